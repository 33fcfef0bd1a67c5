"""Review: is a zoom call worth its tokens? The rules of the policy `hybrid`, as functions of boxes and numbers.

Two kinds of rules. Facts hold whatever the model has in mind:

    covered    a shown view already holds the box, in as much detail as the crop would have
    native     a shown view already holds the box with every pixel of the original: a crop would only be larger

Opinions are those of the branches, and they give way to what contradicts them:

    gate       the gate said that the coarse view suffices
    cut        the box overlaps a proposed region or lies beside it, but leaves out part of it (its middle, where its
               sides were chosen beforehand, and so say nothing of what belongs together): the region is served
    elsewhere  the heat map has next to nothing inside the box, and a proposed region holds it: the model is told of
               that region, or served it (`review.elsewhere`)

Opinions come from one look, at the coarse view, for the question as it was asked. Two things contradict them:

    a crop was shown before the call was written, inserted or served: it may say where to look next, which no look at
    the coarse view can know. So the second crop of a question in several steps is never a matter of the map's opinion.
    the model asks again after it has read such a refusal (`review.insist` turns with one): it sees what the branches do
    not. So a gate that is wrong costs turns and never the answer. It costs as many for every crop: a model that zooms
    out of habit does not win the second by having insisted on the first.

The numbers of every rule that was asked are kept, whatever the verdict. Budgets are the policy's business, and come
before all of this.
Deliberately not here: whether the answer is right, and any state: what happened before is in the `ReviewContext`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

from qzoom_agent.config import ReviewConfig
from qzoom_agent.gate import gate_fires
from qzoom_agent.geometry import Box, Frame, Size
from qzoom_agent.trace import CallRecord, PerceptionRecord
from qzoom_agent.views import View
from qzoom_agent.zoom.zoom import ZoomPlan

Code = Literal["covered", "native", "gate", "cut", "elsewhere"]
"""Which rule decided."""
OPINIONS: frozenset[str] = frozenset({"gate", "elsewhere"})
"""Codes of refusals that rest on the branches' word."""


@dataclass(frozen=True, slots=True)
class ReviewContext:
    """What is known when a call is reviewed, beside the views shown and the call itself."""

    look: PerceptionRecord | None
    """What the branches found; None where nobody looked."""
    refused_turns: int
    """Earlier turns in which a call was refused on the branches' word."""
    crops_read: int
    """Crops that were shown before the model wrote this turn."""
    image: Size
    """Of the original."""
    replan: Callable[[Box], ZoomPlan]
    """What another box, in original pixels, would come to."""
    name: Callable[[str], str]
    """How the model calls a view, by the view's id."""
    write: Callable[[Box], str]
    """A box in original pixels as the model would write it."""


class ReviewDecision(NamedTuple):
    """What the rules say of one call."""

    code: Code | None
    """The rule that decided; None: serve it as it is."""
    numbers: dict[str, float]
    """What was measured, by every rule that was asked."""
    text: str = ""
    """What the model is told."""
    plan: ZoomPlan | None = None
    """What to serve instead of what was asked for; None with a code: refuse."""


class BestView(NamedTuple):
    """The view that shows a box best."""

    view: str
    share: float
    """Share of the box inside it."""
    density: float
    """Its shown pixels per pixel of the original, along a side."""


def judge(
    shown: Sequence[View], plan: ZoomPlan, case: ReviewContext, rules: ReviewConfig, *, map_decides: bool
) -> ReviewDecision:
    """Judge a call that comes to `plan` (with a box) after the views in `shown`.

    map_decides: there is no gate, and a map without a region says that the coarse view suffices.
    """
    assert plan.box is not None
    numbers: dict[str, float] = {}
    seen = seen_best(plan.box, shown, covered=rules.covered)
    crop = density(plan.size, plan.box)
    numbers |= {"covered": seen.share, "density": seen.density, "crop_density": crop}
    fact = adds_nothing(seen, crop, rules)
    if fact is not None:
        return ReviewDecision(fact, numbers, _FACTS[fact].format(view=case.name(seen.view)))
    if case.look is None:
        return ReviewDecision(None, numbers)
    numbers["refused_turns"] = float(case.refused_turns)
    if case.look.score is not None and case.look.threshold is not None:
        numbers |= {"gate": case.look.score, "gate_threshold": case.look.threshold}
    if suffices(case.look, rules.gate, map_decides=map_decides):
        if case.refused_turns < rules.insist * (1 + case.crops_read):
            return ReviewDecision("gate", numbers, _GATE.format(view=case.name(shown[0].id)))
        return ReviewDecision(None, numbers)
    if case.refused_turns >= rules.insist or case.crops_read:
        return ReviewDecision(None, numbers)
    return _by_map(shown, plan.box, case, case.look, rules, numbers)


