"""Training and evaluation: a config and a workdir in, parameters and numbers out."""

from skyformer_jax.training.evaluation import evaluate, table
from skyformer_jax.training.loop import train

__all__ = ["evaluate", "table", "train"]
