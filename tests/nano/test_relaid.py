"""Real receipts in other layouts."""

from dataclasses import replace
from random import Random

import numpy as np
import pytest
from PIL import Image

from nano.paper import Paper
from nano.relaid import relaid
from qzoom_agent.evaluation.tasks.receipts import place_of
from tests.nano.test_paper_questions import RECEIPT, line


def painted(page: Paper, *, first: int) -> Paper:
    """Return a page whose lines are boxes in greys of their own."""
    pixels = np.full((page.image.height, page.image.width), 255, np.uint8)
    for at, one in enumerate(page.lines):
        x1, y1, x2, y2 = (round(edge) for edge in one.box)
        pixels[y1:y2, x1:x2] = first + 5 * at
    return replace(page, image=Image.fromarray(pixels))


OTHER = Paper(
    Image.new("L", (500, 700), 255),
    tuple(
        line(text, x, row)
        for text, x, row in (
            ("BETA TRADING", 20, 1),
            ("5, JALAN Y", 20, 2),
            ("01/02/2017", 20, 4),
            ("NAILS", 20, 6),
            ("4.50", 300, 6),
            ("TOTAL", 20, 9),
            ("77.40", 300, 9),
            ("THANK YOU", 20, 12),
            ("COME AGAIN", 20, 14),
            ("OPEN DAILY", 20, 16),
        )
    ),
    {"company": "BETA TRADING", "date": "01/02/2017", "address": "5, JALAN Y", "total": "77.40"},
)
TONES = {
    one.text: tone
    for page, start in ((RECEIPT, 20), (OTHER, 100))
    for one, tone in zip(page.lines, range(start, 250, 5), strict=False)
}


@pytest.mark.parametrize("joined", [False, True])
def test_each_line_moves_with_its_print(joined: bool) -> None:
    head, foot = painted(RECEIPT, first=20), painted(OTHER, first=100)
    shapes = set()
    for seed in range(30):
        found = relaid(Random(seed), head, foot if joined else None)
        pixels = np.asarray(found.image.convert("L"))
        shapes.add(found.image.size)
        for one in found.lines:
            x1, y1, x2, y2 = (round(edge) for edge in one.box)
            inside = pixels[y1 + 4 : y2 - 4, x1 + 4 : x2 - 4]
            assert abs(float(np.median(inside)) - TONES[one.text]) < 1 or one.text in ("CASH", "TOTAL")
    assert len(shapes) == 30


def test_every_field_can_still_be_found_and_is_the_only_one_of_its_kind() -> None:
    mixed = 0
    for seed in range(60):
        alone = relaid(Random(seed), RECEIPT)
        assert all(place_of(alone.lines, name, value) for name, value in alone.fields.items())
        assert alone.fields == RECEIPT.fields
        both = relaid(Random(seed), RECEIPT, OTHER)
        assert both.fields["company"] == "ACME SDN BHD"
        if both.fields["total"] == "77.40":
            mixed += 1
            box = place_of(both.lines, "total", "77.40")
            beside = (
                [one.text for one in both.lines if one.text == "TOTAL" and abs(one.middle - (box[1] + box[3]) / 2) < 2]
                if box
                else []
            )
            assert beside == ["TOTAL"] and [one.text for one in both.lines].count("TOTAL") == 1
            assert not any(one.text == "9.00" for one in both.lines)
    assert mixed > 20


def test_an_item_that_costs_as_much_as_its_receipt_is_not_the_total_of_another() -> None:
    page = replace(RECEIPT, lines=(*RECEIPT.lines[:5], line("NAIL", 20, 6), line("9.00", 300, 6), *RECEIPT.lines[5:]))
    totals = [relaid(Random(seed), page, OTHER) for seed in range(40)]
    joined = [found for found in totals if any(one.text == "77.40" for one in found.lines)]
    assert joined and all(found.fields["total"] == "77.40" for found in joined)


def test_a_page_without_print_or_fields_is_taken() -> None:
    assert relaid(Random(1), Paper(Image.new("RGB", (40, 60)), ()), OTHER).lines == ()
