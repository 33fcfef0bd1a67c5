"""Old module names import and run their successors, and warn; other names are not found."""

from __future__ import annotations

import importlib
import subprocess
import sys
import warnings
from importlib.util import find_spec
from pathlib import Path

import pytest

from qzoom_agent.moved import MOVED


@pytest.mark.parametrize("new", sorted(set(MOVED.values())))
def test_every_new_name_is_a_module(new: str) -> None:
    assert find_spec(new) is not None


def test_an_old_name_gives_the_new_module_with_a_warning() -> None:
    from qzoom_agent.data.samples import TaskSource

    for name in [name for name in sys.modules if name.startswith("qzoom_agent.evals")]:
        del sys.modules[name]
    with pytest.warns(
        DeprecationWarning, match=r"evals.suites.base is now qzoom_agent.data.samples; .* in .* 0\.3"
    ) as told:
        old = importlib.import_module("qzoom_agent.evals.suites.base")
    assert len(told) == 1
    assert old.Sample is importlib.import_module("qzoom_agent.data.samples").Sample
    assert old.Source is TaskSource
    with pytest.raises(AttributeError, match="no attribute 'Nothing'"):
        _ = old.Nothing


@pytest.mark.parametrize(
    "line",
    [
        "from qzoom_agent.evals.suites.needle import sample",
        "from qzoom_agent.evals.suites.catalog import find_suite",
        "from qzoom_agent.backends import Settings, ScriptedBackend",
        "from qzoom_agent.tools import Zoom, as_langchain_tool",
        "import qzoom_agent.rl.branches.ship",
    ],
)
def test_lines_of_the_old_documentation_work(line: str) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        exec(line, {})


@pytest.mark.parametrize("name", ["evals.nothing", "evals.pareto", "rl.grpo.trainer", "nothing", "backends.hf.more"])
def test_other_names_are_not_found(name: str) -> None:
    with warnings.catch_warnings(), pytest.raises(ModuleNotFoundError):
        warnings.simplefilter("ignore", DeprecationWarning)
        importlib.import_module(f"qzoom_agent.{name}")


@pytest.mark.parametrize("old", ["qzoom_agent.rl.grpo", "qzoom_agent.rl.coldstart.run"])
def test_an_old_command_runs_the_new_one(old: str, tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", old, "--help"], cwd=tmp_path, capture_output=True, text=True, timeout=300, check=False
    )
    assert done.returncode == 0 and "usage:" in done.stdout, done.stderr
    assert f"DeprecationWarning: The module {old} is now {MOVED[old]}" in done.stderr
