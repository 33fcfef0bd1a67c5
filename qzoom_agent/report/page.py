"""Parts of every HTML page: the Jinja templates in templates/, texts and numbers in words, and images as data.

A page is one file that opens from disk, asks the network for nothing, and reads without scripts.

- Texts are untrusted. Jinja escapes every value (autoescape), `legible` spells out characters that a browser would hide
  or obey, and the page's content security policy (CSP) allows one script and one style sheet, by hash: even markup that
  slipped through could not run, load or restyle anything.
- Positions stand in the style sheet, as numbers formatted here; no element has a style of its own.
- The size is bounded: images are scaled and compressed to a share of a fixed number of bytes. The pages of a run folder
  link to pictures beside them instead (`ImageLink`), which thousands of pages share.
"""

import base64
import hashlib
import io
import math
import re
from collections.abc import Callable, Iterable, Sequence
from functools import cache
from importlib import resources
from pathlib import Path
from typing import Any, NamedTuple

import PIL.Image
from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from qzoom_agent.errors import TraceError, is_unseen
from qzoom_agent.files import atomic_write
from qzoom_agent.report.markdown import percent
from qzoom_agent.report.overlay import MAX_SIDE, OPACITY, heat_image, heat_place
from qzoom_agent.trace import PerceptionRecord, Quad
from qzoom_agent.views import View

COLOURS = 8
"""Turns take the colours .c0 to .c7 of report.css in order, then again from the first."""
CROP_BYTES = 160_000
"""For all small images of a page together."""
MAX_TEXT = 8_000
"""Characters of one text that a page shows."""
_ORIGINAL_BYTES = 480_000
# Everything but tab, newline and plain Latin is looked up, which keeps the common case fast.
_UNUSUAL = re.compile("[^\\t\\n\\x20-\\x7e\\xa1-\\xac\\xae-\\u02ff]")


class ImageLink(str):
    """A path of a picture beside the page, which then does not hold it."""

    __slots__ = ()


Picture = PIL.Image.Image | ImageLink
Pictures = Callable[[str], Picture]
"""Finds a picture by its digest."""


def document(template: str, *, rules: str = "", kind: str = "report", linked: bool = False, **values: Any) -> str:
    """Return a whole page.

    Args:
        template: File in templates/ that extends layout.html.jinja.
        rules: Added to the style sheet of all pages.
        kind: Name of the script in templates/.
        linked: Pictures may be `ImageLink`s.
        values: What the template shows.
    """
    style, script = asset("report.css") + rules, asset(f"{kind}.js")
    sources = "data: 'self' file:" if linked else "data:"
    policy = (
        f"default-src 'none'; img-src {sources}; style-src '{_hash(style)}'; script-src '{_hash(script)}'; "
        "base-uri 'none'; form-action 'none'"
    )
    found = environment().get_template(template)
    return found.render(policy=policy, style=Markup(style), script=Markup(script), **values) + "\n"


