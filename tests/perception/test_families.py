"""What holds for every family: a look, and what follows it, is one pass over the final conversation.

Tiny random models with untrained branches. Thresholds are chosen per test, so that a random gate fires or does not.
"""

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from PIL import Image
from transformers import DynamicCache

from qzoom_agent.config import PerceptionConfig
from qzoom_agent.errors import BackendError
from qzoom_agent.messages import Message, image_part, message, text
from qzoom_agent.models import SamplingParams
from qzoom_agent.models.hf import HFBackend
from qzoom_agent.models.hf_session import HFSession
from qzoom_agent.models.interface import PerceivingSession
from qzoom_agent.perception.adapters import adapter_for, align
from qzoom_agent.perception.decoder import Decoder
from qzoom_agent.perception.transformers_versions import image_features
from qzoom_agent.trace import PerceptionRecord
from tests.tiny_models import MIXED, Family, noise

FAMILIES: tuple[Family, ...] = ("qwen2_5_vl", "qwen3_vl", "qwen3_5", "gemma4", "llava")
GREEDY = SamplingParams(max_new_tokens=5)
ALWAYS = PerceptionConfig(gate_threshold=0.0, threshold=0.3)
NEVER = PerceptionConfig(gate_threshold=1.0)
EMPTY = PerceptionConfig(gate_threshold=0.0, threshold=1.0)


@pytest.fixture(params=FAMILIES)
def backend(request: pytest.FixtureRequest, load: Callable[[Family], HFBackend]) -> HFBackend:
    return load(request.param)


def pictures(backend: HFBackend) -> dict[str, Image.Image]:
    cells = {"coarse": (5, 4), "crop1": (2, 3), "crop2": (3, 2)}
    fixed = backend.name == "llava"
    return noise(dict.fromkeys(cells, (4, 4)) if fixed else cells, unit=backend.defaults.factor)


def session_of(backend: HFBackend) -> HFSession:
    return backend.session(pictures(backend).__getitem__)


def asked(*crops: str, question: str = "what is the code on the red circle?") -> list[Message]:
    return [message("user", image_part("coarse"), *(image_part(crop) for crop in crops), question)]


def look(session: HFSession, options: PerceptionConfig, **more: Any) -> PerceptionRecord:
    return session.look(asked(), options=options, **more)[0]


def stock_inputs(backend: HFBackend, ids: torch.Tensor, *views: str) -> dict[str, Any]:
    """Return what the stock forward takes for these ids beside them."""
    pixels = [backend.codec.pixels(pictures(backend)[view])[1] for view in views]
    inputs = {key: torch.cat([one[key] for one in pixels]) for key in pixels[0]}
    if backend.name != "llava":
        inputs["mm_token_type_ids"] = (ids == backend.codec.image_id).int()
    return inputs


def equal(backend: HFBackend, ours: torch.Tensor, theirs: torch.Tensor) -> bool:
    """Return True if logits are equal bit for bit; in families with two kinds of layers, up to rounding."""
    return torch.allclose(ours, theirs, atol=1e-4) if backend.name in MIXED else torch.equal(ours, theirs)


def logits_of(session: HFSession) -> torch.Tensor:
    assert session.prompt_logits is not None
    return session.prompt_logits


def test_a_session_with_branches_can_look(backend: HFBackend) -> None:
    assert backend.perceives
    assert isinstance(session_of(backend), PerceivingSession)


@pytest.mark.parametrize("options", [NEVER, EMPTY], ids=["the gate never fires", "the map is empty"])
def test_the_direct_path_is_the_stock_model(backend: HFBackend, options: PerceptionConfig) -> None:
    looked, stock = session_of(backend), session_of(backend)
    sight = look(looked, options)
    assert sight.boxes == []
    ours, theirs = looked.reply(asked(), settings=GREEDY), stock.reply(asked(), settings=GREEDY)
    assert equal(backend, logits_of(looked), logits_of(stock))
    assert ours.text == theirs.text
    assert ours.cached_tokens == ours.prompt_tokens


def test_a_driven_prefill_is_the_stock_forward(backend: HFBackend) -> None:
    session = session_of(backend)
    look(session, NEVER)
    session.reply(asked(), settings=GREEDY)
    ready = session_of(backend).prepare(asked())
    ids = torch.tensor([ready.prompt.ids])
    inputs = stock_inputs(backend, ids, "coarse")
    with torch.inference_mode():
        out = backend.model(input_ids=ids, position_ids=ready.positions, logits_to_keep=1, **inputs)
    assert equal(backend, out.logits[0, -1], logits_of(session))


