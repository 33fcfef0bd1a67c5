"""A run on disk: everything that was asked, answered and measured under one configuration, in one folder.

    config.yaml           the resolved configuration; `--config` takes it to repeat the run
    run.json              the questions: tasks, number of samples, seed, repeats, fingerprint of the weights
    env.json              machines and versions
    samples.jsonl         one `SampleResult` a line, flushed as samples are finished; samples.<i>.jsonl of process i
    results.json          the figures (`summary.Results`), report.html the same as a page
    traces/<key>.json     the record of each episode; traces/images/ holds the pictures by digest
    ablations/<policy>/   run folders of the same questions under other policies

A row is on disk before the next sample is asked, and after its trace; a torn last line is ignored; one process at a
time writes. A folder only grows: more samples, repeats or tasks, never another configuration, seed or weights.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import subprocess
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from datetime import date
from pathlib import Path
from typing import IO, Any, Final, NamedTuple, Self

from pydantic import AliasChoices, BaseModel, Field, ValidationError

from qzoom_agent.confidence import FILE as CALIBRATION
from qzoom_agent.config import AgentConfig
from qzoom_agent.errors import ConfigError
from qzoom_agent.evaluation.sample_result import AnswerLike, SampleResult
from qzoom_agent.evaluation.tasks.custom import task_name
from qzoom_agent.files import (
    atomic_write,
    expanded,
    first_fault,
    read_json,
    remove_parts,
    require_folder,
    sole_writer,
    translating,
    valid_unicode,
    write_text,
)
from qzoom_agent.models.presets import PRESETS
from qzoom_agent.trace import Text, Trace, by_digest, describe_environment

PICTURE_SIDE = 1600
"""Pictures of traces are JPEG and no larger: they are to look at; the exact pixels are the task's."""
_QUALITY = 82
_SIZE = 1 << 20
_BRANCHES = "branches"
"""Stem of the files that a folder of branches consists of."""
_PLAIN = re.compile(r"[A-Za-z0-9_-][A-Za-z0-9._-]{0,250}")
_ANOTHER = "Choose another --out."
_WRITTEN = "Give a folder that `qzoom eval` wrote."
_KINDS = {".safetensors", ".json", ".jinja", ".bin", ".model", ".txt"}


class TaskSelection(BaseModel, use_attribute_docstrings=True):
    """The samples of one task that a run asks."""

    path: Text | None = None
    """Path or hub id that it was read from, if that is not its own source."""
    reference: str | None = None
    """`Task.reference` of a task from outside this package."""
    split: str | None = None
    fonts: Text | None = None
    total: int
    """Samples that the task has."""
    planned: int
    """Samples that are asked; fewer than `total` is a partial run."""
    stratified: bool = False
    """The planned ones are a seeded subset with each kind in its share, rather than the first."""
    coarse_tokens: tuple[int, int] | None = None
    """(least, most) visual tokens of the coarse view, where the task sets them."""
    answered: bool = True
    """The questions have answers to score by."""
    left_out: list[Text] = Field(default_factory=list)
    """What is wrong with each row that is not asked (`--skip-bad`)."""

    @property
    def partial(self) -> bool:
        return self.planned < self.total


COARSE: Final = ("coarse_tokens", "coarse_min_tokens")
"""Keys of the budget that a task can set."""


class RunSpec(BaseModel, use_attribute_docstrings=True):
    """The questions of a run (`run.json`)."""

    version: str = "1.0"
    seed: int
    weights: str | None
    """Fingerprint of the weights (`fingerprint`), so that retrained ones are another run; None where unknown."""
    repeats: int
    tasks: dict[str, TaskSelection] = Field(validation_alias=AliasChoices("tasks", "suites"))

    def grown(self, later: RunSpec) -> RunSpec:
        """Return this with the questions of `later`; raise ConfigError for a change that is not growth."""
        differ = [] if self.seed == later.seed else [f"seed: {self.seed} then, {later.seed} now"]
        weights = self.weights or later.weights
        if later.weights not in (None, weights):
            note = " (those of a model in the package change with its version)"
            differ.append(f"weights: {self.weights!r} then, {later.weights!r} now{note}")
        if later.repeats < self.repeats:
            differ.append(f"repeats: {self.repeats} then, {later.repeats} now")
        for name in self.tasks.keys() & later.tasks.keys():
            differ += [f"{name}: {text}" for text in _shrinks(name, self.tasks[name], later.tasks[name])]
        if differ:
            raise ConfigError(
                f"The folder holds another run. Different: {'; '.join(differ)}. A folder may only be asked for more; "
                "choose another one (--out, in Python: out)."
            )
        return later.model_copy(update={"tasks": self.tasks | later.tasks, "weights": weights})


