"""A row means the same in evaluation and in training: read alike, or refused alike before a model is loaded."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
from PIL import Image

from qzoom_agent.data.rows import RowSamples
from qzoom_agent.data.samples import Sample, TaskSource
from qzoom_agent.errors import ConfigError
from qzoom_agent.evaluation.tasks.custom import custom_task
from qzoom_agent.geometry import Box
from qzoom_agent.training.branches.dataset import DatasetSpec, load_records
from tests.evaluation.tasks import files, fixtures

SIZE = (400, 300)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with images, for the tables of all tests."""
    made = tmp_path_factory.mktemp("rows")
    for name in ("a.png", "b.png", "data/0.jpg"):
        (made / name).parent.mkdir(exist_ok=True)
        files.draw(name, size=SIZE).save(made / name)
    return made


class Read(NamedTuple):
    """What both entry paths give for a row."""

    question: str
    answers: tuple[str, ...]
    boxes: tuple[tuple[float, ...], ...] | None


def evaluated(path: Path, *, skip_bad: bool = False) -> list[Read]:
    samples = custom_task(path).load(TaskSource(skip_bad=skip_bad))
    assert isinstance(samples, RowSamples)
    wrong = samples.problems(range(len(samples)))
    if wrong and not skip_bad:
        raise ConfigError("; ".join(wrong.values()))
    return read_of(samples[at] for at in range(len(samples)) if at not in wrong)


def trained(path: Path, *, skip_bad: bool = False) -> list[Read]:
    records = load_records([DatasetSpec(path=str(path), skip_bad=skip_bad)])
    return read_of(records[at] for at in range(len(records)))


def read_of(samples: Iterable[Sample]) -> list[Read]:
    read = []
    for one in samples:
        boxes = None if one.known_boxes is None else tuple(tuple(box.as_list()) for box in one.known_boxes)
        read.append(Read(one.question, one.answers, boxes))
    return read


ENTRIES = pytest.mark.parametrize("entry", [evaluated, trained])


def table(folder: Path, *rows: dict[str, Any], kind: str = ".jsonl") -> Path:
    whole = [
        ({} if {"image", "images"} & row.keys() else {"image": "a.png"}) | {"question": "What?"} | row for row in rows
    ]
    path = folder / f"mine{kind}"
    if kind == ".jsonl":
        path.write_text("\n".join(map(json.dumps, whole)))
    else:
        fixtures.tsv([{name: _written(cell) for name, cell in row.items()} for row in whole], path)
    return path


def _written(cell: Any) -> Any:
    return cell if isinstance(cell, str | int | float) else json.dumps(cell)


