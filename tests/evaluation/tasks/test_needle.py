"""The needle tasks: the same pixels everywhere, boxes that hold their needle, answers that follow from the drawing.

After a wanted change of the drawing, `python tests/evaluation/tasks/test_needle.py` prints the table `GOLDEN` anew.
"""

import re
import shutil
from dataclasses import replace
from hashlib import sha256
from itertools import combinations, pairwise
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageDraw

from needle_picture import picture
from qzoom_agent.errors import ConfigError
from qzoom_agent.evaluation.tasks.needle import SPLITS, TASK_NAMES, Sample, pair, sample
from qzoom_agent.evaluation.tasks.needle.boards import (
    CHAIN_QUESTIONS,
    CODE_CHARS,
    FIELDS,
    GRIDS,
    HEADLINES,
    ITEMS,
    LAYOUTS,
    QUESTIONS,
    Board,
    BoardObject,
    Fact,
    draw_board,
)
from qzoom_agent.evaluation.tasks.needle.ink import (
    COLORS,
    OOD,
    PHOTOS,
    SHAPES,
    TRAIN,
    Rect,
    draw_text,
    font,
    text_width,
    typefaces,
)
from qzoom_agent.geometry import Size, fit_tokens, tokens
from qzoom_agent.views import original_id
from tests.cases import each_case

SEEDS = st.integers(0, 2**40)
few = settings(max_examples=4, deadline=None, derandomize=True, database=None)
places = [(layout, split) for layout in (*LAYOUTS, "chain") for split in SPLITS]

# (task, split, seed): question, answer, half the SHA-256 of size and RGB bytes; drawn with the pinned packages.
GOLDEN: dict[tuple[str, str, int], tuple[str, str, str]] = {
    ("needle-global", "train", 0): ("which word is the title?", "bakery", "d3d369620c30388f23a804ee4d4b15a3"),
    ("needle-global", "train", 41): ("what does the headline say?", "forest", "b04c43470cc1fc2ef0fa66c09e47b72b"),
    ("needle-global", "test", 0): ("which shape is red?", "triangle", "2099aa8062948abf7cef3167990fe691"),
    ("needle-global", "test", 41): ("what does the headline say?", "planet", "1d7f74c9c4ba33f92e305d8f830c4d3d"),
    ("needle-global", "ood", 0): ("what is the number of objects?", "6", "8cff55072df40c911bc636a8119c7f8f"),
    ("needle-global", "ood", 41): ("which word is the title?", "island", "59b8c01898560ef04e18969df2e68c75"),
    ("needle-scene", "train", 0): (
        "read the code of the object directly right of the yellow star.",
        "L12",
        "d3d369620c30388f23a804ee4d4b15a3",
    ),
    ("needle-scene", "train", 41): (
        "read the code of the object directly right of the pink star.",
        "U5J",
        "577a8bb9f4560dbe424a9c7238fbed5d",
    ),
    ("needle-scene", "test", 0): ("how many dots are on the pink circle?", "3", "2099aa8062948abf7cef3167990fe691"),
    ("needle-scene", "test", 41): (
        "read the code of the object directly below the blue circle.",
        "7U9",
        "e1f966fde0632d03be3585f712601e18",
    ),
    ("needle-scene", "ood", 0): (
        "what is the code on the object directly right of the green triangle?",
        "9YL",
        "8cff55072df40c911bc636a8119c7f8f",
    ),
    ("needle-scene", "ood", 41): ("count the dots on the green star.", "4", "648fdaaaf5770d872d23bfe124286fc9"),
    ("needle-doc", "train", 0): ("read cell A2.", "V8E", "f5821b2709596fd4e4c729d6c5938651"),
    ("needle-doc", "train", 41): ("what is in cell D3?", "ATJ", "eff031243f22a1504e705b93edbf4a78"),
    ("needle-doc", "test", 0): ("what is the value of hall?", "KPF", "babfe91a1bbf5a5c51e1ac2714b8de3c"),
    ("needle-doc", "test", 41): ("what is the value of gate?", "RR7", "1d7f74c9c4ba33f92e305d8f830c4d3d"),
    ("needle-doc", "ood", 0): ("what does the fish cost?", "6.39", "7ec6da11ddbba6773391baf3a7d1205a"),
    ("needle-doc", "ood", 41): ("what does the fish cost?", "4.53", "59b8c01898560ef04e18969df2e68c75"),
    ("needle-hop", "train", 0): (
        "which code is in the cell named by the purple diamond?",
        "9XE",
        "e8204fe9d7598a033774ce8b949943ed",
    ),
    ("needle-hop", "train", 41): (
        "which code is in the cell named by the purple ring?",
        "NYL",
        "26f2765ba8cbce8caa9f9b9dcca4ceee",
    ),
    ("needle-hop", "test", 0): (
        "which code is in the cell named by the purple ring?",
        "M65",
        "78b90881c6b5e5a1c8da18d7995f7f78",
    ),
    ("needle-hop", "test", 41): (
        "follow the note on the red diamond: what code is in that cell?",
        "5U0",
        "55eeca730679baf07d647586de894b4b",
    ),
    ("needle-hop", "ood", 0): (
        "follow the note on the purple circle: what code is in that cell?",
        "MF2",
        "48b25832e7d14aba8f0c43d9544cd27d",
    ),
    ("needle-hop", "ood", 41): (
        "follow the note on the purple square: what code is in that cell?",
        "A3R",
        "a423a6659e6c81337f6b07f86a7039ee",
    ),
    ("needle-chain", "train", 0): (
        "follow the note on the green triangle to the next note: what code is in that cell?",
        "M0U",
        "94561637d7bd9bffdc0b4e26e1b0026a",
    ),
    ("needle-chain", "train", 41): (
        "follow the note on the green square to the next note: what code is in that cell?",
        "KLN",
        "7c58c76cf486c76e35edb48c8e884d66",
    ),
    ("needle-chain", "test", 0): (
        "follow the note on the orange square to the next note: what code is in that cell?",
        "73U",
        "68bc94c2cff3f5e25602d13737e960c9",
    ),
    ("needle-chain", "test", 41): (
        "follow the note on the green square to the next note: what code is in that cell?",
        "965",
        "824742bf631e978aa93bcc926dd589af",
    ),
    ("needle-chain", "ood", 0): (
        "which code is in the cell named by the note in the cell named by the blue cross?",
        "6E5",
        "4cc2807ea7fb41c09a6a19095359bf01",
    ),
    ("needle-chain", "ood", 41): (
        "which code is in the cell named by the note in the cell named by the red star?",
        "A5C",
        "2c3884e0121269cee58a42b0747142d2",
    ),
}


