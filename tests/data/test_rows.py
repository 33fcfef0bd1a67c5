"""Tables: what is read, what is refused, and where the hub is asked."""

from __future__ import annotations

import csv
import json
import pickle
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
from PIL import Image

from qzoom_agent.data.columns import find_columns, texts
from qzoom_agent.data.image_column import key, picture
from qzoom_agent.data.options import inline_options
from qzoom_agent.data.questions import instructed
from qzoom_agent.data.rows import HubTable, open_path, open_rows
from qzoom_agent.data.samples import TaskSource
from qzoom_agent.errors import ConfigError, ImageError
from qzoom_agent.evaluation.tasks.catalog import TASKS
from tests.evaluation.tasks import files, fixtures

PLACE = HubTable(("new/home", "old/home"))


def test_a_cache_that_cannot_be_written_is_not_a_damaged_table(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    table = tmp_path / "t.parquet"

    def closed(place: Path) -> Any:
        def load(*_: object, **__: object) -> Any:
            raise PermissionError(13, "Permission denied", str(place))

        return load

    monkeypatch.setattr(datasets, "load_dataset", closed(tmp_path / ".cache"))
    monkeypatch.setattr(datasets.Dataset, "from_parquet", closed(tmp_path / ".cache"))
    table.write_bytes(b"PAR1")
    with pytest.raises(ConfigError, match="set HF_HOME to a folder that can be written"):
        open_path(table)
    monkeypatch.setattr(datasets.Dataset, "from_parquet", closed(table))
    with pytest.raises(ConfigError, match=r"Permission denied: '.*t.parquet'\.$"):
        open_path(table)


def test_a_csv_file_is_read_where_a_long_has_32_bits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def limit(size: int) -> None:
        if size >= 2**31:
            raise OverflowError("Python int too large to convert to C long")

    monkeypatch.setattr(csv, "field_size_limit", limit)  # as on Windows
    (tmp_path / "a.csv").write_text("id,text\n1,one\n")
    assert open_path(tmp_path / "a.csv")[0] == {"id": "1", "text": "one"}


def test_a_file_has_no_splits(tmp_path: Path) -> None:
    """Its figures would be those of a split that nobody has read."""
    (tmp_path / "t.jsonl").write_text('{"q": "a"}')
    with pytest.raises(ConfigError, match=r"t\.jsonl is one table and has no split 'dev'"):
        open_path(tmp_path / "t.jsonl", split="dev")


def test_text_cells_stay_text(tmp_path: Path) -> None:
    table = tmp_path / "table.csv"
    table.write_text('\ufeffcode,answer\n007,NA\n1.50,"a, ""b""\nc"\n', encoding="utf-8")
    rows = open_path(table)
    assert rows.columns == ("code", "answer")
    assert [rows[0], rows[1]] == [{"code": "007", "answer": "NA"}, {"code": "1.50", "answer": 'a, "b"\nc'}]


def test_an_empty_cell_names_no_row(tmp_path: Path) -> None:
    """VLMEvalKit's tables name the image of another row by its index, which may be missing too."""
    (tmp_path / "t.csv").write_text("index,image,question\n1,a.png,one?\n2,1,two?\n,b.png,three?\n3,,four?\n")
    rows = open_path(tmp_path / "t.csv")
    assert [rows[at]["image"] for at in range(4)] == ["a.png", "a.png", "b.png", ""]
    (tmp_path / "t.csv").write_text("index,img,question\n1,a.png,one?\n,b.png,two?\n")
    assert [row["img"] for row in open_path(tmp_path / "t.csv").only("img")] == ["a.png", "b.png"]


@pytest.mark.parametrize("suffix", ["jsonl", "csv"])
def test_rows_reach_workers_that_are_started_anew(tmp_path: Path, suffix: str) -> None:
    lines = {"jsonl": '{"q": "a"}\n{"q": "b"}\n{"q": "c"}\n', "csv": "q\na\nb\nc\n"}
    file = tmp_path / f"t.{suffix}"
    file.write_text(lines[suffix], encoding="utf-8")
    rows = open_path(file).renamed({"q": "question"}).select([2, 0])
    sent = pickle.loads(pickle.dumps(rows))
    assert [row["question"] for row in sent.data] == ["c", "a"]


def test_an_image_in_a_cell_reaches_them_as_well(tmp_path: Path) -> None:
    (tmp_path / "t.csv").write_text("image\n" + "A" * 200_000)
    sent = pickle.dumps(open_path(tmp_path / "t.csv"))
    csv.field_size_limit(131_072)  # as in a process that has opened no table
    assert len(pickle.loads(sent)[0]["image"]) == 200_000


@pytest.mark.parametrize("name", ["t.json", "t.jsonl", "t.data"])
def test_json_lines_are_read_under_other_names(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_text('{"q": "a"}\n{"q": "b"}\n')
    assert [row["q"] for row in open_path(tmp_path / name).data] == ["a", "b"]


def test_json_lines_are_read_one_at_a_time(tmp_path: Path) -> None:
    table = tmp_path / "table.jsonl"
    table.write_text('\ufeff{"a": 1}\n\n{"a": "é", "b": [2]}\n{"a": 3', encoding="utf-8")
    with pytest.raises(ConfigError, match=r"Row 3 of .* is not JSON"):
        open_path(table)
    table.write_text('\ufeff{"a": 1}\n\n{"a": "é", "b": [2]}', encoding="utf-8")
    rows = open_path(table)
    assert rows.columns == ("a", "b") and len(rows) == 2
    assert rows[1] == {"a": "é", "b": [2]} and list(rows.only("b")) == [{"b": None}, {"b": [2]}]


def test_a_row_that_is_nested_too_deeply_is_a_damaged_row(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text('{"question": "a"}\n{"question": ' + "[" * 100_000 + "]" * 100_000 + '}\n{"question": "b"}\n')
    with pytest.raises(ConfigError, match=r"Row 2 of .* is not JSON: it is nested too deeply"):
        open_path(path)
    rows = open_path(path, skip_bad=True)
    assert [rows[0], rows[2]] == [{"question": "a"}, {"question": "b"}]


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("t.json", '{\n"a": 1}', "not a list of rows"),
        ("t.json", "[1]", "not a list of rows"),
        ("t.json", "[", "Cannot read .*t.json as a table: JSONDecodeError"),
        ("t.jsonl", "[1]", "Row 1 of .* is not an object"),
        ("t.parquet", "no", "Cannot read .*t.parquet as a table"),
        ("t.xlsx", "no", "Files that are read: .parquet, .jsonl"),
    ],
)
def test_a_damaged_table_is_named(tmp_path: Path, name: str, text: str, message: str) -> None:
    (tmp_path / name).write_text(text)
    with pytest.raises(ConfigError, match=message):
        open_path(tmp_path / name)


def test_a_split_that_is_not_there_is_an_error_with_the_ones_that_are(tmp_path: Path) -> None:
    one = datasets.Dataset.from_list([{"a": 1}])
    datasets.DatasetDict({"train": one, "dev": one}).save_to_disk(str(tmp_path / "both"))
    with pytest.raises(ConfigError, match=r"no split 'test'. There are: train, dev"):
        open_path(tmp_path / "both")
    assert len(open_path(tmp_path / "both", split="dev")) == 1
    one.save_to_disk(str(tmp_path / "alone"))
    with pytest.raises(ConfigError, match="has no split 'test'"):
        open_path(tmp_path / "alone", split="test")
    datasets.DatasetDict({"train": one}).save_to_disk(str(tmp_path / "single"))
    assert open_path(tmp_path / "single").columns == ("a",)
    (tmp_path / "copy").mkdir()
    one.to_parquet(str(tmp_path / "copy" / "train-00000-of-00001.parquet"))
    for only in ("single", "copy"):
        assert len(open_path(tmp_path / only)) == 1
        with pytest.raises(ConfigError, match=r"no split 'test'. There are: train"):
            open_path(tmp_path / only, split="test")


def test_classes_are_read_by_their_names(tmp_path: Path) -> None:
    yes_or_no = datasets.ClassLabel(names=["no", "yes"])
    features = datasets.Features({"answer": yes_or_no, "tags": datasets.List(yes_or_no)})
    table = {"answer": [1, 0, None, -1], "tags": [[0, 1], [], None, [None]]}
    data = datasets.Dataset.from_dict(table, features=features)
    data.to_parquet(str(tmp_path / "table.parquet"))
    data.save_to_disk(str(tmp_path / "saved"))
    for name in ("table.parquet", "saved"):
        rows = open_path(tmp_path / name)
        assert [row["answer"] for row in rows.only("answer")] == ["yes", "no", None, None]
        assert [rows[at]["tags"] for at in range(4)] == [["no", "yes"], [], None, [None]]


def test_a_path_that_is_nowhere_is_an_error(tmp_path: Path) -> None:
    for path in (str(tmp_path / "gone"), "gone.jsonl", "folder/gone.tsv", "folder/gone.JSON"):
        with pytest.raises(ConfigError, match="There is nothing at"):
            open_rows(TaskSource(path=path), PLACE)


def hub(monkeypatch: pytest.MonkeyPatch, there: dict[str, Path]) -> list[str]:
    """Lets `datasets` find these folders under these hub ids; the ids that were asked for, in order."""
    asked: list[str] = []
    real = {name: getattr(datasets, name) for name in ("load_dataset", "get_dataset_config_names")}
    splits = datasets.get_dataset_split_names

    def place(name: str) -> str:
        if name not in there:
            raise FileNotFoundError(f"{name} is gone")
        return str(there[name])

    def configs(name: str) -> Any:
        asked.append(name)
        return real["get_dataset_config_names"](place(name))

    def load(name: str, *args: Any, **options: Any) -> Any:
        return real["load_dataset"](place(name), *args, **options)

    monkeypatch.setattr(datasets, "get_dataset_config_names", configs)
    monkeypatch.setattr(datasets, "get_dataset_split_names", lambda name, config: splits(place(name), config))
    monkeypatch.setattr(datasets, "load_dataset", load)
    return asked


def test_the_hubs_ids_are_tried_in_order(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = fixtures.document_repository(tmp_path / "copy")
    asked = hub(monkeypatch, {"lmms-lab/DocVQA": folder, "me/mine": folder})
    assert len(TASKS["infovqa"].load(TaskSource())) == 4
    assert asked == ["lmms-lab-encoder/DocVQA", "lmms-lab/DocVQA"] == list(TASKS["infovqa"].sources)
    asked.clear()
    assert TASKS["docvqa"].load(TaskSource(path="me/mine"))[0].id == "docvqa-100"
    assert asked == ["me/mine"]


def test_when_no_id_loads_every_reason_is_given(monkeypatch: pytest.MonkeyPatch) -> None:
    hub(monkeypatch, {})
    with pytest.raises(
        ConfigError, match=r"new/home is gone; old/home: FileNotFoundError: old/home is gone.*local copy"
    ):
        open_rows(TaskSource(), PLACE)


def test_a_file_of_a_repository_is_fetched_with_what_lies_beside_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import huggingface_hub

    folder = fixtures.visual_probe(tmp_path / "visualprobe-medium")
    asked = []

    def fetch(name: str, *, repo_type: str) -> str:
        asked.append((name, repo_type))
        return str(folder)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", fetch)
    assert TASKS["visualprobe-medium"].load(TaskSource())[2].image.size == (96, 64)
    assert asked == [("Mini-o3/VisualProbe_Medium", "dataset")]


def test_a_row_that_cannot_be_a_sample_is_named(tmp_path: Path) -> None:
    rows = [{"type": "human_test", "question": None, "answer": "1", "image": "a.png"}]
    (tmp_path / "rows.json").write_text(json.dumps(rows))
    read = TASKS["chartqa"].load(TaskSource(path=str(tmp_path / "rows.json")))
    with pytest.raises(ImageError, match=r"Row 1 of .*rows.json: The image 'a.png' is neither a file in"):
        read[0]
    files.draw("a").save(tmp_path / "a.png")
    with pytest.raises(ConfigError, match=r"Row 1 of .*rows.json cannot be asked"):
        read[0]


def test_every_kind_of_cell_decodes(tmp_path: Path) -> None:
    image = files.draw("cell")
    image.save(tmp_path / "cell.png")
    data, text = files.png(image), files.base64_png(image)
    cells = [
        data,
        text,
        f"data:image/png;base64,{text}",
        "cell.png",
        str(tmp_path / "cell.png"),
        {"bytes": data, "path": None},
        {"bytes": None, "path": "cell.png"},
        ["cell.png"],
        image,
    ]
    for cell in cells:
        assert np.array_equal(np.asarray(picture(cell, tmp_path)), np.asarray(image))
    # Equal by content where it is encoded alike.
    assert len({key(cell, tmp_path) for cell in (data, text, "cell.png", {"bytes": data, "path": "x"})}) == 1
    assert key(data) != key(files.png(files.draw("other")))
    deep = [Image.fromarray(np.full((4, 4), value, np.uint16)) for value in (30_000, 40_000)]
    assert key(deep[0]) != key(deep[1]), "both are white where Pillow converts them"


@pytest.mark.parametrize("cell", [None, 3, [], ["a.png", "b.png"], {"bytes": None, "path": None}, "no such.png"])
def test_a_cell_without_a_picture_is_an_error(cell: object) -> None:
    with pytest.raises(ImageError):
        picture(cell)


def test_pictures_are_upright(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    files.draw("turned").save(tmp_path / "turned.jpg", exif=exif)
    assert picture("turned.jpg", tmp_path).size == (64, 96)


@pytest.mark.parametrize(
    ("text", "options"),
    [
        ("Which? (A) red (B) dark blue\nAnswer.", ("red", "dark blue")),
        ("Which?\nA. one\nB. two\nC. three", ("one", "two", "three")),
        ("Which?\nA: one\nB: two", ("one", "two")),
        ("哪个\uff1f\uff08A\uff09红\uff08B\uff09蓝", ("红", "蓝")),
        ("哪个\uff1f\nA\uff0e红\nB\uff0e1\uff0c5", ("红", "1\uff0c5")),
        ("哪个\uff1f A、红 B、蓝", ("红", "蓝")),
        ("f(A) and g(B)", ()),
        ("Is (A) here?", ()),
        ("Meet B. Smith and A. Jones", ()),
        ("", ()),
    ],
)
def test_options_in_a_question(text: str, options: tuple[str, ...]) -> None:
    assert inline_options(text) == options


def test_cells_that_hold_lists() -> None:
    assert texts("['a', 'b']") == texts('["a", "b"]') == texts(["a", "b"]) == ("a", "b")
    assert texts("a") == ("a",) and texts(None) == texts("") == ()
    with pytest.raises(ConfigError, match="should hold a list"):
        texts("['a', ")


def test_an_instruction_is_not_said_twice() -> None:
    assert instructed("Why? Be brief.\n", "Be brief.") == "Why? Be brief."
    assert instructed("Why?", "Be brief.") == "Why?\nBe brief."


@pytest.mark.parametrize("column", ["boxes", "bbox", "regions"])
def test_a_column_that_is_said_to_be_none_of_ours_is_no_slip(column: str) -> None:
    """As the message about a column that is not read advises."""
    others = ["image", "question", "answer", "catgory", column]
    found = find_columns("t", others, {"boxes": "", "kind": ""})
    assert found.boxes == () and "kind" not in found.names
    with pytest.raises(ConfigError, match=r"'catgory', which is not read.*\(kind: catgory, or an empty name"):
        find_columns("t", others, {"boxes": ""})
