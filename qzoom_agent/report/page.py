"""What the HTML pages are built of: the document, numbers in words, images as data, and boxes over the original.

A page is one file that opens from disk, asks the network for nothing, and reads without scripts.

Invariants
- Texts are untrusted: `markup.el` escapes whatever it is not told is markup, and the page's own policy (CSP) allows
  exactly one script and one style sheet, by hash, so that even markup that slipped through could not run, load or
  restyle anything.
- Positions live in the generated style sheet, as numbers formatted here; no element carries a style of its own.
- The size is bounded: images are scaled and compressed to a share of a fixed number of bytes. A page of a run folder
  may link to pictures beside it instead (`ImageLink`): thousands of pages then share them.
Deliberately not here: what a page says (`report.py` an episode, `report_look.py` one look, `evals.report` a run).
"""

from __future__ import annotations

import base64
import hashlib
import io
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from importlib import resources
from pathlib import Path

import PIL.Image

from qzoom_agent.errors import TraceError
from qzoom_agent.files import whole
from qzoom_agent.report.markup import Html, cut, el
from qzoom_agent.report.overlay import MAX_SIDE, OPACITY, heat_image
from qzoom_agent.trace import Quad
from qzoom_agent.views import View

COLOURS = 8
"""Turns take the colours .c0 to .c7 of report.css in order, then again from the first."""
CROP_BYTES = 160_000
"""For all small images of a page together."""
_ORIGINAL_BYTES = 480_000


class ImageLink(str):
    """Where a picture lies beside the page, which then does not hold it."""

    __slots__ = ()


Picture = PIL.Image.Image | ImageLink
Pictures = Callable[[str], Picture]
"""Finds a picture by its digest."""


def document(title: str, *body: str | None, rules: str = "", script: str | None = None, linked: bool = False) -> str:
    """A whole page; `rules` is added to the style sheet of all pages.

    script: instead of the one of episodes. linked: pictures may be `ImageLink`s.
    """
    style, script = asset("report.css") + rules, script if script is not None else asset("report.js")
    sources = "data: 'self' file:" if linked else "data:"
    policy = (
        f"default-src 'none'; img-src {sources}; style-src '{_hash(style)}'; script-src '{_hash(script)}'; "
        "base-uri 'none'; form-action 'none'"
    )
    head = el(
        "head",
        el("meta", charset="utf-8"),
        el("meta", http_equiv="Content-Security-Policy", content=policy),
        el("meta", name="viewport", content="width=device-width, initial-scale=1"),
        el("meta", name="color-scheme", content="light dark"),
        el("meta", name="referrer", content="no-referrer"),
        el("title", title),
        el("style", Html(style)),
    )
    return "<!doctype html>\n" + el("html", head, el("body", *body, el("script", Html(script))), lang="en") + "\n"


