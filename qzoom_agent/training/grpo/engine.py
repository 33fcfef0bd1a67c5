"""Turns of many conversations as one batch; what they have in common is computed once.

Rollouts of one question begin with the same tokens and the same image. So a view is encoded once, whichever episodes
show it (by digest, crops included); prompts that are equal are prefilled once and their keys and values copied; and
what a conversation has behind it stays in the cache for its next turn, as in an `HFSession`. TRL's own loop has none
of the three: every turn of every rollout encodes all images and the whole conversation anew.

Rows are padded on the left and one mask says what is real, as in `backends.hf_rows`. Between two turns the cache is
packed: what a row has to keep is gathered to its right end, so holes never outlive a turn. Each row has random numbers
of its own, so a turn does not depend on which others it is computed with.
"""

from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final, Literal, NamedTuple

import torch
from PIL import Image
from torch import Tensor
from transformers import DynamicCache
from transformers.utils.generic import ModelOutput

from qzoom_agent.errors import BackendError
from qzoom_agent.images import digest
from qzoom_agent.models.hf import HFBackend
from qzoom_agent.models.hf_rows import causal_mask, padded
from qzoom_agent.models.hf_session import EncodedView, HFSession, Prepared
from qzoom_agent.models.interface import ImageSource, SamplingParams
from qzoom_agent.models.prompts import Prompt
from qzoom_agent.models.sampling import TextStream
from qzoom_agent.perception.decoder import Decoder, Embedded

_PATCHES: Final = 2**16
"""Patches that are encoded together, about."""
NOTHING_SEEN: Any = ModelOutput
"""Stands for the features of a view that was not encoded: any use of it fails."""


class SharedSession(HFSession):
    """A session that takes a view from `seen`, by digest, if anybody has shown it before."""

    def __init__(
        self, backend: HFBackend, image: ImageSource, seen: dict[str, EncodedView], *, encode: bool = True
    ) -> None:
        """
        Args:
            encode: False leaves out the vision encoder, for who only needs ids and positions.
        """
        super().__init__(backend.model, backend.codec, image, end_ids=backend.end_ids)
        self._seen = seen
        self._encodes = encode
        self._digests: dict[str, str] = {}
        self.pixels = image

    def name(self, view: str) -> str:
        """The digest of a view."""
        if view not in self._digests:
            self._digests[view] = digest(self._image(view))
        return self._digests[view]

    def encode(self, view: str) -> EncodedView:
        name = self.name(view)
        if name not in self._seen:
            self._seen[name] = super().encode(view) if self._encodes else self._unseen(self._image(view))
        return self._seen[name]

    def _unseen(self, image: Image.Image) -> EncodedView:
        ids, inputs = self._codec.pixels(image)
        tokens = sum(token == self._codec.image_id for token in ids)
        return EncodedView(ids, tokens, inputs.get("image_grid_thw"), NOTHING_SEEN)

    def key(self, prompt: Prompt) -> Hashable:
        """Equal for prompts of any sessions that are the same to the model."""
        return prompt.ids, tuple((span.start, self._digests[span.view]) for span in prompt.spans)


def encode_together(backend: HFBackend, images: Mapping[str, Image.Image]) -> dict[str, EncodedView]:
    """Views through the vision encoder, as many at a time as `_PATCHES` allows; by the names they are given under."""
    encoded: dict[str, EncodedView] = {}
    lot: list[tuple[str, tuple[int, ...], dict[str, Tensor]]] = []
    for at, (name, image) in enumerate(images.items(), start=1):
        lot.append((name, *backend.codec.pixels(image)))
        if at == len(images) or sum(len(inputs["pixel_values"]) for _, _, inputs in lot) >= _PATCHES:
            encoded |= _encode(backend, lot)
            lot = []
    return encoded


def _encode(
    backend: HFBackend, lot: Sequence[tuple[str, tuple[int, ...], dict[str, Tensor]]]
) -> dict[str, EncodedView]:
    model: Any = backend.model
    pixels = torch.cat([inputs["pixel_values"] for _, _, inputs in lot]).to(model.device, model.dtype)
    grids = torch.cat([inputs["image_grid_thw"] for _, _, inputs in lot]).to(model.device)
    features = model.get_image_features(pixel_values=pixels, image_grid_thw=grids, return_dict=True)
    levels = getattr(features, "deepstack_features", None)
    found = {}
    for at, (name, ids, inputs) in enumerate(lot):
        stacks = {} if levels is None else {"deepstack_features": [(level[at],) for level in levels]}
        own = type(features)(pooler_output=(features.pooler_output[at],), **stacks)
        tokens = sum(token == backend.codec.image_id for token in ids)
        found[name] = EncodedView(ids, tokens, inputs["image_grid_thw"], own)
    return found


