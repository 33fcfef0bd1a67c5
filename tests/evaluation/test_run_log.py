"""Run folders that are full, torn, in the way, or written by somebody else."""

import errno
import json
import os
from collections.abc import Callable
from pathlib import Path
from shutil import copytree
from typing import Any

import pytest

from qzoom_agent.cli.main import main as qzoom
from qzoom_agent.data.samples import TaskSource
from qzoom_agent.errors import ConfigError
from qzoom_agent.evaluation import run_log
from qzoom_agent.evaluation.report import write_run_report
from qzoom_agent.evaluation.run_log import RunFolder, RunSpec, TaskSelection
from qzoom_agent.evaluation.runner import evaluate, rescore
from qzoom_agent.evaluation.summary import Results, summarise
from tests.evaluation.player import lines, numbers, player


def go_on(folder: Path, samples: int = 4) -> Results:
    return evaluate(player(zooms=lambda i: i == 1), [numbers()], out=folder, source=TaskSource(n=samples))


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run, to be copied."""
    folder = tmp_path_factory.mktemp("finished") / "run"
    go_on(folder)
    return folder


def change_row(folder: Path, **changes: Any) -> None:
    rows = lines(folder / "samples.jsonl")
    (folder / "samples.jsonl").write_text("\n".join([json.dumps(json.loads(rows[0]) | changes), *rows[1:]]) + "\n")


@pytest.mark.parametrize("name", ["../../victim", "../victim", "/victim", "a/b", "..", ".hidden", "", "a\0b", "a\\b"])
@pytest.mark.parametrize("field", ["key", "image"])
def test_a_row_cannot_name_a_file_outside_the_run(field: str, name: str, finished: Path, tmp_path: Path) -> None:
    folder = copytree(finished, tmp_path / "runs" / "one")
    if (field, name) == ("image", ""):
        return  # of a sample that could not be read
    change_row(folder, **{field: name})
    before = sorted(path for path in tmp_path.rglob("*"))
    for use in (
        lambda: write_run_report(RunFolder(folder)),
        lambda: summarise(RunFolder(folder)),
        lambda: rescore(RunFolder(folder), [numbers()]),
        lambda: go_on(folder),
    ):
        with pytest.raises(ConfigError, match=rf"Line 1 of .*samples\.jsonl is not the result of a sample: {field}"):
            use()
    assert sorted(path for path in tmp_path.rglob("*")) == before
    for path in (RunFolder(folder).trace_path, RunFolder(folder).picture_path):
        with pytest.raises(ConfigError, match="neither a key nor a digest"):
            path(name)


@pytest.mark.parametrize("worth", [float("nan"), 1e9, -1.0])
def test_a_row_that_is_worth_what_no_answer_can_be_is_refused(worth: float, tmp_path: Path) -> None:
    """It would be the accuracy of the whole run."""
    evaluate(player(), [numbers(3)], out=tmp_path)
    first, *others = (tmp_path / "samples.jsonl").read_text().splitlines()
    changed = json.loads(first)
    changed["scores"]["clean"][0] = worth
    (tmp_path / "samples.jsonl").write_text("\n".join([json.dumps(changed), *others]) + "\n")
    with pytest.raises(
        ConfigError, match=r"Line 1 of .* is not the result of a sample: scores\.clean\.0: Input should"
    ):
        summarise(RunFolder(tmp_path))


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("usage.seconds.think", float("nan")),
        ("usage.seconds.think", -1.0),
        ("token_layers", float("inf")),
        ("elapsed", -1.0),
        ("zooms", -1),
        ("recall", 2.0),
        ("iou", float("nan")),
    ],
)
def test_a_row_that_costs_or_shows_what_nothing_can_is_refused(
    field: str, value: float, finished: Path, tmp_path: Path
) -> None:
    """It would be the cost of the whole run, or leave it without an interval."""
    folder = copytree(finished, tmp_path / "run")
    row = json.loads(lines(folder / "samples.jsonl")[0])
    part, (*outer, name) = row, field.split(".")
    for key in outer:
        part = part[key]
    part[name] = value
    change_row(folder, **row)
    told = field.replace("usage.", "usage: ")
    with pytest.raises(ConfigError, match=rf"Line 1 of .* is not the result of a sample: {told}: Input should"):
        summarise(RunFolder(folder))


def test_a_trace_cannot_name_a_picture_outside_the_run(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    go_on(folder)
    for path in (folder / "traces").glob("*.json"):
        trace = json.loads(path.read_text())
        trace["views"][0]["digest"] = "../../victim"
        path.write_text(json.dumps(trace))
        os.utime(path, (2e9, 2e9))
    assert qzoom(["eval", "report", str(folder)]) == 2


@pytest.mark.parametrize("name", ["run.json", "env.json", "results.json", "config.yaml"])
@pytest.mark.parametrize("content", [b"[{", b"", b"\xff\xfe\xfa", b'"text"', b"[" * 100_000, None], ids=range(6))
def test_a_damaged_file_says_what_to_do(
    name: str, content: bytes | None, finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = copytree(finished, tmp_path / "run")
    if content is None:
        (folder / name).unlink()
        (folder / name).mkdir()
    else:
        (folder / name).write_bytes(content)
    if name == "config.yaml" and content == b"":
        return  # all keys at their defaults
    for use in (lambda: go_on(folder), lambda: write_run_report(RunFolder(folder))):
        try:
            use()
        except ConfigError as error:
            assert name in str(error) or "no run" in str(error) or "configuration" in str(error)
        else:
            assert name != "run.json"  # the others are written anew, or not needed for a report
    assert qzoom(["eval", "report", str(folder)]) in (0, 2)
    assert "Traceback" not in capsys.readouterr().err


def test_a_report_of_more_answers_than_there_are_says_so(finished: Path, tmp_path: Path) -> None:
    folder = copytree(finished, tmp_path / "run")
    (folder / "samples.jsonl").write_text("\n".join(lines(folder / "samples.jsonl")[:1]) + "\n")
    with pytest.raises(ConfigError, match=r"results\.json of .* counts 4 answers .* samples\.jsonl holds 1"):
        write_run_report(RunFolder(folder))
    rescore(RunFolder(folder), [numbers()])
    assert write_run_report(RunFolder(folder)).exists()


def test_a_configuration_in_the_results_that_cannot_be_is_told_with_its_file(finished: Path, tmp_path: Path) -> None:
    folder = copytree(finished, tmp_path / "run")
    results = json.loads((folder / "results.json").read_text())
    results["config"]["perception"]["max_regions"] = "x"
    (folder / "results.json").write_text(json.dumps(results))
    with pytest.raises(ConfigError, match=r"Cannot read .*results\.json: Bad value for 'perception\.max_regions'"):
        write_run_report(RunFolder(folder))


def test_a_torn_row_is_asked_again_and_a_foreign_one_named(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    whole = go_on(folder)
    rows = lines(folder / "samples.jsonl")
    torn = [rows[0], rows[1][: len(rows[1]) // 2], rows[2].replace("board", "b\udcff", 1), rows[3]]
    (folder / "samples.jsonl").write_bytes("\n".join(torn).encode("utf-8", "surrogateescape") + b"\n")
    assert len(RunFolder(folder).latest()) == 2, "a line that is not UTF-8 is no row, either"
    assert go_on(folder).tasks["numbers"].accuracy == whole.tasks["numbers"].accuracy
    (folder / "samples.jsonl").write_text('{"some": "other file"}\n')
    with pytest.raises(ConfigError, match=r"Line 1 of .* is not the result of a sample: key: Field required\. Remove"):
        go_on(folder)


def full(*_: object, **__: object) -> Any:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def _full_rows(patch: pytest.MonkeyPatch) -> None:
    """A journal whose third row meets a full disk, and so does closing it."""
    real = run_log.Journal.append

    def append(journal: Any, row: Any) -> None:
        if row.index == 2:
            journal._file.close()
            journal._file = open("/dev/full", "wb")  # noqa: SIM115, PTH123
        real(journal, row)

    patch.setattr(run_log.Journal, "append", append)


@pytest.mark.parametrize(
    "fill",
    [
        _full_rows,
        lambda patch: patch.setattr("PIL.Image.Image.save", full),
        lambda patch: patch.setattr(Path, "write_text", full),
        lambda patch: patch.setattr(Path, "mkdir", full),
        lambda patch: patch.setattr(Path, "replace", full),
    ],
    ids=["rows", "pictures", "text", "folders", "renaming"],
)
def test_a_full_disk_ends_a_run_that_goes_on_later(
    fill: Callable[[pytest.MonkeyPatch], None], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "run"
    with monkeypatch.context() as patch:
        fill(patch)
        with pytest.raises(ConfigError, match=r"Cannot write .*No space left on device\. Free some space"):
            go_on(folder)
    assert go_on(folder).tasks["numbers"].accuracy == 1.0
    assert not list(tmp_path.rglob("*.part"))


@pytest.mark.parametrize("number", [errno.EACCES, errno.EROFS])
def test_a_folder_without_permission_says_so(number: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    go_on(tmp_path / "run")
    real = Path.open

    def refuse(path: Path, mode: str = "r", *args: Any, **kwargs: Any) -> Any:
        if path.parent == tmp_path / "run":
            raise OSError(number, os.strerror(number))
        return real(path, mode, *args, **kwargs)

    monkeypatch.setattr(Path, "open", refuse)
    for use in (lambda: go_on(tmp_path / "run", 5), lambda: write_run_report(RunFolder(tmp_path / "run"))):
        with pytest.raises(ConfigError, match=rf"Cannot .*{os.strerror(number)}"):
            use()


@pytest.mark.parametrize("name", ["", "traces", "traces/images", ".lock", "samples.jsonl", "config.yaml", "env.json"])
def test_what_is_in_the_way_is_named(name: str, tmp_path: Path) -> None:
    place = tmp_path / "run" / name
    place.parent.mkdir(parents=True, exist_ok=True)
    if "." in name:
        place.mkdir()
    else:
        place.touch()
    with pytest.raises(ConfigError, match=r"Cannot .*(Choose another|Give|Write \[\])"):
        go_on(tmp_path / "run")


def test_unfinished_files_of_a_killed_run_are_removed(tmp_path: Path) -> None:
    go_on(tmp_path)
    left = [tmp_path / f"{name}.{'0' * 32}.part" for name in ("run.json", "traces/x.json", "traces/images/y.jpg")]
    for path in left:
        path.touch()
    go_on(tmp_path, 5)
    assert not any(path.exists() for path in left)


def asked(path: str | None) -> RunSpec:
    """Return a run that asks a table of four rows."""
    part = TaskSelection(path=path, total=4, planned=4)
    return RunSpec(seed=0, weights=None, repeats=1, tasks={"mine": part})


def test_a_table_is_the_same_by_any_way_of_writing_its_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    first = asked("data/mine.jsonl")
    for same in ("./data/mine.jsonl", str(tmp_path / "data" / "mine.jsonl"), "data/../data/mine.jsonl"):
        assert first.grown(asked(same)).tasks["mine"].path == same
    with pytest.raises(ConfigError, match=r"path 'data/mine\.jsonl' then, 'other/mine\.jsonl' now"):
        first.grown(asked("other/mine.jsonl"))


def test_a_run_whose_table_was_not_noted_is_resumed() -> None:
    """As of `evaluate` in Python, once."""

    assert asked(None).grown(asked("data/mine.jsonl")).tasks["mine"].path == "data/mine.jsonl"
    with pytest.raises(ConfigError, match=r"path None then, 'data/other\.jsonl' now"):
        asked(None).grown(asked("data/other.jsonl"))


def test_a_run_goes_on_with_the_weights_that_it_began_with() -> None:
    """Where they are unknown, as of a server that tells nothing of its model, they decide nothing."""
    unknown, first, other = (asked("a.jsonl").model_copy(update={"weights": name}) for name in (None, "1", "2"))
    assert [first.grown(unknown).weights, unknown.grown(first).weights, unknown.grown(unknown).weights] == [
        "1",
        "1",
        None,
    ]
    with pytest.raises(ConfigError, match=r"weights: '1' then, '2' now"):
        first.grown(other)


def test_rows_are_read_while_the_run_is_finished(tmp_path: Path) -> None:
    """As by `qzoom eval export`, while another process puts the rows in order."""
    evaluate(player(), [numbers(6)], out=tmp_path, traces=False)
    folder = RunFolder(tmp_path)
    rows = folder.latest()
    folder.replace_rows(rows[::-1])
    reading = folder.in_order()
    found = [next(reading)]
    RunFolder(tmp_path).replace_rows(rows)
    assert [*found, *reading] == rows
