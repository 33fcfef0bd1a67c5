"""The stock decoder, driven layer by layer, so that a prefill can stop after layer K and continue later.

A stock forward runs all layers or none. Perception runs `layers[:K]` over the coarse conversation, looks at the result,
then runs either `layers[K:]` over the same tokens or, with a crop inserted, `layers[:K]` over the new tokens and
`layers[K:]` over everything. Modules and rotary embeddings are the stock ones, called in the stock order, so a prefill
driven in one go equals the stock prefill: bit for bit where all layers have full attention, else up to rounding
(tests/perception). Caches belong to the caller.

Shapes: hidden states (batch, tokens, hidden); queries, keys and values (batch, heads, tokens, width).
"""

from collections.abc import Sequence
from copy import copy
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention
from transformers import DynamicCache, PreTrainedModel
from transformers.masking_utils import create_causal_mask

from qzoom_agent.errors import BackendError
from qzoom_agent.perception.adapters import FULL, LINEAR, SLIDING, adapter_for, layer_kinds, of_full_layers, text_model
from qzoom_agent.perception.caches import Snapshots, copied_cache, new_cache
from qzoom_agent.perception.masks import Masks, layer_masks
from qzoom_agent.perception.transformers_versions import cache_name, keys_for_others

Rotary = tuple[Tensor, Tensor]
"""Cosines and sines, (batch, tokens, width) each; the width may be a part of a head's."""
Rotaries = Rotary | dict[str, Rotary]
"""Rotary embeddings for all layers, or for each kind of layer."""


class Embedded(NamedTuple):
    """Input of the first layer."""

    hidden: Tensor
    """(batch, tokens, hidden): text embeddings, with image features in the places of visual tokens."""
    visual: Tensor
    """(batch, tokens) bool: True for visual tokens."""
    deepstack: list[Tensor]
    """Features added to the visual tokens after layers 0, 1, ...: (visual tokens, hidden) each; often none."""

    def cut(self, tokens: slice) -> "Embedded":
        """Return some of the tokens, in families without deepstack features."""
        assert not self.deepstack
        return Embedded(self.hidden[:, tokens], self.visual[:, tokens], [])


class Decoder:
    """The decoder of one stock model. Holds no state of a conversation; threads may share it."""

    def __init__(self, model: PreTrainedModel) -> None:
        self.model = model
        self.adapter = adapter_for(model.config)
        self.text: Any = text_model(model)
        self.config = self.text.config
        self.depth = len(self.text.layers)
        self.kinds = layer_kinds(self.config)
        """Kind of each layer."""
        self.recurrent = LINEAR in self.kinds
        """Some layers hold one state of the whole past, which cannot be cropped."""
        kernel = self.config._attn_implementation
        if SLIDING in self.kinds and kernel not in ("sdpa", "eager"):
            raise BackendError(
                f"Perception on {self.adapter.name} needs a mask for each kind of layer, which the attention kernel "
                f"'{kernel}' does not take. Load the model with attn_implementation='sdpa'."
            )

    def cache(self) -> DynamicCache:
        """Return an empty cache."""
        return new_cache(self.model.config)

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

    def rotary(self, hidden: Tensor, positions: Tensor) -> Rotaries:
        """Return rotary embeddings of positions, (3, batch, tokens) for MRoPE families, else (batch, tokens)."""
        if SLIDING in self.kinds:
            return {kind: self.text.rotary_emb(hidden, positions, kind) for kind in set(self.kinds)}
        cos, sin = self.text.rotary_emb(hidden, positions)
        return cos, sin

    def mask(self, hidden: Tensor, past: DynamicCache | None = None, *, visual: Tensor | None = None) -> Masks:
        """Return the masks of new tokens over themselves and those of `past`, in rows without padding.

        Args:
            hidden: embeddings or states of the new tokens.
            past: the cache in front of them.
            visual: which of the new tokens are visual, for families in which those see each other forwards.
        """
        if SLIDING in self.kinds:
            columns = hidden.shape[1] + (0 if past is None else past.get_seq_length())
            valid = torch.ones(len(hidden), columns, dtype=torch.bool, device=hidden.device)
            return layer_masks(self.model.config, valid, hidden, visual=visual)
        given: dict[str, Any] = {"attention_mask": None, cache_name(create_causal_mask): past}
        made: Any = create_causal_mask(config=self.config, inputs_embeds=hidden, **given)
        mask: Tensor | None = made
        return {FULL: mask, LINEAR: None} if self.recurrent else mask

    def run(
        self,
        new: Embedded | Tensor,
        layers: range,
        *,
        rotary: Rotaries,
        mask: Masks,
        cache: DynamicCache | None = None,
    ) -> Tensor:
        """Run some of the layers on embedded tokens, or on states that a lower layer left; return their states.

        Args:
            new: input of the first of `layers`, with deepstack features where it is the model's own input.
            mask: additive mask (batch, 1, tokens, keys), or one for each kind of layer; None for the causal mask of
                unpadded rows.
            cache: receives keys and values; what it already holds is attended to.
        """
        hidden, visual, deepstack = new if isinstance(new, Embedded) else (new, None, [])
        for index in layers:
            kind = self.kinds[index]
            hidden = run_layer(
                self.text.layers[index],
                hidden,
                rotary=rotary[kind] if isinstance(rotary, dict) else rotary,
                mask=mask[kind] if isinstance(mask, dict) else mask,
                cache=cache,
            )
            if index < len(deepstack):
                # on a copy: a layer may return a tensor that others still hold
                hidden = hidden.clone()
                hidden[visual] = hidden[visual] + deepstack[index].to(hidden.device, hidden.dtype)
        return hidden

    def logits(self, hidden: Tensor) -> Tensor:
        """Return logits (batch, vocabulary) after the last token of the last layer's output."""
        # normed whole and then cut, in the stock order: a kernel may round a single row differently
        return self.head(self.text.norm(hidden)[:, -1:])[:, -1]

    def finish(
        self, hidden: Tensor, k: int, *, rotary: Rotaries, mask: Masks, cache: DynamicCache, lean: bool
    ) -> tuple[Tensor, float]:
        """Run the layers from `k` on over states after K layers; return logits after the last token, and the work.

        Args:
            hidden: the states, (batch, tokens, hidden).
            k: layers that have run.
            rotary: rotary embeddings of all tokens.
            mask: as for `run`.
            cache: receives keys and values.
            lean: as for `Prefill.finish`.

        Returns:
            Logits (batch, vocabulary), and the work for each token, in layers.
        """
        lean = lean and is_plain(self.text.layers[-1])
        full = range(k, self.depth - int(lean))
        out, work = self.run(hidden, full, rotary=rotary, mask=mask, cache=cache), float(len(full))
        if lean:
            last = self.text.layers[-1]
            out = last_token(last, out, rotary=of_full_layers(rotary), mask=of_full_layers(mask), cache=cache)
            work += last_token_share(last)
        return self.logits(out), work

    def head(self, normed: Tensor) -> Tensor:
        """Return logits (..., vocabulary) of normed states of the last layer."""
        logits: Tensor = self.model.lm_head(normed)
        cap = getattr(self.config, "final_logit_softcapping", None)
        return logits if cap is None else torch.tanh(logits / cap) * cap


