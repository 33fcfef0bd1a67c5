"""`qzoom eval list|compare|rescore|export|calibrate`: what is done with tasks and finished runs without a model."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Final

from qzoom_agent.cli.console import Console, opening, print_table, printable
from qzoom_agent.cli.evaluate import SCORER_HELP, add_judge_flags, with_judge
from qzoom_agent.cli.main import OK
from qzoom_agent.config import whole_number
from qzoom_agent.errors import ConfigError
from qzoom_agent.files import is_stream, require_file, write_text

_FLIPS: Final = 20


def add_list_flags(flags: argparse.ArgumentParser) -> None:
    flags.description = "List the tasks."


def run_list(_: argparse.Namespace) -> int:
    from qzoom_agent.evaluation.tasks.catalog import TASKS

    rows = [(task.name, ", ".join(task.scorers), task.title) for task in TASKS.values()]
    print_table(rows, header=("task", "scorers", "what it is"))
    print(
        "\nA file or folder of your own questions (image, question, answer[, options, box]) is a task too: "
        "give its path."
    )
    return OK


def add_compare_flags(flags: argparse.ArgumentParser) -> None:
    flags.description = "Compare two runs over the same questions in pairs: the second minus the first."
    flags.add_argument("before", type=Path, metavar="A", help="run folder")
    flags.add_argument("after", type=Path, metavar="B", help="run folder")
    flags.add_argument("--scorer", help="scorer that is compared (default: the one that leads in B)")
    flags.add_argument("--json", type=Path, metavar="FILE", help="write the comparison, every flip included")
    flags.add_argument("--report", type=Path, metavar="FILE", help="write B's report with the flips against A")
    flags.add_argument(
        "--flips", type=whole_number, default=_FLIPS, metavar="N", help=f"print N flips (default: {_FLIPS})"
    )


def run_compare(args: argparse.Namespace) -> int:
    """Print two runs in pairs, and the questions that only one of them answers."""
    from qzoom_agent.cli.result_tables import show_comparison
    from qzoom_agent.evaluation.compare import compare
    from qzoom_agent.evaluation.report import write_run_report
    from qzoom_agent.evaluation.run_log import RunFolder

    for path in (args.json, args.report):
        if path:
            require_file(path)
    before, after = RunFolder.existing(args.before), RunFolder.existing(args.after)
    found = compare(before, after, scorer=args.scorer)
    show_comparison(found)
    flips = [flip for task in found.tasks.values() for flip in task.flips]
    for flip in flips[: args.flips]:
        first, second, gold = (printable(text or "-") for text in (flip.before, flip.after, flip.gold))
        answers = f"{first!r} then {second!r}, it is {gold!r}"
        asked = f"{printable(flip.id)}  {printable(flip.question)[:60]}"
        print(f"{flip.became:<5}  {asked}  {answers}  {flip.trace_after or ''}")
    if len(flips) > args.flips:
        print(f"{len(flips) - args.flips} more flips: see --json, --report or --flips")
    console = Console()
    if args.json:
        write_text(args.json, found.model_dump_json(indent=1) + "\n")
        console.line(f"written {args.json}")
    if args.report:
        console.line(f"written {write_run_report(after, baseline=before, path=args.report)}")
    return OK


def add_rescore_flags(flags: argparse.ArgumentParser) -> None:
    flags.description = "Score the answers of a run again, without asking the model anything."
    flags.add_argument("run", type=Path, metavar="DIR", help="run folder")
    flags.add_argument(
        "--task",
        action="append",
        default=[],
        metavar="MODULE:NAME",
        help="a task of the run that is your own code; a run folder cannot have code imported by itself",
    )
    flags.add_argument("--scorer", help=SCORER_HELP)
    add_judge_flags(flags)


def run_rescore(args: argparse.Namespace) -> int:
    """Score a run again. Raises ConfigError for a task that is code and was not named."""
    from qzoom_agent.cli.result_tables import show
    from qzoom_agent.evaluation.report import write_run_report
    from qzoom_agent.evaluation.run_log import RunFolder
    from qzoom_agent.evaluation.runner import rescore
    from qzoom_agent.evaluation.tasks.catalog import TASKS, find_task, unscored
    from qzoom_agent.evaluation.tasks.custom import custom_task
    from qzoom_agent.extensions import is_reference

    folder = RunFolder.existing(args.run)
    tasks = []
    for name, part in folder.ask.tasks.items():
        named = name if name in TASKS else part.reference or part.path or name
        if is_reference(named) and named not in args.task:
            raise ConfigError(
                f"The task {name!r} of {args.run} is code, {named}, which a run folder cannot have run by itself. "
                f"If you trust it, give --task {named}."
            )
        # A table of questions need not be there: the rows of the run hold what is scored.
        own = part.reference is None and part.path is not None and name not in TASKS
        task = custom_task(Path(named), name=name) if own else find_task(named)
        tasks.append(task if part.answered else unscored(task))
    show(rescore(folder, with_judge(tasks, args, folder.path), scorer=args.scorer), {})
    print(f"report: {opening(write_run_report(folder))}", flush=True)
    return OK


def add_export_flags(flags: argparse.ArgumentParser) -> None:
    flags.description = "Write a run as a table, as results for a model card, or as answers for a test server."
    flags.add_argument("run", type=Path, metavar="DIR", help="run folder")
    formats = ("parquet", "csv", "hf", "submission")
    flags.add_argument("--to", required=True, choices=formats, help="hf: model-index of a model card")
    flags.add_argument("--out", type=Path, metavar="FILE", help="file to write (default: one in the run folder)")


def run_export(args: argparse.Namespace) -> int:
    from qzoom_agent.evaluation.export import export
    from qzoom_agent.evaluation.run_log import RunFolder

    folder = RunFolder.existing(args.run)
    written = export(folder, args.to, args.out)
    if not is_stream(written):  # what goes to /dev/stdout is the file alone
        print(f"written {written}")
    total, asked = sum(part.total for part in folder.ask.tasks.values()), len(folder.newest())
    if args.to == "submission" and asked < total:
        Console().error(f"The run asked {asked} of {total} questions, and the file holds no answer to the others.")
    return OK


def add_calibrate_flags(flags: argparse.ArgumentParser) -> None:
    flags.description = (
        "Fit the confidence of a model's answers to runs with known answers, and measure it on others. "
        "Put the file into the folder of the model's weights: its answers then have a confidence."
    )
    flags.add_argument("runs", type=Path, nargs="+", metavar="DIR", help="run folder to fit to, of any policies")
    flags.add_argument(
        "--held-out", type=Path, nargs="*", default=[], metavar="DIR", help="run folder to measure on, and not fit to"
    )
    flags.add_argument("--out", type=Path, required=True, metavar="FILE", help="file to write: MODEL/confidence.json")
    flags.add_argument("--scorer", help="scorer that decides what is right (default: each task's first)")


def run_calibrate(args: argparse.Namespace) -> int:
    """Fit the confidence, and print how well it holds."""
    from qzoom_agent.evaluation.confidence import calibrate, expected_error, known_answers
    from qzoom_agent.evaluation.run_log import RunFolder

    require_file(args.out)
    runs, held_out = ([RunFolder.existing(path) for path in paths] for paths in (args.runs, args.held_out))
    found = calibrate(runs, scorer=args.scorer)
    rows = []
    if shared := {one.path.resolve() for one in runs} & {one.path.resolve() for one in held_out}:
        raise ConfigError(f"{shared.pop()} is fitted to, so it cannot be held out. Give another run.")
    for name, folders in (("fitted", runs), ("held out", held_out)):
        answers = list(known_answers(folders, scorer=args.scorer, like=runs[0]))
        parts = dict.fromkeys((one.policy, task) for one in answers for task in ("all", one.task))
        for policy, task in parts:
            own = [one for one in answers if one.policy == policy and task in ("all", one.task)]
            error = expected_error(found, own)
            right = sum(one.right for one in own) / len(own)
            rows.append((name, policy, task, str(len(own)), f"{right:.3f}", "-" if error is None else f"{error:.3f}"))
    print_table(rows, header=("runs", "policy", "task", "answers", "right", "calibration error"))
    write_text(args.out, found.model_dump_json(indent=1) + "\n")
    print(f"written {args.out}")
    return OK
