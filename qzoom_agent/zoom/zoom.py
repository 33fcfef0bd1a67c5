"""Zoom: cut the box that a model asked for out of the original image.

A model writes boxes in its own frame, of whichever view it looks at, with swapped corners, edges over the border, or
sides of a few pixels. `Zoom` corrects all of that and says so in a note for the model. Only a box without meaning
(NaN, an unknown view, wholly outside) is not served; the model then reads the legal range. It never raises on a box.

`plan` checks and corrects a box, and is the only place that does; `cut` cuts the plan. The policy reviews the plan in
between, so a refused crop costs nothing. Corrections, in order: corners, the part inside the view, whole pixels of the
original (outward), the shortest side, the aspect.

A sparse crop is encoded finer, and only its tokens on the foreground of a map are shown. Text and objects often fill a
small part of a box: a whole crop spends its tokens on the rest as well.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from math import ceil, floor
from typing import Any, Final, Protocol, Self

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, Field, model_validator

from qzoom_agent.config import CropConfig, PerceptionConfig, ViewBudget
from qzoom_agent.errors import BoxError, ConfigError
from qzoom_agent.extensions import find, satisfying
from qzoom_agent.geometry import MAX_ASPECT, Box, Size, extent, fit_tokens, mapped
from qzoom_agent.views import Kept, TokenBudget, View, ViewStore

_NOTHING = Size(0, 0)
# A box may reach this far outside, in pixels or cells, through rounding alone.
_NOISE = 1e-6
_STEP: Final = 0.95
"""Ratio of the scale of a sparse crop to the next larger one that is tried."""


class ZoomConfig(CropConfig):
    """The shape of a crop (`min_side` and `max_aspect`, in original pixels) and its budget of visual tokens."""

    min_side: int = Field(default=28, ge=1)
    """Shortest side of a crop in original pixels; a smaller box grows around its centre."""
    factor: int = Field(default=28, gt=0)
    """Side in shown pixels of one visual token."""
    min_tokens: int = Field(default=256, gt=0)
    """A crop of fewer tokens is magnified to this many."""
    max_tokens: int = Field(default=1280, gt=0)
    """A crop of more tokens is shrunk to this many."""

    @model_validator(mode="after")
    def _ordered(self) -> Self:
        if self.min_tokens > self.max_tokens:
            raise ConfigError(
                f"The crop budget is empty: at least {self.min_tokens} tokens but at most {self.max_tokens}. "
                "Raise max_tokens or lower min_tokens."
            )
        return self

    @classmethod
    def of(cls, views: ViewBudget, **shape: Any) -> "ZoomConfig":
        """Return the budget of a model's crops; `shape` are the other keys."""
        budget = {"min_tokens": views.crop_min_tokens, "max_tokens": views.crop_max_tokens}
        return cls(factor=views.factor, **budget, **shape)

    @property
    def budget(self) -> TokenBudget:
        """The budget of visual tokens, as `fit_tokens` and `ViewStore` take it."""
        return {"factor": self.factor, "min_tokens": self.min_tokens, "max_tokens": self.max_tokens}

    def for_proposals(self, options: PerceptionConfig) -> "ZoomConfig":
        """Return the budget of crops that branches propose; a limit on one side moves the other with it."""
        low = options.roi_min_tokens or min(self.min_tokens, options.roi_max_tokens or self.min_tokens)
        high = options.roi_max_tokens or max(self.max_tokens, low)
        return self.model_copy(update={"min_tokens": low, "max_tokens": high})


@dataclass(frozen=True, slots=True)
class ZoomPlan:
    """A crop before it is cut: exactly one of `box` and `error` is set."""

    parent: str
    """The view the box was measured in."""
    box: Box | None = None
    """The crop, in whole original pixels."""
    size: Size = _NOTHING
    """Pixels that will be shown; 0 x 0 with an error."""
    tokens: int = 0
    """Visual tokens that the crop will cost."""
    notes: tuple[str, ...] = ()
    """Corrections of the box, as sentences for the model."""
    error: str | None = None
    """The reason why nothing can be cut, and the legal range, for the model."""
    cut: Box | None = None
    """The crop in pixels of the image of a tool that it is cut from (`View.source`); None: it is cut from the
    original, and `box` says where."""
    kept: Kept | None = None
    """Tokens that are shown of a sparse crop, see `sparse_plan`; None: all."""

    @property
    def extent(self) -> Box:
        """The crop in pixels of the image that it is cut from. There must be a box."""
        found = self.cut or self.box
        assert found is not None
        return found


class ZoomResult(BaseModel, frozen=True, extra="forbid"):
    """A served crop, or the reason there is none: exactly one of `view` and `error` is set."""

    view: View | None = None
    """The crop, in the store it was cut from."""
    served: tuple[float, float, float, float] | None = None
    """The box that was cut, in whole original pixels."""
    notes: list[str] = []
    """Corrections of the box, as sentences for the model."""
    error: str | None = None
    """The reason why nothing was cut, and the legal range, for the model."""
    label: str = ""
    """The model's words for what it looks for."""


