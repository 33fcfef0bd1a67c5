"""`qzoom eval SUITE...`: accuracy with its interval, what it cost, and where the model looked.

Everything goes into a run folder (`qzoom_agent.evaluation.run_log`): the same command resumes, and asks
nothing again that is there. The table goes to stdout, progress to stderr. `list`, `compare` and `rescore` in place of a
task are verbs of their own (`cli.evaluated`).
"""

from __future__ import annotations

import argparse
import hashlib
import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from qzoom_agent.cli.console import Console, opener, printable
from qzoom_agent.cli.judging import add_judge_flags, judged_tasks
from qzoom_agent.cli.main import BACKEND, INTERRUPTED, OK
from qzoom_agent.cli.options import add_agent_flags, load_agent, read_config
from qzoom_agent.files import require_file, require_folder, write_text

if TYPE_CHECKING:
    from qzoom_agent.config import AgentConfig
    from qzoom_agent.data.samples import TaskSource
    from qzoom_agent.evaluation.runner import Shard
    from qzoom_agent.evaluation.summary import Results
    from qzoom_agent.evaluation.tasks.task import Task

SCORER_HELP = "scorer that the accuracy is by: one of the task (default: its first), or your own as module:function"
ABLATIONS = ("direct", "blind", "random", "oracle")


def parser() -> argparse.ArgumentParser:
    """The verb's flags."""
    flags = argparse.ArgumentParser(
        prog="qzoom eval",
        description="Measure accuracy and what it costs.",
        epilog="qzoom eval list: the tasks. qzoom eval compare A B: two runs in pairs. "
        "qzoom eval rescore DIR: score the answers of a run again.",
    )
    flags.add_argument(
        "task", nargs="+", help="name of a task, a file or folder of your own questions, or module:function"
    )
    ask = flags.add_argument_group("what is asked")
    ask.add_argument("--n", type=int, help="the first so many questions; for needle tasks, how many are drawn (100)")
    ask.add_argument(
        "--limit", type=int, metavar="N", help="N questions with each kind in its share; the run is partial"
    )
    ask.add_argument("--seed", type=int, default=0, help="draws other questions; two seeds share none (default: 0)")
    ask.add_argument("--split", help="split of the task; needle tasks have test and ood (unseen typefaces)")
    ask.add_argument("--fonts", type=Path, metavar="DIR", help="draw with the typefaces in this folder instead")
    ask.add_argument("--path", help="read the task from this local file or folder, or another hub id")
    ask.add_argument("--repeats", type=int, default=1, metavar="K", help="ask each question K times, with other seeds")
    ask.add_argument("--scorer", help=SCORER_HELP)
    ask.add_argument(
        "--ablate",
        nargs="?",
        const=",".join(ABLATIONS),
        default="",
        metavar="POLICIES",
        help=f"run these policies beside the main one and compare (without a list: {', '.join(ABLATIONS)})",
    )
    how = flags.add_argument_group("how")
    how.add_argument("--out", type=Path, metavar="DIR", help="run folder (default: one of that name under runs/)")
    how.add_argument("--json", type=Path, metavar="FILE", help="write the figures and every row into one file too")
    how.add_argument("--batch", type=int, default=1, metavar="N", help="run N questions at once on the device")
    how.add_argument("--workers", type=int, default=1, metavar="N", help="questions under way at once on a server")
    how.add_argument("--no-traces", action="store_true", help="keep no records of episodes, only the rows")
    how.add_argument("--dry-run", action="store_true", help="say what would be asked, and ask nothing")
    add_judge_flags(flags)
    add_agent_flags(flags)
    return flags