class Prefill:
    """An unfinished prefill of one conversation (batch of one).

    After `extend`, `hidden` and the cache of layers 0..K-1 cover all tokens so far, while layers K.. have seen nothing.
    A crop inserted behind a shared beginning costs only its own tokens in the lower layers: `keep` what is shared,
    `extend` by the rest, `finish` through the upper layers. No token sees what follows its own image, so the result is
    that of one pass over the final conversation (Q-Zoom 3.3; a test compares them).
    """

    def __init__(self, decoder: Decoder, k: int) -> None:
        self.decoder, self.k = decoder, k
        self.cache = decoder.cache()
        self.hidden: Tensor | None = None
        """States after K layers, (1, tokens, hidden)."""
        self.visual: Tensor | None = None
        """(1, tokens) bool: True for visual tokens."""
        self._snapshots = Snapshots()

    def fork(self) -> "Prefill":
        """Return a prefill of the same tokens that goes on by itself."""
        other = copy(self)
        other.cache, other._snapshots = copied_cache(self.cache), self._snapshots.copy()
        return other

    def extend(self, new: Embedded, rotary: Rotaries) -> int:
        """Run the lower layers on new tokens behind those that are there; return the work in token-layers."""
        tokens = new.hidden.shape[1]
        # a crop will be inserted behind the last image, where recurrent states have to be remembered
        edge = int(new.visual[0].nonzero().max()) + 1 if self.decoder.recurrent and bool(new.visual.any()) else tokens
        if edge == tokens:
            self._extend(new, rotary)
        else:
            for part in (slice(edge), slice(edge, None)):
                self._extend(new.cut(part), cut(rotary, part))
        return self.k * tokens

    def _extend(self, new: Embedded, rotary: Rotaries) -> None:
        mask = self.decoder.mask(new.hidden, self.cache if self.hidden is not None else None, visual=new.visual)
        states = self.decoder.run(new, range(self.k), rotary=rotary, mask=mask, cache=self.cache)
        self.hidden = states if self.hidden is None else torch.cat((self.hidden, states), dim=1)
        self.visual = new.visual if self.visual is None else torch.cat((self.visual, new.visual), dim=1)
        if self.decoder.recurrent and bool(new.visual[0, -1]):
            self._snapshots.take(self.cache, self.hidden.shape[1])

    def keep(self, count: int) -> int:
        """Drop all but the first `count` tokens, or more where recurrent states have to; return how many are left."""
        assert self.hidden is not None
        left = self._snapshots.crop(self.cache, count, surplus=self.hidden.shape[1] - count)
        if not left:
            self.cache, self.hidden, self.visual = self.decoder.cache(), None, None
            return 0
        self.hidden = self.hidden[:, :left]
        self.visual = None if self.visual is None else self.visual[:, :left]
        return left

    def finish(self, rotary: Rotaries, *, lean: bool = False) -> tuple[Tensor, float]:
        """Run the upper layers on all tokens. The cache is then that of an ordinary prefill.

        Args:
            rotary: rotary embeddings of all tokens.
            lean: compute the last layer's keys and values for all tokens and the rest of it for the last one alone,
                which is all that is read: a layer cheaper, and equal up to rounding. Without effect in families
                whose layers have another form.

        Returns:
            Logits (1, vocabulary) after the last token, and the work in token-layers.
        """
        assert self.hidden is not None
        states, self.hidden = self.hidden, None
        decoder, tokens = self.decoder, states.shape[1]
        mask = decoder.mask(states, visual=self.visual)
        logits, work = decoder.finish(states, self.k, rotary=rotary, mask=mask, cache=self.cache, lean=lean)
        return logits, work * tokens


