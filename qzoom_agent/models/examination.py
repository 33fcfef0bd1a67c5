"""Examination of one local model: is it the stock model, what does it show, how fast is it and what does it hold?

`qzoom doctor --model NAME` prints it. Every finding is measured on a picture drawn here, so nothing is downloaded
beyond the model.
"""

import sys
from collections.abc import Iterator
from typing import Literal, NamedTuple

import transformers
from PIL import Image, ImageDraw

from qzoom_agent.config import PerceptionConfig
from qzoom_agent.geometry import Box
from qzoom_agent.messages import Message, image_part, message, view_ids
from qzoom_agent.models.hf import HFBackend, load_backend, peak_memory
from qzoom_agent.models.interface import SamplingParams
from qzoom_agent.models.stock import StockBackend, compare, distance, stock_inputs, tolerance
from qzoom_agent.perception.adapters import TILED
from qzoom_agent.views import ViewStore
from qzoom_agent.zoom.zoom import ZoomConfig

_NEW_TOKENS = 32
Verdict = Literal["ok", "note", "bad"]


class Finding(NamedTuple):
    """One line of the examination."""

    name: str
    found: str
    verdict: Verdict = "ok"
    advice: str = ""


def examine_model(model: str, *, branches: str | None = None, device: str = "auto") -> Iterator[Finding]:
    """Load a model and yield the findings, in the order shown.

    Args:
        branches: folder or hub id of branches instead of the model's own.

    Raises:
        ConfigError, BackendError: the model cannot be loaded or run.
    """
    backend = load_backend(model, device=device, branches=branches)
    loaded = backend if isinstance(backend, HFBackend) else backend.loaded
    kind = loaded.model.config.model_type
    yield Finding("model", f"{model} ({kind}), {sum(one.numel() for one in loaded.model.parameters()) / 1e6:,.1f} M")
    yield Finding("runs on", backend.placement)
    yield equality(backend, loaded)

    store = _views(loaded)
    asked = [message("user", image_part("coarse"), "What is printed in the image?")]
    yield tokens(loaded, store, asked)
    session = backend.session(store.image)
    warm = session.reply(asked, settings=SamplingParams(max_new_tokens=1))  # kernels are chosen on first use
    session = backend.session(store.image)
    one = session.reply(asked, settings=SamplingParams(max_new_tokens=1))
    yield Finding("prefill", f"{one.prompt_tokens / one.seconds:,.0f} tokens/s, image encoded ({one.prompt_tokens})")
    session = backend.session(store.image)
    many = session.reply(asked, settings=SamplingParams(max_new_tokens=_NEW_TOKENS, temperature=1.0))
    steps = many.new_tokens - warm.new_tokens
    rate = f"{steps / max(many.seconds - one.seconds, 1e-6):,.1f} tokens/s ({steps})" if steps > 0 else "ended at once"
    yield Finding("decode", rate)

    if isinstance(backend, HFBackend) and backend.perceives:
        yield from look_and_zoom(backend, store, asked)
    else:
        yield Finding("look", "no branches (gate and SD-RPN)", "note", "Policies explicit and direct need none.")
    if loaded.model.device.type == "cuda":
        yield Finding("peak memory", f"{peak_memory() / 2**30:.2f} GiB of the accelerator")
    else:
        yield Finding("peak memory", _process_memory())


def equality(backend: HFBackend | StockBackend, loaded: HFBackend) -> Finding:
    """Compare the model with stock, whatever was found before."""
    reason = compare(loaded)
    if not reason:
        return Finding("same as stock", f"two turns equal, with transformers {transformers.__version__}")
    if isinstance(backend, StockBackend):
        advice = "Each turn is computed anew and nothing perceives; answers are the stock model's."
        return Finding("same as stock", f"through stock generate: {reason}", "note", advice)
    return Finding("same as stock", f"no: {reason}", "bad", "Its answers cannot be trusted here. Use stock generate.")


def tokens(loaded: HFBackend, store: ViewStore, asked: list[Message]) -> Finding:
    """Compare the visual tokens that are counted for a view with those in the stock processor's prompt."""
    counted = store.view("coarse").tokens
    if loaded.branches is not None and loaded.model.config.model_type in TILED:
        return Finding("visual tokens", f"{counted} counted: the base view alone, tiles are left out", "note")
    shown = {view: store.image(view) for view in view_ids(asked)}
    real = int((stock_inputs(loaded, asked, shown)["input_ids"] == loaded.codec.image_id).sum())
    text = f"{real} shown, {counted} counted"
    if real == counted:
        return Finding("visual tokens", text)
    return Finding("visual tokens", text, "bad", "Budgets and costs of this model would be wrong. Report this line.")


def look_and_zoom(backend: HFBackend, store: ViewStore, asked: list[Message]) -> Iterator[Finding]:
    """Look at the coarse view, insert a crop, and compare the logits with those of one pass over both."""
    looked, whole = backend.session(store.image), backend.session(store.image)
    (record,) = looked.look(asked, options=PerceptionConfig(), map_always=True)
    score = "no gate" if record.score is None else f"gate {record.score:.3f} of {record.threshold:.3f}"
    yield Finding("look", f"{score}, {len(record.boxes)} boxes, {record.seconds:.2f} s")
    store.add_crop(Box(300, 200, 700, 500), **ZoomConfig.of(backend.defaults).budget)
    zoomed = [message("user", image_part("coarse"), image_part("crop1"), "What is printed in the image?")]
    settings = SamplingParams(max_new_tokens=1)
    replies = [session.reply(zoomed, settings=settings) for session in (looked, whole)]
    assert looked.prompt_logits is not None
    assert whole.prompt_logits is not None
    far = distance(looked.prompt_logits, whole.prompt_logits)
    text = f"{replies[0].cached_tokens} of {replies[0].prompt_tokens} tokens kept, logits differ by {far:.2%}"
    if far <= tolerance(backend, cached=True):
        yield Finding("zoom", text)
    else:
        yield Finding("zoom", text, "bad", "A crop after a look is not what one pass gives. Use the policy explicit.")


def _views(loaded: HFBackend) -> ViewStore:
    picture = Image.new("RGB", (1000, 700), "white")
    pen = ImageDraw.Draw(picture)
    for row in range(5):
        pen.rectangle((80, 60 + 130 * row, 920, 140 + 130 * row), outline="black", width=3)
        pen.text((100, 80 + 130 * row), f"Item {row}: {407 * (row + 1)}", fill="black", font_size=36)
    store = ViewStore(count=loaded.view_tokens)
    store.add_original(picture)
    budget = loaded.defaults
    most = min(budget.coarse_max_tokens, 576)
    store.add_coarse(factor=budget.factor, min_tokens=min(budget.coarse_min_tokens, most), max_tokens=most)
    return store


def _process_memory() -> str:
    try:
        import resource
    except ImportError:  # Windows
        return "unknown on this platform"
    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    return f"{most / 2**30:.2f} GiB of this process"
