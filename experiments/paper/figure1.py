"""Measures the error of each approximation of softmax attention, the paper's figure 1.

    python -m experiments.paper.figure1                          # on an accelerator
    python -m experiments.paper.figure1 --small --set=data.source=DIR

Queries, keys and values are those of the layers of a Text model with softmax attention, as it is
initialised, and as it is trained here (in --dir; training resumes where it stopped). The inputs are
reviews of at least a length, in bytes, cut to it. Each approximation computes the attention of the
same arrays with each number of features:

    skyformer      landmarks; its method applied to the softmax kernel, as in the paper, see
                   analysis.py
    nystromformer  landmarks (without its convolution)
    linformer      rows of its projections, random as at the start of training
    performer      random features
    informer       active queries, and sampled keys
    bigbird        keys of a query: blocks of an eighth of that, two global, three of the window and
                   three random

Reformer is left out: it uses one array as queries and keys, so exact attention is not its limit.
Random approximations are drawn --draws times.

Lengths beyond that of the trained model, which is 256 with --small, are measured with initialised
weights only, because the trained table of positions ends there.

Writes --out after each length: spectral norms of the error of a head's output, absolute and over
that of the exact output, summarised over examples, layers, heads and draws ("failed" is the number
of errors that were not finite, which are left out); and the picture beside it. Started again, it
measures the missing lengths.
"""

import functools
import itertools
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np
from absl import flags

from configs import text
from experiments.benchmarks.common_flags import integers
from experiments.paper import analysis, grid
from experiments.paper.first_steps import model_inputs, one_device_run
from experiments.paper.report import pictures
from experiments.records import Row, provenance, resume, write_json
from skyformer_jax import cli, training
from skyformer_jax.attention import ATTENTIONS
from skyformer_jax.data.batches import make_batch
from skyformer_jax.data.examples import Examples
from skyformer_jax.errors import UserError
from skyformer_jax.progress import say, track
from skyformer_jax.training import checkpoints
from skyformer_jax.training.run import Run
from skyformer_jax.training.state import init_states, state_spec, take

_SMALL = flags.DEFINE_bool("small", False, "The reduced setting for a CPU: a smaller model.")
_LENGTHS = flags.DEFINE_list("lengths", "128,256,512,1024,2048,4096", "Tokens of a sequence.")
_FEATURES = flags.DEFINE_list("features", "16,32,64,128,256", "Numbers of features.")
_EXAMPLES = flags.DEFINE_integer("examples", 4, "Reviews of each length.", lower_bound=1)
_DRAWS = flags.DEFINE_integer("draws", 4, "Draws of random approximations.", lower_bound=1)
_SEED = flags.DEFINE_integer("seed", 0, "Seed of the model; draw i uses key i.", lower_bound=0)
_SET = flags.DEFINE_multi_string("set", [], "FIELD=VALUE, an override of the config.")
_DIR = flags.DEFINE_string("dir", "runs/figure1", "Folder of the trained model.")
_OUT = flags.DEFINE_string(
    "out", "results/figure1.json", "JSON to write; the plot gets the suffix .png."
)

Arrays = tuple[np.ndarray, np.ndarray, np.ndarray]


