"""Review of a zoom call: is the crop worth its tokens? The rules of the policy `hybrid`, and the door for others.

    covered    a shown view already holds the box, in as much detail as the crop would have
    native     a shown view already holds the box with every pixel of the original
    gate       the gate finds the coarse view sufficient
    cut        the box leaves out part of a proposed region that it touches: the region is served instead
    elsewhere  the heat map is cold inside the box and hot in a proposed region: that region is offered, or served

`covered` and `native` are facts. The others are opinions of the branches from one coarse look, so they give way after
`review.insist` refused turns, and the map's once the model has read a crop. See docs/policies.md.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Literal, NamedTuple, Protocol

from qzoom_agent.config import ReviewConfig
from qzoom_agent.gate import gate_fires
from qzoom_agent.geometry import Box, Frame, Size
from qzoom_agent.trace import CallRecord, PerceptionRecord
from qzoom_agent.views import View
from qzoom_agent.zoom.zoom import ZoomPlan

OPINIONS: frozenset[str] = frozenset({"gate", "elsewhere"})
"""Codes of refusals that rest on the branches alone."""
Last = Literal["budget", "failed"]
"""Reason for a forced last turn: a budget is spent, or calls cannot be served."""


@dataclass(frozen=True, slots=True)
class ReviewContext:
    """The state of an episode in which a call is reviewed, beside the views shown and the call itself."""

    look: PerceptionRecord | None
    """Result of the coarse look, of several images at the one that the call is about; None without one."""
    refused_turns: int
    """Earlier turns in which a call was refused for an opinion of the branches."""
    crops_read: int
    """Crops that were shown before the model wrote this turn."""
    image: Size
    """Size of the original that the call is about."""
    replan: Callable[[Box], ZoomPlan]
    """Plans a crop of another box, in original pixels."""
    name: Callable[[str], str]
    """Gives the model's name of a view, by the view's id."""
    write: Callable[[Box], str]
    """Writes a box in original pixels as the model would."""
    config: ReviewConfig = field(default_factory=ReviewConfig)
    """The section `review` of the configuration."""
    map_decides: bool = False
    """There is no gate, and a map without a region means that the coarse view suffices."""


class ReviewDecision(NamedTuple):
    """The decision on one zoom call: serve it, serve another crop, or refuse it."""

    code: str
    """Short name of the reason, for the trace, such as "covered" or "budget"; empty to serve the call as it is."""
    numbers: dict[str, float]
    """Measurements behind the decision, for the trace."""
    reason: str = ""
    """Text for the model."""
    plan: ZoomPlan | None = None
    """Crop to serve instead of the one asked for; None with a code: refuse."""
    last: Last | None = None
    """Reason for which the next turn has to be the last; None if the model may go on."""

    @property
    def serve(self) -> bool:
        """True unless the call is refused."""
        return not self.code or self.plan is not None


class PolicyRule(Protocol):
    """A rule that reviews the model's zoom calls: a function or an object, given as `review.rule`.

    Budgets come first: a rule is asked only about crops that have room. It runs under every policy that offers tools,
    and may call `hybrid_rule` for what it does not decide itself.
    """

    def __call__(self, plan: ZoomPlan, shown: Sequence[View], context: ReviewContext) -> ReviewDecision:
        """Decide on the crop in `plan` (it has a box), after the views in `shown`."""


class BestView(NamedTuple):
    """The view that shows a box best."""

    view: str
    share: float
    """Share of the box inside it."""
    density: float
    """Its shown pixels per pixel of the original, along a side."""


def hybrid_rule(plan: ZoomPlan, shown: Sequence[View], context: ReviewContext) -> ReviewDecision:
    """Decide on a zoom call as the policy `hybrid` does; see the module's table."""
    assert plan.box is not None
    rules, look = context.config, context.look
    best = best_view(plan.extent, shown, covered=rules.covered)
    crop = density(plan.size, plan.extent)
    numbers = {"covered": best.share, "density": best.density, "crop_density": crop}
    fact = adds_nothing(best, crop, rules)
    if fact is not None:
        return ReviewDecision(fact, numbers, _FACTS[fact].format(view=context.name(best.view)))
    if look is None or plan.cut is not None:  # no look knows the image of a tool
        return ReviewDecision("", numbers)
    numbers["refused_turns"] = float(context.refused_turns)
    if look.score is not None and look.threshold is not None:
        numbers |= {"gate": look.score, "gate_threshold": look.threshold}
    if suffices(look, rules.gate, map_decides=context.map_decides):
        # A model that insisted on its first crop has to insist on the next one as well.
        if context.refused_turns < rules.insist * (1 + context.crops_read):
            coarse = next((view for view in shown if view.origin == plan.box.view), shown[0])
            return ReviewDecision("gate", numbers, _GATE.format(view=context.name(coarse.id)))
        return ReviewDecision("", numbers)
    # A crop may say where to look next, which no look at the coarse view can know.
    if context.refused_turns >= rules.insist or context.crops_read:
        return ReviewDecision("", numbers)
    return _by_map(plan.box, shown, context, look, numbers)


