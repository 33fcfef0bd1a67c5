"""Further looks: the implicit policy goes on from crop to crop, on scripted looks and on tiny models."""

from collections.abc import Callable
from functools import cache
from importlib.resources import files
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors import safe_open

from qzoom_agent import Agent
from qzoom_agent.config import AgentConfig, PerceptionConfig
from qzoom_agent.errors import BackendError
from qzoom_agent.geometry import Box
from qzoom_agent.messages import Message, image_part, message, view_ids
from qzoom_agent.models import hf_session
from qzoom_agent.models.hf import HFBackend
from qzoom_agent.models.hf_batch import BatchEngine
from qzoom_agent.models.hf_session import encode_views
from qzoom_agent.models.interface import SamplingParams
from qzoom_agent.models.scripted import ScriptedBackend
from qzoom_agent.perception import branches as module
from qzoom_agent.perception.branch_config import CONFIG, FURTHER, WEIGHTS
from qzoom_agent.perception.branches import Branches
from qzoom_agent.perception.decoder import Prefill
from qzoom_agent.trace import PerceptionRecord, Trace
from tests.tiny_models import Family, build, noise

FAMILIES: tuple[Family, ...] = ("qwen2_5_vl", "qwen3_vl", "llava")
IMAGE = Image.fromarray(np.random.default_rng(0).integers(0, 255, (600, 900, 3), dtype=np.uint8))
PLACES = ((0, 0, 2, 2), (4, 0, 6, 2), (0, 3, 2, 5), (6, 3, 8, 5), (2, 2, 4, 4), (6, 0, 8, 2), (4, 4, 6, 6))
"""Boxes in cells of a coarse view of 9 x 6 cells of 28 pixels, each 100 pixels of the original."""


def sight(*cells: tuple[int, int, int, int], further: bool = True, aligned: bool = False) -> PerceptionRecord:
    return PerceptionRecord(
        score=0.9 if cells else 0.1,
        threshold=0.5,
        cells=list(cells),
        boxes=[(28 * x1, 28 * y1, 28 * x2, 28 * y2) for x1, y1, x2, y2 in cells],
        reason="the gate asks for more detail" if cells else "the gate says that the coarse view suffices",
        further=further,
        aligned=aligned,
        token_layers=10.0,
    )


def looking(count: int, *, aligned: bool = False) -> Callable[[list[Message]], list[PerceptionRecord]]:
    """Return looks that propose one place after another, `count` in all, and then say enough."""

    def look(messages: list[Message]) -> list[PerceptionRecord]:
        at = len(view_ids(messages)) - 1
        return [sight(*PLACES[at : at + 1] if at < count else (), aligned=aligned)]

    return look


def run(looks: Callable[[list[Message]], list[PerceptionRecord]], **changes: Any) -> Trace:
    backend = ScriptedBackend(lambda messages: str(len(view_ids(messages))), looks=looks)
    return Agent(backend, config=AgentConfig(policy="implicit").replace(**changes)).run(IMAGE, "what?").trace


def test_looks_follow_one_another_until_the_gate_says_enough() -> None:
    trace = run(looking(3))
    assert (trace.answer, trace.status, len(trace.turns)) == ("4", "answered", 1)
    assert [look.route for look in trace.looks] == ["zoom", "zoom", "zoom", "direct"]
    assert [view.box for view in trace.views[2:]] == [(0, 0, 200, 200), (400, 0, 600, 200), (0, 300, 200, 500)]
    assert (trace.usage.inserted, trace.usage.requested) == (3, 0)
    assert sum(look.token_layers for look in trace.looks) == 40.0
    assert Trace.model_validate_json(trace.model_dump_json()) == trace


