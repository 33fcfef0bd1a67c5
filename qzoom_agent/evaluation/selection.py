"""Which samples of a task are asked, and how often.

The order of a stratified subset does not depend on its size: the first 50 of `--limit 100` are those of `--limit 50`,
so a run can be enlarged. Every subset has each kind in its share of the task, to within one sample.
"""

from __future__ import annotations

import hashlib
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from itertools import product

from pydantic import BaseModel, ConfigDict

from qzoom_agent.data.samples import Samples, TaskSource
from qzoom_agent.errors import ConfigError
from qzoom_agent.evaluation.tasks.task import Task


class TaskSelection(BaseModel):
    """What of one task a run asks."""

    model_config = ConfigDict(use_attribute_docstrings=True)

    path: str | None = None
    """Where it was read from, where that is not its own source."""
    split: str | None = None
    fonts: str | None = None
    total: int
    """Samples that the task has."""
    planned: int
    """Samples that are asked; fewer than `total` is a partial run."""
    stratified: bool = False
    """Whether the planned ones are a seeded subset with each kind in its share, rather than the first."""
    coarse_tokens: tuple[int, int] | None = None
    """(least, most) visual tokens of the coarse view, where the task sets them."""

    @property
    def partial(self) -> bool:
        return self.planned < self.total


def require(source: TaskSource, *, limit: int | None = None, repeats: int = 1, workers: int = 1) -> None:
    """ConfigError for numbers that no run can have, before anything is loaded."""
    for name, given in (("n", source.n), ("limit", limit), ("repeats", repeats), ("workers", workers)):
        if given is not None and given < 1:
            raise ConfigError(f"A run needs at least 1 of these; got {name} = {given}.")
    if source.seed < 0:
        raise ConfigError(f"A seed is 0 or more; got {source.seed}.")


def require_scorer(name: str | None, tasks: Sequence[Task]) -> None:
    """ConfigError if no task has a scorer of this name; None is each task's own."""
    known = sorted({scorer for task in tasks for scorer in task.scorers})
    if name is not None and name not in known:
        raise ConfigError(f"There is no scorer {name!r} in these tasks. There are: {', '.join(known)}.")


def plan(
    samples: Samples, source: TaskSource, *, limit: int | None, seed: int, coarse_tokens: tuple[int, int] | None
) -> tuple[TaskSelection, list[int]]:
    """What is asked of these samples, and their places in order.

    `source.n` is how many a task draws, or the first so many of one that has more; `limit` a stratified subset of it.
    """
    total = len(samples)
    if total == 0:
        raise ConfigError("The task has no samples. Check its --path and --split.")
    chosen = list(range(total if source.n is None else min(total, source.n)))
    stratified = limit is not None and limit < len(chosen)
    if stratified:
        kinds = samples.kinds
        chosen = sorted(stratified_order([kinds[index] for index in chosen], seed=seed)[:limit])
    part = TaskSelection(
        path=source.path,
        split=source.split,
        fonts=str(source.fonts) if source.fonts else None,
        total=total,
        planned=len(chosen),
        stratified=stratified,
        coarse_tokens=coarse_tokens,
    )
    return part, chosen


def stratified_order(kinds: Sequence[str], *, seed: int) -> list[int]:
    """All places, so ordered that every beginning has each kind in its share; which come first is drawn by `seed`."""
    groups: Mapping[str, list[int]] = defaultdict(list)
    for index, kind in enumerate(kinds):
        groups[kind].append(index)
    ranked = []
    for kind, group in groups.items():
        group.sort(key=lambda index: _draw(seed, index))
        ranked += [((place + 0.5) / len(group), kind, index) for place, index in enumerate(group)]
    return [index for _, _, index in sorted(ranked)]


def _draw(seed: int, index: int) -> bytes:
    return hashlib.sha256(f"{seed}/{index}".encode()).digest()


def share(chosen: Sequence[int], repeats: int, *, rank: int, ranks: int) -> Iterator[tuple[int, int]]:
    """(place, repeat) pairs that process `rank` of `ranks` asks, every repeat of one sample by the same process."""
    yield from product(chosen[rank::ranks], range(repeats))
