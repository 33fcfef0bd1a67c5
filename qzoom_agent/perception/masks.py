"""Attention masks of batches that are padded on the left, for each kind of layer.

Full attention sees every earlier token of its row, a sliding window only the last ones, and linear attention is told
which tokens are padding. In Gemma 4 the tokens of an image also see each other forwards, in the layers where the stock
model lets them.

Shapes: valid (rows, columns) bool, True for real tokens; additive masks (rows, 1, new tokens, columns).
"""

import torch
from torch import Tensor
from transformers import PretrainedConfig

from qzoom_agent.perception.adapters import FULL, LINEAR, SLIDING, layer_kinds

Masks = Tensor | None | dict[str, Tensor | None]
"""A mask for all layers, or one for each kind of layer; None where the mask is implied."""


def layer_masks(config: PretrainedConfig, valid: Tensor, like: Tensor, *, visual: Tensor | None = None) -> Masks:
    """Return the masks of new tokens, the last columns of `valid`, over all real ones.

    Args:
        valid: the columns that are real.
        like: embeddings of the new tokens, (rows, new tokens, hidden); of masks, they give length and number format.
        visual: the new tokens that are visual, (rows, new tokens) bool; an image is never cut. None: none is.
    """
    text, new = config.get_text_config(), like.shape[1]
    kinds, seen = set(layer_kinds(text)), _causal(valid, new)
    if kinds == {FULL}:
        return _additive(seen, like)
    if LINEAR in kinds:
        return {FULL: _additive(seen, like), LINEAR: None if bool(valid.all()) else valid[:, -new:]}
    place = valid.cumsum(dim=1)  # index of a real token among those of its row
    near = place[:, None, :] > place[:, -new:, None] - text.sliding_window
    if visual is None or getattr(text, "use_bidirectional_attention", None) != "vision":
        return {FULL: _additive(seen, like), SLIDING: _additive(seen & near, like)}
    same = _same_image(visual, valid.shape[1])
    if config.model_type == "gemma4_unified":
        return {FULL: _additive(seen | same, like), SLIDING: _additive((seen & near) | same, like)}
    return {FULL: _additive(seen, like), SLIDING: _additive((seen | same) & near, like)}


def _causal(valid: Tensor, new: int) -> Tensor:
    """Return which columns the last `new` ones see: all real ones up to themselves.

    A padded token sees itself, so that no row of the softmax is empty; no real token ever sees it.
    """
    keys = valid.shape[1]
    at = torch.arange(keys, device=valid.device)
    asking = at[keys - new :, None]
    return (valid[:, None, :] & (at <= asking)) | (at == asking)


def _same_image(visual: Tensor, keys: int) -> Tensor:
    """Return which pairs (rows, new tokens, columns) of a new token and a column belong to one image."""
    before = torch.zeros_like(visual)
    before[:, 1:] = visual[:, :-1]
    # images are counted as they begin; between two of them there is always a marker
    image = torch.where(visual, (visual & ~before).cumsum(dim=1), 0)
    every = torch.nn.functional.pad(image, (keys - visual.shape[1], 0))
    return (image[:, :, None] == every[:, None, :]) & visual[:, :, None]


def _additive(seen: Tensor, like: Tensor) -> Tensor:
    floor = torch.finfo(like.dtype).min
    return torch.zeros(seen.shape, dtype=like.dtype, device=like.device).masked_fill(~seen, floor)[:, None]
