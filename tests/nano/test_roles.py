"""Trees and batches of nano's training: every role is there, and a row draws the same batch again."""

import pickle
from functools import cache
from itertools import pairwise
from random import Random

import numpy as np
import pytest

from nano.batches import KINDS, VALIDATION_SEED, Draw, single, table, trees_of
from nano.examples import (
    LAYOUT_SHARES,
    NOTES,
    PROPOSED_GROWTH,
    PROPOSED_SIDES,
    PROPOSED_TOKENS,
    coarse_tree,
    counts,
    crop_tree,
    proposed,
    training_board,
    training_boards,
    whole_tree,
)
from nano.several import pair_tree, paired_boards, steps_tree
from nano.tokenizer import build_tokenizer
from nano.trees import Look, Packer, Say, Tree
from qzoom_agent.evaluation.tasks.needle.boards import LAYOUTS, Board, draw_board
from qzoom_agent.evaluation.tasks.needle.ink import COLORS, SHAPES
from qzoom_agent.geometry import Box


@cache
def board_of(layout: str, seed: int, notes: int = 0) -> Board:
    return draw_board(layout, seed, notes=notes)


@cache
def tree_of(layout: str, seed: int) -> Tree:
    return coarse_tree(Random(seed), board_of(layout, seed))


def pieces(tree: Tree) -> list[object]:
    return [piece for part in (tree.prefix, *tree.branches) for piece in part]


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_coarse_tree_has_every_role(layout: str) -> None:
    board = board_of(layout, 1)
    trees = [coarse_tree(Random(seed), board) for seed in range(16)]
    roles = {name.split()[0] for tree in trees for name in tree.names}
    assert roles - {"stray", "lost"} == {
        "direct",
        "zoom",
        "beside",
        "call",
        "look",
        "refused",
        "vain",
        *({"noted", "follow", "steps", "slip"} if layout == "hop" else ()),
    }
    for tree in trees:
        assert len(tree.names) == len(tree.branches)
        for name, branch in zip(tree.names, tree.branches, strict=True):
            looks = sum(isinstance(piece, Look) for piece in branch)
            calls = [piece for piece in branch if isinstance(piece, Say) and piece.learn and "<zoom>" in piece.text]
            role, kind = name.split()
            if role in ("refused", "vain"):
                continue  # have tests of their own
            needles = {"hop": 2, "headline": 0, "count": 0, "color": 0, "shape": 0}.get(kind, 1)
            shown = {"direct": 0, "call": 0, "look": 0, "stray": 1, "lost": 1, "follow": 1, "slip": 1, "steps": 1}
            assert looks == shown.get(role, needles)
            asks = {"zoom": needles, "call": 1, "lost": 1, "noted": 1, "follow": 1, "slip": 1, "steps": 2}
            assert len(calls) == asks.get(role, 0)
            assert isinstance(
                branch[0], Look if role in ("beside", "stray", "lost", "noted", "follow", "slip") else Say
            )
            said = [piece for piece in branch if isinstance(piece, Say)]
            assert all(piece.text.endswith("<|im_end|>") for piece in said if piece.learn)
            assert said[-1].learn == (role != "look")
            assert said[-1].looks == (role == "look")
            if role == "look":
                assert said[-1].focus and not any(piece.learn for piece in said)
                continue
            asked = "".join(piece.text for piece in said[: [piece.learn for piece in said].index(True)])
            assert role == "beside" or ("You may zoom." in asked) == (role in asks)
            assert not any(one.learn and two.learn for one, two in pairwise(said))
            assert all(piece.focus or piece.tally for piece in said if piece.learn)
            assert all((piece.tally is not None) == (kind == "count") for piece in said if piece.learn)
            # what is not learned grounds the naming words of the question: of an object its colour, then itself
            grounded = {"headline": 0, "code": 2, "pips": 2, "relation": 2, "hop": 2}.get(kind, 1)
            assert sum(bool(piece.focus) for piece in said if not piece.learn) == grounded


