"""Checks before and during GRPO: each names a known way in which such training goes wrong silently."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import groupby, zip_longest
from typing import Any, Final, NamedTuple

import torch
from PIL import Image
from torch import Tensor
from transformers import PretrainedConfig, ProcessorMixin
from trl.chat_template_utils import qwen3_vl_chat_template, supports_tool_calling

from qzoom_agent.config import AgentConfig
from qzoom_agent.errors import BackendError, ConfigError
from qzoom_agent.messages import text, view_ids
from qzoom_agent.models.hf import HFBackend
from qzoom_agent.models.prompts import PromptCodec, set_unsaved
from qzoom_agent.perception.adapters import adapter_for
from qzoom_agent.policy import LOOK_FIRST
from qzoom_agent.protocols.interface import ZoomProtocol
from qzoom_agent.views import ViewStore

ENOUGH: Final = 64
"""Tokens over which the mean of a turn is compared with the tolerance; that of fewer is too noisy in 16 bits."""
EXACT: Final = 0.02
"""Share of the tolerance that a single token may differ by in float32."""
_MOST_TOKENS = 2**16
_REPLY = "Let me look closer. 12, 34."


def require_family(config: PretrainedConfig) -> None:
    """Raise BackendError for a family into whose completions the trainer cannot put images."""
    if not adapter_for(config).two_dimensional:
        raise BackendError(
            f"The trainer cannot learn from episodes of a {config.model_type} model: TRL places images that come after "
            "the prompt for Qwen-VL families only. Use a Qwen2.5-VL or Qwen3-VL model."
        )


def require_plain_crops(config: AgentConfig, looker: HFBackend, *, aligned: bool = False) -> None:
    """Raise ConfigError if inserted crops are shown in part, or get the positions of their place.

    Args:
        config: Resolved; it decides before the branches do.
        aligned: The rollouts can have these positions.
    """
    if config.policy not in LOOK_FIRST:
        return
    own = None if looker.branches is None else looker.branches.config.positions
    if (config.perception.positions or own) == "aligned" and not aligned:
        raise ConfigError(
            "TRL's tool loop and vLLM compute positions themselves, so they cannot show crops with the positions of "
            "their place. Set rollouts.by to 'shared', or to 'generate' without vLLM; or perception.positions to "
            "'plain', with branches made for it."
        )
    if config.perception.sparse_crop is not None:
        raise ConfigError(
            "Sparse crops cannot be trained on: the trainer encodes each crop whole. Leave perception.sparse_crop out."
        )


class ProbeConversation:
    """A conversation with every kind of turn that a protocol writes: for templates and for counting."""

    def __init__(self, codec: PromptCodec, protocol: ZoomProtocol, *, factor: int, tools: bool) -> None:
        store = ViewStore()
        store.add_original(Image.new("RGB", (8 * factor, 8 * factor)))
        coarse = store.add_coarse(factor=factor, min_tokens=1, max_tokens=4)
        crop = store.add_crop(store.view("original").region, factor=factor, min_tokens=1, max_tokens=4)
        opening = protocol.opening("What is written there?", [coarse], tools=tools)
        between = {
            "result": protocol.result(crop, 0, ["Box grown from 20x20 to 28x28 px around its centre."]),
            "refusal": protocol.refusal("This crop was refused. " + "It shows nothing that was not shown. " * 6),
            "final": protocol.final(),
        }
        whole = {name: [*opening, text("assistant", _REPLY), *turn] for name, turn in between.items()}
        self.codec, self.start = codec, codec.render(opening)
        self.rendered = {name: (codec.render(turns), len(view_ids(turns))) for name, turns in whole.items()}
        """Text of the conversation with each kind of turn, and the number of views that it has to show."""

    def tokens(self) -> tuple[int, int]:
        """Return the text tokens of the opening, and of the longest turn between two of the model's own."""
        texts = [self.start, *(whole for whole, _ in self.rendered.values())]
        count = [len(self.codec.tokenizer(one, add_special_tokens=False)["input_ids"]) for one in texts]
        return count[0], max(count[1:]) - count[0]