def write_page(page: str, path: Path | str) -> Path:
    """Write a page to `path` (folders are created) in one step and return it; TraceError if that is impossible."""
    path = Path(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with whole(path) as part:
            part.write_text(page, encoding="utf-8", newline="\n")
    except OSError as error:
        raise TraceError(f"A report could not be written - {path}: {error} - choose another place for it.") from error
    return path


def asset(name: str, package: str = "qzoom_agent.report") -> str:
    """A text file of the package."""
    return resources.files(package).joinpath(name).read_text(encoding="utf-8").replace("\r\n", "\n")


def _hash(inline: str) -> str:
    return "sha256-" + base64.b64encode(hashlib.sha256(inline.encode()).digest()).decode()


# -- numbers ---------------------------------------------------------------------------------------------------------


def number(value: float) -> str:
    if not math.isfinite(value):
        return str(value)
    return f"{value:,.0f}" if float(value).is_integer() and abs(value) < 1e9 else f"{value:.3g}"


def listed(box: Sequence[float]) -> str:
    return "[" + ", ".join(number(value) for value in box) + "]"


def seconds(value: float) -> str:
    return f"{value:.2f} s" if value < 10 else f"{value:,.0f} s"


def share(part: float, whole: float) -> str:
    percent = 100 * part / whole if whole else 0.0
    return f"{percent:.1f}%" if percent < 10 else f"{percent:.0f}%"


def dots(parts: Iterable[str | None]) -> str:
    """What there is of `parts`, on one line."""
    return " \u00b7 ".join(part for part in parts if part)


def cost(visual: int, written: int, spent: float) -> str:
    return dots([f"{visual:,} visual" if visual else None, f"{written:,} written" if written else None, seconds(spent)])


def full_tokens(views: Sequence[View]) -> float | None:
    """What the original would cost at the coarse view's pixels per token; None without one of the two."""
    original = next((view for view in views if view.kind == "original"), None)
    coarse = next((view for view in views if view.kind == "coarse" and view.tokens), None)
    if original is None or coarse is None:
        return None
    return coarse.tokens * original.width * original.height / max(1, coarse.width * coarse.height)


# -- small parts -----------------------------------------------------------------------------------------------------


def facts(items: Iterable[str | None]) -> Html | None:
    found = [el("li", item) for item in items if item]
    return el("ul", found, cls="facts") if found else None


def brand(*what: str) -> Html:
    """The page's first line."""
    frame = el("rect", x="1", y="1", width="18", height="18", rx="4", cls="frame")
    crop = el("rect", x="10", y="5", width="5", height="5", rx="1", cls="level")
    logo = el("svg", frame, crop, viewBox="0 0 20 20", cls="logo", aria_hidden="true")
    return el("p", logo, el("b", "qzoom"), el("span", *what), cls="brand")


def name(what: str, value: str) -> Html | None:
    return el("li", el("span", what), " ", cut(value, 120)) if value else None


def total(what: str, value: str, split: Sequence[float], note: str) -> Html:
    """One of the large numbers at the top; `split` is drawn as a bar of its parts."""
    whole, start, bars = sum(split), 0.0, []
    for index, part in enumerate(split):
        if whole > 0 and part > 0 and math.isfinite(whole):
            width = 100 * part / whole
            bars.append(el("rect", x=f"{start:.2f}", width=f"{width:.2f}", height="4", cls=f"s{index}"))
            start += width
    bar = el("svg", bars, viewBox="0 0 100 4", preserveAspectRatio="none", aria_hidden="true") if bars else None
    return el("div", el("dt", what), el("dd", value, cls="big"), el("dd", note, bar, cls="note"))


def item(id: str, position: int | None, title: str, cost: str | None, body: Sequence[str | None]) -> Html:
    """An entry of the list beside the picture; boxes of that `id` light up with it."""
    return el(
        "li",
        el(
            "div",
            el("span", str(position) if position else "", cls="dot"),
            el("h2", title),
            el("span", cost, cls="cost") if cost else None,
            cls="bar",
        ),
        body,
        id=f"turn-{id}",
        cls=f"turn {_colour(position)}",
        data_turn=id,
    )


def thumbnail(image: Picture, title: str, alt: str, items: Iterable[str | None], *, limit: int) -> Html:
    """A small image with facts beside it, of about `limit` bytes."""
    return el(
        "figure",
        el("img", src=jpeg(image, 448, limit), alt=alt),
        el("figcaption", el("b", title), facts(items)),
        cls="crop",
    )


def jpeg(image: Picture, side: int, limit: int) -> str:
    """A data URI of `image`, at most `side` px and about `limit` bytes; never enlarged. A link stays what it is."""
    if isinstance(image, ImageLink):
        return image
    data = b""
    for scale, quality in ((1.0, 86), (1.0, 74), (0.8, 70), (0.6, 62), (0.4, 55), (0.2, 50)):
        small = image.convert("RGB")
        small.thumbnail((max(1, int(side * scale)),) * 2, PIL.Image.Resampling.LANCZOS)
        buffer = io.BytesIO()
        # Not optimize=True: Pillow then fails on noise, whose JPEG outgrows the buffer it guesses.
        small.save(buffer, format="JPEG", quality=quality, subsampling=0 if quality > 80 else 2)
        data = buffer.getvalue()
        if len(data) <= limit:
            break
    return "data:image/jpeg;base64," + base64.b64encode(data).decode()


# -- the picture -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class BoxMark:
    """A box drawn over the original; fractions of its width and height, x1 y1 x2 y2."""

    kind: str
    turn: int | None
    label: str
    title: str
    box: Quad

    def rule(self, index: int) -> str:
        x1, y1, x2, y2 = (100 * value for value in self.box)
        return f".m{index}{{left:{x1:.3f}%;top:{y1:.3f}%;width:{x2 - x1:.3f}%;height:{y2 - y1:.3f}%}}\n"

    def html(self, index: int) -> Html:
        side = ["in"] if self.box[1] < 0.05 else []
        side += ["rt"] if self.box[0] > 0.92 else []
        return el(
            "a" if self.turn is not None else "div",
            el("span", self.label) if self.label else None,
            cls=" ".join(["box", self.kind, f"m{index}", _colour(self.turn), *side]),
            href=f"#turn-{self.turn}" if self.turn is not None else None,
            data_turn=str(self.turn) if self.turn is not None else None,
            title=self.title,
            aria_label=self.title if self.turn is not None else None,
        )


def _colour(turn: int | None) -> str:
    """Turns count from 1; 0 is the first look, before the model spoke."""
    return f"c{(turn - 1) % COLOURS}" if turn else "cx"


def picture(
    image: Picture,
    original: View,
    marks: Sequence[BoxMark],
    *,
    alt: str,
    heat: Sequence[Sequence[float]],
    toggles: Sequence[Html | None],
    heat_on: bool = False,
    steps: str | None = None,
) -> Html:
    """The original with boxes and heat map, and what is switched on and off. `picture_rules` places all of it.

    `steps` is what the arrow keys step through.
    """
    size = f"{original.width} x {original.height}"
    warm = any(heat)
    stage = el(
        "div",
        el(
            "img",
            src=jpeg(image, MAX_SIDE, _ORIGINAL_BYTES),
            alt=f"The original image, {size} pixels, {alt}",
            cls="original",
        ),
        el("img", src=_heat_png(heat), alt="Heat map of where detail is needed", cls="heat") if warm else None,
        [mark.html(index) for index, mark in enumerate(marks)],
        cls="stage",
    )
    arrows = el("span", el("kbd", "\u2190"), el("kbd", "\u2192"), f" between {steps}", cls="keys", hidden=True)
    caption = el(
        "figcaption",
        el("span", f"Original, {size} px"),
        el("span", toggles, [toggle("warmth", "Heat map", heat_on), _dial()] if warm else None, cls="toggles"),
        arrows if steps else None,
    )
    return el("figure", stage, caption, cls="picture")


def picture_rules(original: View, marks: Sequence[BoxMark]) -> str:
    """The style sheet's part about one picture."""
    # Percent positions only fit if the stage has the image's shape, also when the height is what limits it.
    ratio = original.width / max(1, original.height)
    stage = f".stage{{aspect-ratio:{ratio:.5f};max-width:calc(var(--tall) * {ratio:.5f})}}\n"
    return "".join(mark.rule(index) for index, mark in enumerate(marks)) + stage + f".heat{{opacity:{OPACITY}}}\n"


def toggle(id: str, label: str, on: bool) -> Html:
    """A switch that works without scripts; report.css says what it hides."""
    return el("label", el("input", type="checkbox", id=id, checked=on), label)


def _dial() -> Html:
    # Only a script can follow a range, so it stays hidden until there is one.
    value = f"{100 * OPACITY:.0f}"
    dial = el(
        "input", type="range", id="opacity", min="0", max="100", value=value, aria_label="Opacity of the heat map"
    )
    return el("label", dial, cls="dial", hidden=True)


def _heat_png(heat: Sequence[Sequence[float]]) -> str:
    buffer = io.BytesIO()
    heat_image(heat).save(buffer, format="PNG", optimize=True)
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()
