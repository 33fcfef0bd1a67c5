"""Ask an agent the samples of tasks, into a run folder that can be interrupted and enlarged.

    from qzoom_agent.evaluation.tasks.catalog import find_task

    run = evaluate(agent, [find_task("needle-scene")], out="runs/scene", source=TaskSource(n=200))
    print(run.tasks["needle-scene"].accuracy)

Invariants: the questions depend on task, source and seed and nothing else, so that two policies, two models or two
machines answer the same ones and can be compared sample by sample; each episode's own seed is a hash of the run's and
the sample's id, so neither order nor resuming, workers or processes change an answer; a sample that fails stays in the
denominator as wrong, with its error in its row, and is asked again when the run is. Rows are not held in memory while
the run lasts. An error of this package (`QzoomError`) fails one sample; any other exception is a bug and is raised.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from functools import partial
from pathlib import Path
from threading import Lock
from time import perf_counter
from typing import NamedTuple, Protocol

from pydantic import JsonValue

from qzoom_agent.agent import Agent
from qzoom_agent.data.samples import Sample, Samples, TaskSource
from qzoom_agent.errors import ConfigError, QzoomError
from qzoom_agent.evaluation.run_log import Journal, RunFolder, RunSpec
from qzoom_agent.evaluation.sample_result import (
    TAKE_GOLD,
    AgentLike,
    SampleResult,
    asked,
    episode_seed,
    image_digest,
    measured,
    scored,
)
from qzoom_agent.evaluation.selection import plan, require, require_scorer, share
from qzoom_agent.evaluation.shards import Shard
from qzoom_agent.evaluation.summary import Results, summarise
from qzoom_agent.evaluation.tasks.task import Score, Task


class ProgressListener(Protocol):
    """Who is told how a run goes."""

    def begin(self, task: str, planned: int) -> None:
        """A task begins, with so many samples (repeats counted) for this process."""
        ...

    def row(self, row: SampleResult, *, new: bool) -> None:
        """A sample is there: finished just now, or by an earlier run."""
        ...


class _Item(NamedTuple):
    """One sample to ask once."""

    task: Task
    samples: Samples
    agent: AgentLike
    place: int
    repeat: int


def evaluate(
    agent: AgentLike,
    tasks: Sequence[Task],
    *,
    out: Path | str,
    source: TaskSource | None = None,
    paths: Mapping[str, str] | None = None,
    limit: int | None = None,
    repeats: int = 1,
    scorer: str | None = None,
    own_budget: bool = False,
    weights: str | None = None,
    environment: dict[str, str] | None = None,
    workers: int = 1,
    shard: Shard | None = None,
    traces: bool = True,
    watch: ProgressListener | None = None,
) -> Results:
    """Ask every planned sample that `out` does not have yet, and return the figures of all that it has.

    Args:
        source: where tasks are read from and how many samples they draw; its seed is the run's.
        paths: by name, the tasks that are read from elsewhere than their own place.
        limit: a stratified subset of so many samples of each task.
        repeats: how often each sample is asked, with other seeds.
        scorer: whose figure is the accuracy; None: each task's default. All scorers are applied and reported.
        own_budget: keep the agent's coarse view even where a task says at how many tokens it is run.
        weights: `identity.fingerprint` of the model.
        workers: samples asked side by side, for agents that gain from it.
        shard: this process among several that share the work; the results are then those of process 0.
        traces: keep the whole record of every episode, with pictures.
    """
    source, shard = source or TaskSource(), shard or Shard()
    require(source, limit=limit, repeats=repeats, workers=workers)
    require_scorer(scorer, tasks)
    folder = RunFolder(out)
    sources = {task.name: source._replace(path=(paths or {}).get(task.name, source.path)) for task in tasks}
    loaded = {task.name: task.load(sources[task.name]) for task in tasks}
    plans = {
        task.name: plan(
            loaded[task.name],
            sources[task.name],
            limit=limit,
            seed=source.seed,
            coarse_tokens=None if own_budget else task.coarse_tokens,
        )
        for task in tasks
    }
    ask = RunSpec(
        seed=source.seed, weights=weights, repeats=repeats, tasks={name: part for name, (part, _) in plans.items()}
    )
    with shard.leads(folder.writing()):
        if shard.index == 0:
            folder.begin(agent.config, ask, environment or {})
        shard.wait()
        for task in tasks:
            part, chosen = plans[task.name]
            runner = agent
            if part.coarse_tokens is not None:
                low, high = part.coarse_tokens
                runner = _at(agent, low, high)
            items = [
                _Item(task, loaded[task.name], runner, index, repeat)
                for index, repeat in share(chosen, repeats, rank=shard.index, ranks=shard.count)
            ]
            _run(
                folder,
                items,
                seed=source.seed,
                weights=weights,
                workers=workers,
                shard=shard,
                traces=traces,
                watch=watch,
            )
        shard.wait()
        if shard.index == 0:
            folder.replace_rows(folder.latest())
            return _write_results(folder, tasks, scorer)
    return summarise(folder, tasks, scorer=scorer)


def rescore(folder: RunFolder, tasks: Sequence[Task], *, scorer: str | None = None) -> Results:
    """Score the answers of a run again, with the tasks' scorers as they are now. Nothing is asked."""
    known = {task.name: task for task in tasks}
    with folder.writing():
        rows = [row.rescored(known[row.task].scorers) if row.task in known else row for row in folder.latest()]
        folder.replace_rows(rows)
        return _write_results(folder, tasks, scorer)


