"""Question trees about paper: parts of a page to read out, coarse views to zoom from, whole pages.

The roles are those of boards (`examples.py`): answered from what is shown, with a crop already beside the coarse view,
with a zoom call and its result, and calls and looks alone, which are many for little. Where a view does not hold the
answer, that is what is answered.
"""

import math
import re
from collections.abc import Sequence
from random import Random
from statistics import median
from typing import Final

from nano.examples import OPEN, Frame, calling, crop_tokens, direct, looking, show, vain, zooming
from nano.frames import CELL
from nano.paper import Line, Rect
from nano.paper_boards import LINE_QUESTION, PaperBoard, shuffled
from nano.tokenizer import LOCATIONS
from nano.trees import Piece, Say, Tree
from nano.words import LABELS
from qzoom_agent.evaluation.tasks.needle.boards import Fact
from qzoom_agent.evaluation.tasks.receipts import BESIDE, BESIDE_QUESTIONS, TOTAL_WORDS
from qzoom_agent.protocols.nano import LOCATION_STEP, UNKNOWN

COARSE_TOKENS: Final = (128, 200, 256, 300, 300, 400)
"""Most visual tokens of a coarse view of paper; one drawn at random."""
LOOK_TOKENS: Final = (200, 256, 300, 300, 400)
"""The same where only places are learned."""
_CUT: Final = 0.4
"""Share of these that show a part of the page."""
PROPOSED_SIDES: Final = ((0.5, 0.88), (0.07, 0.17))
"""Least and greatest width and height of a crop that SD-RPN proposes, as shares of the page's: a few lines."""
PROPOSED_TOKENS: Final = (112, 320)
"""Fewest and most visual tokens of such a crop."""
CLOSE_SIDES: Final = ((0.5, 0.85), (0.45, 0.8))
"""Least and greatest width and height of a close-up, as shares of those of the crop that it is cut from."""
CLOSE_TOKENS: Final = (112, 224)
"""Fewest and most visual tokens of a close-up; more where it would not be magnified by `_CLOSER`."""
_CLOSER: Final = 1.25
"""Least magnification of a close-up against its crop."""
_CLOSE: Final = 0.7
"""Share of the crops of what is asked that a close-up follows."""
WHOLE_TOKENS: Final = (400, 600, 900, 1300, 2048)
"""The same of a whole page to read from."""
LEGIBLE: Final = 16.0
"""Height of a line in a view, in pixels, from which on it is read out."""
_HEIGHTS: Final = (34.0, 62.0)
"""Least and greatest height of a line in a part, in pixels; from 48 or so each character has a visual token."""
_SHOWN: Final = 0.4
"""Share of the questions with the offer of the tool whose crop is shown already, as a policy does that looks first."""
_REACH: Final = LOCATION_STEP * (len(LOCATIONS) - 1)
"""Largest coordinate that has a location token."""
_FACTS: Final = 0.75
"""Share of parts of a page that are cut about something that can be asked, and not about any line."""
_UNKNOWN: Final = 0.35
"""Share of trees with a question whose answer is not shown."""
_DATED: Final = re.compile(r"\d[-/. ]\w{1,3}[-/. ]\d\d")

Branch = tuple[str, Fact, list[Piece]]


