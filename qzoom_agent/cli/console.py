"""Output of the command line for people: lines on stderr, colours only where they are wanted, one progress line.

Results go to stdout (`print`), everything else through a `Console`, so that `qzoom ... > file` holds results only.
No colour when stderr is not a terminal, when NO_COLOR is set, or when TERM is "dumb". Text from a model or a file is
stripped of control characters before it is shown: an answer must not be able to move the cursor or set the title.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Sequence
from typing import Final, Literal, TextIO

Style = Literal["", "bold", "dim", "red", "green", "yellow", "cyan"]
_CODES: Final = {"bold": "1", "dim": "2", "red": "31", "green": "32", "yellow": "33", "cyan": "36"}


def printable(text: str) -> str:
    """`text` on one line, every control character as an escape such as \\x1b."""
    return "".join(char if char.isprintable() else repr(char)[1:-1] for char in text)


def opener() -> str:
    """The command that opens a file with the browser on this system."""
    return "open" if sys.platform == "darwin" else "xdg-open"


def table(rows: Sequence[Sequence[str]], *, header: Sequence[str] | None = None) -> list[str]:
    """Lines with the columns padded to the same width."""
    every = [header, *rows] if header else list(rows)
    widths = [max(len(row[i]) for row in every) for i in range(len(every[0]))] if every else []
    lines = ["  ".join(f"{cell:<{width}}" for cell, width in zip(row, widths, strict=True)).rstrip() for row in every]
    if header:
        lines.insert(1, "  ".join("-" * width for width in widths))
    return lines


class Console:
    """Writes for people. `verbosity` -1 shows nothing but errors, 0 the usual, 1 everything."""

    def __init__(self, *, verbosity: int = 0, stream: TextIO | None = None) -> None:
        self.stream = sys.stderr if stream is None else stream
        self.verbosity = verbosity
        self.tty = self.stream.isatty()
        self.colour = self.tty and not os.environ.get("NO_COLOR") and os.environ.get("TERM") != "dumb"
        self._drawn = float("-inf")
        self._open = False

    def style(self, text: str, style: Style) -> str:
        """`text` in that style, or as it is where colours are off."""
        return f"\x1b[{_CODES[style]}m{text}\x1b[0m" if style and self.colour else text

    def line(self, text: str = "", style: Style = "", *, level: int = 0) -> None:
        """One line, shown from verbosity `level` on."""
        if self.verbosity >= level:
            self.clear()
            print(self.style(text, style), file=self.stream, flush=True)

    def error(self, text: str) -> None:
        """A line that is always shown."""
        self.line(text, "red", level=self.verbosity)

    def progress(self, done: int, total: int, text: str) -> None:
        """The state of long work: redrawn in place on a terminal, about ten lines in all in a log file."""
        if self.verbosity < 0:
            return
        last = done == total
        if not self.tty:
            if last or done % max(1, total // 10) == 0:
                self.line(text)
        elif last or time.monotonic() - self._drawn > 0.1:
            self._drawn = time.monotonic()
            print(f"\r\x1b[K{text}", end="", file=self.stream, flush=True)
            self._open = True

    def clear(self) -> None:
        """Remove a progress line that is still on the screen."""
        if self._open:
            print("\r\x1b[K", end="", file=self.stream, flush=True)
            self._open = False
