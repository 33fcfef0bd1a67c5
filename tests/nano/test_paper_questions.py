"""What can be asked of paper, and the question trees about it."""

from pathlib import Path
from random import Random

import pytest
import torch
from PIL import Image

from nano.drawn_paper import draw_paper, print_paper
from nano.examples import CLOSE, OPEN, Frame, direct, show
from nano.paper import Line, Paper, Rect
from nano.paper_batches import paper_trees
from nano.paper_boards import PaperBoard, board_of
from nano.paper_trees import (
    close_up,
    coarse_paper_tree,
    line_fact,
    look_tree,
    part_tree,
    proposed_crop,
    whole_paper_tree,
)
from nano.tokenizer import build_tokenizer
from nano.trees import Look, Packer, Say, Tree
from qzoom_agent import Agent
from qzoom_agent.evaluation.scorers.anls import anls
from qzoom_agent.evaluation.tasks.receipts import field_questions, line_questions
from qzoom_agent.geometry import Box
from qzoom_agent.protocols.nano import UNKNOWN
from receipt_table import rows

ROW = 30.0


def line(text: str, x: float, row: int) -> Line:
    """A line of characters of 10 x 20 pixels."""
    return Line((x, row * ROW, x + 10 * len(text), row * ROW + 20), text)


RECEIPT = Paper(
    Image.new("L", (400, 600), 255),
    (
        line("ACME SDN BHD", 20, 1),
        line("NO. 1, JALAN X,", 20, 2),
        line("81100 JOHOR", 20, 3),
        line("DATE :", 20, 5),
        line("25/12/2018 8:13 PM", 120, 5),
        line("SUB TOTAL", 20, 8),
        line("9.00", 300, 8),
        line("TOTAL", 20, 9),
        line("RM 9.00", 270, 9),
        line("CASH", 20, 11),
        line("CASH", 20, 12),
        line("10.00", 290, 12),
    ),
    {"company": "ACME SDN BHD", "date": "25/12/2018", "address": "NO 1, JALAN X, 81100 JOHOR.", "total": "9.00"},
)


@pytest.fixture
def board() -> PaperBoard:
    return board_of(Random(0), RECEIPT)


def test_answers_are_the_characters_in_their_box(board: PaperBoard) -> None:
    for fact in board.facts:
        if fact.kind == "address":
            continue
        (box,) = fact.boxes
        inside = [glyph for glyph in board.glyphs if box[0] <= glyph.x <= box[2] and box[1] <= glyph.y <= box[3]]
        assert "".join(glyph.char for glyph in sorted(inside, key=lambda glyph: glyph.x)) == fact.answer


def test_a_line_is_named_by_where_it_begins(board: PaperBoard) -> None:
    frame = show(board, None, tokens=(300, 320))
    fact = line_fact(frame, RECEIPT.lines[4])
    assert fact is not None and fact.answer == "25/12/2018 8:13 PM"
    x, y = 120 * frame.scale[0], 160 * frame.scale[1]
    assert fact.question == f"read the line at <loc_{7 * round(x / 7)}><loc_{7 * round(y / 7)}>."
    assert line_fact(show(board, None, tokens=(16, 40)), RECEIPT.lines[4]) is None


def test_trees_of_paper_call_for_what_they_answer(board: PaperBoard) -> None:
    packer = Packer(build_tokenizer())
    for tree in (
        coarse_paper_tree(Random(1), board),
        part_tree(Random(1), board, tokens=(150, 200)),
        whole_paper_tree(Random(1), board),
    ):
        assert len(tree.branches) == len(tree.names) > 0
        for pieces, name in zip(tree.branches, tree.names, strict=True):
            assert any(isinstance(piece, Say) and (piece.learn or piece.looks) for piece in pieces), name
            if name.startswith(("zoom", "call")):
                assert any(isinstance(piece, Say) and "<zoom>" in piece.text for piece in pieces)
        batch = packer.batch([tree])
        assert batch["focus"].shape[1] > 0 and batch["ground"].shape[1] > 0
        assert int(batch["ids"].max()) < 768


def test_after_a_crop_of_something_else_it_calls_for_what_is_asked(board: PaperBoard) -> None:
    asked = 0
    for seed in range(6):
        tree = coarse_paper_tree(Random(seed), board)
        (coarse,) = (piece for piece in tree.prefix if isinstance(piece, Look))
        for pieces, name in zip(tree.branches, tree.names, strict=True):
            if name.startswith("lost"):
                assert sum(isinstance(piece, Look) for piece in pieces) == 1
                call = pieces[-1]
                assert isinstance(call, Say) and call.learn and call.text.startswith("<zoom><loc_")
                assert all(look is coarse and cells for look, cells in call.focus)
                asked += 1
    assert asked >= 3


