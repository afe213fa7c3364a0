"""Lists the packages; all other metadata is in pyproject.toml.

The folder configs/ is beside the package in a clone, and inside the installed package.
"""

from setuptools import find_packages, setup

setup(
    packages=[*find_packages(include=["skyformer_jax*"]), "skyformer_jax.configs"],
    package_dir={"skyformer_jax.configs": "configs"},
)
