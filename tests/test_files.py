"""Places that are looked at before work begins, and files that are whole or not there."""

from pathlib import Path

import pytest

from qzoom_agent.errors import ConfigError
from qzoom_agent.files import atomic_write, require_file, require_folder, write_text


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
