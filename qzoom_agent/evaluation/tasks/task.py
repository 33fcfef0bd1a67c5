"""What a task is: samples to answer, rules to score them by, and the budget they are to be answered at.

Seam between the tasks (one module or folder each under `evals/tasks`) and the runner, which knows nothing of any
particular benchmark. A task is data: it names its scorers and, where the published figure is not the plain mean, the
function that aggregates; everything that all tasks share (journals, statistics, reports) lives outside.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from pydantic import JsonValue

from qzoom_agent.data.samples import Sample, Samples, TaskSource


class Score(NamedTuple):
    """What an answer is worth."""

    value: float
    """0 to 1."""
    extracted: str | None
    """What was taken for the final answer; None where none was found."""

    @property
    def parsed(self) -> bool:
        return self.extracted is not None


Scorer = Callable[[str | None, Sample], Score]
"""A pure function of the answer's text and the sample; None (no answer came) is worth 0."""


class Scored(NamedTuple):
    """What an aggregate gets of each sample."""

    kind: str
    value: float
    meta: Mapping[str, JsonValue]


@dataclass(frozen=True)
class Task:
    """A benchmark."""

    name: str
    title: str
    """One line for `qzoom eval list`."""
    load: Callable[[TaskSource], Samples]
    scorers: Mapping[str, Scorer]
    """By name, the default first: `faithful` is the public implementation's rule, `clean` ours where that is wrong."""
    aggregate: Callable[[Sequence[Scored]], Mapping[str, float]] | None = None
    """The task's own published figures, where they are more than the mean and the mean by kind."""
    coarse_tokens: tuple[int, int] | None = None
    """(least, most) visual tokens of the coarse view that the task is usually run at; None: the model's own."""
    sources: tuple[str, ...] = ()
    """Hub ids, the preferred one first."""
    columns: tuple[str, ...] = ()
    """Columns that `load` needs."""
