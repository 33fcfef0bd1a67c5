"""What nano is shown: labels that follow from the drawing, views of the promised size, calls that hold their needle."""

from itertools import pairwise
from random import Random

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from PIL import Image

from qzoom_agent.evals.suites.needle.boards import LAYOUTS, Board, Thing, draw_board
from qzoom_agent.evals.suites.needle.ink import COLORS, SHAPES, Glyph, Rect
from qzoom_agent.geometry import Box
from qzoom_agent.rl.nano.batches import BUDGETS, KINDS, VALIDATION_SEED, single, table, trees_of
from qzoom_agent.rl.nano.examples import (
    CALL_MARGIN,
    CELL,
    CHARS,
    COARSE_TOKENS,
    CROP_TOKENS,
    DENSE_CLASSES,
    LAYOUT_SHARES,
    LOCATION_STEP,
    call_for,
    coarse_tree,
    crop_tree,
    dense_labels,
    grown,
    show,
    text_page,
    training_board,
    whole_tree,
)
from qzoom_agent.rl.nano.tokenizer import LOCATIONS, build_tokenizer
from qzoom_agent.rl.nano.trees import Look, Packer, Say, Tree

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
        things=[Thing("star", "blue", (56, 28, 112, 56), 3, (76, 30, 100, 54))],
    )


