"""Every rule and trap of the scorers gives what it gives by hand."""

from __future__ import annotations

import pytest

import golden
from qzoom_agent.evaluation.tasks.catalog import TASKS


@pytest.mark.parametrize("check", list(golden.checks()), ids=lambda check: f"{check.rule}: {check.prediction}"[:80])
def test_row(check: golden.Check) -> None:
    assert check.got == check.expected


def test_every_scorer_of_every_task_is_in_the_table() -> None:
    used = {TASKS[case.task].scorers[case.scorer] for case in golden.CASES}
    for task in TASKS.values():
        for name, scorer in task.scorers.items():
            assert scorer in used, f"{task.name} {name}"


def test_the_command_prints_the_table_and_fails_on_a_difference(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert golden.main([]) == 0
    printed = capsys.readouterr().out
    assert "0 different" in printed and "DIFFERS" not in printed
    rows = [*golden.checks(), *golden.checks((golden.Case("docvqa", "faithful", "12", "13", 1),))]
    monkeypatch.setattr(golden, "checks", lambda: iter(rows))
    assert golden.main([]) == 1
    assert "1 different" in capsys.readouterr().out
