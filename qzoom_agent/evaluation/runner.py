"""Ask an agent the questions of tasks, into a run folder that can be interrupted and enlarged.

    run = evaluate(agent, [find_task("needle-scene")], out="runs/scene", source=TaskSource(n=200))
    print(run.tasks["needle-scene"].accuracy)

The questions depend on task, source and seed alone, and each episode's seed on the run's and the sample's id, so runs
can be compared sample by sample, and neither order nor resuming, workers or processes change an answer. A sample that
fails counts as wrong, with its error in its row, and is asked again when the run is. A `QzoomError` fails one sample;
any other exception is a bug and is raised.
"""

from __future__ import annotations

import hashlib
import os
import sys
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, as_completed, wait
from contextlib import nullcontext
from contextvars import copy_context
from dataclasses import dataclass, replace
from datetime import timedelta
from functools import partial
from itertools import product
from pathlib import Path
from time import perf_counter
from typing import Any, NamedTuple, Protocol, TypeVar

import PIL.Image
from pydantic import BaseModel, ValidationError

from qzoom_agent.agent import Agent
from qzoom_agent.data.image_column import headers_only
from qzoom_agent.data.rows import RowSamples, refuse_rows
from qzoom_agent.data.samples import Sample, Samples, TaskSource
from qzoom_agent.errors import ConfigError, QzoomError
from qzoom_agent.evaluation.audit import audit_again
from qzoom_agent.evaluation.run_log import COARSE, RowPlace, RunFolder, RunSpec, TaskSelection, weights_of_agent
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
from qzoom_agent.evaluation.stats import require_scipy
from qzoom_agent.evaluation.summary import Results, summarise
from qzoom_agent.evaluation.tasks.catalog import with_scorer
from qzoom_agent.evaluation.tasks.task import CustomScorer, Scorer, Task
from qzoom_agent.extensions import calling
from qzoom_agent.files import first_fault

_Item = TypeVar("_Item")
_Result = TypeVar("_Result")


class ProgressListener(Protocol):
    """A receiver of a run's progress."""

    def begin(self, task: str, planned: int) -> None:
        """Note that a task begins, with so many samples (repeats counted) for this process."""

    def row(self, row: SampleResult, *, new: bool) -> None:
        """Note a sample: `new` if it was finished just now, else of an earlier run."""


@dataclass(frozen=True)
class Shard:
    """One of the processes that share a run: process `index` of `count`, alone by default.

        accelerate launch --multi_gpu --num_processes 4 -m qzoom_agent eval vstar --out runs/vstar

    Each asks every k-th sample and appends to its own file in the run folder, which all of them must see; process 0
    merges. Every answer is the same as in one process, so a run may be resumed with another number of them.
    """

    index: int = 0
    count: int = 1
    state: Any = None
    """accelerate's `PartialState`, where there are several."""

    @classmethod
    def launched(cls) -> Shard:
        """Return this process as its launcher's environment describes it."""
        if int(os.environ.get("WORLD_SIZE", "1")) == 1:
            return cls()
        from accelerate import PartialState

        # The processes only wait for each other, which needs no accelerator (cpu=True) and may take hours: the default
        # timeout of ten minutes would end the run.
        state = PartialState(cpu=True, timeout=timedelta(days=14))
        return cls(state.process_index, state.num_processes, state)

    @property
    def device(self) -> str | None:
        """This process's own accelerator, or "auto"; None if there is one process."""
        if self.state is None:
            return None
        from qzoom_agent.models.hf import accelerator

        return accelerator(self.state.local_process_index)

    def wait(self) -> None:
        """Wait until every process is here."""
        if self.state is not None:
            self.state.wait_for_everyone()


