r"""Trains byte-level language models with causal attentions, samples from them, times decoding.

    python -m experiments.language_model [--text=FOLDER] [--attentions=softmax,skyformer-conv]

Prints the bits per byte of the held-out text, and the tokens per second and the state size of
decoding after 1k, 16k and 128k tokens. Writes these and a sample as JSON. An attention is not
trained again if the file has it from the same text, software versions, machine and config. --small
trains for a few steps only, to try the script.
"""

import functools
import json
import math
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
import optax
from absl import flags

from configs import language_model as configs
from experiments.records import Row, provenance, resume, write_json
from skyformer_jax import cli
from skyformer_jax.errors import UserError
from skyformer_jax.files import expand
from skyformer_jax.language_model import LanguageModel, generate
from skyformer_jax.progress import say, track

_ROOT = Path(__file__).resolve().parents[1]
_SUFFIXES = (".py", ".md", ".txt")
_NO_TEXT = (".git", "build", "data", "runs")
_ATTENTIONS = flags.DEFINE_list(
    "attentions",
    ["softmax", "kernelized", "skyformer", "skyformer-conv"],
    "Attentions to train, by their names in configs/language_model.py.",
)
_TEXT = flags.DEFINE_string(
    "text", None, "Folder of .txt, .md and .py files; default: this repository."
)
_MEGABYTES = flags.DEFINE_integer(
    "megabytes", 16, "Reading stops after so many MiB.", lower_bound=1
)
_SMALL = flags.DEFINE_bool("small", False, "Train for a few steps only.")
_OUT = flags.DEFINE_string("out", "results/language_model.json", "JSON to write.")


def read_text(folder: Path, megabytes: int) -> np.ndarray:
    """Returns the bytes of a folder's text files, in a fixed random order, uint8 [bytes].

    Subfolders that git and the commands of this repository create (.git, build, data, runs) are
    left out. Reading stops after the file that reaches `megabytes` MiB.
    """
    paths = sorted(p for p in folder.rglob("*") if p.suffix in _SUFFIXES and p.is_file())
    paths = [p for p in paths if p.relative_to(folder).parts[0] not in _NO_TEXT]
    if not paths:
        raise UserError(f"--text={folder} has no {', '.join(_SUFFIXES)} files; name another folder")
    order = np.random.default_rng(0).permutation(len(paths))
    texts, size = [], 0
    for i in order:
        texts.append(paths[i].read_bytes() + b"\n\n")
        size += len(texts[-1])
        if size >= megabytes << 20:
            break
    return np.frombuffer(b"".join(texts), np.uint8)


def make_model(config: ml_collections.ConfigDict) -> LanguageModel:
    """Builds the model of a config."""
    options = dict(config.attention)
    return LanguageModel(options.pop("name"), options, **config.model)


def batches(text: np.ndarray, config: ml_collections.ConfigDict) -> Iterator[np.ndarray]:
    """Yields batches of random windows, uint8 [batch, length + 1], endlessly."""
    rng, train = np.random.default_rng(config.seed), config.train
    while True:
        starts = rng.integers(0, len(text) - train.length, train.batch_size)
        yield np.stack([text[i : i + train.length + 1] for i in starts])


def train(config: ml_collections.ConfigDict, text: np.ndarray) -> tuple[Any, float]:
    """Trains a model; returns its variables and the seconds of the steps, without compilation."""
    settings, model = config.train, make_model(config)
    tokens = jnp.zeros((1, settings.length), jnp.int32)
    variables = jax.jit(model.init)(jax.random.key(config.seed), tokens)
    schedule = optax.warmup_cosine_decay_schedule(
        0.0, settings.learning_rate, settings.warmup_steps, settings.num_steps
    )
    optimizer = optax.chain(
        optax.clip_by_global_norm(1.0),
        optax.adamw(schedule, b2=0.98, weight_decay=settings.weight_decay),
    )
    params, fixed = variables["params"], {k: v for k, v in variables.items() if k != "params"}
    opt_state = optimizer.init(params)

    @functools.partial(jax.jit, donate_argnums=(0, 1))
    def step(params: Any, opt_state: Any, tokens: jax.Array) -> tuple[Any, Any, jax.Array]:
        def loss(params: Any) -> jax.Array:
            logits = model.apply({"params": params, **fixed}, tokens[:, :-1])
            return optax.softmax_cross_entropy_with_integer_labels(logits, tokens[:, 1:]).mean()

        value, gradients = jax.value_and_grad(loss)(params)
        updates, opt_state = optimizer.update(gradients, opt_state, params)
        return optax.apply_updates(params, updates), opt_state, value

    stream, seconds = batches(text, config), 0.0
    for i in track(range(settings.num_steps), settings.num_steps, config.attention.name, "steps"):
        tokens = jnp.asarray(next(stream), jnp.int32)
        start = time.perf_counter()
        params, opt_state, value = step(params, opt_state, tokens)
        value = float(value)
        seconds += time.perf_counter() - start if i else 0.0
        if not math.isfinite(value):
            raise UserError(f"the loss of {config.attention.name} is {value} at step {i + 1}")
        if (i + 1) % 100 == 0:
            say(f"{config.attention.name}: step {i + 1}, {value / math.log(2):.3f} bits per byte")
    return {"params": params, **fixed}, seconds


