"""`qzoom eval list|compare|rescore`: the tasks there are, two runs in pairs, and the answers of a run scored again."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Final

from qzoom_agent.cli.console import Console, opener, printable, table
from qzoom_agent.cli.evaluate import SCORER_HELP
from qzoom_agent.cli.judging import add_judge_flags, judged_tasks
from qzoom_agent.cli.main import OK
from qzoom_agent.files import require_file, write_text

_FLIPS = 20


def parser(verb: str) -> argparse.ArgumentParser:
    """The flags of one of `VERBS`."""
    return _PARSERS[verb]()


def main(argv: Sequence[str]) -> int:
    """Run the verb that the first word names."""
    return VERBS[argv[0]](parser(argv[0]).parse_args(argv[1:]))


def _list_flags() -> argparse.ArgumentParser:
    return argparse.ArgumentParser(prog="qzoom eval list", description="The tasks.")


def _list(_: argparse.Namespace) -> int:
    from qzoom_agent.evaluation.tasks.catalog import TASKS

    rows = [(task.name, ", ".join(task.scorers), task.title) for task in TASKS.values()]
    for line in table(rows, header=("task", "scorers", "what it is")):
        print(line)
    print(
        "\nA file or folder of your own questions (image, question, answer[, options, box]) is a task too: "
        "give its path."
    )
    return OK


def _compare_flags() -> argparse.ArgumentParser:
    flags = argparse.ArgumentParser(
        prog="qzoom eval compare", description="Two runs over the same questions, in pairs: the second minus the first."
    )
    flags.add_argument("before", type=Path, metavar="A", help="run folder")
    flags.add_argument("after", type=Path, metavar="B", help="run folder")
    flags.add_argument("--scorer", help="whose figure is compared (default: the one that leads in B)")
    flags.add_argument("--json", type=Path, metavar="FILE", help="write the comparison, every flip included")
    flags.add_argument("--report", type=Path, metavar="FILE", help="write B's report with the flips against A")
    flags.add_argument("--flips", type=int, default=_FLIPS, metavar="N", help=f"flips printed (default: {_FLIPS})")
    return flags


def _compare(args: argparse.Namespace) -> int:
    from qzoom_agent.cli.figures import show_comparison
    from qzoom_agent.evaluation.compare import compare
    from qzoom_agent.evaluation.run_log import RunFolder

    for path in (args.json, args.report):
        if path:
            require_file(path)
    before, after = RunFolder.existing(args.before), RunFolder.existing(args.after)
    found = compare(before, after, scorer=args.scorer)
    show_comparison(found)
    flips = [flip for task in found.tasks.values() for flip in task.flips]
    for flip in flips[: args.flips]:
        said = (
            f"{printable(flip.before or '-')!r} then {printable(flip.after or '-')!r}, it is {printable(flip.gold)!r}"
        )
        print(f"{flip.became:<5}  {flip.id}  {printable(flip.question)[:60]}  {said}  {flip.trace_after or ''}")
    if len(flips) > args.flips:
        print(f"{len(flips) - args.flips} more flips: see --json, --report or --flips")
    console = Console()
    if args.json:
        write_text(args.json, found.model_dump_json(indent=1) + "\n")
        console.line(f"written {args.json}")
    if args.report:
        from qzoom_agent.evaluation.report import write_run_report

        console.line(f"written {write_run_report(after, baseline=before, path=args.report)}")
    return OK


def _rescore_flags() -> argparse.ArgumentParser:
    flags = argparse.ArgumentParser(
        prog="qzoom eval rescore", description="Score the answers of a run again, without asking the model anything."
    )
    flags.add_argument("run", type=Path, metavar="DIR", help="run folder")
    flags.add_argument("--scorer", help=SCORER_HELP)
    add_judge_flags(flags)
    return flags


def _rescore(args: argparse.Namespace) -> int:
    from qzoom_agent.cli.figures import show
    from qzoom_agent.evaluation.report import write_run_report
    from qzoom_agent.evaluation.run_log import RunFolder
    from qzoom_agent.evaluation.runner import rescore
    from qzoom_agent.evaluation.tasks.catalog import TASKS, find_task

    folder = RunFolder.existing(args.run)
    tasks = [
        find_task(name if name in TASKS else part.reference or part.path or name)
        for name, part in folder.ask.tasks.items()
    ]
    results = rescore(folder, judged_tasks(tasks, args, folder.path), scorer=args.scorer)
    show(results, {})
    print(f"report: {opener()} {write_run_report(folder)}", flush=True)
    return OK


VERBS: Final[dict[str, Callable[[argparse.Namespace], int]]] = {"list": _list, "compare": _compare, "rescore": _rescore}
_PARSERS: Final = {"list": _list_flags, "compare": _compare_flags, "rescore": _rescore_flags}