def test_what_is_not_shown_is_not_guessed(board: PaperBoard) -> None:
    told = {}
    for seed in range(30):
        tree = part_tree(Random(seed), board, tokens=(20, 60))
        for pieces, name in zip(tree.branches, tree.names, strict=True):
            if name == "direct unknown":
                question, answer = pieces[0], pieces[-1]
                assert isinstance(question, Say) and isinstance(answer, Say)
                assert answer.text == UNKNOWN + CLOSE and answer.learn and not any(cells for _, cells in answer.focus)
                told[question.text] = True
    assert any("TOTAL" not in text and "company" in text for text in told)
    assert not any(text.startswith("what stands beside CASH?") for text in told)


def test_questions_are_those_of_the_tasks(board: PaperBoard) -> None:
    wordings = {asked.kind: asked.wordings for asked in field_questions(RECEIPT.lines, RECEIPT.fields)}
    fields = [fact for fact in board.facts if fact.task == "receipt-field"]
    assert {fact.kind for fact in fields} == set(wordings) == {"company", "date", "address", "total"}
    assert all(fact.question in wordings[fact.kind] for fact in fields)
    beside = {asked.answer: asked for asked in line_questions(RECEIPT.lines)}
    facts = [fact for fact in board.facts if fact.task == "receipt-line"]
    assert {fact.answer for fact in facts} == set(beside) == {"25/12/2018 8:13 PM", "9.00"}
    for fact in facts:
        asked = beside[fact.answer]
        assert fact.question in asked.wordings and (fact.boxes, fact.seen) == ((asked.box,), (asked.label,))


def test_parts_are_cut_about_what_can_be_asked(board: PaperBoard) -> None:
    names = [name for seed in range(20) for name in part_tree(Random(seed), board, tokens=(60, 160)).names]
    assert {"direct company", "direct date", "direct total", "direct address", "direct beside"} <= set(names)
    fields = [name for name in names if name.split()[1] in ("company", "date", "total", "address")]
    assert len(fields) > len(names) / 8


def test_a_served_crop_holds_the_answer_and_can_be_read(board: PaperBoard) -> None:
    tree = coarse_paper_tree(Random(4), board)
    crops = [piece for pieces in tree.branches for piece in pieces if isinstance(piece, Look)]
    assert crops
    for crop in crops:
        rows, columns = crop.grid
        assert 75 <= rows * columns <= 320
    assert any(crop.readings for crop in crops)


def test_one_of_several_crops_may_hold_the_answer(board: PaperBoard) -> None:
    firsts = []
    for seed in range(12):
        tree = coarse_paper_tree(Random(seed), board)
        for pieces, name in zip(tree.branches, tree.names, strict=True):
            crops = [piece for piece in pieces if isinstance(piece, Look)]
            read = [look for say in pieces if isinstance(say, Say) for look, cells in say.focus if cells]
            if len(crops) == 2 and read and not name.endswith("unknown"):
                firsts.append(read[-1] is crops[0])
    assert 0.2 < sum(firsts) / len(firsts) < 0.8


def test_beside_a_crop_that_is_shown_the_tool_is_offered_and_not_called(board: PaperBoard) -> None:
    offered = [
        pieces
        for seed in range(12)
        for tree in [coarse_paper_tree(Random(seed), board)]
        for pieces, name in zip(tree.branches, tree.names, strict=True)
        if name.startswith("offered")
    ]
    assert len(offered) > 3
    for pieces in offered:
        said = "".join(piece.text for piece in pieces if isinstance(piece, Say))
        assert "You may zoom." in said and "<zoom>" not in said
        assert sum(isinstance(piece, Look) for piece in pieces) == 1


def test_a_close_up_is_a_part_of_its_crop_and_mostly_holds_what_is_asked(board: PaperBoard) -> None:
    needle = next(fact.boxes[0] for fact in board.facts if fact.kind == "total")
    held = 0
    for seed in range(40):
        crop = proposed_crop(Random(seed), board, needle)
        close = close_up(Random(seed), crop, [needle])
        wide, high = (close.box[2] - close.box[0]) / (crop.box[2] - crop.box[0]), close.box[3] - close.box[1]
        assert 0.45 < wide < 0.9 and 0.4 * (crop.box[3] - crop.box[1]) < high
        assert close.box[0] >= crop.box[0] and close.box[3] <= crop.box[3]
        assert close.scale[0] > crop.scale[0]
        held += Box(*close.box).coverage(Box(*needle)) > 0.99
    assert held > 32


def test_places_alone_are_asked_of_a_page_and_of_most_of_it(board: PaperBoard) -> None:
    trees = [look_tree(Random(seed), board) for seed in range(12)]
    looks = [piece for tree in trees for piece in tree.prefix if isinstance(piece, Look)]
    assert len({look.grid for look in looks}) > 2 and all(
        rows * columns <= 400 for rows, columns in (look.grid for look in looks)
    )
    for tree in trees:
        assert all(name.startswith("look ") for name in tree.names)
        said = [piece for pieces in tree.branches for piece in pieces if isinstance(piece, Say) and piece.looks]
        assert len(said) == len(tree.branches) and all(cells for say in said for _, cells in say.focus)
    assert {len(tree.branches) for tree in trees} > {len(board.facts)}