CHOICE = "What?\n(A) red\n(B) green\nAnswer with the option's letter from the given choices directly."
READ: list[tuple[dict[str, Any], Read]] = [
    ({"options": {"A": "red", "B": "green"}, "answer": "B"}, Read(CHOICE, ("B",), None)),
    ({"options": {"B": "green", "A": "red", "C": None}, "answer": "green"}, Read(CHOICE, ("B",), None)),
    ({"choices": {"text": ["red", "green"], "label": ["A", "B"]}, "answer": "B"}, Read(CHOICE, ("B",), None)),
    ({"A": "red", "B": "green", "answer": "B"}, Read(CHOICE, ("B",), None)),
    ({"A": "red", "B": "green", "C": "", "D": None, "answer": "A"}, Read(CHOICE, ("A",), None)),
    ({"option_a": "red", "option_b": "green", "answer": "a"}, Read(CHOICE, ("A",), None)),
    ({"choices": ["red", "green"], "answer": 1}, Read(CHOICE, ("B",), None)),
    ({"choices": ["red", "green"], "answer": 0}, Read(CHOICE, ("A",), None)),
    ({"options": ["A. red", "B. green"], "answer": "B"}, Read(CHOICE, ("B",), None)),
    ({"options": ["(a) red", "(b) green"], "answer": "(b) green"}, Read(CHOICE, ("B",), None)),
    ({"options": ["1. red", "2. green"], "answer": "1"}, Read(CHOICE, ("A",), None)),
    ({"options": "A. red\nB. green", "answer": "B."}, Read(CHOICE, ("B",), None)),
    ({"options": "['red', 'green']", "answer": "Green"}, Read(CHOICE, ("B",), None)),
    ({"options": ["\uff21\uff0ered", "\uff22\uff0egreen"], "answer": "green"}, Read(CHOICE, ("B",), None)),
    ({"options": ["A\u3001red", "B\u3001green"], "answer": "\uff08B\uff09"}, Read(CHOICE, ("B",), None)),
    ({"options": ["red", "green"], "answer": "\uff22\u3001green"}, Read(CHOICE, ("B",), None)),
    ({"options": ["red", "green"], "answers": ["B", "green"]}, Read(CHOICE, ("B",), None)),
    ({"options": ["red", "green"], "answer": "<answer>B</answer>"}, Read(CHOICE, ("B",), None)),
    ({"question": "What?\n(A) red\n(B) green", "answer": "B"}, Read(CHOICE, ("B",), None)),
    ({"answer": ["14"]}, Read("What?", ("14",), None)),
    ({"answer": '["14", "fourteen"]'}, Read("What?", ("14", "fourteen"), None)),
    ({"answer": "[Yes, No]"}, Read("What?", ("[Yes, No]",), None)),
    ({"answers": [{"answer": "14", "answer_id": 1}, {"answer": "xiv"}]}, Read("What?", ("14", "xiv"), None)),
    ({"answer": True}, Read("What?", ("true",), None)),
    ({"answer": "<answer>1</answer>"}, Read("What?", ("1",), None)),
    ({"answer": "<think>two</think> <answer> 1 </answer>"}, Read("What?", ("1",), None)),
    ({"answer": r"$\boxed{12.5}$"}, Read("What?", ("12.5",), None)),
    ({"question": "<image>\nWhat is written?", "answer": "x"}, Read("What is written?", ("x",), None)),
    ({"question": "<image 1> What?", "answer": "x"}, Read("What?", ("x",), None)),
    (
        {"question": "What is in <image 1>, and why?", "answer": "x"},
        Read("What is in the image, and why?", ("x",), None),
    ),
    ({"question": "<|vision_start|><|image_pad|><|vision_end|>What?", "answer": "x"}, Read("What?", ("x",), None)),
    ({"box": [1, 2, 30, 40], "answer": "x"}, Read("What?", ("x",), ((1, 2, 30, 40),))),
    ({"box": ["1", "2", "30", "40"], "answer": "x"}, Read("What?", ("x",), ((1, 2, 30, 40),))),
    ({"bbox": [1, 2, 30, 40], "answer": "x"}, Read("What?", ("x",), ((1, 2, 30, 40),))),
    ({"bbox_2d": [1, 2, 30, 40], "answer": "x"}, Read("What?", ("x",), ((1, 2, 30, 40),))),
    ({"targetBox": [1, 2, 30, 40], "answer": "x"}, Read("What?", ("x",), ((1, 2, 30, 40),))),
    ({"target_box": [1, 2, 30, 40], "answer": "x"}, Read("What?", ("x",), ((1, 2, 30, 40),))),
    (
        {"Boxes": [[1, 2, 30, 40], [0, 0, 400.5, 300]], "answer": "x"},
        Read("What?", ("x",), ((1, 2, 30, 40), (0, 0, 400, 300))),
    ),
    ({"box_xywh": [1, 2, 30, 40], "answer": "x"}, Read("What?", ("x",), ((1, 2, 31, 42),))),
    ({"box_norm": [0.1, 0.1, 0.5, 0.5], "answer": "x"}, Read("What?", ("x",), ((40, 30, 200, 150),))),
    ({"bbox_per_mille": [100, 100, 500, 500], "answer": "x"}, Read("What?", ("x",), ((40, 30, 200, 150),))),
    ({"boxes": [], "answer": "x"}, Read("What?", ("x",), ())),
    ({"boxes": None, "answer": "x"}, Read("What?", ("x",), None)),
    ({"images": ["data/0.jpg"], "answer": "x"}, Read("What?", ("x",), None)),
    ({"image": ["b.png"], "answer": "x"}, Read("What?", ("x",), None)),
    ({"query": "Why?", "question": None, "label": "x"}, Read("What?", ("x",), None)),
    ({"options": [], "answer": "x"}, Read("What?", ("x",), None)),
    ({"options": "[]", "answer": "x"}, Read("What?", ("x",), None)),
    ({"options": {"A": None, "B": None}, "answer": "x"}, Read("What?", ("x",), None)),
    ({"choices": {"label": [], "text": []}, "answer": "x"}, Read("What?", ("x",), None)),
]
REFUSED: list[tuple[dict[str, Any], str]] = [
    ({"options": "red, blue", "answer": "A"}, "options are a list"),
    ({"options": ["red"], "answer": "A"}, "2 to 26 options"),
    ({"options": ["red", "red"], "answer": "A"}, "'red' stands twice"),
    ({"options": ["red", ""], "answer": "A"}, "an option is empty"),
    ({"options": [{"a": 1}, "b"], "answer": "A"}, "a text is needed, not dict"),
    ({"options": ["red", "blue"], "answer": 2}, "2 is none of the options red, blue"),
    ({"options": ["red", "blue"], "answer": "A. blue"}, "is none of the options"),
    ({"options": ["yes", "Yes"], "answer": "YES"}, "may mean"),
    ({"options": ["1", "2", "3"], "answer": 1}, "may mean"),
    ({"options": ["red", "blue"], "answers": ["A", "B"]}, "are all right"),
    ({"A": "red", "B": "", "C": "blue", "answer": "A"}, "the option in column B is empty"),
    ({"options": ["red", "blue"], "A": "red", "B": "grey", "answer": "A"}, "differ"),
    ({"answers": None}, "neither an answer nor"),
    ({"answers": []}, "neither an answer nor"),
    ({"answer": ""}, "neither an answer nor"),
    ({"answer": float("nan")}, "neither an answer nor"),
    ({"answer": {"text": ["x"]}}, "neither an answer nor"),
    ({"answer": "<answer>1"}, "one <answer>"),
    ({"question": " ", "answer": "x"}, "question is empty"),
    ({"question": "<image>\n", "answer": "x"}, "question is empty"),
    ({"question": None, "answer": "x"}, "no question"),
    ({"question": "<image 1> or <image 2>?", "answer": "x"}, "several images"),
    ({"question": "<image><image> Which?", "answer": "x"}, "several images"),
    ({"box": [0.1, 0.1, 0.3, 0.3], "answer": "x"}, "looks like shares"),
    ({"box": [300, 300, 100, 100], "answer": "x"}, "x1 < x2"),
    ({"box": [9000, 10, 9900, 90], "answer": "x"}, r"not inside its image of 400 x 300 px"),
    ({"box": [100, 100, 900, 900], "answer": "x"}, r"not inside its image"),
    ({"box": [1, 2, "NaN", 4], "answer": "x"}, "finite"),
    ({"box": [1, 2, float("inf"), 4], "answer": "x"}, "finite"),
    ({"box": [1, 2, 3], "answer": "x"}, "is no box"),
    ({"boxes": [[1, 2, 3, 4, 5]], "answer": "x"}, "is no box"),
    ({"box": "here", "answer": "x"}, "is no box"),
    ({"box": {"x1": 1}, "answer": "x"}, "is no box"),
    ({"bbox_norm": [0.1, 0.1, 1.3, 0.3], "answer": "x"}, "not inside"),
    ({"image": "gone.png", "answer": "x"}, "neither a file in"),
    ({"image": None, "answer": "x"}, "no image in the cell"),
    ({"image": "mine.jsonl", "answer": "x"}, "Not an image"),
    ({"anwser": "x", "answer": "y"}, "'anwser'.*mean 'answer'"),
    ({"optons": ["red", "blue"], "answer": "A"}, "'optons'.*mean 'options'"),
    ({"box_2d": [1, 2, 30, 40], "answer": "x"}, "'box_2d'.*mean 'box'"),
    ({"region": [1, 2, 30, 40], "answer": "x"}, "'region'.*mean 'box'"),
    ({"box2d": [1, 2, 30, 40], "answer": "x"}, "'box2d'.*mean 'box'"),
    ({"Answer": "x", "answer": "y"}, "the columns 'Answer' and 'answer'"),
    ({"boundingbox": [1, 2, 30, 40], "answer": "x"}, "'boundingbox'.*mean 'box'"),
]


