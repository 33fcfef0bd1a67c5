"""Differences between the supported versions of transformers (5.17 to the newest), all in this file.

A parameter or a form is looked for, never a version number, so that unreleased versions work as well.
"""

from collections.abc import Callable, Iterable
from functools import cache as memoised
from inspect import signature
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel
from transformers.utils.generic import ModelOutput

from qzoom_agent.perception.adapters import text_model


@memoised
def _parameters(function: Callable[..., Any]) -> frozenset[str]:
    return frozenset(signature(function).parameters)


def cache_name(function: Callable[..., Any]) -> str:
    """Return a stock function's name for its cache: `cache` from transformers 5.24 on, `past_key_values` before."""
    # a bound method would keep its model in memory
    return "cache" if "cache" in _parameters(getattr(function, "__func__", function)) else "past_key_values"


def keys_for_others(layer: torch.nn.Module) -> dict[str, Any]:
    """Return the argument in which layers of Gemma 4 leave keys for later layers; none of a supported model reads them.

    From transformers 5.24 on they are left even where no layer shares any.
    """
    return {"shared_kv_states": {}} if "shared_kv_states" in _parameters(type(layer).forward) else {}


def crop(layers: Iterable[Any], surplus: int) -> None:
    """Drop the last `surplus` tokens of layers of a cache, some of which may hold none yet."""
    for layer in layers:
        # the layer's own `crop` fails on an empty one before transformers 5.22
        if layer.is_initialized:
            layer.crop(-surplus)


def image_features(model: PreTrainedModel, inputs: dict[str, Any]) -> Any:
    """Return the output of `get_image_features`, in which each deepstack level is one tensor for each image."""
    found: Any = model.get_image_features(**inputs, return_dict=True)  # type: ignore[operator]
    levels = getattr(found, "deepstack_features", None) or []
    if any(isinstance(level, Tensor) for level in levels):  # all images in one tensor, before 5.18
        sizes = [len(part) for part in found.pooler_output]
        found.deepstack_features = [level.split(sizes) for level in levels]
    return found


def forward(
    model: PreTrainedModel,
    ids: Tensor,
    *,
    positions: Tensor,
    cache: DynamicCache,
    features: ModelOutput | None = None,
    **more: Any,
) -> Tensor:
    """Run the stock model on ids (1, tokens) behind a cache; return logits (1, vocabulary) after the last id.

    Args:
        ids: token ids, image placeholders expanded.
        positions: of the ids, as the stock model takes them.
        cache: holds what comes before, and receives keys and values.
        features: `image_features` of the views in the ids.
    """
    inputs = {"position_ids": positions, "use_cache": True, cache_name(type(model).forward): cache, **more}
    if features is None:
        inputs["input_ids"] = ids
    elif "mm_encoder_outputs" in _parameters(type(model).forward):
        inputs |= {"input_ids": ids, "mm_encoder_outputs": {"image": features}}
    else:  # before 5.18 a forward takes pixels, or embeddings in which the features already are
        visual = ids == model.config.image_token_id
        pooled: Any = features.pooler_output  # type: ignore[attr-defined]
        flat = pooled if isinstance(pooled, Tensor) else torch.cat(tuple(pooled))
        # the id of a placeholder may lie outside the vocabulary
        embedded = model.get_input_embeddings()(ids.masked_fill(visual, 0))
        inputs["inputs_embeds"] = embedded.masked_scatter(visual[..., None], flat.flatten(0, -2).to(embedded))
        if levels := getattr(features, "deepstack_features", None):
            # only the decoder itself takes features of lower layers
            text, stacked = text_model(model), [torch.cat(tuple(level)).to(embedded) for level in levels]
            states = text(visual_pos_masks=visual, deepstack_visual_embeds=stacked, **inputs).last_hidden_state
            last: Tensor = model.lm_head(states[:, -1:])[:, -1]
            return last
    logits: Tensor = model(logits_to_keep=1, **inputs).logits[:, -1]
    return logits
