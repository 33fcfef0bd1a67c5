"""Every published family answers as stock `generate` does, or is refused in one sentence that names what is needed."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from packaging.version import Version
from PIL import Image

from qzoom_agent.agent import Agent
from qzoom_agent.errors import BackendError
from qzoom_agent.messages import Message, image_part, message, text, view_ids
from qzoom_agent.models import SamplingParams, stock
from qzoom_agent.models.hf import HFBackend, load_backend, peak_memory
from qzoom_agent.models.presets import SHIPPED
from qzoom_agent.models.prompts import PromptCodec, fit
from qzoom_agent.models.scheduler import batched
from qzoom_agent.models.stock import StockBackend
from tests.tiny_families import FAMILIES, build_family
from tests.tiny_models import SINCE, build, noise

PIECEWISE = (
    "qwen2_vl",
    "qwen2_5_vl",
    "qwen3_vl",
    "qwen3_5",
    "glm4v",
    "llava",
    "llava_next",
    "llava_onevision",
    "internvl",
    "idefics3",
    "gemma4",
    "gemma4_bidirectional",
)
"""Families whose sessions keep a cache."""
WHOLE = ("gemma3", "paligemma")
"""Families that answer through stock `generate`."""
REFUSED = {
    "smolvlm": "num2words",
    "mistral3": "torchvision",
    "pixtral": "torchvision",
    "paligemma_without_template": "has no chat template",
}
"""What the refusal of a family names, in an environment without these packages."""
HERE = Version(transformers.__version__)
REFUSED |= {name: "needs the package torchvision" for name, first in SINCE.items() if Version(first) > HERE}
DAILY = ("qwen3_5", "idefics3", "gemma4_bidirectional", "gemma3")
GREEDY = SamplingParams(max_new_tokens=6)


def pictures(loaded: HFBackend) -> dict[str, Image.Image]:
    return noise({"coarse": (3, 2), "crop1": (2, 3)}, unit=loaded.defaults.factor, seed=3)


def stock_inputs(loaded: HFBackend, messages: list[Message]) -> Any:
    """Return what the processor alone makes of a conversation."""
    processor: Any = loaded.processor
    shown = [fit(pictures(loaded)[view], processor, loaded.model.config) for view in view_ids(messages)]
    rendered = loaded.codec.render(messages)
    bos = processor.tokenizer.bos_token
    return processor(
        text=[rendered],
        images=shown,
        return_tensors="pt",
        add_special_tokens=not (bos and rendered.startswith(bos)),
    )


def generated(loaded: HFBackend, messages: list[Message]) -> str:
    """Return stock `generate`'s greedy answer."""
    inputs, model = stock_inputs(loaded, messages), loaded.model
    out: Any = model.generate(  # type: ignore[operator]
        **inputs,
        max_new_tokens=GREEDY.max_new_tokens,
        do_sample=False,
        eos_token_id=sorted(loaded.end_ids),
        suppress_tokens=list(loaded.codec.forbidden),
    )
    ids = out[0, inputs["input_ids"].shape[1] :].tolist()
    return loaded.codec.decode(ids[:-1] if ids[-1] in loaded.end_ids else ids)


def load(name: str, folder: Path) -> tuple[HFBackend | StockBackend, HFBackend]:
    """Return a family's backend, and the loaded model in it; skip a test of a family that this version refuses."""
    if name in REFUSED and name in (*PIECEWISE, *WHOLE):
        pytest.skip(f"before transformers {SINCE[name]} this family needs torchvision")
    backend = load_backend(str(build_family(name, folder)), device="cpu", dtype="float32")
    return backend, backend if isinstance(backend, HFBackend) else backend.loaded


