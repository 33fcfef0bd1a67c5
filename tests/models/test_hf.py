"""Sessions on local weights say what the stock model says on the whole conversation, and compute only what is new."""

import json
import re
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, GenerationConfig

from qzoom_agent.agent import Agent
from qzoom_agent.errors import BackendError, ConfigError
from qzoom_agent.messages import Message, image_part, message, text, view_ids
from qzoom_agent.models import SamplingParams
from qzoom_agent.models.hf import HFBackend, choose
from qzoom_agent.models.hf_generation import Sampler, TextStream
from qzoom_agent.models.hf_session import HFSession
from qzoom_agent.models.presets import NANO_BUDGET, NANO_FOLDER, PRESETS, Preset
from qzoom_agent.models.prompts import ImageSpan, Prompt, fit, image_only, load_processor, visual_factor
from tests.cases import each_case
from tests.tiny_models import QWEN_TEMPLATE, Family, build, noise

GREEDY = SamplingParams(max_new_tokens=12)
FAMILIES: tuple[Family, ...] = ("qwen2_5_vl", "qwen3_vl", "llava")


@pytest.fixture(scope="module")
def load(tmp_path_factory: pytest.TempPathFactory) -> Callable[[Family], HFBackend]:
    def get(family: Family) -> HFBackend:
        folder = build(family, tmp_path_factory.mktemp(family))
        return HFBackend.load(str(folder), device="cpu", dtype="float32")

    return cache(get)


@pytest.fixture(scope="module")
def qwen(load: Callable[[Family], HFBackend]) -> HFBackend:
    return load("qwen2_5_vl")


def views(backend: HFBackend) -> dict[str, Image.Image]:
    """A coarse view and crops, of other shapes where the family can tell; crop2 and crop3 cost the same tokens."""
    if backend.protocol == "plain":
        cells = {"coarse": (4, 4), "crop1": (4, 4), "crop2": (4, 4), "crop3": (4, 4)}
    else:
        cells = {"coarse": (4, 3), "crop1": (2, 2), "crop2": (3, 2), "crop3": (3, 2)}
    return noise(cells, unit=backend.defaults.factor)


def session_of(backend: HFBackend) -> HFSession:
    return backend.session(views(backend).__getitem__)


def stock_logits(backend: HFBackend, ids: tuple[int, ...], shown: list[str]) -> torch.Tensor:
    """Logits (ids, vocabulary) of the stock model run once, without a cache, on the whole conversation."""
    images = [views(backend)[view] for view in shown]
    inputs = {"input_ids": torch.tensor([ids]), "attention_mask": torch.ones(1, len(ids), dtype=torch.long)}
    if images:
        inputs |= dict(backend.processor.image_processor(images=images, return_tensors="pt"))
    if backend.protocol != "plain":
        inputs["mm_token_type_ids"] = (inputs["input_ids"] == backend.model.config.image_token_id).int()
    with torch.no_grad():
        logits: torch.Tensor = backend.model(**inputs, use_cache=False).logits[0]
    return logits


def assert_as_stock(backend: HFBackend, session: HFSession, shown: list[str], prompt_tokens: int) -> None:
    """The ids generated are the stock model's greedy ones, and the logits after the prompt are its logits."""
    assert session.prompt_logits is not None
    reference = stock_logits(backend, session.held.ids, shown)
    torch.testing.assert_close(session.prompt_logits, reference[prompt_tokens - 1], atol=1e-4, rtol=0)
    said = session.held.ids[prompt_tokens:]
    assert said
    placeholders = [backend.model.config.image_token_id]
    placeholders += [backend.model.config.video_token_id] if backend.protocol != "plain" else []
    reference[:, placeholders] = -torch.inf
    assert tuple(reference[prompt_tokens - 1 : -1].argmax(-1).tolist()) == said


