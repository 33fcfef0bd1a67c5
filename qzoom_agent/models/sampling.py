"""Choosing tokens, and turning them into text as they are generated.

Both are objects of one reply or batch. Random numbers come from the seed of each row and nothing global is read or
changed, so a reply does not depend on what is generated beside it, on the size of its batch, or on the device.
"""

from collections.abc import Callable, Iterable, Sequence

import torch
from torch import Tensor

from qzoom_agent.errors import BackendError
from qzoom_agent.models.interface import SamplingParams


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
        ends = [at + len(mark) for mark in self._stop if (at := whole.find(mark, self._from(mark))) >= 0]
        if ends:
            piece = whole[len(self.text) : min(ends)]
        self.text += piece
        if self._on_text is not None and piece:
            self._on_text(piece)
        return bool(ends)

    def _from(self, mark: str) -> int:
        return max(0, len(self.text) - len(mark) + 1)
