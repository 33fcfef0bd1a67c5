"""AnyRes models (LLaVA-NeXT, LLaVA-OneVision) perceive on their base view, and a crop takes the place of their tiles.

Such a model shows an image as a base view of a fixed grid and up to a dozen tiles, unpadded and pooled, which together
cost thousands of tokens whatever the question. With branches the tiles are left out: the map is laid over the base
view, whose tokens form a grid, and detail comes from the inserted crop, itself a base view. The form is the model's own
for an image without tiles: the grid's tokens and one newline.

No published code does this (SD-RPN covers LLaVA-1.5 alone); it is an extension of ours, not a reproduction.
"""

from typing import Any

import torch
from torch import Tensor
from transformers import PretrainedConfig, PreTrainedModel
from transformers.modeling_outputs import BaseModelOutputWithPooling

ANYRES = frozenset({"llava_next", "llava_onevision"})


def has_tiles(config: PretrainedConfig) -> bool:
    """Whether the family shows an image as a base view and tiles."""
    return config.model_type in ANYRES


def base_view(model: PreTrainedModel, pixels: Tensor) -> BaseModelOutputWithPooling:
    """Features of an image's base view, in the form of `get_image_features`.

    Args:
        pixels: (1, tiles, 3, height, width), the base view first, as the family's processor gives them.
    """
    config = model.config
    inner: Any = model.base_model
    states = inner.vision_tower(pixels[:, 0], output_hidden_states=True, return_dict=True).hidden_states
    layers = config.vision_feature_layer
    chosen = states[layers] if isinstance(layers, int) else torch.cat([states[layer] for layer in layers], dim=-1)
    if config.vision_feature_select_strategy == "default":
        chosen = chosen[:, 1:]  # the class token
    grid = inner.multi_modal_projector(chosen)[0]
    features = torch.cat((grid, inner.image_newline[None].to(grid)))
    return BaseModelOutputWithPooling(pooler_output=[features])  # type: ignore[arg-type]
