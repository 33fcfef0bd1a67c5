"""Files as their publishers give them, and VLMEvalKit's tables: their columns, our own pictures and texts."""

from __future__ import annotations

import base64
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
from datasets import ClassLabel, Image, List, Value

from qzoom_agent.data.rows import open_path
from qzoom_agent.data.samples import TaskSource
from qzoom_agent.errors import ConfigError
from qzoom_agent.evaluation.tasks.catalog import TASKS, find_task, unscored
from qzoom_agent.training.branches.dataset import DatasetSpec, load_records
from tests.evaluation.tasks import files, fixtures


def ocrbench(folder: Path) -> Path:
    """OCRBench/OCRBench.json beside OCRBench_Images/, as MultimodalOCR has them; one answer may be a text."""
    asked = [
        ("IIIT5K", "Regular Text Recognition", "CENTRE"),
        ("STVQA", "Scene Text-centric VQA", ["12", "twelve"]),
        ("HME100k", "Handwritten Mathematical Expression Recognition", ["x ^ { 2 } + y"]),
    ]
    rows = [
        {
            "dataset_name": name,
            "type": kind,
            "id": number,
            "image_path": f"{name}/{number}.jpg",
            "question": "what is written in the image?",
            "answers": answers,
        }
        for number, (name, kind, answers) in enumerate(asked)
    ]
    for row in rows:
        at = folder / "OCRBench_Images" / str(row["image_path"])
        at.parent.mkdir(parents=True)
        files.draw(str(row["id"])).save(at)
    return written(folder / "OCRBench" / "OCRBench.json", rows)


def chartqa(folder: Path) -> Path:
    """test/test_human.json beside test/png/."""
    (folder / "png").mkdir(parents=True)
    files.draw("chart").save(folder / "png" / "4170.png")
    asked = [("How many bars?", "14"), ("Which two are they?", "[Yes, No]")]
    rows = [{"imgname": "4170.png", "query": query, "label": label} for query, label in asked]
    return written(folder / "test_human.json", rows)


def docvqa(folder: Path, *, answered: bool = True) -> Path:
    """val_v1.0.json, whose images lie in documents/."""
    (folder / "documents").mkdir(parents=True)
    files.draw("page").save(folder / "documents" / "abcd0001_7.png")
    row = {
        "questionId": 49153,
        "question": "What is the page number?",
        "question_types": ["layout"],
        "image": "documents/abcd0001_7.png",
        "docId": 5,
        "ucsf_document_id": "abcd0001",
        "ucsf_document_page_no": "7",
        "data_split": "val",
    }
    rows = [row | ({"answers": ["7", "page 7"]} if answered else {}), row | {"questionId": 49154, "answers": ["x"]}]
    head = {"dataset_name": "docvqa", "dataset_split": "val", "dataset_version": "1.0"}
    if not answered:
        rows = [{key: cell for key, cell in one.items() if key != "answers"} for one in rows]
    return written(folder / "val_v1.0.json", head | {"data": rows})


def textvqa(folder: Path) -> Path:
    """TextVQA_0.5.1_val.json; images by their id in train_images/, as the publisher's archive has them."""
    (folder / "train_images").mkdir(parents=True)
    files.draw("nokia").save(folder / "train_images" / "003a8ae2ef43b901.jpg")
    row = {
        "question": "what is the brand?",
        "image_id": "003a8ae2ef43b901",
        "image_classes": ["Mobile phone"],
        "flickr_original_url": "",
        "flickr_300k_url": "",
        "image_width": 96,
        "image_height": 64,
        "answers": ["nokia"] * 9 + ["noka"],
        "question_tokens": ["what", "is", "the", "brand"],
        "question_id": 34602,
        "set_name": "val",
    }
    head = {"dataset_type": "val", "dataset_name": "textvqa", "dataset_version": "0.5.1"}
    return written(folder / "TextVQA_0.5.1_val.json", head | {"data": [row]})


def written(path: Path, data: Any) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(data))
    return path


CASES: Sequence[tuple[str, Callable[[Path], Path], str, tuple[str, ...], str]] = [
    ("ocrbench", ocrbench, "ocrbench-0", ("CENTRE",), "Regular Text Recognition"),
    ("chartqa", chartqa, "chartqa-0", ("14",), "human_test"),
    ("docvqa", docvqa, "docvqa-49153", ("7", "page 7"), "layout"),
    ("textvqa", textvqa, "textvqa-34602", ("nokia",) * 9 + ("noka",), "all"),
]


@pytest.mark.parametrize(("name", "make", "id", "answers", "kind"), CASES, ids=[case[0] for case in CASES])
def test_a_publishers_file(
    tmp_path: Path, name: str, make: Callable[[Path], Path], id: str, answers: tuple[str, ...], kind: str
) -> None:
    read = TASKS[name].load(TaskSource(path=str(make(tmp_path / "copy"))))
    first = read[0]
    assert (first.id, first.answers, first.kind, read.kinds[0]) == (id, answers, kind, kind)
    assert first.image.size == (96, 64) and first.question
    assert read.problems(range(len(read))) == {}  # type: ignore[attr-defined]
    if name == "ocrbench":
        assert [one.meta["dataset"] for one in read] == ["IIIT5K", "STVQA", "HME100k"]


