"""One conversation with local weights: encode an image once, prefill only what is new, generate.

The session owns a KV cache and knows which ids it holds (`_held`). A reply renders the whole conversation, finds the
longest beginning that is already held, drops the rest of the cache, and runs the model on what follows: in pieces of at
most one image, through the stock `forward`, which merges image features (and DeepStack features) itself. Positions are
computed over the whole conversation each time and passed explicitly, because the model's own shortcut (`rope_deltas`)
would be state on a shared module; with that, and a random generator per reply, sessions on one model do not see each
other. Calling the layers directly instead of `forward` was measured on a 3 M parameter model: 5 % faster, not worth it.

A model with branches can `look` first: the coarse pass stops after K layers and is kept. The reply that follows goes on
from there, whether its conversation is the same (the upper layers run) or has a crop inserted (the crop and what
follows it run through the lower layers, then everything through the upper ones).
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import pairwise
from time import perf_counter
from typing import Any, Protocol, cast, runtime_checkable

import torch
from transformers import DynamicCache, PreTrainedModel
from transformers.cache_utils import DynamicLayer
from transformers.utils.generic import ModelOutput

from qzoom_agent.config import PerceptionConfig
from qzoom_agent.errors import BackendError
from qzoom_agent.geometry import Size
from qzoom_agent.messages import Message, view_ids
from qzoom_agent.models.interface import ImageSource, Proposal, Reply, SamplingParams, Sight
from qzoom_agent.models.processing import fit
from qzoom_agent.models.prompts import EncodedTurn, ImageSpan, Prompt, PromptCodec
from qzoom_agent.models.sampling import Sampler, TextStream
from qzoom_agent.perception.adapters import Grid, adapter_for, grid_of
from qzoom_agent.perception.anyres import base_view, has_tiles
from qzoom_agent.perception.branches import Branches
from qzoom_agent.perception.decoder import Decoder, cache_name
from qzoom_agent.perception.layout import Cells, align
from qzoom_agent.perception.look import Look, look
from qzoom_agent.perception.prefill import Prefill


@runtime_checkable
class PlacesImages(Protocol):
    """A model whose positions depend on the images (MRoPE)."""

    def get_rope_index(
        self, *, input_ids: torch.Tensor, mm_token_type_ids: torch.Tensor, image_grid_thw: torch.Tensor | None
    ) -> tuple[torch.Tensor, torch.Tensor]: ...


@dataclass(frozen=True, slots=True)
class EncodedView:
    """A view after the vision encoder."""

    ids: tuple[int, ...]
    """What stands for it in a prompt."""
    tokens: int
    """How many of those are visual."""
    grid: torch.Tensor | None
    """(1, 3) patches in time, height, width, for families that place images in two dimensions."""
    features: ModelOutput
    """What the family's `get_image_features` gave: `forward` takes it back as it is."""


@dataclass(frozen=True, slots=True)
class Prepared:
    """A conversation ready for the decoder."""

    prompt: Prompt
    positions: torch.Tensor
    """(3, 1, ids) for MRoPE families, else (1, ids)."""
    turns: list[EncodedTurn]
    """The answered turns recognised in it, whose ids were kept."""
    rest: EncodedTurn
    """What follows them, up to where the model is to write."""

    @property
    def next_position(self) -> int:
        """Position of the first token after it."""
        return int(self.positions.max()) + 1


