"""Attention of chosen heads, recomputed from the inputs of their layers.

Labels (`labels.py`) need the attention of a few heads, from the tokens of an answer to those of an image. Asking a
model for its attention forces the slow kernel on every layer. Instead the inputs of a few layers are kept during an
ordinary forward, on any kernel, and softmax(q k / sqrt d) is computed later for the rows and heads that are needed (the
map M of SD-RPN, arXiv 2509.16944, and Q-Zoom, arXiv 2604.06912, section 3.1).

    with record(model, layers) as recorded:
        model(**inputs)
    rows = recorded.attention(layer, heads, queries, keys)

One forward over prompt and answer works, and so does `generate`. Attention is computed for layers with full attention
and queries that do not see forwards: packed rows, trees and sliding windows are not supported. Hooks are removed when
the block ends; other threads' forwards are not recorded.
"""

import threading
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from transformers import Cache, PreTrainedModel

from qzoom_agent.errors import BackendError
from qzoom_agent.perception.adapters import FULL, adapter_for, layer_kinds, text_model
from qzoom_agent.perception.decoder import Rotary, project, rotate
from qzoom_agent.perception.labels import Heads

Tokens = slice | Sequence[int]
"""Indices of tokens of a sequence."""


class Recording:
    """The inputs of some layers of one forward. Made by `record`."""

    def __init__(self, model: PreTrainedModel, layers: Sequence[int]) -> None:
        adapter_for(model.config)
        stack: Any = text_model(model).layers
        beyond = sorted(layer for layer in set(layers) if not 0 <= layer < len(stack))
        if beyond:
            raise BackendError(
                f"Attention of layer {beyond[0]} was asked for, but this model's layers are 0 to {len(stack) - 1}. "
                "Heads belong to one base model: use the list made for this one."
            )
        self._layers: dict[int, Any] = {layer: stack[layer] for layer in sorted(set(layers))}
        self._kinds = layer_kinds(text_model(model).config)
        self._inputs: dict[int, tuple[Tensor, Rotary]] = {}
        """Input of each layer so far: (batch, tokens, hidden) before the layer's norm, and rotary embeddings."""
        self._thread = threading.get_ident()

    @torch.no_grad()
    def attention(
        self, layer: int, heads: Sequence[int], queries: Tokens, keys: Tokens, *, mask: Tensor | None = None
    ) -> Tensor:
        """Return attention (batch, heads, queries, keys), float32, on the model's device.

        Args:
            queries: the tokens that attend.
            keys: the columns to return; a row sums to 1 over all columns, returned or not.
            mask: (batch, tokens) as the model was given it, 0 on padding; needed if rows were padded. The result for a
                query on padding is meaningless.

        Raises:
            BackendError: nothing was recorded of this layer, or it has no such head.
        """
        hidden, rotary = self._held(layer)
        if self._kinds[layer] != FULL:
            full = [index for index, kind in enumerate(self._kinds) if kind == FULL]
            raise BackendError(
                f"Attention of layer {layer} was asked for, which has {self._kinds[layer].replace('_', ' ')}. Choose "
                f"heads among the layers with full attention: {', '.join(map(str, full))}."
            )
        module = self._layers[layer]
        attention = module.self_attn
        normed = module.input_layernorm(hidden)
        tokens = torch.arange(normed.shape[1], device=normed.device)
        # indices of the queries, which the causal mask below compares with those of the keys
        asking = tokens[_index(queries)]
        width = int(attention.head_dim)
        heads_here = attention.o_proj.in_features // width
        query = project(
            normed[:, asking], attention.q_proj, getattr(attention, "q_norm", None), width, heads=heads_here
        )
        key = project(normed, attention.k_proj, getattr(attention, "k_norm", None), width)
        query = rotate(query, (rotary[0][:, asking], rotary[1][:, asking]))
        key = rotate(key, rotary)
        chosen = list(heads)
        if not all(0 <= head < query.shape[1] for head in chosen):
            raise BackendError(
                f"Heads {chosen} of layer {layer} were asked for, but its heads are 0 to {query.shape[1] - 1}. "
                "Heads belong to one base model: use the list made for this one."
            )
        # grouped-query attention: `group` query heads share a key head
        group = query.shape[1] // key.shape[1]
        shared = [head // group for head in chosen]
        # float32 in any case: thousands of keys share one denominator
        logits = query[:, chosen].float() @ key[:, shared].float().transpose(2, 3) * attention.scaling
        seen = (tokens <= asking[:, None])[None, None]
        if mask is not None:
            seen = seen & mask.to(tokens.device, torch.bool)[:, None, None]
        # the smallest number rather than -inf: a query on padding sees nothing, and its row would be NaN
        logits = logits.masked_fill(~seen, torch.finfo(logits.dtype).min)
        attended: Tensor = logits.softmax(dim=-1)[..., _index(keys)]
        return attended

    def states(self, layer: int) -> Tensor:
        """Return the states (batch, tokens, hidden) that went into a recorded layer."""
        return self._held(layer)[0]

    def _held(self, layer: int) -> tuple[Tensor, Rotary]:
        if layer not in self._inputs:
            known = ", ".join(map(str, self._inputs)) or "none"
            raise BackendError(
                f"Nothing was recorded of layer {layer} (recorded: {known}). Pass it to `record` and run the model "
                "inside the block, in the same thread."
            )
        return self._inputs[layer]

    def _watch(self, layer: int) -> Any:
        def before(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            if threading.get_ident() != self._thread:
                return
            hidden = args[0] if args else kwargs["hidden_states"]
            cos, sin = kwargs["position_embeddings"]
            # families without MRoPE compute one row of embeddings for the whole batch
            new = [part.expand(len(hidden), -1, -1).detach() for part in (hidden, cos, sin)]
            # by its type: the name of the argument changed between versions of transformers
            cache = next((value for value in kwargs.values() if isinstance(value, Cache)), None)
            if cache is not None and self._kinds[layer] != FULL:
                raise BackendError(f"The states of layer {layer} can be recorded in one forward without a cache alone.")
            past = 0 if cache is None else int(cache.get_seq_length(layer))
            if past:
                old = self._inputs.get(layer)
                if old is None or old[0].shape[1] < past or len(old[0]) != len(hidden):
                    raise BackendError(
                        f"The cache holds {past} tokens that were not recorded, so attention cannot be computed. Start "
                        "the conversation inside the `record` block."
                    )
                held = (old[0], *old[1])
                new = [torch.cat((a[:, :past], b), dim=1) for a, b in zip(held, new, strict=True)]
            self._inputs[layer] = new[0], (new[1], new[2])

        return before


@contextmanager
def record(model: PreTrainedModel, layers: Sequence[int]) -> Iterator[Recording]:
    """Record the inputs of these layers while the block runs the model; a forward without a past starts anew.

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
    """Return one map (rows, columns): attention to one image, in the mean over heads and tokens of an answer.

    Args:
        heads: heads by layer; none give a map of zeros.
        response: tokens of the answer. The published maps leave out its last one, which `generate` never feeds back.
        start: index of the image's first visual token.

    Raises:
        BackendError: as in `Recording.attention`.
        ValueError: `response` has no token.
    """
    image = slice(start, start + rows * columns)
    total = np.zeros(rows * columns, dtype=np.float32)
    for layer, chosen in heads.items():
        found = recorded.attention(layer, chosen, response, image, mask=mask)[row]
        if not found.shape[1]:
            raise ValueError("no token of the answer is in response, so there is no mean; give at least one")
        total += found.mean(dim=1).sum(dim=0).cpu().numpy()
    count = sum(len(chosen) for chosen in heads.values())
    return (total / np.float32(max(1, count))).reshape(rows, columns)


def norm_map(
    recorded: Recording, layer: int, *, start: int, rows: int, columns: int, row: int = 0
) -> NDArray[np.float32]:
    """Return L2 norms of the states of an image's visual tokens as a map (rows, columns), for `make_labels`.

    In the paper visual tokens with a large norm are attention sinks (the published code finds them by heads).
    """
    states = recorded.states(layer)[row, start : start + rows * columns].float()
    norms: NDArray[np.float32] = torch.linalg.vector_norm(states, dim=-1).reshape(rows, columns).cpu().numpy()
    return norms


def _index(tokens: Tokens) -> slice | list[int]:
    return tokens if isinstance(tokens, slice) else list(tokens)