def labels_of(board: Board, box: Rect, size: tuple[int, int]) -> NDArray[np.int64]:
    return dense_labels(board, box, size).reshape(size[1] // CELL, size[0] // CELL, len(DENSE_CLASSES))


# ---- dense labels --------------------------------------------------------------------------------------------------


def test_labels_of_a_board_made_by_hand() -> None:
    labels = labels_of(by_hand(), (0, 0, 112, 56), (112, 56))
    star, blue = SHAPES.index("star") + 1, COLORS.index("blue") + 1
    assert labels.tolist() == [
        [[char("A"), char("7"), 0, 0, 0], [char("N"), 0, 0, 0, 0], [0, 0, 0, 0, 0], [UNKNOWN, 0, 0, 0, 0]],
        [[0, 0, 0, 0, 0], [0, 0, 0, 0, 0], [0, 0, star, blue, 0], [0, 0, star, blue, 3]],
    ]


def test_half_the_scale_hides_what_is_small() -> None:
    labels = labels_of(by_hand(), (0, 0, 112, 56), (56, 28))
    star, blue = SHAPES.index("star") + 1, COLORS.index("blue") + 1
    # "A" and "7" now share a half-token, and neither can be read; nor can the pips, but the star is still a star.
    assert labels.tolist() == [[[UNKNOWN, UNKNOWN, 0, 0, 0], [0, UNKNOWN, star, blue, UNKNOWN]]]


def test_a_crop_has_labels_of_its_own() -> None:
    labels = labels_of(by_hand(), (84, 0, 112, 28), (56, 56))
    # "K" is large enough at twice the scale, and nothing else is inside.
    assert labels[0, 0].tolist() == [0, char("K"), 0, 0, 0]
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


def test_pages_are_full_of_print() -> None:
    rng = Random(0)
    for _ in range(5):
        look = text_page(rng)
        assert look.grid == (8, 8)
        assert look.dense is not None
        assert look.dense.shape == (64, len(DENSE_CLASSES))
        assert (look.dense[:, :2] > 0).sum() > 5
        assert not look.dense[:, 2:].any()


# ---- views and calls -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("budget", BUDGETS)
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


# ---- trees and batches ---------------------------------------------------------------------------------------------


def pieces(tree: Tree) -> list[object]:
    return [piece for part in (tree.prefix, *tree.branches) for piece in part]


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_coarse_tree_has_every_role(layout: str) -> None:
    board = draw_board(layout, 1)
    trees = [coarse_tree(Random(seed), board) for seed in range(6)]
    roles = {name.split()[0] for tree in trees for name in tree.names}
    assert roles == {"direct", "zoom", "beside"}
    for tree in trees:
        assert len(tree.names) == len(tree.branches)
        for name, branch in zip(tree.names, tree.branches, strict=True):
            looks = sum(isinstance(piece, Look) for piece in branch)
            calls = [piece for piece in branch if isinstance(piece, Say) and piece.learn and "<zoom>" in piece.text]
            role, kind = name.split()
            needles = {"hop": 2, "headline": 0, "count": 0, "color": 0, "shape": 0}.get(kind, 1)
            assert looks == (0 if role == "direct" else needles)
            assert len(calls) == (needles if role == "zoom" else 0)
            assert isinstance(branch[0], Look if role == "beside" else Say)
            said = [piece for piece in branch if isinstance(piece, Say)]
            assert all(piece.text.endswith("<|im_end|>") for piece in said if piece.learn)
            assert said[-1].learn
            assert ("You may zoom." in said[0].text) == (role == "zoom")
            assert not any(one.learn and two.learn for one, two in pairwise(said))


def test_a_crop_tree_asks_what_its_crop_shows() -> None:
    for seed in range(6):
        board = training_board(Random(seed), seed)
        tree = crop_tree(Random(seed), board)
        assert tree.branches
        answers = {fact.answer for fact in board.facts}
        for branch in tree.branches:
            assert all(isinstance(piece, Say) for piece in branch)
            last = branch[-1]
            assert isinstance(last, Say)
            assert last.text.removesuffix("<|im_end|>") in answers


def test_a_whole_tree_has_distinct_questions_of_every_kind() -> None:
    board = draw_board("scene", 2)
    tree = whole_tree(Random(0), board, tokens=144, questions=7)
    assert {name.removeprefix("direct ") for name in tree.names} == {fact.kind for fact in board.facts}
    assert len({branch[0].text for branch in tree.branches if isinstance(branch[0], Say)}) == len(tree.branches)


@pytest.mark.parametrize("kind", KINDS)
def test_a_batch_is_drawn_again_from_its_row(kind: str) -> None:
    first, again, other = trees_of(kind, 5), trees_of(kind, 5), trees_of(kind, 6)
    assert [text(tree) for tree in first] == [text(tree) for tree in again]
    assert picture(first) == picture(again) != picture(other)
    assert all(look.dense is not None for tree in first for look in pieces(tree) if isinstance(look, Look))
    if kind != "pages":
        assert all(tree.branches and len(tree.names) == len(tree.branches) for tree in first)


def text(tree: Tree) -> list[object]:
    return [piece for piece in pieces(tree) if isinstance(piece, Say)]


def picture(trees: list[Tree]) -> list[bytes]:
    return [piece.image.tobytes() for tree in trees for piece in pieces(tree) if isinstance(piece, Look)]


def test_an_unknown_kind_of_batch() -> None:
    with pytest.raises(ValueError, match=r"pictures.*pages, crops"):
        trees_of("pictures", 0)


def test_a_table_names_its_batches_and_draws_them_when_read() -> None:
    tokenizer = build_tokenizer()
    drawn = table({"crops": 0.5, "pages": 0.5}, steps=40, seed=3, tokenizer=tokenizer)
    rows = drawn.with_format(None)
    assert rows["seed"][:3] == [3_000_000, 3_000_001, 3_000_002]
    assert set(rows["kind"]) == {"crops", "pages"}
    assert max(rows["seed"]) < VALIDATION_SEED
    at = list(rows["kind"]).index("crops")
    batch, wanted = single([drawn[at]]), Packer(tokenizer).batch(trees_of("crops", 3_000_000 + at))
    assert batch["ids"].tolist() == wanted["ids"].tolist()
    assert np.array_equal(batch["pixels"], wanted["pixels"])
    same = table({"crops": 0.5, "pages": 0.5}, steps=40, seed=3, tokenizer=tokenizer).with_format(None)
    assert list(same["kind"]) == list(rows["kind"])


def test_every_layout_is_trained_on() -> None:
    assert set(LAYOUT_SHARES) == set(LAYOUTS)
    assert sum(LAYOUT_SHARES.values()) == pytest.approx(1.0)
