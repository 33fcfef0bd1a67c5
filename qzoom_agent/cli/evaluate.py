"""`qzoom eval TASK...`: accuracy with its interval, what it cost, and where the model looked.

Everything goes into a run folder (`qzoom_agent.evaluation.run_log`): the same command resumes, and asks no question
again. The table goes to stdout, progress to stderr. In place of a task, `list`, `compare`, `rescore`, `export` and
`calibrate` list the tasks, compare two runs, score answers again, write a run for other tools, and fit confidence.

`qzoom audit TASK...`: does looking help? The policy against its controls on the same questions, and one verdict. The
runs and the page lie in one run folder, as `--ablate` leaves them. Works with any model and server, with boxes or
without.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Final, get_args

from qzoom_agent.cli.console import Console, Progress, opening, print_table, printable
from qzoom_agent.cli.main import BACKEND, OK
from qzoom_agent.cli.options import add_agent_flags, add_column_flag, load_agent, read_config
from qzoom_agent.errors import ConfigError, redact
from qzoom_agent.extensions import calling
from qzoom_agent.files import require_file, require_folder, write_text

if TYPE_CHECKING:
    from qzoom_agent.agent import Agent
    from qzoom_agent.config import AgentConfig
    from qzoom_agent.data.samples import TaskSource
    from qzoom_agent.evaluation.audit import Audit
    from qzoom_agent.evaluation.run_log import RunFolder
    from qzoom_agent.evaluation.runner import Selected, Shard
    from qzoom_agent.evaluation.summary import Results
    from qzoom_agent.evaluation.tasks.task import Task

ABLATIONS: Final = ("direct", "blind", "random", "oracle")
SCORER_HELP: Final = (
    "scorer that the accuracy is by: one of the task (default: its first), or your own as module:function"
)


def add_flags(flags: argparse.ArgumentParser) -> None:
    flags.description = "Measure accuracy and what it costs."
    flags.epilog = (
        "qzoom eval list: the tasks. qzoom eval compare A B: two runs in pairs. "
        "qzoom eval rescore DIR: score the answers of a run again. qzoom eval export DIR --to FORMAT: for other tools. "
        "qzoom eval calibrate DIR --out FILE: confidence of answers."
    )
    add_question_flags(flags)
    flags.add_argument(
        "--ablate",
        nargs="?",
        const=",".join(ABLATIONS),
        default="",
        metavar="POLICIES",
        help=f"run these policies beside the main one and compare (without a list: {', '.join(ABLATIONS)})",
    )


def add_question_flags(flags: argparse.ArgumentParser) -> None:
    """Add the flags that say what is asked of whom, and where the run is kept."""
    flags.add_argument(
        "task", nargs="+", help="name of a task, a file or folder of your own questions, or module:function"
    )
    ask = flags.add_argument_group("questions")
    ask.add_argument(
        "--n", type=int, help="ask the first N questions (default: all; a needle task draws 100 and has no end)"
    )
    ask.add_argument(
        "--limit", type=int, metavar="N", help="ask N questions with each kind in its share; the run is partial"
    )
    ask.add_argument("--seed", type=int, default=0, help="draw other questions; two seeds share none (default: 0)")
    ask.add_argument("--split", help="split of the task (default: test; needle tasks also have ood, unseen typefaces)")
    ask.add_argument("--fonts", type=Path, metavar="DIR", help="draw with the typefaces in this folder instead")
    ask.add_argument("--skip-bad", action="store_true", help="leave out rows that cannot be asked, and count them")
    ask.add_argument(
        "--no-answers",
        action="store_true",
        help="ask a split whose answers are kept back: nothing is scored, and 'qzoom eval export' writes the answers",
    )
    ask.add_argument("--path", help="read the task from this local file or folder, or another hub id")
    add_column_flag(ask)
    ask.add_argument(
        "--repeats", type=int, default=1, metavar="K", help="ask each question K times, with other seeds (default: 1)"
    )
    ask.add_argument("--scorer", help=SCORER_HELP)
    how = flags.add_argument_group("run")
    how.add_argument("--out", type=Path, metavar="DIR", help="run folder (default: one under runs/, named by the run)")
    how.add_argument("--json", type=Path, metavar="FILE", help="write the figures and every row into one file too")
    how.add_argument(
        "--batch", type=int, default=1, metavar="N", help="run N questions at once on the device (default: 1)"
    )
    how.add_argument(
        "--workers", type=int, default=1, metavar="N", help="ask a server N questions at once (default: 1)"
    )
    how.add_argument("--no-traces", action="store_true", help="keep no records of episodes, only the rows")
    how.add_argument("--dry-run", action="store_true", help="print what would be asked, and ask nothing")
    add_judge_flags(flags)
    add_agent_flags(flags)


def run(args: argparse.Namespace) -> int:
    """Run the verb; exit code 4 if the model failed on every question."""
    ablations = _ablations(args.ablate)
    plan = planned(args)
    if plan is None:
        return OK
    from qzoom_agent.cli.result_tables import show
    from qzoom_agent.evaluation.compare import compare
    from qzoom_agent.evaluation.report import write_run_report

    agent, folder, console = plan.agent(), plan.folder, plan.console
    results = plan.ask(agent, folder)
    others = plan.ask_others(agent, ablations)
    if plan.shard.index:
        return OK
    show(results, {name: compare(other, folder, scorer=args.scorer) for name, other in others.items()})
    if args.json:
        _write_json(args.json, folder, results)
        console.line(f"written {args.json}")
    page = write_run_report(folder, baseline=next(iter(others.values()), None))
    print(f"report: {opening(page)}", flush=True)
    return exit_code(folder, results, console)


@dataclass(frozen=True)
class Measurement:
    """The tasks that a command line asks for, and the folder of its run."""

    args: argparse.Namespace
    tasks: Sequence[Task]
    source: TaskSource
    loaded: Mapping[str, Selected]
    folder: RunFolder
    shard: Shard
    console: Console

    def agent(self) -> Agent:
        """Load the agent."""
        args = self.args
        agent = load_agent(args, device=self.shard.device if args.device == "auto" else None)
        self.console.line(f"run folder {self.folder.path}", "dim")
        if args.batch == 1:
            return agent
        from qzoom_agent.models.scheduler import batched

        return agent.replace(backend=batched(agent.backend, args.batch))

    def ask_others(self, agent: Agent, policies: Sequence[str]) -> dict[str, RunFolder]:
        """Ask the same questions under these policies, but for the agent's own; return the folders of the runs."""
        others = {
            name: type(self.folder)(self.folder.path / "ablations" / name)
            for name in policies
            if name != agent.config.policy
        }
        for name, folder in others.items():
            self.ask(agent.replace(policy=name), folder, label=f"{name}: ")
        return others

    def ask(self, agent: Agent, folder: RunFolder, *, label: str = "") -> Results:
        """Ask the agent every question that the folder does not have yet, and return the results of all it has."""
        from qzoom_agent.cli.result_tables import show
        from qzoom_agent.evaluation.run_log import environment
        from qzoom_agent.evaluation.runner import evaluate
        from qzoom_agent.evaluation.summary import summarise

        args, console = self.args, self.console
        progress = Progress(console, label)
        try:
            results = evaluate(
                agent,
                self.tasks,
                out=folder.path,
                source=self.source,
                loaded=self.loaded,
                repeats=args.repeats,
                scorer=args.scorer,
                environment=environment(str(getattr(agent.backend, "placement", "")), command=redact(args.command)),
                workers=args.workers if args.batch == 1 else args.batch,
                shard=self.shard,
                traces=not args.no_traces,
                watch=progress,
            )
        except KeyboardInterrupt:
            console.clear()
            if self.shard.index == 0 and progress.done:
                show(summarise(folder, self.tasks, scorer=args.scorer), {})
            raise progress.interrupted(folder.path) from None
        console.clear()
        return results


