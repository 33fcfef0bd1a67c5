"""Weights of 16 bits while they are trained: in float32, because the steps of an optimizer are smaller than theirs.

At a learning rate of 1e-6 a step of AdamW rounds to nothing in more than 99 of 100 bfloat16 weights.
"""

from collections.abc import Iterable, Mapping
from typing import Final

import torch
from torch import Tensor, nn

_SAMPLED: Final = 2**22
"""Most weights that a `WeightSample` compares."""


def to_float32(weights: Iterable[nn.Parameter]) -> dict[nn.Parameter, torch.dtype]:
    """Turn weights into float32 in place; return the number formats that they had."""
    stored = {weight: weight.dtype for weight in weights}
    for weight in stored:
        weight.data = weight.data.float()
    return stored


def restore(stored: Mapping[nn.Parameter, torch.dtype]) -> None:
    """Give weights back the number formats that `to_float32` found."""
    for weight, number in stored.items():
        weight.data = weight.data.to(number)


class WeightSample:
    """Trained weights as they are now, at equal steps through all of them, to be compared with later."""

    def __init__(self, model: nn.Module) -> None:
        weights = [weight for weight in model.parameters() if weight.requires_grad]
        self._step = max(1, sum(weight.numel() for weight in weights) // _SAMPLED)
        self._kept = [(weight, self._read(weight).clone()) for weight in weights]

    def changed(self) -> float:
        """Return the share of the weights that differ from what they were."""
        differ = [(self._read(weight) != before.to(weight.device)) for weight, before in self._kept]
        return float(sum(int(one.sum()) for one in differ) / max(1, sum(one.numel() for one in differ)))

    def _read(self, weight: nn.Parameter) -> Tensor:
        return weight.detach().flatten()[:: self._step]
