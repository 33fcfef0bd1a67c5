"""Every rule and trap of the scorers gives what it gives by hand."""

from __future__ import annotations

from qzoom_agent.evaluation.tasks.catalog import TASKS
from tests.cases import each_case
from tests.evaluation.scorers import golden


@each_case("check", list(golden.checks()))
def test_row(check: golden.Check) -> None:
    assert check.got == check.expected


def test_every_scorer_of_every_task_is_in_the_table() -> None:
    used = {TASKS[case.task].scorers[case.scorer] for case in golden.CASES}
    for task in TASKS.values():
        for name, scorer in task.scorers.items():
            assert scorer in used, f"{task.name} {name}"
