"""Tasks and scorers from outside the package: as objects, as `module:attribute` and as entry points."""

from __future__ import annotations

import json
from dataclasses import replace
from importlib.metadata import EntryPoint, EntryPoints
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from qzoom_agent import extensions
from qzoom_agent.agent import Agent
from qzoom_agent.cli.main import main
from qzoom_agent.data.samples import Sample, TaskSource
from qzoom_agent.errors import ConfigError
from qzoom_agent.evaluation.run_log import RunFolder
from qzoom_agent.evaluation.runner import evaluate, rescore
from qzoom_agent.evaluation.tasks.catalog import find_task, with_scorer
from qzoom_agent.evaluation.tasks.task import Score, Task
from tests.evaluation.player import numbers, player

MODULE = """
from types import SimpleNamespace

from tests.evaluation.player import numbers


def receipts():
    return numbers(6, name="receipts")


duck = SimpleNamespace(name="duck", load=numbers(4).load, scorers={"loose": lambda answer, sample: True})
nothing = 3


def loose(answer, sample):
    return "x" in answer or answer == sample.answer


def half(answer, sample):
    return 0.5


def wild(answer, sample):
    return 7
"""


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """Work in a folder with a module of one's own, and return the module's name."""
    name = f"mine_{tmp_path.name}"
    (tmp_path / f"{name}.py").write_text(MODULE)
    monkeypatch.chdir(tmp_path)
    return name


def lenient(answer: str, sample: Sample) -> bool:
    return bool(answer)


# ---- objects -------------------------------------------------------------------------------------------------------


def test_a_scorer_of_a_task_may_return_a_number_or_a_bool(tmp_path: Path) -> None:
    seen: list[str] = []

    def third(answer: str, sample: Sample) -> float:
        seen.append(answer)
        return 1 / 3

    task = Task(name="numbers", title="", load=numbers(3).load, scorers={"third": third, "lenient": lenient})
    result = evaluate(player(), [task], out=tmp_path).tasks["numbers"]
    assert result.scores["third"].accuracy.mean == pytest.approx(1 / 3) and result.scores["lenient"].accuracy.mean == 1
    assert result.scores["lenient"].source == f"{__name__}:lenient" and seen == ["0", "1", "2"]
    assert RunFolder(tmp_path).latest()[0].scores["third"] == Score(pytest.approx(1 / 3), "0")


def test_a_scorer_given_to_a_run_leads_it(tmp_path: Path) -> None:
    evaluate(player(lambda index: False), [numbers(3)], out=tmp_path)
    again = evaluate(player(lambda index: False), [numbers(3)], out=tmp_path, scorer=lenient).tasks["numbers"]
    assert (again.scorer, again.accuracy) == (f"{__name__}:lenient", 1.0), "answers of an earlier run are scored, too"
    assert again.scores["clean"].accuracy.mean == 0
    assert rescore(RunFolder(tmp_path), [numbers(3)], scorer=lenient).tasks["numbers"].accuracy == 1


@pytest.mark.parametrize("wrong", [2, -0.1, "right", None, float("nan"), object()])
def test_what_is_no_score_is_refused(wrong: Any, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"returned .* Return a Score, a bool, or a number from 0 to 1"):
        evaluate(player(), [numbers(1)], out=tmp_path, scorer=lambda answer, sample: wrong)


def test_a_scorer_that_takes_something_else_is_refused_before_anything_is_asked() -> None:
    with pytest.raises(ConfigError, match=r"called with an answer and a sample, and takes \(answer\): too many"):
        with_scorer(["needle-scene"], lambda answer: 1.0)  # type: ignore[arg-type,misc]
    with pytest.raises(ConfigError, match="'x' is int, not a function of an answer and a sample"):
        with_scorer([replace(find_task("needle-scene"), scorers={"x": 5})], None)  # type: ignore[dict-item]


def test_an_error_of_a_scorer_is_named_with_its_place(tmp_path: Path) -> None:
    def broken(answer: str, sample: Sample) -> float:
        return 1 / len(answer[:0])

    with pytest.raises(ConfigError, match=r"scorer '.*broken' failed with ZeroDivisionError.*test_doors\.py, line \d+"):
        evaluate(player(), [numbers(1)], out=tmp_path, scorer=broken)


# ---- module:attribute ----------------------------------------------------------------------------------------------


