"""Two runs over the same samples, compared in pairs: accuracy, cost, what flipped, and what zooming did.

Samples are paired by task and id, and only if both runs showed the same image, asked the same question and were scored
against the same answers: two runs that asked different things are not compared. Where both runs asked a sample several
times, the means are paired.

What zooming did shows in the pairs of which one run was shown a crop and the other was not:

    helped     right with the crop, wrong without          tool gain is its share of all pairs of samples
    harmed     wrong with the crop, right without          tool harm is its share
    needless   right either way: the crop only cost
    in vain    wrong either way

Gate regret of a run is the share of all pairs in which it decided wrongly whether to zoom: it zoomed though the other
was right without, or did not, was wrong, and the other was right with a crop. Against `direct` the first half shows,
against `always` the second.
"""

from collections.abc import Callable, Mapping, Sequence
from statistics import fmean
from typing import Literal, NamedTuple

from qzoom_agent.errors import ConfigError
from qzoom_agent.evaluation.run_log import RunFolder
from qzoom_agent.evaluation.sample_result import SampleResult
from qzoom_agent.evaluation.stats import Figures, Paired, paired
from qzoom_agent.evaluation.summary import Results, by_sample, one_version

RIGHT = 0.5
"""An answer worth at least this is right, where right and wrong are counted."""


class Zooming(Figures):
    """Outcomes of zooming, in pairs of which one was shown a crop. See the module's note."""

    pairs: int
    helped: int
    harmed: int
    needless: int
    in_vain: int
    tool_gain: float
    tool_harm: float
    regret_before: float
    """Gate regret of the first run."""
    regret_after: float
    """Gate regret of the second run."""


class Flip(Figures):
    """A sample that one run got right and the other wrong."""

    task: str
    id: str
    kind: str
    question: str
    gold: str
    became: Literal["right", "wrong"]
    before: str | None
    after: str | None
    trace_before: str | None
    """File of the first run's trace; None if it was not kept."""
    trace_after: str | None


class TaskComparison(Figures):
    """One task of two runs: the second minus the first."""

    task: str
    scorer: str
    n: int
    """Pairs."""
    only_before: int
    only_after: int
    """Samples that only one of the runs has; they are left out."""
    accuracy: tuple[float, float]
    """Of both runs, over the pairs."""
    difference: Paired
    visual_tokens: Paired
    token_layers: Paired
    seconds: Paired
    zooming: Zooming
    flips: list[Flip]


class Comparison(Figures):
    """Two runs."""

    before: str
    after: str
    """Their folders."""
    tasks: dict[str, TaskComparison]
    made_differently: list[str]
    """Parts of the runs' environments that differ, such as "torch": their seconds are not of the model alone."""


class Pair(NamedTuple):
    """The same sample in two runs, its repeats."""

    before: list[SampleResult]
    after: list[SampleResult]


def compare(before: RunFolder, after: RunFolder, *, scorer: str | Mapping[str, str] | None = None) -> Comparison:
    """Return the second run minus the first, task by task.

    Tasks that only one of them has begun are left out. `scorer` is whose accuracy is compared, or that of each task;
    None: the one that leads in the second run. ConfigError if the runs have no task in common, no sample in common, or
    no such scorer in both.
    """
    found: dict[str, TaskComparison] = {}
    ours, theirs = before.by_task(), after.by_task()
    common = [name for name in theirs if name in ours]
    if not common:
        raise ConfigError(
            f"The runs have no task in common: {', '.join(ours) or 'no answers'} in {before.path}, "
            f"{', '.join(theirs) or 'no answers'} in {after.path}."
        )
    if scorer is None:
        scorer = {name: each.scorer for name, each in Results.of(after).tasks.items()}
    leading = dict.fromkeys(common, scorer) if isinstance(scorer, str) else scorer
    for name in common:
        pairs, alone = _pairs(ours[name], theirs[name])
        if not pairs:
            raise ConfigError(
                f"{name}: the runs have no sample in common. Both need the same --seed, --split and source."
            )
        # A task that was added has no results until the run is finished.
        chosen = leading.get(name) or next(iter(theirs[name][0].scores), "")
        if any(chosen not in row.scores for row in (pairs[0].before[0], pairs[0].after[0])):
            raise ConfigError(f"{name}: there is no scorer {chosen!r} in both runs. `qzoom eval rescore` adds one.")
        both = [row for pair in pairs for row in (*pair.before, *pair.after)]
        one_version(both, chosen, folders=f"{before.path}` and `qzoom eval rescore {after.path}")
        found[name] = _compare(name, pairs, alone, chosen, before, after)
    was, now = (_environments(run) for run in (before, after))
    return Comparison(
        before=str(before.path),
        after=str(after.path),
        tasks=found,
        made_differently=sorted({part for part, _ in was ^ now}) if was and now else [],
    )


def _environments(run: RunFolder) -> set[tuple[str, str]]:
    """Return the parts of the environments that a run was made in; empty where none was noted."""
    noted = run.environments() if (run.path / "env.json").exists() else []
    return {(part, text) for one in noted for part, text in one.items() if part not in ("date", "command")}


