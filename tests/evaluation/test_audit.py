"""An audit tells apart what crops show, what more tokens give, and what the call alone does."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from qzoom_agent.agent import Agent
from qzoom_agent.data.samples import Sample
from qzoom_agent.errors import ConfigError
from qzoom_agent.evaluation.audit import Audit, audit, grey_policy
from qzoom_agent.evaluation.report import write_run_report
from qzoom_agent.evaluation.run_log import RunFolder
from qzoom_agent.evaluation.runner import evaluate, rescore
from qzoom_agent.models.scripted import ScriptedBackend
from tests.evaluation.player import asked, numbers, player

N = 20
Right = Callable[[int], bool]


def easy(index: int) -> bool:
    return index < 8


def runs(folder: Path, **right: Right) -> tuple[RunFolder, dict[str, RunFolder]]:
    """Runs of the same questions under each policy, right where the function says; `explicit` is the main one."""
    found = {}
    for policy, rule in right.items():
        zooms = policy in ("explicit", "blind")
        agent = player(rule, zooms=lambda _, zooms=zooms: zooms, policy=policy)  # type: ignore[misc]
        evaluate(agent, [numbers(N)], out=folder / policy, traces=False)
        found[policy] = RunFolder(folder / policy)
    return found.pop("explicit"), found


def audited(folder: Path, **right: Right) -> Audit:
    return audit(*runs(folder, **right))


def test_a_gain_that_only_the_crops_give(tmp_path: Path) -> None:
    run, controls = runs(
        tmp_path, explicit=lambda i: i < 18, direct=easy, blind=easy, random=lambda i: i < 9, oracle=lambda i: i < 19
    )
    found = audit(run, controls).tasks["numbers"]
    effects = {name: round(100 * effect.difference, 1) for name, effect in found.effects.items()}
    assert effects == {"gain": 50.0, "call": 0.0, "tokens": 5.0, "content": 45.0, "headroom": 5.0}
    assert found.control == "random"
    assert found.verdict.startswith("Looking helps: +50.0 points")
    assert "What the crops show is worth +45.0 points" in found.verdict and "random crops" in found.verdict
    assert sum(found.wrong.values()) == 2 and found.crops == N
    # One number in four is told to be in the coarse view, so that its crop is one too many.
    assert found.redundant is not None and found.redundant >= N // 4
    assert [arm.policy for arm in found.arms] == ["explicit", "direct", "blind", "random", "oracle"]

    run.write("audit.json", Audit(model="m", tasks={"numbers": found}).model_dump_json())
    page = write_run_report(run).read_text(encoding="utf-8")
    assert "Does looking help?" in page and found.verdict in page


@pytest.mark.slow
def test_a_gain_that_grey_crops_give_as_well_is_not_the_crops(tmp_path: Path) -> None:
    found = audited(tmp_path, explicit=lambda i: i < 18, direct=easy, blind=lambda i: i < 18, random=easy)
    task = found.tasks["numbers"]
    assert task.control == "blind" and "headroom" not in task.effects
    assert "But grey crops do as well" in task.verdict


@pytest.mark.slow
def test_a_policy_that_harms_and_one_without_effect(tmp_path: Path) -> None:
    worse = audited(tmp_path / "a", explicit=easy, direct=lambda i: i < 18, blind=easy, random=easy)
    assert worse.tasks["numbers"].verdict.startswith("Looking harms: -50.0 points")
    equal = audited(tmp_path / "b", explicit=easy, direct=lambda i: 0 < i < 9, blind=easy, random=easy)
    assert equal.tasks["numbers"].verdict.startswith("No effect of looking is shown: +0.0 points")


def test_an_audit_is_by_one_scorer_whichever_leads_in_the_controls(tmp_path: Path) -> None:
    """By `faithful`, which leads in the controls, "7 or 99" is right as well, and random crops would do nothing."""
    found = {}
    for policy in ("explicit", "direct", "blind", "random"):
        form = "{} or 99" if policy in ("direct", "blind") else "{}"
        agent = Agent(ScriptedBackend(lambda messages, form=form: form.format(asked(messages))), policy=policy)
        scorer = "clean" if policy == "explicit" else None
        evaluate(agent, [numbers(10)], out=tmp_path / policy, scorer=scorer, traces=False)
        found[policy] = RunFolder(tmp_path / policy)
    made = audit(found.pop("explicit"), found).tasks["numbers"]
    assert (made.scorer, made.control) == ("clean", "random")
    assert {name: effect.difference for name, effect in made.effects.items()} == {
        "gain": 1.0,
        "call": 0.0,
        "tokens": 1.0,
        "content": 0.0,
    }


def test_an_audit_is_made_again_when_its_run_is_scored_again(tmp_path: Path) -> None:
    run, controls = runs(tmp_path, explicit=lambda i: i < 18, direct=easy, blind=easy, random=easy)
    run.write("audit.json", audit(run, controls, scorer="clean").model_dump_json())

    def lenient(text: str, sample: Sample) -> bool:
        return bool(text)

    def written() -> tuple[str, float]:
        found = Audit.model_validate_json((run.path / "audit.json").read_text(encoding="utf-8")).tasks["numbers"]
        return found.scorer, found.effects["gain"].difference

    rescore(run, [numbers(N)], scorer=lenient)
    assert written() == ("clean", 0.5), "its controls are elsewhere"
    for name, other in controls.items():
        (run.path / "ablations").mkdir(exist_ok=True)
        other.path.rename(run.path / "ablations" / name)
    rescore(run, [numbers(N)])
    assert written() == ("clean", 0.5), "it keeps its scorer"
    rescore(run, [numbers(N)], scorer=lenient)
    assert written() == (f"{__name__}:{lenient.__qualname__}", 0.0)


def test_an_audit_is_of_the_questions_that_its_controls_were_asked(tmp_path: Path) -> None:
    run, controls = runs(tmp_path, explicit=lambda i: i < 18, direct=easy, blind=easy, random=easy)
    (run.path / "ablations").mkdir()
    controls = {name: RunFolder(one.path.rename(run.path / "ablations" / name)) for name, one in controls.items()}
    run.write("audit.json", audit(run, controls).model_dump_json())
    agent = player(lambda i: i < 18, zooms=lambda _: True, policy="explicit")

    evaluate(agent, [numbers(3, name="more")], out=run.path, traces=False)
    assert list(audit(run, controls).tasks) == ["numbers"], "the controls were not asked the other task"
    rescore(run, [numbers(N)])
    assert "Does looking help?" in write_run_report(run).read_text(encoding="utf-8")

    evaluate(agent, [numbers(N + 5)], out=run.path, traces=False)
    assert "Does looking help?" not in write_run_report(run).read_text(encoding="utf-8")
    with pytest.raises(ConfigError, match="have to be of the same questions"):
        audit(run, controls)
    rescore(run, [numbers(N + 5)])
    assert not (run.path / "audit.json").exists()


def test_controls_that_are_missing_are_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="needs runs under blind, random as well"):
        audited(tmp_path, explicit=easy, direct=easy)
    assert [grey_policy(name) for name in ("implicit", "always", "explicit", "hybrid")] == [
        "masked",
        "masked",
        "blind",
        "blind",
    ]
