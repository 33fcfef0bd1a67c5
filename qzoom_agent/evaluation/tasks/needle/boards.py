"""Boards: images of 550 to 784 pixels a side that carry fine print, and what is true about them.

A board is drawn once and yields many facts, each with its question, answer, the boxes of the ink that answers it (in
pixels of the board) and whether a coarse view suffices. Evaluation takes one fact of a board; training uses them all.

Sizes are chosen so that three things hold, and `docs/nano.md` shows them: headlines, labels, shapes and colours
(48 pixels and more) survive a three-fold reduction; printed codes (18 to 22 pixel capitals) and pips (4 pixels) do not;
and every needle is legible to a trained reader on the full board.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from io import BytesIO
from pathlib import Path
from random import Random
from typing import Final

from PIL import Image, ImageDraw, ImageFilter

from qzoom_agent.evaluation.tasks.needle.ink import (
    COLORS,
    SHAPES,
    Color,
    Glyph,
    Rect,
    background,
    draw_die,
    draw_shape,
    draw_text,
    paint,
    text_width,
    typefaces,
)

CODE_CHARS: Final = "0123456789ACEFHJKLMNPRTUVWXY"
"""Digits and the capitals that no digit resembles, as on number plates."""
HEADLINES: Final = (
    "MARKET", "STATION", "GARDEN", "HARBOR", "MUSEUM", "LIBRARY", "BRIDGE", "CASTLE",
    "FOREST", "ISLAND", "VALLEY", "WINTER", "SUMMER", "MUSIC", "THEATER", "KITCHEN",
    "SCHOOL", "AIRPORT", "OCEAN", "DESERT", "PLANET", "QUIZ", "JUNGLE", "BAKERY",
)  # fmt: skip
FIELDS: Final = ("room", "gate", "seat", "desk", "unit", "key", "bay", "dock", "lane", "ward", "hall", "file")
ITEMS: Final = ("tea", "milk", "rice", "soap", "cake", "fish", "corn", "salt", "eggs", "plum", "lamp", "rope")
GRIDS: Final = (
    (24, 24), (23, 25), (25, 23), (22, 26), (26, 22), (21, 27), (27, 21), (20, 28), (28, 20), (22, 23), (23, 22),
)  # fmt: skip
"""Board sizes in cells of 28 pixels: 500 to 576 visual tokens, at least seven times those of a coarse view of 64."""

_DARK: Final[Color] = (22, 22, 28)
_LIGHT: Final[Color] = (250, 250, 246)
QUESTIONS: Final[dict[str, tuple[str, ...]]] = {
    "headline": ("what is the headline?", "which word is the title?", "what does the headline say?"),
    "count": ("how many {0} are there?", "count the {0}.", "what is the number of {0}?"),
    "color": ("what color is the {0}?", "which color does the {0} have?", "tell me the color of the {0}."),
    "shape": ("what shape is the {0} object?", "which shape is {0}?", "what is the shape of the {0} object?"),
    "code": ("what is the code on the {0}?", "which code belongs to the {0}?", "read the code on the {0}."),
    "pips": ("how many dots are on the {0}?", "count the dots on the {0}.", "what number of dots does the {0} show?"),
    "relation": ("what is the code on the object {1} the {0}?", "read the code of the object {1} the {0}."),
    "form": ("what is the value of {0}?", "what is written next to {0}?", "read the {0} field."),
    "receipt": ("what is the price of {0}?", "how much is the {0}?", "what does the {0} cost?"),
    "table": ("what is in cell {0}?", "read cell {0}.", "which code is in cell {0}?"),
    "hop": ("follow the note on the {0}: what code is in that cell?", "which code is in the cell named by the {0}?"),
}

"""Questions by kind; nano and its vocabulary were made with these."""
CHAIN_QUESTIONS: Final = (
    "follow the note on the {0} to the next note: what code is in that cell?",
    "which code is in the cell named by the note in the cell named by the {0}?",
)
"""Questions of the kind `chain`, in words that nano knows but was never trained on."""


@dataclass(frozen=True, slots=True)
class Fact:
    """One question about a board that has exactly one answer.

    `boxes` are the needles in the order in which they must be read: three for `chain`, two for `hop`, one for a detail,
    none when the coarse view suffices.
    """

    task: str
    kind: str
    question: str
    answer: str
    boxes: tuple[Rect, ...] = ()
    seen: tuple[Rect, ...] = ()
    """Boxes that a coarse fact is about: objects counted or named, the headline's word. Empty if there are `boxes`."""

    @property
    def coarse_suffices(self) -> bool:
        return not self.boxes


