"""The figures of a run: accuracy by every scorer with its interval, by kind, and what it cost.

Samples that were asked several times count once, with the mean over their repeats; the standard error and the interval
are then over samples. A scorer's figures never mix with another's: `faithful` repeats a published rule with its faults,
`clean` is ours.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Sequence
from itertools import combinations
from statistics import fmean

import numpy as np
from pydantic import AliasChoices, Field
from typing_extensions import deprecated

from qzoom_agent.config import AgentConfig
from qzoom_agent.errors import ConfigError
from qzoom_agent.evaluation.run_log import RunFolder, RunSpec, TaskSelection
from qzoom_agent.evaluation.sample_result import SampleResult
from qzoom_agent.evaluation.stats import Figure, Figures, Interval, figure
from qzoom_agent.evaluation.tasks.task import PublicRule, Scored, Task, public_rule
from qzoom_agent.extensions import reference
from qzoom_agent.files import read_json


class Spread(Figures):
    """Seconds of one phase over the samples."""

    mean: float
    p50: float
    p95: float


class Cost(Figures):
    """The cost of the answers, a sample; samples that failed are left out."""

    visual_tokens: Figure
    coarse_tokens: float
    crop_tokens: float
    tool_tokens: float = 0.0
    """Of images that own tools returned; 0 in results of older releases."""
    written_tokens: float
    turns: float
    token_layers: Figure
    """Prefill work: tokens times decoder layers."""
    seconds: Figure
    """In the model, the policy and the tool."""
    phases: dict[str, Spread]
    """Seconds of perceive, think, act and of all three together."""
    samples_per_second: float | None
    """Throughput of one process, everything around the model included; None where no time was recorded."""
    peak_memory: dict[str, int]
    """Bytes: "host", and "device" where there is an accelerator: the most of any process that asked."""


class Perception(Figures):
    """The crops and gate decisions of a run."""

    gate_rate: float | None
    """Share of the samples with a gate in which it asked for more detail; None without a gate."""
    zoom_rate: float
    """Share of the samples in which a crop was shown."""
    zooms: float
    """Crops shown, a sample."""
    inserted: int
    """Crops that the policy showed unasked, in all."""
    calls: int
    """Attempts to call the zoom tool, in all, the unreadable ones counted."""
    served: int
    refused: int
    failed: int
    """Calls that could not be read or run."""
    needless_zooms: float | None
    """Share of the samples answerable from the coarse view that were zoomed all the same; None if there are none."""
    redundant: float | None
    """Crops a sample that added nothing (`redundancy`), over samples of which that is known; None if it never
    is."""
    recall: Figure | None
    """Share of the needle inside the best crop, 0 where nothing was cropped; None where no needle is known."""
    iou: Figure | None
    """Intersection over union of needle and best crop; None where no needle is known."""


class Repeats(Figures):
    """Figures of a run that asked every sample k times."""

    k: int
    average: Figure
    """avg@k: the mean over samples of the mean over repeats."""
    passed: Figure
    """pass@k: share of the samples with their best answer among the k (for right/wrong: any right one)."""
    consistency: Figure
    """Share of the pairs of repeats that gave the same final answer."""


class ScorerResult(Figures):
    """The run by one scorer."""

    accuracy: Figure
    parse_rate: float
    """Share of the replies in which a final answer was found; the others, also failed ones, count as wrong."""
    sentences: int = 0
    """Replies to open questions that are prose rather than a short answer, which a rule cannot compare."""
    kinds: dict[str, Figure]
    published: dict[str, float] = Field(default={})
    """The task's own figures, where they are more than the mean."""
    repeats: Repeats | None = None
    """None where every sample was asked once."""
    source: str | None = None
    """Module and name of the function, as `module:name`; None where the run was summarised without its task."""
    version: str = ""
    """Version of the rule that every row was scored by; empty where the rows do not say."""
    public_rule: PublicRule | None = None
    """The public code whose rule it is; None for a rule of its own, and where the task is not known."""


