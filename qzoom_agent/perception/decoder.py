"""The stock decoder, driven layer by layer, so that a prefill can stop at layer K and go on later.

A stock forward runs all layers or none. Perception needs `layers[:K]` over the coarse conversation, then a look at what
came out, then either `layers[K:]` over the same tokens or, with a crop inserted, `layers[:K]` over the new tokens only
and `layers[K:]` over everything. The modules, masks and rotary embeddings are the stock ones, called in the stock order
with the stock arguments, so a prefill driven in one go is the stock prefill bit for bit (tests/perception holds it to
that). Nothing is kept between calls; caches belong to the caller.
"""

from collections.abc import Callable, Sequence
from inspect import signature
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel
from transformers.masking_utils import create_causal_mask

from qzoom_agent.perception.adapters import adapter_for, text_model

Rotary = tuple[Tensor, Tensor]
"""Cosines and sines, (batch, tokens, head width) each."""


def cache_name(function: Callable[..., Any]) -> str:
    """What a stock function calls its cache: `cache` from transformers 5.24 on, `past_key_values` before."""
    return "cache" if "cache" in signature(function).parameters else "past_key_values"


class Embedded(NamedTuple):
    """Input of the first layer."""

    hidden: Tensor
    """(batch, tokens, hidden): text embeddings with image features in the places of visual tokens."""
    visual: Tensor
    """(batch, tokens) bool: which tokens are visual."""
    deepstack: list[Tensor]
    """Features added to the visual tokens after layers 0, 1, ...: (visual tokens, hidden) each; most families: none."""


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
            features: what the family's `get_image_features` gave, one for each image or for several in order.
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
        # a level is a tensor for each image
        deepstack = [torch.cat([part for image in level for part in image]) for level in zip(*stacks, strict=True)]
        return Embedded(hidden, visual, deepstack)

    def rotary(self, hidden: Tensor, positions: Tensor) -> Rotary:
        """Rotary embeddings of positions, (3, batch, tokens) for MRoPE families, else (batch, tokens)."""
        cos, sin = self.text.rotary_emb(hidden, positions)
        return cos, sin

    def mask(self, hidden: Tensor, past: DynamicCache | None = None) -> Tensor | None:
        """Causal mask of new tokens over themselves and what layer 0 of `past` holds; None where it is implied."""
        more: dict[str, Any] = {self._mask_cache: past}
        mask: Any = create_causal_mask(config=self.config, inputs_embeds=hidden, attention_mask=None, **more)
        return mask  # type: ignore[no-any-return]

    def run(
        self,
        hidden: Tensor,
        layers: range,
        *,
        rotary: Rotary,
        mask: Tensor | None,
        cache: DynamicCache | None = None,
        visual: Tensor | None = None,
        deepstack: Sequence[Tensor] = (),
    ) -> Tensor:
        """`hidden` (batch, tokens, hidden) through some of the layers; keys and values go to `cache`."""
        for index in layers:
            hidden = self.text.layers[index](
                hidden,
                attention_mask=mask,
                position_ids=None,
                use_cache=cache is not None,
                position_embeddings=rotary,
                **{self._layer_cache: cache},
            )
            if index < len(deepstack) and visual is not None:
                hidden = hidden.clone()
                hidden[visual] = hidden[visual] + deepstack[index].to(hidden.device, hidden.dtype)
        return hidden

    def logits(self, hidden: Tensor) -> Tensor:
        """Logits (batch, vocabulary) after the last token of the last layer's output."""
        # normed whole and then cut, in the stock order: a kernel may round a single row differently
        logits: Tensor = self.model.lm_head(self.text.norm(hidden)[:, -1:])[:, -1]
        return logits
