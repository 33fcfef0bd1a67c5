"""Generation of turns, the same for one conversation and for the rows of a batch.

A session prepares a conversation (`Prepared`) and prefills it; `write_turns` then samples until every row has ended.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, NamedTuple

import torch
from torch import Tensor

from qzoom_agent.models.interface import OnText, Reply, SamplingParams
from qzoom_agent.models.prompts import EncodedTurn, Prompt
from qzoom_agent.models.sampling import Sampler, TextStream

if TYPE_CHECKING:
    from qzoom_agent.models.hf_session import HFSession


@dataclass(frozen=True, slots=True)
class Prepared:
    """A conversation ready for the decoder."""

    prompt: Prompt
    positions: Tensor
    """(3, 1, ids) for MRoPE families, else (1, ids)."""
    turns: list[EncodedTurn]
    """Answered turns at its beginning, whose ids were kept."""
    rest: EncodedTurn
    """The remainder, up to the point where the model continues."""
    new_visual_tokens: int = 0
    """Visual tokens of its views that the session had not been shown before."""

    @property
    def next_position(self) -> int:
        """Position of the first token that the model writes."""
        return int(self.positions.max()) + 1


class TextListener:
    """A receiver of the text of one row: where it fails, that row ends, and the others of the batch go on."""

    def __init__(self, on_text: OnText) -> None:
        self._on_text = on_text
        self.failure: Exception | None = None

    def __call__(self, piece: str) -> None:
        if self.failure is None:
            try:
                self._on_text(piece)
            except Exception as error:
                self.failure = error


@dataclass(frozen=True, slots=True)
class GenerationRequest:
    """A turn to be generated."""

    session: "HFSession"
    ready: Prepared
    settings: SamplingParams
    on_text: OnText | None = None

    def record(self, turn: "GeneratedTurn", *, seconds: float) -> Reply:
        """Tell the session its generated turn, and return the turn as a reply."""
        # the end of the turn is no part of the conversation: the chat template writes it
        ended = bool(turn.ids) and turn.ids[-1] in self.session.backend.end_ids
        self.session.remember(self.ready, turn.ids[:-1] if ended else turn.ids, turn.text)
        return Reply(
            text=turn.text,
            finish=turn.finish,
            prompt_tokens=len(self.ready.prompt.ids),
            cached_tokens=turn.cached,
            new_tokens=len(turn.ids),
            visual_tokens=self.ready.new_visual_tokens,
            token_layers=turn.token_layers,
            seconds=seconds,
            logprobs=self._logprobs(turn) if self.settings.logprobs else [],
        )

    def _logprobs(self, turn: "GeneratedTurn") -> list[tuple[str, float]]:
        backend = self.session.backend
        return [
            (backend.codec.decode([token]), logp)
            for token, logp in zip(turn.ids, turn.logps, strict=True)
            if token not in backend.end_ids
        ]


class GeneratedTurn(NamedTuple):
    """A turn as it was sampled."""

    ids: tuple[int, ...]
    """Every sampled id, the end-of-turn id included."""
    logps: tuple[float, ...]
    """Their log-probabilities at the temperature of sampling, among all ids."""
    text: str
    """Without the end of the turn; up to and including a stop string."""
    finish: Literal["stop", "length"]
    cached: int = 0
    """Ids of the prompt that were not computed again."""
    token_layers: float = 0.0
    """Work of the prefill."""


def _left(request: GenerationRequest) -> bool:
    """Return whether nobody reads the turn of a row any longer."""
    return isinstance(request.on_text, TextListener) and request.on_text.failure is not None


def write_turns(
    requests: Sequence[GenerationRequest], logits: Tensor, forward: Callable[[Tensor, Tensor, Tensor], Tensor]
) -> list[GeneratedTurn]:
    """Sample a turn for each row of a batch until every row has ended or is full; the last token of a row is not fed.

    Args:
        requests: one for each row, with the same temperature and top_p.
        logits: (rows, vocabulary) after the prompts.
        forward: returns the logits (rows, vocabulary) after ids (rows, 1), given them with their positions, (3, rows,
            1) for MRoPE families, else (rows, 1), and which rows have not ended, (rows,) bool.
    """
    backend, rows = requests[0].session.backend, range(len(requests))
    limits = [min(one.settings.max_new_tokens, one.session.limit - one.ready.next_position) for one in requests]
    sampler = Sampler([one.settings for one in requests], backend.codec.forbidden, logits.device)
    streams = [TextStream(backend.codec.decode, one.settings.stop, one.on_text) for one in requests]
    ids: list[list[int]] = [[] for _ in rows]
    logps: list[list[float]] = [[] for _ in rows]
    finish: list[Literal["stop", "length"] | None] = [None for _ in rows]
    place = torch.tensor([one.ready.next_position for one in requests], device=logits.device)
    axes = requests[0].ready.positions.shape[:-2]
    for step in range(max(limits)):
        tokens, chosen = sampler(logits)
        for row, (token, logp) in enumerate(zip(tokens.tolist(), chosen.tolist(), strict=True)):
            if finish[row] is not None:
                continue
            ids[row].append(token)
            logps[row].append(logp)
            ends = token in backend.end_ids
            if ends or streams[row].push(token) or _left(requests[row]):
                finish[row] = "stop"
            elif len(ids[row]) == limits[row]:
                finish[row] = "length"
            if ends or finish[row] == "length":
                streams[row].finish()
        if all(finish):
            break
        going = torch.tensor([one is None for one in finish], device=logits.device)
        logits = forward(tokens[:, None], (place + step)[:, None].expand(*axes, -1, -1), going)
    return [
        GeneratedTurn(tuple(ids[row]), tuple(logps[row]), streams[row].text, finish[row] or "length") for row in rows
    ]
