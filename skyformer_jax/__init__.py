"""Skyformer and its benchmark in JAX and Flax."""