def evaluate(
    agent: AgentLike,
    tasks: Sequence[Task | str],
    *,
    out: Path | str,
    source: TaskSource | None = None,
    paths: Mapping[str, str] | None = None,
    limit: int | None = None,
    repeats: int = 1,
    scorer: str | Scorer | CustomScorer | None = None,
    own_budget: bool = False,
    weights: str | None = None,
    environment: dict[str, str] | None = None,
    workers: int = 1,
    shard: Shard | None = None,
    traces: bool = True,
    watch: ProgressListener | None = None,
    loaded: Mapping[str, Selected] | None = None,
) -> Results:
    """Ask every planned sample that `out` does not have yet, and return the results of all that it has.

    Args:
        agent: The agent to measure.
        tasks: What it is asked: tasks, or names as `qzoom_agent.evaluation.tasks.catalog.find_task` takes them.
        out: Run folder.
        source: Where tasks are read from and how many samples they draw; its seed is the run's.
        paths: Paths of tasks that are read from elsewhere than their own source, by task name.
        limit: Samples of each task to ask, as a subset with each kind in its share.
        repeats: Times that each sample is asked, with other seeds.
        scorer: Scorer whose figure is the accuracy, as `with_scorer` takes it; None: each task's default. All scorers
            of a task are applied and reported.
        own_budget: Keep the agent's coarse view even where a task sets its visual tokens.
        weights: `run_log.fingerprint` of the model; None: of what the agent was loaded with.
        environment: `run_log.environment`, for the record.
        workers: Samples asked side by side, for agents that gain from it.
        shard: This process among several that share the work; the results are then those of process 0.
        traces: Keep the whole record of every episode, with pictures.
        watch: Receiver of progress.
        loaded: The samples as `select` has checked them, by task; None: they are checked here.

    Raises:
        ConfigError: A number is out of range, a task cannot be read or has samples that cannot be asked, or `out` holds
            another evaluation.
        MissingDependency: scipy is not installed.
    """
    source, shard, weights = source or TaskSource(), shard or Shard(), weights or weights_of_agent(agent)
    require(source, limit=limit, repeats=repeats, workers=workers)
    asked, scorer = with_scorer(tasks, scorer)
    folder = RunFolder(out)
    runs: list[TaskRun] = []
    loaded = loaded or select(asked, source=source, paths=paths, limit=limit, own_budget=own_budget)
    plans = {task.name: loaded[task.name].selection for task in asked}
    for task in asked:
        samples, selection, places = loaded[task.name]
        asker = agent
        if selection.coarse_tokens is not None and isinstance(agent, Agent):
            least, most = selection.coarse_tokens
            asker = agent.replace(**{"budget.coarse_min_tokens": least, "budget.coarse_tokens": most})
        runs.append(TaskRun(task, samples, places, asker, folder, source.seed, weights, traces))
    ask = RunSpec(seed=source.seed, weights=weights, repeats=repeats, tasks=plans)
    scorers = {task.name: task.scorers for task in asked}
    by_tasks = all(one.coarse_tokens is not None for one in plans.values())
    # so that the configuration, given again, leaves it to the tasks
    kept = agent.config.replace(budget=dict.fromkeys(COARSE)) if by_tasks else agent.config

    def finish(by: str | None = scorer) -> Results:
        folder.replace_rows(row.completed(scorers.get(row.task, {})) for row in folder.in_order())
        return _write_results(folder, asked, by)

    def begin() -> None:
        before = folder.ask if (folder.path / "results.json").exists() else None
        folder.begin(kept, ask, environment or {})
        if before and before != folder.ask:  # so that the figures of a smaller run do not stand for this one
            # a task that is new to it may alone have the scorer
            finish(scorer if any(scorer in scorers.get(name, {}) for name in before.tasks) else None)

    results = ask_all(
        runs, folder, begin=begin, finish=finish, repeats=repeats, workers=workers, shard=shard, watch=watch
    )
    return summarise(folder, asked, scorer=scorer) if results is None else results


def ask_all(
    runs: Sequence[TaskRun],
    folder: RunFolder,
    *,
    begin: Callable[[], object],
    finish: Callable[[], _Result],
    repeats: int = 1,
    workers: int = 1,
    shard: Shard,
    watch: ProgressListener | None = None,
) -> _Result | None:
    """Ask what the folder does not have yet, this process its share.

    Process 0 calls `begin` before any process asks and `finish` when all have asked; its result is returned there, None
    in the other processes.
    """
    with folder.writing() if shard.index == 0 else nullcontext():
        if shard.index == 0:
            begin()
            folder.merge()
        shard.wait()
        for run in runs:
            # every repeat of one sample is asked by the same process
            items = list(product(run.places[shard.index :: shard.count], range(repeats)))
            run.finish(items, workers=workers, rank=None if shard.count == 1 else shard.index, watch=watch)
        shard.wait()
        result = finish() if shard.index == 0 else None
        shard.wait()
        return result


class Selected(NamedTuple):
    """The samples of a task, and those of them that are asked."""

    samples: Samples
    selection: TaskSelection
    places: list[int]


