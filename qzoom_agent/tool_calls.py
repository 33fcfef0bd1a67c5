"""A call from the model's text to the reply it reads: plan, review, cut or run, answer.

The agent loop and the environments for reinforcement learning both serve calls here, so a model meets the same tool,
policy and words everywhere. A call never raises, but for a tool or a rule of somebody else that fails.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from typing import Any, Final, NamedTuple, cast

from qzoom_agent.episode_state import Context
from qzoom_agent.errors import ConfigError, ImageError
from qzoom_agent.extensions import calling, reference
from qzoom_agent.geometry import Box, Size, fit_tokens
from qzoom_agent.images import digest
from qzoom_agent.messages import Message, plain_text, text_part
from qzoom_agent.protocols.interface import ToolCall, ToolProtocol, view_names
from qzoom_agent.review import Last, ReviewContext, ReviewDecision, format_box, same_crop
from qzoom_agent.trace import Approval, CallRecord, Decision, PendingCall, PerceptionRecord, Turn
from qzoom_agent.views import View, coarse_id, original_id
from qzoom_agent.zoom.own_tools import ToolOutput
from qzoom_agent.zoom.tool_images import Views
from qzoom_agent.zoom.zoom import ZoomPlan, ZoomResult

PERSON: Final = "person"
"""Code of calls that a person has moved or refused."""
_REPEATED = "Another call of this turn was given this part: it is {view}. Answer from it, or zoom somewhere else."


class CallOutcome(NamedTuple):
    """The outcome of a call."""

    record: CallRecord
    messages: list[Message]
    """The reply to the model."""
    last: Last | None
    """Reason for which the next turn has to be the last, if it has to."""


class Considered(NamedTuple):
    """A call that the review lets through."""

    review: ReviewDecision
    plan: ZoomPlan | None
    """The crop to cut; None: an own tool is to be run."""


@dataclass(frozen=True, slots=True)
class ToolCallExecutor:
    """Serves the calls of one turn. The store must hold a coarse view."""

    ctx: Context
    look: PerceptionRecord | None = None
    """Result of the coarse look, if there was one."""
    refused_turns: int = 0
    """Earlier turns in which a call was refused for an opinion of the branches (`review.refused_on_opinion`)."""
    views_read: int = 1
    """Views shown before the model wrote this turn."""

    def __call__(self, call: ToolCall) -> CallOutcome:
        """Review a call and serve it."""
        found = self.consider(call)
        return found if isinstance(found, CallOutcome) else self._serve(call, found)

    def consider(self, call: ToolCall) -> CallOutcome | Considered:
        """Plan and review a call; return the outcome of one that is not served. Nothing is cut or run yet."""
        ctx = self.ctx
        if call.arguments is not None:
            return self._consider_tool(call)
        box = call.as_box
        if box is None:
            return self._deny(call, "failed", "The call has no box. Give x1, y1, x2, y2.")
        shown, context = ctx.store.shown, self._context(call.view)
        plan = self._plan(box)
        twin = same_crop(plan, shown[self.views_read :], context.config)
        if twin is not None:
            numbers = {"crop_tokens": float(plan.tokens)}
            return self._deny(call, "refused", _REPEATED.format(view=context.name(twin)), numbers, code="repeated")
        review = ctx.policy.review(shown, plan, context, counted=ctx.own_views)
        if not review.serve:
            return self._deny(call, "refused", review.reason, review.numbers, code=review.code, last=review.last)
        if plan.error:
            return self._deny(call, "failed", plan.error, review.numbers)
        return Considered(review, review.plan or plan)

    def _serve(self, call: ToolCall, found: Considered, *, approval: Approval | None = None) -> CallOutcome:
        """Cut the crop of a reviewed call, or run its tool."""
        ctx = self.ctx
        review, plan = found
        if plan is None:
            return self._run(call, review, approval)
        shown = ctx.store.shown
        with calling(reference(ctx.tool), kind="tool"):
            cut = ctx.tool.cut(ctx.store, plan, label=call.label)
        self._require(cut, ZoomResult)
        if cut.view is None:
            return self._deny(call, "failed", cut.error or "", review.numbers)
        notes = [*([review.reason] if review.reason else []), *cut.notes]
        region, extent = cut.view.region, cut.view.extent
        share = region.area / ctx.store.original(cut.view.id).size.area
        measured = {"image_share": share, "magnification": cut.view.width / extent.width}
        record = record_of(
            call,
            "snapped" if review.plan else "grown" if cut.notes else "served",
            " ".join([*notes, *ctx.policy.remarks]),
            code=review.code,
            numbers=review.numbers | measured,
            served=cut.served,
            result=cut.view.id,
            approval=approval,
        )
        crops = sum(view.kind != "coarse" for view in shown)
        messages = ctx.protocol.result(cut.view, crops, notes)
        if review.code == PERSON and not any(review.reason in plain_text(one) for one in messages):
            messages[-1]["content"].append(text_part(review.reason))  # a format without notes must say it too
        return CallOutcome(record, messages, None)

    def _plan(self, box: Box) -> ZoomPlan:
        ctx = self.ctx
        with calling(reference(ctx.tool), kind="tool"):
            plan = ctx.tool.plan(ctx.store, box)
        self._require(plan, ZoomPlan)
        return plan

    def _require(self, given: object, wanted: type) -> None:
        """Raise ConfigError if a tool of somebody else returned another type."""
        if not isinstance(given, wanted):
            raise ConfigError(
                f"The tool {reference(self.ctx.tool)!r} returned {given!r:.80}. Return a {wanted.__name__}."
            )

    def pending(self, call: ToolCall, found: Considered, turn: Turn) -> PendingCall:
        """Return a reviewed call as a person is asked about it."""
        review, plan = found
        asked = PendingCall(
            name=call.name,
            label=call.label,
            thought=turn.thought,
            view=call.view,
            arguments=_written(call),
            code=review.code,
            reason=review.reason,
            numbers=review.numbers,
        )
        if plan is None or plan.box is None:
            return asked
        asked.box, asked.image = plan.box.corners, self.ctx.store.view(plan.box.view).image
        asked.size, asked.tokens = plan.size, plan.tokens
        asked.notes = [*([review.reason] if review.reason else []), *plan.notes]
        if plan.cut is not None:
            asked.source, asked.inside = plan.cut.view, plan.cut.corners
        return asked

    def decided(self, call: ToolCall, pending: PendingCall, approval: Approval) -> CallOutcome:
        """Run a call as a person has decided: as it was shown to them, at another place, or not at all."""
        if approval.action == "refuse":
            reason = f"A person refused this call{f': {approval.reason}' if approval.reason else '.'}"
            return self._deny(call, "refused", reason, pending.numbers, code=PERSON, approval=approval)
        if pending.box is None:
            return self._serve(call, Considered(ReviewDecision("", pending.numbers), None), approval=approval)
        if approval.box is not None:
            return self._moved(call, pending, approval, Box(*approval.box, view=original_id(pending.image)))
        edges = Box(*pending.box, view=original_id(pending.image))
        cut = None if pending.inside is None else Box(*pending.inside, view=pending.source)
        own = [note for note in pending.notes if note != pending.reason]
        plan = ZoomPlan(pending.view, edges, Size(*pending.size), pending.tokens, tuple(own), cut=cut)
        review = ReviewDecision(pending.code, pending.numbers, pending.reason, plan if pending.code else None)
        return self._serve(call, Considered(review, plan), approval=approval)

    def _moved(self, call: ToolCall, pending: PendingCall, approval: Approval, box: Box) -> CallOutcome:
        """Serve the box that a person chose, if the budgets have room for it."""
        ctx = self.ctx
        plan = ctx.zoom.plan(ctx.store, box)
        room = ctx.policy.room(ctx.own_views, plan.tokens)
        if room.code:
            return self._deny(call, "refused", room.reason, room.numbers, code=room.code, approval=approval)
        assert plan.box is not None, "a decision has a box inside the image"
        whole = coarse_id(pending.image)
        shown = format_box(plan.box, ctx.store.view(whole), ctx.protocol.frame)
        of = "" if pending.view == whole else f" of {self._context(whole).name(whole)}"
        review = ReviewDecision(PERSON, pending.numbers, f"A person moved the box to {shown}{of}.", plan)
        return self._serve(call, Considered(review, replace(plan, parent=pending.view)), approval=approval)

    def _context(self, view_id: str = "") -> ReviewContext:
        """Return the context of a review of a call about the image of a view; an unknown one counts as the first."""
        ctx, shown = self.ctx, self.ctx.store.shown
        names = dict(zip((view.id for view in shown), view_names(ctx.protocol, shown), strict=True))
        number = ctx.store.view(view_id).image if view_id in ctx.store else 0
        coarse = next((view for view in shown if view.id == coarse_id(number)), shown[0])
        return ReviewContext(
            look=None if self.look is None else self.look.of(number),
            refused_turns=self.refused_turns,
            crops_read=sum(view.kind == "crop" and view.id not in ctx.earlier for view in shown[: self.views_read]),
            image=ctx.store.original(coarse.id).size,
            replan=self._plan,
            name=names.__getitem__,
            write=lambda other: format_box(other, coarse, ctx.protocol.frame),
            config=ctx.config.review,
            map_decides=ctx.config.perception.gate == "statistics",
        )

    def _consider_tool(self, call: ToolCall) -> CallOutcome | Considered:
        ctx = self.ctx
        if call.name not in ctx.own:
            return self._deny(call, "failed", f"There is no tool {call.name!r}. There are {', '.join(ctx.own)}.")
        review = ctx.policy.review_tool(call, ctx.store.shown, self._context())
        if not review.serve:
            return self._deny(call, "refused", review.reason, review.numbers, code=review.code, last=review.last)
        return Considered(review, None)

    def _run(self, call: ToolCall, review: ReviewDecision, approval: Approval | None) -> CallOutcome:
        """Run an own tool; an image that it returns joins the views, if the budgets have room."""
        ctx = self.ctx
        views = Views(ctx.store, names=view_names(ctx.protocol, ctx.store.shown))
        output = ctx.own[call.name](call.arguments or {}, views, max_pixels=ctx.config.max_pixels)
        if output.error:
            return self._deny(call, "failed", output.error, review.numbers, approval=approval)
        view, note, code, last = self._show(output)
        if view is None and not output.text:
            decision: Decision = "refused" if code else "failed"
            return self._deny(call, decision, note, review.numbers, code=code, last=last, approval=approval)
        said = "\n".join(filter(None, (output.text, note)))
        result = None if view is None else view.id
        more = {"code": code, "numbers": review.numbers, "result": result, "text": output.text, "approval": approval}
        record = record_of(call, "served", note, **more)
        return CallOutcome(record, cast(ToolProtocol, ctx.protocol).tool_result(said, view), last)

    def _show(self, output: ToolOutput) -> tuple[View | None, str, str, Last | None]:
        """Add the image of a tool to the views.

        Returns:
            Its view, None if it is not shown; a note for the model; and of a refusal its code, and `Last` if it is one.
        """
        ctx = self.ctx
        if output.image is None:
            return None, "", "", None
        budget, shown = ctx.zoom.config.budget, ctx.store.shown
        known = digest(output.image)
        twin = next((one for one in shown if one.kind == "tool" and ctx.store.view(one.source).digest == known), None)
        if twin is not None:
            return None, f"This image was already shown: it is {twin.id}.", "repeated", None
        try:
            cost = ctx.store.cost(fit_tokens(output.image.size, **budget), ctx.zoom.config.factor)
            room = ctx.policy.room(ctx.own_views, cost)
            if room.code:
                return None, f"The image is not shown. {room.reason}", room.code, room.last
            view = ctx.store.add_tool_image(output.image, parent=output.parent, matrix=output.matrix, **budget)
        except ImageError as error:
            return None, f"The image is not shown. {error}", "", None
        hint = cast(ToolProtocol, ctx.protocol).zoom_hint(view, ctx.store.shown)
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
        approval: Approval | None = None,
    ) -> CallOutcome:
        record = record_of(call, decision, reason, code=code, numbers=numbers or {}, approval=approval)
        return CallOutcome(record, self.ctx.protocol.refusal(reason), last)


def record_of(call: ToolCall, decision: Decision, reason: str = "", **more: Any) -> CallRecord:
    """Return the record of a call and its outcome; `more` are further fields of `CallRecord`."""
    return CallRecord(**call.model_dump(), arguments=_written(call), decision=decision, reason=reason, **more)


def _written(call: ToolCall) -> str | None:
    return None if call.arguments is None else json.dumps(call.arguments, ensure_ascii=False, default=str)
