"""The figures of `docs/nano.md`: every suite, policy and budget that nano is judged by, in one resumable command.

    python -m qzoom_agent.evals.evidence --out runs/evidence --n 500
    python -m qzoom_agent.evals.evidence --out runs/evidence --n 500 --part 1/2   (half of the rows, for two processes)

A row that is on disk is not run again, one that was interrupted goes on. The table is printed from what is there.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from qzoom_agent.agent import Agent
from qzoom_agent.config import AgentConfig, PolicyName
from qzoom_agent.errors import ConfigError
from qzoom_agent.evals.runner import Result, Row, evaluate

BUDGETS = (64, 144, 256, 400, 576)


class Case(NamedTuple):
    """One row of the table; `budget` is the most visual tokens of the coarse view, None the model's own."""

    suite: str
    policy: PolicyName
    budget: int | None = None
    split: str = "test"

    @property
    def name(self) -> str:
        return "--".join((self.suite, self.policy, str(self.budget or "coarse"), self.split))


CASES: tuple[Case, ...] = (
    Case("needle-global", "direct"),
    Case("needle-scene", "oracle"),
    Case("needle-doc", "oracle"),
    Case("needle-scene", "explicit"),
    Case("needle-doc", "explicit"),
    Case("needle-hop", "explicit"),
    Case("needle-global", "explicit"),
    Case("needle-scene", "oracle", split="ood"),
    Case("needle-doc", "oracle", split="ood"),
    *(Case(suite, "direct", budget) for budget in BUDGETS for suite in ("needle-scene", "needle-doc")),
    Case("needle-hop", "oracle"),
    Case("needle-hop", "direct"),
)


def table(results: Sequence[tuple[Case, Result]]) -> str:
    """The results as a Markdown table."""
    lines = [
        "| suite | split | policy | coarse budget | accuracy | 95 % interval | n | zooms | visual tokens "
        "| failed calls | seconds |",
        "|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for case, result in results:
        failed = "-" if result.failed_call_share is None else f"{result.failed_call_share:.1%}"
        low, high = result.interval
        cells = (
            case.suite,
            case.split,
            case.policy,
            str(case.budget or "64 (preset)"),
            f"{result.accuracy:.1%}",
            f"{low:.1%} to {high:.1%}",
            str(result.n),
            f"{result.zooms:.2f}",
            f"{result.visual_tokens:.0f}",
            failed,
            f"{result.seconds:.2f}",
        )
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def run(case: Case, *, model: str, n: int, seed: int, out: Path) -> Result:
    """The result of one row: from disk if it is there, else by running it."""
    path = out / f"{case.name}.json"
    if path.exists():
        result = Result.model_validate_json(path.read_text())
        before, now = (result.config.model, result.planned, result.seed), (model, n, seed)
        if before != now:
            raise ConfigError(
                f"{path} is of another evaluation: (model, n, seed) was {before}, now {now}. "
                "Delete it, or choose another --out."
            )
        return result
    config = AgentConfig(model=model, policy=case.policy)
    if case.budget is not None:
        config = config.replace(**{"budget.coarse_tokens": case.budget})
    right = 0

    def tell(row: Row) -> None:
        nonlocal right
        right += row.correct

    with Agent.from_pretrained(model, config=config) as agent:
        result = evaluate(
            agent, case.suite, n=n, seed=seed, split=case.split, journal=out / f"{case.name}.rows.jsonl", on_row=tell
        )
    path.write_text(result.model_dump_json())
    (out / f"{case.name}.rows.jsonl").unlink()
    print(f"{case.name}: {right}/{n}", file=sys.stderr, flush=True)
    return result


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder of the results, one JSON a row")
    parser.add_argument("--model", default="nano")
    parser.add_argument("--n", type=int, default=500, help="questions a row")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--part", default="1/1", help="I/K: every K-th row from the I-th")
    options = parser.parse_args(argv)
    part, _, of = options.part.partition("/")
    if not (part.isdigit() and of.isdigit() and 1 <= int(part) <= int(of)):
        raise ConfigError(f"--part is I/K with 1 <= I <= K, such as 1/2; got {options.part!r}.")
    options.out.mkdir(parents=True, exist_ok=True)
    chosen = CASES[int(part) - 1 :: int(of)]
    results = [
        (case, run(case, model=options.model, n=options.n, seed=options.seed, out=options.out)) for case in chosen
    ]
    print(table(results))
    return 0


if __name__ == "__main__":
    sys.exit(main())