@pytest.mark.parametrize("family", FAMILIES)
def test_three_turns_with_new_images_are_as_the_stock_model_says(
    load: Callable[[Family], HFBackend], family: Family
) -> None:
    backend = load(family)
    session = session_of(backend)
    asked = [message("user", image_part("coarse"), "What is the code?")]
    first = session.reply(asked, settings=GREEDY)
    assert_as_stock(backend, session, ["coarse"], first.prompt_tokens)
    assert first.cached_tokens == 0
    assert first.visual_tokens == (16 if family == "llava" else 12)

    asked += [text("assistant", first.text), message("user", image_part("crop1"))]
    second = session.reply(asked, settings=GREEDY)
    assert_as_stock(backend, session, ["coarse", "crop1"], second.prompt_tokens)
    assert second.cached_tokens >= first.prompt_tokens
    assert second.visual_tokens == (16 if family == "llava" else 4)

    asked += [text("assistant", second.text), message("user", "And here:", image_part("crop2"), image_part("crop3"))]
    third = session.reply(asked, settings=GREEDY)
    assert_as_stock(backend, session, ["coarse", "crop1", "crop2", "crop3"], third.prompt_tokens)
    assert third.cached_tokens >= second.prompt_tokens
    if family != "llava":  # its template writes a space before an old answer that is not there when it is generated
        assert third.cached_tokens == second.prompt_tokens + second.new_tokens - 1


@pytest.mark.parametrize("family", FAMILIES)
def test_a_first_prompt_is_what_the_stock_processor_makes_of_it(
    load: Callable[[Family], HFBackend], family: Family
) -> None:
    backend = load(family)
    asked = [
        message("user", image_part("coarse"), "How many?", image_part("crop1")),
        text("assistant", "Two."),
        text("user", "Sure?"),
    ]
    session = session_of(backend)
    reply = session.reply(asked, settings=GREEDY)
    rendered = backend.processor.apply_chat_template(
        [{"role": m["role"], "content": list(m["content"])} for m in asked], add_generation_prompt=True
    )
    pictures = [views(backend)[view] for view in ("coarse", "crop1")]
    expected = backend.processor(text=[rendered], images=pictures, return_tensors="pt")
    assert session.held.ids[: reply.prompt_tokens] == tuple(expected["input_ids"][0].tolist())
    with torch.no_grad():
        generated = backend.model.generate(**expected, do_sample=False, max_new_tokens=GREEDY.max_new_tokens)
    said = generated[0, reply.prompt_tokens :].tolist()
    assert backend.processor.tokenizer.decode([t for t in said if t not in backend.end_ids]) == reply.text


@pytest.mark.parametrize("family", FAMILIES)
def test_a_diverged_conversation_keeps_what_is_shared(load: Callable[[Family], HFBackend], family: Family) -> None:
    backend = load(family)
    session = session_of(backend)
    asked = [message("user", image_part("coarse"), "What is the code?")]
    first = session.reply(asked, settings=GREEDY)
    went: list[Message] = [*asked, text("assistant", first.text), message("user", image_part("crop2"))]
    session.reply(went, settings=GREEDY)

    other = [*asked, text("assistant", "<zoom>7</zoom>"), message("user", image_part("crop3"), "Answer now.")]
    reply = session.reply(other, settings=GREEDY)
    assert_as_stock(backend, session, ["coarse", "crop3"], reply.prompt_tokens)
    assert reply.cached_tokens >= first.prompt_tokens - 1

    fresh = session_of(backend).reply(other, settings=GREEDY)
    assert (fresh.text, fresh.prompt_tokens) == (reply.text, reply.prompt_tokens)

    back = session.reply(went, settings=GREEDY)
    assert back.visual_tokens == 0, "crop2 was encoded before"
    assert_as_stock(backend, session, ["coarse", "crop2"], back.prompt_tokens)


