"""Executes notebooks of this folder from a clean kernel and writes their outputs into them.

    pip install -e ".[notebooks]"
    python notebooks/execute.py                 # all of them
    python notebooks/execute.py 01_what*.ipynb  # some

What changes from one execution or machine to the next and is no output is left out: timestamps,
the versions of the kernel, the metadata of cells.
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
    """The notebook with the outputs of a clean kernel.

    Args:
      path: of the notebook, which is only read.
      folder: that the kernel starts in.
      timeout: seconds that a cell may take.

    Raises:
      nbclient.exceptions.CellExecutionError: if a cell does.
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
    """Executes the notebooks of these paths, or all."""
    for path in map(Path, names) if names else sorted(FOLDER.glob("*.ipynb")):
        start = time.perf_counter()
        notebook = execute(path, FOLDER)
        nbformat.write(notebook, path)
        print(f"{path.name}: {time.perf_counter() - start:.0f} s, {path.stat().st_size:,} bytes")


if __name__ == "__main__":
    main(sys.argv[1:])