def bits_per_byte(model: LanguageModel, variables: Any, text: np.ndarray, length: int) -> float:
    """Returns the bits per byte of consecutive windows, each predicted from its own start."""

    @jax.jit
    def nats(tokens: jax.Array) -> jax.Array:
        logits = model.apply(variables, tokens[:, :-1])
        return optax.softmax_cross_entropy_with_integer_labels(logits, tokens[:, 1:]).sum()

    windows = [text[i : i + length + 1] for i in range(0, len(text) - length, length)]
    total = sum(float(nats(jnp.asarray(window[None], jnp.int32))) for window in windows)
    return total / (len(windows) * length * math.log(2))


def time_decoding(model: LanguageModel, variables: Any, length: int, tokens: int) -> Row:
    """Times decoding after `length` tokens; returns the speed and the bytes of the cache.

    The cached keys and values are zeros, because the time does not depend on their values.
    """
    decoder = model.clone(decode=True)
    room = jax.ShapeDtypeStruct((1, length + tokens), jnp.int32)
    shapes = jax.eval_shape(decoder.init, jax.random.key(0), room)["cache"]

    def kept(path: Any, x: jax.ShapeDtypeStruct) -> jax.Array:
        index = getattr(path[-1], "key", None) == "index"
        return jnp.full(x.shape, length if index else 0, x.dtype)

    cache = jax.tree_util.tree_map_with_path(kept, shapes)
    size = sum(x.nbytes for x in jax.tree.leaves(cache))

    @functools.partial(jax.jit, donate_argnums=0)
    def step(cache: Any, token: jax.Array) -> tuple[Any, jax.Array]:
        given = {**variables, "cache": cache}
        logits, changed = decoder.apply(given, token, mutable=["cache"])
        return changed["cache"], logits[:, -1:].argmax(axis=-1)

    cache, token = step(cache, jnp.zeros((1, 1), jnp.int32))
    times = []
    for _ in range(tokens - 1):
        start = time.perf_counter()
        cache, token = jax.block_until_ready(step(cache, token))
        times.append(time.perf_counter() - start)
    return {
        "length": length,
        "tokens_per_second": round(1 / float(np.median(times)), 1),
        "state_bytes": size,
    }


def measure(
    name: str, config: ml_collections.ConfigDict, text: np.ndarray, lengths: list[int]
) -> Row:
    """Trains and measures one attention; returns its row."""
    held_out = len(text) - len(text) // 20
    variables, seconds = train(config, text[:held_out])
    model = make_model(config)
    prompt = text[held_out : held_out + 64]
    sample = generate(
        model,
        variables,
        jnp.asarray(prompt[None], jnp.int32),
        200,
        jax.random.key(config.seed),
        temperature=0.7,
    )
    return {
        "attention": name,
        "parameters": sum(x.size for x in jax.tree.leaves(variables["params"])),
        "bits_per_byte": round(
            bits_per_byte(model, variables, text[held_out:], config.train.length), 4
        ),
        "training_seconds": round(seconds, 1),
        "sample": {
            "prompt": prompt.tobytes().decode(errors="replace"),
            "text": np.asarray(sample[0], np.uint8).tobytes().decode(errors="replace"),
        },
        "decoding": [time_decoding(model, variables, length, 24) for length in lengths],
        "config": _stored(config),
    }


def _stored(config: ml_collections.ConfigDict) -> dict[str, Any]:
    return json.loads(config.to_json_best_effort())


def main() -> None:
    """Measures each attention that the file lacks, and prints the table."""
    folder = expand(_TEXT.value) if _TEXT.value else _ROOT
    text = read_text(folder, _MEGABYTES.value)
    lengths = [64, 256] if _SMALL.value else [1 << 10, 1 << 14, 1 << 17]
    header = {
        "what": "byte-level language models of equal size with causal attentions",
        **provenance(jax.device_count()),
        "text": {"name": folder.name if _TEXT.value else "this repository", "bytes": len(text)},
        "small": _SMALL.value,
    }
    out = Path(_OUT.value)
    rows = resume(out, header, any_commit=True)
    for name in _ATTENTIONS.value:
        config = configs.get_config(name)
        if _SMALL.value:
            config.train.update({"length": 64, "num_steps": 5, "warmup_steps": 1, "batch_size": 2})
        if any((row["attention"], row["config"]) == (name, _stored(config)) for row in rows):
            continue
        rows = [row for row in rows if row["attention"] != name]
        row = measure(name, config, text, lengths)
        rows.append({"commit": header["commit"], **row})
        write_json(out, {**header, "rows": rows})
    for row in rows:
        speeds = "  ".join(
            f"{one['length']:,}: {one['tokens_per_second']:,.0f} tokens/s, "
            f"{one['state_bytes'] / 1024:,.0f} KiB"
            for one in row["decoding"]
        )
        print(f"{row['attention']:14} {row['bits_per_byte']:.3f} bits per byte   {speeds}")


if __name__ == "__main__":
    cli.run(main)