def test_another_image_of_the_same_size_is_not_taken_for_the_cached_one(qwen: HFBackend) -> None:
    session = session_of(qwen)
    for view in ("crop2", "crop3"):
        reply = session.reply([message("user", image_part(view), "What?")], settings=GREEDY)
        assert reply.cached_tokens < 6, "only what stands before the image"
        assert_as_stock(qwen, session, [view], reply.prompt_tokens)


def test_asking_the_same_again_computes_one_token(qwen: HFBackend) -> None:
    session = session_of(qwen)
    asked = [message("user", image_part("coarse"), "What?")]
    first = session.reply(asked, settings=GREEDY)
    again = session.reply(asked, settings=GREEDY)
    assert again.text == first.text
    assert again.cached_tokens == first.prompt_tokens - 1


def test_log_probabilities_are_those_of_the_model(qwen: HFBackend) -> None:
    session = session_of(qwen)
    asked = [message("user", image_part("coarse"), "What?")]
    reply = session.reply(asked, settings=GREEDY.model_copy(update={"logprobs": True}))
    assert 0 < len(reply.logprobs) <= reply.new_tokens
    assert session.prompt_logits is not None
    known = torch.log_softmax(session.prompt_logits.float(), dim=-1).tolist()
    assert min(abs(reply.logprobs[0][1] - one) for one in known) < 1e-4
    assert "".join(one for one, _ in reply.logprobs) == reply.text
    assert session.reply(asked, settings=GREEDY).logprobs == []


def test_a_template_that_rewrites_old_answers_is_followed(tmp_path: Path) -> None:
    cut_thought = "{{ part.text.split('=')[-1] if message.role == 'assistant' else part.text }}"
    template = QWEN_TEMPLATE.replace("{{ part.text }}", cut_thought)
    backend = HFBackend.load(str(build("qwen2_5_vl", tmp_path, template=template)), device="cpu")
    session = session_of(backend)
    asked = [message("user", image_part("coarse"), "What?")]
    first = session.reply(asked, settings=GREEDY)
    asked += [text("assistant", f"thought={first.text}"), message("user", image_part("crop1"))]
    second = session.reply(asked, settings=GREEDY)
    assert_as_stock(backend, session, ["coarse", "crop1"], second.prompt_tokens)
    asked[1] = text("assistant", "thought=seven")
    third = session.reply(asked, settings=GREEDY)
    assert third.visual_tokens == 0
    assert_as_stock(backend, session, ["coarse", "crop1"], third.prompt_tokens)
    assert "thought" not in backend.processor.tokenizer.decode(session.held.ids)


def test_a_cache_with_a_window_keeps_what_is_shared(tmp_path: Path) -> None:
    sliding = {"use_sliding_window": True, "sliding_window": 24, "max_window_layers": 1}
    backend = HFBackend.load(str(build("qwen2_5_vl", tmp_path, **sliding)), device="cpu")
    session = session_of(backend)
    asked = [message("user", image_part("coarse"), "What is the code on the red circle?")]
    session.reply(asked, settings=GREEDY)
    other = [message("user", image_part("coarse"), "What is the code on the green triangle?")]
    reply = session.reply(other, settings=GREEDY)
    assert 0 < reply.cached_tokens < reply.prompt_tokens
    assert_as_stock(backend, session, ["coarse"], reply.prompt_tokens)


def test_sampling_depends_on_its_seed_alone(qwen: HFBackend) -> None:
    asked = [message("user", image_part("coarse"), "What?")]

    def say(**settings: float) -> str:
        return session_of(qwen).reply(asked, settings=SamplingParams(max_new_tokens=12, **settings)).text

    before = torch.random.get_rng_state()
    texts = [say(temperature=1.0, seed=seed) for seed in (1, 1, 2)]
    assert texts[0] == texts[1] != texts[2]
    assert torch.equal(torch.random.get_rng_state(), before)
    assert say(temperature=1.0, top_p=1e-6) == say()
    assert say(temperature=1e-4) == say()


