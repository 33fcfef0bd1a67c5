"""The table of `docs/nano.md`: nano on every needle task, under every policy, in one resumable command.

    python evals/evidence.py --out runs/evidence --n 500 --write docs/nano.md
    python evals/evidence.py --out runs/evidence --n 500 --part 1/2   (half of the rows, for two processes)
    python evals/evidence.py --out runs/rl --model runs/grpo/final --policies explicit,hybrid
    python evals/evidence.py --out runs/judge --policies hybrid --set review.insert=false

Each row of the table is a run folder under `--out`: one that is finished is read, one that was interrupted is resumed.
Full-resolution boards are in `docs/results.md`, with their baselines (`qzoom bench pareto`).
Policies that need branches are left out for a model that has none, and so is the oracle where nothing needs a crop.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Final, NamedTuple

from qzoom_agent.agent import Agent
from qzoom_agent.config import AgentConfig, PolicyName, read_setting
from qzoom_agent.data.samples import TaskSource
from qzoom_agent.errors import ConfigError, finished
from qzoom_agent.evaluation.compare import compare
from qzoom_agent.evaluation.run_log import RunFolder, environment, fingerprint
from qzoom_agent.evaluation.runner import evaluate
from qzoom_agent.evaluation.summary import Results, TaskResult
from qzoom_agent.evaluation.tasks.catalog import find_task
from qzoom_agent.evaluation.tasks.needle import TASK_NAMES
from qzoom_agent.report.markdown import markdown_table

POLICIES: Final[tuple[PolicyName, ...]] = (
    "direct",
    "explicit",
    "implicit",
    "always",
    "hybrid",
    "oracle",
    "random",
    "blind",
)
_NEED_BRANCHES: Final[frozenset[PolicyName]] = frozenset({"implicit", "always", "hybrid"})
PAIRS: Final[tuple[tuple[PolicyName, PolicyName], ...]] = (
    ("direct", "explicit"),
    ("blind", "explicit"),
    ("random", "oracle"),
    ("explicit", "oracle"),
    ("always", "implicit"),
    ("explicit", "hybrid"),
)
"""Compared pairs: the crop at all, its content, its place, better places, the gate, the review."""
BEGIN: Final = "<!-- evidence: begin -->"
END: Final = "<!-- evidence: end -->"


class Case(NamedTuple):
    """One row of the table, at the model's own budget."""

    task: str
    policy: PolicyName
    split: str = "test"

    @property
    def name(self) -> str:
        return "--".join(self)


CASES: Final[tuple[Case, ...]] = (
    *(
        Case(task, policy)
        for task in TASK_NAMES
        for policy in POLICIES
        if not (task == "needle-global" and policy in {"oracle", "random"})
    ),
    *(Case(task, policy, split="ood") for task in ("needle-scene", "needle-doc") for policy in ("explicit", "oracle")),
)


def table(results: Sequence[tuple[Case, TaskResult]]) -> str:
    """Return the results as a Markdown table."""
    names = ("task", "split", "policy", "accuracy", "95 % interval", "n", "zooms", "gate", "box recall")
    rows = []
    for case, result in results:
        look, cost = result.perception, result.cost
        interval = result.interval
        cells = [
            case.task,
            case.split,
            case.policy,
            f"{result.accuracy:.1%}",
            f"{interval.low:.1%} to {interval.high:.1%}" if interval else "-",
            str(result.n),
            f"{look.zooms:.2f}",
            "-" if look.gate_rate is None else f"{look.gate_rate:.0%}",
            "-" if look.recall is None else f"{look.recall.mean:.0%}",
            f"{cost.visual_tokens.mean:.0f}",
            f"{look.failed / look.calls:.1%}" if look.calls else "-",
            f"{cost.seconds.mean:.2f}",
        ]
        rows.append(cells)
    return markdown_table([*names, "visual tokens", "failed calls", "seconds"], rows)