def test_chartqa_as_a_table_with_lists_and_classes(tmp_path: Path) -> None:
    """The columns and types of HuggingFaceM4/ChartQA."""
    image = files.picture("chart")
    rows = [
        {"image": image, "query": "How many?", "label": ["14"], "human_or_machine": 0},
        {"image": image, "query": "Which?", "label": ["[Yes, No]"], "human_or_machine": 1},
    ]
    classes = ClassLabel(names=["human", "machine"])
    columns = {"image": Image(), "label": List(Value("string")), "human_or_machine": classes}
    path = files.parquet(files.dataset(rows, columns), tmp_path / "ChartQA.parquet")
    read = TASKS["chartqa"].load(TaskSource(path=str(path)))
    assert [one.answers for one in read] == [("14",), ("[Yes, No]",)]
    assert list(read.kinds) == ["human_test", "augmented_test"]
    assert TASKS["chartqa"].scorers["faithful"]("14.5", read[0]).value == 1.0  # type: ignore[arg-type,union-attr]


@pytest.mark.parametrize("name", ["docvqa", "textvqa"])
def test_answers_as_records_of_the_vqa_challenges(name: str, tmp_path: Path) -> None:
    answers = [{"answer": text, "answer_confidence": "yes", "answer_id": at} for at, text in enumerate(("a", "b"))]
    row = {"question": "?", "image": files.base64_png(files.draw("a")), "answers": answers}
    path = written(tmp_path / "rows.json", [row, row | {"answers": [{"text": "a"}]}])
    read = TASKS[name].load(TaskSource(path=str(path)))
    assert read[0].answers == ("a", "b")
    with pytest.raises(ConfigError, match=r"Row 2 .*cannot be asked: KeyError: 'answer'"):
        read[1]


def test_a_publishers_file_as_questions_of_ones_own_and_for_training(tmp_path: Path) -> None:
    path = docvqa(tmp_path)
    assert [one.answers for one in find_task(str(path)).load(TaskSource())] == [("7", "page 7"), ("x",)]
    assert [load_records([DatasetSpec(path=str(path))])[at].answers for at in range(2)] == [("7", "page 7"), ("x",)]


def vlmevalkit(folder: Path) -> Path:
    """A TSV whose second row shows the image of the first; options as columns, a picture of 300 kB in base64."""
    noisy = files.Pillow.effect_noise((600, 600), 90)
    data = base64.b64encode(files.png(noisy)).decode()
    assert len(data) > 200_000  # more than the csv module takes in a cell unless it is told to
    rows = [
        {"index": "7", "question": 'Which "one"\tis it?', "A": "red", "B": "blue", "C": "", "D": "", "answer": "B"},
        {"index": "8", "question": "And now?", "A": "1", "B": "2", "C": "3", "D": "4", "answer": "D"},
    ]
    return fixtures.tsv(
        [{"image": image, "category": "colour"} | row for image, row in zip((data, "7"), rows, strict=True)],
        folder / "Mine.tsv",
    )


def test_vlmevalkits_table(tmp_path: Path) -> None:
    path = vlmevalkit(tmp_path)
    first, second = find_task(str(path)).load(TaskSource())
    assert first.options == ("red", "blue") and first.answer == "B" and first.kind == "colour"
    assert first.question.startswith('Which "one"\tis it?\n(A) red\n(B) blue')
    assert second.image.size == first.image.size == (600, 600) and second.answer == "D"
    assert load_records([DatasetSpec(path=str(path))])[1].answer == "D"
    assert open_path(path)[1]["index"] == "8"


def test_vlmevalkits_table_with_paths(tmp_path: Path) -> None:
    files.draw("one").save(tmp_path / "one.png")
    row = {"index": 0, "question": "Is it?", "answer": "yes", "image_path": "one.png", "category": "x"}
    (only,) = find_task(str(fixtures.tsv([row], tmp_path / "Mine.tsv"))).load(TaskSource())
    assert only.image.size == (96, 64) and only.answer == "yes"


def test_a_table_of_answers_as_vlmevalkit_writes_them(tmp_path: Path) -> None:
    row = {"index": 3, "question": "who?", "answer": "['Ann', 'A.']", "image": files.base64_png(files.draw("a"))}
    (only,) = TASKS["docvqa"].load(TaskSource(path=str(fixtures.tsv([row], tmp_path / "DocVQA_VAL.tsv"))))
    assert (only.id, only.answers) == ("docvqa-3", ("Ann", "A."))


@pytest.mark.parametrize(
    ("text", "told"),
    [("a\ta\n1\t2\n", "two columns 'a'"), ("question\tanswer\n1\t2\t3\n", "has 3 cells, but there are 2 columns")],
)
def test_a_wrong_table_is_named(tmp_path: Path, text: str, told: str) -> None:
    (tmp_path / "t.tsv").write_text(text)
    with pytest.raises(ConfigError, match=told):
        list(open_path(tmp_path / "t.tsv").data)


def test_a_split_without_answers_is_asked_where_that_is_said(tmp_path: Path) -> None:
    path = docvqa(tmp_path, answered=False)
    with pytest.raises(ConfigError, match="lacks the column answers"):
        TASKS["docvqa"].load(TaskSource(path=str(path)))
    first, _ = TASKS["docvqa"].load(TaskSource(path=str(path), answered=False))
    assert first.answers == () and first.id == "docvqa-49153"
    task = unscored(TASKS["docvqa"])
    assert list(task.scorers) == ["replied"] and task.scorers["replied"]("7", first) == (1, "7")
    (own, _) = find_task(str(path)).load(TaskSource(answered=False))
    assert own.answers == ()