def select(
    tasks: Sequence[Task],
    *,
    source: TaskSource,
    paths: Mapping[str, str] | None = None,
    limit: int | None = None,
    own_budget: bool = False,
) -> dict[str, Selected]:
    """Return the samples that `evaluate` asks, by task, once they are checked: rows, and the headers of images.

    Raises ConfigError if a task cannot be read, or has samples that cannot be asked and `source.skip_bad` is not set.
    """
    require_names(tasks)
    found = {}
    for task in tasks:
        own = source._replace(path=(paths or {}).get(task.name, source.path or task.path))
        tokens = None if own_budget else task.coarse_tokens
        with calling(task.name, kind="task"):
            samples = task.load(own)
            selection, places = plan(samples, own, limit=limit, coarse_tokens=tokens, reference=task.reference)
        if isinstance(samples, RowSamples):
            wrong = samples.problems(places)
            told = {samples.rows.number(place): wrong[place] for place in wrong}
            refuse_rows(samples.rows.name, told, total=len(places), skip_bad=source.skip_bad)
            places = [place for place in places if place not in wrong]
            left_out = [f"row {number + 1}: {reason}" for number, reason in told.items()]
            selection = selection.model_copy(update={"planned": len(places), "left_out": left_out})
        found[task.name] = Selected(samples, selection, places)
    return found


def require_names(tasks: Sequence[Task]) -> None:
    """Raise ConfigError for two tasks of one name, which would be one in a run folder."""
    names = [task.name for task in tasks]
    if name := next((name for name in names if names.count(name) > 1), None):
        raise ConfigError(
            f"Two of the tasks are called {name!r}, after their files or folders. Rename one, or evaluate them in two "
            "runs."
        )


def rescore(
    folder: RunFolder, tasks: Sequence[Task | str], *, scorer: str | Scorer | CustomScorer | None = None
) -> Results:
    """Score the answers of a run and of its ablations again, with the tasks' scorers as they are now; ask nothing.

    The audit of a run is made again from these scores.
    """
    for other in folder.ablations.values():
        rescore(other, tasks, scorer=scorer)
    scored_tasks, scorer = with_scorer(tasks, scorer)
    known = {task.name: task for task in scored_tasks}
    with folder.writing():
        rows = [row.rescored(known[row.task].scorers) if row.task in known else row for row in folder.latest()]
        folder.replace_rows(rows)
        results = _write_results(folder, scored_tasks, scorer)
        audit_again(folder, scorer=scorer)
        return results


def _write_results(folder: RunFolder, tasks: Sequence[Task], scorer: str | None) -> Results:
    results = summarise(folder, tasks, scorer=scorer)
    for rule in (rule for task in tasks for rule in task.scorers.values()):
        if isinstance(judge := getattr(rule, "judge", None), BaseModel):  # who gave the scores that are there now
            folder.write("judge.json", judge.model_dump_json(indent=1) + "\n")
    folder.write("results.json", results.model_dump_json(indent=1) + "\n")
    return results