def test_a_scene_is_called_on_more_often_than_it_is_served() -> None:
    tree = coarse_tree(Random(0), draw_board("scene", 5), crops=3, calls=4)
    roles = [name.split()[0] for name in tree.names]
    assert roles.count("call") == 4
    extra = ("stray", "lost", "vain")
    needed = [branch for branch, role in zip(tree.branches, roles, strict=True) if role not in extra]
    assert sum(isinstance(piece, Look) for branch in needed for piece in branch) == 3
    few_calls = coarse_tree(Random(0), draw_board("scene", 5), crops=3, calls=0)
    assert "call" not in {name.split()[0] for name in few_calls.names}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_after_a_crop_that_brings_nothing_it_answers_from_what_was_there(layout: str) -> None:
    """The call for it is not learned; the answer is, and is read from the view before, never from that crop."""
    shown = set()
    for seed in range(8):
        tree = tree_of(layout, seed)
        coarse = next(piece for piece in tree.prefix if isinstance(piece, Look))
        for name, branch in zip(tree.names, tree.branches, strict=True):
            if not name.startswith("vain "):
                continue
            said = [piece for piece in branch if isinstance(piece, Say)]
            before, crops = [piece.learn for piece in said], [piece for piece in branch if isinstance(piece, Look)]
            assert before == [False] * (len(said) - 1) + [True]
            assert said[-3].text.startswith("<zoom>") and said[-3].text.endswith("user\n")
            assert not said[-1].text.startswith("<zoom>")
            source = crops[0] if len(crops) == 2 else coarse
            assert branch[-3] is crops[-1] and crops[-1] is not source
            read = said[-1].focus or [said[-1].tally]
            assert all(place is not None and place[0] is source for place in read)
            shown.add(len(crops))
    assert 1 in shown and shown <= {1, 2}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_after_a_refused_call_it_answers_from_what_is_there_or_calls(layout: str) -> None:
    """The refused call is not learned; what follows the refusal is, and its words point at what it is read from."""
    seen = set()
    for seed in range(16 if layout == "hop" else 8):
        drawings = range(3 if layout == "hop" else 1)  # as in training: other boards have no notes
        board, *again = (board_of(layout, seed, index) for index in drawings)
        tree = coarse_tree(Random(seed), board, again=again)
        coarse = next(piece for piece in tree.prefix if isinstance(piece, Look))
        for name, branch in zip(tree.names, tree.branches, strict=True):
            if not name.startswith("refused "):
                continue
            said = [piece for piece in branch if isinstance(piece, Say)]
            crops = [piece for piece in branch if isinstance(piece, Look)]
            assert [piece.learn for piece in said] == [False] * (len(said) - 1) + [True]
            assert said[-2].text.startswith("<zoom>") and "\nNo crop.<|im_end|>" in said[-2].text
            needles = {"hop": 2, "headline": 0, "count": 0, "color": 0, "shape": 0}.get(name.split()[1], 1)
            calls_again = said[-1].text.startswith("<zoom>")
            assert calls_again == (len(crops) < needles)
            looked = {id(look) for look, _ in said[-1].focus or [said[-1].tally or (coarse, ())]}
            assert looked == {id(coarse if calls_again or not crops else crops[-1])}
            seen.add((len(crops), needles))
    assert seen == {(0, 0), (0, 1), (1, 1), *({(1, 2)} if layout == "hop" else ())}


def test_other_notes_leave_all_else_where_it_is() -> None:
    """So one coarse view stands for all drawings, and a slip's note names a place that the view's own may not."""
    differ = 0
    for seed in range(8):
        board, other = board_of("hop", seed), board_of("hop", seed, 1)
        assert board.things == other.things and len(board.facts) == len(other.facts)
        for one, two in zip(board.facts, other.facts, strict=True):
            hop = one.task == "needle-hop"
            assert (one.question, one.boxes[0] if hop else one) == (two.question, two.boxes[0] if hop else two)
            differ += hop and one.answer != two.answer
        cells = {fact.boxes: fact.answer for fact in board.facts if fact.kind == "table"}
        assert all(cells[fact.boxes[1:]] == fact.answer for fact in other.facts if fact.kind == "hop")
        changed = np.abs(np.asarray(board.image, dtype=int) - np.asarray(other.image, dtype=int)).max(axis=2) > 40
        rows, columns = np.nonzero(changed)
        notes = [fact.boxes[0] for fact in board.facts if fact.kind == "hop"]
        for y, x in zip(rows, columns, strict=True):
            assert any(box[0] - 8 <= x <= box[2] + 8 and box[1] - 8 <= y <= box[3] + 8 for box in notes)
    assert differ >= 8
    drawn = training_boards(Random(0), 0)
    assert {len(training_boards(Random(seed), seed)) for seed in range(24)} == {1, NOTES}
    assert training_board(Random(0), 0).image.tobytes() == drawn[0].image.tobytes()


def test_some_last_turns_are_forced() -> None:
    forced = [
        name
        for seed in range(12)
        for tree in [tree_of("hop", seed)]
        for name, branch in zip(tree.names, tree.branches, strict=True)
        if any(isinstance(piece, Say) and "Answer now." in piece.text for piece in branch)
    ]
    assert forced
    assert all(name.startswith(("zoom ", "noted ")) for name in forced)


