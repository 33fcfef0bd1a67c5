"""Training examples of nano: boards as question trees, at every budget and in every role the agent will ask of it.

The first view is a coarse view, a whole board at a higher budget, or a crop. Branches are written exactly as the `nano`
protocol writes them at inference: a direct question, a question with the crop already beside the coarse view, a zoom
call and its result, two zooms for a note that names a cell, a plain answer although zooming was allowed, what is left
after a refused call, and a forced answer.

Dense labels say, per visual token, which character sits in its left and right half, and which object, colour and die
cover it. They come from the drawing and are marked unknown (-100) where print is too small to read.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from random import Random
from typing import Final

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from nano.model import CELL
from nano.paper_boards import PaperBoard
from nano.paper_views import readings_of
from nano.referents import ink, referents
from nano.trees import Look, Piece, Say, Tree
from qzoom_agent.evaluation.tasks.needle.boards import QUESTIONS, Board, Fact, draw_board, plural
from qzoom_agent.evaluation.tasks.needle.ink import COLORS, SHAPES, Rect
from qzoom_agent.geometry import Size, fit_tokens
from qzoom_agent.protocols.nano import LOCATION_STEP, REFUSAL

CHARS: Final = "0123456789ABCDEFGHIJKLMNOPQRSTUVWXYZ."
DENSE_CLASSES: Final = (len(CHARS) + 1, len(CHARS) + 1, len(SHAPES) + 1, len(COLORS) + 1, 7, 2)
"""Classes of each dense label: left character, right character, shape, colour, pips, middle of an object; 0: none."""
COARSE_TOKENS: Final = 64
CROP_TOKENS: Final = (40, 100)
"""Fewest and most: up to 280 x 280 pixels of a board are shown without loss."""
PAPER_CROP_TOKENS: Final = (96, 256)
"""The same for paper."""
PROPOSED_SIDES: Final = (0.28, 0.21)
"""Of a crop that SD-RPN proposes, as shares of the board's: a little larger than one that nano asks for."""
PROPOSED_TOKENS: Final = (51, 56)
PROPOSED_GROWTH: Final = (0.85, 1.1)
"""Fewest and most times these sides, with tokens in proportion: what is proposed is always magnified as much."""
SLIP_GROWTH: Final = 0.5
"""The same for a crop of little but a note, from which the place it names is learned for a third of the tokens."""
NOTES: Final = 3
"""Drawings of the notes of a board: one picture of it, and so many times the notes to follow."""
CALL_MARGIN: Final = (0.35, 30.0)
"""Margin of a zoom call around the needle: a share of its longer side, and at least these board pixels."""
LAYOUT_SHARES: Final = {"scene": 0.34, "form": 0.15, "receipt": 0.18, "table": 0.09, "hop": 0.24}
_CROP_KINDS: Final = ("code", "pips", "form", "receipt", "table")
LEGIBLE: Final = 11.0
"""Height of characters in a view, in pixels, below which they are no labels: what is illegible is not to be guessed."""
OPEN, ASK, CLOSE = "<|im_start|>user\n", "<|im_end|>\n<|im_start|>assistant\n", "<|im_end|>"
_NEXT: Final = "\n<|im_start|>user\n"


@dataclass(frozen=True)
class Frame:
    """Part of a board as shown: its box in board pixels and the scale of each axis."""

    board: Board
    box: Rect
    look: Look
    image: int = 0
    """Number of the board among those of a question, from 0; calls name it from the second on."""

    @property
    def scale(self) -> tuple[float, float]:
        return self.look.image.width / (self.box[2] - self.box[0]), self.look.image.height / (self.box[3] - self.box[1])


