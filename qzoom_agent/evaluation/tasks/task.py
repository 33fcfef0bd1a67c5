"""The interface of tasks: samples to answer, rules to score them by, and the budget they are to be answered at.

The runner knows nothing of any particular benchmark. A task names its scorers and, where the published figure is not
the plain mean, the function that aggregates; resuming, statistics and reports are the same for all.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from pydantic import JsonValue

from qzoom_agent.data.samples import Sample, Samples, TaskSource
from qzoom_agent.errors import ConfigError
from qzoom_agent.extensions import calling, reference


class Score(NamedTuple):
    """The worth of an answer."""

    value: float
    """0 to 1."""
    extracted: str | None
    """The text that was taken for the final answer; None where none was found."""

    @property
    def parsed(self) -> bool:
        return self.extracted is not None


Scorer = Callable[[str | None, Sample], Score]
"""A pure function of the answer's text and the sample; None (no answer came) is worth 0."""
CustomScorer = Callable[[str, Sample], Score | float | bool]
"""A scorer from outside this package; it is called only if an answer came."""


class Scored(NamedTuple):
    """One scored sample, as aggregates take it."""

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
    scorers: Mapping[str, Scorer | CustomScorer]
    """By name, the default first: `faithful` is the public implementation's rule, `clean` ours where that is wrong."""
    aggregate: Callable[[Sequence[Scored]], Mapping[str, float]] | None = None
    """Function that returns the task's published figures, where they are more than the mean and the mean by kind."""
    coarse_tokens: tuple[int, int] | None = None
    """(least, most) visual tokens of the coarse view that the task is usually run at; None: the model's own."""
    sources: tuple[str, ...] = ()
    """Hub ids, the preferred one first."""
    columns: tuple[str, ...] = ()
    """Columns that `load` needs."""
    reference: str = ""
    """Name by which `find_task` finds a task from outside this package: `module:function` or an entry point."""


def apply(scorer: Scorer | CustomScorer, answer: str | None, sample: Sample) -> Score:
    """Return the worth of an answer by a scorer of this package or another; 0 if none came.

    Raises:
        ConfigError: The scorer failed, or returned neither a `Score` nor a number from 0 to 1.
    """
    if answer is None:
        return Score(0.0, None)
    with calling(reference(scorer), kind="scorer"):
        found = scorer(answer, sample)
    try:
        value = float("nan") if isinstance(found, str) else float(found.value if isinstance(found, Score) else found)
    except (TypeError, ValueError):
        value = float("nan")
    if not 0 <= value <= 1:
        raise ConfigError(
            f"The scorer {reference(scorer)} returned {found!r} for {answer[:60]!r}. Return a Score, a bool, or a "
            "number from 0 to 1."
        )
    return found if isinstance(found, Score) else Score(value, answer)
