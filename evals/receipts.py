"""Accuracy and cost on a folder of receipts: a model at several budgets and under each policy, and OCR with rules.

    python evals/receipts.py DIR --model nano-paper --rival runs/rival --set protocol=nano --out runs/on_receipts
    python evals/receipts.py DIR ... --split validation --rows implicit,oracle   (some rows)
    python evals/receipts.py DIR ... --ocr PYTHON   (the Python of an environment with RapidOCR, see receipt_ocr.py)

Each row asks the four fields of every receipt of a split, policies at the budget of the model's preset. A rival is
another set of weights that answers from whole receipts only, such as the model fine-tuned on them. Rows run one after
another, a question at a time, in this process; OCR runs after them, with as many threads. Seconds of OCR are of a whole
receipt, which gives all four fields. Rows that are there are read, so an interrupted run goes on.
"""

import argparse
import json
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final

import torch

from qzoom_agent.agent import Agent
from qzoom_agent.config import AgentConfig, read_setting
from qzoom_agent.data.samples import TaskSource
from qzoom_agent.errors import ConfigError, finished
from qzoom_agent.evaluation.run_log import RunFolder, environment, fingerprint
from qzoom_agent.evaluation.runner import evaluate
from qzoom_agent.evaluation.summary import Results, TaskResult
from qzoom_agent.evaluation.tasks.catalog import find_task
from qzoom_agent.evaluation.tasks.receipts import FIELD
from qzoom_agent.report.markdown import markdown_table

BUDGETS: Final = (128, 256, 512, 1024, 2048)
"""Most visual tokens of a whole receipt for the baseline."""
POLICIES: Final = ("implicit", "always", "oracle", "explicit", "hybrid")
UNPERCEIVING: Final = {"direct", "oracle", "explicit"}
"""Policies whose rows stay when gate and SD-RPN change."""
FIELDS: Final = ("total", "date", "company", "address")


def row(name: str, asked: Agent, weights: str | None, options: argparse.Namespace) -> TaskResult:
    """Return the result of one row: from disk if it is finished, else by running it."""
    folder = RunFolder(options.out / name)
    if (folder.path / "results.json").exists() and folder.ask.weights == weights and folder.config == asked.config:
        return Results.of(folder).tasks[FIELD]
    source = TaskSource(path=str(options.folder), split=options.split)
    found = evaluate(
        asked,
        [find_task(FIELD)],
        out=folder.path,
        source=source,
        weights=weights,
        environment=environment(),
        traces=False,
    )
    return found.tasks[FIELD]


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="folder of receipts (receipts.jsonl, images/)")
    parser.add_argument("--model", required=True)
    parser.add_argument("--branches", help="gate and SD-RPN (default: the model's)")
    parser.add_argument("--rival", help="model folder that answers from whole receipts only")
    parser.add_argument("--out", type=Path, required=True, help="folder of the run folders, one a row")
    parser.add_argument("--split", default="test")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--ocr", metavar="PYTHON", help="run receipt_ocr.py with it on the same receipts")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="a setting of every row")
    parser.add_argument("--rows", help="rows to run, with commas between (default: all)")
    options = parser.parse_args(argv)
    torch.set_num_threads(options.threads)
    given = dict(read_setting(text) for text in options.set)
    rows: dict[str, dict[str, Any]] = {policy: {"policy": policy} for policy in POLICIES}
    for budget in BUDGETS:
        rows[f"direct-{budget}"] = {"policy": "direct", "budget.coarse_tokens": budget}
    every = {*rows, *(f"rival-{name}" for name in rows)}
    wanted = set(options.rows.split(",")) if options.rows else every
    if unknown := wanted - every:
        raise ConfigError(
            f"There is no row {min(unknown)!r}. The rows are {', '.join(rows)}, and rival- and one of them."
        )
    config = AgentConfig(policy="direct").replace(**given)
    cells = []
    for prefix, model, branches in (("", options.model, options.branches), ("rival-", options.rival, None)):
        if model is None:
            continue
        with Agent.from_pretrained(model, config=config, branches=branches) as agent:
            for name, settings in rows.items():
                if prefix + name not in wanted or (prefix and settings["policy"] != "direct"):
                    continue
                weights = fingerprint(model, branches, base_only=settings["policy"] in UNPERCEIVING)
                result = row(prefix + name, agent.replace(**settings), weights, options)
                scores = [f"{100 * result.marks.kinds[kind].mean:.1f}" for kind in FIELDS]
                cost = [f"{result.cost.visual_tokens.mean:.0f}", f"{result.cost.seconds.mean:.3f}"]
                cells.append([prefix + name, *scores, *cost, str(result.n)])
    if options.ocr:
        script, out = Path(__file__).with_name("receipt_ocr.py"), options.out / "ocr.json"
        command = [options.ocr, str(script), str(options.folder), "--split", options.split, "--json", str(out)]
        subprocess.run([*command, "--threads", str(options.threads)], check=True, stdout=subprocess.DEVNULL)
        report = json.loads(out.read_text())
        scores = [f"{100 * report['scores'][kind]['clean']:.1f}" for kind in FIELDS]
        n = sum(report["scores"][kind]["n"] for kind in FIELDS)
        cells.append([report["reader"], *scores, "-", f"{report['seconds']['mean']:.3f} a receipt", str(n)])
    print(markdown_table(["row", *FIELDS, "visual tokens", "seconds", "n"], cells))
    return 0


if __name__ == "__main__":
    sys.exit(finished("receipts", main))