@ENTRIES
@pytest.mark.parametrize(("row", "wanted"), READ)
def test_read(folder: Path, entry: Callable[[Path], list[Read]], row: dict[str, Any], wanted: Read) -> None:
    if row.get("question", "") is None:
        row = {key: cell for key, cell in row.items() if key != "question"}
        wanted = wanted._replace(question="What?")
    (found,) = entry(table(folder, row))
    assert found == wanted


@pytest.mark.parametrize("column", ["image", "images"])
def test_several_images_are_evaluated_and_not_trained_on(folder: Path, column: str) -> None:
    path = table(folder, {column: ["a.png", "b.png"], "question": "the first or the second?", "answer": "first"})
    assert evaluated(path) == [Read("the first or the second?", ("first",), None)]
    with pytest.raises(ConfigError, match="2 images"):
        trained(path)


@ENTRIES
@pytest.mark.parametrize(("row", "told"), REFUSED)
def test_refused(folder: Path, entry: Callable[[Path], list[Read]], row: dict[str, Any], told: str) -> None:
    with pytest.raises(ConfigError, match=told) as caught:
        entry(table(folder, row))
    assert "\n" not in str(caught.value)


@ENTRIES
def test_a_table_of_texts(folder: Path, entry: Callable[[Path], list[Read]]) -> None:
    row = {"options": ["red", "green"], "answer": "B", "boxes": [[1, 2, 30, 40]]}
    assert entry(table(folder, row, kind=".tsv")) == [Read(CHOICE, ("B",), ((1, 2, 30, 40),))]