@dataclass(frozen=True, slots=True)
class BoardObject:
    """An object of a scene: what it looks like and where, for questions and for dense labels."""

    shape: str
    color: str
    box: Rect
    pips: int = 0
    die: Rect | None = None

    @property
    def name(self) -> str:
        return f"{self.color} {self.shape}"


@dataclass(slots=True)
class Board:
    """A drawn board. `image` is RGB; boxes and glyph centres are in its pixels."""

    image: Image.Image
    facts: list[Fact] = field(default_factory=list)
    glyphs: list[Glyph] = field(default_factory=list)
    things: list[BoardObject] = field(default_factory=list)


class Pen:
    """The random choices that one board keeps throughout: typefaces, paper, ink and plate style."""

    def __init__(
        self,
        rng: Random,
        *,
        split: str,
        fonts: Path | None = None,
        notes: int = 0,
        size: tuple[int, int] | None = None,
    ) -> None:
        self.rng, self.split, self.notes = rng, split, notes
        self.width, self.height = size or _size(rng)
        image, light = background(rng, (self.width, self.height), split=split)
        self.board = Board(image)
        self.draw = ImageDraw.Draw(image)
        self.draw.fontmode = "L"
        faces = typefaces(split, fonts)
        self.title_face, self.code_face = rng.choice(faces), rng.choice(faces)
        self.ink: Color = _DARK if light else _LIGHT
        self.code_capital = rng.randint(18, 22)
        self.code_advance = rng.uniform(25.0, 28.0)
        self.plate: Color = _LIGHT if rng.random() < 0.7 else _DARK
        self.plate_ink: Color = _DARK if self.plate == _LIGHT else _LIGHT
        if rng.random() < 0.3:
            colors = ("blue", "purple") if self.plate == _LIGHT else ("yellow", "cyan")
            self.plate_ink = paint(rng, rng.choice(colors), split=split)

    def fact(
        self,
        task: str,
        kind: str,
        answer: str,
        *names: str,
        boxes: tuple[Rect, ...] = (),
        seen: tuple[Rect, ...] = (),
    ) -> None:
        question = self.rng.choice(CHAIN_QUESTIONS if kind == "chain" else QUESTIONS[kind]).format(*names)
        self.board.facts.append(Fact(task, kind, question, answer, boxes, seen))

    def word(self, text: str, at: tuple[float, float], *, capital: int, fill: Color | None = None) -> Rect:
        """Draw large print that survives the coarse view; return its box."""
        ink = fill if fill is not None else self.ink
        printed = draw_text(self.draw, text, at=at, typeface=self.title_face, capital=capital, fill=ink)
        self.board.glyphs.extend(printed.glyphs)
        return printed.box

    def code_size(self, text: str) -> tuple[float, float]:
        """Return width and height of the plate that `code` draws."""
        width = text_width(text, typeface=self.code_face, capital=self.code_capital, advance=self.code_advance)
        return width + 10, self.code_capital + 10

    def code(self, text: str, at: tuple[float, float]) -> Rect:
        """Draw fine print on a plate whose top-left corner is `at`; return the box of the plate."""
        width, height = self.code_size(text)
        box = (at[0], at[1], at[0] + width, at[1] + height)
        self.draw.rounded_rectangle(box, radius=4, fill=self.plate, outline=(110, 110, 110), width=1)
        printed = draw_text(
            self.draw,
            text,
            at=(at[0] + 5, at[1] + 5),
            typeface=self.code_face,
            capital=self.code_capital,
            fill=self.plate_ink,
            advance=self.code_advance,
        )
        self.board.glyphs.extend(printed.glyphs)
        return box

    def code_below(self, text: str, box: Rect, gap: float) -> Rect:
        """Draw fine print below an object; return the box of the plate."""
        side, width = box[2] - box[0], self.code_size(text)[0]
        left = min(max(4.0, box[0] + side / 2 - width / 2), self.width - width - 4)
        return self.code(text, (left, box[1] + side + gap))

    def new_code(self) -> str:
        return "".join(self.rng.choice(CODE_CHARS) for _ in range(3))

    def headline(self) -> float:
        """Print the headline; returns the y below it."""
        text = self.rng.choice(HEADLINES)
        capital = self.rng.randint(60, 76)
        while text_width(text, typeface=self.title_face, capital=capital) > self.width - 40:
            capital -= 2
        room = self.width - 30 - text_width(text, typeface=self.title_face, capital=capital)
        top = self.rng.randint(14, 26)
        fill = None
        if self.ink == _DARK and self.rng.random() < 0.4:
            fill = paint(self.rng, self.rng.choice(("red", "blue", "purple")), split=self.split)
        word = self.word(text, (15 + self.rng.uniform(0, room), top), capital=capital, fill=fill)
        self.fact("needle-global", "headline", text.lower(), seen=(word,))
        return float(top + capital + 16)


