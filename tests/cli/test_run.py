"""`qzoom run` as a user runs it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from pyarrow import parquet

from qzoom_agent.messages import Message
from tests.cli.test_cli import run, zoom_then


@pytest.fixture
def scans(here: Path) -> Path:
    for name in ("a", "b", "c"):
        (here / "scans").mkdir(exist_ok=True)
        Image.new("RGB", (168, 112), "white").save(here / "scans" / f"{name}.png")
    return here / "scans"


def test_run_leaves_results_and_prints_their_path(play: Any, scans: Path, capsys: pytest.CaptureFixture[str]) -> None:
    play(zoom_then("red"))
    (scans / "broken.png").write_bytes(b"no image")
    argv = ["run", "scans", "--question", "which color?", "--out", "done"]
    assert run(*argv) == 0
    captured = capsys.readouterr()
    assert captured.out == f"{Path('done') / 'results.parquet'}\n"
    assert "1 of 4 rows have no answer: row 3: " in captured.err and "accuracy" not in captured.err
    assert "4/4" in captured.err
    assert parquet.read_table("done/results.parquet")["answer"].to_pylist() == ["red", "red", None, "red"]


@pytest.mark.parametrize("verb", ["run", "eval"])
def test_a_local_model_is_asked_by_as_many_workers_as_are_given(verb: str, scans: Path, here: Path) -> None:
    rows = [f'{{"image": "{name}.png", "question": "which color?", "answer": "red"}}\n' for name in ("a", "b")]
    (scans / "mine.jsonl").write_text("".join(rows))
    assert run(verb, "scans/mine.jsonl", "--out", "done", "--policy", "direct", "--workers", "16") == 0


def test_a_name_that_begins_with_a_tilde_is_one(play: Any, scans: Path) -> None:
    play(zoom_then("red"))
    (scans / "a.png").rename(scans / "~$a.png")
    assert run("run", "scans", "--question", "which color?", "--out", "done") == 0
    found = parquet.read_table("done/results.parquet").to_pydict()
    assert found["image"] == ["b.png", "c.png", "~$a.png"] and found["answer"] == ["red"] * 3


def test_names_that_are_not_utf8_are_asked_and_recorded_legibly(play: Any, scans: Path) -> None:
    play(zoom_then("red"))
    try:
        scans = scans.rename(scans.with_name("sc\udcffans"))
        (scans / "a.png").rename(scans / "\udcffa.png")
    except OSError:
        pytest.skip("this file system takes no such name")
    argv = ["run", str(scans), "--question", "which color?", "--out", "do\udcffne"]
    for _ in range(2):  # the second goes on with the first
        assert run(*argv) == 0
        with Path("do\udcffne", "results.parquet").open("rb") as file:
            found = parquet.read_table(file).to_pydict()
        assert found["image"] == ["b.png", "c.png", "\ufffda.png"] and found["answer"] == ["red"] * 3


def test_half_an_emoji_in_a_table_is_replaced(play: Any, scans: Path, here: Path) -> None:
    play(zoom_then("red"))
    row = r'{"id": "x\ud83d", "image": "scans/a.png", "answer": "\ud83d", '
    row += r'"question": "which \ud83d\ude00 color \uD83D?"}'
    (here / "mine.jsonl").write_text(row)
    (here / "mine.json").write_text(f"[{row}]")
    for table in ("mine.jsonl", "mine.json"):
        assert run("run", table, "--out", f"of-{table}") == 0
        found = parquet.read_table(f"of-{table}/results.parquet").to_pydict()
        assert found["id"] == ["x\ufffd"] and found["question"] == ["which \U0001f600 color \ufffd?"]
        assert run("eval", table, "--out", f"scores-{table}") == 0


def test_an_interrupted_run_says_so_and_goes_on(play: Any, scans: Path, capsys: pytest.CaptureFixture[str]) -> None:
    asked = 0

    def interrupted(messages: list[Message]) -> str:
        nonlocal asked
        asked += 1
        if asked == 2:
            raise KeyboardInterrupt
        return "red"

    play(interrupted)
    argv = ["run", "scans", "--question", "which color?", "--out", "done", "--policy", "direct"]
    assert run(*argv) == 130
    assert "Interrupted after 1 of 3 questions." in capsys.readouterr().err
    assert run(*argv) == 0
    assert asked == 4


def test_rows_are_counted_from_1_wherever_they_are_told(
    play: Any, scans: Path, here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """An image that cannot be read, and a question that the model fails at: in the progress and at the end."""
    play(["red"])
    rows = [f'{{"image": "scans/{name}.png", "question": "which color?"}}\n' for name in ("a", "none", "b")]
    (here / "mine.jsonl").write_text("".join(rows))
    assert run("run", "mine.jsonl", "--out", "done", "--policy", "direct", "--workers", "1") == 0
    told = capsys.readouterr().err
    assert "mine, row 2: ImageError: Row 2 of mine.jsonl: " in told and "mine, row 3: " in told
    assert "2 of 3 rows have no answer: row 2: " in told and "; row 3: " in told
    assert "mine[" not in told and "mine-2" not in told


def test_a_run_in_which_everything_fails_is_4(play: Any, scans: Path, capsys: pytest.CaptureFixture[str]) -> None:
    play([])
    assert run("run", "scans", "--question", "which color?", "--out", "done") == 4
    assert "3 of 3 rows have no answer" in capsys.readouterr().err
    assert run("run", "scans", "--out", "done") == 2
    assert "--question" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (["nowhere"], "There is nothing at nowhere"),
        (["scans", "--question", "what?", "--n", "0"], "at least one row"),
        (["scans", "--question", "what?", "--workers", "0"], "--workers"),
        (["rows.csv", "--column", "question=none"], "none"),
    ],
)
def test_what_is_wrong_is_told_before_a_model_is_loaded(
    change: list[str],
    told: str,
    scans: Path,
    here: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    (here / "rows.csv").write_text("image,question\nscans/a.png,what?\n")
    monkeypatch.setattr("qzoom_agent.cli.run.load_agent", lambda *_, **__: pytest.fail("loaded"))
    assert run("run", *change, "--out", "done") == 2
    assert told in capsys.readouterr().err and not (here / "done").exists()
