"""Settings of a branch file, the names of its files, and the base that it fits.

A branch file is `branches.safetensors` with its config in `branches.json`. In a model's folder both lie in the
subfolder `branches`, because engines such as vLLM load every `*.safetensors` that lies beside the model's own.
Branches of further looks, which read conversations with crops, are a second pair in the subfolder `further` of the
first; without them the model looks once.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, TypeVar

from pydantic import BaseModel, Field
from transformers import PreTrainedModel

from qzoom_agent.config import Blur, Sides
from qzoom_agent.errors import BackendError
from qzoom_agent.perception.adapters import adapter_for, full_layers, text_model

WEIGHTS, CONFIG, SUBFOLDER = "branches.safetensors", "branches.json", "branches"
FURTHER = "further"
"""Subfolder of the branches of further looks."""


InsideCrops = bool | Literal["only"]
Item = TypeVar("Item")


def searched(views: Sequence[Item], inside_crops: InsideCrops) -> Sequence[Item]:
    """Return those of an image's views, the coarse one first, that a further look makes maps of."""
    return views[1:] if inside_crops == "only" else views if inside_crops else views[:1]


class BranchConfig(BaseModel, extra="forbid", frozen=True, use_attribute_docstrings=True):
    """Base model and settings of a branch file."""

    version: Literal[1] = 1
    family: str
    """`model_type` of the base."""
    hidden_size: int = Field(gt=0)
    """Width of the base's decoder."""
    base_layers: int = Field(gt=0)
    """Depth of the base's decoder."""
    k: int = Field(gt=0)
    """Decoder layers that run before the branches."""
    depth: int = Field(default=3, ge=1)
    """Depth T of SD-RPN: T - 1 layers, and the query and key of one more."""
    gate_depth: int = Field(default=3, ge=1)
    """Layers of the gate."""
    positions: Literal["plain", "aligned"] = "plain"
    """Positions of an inserted crop that the base was trained with."""
    threshold: float = Field(default=0.1, ge=0, le=1)
    """Probability from which a cell of the map is foreground."""
    peak_share: float | None = Field(default=None, gt=0, lt=1)
    """Foreground from this share of the map's peak instead."""
    blur: Blur = "fixed"
    """Blur of the map before that."""
    margin: float = Field(default=0.0, ge=0, le=10)
    """Distance that each edge of a proposed box moves outwards, as a share of its longer side."""
    box: Sides | None = None
    """Sides of a proposed box around the centre of the heat, as shares of the map's; None: tight around foreground."""
    max_regions: int = Field(default=1, ge=1, le=16, exclude_if=lambda given: given == 1)
    """Most connected regions that are proposed, each with a crop of its own; 1: one box around all foreground."""
    gate_threshold: float = Field(default=0.1, ge=0, le=1)
    """Probability from which the gate asks for more detail."""
    inside_crops: InsideCrops = Field(default=False, exclude_if=lambda given: not given)
    """Of branches of further looks: the crops shown so far are searched as well as the coarse view, or they alone."""
    crops: int | None = Field(default=None, ge=2, exclude_if=lambda given: given is None)
    """Of branches of further looks: once so many crops of an image are shown, that of the first look counted, no other
    look follows; None: the gate alone ends the looks."""
    evidence: dict[str, Any] = {}
    """Measurements behind the thresholds, as `qzoom calibrate` writes them."""

    def require_fit(self, model: PreTrainedModel) -> None:
        """Raise BackendError if branches of this form were made for another base."""
        adapter_for(model.config)
        text: Any = text_model(model)
        have = (model.config.model_type, text.config.hidden_size, len(text.layers))
        need = (self.family, self.hidden_size, self.base_layers)
        if have != need:
            raise BackendError(
                f"These branches were made for a {need[0]} of width {need[1]} with {need[2]} layers; this model is a "
                f"{have[0]} of width {have[1]} with {have[2]}. Use the base they were trained on."
            )
        # features that join the last layer's output reach no token that is written
        levels = min(
            len(getattr(model.config.vision_config, "deepstack_visual_indexes", None) or ()), len(text.layers) - 1
        )
        if self.k < levels:
            raise BackendError(
                f"Branches cannot read the states after k = {self.k} layers of this model: features of its images join "
                f"those of its first {levels} layers. Choose k from {levels} on."
            )
        depth, full = max(self.depth, self.gate_depth), full_layers(text.config)
        left = sum(index >= self.k for index in full)
        if left < depth:
            raise BackendError(
                f"Branches of depth {depth} after {self.k} layers need {depth} layers with full attention to start "
                f"from; {left} of the model's {len(full)} follow. Choose a smaller k or depth."
            )


def branch_folder(folder: Path | str) -> Path:
    """Return the folder with the branches of a folder: its subfolder `branches`, or itself if there are none in it."""
    inner = Path(folder) / SUBFOLDER
    return inner if (inner / CONFIG).is_file() else Path(folder)


def default_k(base_layers: int) -> int:
    """Return about 0.65 of the depth, as in the published models (18 of 28, 24 of 36, 21 of 32)."""
    return max(1, min(base_layers - 1, round(0.65 * base_layers)))
