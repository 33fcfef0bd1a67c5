"""A call from the model's text to the reply it reads: plan, review, cut or run, answer.

The agent loop and the environments for reinforcement learning both serve calls here, so a model meets the same tool,
policy and words everywhere. A call never raises.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from qzoom_agent.errors import ImageError
from qzoom_agent.geometry import fit_tokens, tokens
from qzoom_agent.images import MAX_PIXELS, digest
from qzoom_agent.messages import Message
from qzoom_agent.policy import CropPolicy
from qzoom_agent.protocols.interface import ToolCall, ToolProtocol, ZoomProtocol
from qzoom_agent.review import Last, ReviewContext, format_box, same_crop
from qzoom_agent.trace import CallRecord, Decision, PerceptionRecord
from qzoom_agent.views import View, ViewStore
from qzoom_agent.zoom.own_tools import OwnTool, ToolOutput
from qzoom_agent.zoom.tool_images import Views
from qzoom_agent.zoom.zoom import Tool, ZoomConfig

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
    own: Mapping[str, OwnTool] = field(default_factory=dict)
    """Tools that the model may call beside zoom, by name."""
    crops: ZoomConfig = field(default_factory=ZoomConfig)
    """Budget of an image that an own tool returns."""
    max_pixels: int = MAX_PIXELS
    """Most pixels of such an image."""
    earlier: frozenset[str] = frozenset()
    """Views that earlier questions of the conversation added, which count neither as read nor towards the budgets."""

    def __call__(self, call: ToolCall) -> CallOutcome:
        """Review a call and serve it."""
        if call.arguments is not None:
            return self._run(call, call.arguments)
        box = call.as_box
        if box is None:
            return self._deny(call, "failed", "The call has no box. Give x1, y1, x2, y2.")
        shown, context = self.store.shown, self._context()
        plan = self.tool.plan(self.store, box)
        twin = same_crop(plan, shown[self.views_read :], context.config)
        if twin is not None:
            return self._deny(call, "refused", _REPEATED.format(view=context.name(twin)), code="repeated")
        review = self.policy.review(shown, plan, context, counted=self._counted())
        if not review.serve:
            return self._deny(call, "refused", review.reason, review.numbers, code=review.code, last=review.last)
        cut = self.tool.cut(self.store, review.plan or plan, label=call.label)
        if cut.view is None:
            return self._deny(call, "failed", cut.error or "", review.numbers)
        notes = [*([review.reason] if review.reason else []), *cut.notes]
        region, extent = cut.view.region, cut.view.extent
        share = region.area / self.store.view("original").size.area
        measured = {"image_share": share, "magnification": cut.view.width / extent.width}
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

    def _counted(self) -> list[View]:
        """Return the views that count towards the budgets."""
        return [view for view in self.store.shown if view.id not in self.earlier]

    def _context(self) -> ReviewContext:
        shown = self.store.shown
        order = [view.id for view in shown]
        return self.policy.review_context(
            look=self.look,
            refused_turns=self.refused_turns,
            crops_read=sum(view.kind == "crop" and view.id not in self.earlier for view in shown[: self.views_read]),
            image=self.store.view("original").size,
            replan=lambda other: self.tool.plan(self.store, other),
            name=lambda view: self.protocol.view_name(order.index(view)),
            write=lambda other: format_box(other, shown[0], self.protocol.frame),
        )

    def _run(self, call: ToolCall, arguments: Mapping[str, Any]) -> CallOutcome:
        """Run an own tool; an image that it returns joins the views, if the budgets have room."""
        assert isinstance(self.protocol, ToolProtocol)
        tool = self.own.get(call.name)
        if tool is None:
            return self._deny(call, "failed", f"There is no tool {call.name!r}. There are {', '.join(self.own)}.")
        review = self.policy.review_tool(call, self.store.shown, self._context())
        if not review.serve:
            return self._deny(call, "refused", review.reason, review.numbers, code=review.code, last=review.last)
        views = Views(self.store, name=self.protocol.view_name)
        output = tool(arguments, views, max_pixels=self.max_pixels)
        if output.error:
            return self._deny(call, "failed", output.error, review.numbers)
        view, note, code, last = self._show(output)
        if view is None and not output.text:
            return self._deny(call, "refused" if code else "failed", note, review.numbers, code=code, last=last)
        said = "\n".join(filter(None, (output.text, note)))
        result = None if view is None else view.id
        more = {"code": code, "numbers": review.numbers, "result": result, "text": output.text}
        record = record_of(call, "served", note, **more)
        return CallOutcome(record, self.protocol.tool_result(said, view), last)

    def _show(self, output: ToolOutput) -> tuple[View | None, str, str, Last | None]:
        """Add the image of a tool to the views.

        Returns:
            Its view, None if it is not shown; a note for the model; and of a refusal its code, and `Last` if it is one.
        """
        if output.image is None:
            return None, "", "", None
        assert isinstance(self.protocol, ToolProtocol)
        budget = self.crops.model_dump(include={"factor", "min_tokens", "max_tokens"})
        shown = self.store.shown
        known = digest(output.image)
        twin = next((one for one in shown if one.kind == "tool" and self.store.view(one.source).digest == known), None)
        if twin is not None:
            return None, f"This image was already shown: it is {twin.id}.", "repeated", None
        try:
            cost = tokens(fit_tokens(output.image.size, **budget), self.crops.factor)
            room = self.policy.room(self._counted(), cost)
            if room.code:
                return None, f"The image is not shown. {room.reason}", room.code, room.last
            view = self.store.add_tool_image(output.image, parent=output.parent, matrix=output.matrix, **budget)
        except ImageError as error:
            return None, f"The image is not shown. {error}", "", None
        hint = self.protocol.zoom_hint(view, self.store.shown)
        return view, f"This image is {view.id!r}. {hint}".strip(), "", None

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
    arguments = None if call.arguments is None else json.dumps(call.arguments, ensure_ascii=False, default=str)
    return CallRecord(**call.model_dump(), arguments=arguments, decision=decision, reason=reason, **more)