def digest(one: Sample) -> str:
    return sha256(f"{one.image.size}".encode() + one.image.tobytes()).hexdigest()[:32]


def record(task: str, split: str, seed: int) -> tuple[str, str, str]:
    one = sample(task, seed, split=split)
    return one.question, one.answer, digest(one)


# ---- the same everywhere -------------------------------------------------------------------------------------------


@each_case("key", GOLDEN)
def test_a_seed_draws_the_pixels_that_were_recorded(key: tuple[str, str, int]) -> None:
    assert record(*key) == GOLDEN[key]


def test_every_task_and_split_was_recorded() -> None:
    assert {(task, split) for task, split, _ in GOLDEN} == {(task, split) for task in TASK_NAMES for split in SPLITS}


@few
@given(SEEDS, st.sampled_from(TASK_NAMES), st.sampled_from(SPLITS))
def test_a_sample_depends_on_task_seed_and_split_alone(seed: int, task: str, split: str) -> None:
    first = sample(task, seed, split=split)
    sample("needle-hop", seed + 1, split="ood")
    again = sample(task, seed, split=split)
    assert replace(first, image=again.image) == again
    assert digest(first) == digest(again)
    assert first.id == f"{task}-{split}-{seed}"


@pytest.mark.parametrize("task", TASK_NAMES)
def test_splits_and_seeds_differ(task: str) -> None:
    drawn = [sample(task, seed, split=split) for seed in range(3) for split in SPLITS]
    assert len({digest(one) for one in drawn}) == len({one.id for one in drawn}) == len(drawn)


def test_unseen_typefaces_and_photographs_were_not_trained_on() -> None:
    assert not {package for package, _ in TRAIN} & {package for package, _ in OOD}
    assert not set(PHOTOS["train"]) & set(PHOTOS["ood"])
    assert set(typefaces("train")) == set(typefaces("test"))
    assert not set(typefaces("train")) & set(typefaces("ood"))


@pytest.mark.parametrize("split", ["train", "ood"])
def test_sizes_are_heights_of_capitals(split: str) -> None:
    for face in typefaces(split):
        box = font(face, 40).getbbox("H")
        assert box[3] - box[1] == pytest.approx(40, abs=1.5), face.name


# ---- what a sample says --------------------------------------------------------------------------------------------


