"""The figures of a run: accuracy by every scorer with its interval, by kind, and what it cost.

Samples that were asked several times count once, with the mean over their repeats; the standard error and the interval
are then over samples. A scorer's figures never mix with another's: `faithful` repeats a published rule with its faults,
`clean` is ours.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from itertools import combinations
from statistics import fmean

from pydantic import AliasChoices, BaseModel, ConfigDict, Field
from typing_extensions import deprecated

from qzoom_agent.config import AgentConfig
from qzoom_agent.errors import ConfigError
from qzoom_agent.evaluation.cost import Cost, Perception, cost, perception
from qzoom_agent.evaluation.run_log import RunFolder
from qzoom_agent.evaluation.sample_result import SampleResult
from qzoom_agent.evaluation.selection import TaskSelection
from qzoom_agent.evaluation.stats import Figure, Interval, figure
from qzoom_agent.evaluation.tasks.task import Scored, Task


class _Figures(BaseModel):
    model_config = ConfigDict(use_attribute_docstrings=True)


class Repeats(_Figures):
    """What asking every sample k times shows."""

    k: int
    average: Figure
    """avg@k: the mean over samples of the mean over repeats."""
    passed: Figure
    """pass@k: share of the samples with their best answer among the k (for right/wrong: any right one)."""
    consistency: Figure
    """Share of the pairs of repeats that gave the same final answer."""


class ScorerResult(_Figures):
    """The run by one scorer."""

    accuracy: Figure
    parse_rate: float
    """Share of the answers in which a final answer was found; the others count as wrong."""
    kinds: dict[str, Figure]
    published: dict[str, float] = {}
    """The task's own figures, where they are more than the mean."""
    repeats: Repeats | None = None
    """None where every sample was asked once."""


class TaskResult(_Figures):
    """One task of a run."""

    task: str = Field(validation_alias=AliasChoices("task", "suite"))
    n: int
    """Samples, each counted once however often it was asked."""
    accuracy: float
    """By `scorer`."""
    se: float | None
    interval: Interval | None
    """95 %: Wilson's for independent right/wrong answers, else bootstrap; clusters resampled whole."""
    scorer: str
    scores: dict[str, ScorerResult]
    """By every scorer, the task's default first."""
    part: TaskSelection
    """What was planned."""
    partial: bool
    """Not the whole task: a limit, or an interruption."""
    failed: int
    """Samples that ended in an error; they count as wrong."""
    statuses: dict[str, int]
    """How the episodes ended."""
    cost: Cost
    perception: Perception

    @property
    def marks(self) -> ScorerResult:
        """By the scorer that the accuracy is by."""
        return self.scores[self.scorer]


