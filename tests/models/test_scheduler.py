"""Episodes side by side answer what they answer alone, in fewer and larger batches."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from qzoom_agent import Agent, graph
from qzoom_agent.config import AgentConfig
from qzoom_agent.errors import BackendError
from qzoom_agent.evaluation.run_log import RunFolder
from qzoom_agent.evaluation.runner import evaluate
from qzoom_agent.models import hf_batch, scheduler
from qzoom_agent.models.hf import HFBackend
from qzoom_agent.models.hf_batch import BatchEngine
from qzoom_agent.models.hf_session import HFSession
from qzoom_agent.models.scheduler import BatchedBackend, RequestQueue, batched
from qzoom_agent.models.scripted import ScriptedBackend
from tests.evaluation.player import numbers
from tests.tiny_models import Family

IMAGES = [
    Image.fromarray(np.random.default_rng(row).integers(0, 255, (300 + 90 * row, 420, 3), dtype=np.uint8))
    for row in range(5)
]
PAIRS = [(image, f"what is on board {row}" + " and why" * row) for row, image in enumerate(IMAGES)]


@pytest.fixture(params=["qwen2_5_vl", pytest.param("qwen3_vl", marks=pytest.mark.slow)])
def backend(request: pytest.FixtureRequest, load: Callable[[Family], HFBackend]) -> HFBackend:
    return load(request.param)


@pytest.fixture
def sizes(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The number of replies that are generated at a time."""
    generate, found = BatchEngine.generate, list[int]()
    monkeypatch.setattr(
        BatchEngine, "generate", lambda self, requests: (found.append(len(requests)), generate(self, requests))[1]
    )
    return found


def config(policy: str, **more: object) -> AgentConfig:
    return AgentConfig().replace(
        policy=policy, **{"generation.max_new_tokens": 6, "budget.max_turns": 2, "budget.coarse_tokens": 36, **more}
    )


@pytest.mark.parametrize("policy", ["implicit", pytest.param("explicit", marks=pytest.mark.slow)])
def test_answers_are_those_of_single_sessions(backend: HFBackend, policy: str, sizes: list[int]) -> None:
    options = {"perception.threshold": 0.3, "perception.gate_threshold": 0.5, "generation.temperature": 1.0}
    alone = Agent(backend, config=config(policy, **options)).batch(PAIRS, workers=1)
    table = BatchedBackend(backend, 3, linger=0.5)
    beside = Agent(table, config=config(policy, **options)).batch(PAIRS, workers=3)
    assert all(one.status != "error" for one in alone)
    assert [(one.text, one.status) for one in beside] == [(one.text, one.status) for one in alone]
    for ours, theirs in zip(beside, alone, strict=True):
        assert [turn.text for turn in ours.trace.turns] == [turn.text for turn in theirs.trace.turns]
        assert [view.box for view in ours.trace.views] == [view.box for view in theirs.trace.views]
        assert ours.trace.usage.visual_tokens == theirs.trace.usage.visual_tokens
    assert max(sizes) == 3, "some were computed together"
    assert not table.queue._waiting


def test_a_batch_of_the_agent_is_computed_together(backend: HFBackend, sizes: list[int]) -> None:
    answers = Agent(backend, config=config("direct")).batch(iter(PAIRS))
    assert max(sizes) > 1
    assert {answer.trace.status for answer in answers} <= {"answered", "budget"}


