"""CharXiv: a chart a row becomes one question of reasoning, and four descriptive ones."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from qzoom_agent.data.samples import TaskSource
from qzoom_agent.errors import ConfigError
from qzoom_agent.evaluation.tasks.catalog import TASKS
from tests.evaluation.tasks import files
from tests.evaluation.tasks.fixtures import samples


def test_reasoning_asks_for_the_kind_of_answer(tmp_path: Path) -> None:
    found = samples("charxiv-reasoning", tmp_path)
    assert [sample.kind for sample in found] == [
        "Text-in-Chart",
        "Number-in-General",
        "Number-in-General",
        "Text-in-General",
        "Number-in-Chart",
    ]
    assert found[0].id == "charxiv-reasoning-0" and found[0].question.startswith("Which model declines?\n")
    assert found[1].question == "By how much?\nAnswer with a number with 2 decimal places."
    assert found[2].question.endswith("an exact integer.")


def test_every_chart_has_its_four_descriptive_questions(tmp_path: Path) -> None:
    found = samples("charxiv-descriptive", tmp_path)
    assert len(found) == 20 and len({sample.cluster for sample in found}) == 5
    assert [sample.id for sample in found[3:6]] == [f"charxiv-descriptive-{part}" for part in ("0-4", "1-1", "1-2")]
    first, whole, placed, named = found[0], found[3], found[4], found[8]
    assert first.question.startswith("For the current plot, what is the spatially highest labeled tick on the y-axis?")
    assert whole.question.startswith("What is the layout of the subplots?\n") and whole.answer == "1 by 1"
    assert placed.question.startswith("For the subplot at row 1 and column 2, what is its title?\n")
    assert named.question.startswith("For the bottom subplot, what is the label of the x-axis?\n")
    assert [sample.kind for sample in found[:4]] == [
        "Information Extraction",
        "Enumeration",
        "Pattern Recognition",
        "Pattern Recognition",
    ]


def test_not_applicable_has_to_be_said(tmp_path: Path) -> None:
    sample = samples("charxiv-descriptive", tmp_path)[11]
    rule = TASKS["charxiv-descriptive"].scorers["rule"]
    assert sample.answer == "Not Applicable"
    assert rule("not applicable", sample).value == 1 and rule("0", sample).value == 0


def test_the_test_split_has_no_answers(tmp_path: Path) -> None:
    row = {"image": files.base64_png(files.draw("C")), "figure_path": "images/9.jpg", "reasoning_q": "How many?"}
    (tmp_path / "test.jsonl").write_text(json.dumps({**row, "reasoning_a": None, "reasoning_a_type": 4}))
    load, path = TASKS["charxiv-reasoning"].load, str(tmp_path / "test.jsonl")
    with pytest.raises(ConfigError, match="there is no answer"):
        load(TaskSource(path=path))[0]
    assert load(TaskSource(path=path, answered=False))[0].question == "How many?\nAnswer with a number."
