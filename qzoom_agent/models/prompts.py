"""From messages to token ids and back, with the model's own processor.

The chat template renders the whole conversation each time. Generated ids must stay as generated, because their text may
tokenise differently: a session keeps answered turns as (text, ids), takes their ids as far as a newly rendered text
begins with those texts, and tokenises only the remainder. A template that rewrites old turns, or a conversation that
diverged, matches less; the result is right in every case.

An image is one placeholder token in the template's text, and as many ids as the processor gives it in a `Prompt`.
Placeholders in a message's text are broken up, so that text is never mistaken for an image, and the special tokens that
begin and end turns in what is not the model's own, so that a question or a tool's text is never mistaken for turns.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, cast

import torch
import transformers
from jinja2 import TemplateError
from PIL import Image, ImageOps
from transformers import PretrainedConfig, ProcessorMixin
from transformers.models.auto.processing_auto import PROCESSOR_MAPPING
from transformers.utils.import_utils import is_torchvision_available

from qzoom_agent.errors import BackendError, describe_error
from qzoom_agent.messages import Message, Part

_TEXT_INPUTS = {"input_ids", "attention_mask", "token_type_ids", "mm_token_type_ids"}
_PLACEHOLDERS = ("image_token_id", "image_token_index", "video_token_id", "audio_token_id")
_FOREIGN = ("user", "tool")
"""Roles of texts that may come from anybody."""


@dataclass(frozen=True, slots=True)
class EncodedTurn:
    """The text rendered since the previous turn and the model's answer to it, with its ids (one per image)."""

    text: str
    ids: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class ImageSpan:
    """The ids [start, stop) of a view in a prompt."""

    start: int
    stop: int
    view: str


@dataclass(frozen=True, slots=True)
class Prompt:
    """The ids of a conversation, images expanded."""

    ids: tuple[int, ...] = ()
    spans: tuple[ImageSpan, ...] = ()

    def shared(self, other: "Prompt") -> int:
        """Return the number of leading ids that both have: an image counts as a whole, and only if it is the same view.

        The last id is never counted, so that one is left to compute logits from.
        """
        pairs = zip(self.ids, other.ids, strict=False)
        differs = next((at for at, (a, b) in enumerate(pairs) if a != b), min(len(self.ids), len(other.ids)))
        count = min(differs, len(self.ids) - 1)
        same = set(other.spans)
        cut = (span.start for span in self.spans if span.start < count and (span not in same or span.stop > count))
        return next(cut, count)

    def head(self, count: int) -> "Prompt":
        """Return the first `count` ids, and the views that lie wholly in them."""
        return Prompt(self.ids[:count], tuple(span for span in self.spans if span.stop <= count))


