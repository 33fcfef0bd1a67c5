"""Runs: the same questions for everyone, nothing lost, nothing asked twice, nothing leaked, every failure counted."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from qzoom_agent.agent import Agent
from qzoom_agent.answer import Answer
from qzoom_agent.config import AgentConfig
from qzoom_agent.data.samples import Sample, TaskSource
from qzoom_agent.errors import BackendError, ConfigError, ImageError
from qzoom_agent.evaluation import runner
from qzoom_agent.evaluation.compare import compare
from qzoom_agent.evaluation.run_log import RunFolder
from qzoom_agent.evaluation.runner import evaluate, rescore
from qzoom_agent.evaluation.sample_result import SampleResult, episode_seed
from qzoom_agent.evaluation.summary import Results, summarise
from qzoom_agent.evaluation.tasks.catalog import find_task
from qzoom_agent.evaluation.tasks.needle import TASK_NAMES, sample_seed
from qzoom_agent.evaluation.tasks.task import Score, Task
from qzoom_agent.geometry import Box
from qzoom_agent.models.scripted import ScriptedBackend
from qzoom_agent.trace import Trace, saved_images
from tests.evaluation.player import Numbers, Watcher, changed, faithful, lines, numbers, player


class Given:
    """An agent that keeps what it was given."""

    def __init__(self, **config: Any) -> None:
        self.agent = player(**config)
        self.config = self.agent.config
        self.calls: list[dict[str, Any]] = []

    def run(self, image: Any, question: str, *, boxes: Any = None, seed: int | None = None) -> Answer:
        self.calls.append({"boxes": boxes, "seed": seed})
        return self.agent.run(image, question, boxes=boxes, seed=seed)


# ---- one run -------------------------------------------------------------------------------------------------------


def test_a_run_leaves_everything_in_its_folder(tmp_path: Path) -> None:
    watch = Watcher()
    agent = player(lambda i: i != 3, zooms=lambda i: i > 0)
    results = evaluate(agent, [numbers(5)], out=tmp_path, environment={"here": "x"}, weights="w", watch=watch)
    result = results.tasks["numbers"]
    assert (result.n, result.accuracy, result.failed, result.partial) == (5, 0.8, 0, False)
    assert watch.begun == [("numbers", 5)]
    assert [new for _, new in watch.rows] == [True] * 5
    assert {path.name for path in tmp_path.iterdir()} == {
        ".lock", "config.yaml", "env.json", "results.json", "run.json", "samples.jsonl", "traces",
    }  # fmt: skip
    folder = RunFolder.existing(tmp_path)
    rows = folder.latest()
    assert AgentConfig.load(tmp_path / "config.yaml") == agent.config
    assert json.loads((tmp_path / "env.json").read_text()) == [{"here": "x"}]
    assert Results.of(folder) == results
    assert len(lines(tmp_path / "samples.jsonl")) == len(rows) == len({row.key for row in rows}) == 5
    for row in rows:
        trace = Trace.load(folder.trace_path(row.key))
        assert trace.question == row.question
        assert trace.seed == row.seed
        picture = saved_images(folder.trace_path(row.key))
        assert picture(row.image).size == (168, 112)
    assert rows[1].usage.served == 1
    assert rows[1].recall == 1.0
    assert 0 < (rows[1].iou or 0) < 1


def test_a_run_without_traces_has_none(tmp_path: Path) -> None:
    evaluate(player(), [numbers(2)], out=tmp_path, traces=False)
    assert not (tmp_path / "traces").exists()


def test_both_scorers_are_applied_and_named(tmp_path: Path) -> None:
    agent = Agent(ScriptedBackend(lambda _: "0 or 1 or 2"))
    result = evaluate(agent, [numbers(3)], out=tmp_path).tasks["numbers"]
    assert result.scorer == "faithful"
    assert {name: marks.accuracy.mean for name, marks in result.scores.items()} == {"faithful": 1.0, "clean": 1 / 3}
    assert result.marks.published == {"second half": 1.0}
    by_ours = summarise(RunFolder(tmp_path), scorer="clean").tasks["numbers"]
    assert (by_ours.scorer, by_ours.accuracy) == ("clean", 1 / 3)
    with pytest.raises(ConfigError, match="clean, faithful"):
        summarise(RunFolder(tmp_path), scorer="kind")


def test_an_answer_that_cannot_be_read_lowers_the_parse_rate(tmp_path: Path) -> None:
    result = evaluate(player(lambda i: i % 2 == 0), [numbers(4)], out=tmp_path).tasks["numbers"]
    assert {name: marks.parse_rate for name, marks in result.scores.items()} == {"faithful": 1.0, "clean": 0.5}


@pytest.mark.parametrize(
    ("policy", "given"), [("explicit", False), ("direct", False), ("oracle", True), ("random", True)]
)
def test_gold_boxes_reach_only_the_policies_that_take_them(policy: str, given: bool, tmp_path: Path) -> None:
    agent = Given(policy=policy)
    evaluate(agent, [numbers(2)], out=tmp_path)
    assert [call["boxes"] is not None for call in agent.calls] == [given, given]


def test_an_oracle_that_knows_nothing_is_an_error(tmp_path: Path) -> None:
    result = evaluate(player(policy="oracle"), [changed(5, boxes=())], out=tmp_path).tasks["numbers"]
    # samples 0 and 4 need no crop: there an oracle has nothing to know
    assert result.statuses == {"answered": 2, "error": 3}


def test_a_random_crop_is_shown_where_nothing_is_known_of_boxes(tmp_path: Path) -> None:
    def unknown(index: int, sample: Sample) -> Sample:
        return replace(sample, boxes=(), coarse_suffices=True if index == 0 else None)

    evaluate(player(policy="random"), [numbers(3, change=unknown)], out=tmp_path)
    # of sample 0 it is known that no part in particular is meant
    assert [len(row.crops) for row in RunFolder(tmp_path).in_order()] == [0, 1, 1]


def test_seeds_are_of_the_sample_and_not_of_the_order(tmp_path: Path) -> None:
    first, again = Given(), Given()
    evaluate(first, [numbers(3)], out=tmp_path / "a")
    evaluate(again, [numbers(3)], out=tmp_path / "b", workers=3)
    assert {call["seed"] for call in again.calls} == {call["seed"] for call in first.calls}
    assert len({call["seed"] for call in first.calls}) == 3
    assert 0 <= episode_seed(1, "a") < 2**31
    assert len({episode_seed(1, "a"), episode_seed(2, "a"), episode_seed(1, "a", 1)}) == 3


def test_workers_change_nothing(tmp_path: Path) -> None:
    agent = player(lambda i: i % 3 > 0, zooms=lambda i: i % 2 > 0)
    evaluate(agent, [numbers(12)], out=tmp_path / "one")
    evaluate(agent, [numbers(12)], out=tmp_path / "four", workers=4)
    assert _timeless(tmp_path / "one") == _timeless(tmp_path / "four")


def _timeless(path: Path) -> list[dict[str, Any]]:
    rows = [row.model_dump(mode="json") for row in RunFolder(path).latest()]
    for row in rows:
        del row["elapsed"], row["peak_memory"], row["usage"]["seconds"]
    return rows


# ---- failures ------------------------------------------------------------------------------------------------------


class Failing(Given):
    """Raises for one sample."""

    def __init__(self, error: Exception) -> None:
        super().__init__()
        self.error = error

    def run(self, image: Any, question: str, **more: Any) -> Answer:
        if "board 1?" in question:
            raise self.error
        return super().run(image, question, **more)


def test_a_failing_sample_is_wrong_named_and_asked_again(tmp_path: Path) -> None:
    result = evaluate(Failing(BackendError("The server is gone.")), [numbers(3)], out=tmp_path).tasks["numbers"]
    assert (result.n, result.failed, result.statuses) == (3, 1, {"answered": 2, "error": 1})
    assert result.accuracy == pytest.approx(2 / 3)
    assert RunFolder(tmp_path).latest()[1].error == "BackendError: The server is gone."
    healed = Given()
    result = evaluate(healed, [numbers(3)], out=tmp_path).tasks["numbers"]
    assert len(healed.calls) == 1
    assert (result.accuracy, result.failed) == (1.0, 0)
    assert len(lines(tmp_path / "samples.jsonl")) == 3


def test_a_backend_that_fails_inside_a_run_is_wrong_too(tmp_path: Path) -> None:
    result = evaluate(Agent(ScriptedBackend([])), [numbers(2)], out=tmp_path).tasks["numbers"]
    assert (result.accuracy, result.statuses) == (0.0, {"error": 2})
    assert "ran out of replies" in (RunFolder(tmp_path).latest()[0].error or "")


def test_a_sample_that_cannot_be_read_counts_as_wrong(tmp_path: Path) -> None:
    def torn(index: int, sample: Sample) -> Sample:
        if index == 2:
            raise ImageError("Cannot read it.")
        return sample

    result = evaluate(player(), [numbers(4, change=torn)], out=tmp_path).tasks["numbers"]
    assert (result.n, result.accuracy, result.failed) == (4, 0.75, 1)
    assert RunFolder(tmp_path).latest()[2].id == "numbers[2]"


def test_a_bug_is_not_a_wrong_answer(tmp_path: Path) -> None:
    with pytest.raises(ZeroDivisionError):
        evaluate(Failing(ZeroDivisionError()), [numbers(3)], out=tmp_path)


@pytest.mark.parametrize(
    "wrong",
    [{"source": TaskSource(n=0)}, {"source": TaskSource(seed=-1)}, {"repeats": 0}, {"workers": 0}, {"limit": 0}],
)
def test_impossible_sizes_are_refused(wrong: dict[str, Any], tmp_path: Path) -> None:
    with pytest.raises(ConfigError):
        evaluate(player(), [numbers()], out=tmp_path / "out", **wrong)
    assert not (tmp_path / "out").exists()


# ---- going on ------------------------------------------------------------------------------------------------------


def test_an_interrupted_run_goes_on(tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt):
        evaluate(player(), [numbers(6)], out=tmp_path, watch=Watcher(stop_after=3))
    partial = summarise(RunFolder(tmp_path)).tasks["numbers"]
    assert (partial.n, partial.partial) == (3, True)
    with (tmp_path / "samples.jsonl").open("a") as file:
        file.write('{"key": "torn by a ki')
    agent, watch = Given(), Watcher()
    result = evaluate(agent, [numbers(6)], out=tmp_path, watch=watch).tasks["numbers"]
    assert len(agent.calls) == 3
    assert [new for _, new in watch.rows] == [False] * 3 + [True] * 3
    assert (result.n, result.accuracy, result.partial) == (6, 1.0, False)
    assert [json.loads(line)["index"] for line in lines(tmp_path / "samples.jsonl")] == list(range(6))


def test_a_finished_run_asks_nothing(tmp_path: Path) -> None:
    evaluate(player(), [numbers(3)], out=tmp_path)
    agent = Given()
    assert evaluate(agent, [numbers(3)], out=tmp_path).tasks["numbers"].n == 3
    assert not agent.calls


def test_a_run_may_be_enlarged(tmp_path: Path) -> None:
    evaluate(player(), [numbers(name="one")], out=tmp_path, source=TaskSource(n=3))
    agent = Given()
    results = evaluate(
        agent, [numbers(name="one"), numbers(name="two")], out=tmp_path, source=TaskSource(n=4), repeats=2
    )
    assert len(agent.calls) == (8 - 3) + 8
    assert {name: result.n for name, result in results.tasks.items()} == {"one": 4, "two": 4}
    assert results.tasks["one"].marks.repeats is not None


def test_the_figures_of_a_run_do_not_stand_for_it_while_it_is_enlarged(tmp_path: Path) -> None:
    evaluate(player(), [numbers()], out=tmp_path, source=TaskSource(n=3))
    with pytest.raises(KeyboardInterrupt):
        evaluate(player(), [numbers()], out=tmp_path, source=TaskSource(n=9), watch=Watcher(stop_after=5))
    found = Results.of(RunFolder(tmp_path)).tasks["numbers"]
    assert (found.n, found.part.planned, found.partial) == (3, 9, True)
    evaluate(player(), [numbers()], out=tmp_path, source=TaskSource(n=9))
    assert Results.of(RunFolder(tmp_path)).tasks["numbers"].partial is False


def test_a_task_may_be_added_with_a_scorer_that_no_other_has(tmp_path: Path) -> None:
    one = replace(numbers(2, name="one"), scorers={"faithful": faithful})
    evaluate(player(), [one], out=tmp_path)
    found = evaluate(player(), [one, numbers(2, name="two")], out=tmp_path, scorer="clean").tasks
    assert {name: task.scorer for name, task in found.items()} == {"one": "faithful", "two": "clean"}


def test_without_a_fingerprint_the_weights_are_those_that_the_agent_was_loaded_with(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(runner, "weights_of_agent", lambda agent: "these")
    assert evaluate(player(), [numbers(1)], out=tmp_path).weights == "these"
    monkeypatch.setattr(runner, "weights_of_agent", lambda agent: "others")
    with pytest.raises(ConfigError, match="weights: 'these' then, 'others' now"):
        evaluate(player(), [numbers(1)], out=tmp_path)


def test_memory_is_not_measured_where_the_system_does_not_tell_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.platform", "win32")
    monkeypatch.setitem(sys.modules, "resource", None)  # as on Windows
    assert "host" not in runner.peak_memory()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"agent": player(policy="direct")}, "policy: 'explicit' then, 'direct' now"),
        ({"source": TaskSource(seed=1)}, "seed: 0 then, 1 now"),
        ({"weights": "other"}, "weights: 'these' then, 'other' now (those of a model in the package change with"),
        ({"source": TaskSource(split="ood")}, "numbers: split None then, 'ood' now"),
        ({"source": TaskSource(n=2)}, "20 samples then, 2 now"),
        ({"limit": 5}, "20 samples then, 5 now"),
    ],
)
def test_a_folder_of_another_run_is_refused(change: dict[str, Any], message: str, tmp_path: Path) -> None:
    given: dict[str, Any] = {"agent": player(), "weights": "these"}
    evaluate(**given, tasks=[numbers()], out=tmp_path)
    before = (tmp_path / "run.json").read_text()
    with pytest.raises(ConfigError, match="holds another run") as refused:
        evaluate(**(given | change), tasks=[numbers()], out=tmp_path)
    assert message in str(refused.value)
    assert (tmp_path / "run.json").read_text() == before


def test_a_changed_sample_is_asked_again(tmp_path: Path) -> None:
    evaluate(player(), [numbers(4)], out=tmp_path)

    def repainted(index: int, sample: Sample) -> Sample:
        if index == 2:
            sample.image.putpixel((0, 0), (1, 2, 3))
        return sample

    agent = Given()
    assert evaluate(agent, [numbers(4, change=repainted)], out=tmp_path).tasks["numbers"].n == 4
    assert len(agent.calls) == 1


@pytest.mark.parametrize(
    ("change", "calls"),
    [({"answer": "9", "answers": ("9",), "kind": "mended"}, 0), ({"boxes": (Box(0, 0, 9, 9),)}, 1)],
    ids=["answers", "boxes"],
)
def test_what_a_task_says_of_a_sample_is_that_of_now(change: dict[str, Any], calls: int, tmp_path: Path) -> None:
    """Another answer is scored without asking; other boxes are asked about, since crops are measured by them."""
    evaluate(player(), [numbers(2)], out=tmp_path)

    def mended(index: int, sample: Sample) -> Sample:
        return replace(sample, **change) if index == 1 else sample

    agent = Given()
    results = evaluate(agent, [numbers(2, change=mended)], out=tmp_path)
    assert len(agent.calls) == calls
    row = RunFolder(tmp_path).latest()[1]
    if calls:
        assert row.boxes == [(0, 0, 9, 9)] and results.tasks["numbers"].accuracy == 1.0
        return
    assert (row.gold, row.kind, row.answer, row.value("clean")) == (["9"], "mended", "1", 0.0)
    assert results.tasks["numbers"].accuracy == 0.5
    evaluate(player(), [numbers(2)], out=tmp_path / "before")
    with pytest.raises(ConfigError, match="scored against different answers: sample numbers-1 has '1' in one and '9'"):
        compare(RunFolder(tmp_path / "before"), RunFolder(tmp_path))


def test_an_image_that_its_metadata_turn_is_asked_about_once(tmp_path: Path) -> None:
    """A task of your own may open its files with Pillow, which turns nothing."""
    (exif := Image.Exif())[0x112] = 6
    Image.new("RGB", (168, 112), "red").save(tmp_path / "turned.jpg", exif=exif)
    agent = Given(policy="direct")
    for _ in range(2):
        task = changed(1, image=Image.open(tmp_path / "turned.jpg"), boxes=(), coarse_suffices=None)
        evaluate(agent, [task], out=tmp_path / "run")
    assert len(agent.calls) == 1
    assert RunFolder(tmp_path / "run").latest()[0].size == (112, 168), "as the agent sees it"


def test_a_sample_that_failed_last_is_asked_whatever_came_before(tmp_path: Path) -> None:
    """A run that is killed after such a row leaves an older answer before it."""
    evaluate(player(), [numbers(2)], out=tmp_path)
    folder = RunFolder(tmp_path)
    row = folder.latest()[1]
    with folder.journal() as journal:
        journal.append(row.model_copy(update={"key": "other", "status": "error", "answer": None, "scores": {}}))
    agent = Given()
    assert evaluate(agent, [numbers(2)], out=tmp_path).tasks["numbers"].failed == 0
    assert len(agent.calls) == 1


def test_the_time_of_an_answer_is_its_own_where_a_run_is_resumed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    read: list[int] = []

    def slow(index: int, sample: Sample) -> Sample:
        read.append(index)  # which takes a second
        return sample

    monkeypatch.setattr(runner, "perf_counter", lambda: float(len(read)))
    for n in (5, 6):
        evaluate(player(), [numbers(n, change=slow)], out=tmp_path)
    assert [row.elapsed for row in RunFolder(tmp_path).latest()] == [1.0] * 6


def test_tasks_of_one_name_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="Two of the tasks are called 'numbers'"):
        evaluate(player(), [numbers(2), numbers(3)], out=tmp_path)


def test_one_process_at_a_time(tmp_path: Path) -> None:
    evaluate(player(), [numbers(2)], out=tmp_path)
    with RunFolder(tmp_path).writing(), pytest.raises(ConfigError, match="Another process"):
        evaluate(player(), [numbers(2)], out=tmp_path)


# ---- scoring again -------------------------------------------------------------------------------------------------


def test_rescoring_asks_nothing_and_uses_the_rules_of_now(tmp_path: Path) -> None:
    agent = Agent(ScriptedBackend(lambda _: "0 or 1 or 2"))
    evaluate(agent, [numbers(3)], out=tmp_path)
    seen: list[Sample] = []

    def lenient(text: str | None, sample: Sample) -> Score:
        seen.append(sample)
        return Score(1.0, text)

    task = Task(name="numbers", title="", load=numbers().load, scorers={"lenient": lenient, "faithful": faithful})
    results = rescore(RunFolder(tmp_path), [task])
    result = results.tasks["numbers"]
    assert (result.scorer, result.accuracy, list(result.scores)) == (
        "lenient",
        1.0,
        ["lenient", "faithful", "clean"],  # a scorer that the task does not have keeps its scores
    )
    assert Results.of(RunFolder(tmp_path)) == results
    assert [(one.answer, one.answers, one.kind, one.meta) for one in seen] == [
        (one.answer, one.answers, one.kind, one.meta) for one in Numbers("numbers", 3)
    ]


def test_rescoring_keeps_failures_wrong(tmp_path: Path) -> None:
    evaluate(Failing(BackendError("gone")), [numbers(3)], out=tmp_path)
    rescored: Sequence[SampleResult] = RunFolder(tmp_path).latest()
    assert rescore(RunFolder(tmp_path), [numbers(3)]).tasks["numbers"].accuracy == pytest.approx(2 / 3)
    assert [row.status for row in RunFolder(tmp_path).latest()] == [row.status for row in rescored]


def test_a_folder_without_a_run_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no run in"):
        RunFolder.existing(tmp_path)


# ---- the needle tasks ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("task", TASK_NAMES)
def test_every_needle_task_runs(task: str, tmp_path: Path) -> None:
    agent = Agent(ScriptedBackend(lambda messages: "7"), config=AgentConfig(policy="direct"))
    assert evaluate(agent, [find_task(task)], out=tmp_path, source=TaskSource(n=2)).tasks[task].n == 2
    ids = {row.id for row in RunFolder(tmp_path).latest()}
    assert ids == {f"{task}-test-{sample_seed(0, index)}" for index in range(2)}


def test_a_wrong_field_of_an_own_task_or_scorer_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"question 'numbers-0' of the task 'numbers' is wrong: gold\.0: "):
        evaluate(player(), [changed(1, answers=(42,))], out=tmp_path / "a")

    def odd(text: str | None, sample: Sample) -> Score:
        return Score(1.0, 42)  # type: ignore[arg-type]

    with pytest.raises(ConfigError, match=r"whose `extracted` is 42\. Give the text"):
        evaluate(player(), [numbers(1)], out=tmp_path / "b", scorer=odd)


def test_a_coarse_view_that_tasks_set_is_left_to_them_when_a_run_is_repeated(tmp_path: Path) -> None:
    own, plain = replace(numbers(2), coarse_tokens=(16, 20)), replace(numbers(2), name="plain")

    def run(*tasks: Task, out: str, config: AgentConfig | None = None) -> Results:
        agent = player() if config is None else player().replace(**config.model_dump(exclude={"model", "protocol"}))
        given = config is not None and config.budget.coarse_tokens is not None
        return evaluate(agent, list(tasks), out=tmp_path / out, source=TaskSource(n=2), own_budget=given)

    first = run(own, out="first")
    saved = RunFolder(tmp_path / "first").config
    assert saved.budget.coarse_tokens is None
    again = run(own, out="again", config=saved)
    assert again.tasks["numbers"].cost.visual_tokens == first.tasks["numbers"].cost.visual_tokens
    assert run(own, out="first").tasks["numbers"].n == 2  # resumed
    assert set(run(own, plain, out="first").tasks) == {
        "numbers",
        "plain",
    }  # and grown, by one that leaves it to the agent
    assert RunFolder(tmp_path / "first").config.budget.coarse_tokens is not None
    assert set(run(own, out="first").tasks) >= {"numbers"}