class HFSession:
    """See the module's note. Made by `HFBackend.session`; not for use from several threads at once."""

    def __init__(
        self,
        model: PreTrainedModel,
        codec: PromptCodec,
        image: ImageSource,
        *,
        end_ids: frozenset[int],
        branches: Branches | None = None,
    ) -> None:
        self._model = model
        self._branches = branches
        self._prefill: Prefill | None = None
        self._lean = False
        self._cache_name = cache_name(model.forward)
        self._places: dict[str, tuple[str, Cells]] = {}
        self._codec = codec
        self._image = image
        self._end_ids = end_ids
        self._limit: int = model.config.get_text_config().max_position_embeddings
        self._images: dict[str, EncodedView] = {}
        self._turns: list[EncodedTurn] = []
        self._held = Prompt()
        self._cache = DynamicCache(config=model.config)
        self.prompt_logits: torch.Tensor | None = None
        """Logits after the prompt of the last reply, (vocabulary,): for calibration and tests."""

    @property
    def held(self) -> Prompt:
        """The ids whose keys and values are in the cache."""
        return self._held

    @property
    def known(self) -> set[str]:
        """The views that are encoded."""
        return set(self._images)

    def close(self) -> None:
        self._images = {}
        self._turns = []
        self._places = {}
        self._forget()

    def look(self, messages: Sequence[Message], *, options: PerceptionConfig, map_always: bool = False) -> list[Sight]:
        if self._branches is None:
            raise BackendError("This model has no branches, so it cannot look. Use the policy 'explicit' or 'direct'.")
        began = perf_counter()
        with self._undisturbed():
            ready = self.prepare(messages)
            if not ready.prompt.spans:
                raise BackendError("There is no image in the conversation, so there is nothing to look at.")
            self._forget()
            decoder = Decoder(self._model)
            prefill = Prefill(decoder, self._branches.config.k)
            ids = torch.tensor([ready.prompt.ids], device=self._model.device)
            new = decoder.embed(ids, self.features(ready.prompt, 0))
            rotary = decoder.rotary(new.hidden, ready.positions)
            work = float(prefill.extend(new, rotary))
            hidden = cast(torch.Tensor, prefill.hidden)
            found = look(
                self._branches,
                decoder.adapter,
                hidden,
                rotary=rotary,
                mask=decoder.mask(hidden),
                images=self.grids(ready.prompt),
                options=options,
                map_always=map_always,
            )
            self._prefill, self._cache, self._held = prefill, prefill.cache, ready.prompt
            self._lean = options.lean
        return self.sights(ready.prompt, found, options, work=work, seconds=perf_counter() - began)

    def sights(
        self, prompt: Prompt, found: Look, options: PerceptionConfig, *, work: float, seconds: float
    ) -> list[Sight]:
        """What the branches found in a prompt, for each of its views, as callers read it."""
        assert self._branches is not None
        wanted = options.positions or self._branches.config.positions
        aligned = wanted == "aligned" and adapter_for(self._model.config).two_dimensional
        grids = [self.grid(span) for span in prompt.spans]
        return [
            Sight(
                view=span.view,
                score=found.score,
                threshold=found.threshold,
                heat=found.maps[at].heat.tolist() if found.maps else [],
                cutoff=found.maps[at].cutoff if found.maps else None,
                proposals=[
                    Proposal((one.x1, one.y1, one.x2, one.y2), grid.to_view(*one[:4], view=span.view))
                    for one in (found.maps[at].regions if found.zooms else ())
                ],
                reason=found.reason,
                aligned=aligned,
                prompt_tokens=len(prompt.ids),
                visual_tokens=self._images[span.view].tokens,
                token_layers=work + found.token_layers,
                seconds=seconds,
                extent=grid.to_view(0, 0, grid.columns, grid.rows, view=span.view),
                margin=self._branches.config.margin,
                fixed=options.box is not None or self._branches.config.box is not None,
            )
            for at, (span, grid) in enumerate(zip(prompt.spans, grids, strict=True))
        ]

    def place(self, view: str, *, source: str, cells: Cells) -> None:
        self._places[view] = (source, cells)

    def reply(
        self,
        messages: Sequence[Message],
        *,
        settings: SamplingParams,
        stop: tuple[str, ...] = (),
        on_text: Callable[[str], None] | None = None,
    ) -> Reply:
        began = perf_counter()
        with self._undisturbed():
            known = set(self._images)
            ready = self.prepare(messages)
            cached = self.keep(ready.prompt)
            logits, work = self.feed(ready.prompt, ready.positions, cached)
            self.prompt_logits = logits
            sampler = Sampler(settings, self._codec.forbidden, logits.device)
            stream = TextStream(self._codec.decode, stop, on_text)
            new_tokens, ended = self._generate(logits, ready.next_position, settings.max_new_tokens, sampler, stream)
            whole = Prompt((*ready.prompt.ids, *stream.ids), ready.prompt.spans)
            self._held = whole.head(self._cache.get_seq_length())
            self.remember(ready, stream.ids, stream.text)
        return Reply(
            text=stream.text,
            finish="stop" if ended else "length",
            prompt_tokens=len(ready.prompt.ids),
            cached_tokens=cached,
            new_tokens=new_tokens,
            visual_tokens=sum(seen.tokens for view, seen in self._images.items() if view not in known),
            token_layers=work,
            seconds=perf_counter() - began,
        )

    def prepare(self, messages: Sequence[Message]) -> Prepared:
        """Ids and positions of a conversation; encodes views not yet seen. Runs no decoder layer.

        Raises BackendError if it cannot be written for this model or is longer than the model can read.
        """
        views = view_ids(messages)
        for view in views:
            if view not in self._images:
                self._images[view] = self.encode(view)
        turns, rest = self._codec.tokenize(self._codec.render(messages), self._turns)
        ids = [token for turn in (*turns, rest) for token in turn.ids]
        prompt = self._codec.expand(ids, views, {view: seen.ids for view, seen in self._images.items()})
        ready = Prepared(prompt, self._positions(prompt), turns, rest)
        if ready.next_position >= self._limit:
            visual = sum(span.stop - span.start for span in prompt.spans)
            raise BackendError(
                f"The conversation has {len(prompt.ids)} tokens, {visual} of them visual, and reaches position "
                f"{ready.next_position}; the model was built for {self._limit}. "
                + (
                    "Lower budget.coarse_tokens, budget.crop_max_tokens or budget.max_turns."
                    if visual > len(prompt.ids) - visual
                    else "Ask a shorter question, or lower budget.max_turns or generation.max_new_tokens."
                )
            )
        return ready

    def remember(self, ready: Prepared, ids: Sequence[int], text: str) -> None:
        """Keep the ids of an answer to a prepared conversation, so that its text is never tokenised again."""
        answer = self._codec.cut(ids, text)
        self._turns = [*ready.turns, EncodedTurn(ready.rest.text + text, (*ready.rest.ids, *answer))]

    def keep(self, prompt: Prompt) -> int:
        """Shorten the cache to what it shares with `prompt`; returns how many ids that is."""
        if self._prefill is not None and prompt == self._held:
            return len(prompt.ids)  # the upper layers are still to come, so even the last id need not be run again
        shared = prompt.shared(self._held)
        if self._prefill is not None:
            self._prefill.keep(shared)
            self._held = self._held.head(shared)
            return shared
        surplus = len(self._held.ids) - shared
        if not surplus:
            return shared
        if not all(type(layer) is DynamicLayer for layer in self._cache.layers):
            # Sliding windows and recurrent states have forgotten what a shorter cache would hold.
            self._forget()
            return 0
        self._cache.crop(-surplus)
        self._held = self._held.head(shared)
        return shared

    def feed(self, prompt: Prompt, positions: torch.Tensor, start: int) -> tuple[torch.Tensor, float]:
        """Run the decoder on prompt.ids[start:], which the cache lacks; logits after the last, (vocabulary,), and the
        work in token-layers."""
        if self._prefill is not None:
            return self._finish(self._prefill, prompt, positions, start)
        images = [span for span in prompt.spans if span.start >= start]
        edges = [start, *(span.stop for span in images[:-1]), len(prompt.ids)]
        logits = torch.empty(0)
        for at, (begin, end) in enumerate(pairwise(edges)):
            ids = torch.tensor([prompt.ids[begin:end]], device=self._model.device)
            features = self._images[images[at].view].features if images else None
            logits = self._forward(ids, positions[..., begin:end], features)
        return logits, (len(prompt.ids) - start) * self._model.config.get_text_config().num_hidden_layers

    def _finish(
        self, prefill: Prefill, prompt: Prompt, positions: torch.Tensor, start: int
    ) -> tuple[torch.Tensor, float]:
        """Complete the prefill that a look left half-way, with the ids from `start` on added to it."""
        decoder, work = prefill.decoder, 0.0
        if start < len(prompt.ids):
            ids = torch.tensor([prompt.ids[start:]], device=self._model.device)
            new = decoder.embed(ids, self.features(prompt, start))
            work = prefill.extend(new, decoder.rotary(new.hidden, positions[..., start:]))
        hidden = cast(torch.Tensor, prefill.hidden)
        logits, more = prefill.finish(decoder.rotary(hidden, positions), lean=self._lean)
        self._prefill = None
        return logits[0], work + more

    def features(self, prompt: Prompt, start: int) -> list[ModelOutput]:
        """Features of the views in prompt.ids[start:], in order."""
        return [self._images[span.view].features for span in prompt.spans if span.start >= start]

    def grids(self, prompt: Prompt) -> list[tuple[int, int, int]]:
        """For each view of a prompt the index of its first visual token, and the rows and columns of its map."""
        shapes = [self.grid(span) for span in prompt.spans]
        return [(at, grid.rows, grid.columns) for at, grid in zip(self._visual_starts(prompt), shapes, strict=True)]

    def grid(self, span: ImageSpan) -> Grid:
        """The cells of the map of a view of a prompt, and where they lie in it."""
        seen = self._images[span.view]
        image = self._image(span.view)
        given = fit(image, self._codec.processor, self._codec.config)  # padded to a square where the family needs it
        return grid_of(self._model, Size(*image.size), seen.grid, seen.tokens, given=Size(*given.size))

    def _visual_starts(self, prompt: Prompt) -> list[int]:
        """Index of the first visual token of each image: its ids may begin with a marker."""
        return [prompt.ids.index(self._codec.image_id, span.start) for span in prompt.spans]

    def _forward(self, ids: torch.Tensor, positions: torch.Tensor, features: ModelOutput | None = None) -> torch.Tensor:
        output = self._model(
            input_ids=ids,
            position_ids=positions,
            use_cache=True,
            logits_to_keep=1,
            mm_encoder_outputs=None if features is None else {"image": features},
            **{self._cache_name: self._cache},
        )
        logits: torch.Tensor = output.logits[0, -1]
        return logits

    def _generate(
        self, logits: torch.Tensor, position: int, limit: int, sampler: Sampler, stream: TextStream
    ) -> tuple[int, bool]:
        """Write into `stream`; (tokens generated, whether the model ended by itself). The last token is not fed."""
        steps = torch.arange(position, min(position + limit, self._limit), device=logits.device)
        where = steps.expand(3, 1, -1) if isinstance(self._model.base_model, PlacesImages) else steps.expand(1, -1)
        for count in range(1, len(steps) + 1):
            token = sampler(logits)
            value = int(token)
            if value in self._end_ids:
                stream.finish()
                return count, True
            if stream.push(value):
                return count, True
            if count < len(steps):
                logits = self._forward(token.view(1, 1), where[..., count - 1 : count])
        stream.finish()
        return len(steps), False

    def encode(self, view: str) -> EncodedView:
        """A view through the vision encoder. Called once a view, when it is first shown."""
        ids, inputs = self._codec.pixels(self._image(view))
        placed = {
            key: value.to(self._model.device, self._model.dtype if value.is_floating_point() else value.dtype)
            for key, value in inputs.items()
        }
        if self._branches is not None and has_tiles(self._model.config):
            base = base_view(self._model, placed["pixel_values"])
            tokens = len(cast(Any, base).pooler_output[0])
            return EncodedView((self._codec.image_id,) * tokens, tokens, None, base)
        features = cast(Any, self._model).get_image_features(**placed, return_dict=True)
        # Only these two are read by `forward`; the rest (every layer of the tower, for LLaVA) would stay in memory.
        for key in set(features) - {"pooler_output", "deepstack_features"}:
            features[key] = None
        tokens = sum(token == self._codec.image_id for token in ids)
        return EncodedView(ids, tokens, inputs.get("image_grid_thw"), features)

    def _positions(self, prompt: Prompt) -> torch.Tensor:
        base = self._model.base_model
        if not isinstance(base, PlacesImages):
            return torch.arange(len(prompt.ids), device=self._model.device).unsqueeze(0)
        grids = [grid for span in prompt.spans if (grid := self._images[span.view].grid) is not None]
        ids = torch.tensor([prompt.ids])
        positions, _ = base.get_rope_index(
            input_ids=ids,
            mm_token_type_ids=(ids == self._codec.image_id).int(),
            image_grid_thw=torch.cat(grids) if grids else None,
        )
        return self._aligned(prompt, positions).to(self._model.device)

    def _aligned(self, prompt: Prompt, positions: torch.Tensor) -> torch.Tensor:
        """The positions, with those of placed crops moved to where they were cut from."""
        starts = dict(zip((span.view for span in prompt.spans), self._visual_starts(prompt), strict=True))
        for view, (source, cells) in self._places.items():
            if view in starts and source in starts:
                grid, start = self._images[view].grid, starts[view]
                assert grid is not None  # a family that places images in two dimensions
                merge = int(self._model.config.vision_config.spatial_merge_size)
                rows, columns = int(grid[0, 1]) // merge, int(grid[0, 2]) // merge
                positions = align(
                    positions,
                    source=starts[source],
                    crop=(start, start + rows * columns),
                    grid=(rows, columns),
                    cells=cells,
                )
        return positions

    def _forget(self) -> None:
        self._prefill = None
        self._held = Prompt()
        self._cache = DynamicCache(config=self._model.config)

    @contextmanager
    def _undisturbed(self) -> Iterator[None]:
        """Inference; whatever interrupts it (even Ctrl-C) may leave half a cache, so the session then starts afresh."""
        try:
            with torch.inference_mode():
                yield
        except torch.OutOfMemoryError as error:
            held = len(self._held.ids)
            self.close()
            raise BackendError(
                f"The accelerator ran out of memory with {held} tokens in the cache ({error}). "
                "Lower budget.coarse_tokens or budget.crop_max_tokens, or use a smaller model."
            ) from error
        except BaseException:
            self.close()
            raise
