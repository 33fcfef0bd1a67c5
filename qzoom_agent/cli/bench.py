"""`qzoom bench`: the worth of perception, measured in one interleaved run, with a figure and a table.

    qzoom bench pareto --n 500 --out runs/pareto              accuracy against cost, baseline and Q-Zoom
    qzoom bench ablation depth --run runs/branches            one choice of the branches, changed and measured

An interrupted run resumes with the same command.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from qzoom_agent.cli.console import Console
from qzoom_agent.cli.main import OK
from qzoom_agent.config import positive_int, whole_number
from qzoom_agent.extras import require
from qzoom_agent.files import require_folder

if TYPE_CHECKING:
    from qzoom_agent.evaluation.pareto import Headline, ParetoPoint


def add_flags(flags: argparse.ArgumentParser) -> None:
    flags.description, flags.formatter_class = __doc__, argparse.RawDescriptionHelpFormatter
    kinds = flags.add_subparsers(dest="what", required=True, metavar="WHAT")
    pareto = kinds.add_parser("pareto", help="accuracy against cost")
    pareto.add_argument("--model", default="nano", help="preset name, folder or hub id (default: nano)")
    pareto.add_argument("--branches", metavar="B", help="gate and SD-RPN: folder or hub id (default: the model's)")
    pareto.add_argument(
        "--rival", metavar="M", help="a second baseline: another model, without zooming, at the baseline's budgets"
    )
    pareto.add_argument(
        "--tasks",
        "--suites",
        type=_names,
        metavar="A,B",
        help="needle tasks (default: needle-scene,needle-doc,needle-global)",
    )
    pareto.add_argument(
        "--budgets", type=_numbers, metavar="N,N", help="visual tokens of the baseline (default: six, from 64 to 576)"
    )
    pareto.add_argument(
        "--coarse",
        type=_numbers,
        metavar="N,N",
        help="visual tokens of the coarse view (default: four, from 64 to 256)",
    )
    ablation = kinds.add_parser("ablation", help="one choice changed")
    ablation.add_argument("name", help="name of the ablation; `list` shows them all")
    ablation.add_argument(
        "--run",
        type=Path,
        default=Path("runs/branches"),
        help="output folder of qzoom train branches (default: runs/branches)",
    )
    for kind, out in ((pareto, "runs/pareto"), (ablation, "runs/ablations")):
        kind.add_argument("--n", type=positive_int, default=100, help="questions a task (default: 100)")
        kind.add_argument("--seed", type=whole_number, default=0, help="draw other questions (default: 0)")
        kind.add_argument("--out", type=Path, default=Path(out), help=f"folder to write (default: {out})")


def run(args: argparse.Namespace) -> int:
    return _pareto(args) if args.what == "pareto" else _ablation(args)


def _pareto(args: argparse.Namespace) -> int:
    from qzoom_agent.evaluation import pareto
    from qzoom_agent.evaluation.interleaved import measure
    from qzoom_agent.evaluation.pareto import draw
    from qzoom_agent.evaluation.tasks.needle import require_task

    console = Console()
    tasks: Sequence[str] = args.tasks or pareto.TASKS
    # Mistakes show before the first question.
    require("matplotlib", extra="eval", use="The figure")
    for task in tasks:
        require_task(task)
    require_folder(args.out)
    agents = pareto.arms(
        args.model,
        budgets=args.budgets or pareto.BUDGETS,
        coarse=args.coarse or pareto.COARSE,
        branches=args.branches,
        rival=args.rival,
    )
    found: list[ParetoPoint] = []
    headlines: list[Headline] = []
    for task in tasks:
        journal = args.out / f"{task}.jsonl"
        note = _progress(console, task, args.n)
        table = measure(agents, task, n=args.n, seed=args.seed, journal=journal, note=note)
        console.clear()
        found += pareto.points(task, table)
        headlines.append(pareto.headline(task, table))
    summary, every = pareto.headline_table(headlines), pareto.points_table(found)
    (args.out / "pareto.md").write_text(f"{summary}\n\n{every}\n", encoding="utf-8")
    lines = "".join(f"{one.model_dump_json()}\n" for one in found)
    (args.out / "pareto.jsonl").write_text(lines, encoding="utf-8")
    draw(found, args.out / "pareto.png", args.out / "pareto.svg")
    print(f"{summary}\n\n{every}", flush=True)
    return OK


def _ablation(args: argparse.Namespace) -> int:
    from qzoom_agent.training.branches.ablation import ABLATIONS, ablate

    if args.name == "list":
        for name, one in ABLATIONS.items():
            print(f"{name:<18} {one.summary}")
        return OK
    console = Console()
    require_folder(args.out)

    def progress(task: str) -> Callable[[int], None]:
        return _progress(console, task, args.n)

    print(ablate(args.name, args.run, args.out, n=args.n, seed=args.seed, progress=progress), flush=True)
    return OK


def _progress(console: Console, task: str, total: int) -> Callable[[int], None]:
    return lambda done: console.progress(done, total, f"{task} {done}/{total}")


def _numbers(text: str) -> list[int]:
    return sorted({positive_int(part) for part in text.split(",")})


def _names(text: str) -> list[str]:
    return list(dict.fromkeys(text.split(",")))
