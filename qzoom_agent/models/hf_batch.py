"""Many conversations at once on one device: looks, prefill and generation of `HFSession`s as rows of a batch.

Between calls each session owns its own unpadded cache, as when it runs alone. A call stacks these caches, padded on the
left so that the last token of every row is in the last column, and afterwards hands each row back:

    [padding | tokens the cache holds | padding | new tokens | written tokens]

One mask says which columns are real, and positions are passed explicitly, so padding costs time and changes nothing:
every row gets the answer of its session alone (tests/models/test_hf_batch.py). Prompts that are equal, and show the
same encoded views, are prefilled once. Recurrent states (Qwen3.5) do not pass over padding unchanged, so such models
look and prefill one row at a time; their rows generate together.

Shapes: ids (rows, tokens); positions (3, rows, tokens) for MRoPE families, else (rows, tokens); hidden states (rows,
tokens, hidden); keys and values (rows, heads, tokens, width); valid (rows, columns) bool: True for real tokens.
"""

from collections.abc import Hashable, Iterator, Sequence
from contextlib import contextmanager
from time import perf_counter
from typing import Any, NamedTuple, Unpack, cast

import torch
from torch import Tensor
from torch.nn.functional import pad
from torch.nn.utils.rnn import pad_sequence
from transformers import DynamicCache

from qzoom_agent.errors import BackendError
from qzoom_agent.messages import Message
from qzoom_agent.models.hf import MASKED_KERNELS, HFBackend
from qzoom_agent.models.hf_generation import GeneratedTurn, GenerationRequest, Prepared, write_turns
from qzoom_agent.models.hf_session import HFSession, closed_on_error
from qzoom_agent.models.interface import LookOptions, Reply
from qzoom_agent.models.prompts import Prompt
from qzoom_agent.perception.caches import copied, joined, recurrent
from qzoom_agent.perception.decoder import Decoder, Embedded, Prefill, Rotaries
from qzoom_agent.perception.look import look
from qzoom_agent.perception.masks import Masks, layer_masks
from qzoom_agent.trace import PerceptionRecord


class _Rows(NamedTuple):
    """Prefilled rows, ready to generate."""

    cache: DynamicCache
    valid: Tensor
    logits: Tensor
    """(rows, vocabulary) after the last token of each prompt."""
    cached: list[int]
    token_layers: list[float]


