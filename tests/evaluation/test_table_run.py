"""Runs over tables and folders of images: batched, resumable, with bad rows counted."""

from __future__ import annotations

import csv
import json
import re
from datetime import datetime
from decimal import Decimal
from pathlib import Path
from typing import Any

import pyarrow
import pytest
from PIL import Image
from pyarrow import parquet

from qzoom_agent.agent import Agent
from qzoom_agent.errors import BackendError, ConfigError
from qzoom_agent.evaluation import table_run
from qzoom_agent.evaluation.export import export
from qzoom_agent.evaluation.run_log import RunFolder
from qzoom_agent.evaluation.table_run import image_rows, run_table
from qzoom_agent.messages import Message
from qzoom_agent.models.scripted import ScriptedBackend
from tests.evaluation.player import ZOOM


class Asked:
    """An agent that answers with the question's word, after a zoom, and counts its answers."""

    def __init__(self, *, fails: str = "no such word") -> None:
        self.words: list[str] = []
        self.fails = fails
        self.agent = Agent(ScriptedBackend(self.reply), policy="explicit")

    def reply(self, messages: list[Message]) -> str:
        parts = [part for message in messages for part in message["content"]]
        if sum(part["type"] == "image" for part in parts) == 1:
            return ZOOM
        found = re.search(r"say the word (\w+)", " ".join(part["text"] for part in parts if part["type"] == "text"))
        assert found
        word = found[1]
        if word == self.fails:
            raise BackendError("The server is gone.")
        self.words.append(word)
        return word


@pytest.fixture
def table(tmp_path: Path) -> Path:
    Image.new("RGB", (168, 112), "red").save(tmp_path / "red.png")
    rows = [{"id": f"r{i}", "image": "red.png", "question": f"say the word w{i}", "note": i} for i in range(6)]
    path = tmp_path / "mine.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def results(path: Path) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = parquet.read_table(path).to_pylist()
    return rows


def test_every_row_has_a_result(table: Path, tmp_path: Path) -> None:
    asked = Asked()
    done = run_table(asked.agent, table, out=tmp_path / "run", workers=3)
    rows = results(done.path)
    assert (done.rows, done.failed) == (6, {})
    assert [row["answer"] for row in rows] == [f"w{i}" for i in range(6)] and sorted(asked.words) == sorted(
        f"w{i}" for i in range(6)
    )
    first = rows[0]
    assert (first["index"], first["id"], first["image"], first["question"]) == (0, "r0", "red.png", "say the word w0")
    assert first["status"] == "answered" and first["error"] is None
    assert first["boxes"] == [[14.0, 14.0, 98.0, 98.0]] and first["visual_tokens"] > 0 and first["turns"] == 2
    assert first["seconds"] >= 0
    run_table(asked.agent, table, out=tmp_path / "run")
    assert len(asked.words) == 6, "a finished run asks nothing again"


def test_the_results_are_exported_as_csv(table: Path, tmp_path: Path) -> None:
    done = run_table(Asked().agent, table, out=tmp_path / "run")
    path = export(RunFolder(tmp_path / "run"), "csv")
    assert path == done.path.with_suffix(".csv")
    with path.open(encoding="utf-8", newline="") as file:
        first, *others = csv.DictReader(file)
    assert len(others) == 5 and list(first) == list(results(done.path)[0])
    assert (first["id"], first["image"], first["answer"]) == ("r0", "red.png", "w0")
    assert json.loads(first["boxes"]) == [[14.0, 14.0, 98.0, 98.0]] and first["error"] == ""
    with pytest.raises(ConfigError, match="a parquet file already"):
        export(RunFolder(tmp_path / "run"), "parquet")


