"""Configs that come with the package: configs/ in a clone, skyformer_jax/configs in a wheel."""

import importlib.util
import sys
import types
from pathlib import Path

_PACKAGE = Path(__file__).resolve().parent
_FOLDERS = (_PACKAGE / "configs", _PACKAGE.parent / "configs")


def find_config(path: str) -> str:
    """Returns the path itself, or if no such file exists, the shipped config of the same name.

    Args:
      path: FILE or FILE:ARGUMENT, as --config takes it. FILE may be configs/text.py whatever the
        working directory is.
    """
    file, colon, argument = path.partition(":")
    if Path(file).parent != Path("configs") or Path(file).exists():
        return path
    for folder in _FOLDERS:
        if (folder / Path(file).name).is_file():
            return f"{folder / Path(file).name}{colon}{argument}"
    return path


def make_configs_importable() -> None:
    """Lets config files import from configs, which is on Python's path only in a clone."""
    if "configs" in sys.modules or importlib.util.find_spec("configs") is not None:
        return
    for folder in _FOLDERS:
        if (folder / "common.py").is_file():
            package = types.ModuleType("configs")
            package.__path__ = [str(folder)]
            sys.modules["configs"] = package
            return
