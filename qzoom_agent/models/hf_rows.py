"""Prepared conversations as the rows of one batch: padded on the left, with one mask that says what may be seen."""

from collections.abc import Sequence

import torch
from torch import Tensor

from qzoom_agent.models.hf import HFBackend
from qzoom_agent.models.hf_session import HFSession, Prepared
from qzoom_agent.perception.decoder import Decoder, Embedded


def padded(
    backend: HFBackend, sessions: Sequence[HFSession], ready: Sequence[Prepared], starts: Sequence[int]
) -> tuple[Embedded, Tensor, Tensor]:
    """Rows of prompt.ids[start:]: embedded, their positions, and (rows, tokens) bool: which tokens are real.

    Args:
        sessions: those that prepared the rows; several rows may share one, and with it the encoded views.
    """
    device = backend.model.device
    parts = [one.prompt.ids[start:] for one, start in zip(ready, starts, strict=True)]
    longest = max(len(part) for part in parts)
    end = next(iter(backend.end_ids))
    ids = torch.tensor([[end] * (longest - len(part)) + list(part) for part in parts], device=device)
    kind = ready[0].positions.dtype
    kind = torch.float32 if any(one.positions.is_floating_point() for one in ready) else kind
    where = torch.zeros(*ready[0].positions.shape[:-2], len(parts), longest, dtype=kind, device=device)
    valid = torch.zeros(len(parts), longest, dtype=torch.bool, device=device)
    features = []
    for row, (one, start) in enumerate(zip(ready, starts, strict=True)):
        count = len(parts[row])
        if count:
            where[..., row, longest - count :] = one.positions[..., 0, start:].to(kind)
            valid[row, longest - count :] = True
        features += sessions[row].features(one.prompt, start)
    return Decoder(backend.model).embed(ids, features), where, valid


def causal_mask(valid: Tensor, new: int, like: Tensor) -> Tensor:
    """Additive mask (rows, 1, new, keys): the last `new` keys ask, and see the real keys up to themselves.

    A padded token sees itself, so that no row of the softmax is empty; nothing real ever sees it.
    """
    keys = valid.shape[1]
    at = torch.arange(keys, device=valid.device)
    asking = at[keys - new :, None]
    seen = (valid[:, None, :] & (at <= asking)) | (at == asking)
    floor = torch.finfo(like.dtype).min
    return torch.zeros(seen.shape, dtype=like.dtype, device=like.device).masked_fill(~seen, floor)[:, None]
