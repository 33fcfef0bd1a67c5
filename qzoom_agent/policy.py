"""Policy: decides which crops the model sees unasked, whether it may ask for more, and which of its calls are served.

    direct    the coarse view alone
    explicit  the model may call the zoom tool, within the budgets
    implicit  the model's branches look first: if the gate fires, the crops that SD-RPN proposes join the coarse view;
              branches that can look again do, with these crops in context, until their gate says enough
    always    as implicit, without asking the gate
    hybrid    as implicit, and the model may call the zoom tool; each call is reviewed (`qzoom_agent.review`)
    oracle    crops around the given gold boxes join the coarse view: an upper bound for the choice of crops
    random    as oracle, with boxes at seeded random places: the worth of more tokens alone
    blind     as explicit, with uniformly grey crops: the worth of the call without its pixels
    masked    as implicit, with uniformly grey crops: the worth of an inserted crop without its pixels
    locate    the model is asked for the box of what the question needs, is shown that crop, and answers

A policy sees boxes, sizes and counts, never text or weights, and is deterministic given the seed. Crops that it inserts
count towards the budgets; only the model's calls are reviewed, budgets first.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from PIL import Image

from qzoom_agent.config import AgentConfig, PerceptionConfig, PolicyName, ViewBudget
from qzoom_agent.errors import ConfigError
from qzoom_agent.extensions import calling, find, satisfying
from qzoom_agent.geometry import Box, Size
from qzoom_agent.protocols.interface import ToolCall
from qzoom_agent.review import PolicyRule, ReviewContext, ReviewDecision, adds, hybrid_rule
from qzoom_agent.views import View, ViewStore
from qzoom_agent.zoom.zoom import ZoomPlan

ASK_FIRST: frozenset[PolicyName] = frozenset({"locate"})
LOOK_FIRST: frozenset[PolicyName] = frozenset({"implicit", "always", "hybrid", "masked"})
LOOK_AGAIN: frozenset[PolicyName] = frozenset({"implicit", "masked"})
OFFER_TOOLS: frozenset[PolicyName] = frozenset({"explicit", "blind", "hybrid"})
RANDOM_AREA = 1 / 16
"""Area of a random crop as a share of the image, where no gold box gives its size."""
WITHHOLD: frozenset[PolicyName] = frozenset({"blind", "masked"})
GREY = (128, 128, 128)
"""Colour of crops that are withheld; a constant, since even the mean colour of a crop would tell something about it."""


class CropPolicy:
    """The policy of a configuration, for one backend's budget of views."""

    def __init__(
        self,
        config: AgentConfig,
        views: ViewBudget,
        *,
        perceives: bool = False,
        known: Mapping[str, PolicyRule] | None = None,
    ) -> None:
        """
        Args:
            views: The resolved budget of each view.
            perceives: The model has branches, or a perceiver looks for it.
            known: Rules given as objects, by the name that the configuration has for them.

        Raises:
            ConfigError: This model cannot run the policy, or there is no such rule.
        """
        self.name = config.policy_for(perceives=perceives)
        if self.name in LOOK_FIRST and not perceives:
            raise ConfigError(
                f"The policy '{self.name}' needs a model with branches (gate and SD-RPN), and this one has none. "
                "Use 'explicit' to let the model zoom by itself, or 'direct' for one look. Its own branches are given "
                "by --branches, and a local model with branches can look for it: --perceiver (in Python: branches, "
                "perceiver)."
            )
        self.looks = self.name in LOOK_FIRST
        self.locates = self.name in ASK_FIRST
        self.offers_tools = self.name in OFFER_TOOLS
        self.looks_with_tools = self.offers_tools and config.perception.prompt == "opening"
        """A look reads the question with the offer of tools."""
        self.looks_again = self.name in LOOK_AGAIN and config.perception.gate != "answer"
        """Further looks follow where the branches can."""
        self._config, self._views = config, views
        self._rule: PolicyRule | None = None
        if name := config.review.rule or ("hybrid" if self.name == "hybrid" else None):
            found = find(name, kind="policy rule", known={"hybrid": hybrid_rule, **(known or {})})
            self._rule = satisfying(found, PolicyRule, kind="policy rule")

    def require(self, gold: Sequence[Box] | None) -> None:
        """Raise ConfigError if this policy needs gold boxes and none were given (None)."""
        if self.name == "oracle" and gold is None:
            raise ConfigError(
                "The policy 'oracle' crops around known boxes, and none were given. "
                "`qzoom eval` reads those of a task. In Python: boxes=[...] in pixels of the original; an empty list "
                "means that nothing needs a crop."
            )

    @property
    def look_options(self) -> PerceptionConfig:
        """The options of a look under this policy."""
        options = self._config.perception
        asked = self.name == "always" or options.gate == "answer"
        return options.model_copy(update={"gate": "off"}) if asked else options

    def inserts(self, size: Size, *, gold: Sequence[Box] | None, seed: int) -> list[Box]:
        """Return the crops shown beside the coarse view, unasked: boxes in original pixels of an image of `size`."""
        if self.name == "oracle":
            return [self.around(box, size) for box in gold or ()]
        if self.name == "random":
            draw, side = random.Random(seed), math.sqrt(RANDOM_AREA)
            if gold is None:
                return [somewhere(size.width * side, size.height * side, size, draw)]
            # As many and as large as the oracle's, so that the two differ in place alone.
            around = [self.around(box, size) for box in gold]
            return [somewhere(box.width, box.height, size, draw) for box in around]
        return []

    def keeps_back(self, shown: Sequence[View], plan: ZoomPlan, *, further: bool = False, close: bool = False) -> str:
        """Return the reason not to show a proposed crop unasked after the views in `shown`; empty to show it.

        Args:
            further: A further look proposes it, and not the first.
            close: It is a close-up of a crop.
        """
        if self.name != "hybrid" and not further:
            return ""
        if self.name == "hybrid" and not self._config.review.insert:
            return "crops are shown when asked for"
        rules = self._config.review
        if close:  # magnified, although what it shows was shown at full resolution
            rules = rules.model_copy(update={"native": None})
        return "" if adds(plan, shown, rules) else "a crop would add nothing"

    def around(self, box: Box, size: Size) -> Box:
        """Return a gold box with its margin: each edge moved outwards, which also makes a line of text less thin."""
        return box.clamp(size).padded(self._config.oracle_margin).clamp(size)

    def review(
        self,
        shown: Sequence[View],
        plan: ZoomPlan,
        context: ReviewContext | None = None,
        *,
        counted: Sequence[View] | None = None,
    ) -> ReviewDecision:
        """Decide on a call that leads to `plan`, after the views in `shown`. Nothing is cut yet.

        A plan with an error costs nothing and is served: the tool tells the model the error.

        Args:
            context: State of the episode, for a rule; without it only the budgets count.
            counted: Views that count towards the budgets; None: all that were shown.
        """
        counted = shown if counted is None else counted
        decision = self._within_budget(counted, plan)
        if self._rule is None or context is None or decision.code or plan.box is None:
            return decision
        ruled = self._ruled(self._rule, plan, shown, context)
        numbers = decision.numbers | ruled.numbers
        if ruled.plan is not None:
            if self._within_budget(counted, ruled.plan).code:
                return decision._replace(numbers=numbers)  # the crop asked for has room, the better one has not
            numbers |= {"asked_tokens": float(plan.tokens), "crop_tokens": float(ruled.plan.tokens)}
        return ruled._replace(numbers=numbers)

    def review_tool(self, call: ToolCall, shown: Sequence[View], context: ReviewContext) -> ReviewDecision:
        """Decide whether an own tool is run: always, unless the rule has a `review_tool` of its own."""
        rule: Callable[..., ReviewDecision] | None = getattr(self._rule, "review_tool", None)
        return ReviewDecision("", {}) if rule is None else self._ruled(rule, call, shown, context)

    def _ruled(self, rule: Callable[..., Any], *arguments: object) -> ReviewDecision:
        name = self._config.review.rule
        with calling(name or "hybrid", kind="policy rule"):
            decision = rule(*arguments)
        if not isinstance(decision, ReviewDecision):
            raise ConfigError(f"The policy rule {name!r} returned {decision!r:.80}. Return a ReviewDecision.")
        if wrong := {key: one for key, one in decision.numbers.items() if not hasattr(one, "__float__")}:
            raise ConfigError(f"The policy rule {name!r} returned {wrong!r:.80} among its numbers. Give numbers alone.")
        return decision

    def room(self, shown: Sequence[View], tokens: int) -> ReviewDecision:
        """Decide whether there is room for another image of so many visual tokens, after the views in `shown`."""
        return self._within_budget(shown, ZoomPlan("", tokens=tokens))

    def _within_budget(self, shown: Sequence[View], plan: ZoomPlan) -> ReviewDecision:
        budget = self._config.budget
        spent = sum(view.tokens for view in shown)
        numbers = {"views": float(len(shown)), "visual_tokens": float(spent), "crop_tokens": float(plan.tokens)}
        if not (self.offers_tools or self.locates):
            text = "There is no zoom tool in this run. Answer the question."
            return ReviewDecision("no_tool", numbers, text, last="failed")
        if len(shown) >= budget.max_views:
            numbers["max_views"] = float(budget.max_views)
            text = f"No more zooming: {len(shown)} of {budget.max_views} views were shown."
            return ReviewDecision("budget", numbers, text, last="budget")
        if budget.max_visual_tokens is not None:
            numbers["max_visual_tokens"] = float(budget.max_visual_tokens)
            left = budget.max_visual_tokens - spent
            if left < self._views.crop_min_tokens:
                text = f"No more zooming: {spent} of {budget.max_visual_tokens} visual tokens are spent."
                return ReviewDecision("budget", numbers, text, last="budget")
            if plan.tokens > left:
                text = f"This crop would cost {plan.tokens} visual tokens and {left} are left. Ask for less, or answer."
                return ReviewDecision("budget", numbers, text)
        return ReviewDecision("", numbers)

    @property
    def remarks(self) -> list[str]:
        """Notes for the record of every served call; the model does not read them."""
        return ["Withheld: the model saw uniform grey of this size."] if self.name in WITHHOLD else []

    def eyes(self, store: ViewStore) -> Callable[[str], Image.Image]:
        """Return the function that gives the session a view's pixels: grey for crops that the policy withholds.

        The trace keeps the real crop, so that a reader can see what was asked for.
        """
        if self.name not in WITHHOLD:
            return store.image

        def withheld(view_id: str) -> Image.Image:
            view = store.view(view_id)
            return Image.new("RGB", view.size, GREY) if view.kind in ("crop", "tool") else store.image(view_id)

        return withheld


def drafts(policy: str | None, gate: str) -> bool:
    """Return whether an answer from the coarse view alone decides if this policy shows more (`perception.gate`)."""
    return gate == "answer" and policy in (LOOK_FIRST | OFFER_TOOLS | ASK_FIRST) - {"always"}


def somewhere(width: float, height: float, size: Size, draw: random.Random) -> Box:
    """Return a box of these sides anywhere in an image."""
    width, height = min(width, size.width), min(height, size.height)
    x, y = draw.uniform(0, size.width - width), draw.uniform(0, size.height - height)
    return Box(x, y, x + width, y + height)
