"""Policies that look first, through the whole agent: with scripted sights, and with tiny models of every family."""

import json
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from qzoom_agent import Agent
from qzoom_agent.config import AgentConfig
from qzoom_agent.errors import BackendError, ConfigError
from qzoom_agent.messages import Message, view_ids
from qzoom_agent.models.hf import HFBackend
from qzoom_agent.models.hf_session import HFSession
from qzoom_agent.models.interface import Reply, SamplingParams
from qzoom_agent.models.scripted import ScriptedBackend
from qzoom_agent.perception.branches import Branches
from qzoom_agent.trace import PerceptionRecord, Trace
from tests.tiny_models import Family, build

FAMILIES: tuple[Family, ...] = ("qwen2_5_vl", "qwen3_vl", "llava")
IMAGE = Image.fromarray(np.random.default_rng(0).integers(0, 255, (600, 900, 3), dtype=np.uint8))
COARSE = {"coarse_tokens": 16, "coarse_min_tokens": 4}
CLOSER = {"roi_min_tokens": 36, "roi_max_tokens": 64}


def sight(*cells: tuple[float, float, float, float], aligned: bool = False) -> PerceptionRecord:
    """A sight of a coarse view of 252 x 168 pixels, 9 x 6 cells of 100 pixels of the original."""
    return PerceptionRecord(
        view="coarse",
        score=0.9,
        threshold=0.5,
        heat=[[0.0] * 9 for _ in range(6)],
        cutoff=0.1,
        cells=list(cells),
        boxes=[(28 * x1, 28 * y1, 28 * x2, 28 * y2) for x1, y1, x2, y2 in cells],
        reason="the gate asks for more detail" if cells else "the gate says that the coarse view suffices",
        aligned=aligned,
        prompt_tokens=66,
        visual_tokens=54,
        token_layers=500.0,
        seconds=0.01,
    )


def scripted(found: PerceptionRecord, seen: list[list[Message]] | None = None, **settings: Any) -> Agent:
    def reply(messages: list[Message]) -> str:
        if seen is not None:
            seen.append(messages)
        return "42"

    backend = ScriptedBackend(reply, looks=lambda _: [found])
    return Agent(backend, config=AgentConfig().replace(policy="implicit", **settings))


def test_proposed_crops_stand_beside_the_coarse_view() -> None:
    seen: list[list[Message]] = []
    answer = scripted(sight((2, 1, 5, 3), (6, 4, 8, 6)), seen).run(IMAGE, "what?")
    assert (answer.text, answer.status) == ("42", "answered")
    assert view_ids(seen[0]) == ["coarse", "crop1", "crop2"]
    record = answer.trace.perception
    assert record is not None
    assert (record.route, record.fired) == ("zoom", True)
    assert record.boxes == [(200, 100, 500, 300), (600, 400, 800, 600)]
    assert [view.box for view in answer.trace.views[2:]] == record.boxes
    usage = answer.trace.usage
    assert (usage.inserted, usage.requested) == (2, 0)


def test_boxes_without_cells_are_shown_and_placed_on_the_map() -> None:
    given = sight((2, 1, 5, 3))
    answer = scripted(given.model_copy(update={"cells": []})).run(IMAGE, "what?")
    record = answer.trace.perception
    assert (answer.status, answer.boxes) == ("answered", [(200, 100, 500, 300)])
    assert record is not None and record.cells[0] == pytest.approx((2, 1, 5, 3))


def test_nothing_proposed_is_the_direct_path() -> None:
    seen: list[list[Message]] = []
    answer = scripted(sight(), seen).run(IMAGE, "what?")
    assert view_ids(seen[0]) == ["coarse"]
    assert answer.trace.perception is not None
    assert answer.trace.perception.route == "direct"
    assert "suffices" in answer.trace.perception.reason


def test_a_margin_and_a_budget_of_its_own_shape_the_crop() -> None:
    perception = {"margin": 0.1, "roi_min_tokens": 20, "roi_max_tokens": 24}
    answer = scripted(sight((2, 1, 5, 3)), perception=perception).run(IMAGE, "what?")
    (crop,) = [view for view in answer.trace.views if view.kind == "crop"]
    assert crop.box == (170, 70, 530, 330)
    assert crop.tokens <= 24


