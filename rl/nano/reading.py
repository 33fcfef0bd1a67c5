"""Reading along lines: a linear reader of visual tokens, its losses, and what it spells.

Every visual token predicts eight frames (`frames.py`). Along the middle of a line the frames of the two nearest
rows are mixed by their distance, so that it does not matter how a line falls on the grid. Where the place of every
character is known, each frame is told its class (`glyphs`); where only the text is known, CTC finds the places
(`lines`).
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, ctc_loss

from nano.frames import ACROSS, DOWN
from nano.paper import BLANK, CLASSES, text_of

_BLANK_WEIGHT = 0.35
"""Of frames without a character against those with one: there are more of them, and they are easier."""


class LineReader(nn.Module):
    """A linear reader of eight frames of a visual token; thrown away when the model ships."""

    def __init__(self, hidden: int) -> None:
        super().__init__()
        self.frames = nn.Linear(hidden, ACROSS * DOWN * CLASSES)

    def forward(self, seen: Tensor) -> Tensor:
        """Return logits (8 * tokens, classes): for every token its frames, from left to right, then the row below."""
        logits: Tensor = self.frames(seen)
        return logits.view(-1, CLASSES)


def along_lines(frames: Tensor, batch: dict[str, Any]) -> Tensor:
    """Return the logits (F, classes) along the lines of a batch."""
    weight = batch["weight"][:, None].to(frames.dtype)
    return torch.lerp(frames[batch["above"]], frames[batch["below"]], weight)


def reading_losses(logits: Tensor, batch: dict[str, Any]) -> dict[str, Tensor]:
    """Return `glyphs` (nats a character and blank) and `lines` (CTC, nats a character), where there is any."""
    out: dict[str, Tensor] = {}
    told = batch["told"]
    known = told >= 0
    if bool(known.any()):
        each = cross_entropy(logits[known].float(), told[known], reduction="none")
        printed = told[known] != BLANK
        out["glyphs"] = each[printed].mean() + _BLANK_WEIGHT * each[~printed].mean()
    spans = torch.split(logits, batch["lengths"].tolist())
    texts = torch.split(batch["classes"], batch["sizes"].tolist())
    starts = batch["lengths"].cumsum(0) - batch["lengths"]
    unknown = [at for at, first in enumerate(told[starts].tolist()) if first == -100]
    if unknown:
        padded = nn.utils.rnn.pad_sequence([spans[at].float().log_softmax(1) for at in unknown])
        loss = ctc_loss(
            padded,
            torch.cat([texts[at] for at in unknown]),
            batch["lengths"][unknown],
            batch["sizes"][unknown],
            blank=BLANK,
            reduction="sum",
            zero_infinity=True,
        )
        out["lines"] = loss / batch["sizes"][unknown].sum()
    return out


def spelled(logits: Tensor, lengths: Sequence[int]) -> list[str]:
    """Return what lines say: the best class of each frame, repeats and blanks dropped."""
    texts = []
    for best in torch.split(logits.argmax(1), list(lengths)):
        kept = torch.unique_consecutive(best).tolist()
        texts.append(text_of([number for number in kept if number != BLANK]))
    return texts
