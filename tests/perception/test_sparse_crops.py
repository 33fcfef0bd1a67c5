"""Sparse crops: the model is shown some tokens of a crop, at the positions that they have in the whole crop."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from qzoom_agent.agent import Agent
from qzoom_agent.answer import Answer
from qzoom_agent.config import PerceptionConfig
from qzoom_agent.errors import BackendError, ConfigError
from qzoom_agent.messages import Message, image_part, message, text
from qzoom_agent.models import SamplingParams
from qzoom_agent.models.hf import HFBackend
from qzoom_agent.models.hf_batch import BatchEngine
from qzoom_agent.models.hf_generation import GenerationRequest
from qzoom_agent.models.hf_session import HFSession
from qzoom_agent.perception.decoder import Decoder, Embedded
from qzoom_agent.perception.transformers_versions import image_features
from qzoom_agent.trace import Trace
from tests.tiny_models import Family

FAMILIES: tuple[Family, ...] = ("qwen2_5_vl", "qwen3_vl", "qwen3_5")
GREEDY = SamplingParams(max_new_tokens=4)
ALWAYS = PerceptionConfig(gate_threshold=0.0, peak_share=0.5)
ROWS = ("0110", "1101", "0010")
"""Tokens that are shown of the crop, which has three rows of four."""


@pytest.fixture(params=FAMILIES)
def backend(request: pytest.FixtureRequest, load: Callable[[Family], HFBackend]) -> HFBackend:
    return load(request.param)


def picture(width: int, height: int) -> Image.Image:
    return Image.fromarray(np.random.default_rng(width).integers(0, 255, (height, width, 3), dtype=np.uint8))


def opened(backend: HFBackend, kept: tuple[str, ...] | None = None, *, crop: str = "crop1") -> HFSession:
    factor = backend.defaults.factor
    views = {"coarse": picture(5 * factor, 4 * factor), crop: picture(4 * factor, 3 * factor)}
    session = backend.session(views.__getitem__)
    if kept is not None:
        session.show_part(crop, kept=kept)
    return session


def asked(*crops: str) -> list[Message]:
    return [message("user", image_part("coarse"), *map(image_part, crops), "what is the code on the red circle?")]


def logits(session: HFSession, *crops: str) -> torch.Tensor:
    session.reply(asked(*crops), settings=GREEDY)
    assert session.prompt_logits is not None
    return session.prompt_logits


def shown(backend: HFBackend) -> tuple[Any, list[int], list[Any]]:
    """Return the prompt with the whole crop, the indices of the ids that `ROWS` shows, and its views' features."""
    session = opened(backend)
    ready = session.prepare(asked("crop1"))
    span = ready.prompt.spans[1]
    left_out = {span.start + at for at, mark in enumerate("".join(ROWS)) if mark == "0"}
    features = [
        image_features(backend.model, backend.codec.pixels(session.image(view))[1]) for view in ("coarse", "crop1")
    ]
    return ready, [at for at in range(len(ready.prompt.ids)) if at not in left_out], features


def test_a_crop_with_all_tokens_kept_is_the_plain_crop(backend: HFBackend) -> None:
    assert torch.equal(logits(opened(backend, ("1111",) * 3), "crop1"), logits(opened(backend), "crop1"))


def test_a_sparse_crop_is_the_crop_with_tokens_taken_out_in_front_of_the_decoder(backend: HFBackend) -> None:
    session, decoder = opened(backend, ROWS), Decoder(backend.model)
    ours = logits(session, "crop1")
    ready, kept, features = shown(backend)
    with torch.inference_mode():
        whole = decoder.embed(torch.tensor([ready.prompt.ids]), features)
        stacked = [at for at, one in enumerate(whole.visual[0].nonzero()[:, 0].tolist()) if one in set(kept)]
        new = Embedded(whole.hidden[:, kept], whole.visual[:, kept], [level[stacked] for level in whole.deepstack])
        rotary = decoder.rotary(new.hidden, ready.positions[..., kept])
        mask = decoder.mask(new.hidden)
        theirs = decoder.logits(decoder.run(new, range(decoder.depth), rotary=rotary, mask=mask))[0]
    assert torch.allclose(ours, theirs, atol=1e-4)
    assert not torch.allclose(ours, logits(opened(backend), "crop1"), atol=1e-2)
    assert session.prepare(asked("crop1")).prompt.ids.count(backend.codec.image_id) == 20 + 6


