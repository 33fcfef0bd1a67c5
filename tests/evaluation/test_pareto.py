"""The interleaved run and what is made of it: figures that a hand computes, and a run that can be killed."""

from collections.abc import Sequence
from copy import deepcopy
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from qzoom_agent.agent import Agent
from qzoom_agent.config import AgentConfig
from qzoom_agent.errors import BackendError, ConfigError
from qzoom_agent.evaluation import pareto
from qzoom_agent.evaluation.interleaved import Cell, Table, measure, weights_of
from qzoom_agent.evaluation.pareto import draw, headline, headline_table, points, points_table, ratio
from qzoom_agent.evaluation.tasks.needle import sample, sample_seed
from qzoom_agent.models.hf import HFBackend
from qzoom_agent.models.scripted import ScriptedBackend
from qzoom_agent.perception.branches import Branches


def cells(right: str, *, seconds: Sequence[float], tokens: int = 64, zoomed: bool = False) -> list[Cell]:
    return [
        Cell(
            id=f"q{index}",
            correct=mark == "1",
            zoomed=zoomed,
            covered=mark == "1" if zoomed else False,
            visual_tokens=tokens,
            token_layers=9.0 * tokens,
            seconds=seconds[index % len(seconds)],
        )
        for index, mark in enumerate(right)
    ]


TABLE: Table = {
    "direct@64": cells("1000", seconds=[0.1]),
    "direct@576": cells("1110", seconds=[0.8, 1.2], tokens=576),
    "direct@400": cells("1110", seconds=[0.6, 1.0], tokens=400),
    "implicit@64": cells("1101", seconds=[0.2], tokens=110, zoomed=True),
    "implicit@144": cells("1111", seconds=[0.4], tokens=190, zoomed=True),
    "oracle@64": cells("1111", seconds=[0.15], tokens=110, zoomed=True),
}


def test_headline_by_hand() -> None:
    """Of two equal baselines the cheaper one counts: .8 s. The fastest that is as accurate takes .2 s."""
    one = headline("needle-scene", TABLE)
    assert one.baseline.budget == 400 and one.fastest is not None and one.fastest.budget == 64
    assert one.speed == pytest.approx(4.0) and one.speed_interval is not None
    assert 2.99 < one.speed_interval.low < 4.0 < one.speed_interval.high < 5.01
    assert one.best.budget == 144 and one.gain == pytest.approx(0.25)
    text = headline_table([one])
    assert "75.0% at 400" in text and "4.00x" in text and "+25.0" in text
    equal = headline("needle-scene", {**TABLE, "implicit@64": cells("1111", seconds=[0.5])})
    assert equal.best.budget == 64 and equal.fastest is not None and equal.fastest.budget == 144


def test_a_rival_that_is_better_is_the_baseline() -> None:
    rival = cells("1111", seconds=[0.6], tokens=400)
    one = headline("needle-scene", {**TABLE, "rival@400": rival})
    assert one.baseline.policy == "rival" and one.fastest is not None and one.fastest.budget == 144
    assert one.speed == pytest.approx(1.5) and one.gain == 0
    assert "100.0% at 400 (rival)" in headline_table([one])
    assert headline("needle-scene", {**TABLE, "rival@400": cells("1100", seconds=[0.1])}) == headline(
        "needle-scene", TABLE
    )
    line = points_table(points("needle-scene", {"rival@400": rival})).splitlines()[-1]
    assert "| rival | 400 | 100.0% |" in line and "| 0% | - | 400 |" in line


def test_a_speed_that_is_not_reached_is_said_so() -> None:
    weak = {**TABLE, "implicit@64": cells("1000", seconds=[0.2]), "implicit@144": cells("1100", seconds=[0.4])}
    one = headline("needle-scene", weak)
    assert one.fastest is None and one.speed is None and one.gain == pytest.approx(-0.25)
    assert "not reached" in headline_table([one]) and "-25.0" in headline_table([one])


