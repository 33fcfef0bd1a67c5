"""The figures of a run: what is counted, once and how sure, and what it cost."""

from __future__ import annotations

import base64
import json
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from qzoom_agent.agent import Agent
from qzoom_agent.cli.result_tables import show_comparison
from qzoom_agent.data.samples import TaskSource
from qzoom_agent.errors import BackendError, ConfigError
from qzoom_agent.evaluation.compare import compare
from qzoom_agent.evaluation.report import _points, write_run_report
from qzoom_agent.evaluation.run_log import RunFolder
from qzoom_agent.evaluation.runner import evaluate, plan, stratified_order
from qzoom_agent.evaluation.sample_result import SampleResult
from qzoom_agent.evaluation.stats import figure, paired, wilson
from qzoom_agent.evaluation.summary import summarise
from qzoom_agent.evaluation.tasks.task import Scored
from qzoom_agent.messages import Message
from qzoom_agent.models.scripted import ScriptedBackend
from tests.evaluation.player import Numbers, Watcher, changed, numbers, player
from tests.evaluation.tasks import fixtures

# ---- statistics ----------------------------------------------------------------------------------------------------


def test_right_and_wrong_get_wilsons_interval() -> None:
    found = figure([1, 0, 1, 1])
    assert (found.n, found.mean, found.interval) == (4, 0.75, wilson(3, 4))
    assert found.se == pytest.approx(0.25)


def test_copies_of_a_sample_make_nothing_surer() -> None:
    values = [1.0, 0.0, 1.0, 0.0, 1.0, 1.0, 0.0, 1.0]
    copied = [value for value in values for _ in range(5)]
    names = [str(index) for index in range(8) for _ in range(5)]
    alone, found, naive = figure(values), figure(copied, clusters=names), figure(copied)
    assert found.se == pytest.approx(alone.se)
    assert alone.interval and found.interval and naive.interval
    assert found.interval.high - found.interval.low > 1.5 * (naive.interval.high - naive.interval.low)


def test_clusters_of_one_are_no_clusters() -> None:
    values = [1.0, 0.0, 1.0]
    assert figure(values, clusters=["a", "b", "c"]) == figure(values)