@pytest.mark.parametrize("family", ["qwen2_5_vl", "qwen3_vl"])
def test_a_sparse_crop_is_what_the_stock_model_makes_of_masked_tokens(
    family: Family, load: Callable[[Family], HFBackend]
) -> None:
    backend = load(family)
    ready, kept, _ = shown(backend)
    session, ids = opened(backend), torch.tensor([ready.prompt.ids])
    pixels = [backend.codec.pixels(session.image(view))[1] for view in ("coarse", "crop1")]
    mask = torch.zeros_like(ids)
    mask[0, kept] = 1
    with torch.inference_mode():
        out = backend.model(
            input_ids=ids,
            attention_mask=mask,
            position_ids=ready.positions,
            mm_token_type_ids=(ids == backend.codec.image_id).int(),
            logits_to_keep=1,
            **{key: torch.cat([one[key] for one in pixels]) for key in pixels[0]},
        )
    assert torch.allclose(out.logits[0, -1], logits(opened(backend, ROWS), "crop1"), atol=1e-4)


def test_a_look_and_later_turns_go_on_from_the_same_cache(backend: HFBackend) -> None:
    looked, plain = opened(backend, ROWS), opened(backend, ROWS)
    looked.look(asked(), options=ALWAYS)
    first = looked.reply(asked("crop1"), settings=GREEDY)
    assert first.text == plain.reply(asked("crop1"), settings=GREEDY).text
    assert 0 < first.cached_tokens < first.prompt_tokens
    later = [*asked("crop1"), text("assistant", first.text), message("user", "Answer now.")]
    second, other = looked.reply(later, settings=GREEDY), plain.reply(later, settings=GREEDY)
    assert second.text == other.text and second.cached_tokens == other.cached_tokens >= first.prompt_tokens
    assert looked.prompt_logits is not None and plain.prompt_logits is not None
    assert torch.allclose(looked.prompt_logits, plain.prompt_logits, atol=1e-4)


def test_rows_of_a_batch_are_those_of_single_sessions(backend: HFBackend) -> None:
    alone = [opened(backend, kept).reply(asked("crop1"), settings=GREEDY) for kept in (ROWS, None)]
    sessions = [opened(backend, kept) for kept in (ROWS, None)]
    engine = BatchEngine(backend)
    engine.look(sessions, [asked()] * 2, options=ALWAYS)
    together = engine.reply([GenerationRequest(one, one.prepare(asked("crop1")), GREEDY) for one in sessions])
    assert [one.text for one in together] == [one.text for one in alone]
    assert [one.prompt_tokens for one in together] == [one.prompt_tokens for one in alone]
    assert alone[1].prompt_tokens - alone[0].prompt_tokens == 6


def test_an_aligned_crop_keeps_the_positions_of_its_place(load: Callable[[Family], HFBackend]) -> None:
    backend = load("qwen3_vl")
    part, whole = opened(backend, ROWS), opened(backend)
    for session in (part, whole):
        session.place("crop1", source="coarse", cells=(1.0, 0.0, 3.0, 2.0))
    wanted = whole.prepare(asked("crop1")).positions[..., shown(backend)[1]]
    assert torch.equal(part.prepare(asked("crop1")).positions, wanted)


def test_a_look_makes_no_map_of_a_sparse_crop(load: Callable[[Family], HFBackend]) -> None:
    backend = load("qwen2_5_vl")
    session = opened(backend, ROWS, crop="aside")
    talk = [message("user", image_part("aside"), image_part("coarse"), "what is the code?")]
    aside, coarse = session.look(talk, options=ALWAYS)
    assert (aside.view, aside.heat, coarse.view) == ("aside", [], "coarse")
    assert (len(coarse.heat), len(coarse.heat[0])) == (4, 5)


