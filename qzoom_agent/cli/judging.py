"""`--judge URL`: a scorer that asks a server about what the rule refuses, beside the task's own and named as such."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from qzoom_agent.evaluation.tasks.task import Task


def add_judge_flags(flags: argparse.ArgumentParser) -> None:
    """Flags that `judged_tasks` reads."""
    group = flags.add_argument_group("judge")
    group.add_argument("--judge", metavar="URL", help="OpenAI-compatible server that adds the scorer 'judge'")
    group.add_argument("--judge-model", metavar="M", default="default", help="the judge's name at its server")


def judged_tasks(tasks: Sequence[Task], args: argparse.Namespace, run: Path) -> list[Task]:
    """The tasks with the judge among their scorers, if there is one.

    Who judged is written to judge.json of the run folder and the verdicts to judge.jsonl, so that none is asked twice.
    The key of the server is read from QZOOM_JUDGE_KEY.
    """
    if args.judge is None:
        return list(tasks)
    from qzoom_agent.evaluation.run_log import RunFolder
    from qzoom_agent.evaluation.scorers.judge import Judge, judged
    from qzoom_agent.files import require_folder

    judge = Judge(args.judge, model=args.judge_model, cache=run / "judge.jsonl")
    RunFolder(require_folder(run)).write("judge.json", judge.record.model_dump_json(indent=1) + "\n")
    return [replace(task, scorers={**task.scorers, "judge": judged(judge)}) for task in tasks]