def test_points_by_hand() -> None:
    found = {f"{one.policy}@{one.budget}": one for one in points("needle-scene", TABLE)}
    one = found["implicit@64"]
    assert (one.n, one.accuracy, one.visual_tokens, one.token_layers, one.zooms) == (4, 0.75, 110, 990, 1.0)
    assert one.seconds == pytest.approx(0.2) and one.covered == 0.75
    whole = found["direct@576"]
    assert whole.seconds == pytest.approx(1.0) and whole.median_seconds == pytest.approx(1.0)
    lines = points_table(list(found.values())).splitlines()
    assert len(lines) == 2 + len(TABLE) and "| 5.0 |" in next(line for line in lines if "| Q-Zoom | 64 |" in line)


def test_ratio_of_pairs_that_always_keep_it_has_no_width() -> None:
    value, interval = ratio([2.0, 4.0, 6.0], [1.0, 2.0, 3.0])
    assert value == 2.0 and interval == (2.0, 2.0)
    assert ratio([3.0], [2.0]) == (1.5, None)


def test_ratio_of_two_pairs_may_be_that_of_either() -> None:
    """Drawn with replacement, one pair in four draws is both times the same."""
    assert ratio([1.0, 3.0], [1.0, 1.0]) == (2.0, (1.0, 3.0))


