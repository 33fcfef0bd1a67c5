"""Differences between the supported model families, as data and a few small functions.

Stock decoders of all families are built alike (`language_model.{embed_tokens, layers, rotary_emb, norm}` and
`lm_head`), so one driver (`decoder.py`) runs them all. An `Adapter`, chosen by the config's `model_type`, names what
differs. Newer families mix kinds of layers: full attention in some, linear or sliding-window attention in others.
Branches are made of full-attention layers alone. This module also lays a token grid over a view (`Grid`), aligns the
positions of a crop (`align`), and encodes the base view of models that show an image in tiles (`base_view`).
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final, Literal, TypeVar

import torch
from torch import Tensor
from transformers import PretrainedConfig, PreTrainedModel
from transformers.modeling_outputs import BaseModelOutputWithPooling

from qzoom_agent.errors import BackendError
from qzoom_agent.geometry import Box, Size

Sink = Literal["corner", "first_token", "none"]
"""Rule that finds the cells that always attract attention; see `maps.keep_mask`."""
Cells = tuple[float, float, float, float]
"""x1, y1, x2, y2 in cells of a token grid, right and bottom exclusive."""
TILED = frozenset({"llava_next", "llava_onevision"})
"""Families that show an image as a base view and up to a dozen tiles."""
FULL: Final = "full_attention"
LINEAR: Final = "linear_attention"
SLIDING: Final = "sliding_attention"
T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Adapter:
    """One model family."""

    name: str
    model_types: tuple[str, ...]
    sink: Sink
    rotated_map: bool
    """Queries and keys of the map are rotated like those of the decoder (not so in SD-RPN for LLaVA)."""
    map_norm: bool
    """A copy of the decoder's final norm comes before the map's own (SD-RPN for LLaVA)."""
    two_dimensional: bool
    """Visual tokens have a row and a column as positions (MRoPE), so that those of a crop can be aligned."""
    kinds: frozenset[str] = frozenset({FULL})
    """Kinds of layers that its decoders have."""


QWEN2_5_VL = Adapter("Qwen2.5-VL", ("qwen2_5_vl",), "corner", True, False, True)
QWEN3_VL = Adapter("Qwen3-VL", ("qwen3_vl",), "first_token", True, False, True)
QWEN3_5 = Adapter("Qwen3.5", ("qwen3_5", "qwen3_5_moe"), "none", True, False, True, frozenset({FULL, LINEAR}))
GEMMA4 = Adapter("Gemma 4", ("gemma4", "gemma4_unified"), "none", True, False, False, frozenset({FULL, SLIDING}))
LLAVA = Adapter("LLaVA", ("llava", "llava_next", "llava_onevision"), "none", False, True, False)
ADAPTERS = (QWEN2_5_VL, QWEN3_VL, QWEN3_5, GEMMA4, LLAVA)


def adapter_for(config: PretrainedConfig) -> Adapter:
    """Return the adapter for a model's config.

    Raises:
        BackendError: the family is not supported, or this model has layers that cannot be run one by one.
    """
    found = next((adapter for adapter in ADAPTERS if config.model_type in adapter.model_types), None)
    if found is None:
        known = ", ".join(f"{adapter.name} ({', '.join(adapter.model_types)})" for adapter in ADAPTERS)
        raise BackendError(
            f"Perception does not know the family '{config.model_type}'. It knows {known}. For another, add an "
            "Adapter to qzoom_agent/perception/adapters.py and run tests/perception/test_families.py on it."
        )
    text = config.get_text_config()
    if strange := sorted(set(layer_kinds(text)) - found.kinds):
        raise BackendError(
            f"This {found.name} model has layers of {' and '.join(strange)}. Perception runs {found.name} models whose "
            f"layers are of {' and '.join(sorted(found.kinds))}; set use_sliding_window to false."
        )
    if getattr(text, "hidden_size_per_layer_input", 0) or getattr(text, "num_kv_shared_layers", 0):
        raise BackendError(
            f"This {found.name} model feeds each layer embeddings of its own or shares keys between layers (as E2B and "
            "E4B do), so its layers cannot be copied as branches. Use a larger model of the family, or the policy "
            "'explicit'."
        )
    if getattr(text, "use_bidirectional_attention", None) == "all":
        raise BackendError(f"This {found.name} model attends to later text too, so it cannot be run piece by piece.")
    return found


def layer_kinds(text_config: Any) -> list[str]:
    """Return the kind of each decoder layer: "full_attention" in families that have only one."""
    kinds = getattr(text_config, "layer_types", None)
    return list(kinds) if kinds else [FULL] * int(text_config.num_hidden_layers)


def full_layers(text_config: Any) -> list[int]:
    """Return the indices of the layers with full attention: those that heads and branches are taken from."""
    return [index for index, kind in enumerate(layer_kinds(text_config)) if kind == FULL]


def of_full_layers(value: T | dict[str, T]) -> T:
    """Return the value for full-attention layers, where there may be one for each kind of layer."""
    if isinstance(value, dict):
        full: T = value[FULL]
        return full
    return value


def text_model(model: PreTrainedModel) -> Any:
    """Return the stock decoder inside a stock image-text-to-text model."""
    return model.base_model.language_model


@dataclass(frozen=True, slots=True)
class Grid:
    """The cells of one image's map and their place in the view that the model was shown."""

    rows: int
    columns: int
    cell: tuple[float, float]
    """Width and height of a cell in shown pixels of the view."""
    corner: tuple[float, float] = (0.0, 0.0)
    """Top left corner of the grid in shown pixels: negative where a view was padded to a square."""

    def to_view(self, x1: float, y1: float, x2: float, y2: float, *, view: str) -> Box:
        """Convert a box in cells to shown pixels of the view; it may reach outside where the view was padded."""
        (width, height), (left, top) = self.cell, self.corner
        return Box(left + x1 * width, top + y1 * height, left + x2 * width, top + y2 * height, view=view)


