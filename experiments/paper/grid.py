"""The cells of a grid of task x attention x seed: the config and the folder of each run.

The reduced setting for a CPU, which every script here has as `--small`, is the variant small of the
configs (a smaller model, shorter texts and images, fewer steps). Where runs are trained to the end,
the fields of `_SHORTER` shorten them further, so that a run takes minutes on one core.
"""

import dataclasses
import importlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import ml_collections
from absl import flags
from ml_collections import config_flags

from skyformer_jax import attention, cli
from skyformer_jax.errors import UserError, one_of
from skyformer_jax.training import config as configs
from skyformer_jax.training.workdir import seed_runs

ROOT = Path(__file__).resolve().parents[2]
_NO_TASKS = ("common", "language_model")
TASKS = ("listops", "text", "retrieval", "image", "pathfinder")  # of the paper's table 1
_FOUND = {path.stem for path in ROOT.glob("configs/*.py")}
CONFIGS = (*TASKS, *sorted(_FOUND - {*TASKS, *_NO_TASKS}))  # in the order of tables
# Prefixes of fields that do not change what is computed, or that do not belong to the setting.
NOT_SETTING = (*configs.MUTABLE_FIELDS, "data.source", "seed")
# Configs that are reductions themselves, and the full config of each.
_FULL = {"quickstart": "listops"}
_FULL_VARIANTS = ("paper", "fast", "ngrams")  # variants of the full task
_SHORTER = tuple(
    f"{config}:{setting}"
    for config, settings in {
        "listops": "train.num_steps=800 train.warmup_steps=80 train.eval_every=100",
        "text": "data.length=256 model.max_length=256 "
        "train.num_steps=800 train.warmup_steps=80 train.eval_every=160",
        "image": "train.num_steps=1000 train.warmup_steps=100 train.eval_every=200",
    }.items()
    for setting in settings.split()
)


@dataclasses.dataclass(frozen=True)
class Cell:
    """A run of the grid.

    `variant` is that of the config, "" for none. `arguments` are those of train.py except the
    workdir, `asked` is what config.json of the run must contain, and `departures` is
    {field: (full setting, here)} for all fields that differ from the full setting.

    The process that trains the cell may train other seeds with it. It has the workdir `run_dir`,
    the arguments `run_arguments`, and `seeds_at_once` seeds. With one seed these are the cell's own
    workdir and arguments.
    """

    config: str
    attention: str
    seed: int
    variant: str
    workdir: Path
    arguments: tuple[str, ...]
    asked: dict[str, Any]
    departures: dict[str, tuple[Any, Any]]
    run_dir: Path
    run_arguments: tuple[str, ...]
    seeds_at_once: int

    @property
    def name(self) -> str:
        """The name for messages: the workdir, as seen from the folder of the grid."""
        return str(self.workdir.relative_to(self.run_dir.parent))


def shorter(configs: Sequence[str]) -> list[str]:
    """Returns the overrides of --small beside the variant small, for these configs."""
    return [setting for setting in _SHORTER if setting.partition(":")[0] in configs]


def make_grid(
    configs: Sequence[str],
    attentions: Sequence[str],
    seeds: Sequence[str],
    variant: str,
    overrides: Sequence[str],
    directory: Path,
    together: bool = False,
) -> list[Cell]:
    """Returns all cells, with their folders in `directory`; overrides are [CONFIG:]FIELD=VALUE.

    The cells are in the order of their seeds, so that the first seed's table is complete first.
    With `together`, one process trains all seeds of a config and attention. This changes nothing
    if there is one seed.

    Raises:
      UserError: for the first value that cannot work, before anything is started.
    """
    configs, attentions = list(dict.fromkeys(configs)), list(dict.fromkeys(attentions))
    for name in configs:
        one_of("config", name, CONFIGS)
    for name in attentions:
        one_of("attention", name, attention.NAMES)
    for seed in seeds:
        if not seed.isdecimal():
            raise UserError(f"--seeds has {seed!r}, which is not a whole number from 0")
    for what, values in (("configs", configs), ("attentions", attentions), ("seeds", seeds)):
        if not values:
            raise UserError(f"--{what} is empty; name at least one, or leave the flag out")
    numbers = list(dict.fromkeys(map(int, seeds)))
    first, last = min(numbers), max(numbers)
    if together and last - first + 1 != len(numbers):
        raise UserError(
            f"--together trains consecutive seeds; --seeds={','.join(seeds)} leaves some out: name "
            "all from the first to the last, or leave out --together"
        )
    settings: dict[str, list[str]] = {config: [] for config in configs}
    for text in overrides:
        owner, setting = _parse_override(text, configs)
        for config in [owner] if owner else configs:
            settings[config].append(setting)
    return [
        _make_cell(
            config,
            name,
            seed,
            range(first, last + 1) if together else range(seed, seed + 1),
            variant,
            settings[config],
            directory,
        )
        for seed in numbers
        for config in configs
        for name in attentions
    ]