@pytest.mark.parametrize(
    ("changes", "looks", "crops", "status"),
    [
        ({"budget": {"max_views": 3}}, 2, 2, "answered"),
        ({"budget": {"max_turns": 2}}, 2, 2, "answered"),
        ({"perception": {"max_looks": 1}}, 1, 1, "answered"),
        ({"policy": "always"}, 1, 1, "answered"),
        ({"budget": {"max_visual_tokens": 190, "coarse_tokens": 64}}, 3, 2, "budget"),
    ],
    ids=["views", "turns", "looks", "always", "visual tokens"],
)
def test_a_budget_or_a_setting_ends_them(changes: dict[str, Any], looks: int, crops: int, status: str) -> None:
    trace = run(looking(7), **changes)
    assert (len(trace.looks), trace.usage.inserted, trace.status) == (looks, crops, status)
    assert trace.answer == str(crops + 1)


def test_branches_that_look_once_look_once() -> None:
    trace = run(lambda messages: [sight(PLACES[len(view_ids(messages))], further=False)])
    assert (len(trace.looks), trace.usage.inserted) == (1, 1)


def test_a_crop_that_shows_nothing_new_ends_them() -> None:
    trace = run(lambda messages: [sight(PLACES[0])])
    assert (len(trace.looks), trace.usage.inserted, trace.status) == (2, 1, "answered")
    assert "a crop would add nothing" in trace.looks[1].reason


def test_a_region_may_lie_inside_a_crop_and_several_may_be_shown() -> None:
    def looks(messages: list[Message]) -> list[PerceptionRecord]:
        if len(shown := view_ids(messages)) == 1:
            return [sight((0, 0, 6, 6))]
        if len(shown) == 2:  # one in the crop, which shows 600 x 600 pixels at 7 x 7 cells or so, one beside it
            return [sight((7, 0, 9, 2)), sight((0, 0, 1, 1))]
        return [sight()]

    trace = run(looks, perception={"max_regions": 2, "roi_min_tokens": 49, "roi_max_tokens": 64})
    assert trace.views[3].box == (700, 0, 900, 200)
    inside = trace.views[4].region
    crop = trace.views[2]
    assert crop.region.coverage(inside) == 1.0
    assert inside.width == pytest.approx(28 * crop.region.width / crop.width, abs=2)


def test_a_close_up_of_a_crop_is_shown_although_its_pixels_were() -> None:
    """A crop at full resolution adds nothing, unless it is the place in a crop that is looked for there."""

    def looks(messages: list[Message]) -> list[PerceptionRecord]:
        if len(view_ids(messages)) == 1:
            return [sight((0, 0, 3, 3))]
        return [sight(), sight((3, 3, 5, 5), further=False).model_copy(update={"close": close})]

    how = {"perception": {"roi_min_tokens": 140, "roi_max_tokens": 160}}
    close = False
    trace = run(looks, **how)
    assert trace.usage.inserted == 1 and "a crop would add nothing" in trace.looks[1].reason
    close = True
    trace = run(looks, **how)
    first, second = trace.views[2:]
    assert first.region.coverage(second.region) == 1.0
    assert second.width / second.region.width > first.width / first.region.width > 1.0


def test_each_look_is_streamed_and_a_killed_run_looks_no_more_than_it_has_to(tmp_path: Path) -> None:
    asked: list[int] = []
    told: list[dict[str, Any]] = []

    class Telling(ScriptedBackend):
        def session(self, image: Any) -> Any:
            session: Any = super().session(image)
            told.append(session.places)
            return session

    def looks(messages: list[Message]) -> list[PerceptionRecord]:
        asked.append(len(view_ids(messages)))
        return looking(2, aligned=True)(messages)

    agent = Agent(Telling(lambda _: "42", looks=looks), config=AgentConfig(policy="implicit"), state_dir=tmp_path)
    stream = agent.stream(IMAGE, "what?", thread="one")
    kinds: list[str] = []
    for event in stream:
        kinds.append(event.kind)
        if kinds.count("look") == 2:
            break
    stream.close()  # type: ignore[attr-defined]
    assert kinds == ["view", "look", "view", "look"]
    answer = agent.resume("one")
    assert (answer.text, len(answer.trace.looks)) == ("42", 3)
    assert asked.count(1) == 1  # the step that was under way may be repeated, those before it are not
    assert set(told[-1]) == {"crop1", "crop2"}
    assert told[-1]["crop2"][1] == pytest.approx((4.0, 0.0, 6.0, 2.0))


