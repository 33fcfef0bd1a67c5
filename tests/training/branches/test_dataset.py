"""Questions about images from boards and from tables of one's own."""

import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from datasets import Dataset
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from nano.batches import VALIDATION_SEED
from qzoom_agent.errors import ConfigError
from qzoom_agent.evaluation.tasks.needle import FIRST_SEED
from qzoom_agent.geometry import Box, Size
from qzoom_agent.images import digest
from qzoom_agent.models.hf import HFBackend
from qzoom_agent.training.branches.base_inference import ask
from qzoom_agent.training.branches.dataset import NEEDLE_SEED, NEEDLE_SPAN, DatasetSpec, Records, load_records, spread
from tests.tiny_models import Family
from tests.training.branches.conftest import picture

RED = Image.new("RGB", (40, 30), "red")


def test_needle_rows_of_a_board_share_it_and_know_their_boxes() -> None:
    records = load_records([DatasetSpec(path="needle", limit=10, a_board=4)])
    rows = [records[index] for index in range(len(records))]
    assert [row.cluster for row in rows] == [rows[0].cluster] * 4 + [rows[4].cluster] * 4 + [rows[8].cluster] * 2
    assert len({row.id for row in rows}) == 10
    for row in rows:
        assert row.question and row.answer
        size = Size(*row.image.size)
        assert all(box.clamp(size) == box for box in row.boxes)
    # every kind of question of a board comes before any comes again
    assert len({row.question for row in rows[:4]}) == 4
    assert any(row.known_boxes for row in rows)


def test_needle_sources_share_no_board_with_each_other_nor_with_what_else_is_drawn() -> None:
    first = load_records([DatasetSpec(path="needle", limit=2, a_board=1)])
    second = load_records([DatasetSpec(path="needle", limit=2, a_board=1, seed=1)])
    names = {records[index].cluster for records in (first, second) for index in range(2)}
    assert len(names) == 4
    assert VALIDATION_SEED < NEEDLE_SEED and NEEDLE_SEED + 4 * NEEDLE_SPAN <= FIRST_SEED


def test_a_folder_with_columns_of_other_names(tmp_path: Path) -> None:
    Dataset.from_dict(
        {
            "picture": [picture(0), picture(0), picture(1)],
            "ask": ["a?", "b?", "c?"],
            "answers": [["x", "y"], ["z"], ["z"]],
        }
    ).save_to_disk(str(tmp_path / "table"))
    source = DatasetSpec(
        path=str(tmp_path / "table"),
        columns={"image": "picture", "question": "ask", "answer": "answers"},
        suffix=" Briefly.",
        mode="natural",
    )
    records = load_records([source])
    assert len(records) == 3
    first, second = records[0], records[1]
    assert first.question == "a? Briefly." and first.answer == "x" and first.mode == "natural"
    assert first.answers == ("x", "y") and records[2].answers == (records[2].answer,) == ("z",)
    assert first.known_boxes is None
    # without a column that says so, equal pixels are the same image
    assert first.cluster == second.cluster == digest(picture(0))[:16]
    with pytest.raises(IndexError):
        records[3]


def test_of_several_questions_the_first_is_asked_and_only_its_own_answer_is_right(tmp_path: Path) -> None:
    """As the covers of OCR-VQA have them."""
    row = {"image": picture(0), "questions": ["who wrote it?", "which year?"], "answers": ["Ann", "1999"]}
    Dataset.from_list([row]).save_to_disk(str(tmp_path / "table"))
    columns = {"question": "questions", "answer": "answers"}
    (found,) = [load_records([DatasetSpec(path=str(tmp_path / "table"), columns=columns)])[0]]
    assert (found.question, found.answer, found.answers) == ("who wrote it?", "Ann", ("Ann",))


def test_the_topic_of_each_row_is_that_of_its_source() -> None:
    sources = [DatasetSpec(path="needle", limit=2, topic="boards"), DatasetSpec(path="needle", limit=1, seed=1)]
    assert load_records(sources).topics() == ["boards", "boards", None]


def test_json_lines_name_images_beside_them(tmp_path: Path) -> None:
    picture(3).save(tmp_path / "one.png")
    row = {"image": "one.png", "question": "a?", "answer": 7, "boxes": [[0, 0, 10, 10]]}
    (tmp_path / "rows.jsonl").write_text(json.dumps(row) + "\n")
    (found,) = [load_records([DatasetSpec(path=str(tmp_path / "rows.jsonl"))])[0]]
    assert digest(found.image) == digest(picture(3))
    assert found.answer == "7" and found.known_boxes == (Box(0, 0, 10, 10),)


def ids(records: Records) -> list[str]:
    return [records[index].id for index in range(len(records))]