def assert_as_generate(name: str, folder: Path) -> None:
    backend, loaded = load(name, folder)
    assert isinstance(backend, HFBackend) == (name in PIECEWISE)
    session = backend.session(pictures(loaded).__getitem__)
    asked = [message("user", image_part("coarse"), "What is the code?")]
    first = session.reply(asked, settings=GREEDY)
    assert first.text == generated(loaded, asked)
    inputs = stock_inputs(loaded, asked)
    assert first.prompt_tokens == inputs["input_ids"].shape[1]
    assert first.visual_tokens == int((inputs["input_ids"] == loaded.codec.image_id).sum())
    # another answer than the one given: part of the cache has to go
    asked += [text("assistant", "it is 407."), message("user", image_part("crop1"), "And here?")]
    second = session.reply(asked, settings=GREEDY)
    assert second.text == generated(loaded, asked)
    whole = int((stock_inputs(loaded, asked)["input_ids"] == loaded.codec.image_id).sum())
    assert first.visual_tokens + second.visual_tokens == whole
    assert (second.cached_tokens > 0) == (name in PIECEWISE)

    agent = Agent(backend, policy="direct", budget={"coarse_tokens": 32}, generation={"max_new_tokens": 2})
    answer = agent.run(Image.new("RGB", (300, 200)), "What is the code?")
    assert answer.status != "error", answer.trace.error
    assert answer.usage.visual_tokens == answer.trace.turns[0].visual_tokens > 0


@pytest.mark.parametrize("name", DAILY)
def test_a_family_answers_as_stock_generate_does(name: str, tmp_path: Path) -> None:
    assert_as_generate(name, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in (*PIECEWISE, *WHOLE) if name not in DAILY])
def test_every_family_answers_as_stock_generate_does(name: str, tmp_path: Path) -> None:
    assert_as_generate(name, tmp_path)


@pytest.mark.parametrize("name", ["qwen2_vl", "gemma4"])
def test_many_questions_to_a_family_that_is_not_batched_are_asked_one_by_one(name: str, tmp_path: Path) -> None:
    agent = Agent(load(name, tmp_path)[0], policy="direct", generation={"max_new_tokens": 2})
    pairs = [(Image.new("RGB", (60, 40)), one) for one in ("What?", "And now?")]
    alone = [agent.run(*pair).trace.turns[0].text for pair in pairs]
    assert [one.trace.turns[0].text for one in agent.batch(pairs)] == alone
    with pytest.raises(BackendError, match=r"answers one question at a time: .* set it to 1"):
        agent.batch(pairs, workers=2)


@pytest.mark.parametrize("name", REFUSED)
def test_a_family_that_cannot_be_run_is_refused_for_its_reason(name: str, tmp_path: Path) -> None:
    with pytest.raises(BackendError, match=REFUSED[name]):
        load_backend(str(build_family(name, tmp_path)), device="cpu", dtype="float32")


def test_every_tiny_family_has_its_outcome() -> None:
    assert {*FAMILIES, "qwen2_5_vl", "qwen3_vl", "llava"} == {*PIECEWISE, *WHOLE, *REFUSED}