def _shrinks(task: str, old: TaskSelection, new: TaskSelection) -> Iterator[str]:
    if old.path is None and new.path is not None and task.removeprefix("own-") == task_name(Path(new.path)):
        old = old.model_copy(update={"path": new.path})  # `evaluate` did not note the path of a table once
    for name in ("path", "split", "fonts", "coarse_tokens", "answered"):
        before, after = getattr(old, name), getattr(new, name)
        written = name in ("path", "fonts") and None not in (before, after)
        if before != after and not (written and Path(before).resolve() == Path(after).resolve()):
            yield f"{name} {before!r} then, {after!r} now"
    if new.planned < old.planned:
        yield f"{old.planned} samples then, {new.planned} now"
    whole = new.planned + len(new.left_out) == new.total
    if (old.stratified and (old.total != new.total or not (new.stratified or whole))) or (
        new.stratified and not old.stratified
    ):
        yield "the samples of --limit are others than the first ones"


RowKey = tuple[str, int, int]
"""Task, place of the sample and repeat."""


class RowPlace(NamedTuple):
    """The place of a row on disk."""

    path: Path
    start: int
    """Of its line, in bytes."""


class RunFolder:
    """The files of a run. Reading never changes them."""

    def __init__(self, path: Path | str) -> None:
        self.path = Path(path)

    @classmethod
    def existing(cls, path: Path | str) -> Self:
        """Return a folder to read; raise ConfigError if there is no run in it."""
        folder = cls(path)
        with translating("read", path, _WRITTEN):
            if not (folder.path / "run.json").is_file():
                raise ConfigError(f"There is no run in {path}: it has no run.json. {_WRITTEN}")
        return folder

    # -- what is asked ---------------------------------------------------------------------------------------------

    @property
    def ask(self) -> RunSpec:
        return read_json(self.path / "run.json", RunSpec, _WRITTEN)

    @property
    def config(self) -> AgentConfig:
        return AgentConfig.load(self.path / "config.yaml")

    @property
    def ablations(self) -> dict[str, Self]:
        """The finished runs of the same questions under other policies, by the names of their folders."""
        found = sorted(path.parent for path in (self.path / "ablations").glob("*/results.json"))
        return {path.name: type(self)(path) for path in found}

    def begin(self, config: AgentConfig, ask: RunSpec, environment: Mapping[str, str]) -> None:
        """Write what is asked, or check it against what was.

        ConfigError if the folder holds another evaluation, or cannot be written.
        """
        require_folder(self.path)
        if (self.path / "run.json").exists():
            was = self.config
            # where all tasks set it, it is not kept
            if None in (was.budget.coarse_tokens, config.budget.coarse_tokens):
                sizes = {key: getattr(was.budget, key) or getattr(config.budget, key) for key in COARSE}
                was, config = was.replace(budget=sizes), config.replace(budget=sizes)
            differ = list(_differ(was.model_dump(mode="json"), config.model_dump(mode="json")))
            if differ:
                raise ConfigError(
                    f"{self.path} holds another run. Different: {'; '.join(differ)}. Choose another folder (--out, in "
                    "Python: out)."
                )
            ask = self.ask.grown(ask)
        self.write("config.yaml", config.to_yaml())
        self.write("run.json", ask.model_dump_json(indent=1) + "\n")
        known = self.environments() if (self.path / "env.json").exists() else []
        if dict(environment) not in known:
            known.append(dict(environment))
            self.write("env.json", json.dumps(known, indent=1, ensure_ascii=False) + "\n")

    def environments(self) -> list[dict[str, str]]:
        return read_json(self.path / "env.json", list[dict[str, str]], "Write [] into it: it only records machines.")

    # -- rows ------------------------------------------------------------------------------------------------------

    @contextmanager
    def writing(self) -> Iterator[None]:
        """Keep other processes from writing; raise ConfigError if one does, or the folder cannot be written.

        A killed process holds nothing.
        """
        with sole_writer(self.path, flag="--out"):
            for folder in (self.path, self.path / "traces", self.path / "traces" / "images"):
                remove_parts(folder)
            yield

    def newest(self, keep: Callable[[SampleResult], bool] = lambda _: True) -> dict[RowKey, RowPlace]:
        """Return the place of the newest row of each sample and repeat, if `keep` accepts that; `read` reads one."""
        found: dict[RowKey, RowPlace] = {}
        with self._opened() as files:
            for row, place in _rows_and_places(files):
                found.pop(key := (row.task, row.index, row.repeat), None)
                if keep(row):
                    found[key] = place
        return found

    def answers(self, task: str) -> dict[str, RowPlace]:
        """Return the place of an answer to each row of a table, by the row's digest."""
        with self._opened() as files:
            found = _rows_and_places(files)
            return {row.row: place for row, place in found if row.row and row.task == task and row.status != "error"}

    def read(self, place: RowPlace) -> SampleResult:
        """Return the row at a place that `newest` gave."""
        with translating("read", place.path, _WRITTEN), place.path.open("rb") as file:
            file.seek(place.start)
            return SampleResult.model_validate_json(file.readline())

    def in_order(self) -> Iterator[SampleResult]:
        """Yield the newest row of each sample and repeat, in the order of tasks, places and repeats, one at a time."""
        order = {name: place for place, name in enumerate(self.ask.tasks)}
        with self._opened() as files:  # as they are now: the process of the run may replace them meanwhile
            found = _rows_and_places(files)
            places = {(order[row.task], row.index, row.repeat): place for row, place in found if row.task in order}
            for _, place in sorted(places.items()):
                with translating("read", place.path, _WRITTEN):
                    files[place.path].seek(place.start)
                    line = files[place.path].readline()
                yield SampleResult.model_validate_json(line)

    def latest(self) -> list[SampleResult]:
        """Return the rows of `in_order` as a list."""
        return list(self.in_order())

    def by_task(self) -> dict[str, list[SampleResult]]:
        """Return the rows of each task that the run has begun."""
        found: dict[str, list[SampleResult]] = {}
        for row in self.in_order():
            found.setdefault(row.task, []).append(row)
        return found

    @contextmanager
    def _opened(self) -> Iterator[dict[Path, IO[bytes]]]:
        """Give the files of rows, open to read, by their paths, the oldest first."""
        with ExitStack() as stack:
            files: dict[Path, IO[bytes]] = {}
            for path in self._files():
                with translating("read", path, _WRITTEN):
                    files[path] = stack.enter_context(path.open("rb"))
            yield files

    def journal(self, rank: int | None = None) -> Journal:
        """Open the file to which this process appends its rows; `rank` if there are several."""
        return Journal(self.path / ("samples.jsonl" if rank is None else f"samples.{rank}.jsonl"))

    def replace_rows(self, rows: Iterable[SampleResult]) -> None:
        """Put these, which may be read from the folder meanwhile, in place of all there are, in one step."""
        with atomic_write(self.path / "samples.jsonl") as part, part.open("w", encoding="utf-8") as file:
            file.writelines(row.model_dump_json() + "\n" for row in rows)
        for path in self._files():
            if path.name != "samples.jsonl":
                with translating("write", path, _ANOTHER):
                    path.unlink()

    def merge(self) -> None:
        """Put the rows of several processes into one file, so that what is appended from now on is the newest."""
        if any(path.name != "samples.jsonl" for path in self._files()):
            self.replace_rows(self.in_order())

    def _files(self) -> list[Path]:
        # "samples.jsonl" sorts after "samples.0.jsonl", but it is the older: a merge puts everything there.
        return sorted(self.path.glob("samples*.jsonl"), key=lambda path: (path.name != "samples.jsonl", path.name))

    # -- traces ----------------------------------------------------------------------------------------------------

    def trace_path(self, key: str) -> Path:
        """Return the file of an episode's record. Raises ConfigError for a key that could leave the folder."""
        return self.path / "traces" / f"{self._plain(key)}.json"

    def picture_path(self, digest: str) -> Path:
        """Return the file of a picture. Raises ConfigError for a digest that could leave the folder."""
        return self.path / "traces" / "images" / f"{self._plain(digest)}.jpg"

    def _plain(self, name: str) -> str:
        if not _PLAIN.fullmatch(name):
            raise ConfigError(
                f"{name!r:.80} in {self.path} is neither a key nor a digest. The run was changed by hand."
            )
        return name

    def save_trace(self, key: str, answer: AnswerLike) -> None:
        """Write the record and its pictures; those that are there already are shared."""
        picture = by_digest(answer.trace.views, answer.store.image)
        for digest in {view.digest for view in answer.trace.views}:
            target = self.picture_path(digest)
            if not target.exists():
                small = picture(digest).copy()
                small.thumbnail((PICTURE_SIDE, PICTURE_SIDE))
                with atomic_write(target, tidy=False) as part:
                    small.save(part, format="JPEG", quality=_QUALITY)
        path = self.trace_path(key)
        with translating("write", path, _ANOTHER):
            path.parent.mkdir(parents=True, exist_ok=True)
            # In place: until its row is written, nobody looks for it, and a torn one is written again with its row.
            path.write_text(answer.trace.model_dump_json(), encoding="utf-8")

    def trace(self, key: str) -> Trace | None:
        """Return the record of an episode, or None if it was not kept."""
        path = self.trace_path(key)
        return Trace.load(path) if path.exists() else None

    # -- files -----------------------------------------------------------------------------------------------------

    def write(self, name: str, text: str) -> Path:
        """Write a file in one step; ConfigError if that is impossible."""
        return write_text(self.path / name, text)


