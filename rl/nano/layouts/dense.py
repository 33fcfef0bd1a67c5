"""Pages of unrelated lines of everything, close together: most characters for the least paper."""

from collections.abc import Callable
from random import Random

from nano import words
from nano.printer import pick_type
from nano.sheet import Cell, Sheet


def draw_dense(rng: Random) -> tuple[Sheet, dict[str, str]]:
    """Return a page without fields."""
    width = rng.choice((360, 384, 420, 480, 512, 576, 576, 640))
    sheet = Sheet(rng, width=width, height=round(width * rng.uniform(0.8, 1.6)))
    makers: list[Callable[[Random], str]] = [
        words.item,
        words.company,
        words.code,
        words.noise,
        words.phone,
        words.foot,
        words.clock,
        lambda rng: words.dated(rng, words.day(rng)),
        lambda rng: sheet.money.format(words.amount(rng, 9000)),
        lambda rng: words.address(rng)[0],
    ]
    while not sheet.full:
        if rng.random() < 0.25:
            sheet.type = pick_type(rng, width=sheet.width)
        set_in = sheet.emphasis(0.1)
        cells: list[Cell] = []
        place = 0.0
        while place < 0.9:
            text = rng.choice(makers)(rng)
            cells.append((text, "l", place))
            place += set_in.width(text) / sheet.width + rng.uniform(0.03, 0.2)
        sheet.row(cells, set_in)
    sheet.y += rng.uniform(10, 80)
    return sheet, {}
