"""One conversation with local weights: encode an image once, prefill only the new tokens, generate.

The session owns a KV cache and the ids that it holds (`held`). A reply renders the whole conversation, finds the
longest beginning that is already held, crops the cache to it, and runs the model on the rest: in pieces of at most one
image, through the stock `forward`. Positions are computed over the whole conversation and passed explicitly, because
the model's own shortcut (`rope_deltas`) is state on a shared module. So sessions of one model do not affect each other.

A model with branches can `look` first: the coarse pass stops after K layers and is kept (`prefill`). A further look
runs these layers on what is new, a crop and the tokens behind it. The reply continues it: on the same conversation the
upper layers run; with a crop inserted, the new tokens run through the lower layers and then everything through the
upper ones. `hf_batch` does the same for many sessions at once.
"""

from collections.abc import Hashable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from copy import copy
from dataclasses import dataclass
from itertools import pairwise
from time import perf_counter
from typing import TYPE_CHECKING, Any, Final, TypeVar, Unpack, cast

import torch
from PIL import Image
from torch import Tensor
from transformers import PretrainedConfig
from transformers.utils.generic import ModelOutput

from qzoom_agent.config import PerceptionConfig
from qzoom_agent.errors import BackendError
from qzoom_agent.geometry import Size
from qzoom_agent.images import digest
from qzoom_agent.messages import Message, view_ids
from qzoom_agent.models.hf_generation import GenerationRequest, Prepared, write_turns
from qzoom_agent.models.interface import TOO_LONG, ImageSource, LookOptions, OnText, Reply, SamplingParams
from qzoom_agent.models.prompts import EncodedTurn, ImageSpan, Prompt, fit
from qzoom_agent.perception.adapters import (
    TILED,
    Cells,
    Grid,
    adapter_for,
    align,
    base_view,
    grid_of,
    merged,
    patch_grid,
)
from qzoom_agent.perception.branch_config import BranchConfig, searched
from qzoom_agent.perception.branches import Branches
from qzoom_agent.perception.caches import Snapshots, new_cache
from qzoom_agent.perception.decoder import Decoder, Prefill
from qzoom_agent.perception.look import BranchOutput, look
from qzoom_agent.perception.maps import runs
from qzoom_agent.perception.transformers_versions import forward, image_features
from qzoom_agent.trace import PerceptionRecord

if TYPE_CHECKING:
    from qzoom_agent.models.hf import HFBackend

_Name = TypeVar("_Name", bound=Hashable)
NO_FEATURES: Any = ModelOutput
"""Placeholder for the features of a view that was not encoded: any use of it fails."""
_PATCHES: Final = 2**16
"""Image patches that are encoded together, about."""


@dataclass(frozen=True, slots=True)
class EncodedView:
    """A view after the vision encoder."""

    ids: tuple[int, ...]
    """The ids that stand for it in a prompt."""
    tokens: int
    """Number of visual tokens among them."""
    grid: Tensor | None
    """(1, 3) patches in time, height, width, for families whose images have no fixed grid."""
    features: ModelOutput
    """Output of the family's `get_image_features`, which `forward` takes as it is."""
    whole: tuple[int, ...] | None = None
    """The ids that would stand for all its tokens, where some are left out; else None."""
    kept: tuple[int, ...] | None = None
    """Indices of `ids` among these."""

    def part(self, rows: Sequence[str], config: PretrainedConfig) -> "EncodedView":
        """Return the view with the visual tokens marked "1" in the rows of its grid, in families of any size."""
        assert self.grid is not None
        if [len(row) for row in rows] != [merged(config, self.grid)[1]] * merged(config, self.grid)[0]:
            raise BackendError(f"A view of {self.tokens} visual tokens cannot be shown in part by these rows: {rows}.")
        # in these families the ids of a view are its visual tokens and nothing else
        kept = tuple(at for at, mark in enumerate("".join(rows)) if mark == "1")
        features: Any = self.features
        if features is not NO_FEATURES:
            at = list(kept)
            stacks = getattr(features, "deepstack_features", None)
            more = {} if stacks is None else {"deepstack_features": [(level[0][at],) for level in stacks]}
            features = type(features)(pooler_output=(features.pooler_output[0][at],), **more)
        return EncodedView(tuple(self.ids[one] for one in kept), len(kept), self.grid, features, self.ids, kept)