def test_a_placeholder_is_never_generated(qwen: HFBackend) -> None:
    for temperature in (0.0, 1.0):
        sampler = Sampler([SamplingParams(temperature=temperature)], [2], torch.device("cpu"))
        assert int(sampler(torch.tensor([[0.0, 0.0, 99.0]]))[0]) != 2
    assert {qwen.model.config.image_token_id, qwen.model.config.video_token_id} == set(qwen.codec.forbidden)


@pytest.mark.parametrize("family", FAMILIES)
def test_placeholders_in_a_text_are_not_images(load: Callable[[Family], HFBackend], family: Family) -> None:
    backend = load(family)
    mark = backend.processor.image_token
    session = session_of(backend)
    asked = [
        message("user", image_part("coarse"), f"What does {mark} mean?"),
        text("assistant", mark),
        text("user", "Yes"),
    ]
    reply = session.reply(asked, settings=GREEDY)
    assert_as_stock(backend, session, ["coarse"], reply.prompt_tokens)


def test_a_stop_string_ends_the_reply_and_the_next_turn_goes_on_from_it(qwen: HFBackend) -> None:
    asked = [message("user", image_part("coarse"), "What?")]
    whole = session_of(qwen).reply(asked, settings=GREEDY)
    mark = whole.text[4:6]
    session = session_of(qwen)
    pieces: list[str] = []
    reply = session.reply(asked, settings=GREEDY.model_copy(update={"stop": ("never", mark)}), on_text=pieces.append)
    assert reply.text == whole.text[: whole.text.index(mark) + 2] == "".join(pieces)
    assert reply.finish == "stop"
    assert reply.new_tokens < whole.new_tokens

    asked += [text("assistant", reply.text), text("user", "Go on.")]
    second = session.reply(asked, settings=GREEDY)
    assert second.cached_tokens == reply.prompt_tokens + reply.new_tokens - 1
    assert_as_stock(qwen, session, ["coarse"], second.prompt_tokens)


def test_a_token_that_reaches_over_a_stop_string_is_cut(qwen: HFBackend) -> None:
    tokenizer = qwen.processor.tokenizer
    ids = tokenizer("it is 407.</zoom> and")["input_ids"]
    for end in ("it is 4", "it is 407.</z", "it is 407.</zoom> and"):
        assert tokenizer.decode(qwen.codec.cut(ids, end)) == end
    assert qwen.codec.cut(ids, "it is 407.</zoom> and") == tuple(ids)


def test_characters_are_streamed_whole(qwen: HFBackend) -> None:
    said = "a é € 😀 end"
    ids = qwen.processor.tokenizer(said)["input_ids"]
    assert len(ids) > len(said), "the tokenizer knows none of the long characters"
    pieces: list[str] = []
    stream = TextStream(qwen.codec.decode, (), pieces.append)
    for token in ids:
        stream.push(token)
    stream.finish()
    assert "".join(pieces) == said == stream.text
    assert not any("\ufffd" in piece for piece in pieces)


@given(said=st.text("ab< >é😀", max_size=30), marks=st.lists(st.text("ab<é", min_size=1, max_size=3), max_size=2))
@settings(max_examples=30, deadline=None)
def test_streaming_ends_with_the_first_stop_string(qwen: HFBackend, said: str, marks: list[str]) -> None:
    pieces: list[str] = []
    stream = TextStream(qwen.codec.decode, tuple(marks), pieces.append)
    stopped = any(stream.push(token) for token in qwen.processor.tokenizer(said)["input_ids"])
    stream.finish()
    ends = [said.index(mark) + len(mark) for mark in marks if mark in said]
    assert stream.text == said[: min(ends, default=len(said))] == "".join(pieces)
    assert stopped == bool(ends)


def test_half_a_character_at_the_end_is_not_lost(qwen: HFBackend) -> None:
    ids = qwen.processor.tokenizer("x€")["input_ids"][:-1]
    pieces: list[str] = []
    stream = TextStream(qwen.codec.decode, (), pieces.append)
    for token in ids:
        stream.push(token)
    assert pieces == ["x"]
    stream.finish()
    assert "".join(pieces) == stream.text == qwen.processor.tokenizer.decode(ids)


