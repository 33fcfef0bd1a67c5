"""The pictures of `docs/concepts.md`: nano at work on the demo boards.

python evals/concept_pictures.py docs/images

concept-views.png   the original, the coarse view, and the crop that the question is answered from
concept-looks.png   heat map and proposals of two questions: one that needs no crop, and one that does
concept-steps.png   a question in two steps: the crop of the first look, and that of the second
"""

import argparse
import json
import sys
from collections.abc import Sequence
from importlib.resources import files
from pathlib import Path
from typing import Any, NamedTuple

from PIL import Image, ImageDraw, ImageFont

from qzoom_agent import Agent
from qzoom_agent.answer import Answer
from qzoom_agent.report.overlay import overlay

_TALL, _GAP, _LINE = 300, 20, 26
_INK = (30, 30, 34)


class Panel(NamedTuple):
    """A picture of a row, and the lines under it."""

    image: Image.Image
    lines: tuple[str, ...]


def views(answer: Answer) -> list[Panel]:
    """Return the original, the coarse view and the crop of a run, each with what it costs."""
    original, coarse = answer.store.view("original"), answer.store.view("coarse")
    crop = next(view for view in answer.trace.views if view.kind == "crop")
    marked = answer.store.image("original")
    ImageDraw.Draw(marked).rectangle(crop.box, outline=(220, 30, 40), width=5)
    full = round(original.width * original.height / 28**2)
    return [
        Panel(marked, (f"original, {original.width} x {original.height}", f"{full} tokens if it were shown")),
        Panel(answer.store.image("coarse"), (f"coarse view, {coarse.width} x {coarse.height}", _tokens(coarse.tokens))),
        Panel(answer.store.image(crop.id), (f"crop, {crop.width} x {crop.height}", _tokens(crop.tokens))),
    ]


def looks(agent: Agent, asked: Sequence[dict[str, Any]]) -> list[Panel]:
    """Return the map and the proposals of a look at each question."""
    found = []
    for one in asked:
        look = agent.look(_demo(one["image"]), one["question"])
        record = look.record
        assert record.score is not None and record.threshold is not None
        verdict = "look closer" if record.fired else "the coarse view suffices"
        picture = overlay(look.store.image("original"), record)
        found.append(Panel(picture, (one["question"], f"gate {record.score:.2f} of {record.threshold:.2f}: {verdict}")))
    return found


def steps(answer: Answer) -> list[Panel]:
    """Return the board of a question in several steps, with its crops in order."""
    crops = [view for view in answer.trace.views if view.kind == "crop"]
    marked = answer.store.image("original")
    for number, crop in enumerate(crops, 1):
        draw = ImageDraw.Draw(marked)
        draw.rectangle(crop.box, outline=(220, 30, 40), width=5)
        draw.text((crop.box[0] + 8, crop.box[1] + 4), str(number), fill=(220, 30, 40), font=_font(30))
    shown = [Panel(answer.store.image(crop.id), (f"crop {number}",)) for number, crop in enumerate(crops, 1)]
    return [Panel(marked, (answer.record.question, f"answer: {answer.text}")), *shown]


def row(panels: Sequence[Panel]) -> Image.Image:
    """Return the panels side by side, each enlarged to one height but a crop, which keeps its shape within it."""
    font = _font(18)
    scaled = [_fitted(panel.image) for panel in panels]
    widths = [
        max(image.width, *(round(font.getlength(line)) for line in panel.lines))
        for image, panel in zip(scaled, panels, strict=True)
    ]
    below = _LINE * max(len(panel.lines) for panel in panels)
    sheet = Image.new("RGB", (sum(widths) + _GAP * (len(panels) + 1), _TALL + below + 2 * _GAP), "white")
    pen, x = ImageDraw.Draw(sheet), _GAP
    for image, panel, width in zip(scaled, panels, widths, strict=True):
        sheet.paste(image, (x, _GAP))
        for number, line in enumerate(panel.lines):
            pen.text((x, _GAP + _TALL + 4 + number * _LINE), line, font=font, fill=_INK)
        x += width + _GAP
    return sheet


def _fitted(image: Image.Image) -> Image.Image:
    scale = min(_TALL / image.height, 1.3 * _TALL / image.width)
    size = (round(image.width * scale), round(image.height * scale))
    return image.convert("RGB").resize(size, Image.Resampling.NEAREST if scale > 1 else Image.Resampling.LANCZOS)


def _tokens(count: int) -> str:
    return f"{count} visual tokens"


def _font(size: int) -> Any:
    return ImageFont.load_default(size)


def _demo(name: str) -> str:
    return str(files("qzoom_agent.data") / "demo" / name)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Draw the pictures of docs/concepts.md.")
    parser.add_argument("folder", type=Path, help="folder to write")
    options = parser.parse_args(argv)
    options.folder.mkdir(parents=True, exist_ok=True)
    one, two, three, *_ = json.loads(Path(_demo("questions.json")).read_text(encoding="utf-8"))
    agent = Agent.from_pretrained("nano")
    drawn = {
        "views": views(agent.run(_demo(two["image"]), two["question"])),
        "looks": looks(agent, [one, two]),
        "steps": steps(agent.run(_demo(three["image"]), three["question"])),
    }
    for name, panels in drawn.items():
        path = options.folder / f"concept-{name}.png"
        row(panels).quantize(160, dither=Image.Dither.NONE).save(path, optimize=True)
        print(path)
    return 0


if __name__ == "__main__":
    sys.exit(main())