def test_the_figure_is_drawn_in_both_formats(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rival = {"rival@576": cells("1011", seconds=[0.9], tokens=576)}
    found = [*points("needle-scene", {**TABLE, **rival}), *points("needle-doc", TABLE)]
    draw(found, tmp_path / "a.png", tmp_path / "a.svg")
    curves, shown = pareto._curves, []
    monkeypatch.setattr(pareto, "_curves", lambda axes, some, key: shown.append(some) or curves(axes, some, key))
    draw(found, tmp_path / "b.svg")
    assert shown == 2 * [found[: len(TABLE) + 1], found[len(TABLE) + 1 :]], "each panel is of one task"
    assert (tmp_path / "a.png").read_bytes().startswith(b"\x89PNG")
    text = (tmp_path / "a.svg").read_text()
    assert text == (tmp_path / "b.svg").read_text() and text.count("<!-- needle-") == 2


class Counting:
    """Scripted agents that keep count of who was asked what."""

    def __init__(self, names: Sequence[str], *, stop_at: int | None = None) -> None:
        self.asked: list[tuple[str, str]] = []
        self.stop_at = stop_at
        self.arms = {name: self._agent(name) for name in names}

    def _agent(self, name: str) -> Agent:
        def reply(messages: list[Any]) -> str:
            question = str(messages[0]["content"][-1]["text"])
            if self.stop_at is not None and len(self.asked) >= self.stop_at:
                raise KeyboardInterrupt
            self.asked.append((name, question))
            return "407"

        config = AgentConfig(policy="oracle" if name == "oracle" else "direct")
        return Agent(ScriptedBackend(reply), config=config)


def test_every_question_is_asked_of_all_before_the_next_in_turning_order() -> None:
    run = Counting(["a", "b", "c"])
    table = measure(run.arms, "needle-doc", n=3)
    names = [name for name, _ in run.asked]
    assert names == ["a", "b", "c", "a", "b", "c", "b", "c", "a", "c", "a", "b"]  # the first three warm up
    assert len({question for _, question in run.asked[3:6]}) == 1
    assert [one.id for one in table["a"]] == [one.id for one in table["b"]]
    first = sample("needle-doc", sample_seed(0, 0))
    assert table["c"][0].id == first.id and table["a"][0].correct == (first.answer == "407")


def test_an_interrupted_run_goes_on_at_the_question_in_flight(tmp_path: Path) -> None:
    journal = tmp_path / "run" / "doc.jsonl"
    whole = measure(Counting(["a", "b"]).arms, "needle-doc", n=4)
    with pytest.raises(KeyboardInterrupt):
        measure(Counting(["a", "b"], stop_at=7).arms, "needle-doc", n=4, journal=journal)
    journal.write_text(journal.read_text() + '\n2 {"a": {"id"')  # torn
    again = Counting(["a", "b"])
    done: list[int] = []
    table = measure(again.arms, "needle-doc", n=4, journal=journal, note=done.append)
    assert len(again.asked) == 2 + 4 and done == [1, 2, 3, 4]
    assert [one.id for one in table["b"]] == [one.id for one in whole["b"]]
    with pytest.raises(ConfigError, match="other configurations"):
        measure(Counting(["a", "c"]).arms, "needle-doc", n=4, journal=journal)


def test_a_model_that_fails_ends_the_run_and_is_no_wrong_answer_in_no_time(tmp_path: Path) -> None:
    def reply(messages: list[Any]) -> str:
        raise RuntimeError("out of memory")

    arms = Counting(["direct@64"]).arms | {"direct@576": Agent(ScriptedBackend(reply), policy="direct")}
    with pytest.raises(BackendError, match=r"failed under 'direct@576'.*out of memory.*goes on at needle-doc-"):
        measure(arms, "needle-doc", n=1, journal=tmp_path / "doc.jsonl")
    assert len((tmp_path / "doc.jsonl").read_text().splitlines()) == 1, "settings alone"


def test_answers_of_other_weights_are_not_taken_for_those_of_these(tmp_path: Path) -> None:
    """The same name and settings, but branches that were trained anew, or read by another rule."""

    class Carried:
        config = AgentConfig(policy="direct")

        def __init__(self, branches: Branches) -> None:
            self.backend = SimpleNamespace(name="nano", branches=branches)

    stored = HFBackend.load("nano").branches
    assert stored is not None
    first = weights_of(Carried(stored))  # type: ignore[arg-type]
    assert first == weights_of(Carried(deepcopy(stored)))  # type: ignore[arg-type]
    retrained, reread = deepcopy(stored), deepcopy(stored)
    with torch.no_grad():
        next(retrained.parameters()).add_(1e-3)
    reread.config = reread.config.model_copy(update={"box": (0.9, 0.9)})
    others = [weights_of(Carried(one)) for one in (retrained, reread)]  # type: ignore[arg-type]
    assert first["base"] is not None and all(one["base"] == first["base"] for one in others)
    assert len({first["branches"], *(one["branches"] for one in others)}) == 3
    journal = tmp_path / "doc.jsonl"
    measure(Counting(["a"]).arms, "needle-doc", n=1, journal=journal)
    journal.write_text(journal.read_text().replace('"branches": null', '"branches": "of before"'))
    with pytest.raises(ConfigError, match="weights"):
        measure(Counting(["a"]).arms, "needle-doc", n=1, journal=journal)


def test_crops_and_their_cover_are_counted() -> None:
    run = Counting(["direct", "oracle"])
    table = measure(run.arms, "needle-doc", n=3)
    assert all(one.zoomed and one.covered for one in table["oracle"])
    assert not any(one.zoomed or one.covered for one in table["direct"])
    assert all(a.visual_tokens > b.visual_tokens for a, b in zip(table["oracle"], table["direct"], strict=True))
    elsewhere = measure(run.arms, "needle-doc", n=3, boxes={"oracle": lambda question: []})
    assert not any(one.zoomed for one in elsewhere["oracle"])


def test_a_model_without_branches_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Agent, "from_pretrained", lambda *args, **kwargs: Agent(ScriptedBackend(["407"])))
    with pytest.raises(ConfigError, match="has no branches"):
        pareto.arms("blind", budgets=[64], coarse=[64])


def test_a_rival_has_weights_of_its_own() -> None:
    arms = pareto.arms("nano", budgets=[64, 576], coarse=[48], rival="nano")
    assert list(arms) == ["direct@64", "direct@576", "implicit@48", "always@48", "oracle@48", "rival@64", "rival@576"]
    assert arms["rival@576"].backend is arms["rival@64"].backend is not arms["direct@64"].backend
    assert arms["rival@576"].config.policy == "direct" and arms["rival@576"].config.budget.coarse_tokens == 576