@cache
def environment() -> Environment:
    """Return the Jinja environment of the pages, in which every value is text unless it is `Markup`."""
    found = Environment(
        loader=PackageLoader("qzoom_agent.report"),
        autoescape=True,
        undefined=StrictUndefined,
        finalize=lambda value: legible(value) if isinstance(value, str) and not isinstance(value, Markup) else value,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    found.globals["opacity"] = round(100 * OPACITY)
    found.filters |= {
        "bounded": bounded,
        # turns count from 1, and 0 is the first look, before the model wrote
        "colour": lambda turn: f"c{(turn - 1) % COLOURS}" if turn and isinstance(turn, int) else "cx",
        "cost": cost,
        "cut": cut,
        "dots": dots,
        "fixed": lambda value, digits: f"{value:,.{digits}f}",
        "listed": listed,
        "number": number,
        "percent": percent,
        "seconds": seconds,
        "share": share,
        "signed": lambda value, digits: f"{value:+z.{digits}f}",
    }
    return found


def write_page(page: str, path: Path | str, *, tidy: bool = True) -> Path:
    """Write a page in one step (`atomic_write`), folders included, and return its path.

    Raises TraceError if that is impossible.
    """
    path = Path(path)
    with atomic_write(path, tidy=tidy, error=TraceError) as part:
        part.write_text(page, encoding="utf-8", newline="\n")
    return path


def asset(name: str) -> str:
    """Return a style sheet or script of templates/."""
    file = resources.files("qzoom_agent.report") / "templates" / name
    return file.read_text(encoding="utf-8").replace("\r\n", "\n")


def _hash(inline: str) -> str:
    return "sha256-" + base64.b64encode(hashlib.sha256(inline.encode()).digest()).decode()


# -- texts and numbers -----------------------------------------------------------------------------------------------


def legible(text: str) -> str:
    """Return `text` with control, direction and private characters written as [U+202E]."""

    def spell(match: re.Match[str]) -> str:
        return f"[U+{ord(match[0]):04X}]" if is_unseen(match[0]) else match[0]

    return _UNUSUAL.sub(spell, text)


def cut(text: str, limit: int) -> str:
    """Return the beginning of a text, for a place with room for one line or two."""
    return text if len(text) <= limit else text[:limit].rstrip() + "..."


def bounded(text: str) -> str:
    """Return a text as far as a page shows it, and how much is missing."""
    if len(text) <= MAX_TEXT:
        return text
    return f"{text[:MAX_TEXT]}\n[{len(text) - MAX_TEXT:,} more characters are in the trace]"


def number(value: float) -> str:
    """Return a number with three digits, or all of them before the point."""
    if not math.isfinite(value):
        return str(value)
    return f"{value:,.0f}" if (float(value).is_integer() or abs(value) >= 100) and abs(value) < 1e9 else f"{value:.3g}"


def listed(box: Sequence[float]) -> str:
    """Return a box as "[1, 2, 3, 4]"."""
    return "[" + ", ".join(number(value).replace(",", "") for value in box) + "]"


def seconds(value: float) -> str:
    """Return a time such as "0.25 s" or "12 s"."""
    return f"{value:.2f} s" if value < 10 else f"{value:,.0f} s"


def share(part: float, whole: float) -> str:
    """Return `part` of `whole` in percent."""
    found = part / whole if whole else 0.0
    return percent(found, 1 if found < 0.1 else 0)


def dots(parts: Iterable[str | None]) -> str:
    """Return the parts that are not empty, on one line."""
    return " \u00b7 ".join(part for part in parts if part)


def cost(spent: float, *, visual: int, written: int = 0) -> str:
    """Return the visual tokens, written tokens and seconds of a turn."""
    return dots([f"{visual:,} visual" if visual else None, f"{written:,} written" if written else None, seconds(spent)])


def full_tokens(views: Sequence[View]) -> float | None:
    """Return the tokens of the originals at the pixels per token of their coarse views; None without one of these."""
    coarse = {view.image: view for view in views if view.kind == "coarse" and view.tokens}
    originals = [view for view in views if view.kind == "original"]
    if not originals or any(view.image not in coarse for view in originals):
        return None
    pairs = [(view, coarse[view.image]) for view in originals]
    return sum(small.tokens * view.size.area / small.size.area for view, small in pairs)


# -- pictures --------------------------------------------------------------------------------------------------------


class Thumbnail(NamedTuple):
    """A small image with facts beside it, or below it if it goes `across`."""

    src: str
    title: str
    alt: str
    facts: Sequence[str | None]
    across: bool = False


class BoxMark(NamedTuple):
    """A box drawn over the original; fractions of its width and height, x1 y1 x2 y2."""

    kind: str
    turn: int | str | None
    """Number of the turn that it lights up with, or the id of that part of the page: colourless, as 0 is."""
    label: str
    title: str
    box: Quad

    def rule(self, index: int) -> str:
        """Return the place of the box, as a rule of the style sheet."""
        return f".m{index}{{{_placed(self.box)}}}\n"


def _placed(place: Quad) -> str:
    """Return a place in fractions of the image as declarations of a style sheet."""
    x1, y1, x2, y2 = (100 * value for value in place)
    return f"left:{x1:.3f}%;top:{y1:.3f}%;width:{x2 - x1:.3f}%;height:{y2 - y1:.3f}%"


class Stage(NamedTuple):
    """The original with boxes and heat map over it, as the macro `picture` draws it."""

    size: str
    src: str
    heat: str | None
    marks: Sequence[BoxMark]
    rules: str
    """The part of the style sheet that places all of it."""
    number: int
    """Number of the image, counted from 0."""
    first_mark: int
    """Marks of the images before it."""


def stage(
    original: View, image: Picture, marks: Sequence[BoxMark], look: PerceptionRecord | None, *, first_mark: int = 0
) -> Stage:
    """Prepare an original image for a page.

    Args:
        original: The image.
        image: Its pixels.
        marks: Boxes on it.
        look: The look whose heat map is laid over it.
        first_mark: Number of boxes on the images before it.
    """
    # Percent positions only fit if the stage has the image's shape, also when the height is what limits it.
    ratio = original.width / max(1, original.height)
    rules = "".join(mark.rule(index) for index, mark in enumerate(marks, start=first_mark))
    warm = None
    name = f".stage.s{original.image}" if original.image else ".stage"
    rules += (
        f"{name}{{aspect-ratio:{ratio:.5f};max-width:calc(var(--tall) * {ratio:.5f})}}\n.heat{{opacity:{OPACITY}}}\n"
    )
    if look is not None and any(look.heat):
        warm = _heat_png(look.heat)
        rules += f"{name} .heat{{{_placed(heat_place(look, original.size))}}}\n"
    size = f"{original.width} x {original.height}"
    return Stage(size, jpeg(image, MAX_SIDE, _ORIGINAL_BYTES), warm, marks, rules, original.image, first_mark)


def thumbnail(
    image: Picture, title: str, alt: str, facts: Sequence[str | None], *, limit: int, across: bool = False
) -> Thumbnail:
    """Return a small image of about `limit` bytes, with facts beside it, or below it if it goes `across`."""
    return Thumbnail(jpeg(image, 448, limit), title, alt, facts, across)


def jpeg(image: Picture, side: int, limit: int) -> str:
    """Return a data URI of `image`, at most `side` px and about `limit` bytes, never enlarged; a link stays one."""
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


def _heat_png(heat: Sequence[Sequence[float]]) -> str:
    buffer = io.BytesIO()
    heat_image(heat).save(buffer, format="PNG", optimize=True)
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()