def _size(rng: Random) -> tuple[int, int]:
    columns, rows = rng.choice(GRIDS)
    width = min(28 * columns + rng.randint(-10, 0), 784)
    return width, min(28 * rows + rng.randint(-10, 0), 784)


def worn(rng: Random, image: Image.Image) -> Image.Image:
    """Return the image as it may come out of a camera and a file: at times blurred a little, at times compressed."""
    if rng.random() < 0.35:
        image = image.filter(ImageFilter.GaussianBlur(rng.uniform(0.3, 0.8)))
    if rng.random() < 0.5:
        buffer = BytesIO()
        image.save(buffer, "JPEG", quality=rng.randint(60, 92))
        image = Image.open(buffer).convert("RGB")
    return image


def draw_board(layout: str, seed: int, *, split: str = "train", fonts: Path | None = None, notes: int = 0) -> Board:
    """Return the board of this layout ("scene", "form", "receipt", "table", "hop" or "chain") and seed.

    Args:
        split: "train", "test" or "ood"; each has boards of its own for the same seed, and "ood" typefaces, palettes,
            photographs and arrangements of its own.
        fonts: draw with the typefaces of this folder instead of the split's.
        notes: above 0, another drawing of the notes: all else, the table's codes too, stays where and what it is.
    """
    rng = Random(f"{layout}/{split}/{seed}")
    pen = Pen(rng, split=split, fonts=fonts, notes=notes)
    _LAYOUTS[layout](pen)
    board = pen.board
    board.image = worn(rng, board.image)
    return board


def _place_things(
    pen: Pen, top: float, bottom: float, columns: int, rows: int, count: int
) -> list[tuple[BoardObject, int, int]]:
    """Draw `count` objects on a jittered grid between `top` and `bottom`, with the room for a plate below each."""
    rng = pen.rng
    staggered = pen.split == "ood" and columns > 1
    free = [(column, row) for row in range(rows) for column in range(columns - (staggered and row % 2))]
    slots = rng.sample(free, min(count, len(free)))
    count = len(slots)
    kinds = rng.sample([(shape, color) for shape in SHAPES for color in COLORS], count)
    if count > 2 and rng.random() < 0.7:  # repeat a colour or a shape, so that counting is a question
        repeated = rng.choice(kinds)
        for index in rng.sample(range(count), rng.randint(1, count - 1)):
            changed = (repeated[0], kinds[index][1]) if rng.random() < 0.5 else (kinds[index][0], repeated[1])
            if changed not in kinds:
                kinds[index] = changed
    cell_width, cell_height = (pen.width - 16) / columns, (bottom - top) / rows
    side = min(rng.uniform(88, 112), cell_width - 24, cell_height - pen.code_capital - 34)
    placed = []
    for (column, row), (shape, color) in zip(slots, kinds, strict=True):
        shift = 0.4 * cell_width if staggered and row % 2 else 0.0
        spare_x = max(0.0, cell_width - max(side, 106) - 8)
        spare_y = max(0.0, cell_height - side - pen.code_capital - 24)
        x = 8 + column * cell_width + rng.uniform(4, 4 + spare_x) + shift
        y = top + row * cell_height + rng.uniform(2, 2 + spare_y)
        box = (x, y, x + side, y + side)
        fill = paint(rng, color, split=pen.split)
        draw_shape(pen.draw, shape, box, fill=fill, outline=(70, 70, 70))
        placed.append((BoardObject(shape, color, box), column, row))
    return placed


