"""Rows know the version of the rule that scored them: older ones are scored again or refused, never mixed."""

from __future__ import annotations

import hashlib
import importlib
import json
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
from PIL import Image

from qzoom_agent.agent import Agent
from qzoom_agent.data.samples import Sample, TaskSource
from qzoom_agent.errors import ConfigError
from qzoom_agent.evaluation.compare import compare
from qzoom_agent.evaluation.run_log import RunFolder
from qzoom_agent.evaluation.runner import evaluate, rescore
from qzoom_agent.evaluation.sample_result import SampleResult
from qzoom_agent.evaluation.scorers import anls
from qzoom_agent.evaluation.summary import summarise
from qzoom_agent.evaluation.tasks.catalog import TASKS, find_task
from qzoom_agent.evaluation.tasks.task import RULES, PublicRule, Score, public_rule, rule_version
from qzoom_agent.models.scripted import ScriptedBackend
from tests.evaluation.player import numbers, player
from tests.evaluation.scorers import lmms_parity


def aged(folder: RunFolder, *, every: int) -> None:
    """Make every so many rows those of an older release: wrong by its rule, whose version it did not note."""
    rows: list[SampleResult] = []
    for at, row in enumerate(folder.latest()):
        old = {"scores": {name: Score(0.0, None) for name in row.scores}, "rules": {}}
        rows.append(row.model_copy(update=old) if at % every == 0 else row)
    folder.replace_rows(rows)


def test_rows_of_an_older_rule_are_scored_again_when_a_run_is_resumed(tmp_path: Path) -> None:
    first = evaluate(player(), [numbers(3)], out=tmp_path, source=TaskSource(n=3))
    aged(RunFolder(tmp_path), every=2)
    again = evaluate(player(), [numbers(4)], out=tmp_path, source=TaskSource(n=4))
    assert first.tasks["numbers"].accuracy == again.tasks["numbers"].accuracy == 1
    assert len({str(row.rules) for row in RunFolder(tmp_path).latest()}) == 1


def test_rows_of_two_rules_have_no_figure_until_they_are_scored_again(tmp_path: Path) -> None:
    task = numbers(4)
    evaluate(player(), [task], out=tmp_path, source=TaskSource(n=4))
    folder = RunFolder(tmp_path)
    aged(folder, every=2)
    with pytest.raises(ConfigError, match=r"different versions of 'faithful': an older one .* and .*rescore"):
        summarise(folder)
    assert rescore(folder, [task]).tasks["numbers"].accuracy == 1


def test_runs_of_two_rules_are_not_compared(tmp_path: Path) -> None:
    for name in ("old", "new"):
        evaluate(player(), [numbers(2)], out=tmp_path / name, source=TaskSource(n=2))
    aged(RunFolder(tmp_path / "old"), every=1)
    with pytest.raises(ConfigError, match=r"rescore .*old` and `qzoom eval rescore .*new`"):
        compare(RunFolder(tmp_path / "old"), RunFolder(tmp_path / "new"))


def test_scores_of_scorers_that_a_task_no_longer_has_are_kept(tmp_path: Path) -> None:
    task = numbers(1)
    more = replace(task, scorers={**task.scorers, "half": lambda text, sample: 0.5})
    evaluate(player(), [more], out=tmp_path, source=TaskSource(n=1))
    evaluate(player(), [task], out=tmp_path, source=TaskSource(n=1))
    (row,) = RunFolder(tmp_path).latest()
    assert row.value("half") == 0.5 and row.rules["half"].startswith("source ")


def mine(text: str, sample: Sample) -> float:
    return 1.0


def test_a_version_is_an_attribute_or_a_digest_of_the_source() -> None:
    assert rule_version(anls.clean) == RULES and public_rule(anls.clean) is None
    assert rule_version(mine).startswith("source ") and rule_version(mine) != rule_version(replace)
    assert rule_version(max) == ""


class Mine:
    def __call__(self, text: str, sample: Sample) -> float:
        return 1.0


def test_the_digest_is_that_of_the_module_since_a_scorer_calls_others(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert rule_version(Mine()) == rule_version(partial(mine)) == rule_version(mine)
    monkeypatch.syspath_prepend(tmp_path)
    found = []
    for value in ("0.0", "1.0"):
        name = f"own_rule_{value[0]}"
        (tmp_path / f"{name}.py").write_text(
            f"def worth():\n    return {value}\n\ndef own(text, sample):\n    return worth()\n"
        )
        found.append(rule_version(importlib.import_module(name).own))
    assert len(set(found)) == 2


def test_answers_are_scored_again_by_a_scorer_without_a_version(tmp_path: Path) -> None:
    task = numbers(1)
    worth = [0.0]

    def unknown(text: str | None, sample: Sample) -> float:
        return worth[0]

    vars(unknown)["version"] = ""
    for worth[0] in (0.0, 1.0):
        evaluate(player(), [replace(task, scorers={"own": unknown})], out=tmp_path, source=TaskSource(n=1))
    (row,) = RunFolder(tmp_path).latest()
    assert row.value("own") == 1.0


def test_results_name_the_public_code_that_a_rule_repeats() -> None:
    for task in TASKS.values():
        for name, scorer in task.scorers.items():
            found = public_rule(scorer)
            assert (found is not None) == (name in {"faithful", "vlmevalkit"}), f"{task.name} {name}"
            assert found is None or (isinstance(found, PublicRule) and found.commit and found.function)


def test_a_rule_that_gives_other_scores_has_a_new_version() -> None:
    """Raise `RULES` if this fails because a score has changed, and put the new digest here."""
    found = []
    for suite in (*lmms_parity.SUITES, *lmms_parity.TYPES):
        scorers = TASKS[suite.split()[0]].scorers
        for row in lmms_parity.generated(suite, 100):
            found += [lmms_parity.ours(row, name) for name in scorers]
    digest = hashlib.sha256(json.dumps([round(score, 6) for score in found]).encode()).hexdigest()[:12]
    assert {RULES: digest} == {"4": "098d17524afc"}


def test_replies_that_are_sentences_are_counted(tmp_path: Path) -> None:
    rows = "".join(json.dumps({"image": "a.png", "question": f"{at}?", "answer": "12"}) + "\n" for at in range(3))
    Image.new("RGB", (32, 32)).save(tmp_path / "a.png")
    (tmp_path / "rows.jsonl").write_text(rows)
    replies = iter(["12", "I cannot see any number on the sign.", "13"])
    agent = Agent(ScriptedBackend(lambda _: next(replies)))
    result = evaluate(agent, [find_task(str(tmp_path / "rows.jsonl"))], out=tmp_path / "run").tasks["rows"].marks
    assert (result.sentences, result.parse_rate, result.accuracy.mean) == (
        1,
        pytest.approx(2 / 3),
        pytest.approx(1 / 3),
    )


def at_most(limit: int, answer: str, sample: Sample) -> bool:
    return len(answer) <= limit


def test_a_scorer_with_other_arguments_is_another_rule(tmp_path: Path) -> None:
    for limit, accuracy in ((0, 0), (100, 1)):
        task = replace(numbers(2), scorers={"short": partial(at_most, limit)})
        result = evaluate(player(), [task], out=tmp_path / "named", source=TaskSource(n=2))
        assert result.tasks["numbers"].accuracy == accuracy
        given = evaluate(
            player(), [numbers(2)], out=tmp_path / "given", source=TaskSource(n=2), scorer=task.scorers["short"]
        )
        assert given.tasks["numbers"].accuracy == accuracy
    assert rule_version(partial(at_most, 3)) == rule_version(partial(at_most, 3)) != rule_version(at_most)
