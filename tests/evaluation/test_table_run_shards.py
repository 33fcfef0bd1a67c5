"""Several processes of accelerate share a run over a table."""

from __future__ import annotations

import json
from importlib import resources
from pathlib import Path

import pytest
from pyarrow import parquet

from tests.evaluation.sharing import two_processes


@pytest.mark.slow
def test_two_processes_answer_what_one_answers(tmp_path: Path) -> None:
    demo = str(resources.files("qzoom_agent.data") / "demo")
    printed = two_processes("qzoom_agent", "run", demo, "--out", str(tmp_path), "--device", "cpu")
    assert printed.count("results.parquet") == 1, "one process writes and says so"
    rows = parquet.read_table(tmp_path / "results.parquet").to_pylist()
    questions = json.loads((Path(demo) / "questions.json").read_text())
    assert [row["index"] for row in rows] == list(range(len(questions))) and all(row["answer"] for row in rows)
    boards = [one["answer"] for one in questions if "receipt" not in one["image"]]  # nano reads boards alone
    assert [row["answer"] for row in rows][: len(boards)] == boards
    assert not list(tmp_path.glob("samples.*.jsonl"))
