"""The notebooks of the documentation run, and print what is stored in them."""

from __future__ import annotations

import ast
import json
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

FOLDER = Path(__file__).resolve().parents[2] / "docs" / "notebooks"
NOTEBOOKS = sorted(FOLDER.glob("*.ipynb"))
MAX_BYTES = 300_000


def cells(path: Path) -> list[dict[str, Any]]:
    """Return the code cells of a notebook."""
    notebook = json.loads(path.read_text(encoding="utf-8"))
    return [cell for cell in notebook["cells"] if cell["cell_type"] == "code"]


def stored(cell: dict[str, Any]) -> tuple[str, set[str]]:
    """Return what a cell printed, and the types of what it showed."""
    outputs = cell["outputs"]
    printed = "".join("".join(one["text"]) for one in outputs if one["output_type"] == "stream")
    return printed, {kind for one in outputs for kind in one.get("data", {})}


def run(source: str, names: dict[str, Any]) -> object:
    """Run a cell as a notebook does, and return the value of its last line."""
    tree = ast.parse(source)
    last = tree.body.pop() if isinstance(tree.body[-1], ast.Expr) else None
    exec(compile(tree, "cell", "exec"), names)
    return None if last is None else eval(compile(ast.Expression(last.value), "cell", "eval"), names)


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_cells_print_and_show_what_is_stored(
    path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    names = vars(ModuleType("__main__"))
    for cell in cells(path):
        source = "".join(cell["source"])
        shown = run(source, names)
        printed, kinds = stored(cell)
        assert capsys.readouterr().out == printed, source
        forms = {"text/html": "_repr_html_", "image/png": "_repr_png_", "text/plain": "__repr__"}
        assert all(hasattr(shown, forms[kind]) for kind in kinds) and bool(kinds) == (shown is not None), source


def test_notebooks_are_small_and_name_no_machine() -> None:
    assert NOTEBOOKS
    for path in NOTEBOOKS:
        text = path.read_text(encoding="utf-8")
        assert len(text) < MAX_BYTES
        assert "/home/" not in text and "/root/" not in text and '"stderr"' not in text
