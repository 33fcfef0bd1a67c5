"""The stock model: the comparison of a loaded model with it, and replies through stock `generate` alone.

A family is not trusted by its name: run right or not at all. A conversation of two turns about two small images is run
as a session runs it (images encoded apart, the second turn behind the cache of the first; with branches, also layer by
layer), and as the stock model runs what its own processor makes of the same conversation. The prompts have to be equal,
and the logits equal up to rounding.

Families that cannot be run piece by piece answer through `generate`: every reply encodes the whole conversation anew.
There is no cache between turns and no perception; policies that need no look (`explicit`, `direct`) work as with any
model.
"""

import hashlib
import json
from collections.abc import Mapping, Sequence
from time import perf_counter
from typing import TYPE_CHECKING, Any, Final

import numpy as np
import torch
import transformers
from PIL import Image
from torch import Tensor
from transformers import GenerationConfig, LogitsProcessor, StoppingCriteria

from qzoom_agent.errors import BackendError
from qzoom_agent.messages import Message, image_part, message, text, view_ids
from qzoom_agent.models.hf_generation import Sampler, TextStream, text_logprobs
from qzoom_agent.models.interface import TOO_LONG, ImageSource, OnText, Reply, SamplingParams
from qzoom_agent.models.presets import NANO_FOLDER, SHIPPED
from qzoom_agent.models.prompts import Prompt
from qzoom_agent.perception.decoder import Decoder

if TYPE_CHECKING:
    from qzoom_agent.models.hf import HFBackend
    from qzoom_agent.models.hf_session import HFSession

_EXACT: Final = 1e-3
"""Largest distance of logits in float32, as a share of their spread."""
_ROUGH: Final = (0.02, 0.08)
"""The same in 16-bit formats, for one pass and for one behind a cache: the latter rounds otherwise, 28 random layers in
bfloat16 by up to 0.032. Attending causally to an image that the stock model sees as a whole makes 0.085."""
RECORDED: Final = NANO_FOLDER / "stock_check.json"
"""Fingerprints under which nano was found equal; a test compares anew."""
_FOUND: dict[str, str] = {}
"""Results by fingerprint: a model of the same configuration is compared once in a process."""


class StockBackend:
    """A loaded model whose sessions call stock `generate`."""

    perceives = False
    gives_logprobs = True

    def __init__(self, loaded: "HFBackend", reason: str) -> None:
        """`reason` says why the model is not run piece by piece."""
        self.loaded, self.reason = loaded, reason
        self.name, self.protocol, self.defaults = loaded.name, loaded.protocol, loaded.defaults
        self.settings, self.prompt = loaded.settings, loaded.prompt
        self.placement = f"{loaded.placement}; stock generate"
        self.view_tokens = loaded.view_tokens

    def session(self, image: ImageSource) -> "StockSession":
        return StockSession(self.loaded, image)


class StockSession:
    """A conversation with a model that is run by stock `generate`."""

    def __init__(self, loaded: "HFBackend", image: ImageSource) -> None:
        self._loaded, self._image = loaded, image
        self._shown = set[str]()
        """Views shown so far."""

    def reply(self, messages: Sequence[Message], *, settings: SamplingParams, on_text: OnText | None = None) -> Reply:
        began = perf_counter()
        loaded, views = self._loaded, view_ids(messages)
        images = {view: self._image(view) for view in views}
        new = {view: loaded.view_tokens(image) for view, image in images.items() if view not in self._shown}
        inputs = stock_inputs(loaded, messages, images)
        prompt: Tensor = inputs["input_ids"]
        model: Any = loaded.model
        generation: Any = GenerationConfig
        config = model.config.get_text_config()
        room = config.max_position_embeddings - prompt.shape[1]
        if room <= 0:
            raise BackendError(
                f"The conversation has {prompt.shape[1]} tokens; {TOO_LONG} "
                f"{config.max_position_embeddings}. Lower budget.coarse_tokens, budget.max_turns or the question."
            )
        limit = min(settings.max_new_tokens, room)
        sampler = Sampler([settings.model_copy(update={"max_new_tokens": limit})], loaded.codec.forbidden, model.device)
        stream = TextStream(loaded.codec.decode, settings.stop, on_text)
        draw, end = _Draw(sampler), _End(stream, loaded.end_ids)
        with torch.inference_mode():
            out = model.generate(
                **inputs,
                generation_config=generation(
                    max_new_tokens=limit,
                    do_sample=False,  # `_Draw` samples
                    eos_token_id=sorted(loaded.end_ids),
                    pad_token_id=min(loaded.end_ids),
                ),
                logits_processor=[draw],
                stopping_criteria=[end],
            )
        if not end.stopped:
            stream.finish()
        self._shown |= new.keys()
        written: list[int] = out[0, prompt.shape[1] :].tolist()
        said = [pair for pair in zip(written, draw.logps, strict=False) if pair[0] not in loaded.end_ids]
        return Reply(
            text=stream.text,
            finish="stop" if end.stopped else "length",
            prompt_tokens=prompt.shape[1],
            cached_tokens=0,
            new_tokens=len(written),
            visual_tokens=sum(new.values()),
            token_layers=float(prompt.shape[1] * config.num_hidden_layers),
            seconds=perf_counter() - began,
            logprobs=text_logprobs(loaded.codec.decode, said) if settings.logprobs else [],
        )

    def close(self) -> None:
        self._shown.clear()


