"""A question's naming word is found where it stands, and grounded on the very thing that it names."""

import pytest

from qzoom_agent.evals.suites.needle.boards import LAYOUTS, QUESTIONS, draw_board
from qzoom_agent.rl.nano.examples import COARSE_TOKENS, asked, show, under
from qzoom_agent.rl.nano.referents import referent
from qzoom_agent.rl.nano.tokenizer import build_tokenizer
from qzoom_agent.rl.nano.trees import Say

BOARDS = [draw_board(layout, seed) for layout in LAYOUTS for seed in range(4)]
FACTS = [(board, fact) for board in BOARDS for fact in board.facts]


def test_every_kind_of_question_but_headlines_names_something() -> None:
    kinds = {fact.kind for _, fact in FACTS}
    assert kinds == set(QUESTIONS)
    assert {fact.kind for board, fact in FACTS if referent(board, fact) is None} == {"headline"}


def test_things_are_grounded_on_their_own_box() -> None:
    for board, fact in FACTS:
        if fact.kind in ("code", "pips", "hop", "relation"):
            found = referent(board, fact)
            assert found is not None
            end, rects = found
            (thing,) = [thing for thing in board.things if fact.question[:end].endswith(thing.name)]
            assert rects == [thing.box]


@pytest.mark.parametrize("kind", ["form", "receipt", "table"])
def test_lines_and_cells_are_grounded_on_their_needle(kind: str) -> None:
    chosen = [(board, fact) for board, fact in FACTS if fact.kind == kind]
    for board, fact in chosen:
        found = referent(board, fact)
        assert found is not None
        assert found[1] == list(fact.boxes)
        assert fact.question[: found[0]].split()[-1] in fact.question
    assert len(chosen) >= 10


def test_attributes_and_counts_are_grounded_on_what_they_are_about() -> None:
    for board, fact in FACTS:
        if fact.kind in ("color", "shape", "count"):
            found = referent(board, fact)
            assert found is not None
            assert found[1] == list(fact.seen)
            assert fact.question[: found[0]].split()[-1] not in ("color", "shape", "number")


def test_splitting_a_question_does_not_change_its_tokens() -> None:
    tokenizer = build_tokenizer()
    for board in BOARDS[::4]:
        frame = show(board, None, tokens=(16, COARSE_TOKENS))
        for fact in board.facts:
            pieces = [piece for piece in asked(frame, fact, " You may zoom.") if isinstance(piece, Say)]
            ids = [token for piece in pieces for token in tokenizer.encode(piece.text)]
            assert ids == tokenizer.encode(f"{fact.question} You may zoom.")
            named = referent(board, fact)
            if named is not None:
                assert [cells for _, cells in pieces[1].focus] == [under(frame, named[1])]