def planned(args: argparse.Namespace) -> Measurement | None:
    """Return the run that the flags describe, checked; None after a dry run, which prints it."""
    from qzoom_agent.data.samples import TaskSource
    from qzoom_agent.evaluation.run_log import RunFolder
    from qzoom_agent.evaluation.runner import Shard, require, require_names, select
    from qzoom_agent.evaluation.tasks.catalog import TASKS, find_task, unscored, with_scorer

    tasks = [find_task(name) for name in dict.fromkeys(args.task)]
    require_names(tasks)
    given = zip(tasks, dict.fromkeys(args.task), strict=True)
    paths = {task.name: name for task, name in given if name not in TASKS and not task.reference}
    config = read_config(args)
    source = TaskSource(
        args.path,
        args.split,
        args.seed,
        args.fonts,
        args.n,
        config.max_pixels,
        answered=not args.no_answers,
        skip_bad=args.skip_bad,
        columns=dict(args.columns or ()) or None,
    )
    if args.columns and (published := [name for name in args.task if name not in paths.values()]):
        raise ConfigError(f"--column is for your own questions; {published[0]} knows its columns. Leave it out.")
    if args.no_answers:
        tasks = list(map(unscored, tasks))
    require(source, limit=args.limit, repeats=args.repeats, workers=min(args.batch, args.workers))
    out = args.out or _default_folder(args, config, [task.name for task in tasks])
    sizes = (args.budget, config.budget.coarse_tokens, config.budget.coarse_min_tokens)
    own = any(one is not None for one in sizes)
    tasks, _ = with_scorer(with_judge(tasks, args, None if args.dry_run else out), args.scorer)
    # Wrong rows show before the model is loaded.
    loaded = select(tasks, source=source, paths=paths, limit=args.limit, own_budget=own)
    for name, one in loaded.items():
        if left := one.selection.left_out:
            Console().error(f"{name}: {len(left)} rows left out. The first: {printable(left[0])}")
    if args.dry_run:
        _dry_run(tasks, loaded, args, config, out)
        return None
    if args.json:
        require_file(args.json)
    require_folder(out)
    shard = Shard.launched()
    console = Console(verbosity=0 if shard.index == 0 else -1)
    return Measurement(args, tasks, source, loaded, RunFolder(out), shard, console)