def approximations(num_features: int, length: int) -> dict[str, Callable[..., jax.Array]]:
    """Returns each approximation as a function of query, key, value and rng."""
    options = {
        "nystromformer": {"num_landmarks": num_features},
        "linformer": {"num_features": num_features},
        "performer": {"num_features": num_features},
        "informer": {"num_active_queries": num_features, "num_sampled_keys": num_features},
    }
    block_size = max(1, num_features // 8)
    if length >= 8 * block_size:
        options["bigbird"] = {"block_size": block_size}
    skyformer = functools.partial(analysis.skyformer_of_softmax, num_landmarks=num_features)
    return {"skyformer": skyformer} | {
        name: functools.partial(ATTENTIONS[name], **of_name) for name, of_name in options.items()
    }


def texts(run: Run, split: Examples, length: int) -> tuple[jax.Array, jax.Array]:
    """Returns tokens and mask of the first reviews with the length, cut to it, without padding."""
    rows = np.flatnonzero(split.lengths[:, 0] >= length)[: _EXAMPLES.value]
    if len(rows) < _EXAMPLES.value:
        raise UserError(
            f"--lengths: only {len(rows)} validation reviews have {length} bytes, of "
            f"--examples={_EXAMPLES.value}; ask for shorter or fewer ones"
        )
    return model_inputs(run, make_batch(split.cut(length), rows, length))


def layer_inputs(model: Any, variables: Any, tokens: jax.Array, mask: jax.Array) -> list[Arrays]:
    """Returns query, key and value, [1, length, heads, head_dim], of each example and layer."""

    @jax.jit
    def arrays_of(tokens: jax.Array, mask: jax.Array) -> list[tuple[jax.Array, ...]]:
        names = ("query", "key", "value")
        found = [analysis.outputs_of(name, model, variables, tokens, mask) for name in names]
        return list(zip(*found, strict=True))

    # One example at a time, to limit the memory of exact attention.
    return [
        jax.device_get(arrays)
        for i in range(len(tokens))
        for arrays in arrays_of(tokens[i : i + 1], mask[i : i + 1])
    ]


def measure(inputs: list[Arrays], features: list[int], what: str) -> list[Row]:
    """Measures errors by approximation and number of features on arrays of one length."""
    length = inputs[0][0].shape[1]
    exact = [np.asarray(jax.jit(ATTENTIONS["softmax"])(*arrays)) for arrays in inputs]
    norms = np.array([analysis.spectral_norm(np.moveaxis(x, 2, 1)) for x in exact])
    settings = [
        (name, num_features, attend)
        for num_features in features
        for name, attend in approximations(num_features, length).items()
    ]
    rows = []
    for name, num_features, attend in track(settings, len(settings), what, "settings"):
        attend, draws = jax.jit(attend), 1 if name == "nystromformer" else _DRAWS.value
        relative = np.array(
            [
                [
                    analysis.spectral_error(attend(*arrays, rng=jax.random.key(draw)), reference)
                    for draw in range(draws)
                ]
                for arrays, reference in zip(inputs, exact, strict=True)
            ]
        )  # [examples and layers, draws, 1, heads]
        finite = np.isfinite(relative)
        found = relative[finite]
        errors = {
            "mean": float(found.mean()),
            "median": float(np.median(found)),
            "standard_deviation": float(found.std(ddof=1)),
            "count": len(found),
        }
        rows.append(
            {
                "attention": name,
                "num_features": num_features,
                "relative_error": errors,
                "absolute_error": float((relative * norms[:, None])[finite].mean()),
                "failed": int((~finite).sum()),
            }
        )
    return rows


def trained_model(cell: grid.Cell) -> tuple[Any, Any, dict[str, Any]]:
    """Trains the model of the cell; returns it, its variables and a description of the training."""
    config = grid.parse_config(cell.arguments)
    result = training.train(config, cell.workdir)
    if result is None:
        sys.exit(1)  # a signal stopped the training, which said so
    run = one_device_run(config)
    folder = cell.workdir / "checkpoints"
    state, _ = checkpoints.restore(folder, result["checkpoint"], state_spec(run))
    about = {
        "steps": config.train.num_steps,
        "batch_size": config.train.batch_size,
        "length": config.model.max_length,
        **{key: result[key] for key in ("checkpoint", "accuracy", "data")},
        "departures": cell.departures,
    }
    return run.model, state.variables, about


def main() -> None:
    """Trains if necessary, measures length after length, and writes JSON and picture after each."""
    lengths, features = integers(_LENGTHS), integers(_FEATURES)
    small, reduced = ("small", grid.shorter(["text"])) if _SMALL.value else ("", [])
    (cell,) = grid.make_grid(
        *(["text"], ["softmax"], [str(_SEED.value)]),
        *(small, [*reduced, *_SET.value], Path(_DIR.value)),
    )
    *trained, about = trained_model(cell)
    full = text.get_config("softmax")
    full.seed = _SEED.value
    initial = one_device_run(full)
    models = {
        "initialised": (initial.model, take(init_states(initial).variables, 0)),
        "trained": trained,
    }
    config = grid.parse_config(cell.arguments)
    config.data.length = max(lengths)
    config.model.max_length = max(config.model.max_length, *lengths)
    run = one_device_run(config)
    validation = run.load_split("validation")

    header = {
        "what": "spectral norm of the error of approximations of softmax attention over that of "
        "its output, for each head, by number of features and length",
        **provenance(1),
        "seed": _SEED.value,
        "examples": _EXAMPLES.value,
        "draws": _DRAWS.value,
        "features": features,
        "data": {**about["data"], "checksum": validation.checksum()},
        "training": about,
    }
    path = Path(_OUT.value)
    rows = resume(path, header)
    done = {(row["weights"], row["length"]) for row in rows}
    for weights, length in itertools.product(models, lengths):
        model, variables = models[weights]
        if (weights, length) in done:
            continue
        if length > model.max_length:
            say(f"{weights} weights: positions end at {model.max_length}; skipped length {length}")
            continue
        inputs = layer_inputs(model, variables, *texts(run, validation, length))
        found = measure(inputs, features, f"{weights} weights, {length} tokens")
        rows += [{"weights": weights, "length": length, **row} for row in found]
        result = {**header, "rows": rows}
        write_json(path, result)
        pictures.figure1(result, path.with_suffix(".png"))


if __name__ == "__main__":
    cli.run(main)