def _scene(pen: Pen) -> None:
    rng = pen.rng
    top = pen.headline()
    columns, rows = (4, 3) if pen.width >= pen.height else (3, 3)
    if pen.height >= 700 and pen.width < 640:
        rows = 4
    placed = _place_things(pen, top, pen.height - 8, columns, rows, rng.randint(4, min(9, columns * rows)))
    plates: dict[tuple[int, int], tuple[BoardObject, str, Rect]] = {}
    for bare, column, row in placed:
        side, x, y = bare.box[2] - bare.box[0], bare.box[0], bare.box[1]
        pips = rng.randint(1, 6)
        die = draw_die(pen.draw, pips, (x + side / 2, y + side * 0.5), side=rng.uniform(23, 27))
        thing = replace(bare, pips=pips, die=die)
        code = pen.new_code()
        plate = pen.code_below(code, thing.box, rng.uniform(2, 7))
        pen.board.things.append(thing)
        plates[column, row] = (thing, code, plate)
        pen.fact("needle-scene", "code", code, thing.name, boxes=(plate,))
        pen.fact("needle-scene", "pips", str(pips), thing.name, boxes=(die,))
    for (column, row), (thing, _, _) in plates.items():
        for place, neighbour in (("right of", (column + 1, row)), ("below", (column, row + 1))):
            if neighbour in plates and not (place == "below" and pen.split == "ood"):
                _, code, plate = plates[neighbour]
                pen.fact("needle-scene", "relation", code, thing.name, f"directly {place}", boxes=(plate,))
    _global_facts(pen, [thing for thing, _, _ in plates.values()])


def _global_facts(pen: Pen, things: list[BoardObject]) -> None:
    shapes, colors = [thing.shape for thing in things], [thing.color for thing in things]
    for thing in things:
        if shapes.count(thing.shape) == 1:
            pen.fact("needle-global", "color", thing.color, thing.shape, seen=(thing.box,))
        if colors.count(thing.color) == 1:
            pen.fact("needle-global", "shape", thing.shape, thing.color, seen=(thing.box,))
    pen.fact("needle-global", "count", str(len(things)), "objects", seen=tuple(thing.box for thing in things))
    present = sorted({*shapes, *colors})
    for what in pen.rng.sample(present, min(3, len(present))):
        counted = tuple(thing.box for thing in things if what in (thing.shape, thing.color))
        pen.fact("needle-global", "count", str(len(counted)), plural(what), seen=counted)


def plural(what: str) -> str:
    """Return the plural of a shape, or of a colour's objects."""
    if what not in SHAPES:
        return f"{what} objects"
    return f"{what}es" if what == "cross" else f"{what}s"


def _form(pen: Pen) -> None:
    rng = pen.rng
    top = pen.headline()
    labels = rng.sample(FIELDS, rng.randint(4, 6))
    step = (pen.height - top - 10) / len(labels)
    capital = int(min(rng.randint(44, 54), step - 22))
    right = pen.split == "ood"
    column = max(text_width(label.upper(), typeface=pen.title_face, capital=capital) for label in labels) + 50
    for index, label in enumerate(labels):
        code = pen.new_code()
        width, height = pen.code_size(code)
        y = top + index * step + rng.uniform(0, step - capital - 14)
        pen.word(label.upper(), (20, y), capital=capital)
        low, high = min(column, pen.width - width - 12), pen.width - width - 12
        x = high if right else rng.uniform(low, high)
        plate = pen.code(code, (x, y + (capital - height) / 2))
        line = y + capital + 8
        pen.draw.line((16, line, pen.width - 16, line), fill=(150, 150, 150), width=1)
        pen.fact("needle-doc", "form", code, label, boxes=(plate,))


def _receipt(pen: Pen) -> None:
    rng = pen.rng
    top = pen.headline()
    items = rng.sample(ITEMS, rng.randint(4, 6))
    step = (pen.height - top - 10) / len(items)
    capital = int(min(rng.randint(40, 50), step - 22))
    for index, item in enumerate(items):
        price = f"{rng.randint(1, 9)}.{rng.randint(0, 99):02d}"
        width, height = pen.code_size(price)
        y = top + index * step + rng.uniform(0, max(1.0, step - capital - 16))
        pen.word(item.upper(), (24, y), capital=capital)
        x = pen.width - width - (90 if pen.split == "ood" else rng.uniform(14, 60))
        plate = pen.code(price, (x, y + (capital - height) / 2))
        pen.fact("needle-doc", "receipt", price, item, boxes=(plate,))


