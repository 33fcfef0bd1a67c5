"""Redundant crops: those that added nothing, counted from the truth that the needle tasks know, never judged.

    needless   the coarse view sufficed for the question, so every crop is one too many
    repeated   an earlier view (the coarse one counts) showed the crop's content in as much detail: the crop's whole
               place, or every needle that lies in it
    missed     no needle lies in the crop

A crop has one reason at most, the first that holds. A needle lies in a view that holds 95 % of its box; a question with
two needles (the note and the cell that it names) gets one crop for each, in whatever order. Detail is shown pixels per
pixel of the original, and no view has more of it than the original has: a larger picture of the same pixels is
`repeated`. Where nothing is known of the question (no needles, and not that the coarse view suffices), only repetition
is counted.

Pure, so that evaluation, a reward and a page count alike. Who asked for a crop does not matter here: one that the
policy inserted is a crop like any other.
"""

from collections import Counter
from collections.abc import Sequence
from typing import Literal, NamedTuple

from qzoom_agent.config import ReviewConfig
from qzoom_agent.geometry import Box
from qzoom_agent.review import adds_nothing, best_view, density
from qzoom_agent.views import View

Reason = Literal["needless", "repeated", "missed"]
INSIDE = 0.95
"""Share of a box that a view has to hold to show it."""
RULES = ReviewConfig(covered=INSIDE, density=0.9, native=0.95)
"""Limits from which content counts as shown before, in a review's terms; fixed, so that figures stay comparable."""


class Redundancy(NamedTuple):
    """The crops of one episode, or of many added up."""

    crops: int = 0
    needless: int = 0
    repeated: int = 0
    missed: int = 0

    @property
    def redundant(self) -> int:
        return self.needless + self.repeated + self.missed


def reasons(
    views: Sequence[View], needles: Sequence[Box], *, coarse_suffices: bool | None
) -> list[tuple[str, Reason | None]]:
    """Return each crop's id and the reason that it was redundant (None: it was not), in the order shown.

    Args:
        views: of an episode, in the order shown; originals and sources, which the model never sees, do not count.
        needles: boxes that answer the question, in original pixels; empty where none is known or needed.
        coarse_suffices: None if unknown.
    """
    found: list[tuple[str, Reason | None]] = []
    earlier: list[View] = []
    for view in views:
        if view.kind == "crop":
            found.append((view.id, _reason(view, earlier, needles, coarse_suffices)))
        if view.kind not in ("original", "source"):
            earlier.append(view)
    return found


def count(views: Sequence[View], needles: Sequence[Box], *, coarse_suffices: bool | None) -> Redundancy:
    """Return the crops of an episode by reason; see `reasons`."""
    why = [reason for _, reason in reasons(views, needles, coarse_suffices=coarse_suffices)]
    counts = Counter(why)
    return Redundancy(len(why), counts["needless"], counts["repeated"], counts["missed"])


def _reason(crop: View, earlier: Sequence[View], needles: Sequence[Box], coarse_suffices: bool | None) -> Reason | None:
    if coarse_suffices:
        return "needless"
    detail = density(crop.size, crop.region)
    inside = [needle for needle in needles if crop.coverage(needle) >= INSIDE]
    # a crop of a tool's image may repeat a view of that image, or one of the same place in the original
    whole = any(_shown(place, earlier, density(crop.size, place)) for place in (crop.region, crop.extent))
    if whole or (inside and all(_shown(one, earlier, detail) for one in inside)):
        return "repeated"
    return "missed" if needles and not inside else None


def _shown(box: Box, earlier: Sequence[View], detail: float) -> bool:
    """Return whether an earlier view showed this box with as much detail."""
    return bool(earlier) and adds_nothing(best_view(box, earlier, covered=RULES.covered), detail, RULES) is not None
