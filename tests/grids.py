"""Parametrizations over the attentions."""

import pytest

from skyformer_jax import attention


def by_default(*names):
    """Parametrizes a test over all attentions and marks all but the given names as slow."""
    return pytest.mark.parametrize(
        "name",
        [
            name if name in names else pytest.param(name, marks=pytest.mark.slow)
            for name in attention.NAMES
        ],
    )