def coarse_paper_tree(rng: Random, board: PaperBoard, *, served: int = 5, calls: int = 5, looks: int = 8) -> Tree:
    """Return what happens on top of a coarse view of a page: some crops are served, more are called or looked for.

    Fields come first: where they stand follows from the layout, which a coarse view shows, and most labels do not. A
    view for which there are not enough location tokens is not called from.
    """
    frame = show(board, None, tokens=(16, rng.choice(COARSE_TOKENS)))
    within_reach = max(frame.look.image.size) <= _REACH
    facts = shuffled(rng, board.facts)
    branches: list[Branch] = []
    for index, fact in enumerate(facts[:served]):
        if within_reach and index % 3 == 2:
            if len(fact.boxes) == 1 and rng.random() < _SHOWN:
                crop = proposed_crop(rng, board, fact.boxes[0])
                branches.append(("offered", fact, zooming(frame, fact, shown=[crop])))
            else:
                branches.append(("zoom", fact, zooming(frame, fact, final=rng.random() < 0.05)))
        else:
            crops = [right := proposed_crop(rng, board, fact.boxes[0])]
            if index % 3 == 1:  # one of several regions is right, wherever it stands among them
                crops.insert(rng.randrange(2), proposed_crop(rng, board, rng.choice(board.paper.lines).box))
            read = right
            if len(crops) == 1 and rng.random() < _CLOSE:
                crops.append(close := close_up(rng, right, fact.boxes))
                read = close if _within(close.box, fact.boxes) else right
            branches.append(("beside", fact, [*(crop.look for crop in crops), *direct(read, fact)]))
    if facts and rng.random() < _UNKNOWN:  # a crop of something else
        stray = proposed_crop(rng, board, rng.choice(facts).boxes[0])
        crops = [stray, close_up(rng, stray, [stray.box])] if rng.random() < _CLOSE else [stray]
        shown = [crop.look for crop in crops]
        branches += [("beside", fact, [*shown, *direct(stray, fact)]) for fact in _unknown(rng, stray, board)]
    if within_reach:
        branches += [("refused", fact, vain(rng, frame, fact)) for fact in facts[-1:]]
        branches += [("call", fact, calling(frame, fact)) for fact in facts[:calls]]
        for fact in rng.sample(facts[:calls], min(2, len(facts))):  # after a crop that does not hold it
            stray = proposed_crop(rng, board, rng.choice(board.paper.lines).box)
            if not _meet(stray.box, fact.boxes[0]):
                branches.append(("lost", fact, calling(frame, fact, shown=[stray])))
    branches += [("look", fact, looking(frame, fact)) for fact in facts[:looks]]
    return _tree(frame, branches)


def look_tree(rng: Random, board: PaperBoard, *, looks: int = 10) -> Tree:
    """Return a coarse view of a page, or of most of it, and questions whose places alone are learned.

    They cost little, and a batch of them trains the vision tower for print that is too small to read.
    """
    box = None
    if rng.random() < _CUT:  # fields stand elsewhere than on the page
        (width, height), high = board.image.size, rng.uniform(0.55, 0.95)
        x, y = rng.uniform(0.0, 0.06) * width, rng.uniform(0.0, 1.0 - high) * height
        box = (x, y, min(float(width), x + rng.uniform(0.92, 1.0) * width), y + high * height)
    frame = show(board, box, tokens=(16, rng.choice(LOOK_TOKENS)))
    inside = [fact for fact in shuffled(rng, board.facts) if _within(frame.box, fact.boxes)]
    return _tree(frame, [("look", fact, looking(frame, fact)) for fact in inside[:looks]])


def part_tree(rng: Random, board: PaperBoard, *, tokens: tuple[int, int] = (60, 240), questions: int = 10) -> Tree:
    """Return a part of a page whose lines are read out, and what else can be asked of it."""
    about, height = _asked_about(rng, board)
    scale = math.exp(rng.uniform(*map(math.log, _HEIGHTS))) / max(4.0, height)
    most = rng.randint(*tokens)
    long = 1.1 * (about[2] - about[0])
    width = min(float(board.image.width), max(long, rng.uniform(8, 30) * CELL / scale))
    high = max(2.0 * height, 1.2 * (about[3] - about[1]), most * (CELL / scale) ** 2 / width)
    high = min(float(board.image.height), high)
    x = _about((about[0] + about[2]) / 2, width, board.image.width, rng.uniform(0.4, 0.6))
    y = _about((about[1] + about[3]) / 2, high, board.image.height, rng.uniform(0.3, 0.7))
    frame = show(board, (x, y, x + width, y + high), tokens=(max(4, round(0.9 * most)), most))
    return _tree(frame, _direct(rng, frame, board, questions))


