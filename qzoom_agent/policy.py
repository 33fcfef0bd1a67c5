"""Policy: what decides on crops. Which crops the model is shown unasked, whether it may ask, and what it then gets.

    direct    the coarse view alone
    explicit  the model may call the zoom tool, as long as the budgets last
    oracle    crops around the given gold boxes stand beside the coarse view: the ceiling of any "where"
    random    as oracle, but the boxes lie at seeded random places: what more tokens alone are worth
    blind     as explicit, but every crop is uniformly grey: what the call alone is worth, without the pixels
    implicit  a model with branches looks first: if its gate asks for more detail, the crops that SD-RPN proposes stand
              beside the coarse view
    always    as implicit, without asking the gate
    hybrid    implicit, and the model may call the zoom tool; each call is reviewed by what was shown and what the
              branches found: served, served at a better place, or refused with a reason (`qzoom_agent.review`)

Without a choice a model with branches runs under `implicit`, another one under `explicit`.

Invariants: a policy sees boxes, sizes and counts, never text and never weights; the same configuration, image size,
gold boxes and seed give the same crops; every review carries the numbers it rests on. Crops that a policy inserts are
the experimenter's choice: they count towards the budgets but are never refused (`hybrid` leaves out those that add
nothing). Only the model's calls are reviewed, and budgets come first: no other rule serves what they do not allow.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Sequence
from typing import Literal, NamedTuple

from PIL import Image

from qzoom_agent.config import AgentConfig, PerceptionConfig, PolicyName, ViewBudget
from qzoom_agent.errors import ConfigError
from qzoom_agent.geometry import Box, Size
from qzoom_agent.review import ReviewContext, adds, judge
from qzoom_agent.views import View, ViewStore
from qzoom_agent.zoom.zoom import ZoomPlan

LOOK_FIRST: frozenset[PolicyName] = frozenset({"implicit", "always", "hybrid"})
OFFER_TOOLS: frozenset[PolicyName] = frozenset({"explicit", "blind", "hybrid"})
RANDOM_AREA = 1 / 16
"""Share of the image that a random crop has when no gold box gives its size."""
Last = Literal["budget", "failed"]
"""Why a turn is the forced last one: a budget is spent, or calls cannot be served."""
GREY = (128, 128, 128)
"""What `blind` shows. A constant: even the mean colour of a crop would say something about it."""


class Review(NamedTuple):
    """The verdict on one zoom call."""

    serve: bool
    reason: str
    """What the model is told when the call is refused or served at another place; else empty."""
    numbers: dict[str, float]
    """What the verdict rests on."""
    last: Last | None
    """Why asking again is no use, so that the next turn has to be the last; None if the model may go on."""
    code: str = ""
    """The rule that refused or moved the call: "no_tool", "budget", or one of `review.Code`; else empty."""
    plan: ZoomPlan | None = None
    """What to cut instead of what was asked for."""


class CropPolicy:
    """The policy that a configuration names, ready for one backend's budget of views."""

    def __init__(self, config: AgentConfig, views: ViewBudget, *, perceives: bool = False) -> None:
        """Raises ConfigError for a policy that this model cannot run; `perceives`: it has branches."""
        self.name = config.policy_for(perceives=perceives)
        if self.name in LOOK_FIRST and not perceives:
            raise ConfigError(
                f"The policy '{self.name}' needs a model with branches (gate and SD-RPN), and this one has none. "
                "Use 'explicit' to let the model zoom by itself, or 'direct' for one look."
            )
        self.looks = self.name in LOOK_FIRST
        self.offers_tools = self.name in OFFER_TOOLS
        self.looks_with_tools = self.offers_tools and config.perception.prompt == "opening"
        """Whether a look reads the question with the offer of tools."""
        self._config = config
        self._views = views

    def require(self, gold: Sequence[Box] | None) -> None:
        """Raise ConfigError if this policy cannot run with these gold boxes (None: none were given)."""
        if self.name == "oracle" and gold is None:
            raise ConfigError(
                "The policy 'oracle' crops around known boxes, and none were given. "
                "Pass boxes=[...] in pixels of the original; an empty list means that nothing needs a crop."
            )

    @property
    def look_options(self) -> PerceptionConfig:
        """How a look is read under this policy."""
        options = self._config.perception
        return options.model_copy(update={"gate": "off"}) if self.name == "always" else options

    def inserts(self, size: Size, *, gold: Sequence[Box] | None, seed: int) -> list[Box]:
        """The crops shown beside the coarse view, unasked: boxes in original pixels of an image of `size`."""
        if self.name == "oracle":
            return [self.around(box, size) for box in gold or ()]
        if self.name == "random":
            # As many and as large as the oracle's, so that the two differ in place alone.
            shapes = [(box.width, box.height) for box in (self.around(box, size) for box in gold or ())]
            side = math.sqrt(RANDOM_AREA)
            draw = random.Random(seed)
            return [_somewhere(w, h, size, draw) for w, h in shapes or [(size.width * side, size.height * side)]]
        return []

    def keeps_back(self, shown: Sequence[View], plan: ZoomPlan) -> str:
        """Why a proposed crop is not shown unasked after the views in `shown`; empty if it is."""
        if self.name != "hybrid":
            return ""
        if not self._config.review.insert:
            return "crops are shown when asked for"
        return "" if adds(plan, shown, self._config.review) else "a crop would add nothing"

    def around(self, box: Box, size: Size) -> Box:
        """A gold box with its margin: each edge moved outwards, which also makes a line of text less thin."""
        inner = box.clamp(size)
        margin = self._config.oracle_margin * max(inner.width, inner.height)
        return Box(inner.x1 - margin, inner.y1 - margin, inner.x2 + margin, inner.y2 + margin).clamp(size)

    def review(self, shown: Sequence[View], plan: ZoomPlan, case: ReviewContext | None = None) -> Review:
        """Judge a call that comes to `plan`, after the views in `shown`. Nothing is cut yet.

        Only whether a crop may be made is judged: a plan with an error costs nothing, and the tool says why.

        Args:
            case: what else is known, for `hybrid`; without it nothing but the budgets counts.
        """
        review = self._within_budget(shown, plan)
        if self.name != "hybrid" or case is None or not review.serve or plan.box is None:
            return review
        map_decides = self._config.perception.gate == "statistics"
        verdict = judge(shown, plan, case, self._config.review, map_decides=map_decides)
        numbers = review.numbers | verdict.numbers
        if verdict.code is None:
            return Review(True, "", numbers, last=None)
        if verdict.plan is None:
            return Review(False, verdict.text, numbers, last=None, code=verdict.code)
        if not self._within_budget(shown, verdict.plan).serve:
            return Review(True, "", numbers, last=None)  # what was asked for has room, the better place has not
        numbers |= {"asked_tokens": float(plan.tokens), "crop_tokens": float(verdict.plan.tokens)}
        return Review(True, verdict.text, numbers, last=None, code=verdict.code, plan=verdict.plan)

    def _within_budget(self, shown: Sequence[View], plan: ZoomPlan) -> Review:
        budget = self._config.budget
        spent = sum(view.tokens for view in shown)
        numbers = {"views": float(len(shown)), "visual_tokens": float(spent), "crop_tokens": float(plan.tokens)}
        if not self.offers_tools:
            text = "There is no zoom tool in this run. Answer the question."
            return Review(False, text, numbers, last="failed", code="no_tool")
        if len(shown) >= budget.max_views:
            numbers["max_views"] = float(budget.max_views)
            text = f"No more zooming: {len(shown)} of {budget.max_views} views were shown."
            return Review(False, text, numbers, last="budget", code="budget")
        if budget.max_visual_tokens is not None:
            numbers["max_visual_tokens"] = float(budget.max_visual_tokens)
            left = budget.max_visual_tokens - spent
            if left < self._views.crop_min_tokens:
                text = f"No more zooming: {spent} of {budget.max_visual_tokens} visual tokens are spent."
                return Review(False, text, numbers, last="budget", code="budget")
            if plan.tokens > left:
                text = f"This crop would cost {plan.tokens} visual tokens and {left} are left. Ask for less, or answer."
                return Review(False, text, numbers, last=None, code="budget")
        return Review(True, "", numbers, last=None)

    @property
    def remarks(self) -> list[str]:
        """What the record of every served call has to say beside the tool's notes; the model does not read it."""
        return ["Withheld: the model saw uniform grey of this size."] if self.name == "blind" else []

    def eyes(self, store: ViewStore) -> Callable[[str], Image.Image]:
        """What the session resolves view ids with: the store's pixels, or grey crops for `blind`.

        Under `blind` the trace keeps the view that was cut and withheld, so that one can see what was asked for.
        """
        if self.name != "blind":
            return store.image

        def withheld(view_id: str) -> Image.Image:
            view = store.view(view_id)
            return Image.new("RGB", view.size, GREY) if view.kind == "crop" else store.image(view_id)

        return withheld


def _somewhere(width: float, height: float, size: Size, draw: random.Random) -> Box:
    width, height = min(width, size.width), min(height, size.height)
    x, y = draw.uniform(0, size.width - width), draw.uniform(0, size.height - height)
    return Box(x, y, x + width, y + height)