def _grid(
    pen: Pen, top: float, columns: int, rows: int, notes: Mapping[str, str] | None = None
) -> dict[str, tuple[str, Rect]]:
    """Draw a table with lettered columns and numbered rows; return the print and plate of every cell by its name.

    `notes` are printed in cells of these names, which hold a code else.
    """
    rng = pen.rng
    left, head = 76.0, 66.0
    cell_width = (pen.width - left - 10) / columns
    cell_height = (pen.height - top - head - 8) / rows
    capital = rng.randint(42, 48)
    letters = "ABCDE"[:columns]
    for column, letter in enumerate(letters):
        middle = left + (column + 0.5) * cell_width
        width = text_width(letter, typeface=pen.title_face, capital=capital)
        pen.word(letter, (middle - width / 2, top + 8), capital=capital)
    cells = {}
    for row in range(rows):
        y = top + head + row * cell_height
        pen.word(str(row + 1), (20, y + (cell_height - capital) / 2), capital=capital)
        for column, letter in enumerate(letters):
            x, name = left + column * cell_width, f"{letter}{row + 1}"
            pen.draw.rectangle((x, y, x + cell_width, y + cell_height), outline=(120, 120, 120), width=2)
            code = (notes or {}).get(name) or pen.new_code()
            width, height = pen.code_size(code)
            at = (
                x + rng.uniform(6, max(7.0, cell_width - width - 6)),
                y + rng.uniform(5, max(6.0, cell_height - height - 5)),
            )
            cells[name] = (code, pen.code(code, at))
    return cells


def _table(pen: Pen) -> None:
    top = pen.headline()
    columns = pen.rng.randint(3, 5 if pen.width > 700 else 4)
    for name, (code, plate) in _grid(pen, top, columns, pen.rng.randint(3, 4)).items():
        pen.fact("needle-doc", "table", code, name, boxes=(plate,))


def _hop(pen: Pen) -> None:
    rng = pen.rng
    columns = rng.randint(3, 4)
    band = 12.0 + rng.uniform(150, 168)
    placed = _place_things(pen, 10.0, band, columns, 1, rng.randint(2, columns))
    cells = _grid(pen, band + 10, columns, rng.randint(2, 3))
    for thing, _, _ in placed:
        name = rng.choice(sorted(cells))
        if pen.notes:
            name = Random(f"{pen.notes}/{thing.name}/{name}").choice(sorted(cells))
        note = pen.code_below(name, thing.box, 3)
        pen.board.things.append(thing)
        code, plate = cells[name]
        pen.fact("needle-hop", "hop", code, thing.name, boxes=(note, plate))
    for name, (code, plate) in cells.items():
        pen.fact("needle-doc", "table", code, name, boxes=(plate,))
    _global_facts(pen, list(pen.board.things))


def _chain(pen: Pen) -> None:
    """Notes on objects name cells with notes, which name cells with codes."""
    rng = pen.rng
    columns, rows = rng.randint(3, 4), rng.randint(2, 3)
    band = 12.0 + rng.uniform(150, 168)
    placed = _place_things(pen, 10.0, band, columns, 1, rng.randint(2, columns))
    names = rng.sample([f"{letter}{row + 1}" for letter in "ABCDE"[:columns] for row in range(rows)], columns * rows)
    notes = {name: rng.choice(names[len(placed) :]) for name in names[: len(placed)]}
    cells = _grid(pen, band + 10, columns, rows, notes)
    for (thing, _, _), (first, last) in zip(placed, notes.items(), strict=True):
        note = pen.code_below(first, thing.box, 3)
        pen.board.things.append(thing)
        code, plate = cells[last]
        pen.fact("needle-chain", "chain", code, thing.name, boxes=(note, cells[first][1], plate))


_LAYOUTS: Final[dict[str, Callable[[Pen], None]]] = {
    "scene": _scene,
    "form": _form,
    "receipt": _receipt,
    "table": _table,
    "hop": _hop,
    "chain": _chain,
}
LAYOUTS: Final = ("scene", "form", "receipt", "table", "hop")
"""Layouts that nano was trained on."""
