"""Ask an agent the samples of suites, into a run folder that can be interrupted and enlarged.

    from qzoom_agent.evaluation.tasks.catalog import find_suite

    run = evaluate(agent, [find_suite("needle-scene")], out="runs/scene", source=Source(n=200))
    print(run.suites["needle-scene"].accuracy)

Invariants: the questions depend on suite, source and seed and nothing else, so that two policies, two models or two
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
from qzoom_agent.evaluation.tasks.task import Score, Suite


class ProgressListener(Protocol):
    """Who is told how a run goes."""

    def begin(self, suite: str, planned: int) -> None:
        """A suite begins, with so many samples (repeats counted) for this process."""
        ...

    def row(self, row: SampleResult, *, new: bool) -> None:
        """A sample is there: finished just now, or by an earlier run."""
        ...


class _Task(NamedTuple):
    """One sample to ask once."""

    suite: Suite
    samples: Samples
    agent: AgentLike
    place: int
    repeat: int


def evaluate(
    agent: AgentLike,
    suites: Sequence[Suite],
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
        source: where suites are read from and how many samples they draw; its seed is the run's.
        paths: by name, the suites that are read from elsewhere than their own place.
        limit: a stratified subset of so many samples of each suite.
        repeats: how often each sample is asked, with other seeds.
        scorer: whose figure is the accuracy; None: each suite's default. All scorers are applied and reported.
        own_budget: keep the agent's coarse view even where a suite says at how many tokens it is run.
        weights: `identity.fingerprint` of the model.
        workers: samples asked side by side, for agents that gain from it.
        shard: this process among several that share the work; the results are then those of process 0.
        traces: keep the whole record of every episode, with pictures.
    """
    source, shard = source or TaskSource(), shard or Shard()
    require(source, limit=limit, repeats=repeats, workers=workers)
    require_scorer(scorer, suites)
    folder = RunFolder(out)
    sources = {suite.name: source._replace(path=(paths or {}).get(suite.name, source.path)) for suite in suites}
    loaded = {suite.name: suite.load(sources[suite.name]) for suite in suites}
    plans = {
        suite.name: plan(
            loaded[suite.name],
            sources[suite.name],
            limit=limit,
            seed=source.seed,
            coarse_tokens=None if own_budget else suite.coarse_tokens,
        )
        for suite in suites
    }
    ask = RunSpec(
        seed=source.seed, weights=weights, repeats=repeats, suites={name: part for name, (part, _) in plans.items()}
    )
    with shard.leads(folder.writing()):
        if shard.index == 0:
            folder.begin(agent.config, ask, environment or {})
        shard.wait()
        for suite in suites:
            part, chosen = plans[suite.name]
            runner = agent
            if part.coarse_tokens is not None:
                low, high = part.coarse_tokens
                runner = _at(agent, low, high)
            tasks = [
                _Task(suite, loaded[suite.name], runner, index, repeat)
                for index, repeat in share(chosen, repeats, rank=shard.index, ranks=shard.count)
            ]
            _run(
                folder,
                tasks,
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
            return _write_results(folder, suites, scorer)
    return summarise(folder, suites, scorer=scorer)


def rescore(folder: RunFolder, suites: Sequence[Suite], *, scorer: str | None = None) -> Results:
    """Score the answers of a run again, with the suites' scorers as they are now. Nothing is asked."""
    known = {suite.name: suite for suite in suites}
    with folder.writing():
        rows = [row.rescored(known[row.suite].scorers) if row.suite in known else row for row in folder.latest()]
        folder.replace_rows(rows)
        return _write_results(folder, suites, scorer)


def _write_results(folder: RunFolder, suites: Sequence[Suite], scorer: str | None) -> Results:
    results = summarise(folder, suites, scorer=scorer)
    folder.write("results.json", results.model_dump_json(indent=1) + "\n")
    return results


def _at(agent: AgentLike, low: int, high: int) -> AgentLike:
    """The same agent with a coarse view of that many tokens."""
    if not isinstance(agent, Agent):
        return agent
    return agent.replace(**{"budget.coarse_min_tokens": low, "budget.coarse_tokens": high})


def _run(
    folder: RunFolder,
    tasks: Sequence[_Task],
    *,
    seed: int,
    weights: str | None,
    workers: int,
    shard: Shard,
    traces: bool,
    watch: ProgressListener | None,
) -> None:
    """Ask what is not there yet of one suite."""
    if not tasks:
        return
    name = tasks[0].suite.name
    wanted = {(task.place, task.repeat) for task in tasks}
    if watch:
        watch.begin(name, len(tasks))
    done = {
        (row.index, row.repeat): row
        for row in folder.rows()
        if row.suite == name and row.status != "error" and (row.index, row.repeat) in wanted
    }
    clock = _Clock()

    def one(task: _Task) -> tuple[SampleResult, bool]:
        try:
            sample = task.samples[task.place]
        except QzoomError as error:
            return _unreadable(task, error, seed=seed), True
        known = partial(
            asked, sample, index=task.place, repeat=task.repeat, seed=seed, config=task.agent.config, weights=weights
        )
        row = done.pop((task.place, task.repeat), None)
        if row is not None and row.key == known(image=image_digest(sample))["key"]:
            return row, False
        return _ask(
            task, sample, known, folder if traces else None, seed=episode_seed(seed, sample.id, task.repeat)
        ), True

    with folder.journal(None if shard.count == 1 else shard.index) as journal:
        for row, new in _side_by_side(one, tasks, workers):
            _keep(row, new, journal, clock, watch)


def _keep(row: SampleResult, new: bool, journal: Journal, clock: _Clock, watch: ProgressListener | None) -> None:
    if new:
        row = row.model_copy(update={"elapsed": clock.lap()})
        journal.append(row)
    if watch:
        watch.row(row, new=new)


def _ask(
    task: _Task, sample: Sample, known: Callable[..., dict[str, JsonValue]], folder: RunFolder | None, *, seed: int
) -> SampleResult:
    """The row of a sample that is asked now; `known` makes the part that is no answer, of the image's digest."""
    policy = task.agent.config.policy
    boxes = sample.boxes if policy in TAKE_GOLD else None
    try:
        if policy == "oracle" and not sample.boxes and not sample.coarse_suffices:
            raise ConfigError("The policy 'oracle' needs to know where the answer is, and this sample does not say.")
        answer = task.agent.run(sample.image, sample.question, boxes=boxes, seed=seed)
    except QzoomError as error:
        return SampleResult.model_validate(known(image=image_digest(sample)) | _failed(error, sample, task.suite))
    # The trace has the digest already; hashing a large image again would cost more than all the rest here.
    views = answer.trace.views
    about = known(image=views[0].digest if views else image_digest(sample))
    if folder:
        folder.save_trace(str(about["key"]), answer)
    found = measured(answer, sample)
    scores = scored(answer.text, answer.trace.status, sample, task.suite.scorers)
    return SampleResult.model_validate(about | found | {"scores": scores})


def _failed(error: QzoomError, sample: Sample, suite: Suite) -> dict[str, object]:
    return {
        "status": "error",
        "error": f"{type(error).__name__}: {error}",
        "scores": scored(None, "error", sample, suite.scorers),
    }


def _unreadable(task: _Task, error: QzoomError, *, seed: int) -> SampleResult:
    """The row of a sample that cannot even be read: it is in the suite, so it counts."""
    name = f"{task.suite.name}[{task.place}]"
    return SampleResult(
        key=f"unreadable-{task.suite.name}-{task.place}-{task.repeat}",
        suite=task.suite.name,
        index=task.place,
        repeat=task.repeat,
        id=name,
        kind=task.samples.kinds[task.place],
        cluster=name,
        seed=episode_seed(seed, name, task.repeat),
        image="",
        size=(1, 1),
        question="",
        gold=[""],
        status="error",
        error=f"{type(error).__name__}: {error}",
        scores={name: Score(0.0, None) for name in task.suite.scorers},
    )


def _side_by_side(
    one: Callable[[_Task], tuple[SampleResult, bool]], tasks: Sequence[_Task], workers: int
) -> Iterator[tuple[SampleResult, bool]]:
    """Results as they are finished; never more than `workers` tasks under way."""
    if workers == 1:
        yield from map(one, tasks)
        return
    with ThreadPoolExecutor(workers) as pool:
        pending: set[Future[tuple[SampleResult, bool]]] = set()
        for task in tasks:
            pending.add(pool.submit(one, task))
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