def grid_of(model: PreTrainedModel, size: Size, patches: Tensor | None, tokens: int, *, given: Size) -> Grid:
    """Return the grid of a view that takes `tokens` visual tokens of the prompt.

    Args:
        size: of the view, in shown pixels.
        patches: (1, 3) patches in time, height and width, for families that take any size; None for fixed grids.
        tokens: visual tokens of the view; a newline token may follow a fixed grid.
        given: size of the processor's input: larger than the view where it was padded, with the view in the centre.
    """
    if patches is not None:
        rows, columns = merged(model.config, patches)
        return Grid(rows, columns, (size.width / columns, size.height / rows))
    side = math.isqrt(tokens)
    # one more token is a newline behind the grid; in other families it is a class token before it, and no cell
    if tokens - side * side > (model.config.model_type in TILED):
        raise BackendError(f"{tokens} visual tokens do not form a square grid, so no map can be laid over the image.")
    corner = (float(-((given.width - size.width) // 2)), float(-((given.height - size.height) // 2)))
    return Grid(side, side, (given.width / side, given.height / side), corner)


def merged(config: PretrainedConfig, patches: Tensor) -> tuple[int, int]:
    """Return rows and columns of visual tokens, given (1, 3) patches in time, height and width."""
    vision = config.vision_config
    # Gemma 4 pools its patches; the patches of its unified form are visual tokens already
    pooled = 1 if config.model_type == "gemma4_unified" else getattr(vision, "pooling_kernel_size", 1)
    merge = int(getattr(vision, "spatial_merge_size", pooled))
    return int(patches[0, 1]) // merge, int(patches[0, 2]) // merge


def patch_grid(inputs: Mapping[str, Tensor]) -> Tensor | None:
    """Return the (1, 3) patches of an image in time, height and width, from its processor's output; None: fixed."""
    if "image_grid_thw" in inputs:
        return inputs["image_grid_thw"]
    if "image_position_ids" in inputs:
        # column and row of each patch, -1 for padding
        columns, rows = (inputs["image_position_ids"][0].amax(dim=0) + 1).tolist()
        return torch.tensor([[1, rows, columns]])
    return None


def align(positions: Tensor, *, source: int, crop: tuple[int, int], grid: tuple[int, int], cells: Cells) -> Tensor:
    """Give a crop the positions of the place it was cut from (Q-Zoom 3.3, "aligned" positions).

    In plain positions a crop that follows the coarse image starts a grid of its own. Aligned, its rows and columns run
    over those of its box in the coarse grid, in fractions of a cell, and only the time axis tells the two apart. The
    tokens around it keep their plain positions, since both layouts span the same range. The end points are those of the
    released code (`reuse_src_pos`), which trained the checkpoints; the paper's formula differs.

    Args:
        positions: plain positions, (3, 1, tokens): time, row, column.
        source: index of the first visual token of the image that the crop was cut from.
        crop: [start, stop) of the crop's visual tokens.
        grid: rows and columns of the crop.
        cells: the crop's box in cells of the source.

    Returns:
        The positions with those of the crop replaced, (3, 1, tokens), float32.
    """
    start, stop = crop
    rows, columns = grid
    if stop - start != rows * columns:
        raise ValueError(f"a crop of {rows} x {columns} cells has {stop - start} visual tokens")
    out = positions.float().clone()
    x1, y1, x2, y2 = cells
    # the source's first token stands at its top left cell
    top, left = float(positions[1, 0, source]), float(positions[2, 0, source])
    down = torch.linspace(top + y1, top + y2 - 1, rows, device=out.device)
    across = torch.linspace(left + x1, left + x2 - 1, columns, device=out.device)
    # tokens run row by row: a row's position is repeated over its columns
    out[1, 0, start:stop] = down.repeat_interleave(columns)
    out[2, 0, start:stop] = across.repeat(rows)
    return out


def base_view(model: PreTrainedModel, pixels: Tensor) -> BaseModelOutputWithPooling:
    """Encode the base view of an image alone, in the form of `get_image_features`.

    A model of a tiled family spends thousands of tokens on tiles whatever the question. With branches the tiles are
    left out: the map is laid over the base view, whose tokens form a grid, and detail comes from the inserted crop,
    itself a base view. The form is the model's own for an image without tiles: the grid's tokens and one newline. This
    is our extension; published SD-RPN covers LLaVA-1.5 alone.

    Args:
        pixels: (1, tiles, 3, height, width), the base view first, as the family's processor gives them.
    """
    config = model.config
    inner: Any = model.base_model
    states = inner.vision_tower(pixels[:, 0], output_hidden_states=True, return_dict=True).hidden_states
    layers = config.vision_feature_layer
    chosen = states[layers] if isinstance(layers, int) else torch.cat([states[layer] for layer in layers], dim=-1)
    if config.vision_feature_select_strategy == "default":
        chosen = chosen[:, 1:]  # the class token is no cell of the grid
    grid = inner.multi_modal_projector(chosen)[0]
    features = torch.cat((grid, inner.image_newline[None].to(grid)))
    return BaseModelOutputWithPooling(pooler_output=[features])  # type: ignore[arg-type]


def base_view_tokens(config: PretrainedConfig) -> int:
    """Return the number of visual tokens of a base view: its grid and one newline."""
    return int(config.vision_config.image_size // config.vision_config.patch_size) ** 2 + 1