def exit_code(folder: RunFolder, results: Results, console: Console) -> int:
    """Return the exit code of a finished run, and print how many questions failed."""
    failed = sum(task.failed for task in results.tasks.values())
    n = sum(count for task in results.tasks.values() for count in task.statuses.values())
    if failed:
        first = next(row.error for row in folder.latest() if row.status == "error")
        console.error(f"{failed} of {n} questions failed and count as wrong. The first: {printable(first or '')}")
    return BACKEND if failed == n else OK


def _ablations(text: str) -> list[str]:
    from qzoom_agent.config import PolicyName

    names = [name.strip() for name in text.split(",") if name.strip()]
    unknown = [name for name in names if name not in get_args(PolicyName)]
    if unknown:
        raise ConfigError(
            f"--ablate takes policies; got {', '.join(unknown)}. Known: {', '.join(get_args(PolicyName))}."
        )
    return list(dict.fromkeys(names))


def _default_folder(args: argparse.Namespace, config: AgentConfig, tasks: Sequence[str]) -> Path:
    """Return a folder named by all that decides a run, so that the same command finds its run again."""
    from qzoom_agent.evaluation.run_log import weights_of

    decides = [config.model_dump(mode="json"), weights_of(config, args.branches), *tasks]
    decides += [args.n, args.limit, args.seed, args.split, str(args.fonts), args.path, args.repeats, args.task]
    # folders that are there keep their names
    decides += ["no answers"] if args.no_answers else []
    decides += [json.dumps(sorted(args.columns))] if args.columns else []
    decides += [args.server, args.extra_body] if args.server else []
    short = hashlib.sha256(json.dumps(decides, sort_keys=True).encode()).hexdigest()[:8]
    name = "+".join(tasks) if len(tasks) <= 3 else f"{tasks[0]}+{len(tasks) - 1}-more"
    model = re.sub(r"[^\w.-]+", "-", config.model).strip("-.")
    return Path("runs") / f"{name}--{model}--{config.policy or 'default'}--{short}"


def _dry_run(
    tasks: Sequence[Task], loaded: Mapping[str, Selected], args: argparse.Namespace, config: AgentConfig, out: Path
) -> None:
    """Print the configuration, how many questions there are, and the first of each task."""
    print(config.to_yaml(), end="")
    print(f"run folder: {out}")
    for task in tasks:
        samples, part, places = loaded[task.name]
        with calling(task.name, kind="task"):
            first = samples[places[0]]
        partial = " (partial)" if part.partial else ""
        asked = f"{part.planned} of {part.total} questions{partial}"
        scorers = sorted(task.scorers, key=lambda name: name != args.scorer)  # the one that leads first
        print(f"\n{task.name}: {asked}, {args.repeats} x, scored by {', '.join(scorers)}")
        size = f"{first.image.width} x {first.image.height} px"
        print(f"  {printable(first.id)}, {size}, answer {printable(first.answer)!r}")
        print("\n".join(f"  | {printable(line)}" for line in first.question.splitlines()))


