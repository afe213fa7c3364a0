"""Prints, as constraints for pip, the lowest versions that pyproject.toml allows.

For instance: python .ci/lowest.py > lowest.txt && pip install -e ".[test]" -c lowest.txt
"""

import tomllib
from pathlib import Path

project = tomllib.loads((Path(__file__).parent.parent / "pyproject.toml").read_text())["project"]
for requirement in project["dependencies"] + project["optional-dependencies"]["lra"]:
    print(requirement.replace(">=", "=="))
