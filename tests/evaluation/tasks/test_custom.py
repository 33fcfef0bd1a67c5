"""A user's own questions, and how tasks are found."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from qzoom_agent import Agent
from qzoom_agent.cli.main import main
from qzoom_agent.data.samples import Samples, TaskSource
from qzoom_agent.errors import ConfigError, ImageError
from qzoom_agent.evaluation.runner import evaluate
from qzoom_agent.evaluation.tasks.catalog import TASKS, find_task
from qzoom_agent.evaluation.tasks.custom import custom_task, task_name
from qzoom_agent.evaluation.tasks.needle import TASK_NAMES as NEEDLE
from qzoom_agent.evaluation.tasks.needle import sample, sample_seed
from qzoom_agent.geometry import Box
from qzoom_agent.messages import Message, view_ids
from qzoom_agent.models.scripted import ScriptedBackend
from qzoom_agent.training.branches.dataset import DatasetSpec, load_records
from tests.evaluation.tasks import files, fixtures


def written(folder: Path, *rows: dict[str, Any]) -> Samples:
    files.draw("own").save(folder / "own.png")
    lines = (json.dumps({"image": "own.png", "question": "What?"} | row) for row in rows)
    (folder / "my questions.jsonl").write_text("\n".join(lines))
    return find_task(str(folder)).load(TaskSource())


def test_the_limit_on_pictures_can_be_set(tmp_path: Path) -> None:
    written(tmp_path, {"answer": 7})
    task = find_task(str(tmp_path))
    with pytest.raises(ImageError, match="over the limit of 9 px"):
        task.load(TaskSource(max_pixels=9))[0]


def test_a_run_knows_the_table_that_it_was_given_in_python(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """It is scored again by the command, and another table of the name is refused."""
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        written(tmp_path / name, {"answer": 7})
    agent = Agent(ScriptedBackend(lambda _: "7"), policy="direct")
    table, other = (tmp_path / name / "my questions.jsonl" for name in ("a", "b"))
    for task in (str(table), find_task(str(table))):
        evaluate(agent, [task], out=tmp_path / "run")
    assert main(["eval", "rescore", str(tmp_path / "run")]) == 0
    assert "accuracy (rule)  1.000" in capsys.readouterr().out
    with pytest.raises(ConfigError, match=r"path '.*/a/my questions\.jsonl' then, '.*/b/my questions\.jsonl' now"):
        evaluate(agent, [str(other)], out=tmp_path / "run")


def test_open_questions_and_choices(tmp_path: Path) -> None:
    read = written(
        tmp_path,
        {"answer": 7, "box": [8, 8, 40, 24]},
        {"answers": ["red", "crimson"], "boxes": [[0, 0, 5, 5], [1, 1, 2, 2]], "kind": "colour", "id": "r1"},
        {"answer": "blue", "options": ["red", "blue"], "category": "choice"},
        {"answer": "(a)", "options": ["red", "blue"]},
        {"answer": True, "note": "left alone"},
    )
    number, colour, choice, letter, truth = read
    assert (number.answer, number.boxes, number.id) == ("7", (Box(8, 8, 40, 24),), f"{tmp_path.name}-0")
    assert (colour.answers, colour.kind, colour.id) == (("red", "crimson"), "colour", f"{tmp_path.name}-r1")
    assert len(colour.boxes) == 2 and number.cluster == colour.cluster
    assert choice.question.splitlines()[1:3] == ["(A) red", "(B) blue"] and choice.answer == "B"
    assert letter.answer == "A" and truth.answer == "true"
    assert list(read.kinds) == ["all", "colour", "choice", "all", "all"]
    (name, scorer), *others = find_task(str(tmp_path)).scorers.items()
    assert name == "rule" and not others
    assert scorer("The answer is Crimson.", colour) == (1, "Crimson")
    assert scorer("it is blue", choice) == (1, "B") and scorer("red", choice) == (0, "A")
    assert scorer("", colour) == (0, None)


def test_every_wrong_row_is_named_before_anything_is_asked(tmp_path: Path) -> None:
    with pytest.raises(ConfigError) as caught:
        written(
            tmp_path,
            {"answer": "fine"},
            {},
            {"answer": "green", "options": ["red", "blue"]},
            {"answer": "x", "box": [1, 2, 3]},
            {"answer": "x", "question": None},
            {"answer": "x", "boxes": "[[1, 2"},
            {"answer": ""},
            {"answers": []},
        )
    said = str(caught.value)
    assert "row 2: there is neither an answer nor answers" in said
    assert "row 3: the answer 'green' is none of the options red, blue" in said
    assert "row 4: box [1, 2, 3] is no box" in said and "row 5: there is no question" in said and "row 6: " in said
    assert "; and 2 more. Mend" in said


def test_a_box_that_two_columns_say_is_one(tmp_path: Path) -> None:
    """As shares of the image it is the same but for rounding."""
    both = {"answer": 7, "box": [10, 20, 31, 40], "box_xywh": [50, 50, 9, 9]}
    width, height = files.draw("own").size
    shares = [10 / width, 20 / height, 31 / width, 40 / height + 1e-9]
    (read,) = written(tmp_path, both | {"box_unit": shares})
    assert [tuple(map(round, box.corners)) for box in read.boxes] == [(10, 20, 31, 40), (50, 50, 59, 59)]


def test_ids_are_used_once(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="two rows have the id 'a'"):
        written(tmp_path, {"answer": "x", "id": "a"}, {"answer": "y", "id": "a"})
    with pytest.raises(ConfigError, match="row 3: two rows have the id '2', this one by its number from 0"):
        written(tmp_path, {"answer": "x", "id": 2}, {"answer": "y"}, {"answer": "z"})


@pytest.mark.parametrize("kind", [".csv", ".tsv", ".parquet", ".json"])
def test_other_tables(tmp_path: Path, kind: str) -> None:
    files.draw("own").save(tmp_path / "own.png")
    row = {"image": "own.png", "question": "What?", "answer": "042", "boxes": "[[1, 2, 3, 4]]", "kind": "code"}
    file = tmp_path / f"table{kind}"
    if kind == ".parquet":
        files.parquet(files.dataset([row]), file)
    elif kind == ".json":
        file.write_text(json.dumps([row]))
    else:
        separator = {".csv": ",", ".tsv": "\t"}[kind]
        cells = ('"[[1, 2, 3, 4]]"' if name == "boxes" else cell for name, cell in row.items())
        file.write_text(separator.join(row) + "\n" + separator.join(cells) + "\n")
    (only,) = find_task(str(file)).load(TaskSource())
    assert (only.answer, only.boxes, only.kind, only.task) == ("042", (Box(1, 2, 3, 4),), "code", "table")
    assert only.image.size == (96, 64)


@pytest.mark.parametrize(
    ("file", "name"),
    [
        ("my questions?.csv", "my-questions"),
        ("दिन.csv", "दिन"),
        ("วันนี้.csv", "วันนี้"),
        ("n\u0303.csv", "\u00f1"),
        ("a--b.csv", "a--b"),
        ("\u2764\ufe0f.csv", "own"),
    ],
)
def test_a_task_keeps_the_letters_of_its_file(tmp_path: Path, file: str, name: str) -> None:
    assert task_name(tmp_path / file) == name


def test_a_folder_holds_one_table(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="it holds none"):
        find_task(str(tmp_path)).load(TaskSource())
    for name in ("a.csv", "b.jsonl"):
        (tmp_path / name).write_text("")
    with pytest.raises(ConfigError, match=r"it holds a\.csv, b.jsonl. Give the file itself"):
        find_task(str(tmp_path)).load(TaskSource())
    with pytest.raises(ConfigError, match=r"no column image.*or add it to the table"):
        find_task(str(tmp_path / "b.jsonl")).load(TaskSource())


def test_a_wrong_name_gets_the_close_ones() -> None:
    with pytest.raises(ConfigError, match=r"Known: .*needle-global.*Did you mean hrbench-4k or hrbench-8k"):
        find_task("HRBench_4k")
    assert find_task("chartqa") is TASKS["chartqa"]


def test_the_catalogue_is_cheap_and_whole() -> None:
    code = (
        "import sys; from qzoom_agent.evaluation.tasks.catalog import TASKS; "
        "heavy = {'datasets', 'torch', 'transformers', 'pandas', 'huggingface_hub'}; "
        "print(sorted(heavy & set(sys.modules)), len(TASKS))"
    )
    printed = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert printed.split() == ["[]", str(len(NEEDLE) + 1 + len(fixtures.WRITERS))]
    for name, task in TASKS.items():
        assert name == task.name and task.title and next(iter(task.scorers)) in ("faithful", "clean", "rule", "exact")


def test_needle_tasks_are_drawn() -> None:
    task = find_task("needle-doc")
    read = task.load(TaskSource(n=3, seed=2, split="ood"))
    drawn = [sample("needle-doc", sample_seed(2, index), split="ood") for index in range(3)]
    assert [one.id for one in read] == [one.id for one in drawn] and len(read) == 3
    assert list(read.kinds) == [one.kind for one in drawn]
    assert task.scorers["exact"](drawn[0].answer, read[0]) == (1, drawn[0].answer)
    assert len(task.load(TaskSource())) == 100
    with pytest.raises(IndexError):
        read[3]


@pytest.mark.parametrize(
    "source",
    [TaskSource(n=0), TaskSource(n=1_000_001), TaskSource(seed=-1), TaskSource(path="x"), TaskSource(split="dev")],
)
def test_needle_tasks_refuse_what_cannot_be(source: TaskSource) -> None:
    with pytest.raises(ConfigError):
        find_task("needle-doc").load(source)


def test_a_row_may_have_several_images(tmp_path: Path) -> None:
    for name, colour in (("a.png", "red"), ("b.png", "blue")):
        Image.new("RGB", (60, 40), colour).save(tmp_path / name)
    rows = [{"images": ["a.png", "b.png"], "question": "which is red?", "answer": "the first"}]
    rows.append({"images": ["b.png"], "question": "which colour?", "answer": "blue"})
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    two, one = custom_task(tmp_path / "rows.jsonl").load(TaskSource())
    assert [image.getpixel((0, 0)) for image in two.images] == [(255, 0, 0), (0, 0, 255)]
    assert one.others == ()
    told: list[int] = []

    def reply(messages: list[Message]) -> str:
        told.append(len(view_ids(messages)))
        return "the first"

    agent = Agent(ScriptedBackend(reply), policy="direct")
    run = evaluate(agent, [custom_task(tmp_path / "rows.jsonl")], out=tmp_path / "run")
    assert told == [2, 1] and run is not None


def test_a_column_may_have_a_point_in_its_name(tmp_path: Path) -> None:
    """Flattened tables have such columns; elsewhere the point stands before a field of a record."""
    files.draw("own").save(tmp_path / "own.png")
    table = tmp_path / "flat.csv"
    table.write_text("image,question,meta.answer,No.\nown.png,What?,red,r1\n")
    (one,) = find_task(str(table)).load(TaskSource(columns={"answer": "meta.answer", "id": "No."}))
    assert (one.answer, one.id) == ("red", "flat-r1")
    row = load_records([DatasetSpec(path=str(table), columns={"answer": "meta.answer"})])[0]
    assert row.answer == "red"
    nested = tmp_path / "nested.jsonl"
    records: list[Any] = [{"said": "red"}, None]
    nested.write_text("\n".join(json.dumps({"image": "own.png", "question": "What?", "meta": one}) for one in records))
    task = find_task(str(nested))
    assert task.load(TaskSource(columns={"answer": "meta.said"}, skip_bad=True))[0].answer == "red"
    with pytest.raises(
        ConfigError, match=r"no field 'sad' for 'meta\.sad' in the column 'meta': its fields are said; row 2"
    ):
        task.load(TaskSource(columns={"answer": "meta.sad"}))