class HFSession:
    """A conversation with a Hugging Face model; see the module's note. Not for use from several threads at once."""

    def __init__(
        self,
        backend: "HFBackend",
        image: ImageSource,
        *,
        pool: dict[str, EncodedView] | None = None,
        encodes: bool = True,
    ) -> None:
        """
        Args:
            pool: encoded views by digest, shared with other sessions; a view found there is not encoded again.
            encodes: False skips the vision encoder, for callers that need only ids and positions.
        """
        self.backend, self.image = backend, image
        self._model, self._codec = backend.model, backend.codec
        self._pool, self._encodes = pool, encodes
        # only families with positions in two dimensions (MRoPE) have this method
        self._rope_index = getattr(self._model.base_model, "get_rope_index", None)
        text = self._model.config.get_text_config()
        self._sees_forwards = getattr(text, "use_bidirectional_attention", None) == "vision"
        self.limit: int = text.max_position_embeddings
        """Positions that the model was built for."""
        self.lean = False
        """The last look wants its prefill finished leanly (`perception.lean`)."""
        self.prompt_logits: Tensor | None = None
        """Logits (vocabulary,) after the prompt of the last reply, for calibration and tests."""
        self.close()

    def close(self) -> None:
        self.places: dict[str, tuple[str, Cells]] = {}
        """The crops with aligned positions: each with the view that it was cut from, and its cells there."""
        self._parts: dict[str, tuple[str, ...]] = {}
        self._digests: dict[str, str] = {}
        self._grids: dict[str, Grid] = {}
        self._images: dict[str, EncodedView] = {}
        self._read: dict[str, tuple[tuple[int, ...], dict[str, Tensor]]] = {}
        self._ahead: dict[str, EncodedView] = {}
        self._turns: list[EncodedTurn] = []
        self._forget()

    def _forget(self) -> None:
        self.held = Prompt()
        """The ids that cache or prefill hold."""
        self.cache = new_cache(self._model.config)
        """Keys and values of `held`, (1, heads, tokens, width) in each layer; not in use while there is a `prefill`."""
        self._snapshots = Snapshots()
        self.prefill: Prefill | None = None
        """The coarse pass that a look left unfinished; None otherwise."""

    @property
    def known(self) -> set[str]:
        """The views that are encoded."""
        return set(self._images)

    def fork(self, *, shared: bool = False) -> "HFSession":
        """Open another conversation; see `ForkingSession`."""
        if shared and self._pool is None:  # the same crop for another question is not encoded again
            whole = [view for view in self._images if view not in self._parts]
            self._pool = {self.digest(view): self._images[view] for view in whole}
        other = copy(self)
        other.close()  # its own, empty state
        other._images, other._parts = self._images if shared else dict(self._images), dict(self._parts)
        if shared and self.prefill is not None:
            other.prefill, other.held = self.prefill.fork(), self.held
        return other

    def look(self, messages: Sequence[Message], **how: Unpack[LookOptions]) -> list[PerceptionRecord]:
        began, options, further = perf_counter(), how["options"], how.get("further", False)
        with torch.inference_mode(), closed_on_error([self]):
            ready, branches = self.prepare_look(messages, further=further)
            decoder, prompt = Decoder(self._model), ready.prompt
            start, prefill = self.resume_look(prompt, decoder, branches.config.k)
            work = self._extend(prefill, prompt, ready.positions, start)
            hidden = cast(Tensor, prefill.hidden)
            (found,) = look(
                branches,
                decoder.adapter,
                hidden,
                rotary=decoder.rotary(hidden, ready.positions),
                mask=decoder.mask(hidden, visual=prefill.visual),
                images=[self.searched(prompt, branches.config, further=further)],
                **how,
            )
            self.held, self.lean = prompt, options.lean
        return self.records(prompt, found, branches.config, options, work=work, seconds=perf_counter() - began)

    def prepare_look(
        self, messages: Sequence[Message], *, further: bool = False, ready: Prepared | None = None
    ) -> tuple[Prepared, Branches]:
        """Prepare a conversation to be looked at, unless it is `ready`.

        Raises BackendError without branches, or without an image.
        """
        first = self.backend.branches
        if first is None:
            raise BackendError("This model has no branches, so it cannot look. Use the policy 'explicit' or 'direct'.")
        branches = first.further if further else first
        if branches is None:
            raise BackendError("The branches of this model look once. Set perception.max_looks to 1, or train others.")
        ready = ready or self.prepare(messages)
        if not ready.prompt.spans:
            raise BackendError("There is no image in the conversation, so there is nothing to look at.")
        return ready, branches

    def resume_look(self, prompt: Prompt, decoder: Decoder, k: int) -> tuple[int, Prefill]:
        """Return the prefill that a look goes on with, and the number of ids of `prompt` that it holds already."""
        if self.prefill is None:
            self._forget()
            self.prefill = Prefill(decoder, k)
            return 0, self.prefill
        return self.keep(prompt), self.prefill

    def searched(self, prompt: Prompt, config: BranchConfig, *, further: bool) -> list[tuple[int, int, int]]:
        """Return the `grids` of the views that a look makes maps of."""
        seen = set(self._searched(prompt, config, further=further))
        return [grid for span, grid in zip(prompt.spans, self.grids(prompt), strict=True) if span in seen]

    def _searched(self, prompt: Prompt, config: BranchConfig, *, further: bool) -> list[ImageSpan]:
        spans = searched(prompt.spans, config.inside_crops) if further else prompt.spans
        return [span for span in spans if self._images[span.view].kept is None]  # not those shown in part

    def records(
        self,
        prompt: Prompt,
        found: BranchOutput,
        config: BranchConfig,
        options: PerceptionConfig,
        *,
        work: float,
        seconds: float,
    ) -> list[PerceptionRecord]:
        """Return the output of branches as a record for each view of the prompt; `work` is that of the layers below."""
        assert self.backend.branches is not None
        again, close = self.backend.branches.further, found.further and config.inside_crops == "only"
        # a number of crops ends further looks, or else a gate
        most = None if again is None else again.config.crops
        further = again is not None and (options.gate != "off" if most is None else len(prompt.spans) < most)
        aligned, sparse = (options.positions or config.positions) == "aligned", options.sparse_crop is not None
        maps, records = dict(zip(self._searched(prompt, config, further=found.further), found.maps, strict=False)), []
        for span in prompt.spans:
            grid, seen = self.grid(span), maps.get(span)
            regions = seen.regions if seen is not None and found.zooms else []
            records.append(
                PerceptionRecord(
                    view=span.view,
                    score=found.score,
                    threshold=found.threshold,
                    heat=[] if seen is None else seen.heat.tolist(),
                    extent=grid.to_view(0, 0, grid.columns, grid.rows, view=span.view).corners,
                    cutoff=None if seen is None else seen.cutoff,
                    cells=[one[:4] for one in regions],
                    boxes=[grid.to_view(*one[:4], view=span.view).corners for one in regions],
                    foreground=[grid.to_view(*run, view=span.view).corners for run in runs(seen.foreground)]
                    if seen and sparse
                    else [],
                    fixed=options.box is not None or config.box is not None,
                    route="zoom" if regions else "direct",
                    reason=found.reason,
                    aligned=aligned and adapter_for(self._model.config).two_dimensional,
                    margin=config.margin,
                    further=further,
                    close=close,
                    prompt_tokens=len(prompt.ids),
                    visual_tokens=self._images[span.view].tokens,
                    token_layers=work + found.token_layers,
                    seconds=seconds,
                )
            )
        return records

    def place(self, view: str, *, source: str, cells: Cells) -> None:
        self.places[view] = (source, cells)

    def show_part(self, view: str, *, kept: Sequence[str]) -> None:
        if self._parts.get(view) != tuple(kept):
            self._parts[view] = tuple(kept)
            self._images.pop(view, None)
            self._grids.pop(view, None)

    def reply(self, messages: Sequence[Message], *, settings: SamplingParams, on_text: OnText | None = None) -> Reply:
        began = perf_counter()
        with torch.inference_mode(), closed_on_error([self]):
            request = GenerationRequest(self, self.prepare(messages), settings, on_text)
            prompt = request.ready.prompt
            cached = self.keep(prompt)
            logits, work = self.feed(prompt, request.ready.positions, cached)
            self.prompt_logits = logits[0]
            (turn,) = write_turns([request], logits, lambda ids, positions, _: self._forward(ids, positions))
            # the last token was not fed to the model
            self.held = Prompt((*prompt.ids, *turn.ids[:-1]), prompt.spans)
            turn = turn._replace(cached=cached, token_layers=work)
            return request.record(turn, seconds=perf_counter() - began)

    def prepare(self, messages: Sequence[Message]) -> Prepared:
        """Return ids and positions of a conversation; encode views that are new. Runs no decoder layer.

        Raises BackendError if it cannot be written for this model or is longer than the model can read.
        """
        views, new = view_ids(messages), self._new_views(messages)
        for view in new:
            self._images[view] = self._encoded(view)
        turns, rest = self._codec.tokenize(self._codec.render(messages), self._turns)
        ids = [token for turn in (*turns, rest) for token in turn.ids]
        prompt = self._codec.expand(ids, views, {view: seen.ids for view, seen in self._images.items()})
        # tokens of a view that is shown in part have the positions that they have in the whole view
        parts = any(self._images[view].kept is not None for view in views)
        every = {view: seen.whole or seen.ids for view, seen in self._images.items()}
        whole = self._codec.expand(ids, views, every) if parts else prompt
        positions = self._positions(whole)
        if parts:
            positions = positions[..., self._shown(whole)]
        visual_tokens = sum(self._images[view].tokens for view in new)
        ready = Prepared(prompt, positions, turns, rest, visual_tokens)
        if ready.next_position >= self.limit:
            visual = sum(span.stop - span.start for span in prompt.spans)
            raise BackendError(
                f"The conversation has {len(prompt.ids)} tokens, {visual} of them visual, and reaches position "
                f"{ready.next_position}; {TOO_LONG} {self.limit}. "
                + (
                    "Lower budget.coarse_tokens, budget.crop_max_tokens or budget.max_turns."
                    if visual > len(prompt.ids) - visual
                    else "Ask a shorter question, or lower budget.max_turns or generation.max_new_tokens."
                )
            )
        return ready

    def read_views(self, messages: Sequence[Message]) -> None:
        """Make the vision encoder's inputs of views that are new. `encode_read` encodes those of several sessions."""
        for view in self._new_views(messages):
            if view not in self._ahead:
                self._read[view] = self._codec.pixels(self.image(view))

    def _new_views(self, messages: Sequence[Message]) -> list[str]:
        return [view for view in dict.fromkeys(view_ids(messages)) if view not in self._images]

    def remember(self, ready: Prepared, ids: Sequence[int], text: str) -> None:
        """Keep the ids of an answer (without the end of the turn), so that its text is never tokenised again."""
        answer = self._codec.cut(ids, text)
        self._turns = [*ready.turns, EncodedTurn(ready.rest.text + text, (*ready.rest.ids, *answer))]

    def key(self, prompt: Prompt) -> Hashable:
        """Return a key that is equal for prompts, of any sessions, that are the same input to the model."""
        shown = tuple((span.start, id(self._images[span.view])) for span in prompt.spans)
        return prompt.ids, shown, tuple(self.places.items()), None if self.prefill is None else id(self)

    def keep(self, prompt: Prompt) -> int:
        """Crop the cache, or the unfinished prefill, to the ids that it shares with `prompt`, or to fewer where states
        have to go back further; return their number.
        """
        if self.prefill is not None and prompt == self.held:
            return len(prompt.ids)  # the upper layers are still to come, so even the last id need not be run again
        shared = prompt.shared(self.held)
        if self.prefill is not None:
            shared = self.prefill.keep(shared)
        else:
            shared = self._snapshots.crop(self.cache, shared, surplus=len(self.held.ids) - shared)
            if not shared:
                self._forget()
        self.held = self.held.head(shared)
        return shared

    def feed(self, prompt: Prompt, positions: Tensor, start: int) -> tuple[Tensor, float]:
        """Run the decoder on prompt.ids[start:], which the cache lacks.

        Returns logits after the last id, (1, vocabulary), and the work in token-layers.
        """
        if self.prefill is not None:
            return self._finish(self.prefill, prompt, positions, start)
        images = [span for span in prompt.spans if span.start >= start]
        edges = [start, *(span.stop for span in images[:-1]), len(prompt.ids)]
        logits = torch.empty(0)
        for at, (begin, end) in enumerate(pairwise(edges)):
            ids = torch.tensor([prompt.ids[begin:end]], device=self._model.device)
            features = self._images[images[at].view].features if images else None
            logits = self._forward(ids, positions[..., begin:end], features, prompt.ids[:end])
        self._snapshots.take(self.cache, len(prompt.ids))
        return logits, (len(prompt.ids) - start) * self._model.config.get_text_config().num_hidden_layers

    def _finish(self, prefill: Prefill, prompt: Prompt, positions: Tensor, start: int) -> tuple[Tensor, float]:
        """Finish the prefill that a look left, with the ids from `start` on added to it."""
        decoder, work = prefill.decoder, self._extend(prefill, prompt, positions, start)
        hidden = cast(Tensor, prefill.hidden)
        logits, more = prefill.finish(decoder.rotary(hidden, positions), lean=self.lean)
        self.prefill, self.cache = None, prefill.cache
        self._snapshots.take(self.cache, len(prompt.ids))
        return logits, work + more

    def _extend(self, prefill: Prefill, prompt: Prompt, positions: Tensor, start: int) -> float:
        """Run the lower layers on the ids from `start` on; return the work in token-layers."""
        if start == len(prompt.ids):
            return 0.0
        ids = torch.tensor([prompt.ids[start:]], device=self._model.device)
        new = prefill.decoder.embed(ids, self.features(prompt, start))
        return float(prefill.extend(new, prefill.decoder.rotary(new.hidden, positions[..., start:])))

    def features(self, prompt: Prompt, start: int) -> list[ModelOutput]:
        """Return the features of the views in prompt.ids[start:], in order."""
        return [self._images[span.view].features for span in prompt.spans if span.start >= start]

    def grids(self, prompt: Prompt) -> list[tuple[int, int, int]]:
        """Return for each view of a prompt the index of its first visual token, and the rows and columns of its map."""
        shapes = [self.grid(span) for span in prompt.spans]
        return [(at, grid.rows, grid.columns) for at, grid in zip(self._visual_starts(prompt), shapes, strict=True)]

    def grid(self, span: ImageSpan) -> Grid:
        """Return the token grid of a view of a prompt."""
        if span.view not in self._grids:  # the pixels are copied, and padded to a square where the family needs it
            seen, image = self._images[span.view], self.image(span.view)
            given = fit(image, self._codec.processor, self._codec.config)
            self._grids[span.view] = grid_of(
                self._model, Size(*image.size), seen.grid, seen.tokens, given=Size(*given.size)
            )
        return self._grids[span.view]

    def _visual_starts(self, prompt: Prompt) -> list[int]:
        """Return the index of the first visual token of each image: its ids may begin with a marker."""
        return [prompt.ids.index(self._codec.image_id, span.start) for span in prompt.spans]

    def _forward(
        self, ids: Tensor, positions: Tensor, features: ModelOutput | None = None, so_far: Sequence[int] = ()
    ) -> Tensor:
        more: dict[str, Any] = {}
        if self._sees_forwards and features is not None:
            # the stock mask reads them by position, from the start of the conversation
            types = torch.tensor([so_far], device=ids.device) == self._codec.image_id
            more["mm_token_type_ids"] = types.int()
        return forward(self._model, ids, positions=positions, cache=self.cache, features=features, **more)

    def digest(self, view: str) -> str:
        """Return the digest of a view's pixels."""
        if view not in self._digests:
            self._digests[view] = digest(self.image(view))
        return self._digests[view]

    def _encoded(self, view: str) -> EncodedView:
        """Return what is shown of a view, encoded, from the pool if any session has shown the view before."""
        if self._pool is None:
            whole = self._ahead.pop(view, None) or self._encode(view)
        else:
            name = self.digest(view)
            if name not in self._pool:
                self._pool[name] = self._encode(view)
            whole = self._pool[name]
        return whole.part(self._parts[view], self._model.config) if view in self._parts else whole

    def _encode(self, view: str) -> EncodedView:
        if self._encodes:
            return encode_views(self.backend, {view: self.image(view)})[view]
        ids, inputs = self._codec.pixels(self.image(view))
        return EncodedView(ids, ids.count(self._codec.image_id), patch_grid(inputs), NO_FEATURES)

    def _positions(self, prompt: Prompt) -> Tensor:
        if self._rope_index is None:
            return torch.arange(len(prompt.ids), device=self._model.device).unsqueeze(0)
        grids = [grid for span in prompt.spans if (grid := self._images[span.view].grid) is not None]
        ids = torch.tensor([prompt.ids])
        positions: Tensor = self._rope_index(
            input_ids=ids,
            mm_token_type_ids=(ids == self._codec.image_id).int(),
            image_grid_thw=torch.cat(grids) if grids else None,
        )[0]
        # placed crops get the positions of the place that they were cut from
        starts = dict(zip((span.view for span in prompt.spans), self._visual_starts(prompt), strict=True))
        for view, (source, cells) in self.places.items():
            if view in starts and source in starts:
                grid, start = self._images[view].grid, starts[view]
                assert grid is not None  # a family that places images in two dimensions
                rows, columns = merged(self._model.config, grid)
                crop = (start, start + rows * columns)
                positions = align(positions, source=starts[source], crop=crop, grid=(rows, columns), cells=cells)
        return positions.to(self._model.device)

    def _shown(self, whole: Prompt) -> list[int]:
        """Return the indices of the ids that are shown in a prompt with all tokens of its views."""
        shown, left = list(range(len(whole.ids))), 0
        for span in whole.spans:
            if (kept := self._images[span.view].kept) is not None:
                shown[span.start - left : span.stop - left] = [span.start + at for at in kept]
                left += span.stop - span.start - len(kept)
        return shown