class Results(_Figures):
    """A run (`results.json`)."""

    version: str = "1.0"
    seed: int
    weights: str | None
    config: AgentConfig
    environments: list[dict[str, str]]
    tasks: dict[str, TaskResult] = Field(validation_alias=AliasChoices("tasks", "suites"))

    @property
    @deprecated("Results.suites is called Results.tasks")
    def suites(self) -> dict[str, TaskResult]:
        """Deprecated name of `tasks`."""
        return self.tasks

    @classmethod
    def of(cls, folder: RunFolder) -> Results:
        """The results that a run has written; ConfigError if there are none yet."""
        path = folder.path / "results.json"
        try:
            return cls.model_validate_json(path.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise ConfigError(f"{path} cannot be read: {error}. Finish the run, or `qzoom eval rescore` it.") from None


def summarise(folder: RunFolder, tasks: Iterable[Task] = (), *, scorer: str | None = None) -> Results:
    """The figures of everything in the folder, finished or not.

    `tasks` adds their published figures; `scorer` is whose accuracy leads, where a task has it. ConfigError if
    nothing is there, or no task has that scorer.
    """
    ask = folder.ask
    known = {task.name: task for task in tasks}
    rows: dict[str, list[SampleResult]] = defaultdict(list)
    for row in folder.latest():
        rows[row.task].append(row)
    if not rows:
        raise ConfigError(f"There is nothing to summarise in {folder.path}: no sample was finished.")
    if scorer is not None and not any(scorer in row.scores for each in rows.values() for row in each[:1]):
        names = sorted({name for each in rows.values() for name in each[0].scores})
        raise ConfigError(f"There is no scorer {scorer!r} in {folder.path}. There are: {', '.join(names)}.")
    return Results(
        seed=ask.seed,
        weights=ask.weights,
        config=folder.config,
        environments=folder.environments(),
        tasks={
            name: task_result(rows[name], ask.tasks[name], task=known.get(name), scorer=scorer, repeats=ask.repeats)
            for name in ask.tasks
            if name in rows
        },
    )


def task_result(
    rows: Sequence[SampleResult],
    part: TaskSelection,
    *,
    task: Task | None = None,
    scorer: str | None = None,
    repeats: int = 1,
) -> TaskResult:
    """The figures of one task's rows, at least one."""
    names = list(rows[0].scores)
    chosen = scorer if scorer in names else names[0]
    scores = {name: _marks(rows, name, task) for name in names}
    leading = scores[chosen].accuracy
    return TaskResult(
        task=rows[0].task,
        n=leading.n,
        accuracy=leading.mean,
        se=leading.se,
        interval=leading.interval,
        scorer=chosen,
        scores=scores,
        part=part,
        partial=part.partial or len(rows) < part.planned * repeats,
        failed=sum(row.status == "error" for row in rows),
        statuses=dict(sorted(Counter(row.status for row in rows).items())),
        cost=cost(rows),
        perception=perception(rows),
    )


def by_sample(rows: Iterable[SampleResult]) -> dict[str, list[SampleResult]]:
    """The repeats of each sample, by its id."""
    found: dict[str, list[SampleResult]] = defaultdict(list)
    for row in rows:
        found[row.id].append(row)
    return found


def _marks(rows: Sequence[SampleResult], scorer: str, task: Task | None) -> ScorerResult:
    samples = list(by_sample(rows).values())
    aggregate = task.aggregate if task else None
    # A sample that could not even be read has no image, and nothing of what a task's own figures go by.
    scored = [Scored(row.kind, row.value(scorer), row.meta) for row in rows if row.image]
    parsed = [scorer in row.scores and row.scores[scorer].parsed for row in rows]
    return ScorerResult(
        accuracy=_figure(samples, scorer),
        parse_rate=fmean(parsed),
        kinds={
            kind: _figure([each for each in samples if each[0].kind == kind], scorer)
            for kind in sorted({row.kind for row in rows})
        },
        published=dict(aggregate(scored)) if aggregate and scored else {},
        repeats=_repeats(samples, scorer),
    )


def _figure(samples: Sequence[Sequence[SampleResult]], scorer: str) -> Figure:
    return _over(samples, [fmean(row.value(scorer) for row in each) for each in samples])


def _over(samples: Sequence[Sequence[SampleResult]], values: Sequence[float]) -> Figure:
    found = figure(values, clusters=[each[0].cluster for each in samples])
    assert found is not None
    return found


def _repeats(samples: Sequence[Sequence[SampleResult]], scorer: str) -> Repeats | None:
    k = max(len(each) for each in samples)
    if k == 1:
        return None
    return Repeats(
        k=k,
        average=_figure(samples, scorer),
        passed=_over(samples, [max(row.value(scorer) for row in each) for each in samples]),
        consistency=_over(samples, [_agreement(each, scorer) for each in samples]),
    )


def _agreement(repeats: Sequence[SampleResult], scorer: str) -> float:
    said = [row.scores[scorer].extracted if scorer in row.scores else None for row in repeats]
    pairs = list(combinations(said, 2))
    # No answer agrees with nothing: a sample that fails each time is not consistent.
    return fmean(a is not None and a == b for a, b in pairs) if pairs else 1.0