class BatchEngine:
    """Runs sessions of one backend as batches. Holds nothing between calls; not for several threads at once."""

    def __init__(self, backend: HFBackend) -> None:
        """Raises BackendError for a kernel that takes no mask, or a family that is not run layer by layer."""
        kernel = backend.model.config.get_text_config()._attn_implementation
        if kernel not in MASKED_KERNELS:
            raise BackendError(
                f"A batch needs a mask for each row, which the attention kernel '{kernel}' does not take. "
                "Load the model with attn_implementation='sdpa'."
            )
        self._backend = backend
        try:
            self._decoder = Decoder(backend.model)
        except BackendError as error:
            raise BackendError(
                f"The model '{backend.name}' answers one question at a time: a batch is run layer by layer, as a look "
                f"is. Leave workers out, or set it to 1. ({error})"
            ) from error

    @torch.no_grad()
    def look(
        self,
        sessions: Sequence[HFSession],
        conversations: Sequence[Sequence[Message]],
        *,
        prepared: Sequence[Prepared | None] | None = None,
        **how: Unpack[LookOptions],
    ) -> list[list[PerceptionRecord]]:
        """Run `HFSession.look` on many sessions; `seconds` of a record is the row's share of the batch.

        `prepared` holds the conversations as `HFSession.prepare` returned them, if it was called.
        """
        if self._decoder.recurrent:
            return [session.look(talk, **how) for session, talk in zip(sessions, conversations, strict=True)]
        began, options, further = perf_counter(), how["options"], how.get("further", False)
        with closed_on_error(sessions):
            found_ready = [
                one.prepare_look(talk, further=further, ready=each)
                for one, talk, each in zip(sessions, conversations, prepared or [None] * len(sessions), strict=True)
            ]
            ready, branches = [one for one, _ in found_ready], found_ready[0][1]
            k = branches.config.k
            held = [
                session.resume_look(one.prompt, self._decoder, k)[0]
                for session, one in zip(sessions, ready, strict=True)
            ]
            self._extend(sessions, ready, held)
            hidden, valid, rotary = self._states(sessions, ready)
            starts = [hidden.shape[1] - len(one.prompt.ids) for one in ready]
            found = look(
                branches,
                self._decoder.adapter,
                hidden,
                rotary=rotary,
                mask=self._masks(valid, hidden, ready),
                images=[
                    # columns of the padded batch
                    [
                        (start + at, rows, columns)
                        for at, rows, columns in session.searched(one.prompt, branches.config, further=further)
                    ]
                    for session, one, start in zip(sessions, ready, starts, strict=True)
                ],
                starts=starts,
                **how,
            )
            for session, one in zip(sessions, ready, strict=True):
                session.held, session.lean = one.prompt, options.lean
        seconds = (perf_counter() - began) / len(ready)
        work = [float(k * (len(one.prompt.ids) - count)) for one, count in zip(ready, held, strict=True)]
        return [
            session.records(one.prompt, each, branches.config, options, work=done, seconds=seconds)
            for session, one, each, done in zip(sessions, ready, found, work, strict=True)
        ]

    def _extend(self, sessions: Sequence[HFSession], ready: Sequence[Prepared], held: Sequence[int]) -> None:
        """Run the lower layers on the ids that each session's unfinished prefill lacks behind the first `held`."""
        more = [row for row, one in enumerate(ready) if len(one.prompt.ids) > held[row]]
        if not more:
            return
        prefills = [cast(Prefill, sessions[row].prefill) for row in more]
        lower, prompts = range(prefills[0].k), [ready[row] for row in more]
        caches = [one.cache for one in prefills]
        states, cache, valid = self._run(
            [sessions[row] for row in more], prompts, [held[row] for row in more], caches, lower
        )
        for at, (row, own) in enumerate(zip(more, self._split(cache, valid, lower), strict=True)):
            before, new = prefills[at].hidden, states[at : at + 1, held[row] - len(prompts[at].prompt.ids) :]
            prefills[at].cache = own
            prefills[at].hidden = new if before is None else torch.cat((before, new), dim=1)
            prefills[at].visual = self._visual([prompts[at]])

    def _states(self, sessions: Sequence[HFSession], ready: Sequence[Prepared]) -> tuple[Tensor, Tensor, Rotaries]:
        """Return the states of unfinished prefills, padded on the left, their valid columns and rotary embeddings."""
        hidden = _left_padded([cast(Tensor, cast(Prefill, one.prefill).hidden) for one in sessions])
        positions, valid = _placed([one.positions for one in ready])
        return hidden, valid, self._decoder.rotary(hidden, positions)

    def reply(self, requests: Sequence[GenerationRequest]) -> list[Reply]:
        """Run `HFSession.reply` on many sessions; `seconds` of a reply is the row's share of the batch."""
        began = perf_counter()
        turns = self.generate(requests)
        seconds = (perf_counter() - began) / max(1, len(turns))
        return [request.record(turn, seconds=seconds) for request, turn in zip(requests, turns, strict=True)]

    @torch.no_grad()
    def generate(self, requests: Sequence[GenerationRequest]) -> list[GeneratedTurn]:
        """Generate one turn for each request. Their sessions are different, their temperature and top_p the same.

        The sessions hold the new caches afterwards. They do not know the turns yet: see `GenerationRequest.record`.
        """
        if not requests:
            return []
        with closed_on_error([one.session for one in requests]):
            keys = [one.session.key(one.ready.prompt) for one in requests]
            first = dict[Hashable, GenerationRequest]()
            for key, request in zip(keys, requests, strict=True):
                first.setdefault(key, request)
            # unfinished prefills last: they are completed as a group of their own, behind the rows of the other one
            order = sorted(first, key=lambda key: first[key].session.prefill is not None)
            rows = self._prefill([first[key] for key in order])
            places = [order.index(key) for key in keys]
            if places != list(range(len(rows.cached))):
                # one row for each request: rows of equal prompts are copied, because each writes its own turn
                rows = self._taken(rows, places)
            valid = rows.valid

            def forward(ids: Tensor, positions: Tensor, going: Tensor) -> Tensor:
                # rows that have ended are fed on, to keep the batch rectangular, but their columns count as padding
                nonlocal valid
                valid = torch.cat((valid, going[:, None]), dim=1)
                with _frozen(rows.cache, going):
                    return self._step(self._decoder.embed(ids, []), positions, valid, rows.cache)

            turns = write_turns(requests, rows.logits, forward)
            for request, turn, own in zip(
                requests, turns, self._split(rows.cache, valid, range(self._decoder.depth)), strict=True
            ):
                session, prompt = request.session, request.ready.prompt
                session.cache, session.prefill = own, None
                # the last sampled token was never fed to the model
                session.held = Prompt((*prompt.ids, *turn.ids[:-1]), prompt.spans)
            return [
                turn._replace(cached=cached, token_layers=work)
                for turn, cached, work in zip(turns, rows.cached, rows.token_layers, strict=True)
            ]

    def _prefill(self, requests: Sequence[GenerationRequest]) -> _Rows:
        """Prefill the prompts; those of sessions with an unfinished prefill stand behind the others."""
        if self._decoder.recurrent:
            return self._one_by_one(requests)
        fresh = [one for one in requests if one.session.prefill is None]
        looked = requests[len(fresh) :]
        if not fresh or not looked:
            return self._upper_layers(looked) if looked else self._all_layers(fresh)
        one, other = self._all_layers(fresh), self._upper_layers(looked)
        every = range(self._decoder.depth)
        own = [*self._split(one.cache, one.valid, every), *self._split(other.cache, other.valid, every)]
        logits, cached = torch.cat((one.logits, other.logits)), one.cached + other.cached
        return _Rows(*self._stack(own, every), logits, cached, one.token_layers + other.token_layers)

    def _one_by_one(self, requests: Sequence[GenerationRequest]) -> _Rows:
        """Prefill the prompts as their sessions do."""
        caches, logits, cached, token_layers = [], [], [], []
        for session, ready in ((one.session, one.ready) for one in requests):
            with torch.inference_mode():  # as in a session, whose states are updated in place
                cached.append(session.keep(ready.prompt))
                last, work = session.feed(ready.prompt, ready.positions, cached[-1])
            logits.append(last)
            token_layers.append(work)
            caches.append(session.cache)
            session.cache = self._decoder.cache()
        return _Rows(*self._stack(caches, range(self._decoder.depth)), torch.cat(logits), cached, token_layers)

    def _all_layers(self, requests: Sequence[GenerationRequest]) -> _Rows:
        """Run all layers on what the sessions' caches lack."""
        sessions, ready = [one.session for one in requests], [one.ready for one in requests]
        shared, layers = [one.session.keep(one.ready.prompt) for one in requests], range(self._decoder.depth)
        hidden, cache, valid = self._run(sessions, ready, shared, [one.cache for one in sessions], layers)
        work = [float((len(one.prompt.ids) - held) * len(layers)) for one, held in zip(ready, shared, strict=True)]
        return _Rows(cache, valid, self._decoder.logits(hidden), shared, work)

    def _upper_layers(self, requests: Sequence[GenerationRequest]) -> _Rows:
        """Complete prefills that a look left after K layers: new tokens through these, then all through the others."""
        decoder = self._decoder
        sessions, ready = [one.session for one in requests], [one.ready for one in requests]
        shared = [one.keep(each.prompt) for one, each in zip(sessions, ready, strict=True)]
        self._extend(sessions, ready, shared)
        # rows with and without new tokens differ in length: padded anew, each ends with its last token
        prefills = [cast(Prefill, one.prefill) for one in sessions]
        k = prefills[0].k
        cache, _ = self._stack([one.cache for one in prefills], range(k))
        hidden, valid, rotary = self._states(sessions, ready)
        for session in sessions:
            session.prefill = None  # the row is in the batch now
        lean, mask = all(one.lean for one in sessions), self._masks(valid, hidden, ready)
        logits, upper = decoder.finish(hidden, k, rotary=rotary, mask=mask, cache=cache, lean=lean)
        lengths = [len(one.prompt.ids) for one in ready]
        work = [float(k * (n - held) + upper * n) for n, held in zip(lengths, shared, strict=True)]
        return _Rows(cache, valid, logits, shared, work)

    def _run(
        self,
        sessions: Sequence[HFSession],
        ready: Sequence[Prepared],
        starts: Sequence[int],
        caches: list[DynamicCache],
        layers: range,
    ) -> tuple[Tensor, DynamicCache, Tensor]:
        """Run layers on each row's ids from its start on, behind the caches, which hold those before it.

        Returns:
            The states of the new ids, the stacked cache and its valid columns.
        """
        cache, held = self._stack(caches, layers, starts)
        # the rows are in the batch now: never two copies of a cache while the layers run
        caches.clear()
        for session in sessions:
            session.cache = self._decoder.cache()
        new, positions, real = padded(sessions, ready, starts)
        valid = torch.cat((held, real), dim=1)
        mask = layer_masks(self._backend.model.config, valid, new.hidden, visual=new.visual)
        rotary = self._decoder.rotary(new.hidden, positions)
        return self._decoder.run(new, layers, rotary=rotary, mask=mask, cache=cache), cache, valid

    def _step(self, new: Embedded, positions: Tensor, valid: Tensor, cache: DynamicCache) -> Tensor:
        """Run all layers on new tokens, the last columns of `valid`; return logits (rows, vocabulary)."""
        decoder = self._decoder
        rotary, mask = decoder.rotary(new.hidden, positions), layer_masks(decoder.model.config, valid, new.hidden)
        return decoder.logits(decoder.run(new, range(decoder.depth), rotary=rotary, mask=mask, cache=cache))

    def _visual(self, ready: Sequence[Prepared]) -> Tensor:
        """Return the visual tokens of prompts, (rows, tokens) bool, padded on the left."""
        ids = [torch.tensor(one.prompt.ids, device=self._backend.model.device) for one in ready]
        image = self._backend.codec.image_id
        return pad_sequence([one == image for one in ids], batch_first=True, padding_side="left")

    def _masks(self, valid: Tensor, hidden: Tensor, ready: Sequence[Prepared]) -> Masks:
        """Return the masks of whole conversations over themselves."""
        return layer_masks(self._backend.model.config, valid, hidden, visual=self._visual(ready))

    def _stack(
        self, caches: Sequence[DynamicCache], layers: range, counts: Sequence[int] | None = None
    ) -> tuple[DynamicCache, Tensor]:
        """Stack caches of one row each into one that is padded on the left; return it and its valid columns.

        `counts` are the tokens of each cache, 0 for one without tensors; None if every cache holds some.
        """
        if counts is None:
            counts = [one.get_seq_length() for one in caches]
        longest = max(counts)
        stacked, valid = self._decoder.cache(), _last_columns(counts, longest, self._backend.model.device)
        if not longest:
            return stacked, valid
        for index in layers:
            held: list[Any] = [one.layers[index] for one in caches]
            if index in recurrent(stacked):  # no padding: every cache holds tokens
                stacked.layers[index] = joined(held, torch.cat)
                continue
            some = next(one for one, count in zip(held, counts, strict=True) if count)
            # an empty cache may have no tensors yet: its row is padding alone, shaped like the others
            keys, values = (
                _left_padded(
                    [
                        getattr(one if count else some, name)[:, :, :count]
                        for one, count in zip(held, counts, strict=True)
                    ]
                )
                for name in ("keys", "values")
            )
            stacked.update(keys, values, index)
        return stacked, valid

    def _split(self, cache: DynamicCache, valid: Tensor, layers: range) -> list[DynamicCache]:
        """Move the valid columns of each row to a cache of its own: holes and padding never outlive a batch."""
        columns = [row.nonzero()[:, 0] for row in valid.cpu()]
        own = [self._decoder.cache() for _ in columns]
        for index in layers:
            held: Any = cache.layers[index]
            if index in recurrent(cache):
                for row, one in enumerate(own):
                    one.layers[index] = copied(held, slice(row, row + 1))
                continue
            for row, (one, kept) in enumerate(zip(own, columns, strict=True)):
                one.update(held.keys[row : row + 1, :, kept], held.values[row : row + 1, :, kept], index)
            held.keys = held.values = held.keys[:0]  # frees the layer: never two copies of the whole cache
        return own

    def _taken(self, rows: _Rows, places: Sequence[int]) -> _Rows:
        """Return these of the rows, in this order; a row may be taken several times."""
        at = torch.tensor(places, device=rows.logits.device)
        cache = self._decoder.cache()
        for index, layer in enumerate(rows.cache.layers):
            held: Any = layer
            if index in recurrent(rows.cache):
                cache.layers[index] = copied(held, at)
                continue
            cache.update(held.keys[at], held.values[at], index)
        cached, work = [rows.cached[place] for place in places], [rows.token_layers[place] for place in places]
        return _Rows(cache, rows.valid[at], rows.logits[at], cached, work)


