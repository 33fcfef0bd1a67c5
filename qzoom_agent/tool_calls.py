"""One zoom call from the model's text to what the model is told: plan, review, cut, answer.

Everything that acts on a call goes through here (the loop of an episode, an environment for reinforcement learning), so
that a model meets the same tool, the same policy and the same words everywhere. Nothing is decided here: the tool mends
the box, the policy reviews it, the protocol words the result. A call never raises.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from qzoom_agent.geometry import Box
from qzoom_agent.messages import Message
from qzoom_agent.policy import CropPolicy, Last
from qzoom_agent.protocols.interface import ToolCall, ZoomProtocol
from qzoom_agent.review import ReviewContext, written
from qzoom_agent.trace import CallRecord, Decision, PerceptionRecord
from qzoom_agent.views import View, ViewStore
from qzoom_agent.zoom.zoom import Zoom, ZoomPlan


class CallOutcome(NamedTuple):
    """What became of a call."""

    record: CallRecord
    messages: list[Message]
    """What the model is told."""
    last: Last | None
    """Why the next turn has to be the last, if it has to."""


@dataclass(frozen=True, slots=True)
class ToolCallExecutor:
    """What the calls of one turn are served with. The store must hold a coarse view."""

    store: ViewStore
    zoom: Zoom
    policy: CropPolicy
    protocol: ZoomProtocol
    look: PerceptionRecord | None = None
    """What the branches found in the coarse view, if anybody looked."""
    refused_turns: int = 0
    """Earlier turns in which a call was refused on the branches' word (`review.refused_on_opinion`)."""
    views_read: int = 1
    """Views shown before the model wrote this turn."""

    def __call__(self, call: ToolCall) -> CallOutcome:
        """Review a call and run it."""
        box = call.as_box
        if box is None:
            return self._no(call, "failed", "The call has no box. Give x1, y1, x2, y2.")
        shown = self.store.shown
        plan = self.zoom.plan(self.store, box)
        review = self.policy.review(shown, plan, self._case(shown))
        if not review.serve:
            return self._no(call, "refused", review.reason, review.numbers, code=review.code, last=review.last)
        chosen: ZoomPlan = review.plan or plan
        cut = self.zoom.cut(self.store, chosen, label=call.label)
        if cut.view is None:
            return self._no(call, "failed", cut.error or "", review.numbers)
        notes = [*([review.reason] if review.reason else []), *cut.notes]
        region, image = cut.view.region, self.store.view("original").size
        record = record_of(
            call,
            "snapped" if review.plan else "grown" if cut.notes else "served",
            " ".join([*notes, *self.policy.remarks]),
            code=review.code,
            numbers=review.numbers
            | {"image_share": region.area / image.area, "magnification": cut.view.width / region.width},
            served=cut.served,
            result=cut.view.id,
        )
        return CallOutcome(record, self.protocol.result(cut.view, len(shown) - 1, notes), None)

    def _no(
        self,
        call: ToolCall,
        decision: Decision,
        reason: str,
        numbers: dict[str, float] | None = None,
        *,
        code: str = "",
        last: Last | None = None,
    ) -> CallOutcome:
        record = record_of(call, decision, reason, code=code, numbers=numbers or {})
        return CallOutcome(record, self.protocol.refusal(reason), last)

    def _case(self, shown: Sequence[View]) -> ReviewContext:
        order = [view.id for view in shown]

        def replan(box: Box) -> ZoomPlan:
            return self.zoom.plan(self.store, box)

        return ReviewContext(
            look=self.look,
            refused_turns=self.refused_turns,
            crops_read=sum(view.kind == "crop" for view in shown[: self.views_read]),
            image=self.store.view("original").size,
            replan=replan,
            name=lambda view: self.protocol.view_name(order.index(view)),
            write=lambda box: written(box, shown[0], self.protocol.frame),
        )


def record_of(call: ToolCall, decision: Decision, reason: str = "", **more: Any) -> CallRecord:
    """The record of a call and its outcome; `more` are further fields of `CallRecord`."""
    return CallRecord(**call.model_dump(), decision=decision, reason=reason, **more)