def test_sessions_in_threads_do_not_see_each_other(load: Callable[[Family], HFBackend]) -> None:
    for family in FAMILIES:
        backend = load(family)

        def converse(number: int, backend: HFBackend = backend) -> list[str]:
            session = session_of(backend)
            settings = SamplingParams(max_new_tokens=6, temperature=0.8 * (number % 2), seed=number)
            asked = [message("user", image_part(("coarse", "crop1")[number % 2]), f"Question {number}?")]
            said = []
            for view in ("crop2", "crop3"):
                reply = session.reply(asked, settings=settings)
                said.append(reply.text)
                asked += [text("assistant", reply.text), message("user", image_part(view))]
            return said

        alone = [converse(number) for number in range(3)]
        with ThreadPoolExecutor(3) as pool:
            assert list(pool.map(converse, range(3))) == alone


def test_the_models_own_shortcuts_are_left_alone(qwen: HFBackend) -> None:
    qwen.model.model.rope_deltas = None
    session_of(qwen).reply([message("user", image_part("coarse"), "What?")], settings=GREEDY)
    assert qwen.model.model.rope_deltas is None


def test_an_interrupted_session_starts_afresh(qwen: HFBackend) -> None:
    session = session_of(qwen)
    asked = [message("user", image_part("coarse"), "What?")]

    def leave(piece: str) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        session.reply(asked, settings=GREEDY, on_text=leave)
    assert session.held == Prompt()
    reply = session.reply(asked, settings=GREEDY)
    assert_as_stock(qwen, session, ["coarse"], reply.prompt_tokens)


def test_running_out_of_memory_is_explained(qwen: HFBackend, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object, **__: object) -> None:
        raise torch.OutOfMemoryError("no memory")

    session = session_of(qwen)
    monkeypatch.setattr(qwen.model.model, "get_image_features", full)
    with pytest.raises(BackendError, match=r"out of memory .* Lower budget.coarse_tokens"):
        session.reply([message("user", image_part("coarse"))], settings=GREEDY)
    monkeypatch.setattr("qzoom_agent.models.hf.AutoConfig.from_pretrained", full)
    with pytest.raises(BackendError, match=r"'qwen2.5-vl-7b' does not fit .* needs about 19 GB"):
        HFBackend.load("qwen2.5-vl-7b", device="cpu")


def test_shared_prefixes_end_before_a_changed_image_and_before_the_last_id() -> None:
    held = Prompt((1, 9, 9, 9, 2, 3), (ImageSpan(1, 4, "a"),))
    assert Prompt((1, 9, 9, 9, 2, 3, 4), (ImageSpan(1, 4, "a"),)).shared(held) == 6
    assert Prompt((1, 9, 9, 9, 2, 3), (ImageSpan(1, 4, "a"),)).shared(held) == 5
    assert Prompt((1, 9, 9, 9, 2, 3, 4), (ImageSpan(1, 4, "b"),)).shared(held) == 1
    assert Prompt((1, 9, 9, 2, 3), (ImageSpan(1, 3, "c"),)).shared(held) == 1
    assert Prompt((1, 9, 9, 9), (ImageSpan(1, 4, "a"),)).shared(held) == 1
    assert Prompt((1, 5), ()).shared(held) == 1
    assert held.head(3) == Prompt((1, 9, 9))