@dataclass(frozen=True)
class TaskRun:
    """One task of a run under way."""

    task: Task
    samples: Samples
    places: Sequence[int]
    """The samples that are asked."""
    agent: AgentLike
    folder: RunFolder
    seed: int
    weights: str | None
    traces: bool
    row_digest: Callable[[int], str] | None = None
    """Digest of the row of a sample, without decoding its image: a sample whose row has not changed since it was
    answered is not asked again, nor is one whose row has moved. None, or an empty digest: that is told by the image."""

    def finish(
        self, items: Sequence[tuple[int, int]], *, workers: int, rank: int | None, watch: ProgressListener | None
    ) -> None:
        """Ask those (place, repeat) pairs that the folder does not have yet."""
        if not items:
            return
        if watch:
            watch.begin(self.task.name, len(items))
        wanted = set(items)
        done = self.folder.newest(
            lambda row: row.task == self.task.name and row.status != "error" and (row.index, row.repeat) in wanted
        )
        answers = {} if self.row_digest is None else self.folder.answers(self.task.name)

        def answered(index: int, repeat: int) -> tuple[SampleResult, bool, bool]:
            place = done.pop((self.task.name, index, repeat), None)
            known = None if place is None else self.folder.read(place)
            with calling(self.task.name, kind="task"):
                digest = self.row_digest(index) if self.row_digest else ""
            if known is None or known.row != digest:
                answer = answers.pop(digest, None)
                if answer and (row := self._moved(answer, index)):
                    return row, False, True
            row, new = self._row(index, repeat, known, digest)
            return row, new, row is not known

        last = perf_counter()
        with self.folder.journal(rank) as journal:
            for row, new, changed in _side_by_side(lambda item: answered(*item), items, workers):
                now = perf_counter()
                if new:
                    row = row.model_copy(update={"elapsed": now - last, "peak_memory": peak_memory()})
                last = now
                if changed:
                    journal.append(row)
                if watch:
                    watch.row(row, new=new)

    def _moved(self, answer: RowPlace, place: int) -> SampleResult | None:
        """Return the answer to a row of a table that stands at `place` now; None if it still stands where it was."""
        row = self.folder.read(answer)
        if self.row_digest is None or self.row_digest(row.index) == row.row:  # this one is asked the same
            return None
        numbered = row.id == f"{row.task}-{row.index}" and "id" not in row.meta
        return row.model_copy(update={"index": place, "id": f"{row.task}-{place}" if numbered else row.id})

    def _row(self, place: int, repeat: int, known: SampleResult | None, digest: str) -> tuple[SampleResult, bool]:
        """Return the row of a sample, and whether it was asked now: not if `known` is of the same experiment."""
        about = partial(
            asked, index=place, repeat=repeat, seed=self.seed, config=self.agent.config, weights=self.weights
        )
        with calling(self.task.name, kind="task"):
            try:
                if known is not None and digest and known.row == digest:
                    return known.completed(self.task.scorers), False
                sample = self.samples[place]
            except QzoomError as error:  # it belongs to the task, so it counts
                sample = self._unread(place)
                return self._failed(about(sample, image=""), sample, error), True
        sample = self._own(sample, place)
        if known is not None and known.key == (told := about(sample, image=image_digest(sample.image)))["key"]:
            current = known.under(told, self.task.scorers)
            if current is not None:
                if current.gold != known.gold:  # the page of the episode shows it
                    self.folder.trace_path(known.key).with_suffix(".html").unlink(missing_ok=True)
                return current, False
        row = self._ask(sample, partial(about, sample), seed=episode_seed(self.seed, sample.id, repeat))
        return (row.model_copy(update={"row": digest}) if digest else row), True

    def _own(self, sample: Sample, place: int) -> Sample:
        """Return a sample under this task's name: a task from outside this package may read another's samples."""
        if not isinstance(sample, Sample):
            raise ConfigError(f"The task {self.task.name!r} gave {sample!r:.80} as question {place}, not a Sample.")
        if wrong := [one for one in sample.images if not isinstance(one, PIL.Image.Image)]:
            raise ConfigError(
                f"The task {self.task.name!r} gave {wrong[0]!r:.80} as an image of question {place}, not an image of "
                "Pillow. qzoom_agent.load_image reads a file as one."
            )
        return sample if sample.task == self.task.name else replace(sample, task=self.task.name)

    def _unread(self, place: int) -> Sample:
        """Return a sample whose image cannot be read, with all else that its row says, as far as that can be read."""
        try:
            with headers_only():
                return self._own(self.samples[place], place)
        except QzoomError:
            blank = PIL.Image.new("RGB", (1, 1))
            return Sample(f"{self.task.name}[{place}]", self.task.name, self.samples.kinds[place], blank, "", "")

    def _ask(self, sample: Sample, about: Callable[..., dict[str, Any]], *, seed: int) -> SampleResult:
        """Ask a sample; `about` makes the part of the row that is known beforehand, from the image's digest."""
        policy = self.agent.config.policy
        try:
            boxes = sample.known_boxes if policy in TAKE_GOLD else None
            if policy == "oracle" and boxes is None:
                raise ConfigError("The policy 'oracle' needs to know where the answer is, and this sample has no box.")
            images: Any = sample.images if sample.others else sample.image
            answer = self.agent.run(images, sample.question, boxes=boxes, seed=seed)
        except QzoomError as error:
            return self._failed(about(image=image_digest(sample.image)), sample, error)
        # The trace has the digest already; hashing a large image again would cost more than all the rest here.
        views = answer.trace.views
        known = about(image=views[0].digest if views else image_digest(sample.image))
        if self.traces:
            self.folder.save_trace(str(known["key"]), answer)
        scores = scored(answer.text, answer.trace.status, sample, self.task.scorers)
        return self._result(sample, known | measured(answer, sample) | scores)

    def _failed(self, known: dict[str, Any], sample: Sample, error: QzoomError) -> SampleResult:
        failed = {"status": "error", "error": f"{type(error).__name__}: {error}"}
        return self._result(sample, known | failed | scored(None, "error", sample, self.task.scorers))

    def _result(self, sample: Sample, fields: Mapping[str, Any]) -> SampleResult:
        try:
            return SampleResult.model_validate(fields)
        except ValidationError as error:  # of a task from outside this package
            raise ConfigError(
                f"The question {sample.id!r:.80} of the task {self.task.name!r} is wrong: {first_fault(error)}."
            ) from error


