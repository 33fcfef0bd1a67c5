"""Attention of chosen heads, computed from the inputs of their layers.

Labels (`labels.py`) need the attention of a few heads, from the tokens of an answer to those of an image. Asking a
model for its attention forces the slow kernel on every layer. Instead the inputs of a few layers are kept while the
decoder runs, on any kernel, and softmax(q k / sqrt d) is computed later for the rows and heads that are needed (the
map M of SD-RPN, arXiv 2509.16944, and Q-Zoom, arXiv 2604.06912, section 3.1).

    kept = layer_inputs(decoder, new, layers, rotary=rotary, mask=mask)
    rows = kept.attention(layer, heads, queries, keys)

Attention is computed for layers with full attention and queries that do not see forwards: packed rows, trees and
sliding windows are not supported.
"""

from collections.abc import Collection, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from qzoom_agent.errors import BackendError
from qzoom_agent.perception.adapters import FULL, full_layers, of_full_layers
from qzoom_agent.perception.decoder import Decoder, Embedded, Rotaries, Rotary, project, rotate
from qzoom_agent.perception.labels import Heads
from qzoom_agent.perception.masks import Masks

Tokens = slice | Sequence[int]
"""Indices of tokens of a sequence."""


@dataclass(frozen=True, slots=True)
class LayerInputs:
    """What went into some layers in one pass. Made by `layer_inputs`."""

    decoder: Decoder
    states: dict[int, Tensor]
    """Input of each layer, (batch, tokens, hidden), before the layer's norm."""
    rotary: Rotary
    """Of the layers with full attention."""

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
            BackendError: the layer has no full attention, or no such head.
        """
        decoder, rotary = self.decoder, self.rotary
        if decoder.kinds[layer] != FULL:
            full = ", ".join(map(str, full_layers(decoder.config)))
            raise BackendError(
                f"Attention of layer {layer} was asked for, which has {decoder.kinds[layer].replace('_', ' ')}. Choose "
                f"heads among the layers with full attention: {full}."
            )
        module = decoder.text.layers[layer]
        attention, normed = module.self_attn, module.input_layernorm(self.states[layer])
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


def layer_inputs(
    decoder: Decoder, new: Embedded, layers: Collection[int], *, rotary: Rotaries, mask: Masks
) -> LayerInputs:
    """Run the decoder as far as the deepest of these layers, and keep what goes into each of them.

    Raises:
        BackendError: the model has no such layer.
    """
    if beyond := sorted(layer for layer in layers if not 0 <= layer < decoder.depth):
        raise BackendError(
            f"Attention of layer {beyond[0]} was asked for, but this model's layers are 0 to {decoder.depth - 1}. "
            "Heads belong to one base model: use the list made for this one."
        )
    states: dict[int, Tensor] = {}
    done = 0
    for layer in sorted(set(layers)):
        new = new._replace(hidden=decoder.run(new, range(done, layer), rotary=rotary, mask=mask))
        states[layer], done = new.hidden, layer
    return LayerInputs(decoder, states, of_full_layers(rotary))


def response_map(
    kept: LayerInputs,
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
        BackendError: as in `LayerInputs.attention`.
        ValueError: `response` has no token.
    """
    image = slice(start, start + rows * columns)
    total = np.zeros(rows * columns, dtype=np.float32)
    for layer, chosen in heads.items():
        found = kept.attention(layer, chosen, response, image, mask=mask)[row]
        if not found.shape[1]:
            raise ValueError("no token of the answer is in response, so there is no mean; give at least one")
        total += found.mean(dim=1).sum(dim=0).cpu().numpy()
    count = sum(len(chosen) for chosen in heads.values())
    return (total / np.float32(max(1, count))).reshape(rows, columns)


def norm_map(
    kept: LayerInputs, layer: int, *, start: int, rows: int, columns: int, row: int = 0
) -> NDArray[np.float32]:
    """Return L2 norms of the states of an image's visual tokens as a map (rows, columns), for `make_labels`.

    In the paper visual tokens with a large norm are attention sinks (the published code finds them by heads).
    """
    states = kept.states[layer][row, start : start + rows * columns].float()
    norms: NDArray[np.float32] = torch.linalg.vector_norm(states, dim=-1).reshape(rows, columns).cpu().numpy()
    return norms


def _index(tokens: Tokens) -> slice | list[int]:
    return tokens if isinstance(tokens, slice) else list(tokens)
