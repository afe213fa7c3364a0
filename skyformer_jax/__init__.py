"""Skyformer and its benchmark in JAX and Flax."""

from skyformer_jax.attention import attention_fn

__all__ = ["attention_fn"]