def _rows_and_places(files: Mapping[Path, IO[bytes]]) -> Iterator[tuple[SampleResult, RowPlace]]:
    """Yield every row, oldest first; ConfigError for a line that is something else.

    One that is no JSON was torn by a kill, and its sample is simply asked again.
    """
    for path, file in files.items():
        start = 0
        with translating("read", path, _WRITTEN):
            for number, line in enumerate(file, 1):
                place, start = RowPlace(path, start), start + len(line)
                try:
                    yield SampleResult.model_validate_json(line), place
                except ValidationError as error:
                    if error.errors(include_input=False)[0]["type"] != "json_invalid":
                        raise ConfigError(
                            f"Line {number} of {path} is not the result of a sample: {first_fault(error)}. "
                            "Remove the line, then ask its sample again."
                        ) from None


class Journal:
    """Rows being appended, one flushed line each."""

    def __init__(self, path: Path) -> None:
        self._path = path
        with translating("write", path, _ANOTHER):
            self._file = path.open("ab+")
            # A killed run may have left half a line: closed here, so that the next row does not become part of it.
            if self._file.tell():
                self._file.seek(-1, os.SEEK_END)
                if self._file.read(1) != b"\n":
                    self._file.write(b"\n")

    def append(self, row: SampleResult) -> None:
        with translating("write", self._path, _ANOTHER):
            self._file.write(row.model_dump_json().encode() + b"\n")
            self._file.flush()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        with suppress(OSError):  # on a full disk, of what `append` has failed to write
            self._file.close()