def encode_views(backend: "HFBackend", images: Mapping[str, Image.Image]) -> dict[str, EncodedView]:
    """Encode views together, as many at a time as `_PATCHES` allows; return them by the names they are given under."""
    return _encode(backend, ((name, *backend.codec.pixels(image)) for name, image in images.items()))


def encode_read(sessions: Sequence[HFSession]) -> None:
    """Encode the views that sessions of one backend have read, together."""
    views = [((at, view), *inputs) for at, one in enumerate(sessions) for view, inputs in one._read.items()]
    for (at, view), encoded in _encode(sessions[0].backend, views).items():
        sessions[at]._ahead[view] = encoded
    for one in sessions:
        one._read = {}


def _encode(
    backend: "HFBackend", views: Iterable[tuple[_Name, tuple[int, ...], dict[str, Tensor]]]
) -> dict[_Name, EncodedView]:
    """Encode views (name, ids, inputs of the vision encoder), as many at a time as `_PATCHES` allows."""
    encoded: dict[_Name, EncodedView] = {}
    batch: list[tuple[_Name, tuple[int, ...], dict[str, Tensor]]] = []
    for one in views:
        batch.append(one)
        # families without a grid for each image are encoded one by one
        alone = "image_grid_thw" not in batch[0][2]
        if alone or sum(len(inputs["pixel_values"]) for *_, inputs in batch) >= _PATCHES:
            encoded |= _encode_batch(backend, batch)
            batch = []
    return encoded | (_encode_batch(backend, batch) if batch else {})


