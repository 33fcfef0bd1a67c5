"""Which boards are drawn for which tasks, and columns as published datasets have them."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import pytest
from datasets import Dataset
from PIL import Image

from qzoom_agent.errors import ConfigError
from qzoom_agent.training.branches.dataset import DatasetSpec, load_records

RED = Image.new("RGB", (40, 30), "red")


def test_hops_have_two_boxes_in_order() -> None:
    rows = load_records([DatasetSpec(path="needle", limit=6, a_board=2, tasks=("needle-hop",))])
    assert [len(rows[at].known_boxes) for at in range(6)] == [2] * 6
    assert {rows[at].question.split()[0] for at in range(6)} <= {"follow", "which"}


def test_all_four_tasks_come_from_one_source() -> None:
    tasks = ("needle-scene", "needle-doc", "needle-hop", "needle-global")
    rows = load_records([DatasetSpec(path="needle", limit=40, a_board=1, tasks=tasks)])
    assert {len(rows[at].known_boxes) for at in range(40)} == {0, 1, 2}


@pytest.mark.parametrize("task", ["needle-scene", "needle-doc", "needle-global"])
def test_one_task_alone(task: str) -> None:
    rows = load_records([DatasetSpec(path="needle", limit=8, a_board=1, tasks=(task,))])
    assert {len(rows[at].known_boxes) for at in range(8)} == {0 if task == "needle-global" else 1}


def png() -> bytes:
    out = io.BytesIO()
    RED.save(out, format="PNG")
    return out.getvalue()


@pytest.mark.parametrize("images", [[RED], [{"bytes": png(), "path": None}]])
def test_fields_of_records_and_lists_of_images(tmp_path: Path, images: list[Any]) -> None:
    row = {
        "images": images,
        "extra_info": {"question": "What code?", "answer": "407"},
        "reward_model": {"ground_truth": "407", "style": "model"},
    }
    Dataset.from_list([row, row]).save_to_disk(str(tmp_path / "rows"))
    columns = {"image": "images", "question": "extra_info.question", "answer": "reward_model.ground_truth"}
    source = DatasetSpec(path=str(tmp_path / "rows"), columns=columns)
    found = load_records([source])[1]
    assert (found.question, found.answer, found.known_boxes) == ("What code?", "407", None)
    assert found.image.size == (40, 30) and found.image.getpixel((0, 0)) == (255, 0, 0)
    with pytest.raises(ConfigError, match=r"has no column extra_info\.query; it has images, extra_info, reward_model"):
        load_records([source.model_copy(update={"columns": columns | {"question": "extra_info.query"}})])


def test_a_table_of_images_is_found_by_its_ids(tmp_path: Path) -> None:
    Dataset.from_list([{"image": RED, "question": "?", "answer": "x"}]).save_to_disk(str(tmp_path / "rows"))
    with pytest.raises(ConfigError, match=r"lacks the column id\. Needed: id, image\. There are: image"):
        load_records([DatasetSpec(path=str(tmp_path / "rows"), images="images")])
