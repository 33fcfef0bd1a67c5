"""Attention of chosen heads, recomputed from the inputs of their layers.

Labels (`labels.py`) need the attention of a few heads, from the tokens of an answer to those of an image. Asking a
model for all its attention forces the slow kernel on every layer and keeps a square for every head. Instead the inputs
of a few layers are kept during an ordinary forward, on whatever kernel, and softmax(q k / sqrt d) is computed later for
the rows and heads that are wanted (the map M of SD-RPN, arXiv 2509.16944, and Q-Zoom, arXiv 2604.06912, section 3.1).
The denominator always runs over every key that a query sees; columns are cut out of a row afterwards.

    with record(model, layers) as recorded:
        model(**inputs)
    rows = recorded.attention(layer, heads, queries, keys)

One forward over prompt and answer will do, and so does `generate`, whose steps are joined by the length of its cache.
Attention is causal and plain: packed rows, trees and sliding windows are not supported. Nothing is kept on modules:
hooks go when the block is left, however it is left, and a recording sees only forwards of the thread that made it.
"""

import threading
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from transformers import Cache, PreTrainedModel

from qzoom_agent.errors import BackendError
from qzoom_agent.perception.adapters import adapter_for, text_model
from qzoom_agent.perception.branches import cut, rotate
from qzoom_agent.perception.decoder import Rotary
from qzoom_agent.perception.labels import Heads

Tokens = slice | Sequence[int]
"""Which tokens of a sequence, by index."""


@dataclass(slots=True)
class _Input:
    """What went into one layer so far."""

    hidden: Tensor
    """(batch, tokens, hidden), before the layer's norm."""
    rotary: Rotary

    def then(self, held: int, new: "_Input") -> "_Input":
        """The first `held` tokens of this, followed by `new`."""
        pairs = zip(cut(self.rotary, slice(0, held)), new.rotary, strict=True)
        cos, sin = (torch.cat(pair, dim=1) for pair in pairs)
        return _Input(torch.cat((self.hidden[:, :held], new.hidden), dim=1), (cos, sin))


