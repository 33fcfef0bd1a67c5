"""Nano's forward pass over a batch of trees without padding: the stock modules, driven over flat tokens.

The stock forward pads every row to the longest and attends over all of it, and calls attention once per image window.
On two CPU cores that costs three times the arithmetic that matters. Here linear layers see one flat list of tokens (or
patches), and attention runs over index blocks (`trees.Block`). What lies between two attentions can be compiled
(`fuse`), which halves a step on two cores once more; it needs a C++ compiler and a minute at the start. Weights, norms
and rotary embeddings are the stock modules themselves, and a test holds every branch against the stock model's own
forward.
"""

from collections.abc import Callable, Sequence
from functools import cache
from typing import Any, NamedTuple, ParamSpec, TypeVar

import torch
from torch import Tensor
from torch.nn.functional import embedding, scaled_dot_product_attention
from transformers import Qwen2_5_VLForConditionalGeneration
from transformers.models.qwen2_5_vl.modeling_qwen2_5_vl import apply_rotary_pos_emb, apply_rotary_pos_emb_vision
from transformers.vision_utils import get_vision_position_ids

from nano.trees import MERGE, Block

_P = ParamSpec("_P")
_R = TypeVar("_R")
_FLASH_FROM = 700
"""Tokens from which the fused kernel beats plain matrix products on a CPU (its backward is slow on small blocks)."""


@cache
def _compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    # each layer, with and without gradients, is a variant of its own, and past the limit all would run uncompiled
    dynamo: Any = torch._dynamo
    dynamo.config.recompile_limit = max(64, dynamo.config.recompile_limit)
    return torch.compile(function, dynamic=True)


def _fused(function: Callable[_P, _R], fuse: bool) -> Callable[_P, _R]:
    return _compiled(function) if fuse else function


def attend(query: Tensor, key: Tensor, value: Tensor, blocks: Sequence[Block]) -> Tensor:
    """Attention of flat tokens (N, heads, d) over blocks; returns (N, heads * d)."""
    heads, width = query.shape[1:]
    pair = torch.cat((key, value), dim=1)
    outputs, owners = [], []
    for block in blocks:
        q = _take(query, block.query)
        k, v = _take(pair, block.key).chunk(2, dim=1)
        if key.shape[1] < heads:
            k, v = (part.repeat_interleave(heads // key.shape[1], dim=1) for part in (k, v))
        if block.bias is None and block.query.shape[1] >= _FLASH_FROM:
            mixed = scaled_dot_product_attention(q, k, v)
        else:
            scores = (q * width**-0.5) @ k.transpose(2, 3)
            if block.bias is not None:
                scores = scores + block.bias
            mixed = torch.softmax(scores, dim=-1) @ v
        flat, where = mixed.transpose(1, 2).reshape(-1, heads * width), block.query.reshape(-1)
        if block.bias is not None:
            real = torch.nonzero(where >= 0)[:, 0]
            flat, where = embedding(real, flat), where[real]
        outputs.append(flat)
        owners.append(where)
    order = torch.empty(query.shape[0], dtype=torch.long, device=query.device)
    order[torch.cat(owners)] = torch.arange(query.shape[0], device=query.device)
    return embedding(order, torch.cat(outputs))


def _take(flat: Tensor, index: Tensor) -> Tensor:
    """Rows of (N, heads, d) as (n, heads, L, d); padding reads row 0, which the bias hides. (`embedding`, because the
    backward of plain indexing is serial and that of `index_select` not much better.)"""
    rows = embedding(index.clamp_min(0), flat.reshape(flat.shape[0], -1))
    return rows.view(*index.shape, *flat.shape[1:]).transpose(1, 2)


def see(
    model: Qwen2_5_VLForConditionalGeneration,
    pixels: Tensor,
    grids: Tensor,
    *,
    windows: Sequence[Block],
    whole: Sequence[Block],
    fuse: bool = False,
) -> Tensor:
    """Visual tokens of all images, shape (tokens, hidden), from patches of one frame each."""
    tower = model.model.visual
    kernel = tower.patch_embed.proj.weight
    # the stock convolution, whose stride is its size, over two equal frames
    hidden = pixels @ kernel.sum(2).view(kernel.shape[0], -1).T
    cos, sin = tower.rotary_pos_emb(hidden, get_vision_position_ids(grids, MERGE))
    before, after = _fused(_before_seeing, fuse), _fused(_after_seeing, fuse)
    for index, block in enumerate(tower.blocks):
        blocks = whole if index in tower.fullatt_block_indexes else windows
        hidden = after(block, hidden, attend(*before(block, hidden, cos, sin), blocks))
    seen: Tensor = tower.merger(hidden)
    return seen


def _before_seeing(block: Any, hidden: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    attention = block.attn
    parts = attention.qkv(block.norm1(hidden)).reshape(hidden.shape[0], 3, attention.num_heads, -1)
    query, key, value = parts.unbind(1)
    query, key = apply_rotary_pos_emb_vision(query, key, cos, sin)
    return query, key, value


def _after_seeing(block: Any, hidden: Tensor, mixed: Tensor) -> Tensor:
    hidden = hidden + block.attn.proj(mixed)
    done: Tensor = hidden + block.mlp(block.norm2(hidden))
    return done


class Thought(NamedTuple):
    """The result of `think`, for flat tokens."""

    hidden: Tensor
    """Final hidden states (N, hidden)."""
    tapped: dict[int, Tensor]
    """Hidden states after the decoder layers in `tap`, (N, hidden) each."""
    watched: dict[int, tuple[Tensor, Tensor]]
    """Rotated queries (N, heads, d) and keys (N, key heads, d) of the decoder layers in `watch`."""


def think(
    model: Qwen2_5_VLForConditionalGeneration,
    embeds: Tensor,
    positions: Tensor,
    blocks: list[Block],
    *,
    tap: Sequence[int],
    watch: Sequence[int],
    fuse: bool = False,
) -> Thought:
    """The language model over flat tokens, and what some of its layers had inside."""
    text = model.model.language_model
    hidden = embeds
    tapped: dict[int, Tensor] = {}
    watched: dict[int, tuple[Tensor, Tensor]] = {}
    cos, sin = text.rotary_emb(hidden, positions[:, None])
    before, after = _fused(_before_thinking, fuse), _fused(_after_thinking, fuse)
    for index, layer in enumerate(text.layers):
        query, key, value = before(layer, hidden, cos, sin)
        hidden = after(layer, hidden, attend(query, key, value, blocks))
        if index in tap:
            tapped[index] = hidden
        if index in watch:
            watched[index] = query, key
    return Thought(text.norm(hidden), tapped, watched)


def _before_thinking(layer: Any, hidden: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    attention, normed = layer.self_attn, layer.input_layernorm(hidden)
    query, key, value = (
        project(normed).view(1, hidden.shape[0], -1, attention.head_dim).transpose(1, 2)
        for project in (attention.q_proj, attention.k_proj, attention.v_proj)
    )
    query, key = apply_rotary_pos_emb(query, key, cos, sin)
    query, key, value = (part[0].transpose(0, 1) for part in (query, key, value))
    return query, key, value


def _after_thinking(layer: Any, hidden: Tensor, mixed: Tensor) -> Tensor:
    hidden = hidden + layer.self_attn.o_proj(mixed)
    done: Tensor = hidden + layer.mlp(layer.post_attention_layernorm(hidden))
    return done