def whole_paper_tree(rng: Random, board: PaperBoard, *, questions: int = 16) -> Tree:
    """Return direct questions about a whole page at a budget at which it can be read: the baseline's training."""
    frame = show(board, None, tokens=(64, rng.choice(WHOLE_TOKENS)))
    return _tree(frame, _direct(rng, frame, board, questions))


def _tree(frame: Frame, branches: Sequence[Branch]) -> Tree:
    names = [f"{mode} {fact.kind}" for mode, fact, _ in branches]
    return Tree([Say(OPEN), frame.look], [pieces for _, _, pieces in branches], names)


def _asked_about(rng: Random, board: PaperBoard) -> tuple[Rect, float]:
    """Return the place that a part of a page is cut about, and the height of its print."""
    line = rng.choice(board.paper.lines)
    if rng.random() >= _FACTS or not board.facts:
        return line.box, line.height
    fields = [fact for fact in board.facts if fact.kind != BESIDE]
    fact = rng.choice(fields if fields and rng.random() < 0.6 else board.facts)
    left, top, right, bottom = zip(*fact.boxes, *fact.seen, strict=True)
    height = min(*(box[3] - box[1] for box in fact.boxes), median(one.height for one in board.paper.lines))
    return (min(left), min(top), max(right), max(bottom)), height


def _about(middle: float, length: float, room: float, share: float) -> float:
    """Return where a stretch begins that holds a place at a share of its length and stays on the page."""
    return min(max(0.0, middle - share * length), max(0.0, room - length))


def _crop(rng: Random, board: PaperBoard, needle: Rect) -> Frame:
    """Return a crop about a needle as a policy might choose it: often too large, seldom centred."""
    width, height = needle[2] - needle[0], needle[3] - needle[1]
    pads = [rng.uniform(0.3, 3.0) * height + rng.uniform(0.0, 0.4) * width * (at % 2 == 0) for at in range(4)]
    box = (
        max(0.0, needle[0] - pads[0]),
        max(0.0, needle[1] - pads[1]),
        min(float(board.image.width), needle[2] + pads[2]),
        min(float(board.image.height), needle[3] + pads[3]),
    )
    return show(board, box, tokens=crop_tokens(board))


def proposed_crop(rng: Random, board: PaperBoard, needle: Rect) -> Frame:
    """Return a crop that holds a needle as SD-RPN proposes it, of fixed sides, or where it is too large for these."""
    sides = [rng.uniform(*share) * side for share, side in zip(PROPOSED_SIDES, board.image.size, strict=True)]
    lengths = (needle[2] - needle[0], needle[3] - needle[1])
    if rng.random() < 0.3 or any(0.95 * side < length for side, length in zip(sides, lengths, strict=True)):
        return _crop(rng, board, needle)
    corner = []
    for axis, side in enumerate(sides):
        start = (needle[axis] + needle[axis + 2] - side) / 2 + rng.gauss(0.0, 0.2) * side
        start = max(min(start, needle[axis]), needle[axis + 2] - side)
        corner.append(min(max(0.0, start), board.image.size[axis] - side))
    (x, y), (width, height) = corner, sides
    most = rng.randint(*PROPOSED_TOKENS)
    return show(board, (x, y, x + width, y + height), tokens=(round(0.7 * most), most))


def close_up(rng: Random, crop: Frame, boxes: Sequence[Rect]) -> Frame:
    """Return a part of a crop as a second look proposes it: of fixed sides, about these boxes or a little off."""
    left, top, right, bottom = zip(*boxes, strict=True)
    corners, share = [], 1.0
    for axis, (low, high) in enumerate(((min(left), max(right)), (min(top), max(bottom)))):
        first, last = crop.box[axis], crop.box[axis + 2]
        side = rng.uniform(*CLOSE_SIDES[axis]) * (last - first)
        start = (low + high - side) / 2 + rng.gauss(0.0, 0.12) * side
        start = min(max(first, start), last - side)
        corners.append((start, start + side))
        share *= side / (last - first)
    (x1, x2), (y1, y2) = corners
    rows, columns = crop.look.grid
    most = max(rng.randint(*CLOSE_TOKENS), math.ceil(1.3 * _CLOSER**2 * share * rows * columns))
    return show(crop.board, (x1, y1, x2, y2), tokens=(round(0.7 * most), most))


