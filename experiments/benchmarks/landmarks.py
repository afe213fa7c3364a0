"""Error against cost of skyformer_attention for each way of choosing landmarks.

    python -m experiments.benchmarks.landmarks --num_landmarks=16,32,64,128,256 --draws=10

Compares with the exact kernelized_attention on three generated data sets. The errors are those of
inverse="cholesky", so that nothing of the iterative inverse's own error is mixed in; the times are
those of the default inverse="schulz". Writes JSON with commit, versions and hardware, and a plot
beside it.
"""

import functools
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
from absl import flags

from experiments.provenance import provenance, write_json
from skyformer_jax import cli
from skyformer_jax.attention.gaussian import gaussian_scores, kernelized_attention
from skyformer_jax.attention.skyformer import LANDMARKS, skyformer_attention
from skyformer_jax.errors import UserError
from skyformer_jax.progress import track

_LENGTH = flags.DEFINE_integer("length", 2048, "Queries, and keys.", lower_bound=2)
_HEADS = flags.DEFINE_integer("heads", 2, "Heads.", lower_bound=1)
_HEAD_DIM = flags.DEFINE_integer("head_dim", 32, "Size of a head.", lower_bound=1)
_NUM_LANDMARKS = flags.DEFINE_list("num_landmarks", "16,32,64,128,256", "Which d to compare.")
_DRAWS = flags.DEFINE_integer("draws", 10, "Draws of the random landmarks.", lower_bound=1)
_ROUNDS = flags.DEFINE_integer("rounds", 15, "Calls timed of each kind and d.", lower_bound=1)
_SEED = flags.DEFINE_integer("seed", 0, "Of the data; draw i of the landmarks has seed i.")
_OUT = flags.DEFINE_string("out", "results/landmarks.json", "JSON to write; the plot has .png.")

_DETERMINISTIC = ("strided", "segment_means")
# Largest singular values are found by so many steps of power iteration on a block of so many
# vectors; on the data here within 0.3 % of those of a full decomposition.
_POWER_STEPS = 12
_POWER_BLOCK = 8

Rows = np.ndarray
Call = Callable[[jax.Array, jax.Array, jax.Array, jax.Array], jax.Array]


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