class Tool(Protocol):
    """A tool that serves the model's zoom calls, in place of `Zoom`.

    An object, or a class that takes a `ZoomConfig`. A zoom call is a box of a view, and its result a crop; for anything
    else there are own tools (`qzoom_agent.zoom.own_tools`). The prompt, the schema and the words around a crop belong
    to the `ZoomProtocol`, and crops that a policy inserts unasked are always cut by `Zoom`.
    """

    def plan(self, store: ViewStore, box: Box) -> ZoomPlan:
        """Return the crop that `box`, in any frame of any view, leads to; neither raises nor changes the store."""

    def cut(self, store: ViewStore, plan: ZoomPlan, *, label: str = "") -> ZoomResult:
        """Cut a plan and add the crop to the store."""


class Zoom:
    """The zoom tool. It holds only its settings, so one object serves any number of stores."""

    def __init__(self, config: ZoomConfig | None = None) -> None:
        self.config = config or ZoomConfig()

    def __call__(self, store: ViewStore, box: Box, *, label: str = "") -> ZoomResult:
        """Plan and cut `box`, in any frame of any view of `store`. Raises as `cut` does, never on a box."""
        return self.cut(store, self.plan(store, box), label=label)

    def plan(self, store: ViewStore, box: Box) -> ZoomPlan:
        """Check and correct `box`, in any frame of any view of `store`. Never raises, and changes nothing."""
        notes: list[str] = []
        try:
            shaped = self._shape(_on_source(store, store.view(box.view), box, notes), store, notes)
        except BoxError as error:
            wide, high = store.view("original").size
            legal = "" if box.view in store else f" The original has {wide}x{high} pixels."
            return ZoomPlan(box.view, error=f"{error}{legal}")
        size = fit_tokens((int(shaped.width), int(shaped.height)), **self.config.budget)
        shown, view = store.cost(size, self.config.factor), store.view(box.view)
        if not view.source:
            return ZoomPlan(box.view, shaped, size, shown, tuple(notes))
        original = store.original(view.id).size
        place = mapped(shaped, view.matrix).clamp(original).rounded() if view.matrix else Box(0, 0, *original)
        return ZoomPlan(box.view, replace(place, view=view.origin), size, shown, tuple(notes), cut=shaped)

    def cut(self, store: ViewStore, plan: ZoomPlan, *, label: str = "") -> ZoomResult:
        """Cut a plan for this store and add the crop to it.

        Raises:
            ImageError: The crop cannot be written to the store's folder.
        """
        if plan.box is None:
            return ZoomResult(error=plan.error, label=label)
        if plan.kept is not None:
            crop = store.add_sparse_crop(plan.box, size=plan.size, kept=plan.kept, parent=plan.parent)
        else:
            crop = store.add_crop(plan.extent, parent=plan.parent, **self.config.budget)
        return ZoomResult(view=crop, served=crop.box, notes=list(plan.notes), label=label)

    def _shape(self, box: Box, store: ViewStore, notes: list[str]) -> Box:
        """Grow a small or thin box; shorten one that is thin because the image is."""
        size = store.view(box.view).size
        max_aspect = min(self.config.max_aspect, MAX_ASPECT)
        grown = _whole(box.grow_to(self.config.min_side, size).limit_aspect(max_aspect, size))
        if grown != box:
            moved = any(abs(a - b) >= 1 for a, b in zip(grown.center, box.center, strict=True))
            how = ", moved to stay inside the image." if moved else " around its centre."
            notes.append(f"Box grown from {_sides(box)} to {_sides(grown)} px{how}")
        short = min(grown.width, grown.height)
        longest = max(1.0, short * max_aspect // 1)
        if max(grown.width, grown.height) <= longest:
            return grown
        (cx, cy), half_w, half_h = grown.center, min(grown.width, longest) / 2, min(grown.height, longest) / 2
        middle = replace(grown, x1=cx - half_w, y1=cy - half_h, x2=cx + half_w, y2=cy + half_h)
        shortened = _whole(middle)
        notes.append(
            f"Box shortened from {_sides(grown)} to {_sides(shortened)} px around its centre: nothing longer than "
            f"{max_aspect:g}:1 can be shown. Zoom in on one part at a time."
        )
        return shortened


def find_tool(name: str | None, config: ZoomConfig, *, known: Mapping[str, Any] | None = None) -> Tool:
    """Return the tool called `name`: "zoom" (also None), one of `known`, `module:attribute` or an entry point.

    Raises:
        ConfigError: There is none, or it does not satisfy `Tool`.
    """
    found = find(name or "zoom", kind="tool", known={"zoom": Zoom, **(known or {})})
    tool: Tool = satisfying(found, Tool, config, kind="tool")
    return tool


def _on_source(store: ViewStore, view: View, box: Box, notes: list[str]) -> Box:
    """Return the part of a box inside its view, in whole pixels of the image that the view was cut from.

    Raises:
        BoxError: There is none; the text is for the model.
    """
    if not box.finite:
        raise BoxError(f"Box {_list(box)} is not a box: all four numbers must be finite. {_legal(store, view, box)}")
    straight = box.ordered()
    if straight != box:
        notes.append(f"The corners were swapped; read as {_list(straight)}.")
    # The original has no token grid, and `View.cell` says so.
    pixel = straight.to_pixel(view.size, view.cell if box.frame == "cell" else 1)
    if _misses(pixel.x1, pixel.x2, view.width) or _misses(pixel.y1, pixel.y2, view.height):
        raise BoxError(f"Box {_list(box)} lies outside the image. {_legal(store, view, box)}")
    inside = pixel.clamp(view.size)
    if max(-pixel.x1, -pixel.y1, pixel.x2 - view.width, pixel.y2 - view.height) > _NOISE:
        notes.append(f"Box {_list(box)} reached outside the image; only the part inside was cut.")
    found = view.to_source(inside)
    return found.rounded().clamp(store.view(found.view).size)


def _misses(low: float, high: float, limit: int) -> bool:
    """Return whether an interval shares no length with 0..limit; a point on the border does not miss it."""
    return high < 0 or low > limit or (low < high and (high == 0 or low == limit))


def _whole(box: Box) -> Box:
    """Return a box with sides of whole numbers, moved onto whole pixels."""
    x1, y1 = box.x1 // 1, box.y1 // 1
    return replace(box, x1=x1, y1=y1, x2=x1 + round(box.width), y2=y1 + round(box.height))


def _legal(store: ViewStore, view: View, box: Box) -> str:
    """Return the size of the image and the range of the box's frame, as a sentence for the model."""
    width, height = extent(box.frame, view.size, view.cell if box.frame == "cell" else 1)
    source = store.view(view.extent.view).size
    place = "" if view.kind == "original" else f", taken from an image of {source.width}x{source.height} px"
    return (
        f"View '{view.id}' has {view.width}x{view.height} px{place}. Write x1, y1, x2, y2 in frame {box.frame}: "
        f"x from 0 to {width:g}, y from 0 to {height:g}."
    )


def _sides(box: Box) -> str:
    return f"{box.width:.0f}x{box.height:.0f}"


def _list(box: Box) -> str:
    return "[" + ", ".join(f"{value:.6g}" for value in box.as_list()) + "]"


# -- sparse crops ------------------------------------------------------------------------------------------------------


def sparse_plan(plan: ZoomPlan, foreground: Sequence[Box], *, scale: float, factor: int) -> ZoomPlan:
    """Return a plan that shows some tokens of the same crop, at the largest scale that costs no more than `plan`.

    Args:
        plan: A crop as it is shown whole.
        foreground: Boxes in original pixels. A token is kept if it or one of its eight neighbours touches one of them.
        scale: Most times that each side is encoded larger.
        factor: Side in pixels of one token.

    Returns:
        The plan with its new size, tokens and `kept`; the plan itself if nothing would be left out.
    """
    if plan.box is None:
        return plan
    side, whole = scale, (int(plan.box.width), int(plan.box.height))
    while side > 1:
        count = int(plan.tokens * side**2)
        size = fit_tokens(whole, factor=factor, min_tokens=count, max_tokens=count)
        kept = _near(plan.box, size, foreground, factor)
        if 0 < int(kept.sum()) <= plan.tokens:
            return _thinned(plan, size, kept)
        side *= _STEP
    kept = _near(plan.box, plan.size, foreground, factor)
    return _thinned(plan, plan.size, kept) if kept.any() else plan


def _near(box: Box, size: Size, foreground: Sequence[Box], factor: int) -> NDArray[np.bool]:
    """Return which tokens (rows, columns) of a crop shown at this size touch the foreground, or have a neighbour that
    does.
    """
    columns, rows = size.width // factor, size.height // factor
    kept = np.zeros((rows, columns), dtype=np.bool)
    across, down = columns / box.width, rows / box.height
    for part in foreground:
        left, right = _touched((part.x1 - box.x1) * across, (part.x2 - box.x1) * across, columns)
        top, bottom = _touched((part.y1 - box.y1) * down, (part.y2 - box.y1) * down, rows)
        if left < right and top < bottom:
            kept[max(0, top - 1) : bottom + 1, max(0, left - 1) : right + 1] = True
    return kept


def _touched(low: float, high: float, count: int) -> tuple[int, int]:
    """Return the first cell of 0..count that an interval touches, and the one behind the last."""
    return max(0, floor(low + _NOISE)), min(count, ceil(high - _NOISE))


def _thinned(plan: ZoomPlan, size: Size, kept: NDArray[np.bool]) -> ZoomPlan:
    if kept.all():
        return plan
    rows: Kept = tuple("".join("01"[mark] for mark in row) for row in kept.astype(int).tolist())
    return replace(plan, size=size, tokens=int(kept.sum()), kept=rows)
