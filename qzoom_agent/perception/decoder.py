"""The stock decoder, driven layer by layer, so that a prefill can stop after layer K and continue later.

A stock forward runs all layers or none. Perception runs `layers[:K]` over the coarse conversation, looks at the result,
then runs either `layers[K:]` over the same tokens or, with a crop inserted, `layers[:K]` over the new tokens and
`layers[K:]` over everything. Modules, masks and rotary embeddings are the stock ones, called in the stock order, so a
prefill driven in one go equals the stock prefill bit for bit (tests/perception). Caches belong to the caller.

Shapes: hidden states (batch, tokens, hidden); queries, keys and values (batch, heads, tokens, width).
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention
from transformers import DynamicCache, PreTrainedModel
from transformers.masking_utils import create_causal_mask

from qzoom_agent.perception.adapters import adapter_for, text_model
from qzoom_agent.perception.transformers_versions import cache_name, crop

Rotary = tuple[Tensor, Tensor]
"""Cosines and sines, (batch, tokens, width) each."""


class Embedded(NamedTuple):
    """Input of the first layer."""

    hidden: Tensor
    """(batch, tokens, hidden): text embeddings, with image features in the places of visual tokens."""
    visual: Tensor
    """(batch, tokens) bool: True for visual tokens."""
    deepstack: list[Tensor]
    """Features added to the visual tokens after layers 0, 1, ...: (visual tokens, hidden) each; often none."""


class Decoder:
    """The decoder of one stock model. Holds no state of a conversation; threads may share it."""

    def __init__(self, model: PreTrainedModel) -> None:
        self.model = model
        self.adapter = adapter_for(model.config)
        self.text: Any = text_model(model)
        self.config = self.text.config
        self.depth = len(self.text.layers)
        self._layer_cache = cache_name(self.text.layers[0].forward)
        self._mask_cache = cache_name(create_causal_mask)

    def embed(self, ids: Tensor, features: Sequence[Any]) -> Embedded:
        """Embed ids (batch, tokens) whose visual tokens are, in reading order, those of `features`.

        Args:
            ids: token ids, image placeholders expanded.
            features: outputs of the family's `get_image_features`, one for each image or for several in order.

        Raises:
            ValueError: the ids have another number of visual tokens than the features.
        """
        hidden = self.text.embed_tokens(ids)
        visual = ids == self.model.config.image_token_id
        if not features:
            return Embedded(hidden, visual, [])
        flat = torch.cat([part for one in features for part in one.pooler_output]).to(hidden.device, hidden.dtype)
        if len(flat) != int(visual.sum()):
            raise ValueError(f"{int(visual.sum())} visual tokens in the prompt, {len(flat)} image features")
        hidden = hidden.masked_scatter(visual[..., None].expand_as(hidden), flat)
        stacks = [one.deepstack_features for one in features if getattr(one, "deepstack_features", None) is not None]
        # a level holds one tensor for each image
        deepstack = [torch.cat([part for image in level for part in image]) for level in zip(*stacks, strict=True)]
        return Embedded(hidden, visual, deepstack)

    def rotary(self, hidden: Tensor, positions: Tensor) -> Rotary:
        """Return rotary embeddings of positions, (3, batch, tokens) for MRoPE families, else (batch, tokens)."""
        cos, sin = self.text.rotary_emb(hidden, positions)
        return cos, sin

    def mask(self, hidden: Tensor, past: DynamicCache | None = None) -> Tensor | None:
        """Return the causal mask of new tokens over themselves and layer 0 of `past`; None where it is implied."""
        more: dict[str, Any] = {self._mask_cache: past}
        mask: Any = create_causal_mask(config=self.config, inputs_embeds=hidden, attention_mask=None, **more)
        return mask  # type: ignore[no-any-return]

    def run(
        self,
        new: Embedded | Tensor,
        layers: range,
        *,
        rotary: Rotary,
        mask: Tensor | None,
        cache: DynamicCache | None = None,
    ) -> Tensor:
        """Run some of the layers on embedded tokens, or on states that a lower layer left; return their states.

        Args:
            new: input of the first of `layers`, with deepstack features where it is the model's own input.
            layers: indices of the layers to run.
            rotary: rotary embeddings of the tokens' positions.
            mask: additive mask (batch, 1, tokens, keys); None for the causal mask of unpadded rows.
            cache: receives keys and values; what it already holds is attended to.
        """
        hidden, visual, deepstack = new if isinstance(new, Embedded) else (new, None, [])
        for index in layers:
            hidden = self.text.layers[index](
                hidden,
                attention_mask=mask,
                position_ids=None,
                use_cache=cache is not None,
                position_embeddings=rotary,
                **{self._layer_cache: cache},
            )
            if index < len(deepstack):
                # on a copy: a layer may return a tensor that others still hold
                hidden = hidden.clone()
                hidden[visual] = hidden[visual] + deepstack[index].to(hidden.device, hidden.dtype)
        return hidden

    def logits(self, hidden: Tensor) -> Tensor:
        """Return logits (batch, vocabulary) after the last token of the last layer's output."""
        # normed whole and then cut, in the stock order: a kernel may round a single row differently
        logits: Tensor = self.model.lm_head(self.text.norm(hidden)[:, -1:])[:, -1]
        return logits