def test_batches_of_questions_need_receipts_and_are_drawn_again() -> None:
    with pytest.raises(ValueError, match="--receipts"):
        paper_trees(Random(0), "paper_parts", 0, None, tokens=60)


def test_drawn_receipts_can_be_asked_about() -> None:
    boards = [board_of(Random(seed), print_paper(seed)) for seed in range(8)]
    kinds = {fact.kind for board in boards for fact in board.facts}
    assert {"company", "date", "total", "beside"} <= kinds
    for board in boards:
        for fact in board.facts:
            assert all(0 <= box[0] < box[2] and 0 <= box[1] < box[3] for box in fact.boxes)


def test_a_view_of_paper_is_read_along_its_lines(board: PaperBoard) -> None:
    box: Rect = (0.0, 120.0, 400.0, 200.0)
    frame: Frame = show(board, box, tokens=(60, 80))
    assert frame.look.dense is None and frame.look.readings is not None
    assert len(frame.look.readings) == 2
    batch = Packer(build_tokenizer()).batch([whole_paper_tree(Random(0), board)])
    assert torch.all(batch["reading"]["told"] == -100)  # evenly spread places are no labels


def test_words_and_characters_of_a_line_are_counted_where_they_are_read_and_said() -> None:
    board = board_of(Random(0), RECEIPT)
    frame = show(board, (0, 40, 400, 100), tokens=(60, 400))
    fact = line_fact(frame, RECEIPT.lines[1])
    assert fact is not None and fact.answer == "NO. 1, JALAN X,"
    packer = Packer(build_tokenizer())
    batch = packer.batch([Tree([Say(OPEN), frame.look], [direct(frame, fact)], ["direct at"])])
    said = torch.nonzero(batch["labels"] != -100)[:, 0]
    counted = {int(token): (int(word), int(character)) for token, word, character in batch["spell"].T}
    wanted = [(0, 0), (0, 1), (0, 2), (0, 3), (1, 0), (1, 1), (1, 2), (2, 0), (2, 1), (2, 2), (2, 3), (2, 4), (2, 5)]
    assert [counted[int(token) - 1] for token in said[:13]] == wanted
    shown = [counted[int(token)] for token in torch.unique(batch["focus"][1])]
    assert shown == sorted(shown) and shown[0] == (0, 0) and set(shown) < {*wanted, (3, 0), (3, 1)}


def test_only_whole_lines_are_counted(board: PaperBoard) -> None:
    frame = show(board, None, tokens=(4, 400))
    facts = [fact for fact in board.facts if fact.kind in ("total", "date")]
    batch = Packer(build_tokenizer()).batch([Tree([Say(OPEN), frame.look], [direct(frame, one) for one in facts])])
    assert len(facts) == 2 and batch["spell"].shape == (3, 0)


def test_a_table_for_branches_asks_whole_receipts_and_parts_of_them(tmp_path: Path) -> None:
    found = list(rows([RECEIPT], tmp_path, parts=3))
    wholes = [row for row in found if row["image"] == "000.jpg"]
    parts = [row for row in found if row not in wholes]
    assert {row["answer"] for row in wholes} >= {"ACME SDN BHD", "25/12/2018", "9.00"} and len(parts) == 3
    assert all(len(row["boxes"]) == 1 for row in wholes) and not any(row["boxes"] for row in parts)
    with Image.open(tmp_path / "000.jpg") as whole:
        assert whole.size == RECEIPT.image.size
    for row in parts:
        with Image.open(tmp_path / row["image"]) as part:
            assert part.height < RECEIPT.image.height / 2
    assert found == list(rows([RECEIPT], tmp_path, parts=3))


def test_proposed_crops_of_paper_hold_the_needle(board: PaperBoard) -> None:
    needle = next(fact.boxes[0] for fact in board.facts if fact.kind == "total")
    shares = []
    for seed in range(40):
        crop = proposed_crop(Random(seed), board, needle)
        left, top, right, bottom = crop.box
        assert left <= needle[0] and top <= needle[1] and right >= needle[2] and bottom >= needle[3]
        shares.append((right - left) / board.image.width)
    assert sum(0.49 < share < 0.81 for share in shares) > 20


def test_the_nano_for_receipts_finds_and_reads_a_company() -> None:
    drawn = board_of(Random(9004), draw_paper(9004, layout="receipt"))
    company = next(fact for fact in drawn.facts if fact.kind == "company")
    answer = Agent.from_pretrained("nano-paper").run(drawn.image, company.question)
    crop, close = (view for view in answer.trace.views if view.kind == "crop")
    assert crop.coverage(Box(*company.boxes[0])) > 0.9
    assert crop.region.coverage(close.region) > 0.99 and close.region.area < 0.3 * crop.region.area
    assert anls(answer.text, [company.answer], raw_length=False) > 0.5