def test_tasks_and_scorers_of_a_module_on_the_command_line(
    here: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(Agent, "from_pretrained", lambda *_, **__: player(lambda index: index % 2 == 0))
    assert main(["eval", f"{here}:receipts", f"{here}:duck", "--scorer", f"{here}:loose", "--out", "run"]) == 0
    out = capsys.readouterr().out
    assert f"accuracy ({here}:loose)  1.000" in out and "accuracy (clean)" in out
    results = json.loads(Path("run/results.json").read_text())
    receipts = results["tasks"]["receipts"]
    assert receipts["part"]["reference"] == f"{here}:receipts" and receipts["scorer"] == f"{here}:loose"
    assert receipts["scores"][f"{here}:loose"]["source"] == f"{here}:loose"
    assert list(results["tasks"]["duck"]["scores"]) == ["loose", f"{here}:loose"]
    trusted = ["--task", f"{here}:receipts", "--task", f"{here}:duck"]
    assert main(["eval", "rescore", "run", "--scorer", f"{here}:half", *trusted]) == 0
    out = capsys.readouterr().out
    assert f"accuracy ({here}:half)   0.500" in out and f"accuracy ({here}:loose)  1.000" in out
    assert main(["eval", f"{here}:duck", "--scorer", f"{here}:wild", "--out", "wild"]) == 2
    assert f"The scorer {here}:wild returned 7" in capsys.readouterr().err


def test_an_evaluation_takes_tasks_by_their_names(here: str, tmp_path: Path) -> None:
    results = evaluate(player(), [f"{here}:receipts", "needle-scene"], out=tmp_path / "run", source=TaskSource(n=1))
    assert list(results.tasks) == ["receipts", "needle-scene"]


def test_what_is_no_task_is_refused(here: str) -> None:
    with pytest.raises(ConfigError, match=r"nothing' is int without name, load, scorers\. Give a Task"):
        find_task(f"{here}:nothing")
    with pytest.raises(ConfigError, match="no_such_module_y:f' cannot be imported: ModuleNotFoundError"):
        find_task("no_such_module_y:f")
    with pytest.raises(ConfigError, match=r"There is no scorer 'kind'\. Known: clean, faithful\..*module:name"):
        with_scorer([numbers()], "kind")
    with pytest.raises(ConfigError, match="nothing' is int, not a function"):
        with_scorer([numbers()], f"{here}:nothing")
    with pytest.raises(ConfigError, match=r"loose' cannot be made.*no arguments"):
        find_task(f"{here}:loose")
    with pytest.raises(ConfigError, match="'numbers' has no scorer"):
        with_scorer([replace(numbers(), scorers={})], None)


def test_samples_that_are_none_are_refused(tmp_path: Path) -> None:
    task = replace(numbers(), load=lambda _: [1, 2])  # type: ignore[arg-type,return-value]
    with pytest.raises(ConfigError, match="gave 1 as question 0, not a Sample"):
        evaluate(player(), [task], out=tmp_path)


@pytest.mark.parametrize("what", ["load", "sample", "kinds"])
def test_a_task_that_fails_is_named_with_the_line(what: str, tmp_path: Path) -> None:
    class Broken(list[Any]):
        kinds = ["number"] * 4

        def __getitem__(self, index: Any) -> Any:
            return {"question": "?"}["image"]

    def load(source: TaskSource) -> Any:
        return {"load": lambda: 1 / 0, "sample": lambda: Broken([1] * 4), "kinds": lambda: [1] * 4}[what]()

    with pytest.raises(ConfigError, match=r"The task 'numbers' failed with \w*Error: .*, line \d+\)"):
        evaluate(player(), [replace(numbers(), load=load)], out=tmp_path, limit=2)


@pytest.mark.parametrize("image", ["board.png", None])
def test_an_image_that_is_not_one_of_pillow_is_refused(image: Any, tmp_path: Path) -> None:
    task = replace(numbers(), load=lambda _: [Sample("0", "numbers", "k", image, "Which?", "1")])  # type: ignore[arg-type,return-value]
    with pytest.raises(ConfigError, match=f"gave {image!r} as an image of question 0.*load_image reads a file"):
        evaluate(player(), [task], out=tmp_path)


# ---- entry points --------------------------------------------------------------------------------------------------


def test_tasks_and_scorers_of_installed_packages(here: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    points = EntryPoints(
        [
            EntryPoint("receipts", f"{here}:receipts", "qzoom_agent.tasks"),
            EntryPoint("half", f"{here}:half", "qzoom_agent.scorers"),
        ]
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setattr(extensions, "entry_points", lambda group: points.select(group=group))
    task = find_task("receipts")
    assert (task.name, task.reference) == ("receipts", "receipts")
    result = evaluate(player(), [task], out=tmp_path / "run", scorer="half").tasks["receipts"]
    assert (result.scorer, result.accuracy) == ("half", 0.5)
    assert result.scores["half"].source == f"{here}:half"


def test_an_object_with_the_attributes_of_a_task_is_one() -> None:
    from qzoom_agent.evaluation.tasks.catalog import as_task

    found = as_task(lambda: SimpleNamespace(name="duck", load=numbers().load, scorers={}, coarse_tokens=(4, 16)), "m:f")
    assert (found.name, found.title, found.coarse_tokens) == ("duck", "duck", (4, 16))
