"""Generation of turns, the same for one conversation and for the rows of a batch.

A session prepares a conversation (`Prepared`) and prefills it; `write_turns` then samples until every row has ended.
Random numbers come from the seed of each row and nothing global is read or changed, so a reply does not depend on what
is generated beside it, on the size of its batch, or on the device.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, NamedTuple

import torch
from torch import Tensor

from qzoom_agent.errors import BackendError
from qzoom_agent.models.interface import OnText, Reply, SamplingParams
from qzoom_agent.models.prompts import EncodedTurn, Prompt

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
        said = [pair for pair in zip(turn.ids, turn.logps, strict=True) if pair[0] not in backend.end_ids]
        return text_logprobs(backend.codec.decode, said)


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
    # a limit may be far beyond what the model has room for, and a random number is drawn for each step
    settings = [
        one.settings.model_copy(update={"max_new_tokens": limit}) for one, limit in zip(requests, limits, strict=True)
    ]
    sampler = Sampler(settings, backend.codec.forbidden, logits.device)
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


# -- tokens and their text ---------------------------------------------------------------------------------------------


class Sampler:
    """Chooses the next token of each row of a batch, never a forbidden one."""

    def __init__(self, settings: Sequence[SamplingParams], forbidden: Iterable[int], device: torch.device) -> None:
        """Rows have settings of their own, but the same sampling."""
        self._settings = settings[0]
        self._forbidden = torch.tensor(list(forbidden), dtype=torch.long, device=device)
        steps = max(one.max_new_tokens for one in settings)
        # drawn on the CPU, all at once: the same numbers on every device, whatever the other rows do
        chances = [torch.rand(steps, generator=torch.Generator().manual_seed(one.seed)) for one in settings]
        self._chances = torch.stack(chances).to(device)
        self._step = 0
        self._written: Tensor | None = None
        """1 for each token that a row has, (rows, vocabulary): for the presence penalty."""

    def __call__(self, logits: Tensor) -> tuple[Tensor, Tensor]:
        """Return a token for each row of logits (rows, vocabulary), and its log-probability; see `draw`."""
        chance, self._step = self._chances[:, self._step], self._step + 1
        penalty = self._settings.presence_penalty
        if not penalty:
            return draw(logits, chance, settings=self._settings, forbidden=self._forbidden)
        if self._written is None:
            self._written = torch.zeros_like(logits, dtype=torch.float32)
        lowered = logits.float() - penalty * self._written
        tokens, logps = draw(lowered, chance, settings=self._settings, forbidden=self._forbidden)
        self._written.scatter_(1, tokens[:, None], 1.0)
        return tokens, logps


def draw(logits: Tensor, chance: Tensor, *, settings: SamplingParams, forbidden: Tensor) -> tuple[Tensor, Tensor]:
    """Choose a token for each row of logits (rows, vocabulary).

    Args:
        chance: (rows,) random numbers in [0, 1). The token is the one at which the cumulative probability of its row
            passes this share.
        forbidden: ids that are never chosen.

    Returns:
        Tokens (rows,), and their log-probabilities at this temperature among all ids, (rows,).

    Raises:
        BackendError: the logits of a row are not finite.
    """
    scaled = logits.float() / (settings.temperature or 1.0)
    open_ = scaled.index_fill(1, forbidden, -torch.inf)
    if settings.temperature == 0:
        tokens = open_.argmax(dim=1)
    else:
        if settings.top_k is not None and settings.top_k < open_.shape[1]:
            least = open_.topk(settings.top_k, dim=1).values[:, -1:]
            open_ = open_.masked_fill(open_ < least, -torch.inf)
        weights = torch.softmax(open_, dim=1)
        if settings.top_p < 1:
            ordered, order = weights.sort(dim=1, descending=True)
            # A token is kept if those before it do not yet hold top_p: the likeliest one always is.
            ordered = ordered * (ordered.cumsum(1) - ordered < settings.top_p)
            weights = torch.zeros_like(weights).scatter(1, order, ordered)
        # the share is of what is left after top_p, so the weights need not add up to 1
        passed = weights.cumsum(1)
        at = torch.searchsorted(passed, chance[:, None] * passed[:, -1:], right=True)
        tokens = at[:, 0].clamp(max=logits.shape[1] - 1)
    logps = torch.log_softmax(scaled, dim=1).gather(1, tokens[:, None])[:, 0]
    # a NaN or an infinite logit anywhere in a row makes the softmax of the whole row NaN
    if not bool(logps.isfinite().all()):
        raise BackendError(
            "The model's logits are not finite. Its weights are damaged, or too large for the number format: download "
            "them again, or load them with dtype='float32' or 'bfloat16'."
        )
    return tokens, logps


class TextStream:
    """Text of a growing list of ids, emitted piece by piece, ending with the first stop string.

    A character whose bytes are spread over several tokens is emitted whole. `text` is the text emitted so far.
    """

    def __init__(
        self, decode: Callable[[list[int]], str], stop: tuple[str, ...], on_text: Callable[[str], None] | None
    ) -> None:
        self.ids: list[int] = []
        self.text = ""
        self._decode = decode
        self._stop = tuple(mark for mark in stop if mark)
        self._on_text = on_text
        self._read = 0
        self._context = 0

    def push(self, token: int) -> bool:
        """Add an id; return True once a stop string is written (`text` then ends with it)."""
        self.ids.append(token)
        return bool(self._stop or self._on_text) and self._flush(last=False)

    def finish(self) -> None:
        """Emit the rest, even half a character."""
        self._flush(last=True)

    def _flush(self, *, last: bool) -> bool:
        # A few ids before the unread ones are decoded too: the text of a token can depend on the one before it.
        before = self._decode(self.ids[self._context : self._read])
        now = self._decode(self.ids[self._context :])
        if len(now) <= len(before) or (now.endswith("\ufffd") and not last):
            return False
        self._context, self._read = self._read, len(self.ids)
        piece = now[len(before) :]
        whole = self.text + piece
        ends = [
            at + len(mark)
            for mark in self._stop
            if (at := whole.find(mark, max(0, len(self.text) - len(mark) + 1))) >= 0
        ]
        if ends:
            piece = whole[len(self.text) : min(ends)]
        self.text += piece
        if self._on_text is not None and piece:
            self._on_text(piece)
        return bool(ends)


def text_logprobs(decode: Callable[[list[int]], str], tokens: Sequence[tuple[int, float]]) -> list[tuple[str, float]]:
    """Return text and log-probability of tokens; those of one character are one, as likely as the least likely."""
    found, pieces, values = list[tuple[str, float]](), list[str](), list[float]()
    stream = TextStream(decode, (), pieces.append)
    for at, (token, value) in enumerate(tokens, 1):
        values.append(value)
        stream.push(token)
        if at == len(tokens):
            stream.finish()
        if pieces:
            found.append(("".join(pieces), min(values)))
            pieces.clear()
            values.clear()
    return found
