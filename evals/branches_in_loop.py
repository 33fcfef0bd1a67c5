"""The table of `docs/grpo.md` on GRPO with gate and SD-RPN in the loop: six runs, as many seeds of each, resumable.

    qzoom train coldstart --config rl/recipes/nano/coldstart_hungry.yaml --output runs/hungry
    python evals/branches_in_loop.py runs/hungry/final --out runs/loop --seeds 0,1,2 --steps 40
    python evals/branches_in_loop.py runs/hungry/final --out runs/loop --seeds 0 --runs a,c --table   (no training)
    python evals/branches_in_loop.py runs/hungry/final --out runs/small --set budget.crop_max_tokens=32

With crops of at most 32 visual tokens the model reads less to begin with: a start with head-room.

Each run trains from the given model and is then asked test questions under its own policy, under `explicit` and under
`hybrid`, whose review inserts nothing. Run a under `hybrid` is the control: it says what the review alone saves of a
model that never met it. Rows of all seeds are compared question by question.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from statistics import fmean, median
from typing import Any, Final, NamedTuple

from evidence import Case, run
from qzoom_agent.agent import Agent
from qzoom_agent.config import AgentConfig, PolicyName, read_setting
from qzoom_agent.errors import ConfigError, finished
from qzoom_agent.evaluation.run_log import RunFolder, fingerprint
from qzoom_agent.evaluation.sample_result import SampleResult
from qzoom_agent.models.scheduler import batched
from qzoom_agent.report.markdown import markdown_table
from review_savings import Side, table

TASKS: Final = ("needle-global", "needle-scene", "needle-doc", "needle-hop")
"""Those that the recipes train on."""


class Run(NamedTuple):
    """A recipe of `rl/recipes/nano`, and the policy that it trains."""

    recipe: str
    policy: PolicyName
    rewards: str


RUNS: Final[dict[str, Run]] = {
    "a": Run("grpo_accuracy", "explicit", "accuracy"),
    "b": Run("grpo", "explicit", "accuracy, price, redundancy"),
    "c": Run("grpo_hybrid", "hybrid", "accuracy"),
    "d": Run("grpo_agreement", "hybrid", "accuracy, agreement"),
    "e": Run("grpo_implicit", "implicit", "accuracy"),
    "f": Run("grpo_refusal", "hybrid", "accuracy, price of refused calls"),
}


def train(name: str, seed: int, options: argparse.Namespace) -> Path:
    """Train a run to its end and return its folder; one that is finished is left as it is, or refused if it differs."""
    output: Path = options.out / f"{name}-{seed}"
    settings = {"max_steps": options.steps, "evaluation.eval_steps": 10, "evaluation.questions": options.held_out}
    command = [
        sys.executable,
        "-m",
        "qzoom_agent",
        "train",
        "grpo",
        "--config",
        f"rl/recipes/nano/{RUNS[name].recipe}.yaml",
    ]
    command += ["--model", str(options.model), "--seed", str(seed), "--output", str(output)]
    for setting in (*(f"{key}={value}" for key, value in settings.items()), *(f"agent.{one}" for one in options.set)):
        command += ["--set", setting]
    if not options.table:
        subprocess.run(command, check=True)
    if not (output / "final").is_dir():
        raise ConfigError(f"{output} has no trained model. Run again without --table.")
    return output


def ask(
    model: Path, policies: Sequence[PolicyName], options: argparse.Namespace
) -> dict[PolicyName, list[SampleResult]]:
    """Return the rows of a model under each policy, the same questions for every model."""
    out: Path = options.out / "asked" / (model.parent.name if model.name == "final" else model.name)
    found: dict[PolicyName, list[SampleResult]] = {}
    config = AgentConfig(policy="explicit").replace(**dict(map(read_setting, ["review.insert=false", *options.set])))
    with Agent.from_pretrained(str(model), config=config) as agent:
        many = agent.replace(backend=batched(agent.backend, options.batch))
        for policy in policies:
            found[policy] = []
            weights = fingerprint(str(model), base_only=policy == "explicit")
            for task in TASKS:
                case = Case(task, policy)
                run(case, many, n=options.n, seed=0, weights=weights, out=out, workers=options.batch)
                rows = RunFolder.existing(out / case.name).latest()
                found[policy] += sorted(rows, key=lambda row: row.index)
    return found


def training_table(logs: Mapping[str, Sequence[Path]]) -> str:
    """Return what training cost, and the held-out accuracy of every tenth step: medians and means over the seeds."""
    names = ("run", "policy", "rewards", "held-out accuracy, % (step)", "visual tokens a rollout", "turns")
    lines = []
    for name, folders in logs.items():
        rows = [[json.loads(line) for line in (path / "log.jsonl").read_text().splitlines()] for path in folders]
        steps = [row for one in rows for row in one if "step_time" in row]
        last = [row for row in steps if row["step"] > row["of"] - 10]
        curve: dict[int, list[float]] = {}
        for row in (row for one in rows for row in one if "eval_zoom/accuracy" in row):
            curve.setdefault(row["step"], []).append(100 * row["eval_zoom/accuracy"])
        cells = [
            name,
            f"`{RUNS[name].policy}`",
            RUNS[name].rewards,
            ", ".join(f"{fmean(values):.1f} ({step})" for step, values in sorted(curve.items())),
            f"{_mean(last, 'zoom/visual_tokens'):.0f}",
            f"{_mean(last, 'zoom/turns'):.2f}",
            f"{median(row['step_time'] for row in steps):.1f}",
        ]
        lines.append(cells)
    return markdown_table([*names, "seconds a step"], lines)


def _mean(rows: Sequence[Mapping[str, Any]], key: str) -> float:
    return fmean(row[key] for row in rows)


def sides(found: Mapping[str, Sequence[Mapping[PolicyName, list[SampleResult]]]]) -> Iterator[tuple[str, list[Side]]]:
    """Yield the comparisons: all models under `explicit`, all under `hybrid`, and each under its own policy."""
    shared: tuple[PolicyName, ...] = ("explicit", "hybrid")
    for policy in shared:
        yield (
            f"Under `{policy}`",
            [_side(f"{name} under {policy}", [seed[policy] for seed in seeds]) for name, seeds in found.items()],
        )
    own: list[tuple[str, PolicyName]] = [("a", "hybrid"), ("a", "explicit"), ("start", "implicit")]
    own += [(name, RUNS[name].policy) for name in found if name not in {"start", "a"}]
    yield (
        "Each under its own policy, against the control",
        [_side(f"{name} under {policy}", [seed[policy] for seed in found[name]]) for name, policy in own],
    )


def _side(name: str, seeds: Sequence[list[SampleResult]]) -> Side:
    return Side(name, [row for rows in seeds for row in rows])


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path, help="folder of the model that every run starts from")
    parser.add_argument("--out", type=Path, required=True, help="folder of the runs")
    parser.add_argument("--runs", default=",".join(RUNS), help="some of a,b,c,d,e,f; a is always among them")
    parser.add_argument("--seeds", default="0,1,2")
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--held-out", type=int, default=100, help="questions of the curve")
    parser.add_argument("--n", type=int, default=150, help="test questions a task")
    parser.add_argument("--batch", type=int, default=16, help="questions asked at a time")
    parser.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="KEY=VALUE",
        help="a setting of the agent, in training and when asked",
    )
    parser.add_argument("--table", action="store_true", help="train nothing: ask and print what there is")
    options = parser.parse_args(argv)
    names = sorted({"a", *options.runs.split(",")})
    if strange := sorted(set(names) - set(RUNS)):
        raise ConfigError(f"There is no run {', '.join(strange)}. Choose from {', '.join(RUNS)}.")
    seeds = [int(seed) for seed in options.seeds.split(",")]
    folders = {name: [train(name, seed, options) for seed in seeds] for name in names}
    print(training_table(folders))
    every: tuple[PolicyName, ...] = ("explicit", "hybrid", "implicit")
    found = {"start": [ask(options.model, every, options)] * len(seeds)}
    for name in names:
        policies = every if RUNS[name].policy == "implicit" else every[:2]
        found[name] = [ask(folder / "final", policies, options) for folder in folders[name]]
    for title, compared in sides(found):
        print(f"\n{title}:\n\n{table(compared)}")
    return 0


if __name__ == "__main__":
    sys.exit(finished("branches_in_loop", main))