def _pairs(before: Sequence[SampleResult], after: Sequence[SampleResult]) -> tuple[list[Pair], tuple[int, int]]:
    """Return the samples that both have, and how many only one has."""
    first, second = by_sample(before), by_sample(after)
    pairs = [Pair(first[id], rows) for id, rows in second.items() if id in first]
    for pair in pairs:
        one, two = pair.before[0], pair.after[0]
        others = one.other_images != two.other_images and one.other_images and two.other_images
        if one.image and two.image and (others or (one.image, one.question) != (two.image, two.question)):
            raise ConfigError(
                f"The runs asked different things: sample {one.id} has another "
                f"{'image' if others or one.image != two.image else 'question'} in each. Run one of them again."
            )
        if (one.gold, one.options) != (two.gold, two.options):
            raise ConfigError(
                f"The runs were scored against different answers: sample {one.id} has {one.gold[0]!r:.60} in one and "
                f"{two.gold[0]!r:.60} in the other. Give the same command as for the first run again: it asks nothing "
                "anew and scores by the answers as they are now."
            )
    return pairs, (len(first) - len(pairs), len(second) - len(pairs))


def _compare(
    name: str, pairs: Sequence[Pair], alone: tuple[int, int], scorer: str, before: RunFolder, after: RunFolder
) -> TaskComparison:
    # What failed was broken off, so it is cheap in one run alone.
    ended = [pair for pair in pairs if all(row.status != "error" for side in pair for row in side)] or pairs

    def means(some: Sequence[Pair], value: Callable[[SampleResult], float]) -> tuple[list[float], list[float]]:
        first, second = ([fmean(map(value, rows)) for rows in side] for side in zip(*some, strict=True))
        return first, second

    def cost(value: Callable[[SampleResult], float]) -> Paired:
        return paired(*means(ended, value), clusters=[pair.after[0].cluster for pair in ended], share=False)

    was, now = means(pairs, lambda row: row.value(scorer))
    return TaskComparison(
        task=name,
        scorer=scorer,
        n=len(pairs),
        only_before=alone[0],
        only_after=alone[1],
        accuracy=(fmean(was), fmean(now)),
        difference=paired(was, now, clusters=[pair.after[0].cluster for pair in pairs], share=True),
        visual_tokens=cost(lambda row: row.visual_tokens),
        token_layers=cost(lambda row: row.token_layers),
        seconds=cost(lambda row: row.usage.seconds.total),
        zooming=zooming(pairs, scorer),
        flips=[flip for pair in pairs if (flip := _flip(pair, scorer, before, after)) is not None],
    )


def worth(rows: Sequence[SampleResult], scorer: str) -> float:
    """Return the mean worth of a sample over its repeats."""
    return fmean(row.value(scorer) for row in rows)


def deciding(rows: Sequence[SampleResult], scorer: str) -> tuple[SampleResult, bool]:
    """Return the first repeat of a sample that is right or wrong as the sample is, and whether it is right."""
    right = worth(rows, scorer) >= RIGHT
    return next(row for row in rows if (row.value(scorer) >= RIGHT) == right), right


def zooming(pairs: Sequence[Pair], scorer: str) -> Zooming:
    """Return the outcomes of zooming; of several repeats the first counts."""
    counts = {"helped": 0, "harmed": 0, "needless": 0, "in_vain": 0}
    regret = [0, 0]
    for pair in pairs:
        rows = (pair.before[0], pair.after[0])
        if (rows[0].zooms > 0) == (rows[1].zooms > 0):
            continue
        zoomed = int(rows[1].zooms > 0)
        with_crop, without = (rows[at].value(scorer) >= RIGHT for at in (zoomed, 1 - zoomed))
        counts[_OUTCOMES[with_crop, without]] += 1
        regret[zoomed] += without
        regret[1 - zoomed] += with_crop and not without
    n = len(pairs)
    return Zooming(
        pairs=sum(counts.values()),
        **counts,
        tool_gain=counts["helped"] / n,
        tool_harm=counts["harmed"] / n,
        regret_before=regret[0] / n,
        regret_after=regret[1] / n,
    )


_OUTCOMES = {(True, False): "helped", (False, True): "harmed", (True, True): "needless", (False, False): "in_vain"}
"""By (right with the crop, right without)."""


def _flip(pair: Pair, scorer: str, before: RunFolder, after: RunFolder) -> Flip | None:
    (one, was), (two, now) = deciding(pair.before, scorer), deciding(pair.after, scorer)
    if was == now:
        return None
    return Flip(
        task=two.task,
        id=two.id,
        kind=two.kind,
        question=two.question,
        gold=two.gold[0],
        became="right" if now else "wrong",
        before=one.answer,
        after=two.answer,
        trace_before=_trace(before, one),
        trace_after=_trace(after, two),
    )


def _trace(folder: RunFolder, row: SampleResult) -> str | None:
    path = folder.trace_path(row.key)
    return str(path) if path.exists() else None