def test_rows_that_do_not_fit_are_refused(load: Callable[[Family], HFBackend]) -> None:
    with pytest.raises(BackendError, match="cannot be shown in part by these rows"):
        opened(load("qwen2_5_vl"), ("111", "111")).prepare(asked("crop1"))


# -- episodes --------------------------------------------------------------------------------------------------------


def agent_of(backend: HFBackend, **more: Any) -> Agent:
    perception = {"sparse_crop": 3.0, "gate_threshold": 0.0, "peak_share": 0.99, "blur": "none", "box": (0.6, 0.6)}
    budget = {"coarse_tokens": 64, "crop_min_tokens": 12, "crop_max_tokens": 24}
    how = {"policy": "implicit", "perception": perception, "budget": budget, "generation": {"max_new_tokens": 4}}
    return Agent(backend, **{**how, **more})


def test_an_episode_counts_the_tokens_that_the_decoder_saw(
    backend: HFBackend, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    embedded, embed = [], Decoder.embed

    def counting(self: Decoder, ids: torch.Tensor, features: Any) -> Embedded:
        new = embed(self, ids, features)
        embedded.append(int(new.visual.sum()))
        return new

    monkeypatch.setattr(Decoder, "embed", counting)
    image = picture(20 * backend.defaults.factor, 16 * backend.defaults.factor)
    answer = agent_of(backend, state_dir=tmp_path / "runs").run(image, "what is the code?", thread="one")
    assert answer.trace.error is None
    coarse, crop = answer.trace.views[1:]
    assert crop.kept is not None and crop.tokens <= 24
    assert len(crop.kept) * len(crop.kept[0]) * backend.defaults.factor**2 == crop.width * crop.height
    assert crop.width * crop.height > 24 * backend.defaults.factor**2
    assert answer.usage.visual_tokens == coarse.tokens + crop.tokens == sum(embedded)
    assert answer.trace.turns[0].visual_tokens == crop.tokens
    answer.save(tmp_path / "saved")
    assert Trace.load(tmp_path / "saved") == answer.trace
    opened_again = Answer.load(tmp_path / "saved")
    assert opened_again.store.view("crop1").kept == crop.kept
    assert f"{crop.tokens} visual tokens of " in opened_again.report(tmp_path / "page.html").read_text()


def test_a_resumed_run_shows_the_same_tokens(load: Callable[[Family], HFBackend], tmp_path: Path) -> None:
    backend = load("qwen3_vl")
    image = picture(20 * backend.defaults.factor, 16 * backend.defaults.factor)
    agent = agent_of(backend, state_dir=tmp_path)
    whole = agent.run(image, "what is the code?")
    stream = agent.stream(image, "what is the code?", thread="two")
    for event in stream:
        if event.kind == "view" and event.data["kind"] == "crop":
            break
    stream.close()  # type: ignore[attr-defined]
    resumed = agent.resume("two")
    assert whole.trace.views[2].kept is not None
    assert resumed.text == whole.text and resumed.trace.views == whole.trace.views
    assert resumed.trace.turns[0].prompt_tokens == whole.trace.turns[0].prompt_tokens


@pytest.mark.parametrize("family", ["gemma4", "llava"])
def test_families_of_fixed_sizes_are_refused(family: Family, load: Callable[[Family], HFBackend]) -> None:
    with pytest.raises(ConfigError, match=r"Sparse crops .* images may have any size"):
        agent_of(load(family))


def test_a_perceiver_is_refused(load: Callable[[Family], HFBackend]) -> None:
    from qzoom_agent.models.perceiver import LocalPerceiver

    backend = load("qwen2_5_vl")
    with pytest.raises(ConfigError, match="with a perceiver"):
        agent_of(backend, perceiver=LocalPerceiver(backend))
