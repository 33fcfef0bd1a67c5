"""What perception has to know about a model family: data, not code.

Stock decoders of all supported families are built alike (`language_model.{embed_tokens, layers, rotary_emb, norm}` and
`lm_head`), so one driver (`decoder.py`) runs them all and an `Adapter` only names the differences: which tokens of an
image form its grid, which cells of a map are attention sinks, whether the map's queries and keys are rotated, and
whether a crop can be given the positions of the place it was cut from.

The adapter is chosen by the `model_type` of the model's config, never by a path or a name.
"""

import math
from dataclasses import dataclass
from typing import Any, Literal

from torch import Tensor
from transformers import PretrainedConfig, PreTrainedModel

from qzoom_agent.errors import BackendError
from qzoom_agent.geometry import Box, Size

Sink = Literal["corner", "first_token", "none"]
"""Which rule finds the cells that always attract attention; see `maps.keep_mask`."""


@dataclass(frozen=True, slots=True)
class Adapter:
    """One family."""

    name: str
    model_types: tuple[str, ...]
    sink: Sink
    rotated_map: bool
    """Whether queries and keys of the map are rotated like those of the decoder (SD-RPN for LLaVA does not)."""
    map_norm: bool
    """Whether a copy of the decoder's final norm comes before the map's own (SD-RPN for LLaVA)."""
    two_dimensional: bool
    """Whether visual tokens have a row and a column as positions (MRoPE), so that a crop's can be aligned."""


QWEN2_5_VL = Adapter("Qwen2.5-VL", ("qwen2_5_vl",), "corner", True, False, True)
QWEN3_VL = Adapter("Qwen3-VL", ("qwen3_vl",), "first_token", True, False, True)
LLAVA = Adapter("LLaVA", ("llava", "llava_next", "llava_onevision"), "none", False, True, False)
ADAPTERS = (QWEN2_5_VL, QWEN3_VL, LLAVA)


def adapter_for(config: PretrainedConfig) -> Adapter:
    """The adapter of a model's config.

    Raises:
        BackendError: the family is not supported, or this config has layers that do not see the whole past.
    """
    found = next((adapter for adapter in ADAPTERS if config.model_type in adapter.model_types), None)
    if found is None:
        known = ", ".join(f"{adapter.name} ({', '.join(adapter.model_types)})" for adapter in ADAPTERS)
        raise BackendError(
            f"Perception does not know the family '{config.model_type}'. It knows: {known}. For another one, add an "
            "Adapter to qzoom_agent/perception/adapters.py and hold it to tests/perception/test_families.py."
        )
    text = config.get_text_config()
    if set(getattr(text, "layer_types", None) or {"full_attention"}) != {"full_attention"}:
        raise BackendError(
            f"This {found.name} model has layers of sliding-window or linear attention. Perception continues a "
            "half-finished prefill, which needs full attention in every layer; set use_sliding_window to false."
        )
    return found


@dataclass(frozen=True, slots=True)
class Grid:
    """The cells of one image's map, and where they lie in the view that the model was shown."""

    rows: int
    columns: int
    cell: tuple[float, float]
    """Width and height of a cell in shown pixels of the view."""
    corner: tuple[float, float] = (0.0, 0.0)
    """Where the grid's corner lies in shown pixels: negative where a view was padded to a square."""

    def to_view(self, x1: float, y1: float, x2: float, y2: float, *, view: str) -> Box:
        """A box in cells as shown pixels of the view; it may reach outside where the view was padded."""
        (width, height), (left, top) = self.cell, self.corner
        return Box(left + x1 * width, top + y1 * height, left + x2 * width, top + y2 * height, view=view)


def grid_of(model: PreTrainedModel, size: Size, patches: Tensor | None, tokens: int, *, given: Size) -> Grid:
    """The grid of a view of `size` shown pixels that stands as `tokens` visual tokens in the prompt.

    Args:
        patches: (1, 3) patches in time, height and width, for families that take any size; None for fixed grids.
        given: the size of what the processor was given: larger than the view where that was padded, centred.
    """
    if patches is not None:
        merge = int(model.config.vision_config.spatial_merge_size)
        rows, columns = int(patches[0, 1]) // merge, int(patches[0, 2]) // merge
        return Grid(rows, columns, (size.width / columns, size.height / rows))
    side = math.isqrt(tokens)
    if tokens - side * side > 1:  # a newline may follow the grid
        raise BackendError(f"{tokens} visual tokens do not form a square grid, so no map can be laid over the image.")
    corner = (float(-((given.width - size.width) // 2)), float(-((given.height - size.height) // 2)))
    return Grid(side, side, (given.width / side, given.height / side), corner)


def text_model(model: PreTrainedModel) -> Any:
    """The stock decoder inside a stock image-text-to-text model."""
    return model.base_model.language_model