def _write_json(path: Path, folder: RunFolder, results: Results) -> None:
    """Write the figures of the run and its rows; of a run of one task, its accuracy, n and interval at the top."""
    data = results.model_dump(mode="json")
    if len(results.tasks) == 1:
        data |= next(iter(data["tasks"].values()))
    data["rows"] = [row.model_dump(mode="json") for row in folder.latest()]
    write_text(path, json.dumps(data, indent=1) + "\n")


# -- a judge among the scorers ---------------------------------------------------------------------------------------


def add_judge_flags(flags: argparse.ArgumentParser) -> None:
    group = flags.add_argument_group("judge")
    group.add_argument(
        "--judge",
        metavar="URL",
        help="add the scorer 'judge': an OpenAI-compatible server, asked about answers that the rule refuses "
        "(key: QZOOM_JUDGE_KEY)",
    )
    group.add_argument(
        "--judge-model", metavar="M", default="default", help="the judge's name at its server (default: default)"
    )


def with_judge(tasks: Sequence[Task], args: argparse.Namespace, run: Path | None) -> list[Task]:
    """Return the tasks with the judge among their scorers, if there is one.

    The verdicts are written to judge.jsonl of the run folder, so that none is asked twice; without a folder nothing is.
    """
    if args.judge is None:
        return list(tasks)
    from qzoom_agent.evaluation.scorers.judge import Judge, judged

    judge = Judge(args.judge, model=args.judge_model, cache=run and run / "judge.jsonl")
    return [replace(task, scorers={**task.scorers, "judge": judged(judge)}) for task in tasks]


# -- qzoom audit -------------------------------------------------------------------------------------------------------


def add_audit_flags(flags: argparse.ArgumentParser) -> None:
    flags.description = (
        "Run a policy and its controls (no crop, grey crops, random crops, crops at the known boxes) on "
        "the same questions, and say how much of the gain is what the crops show."
    )
    add_question_flags(flags)


def run_audit(args: argparse.Namespace) -> int:
    """Run the verb; exit code 4 if the model failed on every question."""
    if args.no_answers:
        raise ConfigError("An audit compares what is right, so it needs answers. Leave out --no-answers.")
    plan = planned(args)
    if plan is None:
        return OK

    from qzoom_agent.evaluation.audit import FILE, audit, grey_policy
    from qzoom_agent.evaluation.report import write_run_report

    agent, folder = plan.agent(), plan.folder
    if agent.config.policy in ("direct", "random", "blind", "masked"):
        raise ConfigError(f"{agent.config.policy!r} is a control of an audit. Give --policy that is to be audited.")
    results = plan.ask(agent, folder, label=f"{agent.config.policy}: ")
    names: list[str] = ["direct", grey_policy(str(agent.config.policy)), "random"]
    if all(row.boxes or row.coarse_suffices for row in folder.latest()):
        names.append("oracle")
    controls = plan.ask_others(agent, names)
    if plan.shard.index:
        return OK
    found = audit(folder, controls, scorer=args.scorer)
    folder.write(FILE, found.model_dump_json(indent=1) + "\n")
    if args.json:
        write_text(args.json, found.model_dump_json(indent=1) + "\n")
    _show_audit(found)
    print(f"report: {opening(write_run_report(folder, baseline=controls['direct']))}", flush=True)
    return exit_code(folder, results, plan.console)


def _show_audit(found: Audit) -> None:
    from qzoom_agent.evaluation.audit import MEANINGS, points

    for each in found.tasks.values():
        print(f"{each.task}: {found.model}, policy {each.policy}, scorer {each.scorer}, n = {each.arms[0].accuracy.n}")
        arms = [
            (arm.policy, f"{arm.accuracy.mean:.3f}", f"{arm.visual_tokens:.0f}", f"{arm.crops:.2f}")
            for arm in each.arms
        ]
        print_table(arms, header=("policy", "accuracy", "visual tokens", "crops"))
        effects = [(name, points(effect), f"p {effect.p:.2g}", MEANINGS[name]) for name, effect in each.effects.items()]
        print_table(effects, header=("effect", "difference", "p", "what is compared"))
        if each.redundant is not None and each.crops:
            print(f"{each.redundant} of {each.crops} crops were redundant.")
        if each.wrong:
            print("Wrong answers: " + ", ".join(f"{count} {cause}" for cause, count in each.wrong.items()) + ".")
        print(each.verdict + "\n")
