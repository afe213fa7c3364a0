"""Measures error and cost of skyformer_attention for each way of choosing landmarks.

    python -m experiments.benchmarks.landmarks --num_landmarks=16,32,64,128,256 --draws=10

Compares it with the exact kernelized_attention on three generated data sets. The errors are those
with inverse="cholesky", to leave out the error of the iterative inverse; the times are those with
the default inverse="schulz". Writes JSON with commit, versions and hardware, and a plot beside it.
--small uses 128 queries and keys, 16 and 64 landmarks, two draws and one round.
"""

import functools
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
import scipy.sparse.linalg
from absl import flags

from experiments.benchmarks import common_flags
from experiments.benchmarks.timing import as_text, measure_calls
from experiments.records import Row, provenance, write_json
from skyformer_jax import cli
from skyformer_jax.attention.gaussian import gaussian_scores
from skyformer_jax.attention.kernelized import kernelized_attention
from skyformer_jax.attention.landmark_choice import LANDMARKS
from skyformer_jax.attention.skyformer import skyformer_attention
from skyformer_jax.progress import track

_NUM_LANDMARKS = flags.DEFINE_list("num_landmarks", "16,32,64,128,256", "Numbers d of landmarks.")
_DRAWS = flags.DEFINE_integer("draws", 10, "Draws of the random landmarks.", lower_bound=1)
_ROUNDS = common_flags.rounds(15)
_SMALL = common_flags.small()
_OUT = common_flags.out("results/landmarks.json")

_DETERMINISTIC = ("strided", "segment_means")
_EXACT = ("exact", 0)
_LENGTH, _SMALL_LENGTH = 2048, 128  # of queries, and of keys
_HEADS, _HEAD_DIM = 2, 32  # as in the paper
_SEED = 0  # of the data; draw i of the landmarks has seed i

Rows = np.ndarray
Setting = tuple[str, int]  # kind and number of landmarks


# The result quotes the docstrings of these three functions.
def gaussian_data(rng: np.random.Generator, length: int, width: int) -> tuple[Rows, Rows]:
    """Independent normal queries and keys of standard deviation 0.5."""
    return 0.5 * rng.normal(size=(length, width)), 0.5 * rng.normal(size=(length, width))


def clustered_data(rng: np.random.Generator, length: int, width: int) -> tuple[Rows, Rows]:
    """One cluster of about 60 % of the tokens and 60 small ones, all far apart, in random order."""
    num_small = 60
    centres = 2.0 * rng.normal(size=(1 + num_small, width))
    shares = np.array([0.6] + [0.4 / num_small] * num_small)
    deviations = np.where(np.arange(1 + num_small) == 0, 0.3, 0.1)[:, None]

    def draw() -> Rows:
        labels = rng.choice(1 + num_small, length, p=shares)
        return centres[labels] + deviations[labels] * rng.normal(size=(length, width))

    return draw(), draw()


def smooth_data(rng: np.random.Generator, length: int, width: int) -> tuple[Rows, Rows]:
    """A slow walk about the origin (correlation e^(-steps/256)), with small noise of their own."""
    keep = np.exp(-1 / 256)
    walk = rng.normal(size=(length, width))
    for i in range(1, length):
        walk[i] = keep * walk[i - 1] + np.sqrt(1 - keep**2) * walk[i]
    query, key = (walk + 0.1 * rng.normal(size=(length, width)) for _ in range(2))
    return query, key


DATA = {"gaussian": gaussian_data, "clustered": clustered_data, "smooth": smooth_data}


