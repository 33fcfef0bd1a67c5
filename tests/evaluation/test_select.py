"""What a run asks is checked before anything is asked; wrong rows are refused, or left out and counted."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from qzoom_agent.cli.result_tables import _facts
from qzoom_agent.data.samples import Sample, TaskSource
from qzoom_agent.errors import ConfigError
from qzoom_agent.evaluation.export import export
from qzoom_agent.evaluation.report import write_run_report
from qzoom_agent.evaluation.run_log import RunFolder
from qzoom_agent.evaluation.runner import evaluate
from qzoom_agent.evaluation.summary import summarise
from qzoom_agent.evaluation.tasks.catalog import unscored
from qzoom_agent.evaluation.tasks.custom import custom_task
from qzoom_agent.evaluation.tasks.task import Score
from tests.evaluation.player import numbers, player
from tests.evaluation.tasks import files


@pytest.fixture
def table(tmp_path: Path) -> Path:
    files.draw("a").save(tmp_path / "a.png")
    rows = [
        {"answer": str(at), "image": "a.png" if at % 3 else "gone.png", "question": f"which number is on board {at}?"}
        for at in range(6)
    ]
    (tmp_path / "mine.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return tmp_path / "mine.jsonl"


def test_wrong_rows_are_refused_before_anything_is_asked(table: Path, tmp_path: Path) -> None:
    agent = player(lambda i: True)
    with pytest.raises(ConfigError, match=r"mine.jsonl has 2 of 6 rows that cannot be asked: row 1: .*gone.png.*row 4"):
        evaluate(agent, [custom_task(table)], out=tmp_path / "run")
    assert not (tmp_path / "run" / "samples.jsonl").exists()


def test_left_out_rows_are_counted(table: Path, tmp_path: Path) -> None:
    task = custom_task(table)
    results = evaluate(player(lambda i: True), [task], out=tmp_path / "run", source=TaskSource(skip_bad=True))
    found = results.tasks[task.name]
    assert found.n == 4 and len(found.part.left_out) == 2 and found.part.left_out[0].startswith("row 1: ")
    assert found.partial and summarise(RunFolder(tmp_path / "run")).tasks[task.name].part == found.part
    rows = RunFolder(tmp_path / "run").latest()
    assert [row.index for row in rows] == [1, 2, 4, 5]


def test_a_limited_run_is_enlarged_to_all_rows_but_those_left_out(table: Path, tmp_path: Path) -> None:
    task, source = custom_task(table), TaskSource(skip_bad=True)
    evaluate(player(lambda i: True), [task], out=tmp_path / "run", source=source, limit=2)
    assert evaluate(player(lambda i: True), [task], out=tmp_path / "run", source=source).tasks[task.name].n == 4


def test_a_run_without_answers_has_no_accuracy_but_replies(table: Path, tmp_path: Path) -> None:
    rows = [json.loads(line) for line in table.read_text().splitlines()]
    table.write_text("\n".join(json.dumps(row | {"answer": None, "image": "a.png"}) for row in rows))
    task = custom_task(table)
    source = TaskSource(answered=False)
    results = evaluate(player(lambda i: True), [unscored(task)], out=tmp_path / "run", source=source)
    found = results.tasks[task.name]
    assert list(found.scores) == ["replied"] and found.accuracy == 1 and not found.part.answered
    assert _facts(found)[0][0] == "replied", "nothing says that the replies are right"
    folder = RunFolder(tmp_path / "run")
    assert "Replied" in write_run_report(folder).read_text(encoding="utf-8")
    with pytest.raises(ConfigError, match=r"asked without answers .* no accuracy for a model card"):
        export(folder, "hf")


def test_right_answers_are_counted_where_answers_are_right_or_wrong(tmp_path: Path) -> None:
    def half(text: str, sample: Sample) -> Score:
        return Score(0.7, text)

    whole = evaluate(player(lambda i: i > 0), [numbers(2)], out=tmp_path / "whole").tasks["numbers"]
    parts = evaluate(player(), [replace(numbers(2), scorers={"half": half})], out=tmp_path / "parts").tasks["numbers"]
    assert _facts(whole)[0][1].endswith("1 of 2") and "of 2" not in _facts(parts)[0][1]