def _side_by_side(work: Callable[[_Item], _Result], items: Sequence[_Item], workers: int) -> Iterator[_Result]:
    """Yield results as they are finished; never more than `workers` items are under way."""
    if workers == 1:
        yield from map(work, items)
        return
    with ThreadPoolExecutor(workers) as pool:
        pending: set[Future[_Result]] = set()
        for item in items:
            pending.add(pool.submit(copy_context().run, work, item))
            if len(pending) == workers:
                finished, pending = wait(pending, return_when=FIRST_COMPLETED)
                yield from (future.result() for future in finished)
        yield from (future.result() for future in as_completed(pending))


def peak_memory() -> dict[str, int]:
    """Return the most bytes this process held: of host memory, and of the accelerator's if torch is in use."""
    found: dict[str, int] = {}
    if sys.platform != "win32":
        import resource

        unit = 1 if sys.platform == "darwin" else 1024
        found["host"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
    if "torch" in sys.modules:
        from qzoom_agent.models.hf import peak_memory as device

        held = device()
        found |= {"device": held} if held else {}
    return found


def require(source: TaskSource, *, limit: int | None = None, repeats: int = 1, workers: int = 1) -> None:
    """Raise ConfigError for numbers that no run can have, MissingDependency without scipy; nothing is loaded before."""
    for name, given in (("n", source.n), ("limit", limit), ("repeats", repeats), ("workers", workers)):
        if given is not None and given < 1:
            raise ConfigError(f"A run needs at least 1 of these; got {name} = {given}.")
    if source.seed < 0:
        raise ConfigError(f"A seed is 0 or more; got {source.seed}.")
    require_scipy()


def plan(
    samples: Samples,
    source: TaskSource,
    *,
    limit: int | None = None,
    coarse_tokens: tuple[int, int] | None = None,
    reference: str = "",
) -> tuple[TaskSelection, list[int]]:
    """Return the selection of a task's samples, and their places in order.

    Args:
        samples: All samples of the task.
        source: Where they are from. `source.n` is the number that the task draws, or the first so many of one that
            has more.
        limit: Size of a subset of these with each kind in its share. A larger one contains a smaller one, so a run can
            be enlarged.
        coarse_tokens: (least, most) visual tokens of the coarse view, for the record.
        reference: `Task.reference`, for the record.
    """
    total = len(samples)
    if total == 0:
        raise ConfigError("The task has no samples. Check its --path and --split.")
    chosen = list(range(total if source.n is None else min(total, source.n)))
    stratified = limit is not None and limit < len(chosen)
    if stratified:
        kinds = samples.kinds
        chosen = sorted(stratified_order([kinds[index] for index in chosen], seed=source.seed)[:limit])
    selection = TaskSelection(
        path=source.path,
        reference=reference or None,
        split=source.split,
        fonts=str(source.fonts) if source.fonts else None,
        total=total,
        planned=len(chosen),
        stratified=stratified,
        coarse_tokens=coarse_tokens,
        answered=source.answered,
    )
    return selection, chosen


def stratified_order(kinds: Sequence[str], *, seed: int) -> list[int]:
    """Return all places, so ordered that every beginning has each kind in its share, drawn by `seed`."""
    groups: Mapping[str, list[int]] = defaultdict(list)
    for index, kind in enumerate(kinds):
        groups[kind].append(index)
    ranked = []
    for kind, group in groups.items():
        group.sort(key=lambda index: hashlib.sha256(f"{seed}/{index}".encode()).digest())
        ranked += [((place + 0.5) / len(group), kind, index) for place, index in enumerate(group)]
    return [index for _, _, index in sorted(ranked)]
