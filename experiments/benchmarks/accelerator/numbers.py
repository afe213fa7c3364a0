"""Checks the values and gradients of all attentions on a device.

The reference for softmax and kernelized attention is their formula in float64 NumPy. For the
approximations it is the same function on the CPU in float32, which the tests compare with float64
to 1e-5 or better. Both references get the inputs that the device gets, rounded if they are
bfloat16. Informer and Reformer choose keys by comparing numbers, so rounding can change a choice,
and with it the output of a query.

Only one program is compiled at a time, because the XLA of jax 0.11.2 crashed when programs for a
GPU and for the CPU were compiled at once.
"""

import functools
import itertools
import math
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import numpy as np

from experiments.benchmarks import attention_cells
from experiments.benchmarks.timing import attempt
from experiments.records import Row
from skyformer_jax.attention import REGISTRY
from skyformer_jax.progress import say

_BATCH = 2
# Relative error from which on a kernel counts as wrong.
_WRONG = 0.02
_NAMES = ("out", "d_query", "d_key", "d_value")
# Standard deviation and mean of queries and keys, the same in every component. Trained layers have
# means this far from zero.
_INPUTS = {"unit normal": (1.0, 0.0), "std 0.3, offset 3": (0.3, 3.0)}
# Attentions with a float64 formula here, by the first word of their names.
_FLOAT64 = {"softmax": "softmax", "flash": "softmax", "kernelized": "kernelized"}


def _exact(
    form: str, query: np.ndarray, key: np.ndarray, value: np.ndarray, weights: np.ndarray
) -> list[np.ndarray]:
    """Computes softmax or kernelized attention, and the gradients of sum(out * weights).

    All results are float64 [batch, length, heads, head_dim].
    """
    q, k, v, g = (np.moveaxis(x.astype(np.float64), 2, 1) for x in (query, key, value, weights))
    transposed = functools.partial(np.swapaxes, axis1=-1, axis2=-2)
    scale = q.shape[-1] ** -0.5
    scores = q @ transposed(k)
    if form == "softmax":
        s = np.exp(scale * (scores - scores.max(axis=-1, keepdims=True)))
        s /= s.sum(axis=-1, keepdims=True)
        out = s @ v
        w = s * (g @ transposed(v) - (g * out).sum(axis=-1, keepdims=True))
        d_query, d_key = scale * w @ k, scale * transposed(w) @ q
    else:
        norms = [(x * x).sum(axis=-1) for x in (q, k)]
        s = np.exp(scale * (scores - (norms[0][..., :, None] + norms[1][..., None, :]) / 2))
        out = s @ v
        w = s * (g @ transposed(v))
        d_query = scale * (w @ k - w.sum(axis=-1)[..., None] * q)
        d_key = scale * (transposed(w) @ q - w.sum(axis=-2)[..., None] * k)
    return [np.moveaxis(x, 1, 2) for x in (out, d_query, d_key, transposed(s) @ g)]


def _make_program(name: str, settings: attention_cells.Settings, inputs: tuple[Any, ...]) -> Any:
    """Returns a jitted function of (arguments, weights) to the output and the gradients."""
    forward, _ = attention_cells.make_call(name, "forward", settings, inputs)
    gradients, _ = attention_cells.make_call(name, "gradients", settings, inputs)

    def both(arguments: tuple[Any, ...], weights: jax.Array) -> Any:
        return forward(*arguments), gradients(*arguments, weights)[0]

    return jax.jit(both)


class _Check:
    """Checks one attention, by the same programs for all inputs."""

    def __init__(self, name: str, length: int) -> None:
        self._name, self._length = name, length
        self._settings = attention_cells.Settings(
            attentions=(name,),
            dtypes=attention_cells.DTYPES,
            passes=attention_cells.PASSES,
            rounds=1,
            batch=_BATCH,
            **attention_cells.PAPER_HEADS,
        )
        self._program = None

    def _run(self, inputs: tuple[jax.Array, ...], device: jax.Device) -> list[np.ndarray]:
        """Returns the output and the gradients as float64."""
        if self._program is None:
            self._program = _make_program(self._name, self._settings, inputs)
        _, arguments = attention_cells.make_call(self._name, "forward", self._settings, inputs)
        found = self._program(*jax.device_put((arguments, inputs[-1]), device))
        return [np.asarray(x, np.float64) for x in jax.tree.leaves(found)]

    def errors(self, dtype: str, std: float, offset: float) -> dict[str, float]:
        """Returns the relative errors of the output and the gradients."""
        drawn = attention_cells.make_inputs(self._settings, self._length, dtype)
        moved = tuple((std * x + offset).astype(dtype) for x in drawn[:2])
        inputs = (*moved, *drawn[2:])
        found = self._run(inputs, jax.devices()[0])
        wide = tuple(np.asarray(x, np.float32) for x in inputs)
        if self._name.partition("-")[0] in _FLOAT64:
            expected = _exact(_FLOAT64[self._name.partition("-")[0]], *wide)
        else:
            arrays = tuple(jax.device_put(x, jax.devices("cpu")[0]) for x in wide)
            expected = self._run(arrays, jax.devices("cpu")[0])
        names = _NAMES if len(found) == len(_NAMES) else ("out", "d_query", "d_value")
        return {
            which: float(np.linalg.norm(a - b) / np.linalg.norm(b))
            for which, a, b in zip(names, found, expected, strict=True)
        }


def check(length: int, deadline: float) -> Iterator[Row]:
    """Yields a row for each attention, dtype and kind of inputs.

    A row has either errors, the relative errors in the Frobenius norm of the output and of the
    gradients with respect to query, key (except for Reformer, which has no separate key) and
    value; or skipped, the reason why there are none.

    Args:
      length: tokens of a sequence.
      deadline: time.monotonic() after which no check is started.
    """
    for name in attention_cells.ATTENTIONS:
        one = _Check(name, length)
        for dtype, (inputs, moments) in itertools.product(attention_cells.DTYPES, _INPUTS.items()):
            errors, reason = attempt(functools.partial(one.errors, dtype, *moments), deadline)
            row = {"attention": name, "dtype": dtype, "inputs": inputs}
            row |= {"skipped": reason} if reason else {"errors": errors}
            say(_line(row))
            yield row


def implementations(rows: Sequence[Row]) -> dict[str, str]:
    """Chooses the implementation of each attention for training, by the float32 rows of check.

    Returns:
      {attention: implementation} for the attentions that have several implementations: "auto", or
      "chunked", which XLA compiles, if the kernels failed or are wrong. Attentions without a row
      are left out.
    """
    found: dict[str, str] = {}
    for row in rows:
        name = row["attention"]
        if row["dtype"] != "float32" or name not in REGISTRY:
            continue
        if "implementation" in REGISTRY[name].options:
            right = all(error < _WRONG for error in row.get("errors", {"": math.inf}).values())
            found[name] = "auto" if right and found.get(name, "auto") == "auto" else "chunked"
    return found


def _line(row: Row) -> str:
    name = f"{row['attention']:20} {row['dtype']:9} {row['inputs']:18}"
    if "skipped" in row:
        return f"{name} {row['skipped']}"
    return " ".join([name, *(f"{which} {error:.1e}" for which, error in row["errors"].items())])


def as_text(rows: Sequence[Row]) -> str:
    """Formats each row as a line."""
    return "\n".join(map(_line, rows))
