"""A byte-level language model: train in parallel, decode with the state of the attention.

Data: bytes of any text, of which the last twentieth is held out: of the folder that --text names,
such as aclImdb/, or else the sources and pages of this repository.

Bits per byte depend on the text; a uniform guess has 8. Kernelized attention and Skyformer divide
rows by their sums here: without, the outputs of late positions are sums over more keys than those
of early ones, and a model meets greater sums beyond the length that it was trained on.

Fixed landmarks cannot tell near positions from far ones, as queries and keys of the other
attentions do by rotary positions. A short convolution of the values gives Skyformer the last bytes.

    python -m experiments.language_model --attentions=softmax,kernelized,skyformer,skyformer-conv
"""

import ml_collections

from skyformer_jax.attention.decoding import DECODABLE
from skyformer_jax.errors import one_of

_OPTIONS = {
    "kernelized": {"normalize": True},
    "skyformer": {"landmarks": "learned", "num_landmarks": 64, "normalize": True},
}
_CONV_SIZE = 5


def get_config(name: str = "skyformer-conv") -> ml_collections.ConfigDict:
    """The config of an attention; the models have equal size, but for Skyformer's landmarks.

    Args:
      name: one of DECODABLE, or skyformer-conv, Skyformer with a causal convolution of 5 values.
    """
    attention, _, conv = name.partition("-")
    one_of("attention", name, (*DECODABLE, "skyformer-conv"))
    options = {**_OPTIONS.get(attention, {}), **({"conv_size": _CONV_SIZE} if conv else {})}
    return ml_collections.ConfigDict(
        {
            "attention": {"name": attention, **options},
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
