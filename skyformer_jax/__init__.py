"""Skyformer and its benchmark in JAX and Flax.

The nine attention functions, attention_fn and load_pretrained are imported on first use, so that a
program that needs only a part of the package, or only its version, does not wait for JAX.
"""

from typing import TYPE_CHECKING, Any

__version__ = "0.2.0"

__all__ = [
    "__version__",
    "attention_fn",
    "bigbird_attention",
    "informer_attention",
    "kernelized_attention",
    "linformer_attention",
    "load_pretrained",
    "nystromformer_attention",
    "performer_attention",
    "reformer_attention",
    "skyformer_attention",
    "softmax_attention",
]

if TYPE_CHECKING:
    from skyformer_jax.attention import (
        attention_fn,
        bigbird_attention,
        informer_attention,
        kernelized_attention,
        linformer_attention,
        nystromformer_attention,
        performer_attention,
        reformer_attention,
        skyformer_attention,
        softmax_attention,
    )
    from skyformer_jax.pretrained import load_pretrained


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    if name == "load_pretrained":
        from skyformer_jax.pretrained import load_pretrained

        return load_pretrained
    from skyformer_jax import attention

    return getattr(attention, name)


def __dir__() -> list[str]:
    return __all__