@ENTRIES
def test_bad_rows_are_named_or_left_out(folder: Path, entry: Callable[..., list[Read]]) -> None:
    rows = [
        {"answer": "1"},
        {"answer": None},
        {"image": "gone.png", "answer": "2"},
        {"answer": "3", "box": [500, 1, 600, 2]},
    ]
    path = table(folder, *rows)
    with pytest.raises(ConfigError, match="neither an answer nor"):
        entry(path)
    assert [one.answers for one in entry(path, skip_bad=True)] == [("1",)]
    with pytest.raises(ConfigError, match="no row is left"):
        entry(table(folder, *rows[1:2]), skip_bad=True)


def test_training_names_file_row_and_reason(folder: Path) -> None:
    path = table(folder, {"answer": "1"}, {"answer": "2", "box": [1, 2, 3]})
    with pytest.raises(
        ConfigError, match=r"mine.jsonl has 1 of 2 rows .* row 2: box \[1, 2, 3\] is no box.*--skip-bad"
    ):
        trained(path)


def test_a_source_says_what_its_columns_are(folder: Path) -> None:
    path = table(folder, {"answer": "x", "where": [1, 2, 30, 40], "optons": "no list"})
    columns = {"boxes": "where", "options": ""}
    with pytest.raises(ConfigError, match=r"'optons'.*\(options: optons, or an empty name for none\)"):
        load_records([DatasetSpec(path=str(path), columns={"boxes": "where"})])
    assert load_records([DatasetSpec(path=str(path), columns=columns)])[0].options == ()
    with pytest.raises(ConfigError, match="what boxs is called"):
        load_records([DatasetSpec(path=str(path), columns={"boxs": "where"})])
    with pytest.raises(ConfigError, match="no column elsewhere"):
        load_records([DatasetSpec(path=str(path), columns={"boxes": "elsewhere", "options": "optons"})])
    path = table(folder, {"answer": "x", "where": [1, 2, 30, 40], "choices": "no list"})
    (found,) = [load_records([DatasetSpec(path=str(path), columns=columns)])[0]]
    assert found.boxes == (Box(1, 2, 30, 40),) and found.question == "What?"


def _pictures(folder: Path) -> dict[str, tuple[int, int, int]]:
    """Write files in forms that are easily read wrong, and return the colour that each shows at its first pixel."""
    new = Image.new
    new("RGBA", SIZE, (0, 0, 0, 0)).save(folder / "transparent.png")
    Image.fromarray(np.full(SIZE[::-1], 32896, np.uint16)).save(folder / "grey16.png")
    palette = new("P", SIZE, 1)
    palette.putpalette([255, 0, 0, 0, 0, 255])
    palette.save(folder / "palette.png")
    new("CMYK", SIZE, (0, 255, 255, 0)).save(folder / "cmyk.tif")
    turned = new("RGB", SIZE[::-1], "white")
    turned.paste("blue", (0, 0, SIZE[1], 10))
    exif = Image.Exif()
    exif[0x0112] = 3
    turned.rotate(90, expand=True).save(folder / "turned.png", exif=exif)
    return {
        "transparent.png": (255, 255, 255),
        "grey16.png": (128, 128, 128),
        "palette.png": (0, 0, 255),
        "cmyk.tif": (255, 0, 0),
        "turned.png": (255, 255, 255),
    }


def test_pixels_are_the_same_in_evaluation_and_training(tmp_path: Path) -> None:
    wanted = _pictures(tmp_path)
    path = tmp_path / "mine.jsonl"
    path.write_text("\n".join(json.dumps({"image": name, "question": "What?", "answer": "x"}) for name in wanted))
    samples, records = custom_task(path).load(TaskSource()), load_records([DatasetSpec(path=str(path))])
    for at, (name, colour) in enumerate(wanted.items()):
        shown, learned = samples[at].image, records[at].image
        assert shown.size == learned.size == SIZE and shown.tobytes() == learned.tobytes(), name
        assert shown.getpixel((0, 0)) == colour, name


def test_images_are_checked_at_their_header_and_at_their_end(tmp_path: Path) -> None:
    whole = tmp_path / "whole.jpg"
    files.draw("whole", size=SIZE).save(whole)
    (tmp_path / "cut.jpg").write_bytes(whole.read_bytes()[:-900])
    Image.new("L", (1, 201)).save(tmp_path / "thin.png")
    path = tmp_path / "mine.jsonl"
    rows = [{"image": name, "question": "What?", "answer": "x"} for name in ("cut.jpg", "thin.png", "whole.jpg")]
    path.write_text("\n".join(map(json.dumps, rows)))
    samples = custom_task(path).load(TaskSource())
    assert isinstance(samples, RowSamples)
    found = samples.problems(range(3))
    assert found.keys() == {0, 1} and "Cannot decode" in found[0] and "200:1" in found[1]