class TaskResult(Figures):
    """One task of a run."""

    task: str = Field(validation_alias=AliasChoices("task", "suite"))
    n: int
    """Samples, each counted once however often it was asked."""
    accuracy: float
    """By `scorer`."""
    se: float | None
    interval: Interval | None
    """95 %: Wilson's for independent right/wrong answers, else Korn and Graubard's."""
    scorer: str
    scores: dict[str, ScorerResult]
    """By every scorer, the task's default first."""
    part: TaskSelection
    """The planned samples."""
    partial: bool
    """Not the whole task: a limit, or an interruption."""
    failed: int
    """Samples that ended in an error; they count as wrong."""
    statuses: dict[str, int]
    """Number of episodes by the status that they ended with."""
    cost: Cost
    perception: Perception

    @property
    def marks(self) -> ScorerResult:
        """By the scorer that the accuracy is by."""
        return self.scores[self.scorer]


class Results(Figures):
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
        """Return the results that a run has written; ConfigError if there are none yet."""
        return read_json(folder.path / "results.json", cls, "Finish the run, or `qzoom eval rescore` it.")


def summarise(folder: RunFolder, tasks: Iterable[Task] = (), *, scorer: str | None = None) -> Results:
    """Return the figures of everything in the folder, finished or not.

    `tasks` adds their published figures; `scorer` is whose accuracy leads, where a task has it. ConfigError if
    nothing is there, or no task has that scorer.
    """
    ask = folder.ask
    known = {task.name: task for task in tasks}
    rows = folder.by_task()
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
        tasks={name: _task_result(each, ask, known.get(name), scorer) for name, each in rows.items()},
    )


def _task_result(rows: Sequence[SampleResult], ask: RunSpec, task: Task | None, scorer: str | None) -> TaskResult:
    """Return the figures of one task's rows, at least one."""
    part = ask.tasks[rows[0].task]
    # A scorer that some rows lack was not yet, or is no longer, one of the task's.
    names = [name for name in rows[0].scores if all(name in row.scores for row in rows)]
    if not names:
        raise ConfigError(
            f"{rows[0].task}: no scorer has scored all answers, as after a run that was killed when its scorers had "
            "changed. Give its command again, or `qzoom eval rescore` it."
        )
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
        partial=part.partial or len(rows) < part.planned * ask.repeats,
        failed=sum(row.status == "error" for row in rows),
        statuses=dict(sorted(Counter(row.status for row in rows).items())),
        cost=cost(rows),
        perception=perception(rows),
    )


def one_version(rows: Sequence[SampleResult], scorer: str, *, folders: str = "DIR") -> str:
    """Return the version of the rule that all rows were scored by; raise ConfigError if there are several."""
    versions = sorted({row.rules.get(scorer, "") for row in rows})
    if len(versions) > 1:
        named = " and ".join(version or "an older one that was not noted" for version in versions)
        raise ConfigError(
            f"{rows[0].task}: answers were scored by different versions of {scorer!r}: {named}. Their figures do not "
            f"compare. Score them again with `qzoom eval rescore {folders}`, which asks the model nothing."
        )
    return versions[0]


def by_sample(rows: Iterable[SampleResult]) -> dict[str, list[SampleResult]]:
    """Return the repeats of each sample, by its id; raise ConfigError if two samples have one id."""
    found: dict[str, list[SampleResult]] = defaultdict(list)
    for row in rows:
        found[row.id].append(row)
        if row.index != (first := found[row.id][0]).index:
            raise ConfigError(
                f"{row.task}: the questions {first.index} and {row.index}, counted from 0, have the same id, "
                f"{row.id!r:.80}. Give each question an id of its own, and ask them in another folder."
            )
    return found


def _marks(rows: Sequence[SampleResult], scorer: str, task: Task | None) -> ScorerResult:
    """Return the figures of rows that this scorer has all scored."""
    samples = list(by_sample(rows).values())
    parsed = [row.scores[scorer].parsed for row in rows]
    rule = task.scorers.get(scorer) if task else None
    kinds: dict[str, list[list[SampleResult]]] = defaultdict(list)
    for each in samples:
        kinds[each[0].kind].append(each)
    return ScorerResult(
        accuracy=_figure(samples, scorer),
        parse_rate=fmean(parsed),
        sentences=sum(
            bool(row.answer) and not row.options and not read for row, read in zip(rows, parsed, strict=True)
        ),
        kinds={kind: _figure(kinds[kind], scorer) for kind in sorted(kinds)},
        published=_published(rows, scorer, task),
        repeats=_repeats(samples, scorer),
        source=reference(rule) if rule else None,
        version=one_version(rows, scorer),
        public_rule=public_rule(rule) if rule else None,
    )