def _by_map(
    box: Box, shown: Sequence[View], context: ReviewContext, look: PerceptionRecord, numbers: dict[str, float]
) -> ReviewDecision:
    """Decide by the heat map and the proposed regions."""
    rules, heat = context.config, Heat.of(look, context.image)
    crops = [view for view in shown if view.kind == "crop" and view.extent.view == box.view]
    proposed = [Box(*quad, view=box.view) for quad in look.boxes]
    regions = [one for one in proposed if all(crop.coverage(one) < rules.covered for crop in crops)]
    if (inside := heat.share(box)) is not None:
        numbers["heat"] = inside
    cut = cut_region(box, regions, heat, rules, fixed=look.fixed)
    region = cut or hotter_region(inside, regions, heat, rules)
    if region is None:
        return ReviewDecision("", numbers)
    code = "cut" if cut else "elsewhere"
    if (held := heat.share(region)) is not None:
        numbers["region_heat"] = held
    if not cut and rules.elsewhere == "offer":
        return ReviewDecision(code, numbers, _ELSEWHERE.format(box=context.write(region)))
    instead = context.replan(region)
    if instead.box is None or not adds(instead, shown, rules):
        return ReviewDecision("", numbers)
    return ReviewDecision(code, numbers, (_CUT if cut else _MOVED).format(box=context.write(instead.box)), instead)


def density(shown: Size, box: Box) -> float:
    """Return shown pixels per pixel of the original, along a side, of a box (original pixels) shown at this size."""
    return math.sqrt(shown.area / box.area) if box.area > 0 else 0.0


def best_view(box: Box, shown: Sequence[View], *, covered: float) -> BestView:
    """Return the view that shows a box best: the densest that holds it, else the one with most of it.

    Args:
        box: In original pixels, or in those of a tool's image (`View.source`); views cut from another do not count.
        covered: Share of the box that a view has to hold.
    """
    held = [view for view in shown if view.extent.view == box.view]
    every = [BestView(view.id, view.coverage(box), density(view.size, view.extent)) for view in held]
    holding = [one for one in every if one.share >= covered]
    nothing = BestView("", 0.0, 0.0)
    return max(holding or every, key=lambda one: one.density if holding else one.share, default=nothing)


def adds_nothing(best: BestView, crop: float, rules: ReviewConfig) -> Literal["covered", "native"] | None:
    """Return the reason why a crop of density `crop` adds nothing to the best view of its box; None if it adds."""
    if best.share < rules.covered:
        return None
    if rules.density is not None and best.density >= rules.density * crop:
        return "covered"
    if rules.native is not None and best.density >= rules.native:
        return "native"
    return None


def adds(plan: ZoomPlan, shown: Sequence[View], rules: ReviewConfig) -> bool:
    """Return whether a planned crop adds anything to the views in `shown`; a plan without a box adds nothing."""
    if plan.box is None:
        return False
    best = best_view(plan.extent, shown, covered=rules.covered)
    return adds_nothing(best, density(plan.size, plan.extent), rules) is None


def same_crop(plan: ZoomPlan, crops: Sequence[View], rules: ReviewConfig) -> str | None:
    """Return the id of the crop that a plan would show once more: its box has an IoU of `rules.covered`; or None."""
    if plan.box is None:
        return None
    box = plan.extent
    same = (view for view in crops if view.extent.view == box.view)
    return next((view.id for view in same if box.iou(view.extent) >= rules.covered), None)


def suffices(look: PerceptionRecord, share: float | None, *, map_decides: bool = True) -> bool:
    """Return whether the coarse view suffices according to a look.

    Args:
        share: Believe the gate where its score is below this share of its threshold; None: never.
        map_decides: Without a gate, a map without a region means that it suffices.
    """
    if share is None:
        return False
    fires = gate_fires(look.score, look.threshold, share=share)
    return map_decides and not look.boxes if fires is None else not fires