def test_an_inserted_crop_gives_what_one_pass_over_everything_gives(backend: HFBackend) -> None:
    looked, whole = session_of(backend), session_of(backend)
    assert look(looked, ALWAYS).boxes
    ours, theirs = (one.reply(asked("crop1"), settings=GREEDY) for one in (looked, whole))
    assert torch.allclose(logits_of(looked), logits_of(whole), atol=1e-4)
    assert (ours.text, ours.prompt_tokens) == (theirs.text, theirs.prompt_tokens)
    assert 0 < ours.cached_tokens < ours.prompt_tokens
    layers = backend.model.config.get_text_config().num_hidden_layers
    assert theirs.token_layers == layers * theirs.prompt_tokens
    assert ours.token_layers == theirs.token_layers - 3 * ours.cached_tokens


def test_plain_positions_are_those_of_a_stock_prompt_of_two_images(backend: HFBackend) -> None:
    looked = session_of(backend)
    look(looked, ALWAYS)
    looked.reply(asked("crop1"), settings=GREEDY)
    ready = session_of(backend).prepare(asked("crop1"))
    ids = torch.tensor([ready.prompt.ids])
    inputs = stock_inputs(backend, ids, "coarse", "crop1")
    with torch.inference_mode():
        out = backend.model(input_ids=ids, attention_mask=torch.ones_like(ids), logits_to_keep=1, **inputs)
    assert torch.allclose(out.logits[0, -1], logits_of(looked), atol=1e-4)


def test_a_look_reads_the_pixels_of_a_view_once_to_encode_and_once_to_place_it(backend: HFBackend) -> None:
    session, read = session_of(backend), list[str]()
    image = session.image
    session.image = lambda view: read.append(view) or image(view)  # type: ignore[func-returns-value]
    look(session, ALWAYS)
    look(session, ALWAYS)
    assert read == ["coarse", "coarse"]


def test_a_lean_prefill_says_the_same_for_less(backend: HFBackend) -> None:
    lean, full = session_of(backend), session_of(backend)
    look(lean, ALWAYS.model_copy(update={"lean": True}))
    look(full, ALWAYS)
    cheap, dear = (one.reply(asked("crop1"), settings=GREEDY) for one in (lean, full))
    assert cheap.text == dear.text
    assert torch.allclose(logits_of(lean), logits_of(full), atol=1e-4)
    saved = dear.token_layers - cheap.token_layers
    assert saved == 0 if backend.name in MIXED else saved > 0.5 * dear.prompt_tokens


def test_several_crops_can_be_inserted(backend: HFBackend) -> None:
    looked, whole = session_of(backend), session_of(backend)
    look(looked, ALWAYS)
    for session in (looked, whole):
        session.reply(asked("crop1", "crop2"), settings=GREEDY)
    assert torch.allclose(logits_of(looked), logits_of(whole), atol=1e-4)


def test_a_greedy_continuation_is_that_of_generate(backend: HFBackend) -> None:
    looked = session_of(backend)
    look(looked, ALWAYS)
    reply = looked.reply(asked("crop1"), settings=GREEDY)
    ready = session_of(backend).prepare(asked("crop1"))
    ids = torch.tensor([ready.prompt.ids])
    inputs = stock_inputs(backend, ids, "coarse", "crop1")
    # `generate` may write what a session never writes: the placeholder of an image
    bad = [[token] for token in backend.codec.forbidden]
    out = backend.model.generate(
        input_ids=ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=GREEDY.max_new_tokens,
        do_sample=False,
        bad_words_ids=bad,
        **inputs,
    )
    written = out[0, ids.shape[1] :].tolist()
    ends = [at for at, token in enumerate(written) if token in backend.end_ids]
    assert reply.text == backend.codec.decode(written[: ends[0]] if ends else written)


def test_a_conversation_goes_on_from_the_same_cache(backend: HFBackend) -> None:
    session, plain = session_of(backend), session_of(backend)
    look(session, ALWAYS)
    first = session.reply(asked("crop1"), settings=GREEDY)
    assert plain.reply(asked("crop1"), settings=GREEDY).text == first.text
    later = [*asked("crop1"), text("assistant", first.text), message("user", image_part("crop2"), "Answer now.")]
    second, other = session.reply(later, settings=GREEDY), plain.reply(later, settings=GREEDY)
    assert second.text == other.text
    assert torch.allclose(logits_of(session), logits_of(plain), atol=1e-4)
    assert second.cached_tokens == other.cached_tokens >= first.prompt_tokens