def _published(rows: Sequence[SampleResult], scorer: str, task: Task | None) -> dict[str, float]:
    """Return the task's own figures, of several repeats their mean."""
    repeats: dict[int, list[Scored]] = defaultdict(list)
    for row in rows:
        if row.question:  # else nothing is known of the sample but that it could not be read
            repeats[row.repeat].append(Scored(row.kind, row.value(scorer), row.meta))
    found = [task.aggregate(scored) for scored in repeats.values()] if task and task.aggregate else []
    names = dict.fromkeys(name for figures in found for name in figures)
    return {name: fmean(figures[name] for figures in found if name in figures) for name in names}


def _figure(samples: Sequence[Sequence[SampleResult]], scorer: str) -> Figure:
    return _over(samples, [fmean(row.value(scorer) for row in each) for each in samples])


def _over(samples: Sequence[Sequence[SampleResult]], values: Sequence[float]) -> Figure:
    return figure(values, clusters=[each[0].cluster for each in samples], share=True)


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
    said = [row.scores[scorer].extracted for row in repeats]
    pairs = list(combinations(said, 2))
    # No answer agrees with nothing: a sample that fails each time is not consistent.
    return fmean(a is not None and a == b for a, b in pairs) if pairs else 1.0


def cost(rows: Sequence[SampleResult]) -> Cost:
    """Return the cost of at least one row."""
    throughput = len(rows) / elapsed if (elapsed := sum(row.elapsed for row in rows)) > 0 else None
    rows = measured(rows)
    return Cost(
        visual_tokens=_mean(rows, lambda row: row.visual_tokens),
        coarse_tokens=fmean(row.usage.coarse_tokens for row in rows),
        crop_tokens=fmean(row.usage.crop_tokens for row in rows),
        tool_tokens=fmean(row.usage.tool_tokens for row in rows),
        written_tokens=fmean(row.usage.written_tokens for row in rows),
        turns=fmean(row.turns for row in rows),
        token_layers=_mean(rows, lambda row: row.token_layers),
        seconds=_mean(rows, lambda row: row.usage.seconds.total),
        phases={name: _spread([getattr(row.usage.seconds, name) for row in rows]) for name in _PHASES},
        samples_per_second=throughput,
        peak_memory={
            name: max(row.peak_memory.get(name, 0) for row in rows)
            for name in sorted({name for row in rows for name in row.peak_memory})
        },
    )


def measured(rows: Sequence[SampleResult]) -> Sequence[SampleResult]:
    """Return the rows whose cost counts: one that failed is cheap because it was broken off. All, where all failed."""
    return [row for row in rows if row.status != "error"] or rows


_PHASES = ("perceive", "think", "act", "total")


def perception(rows: Sequence[SampleResult]) -> Perception:
    """Return the crops and gate decisions of at least one row."""
    gated = [row.fired for row in rows if row.fired is not None]
    easy = [row for row in rows if row.coarse_suffices]
    known = [row.redundancy for row in rows if row.redundancy is not None]
    return Perception(
        gate_rate=fmean(gated) if gated else None,
        zoom_rate=fmean(row.zooms > 0 for row in rows),
        zooms=fmean(row.zooms for row in rows),
        inserted=sum(row.usage.inserted for row in rows),
        calls=sum(row.calls for row in rows),
        served=sum(row.usage.served for row in rows),
        refused=sum(row.usage.refused for row in rows),
        failed=sum(row.failed_calls for row in rows),
        needless_zooms=fmean(row.zooms > 0 for row in easy) if easy else None,
        redundant=fmean(one.redundant for one in known) if known else None,
        recall=_known(rows, lambda row: row.recall),
        iou=_known(rows, lambda row: row.iou),
    )


def _mean(rows: Sequence[SampleResult], value: Callable[[SampleResult], float]) -> Figure:
    return figure([value(row) for row in rows], clusters=[row.cluster for row in rows], share=False)


def _known(rows: Sequence[SampleResult], value: Callable[[SampleResult], float | None]) -> Figure | None:
    known = [(found, row.cluster) for row in rows if (found := value(row)) is not None]
    return figure([one for one, _ in known], clusters=[cluster for _, cluster in known], share=True) if known else None


def _spread(values: Sequence[float]) -> Spread:
    low, high = np.quantile(values, [0.5, 0.95])
    return Spread(mean=fmean(values), p50=float(low), p95=float(high))
