"""A run as it happens: one line a step, made from the agent's events; and the same lines from a saved trace.

Boxes are shown in pixels of the original image, whatever frame the model used.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

from qzoom_agent.cli.console import Console, printable
from qzoom_agent.cli.main import BACKEND, BUDGET, OK
from qzoom_agent.trace import CallRecord, PerceptionRecord, Status, Trace, Turn
from qzoom_agent.views import View

if TYPE_CHECKING:
    from qzoom_agent.agent import Answer, Event

EXIT_CODES: dict[Status, int] = {"answered": OK, "budget": BUDGET, "refused": BUDGET, "error": BACKEND}


def follow(events: Iterable[Event], console: Console, *, area: int) -> Answer:
    """Show each event; returns the answer that the last one carries. `area` is the original's, in pixels."""
    steps = _Steps(console, area)
    answer: Answer | None = None
    began = time.perf_counter()
    for event in events:
        seconds = time.perf_counter() - began
        if event.kind == "view":
            steps.view(View(**event.data), seconds)
            began = time.perf_counter()
        elif event.kind == "look":
            steps.look(PerceptionRecord(**event.data))
        elif event.kind == "turn":
            steps.turn(Turn(**event.data))
        elif event.kind == "call":
            steps.call(CallRecord(**{key: value for key, value in event.data.items() if key != "turn"}))
        elif event.kind == "answer":
            answer = event.answer
    assert answer is not None, "a run always ends with an answer event"
    return answer


def replay(trace: Trace, console: Console) -> None:
    """Show the steps of a finished run."""
    original = trace.view("original")
    steps = _Steps(console, original.size.area if original else 1)
    calls = {call.result for turn in trace.turns for call in turn.calls}
    for view in trace.views:
        if view.kind != "original" and view.id not in calls:
            steps.view(view, None)
            if view.kind == "coarse" and trace.perception is not None:
                steps.look(trace.perception)
    for turn in trace.turns:
        steps.turn(turn)
        for call in turn.calls:
            steps.call(call)
            result = trace.view(call.result) if call.result else None
            if result:
                steps.view(result, turn.seconds + turn.act_seconds)


def summary(trace: Trace) -> str:
    """Return the end of a run and its cost, on one line."""
    usage = trace.usage
    zooms = usage.served + usage.inserted
    turned_down = usage.refused + usage.failed
    saved = f", {usage.saved_tokens} saved by refusals" if usage.saved_tokens else ""
    parts = [
        f"{zooms} zoom{'' if zooms == 1 else 's'}" + (f" ({turned_down} more not served)" if turned_down else ""),
        f"{usage.visual_tokens} visual tokens ({usage.coarse_tokens} coarse + {usage.crop_tokens} crops{saved})",
        f"{usage.seconds.total:.2f} s",
    ]
    return f"{trace.status}: {', '.join(parts)}"


class _Steps:
    """Turns views, turns and calls into lines."""

    def __init__(self, console: Console, area: int) -> None:
        self.console = console
        self.area = area
        self.asked: dict[str, CallRecord] = {}

    def view(self, view: View, seconds: float | None) -> None:
        if view.kind == "coarse":
            self.console.line(f"look coarse {view.tokens} tokens", "cyan")
            return
        call = self.asked.pop(view.id, None)
        took = "" if seconds is None else f" {seconds:.2f} s"
        share = view.region.area / self.area
        verb = "zoom" if call else "show"
        self.console.line(f"{verb} {_quad(view.box)} {share:.1%} of image +{view.tokens} visual tokens{took}", "cyan")
        if call and call.decision in ("grown", "snapped") and call.reason:
            self.console.line(f"     {printable(call.reason)}", "dim")

    def look(self, found: PerceptionRecord) -> None:
        """Print the result of a look; without -v only where the budget withheld the crops it proposed."""
        gate = "" if found.fired is None else f"gate {found.score:.2f} of {found.threshold:.2f}: "
        text = f"     {gate}{printable(found.reason)}"
        if found.withheld:
            self.console.line(text, "yellow")
        else:
            self.console.line(text, "dim", level=1)

    def turn(self, turn: Turn) -> None:
        for text in turn.text.splitlines():
            self.console.line(f"     {printable(text)}", "dim", level=1)
        for problem in turn.problems:
            self.console.line(f"unreadable call: {printable(problem)}", "yellow")
        for repair in turn.repairs:
            self.console.line(f"     mended: {printable(repair)}", "dim", level=1)

    def call(self, call: CallRecord) -> None:
        if call.result is not None:
            self.asked[call.result] = call
            return
        asked = f"{_quad(call.box)} of {printable(call.view)}, {call.frame} " if call.box else ""
        rule = f"({printable(call.code)}) " if call.code else ""
        self.console.line(f"{call.decision} {rule}{asked}- {printable(call.reason)}", "yellow")


def _quad(box: Sequence[Any]) -> str:
    return "[" + ",".join(f"{side:.4g}" if abs(side) < 10 and side % 1 else f"{side:.0f}" for side in box) + "]"