@few
@given(SEEDS, st.sampled_from(TASK_NAMES), st.sampled_from(SPLITS))
def test_needles_lie_inside_and_are_large_enough(seed: int, task: str, split: str) -> None:
    one = sample(task, seed, split=split)
    assert one.image.mode == "RGB"
    assert one.task == task
    assert one.coarse_suffices == (not one.boxes) == (task == "needle-global")
    assert len(one.boxes) == {"needle-global": 0, "needle-hop": 2, "needle-chain": 3}.get(task, 1)
    for box in one.boxes:
        assert (box.frame, box.view) == ("pixel", "original")
        assert 0 <= box.x1 < box.x2 <= one.image.width
        assert 0 <= box.y1 < box.y2 <= one.image.height
        assert min(box.width, box.height) >= 20


def test_every_kind_of_question_is_asked() -> None:
    asked: set[str] = set()
    for seed in range(24):
        asked |= {sample(task, seed).kind for task in TASK_NAMES}
        if asked == {*QUESTIONS, "chain"}:
            return
    pytest.fail(f"never asked: { {*QUESTIONS, 'chain'} - asked }, of no kind: {asked - {*QUESTIONS, 'chain'}}")


def test_a_coarse_view_is_seven_times_smaller() -> None:
    for columns, rows in GRIDS:
        for cut in (0, 10):
            size = Size(28 * columns - cut, 28 * rows - cut)
            whole = tokens(fit_tokens(size, factor=28, min_tokens=16, max_tokens=576), 28)
            coarse = tokens(fit_tokens(size, factor=28, min_tokens=16, max_tokens=64), 28)
            assert 500 <= whole <= 576
            assert whole >= 7 * coarse


# ---- answers against the drawing -----------------------------------------------------------------------------------


@pytest.fixture(scope="module", params=places, ids="-".join)
def boards(request: pytest.FixtureRequest) -> list[Board]:
    layout, split = request.param
    return [draw_board(layout, seed, split=split) for seed in range(4)]


def test_answers_follow_from_the_drawing(boards: list[Board]) -> None:
    for board in boards:
        assert board.facts
        answers: dict[str, str] = {}
        for fact in board.facts:
            assert answers.setdefault(fact.question, fact.answer) == fact.answer, "one question, two answers"
            assert fact.answer == recomputed(board, fact), fact
            assert fact.coarse_suffices == (fact.task == "needle-global")


def test_plates_are_inside_and_apart(boards: list[Board]) -> None:
    for board in boards:
        assert overlaps(board) == []


def test_staggered_rows_of_unseen_scenes_keep_their_plates_apart() -> None:
    for seed in (3, 20, 157, *range(21, 29)):
        board = draw_board("scene", seed, split="ood")
        assert overlaps(board) == []
        for one, other in combinations(board.things, 2):
            assert not meet(one.box, other.box), (seed, one.name, other.name)


def test_a_coarse_fact_names_what_it_is_about(boards: list[Board]) -> None:
    for board in boards:
        for fact in board.facts:
            names = named(fact)
            if not fact.coarse_suffices:
                assert fact.seen == (), "its boxes say it"
            elif fact.kind == "headline":
                (word,) = fact.seen
                assert read(board, word).lower() == fact.answer
            elif fact.kind == "count":
                assert sorted(fact.seen) == sorted(thing.box for thing in board.things if fits(thing, names[0]))
            else:
                assert fact.seen == (the_one(board, names[0]).box,)


@each_case("typeface", typefaces("train"))
def test_wide_letters_are_printed_apart(typeface: Path) -> None:
    """Tracking is a slot a letter, and a letter that is wider than its slot gets room of its own."""
    paper = Image.new("RGB", (400, 80))
    pen, white = ImageDraw.Draw(paper), (255, 255, 255)
    printed = draw_text(pen, "W1MW", at=(10, 20), typeface=typeface, capital=40, fill=white, advance=24)
    width = printed.box[2] - printed.box[0]
    assert width == pytest.approx(text_width("W1MW", typeface=typeface, capital=40, advance=24))
    ink = [(box[0], box[2]) for box in (font(typeface, 40).getbbox(char) for char in "W1MW")]
    for (one, (left, right)), (two, (start, end)) in pairwise(zip(printed.glyphs, ink, strict=True)):
        assert two.x - one.x >= (right - left + end - start) / 2, f"{one.char} runs into {two.char}"
    columns = np.flatnonzero(np.asarray(paper).max(axis=(0, 2)) > 60)
    assert columns[0] >= printed.box[0] - 1
    assert columns[-1] <= printed.box[2] + 1
    assert text_width("111", typeface=typeface, capital=40, advance=60) == 180, "a narrow letter keeps its slot"


