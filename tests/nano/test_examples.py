"""What nano is shown: labels that follow from the drawing, views of the promised size, calls that hold their needle."""

from collections.abc import Callable, Iterator
from random import Random

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from PIL import Image

from nano.batches import BUDGETS
from nano.examples import (
    CALL_MARGIN,
    CELL,
    CHARS,
    COARSE_TOKENS,
    CROP_TOKENS,
    DENSE_CLASSES,
    LOCATION_STEP,
    OPEN,
    Frame,
    beside,
    call_for,
    calling,
    dense_labels,
    direct,
    grown,
    looking,
    noting,
    read_from,
    show,
    under,
    zooming,
)
from nano.pages import object_page, plate_page, text_page
from nano.tokenizer import LOCATIONS, build_tokenizer
from nano.trees import Look, Packer, Say, Tree
from qzoom_agent.evaluation.tasks.needle.boards import LAYOUTS, Board, BoardObject, Fact, draw_board
from qzoom_agent.evaluation.tasks.needle.ink import COLORS, SHAPES, Glyph, Rect
from qzoom_agent.geometry import Box
from qzoom_agent.views import View, ViewStore
from tests.cases import each_case

UNKNOWN = -100
few = settings(max_examples=6, deadline=None, derandomize=True, database=None)


def char(text: str) -> int:
    return CHARS.index(text) + 1


def by_hand() -> Board:
    """A board of 4 x 2 tokens: print in the upper row, a blue star with three pips over the right half of the lower."""
    return Board(
        Image.new("RGB", (112, 56), "white"),
        glyphs=[
            Glyph("A", 7, 14, 20),  # left half of token (0, 0)
            Glyph("7", 21, 14, 20),  # right half
            Glyph("M", 36, 4, 20),  # left half of token (0, 1), further from its centre than ...
            Glyph("N", 35, 13, 20),  # ... this one
            Glyph("K", 94, 12, 10),  # too small to read at this scale
            Glyph("X", 500, 14, 20),  # elsewhere
        ],
        things=[BoardObject("star", "blue", (56, 28, 112, 56), 3, (76, 30, 100, 54))],
    )


