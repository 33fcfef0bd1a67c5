"""Drawn receipts, invoices and labels: what stands where on them, and what can be asked about them."""

import re
from decimal import Decimal
from itertools import combinations, pairwise
from random import Random
from typing import get_args

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nano import drawn_paper
from nano.bills import draw_bill
from nano.drawn_paper import SHARES, Layout, draw_paper, in_reading_order, print_paper
from nano.paper import Line, Paper
from nano.paper_boards import board_of
from nano.sheet import Sheet, broken
from qzoom_agent.evaluation.tasks.receipts import place_of, row_of

LAYOUTS: tuple[Layout, ...] = get_args(Layout)
ADDED = ("SHIPPING", "DELIVERY", "FREIGHT", "TAX", "GST", "VAT", "SST")


@pytest.fixture(scope="module")
def scans() -> list[Paper]:
    return [draw_paper(seed, layout=layout) for seed, layout in enumerate(LAYOUTS)]


def test_a_page_is_the_same_every_time_it_is_drawn(scans: list[Paper]) -> None:
    again = draw_paper(1, layout="invoice")
    assert again.lines == scans[1].lines and again.fields == scans[1].fields
    assert np.array_equal(np.asarray(again.image), np.asarray(scans[1].image))
    assert draw_paper(2, layout="invoice").lines != scans[1].lines


def test_layouts_are_drawn_by_their_shares(monkeypatch: pytest.MonkeyPatch) -> None:
    blank = dict.fromkeys(LAYOUTS, lambda rng: (Sheet(rng, width=90, height=90), {}))
    monkeypatch.setattr(drawn_paper, "_DRAW", blank)
    names = [print_paper(seed).name.split("/")[1] for seed in range(60)]
    assert set(names) == set(LAYOUTS) and 25 <= names.count("receipt") <= 45
    assert sum(SHARES.values()) == pytest.approx(1.0)


def test_there_is_ink_where_a_line_is_said_to_be(scans: list[Paper]) -> None:
    for page in scans:
        pixels = np.asarray(page.image, dtype=float)
        for line in page.lines:
            left, top, right, bottom = (round(edge) for edge in line.box)
            inside = pixels[max(0, top) : bottom, max(0, left) : right]
            assert inside.size, (page.name, line)
            assert np.percentile(inside, 99) - inside.min() > 25, (page.name, line)


def test_every_character_of_a_scan_has_a_place_of_its_own_on_it(scans: list[Paper]) -> None:
    for page in scans:
        assert page.lines
        for line in page.lines:
            assert line.centers is not None and len(line.centers) == len(line.text)
            assert all(one < other for one, other in pairwise(line.centers))
            assert line.box[0] - 1 <= line.centers[0] and line.centers[-1] <= line.box[2] + 1
            assert line.centers[0] > 0 and line.centers[-1] < page.image.width


@settings(max_examples=16, deadline=None, derandomize=True)
@given(seed=st.integers(0, 10**9), layout=st.sampled_from(LAYOUTS))
def test_print_stays_on_the_page_and_lines_keep_apart(seed: int, layout: Layout) -> None:
    page = print_paper(seed, layout=layout)
    for line in page.lines:
        left, top, right, bottom = line.box
        assert 0 <= left < right <= page.image.width and 0 <= top < bottom <= page.image.height, line
    for one, other in combinations(page.lines, 2):
        across = min(one.box[2], other.box[2]) - max(one.box[0], other.box[0])
        down = min(one.box[3], other.box[3]) - max(one.box[1], other.box[1])
        assert across <= 0 or down <= 1, (one, other)
    printed = " ".join(line.text for line in page.lines).replace(",", "")
    for name, value in page.fields.items():
        assert all(word in printed for word in value.replace(",", "").split()), (name, value)


