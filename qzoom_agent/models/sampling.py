"""Choosing tokens, and turning them into text as they come.

Both are objects of one reply: the random generator is seeded from the settings and nothing global is read or changed,
so replies generated side by side do not disturb each other.
"""

from collections.abc import Callable, Iterable

import torch

from qzoom_agent.models.interface import SamplingParams


class Sampler:
    """Takes the next token from logits, never one of `forbidden`."""

    def __init__(self, settings: SamplingParams, forbidden: Iterable[int], device: torch.device) -> None:
        self._settings = settings
        self._forbidden = torch.tensor(list(forbidden), dtype=torch.long, device=device)
        self._generator = torch.Generator(device=device).manual_seed(settings.seed)

    def __call__(self, logits: torch.Tensor) -> torch.Tensor:
        """A token id, shape (1,), from logits of shape (vocabulary,)."""
        logits = logits.index_fill(0, self._forbidden, -torch.inf)
        if self._settings.temperature == 0:
            return logits.argmax(keepdim=True)
        weights = torch.softmax(logits.float() / self._settings.temperature, dim=-1)
        if self._settings.top_p == 1:
            return torch.multinomial(weights, 1, generator=self._generator)
        weights, order = weights.sort(descending=True)
        # A token is kept if those before it do not yet hold top_p: the likeliest one always is.
        weights = weights * (weights.cumsum(0) - weights < self._settings.top_p)
        return order[torch.multinomial(weights, 1, generator=self._generator)]


class TextStream:
    """Text of a growing list of ids, given out piece by piece, ending with the first stop string.

    A character whose bytes are spread over tokens is given out whole. `text` is what has been given out.
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
        """Take one more id; True once a stop string is written (then `text` ends with it)."""
        self.ids.append(token)
        return bool(self._stop or self._on_text) and self._flush(last=False)

    def finish(self) -> None:
        """Give out what is left, even half a character."""
        self._flush(last=True)

    def _flush(self, *, last: bool) -> bool:
        # A few ids before the unread ones are decoded too: how a token reads can depend on the one before it.
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