def test_of_several_sources_each_gives_its_share() -> None:
    sources = [DatasetSpec(path="needle", limit=9, a_board=2), DatasetSpec(path="needle", limit=3, a_board=2, seed=1)]
    first, second = (ids(load_records([source])) for source in sources)
    assert ids(load_records(sources)) == ids(load_records(sources, limit=99)) == first + second
    assert ids(load_records(sources, limit=4)) == first[:3] + second[:1]


def test_of_boards_the_first_are_taken_and_of_a_table_a_sample_in_its_order(tmp_path: Path) -> None:
    boards = DatasetSpec(path="needle", limit=12, a_board=4)
    assert ids(load_records([boards], limit=5)) == ids(load_records([boards]))[:5]
    assert ids(load_records([boards])) == ids(load_records([boards.model_copy(update={"limit": 40})]))[:12]
    rows = {"id": [f"{at:03}" for at in range(200)], "image": [picture(0)] * 200, "question": ["a?"] * 200}
    Dataset.from_dict({**rows, "answer": ["x"] * 200}).save_to_disk(str(tmp_path / "table"))
    table = DatasetSpec(path=str(tmp_path / "table"), limit=100)
    some, fewer = ids(load_records([table])), ids(load_records([table], limit=20))
    assert some == sorted(some) and fewer == sorted(fewer) and set(fewer) < set(some)
    for found, count in ((some, 100), (fewer, 20)):
        assert len(set(found)) == count and 0.3 < sum(one >= "100" for one in found) / count < 0.7
    assert some == ids(load_records([table])) != ids(load_records([table.model_copy(update={"seed": 1})]))


def test_each_question_is_asked_of_its_own_image_whatever_a_column_of_ids_says(
    folders: Callable[[Family], Path], tmp_path: Path
) -> None:
    """Two sources may number their images alike, and a column may be empty or name documents of several pages."""
    sources = []
    for name, named in (("a", ["7", "7"]), ("b", ["7", None])):
        rows = {"image": [picture(at + 2 * (name == "b")) for at in range(2)], "question": ["a?", "b?"]}
        table = Dataset.from_dict({**rows, "answer": ["x", "y"], "image_id": named})
        table.save_to_disk(str(tmp_path / name))
        sources.append(DatasetSpec(path=str(tmp_path / name)))
    found = load_records(sources)
    records = [found[at] for at in range(4)]
    backend = HFBackend.load(str(folders("qwen2_5_vl")), device="cpu", dtype="float32")
    for record, asked in zip(records, ask(backend, records, 16), strict=True):
        assert digest(asked.store.image("original")) == digest(record.image)
    assert len({record.cluster for record in records}) == 4


@pytest.mark.parametrize("own", [{}, {"id": ["same", "same", "same"]}, {"image_id": ["a", "b", "b"]}])
def test_several_questions_about_an_image_are_several_records(tmp_path: Path, own: dict[str, list[str]]) -> None:
    """Rollouts of one record are a group: two questions in it would be compared with each other."""
    rows = {"image": [picture(0), picture(0), picture(1)], "question": ["a?", "b?", "a?"], "answer": ["x", "y", "z"]}
    Dataset.from_dict({**rows, **own}).save_to_disk(str(tmp_path / "table"))
    records = load_records([DatasetSpec(path=str(tmp_path / "table"))])
    assert records[0].id != records[1].id
    assert records[0].cluster == records[1].cluster != records[2].cluster


@given(st.lists(st.integers(1, 50), min_size=1, max_size=6), st.integers(1, 200))
def test_shares_are_in_proportion_and_add_up(sizes: list[int], limit: int) -> None:
    shares, total = spread(sizes, limit), sum(sizes)
    assert sum(shares) == min(limit, total)
    for share, size in zip(shares, sizes, strict=True):
        assert 0 <= share <= size and abs(share - size * min(limit, total) / total) < 1


@pytest.mark.parametrize(
    ("columns", "told"), [({}, "no column image and no column question"), ({"image": "ask"}, "no column question")]
)
def test_a_missing_column_is_named(tmp_path: Path, columns: dict[str, str], told: str) -> None:
    Dataset.from_dict({"ask": ["a?"], "answer": ["x"]}).save_to_disk(str(tmp_path / "table"))
    with pytest.raises(ConfigError, match=told) as caught:
        load_records([DatasetSpec(path=str(tmp_path / "table"), columns=columns)])
    assert "it has ask, answer" in str(caught.value) and "`columns`" in str(caught.value)


def test_what_cannot_be_read_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="nothing-there"):
        load_records([DatasetSpec(path=str(tmp_path / "nothing-there"))])


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