@settings(max_examples=25, deadline=None, derandomize=True)
@given(seed=st.integers(0, 10**9), count=st.integers(1, 30))
def test_a_bill_adds_up_to_the_cent(seed: int, count: int) -> None:
    bill = draw_bill(Random(seed), count=count)
    assert len(bill.items) == count
    assert bill.subtotal == sum(item.pieces * item.price for item in bill.items)
    assert bill.total == bill.subtotal - bill.off + bill.shipping + bill.tax
    assert abs(bill.tax - (bill.total - bill.tax) * bill.rate / 100) <= Decimal("0.005")
    assert all(value == round(value, 2) >= 0 for value in (bill.off, bill.shipping, bill.tax, bill.total))


@settings(max_examples=8, deadline=None, derandomize=True)
@given(seed=st.integers(0, 10**9))
def test_the_sums_printed_on_an_invoice_add_up(seed: int) -> None:
    page = print_paper(seed, layout="invoice")
    sums: dict[str, Decimal] = {}
    for line in page.lines:
        row = row_of(page.lines, line)
        amount = re.fullmatch(r"\$?(-?[\d,]+\.\d\d)( EUR)?", row[-1].text.replace("$-", "-"))
        if len(row) == 2 and row[0] is line and amount:
            sums[line.text] = Decimal(amount[1].replace(",", ""))
    below = [value for label, value in sums.items() if "SUB" in label]
    assert len(below) == 1 and "total" in page.fields
    more = sum(value for label, value in sums.items() if any(word in label for word in ADDED))
    less = sum(value for label, value in sums.items() if "DISCOUNT" in label)
    assert below[0] + more + less == Decimal(page.fields["total"])


def test_fields_are_found_where_they_are_printed() -> None:
    found: dict[str, int] = {}
    for seed in range(8):
        for layout in ("receipt", "invoice", "label"):
            page = print_paper(seed, layout=layout)
            for name, value in page.fields.items():
                box = place_of(page.lines, name, value)
                found[f"{layout} {name}"] = found.get(f"{layout} {name}", 0) + (box is not None)
    assert all(found[f"{layout} {name}"] >= 6 for layout in ("receipt", "invoice") for name in ("company", "total"))
    assert all(found[f"{layout} {name}"] >= 4 for layout in ("receipt", "invoice") for name in ("date", "address"))
    assert found["label company"] >= 4 and found["label date"] >= 4 and found["label total"] >= 1


def test_invoices_and_labels_can_be_asked_about() -> None:
    for layout in ("invoice", "label"):
        facts = [fact for seed in range(6) for fact in board_of(Random(seed), print_paper(seed, layout=layout)).facts]
        assert {"company", "date", "address", "beside"} <= {fact.kind for fact in facts}
        assert all(0 <= box[0] < box[2] and 0 <= box[1] < box[3] for fact in facts for box in fact.boxes)


def test_rows_are_read_before_columns() -> None:
    left = [Line((10, 20 * row, 90, 20 * row + 14), f"L{row}") for row in range(3)]
    right = [Line((120, 20 * row + 3, 200, 20 * row + 17), f"R{row}") for row in range(3)]
    assert [line.text for line in in_reading_order([*right, *left])] == ["L0", "R0", "L1", "R1", "L2", "R2"]


def test_parts_of_a_sheet_stand_side_by_side() -> None:
    sheet = Sheet(Random(0), width=600, height=800)
    top = sheet.y
    sheet.side_by_side((0.0, 0.4, lambda: sheet.rows(["AB", "CD", "EF"])), (0.6, 1.0, lambda: sheet.rows(["GH"])))
    boxes = {line.text: line.box for line in sheet.strip.lines}
    assert boxes["AB"][1] == boxes["GH"][1] and boxes["GH"][0] > boxes["AB"][2] + 0.1 * sheet.wide
    assert sheet.y == pytest.approx(top + 3 * sheet.type.size * sheet.leading)


def test_text_is_broken_between_words() -> None:
    type_ = Sheet(Random(1), width=600, height=800).type
    width = type_.width("ten letters")
    assert broken("ten letters and more", type_, width) == ["ten letters", "and more"]
    assert all(type_.width(line) <= width for line in broken("unbreakablyunbreakablylong one", type_, width))