def _by_map(
    shown: Sequence[View],
    box: Box,
    case: ReviewContext,
    look: PerceptionRecord,
    rules: ReviewConfig,
    numbers: dict[str, float],
) -> ReviewDecision:
    """What the heat map and the proposed regions say of a box."""
    heat = Heat.of(look, case.image)
    crops = [view.region for view in shown if view.kind == "crop"]
    regions = [one for one in (Box(*box) for box in look.boxes) if all(c.coverage(one) < rules.covered for c in crops)]
    inside = heat.share(box)
    if inside is not None:
        numbers["heat"] = inside
    cut = cut_region(box, regions, heat, rules, fixed=look.fixed)
    region = cut or hotter_region(inside, regions, heat, rules)
    if region is None:
        return ReviewDecision(None, numbers)
    code: Code = "cut" if cut else "elsewhere"
    held = heat.share(region)
    if held is not None:
        numbers["region_heat"] = held
    if not cut and rules.elsewhere == "offer":
        return ReviewDecision(code, numbers, _ELSEWHERE.format(box=case.write(region)))
    instead = case.replan(region)
    if instead.box is None or not adds(instead, shown, rules):
        return ReviewDecision(None, numbers)
    return ReviewDecision(code, numbers, (_CUT if cut else _MOVED).format(box=case.write(instead.box)), instead)


# ---- facts ---------------------------------------------------------------------------------------------------------


def density(shown: Size, box: Box) -> float:
    """Shown pixels per pixel of the original, along a side, of a box in original pixels shown at this size."""
    return math.sqrt(shown.area / box.area) if box.area > 0 else 0.0


def seen_best(box: Box, shown: Sequence[View], *, covered: float) -> BestView:
    """The view that shows a box (original pixels) best: the densest that holds it, else the one with most of it.

    Args:
        shown: at least one view.
        covered: share of the box that a view has to hold.
    """
    every = [BestView(view.id, view.region.coverage(box), density(view.size, view.region)) for view in shown]
    holding = [one for one in every if one.share >= covered]
    if holding:
        return max(holding, key=lambda one: one.density)
    return max(every, key=lambda one: one.share)


def adds_nothing(seen: BestView, crop: float, rules: ReviewConfig) -> Literal["covered", "native"] | None:
    """Why a crop of density `crop` adds nothing to what was seen of its box; None if it adds something."""
    if seen.share < rules.covered:
        return None
    if rules.density is not None and seen.density >= rules.density * crop:
        return "covered"
    if rules.native is not None and seen.density >= rules.native:
        return "native"
    return None


def adds(plan: ZoomPlan, shown: Sequence[View], rules: ReviewConfig) -> bool:
    """Whether a planned crop adds anything to what was shown; a plan without a box adds nothing."""
    if plan.box is None:
        return False
    seen = seen_best(plan.box, shown, covered=rules.covered)
    return adds_nothing(seen, density(plan.size, plan.box), rules) is None


# ---- opinions ------------------------------------------------------------------------------------------------------


def suffices(look: PerceptionRecord, share: float | None, *, map_decides: bool) -> bool:
    """Whether the look said that the coarse view suffices: the gate's score is below `share` of its threshold.

    Where no gate was asked, the map speaks, and only if `map_decides`: it then found no region.
    """
    if share is None:
        return False
    fires = gate_fires(look.score, look.threshold, share=share)
    return map_decides and not look.boxes if fires is None else not fires


@dataclass(frozen=True, slots=True)
class Heat:
    """A heat map laid over the original."""

    cells: list[list[float]]
    """What each cell holds above the map's mean, as a share of the whole; empty for a map that is flat or not there."""
    extent: Box
    """What the map covers, in original pixels."""

    @classmethod
    def of(cls, look: PerceptionRecord, image: Size) -> Heat:
        """The map of a look at an image of this size."""
        extent = Box(0, 0, *image) if look.extent is None else Box(*look.extent)
        values = [[value if math.isfinite(value) else 0.0 for value in row] for row in look.heat]
        count = sum(len(row) for row in values)
        mean = sum(map(sum, values)) / count if count else 0.0
        above = [[max(0.0, value - mean) for value in row] for row in values]
        total = sum(map(sum, above))
        if total <= 0 or extent.area <= 0:
            return cls([], extent)
        return cls([[value / total for value in row] for row in above], extent)

    def share(self, box: Box) -> float | None:
        """The share of the heat inside a box in original pixels, 0 to 1; None if there is no heat to share."""
        if not self.cells:
            return None
        down = _overlaps(box.y1, box.y2, self.extent.y1, self.extent.height, len(self.cells))
        across = _overlaps(box.x1, box.x2, self.extent.x1, self.extent.width, len(self.cells[0]))
        return min(
            1.0,
            sum(
                y * sum(x * v for x, v in zip(across, row, strict=True))
                for y, row in zip(down, self.cells, strict=True)
            ),
        )


