"""Many conversations at once on one device, each going its own way: one zooms, its neighbour does not.

Rows are padded on the left. After a look the lower layers hold every row's coarse pass; rows whose conversation is the
same then run through the upper layers, rows with a crop inserted first run their new tokens through the lower ones.
Those new tokens stand behind the padded coarse rows, so a row is

    [padding | coarse tokens that are kept | coarse tokens that are not | padding | new tokens]

and one mask says which of these may be seen. Positions are given explicitly, so holes cost time and change nothing:
answers are those of single sessions (tests/perception/test_batch.py). Sessions prepare prompts and encode views; the
batch owns the caches, for one look and one reply.
"""

from collections.abc import Mapping, Sequence
from time import perf_counter
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers import DynamicCache

from qzoom_agent.config import PerceptionConfig
from qzoom_agent.errors import BackendError
from qzoom_agent.messages import Message
from qzoom_agent.models.hf import HFBackend
from qzoom_agent.models.hf_rows import causal_mask, padded
from qzoom_agent.models.hf_session import HFSession, Prepared
from qzoom_agent.models.interface import ImageSource, Reply, SamplingParams, Sight
from qzoom_agent.models.prompts import Prompt
from qzoom_agent.models.sampling import Sampler, TextStream
from qzoom_agent.perception.decoder import Decoder, Embedded
from qzoom_agent.perception.layout import Cells
from qzoom_agent.perception.look import look_batch


class _Coarse(NamedTuple):
    """The lower layers after a look, padded to the longest prompt."""

    prompts: list[Prompt]
    hidden: Tensor
    """(rows, tokens, hidden)."""
    positions: Tensor
    """(3, rows, tokens) or (rows, tokens)."""
    cache: DynamicCache


class _Group(NamedTuple):
    """Rows that are prefilled and generate together."""

    rows: list[int]
    ready: list[Prepared]
    shared: list[int]
    """How many ids of each row the lower layers already hold."""


