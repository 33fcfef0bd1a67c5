"""The receipt of `qzoom demo`: nano-paper reads it, and no training drew it."""

import json
from pathlib import Path
from typing import Any

import pytest

import demo_receipt
from demo_receipt import DEMO, LARGEST, LIKE_SCANS, MODEL, NAME, Page
from nano.batches import NUMBERS_A_STAGE, VALIDATION_SEED
from nano.paper_batches import _BATCHES_PER_PAGE
from qzoom_agent import Agent


@pytest.fixture
def row() -> Any:
    return json.loads((DEMO / "questions.json").read_text(encoding="utf-8"))[-1]


def _page(row: Any) -> Page:
    return Page(row["seed"], (DEMO / row["image"]).read_bytes(), row["question"], row["answer"], tuple(row["boxes"][0]))


def test_the_shipped_weights_read_the_shipped_receipt(row: Any) -> None:
    assert (row["image"], row["model"]) == (NAME, MODEL)
    assert (DEMO / NAME).stat().st_size <= LARGEST
    with Agent.from_pretrained(MODEL) as agent:
        assert demo_receipt.is_read(agent, _page(row)), "choose another: python rl/demo_receipt.py"


def test_no_training_draws_a_page_that_can_be_chosen() -> None:
    seeds = [demo_receipt.FIRST_SEED + number for number in LIKE_SCANS]
    assert min(seeds) > (VALIDATION_SEED + NUMBERS_A_STAGE) // _BATCHES_PER_PAGE
    assert max(seeds) < 1_000_000_007  # pages without lines are drawn again from there


def test_choosing_again_replaces_the_receipt_alone(row: Any, tmp_path: Path) -> None:
    rows = json.loads((DEMO / "questions.json").read_text(encoding="utf-8"))
    (tmp_path / "questions.json").write_text(json.dumps(rows), encoding="utf-8")
    demo_receipt.write(tmp_path, _page(row)._replace(scan=b"scan", total="9.00"))
    assert json.loads((tmp_path / "questions.json").read_text(encoding="utf-8")) == [
        *rows[:-1],
        row | {"answer": "9.00"},
    ]
    assert (tmp_path / NAME).read_bytes() == b"scan"
