"""Time and temporaries of each attention function against the length, side by side.

    python -m experiments.benchmarks.speed --lengths=1024,2048,4096,8192,16384

Forward pass and gradients (of a weighted sum of the output, by query, key, value and what is
trained), on normal inputs without padding. Every function is compiled ahead of time, which is
timed apart, and is given what a layer would give it in training: the arrays that it keeps, and a
key where training draws anew in every step, so that drawing Skyformer's landmarks, Informer's
sample and Reformer's hashes is in the time. At each length the functions take turns in one
process, and medians are reported. Temporaries are what the compiled program says it needs; where
XLA fuses them away from sight on a CPU, XLA_FLAGS=--xla_cpu_experimental_ynn_fusion_type= shows
them.

Writes JSON after each length, with commit, versions and hardware, and a plot beside it. Started
again after an interruption, it goes on with the lengths that are missing.
"""

import os
from pathlib import Path

import jax
from absl import flags
from skyformer_jax.config import one_of

from experiments.benchmarks import attention_cells
from experiments.provenance import provenance
from skyformer_jax import attention, cli
from skyformer_jax.errors import UserError

_ATTENTIONS = flags.DEFINE_list("attentions", None, "Which; default: all.")
_LENGTHS = flags.DEFINE_list("lengths", "1024,2048,4096,8192,16384", "Tokens of a sequence.")
_BATCH = flags.DEFINE_integer("batch", 1, "Sequences in a call.", lower_bound=1)
_HEADS = flags.DEFINE_integer("heads", 2, "Heads.", lower_bound=1)
_HEAD_DIM = flags.DEFINE_integer("head_dim", 32, "Size of a head.", lower_bound=1)
_DTYPES = flags.DEFINE_list("dtypes", "float32", "Of query, key and value; also bfloat16.")
_PASSES = flags.DEFINE_list("passes", "forward,gradients", "Which.")
_ROUNDS = flags.DEFINE_integer("rounds", 5, "Turns that each takes.", lower_bound=1)
_MAX_SECONDS = flags.DEFINE_float(
    "max_seconds", 30, "What takes longer is timed once, and not at greater lengths.", lower_bound=0
)
_MAX_TEMPORARIES = flags.DEFINE_float(
    "max_temporaries",
    None,
    "GiB; what needs more is not run. Default: half of a CPU's memory, all that a GPU gives.",
    lower_bound=0,
)
_OUT = flags.DEFINE_string("out", "results/speed_cpu.json", "JSON to write; the plot has .png.")


def main() -> None:
    """Measures, plots, and prints the tables."""
    names = _ATTENTIONS.value
    if names is None:
        flash = ["flash"] if jax.default_backend() == "gpu" else []
        names = [*attention.NAMES, "kernelized-dense", *flash]
    try:
        lengths = sorted({int(length) for length in _LENGTHS.value})
    except ValueError:
        lengths = []
    if not lengths or lengths[0] < 1:
        raise UserError(f"--lengths must be positive integers; got {','.join(_LENGTHS.value)}")
    for flag, values, allowed in (
        ("attention", names, attention_cells.ATTENTIONS),
        ("dtype", _DTYPES.value, attention_cells.DTYPES),
        ("pass", _PASSES.value, attention_cells.PASSES),
    ):
        if not values:
            raise UserError(f"no {flag} given; choose of: {', '.join(allowed)}")
        for value in values:
            one_of(flag, value, allowed)
    if _MAX_TEMPORARIES.value is None:
        max_temporaries = attention_cells.device_memory()
    else:
        max_temporaries = _MAX_TEMPORARIES.value * 2**30
    settings = attention_cells.Settings(
        attentions=tuple(names),
        dtypes=tuple(_DTYPES.value),
        passes=tuple(_PASSES.value),
        batch=_BATCH.value,
        heads=_HEADS.value,
        head_dim=_HEAD_DIM.value,
        rounds=_ROUNDS.value,
        max_seconds=_MAX_SECONDS.value,
        max_temporaries=max_temporaries,
    )
    header = {
        "what": "attention functions, compiled: seconds of a call by turns, and bytes that the "
        "program needs; exponents are slopes in log-log from 4096 tokens on",
        **provenance(1),
        "xla_flags": os.environ.get("XLA_FLAGS", ""),
    }
    path = Path(_OUT.value)
    result = attention_cells.measure(settings, lengths, path, header)
    attention_cells.plot(result, path.with_suffix(".png"))
    print(attention_cells.tables(result["cells"]))


if __name__ == "__main__":
    cli.run(main)