def labels_of(board: Board, box: Rect, size: tuple[int, int]) -> NDArray[np.int64]:
    return dense_labels(board, box, size).reshape(size[1] // CELL, size[0] // CELL, len(DENSE_CLASSES))


# ---- dense labels --------------------------------------------------------------------------------------------------


def test_labels_of_a_board_made_by_hand() -> None:
    labels = labels_of(by_hand(), (0, 0, 112, 56), (112, 56))
    star, blue = SHAPES.index("star") + 1, COLORS.index("blue") + 1
    assert labels.tolist() == [
        [[char("A"), char("7"), 0, 0, 0, 0], [char("N"), 0, 0, 0, 0, 0], [0] * 6, [UNKNOWN, 0, 0, 0, 0, 0]],
        [[0] * 6, [0] * 6, [0, 0, star, blue, 0, 0], [0, 0, star, blue, 3, 1]],
    ]


def test_half_the_scale_hides_what_is_small() -> None:
    labels = labels_of(by_hand(), (0, 0, 112, 56), (56, 28))
    star, blue = SHAPES.index("star") + 1, COLORS.index("blue") + 1
    # "A" and "7" now share a half-token, and neither can be read; nor can the pips, but the star is still a star.
    assert labels.tolist() == [[[UNKNOWN, UNKNOWN, 0, 0, 0, 0], [0, UNKNOWN, star, blue, UNKNOWN, 1]]]


def test_a_crop_has_labels_of_its_own() -> None:
    labels = labels_of(by_hand(), (84, 0, 112, 28), (56, 56))
    # "K" is large enough at twice the scale, and nothing else is inside.
    assert labels[0, 0].tolist() == [0, char("K"), 0, 0, 0, 0]
    assert np.count_nonzero(labels) == 1


@pytest.mark.parametrize("layout", LAYOUTS)
def test_labels_of_a_whole_board_at_its_own_scale(layout: str) -> None:
    board = draw_board(layout, 3)
    frame = show(board, None, tokens=(500, 576))
    assert frame.look.dense is not None
    labels = frame.look.dense
    assert labels.shape == (np.prod(frame.look.grid), len(DENSE_CLASSES))
    for slot, classes in enumerate(DENSE_CLASSES):
        assert set(labels[:, slot].tolist()) <= {UNKNOWN, *range(classes)}
    shown = {char(glyph.char) for glyph in board.glyphs}
    assert set(labels[:, :2].ravel().tolist()) <= shown | {0, UNKNOWN}
    # Hardly a character is hidden by another one in the same half of a token.
    assert (labels[:, :2] > 0).sum() > 0.85 * len(board.glyphs)
    assert len(set(labels[:, 2]) - {0}) == len({thing.shape for thing in board.things})
    assert len(set(labels[:, 3]) - {0}) == len({thing.color for thing in board.things})
    assert (labels[:, 4] > 0).sum() == sum(thing.die is not None for thing in board.things)


def test_fine_print_is_unknown_in_a_coarse_view() -> None:
    board = draw_board("table", 1)
    frame = show(board, None, tokens=(16, COARSE_TOKENS))
    assert frame.look.dense is not None
    named = set(frame.look.dense[:, :2].ravel().tolist()) - {0, UNKNOWN}
    large = {char(glyph.char) for glyph in board.glyphs if glyph.height >= 40}
    assert UNKNOWN in frame.look.dense[:, :2]
    assert named <= large


def page_of(tree: Tree) -> tuple[Look, list[tuple[str, str, Say]]]:
    """The image of a page, and question, answer and what is learned of each branch."""
    opened, look = tree.prefix
    assert isinstance(opened, Say)
    assert isinstance(look, Look)
    assert look.grid == (8, 8)
    asked = []
    for branch in tree.branches:
        *questions, answer = branch
        assert isinstance(answer, Say)
        assert answer.focus or answer.tally
        question = "".join(piece.text for piece in questions if isinstance(piece, Say))
        asked.append((question.split("<")[0], answer.text.removesuffix("<|im_end|>"), answer))
    assert len({question for question, _, _ in asked}) == len(asked) == len(tree.names)
    return look, asked


@pytest.mark.parametrize("draw", [text_page, plate_page])
def test_pages_are_full_of_print(draw: Callable[[Random], Tree]) -> None:
    """Each is read line by line, or all at once; every character has its place, a space has none."""
    tokenizer, rng, forms = build_tokenizer(), Random(0), set()
    for _ in range(8):
        tree = draw(rng)
        look, asked = page_of(tree)
        forms |= set(tree.names)
        assert look.dense is not None
        assert look.dense.shape == (64, len(DENSE_CLASSES))
        assert (look.dense[:, :2] > 0).sum() > 5
        assert not look.dense[:, 2:].any()
        whole = tree.names == ["direct page"]
        lines = ["read the page."] if whole else [f"read line {line + 1}." for line in range(len(asked))]
        assert [question for question, _, _ in asked] == lines
        below = -1
        for _, answer, said in asked:
            assert set(answer) <= {*CHARS, " "}
            assert len(said.focus) == len(answer) == len(tokenizer.encode(answer))
            assert [not cells for _, cells in said.focus] == [character == " " for character in answer]
            places = [list(cells) for _, cells in said.focus]
            for word in words(answer, places):
                assert [min(cells) % 8 for cells in word] == sorted(min(cells) % 8 for cells in word)
                row = min(cells[0] // 8 for cells in word)
                assert row >= below
                below = row
    assert forms == {"direct line", "direct page"}


def words(answer: str, places: list[list[int]]) -> list[list[list[int]]]:
    """The places of each word."""
    ends = [at for at, character in enumerate(answer) if character == " "]
    return [places[start:end] for start, end in zip([0, *(at + 1 for at in ends)], [*ends, None], strict=True)]


@pytest.mark.parametrize("draw", [text_page, plate_page])
def test_labels_of_a_page_spell_its_lines(draw: Callable[[Random], Tree]) -> None:
    """Where one character fills a half-token, the dense label under a focus is that character."""
    rng, told, right = Random(1), 0, 0
    for _ in range(5):
        look, asked = page_of(draw(rng))
        assert look.dense is not None
        for _, answer, said in asked:
            for character, (_, cells) in zip(answer, said.focus, strict=True):
                labels = set(look.dense[list(cells), :2].ravel().tolist())
                if labels - {0, UNKNOWN}:
                    told += 1
                    right += char(character) in labels
    assert told > 60
    assert right > 0.9 * told


def test_plates_are_magnified_as_the_crops_of_boards_are() -> None:
    """From a whole board's print to that of nano's own crops; several lines each, and prices among the codes."""
    rng = Random(2)
    scales, answers = [], []
    for _ in range(40):
        tree = plate_page(rng)
        _, asked = page_of(tree)
        answers += [word for _, answer, _ in asked for word in answer.split()]
        look = tree.prefix[1]
        assert isinstance(look, Look) and look.dense is not None
        height = (look.dense[:, :2] > 0).any(1).reshape(8, 8).any(1).sum()
        scales.append(int(height))
    assert min(scales) >= 2 and max(scales) >= 5, "rows with print: few when magnified, many when not"
    prices = [word for word in answers if "." in word]
    assert 0.1 < len(prices) / len(answers) < 0.35
    assert {len(word) for word in answers if "." not in word} >= {3, 4, 5, 6}


def test_pages_of_objects_are_named_and_counted() -> None:
    rng = Random(0)
    dice: set[int] = set()
    for _ in range(12):
        tree = object_page(rng)
        look, asked = page_of(tree)
        assert look.dense is not None
        kinds = [name.removeprefix("direct ") for name in tree.names]
        dice.add(kinds.count("pips"))
        assert set(kinds) <= {"pips", "color", "shape", "count"}
        assert (look.dense[:, 4] > 0).sum() >= kinds.count("pips")
        for kind, (_, answer, said) in zip(kinds, asked, strict=True):
            if kind == "count":
                assert said.tally is not None and len(said.tally[1]) == int(answer)
                continue
            slot, words = {"pips": (4, "123456"), "color": (3, COLORS), "shape": (2, SHAPES)}[kind]
            value = words.index(answer) + 1
            ((_, cells),) = said.focus
            assert value in look.dense[list(cells), slot]
    assert dice == {4, 9, 0}, "large objects carry dice, those as small as on a coarse view none"


# ---- views and calls -----------------------------------------------------------------------------------------------


@each_case("layout", LAYOUTS)
@each_case("budget", BUDGETS)
def test_a_whole_board_meets_its_budget(layout: str, budget: int) -> None:
    board = draw_board(layout, 0)
    frame = show(board, None, tokens=(16, budget), dense=False)
    rows, columns = frame.look.grid
    assert frame.look.dense is None
    assert frame.look.image.size == (columns * CELL, rows * CELL)
    assert 0.7 * min(budget, 500) <= rows * columns <= budget
    assert frame.box == (0, 0, *board.image.size)
    assert frame.scale == pytest.approx((columns * CELL / board.image.width, rows * CELL / board.image.height))


@few
@given(st.sampled_from(LAYOUTS), st.integers(0, 10**6))
def test_a_call_is_inside_the_view_and_holds_its_needle(layout: str, seed: int) -> None:
    board = draw_board(layout, seed)
    frame = show(board, None, tokens=(16, COARSE_TOKENS))
    width, height = frame.look.image.size
    for needle in {box for fact in board.facts for box in fact.boxes}:
        call, asked = call_for(frame, needle)
        assert call.startswith("<zoom><loc_")
        assert call.endswith("></zoom>")
        places = call.removeprefix("<zoom>").removesuffix("</zoom>").replace("><", "> <").split()
        assert set(places) <= set(LOCATIONS)
        x1, y1, x2, y2 = (int(place[5:-1]) for place in places)
        assert 0 <= x1 < x2 <= width
        assert 0 <= y1 < y2 <= height
        assert asked == pytest.approx(
            [value / scale for value, scale in zip((x1, y1, x2, y2), frame.scale * 2, strict=True)]
        )
        # Rounded outward from the needle with its margin, by less than a step on each side.
        wanted = Box(*grown(needle, board, margin=CALL_MARGIN[0], least=CALL_MARGIN[1]))
        assert Box(*asked).coverage(wanted) == pytest.approx(1.0)
        assert Box(*asked).coverage(Box(*needle)) == pytest.approx(1.0)
        assert Box(*asked).width - wanted.width < 2 * LOCATION_STEP / frame.scale[0]
        assert Box(*asked).height - wanted.height < 2 * LOCATION_STEP / frame.scale[1]


def test_a_call_is_magnified() -> None:
    board = draw_board("scene", 0)
    frame = show(board, None, tokens=(16, COARSE_TOKENS))
    for fact in board.facts:
        for needle in fact.boxes:
            crop = show(board, call_for(frame, needle)[1], tokens=CROP_TOKENS)
            assert CROP_TOKENS[0] <= np.prod(crop.look.grid) <= CROP_TOKENS[1]
            assert min(crop.scale) > 1.2
            assert min(crop.scale) > 3.5 * max(frame.scale)


def test_a_grown_box_stays_on_the_board() -> None:
    board = Board(Image.new("RGB", (100, 80)))
    assert grown((40, 30, 60, 40), board, margin=0.5) == (30, 20, 70, 50)
    assert grown((40, 30, 60, 40), board, margin=0.1, least=5) == (35, 25, 65, 45)
    assert grown((2, 3, 96, 78), board, margin=0.5) == (0, 0, 100, 80)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_crop_is_of_the_view_stores_pixels(layout: str) -> None:
    for frame, view, image in crops_twice(layout):
        assert view.box == frame.box == tuple(round(value) for value in frame.box)
        assert (view.height // CELL, view.width // CELL) == frame.look.grid
        apart = np.abs(np.asarray(image, dtype=int) - np.asarray(frame.look.image, dtype=int))
        assert apart.mean() < 1.0


def test_a_crop_is_the_view_stores_pixel_for_pixel() -> None:
    for layout in LAYOUTS:
        for frame, _, image in crops_twice(layout):
            assert np.array_equal(np.asarray(image), np.asarray(frame.look.image))


def crops_twice(layout: str) -> Iterator[tuple[Frame, View, Image.Image]]:
    """Loose crops of a board's needles as training and as the agent's store cut them."""
    rng, board = Random(7), draw_board(layout, 3)
    store = ViewStore()
    store.add_original(board.image)
    store.add_coarse(factor=CELL, min_tokens=16, max_tokens=COARSE_TOKENS)
    for fact in [fact for fact in board.facts if fact.boxes][:4]:
        near = grown(fact.boxes[0], board, margin=rng.uniform(0.2, 0.9), least=rng.uniform(4.0, 40.0))
        asked = (near[0] + 0.3, near[1], near[2], near[3] - 0.7)
        view = store.add_crop(Box(*asked), factor=CELL, min_tokens=CROP_TOKENS[0], max_tokens=CROP_TOKENS[1])
        yield show(board, asked, tokens=CROP_TOKENS), view, store.image(view.id)


# ---- where an answer is read ---------------------------------------------------------------------------------------


def test_tokens_under_a_box_made_by_hand() -> None:
    frame = show(by_hand(), None, tokens=(1, 8), dense=False)
    assert frame.look.grid == (2, 4)
    assert under(frame, [(56, 28, 112, 56)]) == [6, 7]
    assert under(frame, [(0, 0, 69, 28)]) == [0, 1], "under half of the third token is covered"
    assert under(frame, [(0, 0, 71, 28)]) == [0, 1, 2]
    assert under(frame, [(24, 24, 34, 34)]) == [5], "a small box at a corner is where a quarter of it is"
    assert under(frame, [(0, 0, 28, 28), (84, 28, 112, 56)]) == [0, 7]
    assert under(frame, [(500, 0, 528, 28)]) == []
    crop = show(by_hand(), (56, 28, 112, 56), tokens=(8, 8), dense=False)
    assert crop.look.grid == (2, 4)
    assert under(crop, [(56, 28, 112, 56)]) == list(range(8))
    assert under(crop, [(84, 42, 98, 56)]) == [6]


@each_case("split", ["train", "ood"])
@each_case("layout", LAYOUTS)
def test_every_character_is_read_where_it_is_printed(layout: str, split: str) -> None:
    board = draw_board(layout, 2, split=split)
    coarse, whole = (show(board, None, tokens=(16, budget), dense=False) for budget in (COARSE_TOKENS, 576))
    for fact in board.facts:
        if not fact.boxes:
            ((look, cells),) = read_from(coarse, fact)
            assert look is coarse.look
            assert cells and set(cells) <= set(under(coarse, fact.seen))
            if fact.kind == "count":  # one token for each, two where the middle lies between them
                assert len(fact.seen) <= len(cells) <= 2 * len(fact.seen)
            else:
                assert cells == under(coarse, fact.seen)
            continue
        crop = show(board, grown(fact.boxes[-1], board, margin=0.5, least=10), tokens=CROP_TOKENS, dense=False)
        for frame in (coarse, whole, crop):
            found = read_from(frame, fact)
            assert all(look is frame.look for look, _ in found)
            for (_, cells), point in zip(found, printed(board, fact), strict=True):
                assert cell_of(frame, point) in cells
                # A character is small: never more of the whole board than two tokens.
                assert fact.kind == "pips" or frame is crop or len(cells) <= 2


def printed(board: Board, fact: Fact) -> list[tuple[float, float]]:
    """The middle of every character of the answer, or of the die."""
    x1, y1, x2, y2 = fact.boxes[-1]
    if fact.kind == "pips":
        return [((x1 + x2) / 2, (y1 + y2) / 2)]
    inside = sorted((glyph.x, glyph.y) for glyph in board.glyphs if x1 < glyph.x < x2 and y1 < glyph.y < y2)
    assert len(inside) == len(fact.answer)
    return inside


def cell_of(frame: Frame, point: tuple[float, float]) -> int:
    """The visual token that shows this point of the board."""
    column, row = (
        int((value - start) * scale // CELL)
        for value, start, scale in zip(point, frame.box[:2], frame.scale, strict=True)
    )
    return row * frame.look.grid[1] + column


def test_calls_are_led_to_their_needle_and_answers_to_the_last_crop() -> None:
    board = draw_board("hop", 4)
    frame = show(board, None, tokens=(16, COARSE_TOKENS))
    fact = next(fact for fact in board.facts if fact.kind == "hop")
    said = [piece for piece in zooming(frame, fact) if isinstance(piece, Say) and piece.learn]
    crops = [piece for piece in zooming(frame, fact) if isinstance(piece, Look)]
    for piece, needle in zip(said[:2], fact.boxes, strict=True):
        assert "<zoom>" in piece.text
        assert list(piece.focus) == [(frame.look, under(frame, [needle]))] * 5, "the tag and four edges"
        middle = ((needle[0] + needle[2]) / 2, (needle[1] + needle[3]) / 2)
        assert cell_of(frame, middle) in piece.focus[0][1]
    assert len(crops) == 2
    assert [look.image.tobytes() for look, _ in said[2].focus] == [crops[1].image.tobytes()] * len(fact.answer)
    assert calling(frame, fact)[-1] == said[0]
    views = [show(board, grown(box, board, margin=0.3), tokens=CROP_TOKENS) for box in fact.boxes]
    shown, answer = beside(fact, views)[:2], beside(fact, views)[-1]
    assert shown == [view.look for view in views]
    assert isinstance(answer, Say)
    assert all(look is views[1].look for look, _ in answer.focus)


def test_focus_pairs_point_from_the_token_before_to_the_tokens_under_the_print() -> None:
    """Through the packer: two trees, a branch with a crop of its own, and places read off the batch's positions."""
    tokenizer = build_tokenizer()
    packer = Packer(tokenizer)
    board, other = draw_board("hop", 4), draw_board("receipt", 2)
    whole, second = show(board, None, tokens=(16, 576)), show(other, None, tokens=(16, 400))
    facts = [fact for fact in board.facts if fact.kind == "table"][:2]
    hop = next(fact for fact in board.facts if fact.kind == "hop")
    crop = show(board, grown(hop.boxes[1], board, margin=0.5, least=10), tokens=CROP_TOKENS)
    price = next(fact for fact in other.facts if fact.kind == "receipt")
    trees = [
        Tree([whole.look], [direct(whole, facts[0]), beside(hop, [crop]), direct(whole, facts[1])]),
        Tree([second.look], [direct(second, price)]),
    ]
    read = [(board, whole, facts[0]), (board, crop, hop), (board, whole, facts[1]), (other, second, price)]
    batch = packer.batch(trees)
    asking, seen = batch["focus"]
    assert (batch["ids"][seen] == packer.pad).all()
    assert torch.equal(batch["tree"][asking], batch["tree"][seen])
    assert ((batch["branch"][seen] == -1) | (batch["branch"][seen] == batch["branch"][asking])).all()
    assert batch["tree"].tolist() == sorted(batch["tree"].tolist())
    # Which image a visual token is of, and where in it: the row and column axes count from its first token.
    image = torch.cumsum(batch["ids"] == packer.start, 0)
    for number, (drawn, frame, fact) in enumerate(read):
        learned = torch.nonzero((batch["branch"] == number) & (batch["labels"] != -100))[:, 0]
        for at, char_, point in zip(learned[:-1].tolist(), fact.answer, printed(drawn, fact), strict=True):
            assert tokenizer.decode([batch["labels"][at]]) == char_
            looked = seen[asking == at - 1]
            assert len(looked) > 0
            first = int(torch.nonzero(image == image[looked[0]])[1])
            rows, columns = (batch["positions"][axis, looked] - batch["positions"][axis, first] for axis in (1, 2))
            assert cell_of(frame, point) in (rows * frame.look.grid[1] + columns).tolist()
        assert not (asking == int(learned[-1]) - 1).any(), "the end is not read anywhere"


def test_the_print_of_a_note_names_the_place_and_the_next_call_looks_at_the_print() -> None:
    packer = Packer(build_tokenizer())
    board = draw_board("hop", 4)
    frame = show(board, None, tokens=(16, COARSE_TOKENS))
    fact = next(fact for fact in board.facts if fact.kind == "hop")
    note = noting(show(board, grown(fact.boxes[0], board, margin=0.4), tokens=CROP_TOKENS), fact, frame)
    for branch, calls in ((zooming(frame, fact), 2), (zooming(frame, fact, shown=[note]), 1)):
        (crop,) = [piece for piece in branch if isinstance(piece, Look) and piece.note is not None]
        batch = packer.batch([Tree([Say(OPEN), frame.look], [branch])])
        coarse, shown = (torch.nonzero(batch["ids"] == packer.start)[at, 0] + 1 for at in (0, 1))
        assert crop.note is not None
        words = [int(shown) + token for token in crop.note[0]]
        assert len(words) >= 1
        naming, place = batch["ground"]
        for word in words:
            assert (place[naming == word] - coarse).tolist() == under(frame, fact.boxes[1:])
        asking, named = batch["point"]
        told = asking[torch.isin(named, torch.tensor(words))].unique()
        said = torch.nonzero(batch["labels"] != -100)[:, 0]
        starts = [int(at) for at in said if int(at) - 1 not in set(said.tolist())]
        last = starts[calls - 1]  # the call for the code, and not the one for the note
        assert told.tolist() == list(range(last - 1, last - 1 + len(told)))
        assert len(told) == 7, "<zoom>, four edges, </zoom> and the end"


def test_a_question_that_is_only_looked_up_says_nothing_and_looks_once() -> None:
    packer = Packer(build_tokenizer())
    board = draw_board("hop", 4)
    frame = show(board, None, tokens=(16, COARSE_TOKENS))
    fact = next(fact for fact in board.facts if fact.kind == "hop")
    batch = packer.batch([Tree([Say(OPEN), frame.look], [looking(frame, fact)])])
    assert bool((batch["labels"] == -100).all())
    last = len(batch["ids"]) - 2  # the last token of the question, before the end that is never said
    assert set(batch["focus"][0].tolist()) == set(batch["aim"][0].tolist()) == set(batch["point"][0].tolist()) == {last}
    first = int(torch.nonzero(batch["ids"] == packer.start)[0, 0]) + 1
    assert (batch["focus"][1] - first).tolist() == under(frame, fact.boxes[:1])
