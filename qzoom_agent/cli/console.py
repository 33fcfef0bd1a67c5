"""Messages of the command line: lines on stderr, colours where they are wanted, one progress line.

Results go to stdout (`print`), everything else through a `Console`, so that `qzoom ... > file` holds results only.
There are no colours if stderr is not a terminal, NO_COLOR is set, or TERM is "dumb". Control characters in texts of a
model or a file are escaped (`printable`): an answer must not be able to move the cursor or set the title.
"""

from __future__ import annotations

import math
import os
import shlex
import sys
import unicodedata
from collections.abc import Sequence
from pathlib import Path
from time import monotonic
from typing import TYPE_CHECKING, Final, Literal, TextIO

from qzoom_agent.errors import visible
from qzoom_agent.report.markdown import percent

if TYPE_CHECKING:
    from qzoom_agent.evaluation.sample_result import SampleResult

Style = Literal["", "bold", "dim", "red", "green", "yellow", "cyan"]
_CODES: Final = {"bold": "1", "dim": "2", "red": "31", "green": "32", "yellow": "33", "cyan": "36"}
_BAR_WIDTH: Final = 16


def printable(text: str) -> str:
    """Return `text` on one line, with control characters as escapes such as \\x1b."""
    return visible(text).replace("\n", "\\n").replace("\t", "\\t")


def opening(file: Path) -> str:
    """Return the command line that opens a file with the browser on this system."""
    return shlex.join(["open" if sys.platform == "darwin" else "xdg-open", str(file)])


def table(rows: Sequence[Sequence[str]], *, header: Sequence[str] | None = None) -> list[str]:
    """Return lines with the columns padded to the same width; cells are `printable`."""
    every = [[printable(cell) for cell in row] for row in ([header, *rows] if header else rows)]
    widths = [max(_cells(row[i]) for row in every) for i in range(len(every[0]))] if every else []
    lines = [
        "  ".join(cell + " " * (width - _cells(cell)) for cell, width in zip(row, widths, strict=True)).rstrip()
        for row in every
    ]
    if header:
        lines.insert(1, "  ".join("-" * width for width in widths))
    return lines


def _cells(text: str) -> int:
    """Return how many cells of a terminal a text takes: two for a wide character, none for a mark on another."""
    kinds = ((unicodedata.category(char), unicodedata.east_asian_width(char)) for char in text)
    return sum(0 if category in ("Mn", "Me", "Cf") else 2 if width in "WF" else 1 for category, width in kinds)


def print_table(rows: Sequence[Sequence[str]], *, header: Sequence[str] | None = None) -> None:
    """Print a table to stdout."""
    for line in table(rows, header=header):
        print(line)


class Console:
    """Lines on stderr or `stream`. `verbosity` -1 shows only errors, 0 the usual, 1 everything."""

    def __init__(self, *, verbosity: int = 0, stream: TextIO | None = None) -> None:
        self.stream = sys.stderr if stream is None else stream
        self.verbosity = verbosity
        self.tty = self.stream.isatty()
        self.colour = self.tty and not os.environ.get("NO_COLOR") and os.environ.get("TERM") != "dumb"
        self._drawn = float("-inf")
        self._open = False

    def style(self, text: str, style: Style) -> str:
        """Return `text` in that style, or unchanged where colours are off."""
        return f"\x1b[{_CODES[style]}m{text}\x1b[0m" if style and self.colour else text

    def line(self, text: str = "", style: Style = "", *, level: int = 0) -> None:
        """Print a line, from verbosity `level` on."""
        if self.verbosity >= level:
            self.clear()
            print(self.style(visible(text), style), file=self.stream, flush=True)

    def error(self, text: str) -> None:
        """Print a line at any verbosity."""
        self.line(text, "red", level=self.verbosity)

    def progress(self, done: int, total: int, text: str) -> None:
        """Show the state of long work: redrawn in place on a terminal, about ten lines in all in a log file."""
        if self.verbosity < 0:
            return
        last = done == total
        if not self.tty:
            if last or done % max(1, total // 10) == 0:
                self.line(text)
        elif last or monotonic() - self._drawn > 0.1:
            self._drawn = monotonic()
            # Without wrapping, a terminal cuts what is wider than itself; a second row could not be redrawn.
            print(f"\r\x1b[K\x1b[?7l{text}\x1b[?7h", end="", file=self.stream, flush=True)
            self._open = True

    def clear(self) -> None:
        """Remove a progress line that is still on the screen."""
        if self._open:
            print("\r\x1b[K", end="", file=self.stream, flush=True)
            self._open = False


class Progress:
    """The progress line of a run: accuracy and parse rate by the task's default scorer, gate rate, time left."""

    def __init__(self, console: Console, prefix: str = "") -> None:
        self.console, self.prefix = console, prefix
        self.done = self.planned = 0
        self.begin("", 0)

    def begin(self, task: str, planned: int) -> None:
        self.task, self.total = task, planned
        self.planned += planned
        self.n = self.new = self.failed = self.scored = self.parsed = self.gated = self.fired = 0
        self.sum = self.squares = 0.0
        self.measure = "accuracy"
        self.began = monotonic()

    def row(self, row: SampleResult, *, new: bool) -> None:
        scorer, score = next(iter(row.scores.items()), ("", None))
        value = score.value if score else 0.0
        self.done, self.n, self.new = self.done + 1, self.n + 1, self.new + new
        self.sum, self.squares = self.sum + value, self.squares + value * value
        self.scored += score is not None
        if scorer == "replied":  # there are no answers to be right about
            self.measure = scorer
        self.parsed += bool(score and score.parsed)
        if row.fired is not None:
            self.gated, self.fired = self.gated + 1, self.fired + row.fired
        if row.status == "error":
            self.failed += 1
            self.console.error(f"{_name(row)}: {printable(row.error or 'failed')}")
        self.console.progress(self.n, self.total, self.text())

    def interrupted(self, folder: Path) -> KeyboardInterrupt:
        """Return the interruption of a run whose answers so far are in a folder."""
        self.console.clear()
        return KeyboardInterrupt(
            f"Interrupted after {self.done} of {self.planned} questions. Finished ones are in {folder}; the same "
            "command goes on."
        )

    def text(self) -> str:
        mean = self.sum / self.n
        spread = math.sqrt(max(0.0, self.squares / self.n - mean * mean) / max(1, self.n - 1))
        seconds = monotonic() - self.began
        parts = [
            f"{self.prefix}{self.task} {self._bar()}{self.n}/{self.total}",
            f"{self.measure} {mean:.3f} \u00b1 {spread:.3f}" if self.scored else "",
            f"gate {percent(self.fired / self.gated)}" if self.gated else "",
            f"parsed {percent(self.parsed / self.n)}" if self.scored else "",
            f"{self.new / seconds:.1f}/s" if self.new and seconds > 0 else "",
            f"{_clock(seconds / self.new * (self.total - self.n))} left" if self.new and self.n < self.total else "",
            self.console.style(f"{self.failed} failed", "red") if self.failed else "",
        ]
        return "  ".join(part for part in parts if part)

    def _bar(self) -> str:
        if not self.console.tty:
            return ""
        filled = _BAR_WIDTH * self.n // max(1, self.total)
        return "\u2588" * filled + "\u2591" * (_BAR_WIDTH - filled) + " "


def _name(row: SampleResult) -> str:
    """Return the id of a question, or its task and the number of its row from 1 where it has no id of its own."""
    unnamed = row.id in (f"{row.task}-{row.index}", f"{row.task}[{row.index}]")
    return f"{row.task}, row {row.index + 1}" if unnamed else row.id


def _clock(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"