def meet(one: Rect, two: Rect) -> bool:
    """Whether two boxes share a pixel or more."""
    across, down = min(one[2], two[2]) - max(one[0], two[0]), min(one[3], two[3]) - max(one[1], two[1])
    return across >= 1 and down >= 1


def overlaps(board: Board) -> list[tuple[Rect, Rect]]:
    """Pairs of plates that overlap by a pixel or more; fails on one that leaves the board."""
    plates = sorted({box for fact in board.facts if fact.kind != "pips" for box in fact.boxes})
    for x1, y1, x2, y2 in plates:
        assert x1 >= 0
        assert y1 >= 0
        assert x2 <= board.image.width - 1
        assert y2 <= board.image.height - 1
    return [(a, b) for a, b in combinations(plates, 2) if meet(a, b)]


def recomputed(board: Board, fact: Fact) -> str:
    """The answer again, from what was drawn: glyphs inside the needle and the objects of the scene."""
    names = named(fact)
    if fact.kind == "headline":
        tallest = max(glyph.height for glyph in board.glyphs)
        word = "".join(glyph.char for glyph in board.glyphs if glyph.height == tallest)
        assert word in HEADLINES
        return word.lower()
    if fact.kind == "count":
        return str(sum(fits(thing, names[0]) for thing in board.things))
    if fact.kind in ("color", "shape"):
        thing = the_one(board, names[0])
        assert thing.box[2] - thing.box[0] >= 48
        return thing.color if fact.kind == "color" else thing.shape
    printed = [read(board, box) for box in fact.boxes]
    if fact.kind == "pips":
        thing = the_one(board, names[0])
        assert fact.boxes == (thing.die,)
        assert 1 <= thing.pips <= 6
        return str(thing.pips)
    if fact.kind == "receipt":
        assert names[0] in ITEMS
        assert re.fullmatch(r"[1-9]\.\d\d", fact.answer)
        return printed[0]
    assert re.fullmatch(f"[{CODE_CHARS}]{{3}}", fact.answer)
    if fact.kind == "form":
        assert names[0] in FIELDS
    elif fact.kind == "code":
        assert nearest_plate(board, the_one(board, names[0])) == fact.boxes[0]
    elif fact.kind == "relation":
        assert nearest_plate(board, neighbour(board, the_one(board, names[0]), names[1])) == fact.boxes[0]
    elif fact.kind == "table":
        assert re.fullmatch("[A-E][1-4]", names[0])
        assert aligned(board, names[0], fact.boxes[0])
    elif fact.kind == "hop":
        note, cell = fact.boxes
        assert note == nearest_plate(board, the_one(board, names[0]))
        cells = {named(other)[0]: other.boxes for other in board.facts if other.kind == "table"}
        assert cells[printed[0]] == (cell,)
    elif fact.kind == "chain":
        note, first, last = fact.boxes
        assert note == nearest_plate(board, the_one(board, names[0]))
        assert aligned(board, printed[0], first)
        assert aligned(board, printed[1], last)
    return printed[-1]


def named(fact: Fact) -> tuple[str, ...]:
    """What the question is about: the names that were put into its template."""
    for template in CHAIN_QUESTIONS if fact.kind == "chain" else QUESTIONS[fact.kind]:
        pattern = re.escape(template).replace(r"\{0\}", "(.+)").replace(r"\{1\}", "(directly .+)")
        found = re.fullmatch(pattern, fact.question)
        if found:
            groups = found.groups()
            return groups[::-1] if "{1}" in template else groups
    raise AssertionError(f"no template asks: {fact.question}")


def fits(thing: BoardObject, plural: str) -> bool:
    """Whether a thing is one of the "objects", "red objects" or "circles"."""
    singular = "cross" if plural == "crosses" else plural.removesuffix("s")
    return set(singular.split()) - {"object"} <= {thing.shape, thing.color}


def the_one(board: Board, name: str) -> BoardObject:
    """The thing of that name: a question must not fit two."""
    found = [thing for thing in board.things if set(name.split()) <= {thing.shape, thing.color}]
    assert len(found) == 1, name
    assert set(name.split()) <= {*SHAPES, *COLORS}
    return found[0]


def read(board: Board, box: Rect) -> str:
    """The characters printed inside a box, from the left."""
    inside = [glyph for glyph in board.glyphs if box[0] < glyph.x < box[2] and box[1] < glyph.y < box[3]]
    return "".join(glyph.char for glyph in sorted(inside, key=lambda glyph: glyph.x))


