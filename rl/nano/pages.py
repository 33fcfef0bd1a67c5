"""Pages: small images packed with things to read, from which the vision tower and the read-out learn most per second.

A crop of a board costs 40 to 64 visual tokens and holds three characters; a page of 64 holds thirty, each with a dense
label, and every line is a question too. Pages of plates show the print of boards as crops do, worn and magnified;
pages of objects do the same for shapes, colours and dice.
"""

from collections.abc import Sequence
from random import Random
from typing import Final

from PIL import Image, ImageDraw

from nano.examples import ASK, CHARS, CLOSE, OPEN, counts, direct, read_from, show
from nano.trees import Look, Say, Tree
from qzoom_agent.evaluation.tasks.needle.boards import CODE_CHARS, QUESTIONS, Board, BoardObject, Fact, Pen, worn
from qzoom_agent.evaluation.tasks.needle.ink import (
    COLORS,
    SHAPES,
    Rect,
    background,
    draw_die,
    draw_shape,
    draw_text,
    paint,
    text_width,
    typefaces,
)

SIDE: Final = 224
_TOKENS: Final = (57, 64)  # 64 whatever the rounding
_SIZES: Final = ((26, 46), (15, 26), (46, 60))
_MAGNIFIED: Final = (1.0, 1.8)
"""Range of magnification: from a whole board at full budget to nano's own crops."""


def _tree(board: Board) -> Tree:
    frame = show(board, None, tokens=_TOKENS)
    return Tree(
        [Say(OPEN), frame.look],
        [direct(frame, fact) for fact in board.facts],
        [f"direct {fact.kind}" for fact in board.facts],
    )


def _whole_page(board: Board) -> Tree:
    """All lines read in one answer: hardly any tokens but the ones that teach."""
    frame = show(board, None, tokens=_TOKENS)
    focus: list[tuple[Look, Sequence[int]]] = []
    for fact in board.facts:
        focus += [*([(frame.look, ())] if focus else []), *read_from(frame, fact)]
    text = " ".join(fact.answer for fact in board.facts)
    pieces = [Say("read the page." + ASK), Say(text + CLOSE, learn=True, focus=focus)]
    return Tree([Say(OPEN), frame.look], [pieces], ["direct page"])


def _read_out(rng: Random, board: Board) -> Tree:
    return _whole_page(board) if rng.random() < 0.6 else _tree(board)


def _line(board: Board, text: str, box: Rect) -> None:
    board.facts.append(Fact("pages", "line", f"read line {len(board.facts) + 1}.", text, (box,)))


def text_page(rng: Random) -> Tree:
    """Lines of random print in several sizes and typefaces: "read line 2." for each, or "read the page."."""
    image, light = background(rng, (SIDE, SIDE), split="train")
    board = Board(image)
    draw = ImageDraw.Draw(image)
    y = float(rng.randint(3, 12))
    while True:
        capital = rng.randint(*rng.choices(_SIZES, weights=(5, 4, 1))[0])
        if y + capital > SIDE - 2:
            return _read_out(rng, board)
        typeface = rng.choice(typefaces("train"))
        chars = CODE_CHARS if rng.random() < 0.8 else CHARS
        advance = capital * rng.uniform(0.85, 1.5) if rng.random() < 0.7 else None
        text = "".join(rng.choice(chars) for _ in range(rng.randint(3, 10)))
        while text_width(text, typeface=typeface, capital=capital, advance=advance) > SIDE - 12:
            text = text[:-1]
        dark = light == (rng.random() < 0.85)
        fill = (rng.randint(0, 70), rng.randint(0, 70), rng.randint(0, 90)) if dark else (rng.randint(190, 255),) * 3
        if light != dark:
            plate = (rng.randint(0, 60),) * 3 if light else (rng.randint(200, 255),) * 3
            draw.rectangle((0, y - 3, SIDE, y + capital + 3), fill=plate)
        room = SIDE - 8 - text_width(text, typeface=typeface, capital=capital, advance=advance)
        at = (4 + rng.uniform(0, room), y)
        printed = draw_text(draw, text, at=at, typeface=typeface, capital=capital, fill=fill, advance=advance)
        board.glyphs += printed.glyphs
        _line(board, text, printed.box)
        y += capital + rng.randint(6, 20)


def plate_page(rng: Random) -> Tree:
    """Codes and prices on plates, drawn and worn as on a board and then magnified, as the crops of one are."""
    side = round(SIDE / rng.uniform(*_MAGNIFIED))
    pen = Pen(rng, split="train", size=(side, side))
    most = int((side - 16) // pen.code_advance)
    y = rng.uniform(1.0, 10.0)
    while True:
        length = max(rng.randint(3, most), rng.randint(3, most))
        text = "".join(rng.choice(CODE_CHARS) for _ in range(length))
        if rng.random() < 0.2:
            text = f"{rng.randint(1, 9)}.{rng.randint(0, 99):02d}"
        width, height = pen.code_size(text)
        if y + height > side - 1:
            pen.board.image = worn(rng, pen.board.image)
            return _read_out(rng, pen.board)
        _line(pen.board, text, pen.code(text, (rng.uniform(0.0, max(0.0, side - 1 - width)), y)))
        y += height + rng.uniform(2.0, 11.0)


def object_page(rng: Random) -> Tree:
    """Up to nine objects, large ones with dice: how many dots, which colour, which shape."""
    image, _ = background(rng, (SIDE, SIDE), split="train")
    board = Board(image)
    draw = ImageDraw.Draw(image)
    across = rng.choice((2, 2, 3, 5))
    cell = SIDE / across
    cells = rng.sample(range(across * across), min(across * across, 9))
    kinds = rng.sample([(shape, color) for shape in SHAPES for color in COLORS], len(cells))
    for index, (shape, color) in zip(cells, kinds, strict=True):
        side = rng.uniform(0.55, 0.9) * cell
        x = (index % across) * cell + rng.uniform(1, cell - side - 1)
        y = (index // across) * cell + rng.uniform(1, cell - side - 1)
        box = (x, y, x + side, y + side)
        draw_shape(draw, shape, box, fill=paint(rng, color, split="train"), outline=(70, 70, 70))
        if across == 5:  # as small as on a coarse view, where dice cannot be read
            board.things.append(BoardObject(shape, color, box, 0, None))
            continue
        pips = rng.randint(1, 6)
        size = rng.uniform(max(24.0, 0.3 * side), (0.8 if across == 2 else 0.62) * side)
        die = draw_die(draw, pips, (x + side / 2, y + side / 2), side=size)
        thing = BoardObject(shape, color, box, pips, die)
        board.things.append(thing)
        asked = rng.choice(QUESTIONS["pips"]).format(thing.name)
        board.facts.append(Fact("pages", "pips", asked, str(pips), (die,)))
    if across == 2:  # as in a crop, where a small die is magnified
        coarse = round(SIDE / rng.uniform(1.0, 3.5))
        board.image = image.resize((coarse, coarse), Image.Resampling.BICUBIC).resize(
            (SIDE, SIDE), Image.Resampling.BICUBIC
        )
    for thing in board.things:
        if [other.shape for other in board.things].count(thing.shape) == 1:
            asked = rng.choice(QUESTIONS["color"]).format(thing.shape)
            board.facts.append(Fact("pages", "color", asked, thing.color, seen=(thing.box,)))
        if [other.color for other in board.things].count(thing.color) == 1:
            asked = rng.choice(QUESTIONS["shape"]).format(thing.color)
            board.facts.append(Fact("pages", "shape", asked, thing.shape, seen=(thing.box,)))
    board.facts += counts(rng, board, most=6)
    return _tree(board)