class PromptCodec:
    """Template, tokenizer and image processor of one model. Holds no conversation; threads may share it."""

    def __init__(self, processor: ProcessorMixin, config: PretrainedConfig) -> None:
        self.processor = processor
        self.config = config
        self.tokenizer = processor.tokenizer
        values = [vars(config).get(key) for key in _PLACEHOLDERS]
        self.forbidden: tuple[int, ...] = tuple(sorted({value for value in values if isinstance(value, int)}))
        """Ids of image, video and audio placeholders, which are neither written in a message nor generated."""
        self.image_id: int = config.image_token_id
        # some families expand another token than the one that stands for the features
        own = getattr(processor, "image_token", None)
        self._image_mark: str = own or self.tokenizer.convert_ids_to_tokens(self.image_id)
        marks = {self._image_mark, *self.tokenizer.convert_ids_to_tokens(list(self.forbidden))}
        self._marks: list[str] = sorted(mark for mark in marks if mark)

    def render(self, messages: Sequence[Message]) -> str:
        """Render the conversation up to the point where the assistant continues. Raises BackendError."""
        plain: list[Any] = []
        for message in messages:
            marks = [*self._marks, *self._turn_marks] if message["role"] in _FOREIGN else self._marks
            plain.append({**message, "content": [_without(marks, part) for part in message["content"]]})
        try:
            text: str = self._written(plain)
        except Exception as error:  # a template is code that comes with the model
            reason = error if isinstance(error, TemplateError) else describe_error(error)
            roles = ", ".join(message["role"] for message in messages)
            raise BackendError(
                f"The model's chat template rejected the conversation: {reason}. Its roles were: {roles}. "
                "Choose a protocol that fits this model."
            ) from error
        return text

    def _written(self, plain: list[Any]) -> str:
        text: str = self.processor.apply_chat_template(plain, tokenize=False, add_generation_prompt=True)
        return text

    @cached_property
    def _turn_marks(self) -> list[str]:
        """Special tokens around turns. A question, or print that a tool read, with one of them would add turns."""
        roles = ("user", "assistant", "user")
        try:
            written = self._written([{"role": role, "content": [{"type": "text", "text": "a"}]} for role in roles])
        except Exception:  # the conversation itself will tell why
            written = ""
        ends = (self.tokenizer.bos_token, self.tokenizer.eos_token)
        return [
            mark for mark in self.tokenizer.all_special_tokens if len(mark) > 2 and (mark in written or mark in ends)
        ]

    def tokenize(self, text: str, known: Sequence[EncodedTurn]) -> tuple[list[EncodedTurn], EncodedTurn]:
        """Split a rendered conversation into the turns of `known` at its start and the remainder; one id per image."""
        turns: list[EncodedTurn] = []
        at = 0
        for turn in known:
            if not text.startswith(turn.text, at):
                break
            turns.append(turn)
            at += len(turn.text)
        return turns, EncodedTurn(text[at:], tuple(self._rest(text, at)))

    def _rest(self, text: str, at: int) -> list[int]:
        """Return the ids of text[at:], as in the whole text if a token begins at `at`, else tokenised alone."""
        if at == 0:
            return list(self.tokenizer(text, add_special_tokens=self._lacks_bos(text))["input_ids"])
        if self.tokenizer.is_fast:
            coded = self.tokenizer(text, add_special_tokens=self._lacks_bos(text), return_offsets_mapping=True)
            starts = [start for start, _ in coded["offset_mapping"]]
            if at in starts:
                return list(coded["input_ids"][starts.index(at, 1) :])
        return list(self.tokenizer(text[at:], add_special_tokens=False)["input_ids"])

    def _lacks_bos(self, text: str) -> bool:
        """Return True if the template left it to the tokenizer to begin with its special token."""
        bos = self.tokenizer.bos_token
        return bos is None or not text.startswith(bos)

    def expand(self, ids: Sequence[int], views: Sequence[str], images: Mapping[str, Sequence[int]]) -> Prompt:
        """Replace the placeholders by the ids of the views, in order. Raises BackendError if they do not match."""
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
        """Return an image's ids and the inputs of the vision encoder. Raises BackendError for an impossible size."""
        image = fit(image, self.processor, self.config)
        coded = self.processor(images=[image], text=[self._image_mark], add_special_tokens=False, return_tensors="pt")
        return tuple(coded["input_ids"][0].tolist()), {key: coded[key] for key in coded if key not in _TEXT_INPUTS}

    def visual_tokens(self, image: Image.Image) -> int:
        """Return the number of visual tokens that the processor makes of an image."""
        return self.pixels(image)[0].count(self.image_id)

    def whole(self, text: str, images: Sequence[Image.Image]) -> Mapping[str, Any]:
        """Return the stock processor's inputs for a rendered conversation with its images. Raises BackendError."""
        fitted = [fit(image, self.processor, self.config) for image in images]
        call: Any = self.processor
        try:
            coded: Mapping[str, Any] = call(
                images=fitted or None, text=[text], add_special_tokens=self._lacks_bos(text), return_tensors="pt"
            )
        except (ValueError, TypeError, KeyError, IndexError) as error:
            raise BackendError(
                f"The model's processor rejected a conversation with {len(fitted)} images: {error}. "
                "Choose another protocol, or another model."
            ) from error
        return coded

    def decode(self, ids: Iterable[int]) -> str:
        """Return the text of generated ids, special tokens included: a protocol may parse them."""
        text: str = self.tokenizer.decode(list(ids), skip_special_tokens=False, clean_up_tokenization_spaces=False)
        return text

    def cut(self, ids: Sequence[int], text: str) -> tuple[int, ...]:
        """Return ids for `text`, a prefix of the text of `ids`; a last token that goes too far is tokenised anew."""
        kept = len(ids)
        while kept and not text.startswith(self.decode(ids[:kept])):
            kept -= 1
        rest = text[len(self.decode(ids[:kept])) :]
        tail: Any = self.tokenizer(rest, add_special_tokens=False)["input_ids"] if rest else []
        return (*ids[:kept], *tail)


def _without(marks: Iterable[str], part: Part) -> dict[str, str]:
    """Return a part as templates take it, with a blank inside these marks: they are then text like any other."""
    if part["type"] == "image":
        return {"type": "image"}
    text = part["text"]
    for mark in marks:
        text = text.replace(mark, f"{mark[0]} {mark[1:]}")
    return {"type": "text", "text": text}


class _WithoutVideo(ProcessorMixin):
    """Base of processors that leave out their video part. It comes after the stock class and receives its parts."""

    def __init__(self, *parts: Any, **named: Any) -> None:
        named.pop("video_processor", None)
        cast(Any, super()).__init__(*parts[: len(self.get_attributes())], **named)

    @classmethod
    def get_attributes(cls) -> list[str]:
        return [name for name in cast(Any, super()).get_attributes() if name != "video_processor"]

    @classmethod
    def from_args_and_dict(cls, args: Any, processor_dict: dict[str, Any], **kwargs: Any) -> Any:
        # Some families have no default for it.
        return super().from_args_and_dict(args, {**processor_dict, "video_processor": None}, **kwargs)


