"""Docstrings say what a thing does or is; none opens with a clause ("What ...", "Whether ...", "How ...")."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
FOLDERS = ("qzoom_agent", "rl", "evals", "tools")
CLAUSES = {"what", "whether", "where", "how", "who", "whose", "which", "why", "when"}


def _docstrings(path: Path) -> Iterator[tuple[str, str]]:
    """Yield (file and line, first word) of every docstring, those of attributes and constants included."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        for child in getattr(node, "body", []) if not isinstance(node, ast.Lambda | ast.IfExp) else []:
            if (
                isinstance(child, ast.Expr)
                and isinstance(child.value, ast.Constant)
                and isinstance(child.value.value, str)
            ):
                words = child.value.value.split()
                yield f"{path.relative_to(ROOT)}:{child.lineno}", words[0].strip(",.:;").lower() if words else ""


def test_docstrings_open_without_a_clause() -> None:
    found = [one for folder in FOLDERS for path in sorted((ROOT / folder).rglob("*.py")) for one in _docstrings(path)]
    clauses = [place for place, word in found if word in CLAUSES]
    assert len(clauses) < len(found) / 100, f"{len(clauses)} of {len(found)}:\n" + "\n".join(clauses)