def is_plain(layer: nn.Module) -> bool:
    """Return True for a layer of the usual form: attention without an output gate, two norms, no more."""
    attention: Any = getattr(layer, "self_attn", None)
    usual = {"self_attn", "mlp", "input_layernorm", "post_attention_layernorm"}
    names = {name for name, _ in layer.named_children()}
    return names == usual and bool(attention.q_proj.out_features == attention.o_proj.in_features)


def run_layer(
    layer: Any, hidden: Tensor, *, rotary: Rotary, mask: Tensor | None, cache: DynamicCache | None = None
) -> Tensor:
    """Run a decoder layer, (batch, tokens, hidden); the arguments are those of `last_token`."""
    out: Tensor = layer(
        hidden,
        attention_mask=mask,
        position_ids=None,
        use_cache=cache is not None,
        position_embeddings=rotary,
        **{cache_name(layer.forward): cache},
        **keys_for_others(layer),
    )
    return out


def last_token(
    layer: Any, hidden: Tensor, *, rotary: Rotary, mask: Tensor | None, cache: DynamicCache | None = None
) -> Tensor:
    """Run a layer for the last token alone: keys and values of all tokens, the rest of one. Returns (batch, 1, hidden).

    A layer that is not plain is run for all tokens.

    Args:
        hidden: its input, (batch, tokens, hidden).
        rotary: rotary embeddings of all tokens.
        mask: additive mask (batch, 1, tokens, tokens), or None.
        cache: receives the keys and values; must hold none of this layer yet.
    """
    if not is_plain(layer):
        return run_layer(layer, hidden, rotary=rotary, mask=mask, cache=cache)[:, -1:]
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


def project(
    states: Tensor, linear: nn.Module, norm: nn.Module | None, width: int, *, heads: int | None = None
) -> Tensor:
    """Return queries, keys or values (batch, heads, tokens, width) of states (batch, tokens, hidden), not rotated.

    With `heads`, what else the projection has of a head is left out: in Qwen3.5 a gate follows each query.
    """
    parts: Tensor = linear(states).unflatten(-1, (-1, width) if heads is None else (heads, -1))[..., :width]
    # the norm is over the width of a head, before heads and tokens change places
    return (parts if norm is None else norm(parts)).transpose(1, 2)


def rotate(parts: Tensor, rotary: Rotary) -> Tensor:
    """Apply rotary embeddings to (batch, heads, tokens, width), as all supported families do."""
    cos, sin = (part[:, None] for part in rotary)
    width = cos.shape[-1]
    if width < parts.shape[-1]:  # the rest of a head is not rotated
        return torch.cat((rotate(parts[..., :width], rotary), parts[..., width:]), dim=-1)
    half = width // 2
    turned = torch.cat((-parts[..., half:], parts[..., :half]), dim=-1)
    return parts * cos + turned * sin


R = TypeVar("R", Rotary, Rotaries)


def cut(rotary: R, tokens: slice) -> R:
    """Return the rotary embeddings of some of the tokens."""
    if isinstance(rotary, dict):
        return {kind: cut(one, tokens) for kind, one in rotary.items()}
    return rotary[0][:, tokens], rotary[1][:, tokens]


def last_token_share(layer: Any) -> float:
    """Return the work of `last_token` for each token, in layers."""
    return layer_share((layer.self_attn.k_proj, layer.self_attn.v_proj), layer) if is_plain(layer) else 1.0


def layer_share(run: Sequence[nn.Module], layer: nn.Module) -> float:
    """Return the share of a layer's weights that these of its modules have."""
    some = sum(weight.numel() for part in run for weight in part.parameters())
    return float(some / sum(weight.numel() for weight in layer.parameters()))
