"""Training and evaluation of the model that a config describes, in a workdir."""

from skyformer_jax.training.evaluation import evaluate
from skyformer_jax.training.loop import train
from skyformer_jax.training.released import evaluate_released, release
from skyformer_jax.training.results import result_table

__all__ = ["evaluate", "evaluate_released", "release", "result_table", "train"]
