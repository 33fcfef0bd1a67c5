"""Rules for the fields of receipts, on lines of our own; OCR itself is not run here."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

import receipt_ocr
from qzoom_agent.data.receipts import Line
from tests.evaluation.tasks import fixtures


def printed(*rows: str) -> list[Line]:
    """Lines of print, one row each; cells of a row are parted by "|"."""
    return [
        Line((150.0 * column, 30.0 * number, 150.0 * column + 10 * len(cell), 30.0 * number + 20), cell)
        for number, row in enumerate(rows)
        for column, cell in enumerate(row.split("|"))
    ]


def test_fields_are_found_in_lines() -> None:
    found = receipt_ocr.fields_of(
        printed(
            "WELCOME", "ACME SDN BHD", "(12345-X)", "1, JALAN X,", "81100 JOHOR", "TEL: 07-123", "DATE: 25/12/2018 8:13"
        )
    )
    assert found == {
        "company": "ACME SDN BHD",
        "address": "1, JALAN X, 81100 JOHOR",
        "date": "25/12/2018",
        "total": "",
    }


@pytest.mark.parametrize(
    ("rows", "total"),
    [
        (["SUB TOTAL|9.00", "TOTAL|9.54", "CASH|10.00"], "9.54"),
        (["TOTAL INCL. GST@6%|RM 9.54", "GST @6% INCLUDED IN TOTAL|0.54"], "9.54"),
        (["TOTAL|9.53", "ROUNDED TOTAL|9.55", "TOTAL QTY|2.00"], "9.55"),
        (["TOTAL :|9.00|0.54", "SUBTOTAL|9.54"], "9.54"),
        (["tea|1.20", "milk|12.00"], "12.00"),
        (["nothing"], ""),
    ],
)
def test_the_total_is_beside_its_best_name(rows: list[str], total: str) -> None:
    assert receipt_ocr.fields_of(printed(*rows))["total"] == total


def test_a_date_on_a_line_that_says_so_goes_first() -> None:
    rows = ["printed 01/02/2019", "Date|03 MAR 2019"]
    assert receipt_ocr.fields_of(printed(*rows))["date"] == "03 MAR 2019"
    assert receipt_ocr.fields_of(printed("45/45/2019"))["date"] == ""


def test_no_lines_have_no_fields() -> None:
    assert set(receipt_ocr.fields_of([]).values()) == {""}


def test_the_rules_alone_are_scored_on_transcripts(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder, file = fixtures.receipts(tmp_path / "receipts"), tmp_path / "figures.json"
    assert receipt_ocr.main([str(folder), "--transcripts", "--json", str(file)]) == 0
    report = json.loads(file.read_text())
    assert (report["receipts"], report["reader"], report["megabytes"]) == (3, "transcripts", 0.0)
    assert {kind: one["exact"] for kind, one in report["scores"].items()} == {
        "company": 1.0,
        "date": 1.0,
        "address": 1.0,
        "total": 1.0,
    }
    assert report["answers"]["images/008.png"]["date"] == "09/03/2018"
    assert '"scores"' in capsys.readouterr().out