def test_a_further_look_that_fails_is_an_answer_with_status_error() -> None:
    def looks(messages: list[Message]) -> list[PerceptionRecord]:
        if len(view_ids(messages)) > 1:
            raise RuntimeError("no luck")
        return [sight(PLACES[0])]

    trace = run(looks)
    assert (trace.status, trace.error, trace.usage.inserted) == ("error", "RuntimeError: no luck", 1)


# ---- tiny models ---------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def load(tmp_path_factory: pytest.TempPathFactory) -> Callable[[Family], HFBackend]:
    """Return tiny models with branches that look again."""

    def get(family: Family) -> HFBackend:
        folder = build(family, tmp_path_factory.mktemp(f"further-{family}"), layers=6)
        plain = HFBackend.load(str(folder), device="cpu", dtype="float32")
        positions = "plain" if family == "llava" else "aligned"
        branches = Branches.from_base(plain.model, k=3, positions=positions, gate_threshold=0.0)
        torch.manual_seed(1)
        branches.add_further(Branches.from_base(plain.model, k=3, gate_threshold=0.0, inside_crops=True))
        branches.save(folder)
        return HFBackend.load(str(folder), device="cpu", dtype="float32")

    return cache(get)


# a part of the map, so that crops differ from the whole image
SEARCH = {
    "perception": {"box": (0.4, 0.4), "peak_share": 0.5, "max_looks": 3, "roi_min_tokens": 36, "roi_max_tokens": 64},
    "budget": {"coarse_tokens": 16, "coarse_min_tokens": 4},
    "generation": {"max_new_tokens": 4},
}