def _write_results(folder: RunFolder, tasks: Sequence[Task], scorer: str | None) -> Results:
    results = summarise(folder, tasks, scorer=scorer)
    folder.write("results.json", results.model_dump_json(indent=1) + "\n")
    return results


def _at(agent: AgentLike, low: int, high: int) -> AgentLike:
    """The same agent with a coarse view of that many tokens."""
    if not isinstance(agent, Agent):
        return agent
    return agent.replace(**{"budget.coarse_min_tokens": low, "budget.coarse_tokens": high})


def _run(
    folder: RunFolder,
    items: Sequence[_Item],
    *,
    seed: int,
    weights: str | None,
    workers: int,
    shard: Shard,
    traces: bool,
    watch: ProgressListener | None,
) -> None:
    """Ask what is not there yet of one task."""
    if not items:
        return
    name = items[0].task.name
    wanted = {(item.place, item.repeat) for item in items}
    if watch:
        watch.begin(name, len(items))
    done = {
        (row.index, row.repeat): row
        for row in folder.rows()
        if row.task == name and row.status != "error" and (row.index, row.repeat) in wanted
    }
    clock = _Clock()

    def one(item: _Item) -> tuple[SampleResult, bool]:
        try:
            sample = item.samples[item.place]
        except QzoomError as error:
            return _unreadable(item, error, seed=seed), True
        known = partial(
            asked, sample, index=item.place, repeat=item.repeat, seed=seed, config=item.agent.config, weights=weights
        )
        row = done.pop((item.place, item.repeat), None)
        if row is not None and row.key == known(image=image_digest(sample))["key"]:
            return row, False
        return _ask(
            item, sample, known, folder if traces else None, seed=episode_seed(seed, sample.id, item.repeat)
        ), True

    with folder.journal(None if shard.count == 1 else shard.index) as journal:
        for row, new in _side_by_side(one, items, workers):
            _keep(row, new, journal, clock, watch)


def _keep(row: SampleResult, new: bool, journal: Journal, clock: _Clock, watch: ProgressListener | None) -> None:
    if new:
        row = row.model_copy(update={"elapsed": clock.lap()})
        journal.append(row)
    if watch:
        watch.row(row, new=new)


def _ask(
    item: _Item, sample: Sample, known: Callable[..., dict[str, JsonValue]], folder: RunFolder | None, *, seed: int
) -> SampleResult:
    """The row of a sample that is asked now; `known` makes the part that is no answer, of the image's digest."""
    policy = item.agent.config.policy
    boxes = sample.boxes if policy in TAKE_GOLD else None
    try:
        if policy == "oracle" and not sample.boxes and not sample.coarse_suffices:
            raise ConfigError("The policy 'oracle' needs to know where the answer is, and this sample does not say.")
        answer = item.agent.run(sample.image, sample.question, boxes=boxes, seed=seed)
    except QzoomError as error:
        return SampleResult.model_validate(known(image=image_digest(sample)) | _failed(error, sample, item.task))
    # The trace has the digest already; hashing a large image again would cost more than all the rest here.
    views = answer.trace.views
    about = known(image=views[0].digest if views else image_digest(sample))
    if folder:
        folder.save_trace(str(about["key"]), answer)
    found = measured(answer, sample)
    scores = scored(answer.text, answer.trace.status, sample, item.task.scorers)
    return SampleResult.model_validate(about | found | {"scores": scores})


def _failed(error: QzoomError, sample: Sample, task: Task) -> dict[str, object]:
    return {
        "status": "error",
        "error": f"{type(error).__name__}: {error}",
        "scores": scored(None, "error", sample, task.scorers),
    }


def _unreadable(item: _Item, error: QzoomError, *, seed: int) -> SampleResult:
    """The row of a sample that cannot even be read: it is in the task, so it counts."""
    name = f"{item.task.name}[{item.place}]"
    return SampleResult(
        key=f"unreadable-{item.task.name}-{item.place}-{item.repeat}",
        task=item.task.name,
        index=item.place,
        repeat=item.repeat,
        id=name,
        kind=item.samples.kinds[item.place],
        cluster=name,
        seed=episode_seed(seed, name, item.repeat),
        image="",
        size=(1, 1),
        question="",
        gold=[""],
        status="error",
        error=f"{type(error).__name__}: {error}",
        scores={name: Score(0.0, None) for name in item.task.scorers},
    )


def _side_by_side(
    one: Callable[[_Item], tuple[SampleResult, bool]], items: Sequence[_Item], workers: int
) -> Iterator[tuple[SampleResult, bool]]:
    """Results as they are finished; never more than `workers` tasks under way."""
    if workers == 1:
        yield from map(one, items)
        return
    with ThreadPoolExecutor(workers) as pool:
        pending: set[Future[tuple[SampleResult, bool]]] = set()
        for item in items:
            pending.add(pool.submit(one, item))
            if len(pending) == workers:
                finished, pending = wait(pending, return_when=FIRST_COMPLETED)
                yield from (future.result() for future in finished)
        while pending:
            finished, pending = wait(pending, return_when=FIRST_COMPLETED)
            yield from (future.result() for future in finished)


class _Clock:
    """Seconds between the samples that a process finishes."""

    def __init__(self) -> None:
        self._last = perf_counter()
        self._lock = Lock()

    def lap(self) -> float:
        with self._lock:
            now = perf_counter()
            lap, self._last = now - self._last, now
            return lap