def test_aligned_crops_go_on_from_the_same_cache(load: Callable[[Family], HFBackend]) -> None:
    backend = load("qwen3_vl")
    session, plain = session_of(backend), session_of(backend)
    sight = look(session, ALWAYS.model_copy(update={"positions": "aligned"}))
    assert sight.aligned
    for one in (session, plain):
        one.place("crop1", source="coarse", cells=(1.0, 0.0, 3.0, 2.0))
    first, same = (one.reply(asked("crop1"), settings=GREEDY) for one in (session, plain))
    assert first.text == same.text
    later = [*asked("crop1"), text("assistant", first.text), message("user", image_part("crop2"), "Answer now.")]
    assert session.reply(later, settings=GREEDY).text == plain.reply(later, settings=GREEDY).text
    assert torch.allclose(logits_of(session), logits_of(plain), atol=1e-4)


@pytest.mark.parametrize("family", ["qwen2_5_vl", "qwen3_vl", "qwen3_5"])
def test_an_aligned_crop_gives_what_one_pass_with_those_positions_gives(
    family: Family, load: Callable[[Family], HFBackend]
) -> None:
    backend = load(family)
    session, decoder = session_of(backend), Decoder(backend.model)
    look(session, ALWAYS)
    session.place("crop1", source="coarse", cells=(1.0, 0.0, 3.0, 2.0))
    session.reply(asked("crop1"), settings=GREEDY)
    ready = session_of(backend).prepare(asked("crop1"))
    starts = [span.start for span in ready.prompt.spans]
    moved = align(
        ready.positions,
        source=starts[0],
        crop=(starts[1], starts[1] + 6),
        grid=(3, 2),
        cells=(1.0, 0.0, 3.0, 2.0),
    )
    assert not torch.equal(moved, ready.positions.float())
    with torch.inference_mode():
        features = [
            image_features(backend.model, backend.codec.pixels(pictures(backend)[view])[1])
            for view in ("coarse", "crop1")
        ]
        new = decoder.embed(torch.tensor([ready.prompt.ids]), features)
        rotary, mask = decoder.rotary(new.hidden, moved), decoder.mask(new.hidden)
        out = decoder.run(new, range(decoder.depth), rotary=rotary, mask=mask)
        logits = decoder.logits(out)[0]
    assert torch.allclose(logits, logits_of(session), atol=1e-4)


@pytest.mark.parametrize("family", ["llava", "gemma4"])
def test_families_without_two_dimensions_have_no_aligned_positions(
    family: Family, load: Callable[[Family], HFBackend]
) -> None:
    options = ALWAYS.model_copy(update={"positions": "aligned"})
    assert not look(session_of(load(family)), options).aligned


def test_a_conversation_goes_back_to_a_shorter_one(backend: HFBackend) -> None:
    """An answer that is told differently afterwards, and then another question about the image."""
    session = session_of(backend)
    look(session, ALWAYS)
    first = session.reply(asked("crop1"), settings=GREEDY)
    told = [*asked("crop1"), text("assistant", "something else"), message("user", "Answer now.")]
    for talk in (told, asked(question="407?")):
        plain = session_of(backend)
        ours, theirs = session.reply(talk, settings=GREEDY), plain.reply(talk, settings=GREEDY)
        assert ours.text == theirs.text
        assert torch.allclose(logits_of(session), logits_of(plain), atol=1e-4)
        if talk is told:
            assert abs(ours.cached_tokens - first.prompt_tokens) <= 2


def test_sampling_and_streaming_work_after_a_look(backend: HFBackend) -> None:
    settings = SamplingParams(max_new_tokens=8, temperature=1.0, seed=5)
    session, whole = session_of(backend), session_of(backend)
    look(session, ALWAYS)
    pieces: list[str] = []
    reply = session.reply(asked("crop1"), settings=settings, on_text=pieces.append)
    assert "".join(pieces) == reply.text == whole.reply(asked("crop1"), settings=settings).text


