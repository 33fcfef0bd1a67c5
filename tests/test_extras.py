"""A package of an extra that is not installed is named, with the command that installs it."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from random import Random

import pytest

from qzoom_agent import extras
from qzoom_agent.data.rows import HubTable, open_rows
from qzoom_agent.data.samples import TaskSource
from qzoom_agent.errors import MissingDependency
from qzoom_agent.evaluation.tasks.needle import ink
from qzoom_agent.evaluation.tasks.needle.tasks import load
from qzoom_agent.extras import require

EXTRAS = ("trl", "datasets", "peft", "matplotlib", "scipy", "skimage", "font_lato", "font_manrope")
EXTRAS += ("fastapi", "gradio", "mcp")


def test_an_installed_package_is_found_and_not_imported() -> None:
    folder = require("skimage", extra="eval", use="This test")
    assert (folder / "__init__.py").is_file()


def test_a_missing_package_is_named_with_the_command_that_installs_it() -> None:
    with pytest.raises(MissingDependency, match=r'^This test needs .*: pip install "qzoom-agent\[train\]"$'):
        require("no_such_package", extra="train", use="This test")


def test_a_folder_of_that_name_beside_a_script_is_no_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "my_package").mkdir()
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(MissingDependency, match="my_package, which is not installed"):
        require("my_package", extra="train", use="This test")


def test_python_without_docstrings_and_a_package_in_a_zip_file_are_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert extras.obstacle() == ""
    with monkeypatch.context() as changed:
        changed.setattr(extras, "__file__", str(tmp_path / "qzoom.whl" / "qzoom_agent" / "extras.py"))
        assert "from a zip file" in extras.obstacle()
    said = "from qzoom_agent.extras import obstacle; print(obstacle())"
    done = subprocess.run([sys.executable, "-OO", "-c", said], capture_output=True, text=True, check=True)
    assert "-OO" in done.stdout


def test_boards_and_tables_name_the_extra(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ink.typefaces.cache_clear()
    table = tmp_path / "mine.parquet"
    table.write_bytes(b"PAR1")
    for name in EXTRAS:
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(MissingDependency, match=r"qzoom-agent\[eval\]"):
        load("needle-scene", TaskSource())
    with pytest.raises(MissingDependency, match=r"qzoom-agent\[eval\]"):
        open_rows(TaskSource(str(table)), HubTable(()))


def test_a_training_without_the_photographs_fails_at_its_first_board(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "skimage", None)
    for seed in range(4):  # most backgrounds have no photograph
        with pytest.raises(MissingDependency, match=r"skimage.*qzoom-agent\[eval\]"):
            ink.background(Random(seed), (64, 64), split="train")


VERBS = [
    (["eval", "needle-scene", "--n", "2"], "eval"),
    (["train", "grpo", "--config", "x.yaml", "--output", "out"], "train"),
    (["train", "coldstart", "--config", "x.yaml", "--output", "out"], "train"),
    (["train", "sdrpn", "--config", "x.yaml", "--output", "out"], "train"),
    (["serve", "--port", "0"], "serve"),  # whatever port is taken
    (["web"], "web"),
    (["mcp"], "mcp"),
    (["calibrate", "--config", "x.yaml", "--output", "out"], "train"),
]


def test_a_verb_without_its_extra_fails_in_one_line(tmp_path: Path) -> None:
    """All in one new process, which has imported nothing of the extras."""
    code = (
        f"import sys; sys.modules.update(dict.fromkeys({EXTRAS!r}))\n"
        "from qzoom_agent.cli.main import main\n"
        f"for argv, _ in {VERBS!r}: print(main(argv))"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.stdout.split() == ["4"] * len(VERBS), done.stderr
    for line, (argv, extra) in zip(done.stderr.splitlines(), VERBS, strict=True):
        assert line.startswith(f"qzoom {argv[0]}: ") and line.endswith(f'pip install "qzoom-agent[{extra}]"')
    assert not list(tmp_path.iterdir())