class Prefill:
    """An unfinished prefill of one conversation (batch of one).

    After `extend`, `hidden` and the cache of layers 0..K-1 cover all tokens so far, while layers K.. have seen nothing.
    A crop inserted behind a shared beginning costs only its own tokens in the lower layers: `keep` what is shared,
    `extend` by the rest, `finish` through the upper layers. Attention is causal, so the result is that of one pass over
    the final conversation (Q-Zoom 3.3; a test compares them).
    """

    def __init__(self, decoder: Decoder, k: int) -> None:
        self.decoder, self.k = decoder, k
        self.cache = DynamicCache(config=decoder.model.config)
        self.hidden: Tensor | None = None
        """States after K layers, (1, tokens, hidden)."""

    def extend(self, new: Embedded, rotary: Rotary) -> int:
        """Run the lower layers on new tokens behind those that are there; return the work in token-layers."""
        mask = self.decoder.mask(new.hidden, self.cache if self.hidden is not None else None)
        states = self.decoder.run(new, range(self.k), rotary=rotary, mask=mask, cache=self.cache)
        self.hidden = states if self.hidden is None else torch.cat((self.hidden, states), dim=1)
        return self.k * states.shape[1]

    def keep(self, count: int) -> None:
        """Drop all but the first `count` tokens."""
        assert self.hidden is not None
        surplus = self.hidden.shape[1] - count
        if surplus:
            crop(self.cache, surplus)
            self.hidden = self.hidden[:, :count]

    def finish(self, rotary: Rotary, *, lean: bool = False) -> tuple[Tensor, float]:
        """Run the upper layers on all tokens. The cache is then that of an ordinary prefill.

        Args:
            rotary: rotary embeddings of all tokens.
            lean: compute the last layer's keys and values for all tokens and the rest of it for the last one alone,
                which is all that is read: a layer cheaper, and equal up to rounding.

        Returns:
            Logits (1, vocabulary) after the last token, and the work in token-layers.
        """
        assert self.hidden is not None
        states, self.hidden = self.hidden, None
        decoder, tokens, mask = self.decoder, states.shape[1], self.decoder.mask(states)
        full = range(self.k, decoder.depth - int(lean))
        out = decoder.run(states, full, rotary=rotary, mask=mask, cache=self.cache)
        work = float(len(full) * tokens)
        if lean:
            last = decoder.text.layers[-1]
            out = last_token(last, out, rotary=rotary, mask=mask, cache=self.cache)
            work += layer_share((last.self_attn.k_proj, last.self_attn.v_proj), last) * tokens
        return decoder.logits(out), work


def last_token(
    layer: Any, hidden: Tensor, *, rotary: Rotary, mask: Tensor | None, cache: DynamicCache | None = None
) -> Tensor:
    """Run a layer for the last token alone: keys and values of all tokens, the rest of one. Returns (batch, 1, hidden).

    Args:
        layer: a decoder layer.
        hidden: its input, (batch, tokens, hidden).
        rotary: rotary embeddings of all tokens.
        mask: additive mask (batch, 1, tokens, tokens), or None.
        cache: receives the keys and values; must hold none of this layer yet.
    """
    attention, normed = layer.self_attn, layer.input_layernorm(hidden)
    query = project(normed[:, -1:], attention.q_proj, getattr(attention, "q_norm", None), attention.head_dim)
    key = project(normed, attention.k_proj, getattr(attention, "k_norm", None), attention.head_dim)
    query, key = rotate(query, cut(rotary, slice(-1, None))), rotate(key, rotary)
    value = project(normed, attention.v_proj, None, attention.head_dim)
    if cache is not None:
        cache.update(key, value, attention.layer_idx)
    mixed = scaled_dot_product_attention(
        query,
        key,
        value,
        attn_mask=None if mask is None else mask[:, :, -1:],
        scale=attention.scaling,
        enable_gqa=query.shape[1] != key.shape[1],
    )
    out = hidden[:, -1:] + attention.o_proj(mixed.transpose(1, 2).flatten(2))
    done: Tensor = out + layer.mlp(layer.post_attention_layernorm(out))
    return done


def project(states: Tensor, linear: nn.Module, norm: nn.Module | None, width: int) -> Tensor:
    """Return queries, keys or values (batch, heads, tokens, width) of states (batch, tokens, hidden), not rotated."""
    parts: Tensor = linear(states).unflatten(-1, (-1, width))
    # the norm is over the width of a head, before heads and tokens change places
    return (parts if norm is None else norm(parts)).transpose(1, 2)


def rotate(parts: Tensor, rotary: Rotary) -> Tensor:
    """Apply rotary embeddings to (batch, heads, tokens, width), as all supported families do."""
    cos, sin = (part[:, None] for part in rotary)
    half = parts.shape[-1] // 2
    turned = torch.cat((-parts[..., half:], parts[..., :half]), dim=-1)
    return parts * cos + turned * sin


def cut(rotary: Rotary, tokens: slice) -> Rotary:
    """Return the rotary embeddings of some of the tokens."""
    return rotary[0][:, tokens], rotary[1][:, tokens]


def layer_share(run: Sequence[nn.Module], layer: nn.Module) -> float:
    """Return the share of a layer's weights that these of its modules have."""
    some = sum(weight.numel() for part in run for weight in part.parameters())
    return float(some / sum(weight.numel() for weight in layer.parameters()))
