"""The packages; all other metadata is in pyproject.toml.

The configs lie beside the package in a clone, and in it once installed.
"""

from setuptools import find_packages, setup

setup(
    packages=[*find_packages(include=["skyformer_jax*"]), "skyformer_jax.configs"],
    package_dir={"skyformer_jax.configs": "configs"},
)
