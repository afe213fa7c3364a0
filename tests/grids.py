"""Parametrisations over the attentions."""

import pytest

from skyformer_jax import attention


def by_default(*names):
    """Parametrises a test over all attentions; those that are not named are slow."""
    return pytest.mark.parametrize(
        "name",
        [
            name if name in names else pytest.param(name, marks=pytest.mark.slow)
            for name in attention.NAMES
        ],
    )