def show(
    board: Board, box: Rect | None, *, tokens: tuple[int, int], dense: bool = True, legible: float = LEGIBLE
) -> Frame:
    """The board or a part of it at a budget of (fewest, most) visual tokens, cut from the original and resized once."""
    whole = (0.0, 0.0, float(board.image.width), float(board.image.height))
    # as the view store cuts it: whole pixels, outward
    box = whole if box is None else _whole_pixels(box, whole)
    width, height = int(box[2] - box[0]), int(box[3] - box[1])
    size = fit_tokens(Size(width, height), factor=CELL, min_tokens=tokens[0], max_tokens=tokens[1])
    image = board.image.crop(box).resize((size.width, size.height), Image.Resampling.BICUBIC)
    if isinstance(board, PaperBoard):
        readings = readings_of(board.paper, box, size.width // CELL, size.height // CELL)
        return Frame(board, box, Look(image, readings=readings if dense else None))
    return Frame(board, box, Look(image, dense_labels(board, box, image.size, legible=legible) if dense else None))


def _whole_pixels(box: Rect, whole: Rect) -> Rect:
    x1, y1, x2, y2 = math.floor(box[0]), math.floor(box[1]), math.ceil(box[2]), math.ceil(box[3])
    return max(0.0, x1), max(0.0, y1), min(whole[2], x2), min(whole[3], y2)


def dense_labels(board: Board, box: Rect, size: tuple[int, int], *, legible: float = LEGIBLE) -> NDArray[np.int64]:
    """Labels of every visual token of the view, shape (tokens, 6); see `DENSE_CLASSES`.

    Args:
        legible: height of the smallest characters that are labels; of dice twice that.
    """
    columns, rows = size[0] // CELL, size[1] // CELL
    scale_x, scale_y = size[0] / (box[2] - box[0]), size[1] / (box[3] - box[1])
    labels = np.zeros((rows, columns, len(DENSE_CLASSES)), dtype=np.int64)
    closest = np.full((rows, columns, 2), np.inf)
    for glyph in board.glyphs:
        x, y = (glyph.x - box[0]) * scale_x, (glyph.y - box[1]) * scale_y
        if not (0 <= x < size[0] and 0 <= y < size[1]):
            continue
        column, row, half = int(x // CELL), int(y // CELL), int(x % CELL >= CELL / 2)
        distance = abs(y % CELL - CELL / 2) + abs(x % (CELL / 2) - CELL / 4)
        if distance < closest[row, column, half]:
            closest[row, column, half] = distance
            large = glyph.height * scale_y >= legible
            labels[row, column, half] = CHARS.index(glyph.char) + 1 if large else -100
    for thing in board.things:
        shape, color = SHAPES.index(thing.shape) + 1, COLORS.index(thing.color) + 1
        _cover(labels, thing.box, box, (scale_x, scale_y), (2, shape), (3, color))
        _cover(labels, _middle(thing.box), box, (scale_x, scale_y), (5, 1))
        if thing.die is not None:
            large = (thing.die[2] - thing.die[0]) * scale_x >= 2 * legible
            _cover(labels, thing.die, box, (scale_x, scale_y), (4, thing.pips if large else -100))
    return labels.reshape(rows * columns, len(DENSE_CLASSES))


def _middle(rect: Rect) -> Rect:
    """The point in the middle, as a box so small that it lies in one visual token: a thing counts once."""
    x, y = (rect[0] + rect[2]) / 2, (rect[1] + rect[3]) / 2
    return x - 0.01, y - 0.01, x + 0.01, y + 0.01


def _cover(
    labels: NDArray[np.int64], thing: Rect, box: Rect, scale: tuple[float, float], *values: tuple[int, int]
) -> None:
    """Write label values into the tokens whose cell holds the thing's centre or whose centre it covers."""
    rows, columns, _ = labels.shape
    x1, x2 = (thing[0] - box[0]) * scale[0] / CELL, (thing[2] - box[0]) * scale[0] / CELL
    y1, y2 = (thing[1] - box[1]) * scale[1] / CELL, (thing[3] - box[1]) * scale[1] / CELL
    for row in {int((y1 + y2) // 2), *range(max(0, round(y1)), min(rows, round(y2)))}:
        for column in {int((x1 + x2) // 2), *range(max(0, round(x1)), min(columns, round(x2)))}:
            if 0 <= row < rows and 0 <= column < columns:
                for slot, value in values:
                    labels[row, column, slot] = value


def grown(box: Rect, board: Board, *, margin: float, least: float = 0.0) -> Rect:
    """The box with `margin` of its longer side (at least `least` pixels) added on every side, inside the board."""
    pad = max(least, margin * max(box[2] - box[0], box[3] - box[1]))
    width, height = float(board.image.width), float(board.image.height)
    return max(0.0, box[0] - pad), max(0.0, box[1] - pad), min(width, box[2] + pad), min(height, box[3] + pad)


def call_for(frame: Frame, needle: Rect) -> tuple[str, Rect]:
    """Nano's zoom call for a needle, in coarse pixels rounded outward, and the board box that it asks for."""
    x1, y1, x2, y2 = grown(needle, frame.board, margin=CALL_MARGIN[0], least=CALL_MARGIN[1])
    scale_x, scale_y = frame.scale
    step = LOCATION_STEP
    left, top = int(x1 * scale_x // step) * step, int(y1 * scale_y // step) * step
    right = min(int(-(-x2 * scale_x // step)) * step, frame.look.image.width)
    bottom = min(int(-(-y2 * scale_y // step)) * step, frame.look.image.height)
    named = str(frame.image + 1) if frame.image else ""
    call = f"<zoom>{named}" + "".join(f"<loc_{value}>" for value in (left, top, right, bottom)) + "</zoom>"
    return call, (left / scale_x, top / scale_y, right / scale_x, bottom / scale_y)


def _jittered(rng: Random, needle: Rect, board: Board) -> Rect:
    """A box around the needle as a loose policy might choose it."""
    box = grown(needle, board, margin=rng.uniform(0.2, 0.9), least=rng.uniform(4.0, 40.0))
    pads = (needle[0] - box[0], needle[1] - box[1], box[2] - needle[2], box[3] - needle[3])
    left, top, right, bottom = (pad * rng.uniform(0.15, 1.0) for pad in pads)
    return needle[0] - left, needle[1] - top, needle[2] + right, needle[3] + bottom


def proposed(rng: Random, board: Board, needle: Rect, *, growth: float | None = None) -> Frame:
    """A crop as SD-RPN proposes it: its sides are shares of the board's, its centre is about where the needle's is."""
    growth = rng.uniform(*PROPOSED_GROWTH) if growth is None else growth
    width, height = (growth * share * side for share, side in zip(PROPOSED_SIDES, board.image.size, strict=True))
    x = (needle[0] + needle[2] - width) / 2 + rng.gauss(0.0, 0.12) * width
    y = (needle[1] + needle[3] - height) / 2 + rng.gauss(0.0, 0.12) * height
    x, y = min(max(0.0, x), board.image.width - width), min(max(0.0, y), board.image.height - height)
    least, most = (round(growth**2 * count) for count in PROPOSED_TOKENS)
    return show(board, (x, y, x + width, y + height), tokens=(least, most))


def crop_tokens(board: Board) -> tuple[int, int]:
    """Return the fewest and most visual tokens of a crop: print on paper is finer."""
    return PAPER_CROP_TOKENS if isinstance(board, PaperBoard) else CROP_TOKENS


def needles(board: Board) -> list[Rect]:
    """Every place of the board that some question needs a crop of."""
    return [box for fact in board.facts for box in fact.boxes]


def _anywhere(rng: Random, board: Board) -> Rect:
    """A place as large as a needle."""
    x, y = rng.uniform(0, board.image.width - 60), rng.uniform(0, board.image.height - 30)
    return x, y, x + 60, y + 30


def inserted(rng: Random, frame: Frame, needle: Rect) -> Frame:
    """A crop of the needle that stands beside the coarse view: as SD-RPN proposes it, or looser or tighter."""
    if rng.random() < 0.7:
        return placed(proposed(rng, frame.board, needle), frame)
    return placed(show(frame.board, _jittered(rng, needle, frame.board), tokens=CROP_TOKENS), frame)


def placed(crop: Frame, frame: Frame) -> Frame:
    """The crop, told where in `frame`, an earlier view of the whole board, it was cut."""
    (x1, y1, x2, y2), (scale_x, scale_y) = crop.box, (scale / CELL for scale in frame.scale)
    cells = (x1 * scale_x, y1 * scale_y, x2 * scale_x, y2 * scale_y)
    return replace(crop, look=replace(crop.look, place=(frame.look, cells)))


def _answer(text: str, focus: Sequence[tuple[Look, Sequence[int]]] = ()) -> Say:
    return Say(text + CLOSE, learn=True, focus=focus)


def under(frame: Frame, rects: Sequence[Rect]) -> list[int]:
    """The visual tokens that show these boxes of the board: half covered by one, or holding a quarter of one.

    Of a line that is long and low, and so between two rows that no token is or does, those that show the most of it.
    """
    columns, rows = frame.look.grid[1], frame.look.grid[0]
    scale_x, scale_y = frame.scale
    found: set[int] = set()
    for rect in rects:
        x1, x2 = ((value - frame.box[0]) * scale_x / CELL for value in (rect[0], rect[2]))
        y1, y2 = ((value - frame.box[1]) * scale_y / CELL for value in (rect[1], rect[3]))
        covered: dict[int, float] = {}
        for row in range(max(0, int(y1)), min(rows, int(y2) + 1)):
            for column in range(max(0, int(x1)), min(columns, int(x2) + 1)):
                across, down = min(x2, column + 1) - max(x1, column), min(y2, row + 1) - max(y1, row)
                if across > 0 and down > 0:
                    covered[row * columns + column] = across * down
        most = max(covered.values(), default=0.0)
        enough = min(0.5, 0.25 * (x2 - x1) * (y2 - y1))
        found.update(token for token, share in covered.items() if share >= (enough if enough <= most else 0.8 * most))
    return sorted(found)


def read_from(frame: Frame, fact: Fact) -> list[tuple[Look, list[int]]]:
    """Return the place of each token of the answer: printed characters for codes and prices, else the object itself."""
    if not fact.boxes:
        return [(frame.look, under(frame, fact.seen))]
    box = fact.boxes[-1]
    inside = [glyph for glyph in frame.board.glyphs if box[0] <= glyph.x <= box[2] and box[1] <= glyph.y <= box[3]]
    if len(inside) != len(fact.answer):
        return [(frame.look, under(frame, [box]))]
    return [(frame.look, under(frame, [ink(glyph)])) for glyph in sorted(inside, key=lambda glyph: glyph.x)]


def asked(frame: Frame, fact: Fact, after: str) -> list[Piece]:
    """The question and what follows it; its naming words are told where in `frame` what they name is."""
    pieces, start = [], 0
    focus: list[tuple[Look, Sequence[int]]] = []
    for end, rects in referents(frame.board, fact):
        pieces.append(Say(fact.question[start:end], focus=focus))
        start, focus = end, [(frame.look, under(frame, rects))]
    return [*pieces, Say(fact.question[start:] + after, focus=focus)]


def direct(frame: Frame, fact: Fact) -> list[Piece]:
    return [*asked(frame, fact, ASK), _reply(frame, fact)]


def _reply(frame: Frame, fact: Fact) -> Say:
    """The answer, read from `frame`. What is counted has one token for each, in its middle."""
    if fact.kind == "count":
        return Say(fact.answer + CLOSE, learn=True, tally=(frame.look, under(frame, [_middle(r) for r in fact.seen])))
    return replace(_answer(fact.answer, read_from(frame, fact)), line=fact.kind == "at")


def beside(fact: Fact, crops: Sequence[Frame]) -> list[Piece]:
    """The crops already stand beside the coarse view, as a perception policy puts them."""
    return [*(crop.look for crop in crops), *direct(crops[-1], fact)]


def looking(frame: Frame, fact: Fact) -> list[Piece]:
    """A question without the offer of tools whose answer cannot be read in `frame`: only where it lies is learned.

    That is what gate and SD-RPN start from. Of two steps it is the first.
    """
    return [*asked(frame, fact, ASK), Say(CLOSE, looks=True, focus=[(frame.look, under(frame, fact.boxes[:1]))])]


def calling(frame: Frame, fact: Fact, *, shown: Sequence[Frame] = (), step: int = 0) -> list[Piece]:
    """The zoom call alone: where to look is learned from far more questions than there is time to answer.

    `shown`: crops that already stand beside the coarse view, of the steps before `step` or of something else.
    """
    needle = fact.boxes[step]
    call, _ = call_for(frame, needle)
    return [
        *(crop.look for crop in shown),
        *asked(frame, fact, f" You may zoom.{ASK}"),
        _called(frame, call, needle),
    ]


def _called(frame: Frame, call: str, needle: Rect) -> Say:
    """A call, each token of which is read from where the needle lies."""
    return _answer(call, [(frame.look, under(frame, [needle]))] * (5 + bool(frame.image)))


def noting(crop: Frame, fact: Fact, frame: Frame) -> Frame:
    """A crop of a note of two steps: its last character is told where in `frame` the place is that it names."""
    if len(fact.boxes) < 2:
        return crop
    left, top, right, bottom = fact.boxes[0]
    characters = [glyph for glyph in crop.board.glyphs if left <= glyph.x <= right and top <= glyph.y <= bottom]
    tokens = under(crop, [ink(max(characters, key=lambda glyph: glyph.x))])
    return replace(crop, look=replace(crop.look, note=(tokens, frame.look, under(frame, fact.boxes[1:]))))


def vain(rng: Random, frame: Frame, fact: Fact, *, shown: Sequence[Frame] = (), served: bool = False) -> list[Piece]:
    """A zoom call that brings nothing: refused, for what is in `shown` already or is not needed, or `served` elsewhere.

    It was not meant to be learned. What is left is: to answer from what is there, or to call for the needle that is not
    yet in `shown`.
    """
    where = shown[-1] if shown and len(shown) == len(fact.boxes) else frame
    nowhere = _anywhere(rng, frame.board)
    place = rng.choice([*fact.seen, nowhere]) if served or not fact.boxes else fact.boxes[0]
    call, box = call_for(frame, place)
    pieces = [*(crop.look for crop in shown), *asked(where, fact, f" You may zoom.{ASK}")]
    told = call + CLOSE + _NEXT
    if served:
        pieces += [Say(told), show(frame.board, box, tokens=crop_tokens(frame.board)).look, Say(ASK)]
    else:
        pieces.append(Say(told + REFUSAL + ASK))
    if len(shown) == len(fact.boxes):
        return [*pieces, _reply(where, fact)]
    needle = fact.boxes[len(shown)]
    return [*pieces, _called(frame, call_for(frame, needle)[0], needle)]


def zooming(
    frame: Frame, fact: Fact, *, shown: Sequence[Frame] = (), final: bool = False, served: bool = True
) -> list[Piece]:
    """Call the zoom tool for every needle in order, then answer; with `final`, when told that this turn is the last.

    Unless `served`, the last call ends it.

    `shown`: crops of the first needles that already stand beside the coarse view, and are not asked for again.
    """
    last = shown[-1] if shown else frame
    where = last if len(shown) == len(fact.boxes) else frame
    pieces = [*(crop.look for crop in shown), *asked(where, fact, f" You may zoom.{ASK}")]
    for step, needle in enumerate(fact.boxes[len(shown) :], start=len(shown) + 1):
        call, box = call_for(frame, needle)
        pieces.append(_called(frame, call, needle))
        if step == len(fact.boxes) and not served:
            return pieces
        last = show(frame.board, box, tokens=crop_tokens(frame.board))
        if step < len(fact.boxes):
            last = noting(last, fact, frame)
        pieces += [Say(_NEXT), last.look, Say(ASK)]
    if final and fact.boxes:
        pieces[-1] = Say(f"{CLOSE}{_NEXT}Answer now.{ASK}")
    return [*pieces, _reply(last, fact)]


def coarse_tree(
    rng: Random,
    board: Board,
    *,
    again: Sequence[Board] = (),
    crops: int = 8,
    calls: int = 12,
    looks: int = 8,
    tokens: int = COARSE_TOKENS,
) -> Tree:
    """Build the tree of one coarse view: about `crops` crops, `calls` that are not served, `looks` without one.

    again: the same board with other notes (see `draw_board`), which no coarse view can tell apart.
    """
    frame = show(board, None, tokens=(16, tokens))
    easy = [fact for fact in board.facts if fact.coarse_suffices]
    fine = [fact for fact in board.facts if len(fact.boxes) == 1]
    hops = steps_of(board)
    rng.shuffle(easy)
    fine = varied(rng, fine)
    branches = [("direct", fact, direct(frame, fact)) for fact in [*easy[:7], *counts(rng, board)]]
    branches += [("zoom", fact, zooming(frame, fact)) for fact in easy[7:10] or easy[:1]]
    branches += [("refused", fact, vain(rng, frame, fact)) for fact in [*easy[-2:], *fine[-1:]]]
    if rng.random() < 0.6:
        branches += [("vain", fact, vain(rng, frame, fact, served=True)) for fact in easy[-1:]]
    branches += [("direct", fact, direct(frame, fact)) for fact in fine[:1]]
    stray, chance = placed(proposed(rng, board, _anywhere(rng, board)), frame), rng.random()
    if chance < 0.25 and easy:  # a crop that nobody needed
        branches.append(("stray", easy[0], [stray.look, *direct(frame, easy[0])]))
    elif chance < 0.5 and fine:  # a crop of the wrong place
        branches.append(("lost", fine[-1], calling(frame, fine[-1], shown=[stray])))
    branches += _notes(rng, [frame, *(replace(frame, board=other) for other in again)])
    crops -= 2 * min(3, len(hops))
    if hops and rng.random() < 0.2:
        views = [inserted(rng, frame, box) for box in hops[-1].boxes]
        branches.append(("beside", hops[-1], beside(hops[-1], views)))
        crops -= 2
    served, called = max(1, crops), fine[max(1, crops) :]
    for index, fact in enumerate(fine[:served]):
        if index % 3 == 0:
            branches.append(("zoom", fact, zooming(frame, fact, final=rng.random() < 0.05)))
            continue
        view, chance = inserted(rng, frame, fact.boxes[0]), rng.random()
        if chance < 0.2:
            served = chance < 0.07
            name = "vain" if served else "refused"
            branches.append((name, fact, vain(rng, frame, fact, shown=[view], served=served)))
        else:
            pieces = beside(fact, [view]) if chance < 0.75 else zooming(frame, fact, shown=[view])
            branches.append(("beside", fact, pieces))
        called.append(fact)
    unseen = [*called, *hops[2:]]
    branches += [("call", fact, calling(frame, fact)) for fact in unseen[:calls]]
    branches += [("look", fact, looking(frame, fact)) for fact in [*hops[:2], *reversed(unseen)][:looks]]
    names = [f"{mode} {fact.kind}" for mode, fact, _ in branches]
    return Tree([Say(OPEN), frame.look], [pieces for _, _, pieces in branches], names)


def _notes(rng: Random, frames: Sequence[Frame]) -> list[tuple[str, Fact, list[Piece]]]:
    """Write conversations about a board's notes. `frames`: its coarse view, of as many drawings of its notes.

    Of each note one second call is served; several are not, after crops of every kind.
    """
    branches: list[tuple[str, Fact, list[Piece]]] = []
    for index, facts in enumerate(zip(*(steps_of(one.board)[:3] for one in frames), strict=True)):
        served, other, another = ((frames[at % len(frames)], facts[at % len(frames)]) for at in range(3))
        shown = [_noted(rng, frames[0], *one) for one in (served, other)]
        branches.append(("follow", other[1], calling(*other, shown=[shown[1]], step=1)))
        branches.append(("steps", another[1], zooming(*another, served=False)))
        role = "noted" if index else "zoom"
        final = rng.random() < 0.05
        branches.append((role, served[1], zooming(*served, shown=shown[:1] if index else (), final=final)))
        for one in zip(frames, facts, strict=True):
            slip = _noted(rng, frames[0], *one, growth=SLIP_GROWTH)
            if rng.random() < 0.15:
                branches.append(("refused", one[1], vain(rng, *one, shown=[slip])))
            else:
                branches.append(("slip", one[1], calling(*one, shown=[slip], step=1)))
    return branches


def steps_of(board: Board) -> list[Fact]:
    """Its questions in two steps."""
    return [fact for fact in board.facts if len(fact.boxes) == 2]


def _noted(rng: Random, coarse: Frame, frame: Frame, fact: Fact, *, growth: float | None = None) -> Frame:
    """A proposed crop of the note of a question in two steps."""
    return noting(placed(proposed(rng, frame.board, fact.boxes[0], growth=growth), coarse), fact, coarse)


def counts(rng: Random, board: Board, *, most: int = 12) -> list[Fact]:
    """Further questions of how many there are: most words of a board name one thing alone, which teaches least."""
    words = [*{thing.shape for thing in board.things}, *{thing.color for thing in board.things}]
    seen = {word: [thing.box for thing in board.things if word in (thing.shape, thing.color)] for word in sorted(words)}
    chosen = sorted(seen, key=lambda word: rng.random() * min(3, len(seen[word])), reverse=True)[:most]
    return [
        Fact(
            "needle-global",
            "count",
            rng.choice(QUESTIONS["count"]).format(plural(word)),
            str(len(seen[word])),
            seen=tuple(seen[word]),
        )
        for word in chosen
    ]


def varied(rng: Random, facts: list[Fact]) -> list[Fact]:
    """Shuffled so that every kind comes before any kind comes again."""
    rng.shuffle(facts)
    seen: dict[str, int] = {}
    keyed = []
    for fact in facts:
        seen[fact.kind] = seen.get(fact.kind, 0) + 1
        keyed.append((seen[fact.kind], fact))
    return [fact for _, fact in sorted(keyed, key=lambda pair: pair[0])]


def whole_tree(rng: Random, board: Board, *, tokens: int, questions: int = 14, legible: float = LEGIBLE) -> Tree:
    """Direct questions on the whole board at a budget: the baseline's training."""
    frame = show(board, None, tokens=(16, tokens), legible=legible)
    facts = varied(rng, list(board.facts))[:questions]
    return Tree(
        [Say(OPEN), frame.look], [direct(frame, fact) for fact in facts], [f"direct {fact.kind}" for fact in facts]
    )


def crop_tree(rng: Random, board: Board, *, kind: str | None = None) -> Tree:
    """A crop shown as an image of its own, with the questions whose needles lie inside it; around one of `kind`."""
    fact = rng.choice([fact for fact in board.facts if fact.boxes and kind in (None, fact.kind)])
    box = _jittered(rng, rng.choice(fact.boxes), board)
    inside = [
        other
        for other in board.facts
        if len(other.boxes) == 1 and _contains(box, other.boxes[0]) and other.kind in _CROP_KINDS
    ]
    frame = show(board, box, tokens=CROP_TOKENS)
    facts = inside or [fact]
    names = [f"direct {other.kind}" for other in facts]
    return Tree([Say(OPEN), frame.look], [direct(frame, other) for other in facts], names)


def _contains(outer: Rect, inner: Rect) -> bool:
    return outer[0] <= inner[0] and outer[1] <= inner[1] and outer[2] >= inner[2] and outer[3] >= inner[3]


def training_board(rng: Random, seed: int) -> Board:
    return training_boards(rng, seed, notes=1)[0]


def training_boards(rng: Random, seed: int, *, notes: int = NOTES) -> list[Board]:
    """A board for training, and if it has notes, the same board with other notes: `notes` drawings in all."""
    layout = rng.choices(list(LAYOUT_SHARES), weights=list(LAYOUT_SHARES.values()))[0]
    return [draw_board(layout, seed, split="train", notes=index) for index in range(notes if layout == "hop" else 1)]