def image_only(stock: type[ProcessorMixin]) -> type[ProcessorMixin]:
    """Return the processor class `stock` without its video part, whose processor needs torchvision.

    The stock constructor runs with every argument of the model's own files.
    """
    return type(stock.__name__, (stock, _WithoutVideo), {"__doc__": stock.__doc__})


def load_processor(source: str, config: PretrainedConfig) -> ProcessorMixin:
    """Load the processor of the model in `source` (folder or hub id), set up for shown views.

    A view already has the size that the model is to see, so the resize of families that take any size is switched off.
    Raises BackendError if there is no processor, or no chat template.
    """
    if type(config) not in PROCESSOR_MAPPING:
        raise BackendError(
            f"'{source}' is a {config.model_type} model, for which this transformers version has no processor of "
            "images and text. Use an image-text-to-text model."
        )
    stock = cast(type[ProcessorMixin], PROCESSOR_MAPPING[type(config)])
    # A family may come with the processor of another one, as Pixtral's in LLaVA.
    named = cast(Any, stock).get_processor_dict(source)[0].get("processor_class")
    if isinstance(named, str) and named.endswith("Processor") and not named.startswith("Auto"):
        stock = getattr(transformers, named, stock)
    if not is_torchvision_available() and "video_processor" in cast(Any, stock).get_attributes():
        stock = image_only(stock)
    try:
        processor = stock.from_pretrained(source, trust_remote_code=False)
    except ValueError as error:
        if "Unrecognized image processor" not in str(error):
            raise
        # Many fine-tunes name a class that is gone, such as Qwen2_5_VLImageProcessor: then the family's own is taken.
        processor = stock.from_pretrained(source, config=config, trust_remote_code=False)
    if processor.chat_template is None:
        processor.chat_template = processor.tokenizer.chat_template
    if processor.chat_template is None:
        raise BackendError(
            f"'{source}' has no chat template, so a conversation cannot be written for it. "
            "Use an instruction-tuned model, or put a chat_template.jinja into its folder."
        )
    if takes_any_size(config):
        set_unsaved(processor.image_processor, do_resize=False)
    return processor


def save_processor(processor: ProcessorMixin, folder: Path) -> None:
    """Save the processor of a model that was trained, so that stock code can load it."""
    processor.save_pretrained(folder)
    if isinstance(processor, _WithoutVideo):
        # where torchvision is installed, stock code makes the part that is left out of this file
        processor.image_processor.save_pretrained(folder)


def set_unsaved(images: Any, **settings: Any) -> None:
    """Change settings of an image processor that is in use. It is saved with those that it came with: a trained model
    is for other software, too, which resizes images.
    """
    stock, saved = type(images), images.to_dict()
    came = {key: saved[key] for key in settings if key in saved}
    for key, value in settings.items():
        setattr(images, key, value)

    def to_dict(self: Any) -> dict[str, Any]:
        return {**stock.to_dict(self), **came}

    images.__class__ = type(stock.__name__, (stock,), {"to_dict": to_dict, "__doc__": stock.__doc__})


def takes_any_size(config: PretrainedConfig) -> bool:
    """Return True if the family encodes an image at its own size (Qwen-VL) instead of a fixed one (LLaVA)."""
    return hasattr(config.vision_config, "spatial_merge_size")


def visual_factor(config: PretrainedConfig) -> int:
    """Return the side in pixels of the square that becomes one visual token."""
    # attributes, not `to_dict`, which copies the whole configuration: this is asked for every view
    vision = config.vision_config
    merged = getattr(vision, "spatial_merge_size", None) or getattr(config, "spatial_merge_size", None)
    merged = merged or getattr(vision, "pooling_kernel_size", None) or getattr(config, "scale_factor", None)
    patch, merged = vision.patch_size, merged or round(1 / (getattr(config, "downsample_ratio", None) or 1))
    return int(patch[0] if isinstance(patch, list | tuple) else patch) * int(merged)


def fit(image: Image.Image, processor: ProcessorMixin, config: PretrainedConfig) -> Image.Image:
    """Return `image` as the processor takes it. A family that centre-crops gets it padded to a square: no side is lost.

    Raises BackendError for a view of a size that the model cannot take.
    """
    if takes_any_size(config):
        factor = visual_factor(config)
        if image.width % factor or image.height % factor:
            raise BackendError(
                f"A view of {image.width} x {image.height} px was given to a model whose views have sides that are "
                f"multiples of {factor} px. Cut views with ViewStore and this backend's factor."
            )
    elif image.width != image.height and processor.image_processor.to_dict().get("do_center_crop"):
        side = max(image.size)
        mean = tuple(round(255 * value) for value in processor.image_processor.image_mean)
        image = ImageOps.pad(image, (side, side), color=mean)
    return image