def main(argv: Sequence[str]) -> int:
    """Run the verb; exit code 4 if the model failed on every question."""
    from qzoom_agent.cli import evaluated

    if argv and argv[0] in evaluated.VERBS:
        return evaluated.main(argv)
    args = parser().parse_args(argv)

    from qzoom_agent.data.samples import TaskSource
    from qzoom_agent.evaluation.runner import Shard, require
    from qzoom_agent.evaluation.tasks.catalog import TASKS, find_task, with_scorer
    from qzoom_agent.evaluation.tasks.needle import TASK_NAMES as NEEDLE_TASKS

    tasks = [find_task(name) for name in dict.fromkeys(args.task)]
    given = zip(tasks, dict.fromkeys(args.task), strict=True)
    paths = {task.name: name for task, name in given if name not in TASKS and not task.reference}
    config = read_config(args)
    source = TaskSource(args.path, args.split, args.seed, args.fonts, args.n, config.max_pixels)
    require(source, limit=args.limit, repeats=args.repeats, workers=min(args.batch, args.workers))
    ablations = _ablations(args.ablate, config.policy or "")
    out = args.out or _default(args, config, [task.name for task in tasks])
    if args.dry_run:
        return _dry(tasks, source, paths, args, config, out)
    for task in tasks:
        if task.name in NEEDLE_TASKS:  # read from nowhere: what is wrong with how they are drawn costs no model load
            task.load(source)
    tasks = judged_tasks(tasks, args, out)
    tasks, _ = with_scorer(tasks, args.scorer)
    if args.json:
        require_file(args.json)
    require_folder(out)
    return _measure(args, tasks, source, paths, out, ablations, Shard.launched())


def _measure(
    args: argparse.Namespace,
    tasks: Sequence[Task],
    source: TaskSource,
    paths: dict[str, str],
    out: Path,
    ablations: Sequence[str],
    shard: Shard,
) -> int:
    from qzoom_agent.cli.figures import show
    from qzoom_agent.cli.progress import Progress
    from qzoom_agent.evaluation.compare import compare
    from qzoom_agent.evaluation.report import write_run_report
    from qzoom_agent.evaluation.run_log import RunFolder, environment, fingerprint
    from qzoom_agent.evaluation.runner import evaluate
    from qzoom_agent.evaluation.summary import summarise

    console = Console(verbosity=0 if shard.index == 0 else -1)
    agent = load_agent(args, device=shard.device if args.device == "auto" else None)
    workers = args.workers
    if args.batch > 1:
        from qzoom_agent.models.scheduler import batched

        agent, workers = type(agent)(batched(agent.backend, args.batch), config=agent.config), args.batch
    weights = fingerprint(agent.config.model, args.branches)
    own = args.budget is not None or read_config(args).budget.coarse_tokens is not None
    folders = {out: agent} | {out / "ablations" / name: agent.replace(policy=name) for name in ablations}
    console.line(f"run folder {out}", "dim")
    for path, each in folders.items():
        progress = Progress(console, "" if path == out else f"{path.name}: ")
        try:
            evaluate(
                each,
                tasks,
                out=path,
                source=source,
                paths=paths,
                limit=args.limit,
                repeats=args.repeats,
                scorer=args.scorer,
                own_budget=own,
                weights=weights,
                environment=environment(str(getattr(agent.backend, "placement", ""))),
                workers=workers,
                shard=shard,
                traces=not args.no_traces,
                watch=progress,
            )
        except KeyboardInterrupt:
            console.clear()
            if shard.index == 0 and progress.done:
                show(summarise(RunFolder(path), tasks, scorer=args.scorer), {})
            console.error(
                f"Interrupted after {progress.done} of {progress.planned} questions. "
                f"Finished questions are in {path}; the same command goes on."
            )
            return INTERRUPTED
        console.clear()
    if shard.index:
        return OK
    folder = RunFolder(out)
    results = summarise(folder, tasks, scorer=args.scorer)
    against = {name: compare(RunFolder(out / "ablations" / name), folder, scorer=args.scorer) for name in ablations}
    show(results, against)
    if args.json:
        _write_json(args.json, folder, results)
        console.line(f"written {args.json}")
    page = write_run_report(folder, baseline=RunFolder(out / "ablations" / ablations[0]) if ablations else None)
    print(f"report: {opener()} {page}", flush=True)
    return _ending(console, folder, results)


