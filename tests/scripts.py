"""The scripts of experiments/ as modules."""

import importlib

from absl import flags


def import_script(name):
    """experiments/NAME.py without its flags, since other scripts' flags have the same names."""
    before = set(flags.FLAGS)
    module = importlib.import_module(f"experiments.{name}")
    flags.FLAGS.remove_flag_values(set(flags.FLAGS) - before)
    return module