def padded(
    sessions: Sequence[HFSession], ready: Sequence[Prepared], starts: Sequence[int]
) -> tuple[Embedded, Tensor, Tensor]:
    """Embed the rows prompt.ids[start:], padded on the left.

    Args:
        sessions: those that prepared the rows; several rows may share one, and with it the encoded views.
        starts: index of the first id of each row.

    Returns:
        The embedded rows, their positions, and (rows, tokens) bool: True for real tokens.
    """
    backend = sessions[0].backend
    device = backend.model.device
    parts = [one.prompt.ids[start:] for one, start in zip(ready, starts, strict=True)]
    longest = max(len(part) for part in parts)
    filler = next(iter(backend.end_ids))  # any id that is no image; the mask hides it
    ids = torch.tensor([[filler] * (longest - len(part)) + list(part) for part in parts], device=device)
    rows = list(zip(sessions, ready, starts, strict=True))
    positions, valid = _placed([one.positions[..., start:] for _, one, start in rows])
    features = [view for session, one, start in rows for view in session.features(one.prompt, start)]
    return Decoder(backend.model).embed(ids, features), positions, valid


def _placed(rows: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """Return the positions (..., 1, tokens) of rows, padded on the left, and their valid columns."""
    # aligned positions are fractions of a cell
    kind = torch.float32 if any(one.is_floating_point() for one in rows) else rows[0].dtype
    counts = [one.shape[-1] for one in rows]
    longest = max(counts)
    positions = [pad(one.to(kind), (longest - count, 0)) for one, count in zip(rows, counts, strict=True)]
    return torch.cat(positions, dim=-2), _last_columns(counts, longest, rows[0].device)


def _last_columns(counts: Sequence[int], columns: int, device: torch.device) -> Tensor:
    """Return (rows, columns) bool: True in the last `counts` columns of each row."""
    missing = columns - torch.tensor(counts, device=device)
    return torch.arange(columns, device=device) >= missing[:, None]


@contextmanager
def _frozen(cache: DynamicCache, going: Tensor) -> Iterator[None]:
    """Keep the recurrent states of rows that have ended as they are while the block runs the others."""
    stateful = recurrent(cache)
    # most models have none, and are not asked on the device, which the step would wait for
    before = {} if not stateful or bool(going.all()) else {at: copied(layer) for at, layer in stateful.items()}
    yield
    for at, layer in before.items():

        def chosen(pair: list[Tensor]) -> Tensor:
            return torch.where(going.view(-1, *[1] * (pair[0].ndim - 1)), pair[0], pair[1])

        cache.layers[at] = joined([cache.layers[at], layer], chosen)


def _left_padded(parts: Sequence[Tensor]) -> Tensor:
    """Stack rows (1, ..., tokens, width) of different lengths into (rows, ..., tokens, width), padded on the left."""
    longest = max(part.shape[-2] for part in parts)
    return torch.cat([pad(part, (0, 0, longest - part.shape[-2], 0)) for part in parts])
