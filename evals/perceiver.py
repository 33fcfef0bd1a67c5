"""Nano behind a server: what a local perceiver, a gate from log-probabilities and an asked-for box are worth.

    vllm serve qzoom_agent/weights/nano --served-model-name served --dtype bfloat16 --port 8000
    python evals/perceiver.py --server http://localhost:8000/v1 --model served --n 100 --out runs/perceiver

Every way of asking answers the same questions of needle-scene and needle-doc, in a run folder of its own, so that the
same command resumes. `image tokens` counts each view once, as a server with a prefix cache encodes it; `sent` counts
each view in every request.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping
from pathlib import Path
from statistics import fmean
from typing import Any, Final

from qzoom_agent.agent import Agent
from qzoom_agent.data.samples import TaskSource
from qzoom_agent.errors import finished
from qzoom_agent.evaluation.run_log import RunFolder
from qzoom_agent.evaluation.runner import evaluate
from qzoom_agent.evaluation.stats import figure, paired
from qzoom_agent.evaluation.tasks.catalog import find_task
from qzoom_agent.geometry import tokens
from qzoom_agent.images import load_image
from qzoom_agent.models.presets import NANO_BUDGET
from qzoom_agent.models.server import ServerBackend

TASKS: Final = ("needle-scene", "needle-doc")
WHOLE: Final = 576
"""Visual tokens of a whole board: nano reads its print from here on."""
ARMS: Final[Mapping[str, dict[str, Any]]] = {
    "local": {"policy": "implicit"},
    "coarse": {"policy": "direct"},
    "whole": {"policy": "direct", "budget.coarse_tokens": WHOLE},
    "perceiver": {"policy": "implicit", "perceiver": "nano"},
    "perceiver-answer": {"policy": "implicit", "perceiver": "nano", "perception.gate": "answer"},
    "locate": {"policy": "locate"},
    "locate-answer": {"policy": "locate", "perception.gate": "answer"},
    "explicit": {"policy": "explicit"},
}
"""Ways of asking, by name, and their settings."""


def agent_of(arm: str, server: str, model: str) -> Agent:
    """Return the agent of a way of asking; the server's nano has the budgets and the format of the local one."""
    how = dict(ARMS[arm])
    if arm == "local":
        return Agent.from_pretrained("nano", device="cpu", **how)
    low, high = NANO_BUDGET.roi_tokens or (None, None)
    nano = {
        "protocol": "nano",
        "budget.coarse_min_tokens": NANO_BUDGET.coarse_min_tokens,
        "budget.coarse_tokens": NANO_BUDGET.coarse_max_tokens,
        "budget.crop_min_tokens": NANO_BUDGET.crop_min_tokens,
        "budget.crop_max_tokens": NANO_BUDGET.crop_max_tokens,
        "crop.min_side": NANO_BUDGET.crop_min_side,
        "perception.roi_min_tokens": low,
        "perception.roi_max_tokens": high,
    }
    return Agent.from_server(server, model=model, **{**nano, **how})


def count_sent(agent: Agent, journal: Path) -> None:
    """Have every request of an agent write the visual tokens that it sends into a file, one number a line."""
    if not isinstance(agent.backend, ServerBackend):
        return
    client = agent.backend.client
    complete = client.complete
    journal.parent.mkdir(parents=True, exist_ok=True)

    def counting(messages: Any, **fields: Any) -> Any:
        parts = [part for turn in messages for part in turn["content"] if part["type"] == "image_url"]
        sizes = [load_image(part["image_url"]["url"]).size for part in parts]
        with journal.open("a", encoding="utf-8") as file:
            file.write(f"{sum(tokens(size, NANO_BUDGET.factor) for size in sizes)}\n")
        return complete(messages, **fields)

    client.complete = counting  # type: ignore[method-assign]


def line(name: str, folder: RunFolder, sent: list[int], against: RunFolder) -> str:
    """Return a row of the table: a way of asking, and its accuracy against another over the same questions."""
    rows = folder.latest()
    right = [row.value("exact") for row in rows]
    found = figure(right)
    low, high = found.interval or (0.0, 1.0)
    base = {(row.task, row.index): row.value("exact") for row in against.latest()}
    pairs = [(base[row.task, row.index], row.value("exact")) for row in rows if (row.task, row.index) in base]
    change = paired([one for one, _ in pairs], [other for _, other in pairs])
    by_task = [fmean(row.value("exact") for row in rows if row.task == task) for task in TASKS]
    cells = [
        name,
        *(f"{share:.1%}" for share in by_task),
        f"{found.mean:.1%} ({low:.1%} to {high:.1%})",
        f"{100 * change.difference:+.1f}",
        f"{fmean(row.visual_tokens for row in rows):.0f}",
        f"{sum(sent) / len(rows):.0f}" if sent else "-",
        f"{len(sent) / len(rows):.2f}" if sent else "-",
        f"{fmean(row.zooms for row in rows):.2f}",
        f"{sum(row.status == 'error' for row in rows)}",
    ]
    return f"| {' | '.join(cells)} |"


def main() -> int:
    """Ask in every way that is named, and print the table."""
    flags = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    flags.add_argument("--server", required=True, metavar="URL")
    flags.add_argument("--model", default="served", metavar="M", help="nano's name at the server (default: served)")
    flags.add_argument("--n", type=int, default=100, help="questions of each task (default: 100)")
    flags.add_argument("--out", type=Path, required=True, metavar="DIR")
    flags.add_argument("--workers", type=int, default=2, help="questions at once (default: 2)")
    flags.add_argument("--arms", default=",".join(ARMS), help="ways to ask, separated by commas")
    args = flags.parse_args()
    names = args.arms.split(",")
    tasks = [find_task(name) for name in TASKS]
    for name in names:
        folder = args.out / name
        agent = agent_of(name, args.server, args.model)
        count_sent(agent, folder.with_suffix(".sent"))
        evaluate(agent, tasks, out=folder, source=TaskSource(n=args.n), workers=args.workers, own_budget=True)
        print(f"{name}: done", file=sys.stderr, flush=True)
    print("| way | scenes | documents | right | against local | image tokens | sent | requests | crops | errors |")
    print("|---|---|---|---|---|---|---|---|---|---|")
    for name in names:
        folder = args.out / name
        journal = folder.with_suffix(".sent")
        sent = [int(number) for number in journal.read_text().split()] if journal.exists() else []
        print(line(name, RunFolder(folder), sent, RunFolder(args.out / "local")), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(finished("perceiver.py", main))