def test_a_map_has_a_cell_for_every_visual_token(backend: HFBackend) -> None:
    sight = look(session_of(backend), ALWAYS)
    rows, columns = len(sight.heat), len(sight.heat[0])
    # Gemma 4 fills its budget of 70 visual tokens
    assert (rows, columns) == {"llava": (4, 4), "gemma4": (7, 9)}.get(backend.name, (4, 5))
    assert rows * columns == sight.visual_tokens
    assert all(0 <= value <= 1 for row in sight.heat for value in row)
    for x1, y1, x2, y2 in sight.cells:
        assert 0 <= x1 < x2 <= columns
        assert 0 <= y1 < y2 <= rows


def test_every_image_of_a_question_has_its_map(backend: HFBackend) -> None:
    sights = session_of(backend).look(asked("crop1"), options=ALWAYS)
    assert [sight.view for sight in sights] == ["coarse", "crop1"]
    assert [sight.visual_tokens for sight in sights] == [sum(map(len, sight.heat)) for sight in sights]
    assert sights[0].score == sights[1].score


def test_the_gate_decides_before_a_map_is_made(backend: HFBackend) -> None:
    sight = look(session_of(backend), NEVER)
    assert (sight.heat, sight.boxes) == ([], [])
    assert "suffices" in sight.reason
    shown = look(session_of(backend), NEVER, map_always=True)
    assert shown.heat
    assert shown.boxes == []
    assert shown.token_layers > sight.token_layers


def test_the_gate_can_be_left_out_or_replaced(backend: HFBackend) -> None:
    off = look(session_of(backend), PerceptionConfig(gate="off", threshold=0.3))
    assert off.score is None
    assert off.boxes
    flat = look(session_of(backend), PerceptionConfig(gate="statistics", peak_to_mean=1e6))
    assert (flat.score, flat.boxes) == (None, [])
    keen = look(session_of(backend), PerceptionConfig(gate="statistics", peak_to_mean=1.0, peak_share=0.5))
    assert keen.boxes


def test_interleaved_and_parallel_episodes_do_not_see_each_other(backend: HFBackend) -> None:
    questions = [f"how many green triangles are there? {number}" for number in range(3)]

    def episode(question: str, *, pause: Callable[[], None] = lambda: None) -> tuple[str, torch.Tensor]:
        session = session_of(backend)
        session.look(asked(question=question), options=ALWAYS)
        pause()
        crops = ("crop1",) if int(question[-1]) % 2 else ("crop2", "crop1")
        reply = session.reply(asked(*crops, question=question), settings=GREEDY)
        return reply.text, logits_of(session)

    alone = [episode(question) for question in questions]
    nested = episode(questions[0], pause=lambda: [episode(question) for question in questions[1:]] and None)
    assert nested[0] == alone[0][0]
    with ThreadPoolExecutor(3) as pool:
        together = list(pool.map(episode, questions))
    for (words, logits), (other_words, other_logits) in zip(alone, together, strict=True):
        assert words == other_words
        assert torch.allclose(logits, other_logits, atol=1e-5)


def test_a_look_that_fails_leaves_nothing_behind(backend: HFBackend) -> None:
    session = session_of(backend)
    with pytest.raises(BackendError, match="no image in the conversation"):
        session.look([text("user", "what?")], options=ALWAYS)
    assert session.held.ids == ()

    def broken(*_: Any, **__: Any) -> None:
        raise RuntimeError("broken")

    assert backend.branches is not None
    assert backend.branches.sdrpn is not None
    handle = backend.branches.sdrpn.norm.register_forward_pre_hook(broken)
    try:
        with pytest.raises(RuntimeError, match="broken"):
            look(session, ALWAYS)
    finally:
        handle.remove()
    assert session.held.ids == ()
    assert session.reply(asked(), settings=GREEDY).text == session_of(backend).reply(asked(), settings=GREEDY).text


def test_branches_leave_the_base_as_it_was(backend: HFBackend) -> None:
    names = {name for name, _ in backend.model.named_parameters()}
    assert not any("sdrpn" in name or "gate.head" in name for name in names)
    assert adapter_for(backend.model.config).name
    cache = DynamicCache(config=backend.model.config)
    assert cache.get_seq_length() == 0


def test_an_unknown_family_names_the_known_ones(backend: HFBackend) -> None:
    class Other:
        model_type = "gemma3"

    with pytest.raises(BackendError, match=r"'gemma3'.*Qwen2\.5-VL.*LLaVA.*add an Adapter"):
        adapter_for(Other())  # type: ignore[arg-type]