def test_a_row_may_be_about_several_images(tmp_path: Path) -> None:
    for name, width in (("red", 168), ("blue", 224)):
        Image.new("RGB", (width, 112), name).save(tmp_path / f"{name}.png")
    both = {"images": ["red.png", "blue.png"], "question": "say the word both"}
    one = {"images": ["blue.png"], "question": "say the word one"}
    (table := tmp_path / "mine.jsonl").write_text("".join(json.dumps(row) + "\n" for row in (both, one)))
    words: list[str] = []

    def reply(messages: list[Message]) -> str:
        parts = [part for message in messages for part in message["content"]]
        asked = " ".join(part["text"] for part in parts if part["type"] == "text")
        coarse = 2 if "both" in asked else 1
        if sum(part["type"] == "image" for part in parts) == coarse:
            call = {"bbox_2d": [14, 14, 98, 98], "img_idx": coarse - 1}
            return f"<tool_call>{json.dumps({'name': 'image_zoom_in_tool', 'arguments': call})}</tool_call>"
        words.append("both" if "both" in asked else "one")
        return f"<answer>{words[-1]}</answer>"

    agent = Agent(ScriptedBackend(reply), policy="explicit", protocol="deepeyes")
    first, second = results(run_table(agent, table, out=tmp_path / "run").path)
    assert (first["answer"], first["image"], first["box_images"]) == ("both", "red.png, blue.png", [1])
    assert (second["answer"], second["image"], second["box_images"]) == ("one", "blue.png", None)
    assert len(first["boxes"]) == len(second["boxes"]) == 1
    Image.new("RGB", (224, 224), "blue").save(tmp_path / "blue.png")
    run_table(agent, table, out=tmp_path / "run")
    assert sorted(words) == ["both", "both", "one", "one"], "a file that has changed is looked at again"


def test_rows_that_cannot_be_asked_are_listed_and_asked_again(table: Path, tmp_path: Path) -> None:
    bad = [
        '{"image": "missing.png", "question": "say the word x"}',
        "not json",
        '{"id": "r8", "image": "red.png"}',
        '{"image": "red.png", "question": "say the word gone"}',
    ]
    table.write_text(table.read_text() + "\n".join(bad) + "\n")
    asked = Asked(fails="gone")
    done = run_table(asked.agent, table, out=tmp_path / "run")
    assert done.rows == 10 and list(done.failed) == [6, 7, 8, 9]
    for index, told in zip(
        (6, 7, 8, 9), ("missing.png", "is not JSON", "no question", "The server is gone"), strict=True
    ):
        assert told in done.failed[index]
    rows = results(done.path)
    assert [row["status"] for row in rows] == ["answered"] * 6 + ["error"] * 4
    assert [(row["id"], row["image"]) for row in rows[6:]] == [
        (None, "missing.png"),
        (None, None),
        ("r8", "red.png"),
        (None, "red.png"),
    ]
    again = Asked()
    assert list(run_table(again.agent, table, out=tmp_path / "run").failed) == [6, 7, 8]
    assert again.words == ["gone"], "only what failed is asked again"


def test_a_changed_row_is_asked_again_and_new_rows_are_added(table: Path, tmp_path: Path) -> None:
    asked = Asked()
    run_table(asked.agent, table, out=tmp_path / "run")
    more = json.dumps({"image": "red.png", "question": "say the word new"})
    table.write_text(table.read_text().replace("word w2", "word other") + more + "\n")
    asked.words.clear()
    done = run_table(asked.agent, table, out=tmp_path / "run")
    assert asked.words == ["other", "new"]
    assert [row["answer"] for row in results(done.path)] == ["w0", "w1", "other", "w3", "w4", "w5", "new"]
    Image.new("RGB", (500, 400), "blue").save(tmp_path / "red.png")
    asked.words.clear()
    run_table(asked.agent, table, out=tmp_path / "run", n=7)
    assert len(asked.words) == 7, "another image is another question"


def test_an_image_in_the_home_folder_that_has_changed_is_looked_at_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    (table := tmp_path / "mine.jsonl").write_text('{"image": "~/red.png", "question": "say the word yes"}')
    asked = Asked()
    for side in (112, 168):
        Image.new("RGB", (168, side), "red").save(tmp_path / "red.png")
        run_table(asked.agent, table, out=tmp_path / "run")
    assert asked.words == ["yes", "yes"]


