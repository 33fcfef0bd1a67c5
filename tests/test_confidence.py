"""Confidence of answers: from the probabilities of their tokens, by a calibration of the model."""

from __future__ import annotations

import math
import random
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qzoom_agent.agent import Agent
from qzoom_agent.answer import Answer
from qzoom_agent.cli.main import main
from qzoom_agent.confidence import Calibration, Fitted
from qzoom_agent.config import AgentConfig
from qzoom_agent.data.samples import TaskSource
from qzoom_agent.errors import ConfigError
from qzoom_agent.evaluation.confidence import Known, calibrate, expected_error, known_answers
from qzoom_agent.evaluation.run_log import RunFolder, fingerprint
from qzoom_agent.evaluation.runner import evaluate
from qzoom_agent.messages import Message
from qzoom_agent.trace import PerceptionRecord
from tests.evaluation.player import asked, numbers
from tests.test_draft import IMAGE, Telling

CALIBRATION = Calibration(policies={"direct": Fitted(slope=2.0, intercept=-1.0, questions=100)})


class Nowhere:
    """A perceiver that proposes nothing."""

    def look(self, *_: Any, **__: Any) -> PerceptionRecord:
        return PerceptionRecord()


def telling(logprob: float | None, **more: Any) -> Telling:
    model: Any = Telling(["42"], logprob)
    for name, value in more.items():
        setattr(model, name, value)
    return model  # type: ignore[no-any-return]


def test_an_answer_has_the_confidence_of_its_model(tmp_path: Path) -> None:
    model = telling(math.log(0.8), gives_logprobs=True, calibration=CALIBRATION)
    answer = Agent(model, policy="direct").run(IMAGE, "which?")
    assert answer.record.answer_probability == pytest.approx(0.8)
    assert answer.confidence == pytest.approx(1 / (1 + math.exp(1 - 2 * math.log(4))))
    assert Answer.load(answer.save(tmp_path)).confidence == answer.confidence
    assert (answer.usage.requests, answer.usage.prompt_tokens) == (1, answer.trace.turns[0].prompt_tokens)


def test_a_calibration_of_numbers_that_are_none_is_refused(tmp_path: Path) -> None:
    """Every answer would be certain."""
    (tmp_path / "c.json").write_text('{"policies": {"direct": {"slope": NaN, "intercept": 0, "questions": 9}}}')
    with pytest.raises(ConfigError, match=r"Cannot read .*c\.json: .*\.direct\.slope: Input should be a finite"):
        Calibration.load(tmp_path / "c.json")


def test_a_repeated_run_has_the_same_confidence() -> None:
    first = Agent.from_pretrained("nano", policy="direct").run(IMAGE, "which?")
    saved = AgentConfig.model_validate(first.trace.config)  # names the format, as a config.yaml does
    assert Agent.from_pretrained("nano", config=saved).run(IMAGE, "which?").confidence == first.confidence is not None


@pytest.mark.parametrize(
    ("model", "changes"),
    [
        ({"calibration": None}, {}),
        ({}, {"generation.temperature": 0.5}),
        ({}, {"policy": "explicit"}),
        ({"gives_logprobs": False}, {}),
        ({}, {"generation.logprobs": False}),
        ({}, {"system": "Answer in French."}),
        ({}, {"prompt": {"user_without_tools": "please tell me {question} now"}}),
        ({}, {"protocol": "qwen3vl"}),
        ({}, {"perceiver": "tests.test_confidence:Nowhere"}),
        ({}, {"tool": "qzoom_agent.zoom:Zoom"}),
        ({}, {"own_tools": ["rotate"]}),
        ({}, {"review.rule": "hybrid"}),
    ],
)
def test_without_a_calibration_that_fits_there_is_none(model: dict[str, Any], changes: dict[str, Any]) -> None:
    held = telling(-0.1, **{"gives_logprobs": True, "calibration": CALIBRATION, **model})
    assert Agent(held, **{"policy": "direct", **changes}).run(IMAGE, "which?").confidence is None


def test_a_server_is_asked_for_probabilities_only_if_told_to() -> None:
    plain, told = (Agent(telling(-0.1), policy="direct", **how) for how in ({}, {"generation.logprobs": True}))
    assert plain.run(IMAGE, "which?").record.answer_probability is None
    assert told.run(IMAGE, "which?").record.answer_probability == pytest.approx(math.exp(-0.1))


@settings(max_examples=25, deadline=None)
@given(st.floats(0, 1), st.floats(0, 1), st.floats(0.1, 5), st.floats(-5, 5))
def test_confidence_is_a_probability_and_keeps_the_order(one: float, other: float, slope: float, at: float) -> None:
    fitted = Fitted(slope=slope, intercept=at, questions=1)
    assert 0 <= fitted(one) <= 1
    assert fitted(min(one, other)) <= fitted(max(one, other))


def test_the_expected_error_is_that_of_each_tenth() -> None:
    plain = Calibration(policies={"direct": Fitted(slope=1, intercept=0, questions=1)})
    answers = [Known("direct", "a", 0.95, 1.0)] * 8 + [Known("direct", "a", 0.95, 0.0)] * 2
    assert expected_error(plain, answers) == pytest.approx(0.15)
    both = answers + [Known("direct", "a", 0.25, 0.0)] * 10
    assert expected_error(plain, both) == pytest.approx((0.15 + 0.25) / 2)
    wrong_way = [Known("direct", "a", 0.95, 0.0), Known("direct", "a", 0.05, 1.0)]
    assert expected_error(plain, wrong_way) == pytest.approx(0.95), "one is not made up for by the other"
    assert expected_error(plain, [Known("direct", "a", 1.0, 1.0)]) == pytest.approx(0.0, abs=1e-5)
    assert expected_error(plain, [Known("hybrid", "a", 0.5, 1.0)]) is None