def test_all_right_in_few_clusters_is_not_certainty() -> None:
    assert figure([1.0] * 100, clusters=[str(index // 25) for index in range(100)]).interval == wilson(4, 4)


def test_a_clustered_comparison_is_less_sure() -> None:
    before, after = [0.0] * 12, [1.0] * 9 + [0.0] * 3
    loose, bound = paired(before, after), paired(before, after, clusters=[str(index // 3) for index in range(12)])
    assert loose.difference == bound.difference == 0.75
    assert loose.interval and bound.interval
    assert bound.interval.low < loose.interval.low
    assert paired([0.0] * 6, [1.0] * 6, clusters=list("aabbcc")).p == 0.25, "all three clusters gained"


def test_a_standard_error_needs_two() -> None:
    for found in (figure([1.0]), figure([1.0, 0.0], clusters=["a", "a"])):
        assert found.se is None


# ---- which samples -------------------------------------------------------------------------------------------------


@given(st.lists(st.sampled_from("abc"), min_size=1, max_size=60), st.integers(0, 5))
def test_every_beginning_has_each_kind_in_its_share(kinds: list[str], seed: int) -> None:
    order = stratified_order(kinds, seed=seed)
    assert sorted(order) == list(range(len(kinds)))
    total = Counter(kinds)
    for n in range(len(kinds) + 1):
        taken = Counter(kinds[index] for index in order[:n])
        for kind, count in total.items():
            assert abs(taken[kind] - n * count / len(kinds)) <= 1 + 1e-9 + (len(total) - 2) * 0.5


def test_a_limit_is_partial_and_seeded() -> None:
    samples = Numbers("numbers", 100)
    part, chosen = plan(samples, TaskSource(), limit=20)
    assert (part.planned, part.total, part.partial, part.stratified) == (20, 100, True, True)
    assert Counter(samples.kinds[index] for index in chosen) == {"odd": 10, "even": 8, "tenth": 2}
    assert chosen != plan(samples, TaskSource(seed=1), limit=20)[1]
    assert set(chosen) < set(plan(samples, TaskSource(), limit=40)[1])
    whole, every = plan(samples, TaskSource(), limit=200)
    assert (whole.partial, every) == (False, list(range(100)))


def test_an_empty_task_is_refused() -> None:
    with pytest.raises(ConfigError, match="no samples"):
        plan(Numbers("numbers", 0), TaskSource(), limit=None)


def test_a_limited_run_is_stamped(tmp_path: Path) -> None:
    result = evaluate(player(), [numbers(40)], out=tmp_path, limit=10).tasks["numbers"]
    assert (result.n, result.partial, result.marks.repeats) == (10, True, None)
    assert {kind: one.n for kind, one in result.marks.kinds.items()} == {"even": 4, "odd": 5, "tenth": 1}
    assert evaluate(player(), [numbers(40)], out=tmp_path, limit=20).tasks["numbers"].n == 20


# ---- figures -------------------------------------------------------------------------------------------------------


def test_costs_and_looks_stand_beside_the_accuracy(tmp_path: Path) -> None:
    agent = player(zooms=lambda i: i % 2 == 0)
    result = evaluate(agent, [numbers(8)], out=tmp_path).tasks["numbers"]
    look, cost = result.perception, result.cost
    assert (look.zooms, look.zoom_rate, look.calls, look.served, look.gate_rate) == (0.5, 0.5, 4, 4, None)
    assert look.needless_zooms == 1.0
    assert look.recall is not None and look.recall.mean == 0.5
    assert cost.visual_tokens.mean == cost.coarse_tokens + cost.crop_tokens
    assert cost.crop_tokens > 0
    assert cost.token_layers == (8, 0.0, 0.0, None), "no share of something: zeros are no wrong answers"
    assert set(cost.phases) == {"perceive", "think", "act", "total"}
    assert cost.phases["total"].p95 >= cost.phases["total"].p50 > 0
    assert cost.samples_per_second is not None
    assert cost.peak_memory["host"] > 10**7


def test_a_scorer_that_some_rows_lack_has_no_figure(tmp_path: Path) -> None:
    assert set(evaluate(player(), [numbers(3)], out=tmp_path).tasks["numbers"].scores) == {"faithful", "clean"}
    run, whole = RunFolder(tmp_path), RunFolder(tmp_path / "whole")
    evaluate(player(), [numbers(3)], out=whole.path)
    rows = [row.model_copy(update={"scores": {"faithful": row.scores["faithful"]}}) for row in run.latest()]
    run.replace_rows([*run.latest()[:-1], rows[-1]])
    assert set(summarise(run).tasks["numbers"].scores) == {"faithful"}
    run.replace_rows(rows)
    for pair in ((run, whole), (whole, run)):
        with pytest.raises(ConfigError, match="no scorer 'clean' in both"):
            compare(*pair, scorer="clean")


def test_samples_that_failed_do_not_make_a_run_cheaper(tmp_path: Path) -> None:
    def breaks(index: int) -> bool:
        if index > 3:
            raise BackendError("The server is gone.")
        return True

    whole = evaluate(player(), [numbers(8)], out=tmp_path / "whole").tasks["numbers"]
    broken = evaluate(player(breaks), [numbers(8)], out=tmp_path / "broken").tasks["numbers"]
    assert (broken.failed, broken.accuracy) == (4, 0.5)
    assert broken.cost.visual_tokens.n == 4
    assert broken.cost.visual_tokens.mean == whole.cost.visual_tokens.mean
    assert (broken.cost.turns, broken.cost.written_tokens) == (whole.cost.turns, whole.cost.written_tokens)
    found = compare(RunFolder(tmp_path / "whole"), RunFolder(tmp_path / "broken")).tasks["numbers"]
    assert (found.n, found.difference.difference, found.visual_tokens.difference) == (8, -0.5, 0.0)
    assert (found.visual_tokens.n, found.token_layers.n, found.seconds.n) == (4, 4, 4)
    assert found.token_layers.interval is None


def test_repeats_are_of_one_sample(tmp_path: Path) -> None:
    tries: Counter[int] = Counter()

    def right(index: int) -> bool:
        tries[index] += 1
        return index > 1 or (index == 1 and tries[index] == 2)

    result = evaluate(player(right), [numbers(4)], out=tmp_path, repeats=3).tasks["numbers"]
    repeats = result.marks.repeats
    assert repeats is not None and repeats.k == 3
    assert result.n == 4
    assert result.accuracy == repeats.average.mean == pytest.approx((0 + 1 / 3 + 1 + 1) / 4)
    assert repeats.passed.mean == 0.75
    # wrong thrice in the same words is consistent, too; "x", "1", "x" agrees in one pair of three
    assert repeats.consistency.mean == pytest.approx((1 + 1 / 3 + 1 + 1) / 4)
    assert sum(result.statuses.values()) == 12
    seeds = {row.seed for row in RunFolder(tmp_path).latest()}
    assert len(seeds) == 12


def test_own_figures_of_several_repeats_are_their_mean(tmp_path: Path) -> None:
    def points(scored: Sequence[Scored]) -> dict[str, float]:
        return {"points": sum(one.value for one in scored), "all right": float(all(one.value for one in scored))}

    tries: Counter[int] = Counter()

    def right(index: int) -> bool:
        tries[index] += 1
        return index > 0 or tries[index] == 2

    task = replace(numbers(4), aggregate=points)
    result = evaluate(player(right), [task], out=tmp_path, repeats=2).tasks["numbers"]
    assert result.accuracy == pytest.approx(7 / 8)
    assert result.marks.published == {"points": pytest.approx(3.5), "all right": pytest.approx(0.5)}


def test_a_sample_whose_image_is_damaged_counts_in_every_figure(tmp_path: Path) -> None:
    """The first of two questions of HR-Bench, in its four rotations; the damage shows when the image is decoded."""
    rows = fixtures.hr_rows()
    intact = base64.b64decode(rows[0]["image"])
    damaged = bytearray(intact)
    at = intact.index(b"IDAT") + 4
    damaged[at : at + 20] = bytes(20)
    rows = [row | {"image": base64.b64encode(damaged).decode()} if at < 4 else row for at, row in enumerate(rows)]
    path = fixtures.tsv(rows, tmp_path / "hr.tsv")

    def reply(messages: list[Message]) -> str:
        text = " ".join(part["text"] for one in messages for part in one["content"] if part["type"] == "text")
        found = re.search(r"([A-D])\. left", text)
        assert found
        return found[1]

    agent = Agent(ScriptedBackend(reply))
    run = evaluate(agent, ["hrbench-4k"], out=tmp_path / "run", source=TaskSource(path=str(path)))
    result = run.tasks["hrbench-4k"]
    assert (result.n, result.failed, result.accuracy) == (8, 4, 0.5)
    figures = {"single": 0.0, "cross": 1.0, "average": 0.5, "strict circular": 0.5, "consistent": 1.0}
    assert result.marks.published == figures
    first = RunFolder(tmp_path / "run").latest()[0]
    assert (first.id, first.cluster, first.gold) == ("hrbench-4k-0", "hrbench-4k-0", ["A"])
    assert first.size == (96, 64) and first.question.startswith("Which one is it")


def test_two_questions_of_one_id_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="questions 0 and 1, counted from 0, have the same id, 'one'"):
        evaluate(player(), [changed(2, id="one")], out=tmp_path)


def test_questions_of_one_image_are_one_cluster(tmp_path: Path) -> None:
    right = {0, 1, 4, 5, 8, 9}
    apart = evaluate(player(lambda i: i in right), [numbers(12)], out=tmp_path / "a").tasks["numbers"]
    bound = evaluate(player(lambda i: i in right), [numbers(12, clustered=True)], out=tmp_path / "b").tasks["numbers"]
    assert apart.accuracy == bound.accuracy == 0.5
    assert apart.se and bound.se and bound.se > 1.3 * apart.se


# ---- two runs ------------------------------------------------------------------------------------------------------


def two(tmp_path: Path, n: int = 8) -> tuple[RunFolder, RunFolder]:
    """direct is right on 0, 1, 2; explicit zooms on all but 0 and is right on 0, 2, 3, 4."""
    direct = player(lambda i: i in {0, 1, 2}, policy="direct")
    explicit = player(lambda i: i in {0, 2, 3, 4}, zooms=lambda i: i > 0)
    evaluate(direct, [numbers(n)], out=tmp_path / "direct")
    evaluate(explicit, [numbers(n)], out=tmp_path / "explicit")
    return RunFolder(tmp_path / "direct"), RunFolder(tmp_path / "explicit")


def test_two_runs_are_compared_in_pairs(tmp_path: Path) -> None:
    before, after = two(tmp_path)
    found = compare(before, after).tasks["numbers"]
    assert (found.n, found.accuracy, found.scorer) == (8, (3 / 8, 4 / 8), "faithful")
    assert (found.difference.difference, found.difference.gained, found.difference.lost) == (1 / 8, 2, 1)
    assert found.difference.p == 1.0
    assert found.visual_tokens.difference > 0
    assert found.visual_tokens.gained == 7
    assert {(flip.id, flip.became) for flip in found.flips} == {
        ("numbers-1", "wrong"),
        ("numbers-3", "right"),
        ("numbers-4", "right"),
    }
    for flip in found.flips:
        assert Path(flip.trace_before or "").is_file()
        assert Path(flip.trace_after or "").is_file()


def test_a_flip_of_repeats_shows_replies_that_are_as_it_says(tmp_path: Path) -> None:
    replies = {"before": ["0", "x", "x"], "after": ["x", "0", "0"]}
    for name, written in replies.items():
        evaluate(Agent(ScriptedBackend(written)), [numbers(1)], out=tmp_path / name, repeats=3)
    [flip] = compare(RunFolder(tmp_path / "before"), RunFolder(tmp_path / "after")).tasks["numbers"].flips
    assert (flip.became, flip.before, flip.after) == ("right", "x", "0")


def test_costs_are_compared_by_cluster(tmp_path: Path) -> None:
    task = [numbers(8, clustered=True)]
    evaluate(player(), task, out=tmp_path / "a")
    evaluate(player(zooms=lambda index: True), task, out=tmp_path / "b")
    found = compare(RunFolder(tmp_path / "a"), RunFolder(tmp_path / "b")).tasks["numbers"]
    assert (found.visual_tokens.gained, found.visual_tokens.p) == (8, 2 / 2**4), "all of four clusters cost more"


def test_what_zooming_did(tmp_path: Path) -> None:
    zooming = compare(*two(tmp_path)).tasks["numbers"].zooming
    assert (zooming.pairs, zooming.helped, zooming.harmed, zooming.needless, zooming.in_vain) == (7, 2, 1, 1, 3)
    assert (zooming.tool_gain, zooming.tool_harm) == (2 / 8, 1 / 8)
    # the explicit run zoomed on 1 and 2 for nothing; the direct one missed 3 and 4
    assert (zooming.regret_before, zooming.regret_after) == (2 / 8, 2 / 8)


def test_runs_of_other_questions_are_not_compared(tmp_path: Path) -> None:
    evaluate(player(), [numbers(3)], out=tmp_path / "a")
    evaluate(player(), [numbers(3, name="others")], out=tmp_path / "b")
    with pytest.raises(ConfigError, match="no task in common"):
        compare(RunFolder(tmp_path / "a"), RunFolder(tmp_path / "b"))
    rows = RunFolder(tmp_path / "a").latest()
    changed = [row.model_copy(update={"question": "another?"}) for row in rows]
    evaluate(player(), [numbers(3)], out=tmp_path / "c")
    RunFolder(tmp_path / "c").replace_rows(changed)
    with pytest.raises(ConfigError, match="asked different things"):
        compare(RunFolder(tmp_path / "a"), RunFolder(tmp_path / "c"))


def test_runs_of_other_second_images_are_not_compared(tmp_path: Path) -> None:
    for name, colour in (("a", "red"), ("b", "blue"), ("c", "blue")):
        others = (Image.new("RGB", (168, 112), colour),)
        evaluate(player(policy="direct"), [changed(3, others=others)], out=tmp_path / name)
    a, b, c = (RunFolder(tmp_path / name) for name in "abc")
    assert compare(b, c).tasks["numbers"].n == 3
    with pytest.raises(ConfigError, match="asked different things: sample numbers-0 has another image"):
        compare(a, b)
    a.replace_rows([row.model_copy(update={"other_images": []}) for row in a.latest()])
    assert compare(a, b).tasks["numbers"].n == 3, "older rows do not say which they were"


def test_answers_that_no_scorer_has_all_scored_have_no_figures(tmp_path: Path) -> None:
    evaluate(player(), [numbers(2)], out=tmp_path)
    folder = RunFolder(tmp_path)
    first, second = folder.latest()
    folder.replace_rows([first, second.model_copy(update={"scores": {"new": second.scores["clean"]}})])
    with pytest.raises(ConfigError, match="numbers: no scorer has scored all answers"):
        summarise(folder)


def test_an_interrupted_run_is_compared_by_the_tasks_that_it_has_begun(tmp_path: Path) -> None:
    tasks = [numbers(3, name="one"), numbers(3, name="two")]
    evaluate(player(), tasks, out=tmp_path / "a")
    with pytest.raises(KeyboardInterrupt):
        evaluate(player(), tasks, out=tmp_path / "b", watch=Watcher(stop_after=3))
    for one, other in (("a", "b"), ("b", "a")):
        found = compare(RunFolder(tmp_path / one), RunFolder(tmp_path / other), scorer="clean")
        assert {name: task.n for name, task in found.tasks.items()} == {"one": 3}


def test_runs_of_different_versions_are_compared_with_what_differs(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before, after = two(tmp_path)
    assert compare(before, after).made_differently == []  # nothing is noted of either
    same = {"platform": "Linux", "cores": "2"}
    before.write("env.json", json.dumps([{**same, "date": "2026-01-01", "command": "x", "qzoom-agent": "0.1.0"}]))
    after.write("env.json", json.dumps([{**same, "date": "2027-01-01", "qzoom-agent": "0.2.0", "placement": "cuda"}]))
    found = compare(before, after)
    assert found.made_differently == ["placement", "qzoom-agent"]
    show_comparison(found)
    assert "were made with different placement, qzoom-agent (env.json)" in capsys.readouterr().out
    show_comparison(compare(before, before))
    assert "made with" not in capsys.readouterr().out


def test_a_task_that_was_added_is_compared_before_the_run_is_finished(tmp_path: Path) -> None:
    tasks = [numbers(3, name="one"), numbers(3, name="two")]
    evaluate(player(), tasks, out=tmp_path / "a")
    evaluate(player(), tasks[:1], out=tmp_path / "b")
    with pytest.raises(KeyboardInterrupt):
        evaluate(player(), tasks, out=tmp_path / "b", watch=Watcher(stop_after=4))
    before, after = RunFolder(tmp_path / "a"), RunFolder(tmp_path / "b")
    found = compare(before, after)
    assert {name: (task.n, task.scorer) for name, task in found.tasks.items()} == {
        "one": (3, "faithful"),
        "two": (1, "faithful"),
    }
    assert {name: task.partial for name, task in summarise(after).tasks.items()} == {"one": False, "two": True}
    assert write_run_report(after, baseline=before).exists()


def test_samples_of_one_run_alone_are_counted(tmp_path: Path) -> None:
    evaluate(player(), [numbers()], out=tmp_path / "a", source=TaskSource(n=3))
    evaluate(player(), [numbers()], out=tmp_path / "b", source=TaskSource(n=5))
    found = compare(RunFolder(tmp_path / "a"), RunFolder(tmp_path / "b"), scorer="clean").tasks["numbers"]
    assert (found.n, found.only_before, found.only_after, found.scorer) == (3, 0, 2, "clean")
    with pytest.raises(ConfigError, match="no scorer 'kind'"):
        compare(RunFolder(tmp_path / "a"), RunFolder(tmp_path / "b"), scorer="kind")


def test_figures_by_kind_read_each_sample_a_few_times_whatever_the_number_of_kinds(tmp_path: Path) -> None:
    """A column `kind` may hold another text in every row."""
    reads = Counter[str]()

    class Counted(SampleResult):
        def __getattribute__(self, name: str) -> Any:
            reads[name] += 1
            return super().__getattribute__(name)

    evaluate(player(), [numbers(1)], out=tmp_path)
    folder = RunFolder(tmp_path)
    row, many = folder.latest()[0].model_dump(mode="json"), 300
    rows = [Counted.model_validate(row | {"id": str(at), "index": at, "kind": f"kind {at}"}) for at in range(many)]
    reads.clear()
    folder.by_task = lambda: {"numbers": rows}  # type: ignore[method-assign,assignment,return-value]
    found = summarise(folder).tasks["numbers"]
    assert len(found.marks.kinds) == many
    assert reads["kind"] <= 5 * many * len(found.scores)


def test_the_chart_of_a_report_shows_as_many_kinds_as_have_room() -> None:
    for kinds, shown in ((16, 17), (17, 1), (3000, 1)):
        figures = {f"kind {at}": figure([1.0, 0.0]) for at in range(kinds)}
        task = SimpleNamespace(
            cost=SimpleNamespace(visual_tokens=figure([5.0])),
            marks=SimpleNamespace(accuracy=figure([1.0, 0.0]), kinds=figures),
        )
        results: Any = SimpleNamespace(tasks={"numbers": task}, config=SimpleNamespace(policy="direct"))
        rows: Any = [SimpleNamespace(kind=kind, visual_tokens=5, status="answered") for kind in figures]
        assert len(_points(results, rows, {})) == shown