def test_seconds_in_a_batch_are_shares_of_it_with_the_vision_encoder_and_without_waiting(
    backend: HFBackend, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = [0.0]
    for module in (graph, hf_batch, scheduler):  # time passes in the two places below alone
        monkeypatch.setattr(module, "perf_counter", lambda: clock[0], raising=False)
    monkeypatch.setattr(scheduler, "thread_time", lambda: clock[0], raising=False)
    wait, encode, look = RequestQueue._compute_until, scheduler.encode_read, hf_batch.look

    def waiting(self: RequestQueue, done: Callable[[], bool]) -> None:
        clock[0] += 100
        wait(self, done)

    def encoding(sessions: Sequence[HFSession]) -> None:
        clock[0] += 1 if any(one._read for one in sessions) else 0
        encode(sessions)

    def looking(*given: Any, **options: Any) -> Any:
        clock[0] += 4
        return look(*given, **options)

    monkeypatch.setattr(RequestQueue, "_compute_until", waiting)
    monkeypatch.setattr(scheduler, "encode_read", encoding)
    monkeypatch.setattr(hf_batch, "look", looking)
    agent = Agent(BatchedBackend(backend, 1), config=config("implicit", **{"perception.gate_threshold": 1.0}))
    usage = agent.run(*PAIRS[0]).usage
    assert usage.seconds.perceive == 1 + 4
    usage = agent.replace(policy="direct").run(*PAIRS[0]).usage
    assert (usage.seconds.perceive, usage.seconds.think) == (0, 1)


def test_a_lean_prefill_costs_the_same_in_a_batch(backend: HFBackend) -> None:
    options = {"perception.threshold": 0.3, "perception.gate_threshold": 0.5}
    lean = config("implicit", **options, **{"perception.lean": True})
    alone = Agent(backend, config=lean).batch(PAIRS[:3], workers=1)
    beside = Agent(BatchedBackend(backend, 3, linger=0.5), config=lean).batch(PAIRS[:3], workers=3)
    assert [one.text for one in beside] == [one.text for one in alone]
    spent = [one.trace.token_layers for one in beside]
    assert spent == pytest.approx([one.trace.token_layers for one in alone])
    full = Agent(backend, config=config("implicit", **options)).batch(PAIRS[:3], workers=1)
    assert all(less < one.trace.token_layers for less, one in zip(spent, full, strict=True))


def test_an_evaluation_in_batches_has_the_same_rows(backend: HFBackend, tmp_path: Path) -> None:
    agent = Agent(backend, config=config("implicit"))
    evaluate(agent, [numbers(5)], out=tmp_path / "one")
    evaluate(Agent(batched(backend, 3), config=config("implicit")), [numbers(5)], out=tmp_path / "three", workers=3)
    one, three = (RunFolder(tmp_path / name).latest() for name in ("one", "three"))
    assert [(row.key, row.answer, row.fired, row.zooms) for row in one] == [
        (row.key, row.answer, row.fired, row.zooms) for row in three
    ]


def test_a_failing_batch_is_the_error_of_each(backend: HFBackend, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: object, **__: object) -> None:
        raise RuntimeError("out of memory")

    monkeypatch.setattr(BatchEngine, "reply", broken)
    answers = Agent(BatchedBackend(backend, 2), config=config("direct")).batch(PAIRS[:3], workers=2)
    assert [one.status for one in answers] == ["error"] * 3
    assert all("out of memory" in (one.trace.error or "") for one in answers)


def test_more_threads_than_rows_take_turns(backend: HFBackend) -> None:
    answers = Agent(BatchedBackend(backend, 2, linger=0.01), config=config("direct")).batch(PAIRS, workers=5)
    alone = Agent(backend, config=config("direct")).batch(PAIRS, workers=1)
    assert [one.text for one in answers] == [one.text for one in alone]


def test_a_batch_waits_for_no_more_threads_than_there_are(backend: HFBackend, monkeypatch: pytest.MonkeyPatch) -> None:
    table = BatchedBackend(backend, 8)
    table.queue.callers = lambda: 1
    monkeypatch.setattr(table.queue._changed, "wait", lambda _: pytest.fail("it waits for others"))
    alone = Agent(backend, config=config("implicit")).run(*PAIRS[0])
    assert Agent(table, config=config("implicit")).run(*PAIRS[0]).text == alone.text


def test_what_does_not_run_here_is_not_batched() -> None:
    with pytest.raises(BackendError, match="nothing to batch"):
        batched(ScriptedBackend([]), 4)


def test_a_conversation_that_is_too_long_does_not_stop_its_neighbours(backend: HFBackend) -> None:
    limit = backend.model.config.get_text_config().max_position_embeddings
    pairs = [PAIRS[0], (IMAGES[1], "what? " * limit), PAIRS[2]]
    beside = Agent(BatchedBackend(backend, 3, linger=0.5), config=config("direct")).batch(pairs, workers=3)
    alone = Agent(backend, config=config("direct")).batch(pairs)
    assert [one.status == "error" for one in beside] == [False, True, False]
    assert [(one.text, one.status) for one in beside] == [(one.text, one.status) for one in alone]