class _Draw(LogitsProcessor):
    """Leaves one token open, chosen by our own sampler: seeded for itself, and never a placeholder of an image."""

    def __init__(self, sampler: Sampler) -> None:
        self._sampler = sampler
        self.logps: list[float] = []
        """Log-probabilities of the tokens so far."""

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        tokens, logps = self._sampler(scores)
        self.logps += logps.tolist()
        return torch.full_like(scores, -torch.inf).scatter(1, tokens[:, None], 0.0)


class _End(StoppingCriteria):
    """Ends a reply at an end-of-turn id or a stop text."""

    def __init__(self, stream: TextStream, end_ids: frozenset[int]) -> None:
        self._stream, self._end_ids = stream, end_ids
        self.stopped = False

    def __call__(self, input_ids: Tensor, scores: Any, **_: Any) -> Tensor:
        token = int(input_ids[0, -1])
        if token in self._end_ids:
            self._stream.finish()
            self.stopped = True
        else:
            self.stopped = self._stream.push(token)
        return torch.tensor([self.stopped], device=input_ids.device)


def stock_inputs(loaded: "HFBackend", messages: Sequence[Message], images: Mapping[str, Image.Image]) -> dict[str, Any]:
    """Return the stock model's inputs for a conversation, made by its processor in one call. Raises BackendError."""
    model = loaded.model
    coded = loaded.codec.whole(loaded.codec.render(messages), [images[view] for view in view_ids(messages)])
    return {
        key: value.to(model.device, model.dtype if value.is_floating_point() else value.dtype)
        for key, value in coded.items()
        if isinstance(value, Tensor)
    }


# -- comparison --------------------------------------------------------------------------------------------------------


def difference(loaded: "HFBackend") -> str:
    """Return how a session's run differs from the stock model's, for a message; empty if it does not.

    Raises BackendError for a model that cannot be run by stock code either.
    """
    key = fingerprint(loaded)
    if key not in _FOUND:
        # what ships comes with its result, so that its first answer does not wait for the comparison
        recorded = loaded.name in SHIPPED and key in json.loads(RECORDED.read_text(encoding="utf-8"))
        _FOUND[key] = "" if recorded else compare(loaded)
    return _FOUND[key]


def fingerprint(loaded: "HFBackend") -> str:
    """Return a name of everything but the weights that the comparison depends on, transformers' version included."""
    processor: Any = loaded.processor
    config = {key: value for key, value in loaded.model.config.to_dict().items() if key != "_name_or_path"}
    images = json.loads(processor.image_processor.to_json_string())
    if "do_resize" in images:  # in use it may be another than what is saved
        images["do_resize"] = processor.image_processor.do_resize
    parts = (
        transformers.__version__,
        json.dumps(config, sort_keys=True, default=str),
        type(processor).__name__,
        json.dumps(images, indent=2, sort_keys=True) + "\n",
        processor.chat_template,
        str(loaded.model.dtype),
        loaded.model.device.type,
        loaded.branches is not None,
    )
    return hashlib.sha256(repr(parts).encode()).hexdigest()


