"""Places that are looked at before work begins, and files that are whole or not there."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from PIL import Image

from qzoom_agent import Agent
from qzoom_agent.cli.main import main as qzoom
from qzoom_agent.errors import ConfigError, ImageError, TraceError
from qzoom_agent.files import (
    atomic_write,
    read_json,
    read_text,
    read_yaml,
    require_file,
    require_folder,
    sole_writer,
    write_text,
)
from qzoom_agent.models.scripted import ScriptedBackend


def test_a_place_is_made_and_nothing_is_left_in_it(tmp_path: Path) -> None:
    assert require_folder(tmp_path / "a" / "b").is_dir()
    assert not require_file(tmp_path / "c" / "page.html").exists()
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["a", "b", "c"]
    assert write_text(tmp_path / "d" / "x.json", "{}").read_text() == "{}"


def test_a_place_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("kept")
    for place in (tmp_path / "file", tmp_path / "file" / "below", "/proc"):
        with pytest.raises(ConfigError, match=r"Cannot write into .* Choose another folder"):
            require_folder(place)
    with pytest.raises(ConfigError, match=r"Cannot write .*: File name too long"), atomic_write(tmp_path / ("x" * 999)):
        pass
    with pytest.raises(ConfigError, match=r"it is a folder\. Give the path of a file"):
        require_file(tmp_path)
    with pytest.raises(ConfigError, match="Cannot write into"):
        write_text(tmp_path / "file" / "x.json", "{}")
    assert (tmp_path / "file").read_text() == "kept"


def test_a_file_that_is_there_may_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("old")
    assert require_file(tmp_path / "file").read_text() == "old"
    assert str(write_text("/dev/null", "gone")) == "/dev/null"


def test_a_file_is_whole_or_not_there(tmp_path: Path) -> None:
    target = tmp_path / "file"
    with atomic_write(target) as part:
        part.write_text("new")
        assert not target.exists()
    with pytest.raises(KeyboardInterrupt), atomic_write(target) as part:
        part.write_text("half")
        raise KeyboardInterrupt
    assert [path.name for path in tmp_path.iterdir()] == ["file"]
    assert target.read_text() == "new"


@pytest.mark.skipif(sys.platform == "win32", reason="of limits of Unix")
def test_a_text_that_does_not_fit_leaves_what_was_there(tmp_path: Path) -> None:
    """As `qzoom eval calibrate --out MODEL/confidence.json` on a full disk."""
    import resource

    write_text(tmp_path / "confidence.json", "old")
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (8, before[1]))
    try:
        with pytest.raises(ConfigError, match=r"File too large\. Free some space"):
            write_text(tmp_path / "confidence.json", "new" * 10)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert (tmp_path / "confidence.json").read_text() == "old" and not parts(tmp_path)


WRITER = """
import sys, time
from pathlib import Path
from qzoom_agent.files import atomic_write
with atomic_write(Path(sys.argv[1])) as part:
    part.write_text("half")
    time.sleep(60)