class Batch:
    """One round of a batch: `look` (if wanted), then `reply`. Not for use from several threads at once."""

    def __init__(self, backend: HFBackend, images: Sequence[ImageSource | HFSession]) -> None:
        """A row that is given as a session uses the views which that has encoded; rows may share one.

        Raises BackendError for an attention kernel that takes no mask.
        """
        kernel = backend.model.config.get_text_config()._attn_implementation
        if kernel not in ("sdpa", "eager"):
            raise BackendError(
                f"Batches need a mask for each row, which the attention kernel '{kernel}' does not take. "
                "Load the model with attn_implementation='sdpa'."
            )
        self._backend = backend
        self._decoder = Decoder(backend.model)
        self._sessions = [one if isinstance(one, HFSession) else backend.session(one) for one in images]
        self._coarse: _Coarse | None = None

    def place(self, row: int, view: str, *, source: str, cells: Cells) -> None:
        """As `PerceivingSession.place`, for one row."""
        self._sessions[row].place(view, source=source, cells=cells)

    @torch.inference_mode()
    def look(
        self, conversations: Sequence[Sequence[Message]], *, options: PerceptionConfig, map_always: bool = False
    ) -> list[list[Sight]]:
        """The coarse pass over each row's conversation: for each row a Sight for each of its views."""
        branches = self._backend.branches
        if branches is None:
            raise BackendError("This model has no branches, so it cannot look.")
        began = perf_counter()
        ready = [one.prepare(talk) for one, talk in zip(self._sessions, conversations, strict=True)]
        new, positions, valid = padded(self._backend, self._sessions, ready, [0] * len(ready))
        mask = causal_mask(valid, valid.shape[1], new.hidden)
        rotary = self._decoder.rotary(new.hidden, positions)
        cache = DynamicCache(config=self._backend.model.config)
        lower = range(branches.config.k)
        hidden = self._run(new, lower, rotary=rotary, mask=mask, cache=cache)
        starts = [hidden.shape[1] - len(one.prompt.ids) for one in ready]
        found = look_batch(
            branches,
            self._decoder.adapter,
            hidden,
            rotary=rotary,
            mask=mask,
            images=[
                [(start + at, rows, columns) for at, rows, columns in session.grids(one.prompt)]
                for session, one, start in zip(self._sessions, ready, starts, strict=True)
            ],
            starts=starts,
            options=options,
            map_always=map_always,
        )
        self._coarse = _Coarse([one.prompt for one in ready], hidden, positions, cache)
        seconds = (perf_counter() - began) / len(ready)
        return [
            session.sights(one.prompt, each, options, work=float(len(lower) * len(one.prompt.ids)), seconds=seconds)
            for session, one, each in zip(self._sessions, ready, found, strict=True)
        ]

    @torch.inference_mode()
    def reply(
        self,
        conversations: Sequence[Sequence[Message]],
        *,
        settings: SamplingParams,
        stop: tuple[str, ...] = (),
        rows: Sequence[int] | None = None,
        seeds: Sequence[int] | None = None,
    ) -> list[Reply]:
        """One assistant turn for each row, in order. `Reply.seconds` is the row's share of its group's time.

        rows: only these, where others need no turn. seeds: of each, instead of the one in `settings`.
        """
        rows = range(len(self._sessions)) if rows is None else rows
        each = [settings.model_copy(update={"seed": seed}) for seed in seeds or [settings.seed] * len(rows)]
        drawing = dict(zip(rows, each, strict=True))
        ready = {row: self._sessions[row].prepare(talk) for row, talk in zip(rows, conversations, strict=True)}
        replies: dict[int, Reply] = {}
        for group in self._groups(ready):
            began = perf_counter()
            streams, ended, counts, work = self._answer(group, [drawing[row] for row in group.rows], stop)
            seconds = (perf_counter() - began) / len(group.rows)
            for at, row in enumerate(group.rows):
                replies[row] = Reply(
                    text=streams[at].text,
                    finish="stop" if ended[at] else "length",
                    prompt_tokens=len(group.ready[at].prompt.ids),
                    cached_tokens=group.shared[at],
                    new_tokens=counts[at],
                    visual_tokens=sum(span.stop - span.start for span in group.ready[at].prompt.spans),
                    token_layers=work[at],
                    seconds=seconds,
                )
        self._coarse = None
        return [replies[row] for row in rows]

    def _groups(self, ready: Mapping[int, Prepared]) -> list[_Group]:
        """Rows whose prompt is wholly there, rows with something new, each together."""
        coarse = self._coarse
        if coarse is None:
            return [_Group(list(ready), list(ready.values()), [0] * len(ready))]
        same = [row for row, one in ready.items() if one.prompt == coarse.prompts[row]]
        other = [row for row in ready if row not in set(same)]
        shared = {row: ready[row].prompt.shared(coarse.prompts[row]) for row in other}
        groups = (
            _Group(same, [ready[row] for row in same], [len(ready[row].prompt.ids) for row in same]),
            _Group(other, [ready[row] for row in other], [shared[row] for row in other]),
        )
        return [group for group in groups if group.rows]

    def _answer(
        self, group: _Group, settings: Sequence[SamplingParams], stop: tuple[str, ...]
    ) -> tuple[list[TextStream], list[bool], list[int], list[float]]:
        """Prefill what is missing and generate: texts, whether each ended by itself, tokens, work in token-layers."""
        decoder, coarse, codec = self._decoder, self._coarse, self._backend.codec
        cache = DynamicCache(config=self._backend.model.config)
        depth, k = decoder.depth, 0
        hidden = positions = valid = None
        if coarse is not None and self._backend.branches is not None:
            k = self._backend.branches.config.k
            hidden = coarse.hidden[group.rows]
            positions = coarse.positions[..., group.rows, :]
            valid = torch.zeros(hidden.shape[:2], dtype=torch.bool, device=hidden.device)
            for at, row in enumerate(group.rows):
                start = hidden.shape[1] - len(coarse.prompts[row].ids)
                valid[at, start : start + group.shared[at]] = True
            for layer in range(k):
                held: Any = coarse.cache.layers[layer]
                cache.update(held.keys[group.rows], held.values[group.rows], layer)
        if any(len(one.prompt.ids) > count for one, count in zip(group.ready, group.shared, strict=True)):
            sessions = [self._sessions[row] for row in group.rows]
            new, more, fresh = padded(self._backend, sessions, group.ready, group.shared)
            valid = fresh if valid is None else torch.cat((valid, fresh), dim=1)
            mask = causal_mask(valid, fresh.shape[1], new.hidden)
            below = self._run(new, range(k), rotary=decoder.rotary(new.hidden, more), mask=mask, cache=cache)
            hidden = below if hidden is None else torch.cat((hidden, below), dim=1)
            positions = more if positions is None else torch.cat((positions.to(more.dtype), more), dim=-1)
            upper = Embedded(hidden, new.visual, new.deepstack) if k == 0 else Embedded(hidden, new.visual, [])
        else:
            assert hidden is not None
            upper = Embedded(hidden, torch.zeros(hidden.shape[:2], dtype=torch.bool), [])
        assert positions is not None and valid is not None
        out = self._run(
            upper,
            range(k, depth),
            rotary=decoder.rotary(hidden, positions),
            mask=causal_mask(valid, valid.shape[1], hidden),
            cache=cache,
        )
        lengths = [len(one.prompt.ids) for one in group.ready]
        work = [float(k * (n - held) + (depth - k) * n) for n, held in zip(lengths, group.shared, strict=True)]
        streams = [TextStream(codec.decode, stop, None) for _ in group.rows]
        ended, counts = self._generate(decoder.logits(out), group, cache, valid, settings, streams)
        return streams, ended, counts, work

    def _generate(
        self,
        logits: Tensor,
        group: _Group,
        cache: DynamicCache,
        valid: Tensor,
        settings: Sequence[SamplingParams],
        streams: list[TextStream],
    ) -> tuple[list[bool], list[int]]:
        """Write into the streams until every row has ended or is full."""
        decoder, rows = self._decoder, range(len(group.rows))
        samplers = [Sampler(one, self._backend.codec.forbidden, logits.device) for one in settings]
        most = settings[0].max_new_tokens
        ended, done, counts = [False for _ in rows], [False for _ in rows], [0 for _ in rows]
        next_position = torch.tensor([one.next_position for one in group.ready], device=logits.device)
        for step in range(most):
            tokens = torch.zeros(len(rows), 1, dtype=torch.long, device=logits.device)
            for row in rows:
                if done[row]:
                    continue
                token = samplers[row](logits[row])
                counts[row] += 1
                tokens[row] = token
                value = int(token)
                ended[row] = value in self._backend.end_ids or streams[row].push(value)
                done[row] = ended[row] or counts[row] == most
                if value in self._backend.end_ids or (done[row] and not ended[row]):
                    streams[row].finish()
            if all(done):
                break
            valid = torch.cat((valid, torch.ones_like(valid[:, :1])), dim=1)
            hidden = decoder.text.embed_tokens(tokens)
            where = (next_position + step)[:, None]
            placed = where.expand(3, -1, -1) if decoder.adapter.two_dimensional else where
            one = Embedded(hidden, torch.zeros_like(tokens, dtype=torch.bool), [])
            rotary, mask = decoder.rotary(hidden, placed), causal_mask(valid, 1, hidden)
            logits = decoder.logits(self._run(one, range(decoder.depth), rotary=rotary, mask=mask, cache=cache))
        return ended, counts

    def _run(
        self, new: Embedded, layers: range, *, rotary: tuple[Tensor, Tensor], mask: Tensor, cache: DynamicCache
    ) -> Tensor:
        return self._decoder.run(
            new.hidden, layers, rotary=rotary, mask=mask, cache=cache, visual=new.visual, deepstack=new.deepstack
        )