def test_crops_stop_where_the_budget_does() -> None:
    answer = scripted(sight((2, 1, 5, 3), (6, 4, 8, 6)), budget={"max_views": 2}).run(IMAGE, "what?")
    assert answer.trace.usage.inserted == 1
    assert answer.trace.perception is not None
    assert "no room" in answer.trace.perception.reason
    whole = scripted(sight((2, 1, 5, 3))).run(IMAGE, "what?").usage.visual_tokens
    for limit, inserted in ((whole, 1), (whole - 1, 0)):
        budget = {"max_visual_tokens": limit}
        assert scripted(sight((2, 1, 5, 3)), budget=budget).run(IMAGE, "what?").usage.inserted == inserted
    tight = scripted(sight((2, 1, 5, 3)), budget={"max_visual_tokens": 70}).run(IMAGE, "what?")
    assert tight.trace.usage.inserted == 0
    # the answer stands, but not as one that had all it asked for
    assert tight.status == "budget" and tight.text
    assert tight.trace.perception is not None and tight.trace.perception.withheld
    assert not answer.trace.perception.withheld and answer.status == "answered"


def test_a_look_that_fails_is_an_answer_with_status_error() -> None:
    def broken(_: list[Message]) -> list[PerceptionRecord]:
        raise RuntimeError("no luck")

    backend = ScriptedBackend(["42"], looks=broken)
    answer = Agent(backend, config=AgentConfig(policy="always")).run(IMAGE, "what?")
    assert (answer.status, answer.trace.error) == ("error", "RuntimeError: no luck")
    assert answer.trace.turns == []


@pytest.mark.parametrize("aligned", [True, False])
def test_placed_crops_survive_a_resume(aligned: bool, tmp_path: Path) -> None:
    """A session opened after a kill is told of the crops that were placed before it."""
    told: list[dict[str, Any]] = []

    class Telling(ScriptedBackend):
        def session(self, image: Any) -> Any:
            session = super().session(image)
            told.append(session.places)
            return session

    def found(_: list[Message]) -> list[PerceptionRecord]:
        return [sight((2, 1, 5, 3), aligned=aligned)]

    replies = iter(["<zoom>", "42"])
    backend = Telling(lambda _: next(replies), looks=found)
    agent = Agent(backend, config=AgentConfig(policy="implicit"), state_dir=tmp_path)
    stream = agent.stream(IMAGE, "what?", thread="one")
    for event in stream:
        if event.kind == "turn":
            break
    stream.close()  # type: ignore[attr-defined]
    assert agent.resume("one").text == "42"
    wanted = {"crop1": ("coarse", (2.0, 1.0, 5.0, 3.0))} if aligned else {}
    assert told[0] == told[-1] == wanted
    assert len(told) == 2


def test_looking_alone_answers_nothing() -> None:
    found = scripted(sight((2, 1, 5, 3))).look(IMAGE, "what?")
    assert found.record.boxes == [(200, 100, 500, 300)]
    assert found.store.view("coarse").tokens > 0
    with pytest.raises(ConfigError, match="has no branches"):
        Agent(ScriptedBackend([])).look(IMAGE, "what?")


def test_oracle_and_random_need_no_branches_and_work_with_them() -> None:
    for policy in ("oracle", "random", "direct", "explicit", "blind"):
        agent = Agent(ScriptedBackend(lambda _: "42", looks=lambda _: []), config=AgentConfig(policy=policy))
        answer = agent.run(IMAGE, "what?", boxes=[[10, 10, 60, 60]])
        assert (answer.text, answer.trace.perception) == ("42", None)


@pytest.fixture(scope="module")
def load(tmp_path_factory: pytest.TempPathFactory) -> Callable[[Family], Path]:
    """Folders of tiny models with their branches inside."""

    def get(family: Family) -> Path:
        folder = build(family, tmp_path_factory.mktemp(family), layers=6)
        plain = HFBackend.load(str(folder), device="cpu", dtype="float32")
        torch.manual_seed(1)
        positions = "plain" if family == "llava" else "aligned"
        Branches.from_base(plain.model, k=3, positions=positions, gate_threshold=0.0).save(folder)
        return folder

    return cache(get)