def test_a_reply_may_not_outgrow_the_model(tmp_path: Path) -> None:
    backend = HFBackend.load(str(build("qwen2_5_vl", tmp_path, max_position_embeddings=40)), device="cpu")
    session = session_of(backend)
    asked = [message("user", image_part("coarse"), "What?")]
    reply = session.reply(asked, settings=SamplingParams(max_new_tokens=500))
    assert reply.finish == "length"
    assert reply.new_tokens < 40
    with pytest.raises(BackendError, match=r"reaches position \d+; the model was built for 40\. Ask a shorter"):
        session.reply([message("user", image_part("coarse"), "What is the code? " * 9)], settings=GREEDY)
    with pytest.raises(BackendError, match=r"of them visual.*built for 40\. Lower budget\.coarse_tokens"):
        session.reply([message("user", *[image_part("coarse")] * 12)], settings=GREEDY)


def test_a_view_of_an_impossible_size_is_refused(qwen: HFBackend) -> None:
    session = qwen.session(lambda view: Image.new("RGB", (100, 84)))
    with pytest.raises(BackendError, match=r"100 x 84 px .* multiples of 28 px"):
        session.reply([message("user", image_part("coarse"))], settings=GREEDY)


def test_a_shown_view_reaches_the_encoder_as_it_is(qwen: HFBackend) -> None:
    for size in ((28, 28), (28, 2800), (1400, 1400)):  # far under and over the stock processor's own limits
        ids, inputs = qwen.codec.pixels(Image.new("RGB", size))
        assert inputs["image_grid_thw"].tolist() == [[1, size[1] // 14, size[0] // 14]]
        assert len(ids) == (size[0] // 28) * (size[1] // 28)


def test_llava_sees_the_sides_of_a_wide_view(load: Callable[[Family], HFBackend]) -> None:
    backend = load("llava")
    wide = Image.new("RGB", (112, 28), "red")
    seen = fit(wide, backend.processor, backend.model.config)
    assert seen.size == (112, 112)
    assert seen.getpixel((0, 56)) == seen.getpixel((111, 56)) == (255, 0, 0)
    assert seen.getpixel((56, 2)) == (123, 117, 104), "the mean colour its encoder was normalised with"


def test_the_image_only_processor_is_saved_under_the_stock_name(qwen: HFBackend, tmp_path: Path) -> None:
    qwen.processor.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "processor_config.json").read_text())["processor_class"] == "Qwen2_5_VLProcessor"
    again = type(qwen.processor).from_pretrained(tmp_path)
    assert again.chat_template == qwen.processor.chat_template
    assert image_only(type(qwen.processor)).get_attributes() == ["image_processor", "tokenizer"]


def test_a_processor_class_that_is_gone_is_that_of_the_family(qwen: HFBackend, tmp_path: Path) -> None:
    qwen.processor.save_pretrained(tmp_path)
    qwen.model.config.save_pretrained(tmp_path)
    for file in tmp_path.glob("*processor_config.json"):
        file.write_text(re.sub(r'("image_processor_type": ")\w+', r"\1Qwen2_5_VLImageProcessor", file.read_text()))
    loaded = load_processor(str(tmp_path), qwen.model.config)
    assert type(loaded.image_processor).__name__ == type(qwen.processor.image_processor).__name__
    assert loaded.image_processor.merge_size == qwen.processor.image_processor.merge_size


def test_a_protocol_and_budgets_are_found_for_a_folder(load: Callable[[Family], HFBackend], tmp_path: Path) -> None:
    assert [load(family).protocol for family in FAMILIES] == ["deepeyes", "qwen3vl", "plain"]
    assert load("llava").defaults.coarse_max_tokens == 576
    folder = build("qwen2_5_vl", tmp_path)
    tokenizer = load("qwen2_5_vl").processor.tokenizer.from_pretrained(folder)
    tokenizer.add_tokens(["<zoom>"])
    tokenizer.save_pretrained(folder)
    trained = HFBackend.load(str(folder), device="cpu")
    assert (trained.protocol, trained.defaults) == ("nano", NANO_BUDGET)
    assert HFBackend.load(str(folder), device="cpu", protocol="plain").protocol == "plain"


def test_the_weights_say_how_large_a_token_is(load: Callable[[Family], HFBackend]) -> None:
    assert [load(family).defaults.factor for family in FAMILIES] == [28, 32, 14]
    qwen3 = load("qwen3_vl")
    wrong = HFBackend(qwen3.model, qwen3.processor, name="x", protocol="deepeyes", defaults=NANO_BUDGET)
    assert wrong.defaults == NANO_BUDGET.model_copy(update={"factor": 32})


@each_case("preset", PRESETS.values())
def test_a_preset_knows_how_large_a_token_of_its_family_is(preset: Preset) -> None:
    begins = {
        "nano": "qwen2_5_vl",
        "llava": "llava",
        "gemma": "gemma4",
        "qwen3.5": "qwen3_5",
        "q-zoom-qwen3": "qwen3_vl",
    }
    begins |= {"qwen3-vl": "qwen3_vl", "zwz-4": "qwen3_vl", "zwz-8": "qwen3_vl"}
    family = next((kind for start, kind in begins.items() if preset.name.startswith(start)), "qwen2_5_vl")
    assert preset.budget is not None
    parts = {"vision_config": {}} if family == "gemma4" else {}
    assert preset.budget.factor == visual_factor(AutoConfig.for_model(family, **parts))


def test_a_checkpoints_own_sampling_counts_where_the_preset_is_silent(qwen: HFBackend) -> None:
    def settings(stated: dict[str, object], preset: dict[str, object]) -> dict[str, object]:
        before, qwen.model.generation_config = qwen.model.generation_config, GenerationConfig(**stated)
        try:
            return HFBackend(qwen.model, qwen.processor, name="x", settings=preset).settings
        finally:
            qwen.model.generation_config = before

    sampled = {"do_sample": True, "temperature": 0.7, "top_p": 0.8, "top_k": 20}
    found = {f"generation.{key}": sampled[key] for key in ("temperature", "top_p", "top_k")}
    assert settings(sampled, {}) == found
    assert settings(sampled, {"generation.temperature": 0.0}) == found | {"generation.temperature": 0.0}
    assert settings({"do_sample": True, "temperature": 1e-6}, {}) == {}, "greedy, as some configs write it"
    assert settings({"temperature": 0.7, "max_new_tokens": 99}, {}) == {"generation.max_new_tokens": 99}


def test_a_model_that_is_only_guessed_says_so_once(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    folder = build("qwen2_5_vl", tmp_path / "tiny")
    assert HFBackend.load(str(folder), device="cpu").protocol == "deepeyes"
    said = [one.message for one in caplog.records if one.levelname == "WARNING"]
    assert len(said) == 1 and "only the family is known of it" in said[0]
    caplog.clear()
    (folder / "qzoom_prompt.yaml").write_text("final: Stop.\n")
    backend = HFBackend.load(str(folder), device="cpu", protocol="plain")
    assert not caplog.records
    assert backend.prompt is not None and Agent(backend).protocol.final()[0]["content"][0]["text"] == "Stop."


def test_device_and_dtype_say_why() -> None:
    where, number, line = choose("cpu", "auto")
    assert (where.type, number, line) == ("cpu", torch.float32, "cpu, float32: device as asked")
    assert choose("cpu", "bfloat16")[1:] == (torch.bfloat16, "cpu, bfloat16: device as asked; dtype as asked")
    if not torch.accelerator.is_available():
        assert choose("auto", "auto")[2] == "cpu, float32: no accelerator found"
        with pytest.raises(ConfigError, match=r"'cuda' was not found: .* Use device='auto'"):
            choose("cuda", "auto")
    with pytest.raises(ConfigError, match="Unknown device 'gpu'"):
        choose("gpu", "auto")
    with pytest.raises(ConfigError, match="Unknown dtype 'fp8'"):
        choose("cpu", "fp8")


def test_weights_that_are_not_there_are_explained(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(BackendError, match=r"Could not load the model .*save_pretrained"):
        HFBackend.load(str(tmp_path))

    folder = build("qwen2_5_vl", tmp_path / "partial")
    weights = load_file(folder / "model.safetensors")
    name, _ = weights.popitem()
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(BackendError, match=f"lacks 1 of the weights that its config names, .*{name.split('.')[-1]}"):
        HFBackend.load(str(folder))
    (folder / "model.safetensors").write_bytes(b"broken")
    with pytest.raises(BackendError, match="Could not load the model"):
        HFBackend.load(str(folder))
    (folder / "chat_template.jinja").unlink()
    with pytest.raises(BackendError, match="has no chat template"):
        HFBackend.load(str(folder))

    def offline(source: str, **_: object) -> None:
        raise OSError(f"We couldn't connect to the hub to load {source}.\nmore")

    monkeypatch.setattr("qzoom_agent.models.hf.AutoConfig.from_pretrained", offline)
    with pytest.raises(BackendError, match=r"couldn't connect .* `hf download Qwen/Qwen3-VL-4B-Instruct`"):
        HFBackend.load("qwen3-vl-4b")
    with pytest.raises(BackendError, match=f"from {NANO_FOLDER}: .* install qzoom-agent again"):
        HFBackend.load("nano")


@pytest.mark.parametrize("file", ["config.json", "tokenizer_config.json", "preprocessor_config.json"])
def test_code_in_a_folder_is_never_run_nor_asked_about(
    tmp_path: Path, file: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    folder = build("qwen2_5_vl", tmp_path)
    (folder / "own.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')")
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("asked on the terminal"))
    settings = json.loads((folder / file).read_text())
    names = ("AutoConfig", "AutoModelForImageTextToText", "AutoTokenizer", "AutoImageProcessor", "AutoProcessor")
    own = dict.fromkeys(names, "own.Own") | {"AutoTokenizer": ["own.Own", None]}
    (folder / file).write_text(json.dumps({**settings, "auto_map": own}))
    HFBackend.load(str(folder), device="cpu")
    assert ("is not run" in caplog.text) == (file == "config.json")
    (folder / "config.json").write_text(json.dumps({"model_type": "own", "auto_map": own}))
    with pytest.raises(BackendError, match=r"never run \(trust_remote_code=False\)"):
        HFBackend.load(str(folder), device="cpu")
    assert not (tmp_path / "ran").exists()


def test_damaged_weights_are_an_error_of_the_model(tmp_path: Path) -> None:
    folder = build("qwen2_5_vl", tmp_path)
    weights = load_file(folder / "model.safetensors")
    for value in weights.values():
        value.fill_(torch.nan)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    damaged = HFBackend.load(str(folder), device="cpu", dtype="float32")
    with pytest.raises(BackendError, match=r"not finite.*download"):
        session_of(damaged).reply([message("user", image_part("coarse"), "What?")], settings=GREEDY)
    answer = Agent(damaged, policy="direct").run(Image.new("RGB", (64, 64)), "What?")
    assert answer.status == "error" and "not finite" in str(answer.trace.error)


def test_a_text_model_is_refused(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama", "architectures": ["LlamaForCausalLM"]}))
    with pytest.raises(BackendError, match=r"llama model, .* Use an image-text-to-text model"):
        HFBackend.load(str(tmp_path))


def test_views_named_in_messages_are_asked_for_once(qwen: HFBackend) -> None:
    asked_for: list[str] = []
    pictures = views(qwen)

    def image(view: str) -> Image.Image:
        asked_for.append(view)
        return pictures[view]

    session = qwen.session(image)
    asked = [message("user", image_part("coarse"), image_part("crop1"), "What?")]
    reply = session.reply(asked, settings=GREEDY)
    asked += [text("assistant", reply.text), message("user", image_part("coarse"), "Again?")]
    second = session.reply(asked, settings=GREEDY)
    assert asked_for == ["coarse", "crop1"]
    assert second.visual_tokens == 0
    assert_as_stock(qwen, session, view_ids(asked), second.prompt_tokens)