def _parse_override(text: str, configs: Sequence[str]) -> tuple[str, str]:
    """Splits [CONFIG:]FIELD=VALUE into the config, "" for all, and FIELD=VALUE."""
    field, equals, value = text.partition("=")
    owner, _, field = field.rpartition(":")
    if not (field and equals):
        raise UserError(f"--set={text} is not [CONFIG:]FIELD=VALUE, as in train.num_steps=100")
    return one_of("config in --set:", owner, configs) if owner else "", f"{field}={value}"


def _make_cell(
    config_name: str,
    attention_name: str,
    seed: int,
    at_once: range,
    variant: str,
    settings: Sequence[str],
    directory: Path,
) -> Cell:
    name = f"{attention_name},{variant}" if variant else attention_name
    of_all_seeds = (
        f"--config={ROOT / 'configs' / config_name}.py:{name}",
        *(f"--config.{setting}" for setting in settings),
    )
    arguments = run_arguments = (*of_all_seeds, f"--config.seed={seed}")
    folder = "-".join(filter(None, (config_name, attention_name, variant)))
    workdir = run_dir = directory / f"{folder}-seed{seed}"
    config = parse_config(arguments)
    if (config.attention.name, config.seed, config.num_seeds) != (attention_name, seed, 1):
        raise UserError("--set cannot set attention.name, seed or num_seeds: each cell has its own")
    configs.check(config, num_devices=1)
    if len(at_once) > 1:
        of_seeds = (f"--config.seed={at_once[0]}", f"--config.num_seeds={len(at_once)}")
        run_arguments = (*of_all_seeds, *of_seeds)
        run_config, run_dir = parse_config(run_arguments), directory / folder
        configs.check(run_config, num_devices=1)
        workdir = seed_runs(run_config, run_dir)[at_once.index(seed)].workdir
    get_full = importlib.import_module(f"configs.{_FULL.get(config_name, config_name)}").get_config
    full = setting_of(
        configs.to_dict(get_full(name if variant in _FULL_VARIANTS else attention_name))
    )
    asked = configs.stored(config)
    here = setting_of(asked)
    return Cell(
        config=config_name,
        attention=attention_name,
        seed=seed,
        variant=variant,
        workdir=workdir,
        arguments=arguments,
        asked=asked,
        departures=departures(full, here),
        run_dir=run_dir,
        run_arguments=run_arguments,
        seeds_at_once=len(at_once),
    )


def parse_config(arguments: Sequence[str]) -> ml_collections.ConfigDict:
    """Returns the config that train.py makes from these arguments."""
    values, argv = flags.FlagValues(), ["train.py", *arguments]
    config = config_flags.DEFINE_config_file("config", flag_values=values, sys_argv=argv)
    cli.parse(values, argv)
    return config.value


def with_settled_kind(asked: dict[str, Any], saved: ml_collections.ConfigDict) -> dict[str, Any]:
    """Returns a stored config with the data.kind of its run, which train.py may have chosen."""
    return {**asked, "data": {**asked["data"], "kind": asked["data"]["kind"] or saved.data.kind}}


def departures(full: dict[str, Any], here: dict[str, Any]) -> dict[str, tuple[Any, Any]]:
    """Returns {field: (in the full setting, here)} for fields that differ, given two settings."""
    return {
        field: (full.get(field), here.get(field))
        for field in sorted(full.keys() | here.keys())
        if full.get(field) != here.get(field)
    }


def setting_of(config: dict[str, Any]) -> dict[str, Any]:
    """Returns the setting in a stored config, as {"train.num_steps": 100, ...}."""
    flat = configs.flatten(config).items()
    return {field: value for field, value in flat if not field.startswith(NOT_SETTING)}