def test_more_is_counted_than_a_board_asks_for() -> None:
    """Each word once, with the right number and a box for each; words of several things come first."""
    several = alone = 0
    boards = [board_of("scene", seed) for seed in range(8)]
    for seed, board in enumerate(boards):
        found = counts(Random(seed), board, most=4)
        assert len({fact.question.split()[-1] + fact.answer for fact in found}) >= len(found) - 1
        for fact in found:
            words = {word for word in (*SHAPES, *COLORS) if word in fact.question}
            (word,) = words
            boxes = [thing.box for thing in board.things if word in (thing.shape, thing.color)]
            assert (fact.answer, list(fact.seen)) == (str(len(boxes)), boxes)
            several, alone = several + (len(boxes) > 1), alone + (len(boxes) == 1)
    every = [
        sum(word in (thing.shape, thing.color) for thing in board.things)
        for board in boards
        for word in (*SHAPES, *COLORS)
    ]
    assert several / (several + alone) > sum(n > 1 for n in every) / sum(n > 0 for n in every)
    assert counts(Random(0), draw_board("form", 0)) == []


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


def test_a_pair_is_asked_about_either_board_and_calls_name_the_second() -> None:
    for seed in range(4):
        boards = paired_boards(Random(seed), seed)
        tree = pair_tree(Random(seed), boards, tokens=64)
        views = [piece for piece in tree.prefix if isinstance(piece, Look)]
        assert len(views) == 2
        assert len({fact.task for board in boards for fact in board.facts} & {"needle-scene", "needle-doc"}) == 2
        asked = set()
        for name, branch in zip(tree.names, tree.branches, strict=True):
            said = [piece for piece in branch if isinstance(piece, Say)]
            learned = [piece for piece in said if piece.learn]
            for call in (piece for piece in learned if "<zoom>" in piece.text):
                about = [index for index, view in enumerate(views) if call.focus[0][0] is view]
                assert call.text.startswith("<zoom>2<loc_" if about == [1] else "<zoom><loc_")
                assert len(call.focus) == 5 + about[0] and len({id(look) for look, _ in call.focus}) == 1
                asked.add((name.split()[0], about[0]))
            question = said[0].text if name.startswith("call") else ""
            assert all(piece.text.endswith("<|im_end|>") for piece in learned) and question != " You may zoom."
        assert {("zoom", 0), ("zoom", 1), ("call", 0), ("call", 1)} <= asked | {
            ("call", index) for index, board in enumerate(boards) if len(board.facts) < 20
        }


def test_both_crops_of_two_steps_stand_beside_the_coarse_view_in_their_order() -> None:
    board = board_of("hop", 4)
    tree = steps_tree(Random(0), board, tokens=64)
    hops = [fact for fact in board.facts if len(fact.boxes) == 2]
    assert 2 <= len(tree.branches) <= len(hops)
    for fact, branch in zip(hops, tree.branches, strict=False):
        first, second = (piece for piece in branch if isinstance(piece, Look))
        assert first.note is not None and second.note is None
        last = branch[-1]
        assert isinstance(last, Say) and last.text == fact.answer + "<|im_end|>"
        assert {id(look) for look, _ in last.focus} == {id(second)}


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
    branching = kind not in ("print", "glances")
    assert all(bool(tree.branches) == branching and len(tree.names) == len(tree.branches) for tree in first)


def text(tree: Tree) -> list[object]:
    """What is said, and which tokens each word is read from."""
    said = [piece for piece in pieces(tree) if isinstance(piece, Say)]
    return [(piece.text, piece.learn, [list(cells) for _, cells in piece.focus]) for piece in said]


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
    assert batch["kind"] == "crops"
    assert single([drawn[list(rows["kind"]).index("pages")]])["kind"] == "pages"
    assert pickle.loads(pickle.dumps(Draw(tokenizer))).packer.pad == Packer(tokenizer).pad, "any worker can get it"
    same = table({"crops": 0.5, "pages": 0.5}, steps=40, seed=3, tokenizer=tokenizer).with_format(None)
    assert list(same["kind"]) == list(rows["kind"])


def test_every_layout_is_trained_on() -> None:
    assert set(LAYOUT_SHARES) == set(LAYOUTS)
    assert sum(LAYOUT_SHARES.values()) == pytest.approx(1.0)


def test_proposed_crops_are_magnified_alike_and_mostly_hold_the_needle() -> None:
    rng, held = Random(0), []
    for seed in range(12):
        board = board_of("form", seed)
        for fact in board.facts:
            for needle in fact.boxes:
                frame = proposed(rng, board, needle)
                box, (rows, columns) = frame.box, frame.look.grid
                sides = (box[2] - box[0]) / board.image.width, (box[3] - box[1]) / board.image.height
                growth = sides[0] / PROPOSED_SIDES[0]
                assert sides[1] / PROPOSED_SIDES[1] == pytest.approx(growth, rel=0.03)  # whole pixels, outward
                assert PROPOSED_GROWTH[0] <= growth < 1.03 * PROPOSED_GROWTH[1]
                assert rows * columns / growth**2 == pytest.approx(PROPOSED_TOKENS[1], rel=0.2)
                assert min(box) >= 0 and box[2] <= board.image.width and box[3] <= board.image.height
                held.append(Box(*box).coverage(Box(*needle)) >= 0.95)
    assert 0.7 < sum(held) / len(held) < 1.0
