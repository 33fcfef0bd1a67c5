"""A question's naming words are found where they stand, and grounded on the very things that they name."""

import pytest

from nano.examples import COARSE_TOKENS, asked, show, under
from nano.referents import ink, referents
from nano.tokenizer import build_tokenizer
from nano.trees import Say
from qzoom_agent.evaluation.tasks.needle.boards import LAYOUTS, QUESTIONS, Board, Fact, draw_board

Facts = list[tuple[Board, Fact]]


@pytest.fixture(scope="module")
def facts() -> Facts:
    """The facts of a few boards of every layout, each with its board."""
    boards = [draw_board(layout, seed) for layout in LAYOUTS for seed in range(4)]
    return [(board, fact) for board in boards for fact in board.facts]


def test_every_kind_of_question_but_headlines_names_something(facts: Facts) -> None:
    kinds = {fact.kind for _, fact in facts}
    assert kinds == set(QUESTIONS)
    assert {fact.kind for board, fact in facts if not referents(board, fact)} == {"headline"}


def test_things_are_grounded_on_their_own_box(facts: Facts) -> None:
    for board, fact in facts:
        if fact.kind in ("code", "pips", "hop", "relation"):
            (middle, alike), (end, rects) = referents(board, fact)
            (thing,) = [thing for thing in board.things if fact.question[:end].endswith(thing.name)]
            assert rects == [thing.box]
            assert fact.question[:middle].endswith(thing.color)
            assert alike == [other.box for other in board.things if other.color == thing.color]


@pytest.mark.parametrize("kind", ["form", "receipt", "table"])
def test_lines_and_cells_are_grounded_on_their_needle_and_the_label_beside_it(kind: str, facts: Facts) -> None:
    chosen = [(board, fact) for board, fact in facts if fact.kind == kind]
    for board, fact in chosen:
        ((end, rects),) = referents(board, fact)
        word, plate = fact.question[:end].split()[-1], fact.boxes[0]
        assert rects[0] == plate
        letters = [glyph.char for glyph in board.glyphs if ink(glyph) in rects[1:]]
        assert "".join(letters) == ("" if kind == "table" else word.upper())
    assert len(chosen) >= 10


def test_attributes_and_counts_are_grounded_on_what_they_are_about(facts: Facts) -> None:
    for board, fact in facts:
        if fact.kind in ("color", "shape", "count"):
            ((end, rects),) = referents(board, fact)
            assert rects == list(fact.seen)
            assert fact.question[:end].split()[-1] not in ("color", "shape", "number")


def test_splitting_a_question_does_not_change_its_tokens() -> None:
    tokenizer = build_tokenizer()
    for layout in LAYOUTS:
        board = draw_board(layout, 0)
        frame = show(board, None, tokens=(16, COARSE_TOKENS))
        for fact in board.facts:
            pieces = [piece for piece in asked(frame, fact, " You may zoom.") if isinstance(piece, Say)]
            ids = [token for piece in pieces for token in tokenizer.encode(piece.text)]
            assert ids == tokenizer.encode(f"{fact.question} You may zoom.")
            told = [cells for piece in pieces for _, cells in piece.focus]
            assert told == [under(frame, rects) for _, rects in referents(board, fact)]