def test_eval_calibrate_makes_a_model_sure_of_what_it_gets_right(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A model whose tokens have a probability of 0.9 or 0.5, and which is right at 70 % and 10 % of these."""
    draw = random.Random(3)

    def reply(messages: list[Message]) -> str:
        index = asked(messages)
        model.logprob = math.log(0.9 if index % 2 else 0.5)
        return str(index) if draw.random() < (0.7 if index % 2 else 0.1) else "x"

    model: Any = telling(-0.1, _replies=reply, gives_logprobs=True)
    for name in ("fit", "other"):
        evaluate(
            Agent(model, policy="direct"), [numbers()], out=tmp_path / name, source=TaskSource(n=160), traces=False
        )
    out = tmp_path / "model" / "confidence.json"
    argv = ["eval", "calibrate", str(tmp_path / "fit"), "--held-out", str(tmp_path / "other"), "--out", str(out)]
    assert main(argv) == 0
    found = Calibration.load(out)
    assert found.of(0.9, policy="direct", temperature=0) == pytest.approx(0.7, abs=0.08)
    assert found.of(0.5, policy="direct", temperature=0) == pytest.approx(0.1, abs=0.06)
    held = list(known_answers([RunFolder(tmp_path / "other")]))
    assert (expected_error(found, held) or 0) < 0.08
    twice = [RunFolder(tmp_path / "other"), RunFolder(tmp_path / "fit" / ".." / "other")]
    assert list(known_answers(twice)) == held, "a run that is named twice counts once"
    assert "held out" in capsys.readouterr().out
    plain = fingerprint(str(tmp_path / "model"))
    out.unlink()
    assert fingerprint(str(tmp_path / "model")) == plain, "a calibration changes no answer"


def test_a_model_that_is_sure_of_wrong_answers_is_fitted_to(tmp_path: Path) -> None:
    """All of its tokens have a probability of nearly 1, and three answers of five are right."""

    def reply(messages: list[Message]) -> str:
        index = asked(messages)
        model.logprob = -(10.0 ** -(2 + index % 4))
        return str(index) if index % 5 < 3 else "x"

    model: Any = telling(-0.1, _replies=reply, gives_logprobs=True)
    evaluate(Agent(model, policy="direct"), [numbers()], out=tmp_path, source=TaskSource(n=60), traces=False)
    runs = [RunFolder(tmp_path)]
    found = calibrate(runs)
    assert [found.of(one, policy="direct", temperature=0) for one in (0.99, 0.999999)] == pytest.approx(
        [0.6, 0.6], abs=0.05
    )
    assert expected_error(found, list(known_answers(runs))) == pytest.approx(0, abs=0.02)


def test_too_few_answers_are_not_fitted_to(tmp_path: Path) -> None:
    evaluate(Agent(telling(None), policy="direct"), [numbers(1)], out=tmp_path, traces=False)
    with pytest.raises(ConfigError, match=r"have 0 scored answers.*generation.logprobs=true"):
        calibrate([RunFolder(tmp_path)])


def test_a_question_that_is_asked_again_counts_once(tmp_path: Path) -> None:
    model = telling(-0.1, _replies=lambda _: "42", gives_logprobs=True)
    evaluate(Agent(model, policy="direct"), [numbers(10)], out=tmp_path, repeats=6, traces=False)
    with pytest.raises(ConfigError, match="have 10 scored answers"):
        calibrate([RunFolder(tmp_path)])


def test_runs_that_say_nothing_about_the_model_are_refused(tmp_path: Path) -> None:
    model = telling(-0.1, gives_logprobs=True)
    runs: dict[str, dict[str, Any]] = {
        "first": {},
        "other": {},
        "sampled": {"generation.temperature": 0.5},
        "told": {"system": "Answer in French."},
    }
    for name, changes in runs.items():
        agent = Agent(model, policy="direct", **changes)
        evaluate(agent, [numbers(2)], out=tmp_path / name, traces=False, weights=name)
    source = TaskSource(answered=False)
    evaluate(Agent(model, policy="direct"), [numbers(2)], out=tmp_path / "unknown", source=source, weights="first")
    first, other, sampled, told_more, unknown = (RunFolder(tmp_path / name) for name in (*runs, "unknown"))
    for folders, told in (
        ([first, other], "is of another model than"),
        ([first, sampled], "was sampled"),
        ([told_more], r"was asked with system: Answer in French\., and confidence"),
        ([unknown], "asked numbers without answers"),
    ):
        with pytest.raises(ConfigError, match=told):
            list(known_answers(folders))
    with pytest.raises(ConfigError, match="is of another model than"):
        list(known_answers([other], like=first))
    with pytest.raises(ConfigError, match=r"has no scorer 'nope'\. It has: clean, faithful"):
        calibrate([first], scorer="nope")
    same = ["eval", "calibrate", str(tmp_path / "first"), "--held-out", str(tmp_path / "first"), "--out"]
    assert main([*same, str(tmp_path / "c.json")]) == 2