def differences(cases: Sequence[Case], out: Path) -> str:
    """Return the gain of each change of policy in points of accuracy, paired by question, as a Markdown table.

    Tasks and pairs of which both policies are among `cases`; empty if there are none.
    """
    known = set(cases)
    rows = []
    for task in TASK_NAMES:
        cells: list[str] = [task]
        for before, after in PAIRS:
            pair = Case(task, before), Case(task, after)
            if not known.issuperset(pair):
                cells.append("-")
                continue
            first, second = (RunFolder.existing(out / case.name) for case in pair)
            found = compare(first, second).tasks[task].difference
            interval = found.interval
            bounds = f" ({100 * interval.low:+.1f} to {100 * interval.high:+.1f})" if interval else ""
            cells.append(f"{100 * found.difference:+.1f}{bounds}")
        if any(cell != "-" for cell in cells[1:]):
            rows.append(cells)
    head = ["points, paired by question", *(f"{after} - {before}" for before, after in PAIRS)]
    return markdown_table(head, rows) if rows else ""


def run(case: Case, agent: Agent, *, n: int, seed: int, weights: str | None, out: Path, workers: int = 1) -> TaskResult:
    """Return the result of one row: from disk if it is finished, else by running it, `workers` questions at once."""
    folder, asked = RunFolder(out / case.name), agent.replace(policy=case.policy)
    known = (folder.path / "results.json").exists()
    if known and folder.ask.weights == weights and folder.config == asked.config:
        found = Results.of(folder)
        result = found.tasks[case.task]
        if found.seed == seed and result.n == n and not result.failed:
            return result
    results = evaluate(
        asked,
        [find_task(case.task)],
        out=folder.path,
        source=TaskSource(split=case.split, seed=seed, n=n),
        own_budget=True,
        weights=weights,
        environment=environment(),
        workers=workers,
        traces=False,
    )
    result = results.tasks[case.task]
    print(f"{case.name}: {result.accuracy:.1%} of {result.n}", file=sys.stderr, flush=True)
    return result


def write(text: str, path: Path) -> None:
    """Put the table between the two marks of a Markdown file; ConfigError if they are not there."""
    page = path.read_text(encoding="utf-8") if path.is_file() else ""
    before, begin, rest = page.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end:
        raise ConfigError(f"{path} has no place for the table: it needs the lines {BEGIN} and {END}.")
    path.write_text(f"{before}{BEGIN}\n\n{text}\n\n{END}{after}", encoding="utf-8")


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder of the run folders, one a row")
    parser.add_argument("--model", default="nano")
    parser.add_argument("--n", type=int, default=500, help="questions a row")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--part", default="1/1", help="I/K: every K-th row from the I-th")
    parser.add_argument("--policies", help="only the rows of these, such as explicit,hybrid")
    parser.add_argument(
        "--set", action="append", default=[], metavar="KEY=VALUE", help="any other setting of the agent"
    )
    parser.add_argument("--write", type=Path, metavar="FILE", help="put the table into this Markdown file too")
    options = parser.parse_args(argv)
    part, _, of = options.part.partition("/")
    if not (part.isdigit() and of.isdigit() and 1 <= int(part) <= int(of)):
        raise ConfigError(f"--part is I/K with 1 <= I <= K, such as 1/2; got {options.part!r}.")
    wanted = set((options.policies or ",".join(POLICIES)).split(","))
    if strange := sorted(wanted - set(POLICIES)):
        raise ConfigError(f"There is no policy {', '.join(strange)}. Choose from {', '.join(POLICIES)}.")
    if options.write and (int(of) > 1 or options.policies or options.set):
        raise ConfigError(
            "--write takes the whole table: without --part, --policies and --set, once all rows are done."
        )
    settings = dict(read_setting(text) for text in options.set)
    weights = {policy: fingerprint(options.model, base_only=policy not in _NEED_BRANCHES) for policy in POLICIES}
    with Agent.from_pretrained(options.model, config=AgentConfig(policy="direct").replace(**settings)) as agent:
        cases = [case for case in CASES if case.policy in wanted]
        cases = [case for case in cases if agent.backend.perceives or case.policy not in _NEED_BRANCHES]
        results = [
            (case, run(case, agent, n=options.n, seed=options.seed, weights=weights[case.policy], out=options.out))
            for case in cases[int(part) - 1 :: int(of)]
        ]
    text = table(results)
    if worth := differences([case for case, _ in results], options.out):
        text += f"\n\n{worth}"
    print(text)
    if options.write:
        write(text, options.write)
    return 0


if __name__ == "__main__":
    sys.exit(finished("evidence", main))