def require_template(probe: ProbeConversation) -> None:
    """Raise ConfigError if the chat template drops an image of any turn, or rewrites earlier turns."""
    mark = probe.codec.tokenizer.convert_ids_to_tokens(probe.codec.image_id)
    for name, (whole, wanted) in probe.rendered.items():
        if not whole.startswith(probe.start + _REPLY):
            raise ConfigError(
                f"The chat template rewrites the conversation once a {name} follows, so its turns are not one sequence "
                "that can be trained on. Give the model a template that only ever adds."
            )
        if (shown := whole.count(mark)) != wanted:
            raise ConfigError(
                f"The chat template shows {shown} of {wanted} images of a conversation with a {name}: crops would not "
                "reach the model. Choose another protocol, or a template that renders images in that role."
            )


def require_tool_template(processor: ProcessorMixin) -> None:
    """Give a processor whose chat template knows no tools (Qwen2.5-VL's own) one that does, for TRL's tool loop.

    Raises ConfigError if its vocabulary lacks the tokens that such a template writes.
    """
    if supports_tool_calling(processor):
        return
    marks = ("<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|image_pad|>")
    if missing := [mark for mark in marks if mark not in processor.tokenizer.get_vocab()]:
        raise ConfigError(
            f"The model's chat template supports no tools, and its vocabulary lacks {', '.join(missing)} for one that "
            "does. Set rollouts.by to 'shared' or 'generate'."
        )
    processor.chat_template = processor.tokenizer.chat_template = qwen3_vl_chat_template


def fit_for_trl(processor: ProcessorMixin, *, factor: int) -> None:
    """Make the image processor one that TRL's tool loop can work with, and that is saved as it came.

    Views stay as they are.
    """
    images: Any = processor.image_processor
    # TRL tries templates with an image of 8 pixels, which has to be enlarged
    size = type(images.size)(shortest_edge=factor**2, longest_edge=factor**2 * _MOST_TOKENS)
    set_unsaved(images, do_resize=True, size=size)
    stock = type(images)

    # processors without torchvision return arrays unless asked, which TRL cannot split where no call gave an image
    def preprocess(self: Any, images: Any, *args: Any, **options: Any) -> Any:
        if options.get("return_tensors") is None:
            options["return_tensors"] = "pt"
        return stock.preprocess(self, images, *args, **options)

    images.__class__ = type(stock.__name__, (stock,), {"preprocess": preprocess, "__doc__": stock.__doc__})


@contextmanager
def refused_by_trl() -> Iterator[None]:
    """Raise what TRL says of settings that it does not take as a ConfigError."""
    try:
        yield
    except (TypeError, ValueError, ImportError) as error:
        raise ConfigError(f"TRL refuses the recipe: {error}") from None