def test_a_model_that_runs_whole_says_so_and_takes_no_branches_batches_or_training(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    backend, _ = load("gemma3", tmp_path)
    assert [line.count("stock generate") for line in caplog.messages if "stock" in line] == [1]
    assert not backend.perceives
    with pytest.raises(BackendError, match="nothing to batch"):
        batched(backend, 2)
    with pytest.raises(BackendError, match=r"cannot be run piece by piece .*Qwen-VL or LLaVA"):
        HFBackend.load(str(tmp_path), device="cpu", dtype="float32")
    assert isinstance(load_backend(str(tmp_path), check=False, device="cpu"), HFBackend)


def test_replies_of_stock_generate_stream_stop_and_are_seeded(tmp_path: Path) -> None:
    backend, loaded = load("gemma4_bidirectional", tmp_path)
    asked = [message("user", image_part("coarse"), "What is the code?")]

    def reply(**settings: Any) -> Any:
        pieces: list[str] = []
        session = backend.session(pictures(loaded).__getitem__)
        found = session.reply(asked, settings=SamplingParams(**settings, logprobs=True), on_text=pieces.append)
        assert "".join(pieces) == found.text
        assert "".join(one for one, _ in found.logprobs).startswith(found.text)
        return found

    whole = reply(max_new_tokens=12)
    assert (whole.finish, whole.new_tokens) == ("length", 12) or whole.finish == "stop"
    mark = whole.text[1:3]
    stopped = reply(max_new_tokens=12, stop=(mark,))
    assert stopped.finish == "stop"
    assert stopped.text == whole.text[: whole.text.index(mark) + 2]
    drawn = [reply(max_new_tokens=8, temperature=1.0, seed=seed).text for seed in (1, 1, 2)]
    assert drawn[0] == drawn[1] != drawn[2]
    with torch.no_grad():
        logits: Any = loaded.model(**stock_inputs(loaded, asked)).logits[0, -1]
    assert whole.logprobs[0][1] == pytest.approx(float(logits.float().log_softmax(-1).max()), abs=1e-4)


def test_a_model_that_runs_whole_tells_how_sure_it_is(tmp_path: Path) -> None:
    backend, _ = load("gemma3", tmp_path)
    agent = Agent(backend, policy="explicit", generation={"max_new_tokens": 4}, perception={"gate": "answer"})
    answer = agent.run(Image.new("RGB", (60, 40)), "What?")
    assert answer.status != "error", answer.trace.error
    assert answer.trace.turns[0].confidence is not None


def test_a_difference_of_the_logits_is_found_once_for_a_configuration(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(stock, "_FOUND", {})
    _, loaded = load("qwen2_5_vl", tmp_path)
    assert list(stock._FOUND.values()) == [""]
    compared: list[HFBackend] = []
    monkeypatch.setattr(stock, "compare", compared.append)
    assert stock.difference(loaded) == ""
    assert compared == []
    monkeypatch.undo()

    inner: Any = loaded.model.base_model
    features = inner.get_image_features

    def other(*args: Any, **named: Any) -> Any:
        found = features(*args, **named)
        return type(found)(pooler_output=tuple(-part for part in found.pooler_output))

    monkeypatch.setattr(loaded.model, "get_image_features", other)
    with torch.inference_mode():
        assert "in turn 1 its logits differ" in stock.compare(loaded)


@pytest.mark.parametrize("name", SHIPPED)
def test_what_ships_comes_with_its_result(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """If this fails after a change of nano or transformers, add the fingerprint to weights/nano/stock_check.json."""
    nano = HFBackend.load(name, device="cpu", check=False)
    assert stock.compare(nano) == ""
    monkeypatch.setattr(stock, "_FOUND", {})
    monkeypatch.setattr(stock, "compare", lambda loaded: "compared")
    recorded = json.loads(stock.RECORDED.read_text())
    if transformers.__version__ in recorded.values():
        assert stock.difference(nano) == "", stock.fingerprint(nano)
    else:
        assert stock.difference(nano) == "compared"


def test_views_of_one_size_are_counted_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    backend, prepared = HFBackend.load(str(build("llava", tmp_path)), check=False), []
    pixels = PromptCodec.pixels
    monkeypatch.setattr(PromptCodec, "pixels", lambda self, image: prepared.append(image.size) or pixels(self, image))
    for level in (0, 90, 255):
        for size in ((84, 56), (57, 91)):
            count = backend.view_tokens(Image.new("L", size, level).convert("RGB"))
            assert count == 16
    assert prepared == [(84, 56), (57, 91)]


def test_peak_memory_is_that_of_the_device_in_use(monkeypatch: pytest.MonkeyPatch) -> None:
    held = [0, 5 * 2**30, 2**20]  # a process of several computes on a device of its own
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: len(held))
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda device=0: held[device])
    assert peak_memory() == held[1]
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert peak_memory() == 0