@dataclass(frozen=True, slots=True)
class GenerationRequest:
    """A turn that somebody waits for."""

    session: SharedSession
    ready: Prepared
    settings: SamplingParams
    stop: tuple[str, ...]


class GeneratedTurn(NamedTuple):
    """A turn as it was sampled."""

    ids: tuple[int, ...]
    """Every sampled id, the end-of-turn id included."""
    logps: tuple[float, ...]
    """Their log-probabilities at the temperature of sampling, among all ids."""
    text: str
    """Without the end of the turn; up to and including a stop string."""
    finish: Literal["stop", "length"]
    cached: int
    """Ids of the prompt whose keys and values were there already."""


class SharedDecoder:
    """Writes turns for wishes. Holds the caches of the conversations it has written for; `clear` forgets them."""

    def __init__(self, backend: HFBackend) -> None:
        """Raises BackendError for an attention kernel that takes no mask."""
        kernel = backend.model.config.get_text_config()._attn_implementation
        if kernel not in ("sdpa", "eager"):
            raise BackendError(
                f"Shared rollouts need a mask for each row, which the attention kernel '{kernel}' does not take. "
                "Load the model with sdpa, or set rollouts.by to 'generate'."
            )
        self._backend = backend
        self._decoder = Decoder(backend.model)
        self.clear()

    def clear(self) -> None:
        """Forget all conversations."""
        self._cache = DynamicCache(config=self._backend.model.config)
        self._valid = torch.zeros(0, 0, dtype=torch.bool)
        self._held: dict[SharedSession, tuple[int, Prompt]] = {}

    @torch.no_grad()
    def __call__(self, wishes: Sequence[GenerationRequest]) -> list[GeneratedTurn]:
        """One turn for each wish. A session is asked for one turn at a time."""
        if not wishes:  # no conversation of the batch can go on
            return []
        keys = [wish.session.key(wish.ready.prompt) for wish in wishes]
        first: dict[Hashable, int] = {}
        for at, key in enumerate(keys):
            first.setdefault(key, at)
        places = {key: place for place, key in enumerate(first)}
        chosen = [wishes[at] for at in first.values()]
        sessions, ready = [one.session for one in chosen], [one.ready for one in chosen]
        shared = [self._shared(wish) for wish in chosen]
        cache, valid = self._recall(sessions, shared)
        new, positions, fresh = padded(self._backend, sessions, ready, shared)
        valid = torch.cat((valid, fresh), dim=1)
        logits = self._run(new, positions, valid, cache)
        if len(chosen) < len(wishes):
            rows = torch.tensor([places[key] for key in keys], device=logits.device)
            cache, valid, logits = _taken(cache, rows, self._backend), valid[rows], logits[rows]
        written, valid = self._write(wishes, logits, cache, valid)
        self._cache, self._valid = cache, valid
        self._held = {
            wish.session: (row, Prompt((*wish.ready.prompt.ids, *one.ids[:-1]), wish.ready.prompt.spans))
            for row, (wish, one) in enumerate(zip(wishes, written, strict=True))
        }
        cached = {key: shared[place] for key, place in places.items()}
        return [one._replace(cached=cached[key]) for one, key in zip(written, keys, strict=True)]

    def _shared(self, wish: GenerationRequest) -> int:
        held = self._held.get(wish.session)
        return 0 if held is None else wish.ready.prompt.shared(held[1])

    def _recall(self, sessions: Sequence[SharedSession], shared: Sequence[int]) -> tuple[DynamicCache, Tensor]:
        """The beginnings of some conversations as a packed cache, and (rows, tokens) bool: which tokens are real."""
        backend, longest = self._backend, max(shared)
        device = backend.model.device
        cache = DynamicCache(config=backend.model.config)
        valid = torch.zeros(len(shared), longest, dtype=torch.bool, device=device)
        if not longest:
            return cache, valid
        columns = torch.zeros(len(shared), longest, dtype=torch.long, device=device)
        slots = torch.zeros(len(shared), dtype=torch.long, device=device)
        for row, (session, count) in enumerate(zip(sessions, shared, strict=True)):
            if count:
                slots[row] = slot = self._held[session][0]
                columns[row, longest - count :] = self._valid[slot].nonzero()[:count, 0]
                valid[row, longest - count :] = True
        for index, layer in enumerate(self._cache.layers):
            kept: Any = layer
            cache.update(_gathered(kept.keys, slots, columns), _gathered(kept.values, slots, columns), index)
        return cache, valid

    def _run(self, new: Embedded, positions: Tensor, valid: Tensor, cache: DynamicCache) -> Tensor:
        """Logits (rows, vocabulary) after the last of the new tokens."""
        decoder = self._decoder
        out = decoder.run(
            new.hidden,
            range(decoder.depth),
            rotary=decoder.rotary(new.hidden, positions),
            mask=causal_mask(valid, new.hidden.shape[1], new.hidden),
            cache=cache,
            visual=new.visual,
            deepstack=new.deepstack,
        )
        return decoder.logits(out)

    def _write(
        self, wishes: Sequence[GenerationRequest], logits: Tensor, cache: DynamicCache, valid: Tensor
    ) -> tuple[list[GeneratedTurn], Tensor]:
        """Sample until every row has ended or is full; what was written, and which cached tokens are real by then."""
        codec, device = self._backend.codec, logits.device
        rows = range(len(wishes))
        limits = [wish.settings.max_new_tokens for wish in wishes]
        chances = torch.stack([_chances(wish.settings, max(limits)) for wish in wishes]).to(device)
        streams = [TextStream(codec.decode, wish.stop, None) for wish in wishes]
        ids: list[list[int]] = [[] for _ in rows]
        logps: list[list[float]] = [[] for _ in rows]
        done, stopped = [False for _ in rows], [False for _ in rows]
        place = torch.tensor([wish.ready.next_position for wish in wishes], device=device)
        forbidden = torch.tensor(codec.forbidden, dtype=torch.long, device=device)
        settings = wishes[0].settings
        for step in range(max(limits)):
            tokens, chosen = draw(logits, chances[:, step], settings=settings, forbidden=forbidden)
            for row, token, logp in zip(rows, tokens.tolist(), chosen.tolist(), strict=True):
                if done[row]:
                    continue
                ids[row].append(token)
                logps[row].append(logp)
                ends = token in self._backend.end_ids
                stopped[row] = ends or streams[row].push(token)
                done[row] = stopped[row] or len(ids[row]) == limits[row]
                if ends or (done[row] and not stopped[row]):
                    streams[row].finish()
            if all(done):
                break
            going = torch.tensor([not one for one in done], device=device)
            valid = torch.cat((valid, going[:, None]), dim=1)
            hidden = self._decoder.text.embed_tokens(tokens[:, None])
            where = (place + step)[:, None]
            placed = where.expand(3, -1, -1) if self._decoder.adapter.two_dimensional else where
            one = Embedded(hidden, torch.zeros_like(tokens[:, None], dtype=torch.bool), [])
            logits = self._run(one, placed, valid, cache)
        return [
            GeneratedTurn(
                tuple(ids[row]), tuple(logps[row]), streams[row].text, "stop" if stopped[row] else "length", 0
            )
            for row in rows
        ], valid