"""


@pytest.mark.skipif(sys.platform == "win32", reason="of devices of Unix")
def test_a_pipe_and_a_stream_are_written_and_stay(tmp_path: Path) -> None:
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    with subprocess.Popen(["cat", str(pipe)], stdout=subprocess.PIPE, text=True) as reader:
        try:
            with atomic_write(pipe) as part:
                part.write_text("page")
            assert pipe.is_fifo() and reader.communicate(timeout=10)[0] == "page"
        finally:
            reader.kill()
    opened = (tmp_path / "shell").open("w+")
    stream = Path(f"/proc/self/fd/{opened.fileno()}")
    if stream.is_symlink():  # as /dev/stdout of `qzoom eval export RUN --to csv --out /dev/stdout > file`
        with opened, atomic_write(stream) as part:
            part.write_text("rows")
            assert part == stream
        assert (tmp_path / "shell").read_text() == "rows"
    assert [one.name for one in tmp_path.iterdir() if one.suffix == ".part"] == []


def parts(folder: Path) -> list[Path]:
    return [path for path in folder.rglob("*.part") if path.is_file()]


def test_what_a_killed_process_left_is_removed_by_the_next_write(tmp_path: Path) -> None:
    theirs = tmp_path / ("notes.part")
    theirs.write_text("not ours")
    writer = subprocess.Popen([sys.executable, "-c", WRITER, str(tmp_path / "one")])
    patience = time.monotonic() + 60
    while not any(path.stat().st_size for path in parts(tmp_path) if path != theirs):
        assert writer.poll() is None and time.monotonic() < patience
        time.sleep(0.01)
    with atomic_write(tmp_path / "two") as part:
        part.write_text("whole")
    assert len(parts(tmp_path)) == 2, "that of a process at work stays"
    os.kill(writer.pid, signal.SIGKILL)
    writer.wait()
    with atomic_write(tmp_path / "two") as part:
        part.write_text("whole")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["notes.part", "two"]


def test_a_saved_run_has_no_unfinished_files(tmp_path: Path) -> None:
    answer = Agent(ScriptedBackend(["42"])).run(Image.new("RGB", (80, 60)), "What?")
    for name in ("trace.json", "images/a.png", "images/b.png"):
        left = tmp_path / f"{name}.{'0f' * 16}.part"
        left.parent.mkdir(exist_ok=True)
        left.write_text("half")
    for _ in range(2):  # the second time all images are there already
        answer.save(tmp_path)
        assert not parts(tmp_path)
        (tmp_path / "images" / f"c.png.{'a' * 32}.part").touch()
    answer.save(tmp_path)
    assert not parts(tmp_path)


@pytest.mark.parametrize("error", [ConfigError, ImageError])
@pytest.mark.parametrize(("number", "advice"), [(28, "Free some space"), (122, "Free some space"), (13, "Choose")])
def test_a_disk_that_refuses_says_what_to_do(
    error: type[ConfigError], number: int, advice: str, tmp_path: Path
) -> None:
    with pytest.raises(error, match=f"Cannot write .*file: .*{advice}"), atomic_write(tmp_path / "file", error=error):
        raise OSError(number, os.strerror(number))
    assert not list(tmp_path.iterdir())


def test_a_file_that_cannot_be_read_says_what_to_do(tmp_path: Path) -> None:
    (tmp_path / "latin").write_bytes("caf\xe9".encode("latin-1"))
    (tmp_path / "torn").write_text("[1, 2")
    (tmp_path / "other").write_text('["x"]')
    with pytest.raises(ConfigError, match=r"Cannot read .*latin: it is not UTF-8 text .* Give another\."):
        read_text(tmp_path / "latin", "Give another.")
    for name in ("torn", "other", "latin"):
        with pytest.raises(ConfigError, match=r"Cannot read .*: it is damaged or another file: .*\. Give another\."):
            read_json(tmp_path / name, list[int], "Give another.")
    for name in ("missing", ".", "torn/below"):
        with pytest.raises(ConfigError, match=r"Cannot read .* Give another\."):
            read_json(tmp_path / name, list[int], "Give another.")


def test_the_command_line_shows_no_traceback_for_a_full_disk(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def full(*_: object, **__: object) -> int:
        raise OSError(28, "No space left on device", str(tmp_path / "file"))

    monkeypatch.setattr("qzoom_agent.cli.models.run", full)
    assert qzoom(["models"]) == 2
    assert "qzoom models: " in (said := capsys.readouterr().err) and "No space left on device" in said


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs a forked process")
def test_the_lock_of_a_folder_from_elsewhere_changes_no_other_file(tmp_path: Path) -> None:
    other, folder = tmp_path / "other.txt", tmp_path / "run"
    other.write_text("kept")
    folder.mkdir()
    (folder / ".lock").symlink_to("../other.txt")
    told = r"write into .*run: \.lock there is a link .*another --out"
    with pytest.raises(ConfigError, match=told), sole_writer(folder, flag="--out"):
        pass
    agent = Agent(ScriptedBackend(["42"]), state_dir=folder)
    with pytest.raises(ConfigError, match=r"\.lock there is a link"):
        agent.run(Image.new("RGB", (80, 60)), "What?", thread="one")
    (folder / "one").mkdir(exist_ok=True)
    (folder / ".lock").unlink()
    (folder / "one" / ".lock").unlink(missing_ok=True)
    (folder / "one" / ".lock").symlink_to("../../other.txt")
    with pytest.raises(ConfigError, match=r"\.lock there is a link"):
        agent.run(Image.new("RGB", (80, 60)), "What?", thread="one")
    assert other.read_text() == "kept"


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="there are no such pipes")
def test_pipes_in_a_folder_from_elsewhere_are_not_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / ".lock")
    os.mkfifo(tmp_path / f"a.{'0f' * 16}.part")
    write_text(tmp_path / "b", "whole")
    with pytest.raises(ConfigError, match="Choose another --out"), sole_writer(tmp_path, flag="--out"):
        pass


def test_a_forked_child_does_not_hold_the_lock_of_its_parent(tmp_path: Path) -> None:
    """A trainer that was killed leaves the workers that load its data, for a while."""
    begun, child_begins = os.pipe()
    end, parent_ends = os.pipe()
    with sole_writer(tmp_path, flag="--out"):
        child = os.fork()
        if not child:
            os.write(child_begins, b".")
            os.read(end, 1)
            os._exit(0)
        os.read(begun, 1)
        with pytest.raises(ConfigError, match=r"Another process is writing into .* choose another --out"):
            sole_writer(tmp_path, flag="--out").__enter__()
    try:
        with sole_writer(tmp_path, flag="--out"):
            pass
    finally:
        os.write(parent_ends, b".")
        os.waitpid(child, 0)
        for one in (begun, child_begins, end, parent_ends):
            os.close(one)


def test_the_record_of_a_saved_run_is_written_last(tmp_path: Path) -> None:
    """A folder with a record is complete, also if the process was killed between two files."""
    answer = Agent(ScriptedBackend(["42"])).run(Image.new("RGB", (80, 60)), "What?")
    (tmp_path / "images").write_text("in the way")
    with pytest.raises(TraceError):
        answer.save(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["config.yaml", "images"]
    (tmp_path / "images").unlink()
    answer.save(tmp_path)
    (tmp_path / "config.yaml").unlink()
    (tmp_path / "config.yaml").mkdir()
    with pytest.raises(TraceError):
        answer.save(tmp_path)


def doubled(times: int) -> str:
    """Return a YAML text of a few bytes that stands for 2 ** times values."""
    return "x0: &x0 [a]\n" + "".join(f"x{at}: &x{at} [*x{at - 1}, *x{at - 1}]\n" for at in range(1, times))


def test_yaml_may_repeat_a_part_but_not_fill_the_memory() -> None:
    repeated = read_yaml("a: &a {b: 1}\nc: {<<: *a, d: *a, e: '*'}")
    assert repeated["c"] == {"b": 1, "d": {"b": 1}, "e": "*"}
    assert len(read_yaml(doubled(10))) == 10
    long = f"a: &a {'x' * 20_000}\nb: [{', '.join(['*a'] * 1000)}]"
    for text in (doubled(64), doubled(64).replace("[", "{k: [").replace("]", "]}"), "&a [*a]", "a: &a {b: *a}", long):
        with pytest.raises(ValueError, match=r"aliases \(\*\) stand for more than 10,000,000 characters"):
            read_yaml(text)