@pytest.mark.parametrize(
    ("family", "positions"),
    [(family, how) for family in FAMILIES for how in ("plain", "aligned") if (family, how) != ("llava", "aligned")],
)
def test_the_answer_after_several_looks_is_that_of_one_pass_over_its_views(
    family: Family, positions: str, load: Callable[[Family], HFBackend], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each layer below the branches runs once on each token, and each view is encoded once."""
    backend = load(family)
    ran: list[int] = []
    encoded: list[str] = []
    extend = Prefill.extend

    def counted(self: Prefill, new: Any, rotary: Any) -> int:
        ran.append(new.hidden.shape[1])
        return extend(self, new, rotary)

    def encoding(backend: HFBackend, images: Any) -> Any:
        encoded.extend(images)
        return encode_views(backend, images)

    monkeypatch.setattr(Prefill, "extend", counted)
    monkeypatch.setattr(hf_session, "encode_views", encoding)
    config = AgentConfig(policy="implicit").replace(**SEARCH).replace(perception={"positions": positions})
    agent = Agent(backend, config=config)
    answer = agent.run(IMAGE, "what is the code?")
    trace = answer.trace
    assert trace.error is None
    assert len(trace.looks) > 1
    last = backend.session(answer.store.image)
    tokens = len(last.prepare(agent.protocol.opening("what is the code?", answer.store.shown, tools=False)).prompt.ids)
    tail = ran[0] - answer.store.view("coarse").tokens  # the question at most, which stands behind the crops
    assert sum(ran) <= tokens + tail * (len(ran) - 1)
    assert encoded[: len(trace.views) - 1] == [view.id for view in trace.views[1:]]
    assert len(encoded) == 2 * (len(trace.views) - 1)  # once in the episode, once above
    session = backend.session(answer.store.image)
    for view in trace.views[2:]:
        if positions == "aligned" and family != "llava":
            coarse = answer.store.view("coarse")
            cells = coarse.from_original(view.region).to_frame("cell", coarse.size, coarse.cell).as_list()
            session.place(view.id, source="coarse", cells=(cells[0], cells[1], cells[2], cells[3]))
    opening = agent.protocol.opening("what is the code?", answer.store.shown, tools=False)
    assert session.reply(opening, settings=SamplingParams(max_new_tokens=4)).text == trace.turns[0].text
    assert trace.turns[0].cached_tokens >= trace.looks[-1].visual_tokens


def test_with_the_gate_off_nothing_would_end_further_looks(load: Callable[[Family], HFBackend]) -> None:
    agent = Agent(load("qwen2_5_vl"), config=AgentConfig(policy="implicit").replace(**SEARCH))
    off = agent.replace(**{"perception.gate": "off"})
    assert [len(one.run(IMAGE, "what is the code?").trace.looks) for one in (agent, off)] == [3, 1]


@pytest.mark.parametrize("family", FAMILIES)
def test_close_ups_lie_in_the_crop_and_need_no_gate(family: Family, load: Callable[[Family], HFBackend]) -> None:
    first = load(family)
    assert first.branches is not None
    how = {"k": 3, "with_gate": False, "box": (0.5, 0.4), "peak_share": 0.5}
    branches = Branches.from_base(first.model, **how)
    branches.add_further(Branches.from_base(first.model, **how, inside_crops="only", crops=2))
    backend = HFBackend(first.model, first.processor, name="close", branches=branches)
    search = {**SEARCH, "perception": {"roi_min_tokens": 16, "roi_max_tokens": 36}}
    agent = Agent(backend, config=AgentConfig(policy="implicit").replace(**search))
    (one, two) = agent.batch([(IMAGE, "what is the code?"), (IMAGE, "how many dots are on the red circle?")])
    off = agent.replace(**{"perception.gate": "off"}).run(IMAGE, "what is the code?")  # their number ends them
    for trace in (agent.run(IMAGE, "what is the code?").trace, off.trace, one.trace, two.trace):
        assert [(look.score, look.route) for look in trace.looks] == [(None, "zoom")] * 2
        crop, close = trace.views[2:]
        assert crop.region.coverage(close.region) > 0.99
        assert close.region.area < 0.5 * crop.region.area
        assert trace.looks[1].extent is not None
        searched = Box(*trace.looks[1].extent)  # of a family that pads an image, that with its padding
        assert searched.coverage(crop.region) > 0.9 and searched.width < 1.2 * crop.region.width
    boxed = agent.replace(**{"perception.box": (0.6, 0.6)}).run(IMAGE, "what is the code?").trace
    crop, close = boxed.views[2:]  # the sides that are asked for are those of the first crop
    assert close.region.width < 0.6 * crop.region.width


def test_a_crop_that_is_shown_in_part_has_no_close_up() -> None:
    receipt = files("qzoom_agent") / "data" / "demo" / "4-receipt.jpg"
    with Agent.from_pretrained("nano-paper").replace(**{"perception.sparse_crop": 2.0}) as agent:
        asked = [(str(receipt), "what is the total?"), (str(receipt), "what is the date?")]
        for trace in (agent.run(*asked[0]).trace, *(answer.trace for answer in agent.batch(asked))):
            assert trace.error is None and trace.views[2].kept is not None
            assert (len(trace.looks), trace.usage.inserted) == (2, 1)


@pytest.mark.parametrize("family", FAMILIES)
def test_further_looks_of_a_batch_are_those_of_single_sessions(
    family: Family, load: Callable[[Family], HFBackend]
) -> None:
    backend = load(family)
    options = PerceptionConfig(box=(0.4, 0.4), peak_share=0.5, gate_threshold=0.0)
    side = backend.defaults.factor * 4
    pictures = [noise({"coarse": (side, side), "crop1": (side, side)}, seed=seed) for seed in range(2)]
    questions = ["what is the code?", "how many dots are on the red circle? one, two or three?"]
    talks = [
        [[message("user", *(image_part(view) for view in shown), question)] for question in questions]
        for shown in (["coarse"], ["coarse", "crop1"])
    ]
    single = [backend.session(pictures[row].__getitem__) for row in range(2)]
    rows = [backend.session(pictures[row].__getitem__) for row in range(2)]
    engine = BatchEngine(backend)
    for step, further in enumerate((False, True)):
        found = engine.look(rows, talks[step], options=options, further=further)
        alone = [single[row].look(talks[step][row], options=options, further=further) for row in range(2)]
        for ours, theirs in zip(found, alone, strict=True):
            assert len(ours) == len(theirs) == step + 1
            for one, other in zip(ours, theirs, strict=True):
                assert one.score == pytest.approx(other.score, abs=1e-5)
                assert np.allclose(one.heat, other.heat, atol=1e-5)
                assert np.allclose(one.cells, other.cells, atol=1e-4)
                assert one.token_layers == other.token_layers
            if further:  # the maps compete: one region of all
                assert sum(len(one.cells) for one in ours) == 1
    for row, session in enumerate(rows):
        fresh = backend.session(pictures[row].__getitem__)
        anew = fresh.look(talks[1][row], options=options, further=True)
        again = session.look(talks[1][row], options=options, further=True)
        assert np.allclose(anew[0].heat, again[0].heat, atol=1e-5)
        assert again[0].token_layers < anew[0].token_layers


def test_branches_of_further_looks_lie_in_a_folder_of_their_own(
    load: Callable[[Family], HFBackend], tmp_path: Path
) -> None:
    backend = load("qwen2_5_vl")
    assert backend.branches is not None and backend.branches.further is not None
    size = backend.branches.save(tmp_path, int8=True)
    files = [tmp_path / WEIGHTS, tmp_path / FURTHER / WEIGHTS]
    assert size == sum(file.stat().st_size for file in files)
    assert (tmp_path / FURTHER / CONFIG).is_file()
    with safe_open(files[0], framework="pt") as stored:
        assert not any(name.startswith(FURTHER) for name in stored.keys())  # noqa: SIM118
    again = Branches.load(tmp_path, backend.model)
    assert again.further is not None
    assert again.further.config == backend.branches.further.config
    assert "inside_crops" not in again.config.model_dump_json()
    other = again.digest()
    config = again.further.config.model_copy(update={"gate_threshold": 0.9})
    again.add_further(Branches(config, again.further.sdrpn, again.further.gate))
    assert again.digest() != other, "other settings of further looks are other branches"
    again.further = None
    again.save(tmp_path)
    assert Branches.load(tmp_path, backend.model).further is None


def test_branches_that_were_saved_in_part_are_not_mixed_with_those_they_replace(
    load: Callable[[Family], HFBackend], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    backend = load("qwen2_5_vl")
    assert backend.branches is not None
    backend.branches.save(tmp_path)
    once = Branches(backend.branches.config, backend.branches.sdrpn, backend.branches.gate)
    written, write = list[Path](), module.save_file

    def killed(weights: Any, path: Path, **more: Any) -> None:
        write(weights, path, **more)
        written.append(path)
        raise KeyboardInterrupt

    monkeypatch.setattr(module, "save_file", killed)
    with pytest.raises(KeyboardInterrupt):
        once.save(tmp_path)
    assert written == [tmp_path / WEIGHTS]
    with pytest.raises(BackendError, match="There are no branches in"):
        Branches.load(tmp_path, backend.model)


def test_branches_that_do_not_belong_together_are_refused(load: Callable[[Family], HFBackend]) -> None:
    backend = load("qwen2_5_vl")
    branches = Branches.from_base(backend.model, k=3, with_gate=False)
    with pytest.raises(BackendError, match="after 2 layers and those of the first look after 3"):
        branches.add_further(Branches.from_base(backend.model, k=2))
    once = HFBackend(backend.model, backend.processor, name="once", branches=branches)
    talk = [message("user", image_part("coarse"), "what?")]
    with pytest.raises(BackendError, match="look once"):
        once.session(lambda _: IMAGE.resize((112, 112))).look(talk, options=PerceptionConfig(), further=True)
