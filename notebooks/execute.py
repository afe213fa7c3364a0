"""Executes notebooks of this folder in a clean kernel and writes the outputs into them.

    pip install -e ".[notebooks]"
    python notebooks/execute.py                 # all of them
    python notebooks/execute.py 01_what*.ipynb  # some

Metadata that changes between executions or machines is dropped: timestamps, the versions of the
kernel, and the metadata of cells.
"""

import sys
import time
from pathlib import Path

import nbformat
from nbclient import NotebookClient

FOLDER = Path(__file__).resolve().parent
METADATA = {
    "kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"},
    "language_info": {"name": "python"},
}


def execute(path: Path, folder: Path, timeout: int = 3600) -> nbformat.NotebookNode:
    """Executes a notebook in a clean kernel and returns it with its outputs.

    Args:
      path: the notebook file, which is not modified.
      folder: the working folder of the kernel.
      timeout: the most seconds that a cell may take.

    Raises:
      nbclient.exceptions.CellExecutionError: if a cell raises.
    """
    notebook = nbformat.read(path, as_version=4)
    client = NotebookClient(
        notebook,
        kernel_name="python3",
        timeout=timeout,
        record_timing=False,
        coalesce_streams=True,
        resources={"metadata": {"path": str(folder)}},
    )
    client.execute()
    notebook.metadata = nbformat.from_dict(METADATA)
    for number, cell in enumerate(notebook.cells):
        cell.metadata = nbformat.NotebookNode()
        cell.id = f"cell-{number}"
        for output in cell.get("outputs", ()):
            if "metadata" in output:
                output.metadata = nbformat.NotebookNode()
    return notebook


def main(names: list[str]) -> None:
    """Executes the notebooks at these paths, or all notebooks of the folder."""
    for path in map(Path, names) if names else sorted(FOLDER.glob("*.ipynb")):
        start = time.perf_counter()
        notebook = execute(path, FOLDER)
        nbformat.write(notebook, path)
        print(f"{path.name}: {time.perf_counter() - start:.0f} s, {path.stat().st_size:,} bytes")


if __name__ == "__main__":
    main(sys.argv[1:])
