"""Imports the scripts of experiments/ as modules."""

import importlib

from absl import flags


def import_script(name):
    """Imports experiments.NAME and removes its flags, because scripts reuse flag names."""
    before = set(flags.FLAGS)
    module = importlib.import_module(f"experiments.{name}")
    flags.FLAGS.remove_flag_values(set(flags.FLAGS) - before)
    return module
