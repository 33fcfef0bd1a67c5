"""`qzoom demo`: questions about three boards and a receipt, answered by the two models that ship with the package.

The pictures ship too (`qzoom_agent/data/demo`). The boards are of the test split, so nano was not trained on them, and
they were chosen because nano answers all three; the receipt is drawn, from a seed that no training used, and was chosen
because nano-paper answers it (`rl/demo_receipt.py`). `--seed` draws other boards, on which nano errs at the rates of
docs/nano.md. The right answer is printed beside the model's in any case.
"""

from __future__ import annotations

import argparse
import json
from dataclasses import replace
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qzoom_agent.cli.console import Console, printable
from qzoom_agent.cli.options import add_agent_flags, load_agent, read_config
from qzoom_agent.errors import ConfigError
from qzoom_agent.files import require_file, require_folder

if TYPE_CHECKING:
    from qzoom_agent.data.samples import Sample


def add_flags(flags: argparse.ArgumentParser) -> None:
    flags.description = (
        "Answer three questions of rising difficulty about boards (nano) and one about a receipt (nano-paper). "
        "A model that you name answers all of them."
    )
    flags.add_argument(
        "--out", metavar="DIR", default="qzoom-demo", help="folder for pictures and reports (default: qzoom-demo)"
    )
    flags.add_argument(
        "--seed",
        type=int,
        metavar="N",
        help="draw other boards from this seed, and leave out the receipt (default: the pictures that ship)",
    )
    add_agent_flags(flags)


def run(args: argparse.Namespace) -> int:
    """Run the demo and return 4 if the model failed on a question, 0 otherwise, right or wrong."""
    console = Console()

    from qzoom_agent.cli.ask import EXIT_CODES, follow, summary
    from qzoom_agent.report.episode import write_report
    from qzoom_agent.trace import by_digest

    config = read_config(args)
    # What belongs to one model, as branches do, fits no other.
    one_model = bool(args.server or args.branches) or "model" in config.model_fields_set
    # Boards are drawn anew by the package; the generator of receipts is not in it.
    rows = [row for row in _shipped() if args.seed is None or "model" not in row]
    questions = [(row, _sample(row, number, args.seed)) for number, row in enumerate(rows, start=1)]
    out = require_folder(args.out)
    for row, sample in questions:
        require_file(out / row["image"])
        require_file(out / f"{sample.id}.html")
    agent = load_agent(args)
    code = 0
    for number, (row, sample) in enumerate(questions, start=1):
        picture = out / row["image"]
        if args.seed is None:
            picture.write_bytes(_file(row["image"]))
        else:
            sample.image.save(picture)
        console.line(f"{number}. {sample.question}", "bold")
        console.line(f"   {row['shows']}", "dim")
        if "model" in row and not one_model:
            agent = load_agent(argparse.Namespace(**vars(args) | {"model": row["model"]}))
        # No single look finds two crops of which the second depends on the first: there the model asks for crops.
        steps = len(sample.boxes) > 1 and config.policy is None
        asked = agent.replace(policy="explicit") if steps else agent
        # The known boxes are drawn in the report; neither default policy looks at them.
        events = asked.stream(sample.image, sample.question, boxes=sample.boxes)
        answer = follow(events, console, [sample.image.width * sample.image.height])
        verdict = "right" if _right(answer.text, sample) else f"wrong, it is {sample.answer}"
        print(f"{printable(answer.text) or 'no answer'}  ({verdict})", flush=True)
        if answer.trace.error:
            console.error(f"The model failed: {printable(answer.trace.error)}")
        console.line(summary(answer.trace), "dim")
        images = by_digest(answer.trace.views, answer.store.image)
        page = write_report(answer.trace, images, out / f"{sample.id}.html", expected=sample.answer)
        console.line(f"picture {picture}, report {page}\n")
        if answer.status == "error":
            code = EXIT_CODES["error"]
    console.line(f"Open the reports in {out} with a browser to see where the model looked.")
    return code


def _file(name: str) -> bytes:
    return (resources.files("qzoom_agent.data") / "demo" / name).read_bytes()


def _shipped() -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = json.loads(_file("questions.json"))
    return rows


def _right(said: str, sample: Sample) -> bool:
    if sample.kind == "total":  # an amount, with or without its currency
        from qzoom_agent.evaluation.scorers.receipts import same

        return same(said, sample.answer, sample.kind)
    from qzoom_agent.evaluation.scorers.match import exact_match

    return exact_match(said, sample.answer)


def _sample(row: dict[str, Any], number: int, seed: int | None) -> Sample:
    """Return a question that ships, or one of the same kind from another seed."""
    name = Path(row["image"]).stem
    if seed is None:
        from qzoom_agent.data.samples import Sample
        from qzoom_agent.geometry import Box
        from qzoom_agent.images import load_image

        image = load_image(_file(row["image"]))
        boxes = tuple(Box(*box) for box in row["boxes"])
        return Sample(name, name, row.get("kind", ""), image, row["question"], row["answer"], boxes)
    from qzoom_agent.evaluation.tasks.needle import sample, sample_seed

    if seed < 0:
        raise ConfigError(f"A seed is 0 or more; got {seed}.")
    return replace(sample(f"needle-{name[2:]}", sample_seed(seed, number)), id=name)