def _encode_batch(
    backend: "HFBackend", batch: Sequence[tuple[_Name, tuple[int, ...], dict[str, Tensor]]]
) -> dict[_Name, EncodedView]:
    model: Any = backend.model
    # patches of all images in one sequence; the grids tell the tower where each ends
    joined = {key: torch.cat([inputs[key] for *_, inputs in batch]) for key in batch[0][2]}
    placed = {
        key: value.to(model.device, model.dtype if value.is_floating_point() else value.dtype)
        for key, value in joined.items()
    }
    image_id = backend.codec.image_id
    if backend.branches is not None and model.config.model_type in TILED:
        features: Any = base_view(model, placed["pixel_values"])
        tokens = len(features.pooler_output[0])
        return {batch[0][0]: EncodedView((image_id,) * tokens, tokens, None, features)}
    features = image_features(model, placed)
    levels = getattr(features, "deepstack_features", None)
    encoded = {}
    for at, (name, ids, inputs) in enumerate(batch):
        # `forward` reads only these two; the rest (every layer of the tower, for LLaVA) would stay in memory
        stacks = {} if levels is None else {"deepstack_features": [(level[at],) for level in levels]}
        # an image that is encoded by itself keeps the form that its family's `forward` takes
        pooled = features.pooler_output if len(batch) == 1 else (features.pooler_output[at],)
        own = type(features)(pooler_output=pooled, **stacks)
        encoded[name] = EncodedView(ids, ids.count(image_id), patch_grid(inputs), own)
    return encoded


@contextmanager
def closed_on_error(sessions: Sequence[HFSession]) -> Iterator[None]:
    """Close the sessions if the block fails or is interrupted: their caches may be half written, so they start anew."""
    try:
        yield
    except BaseException as error:
        held = max((len(session.held.ids) for session in sessions), default=0)
        for session in sessions:
            session.close()
        if not isinstance(error, torch.OutOfMemoryError):
            raise
        raise BackendError(
            f"The accelerator ran out of memory with {held} tokens in the cache ({error}). "
            "Lower budget.coarse_tokens or budget.crop_max_tokens, or use a smaller model or batch."
        ) from error