def _ending(console: Console, folder: object, results: Results) -> int:
    """Say what failed; the exit code."""
    from qzoom_agent.evaluation.run_log import RunFolder

    assert isinstance(folder, RunFolder)
    failed, n = (
        sum(value)
        for value in zip(*((each.failed, sum(each.statuses.values())) for each in results.tasks.values()), strict=True)
    )
    if failed:
        first = next(row.error for row in folder.latest() if row.status == "error")
        console.error(f"{failed} of {n} questions failed and count as wrong. The first: {printable(first or '')}")
    return BACKEND if failed == n else OK


def _ablations(text: str, policy: str) -> list[str]:
    from typing import get_args

    from qzoom_agent.config import PolicyName
    from qzoom_agent.errors import ConfigError

    names = [name.strip() for name in text.split(",") if name.strip()]
    unknown = [name for name in names if name not in get_args(PolicyName)]
    if unknown:
        raise ConfigError(
            f"--ablate takes policies; got {', '.join(unknown)}. Known: {', '.join(get_args(PolicyName))}."
        )
    return [name for name in dict.fromkeys(names) if name != policy]


def _default(args: argparse.Namespace, config: AgentConfig, tasks: Sequence[str]) -> Path:
    """A folder of its own for all that decides a run, so that the same command finds its run again."""
    from qzoom_agent.evaluation.run_log import fingerprint

    decides = [config.model_dump(mode="json"), fingerprint(config.model, args.branches), *tasks]
    decides += [args.n, args.limit, args.seed, args.split, str(args.fonts), args.path, args.repeats, args.task]
    short = hashlib.sha256(json.dumps(decides, sort_keys=True).encode()).hexdigest()[:8]
    name = "+".join(tasks) if len(tasks) <= 3 else f"{tasks[0]}+{len(tasks) - 1}-more"
    model = re.sub(r"[^\w.-]+", "-", config.model).strip("-.")
    return Path("runs") / f"{name}--{model}--{config.policy or 'default'}--{short}"


def _dry(
    tasks: Sequence[Task],
    source: TaskSource,
    paths: dict[str, str],
    args: argparse.Namespace,
    config: AgentConfig,
    out: Path,
) -> int:
    """Print the configuration, how many questions there are, and the first of each task."""
    from qzoom_agent.evaluation.runner import plan

    print(config.to_yaml(), end="")
    print(f"run folder: {out}")
    for task in tasks:
        own = source._replace(path=paths.get(task.name, source.path))
        samples = task.load(own)
        part, chosen = plan(samples, own, limit=args.limit, seed=args.seed, coarse_tokens=task.coarse_tokens)
        first = samples[chosen[0]]
        partial = " (partial)" if part.partial else ""
        asked = f"{part.planned} of {part.total} questions{partial}"
        print(f"\n{task.name}: {asked}, {args.repeats} x, scored by {', '.join(task.scorers)}")
        print(f"  {first.id}, {first.image.width} x {first.image.height} px, answer {printable(first.answer)!r}")
        print("\n".join(f"  | {printable(line)}" for line in first.question.splitlines()))
    return OK


def _write_json(path: Path, folder: object, results: Results) -> None:
    """The figures of the run and its rows; of a run of one task, its accuracy, n and interval at the top."""
    from qzoom_agent.evaluation.run_log import RunFolder

    assert isinstance(folder, RunFolder)
    data = results.model_dump(mode="json")
    if len(results.tasks) == 1:
        data |= next(iter(data["tasks"].values()))
    data["rows"] = [row.model_dump(mode="json") for row in folder.latest()]
    write_text(path, json.dumps(data, indent=1) + "\n")