def nearest_plate(board: Board, thing: BoardObject) -> Rect:
    """The plate that starts closest below a thing."""
    plates = {fact.boxes[0] for fact in board.facts if fact.kind in ("code", "hop", "chain")}
    middle = (thing.box[0] + thing.box[2]) / 2
    return min(plates, key=lambda plate: abs(plate[1] - thing.box[3]) + abs((plate[0] + plate[2]) / 2 - middle))


def neighbour(board: Board, thing: BoardObject, place: str) -> BoardObject:
    """The closest thing that lies wholly to the right of a thing, or below it, and beside it on the other axis."""
    along, across = (0, 1) if place == "directly right of" else (1, 0)
    beside = [
        other
        for other in board.things
        if other.box[along] + other.box[along + 2] > thing.box[along] + thing.box[along + 2]
        and min(other.box[across + 2], thing.box[across + 2]) > max(other.box[across], thing.box[across])
    ]
    return min(beside, key=lambda other: other.box[along])


def aligned(board: Board, cell: str, plate: Rect) -> bool:
    """Whether the heading closest to the plate's column is the cell's letter, and likewise its row."""
    headings = [glyph for glyph in board.glyphs if glyph.height >= 42]
    x, y = (plate[0] + plate[2]) / 2, (plate[1] + plate[3]) / 2
    letters = [glyph for glyph in headings if glyph.char in "ABCDE" and glyph.height == headings[-1].height]
    numbers = [glyph for glyph in headings if glyph.char in "1234" and glyph.x < 76]
    column = min(letters, key=lambda glyph: abs(glyph.x - x))
    row = min(numbers, key=lambda glyph: abs(glyph.y - y))
    return column.char + row.char == cell


# ---- a user's own typefaces, and mistakes --------------------------------------------------------------------------


def test_a_folder_of_typefaces(tmp_path: Path) -> None:
    faces = {path.name: path for path in typefaces("train")}
    for folder in ("mine", "copy"):
        (tmp_path / folder).mkdir()
        for name in ("DejaVuSans.ttf", "cmss10.ttf"):
            shutil.copy(faces[name], tmp_path / folder)
    (tmp_path / "mine" / "LICENSE.txt").write_text("not a typeface")
    assert [path.name for path in typefaces("test", tmp_path / "mine")] == ["DejaVuSans.ttf", "cmss10.ttf"]
    mine = sample("needle-doc", 5, fonts=tmp_path / "mine")
    assert digest(mine) == digest(sample("needle-doc", 5, fonts=tmp_path / "copy"))
    assert digest(mine) != digest(sample("needle-doc", 5))


def test_a_folder_without_typefaces(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"No typeface found.*\.ttf or \.otf.*Give a folder"):
        sample("needle-doc", 0, fonts=tmp_path)


def test_a_file_that_is_no_typeface(tmp_path: Path) -> None:
    (tmp_path / "broken.ttf").write_bytes(b"not a font")
    with pytest.raises(ConfigError, match=r"Cannot read the typeface .*broken\.ttf"):
        sample("needle-doc", 0, fonts=tmp_path)


def test_unknown_task_and_split() -> None:
    with pytest.raises(ConfigError, match=r"needle-map.*needle-global, needle-scene"):
        sample("needle-map", 0)
    with pytest.raises(ConfigError, match=r"validation.*train, test, ood"):
        sample("needle-doc", 0, split="validation")


def test_the_picture_of_the_documentation_is_drawn() -> None:
    sheet = picture()
    assert sheet.mode == "RGB"
    assert sheet.width > 800
    assert min(len(part.getcolors(maxcolors=10**6) or ()) for part in thirds(sheet)) > 1000


def thirds(sheet: Image.Image) -> list[Image.Image]:
    """The rows of the picture, one a task."""
    step = sheet.height // 3
    return [sheet.crop((0, y, sheet.width, y + step)) for y in (0, step, 2 * step)]


if __name__ == "__main__":
    for task in TASK_NAMES:
        for split in SPLITS:
            for seed in (0, 41):
                print(f"    {(task, split, seed)!r}: {record(task, split, seed)!r},".replace("'", '"'))


def test_a_pair_has_its_question_on_one_of_two_boards() -> None:
    pairs = [pair(seed) for seed in range(12)]
    assert {one.meta["board"] for one in pairs} == {0, 1}
    for seed, one in enumerate(pairs):
        board = int(str(one.meta["board"]))
        asked = sample("needle-doc" if one.kind.startswith("doc") else "needle-scene", seed)
        assert one.images[board].tobytes() == asked.image.tobytes() != one.images[1 - board].tobytes()
        assert (one.question, one.answer) == (asked.question, asked.answer)
        assert {box.view for box in one.boxes} == {original_id(board)}
