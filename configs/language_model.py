"""A byte-level language model: trains in parallel, decodes with the state of the attention.

Data: the bytes of the text in the folder --text, such as aclImdb/, or by default of the sources and
pages of this repository. The last twentieth is held out.

Bits per byte depend on the text; a uniform guess has 8. Kernelized attention and Skyformer
normalize rows by their sums here. Otherwise the outputs at late positions would be sums over more
keys than at early ones, and would grow further beyond the length of training.

Landmarks are fixed, so they cannot distinguish near positions from far ones, as the queries and
keys of the other attentions do by rotary positions. A short convolution of the values gives
Skyformer access to the last bytes.

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
    """Returns the config of an attention; models differ in size only by Skyformer's landmarks.

    Args:
      name: one of DECODABLE, or skyformer-conv: Skyformer with a causal convolution of 5 values.
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