@dataclass(frozen=True, slots=True)
class Heat:
    """A heat map laid over the original."""

    cells: list[list[float]]
    """Heat of each cell above the map's mean, as a share of the whole; empty for a flat map or none."""
    extent: Box
    """The area of the map, in original pixels."""

    @classmethod
    def of(cls, look: PerceptionRecord, image: Size) -> Heat:
        """Return the map of a look at an image of this size."""
        extent = Box(0, 0, *image) if look.extent is None else Box(*look.extent)
        values = [[value if math.isfinite(value) else 0.0 for value in row] for row in look.heat]
        count = sum(len(row) for row in values)
        mean = sum(map(sum, values)) / count if count else 0.0
        above = [[max(0.0, value - mean) for value in row] for row in values]
        total = sum(map(sum, above))
        empty = total <= 0 or extent.area <= 0
        return cls([] if empty else [[value / total for value in row] for row in above], extent)

    def share(self, box: Box) -> float | None:
        """Return the share of the heat inside a box in original pixels, 0 to 1; None without a map."""
        if not self.cells:
            return None
        down = _overlaps(box.y1, box.y2, self.extent.y1, self.extent.height, len(self.cells))
        across = _overlaps(box.x1, box.x2, self.extent.x1, self.extent.width, len(self.cells[0]))
        rows = (sum(x * value for x, value in zip(across, row, strict=True)) for row in self.cells)
        return min(1.0, sum(y * row for y, row in zip(down, rows, strict=True)))


def cut_region(box: Box, regions: Sequence[Box], heat: Heat, rules: ReviewConfig, *, fixed: bool = False) -> Box | None:
    """Return the proposed region that a box touches but cuts; None if it touches none or holds enough of it.

    Touching: an overlap of at least `rules.snap` of the smaller of the two, or a gap of at most `rules.snap_gap` of the
    region's longer side. Cutting: less than `rules.snap_keep` of the region's heat (of its area, without heat) inside.
    A region of `fixed` sides is cut where its middle is outside.
    """
    if rules.snap is None:
        return None
    touched = []
    for region in regions:
        shared = box.coverage(region) * region.area
        overlap = shared / max(1e-9, min(box.area, region.area))
        near = shared == 0 and gap(box, region) <= rules.snap_gap * max(region.width, region.height)
        if overlap >= rules.snap or near:
            touched.append((overlap, -gap(box, region), region))
    if not touched:
        return None
    region = max(touched, key=lambda one: one[:2])[2]
    if fixed:
        x, y = region.center
        return None if box.x1 <= x <= box.x2 and box.y1 <= y <= box.y2 else region
    return region if _kept(box, region, heat) < rules.snap_keep else None


def hotter_region(inside: float | None, regions: Sequence[Box], heat: Heat, rules: ReviewConfig) -> Box | None:
    """Return the region that holds the heat which a box with a share of `inside` lacks; None if the box is not cold."""
    if rules.cold is None or inside is None or inside >= rules.cold or not regions:
        return None
    region = max(regions, key=lambda one: heat.share(one) or 0.0)
    return region if (heat.share(region) or 0.0) >= rules.hot else None


def gap(box: Box, other: Box) -> float:
    """Return the distance of two boxes in pixels: the larger of those along the two axes; 0 if they touch."""
    return max(box.x1 - other.x2, other.x1 - box.x2, box.y1 - other.y2, other.y1 - box.y2, 0.0)


def _kept(box: Box, region: Box, heat: Heat) -> float:
    """Return the share of a region inside a box: of its heat, or of its area where it has none."""
    whole = heat.share(region)
    if not whole:
        return box.coverage(region)
    x1, y1 = max(box.x1, region.x1), max(box.y1, region.y1)
    x2, y2 = min(box.x2, region.x2), min(box.y2, region.y2)
    return (heat.share(Box(x1, y1, x2, y2)) or 0.0) / whole if x1 < x2 and y1 < y2 else 0.0


def _overlaps(low: float, high: float, start: float, length: float, count: int) -> list[float]:
    """Return the share of each of `count` equal cells of an interval that lies inside low..high."""
    side = length / count
    return [max(0.0, min(high, start + (at + 1) * side) - max(low, start + at * side)) / side for at in range(count)]


# texts for the model
_FACTS: dict[str, str] = {
    "covered": "This part is already shown in {view} in as much detail. Answer from it, or zoom somewhere else.",
    "native": "This part is already shown in {view} with all its pixels. Answer from it, or zoom somewhere else.",
}
_GATE = "What the question needs can be seen in {view}. Answer from it; ask again only if it cannot be read there."
_ELSEWHERE = "There is little for this question in that part. Look at {box}, or ask again if you are sure."
_CUT = "The box was moved to {box}, so that nothing there is cut off."
_MOVED = "The box was moved to {box}: there is little for this question where it was."


def format_box(box: Box, view: View, frame: Frame) -> str:
    """Return a box in original pixels as a model that writes `frame` of `view` would write it."""
    inside = view.from_original(box).to_frame(frame, view.size, 1 if frame != "cell" else view.cell)
    digits = 3 if frame == "unit" else 0
    return "[" + ", ".join(f"{value:.{digits}f}" for value in inside.as_list()) + "]"


def refused_on_opinion(turns: Sequence[Sequence[CallRecord]]) -> int:
    """Return in how many of these turns (each its calls) a call was refused for an opinion of the branches."""
    return sum(any(call.decision == "refused" and call.code in OPINIONS for call in calls) for calls in turns)
