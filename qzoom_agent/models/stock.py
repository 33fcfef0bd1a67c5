"""A model that is run by stock `generate` alone: every reply encodes the whole conversation anew.

For families that cannot be run piece by piece, see `stock_check`. There is no cache between turns and no perception;
policies that need no look (`explicit`, `direct`) work as with any model.
"""

from collections.abc import Mapping, Sequence
from time import perf_counter
from typing import TYPE_CHECKING, Any

import torch
from PIL import Image
from torch import Tensor
from transformers import GenerationConfig, LogitsProcessor, StoppingCriteria

from qzoom_agent.errors import BackendError
from qzoom_agent.messages import Message, view_ids
from qzoom_agent.models.interface import TOO_LONG, ImageSource, OnText, Reply, SamplingParams
from qzoom_agent.models.sampling import Sampler, TextStream

if TYPE_CHECKING:
    from qzoom_agent.models.hf import HFBackend


class StockBackend:
    """A loaded model whose sessions call stock `generate`."""

    perceives = False

    def __init__(self, loaded: "HFBackend", reason: str) -> None:
        """`reason` says why the model is not run piece by piece."""
        self.loaded, self.reason = loaded, reason
        self.name, self.protocol, self.defaults = loaded.name, loaded.protocol, loaded.defaults
        self.settings, self.prompt = loaded.settings, loaded.prompt
        self.placement = f"{loaded.placement}; stock generate"

    def session(self, image: ImageSource) -> "StockSession":
        return StockSession(self.loaded, image)

    def view_tokens(self, image: Image.Image) -> int:
        """Return the number of visual tokens that the processor makes of a view."""
        return self.loaded.view_tokens(image)


class StockSession:
    """A conversation with a model that is run by stock `generate`."""

    def __init__(self, loaded: "HFBackend", image: ImageSource) -> None:
        self._loaded, self._image = loaded, image
        self._shown: dict[str, int] = {}
        """Visual tokens of each view shown so far."""

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
        end = _End(stream, loaded.end_ids)
        with torch.inference_mode():
            out = model.generate(
                **inputs,
                generation_config=generation(
                    max_new_tokens=limit,
                    do_sample=False,  # `_Draw` samples
                    eos_token_id=sorted(loaded.end_ids),
                    pad_token_id=min(loaded.end_ids),
                ),
                logits_processor=[_Draw(sampler)],
                stopping_criteria=[end],
            )
        if not end.stopped:
            stream.finish()
        self._shown |= new
        written = out.shape[1] - prompt.shape[1]
        return Reply(
            text=stream.text,
            finish="stop" if end.stopped else "length",
            prompt_tokens=prompt.shape[1],
            cached_tokens=0,
            new_tokens=written,
            visual_tokens=sum(new.values()),
            token_layers=float(prompt.shape[1] * config.num_hidden_layers),
            seconds=perf_counter() - began,
        )

    def close(self) -> None:
        self._shown = {}


class _Draw(LogitsProcessor):
    """Leaves one token open, chosen by our own sampler: seeded for itself, and never a placeholder of an image."""

    def __init__(self, sampler: Sampler) -> None:
        self._sampler = sampler

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        tokens, _ = self._sampler(scores)
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
    """Return the inputs of the stock model for a conversation, made by its processor in one call. Raises BackendError.

    Args:
        loaded: the model.
        messages: the conversation.
        images: pixels of its views.
    """
    model = loaded.model
    coded = loaded.codec.whole(loaded.codec.render(messages), [images[view] for view in view_ids(messages)])
    return {
        key: value.to(model.device, model.dtype if value.is_floating_point() else value.dtype)
        for key, value in coded.items()
        if isinstance(value, Tensor)
    }