def _direct(rng: Random, frame: Frame, board: PaperBoard, questions: int) -> list[Branch]:
    """Return direct questions about a view; now and then one whose answer is not in it."""
    facts = _askable(rng, frame, board)[:questions]
    facts += _unknown(rng, frame, board) if rng.random() < _UNKNOWN else []
    return [("direct", fact, direct(frame, fact)) for fact in facts]


def _unknown(rng: Random, frame: Frame, board: PaperBoard) -> list[Fact]:
    """Return a question whose answer a view does not hold: about another part of the page, or a label it lacks."""
    shown = [line.text for line in board.paper.lines if _meet(line.box, frame.box)]
    elsewhere = [
        fact
        for fact in board.facts
        if not any(_meet(box, frame.box) for box in (*fact.boxes, *fact.seen))
        and not any(fact.answer in text or _could_be(fact, text) for text in shown)
    ]
    if elsewhere and rng.random() < 0.7:
        question = rng.choice(elsewhere).question
    else:
        printed = " ".join(line.text for line in board.paper.lines)
        names = [name.upper() for name in LABELS if name.upper() not in printed]
        if not names:
            return []
        question = rng.choice(BESIDE_QUESTIONS).format(rng.choice(names))
    return [Fact("paper", "unknown", question, UNKNOWN)]


def _could_be(fact: Fact, text: str) -> bool:
    """Return whether a line might be taken for the answer, or for the label that is asked about."""
    if fact.kind == "total":
        return any(word in text for word in TOTAL_WORDS)
    if fact.kind == "date":
        return _DATED.search(text) is not None
    return fact.kind == BESIDE and fact.question.endswith(f" {text.strip(' :.')}?")


def _meet(one: Rect, other: Rect) -> bool:
    return one[0] < other[2] and other[0] < one[2] and one[1] < other[3] and other[1] < one[3]


def _askable(rng: Random, frame: Frame, board: PaperBoard) -> list[Fact]:
    """Return what can be read in a view: its facts and its lines, in turn."""
    facts = shuffled(rng, [fact for fact in board.facts if _seen(frame, [*fact.boxes, *fact.seen])])
    lines = [fact for line in board.paper.lines if (fact := line_fact(frame, line)) is not None]
    rng.shuffle(lines)
    both = [fact for pair in zip(facts, lines, strict=False) for fact in pair]
    return [*both, *facts[len(lines) :], *lines[len(facts) :]]


def _seen(frame: Frame, boxes: Sequence[Rect]) -> bool:
    """Return whether boxes lie in a view and are large enough to be read."""
    tall = min(box[3] - box[1] for box in boxes) * frame.scale[1]
    return _within(frame.box, boxes) and tall >= LEGIBLE


def _within(whole: Rect, boxes: Sequence[Rect]) -> bool:
    left, top, right, bottom = whole
    return all(left <= box[0] and top <= box[1] and box[2] <= right and box[3] <= bottom for box in boxes)


def line_fact(frame: Frame, line: Line) -> Fact | None:
    """Return the question for a line by the place of its left end, or None where it has none or is not seen."""
    if not _seen(frame, [line.box]) or not line.text.strip():
        return None
    x = (line.box[0] - frame.box[0]) * frame.scale[0]
    y = ((line.box[1] + line.box[3]) / 2 - frame.box[1]) * frame.scale[1]
    if max(x, y) > _REACH:
        return None
    place = "".join(LOCATIONS[round(value / LOCATION_STEP)] for value in (x, y))
    return Fact("paper", "at", LINE_QUESTION.format(place), line.text, (line.box,))