def require_features(ids: Sequence[int], images: Sequence[Image.Image], backend: HFBackend) -> None:
    """Raise BackendError if a sequence has not as many visual tokens as its images have features."""
    factor = backend.defaults.factor
    features = sum((image.width // factor) * (image.height // factor) for image in images)
    found = sum(token == backend.codec.image_id for token in ids)
    if found != features:
        raise BackendError(
            f"A rollout has {found} visual tokens for {features} features of {len(images)} images, so it cannot be "
            "trained on. Is the chat template another than the one that the episodes were run with?"
        )


def require_images(batch: Mapping[str, Any], images: int) -> None:
    """Raise BackendError if a batch that goes to training lacks some of its images."""
    grids = batch.get("image_grid_thw")
    found = 0 if grids is None else len(grids)
    if images and (batch.get("pixel_values") is None or found != images):
        raise BackendError(
            f"The trainer dropped {images - found} of {images} images of a batch: it would learn without seeing. "
            "This happens where visual tokens were cut; raise max_completion_length."
        )


class LogpDistance(NamedTuple):
    """Absolute differences of log-probabilities, over sampled tokens."""

    mean: float
    largest: float
    tokens: int
    """Their number."""


def logp_distances(sampled: Tensor, trained: Tensor, mask: Tensor) -> list[LogpDistance]:
    """Return how far apart log-probabilities are where `mask` is 1: first over all turns, then in each turn by itself.

    All tensors are (rows, tokens); a run of ones in a row of `mask` is a turn.
    """
    mask = mask.bool()
    apart = (sampled - trained).abs()
    known = mask & ~torch.isnan(apart)
    first = mask.clone()
    first[:, 1:] &= ~mask[:, :-1]
    turns = first.cumsum(1)
    chosen = [known, *(known & (turns == turn) for turn in range(1, int(turns.max()) + 1))]
    return [_distance(apart[one]) for one in chosen]


def joined(batches: Sequence[Sequence[LogpDistance]]) -> list[LogpDistance]:
    """Return the distances of several batches, each as `logp_distances` returns them, as those of one batch."""
    found = []
    for same_turn in zip_longest(*batches, fillvalue=LogpDistance(0.0, 0.0, 0)):
        tokens = sum(one.tokens for one in same_turn)
        mean = sum(one.mean * one.tokens for one in same_turn) / max(1, tokens)
        found.append(LogpDistance(mean, max(one.largest for one in same_turn), tokens))
    return found


def _distance(apart: Tensor) -> LogpDistance:
    if not apart.numel():
        return LogpDistance(0.0, 0.0, 0)
    return LogpDistance(float(apart.mean()), float(apart.max()), apart.numel())


def require_same_model(
    distances: Sequence[LogpDistance], *, tolerance: float, writer: str, exact: bool = False
) -> None:
    """Raise BackendError if the turns were written by another model than the one that is trained.

    Args:
        distances: See `logp_distances`. The mean of a single turn counts where it is one over `ENOUGH` tokens.
        tolerance: The largest mean that is taken for rounding.
        exact: All is computed in float32, where the largest difference of a token is `EXACT` times `tolerance`.
    """
    for turn, one in enumerate(distances):
        means = one.mean > tolerance and (not turn or one.tokens >= ENOUGH)
        if means or (exact and one.largest > EXACT * tolerance):
            raise BackendError(
                f"The log-probabilities of what was sampled ({writer}{f', turn {turn}' if turn else ''}) differ from "
                f"the trainer's by {one.mean:.4f} in the mean and {one.largest:.4f} at most; rollouts.tolerance = "
                f"{tolerance:g} allows {f'{EXACT * tolerance:g} a token' if exact else 'that mean'}. The prompts or "
                "images that were sampled from are not those that are trained on, or the model has dropout; do not "
                "train like this. `rollouts.by: shared` is exact."
            )


def one_token_an_image(ids: Sequence[int], image_id: int) -> list[int]:
    """Return token ids with each run of image tokens as a single one."""
    return [one for token, run in groupby(ids) for one in ([token] if token == image_id else run)]


class SamePrompts:
    """A vLLM engine (`vllm.LLM`) in the trainer's own process, whose prompts are checked to be the trainer's.

    TRL 1.16 gives it token ids in which every image is as many tokens as it has features, and the images beside them;
    vLLM expands image tokens once more, so that it would read another prompt.
    """

    def __init__(self, engine: Any, image_id: int) -> None:
        self._engine, self._image_id = engine, image_id

    def __getattr__(self, name: str) -> Any:
        return getattr(self._engine, name)

    def generate(self, prompts: Sequence[dict[str, Any]], **options: Any) -> Any:
        """Generate as vLLM does. Raises BackendError if it read other tokens than it was asked to."""
        asked = [
            {**one, "prompt_token_ids": one_token_an_image(one["prompt_token_ids"], self._image_id)} for one in prompts
        ]
        replies = self._engine.generate(asked, **options)
        for prompt, reply in zip(prompts, replies, strict=True):
            given, read = list(prompt["prompt_token_ids"]), list(reply.prompt_token_ids)
            if given != read:
                counts = [sum(token == self._image_id for token in ids) for ids in (given, read)]
                raise BackendError(
                    f"vLLM read a prompt of {len(read)} tokens, {counts[1]} of them visual, where the trainer has "
                    f"{len(given)} and {counts[0]}: it sizes or places the images of this family otherwise. Set "
                    "rollouts.by to 'shared', or rollouts.vllm.mode to 'server'."
                )
        return replies