def draw(logits: Tensor, chance: Tensor, *, settings: SamplingParams, forbidden: Tensor) -> tuple[Tensor, Tensor]:
    """A token for each row of logits (rows, vocabulary), and its log-probability among all ids.

    Args:
        chance: (rows,) numbers in [0, 1): the token is where the row's probabilities, added up, pass this share.
        forbidden: ids that are never taken.
    """
    scaled = logits.float() / (settings.temperature or 1.0)
    open_ = scaled.index_fill(1, forbidden, -torch.inf)
    if settings.temperature == 0:
        tokens = open_.argmax(dim=1)
    else:
        weights = torch.softmax(open_, dim=1)
        if settings.top_p < 1:
            ordered, order = weights.sort(dim=1, descending=True)
            # A token is kept if those before it do not yet hold top_p: the likeliest one always is.
            ordered = ordered * (ordered.cumsum(1) - ordered < settings.top_p)
            weights = torch.zeros_like(weights).scatter(1, order, ordered)
        passed = weights.cumsum(1)
        at = torch.searchsorted(passed, chance[:, None] * passed[:, -1:], right=True)
        tokens = at[:, 0].clamp(max=logits.shape[1] - 1)
    return tokens, torch.log_softmax(scaled, dim=1).gather(1, tokens[:, None])[:, 0]


def _chances(settings: SamplingParams, count: int) -> Tensor:
    return torch.rand(count, generator=torch.Generator().manual_seed(settings.seed))


def _gathered(held: Tensor, slots: Tensor, columns: Tensor) -> Tensor:
    """Some columns (rows, tokens) of some rows of (rows, heads, tokens, width)."""
    rows = held[slots]
    return rows.gather(2, columns[:, None, :, None].expand(-1, rows.shape[1], -1, rows.shape[3]))


def _taken(cache: DynamicCache, rows: Tensor, backend: HFBackend) -> DynamicCache:
    """A cache of these rows."""
    taken = DynamicCache(config=backend.model.config)
    for index, layer in enumerate(cache.layers):
        kept: Any = layer
        taken.update(kept.keys[rows], kept.values[rows], index)
    return taken
