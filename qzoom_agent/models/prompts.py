"""From messages to token ids and back.

A conversation is rendered by the model's own chat template, as a whole, each time: rendering costs a tenth of a
millisecond and templates may look at every message. Tokens are another matter: what the model generated must stay the
ids it generated, because its text may tokenise differently. So a session keeps its answered turns as (text, ids), and
as far as a newly rendered text begins with those texts, their ids are taken; only the remainder is tokenised. A
template that rewrites old turns (drops thoughts, trims) or a conversation that diverged simply matches less: always
right, and fast when nothing was rewritten.

Images are one placeholder token each in the template's text and as many ids as the processor says in a `Prompt`.
Placeholders written out in a message's text are broken up, so that text is never mistaken for an image.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jinja2 import TemplateError
from PIL import Image
from transformers import PretrainedConfig, ProcessorMixin

from qzoom_agent.errors import BackendError
from qzoom_agent.messages import Message, Part
from qzoom_agent.models.processing import fit

_TEXT_INPUTS = {"input_ids", "attention_mask", "token_type_ids", "mm_token_type_ids"}
_PLACEHOLDERS = ("image_token_id", "image_token_index", "video_token_id", "audio_token_id")


@dataclass(frozen=True, slots=True)
class EncodedTurn:
    """What was rendered since the turn before and the model's answer to it, as text and as ids (one per image)."""

    text: str
    ids: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class ImageSpan:
    """Where the ids of a view stand in a prompt: [start, stop)."""

    start: int
    stop: int
    view: str


@dataclass(frozen=True, slots=True)
class Prompt:
    """The ids of a conversation, images expanded."""

    ids: tuple[int, ...] = ()
    spans: tuple[ImageSpan, ...] = ()

    def shared(self, other: "Prompt") -> int:
        """How many leading ids both have: an image counts wholly or not at all, and only if it is the same view.

        The last id is never counted, so that there is always something left to compute logits from.
        """
        pairs = zip(self.ids, other.ids, strict=False)
        differs = next((at for at, (a, b) in enumerate(pairs) if a != b), min(len(self.ids), len(other.ids)))
        count = min(differs, len(self.ids) - 1)
        same = set(other.spans)
        cut = (span.start for span in self.spans if span.start < count and (span not in same or span.stop > count))
        return next(cut, count)

    def head(self, count: int) -> "Prompt":
        """The first `count` ids, and the views that lie wholly in them."""
        return Prompt(self.ids[:count], tuple(span for span in self.spans if span.stop <= count))


class PromptCodec:
    """The text side of one model: template, tokenizer, image processor. Holds no conversation; threads may share it."""

    def __init__(self, processor: ProcessorMixin, config: PretrainedConfig) -> None:
        self.processor = processor
        self.config = config
        self.tokenizer = processor.tokenizer
        values = config.to_dict()
        forbidden = {values[key] for key in _PLACEHOLDERS if isinstance(values.get(key), int)}
        self.forbidden: tuple[int, ...] = tuple(sorted(forbidden))
        """Ids that stand for pixels and may neither be written in a message nor be generated."""
        self.image_id: int = config.image_token_id
        self._image_mark: str = self.tokenizer.convert_ids_to_tokens(self.image_id)
        self._marks: list[str] = [mark for mark in self.tokenizer.convert_ids_to_tokens(list(self.forbidden)) if mark]

    def render(self, messages: Sequence[Message]) -> str:
        """The conversation as text, up to where the assistant is to write. Raises BackendError."""
        plain: list[Any] = [
            {"role": message["role"], "content": [self._part(part) for part in message["content"]]}
            for message in messages
        ]
        try:
            text: str = self.processor.apply_chat_template(plain, tokenize=False, add_generation_prompt=True)
        except (TemplateError, TypeError) as error:
            roles = ", ".join(message["role"] for message in messages)
            raise BackendError(
                f"The model's chat template refused the conversation: {error}. Its roles were: {roles}. "
                "Choose a protocol that fits this model."
            ) from error
        return text

    def _part(self, part: Part) -> dict[str, str]:
        if part["type"] == "image":
            return {"type": "image"}
        text = part["text"]
        for mark in self._marks:
            text = text.replace(mark, f"{mark[0]} {mark[1:]}")
        return {"type": "text", "text": text}

    def tokenize(self, text: str, known: Sequence[EncodedTurn]) -> tuple[list[EncodedTurn], EncodedTurn]:
        """A rendered conversation as the turns of `known` it begins with, and the remainder; one id per image."""
        turns: list[EncodedTurn] = []
        at = 0
        for turn in known:
            if not text.startswith(turn.text, at):
                break
            turns.append(turn)
            at += len(turn.text)
        return turns, EncodedTurn(text[at:], tuple(self._rest(text, at)))

    def _rest(self, text: str, at: int) -> list[int]:
        """Ids of text[at:], as they are in the whole text where a token begins there, else of it alone."""
        bos = self.tokenizer.bos_token
        special = bos is None or not text.startswith(bos)
        if at == 0:
            return list(self.tokenizer(text, add_special_tokens=special)["input_ids"])
        if self.tokenizer.is_fast:
            coded = self.tokenizer(text, add_special_tokens=special, return_offsets_mapping=True)
            starts = [start for start, _ in coded["offset_mapping"]]
            if at in starts:
                return list(coded["input_ids"][starts.index(at, 1) :])
        return list(self.tokenizer(text[at:], add_special_tokens=False)["input_ids"])

    def expand(self, ids: Sequence[int], views: Sequence[str], images: Mapping[str, Sequence[int]]) -> Prompt:
        """Put the ids of the views, in order, where the placeholders are. Raises BackendError if they do not match."""
        found = sum(token == self.image_id for token in ids)
        if found != len(views):
            raise BackendError(
                f"The model's chat template wrote {found} image places for the {len(views)} images of the "
                "conversation. It does not support images where this protocol shows them; choose another protocol."
            )
        out: list[int] = []
        spans: list[ImageSpan] = []
        left = iter(views)
        for token in ids:
            if token == self.image_id:
                view = next(left)
                spans.append(ImageSpan(len(out), len(out) + len(images[view]), view))
                out += images[view]
            else:
                out.append(token)
        return Prompt(tuple(out), tuple(spans))

    def pixels(self, image: Image.Image) -> tuple[tuple[int, ...], dict[str, torch.Tensor]]:
        """(the ids an image stands for, what the vision encoder takes). Raises BackendError for an impossible size."""
        image = fit(image, self.processor, self.config)
        coded = self.processor(images=[image], text=[self._image_mark], add_special_tokens=False, return_tensors="pt")
        return tuple(coded["input_ids"][0].tolist()), {key: coded[key] for key in coded if key not in _TEXT_INPUTS}

    def decode(self, ids: Iterable[int]) -> str:
        """Text of generated ids, special tokens written out: a protocol may read them."""
        text: str = self.tokenizer.decode(list(ids), skip_special_tokens=False, clean_up_tokenization_spaces=False)
        return text

    def cut(self, ids: Sequence[int], text: str) -> tuple[int, ...]:
        """Ids for `text`, a beginning of what `ids` say: the ids themselves but for a last token that says more."""
        kept = len(ids)
        while kept and not text.startswith(self.decode(ids[:kept])):
            kept -= 1
        rest = text[len(self.decode(ids[:kept])) :]
        tail: Any = self.tokenizer(rest, add_special_tokens=False)["input_ids"] if rest else []
        return (*ids[:kept], *tail)
