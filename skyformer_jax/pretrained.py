"""Models that were trained and released: a folder with parameters, config and test result.

The parameters are a .npz file of plain arrays, which is read without pickle. Nothing but the core
is needed to load them.
"""

import json
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import flax.linen as nn
import numpy as np
from flax import traverse_util

from skyformer_jax.errors import UserError
from skyformer_jax.models import build_model

PARAMETERS = "parameters.npz"
CONFIG = "config.json"
RESULT = "result.json"


def load_pretrained(path: str | Path) -> tuple[nn.Module, dict[str, Any]]:
    """The model of a released checkpoint, and its variables.

    model, variables = load_pretrained("checkpoints/text-skyformer")
    logits = model.apply(variables, tokens, mask)

    Args:
      path: folder with parameters.npz and config.json, as those in checkpoints/.

    Returns:
      A models.Classifier or DualClassifier; and {"params": ..., "fixed": ...}, NumPy arrays.

    Raises:
      UserError: if the folder or one of its files is missing or damaged.
    """
    folder = Path(path)
    config = read_config(folder)
    try:
        with np.load(folder / PARAMETERS, allow_pickle=False) as file:
            flat = {name: file[name] for name in file.files}
    except FileNotFoundError:
        raise UserError(f"{folder} has no {PARAMETERS}: it is no released checkpoint") from None
    except (OSError, ValueError, EOFError, zipfile.BadZipFile) as error:
        raise UserError(f"{folder / PARAMETERS} is damaged: {error}") from None
    variables = traverse_util.unflatten_dict(flat, sep="/")
    return build_model(config), {"fixed": {}, **variables}


def read_config(folder: Path) -> dict[str, Any]:
    """The config of a released checkpoint.

    Raises:
      UserError: if it is missing or damaged.
    """
    try:
        config = json.loads((folder / CONFIG).read_text())
        if not {"attention", "model"} <= set(config):
            raise ValueError("it has no attention or no model")
    except FileNotFoundError:
        raise UserError(f"{folder} has no {CONFIG}: it is no released checkpoint") from None
    except ValueError as error:
        raise UserError(f"{folder / CONFIG} is damaged: {error}") from None
    return config


def save_parameters(path: Path, variables: Mapping[str, Any]) -> None:
    """Writes variables as a .npz file of one array for each path, such as params/block_0/...

    Args:
      path: the file to write; its folder exists.
      variables: nested dicts of arrays.
    """
    flat = traverse_util.flatten_dict(dict(variables), sep="/")
    arrays = {name: np.asarray(x) for name, x in flat.items()}
    partial = path.with_name(f"{path.name}.tmp")
    with partial.open("wb") as file:
        np.savez_compressed(file, allow_pickle=False, **arrays)  # type: ignore[arg-type]
    partial.replace(path)