@pytest.fixture(scope="module")
def loaded(load: Callable[[Family], Path]) -> Callable[[Family], HFBackend]:
    """The models of these folders, for tests that change nothing about them."""
    return cache(lambda family: HFBackend.load(str(load(family)), device="cpu", dtype="float32"))


@pytest.mark.parametrize("family", FAMILIES)
def test_every_policy_runs_on_a_model_with_branches(family: Family, load: Callable[[Family], Path]) -> None:
    folder = load(family)
    common = {"generation": {"max_new_tokens": 4}, "budget": {"max_turns": 1, **COARSE}}
    backend = Agent.from_pretrained(str(folder), device="cpu", dtype="float32", **common).backend
    assert backend.perceives
    looking = ("implicit", "always", "hybrid")
    perception = {"threshold": 0.3, "prompt": "opening", **CLOSER}
    # those that do not look are the same code for every family
    for policy in (*looking, *(("direct", "random", "oracle", "blind") if family == FAMILIES[0] else ())):
        config = AgentConfig(policy=policy).replace(perception=perception, **common)
        answer = Agent(backend, config=config).run(IMAGE, "what is the code?", boxes=[[100, 100, 200, 160]])
        assert answer.status in ("answered", "refused", "budget"), answer.trace.error
        crops = answer.trace.usage.inserted
        assert crops == (1 if policy in (*looking, "random", "oracle") else 0), policy
        if policy in looking:
            record = answer.trace.perception
            assert record is not None
            assert (record.score is None) == (policy == "always")
            turn = answer.trace.turns[0]
            assert turn.cached_tokens > record.visual_tokens
            assert Trace.model_validate_json(answer.trace.model_dump_json()) == answer.trace


@pytest.mark.parametrize("family", FAMILIES)
def test_an_implicit_answer_is_that_of_one_pass_over_its_views(
    family: Family, loaded: Callable[[Family], HFBackend]
) -> None:
    how = {"perception": {"threshold": 0.3, "positions": "plain", **CLOSER}, "budget": COARSE}
    agent = Agent(loaded(family), policy="implicit", generation={"max_new_tokens": 4}, **how)
    answer = agent.run(IMAGE, "what is the code?")
    assert answer.usage.inserted
    session = agent.backend.session(answer.store.image)
    opening = agent.protocol.opening("what is the code?", answer.store.shown, tools=False)
    assert session.reply(opening, settings=SamplingParams(max_new_tokens=4)).text == answer.trace.turns[0].text


class Speaking:
    """A real session whose words are given: everything it computes is real, and it calls the tool when it should."""

    def __init__(self, session: HFSession, words: Iterator[str], spoken: list[tuple[list[Message], torch.Tensor]]):
        self._session, self._words, self._spoken = session, words, spoken
        self.look, self.place, self.close = session.look, session.place, session.close

    def reply(self, messages: list[Message], **rest: Any) -> Reply:
        found = self._session.reply(messages, **rest)
        logits = self._session.prompt_logits
        assert logits is not None
        self._spoken.append((list(messages), logits.clone()))
        return found.model_copy(update={"text": next(self._words), "finish": "stop"})