def test_a_run_is_of_the_weights_that_its_agent_was_loaded_with(
    table: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for weights in ("these", "others"):
        monkeypatch.setattr(table_run, "weights_of_agent", lambda agent, weights=weights: weights)
        if weights == "these":
            run_table(Asked().agent, table, out=tmp_path / "run")
    with pytest.raises(ConfigError, match="weights: 'these' then, 'others' now"):
        run_table(Asked().agent, table, out=tmp_path / "run")


def test_only_the_files_that_are_new_to_a_folder_are_asked_about(tmp_path: Path) -> None:
    (scans := tmp_path / "scans").mkdir()
    asked = Asked()
    for names in ("cde", "af"):
        for name in names:
            Image.new("RGB", (168, 112), (40 * ord(name) % 256, 0, 0)).save(scans / f"{name}.png")
        done = run_table(asked.agent, scans, out=tmp_path / "run", question="say the word yes", workers=2)
    assert len(asked.words) == 5
    assert [row["image"] for row in results(done.path)] == [f"{name}.png" for name in "acdef"]
    rows = RunFolder(tmp_path / "run").latest()
    assert [(row.index, row.id) for row in rows] == [(at, f"scans-{at}") for at in range(5)]
    run_table(asked.agent, scans, out=tmp_path / "run", question="say the word yes")
    assert len(asked.words) == 5


def test_the_same_question_twice_is_asked_twice_also_after_a_kill(table: Path, tmp_path: Path) -> None:
    line = table.read_text().splitlines()[0]
    table.write_text(f"{line}\n" * 3)
    asked = Asked()
    run_table(asked.agent, table, out=tmp_path / "run", n=1)
    run_table(asked.agent, table, out=tmp_path / "run")
    assert asked.words == ["w0"] * 3, "a sampled answer to one is no answer to the others"


def test_a_run_folder_holds_the_answers_to_one_table(table: Path, tmp_path: Path) -> None:
    """A second table, a renamed one or an evaluation beside it would mix its rows with theirs."""
    before = run_table(Asked().agent, table, out=tmp_path / "run").path.read_bytes()
    other = table.rename(tmp_path / "other.jsonl")
    asked = Asked()
    with pytest.raises(ConfigError, match=r"holds the answers to mine, and the table is other\. Choose another folder"):
        run_table(asked.agent, other, out=tmp_path / "run")
    assert not asked.words and (tmp_path / "run" / "results.parquet").read_bytes() == before
    assert run_table(asked.agent, other.rename(table), out=tmp_path / "run").rows == 6 and not asked.words


def test_one_question_is_asked_about_every_image_of_a_folder(tmp_path: Path) -> None:
    for name in ("b.png", "a.jpg", "sub/c.webp"):
        (tmp_path / "scans" / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (168, 112)).save(tmp_path / "scans" / name)
    (tmp_path / "scans" / "notes.txt").touch()
    (tmp_path / "scans" / "broken.png").write_bytes(b"\x89PNG")
    done = run_table(Asked().agent, tmp_path / "scans", out=tmp_path / "run", question="say the word dot", traces=True)
    rows = results(done.path)
    assert [row["image"] for row in rows] == ["a.jpg", "b.png", "broken.png", "sub/c.webp"]
    assert [row["answer"] for row in rows] == ["dot", "dot", None, "dot"] and list(done.failed) == [2]
    assert all(row["question"] == "say the word dot" for row in rows)
    folder = RunFolder(tmp_path / "run")
    assert all(folder.trace(row.key) for row in folder.in_order() if row.status == "answered")


def test_linked_folders_are_read_once_and_loops_end(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    for name in ("scans/own/a.png", "elsewhere/sub/b.png", "elsewhere/c.png"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (168, 112)).save(tmp_path / name)
    for name, target in (("2024", "elsewhere"), ("2025", "elsewhere/sub"), ("all", "scans"), ("also", "scans/own")):
        (tmp_path / "scans" / name).symlink_to(tmp_path / target)
    (tmp_path / "elsewhere" / "back").symlink_to(tmp_path / "scans")
    (tmp_path / "scans" / "itself").symlink_to(tmp_path / "scans" / "itself")
    rows = image_rows(tmp_path / "scans")
    assert rows and [row["image"] for row in rows] == ["2024/c.png", "2025/b.png", "own/a.png"]
    (tmp_path / "scans" / "2024").unlink()
    run_table(Asked().agent, tmp_path / "scans", out=tmp_path / "run", question="say the word dot")
    assert [row["image"] for row in results(tmp_path / "run" / "results.parquet")] == ["2025/b.png", "own/a.png"]
    assert re.findall(r"\((.*)\)", caplog.text) == ["1 without an ending"] * 2, "the link to itself"


def test_a_folder_of_scans_has_a_row_for_each_page_and_tells_of_other_files(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    page = Image.new("RGB", (168, 112))
    (tmp_path / ".thumbnails").mkdir()
    page.save(tmp_path / ".thumbnails" / "a.png")
    page.save(tmp_path / "a.jp2")
    page.save(tmp_path / "b.pdf", save_all=True, append_images=[page])
    (tmp_path / "c.pdf").write_bytes(b"%PDF-damaged")
    (tmp_path / "d.heic").touch()
    done = run_table(Asked().agent, tmp_path, out=tmp_path / "run", question="say the word dot")
    rows = results(done.path)
    assert [row["image"] for row in rows] == ["a.jp2", "b.pdf#page=1", "b.pdf#page=2", "c.pdf#page=1"]
    assert [row["answer"] for row in rows] == ["dot", "dot", "dot", None]
    assert "left out (1 .heic)" in caplog.text
    pages = run_table(Asked().agent, tmp_path / "b.pdf", out=tmp_path / "pages", question="say the word dot")
    assert pages.rows == 2


def test_a_table_as_others_write_it(tmp_path: Path) -> None:
    page = Image.new("RGB", (168, 112))
    page.save(tmp_path / "b.pdf", save_all=True, append_images=[page])
    rows = "scan;prompt\nb.pdf#page=2;say the word one\nb.pdf#page=3;say the word two\n"
    (tmp_path / "mine.csv").write_text("\n" + rows, encoding="utf-8-sig")
    columns = {"image": "scan", "question": "prompt"}
    done = run_table(Asked().agent, tmp_path / "mine.csv", out=tmp_path / "run", columns=columns)
    first, second = results(done.path)
    assert (first["answer"], first["image"]) == ("one", "b.pdf#page=2")
    assert (second["question"], second["image"]) == ("say the word two", "b.pdf#page=3")
    assert second["error"].startswith("ImageError: '") and "pages 1 to 2" in second["error"]
    (tmp_path / "mine.csv").rename(tmp_path / "mine.ndjson")
    line = json.dumps({"scan": "b.pdf", "prompt": "say the word one", "query": "say the word old"})
    (tmp_path / "mine.ndjson").write_text(line)
    run_table(asked := Asked().agent, tmp_path / "mine.ndjson", out=tmp_path / "two", columns={"image": "scan"})
    done = run_table(asked, tmp_path / "mine.ndjson", out=tmp_path / "two", columns=columns)
    assert [row["answer"] for row in results(done.path)] == ["one"], "another column is another question"


def test_an_id_is_what_a_database_writes(tmp_path: Path) -> None:
    Image.new("RGB", (168, 112)).save(tmp_path / "a.png")
    for name, id in (("decimal", Decimal("12.50")), ("date", datetime(2026, 3, 1))):
        arrays = {"id": [id], "image": ["a.png"], "question": ["say the word one"]}
        parquet.write_table(pyarrow.table(arrays), tmp_path / f"{name}.parquet")
        done = run_table(Asked().agent, tmp_path / f"{name}.parquet", out=tmp_path / name)
        assert [(row["id"], row["answer"]) for row in results(done.path)] == [(str(id), "one")]


def test_a_question_goes_before_the_column(table: Path, tmp_path: Path) -> None:
    done = run_table(Asked().agent, table, out=tmp_path / "run", question="say the word all", n=2)
    assert [row["answer"] for row in results(done.path)] == ["all", "all"]


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"table": "nowhere"}, "There is nothing at nowhere"),
        ({"n": 0}, "n = 0"),
        ({"workers": 0}, "workers"),
        ({"table": "plain.csv"}, "no column image.*It has: a, b.*--column image=NAME"),
        ({"table": "plain.csv", "columns": {"image": "a"}}, "no column question.*query.*--question TEXT"),
        ({"table": "plain.csv", "columns": {"image": "c"}}, "lacks the column c"),
        ({"table": "plain.csv", "columns": {"picture": "a"}}, "picture.*not read"),
        ({"table": "plain.csv", "question": "what?", "n": 1}, "no column image"),
        ({"table": "latin.csv"}, "Save it as UTF-8"),
        ({"table": "empty"}, "neither an image nor a table"),
        ({"table": ["a.png"]}, "got list. Agent.batch"),
        ({"question": " "}, "question"),
        ({"table": "empty", "out": "empty"}, "The run folder is empty, where the images are"),
    ],
)
def test_what_cannot_be_asked_is_said_before(
    change: dict[str, Any], told: str, table: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("plain.csv").write_text("a,b\n1,2\n")
    Path("latin.csv").write_bytes("image,question\na.png,für?\n".encode("latin-1"))
    Path("empty").mkdir()
    with pytest.raises(ConfigError, match=told):
        run_table(Asked().agent, **{"table": table, "out": "run", **change})


def test_a_run_folder_among_the_images_is_not_asked_about(tmp_path: Path) -> None:
    Image.new("RGB", (168, 112), "white").save(tmp_path / "a.png")
    for _ in range(2):
        done = run_table(Asked().agent, tmp_path, out=tmp_path / "out", question="say the word dot", traces=True)
        assert (done.rows, len(done.failed)) == (1, 0)
    assert list((tmp_path / "out").rglob("*.jpg")) or list((tmp_path / "out").rglob("*.png"))