def cut_region(box: Box, regions: Sequence[Box], heat: Heat, rules: ReviewConfig, *, fixed: bool = False) -> Box | None:
    """The proposed region that a box touches but cuts, or lies beside; None if it touches none or holds what counts.

    Touching: an overlap of at least `rules.snap` of the smaller of the two, or a gap of at most `rules.snap_gap` of the
    region's longer side. Cutting: less than `rules.snap_keep` of the region's heat (of its area, without heat) inside;
    of a region of `fixed` sides, the middle is outside.
    """
    if rules.snap is None:
        return None
    touched = []
    for region in regions:
        shared = box.coverage(region) * region.area
        overlap = shared / max(1e-9, min(box.area, region.area))
        if overlap >= rules.snap or (
            shared == 0 and gap(box, region) <= rules.snap_gap * max(region.width, region.height)
        ):
            touched.append((overlap, -gap(box, region), region))
    if not touched:
        return None
    region = max(touched, key=lambda one: one[:2])[2]
    if fixed:
        x, y = (region.x1 + region.x2) / 2, (region.y1 + region.y2) / 2
        return None if box.x1 <= x <= box.x2 and box.y1 <= y <= box.y2 else region
    return region if _kept(box, region, heat) < rules.snap_keep else None


def hotter_region(inside: float | None, regions: Sequence[Box], heat: Heat, rules: ReviewConfig) -> Box | None:
    """The region that holds the heat which a box with a share of `inside` lacks, if the box is that cold."""
    if rules.cold is None or inside is None or inside >= rules.cold or not regions:
        return None
    region = max(regions, key=lambda one: heat.share(one) or 0.0)
    return region if (heat.share(region) or 0.0) >= rules.hot else None


def gap(box: Box, other: Box) -> float:
    """How far apart two boxes lie, in pixels: the larger of the distances along the two axes; 0 if they touch."""
    across = max(box.x1 - other.x2, other.x1 - box.x2, 0.0)
    down = max(box.y1 - other.y2, other.y1 - box.y2, 0.0)
    return max(across, down)


def _kept(box: Box, region: Box, heat: Heat) -> float:
    """How much of a region is inside a box: of its heat, or of its area where it has none."""
    whole = heat.share(region)
    if not whole:
        return box.coverage(region)
    x1, y1 = max(box.x1, region.x1), max(box.y1, region.y1)
    x2, y2 = min(box.x2, region.x2), min(box.y2, region.y2)
    return (heat.share(Box(x1, y1, x2, y2)) or 0.0) / whole if x1 < x2 and y1 < y2 else 0.0


def _overlaps(low: float, high: float, start: float, length: float, count: int) -> list[float]:
    """For each of `count` equal cells of an interval, the share of it inside low..high."""
    side = length / count
    return [max(0.0, min(high, start + (at + 1) * side) - max(low, start + at * side)) / side for at in range(count)]


# ---- what the model reads ------------------------------------------------------------------------------------------

_FACTS: dict[str, str] = {
    "covered": "This part is already shown in {view} in as much detail. Answer from it, or zoom somewhere else.",
    "native": "This part is already shown in {view} with all its pixels. Answer from it, or zoom somewhere else.",
}
_GATE = "What the question needs can be seen in {view}. Answer from it; ask again only if it cannot be read there."
_ELSEWHERE = "There is little for this question in that part. Look at {box}, or ask again if you are sure."
_CUT = "The box was moved to {box}, so that nothing there is cut off."
_MOVED = "The box was moved to {box}: there is little for this question where it was."


def written(box: Box, view: View, frame: Frame) -> str:
    """A box in original pixels as a model that writes `frame` of `view` would write it."""
    inside = view.from_original(box).to_frame(frame, view.size, 1 if frame != "cell" else view.cell)
    digits = 3 if frame == "unit" else 0
    return "[" + ", ".join(f"{value:.{digits}f}" for value in inside.as_list()) + "]"


def refused_on_opinion(turns: Sequence[Sequence[CallRecord]]) -> int:
    """In how many of these turns (each its calls) a call was refused on the branches' word."""
    return sum(any(call.decision == "refused" and call.code in OPINIONS for call in calls) for calls in turns)
