"""`qzoom ask --approve`: asks at the terminal about each call before it is run.

The call and the question go to stderr, so that stdout has the answer alone; the decision is a line of stdin.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Callable
from typing import TYPE_CHECKING, Final

from qzoom_agent.cli.console import Console, printable
from qzoom_agent.errors import ConfigError

if TYPE_CHECKING:
    from qzoom_agent.approval import Decision
    from qzoom_agent.trace import PendingCall

_HOW: Final = "run it? y, or n, or another box (x1,y1,x2,y2 in pixels of the image), or the reason to refuse it"
_BOX: Final = re.compile(r"[\[(]?" + r"[,\s]+".join([r"\s*(-?[\d.]{1,12})"] * 4) + r"\s*[\])]?")


def ask_at_terminal(console: Console, *sizes: tuple[int, int]) -> Callable[[PendingCall], Decision]:
    """Return a function that asks a person about a call.

    Args:
        console: Where to ask.
        sizes: Of each image, in pixels.
    """

    def decide(call: PendingCall) -> Decision:
        for line in describe(call, sizes[call.image]):
            console.line(line, "bold", level=console.verbosity)
        while True:
            console.line(_HOW, level=console.verbosity)
            written = sys.stdin.readline()
            if not written:
                raise ConfigError(
                    "Nobody decided on the call: stdin has ended. Run `qzoom ask --approve` at a terminal."
                )
            decision = read_line(written, movable=call.box is not None)
            if decision is not None:
                return decision

    return decide


def describe(call: PendingCall, size: tuple[int, int]) -> list[str]:
    """Return the lines that show a call to a person."""
    label = f' "{printable(call.label)[:120]}"' if call.label else ""
    if call.box is None:
        return [f"call {printable(call.name)} {printable(call.arguments or '')[:400]}"]
    x1, y1, x2, y2 = call.box
    share = (x2 - x1) * (y2 - y1) / (size[0] * size[1])
    head = f"call {printable(call.name)}{label} [{x1:.0f},{y1:.0f},{x2:.0f},{y2:.0f}] of {size[0]}x{size[1]} px"
    cost = f", {share:.1%} of image, +{call.tokens} visual tokens"
    return [head + cost, *(f"     {printable(note)}" for note in call.notes)]


def read_line(written: str, *, movable: bool) -> Decision | None:
    """Return the decision that a person wrote; None for an empty line, and for a box where none can be moved."""
    text = written.strip()
    box = _BOX.fullmatch(text)
    if box:
        try:
            return [float(side) for side in box.groups()] if movable else None
        except ValueError:  # such as 1.2.3
            return None
    if text.lower() in ("y", "yes"):
        return True
    if text.lower() in ("n", "no"):
        return False
    return text or None