def make_inputs(name: str) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Query, key and normal value of one data set, float32 [1, length, heads, head_dim]."""
    rng = np.random.default_rng([_SEED.value, list(DATA).index(name)])
    shape = (1, _LENGTH.value, _HEADS.value, _HEAD_DIM.value)
    query, key = DATA[name](rng, _LENGTH.value, _HEADS.value * _HEAD_DIM.value)
    value = rng.normal(size=shape)
    return tuple(jnp.asarray(x.reshape(shape), jnp.float32) for x in (query, key, value))


def spectral_norm(matrices: np.ndarray) -> np.ndarray:
    """Largest singular values of [..., rows, columns], by block power iteration.

    For matrices of length x length, which analysis.spectral_norm would decompose in full.
    """
    num_columns = matrices.shape[-1]
    block = np.random.default_rng(0).normal(
        size=(*matrices.shape[:-2], num_columns, min(_POWER_BLOCK, num_columns))
    )
    block = block.astype(matrices.dtype)
    for _ in range(_POWER_STEPS):
        image = np.linalg.qr(matrices @ block)[0]
        block = np.linalg.qr(np.swapaxes(matrices, -1, -2) @ image)[0]
    return np.linalg.svd(matrices @ block, compute_uv=False)[..., 0]


def kernel_matrix(attend: Call, key: jax.Array) -> jax.Array:
    """The [heads, q_length, kv_length] by which an attention multiplies the values.

    It is read off with the columns of the identity, head_dim at a time, as values.

    Args:
      attend: from a value of key's shape to the output.
      key: [1, kv_length, heads, head_dim].
    """
    _, length, heads, head_dim = key.shape
    pieces = -(-length // head_dim)
    identity = jnp.eye(length, pieces * head_dim).reshape(length, pieces, head_dim)
    values = jnp.moveaxis(identity, 1, 0)[:, None, :, None]  # [pieces, 1, length, 1, head_dim]
    values = jnp.broadcast_to(values, (pieces, 1, length, heads, head_dim))
    out = jax.vmap(attend)(values)[:, 0]  # [pieces, length, heads, head_dim]
    return jnp.moveaxis(out, 2, 0).transpose(0, 2, 1, 3).reshape(heads, length, -1)[..., :length]


@functools.partial(jax.jit, static_argnames=("kind", "num_landmarks"))
def approximate_matrix(
    query: jax.Array, key: jax.Array, rng: jax.Array, kind: str, num_landmarks: int
) -> jax.Array:
    """What skyformer_attention has in place of the kernel matrix, [heads, q_length, kv_length]."""
    attend = functools.partial(
        skyformer_attention,
        query,
        key,
        rng=rng,
        num_landmarks=num_landmarks,
        landmarks=kind,
        inverse="cholesky",
    )
    return kernel_matrix(attend, key)


def measure_errors(
    settings: list[tuple[str, int]], inputs: tuple[jax.Array, ...], what: str
) -> dict[tuple[str, int], dict[str, list[float]]]:
    """Relative spectral errors of kernel matrix and output by kind and d, one a draw and head."""
    query, key, value = inputs
    exact = np.asarray(gaussian_scores(query, key, query.shape[-1] ** -0.5)[0])
    values = np.moveaxis(np.asarray(value[0]), 1, 0)  # [heads, length, head_dim]
    norms = spectral_norm(exact), spectral_norm(exact @ values)
    result = {}
    for kind, num in track(settings, len(settings), what, "settings"):
        kernel, output = [], []
        for draw in range(1 if kind in _DETERMINISTIC else _DRAWS.value):
            matrix = approximate_matrix(query, key, jax.random.key(draw), kind, num)
            error = np.asarray(matrix) - exact
            kernel += (spectral_norm(error) / norms[0]).tolist()
            output += (spectral_norm(error @ values) / norms[1]).tolist()
        result[kind, num] = {"kernel": kernel, "output": output}
    return result


def compile_calls(
    nums_landmarks: list[int], inputs: tuple[jax.Array, ...]
) -> tuple[dict[tuple[str, int], Call], dict[tuple[str, int], float]]:
    """The calls to time, by kind and d, and what compiling each took; ("exact", 0) is exact."""
    calls, seconds = {}, {}
    settings = [("exact", 0)] + [(kind, num) for num in nums_landmarks for kind in LANDMARKS]
    for kind, num in track(settings, len(settings), "compiling", "programs"):

        def call(
            query: jax.Array,
            key: jax.Array,
            value: jax.Array,
            rng: jax.Array,
            kind: str = kind,
            num: int = num,
        ) -> jax.Array:
            if kind == "exact":
                return kernelized_attention(query, key, value)
            return skyformer_attention(
                query, key, value, rng=rng, num_landmarks=num, landmarks=kind
            )

        start = time.perf_counter()
        calls[kind, num] = jax.jit(call).lower(*inputs, jax.random.key(0)).compile()
        seconds[kind, num] = time.perf_counter() - start
    return calls, seconds


def measure_seconds(
    calls: dict[tuple[str, int], Call], inputs: tuple[jax.Array, ...], what: str
) -> dict[tuple[str, int], list[float]]:
    """Seconds of each call in each round; the calls take turns, and round -1 warms them."""
    seconds = {setting: [] for setting in calls}
    for turn in track(range(-1, _ROUNDS.value), _ROUNDS.value + 1, what, "rounds"):
        rng = jax.random.key(turn + 1)
        for setting, call in calls.items():
            start = time.perf_counter()
            jax.block_until_ready(call(*inputs, rng))
            if turn >= 0:
                seconds[setting].append(time.perf_counter() - start)
    return seconds


def plot(rows: list[dict[str, Any]], exact_seconds: dict[str, float], path: Path) -> None:
    """One panel a data set: kernel error against seconds, a line a kind, a marker a d."""
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


def main() -> None:
    """Measures errors, then times; writes the JSON and the plot, and prints a table."""
    try:
        nums_landmarks = sorted({int(num) for num in _NUM_LANDMARKS.value})
    except ValueError:
        raise UserError(
            f"--num_landmarks must be integers; got {','.join(_NUM_LANDMARKS.value)}"
        ) from None
    if not nums_landmarks or not 1 <= nums_landmarks[0] <= nums_landmarks[-1] <= 2 * _LENGTH.value:
        raise UserError(
            f"--num_landmarks must be in 1..{2 * _LENGTH.value} (queries and keys); "
            f"got {','.join(_NUM_LANDMARKS.value)}"
        )
    path = Path(_OUT.value)
    path.parent.mkdir(parents=True, exist_ok=True)
    inputs = {name: make_inputs(name) for name in DATA}

    calls, compile_seconds = compile_calls(nums_landmarks, inputs["gaussian"])
    seconds = {name: measure_seconds(calls, inputs[name], f"{name}, times") for name in DATA}
    exact_seconds = {name: statistics.median(seconds[name]["exact", 0]) for name in DATA}
    rows = []
    for name in DATA:
        settings = [(kind, num) for kind in LANDMARKS for num in nums_landmarks]
        measured = measure_errors(settings, inputs[name], f"{name}, errors")
        for (kind, num), found in measured.items():
            row = {"data": name, "landmarks": kind, "num_landmarks": num}
            for what, errors in found.items():
                row[f"{what}_error"] = {
                    "mean": statistics.fmean(errors),
                    "deviation": statistics.pstdev(errors),
                    "count": len(errors),
                }
            row["median_seconds"] = statistics.median(seconds[name][kind, num])
            row["fastest_seconds"] = min(seconds[name][kind, num])
            row["compile_seconds"] = compile_seconds[kind, num]
            rows.append(row)
    for row in rows:
        print(
            f"{row['data']:10}{row['landmarks']:15}{row['num_landmarks']:5}"
            f"   kernel {row['kernel_error']['mean']:.5f} +- {row['kernel_error']['deviation']:.5f}"
            f"   output {row['output_error']['mean']:.5f} +- {row['output_error']['deviation']:.5f}"
            f"{1000 * row['median_seconds']:9.1f} ms"
        )
    for name in DATA:
        print(f"{name:10}exact{1000 * exact_seconds[name]:9.1f} ms")
    result = {
        "what": "skyformer_attention against the exact kernelized_attention, by landmarks and "
        "their number: spectral norm of the error relative to that of the exact, of the kernel "
        "matrix and of the output for normal values, mean and standard deviation over draws and "
        'heads, with inverse="cholesky"; seconds of the jitted forward pass with inverse="schulz"',
        "data_source": "generated: "
        + " ".join(f"{name}: {make.__doc__}" for name, make in DATA.items()),
        **provenance(1),
        "batch_size": 1,
        "length": _LENGTH.value,
        "heads": _HEADS.value,
        "head_dim": _HEAD_DIM.value,
        "gamma": 0.1,
        "num_iterations": 6,
        "seed": _SEED.value,
        "draws": {kind: 1 if kind in _DETERMINISTIC else _DRAWS.value for kind in LANDMARKS},
        "draw_seeds": list(range(_DRAWS.value)),
        "rounds": _ROUNDS.value,
        "exact": {"median_seconds": exact_seconds, "compile_seconds": compile_seconds["exact", 0]},
        "rows": rows,
    }
    write_json(path, result)
    plot(rows, exact_seconds, path.with_suffix(".png"))


if __name__ == "__main__":
    cli.run(main)