@pytest.mark.parametrize(("family", "prompt"), [*((family, "opening") for family in FAMILIES), (FAMILIES[0], "plain")])
@pytest.mark.parametrize("fires", [True, False])
def test_a_hybrid_episode_computes_what_fresh_sessions_would(
    family: Family, fires: bool, prompt: str, loaded: Callable[[Family], HFBackend], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Look, inserted crop, refused and served calls, on one cache: each turn's logits are those of a first pass."""
    backend = loaded(family)
    gate = {"gate_threshold": 0.0 if fires else 1.0}
    perception = {"threshold": 0.3, "positions": "plain", "prompt": prompt} | gate
    perception |= {"roi_min_tokens": 96, "roi_max_tokens": 120}
    budget = {"coarse_tokens": 64, "crop_min_tokens": 16, "crop_max_tokens": 24}
    config = AgentConfig(policy="hybrid", protocol="plain").replace(
        perception=perception, budget=budget, generation={"max_new_tokens": 3}
    )
    # the whole image again (shown, or not needed), then a corner of it, twice
    words = iter(["ZOOM: 0, 0, 1000, 1000", "ZOOM: 0, 0, 60, 60", "ZOOM: 0, 0, 60, 60", "42"])
    spoken: list[tuple[list[Message], torch.Tensor]] = []
    fresh = backend.session
    monkeypatch.setattr(backend, "session", lambda image: Speaking(fresh(image), words, spoken))
    answer = Agent(backend, config=config).run(IMAGE, "what is the code?")
    assert (answer.text, answer.status) == ("42", "answered"), answer.trace.error
    calls = [(call.decision, call.code) for turn in answer.trace.turns for call in turn.calls]
    record = answer.trace.perception
    assert record is not None
    assert record.fired is fires
    assert record.extent is not None
    padded = (0, -150, 900, 750) if family == "llava" else (0, 0, 900, 600)
    assert record.extent == pytest.approx(padded, abs=8)
    assert answer.trace.usage.inserted == int(fires)
    assert calls[0] == ("refused", "covered")
    # a random map proposes nearly everything: the corner in its crop is coarse, so a closer look at it is news
    assert calls[1:] == ([("served", ""), ("refused", "covered")] if fires else [("refused", "gate"), ("served", "")])
    for (messages, logits), turn in zip(spoken, answer.trace.turns, strict=True):
        session = fresh(answer.store.image)
        again = session.reply(messages, settings=SamplingParams(max_new_tokens=1))
        assert session.prompt_logits is not None
        assert torch.allclose(logits, session.prompt_logits, atol=2e-4), turn.index
        assert again.prompt_tokens == turn.prompt_tokens
        assert turn.cached_tokens >= record.visual_tokens
    assert Trace.model_validate_json(answer.trace.model_dump_json()) == answer.trace


def test_a_folder_of_branches_can_be_given(load: Callable[[Family], Path], tmp_path: Path) -> None:
    folder = load("qwen2_5_vl")
    other = HFBackend.load(str(folder), device="cpu", dtype="float32")
    Branches.from_base(other.model, k=2, depth=2, gate_depth=2).save(tmp_path)
    agent = Agent.from_pretrained(str(folder), branches=tmp_path, device="cpu", dtype="float32", policy="always")
    assert isinstance(agent.backend, HFBackend)
    assert agent.backend.branches is not None
    assert agent.backend.branches.config.k == 2
    saved = json.loads((tmp_path / "branches.json").read_text())
    assert saved["k"] == 2


@pytest.mark.parametrize("part", ["gate", "sdrpn"])
def test_damaged_branches_are_an_error_of_the_model(part: str, load: Callable[[Family], Path]) -> None:
    agent = Agent.from_pretrained(str(load("qwen2_5_vl")), device="cpu", dtype="float32", policy="implicit")
    assert isinstance(agent.backend, HFBackend)
    for value in getattr(agent.backend.branches, part).parameters():
        value.data.fill_(torch.nan)
    with pytest.raises(BackendError, match="not finite"):
        agent.look(IMAGE, "what?")
    assert "not finite" in str(agent.run(IMAGE, "what?").trace.error)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("size", [(1, 1), (5, 3), (30, 900)])
def test_images_smaller_than_a_cell_or_very_thin_are_answered(
    family: Family, size: tuple[int, int], loaded: Callable[[Family], HFBackend]
) -> None:
    config = {"generation": {"max_new_tokens": 3}, "perception": {"threshold": 0.3}}
    agent = Agent(loaded(family), policy="implicit", **config)
    answer = agent.run(Image.new("RGB", size, (200, 30, 30)), "what is the code?")
    assert answer.status in ("answered", "refused", "budget"), answer.trace.error  # cut off after three tokens
    record = answer.trace.perception
    assert record is not None
    for x1, y1, x2, y2 in record.boxes:
        assert 0 <= x1 < x2 <= size[0]
        assert 0 <= y1 < y2 <= size[1]
