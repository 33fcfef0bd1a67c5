"""Run a notebook of `docs/notebooks/` from its first cell and store what it prints and shows.

    pip install -e ".[docs]" -c constraints.txt
    python evals/run_notebook.py docs/notebooks/first-look.ipynb

Of each result the richest form is kept. Warnings are not: they name paths of the machine.
"""

import argparse
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import nbformat
from nbclient import NotebookClient

_RICHEST = ("text/html", "image/png", "text/plain")


def run(path: Path) -> None:
    """Execute the cells in an empty folder and write the notebook with their outputs."""
    notebook: Any = nbformat.read(path, as_version=4)
    with tempfile.TemporaryDirectory() as folder:
        NotebookClient(notebook, timeout=600, record_timing=False, resources={"metadata": {"path": folder}}).execute()
    for cell in notebook.cells:
        if cell.cell_type == "code":
            cell.outputs = [_kept(output) for output in cell.outputs if output.get("name") != "stderr"]
    notebook.metadata.language_info = {"name": "python"}
    nbformat.write(notebook, path)


def _kept(output: Any) -> Any:
    if "data" in output:
        best = next(kind for kind in _RICHEST if kind in output.data)
        output.data = {best: output.data[best]}
        output.metadata = {}
    return output


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Run notebooks and store their outputs.")
    parser.add_argument("notebooks", type=Path, nargs="+", metavar="FILE")
    for path in parser.parse_args(argv).notebooks:
        run(path)
        print(path)
    return 0


if __name__ == "__main__":
    sys.exit(main())
