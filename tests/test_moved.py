"""Old module names import and run their successors, and warn; other names are not found."""

from __future__ import annotations

import importlib
import runpy
import sys
import warnings
from importlib.util import find_spec

import pytest

from qzoom_agent.moved import MOVED
from tests.cases import each_case


@each_case("new", sorted(set(MOVED.values())))
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


def test_an_old_command_runs_the_new_one(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    old = "qzoom_agent.rl.grpo"
    monkeypatch.setattr(sys, "argv", ["grpo", "--help"])
    with pytest.raises(SystemExit) as ended, pytest.warns(DeprecationWarning, match=f"{old} is now {MOVED[old]}"):
        runpy.run_module(old, run_name="__main__")
    assert not ended.value.code and "usage:" in capsys.readouterr().out
