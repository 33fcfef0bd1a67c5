"""Questions about receipts: what is asked, and where the answers stand."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from qzoom_agent.data.receipts import Line, Rect
from qzoom_agent.data.samples import Sample, TaskSource
from qzoom_agent.errors import ConfigError, ImageError
from qzoom_agent.evaluation.tasks.catalog import TASKS
from qzoom_agent.evaluation.tasks.receipts import (
    FIELD_QUESTIONS,
    ReceiptQuestion,
    centers_of,
    field_questions,
    found_in,
    is_label,
    line_questions,
    part_of,
    place_of,
    row_of,
)
from tests.evaluation.tasks import fixtures

ROW = 30.0


def line(text: str, x: float, row: float) -> Line:
    """A line of characters of 10 x 20 pixels."""
    return Line((x, row * ROW, x + 10 * len(text), row * ROW + 20), text)


LINES = (
    line("ACME SDN BHD", 20, 1),
    line("NO. 1, JALAN X,", 20, 2),
    line("81100 JOHOR", 20, 3),
    line("DATE :", 20, 5),
    line("25/12/2018 8:13 PM", 120, 5),
    line("Inv No: CS 1001", 20, 6),
    line("ITEM", 20, 7),
    line("AMOUNT", 300, 7),
    line("SUB TOTAL", 20, 8),
    line("9.00", 300, 8),
    line("TOTAL", 20, 9),
    line("RM9.00", 270, 9),
    line("CASH", 20, 11),
    line("CASH", 20, 12),
    line("10.00", 290, 12),
)
FIELDS = {"company": "Acme Sdn. Bhd.", "date": "25/12/2018", "address": "NO 1, JALAN X, 81100 JOHOR.", "total": "9.00"}


def samples(name: str, folder: Path, split: str | None = None) -> list[Sample]:
    return list(TASKS[name].load(TaskSource(path=str(folder), split=split)))


def test_fields_lie_where_they_are_printed() -> None:
    found = {asked.kind: asked.box for asked in field_questions(LINES, FIELDS)}
    assert found["company"] == LINES[0].box
    assert found["date"] == (120.0, 150.0, 220.0, 170.0)
    assert found["address"] == (20.0, 60.0, 170.0, 110.0)
    assert found["total"] == (290.0, 270.0, 330.0, 290.0)  # beside TOTAL, without RM


def test_a_value_that_is_printed_otherwise_is_found_and_another_is_not() -> None:
    assert place_of(LINES, "date", "2018-12-25") == LINES[4].box
    assert place_of(LINES, "company", "ACNE SDN BHD") == LINES[0].box
    assert place_of(LINES, "company", "OTHER SHOP") is None
    assert place_of(LINES, "total", "12.00") is None and place_of(LINES, "date", "24/12/2018") is None
    twice = [line("9.00", 0, 0), line("9.00", 0, 1)]
    assert place_of(twice, "total", "9.00") is None  # either may be the total
    assert place_of([line("1,234.50", 0, 0)], "total", "RM 1234.50") == (0.0, 0.0, 80.0, 20.0)
    for printed, value in (("1.234,50", "1234,50 €"), ("1'234.50", "1234.50"), ("9,00", "€ 9.00")):
        assert place_of([line(printed, 0, 0)], "total", value) == (0.0, 0.0, 10.0 * len(printed), 20.0)
    assert place_of([line("9,00", 0, 0)], "total", "900") is None


def test_only_labels_that_name_one_row_are_asked_about() -> None:
    answers = {asked.wordings[0]: asked.answer for asked in line_questions(LINES)}
    assert answers == {
        "what stands beside DATE?": "25/12/2018 8:13 PM",
        "what stands beside Inv No?": "CS 1001",
        "what stands beside SUB TOTAL?": "9.00",
    }


def test_a_value_after_a_colon_has_a_box_of_its_own() -> None:
    (asked,) = line_questions([line("INV NO: CS 1001", 20, 0)])
    assert asked.box == (100.0, 0.0, 170.0, 20.0) and asked.label == (20.0, 0.0, 80.0, 20.0)
    (spread,) = line_questions([line("TOTAL", 0, 0), line(": 9.00", 200, 0)])
    assert (spread.answer, spread.box) == ("9.00", (220.0, 0.0, 260.0, 20.0))
    assert not list(line_questions([line("TIME 12:30", 0, 0)]))
    (clock,) = line_questions([line("TIME: 12:30", 0, 0)])
    assert clock.answer == "12:30"


def test_part_of_another_value_is_not_the_value() -> None:
    for text in ("19.00", "9.00 9.00", "1,9.00", "9.005", "-9.00"):
        assert found_in(line(text, 0, 0), "9.00") is None, text
    assert found_in(line("rm 9.00", 0, 0), "9.00") == (30.0, 0.0, 70.0, 20.0)
    assert found_in(line("the Acme shop", 0, 0), "ACME") == (40.0, 0.0, 80.0, 20.0)
    assert found_in(line("ACMES", 0, 0), "ACME") is None


def test_labels_are_words() -> None:
    assert is_label("TOTAL (RM)") and is_label("GST NO")
    assert not is_label("9.00") and not is_label("RM") and not is_label("SR 123456")


def test_known_places_of_characters_are_kept() -> None:
    known = Line((0.0, 0.0, 30.0, 10.0), "AB", (4.0, 22.0))
    assert centers_of(known) == (4.0, 22.0)
    assert centers_of(Line(known.box, known.text)) == (7.5, 22.5)


WORDS = st.text(alphabet="AB 1:.9", min_size=1, max_size=10).filter(str.strip)
PAGES = st.lists(st.tuples(WORDS, st.integers(0, 300), st.integers(0, 9)), min_size=1, max_size=12)


def inside(box: Rect, page: list[Line]) -> bool:
    """Return whether a box lies in the lines of a page."""
    left, top, right, bottom = zip(*(one.box for one in page), strict=True)
    return min(left) <= box[0] < box[2] <= max(right) and min(top) <= box[1] < box[3] <= max(bottom)


@given(PAGES, WORDS)
def test_boxes_lie_in_lines_that_hold_the_answer(printed: list[tuple[str, int, int]], value: str) -> None:
    page = [line(*one) for one in printed]
    asked: list[ReceiptQuestion] = [*field_questions(page, dict.fromkeys(FIELD_QUESTIONS, value))]
    assert [one.kind for one in asked] == list(FIELD_QUESTIONS)
    assert all(one.box is None or inside(one.box, page) for one in asked)
    for one in line_questions(page):
        assert one.box is not None and inside(one.box, page) and one.label is not None
        holders = [holder for holder in page if holder.box[1] == one.box[1] and one.answer in holder.text]
        assert holders and any(one.box[0] >= holder.box[0] for holder in holders)
        labels = [one.wordings[0].removeprefix("what stands beside ").removesuffix("?")]
        assert all(sum(label in other.text for other in page) == 1 for label in labels)


@given(WORDS, st.data())
def test_the_box_of_a_part_holds_its_characters_alone(text: str, data: st.DataObject) -> None:
    whole = line(text, 7, 3)
    start = data.draw(st.integers(0, len(text) - 1))
    end = data.draw(st.integers(start + 1, len(text)))
    box = part_of(whole, start, end)
    held = [at for at, x in enumerate(centers_of(whole)) if box[0] < x < box[2]]
    assert held == list(range(start, end))


@given(PAGES)
def test_a_row_holds_its_line_and_runs_from_left_to_right(printed: list[tuple[str, int, int]]) -> None:
    page = [line(*one) for one in printed]
    for one in page:
        row = row_of(page, one)
        assert any(other is one for other in row)
        assert [other.box[0] for other in row] == sorted(other.box[0] for other in row)


def test_the_test_split_of_a_folder_is_asked(tmp_path: Path) -> None:
    folder = fixtures.receipts(tmp_path)
    found = samples("receipt-field", folder)
    assert [one.kind for one in found] == ["company", "date", "total", "address"] * 3
    assert found[0].question == "what is the company?" and found[0].answer == "Acme Trading"
    assert [one.id for one in found[:5:4]] == ["receipt-field-8-0", "receipt-field-18-0"]
    assert found[0].cluster == found[3].cluster != found[4].cluster
    assert all(len(one.boxes) == 1 for one in found)
    (box,) = found[2].boxes
    assert box == TASKS["receipt-field"].load(TaskSource(path=str(folder / "receipts.jsonl")))[2].boxes[0]
    assert (box.x1, box.y1, box.y2) == (158.0, 110.0, 122.0)
    assert {one.id for one in samples("receipt-field", folder, "all")} > {one.id for one in found}


def test_labels_of_a_folder_are_asked(tmp_path: Path) -> None:
    found = samples("receipt-line", fixtures.receipts(tmp_path, count=9))
    assert [(one.question, one.answer) for one in found] == [
        ("what stands beside DATE?", "09/03/2018"),
        ("what stands beside SUB TOTAL?", "8.50"),
    ]
    assert all(one.kind == "beside" and one.boxes for one in found)


def test_receipts_that_cannot_be_asked_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="--path DIR"):
        TASKS["receipt-field"].load(TaskSource())
    folder = fixtures.receipts(tmp_path, count=9)
    (folder / "images" / "008.png").unlink()
    with pytest.raises(ImageError, match=r"questions about .*images/008\.png"):
        samples("receipt-line", folder)