@torch.inference_mode()
def compare(loaded: "HFBackend") -> str:
    """Return what `difference` returns, computed anew."""
    images = {name: small_image(loaded, name) for name in ("first", "second")}
    first = [message("user", image_part("first"), "What is in the image?")]
    second = [*first, text("assistant", "A 7."), message("user", image_part("second"), "And here?")]
    expected = [_stock(loaded, messages, images) for messages in (first, second)]
    try:
        session = loaded.session(images.__getitem__)
        session.limit = 10**9  # what a model has room for is not the question here
        for turn, (messages, (ids, logits)) in enumerate(zip((first, second), expected, strict=True), start=1):
            ready = session.prepare(messages)
            if ready.prompt.ids != ids:
                return "its processor writes another prompt for a conversation than for its parts"
            ours, _ = session.feed(ready.prompt, ready.positions, session.keep(ready.prompt))
            session.held = ready.prompt
            if (far := distance(ours[0], logits)) > tolerance(loaded, cached=turn == 2):
                return f"in turn {turn} its logits differ by {far:.1%} of their spread"
        if loaded.branches is not None:
            return _by_layers(loaded, session, ready.prompt, ready.positions, logits)
    except torch.OutOfMemoryError:
        raise
    except BackendError:
        return "its processor writes images in a way that a session cannot"
    except (TypeError, ValueError, RuntimeError, KeyError, IndexError, AttributeError) as error:
        return f"its code fails ({type(error).__name__}: {str(error).strip().split(chr(10))[0]})"
    return ""


def _by_layers(loaded: "HFBackend", session: "HFSession", prompt: Prompt, positions: Tensor, logits: Tensor) -> str:
    """Compare the decoder driven layer by layer, as a look drives it."""
    decoder = Decoder(loaded.model)
    new = decoder.embed(torch.tensor([prompt.ids], device=loaded.model.device), session.features(prompt, 0))
    rotary, mask = decoder.rotary(new.hidden, positions), decoder.mask(new.hidden, visual=new.visual)
    ours = decoder.logits(decoder.run(new, range(decoder.depth), rotary=rotary, mask=mask))[0]
    far = distance(ours, logits)
    return f"layer by layer its logits differ by {far:.1%} of their spread" if far > tolerance(loaded) else ""


def _stock(
    loaded: "HFBackend", messages: list[Message], images: dict[str, Image.Image]
) -> tuple[tuple[int, ...], Tensor]:
    """Return the ids that the stock processor makes of a conversation, and the stock model's logits after them."""
    model: Any = loaded.model
    inner = model.base_model
    before = getattr(inner, "rope_deltas", None)
    try:
        inputs = stock_inputs(loaded, messages, images)
        logits = model(**inputs, use_cache=False).logits[0, -1]
    except (TypeError, ValueError, RuntimeError, KeyError, IndexError, AttributeError, ImportError) as error:
        if isinstance(error, torch.OutOfMemoryError):
            raise
        reason = f"{type(error).__name__}: {str(error).strip()}".splitlines()[0]
        raise BackendError(
            f"The {model.config.model_type} model '{loaded.name}' cannot be run on an image here, not even by "
            f"transformers' own code ({reason}). Serve it elsewhere and use Agent.from_server (--server), or use "
            "another model."
        ) from error
    finally:
        if hasattr(inner, "rope_deltas"):
            inner.rope_deltas = before
    return tuple(inputs["input_ids"][0].tolist()), logits


def small_image(loaded: "HFBackend", name: str) -> Image.Image:
    """Return an image of noise, 2 x 2 visual tokens (3 x 2 for the second) where the family takes any size."""
    factor = loaded.defaults.factor
    columns = 3 if name == "second" else 2
    noise = np.random.default_rng(columns).integers(0, 255, (2 * factor, columns * factor, 3), dtype=np.uint8)
    return Image.fromarray(noise)


def tolerance(loaded: "HFBackend", *, cached: bool = False) -> float:
    """Return the largest distance of logits that is rounding; `cached` if one of them came from behind a cache."""
    return _ROUGH[cached] if loaded.model.dtype in (torch.float16, torch.bfloat16) else _EXACT


def distance(ours: Tensor, stock: Tensor) -> float:
    """Return the largest difference of two rows of logits, as a share of the spread of the second."""
    one, other = ours.float(), stock.float()
    spread = float(other.max() - other.min())
    return float((one - other).abs().max()) / spread if spread else float("inf")