def _differ(before: Mapping[str, Any], now: Mapping[str, Any], prefix: str = "") -> Iterator[str]:
    for key in now:
        old, new = before.get(key), now[key]
        if isinstance(old, Mapping) and isinstance(new, Mapping):
            yield from _differ(old, new, f"{prefix}{key}.")
        elif old != new:
            yield f"{prefix}{key}: {old!r} then, {new!r} now"


def fingerprint(model: str, branches: str | Path | None = None, *, base_only: bool = False) -> str | None:
    """Return a digest that changes when weights do; None for a model that is not a folder on this machine.

    `base_only` leaves out branches that lie beside the weights: what does not use them does not change with them.

    Of large files the size, the first and the last MiB are read: enough to tell one training run from another in a
    moment, whatever the weights weigh.
    """
    source = PRESETS[model].source if model in PRESETS else str(expanded(model))
    if not Path(source).is_dir():
        return None
    found = hashlib.sha256()
    if branches and not Path(branches).is_dir():
        from qzoom_agent.perception.hub import local_branches  # loads torch

        branches = local_branches(branches)
    for folder in (Path(source), Path(branches) if branches else None):
        for path in sorted(folder.rglob("*")) if folder else ():
            read = path.suffix in _KINDS and path.name != CALIBRATION  # which changes no answer
            if path.is_file() and read and not (base_only and path.stem == _BRANCHES):
                found.update(f"{path.name} {path.stat().st_size}\n".encode())
                with path.open("rb") as file:
                    found.update(file.read(_SIZE))
                    file.seek(max(file.tell(), path.stat().st_size - _SIZE))
                    found.update(file.read())
    return found.hexdigest()[:16]


def weights_of(config: AgentConfig, branches: str | Path | None = None) -> str | None:
    """Return the `fingerprint` of a configuration's model, joined to that of its perceiver, which has the branches."""
    if config.perceiver is None:
        return fingerprint(config.model, branches)
    both = (fingerprint(config.model), fingerprint(config.perceiver, branches))
    return "+".join(one or "unknown" for one in both) if any(both) else None


def weights_of_agent(agent: Any) -> str | None:
    """Return `weights_of` what an agent was loaded with, its branches included; None where that is unknown.

    Of a model behind a server, what the server tells of it beside its name (`ChatClient.fingerprint`).
    """
    client = getattr(getattr(agent, "backend", None), "client", None)
    if client is not None and agent.config.perceiver is None:
        told: str | None = getattr(client, "fingerprint", None)
        return told
    looks = getattr(getattr(agent, "perceiver", None) or agent, "backend", None)
    looks = getattr(looks, "backend", looks)  # of one in batches, the one inside
    return weights_of(agent.config, getattr(looks, "branches_from", None))


def environment(placement: str = "", *, command: str = "") -> dict[str, str]:
    """Return the day, versions, revision and machine.

    Args:
        placement: The backend's device and number format, and why.
        command: The command line that was run.
    """
    found = {"date": date.today().isoformat()} | describe_environment() | {"cores": str(os.cpu_count())}
    found |= {name: text for name, text in (("placement", placement), ("command", valid_unicode(command))) if text}
    done = subprocess.run(
        ["git", "-C", str(Path(__file__).resolve().parent), "describe", "--always", "--dirty"],
        capture_output=True,
        text=True,
        check=False,
    )
    return found | ({"revision": done.stdout.strip()} if done.returncode == 0 else {})
