"""A zoom call from the model's text to the reply it reads: plan, review, cut, answer.

The agent loop and the environments for reinforcement learning both serve calls here, so a model meets the same tool,
policy and words everywhere. A call never raises.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

from qzoom_agent.messages import Message
from qzoom_agent.policy import CropPolicy
from qzoom_agent.protocols.interface import ToolCall, ZoomProtocol
from qzoom_agent.review import Last, format_box, same_crop
from qzoom_agent.trace import CallRecord, Decision, PerceptionRecord
from qzoom_agent.views import ViewStore
from qzoom_agent.zoom.zoom import Tool

_REPEATED = "Another call of this turn was given this part: it is {view}. Answer from it, or zoom somewhere else."


class CallOutcome(NamedTuple):
    """The outcome of a call."""

    record: CallRecord
    messages: list[Message]
    """The reply to the model."""
    last: Last | None
    """Reason for which the next turn has to be the last, if it has to."""


@dataclass(frozen=True, slots=True)
class ToolCallExecutor:
    """Serves the calls of one turn. The store must hold a coarse view."""

    store: ViewStore
    tool: Tool
    policy: CropPolicy
    protocol: ZoomProtocol
    look: PerceptionRecord | None = None
    """Result of the coarse look, if there was one."""
    refused_turns: int = 0
    """Earlier turns in which a call was refused for an opinion of the branches (`review.refused_on_opinion`)."""
    views_read: int = 1
    """Views shown before the model wrote this turn."""

    def __call__(self, call: ToolCall) -> CallOutcome:
        """Review a call and serve it."""
        box = call.as_box
        if box is None:
            return self._deny(call, "failed", "The call has no box. Give x1, y1, x2, y2.")
        shown = self.store.shown
        order = [view.id for view in shown]
        original = self.store.view("original").size
        context = self.policy.review_context(
            look=self.look,
            refused_turns=self.refused_turns,
            crops_read=sum(view.kind == "crop" for view in shown[: self.views_read]),
            image=original,
            replan=lambda other: self.tool.plan(self.store, other),
            name=lambda view: self.protocol.view_name(order.index(view)),
            write=lambda other: format_box(other, shown[0], self.protocol.frame),
        )
        plan = self.tool.plan(self.store, box)
        twin = same_crop(plan, shown[self.views_read :], context.config)
        if twin is not None:
            return self._deny(call, "refused", _REPEATED.format(view=context.name(twin)), code="repeated")
        review = self.policy.review(shown, plan, context)
        if not review.serve:
            return self._deny(call, "refused", review.reason, review.numbers, code=review.code, last=review.last)
        cut = self.tool.cut(self.store, review.plan or plan, label=call.label)
        if cut.view is None:
            return self._deny(call, "failed", cut.error or "", review.numbers)
        notes = [*([review.reason] if review.reason else []), *cut.notes]
        region = cut.view.region
        measured = {"image_share": region.area / original.area, "magnification": cut.view.width / region.width}
        record = record_of(
            call,
            "snapped" if review.plan else "grown" if cut.notes else "served",
            " ".join([*notes, *self.policy.remarks]),
            code=review.code,
            numbers=review.numbers | measured,
            served=cut.served,
            result=cut.view.id,
        )
        return CallOutcome(record, self.protocol.result(cut.view, len(shown) - 1, notes), None)

    def _deny(
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


def record_of(call: ToolCall, decision: Decision, reason: str = "", **more: Any) -> CallRecord:
    """Return the record of a call and its outcome; `more` are further fields of `CallRecord`."""
    return CallRecord(**call.model_dump(), decision=decision, reason=reason, **more)
