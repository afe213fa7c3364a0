"""A byte-level language model: train in parallel, decode with the state of the attention.

Data: bytes of any text, of which the last twentieth is held out: of the folder that --text names,
such as aclImdb/, or else the sources and pages of this repository.

Bits per byte depend on the text; a uniform guess has 8. Kernelized attention and Skyformer divide
rows by their sums here: without, the outputs of late positions are sums over more keys than those
of early ones, and a model meets greater sums beyond the length that it was trained on.

    python -m experiments.language_model --attentions=softmax,kernelized,skyformer
"""

import ml_collections

from skyformer_jax.attention.decoding import DECODABLE
from skyformer_jax.errors import one_of

_OPTIONS = {
    "kernelized": {"normalize": True},
    "skyformer": {"landmarks": "learned", "num_landmarks": 64, "normalize": True},
}


def get_config(attention: str = "skyformer") -> ml_collections.ConfigDict:
    """The config of an attention; the models have equal size, but for Skyformer's landmarks."""
    one_of("attention", attention, DECODABLE)
    return ml_collections.ConfigDict(
        {
            "attention": {"name": attention, **_OPTIONS.get(attention, {})},
            "model": {
                "num_layers": 2,
                "width": 128,
                "num_heads": 4,
                "head_dim": 32,
                "mlp_dim": 512,
            },
            "train": {
                "length": 512,
                "batch_size": 8,
                "num_steps": 800,
                "warmup_steps": 80,
                "learning_rate": 3e-3,
                "weight_decay": 0.01,
            },
            "seed": 0,
        }
    )