class Recording:
    """The inputs of some layers of one forward. Made by `record`."""

    def __init__(self, model: PreTrainedModel, layers: Sequence[int]) -> None:
        adapter_for(model.config)
        stack: Any = text_model(model).layers
        beyond = sorted(layer for layer in set(layers) if not 0 <= layer < len(stack))
        if beyond:
            raise BackendError(
                f"Attention of layer {beyond[0]} is asked for, but this model's layers are 0 to {len(stack) - 1}. "
                "Heads are picked for one base: use the list made for this one."
            )
        self._layers: dict[int, Any] = {layer: stack[layer] for layer in sorted(set(layers))}
        self._inputs: dict[int, _Input] = {}
        self._thread = threading.get_ident()

    @torch.no_grad()
    def attention(
        self, layer: int, heads: Sequence[int], queries: Tokens, keys: Tokens, *, mask: Tensor | None = None
    ) -> Tensor:
        """Attention (batch, heads, queries, keys), float32, on the model's device.

        Args:
            layer: one of the recorded ones.
            keys: which columns to return; a row sums to 1 over all of them.
            mask: (batch, tokens) as the model was given it, 0 on padding; needed if rows were padded. Rows that stand
                on padding mean nothing.
        Raises:
            BackendError: nothing was recorded of this layer, or it has no such head.
        """
        held = self._held(layer)
        module = self._layers[layer]
        attention = module.self_attn
        normed = module.input_layernorm(held.hidden)
        tokens = torch.arange(normed.shape[1], device=normed.device)
        # once an index of its own, so that any kind of `queries` meets the causal rule
        asking = tokens[_index(queries)]
        query = _project(normed[:, asking], attention, "q", (held.rotary[0][:, asking], held.rotary[1][:, asking]))
        key = _project(normed, attention, "k", held.rotary)
        chosen = list(heads)
        if not all(0 <= head < query.shape[1] for head in chosen):
            raise BackendError(
                f"Heads {chosen} of layer {layer} are asked for, but this model's heads are 0 to {query.shape[1] - 1}. "
                "Heads are picked for one base: use the list made for this one."
            )
        group = query.shape[1] // key.shape[1]
        shared = [head // group for head in chosen]
        # float32 whatever the model computes in: thousands of keys share one denominator
        logits = query[:, chosen].float() @ key[:, shared].float().transpose(2, 3) * attention.scaling
        seen = (tokens <= asking[:, None])[None, None]
        if mask is not None:
            seen = seen & mask.to(tokens.device, torch.bool)[:, None, None]
        # the least number rather than -inf, so that a row on padding, which sees nothing, is not NaN
        logits = logits.masked_fill(~seen, torch.finfo(logits.dtype).min)
        attended: Tensor = logits.softmax(dim=-1)[..., _index(keys)]
        return attended

    def norms(self, layer: int, tokens: Tokens) -> Tensor:
        """L2 norms (batch, tokens), float32, of the states that go into a recorded layer.

        Visual tokens of a large norm are attention sinks in the paper (the published code finds them by heads).
        """
        norms: Tensor = torch.linalg.vector_norm(self._held(layer).hidden[:, _index(tokens)].float(), dim=-1)
        return norms

    def _held(self, layer: int) -> _Input:
        if layer not in self._inputs:
            known = ", ".join(map(str, self._inputs)) or "none"
            raise BackendError(
                f"Nothing was recorded of layer {layer} (recorded: {known}). Name it in `record` and run the model "
                "inside the block, in the same thread."
            )
        return self._inputs[layer]

    def _watch(self, layer: int) -> Any:
        def before(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            if threading.get_ident() != self._thread:
                return
            hidden = args[0] if args else kwargs["hidden_states"]
            cos, sin = kwargs["position_embeddings"]
            # families without MRoPE compute positions once for all rows
            rotary = (cos.expand(len(hidden), -1, -1).detach(), sin.expand(len(hidden), -1, -1).detach())
            new = _Input(hidden.detach(), rotary)
            # found by its type: its name changed between versions
            cache = next((value for value in kwargs.values() if isinstance(value, Cache)), None)
            past = 0 if cache is None else int(cache.get_seq_length(layer))
            if past:
                old = self._inputs.get(layer)
                if old is None or old.hidden.shape[1] < past or len(old.hidden) != len(hidden):
                    raise BackendError(
                        f"The cache holds {past} tokens that were not recorded, so attention cannot be computed. Start "
                        "the conversation inside the block."
                    )
                new = old.then(past, new)
            self._inputs[layer] = new

        return before


@contextmanager
def record(model: PreTrainedModel, layers: Sequence[int]) -> Iterator[Recording]:
    """Keep the inputs of these layers while the block runs the model; the last forward without a past counts.

    Raises:
        BackendError: the family is not supported, or the model has no such layer.
    """
    recording = Recording(model, layers)
    with ExitStack() as hooks:
        for index, module in recording._layers.items():
            handle = module.register_forward_pre_hook(recording._watch(index), with_kwargs=True)
            hooks.callback(handle.remove)
        yield recording


def response_map(
    recorded: Recording,
    heads: Heads,
    *,
    response: Tokens,
    start: int,
    rows: int,
    columns: int,
    row: int = 0,
    mask: Tensor | None = None,
) -> NDArray[np.float32]:
    """One map (rows, columns): the mean over heads and tokens of an answer of their attention to one image.

    Args:
        heads: of recorded layers; none give a map of zeros.
        response: the tokens of the answer that ask. The published maps leave out its last token, which `generate` never
            feeds back.
        start: index of the image's first visual token.
        row: which row of the batch.
        mask: as in `Recording.attention`.
    Raises:
        BackendError: as in `Recording.attention`.
        ValueError: no token asks.
    """
    image = slice(start, start + rows * columns)
    total = np.zeros(rows * columns, dtype=np.float32)
    for layer, chosen in heads.items():
        found = recorded.attention(layer, chosen, response, image, mask=mask)[row]
        if not found.shape[1]:
            raise ValueError("no token of the answer asks, so there is no mean")
        total += found.mean(dim=1).sum(dim=0).cpu().numpy()
    count = sum(len(chosen) for chosen in heads.values())
    return (total / np.float32(max(1, count))).reshape(rows, columns)


def norm_map(
    recorded: Recording, layer: int, *, start: int, rows: int, columns: int, row: int = 0
) -> NDArray[np.float32]:
    """The norms of an image's visual tokens as a map (rows, columns), to be used as the sink map of `make_labels`."""
    found = recorded.norms(layer, slice(start, start + rows * columns))[row]
    norms: NDArray[np.float32] = found.reshape(rows, columns).cpu().numpy()
    return norms


def _index(tokens: Tokens) -> slice | list[int]:
    return tokens if isinstance(tokens, slice) else list(tokens)


def _project(normed: Tensor, attention: Any, which: str, rotary: Rotary) -> Tensor:
    """Queries or keys (batch, heads, tokens, width), normed and rotated as the layer does it."""
    parts: Tensor = getattr(attention, f"{which}_proj")(normed).unflatten(-1, (-1, int(attention.head_dim)))
    norm = getattr(attention, f"{which}_norm", None)
    if norm is not None:
        parts = norm(parts)
    return rotate(parts.transpose(1, 2), rotary)
