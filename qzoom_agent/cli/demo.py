"""`qzoom demo`: three questions of rising difficulty, answered by the model that ships with the package.

The pictures ship too (`qzoom_agent/data/demo`). They are boards of the test split, so nano was not trained on them, and
they were chosen because nano answers all three. `--seed` draws other boards, on which nano errs at the rates of
docs/nano.md. The right answer is printed beside the model's in any case.
"""

from __future__ import annotations

import argparse
import json
from dataclasses import replace
from importlib import resources
from typing import TYPE_CHECKING, Any

from qzoom_agent.cli.console import Console, printable
from qzoom_agent.cli.options import add_agent_flags, load_agent, read_config
from qzoom_agent.errors import ConfigError
from qzoom_agent.files import require_file, require_folder

if TYPE_CHECKING:
    from qzoom_agent.data.samples import Sample


def add_flags(flags: argparse.ArgumentParser) -> None:
    """Add the flags of `qzoom demo`."""
    flags.description = "Answer three questions of rising difficulty."
    flags.add_argument(
        "--out", metavar="DIR", default="qzoom-demo", help="folder for pictures and reports (default: qzoom-demo)"
    )
    flags.add_argument(
        "--seed", type=int, metavar="N", help="draw other boards from this seed (default: the three that ship)"
    )
    add_agent_flags(flags)


def run(args: argparse.Namespace) -> int:
    """Run the demo and return 4 if the model failed on a question, 0 otherwise, right or wrong."""
    console = Console()

    from qzoom_agent.cli.ask import EXIT_CODES, follow, summary
    from qzoom_agent.evaluation.scorers.match import exact_match
    from qzoom_agent.report.episode import write_report
    from qzoom_agent.trace import by_digest

    questions = [(_sample(row, number, args.seed), row["shows"]) for number, row in enumerate(_shipped(), start=1)]
    out = require_folder(args.out)
    for sample, _ in questions:
        require_file(out / f"{sample.id}.png")
        require_file(out / f"{sample.id}.html")
    agent = load_agent(args)
    code = 0
    for number, (sample, shows) in enumerate(questions, start=1):
        board = out / f"{sample.id}.png"
        sample.image.save(board)
        console.line(f"{number}. {sample.question}", "bold")
        console.line(f"   {shows}", "dim")
        # No single look finds two crops of which the second depends on the first: there the model asks for crops.
        steps = len(sample.boxes) > 1 and read_config(args).policy is None
        asked = agent.replace(policy="explicit") if steps else agent
        # The known boxes are drawn in the report; neither default policy looks at them.
        events = asked.stream(sample.image, sample.question, boxes=sample.boxes)
        answer = follow(events, console, area=sample.image.width * sample.image.height)
        verdict = "right" if exact_match(answer.text, sample.answer) else f"wrong, it is {sample.answer}"
        print(f"{printable(answer.text) or 'no answer'}  ({verdict})", flush=True)
        if answer.trace.error:
            console.error(f"The model failed: {printable(answer.trace.error)}")
        console.line(summary(answer.trace), "dim")
        images = by_digest(answer.trace.views, answer.store.image)
        page = write_report(answer.trace, images, out / f"{sample.id}.html", expected=sample.answer)
        console.line(f"board {board}, report {page}\n")
        if answer.status == "error":
            code = EXIT_CODES["error"]
    console.line(f"Open the reports in {out} with a browser to see where the model looked.")
    return code


def _shipped() -> list[dict[str, Any]]:
    text = (resources.files("qzoom_agent.data") / "demo" / "questions.json").read_text(encoding="utf-8")
    rows: list[dict[str, Any]] = json.loads(text)
    return rows


def _sample(row: dict[str, Any], number: int, seed: int | None) -> Sample:
    """Return a question that ships, or one of the same kind from another seed."""
    name = row["image"].removesuffix(".png")
    if seed is None:
        from qzoom_agent.data.samples import Sample
        from qzoom_agent.geometry import Box
        from qzoom_agent.images import load_image

        image = load_image((resources.files("qzoom_agent.data") / "demo" / row["image"]).read_bytes())
        boxes = tuple(Box(*box) for box in row["boxes"])
        return Sample(name, name, "", image, row["question"], row["answer"], boxes)
    from qzoom_agent.evaluation.tasks.needle import sample, sample_seed

    if seed < 0:
        raise ConfigError(f"A seed is 0 or more; got {seed}.")
    return replace(sample(f"needle-{name[2:]}", sample_seed(seed, number)), id=name)