def make_inputs(name: str, length: int) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Draws query, key and normal value of a data set, float32 [1, length, heads, head_dim]."""
    rng = np.random.default_rng([_SEED, list(DATA).index(name)])
    query, key = DATA[name](rng, length, _HEADS * _HEAD_DIM)
    value = rng.normal(size=query.shape)
    shape = (1, length, _HEADS, _HEAD_DIM)
    return tuple(jnp.asarray(x.reshape(shape), jnp.float32) for x in (query, key, value))


def spectral_norms(matrices: np.ndarray) -> np.ndarray:
    """Computes the largest singular values of [heads, rows, columns] by Lanczos iteration.

    The matrices here are length x length, and a full decomposition of these takes too long.
    """
    start = np.random.default_rng(0).normal(size=min(matrices.shape[1:])).astype(matrices.dtype)
    largest = functools.partial(
        scipy.sparse.linalg.svds, k=1, v0=start, return_singular_vectors=False
    )
    return np.concatenate([largest(matrix) for matrix in matrices])


@functools.partial(jax.jit, static_argnames=("kind", "num_landmarks"))
def approximate_matrix(
    query: jax.Array, key: jax.Array, rng: jax.Array, kind: str, num_landmarks: int
) -> jax.Array:
    """Computes skyformer_attention's approximation of the kernel matrix.

    The values are columns of the identity, head_dim at a time; head_dim must divide kv_length. The
    result is [heads, q_length, kv_length].
    """

    def attend(value: jax.Array) -> jax.Array:
        options = {"num_landmarks": num_landmarks, "landmarks": kind, "inverse": "cholesky"}
        return skyformer_attention(query, key, value, rng=rng, **options)

    _, length, heads, head_dim = key.shape
    identity = jnp.eye(length).reshape(1, length, -1, 1, head_dim)
    out = jax.vmap(attend, 2, 2)(jnp.repeat(identity, heads, axis=3))
    return jnp.moveaxis(out[0], 2, 0).reshape(heads, length, length)


def measure_errors(
    settings: list[Setting], inputs: tuple[jax.Array, ...], what: str
) -> dict[Setting, Row]:
    """Measures relative spectral errors of kernel matrix and output, over draws and heads."""
    query, key, value = inputs
    exact = np.asarray(gaussian_scores(query, key, query.shape[-1] ** -0.5)[0])
    values = np.moveaxis(np.asarray(value[0]), 1, 0)  # [heads, length, head_dim]
    norms = spectral_norms(exact), spectral_norms(exact @ values)
    result = {}
    for kind, num in track(settings, len(settings), what, "settings"):
        errors: dict[str, list[float]] = {"kernel_error": [], "output_error": []}
        for draw in range(1 if kind in _DETERMINISTIC else _DRAWS.value):
            matrix = approximate_matrix(query, key, jax.random.key(draw), kind, num)
            error = np.asarray(matrix) - exact
            errors["kernel_error"] += (spectral_norms(error) / norms[0]).tolist()
            errors["output_error"] += (spectral_norms(error @ values) / norms[1]).tolist()
        result[kind, num] = {
            what: {
                "mean": statistics.fmean(found),
                "deviation": statistics.pstdev(found),
                "count": len(found),
            }
            for what, found in errors.items()
        }
    return result


def plot(rows: list[Row], exact_seconds: dict[str, float], path: Path) -> None:
    """Plots kernel error against seconds: a panel per data set, a line per kind, a marker per d."""
    figure, axes = plt.subplots(1, len(DATA), figsize=(14, 4), layout="tight", squeeze=False)
    for axis, name in zip(axes[0], DATA, strict=True):
        for kind, marker in zip(LANDMARKS, "os^Dv", strict=True):
            line = [row for row in rows if (row["data"], row["landmarks"]) == (name, kind)]
            axis.plot(
                [row["median_seconds"] for row in line],
                [row["kernel_error"]["mean"] for row in line],
                marker=marker,
                markersize=5,
                label=kind,
            )
        axis.axvline(exact_seconds[name], color="grey", linestyle=":", label="exact, error 0")
        axis.set(title=name, xscale="log", yscale="log", xlabel="seconds per call")
        axis.grid(which="major", alpha=0.3)
    nums = sorted({row["num_landmarks"] for row in rows})
    axes[0, 0].set_ylabel("relative spectral error of the kernel matrix")
    axes[0, -1].legend(
        title="d = " + ", ".join(map(str, nums)), loc="upper left", bbox_to_anchor=(1.02, 1)
    )
    figure.savefig(path, dpi=100)


def measure(nums_landmarks: Sequence[int], length: int) -> tuple[list[Row], dict[str, Any]]:
    """Returns the rows of all data sets and settings, and the times of exact attention."""
    settings = [(kind, num) for kind in LANDMARKS for num in nums_landmarks]
    inputs = {name: make_inputs(name, length) for name in DATA}

    def attend(kind: str, num: int, query: Any, key: Any, value: Any, rng: Any) -> jax.Array:
        if (kind, num) == _EXACT:
            return kernelized_attention(query, key, value)
        return skyformer_attention(query, key, value, rng=rng, num_landmarks=num, landmarks=kind)

    calls = {
        (name, *setting): (functools.partial(attend, *setting), (*inputs[name], jax.random.key(0)))
        for name in DATA
        for setting in [_EXACT, *settings]
    }
    times = measure_calls(calls, _ROUNDS.value, "times")
    rows = []
    for name in DATA:
        errors = measure_errors(settings, inputs[name], f"{name}, errors")
        for (kind, num), found in errors.items():
            time = times[name, kind, num]
            rows.append(
                {
                    "data": name,
                    "landmarks": kind,
                    "num_landmarks": num,
                    **found,
                    "median_seconds": time["median_seconds"],
                    "fastest_seconds": min(time["seconds"]),
                    "compile_seconds": time["compile_seconds"],
                }
            )
    exact = {name: times[name, *_EXACT] for name in DATA}
    return rows, {
        "median_seconds": {name: row["median_seconds"] for name, row in exact.items()},
        "compile_seconds": statistics.median(row["compile_seconds"] for row in exact.values()),
    }


def main() -> None:
    """Measures times and errors; writes the JSON and the plot, and prints the times."""
    length = _SMALL_LENGTH if _SMALL.value else _LENGTH
    if _SMALL.value:
        common_flags.set_defaults(num_landmarks="16,64", draws=2, rounds=1)
    rows, exact = measure(common_flags.integers(_NUM_LANDMARKS, 2 * length), length)
    print(as_text(rows, "data", "landmarks", "num_landmarks"))
    result = {
        "what": "skyformer_attention against the exact kernelized_attention, by landmarks and "
        "their number: spectral norm of the error relative to that of the exact, of the kernel "
        "matrix and of the output for normal values, mean and standard deviation over draws and "
        'heads, with inverse="cholesky"; seconds of the jitted forward pass with inverse="schulz"',
        "data_source": "generated: "
        + " ".join(f"{name}: {make.__doc__}" for name, make in DATA.items()),
        **provenance(1),
        "small": _SMALL.value,
        "batch_size": 1,
        "length": length,
        "heads": _HEADS,
        "head_dim": _HEAD_DIM,
        "gamma": 0.1,
        "num_iterations": 6,
        "seed": _SEED,
        "draws": {kind: 1 if kind in _DETERMINISTIC else _DRAWS.value for kind in LANDMARKS},
        "draw_seeds": list(range(_DRAWS.value)),
        "rounds": _ROUNDS.value,
        "exact": exact,
        "rows": rows,
    }
    path = Path(_OUT.value)
    write_json(path, result)
    plot(rows, exact["median_seconds"], path.with_suffix(".png"))


if __name__ == "__main__":
    cli.run(main)
