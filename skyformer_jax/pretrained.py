"""Released models: folders with parameters, config and test result.

The parameters are an .npz file of plain arrays, which is read without pickle. Loading needs only
the core package.
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
    """Loads the model of a released checkpoint and its variables.

    For example::

        model, variables = load_pretrained("checkpoints/text-skyformer")
        logits = model.apply(variables, tokens, mask)

    Args:
      path: a folder with parameters.npz and config.json, such as those in checkpoints/.

    Returns:
      A models.Classifier or DualClassifier; and {"params": ..., "fixed": ...} with NumPy arrays.

    Raises:
      UserError: if the folder or one of its files is missing or damaged.
    """
    folder = Path(path)
    config = read_config(folder)
    try:
        with np.load(folder / PARAMETERS, allow_pickle=False) as file:
            flat = {name: file[name] for name in file.files}
    except FileNotFoundError:
        raise UserError(f"{folder} has no {PARAMETERS}: it is not a released checkpoint") from None
    except (OSError, ValueError, EOFError, zipfile.BadZipFile) as error:
        raise UserError(f"{folder / PARAMETERS} is damaged: {error}") from None
    variables = traverse_util.unflatten_dict(flat, sep="/")
    return build_model(config), {"fixed": {}, **variables}


def read_config(folder: Path) -> dict[str, Any]:
    """Reads the config of a released checkpoint.

    Raises:
      UserError: if the config is missing or damaged.
    """
    try:
        config = json.loads((folder / CONFIG).read_text())
        if not {"attention", "model"} <= set(config):
            raise ValueError("it lacks attention or model")
    except FileNotFoundError:
        raise UserError(f"{folder} has no {CONFIG}: it is not a released checkpoint") from None
    except ValueError as error:
        raise UserError(f"{folder / CONFIG} is damaged: {error}") from None
    return config


def save_parameters(path: Path, variables: Mapping[str, Any]) -> None:
    """Writes variables to an .npz file, one array for each path such as params/block_0/...

    Args:
      path: the file to write, in an existing folder.
      variables: nested dicts of arrays.
    """
    flat = traverse_util.flatten_dict(dict(variables), sep="/")
    arrays = {name: np.asarray(x) for name, x in flat.items()}
    partial = path.with_name(f"{path.name}.tmp")
    with partial.open("wb") as file:
        np.savez_compressed(file, allow_pickle=False, **arrays)  # type: ignore[arg-type]
    partial.replace(path)
