"""A folder of receipts: what is read, which split it is in, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from qzoom_agent.data.receipts import SPLITS, Line, read_receipts
from qzoom_agent.errors import ConfigError, QzoomError


def row(number: int, **changes: Any) -> dict[str, Any]:
    fields = {"company": "ACME", "date": "01/02/2019", "total": f"{number}.00"}
    lines = [{"box": [20, 30, 220, 60], "text": f"Total {number}.00"}]
    return {"image": f"{number}.jpg", "size": [300, 200], "fields": fields, "lines": lines, **changes}


def write(folder: Path, rows: list[dict[str, Any]]) -> Path:
    (folder / "receipts.jsonl").write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    return folder


def test_every_receipt_is_in_one_split(tmp_path: Path) -> None:
    folder = write(tmp_path, [row(number) for number in range(500)])
    found = {split: {one.number for one in read_receipts(folder, split)} for split in SPLITS}
    assert {split: len(numbers) for split, numbers in found.items()} == {
        "train": 400,
        "validation": 40,
        "test": 60,
        "all": 500,
    }
    assert not found["train"] & found["test"] and not found["train"] & found["validation"]
    assert found["train"] | found["validation"] | found["test"] == found["all"] == set(range(500))
    assert [one.number for one in read_receipts(folder / "receipts.jsonl")][:3] == [8, 18, 23]


def test_a_receipt_that_was_trained_on_is_not_tested_again(tmp_path: Path) -> None:
    rows = [row(number) for number in range(25)]
    rows[8]["fields"] = rows[7]["fields"]
    del rows[18]["fields"]["total"]
    rows[23]["fields"] = rows[18]["fields"]
    folder = write(tmp_path, rows)
    assert [one.number for one in read_receipts(folder)] == [18, 23]  # without a total they may be two sales
    assert len(read_receipts(folder, "train")) == 20 and len(read_receipts(folder, "all")) == 25


def test_lines_and_fields_without_content_are_left_out(tmp_path: Path) -> None:
    lines = [{"box": [0, 0, 9, 9], "text": "A"}, {"box": [0, 0, 9, 9], "text": " "}, {"box": [5, 0, 5, 9], "text": "B"}]
    (only,) = read_receipts(write(tmp_path, [row(0, lines=lines, fields={"date": "", "total": "9"})]), "all")
    assert only.lines == (Line((0.0, 0.0, 9.0, 9.0), "A"),)
    assert only.fields == {"total": "9"} and only.sale is None
    assert (only.lines[0].height, only.lines[0].middle) == (9.0, 4.5)


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"image": None}, "Row 2 of .*image"),
        ({"lines": [{"box": [1, 2, 3], "text": "A"}]}, "Row 2 of .*lines.0.box"),
        ({"lines": [{"box": [1, 2, 3, float("nan")], "text": "A"}]}, "Row 2 of .*lines.0.box"),
        ({"fields": {"total": 9}}, "Row 2 of .*fields.total"),
    ],
)
def test_a_row_that_is_no_receipt_is_named(change: dict[str, Any], told: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=told):
        read_receipts(write(tmp_path, [row(0), row(1, **change)]), "all")


def test_a_folder_or_split_that_is_not_there_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"receipts\.jsonl: No such file"):
        read_receipts(tmp_path)
    with pytest.raises(ConfigError, match=r"none is in the split 'test'.*'all' has all"):
        read_receipts(write(tmp_path, [row(0)]))
    with pytest.raises(ConfigError, match=r"no split 'dev'.*train, validation, test, all"):
        read_receipts(tmp_path, "dev")


@given(st.binary(max_size=60))
def test_no_file_ends_in_another_error(content: bytes) -> None:
    from tempfile import TemporaryDirectory

    with TemporaryDirectory() as name:
        (Path(name) / "receipts.jsonl").write_bytes(content)
        with pytest.raises(QzoomError):
            read_receipts(Path(name), "all")


def test_a_file_may_begin_with_the_mark_of_utf_8(tmp_path: Path) -> None:
    file = write(tmp_path, [row(0)]) / "receipts.jsonl"
    file.write_text(file.read_text("utf-8"), encoding="utf-8-sig")
    assert [one.image for one in read_receipts(tmp_path, "all")] == ["0.jpg"]
