"""Progress of an evaluation: one line with running accuracy and its standard error, gate and parse rate, time left."""

from __future__ import annotations

import math
from time import monotonic
from typing import TYPE_CHECKING

from qzoom_agent.cli.console import Console, printable

if TYPE_CHECKING:
    from qzoom_agent.evaluation.sample_result import SampleResult

_BAR = 16


class Progress:
    """A `ProgressListener` that draws the line of the task under way. Accuracy is by the task's default scorer."""

    def __init__(self, console: Console, prefix: str = "") -> None:
        self.console, self.prefix = console, prefix
        self.done = self.planned = 0
        self.begin("", 0)

    def begin(self, task: str, planned: int) -> None:
        self.task, self.total = task, planned
        self.planned += planned
        self.n = self.new = self.failed = self.parsed = self.gated = self.fired = 0
        self.sum = self.squares = 0.0
        self.began = monotonic()

    def row(self, row: SampleResult, *, new: bool) -> None:
        score = next(iter(row.scores.values()), None)
        value = score.value if score else 0.0
        self.done, self.n, self.new = self.done + 1, self.n + 1, self.new + new
        self.sum, self.squares = self.sum + value, self.squares + value * value
        self.parsed += bool(score and score.parsed)
        if row.fired is not None:
            self.gated, self.fired = self.gated + 1, self.fired + row.fired
        if row.status == "error":
            self.failed += 1
            self.console.error(f"{row.id}: {printable(row.error or 'failed')}")
        self.console.progress(self.n, self.total, self.text())

    def text(self) -> str:
        """The line."""
        mean = self.sum / self.n
        spread = math.sqrt(max(0.0, self.squares / self.n - mean * mean) / max(1, self.n - 1))
        seconds = monotonic() - self.began
        parts = [
            f"{self.prefix}{self.task} {self._bar()}{self.n}/{self.total}",
            f"accuracy {mean:.3f} \u00b1 {spread:.3f}",
            f"gate {self.fired / self.gated:.0%}" if self.gated else "",
            f"parsed {self.parsed / self.n:.0%}",
            f"{self.new / seconds:.1f}/s" if self.new and seconds > 0 else "",
            f"{_clock(seconds / self.new * (self.total - self.n))} left" if self.new and self.n < self.total else "",
            self.console.style(f"{self.failed} failed", "red") if self.failed else "",
        ]
        return "  ".join(part for part in parts if part)

    def _bar(self) -> str:
        if not self.console.tty:
            return ""
        filled = _BAR * self.n // max(1, self.total)
        return "\u2588" * filled + "\u2591" * (_BAR - filled) + " "


def _clock(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"
