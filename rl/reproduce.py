"""`qzoom reproduce`: every stage from random weights to the tables, in one command that can be interrupted.

    qzoom reproduce rl/recipes/nano/all.yaml                     (hours: see the plan, which is printed first)
    qzoom reproduce rl/recipes/nano/all.yaml --plan              (only the plan)
    qzoom reproduce rl/recipes/nano/all.yaml --quick             (the whole chain at toy length, in minutes)

The file is a plain list of steps, and a step is a command line, run as its own process: what is done here is what one
would type. A step that has finished leaves `done/NAME.json` in the output folder and is skipped from then on; one that
was killed is started again, and goes on by itself where its stage can. Every word goes to `logs/NAME.log` too, and the
tables of steps marked `report` to `tables.md`. Steps that write figures into documents do so in copies of them.

In command lines {out} is the output folder, {documents} the folder of those copies, {NAME} the recipe of that name, and
the rest are the file's `values`. Recipes are rewritten with their `change` (a key `stages.*.steps` is set in every
stage), with --quick with their `quick` settings as well, and the values with those of `quick`.
"""

import argparse
import hashlib
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import groupby
from pathlib import Path
from string import Formatter
from typing import Any, Final

from pydantic import BaseModel, Field, model_validator
from yaml import YAMLError, safe_dump, safe_load

from qzoom_agent.errors import BackendError, ConfigError, finished
from qzoom_agent.models.presets import NANO_FOLDER
from qzoom_agent.training.recipe_io import Section, read_recipe

_PROGRAMS: Final = {"qzoom": [sys.executable, "-m", "qzoom_agent"], "python": [sys.executable]}
_GIVEN: Final = frozenset({"out", "documents", "bundled"})
"""Names that every file may use: two folders, and the model inside the package."""
_COPIES: Final = "documents"
_PATIENCE: Final = 30
"""Seconds that a step gets to end after it was told to."""


class RecipeFile(Section):
    """A recipe that steps use."""

    file: Path
    """Relative to the file that names it."""
    change: dict[str, Any] = Field(default_factory=dict)
    """What is changed in it, by dotted keys; `*` stands for every item of a list."""
    quick: dict[str, Any] = Field(default_factory=dict)
    """What --quick changes in it as well."""


class Documents(Section):
    """Files that steps write figures into."""

    root: Path
    """Folder of them, relative to the file that names it."""
    files: list[Path] = Field(min_length=1)
    """Relative to that folder; a copy lies as deep."""


class Step(Section):
    """One command."""

    name: str = Field(pattern=r"^[a-z][a-z0-9-]*$")
    run: str
    """A command line that begins with `qzoom` or `python`."""
    hours: float = Field(ge=0)
    """How long it takes, about, on one CPU core."""
    needs: str | None = None
    """What a step before makes only where there is something to do; if it is not there, this step is left out."""
    report: bool = False
    """The tables that it prints are part of `tables.md`."""

    @model_validator(mode="after")
    def _known_program(self) -> "Step":
        if next(iter(shlex.split(self.run)), None) not in _PROGRAMS:
            raise ValueError(f"a command begins with {' or '.join(_PROGRAMS)}; got {self.run!r}")
        return self


class Chain(Section):
    """The file."""

    recipes: dict[str, RecipeFile] = Field(default_factory=dict)
    values: dict[str, str | int | float] = Field(default_factory=dict)
    """What command lines may use."""
    quick: dict[str, str | int | float] = Field(default_factory=dict)
    """Values of --quick."""
    documents: Documents | None = None
    steps: list[Step] = Field(min_length=1)

    @model_validator(mode="after")
    def _consistent(self) -> "Chain":
        names = [step.name for step in self.steps]
        if len(set(names)) < len(names):
            raise ValueError(f"every step needs a name of its own; got {', '.join(names)}")
        known = {*_GIVEN, *self.recipes, *self.values}
        used = {name for step in self.steps for text in (step.run, step.needs or "") for name in _names(text)}
        if used - known:
            raise ValueError(f"commands use {', '.join(sorted(used - known))}, which is neither recipe nor value")
        if set(self.quick) - set(self.values):
            raise ValueError(f"quick has values that are none: {', '.join(sorted(set(self.quick) - set(self.values)))}")
        return self


def _names(text: str) -> set[str]:
    """What stands in braces."""
    return {name for _, name, _, _ in Formatter().parse(text) if name is not None}


class Done(BaseModel):
    """What a finished step leaves behind."""

    command: str
    digest: str
    """Of the command and the recipes it names."""
    seconds: float


class Command(BaseModel):
    """A step, ready to be run."""

    step: Step
    line: str
    """As one would type it."""
    digest: str
    needs: Path | None
    marker: Path
    log: Path

    @property
    def done(self) -> bool:
        """Whether it has finished before. Raises ConfigError if that was another command, or with another recipe."""
        if not self.marker.exists():
            return False
        before = Done.model_validate_json(self.marker.read_text(encoding="utf-8"))
        if before.digest != self.digest:
            raise ConfigError(
                f"The step '{self.step.name}' was done with another command or recipe ({before.command}). "
                f"Delete {self.marker} and what it wrote, or choose another --output."
            )
        return True


def load_chain(path: Path) -> Chain:
    """Read a recipe; see `read_recipe`."""
    return read_recipe(path, Chain)


def prepare(chain: Chain, folder: Path, output: Path, *, quick: bool) -> list[Command]:
    """The commands of a chain whose file is in `folder`; writes the recipes that are changed.

    Raises:
        ConfigError: a recipe cannot be read, or has no such key as is changed.
    """
    files = {name: folder / one.file for name, one in chain.recipes.items()}
    texts = {}
    for name, file in files.items():
        try:
            data = safe_load(file.read_text(encoding="utf-8"))
        except (OSError, UnicodeDecodeError, YAMLError) as error:
            raise ConfigError(f"Cannot read the recipe {file}: {error}.") from error
        one = chain.recipes[name]
        changes = {**one.change, **(one.quick if quick else {})}
        for key, value in changes.items():
            put(data, key, str(NANO_FOLDER) if value == "{bundled}" else value)
        texts[name] = safe_dump(data)
        if changes:
            files[name] = output / "recipes" / f"{name}.yaml"
            files[name].parent.mkdir(parents=True, exist_ok=True)
            files[name].write_text(safe_dump(data, sort_keys=False), encoding="utf-8")
    values: Mapping[str, Any] = {**chain.values, **(chain.quick if quick else {})}
    filled = {**values, **files, "out": output, "documents": output / _COPIES, "bundled": NANO_FOLDER}
    commands = []
    for step in chain.steps:
        line = step.run.format(**{name: shlex.quote(str(value)) for name, value in filled.items()})
        used = sorted(_names(step.run) & texts.keys())
        digest = hashlib.sha256("\0".join((line, *(texts[name] for name in used))).encode()).hexdigest()[:16]
        commands.append(
            Command(
                step=step,
                line=line,
                digest=digest,
                needs=None if step.needs is None else Path(step.needs.format(**filled)),
                marker=output / "done" / f"{step.name}.json",
                log=output / "logs" / f"{step.name}.log",
            )
        )
    return commands


def put(data: Any, key: str, value: Any) -> None:
    """Set a dotted key in nested mappings and lists; `*` is every item. The last key may be new, those before not.

    Raises:
        ConfigError: there is no such place.
    """
    first, _, rest = key.partition(".")
    if first == "*" and isinstance(data, list) and rest:
        for item in data:
            put(item, rest, value)
    elif isinstance(data, dict) and not rest:
        data[first] = value
    elif isinstance(data, dict) and first in data:
        put(data[first], rest, value)
    else:
        raise ConfigError(f"A recipe has no place '{key}' to change.")


def plan(commands: Sequence[Command], *, quick: bool) -> str:
    """What will be run, with what is expected of it."""
    lines = []
    width = max(len(command.step.name) for command in commands)
    for at, command in enumerate(commands, 1):
        hours = "minutes" if quick else f"{command.step.hours:g} h"
        lines.append(f"{at:>2}  {command.step.name:<{width}} {'done' if command.done else hours:<8} {command.line}")
    left = sum(command.step.hours for command in commands if not command.done)
    lines.append("in all a few minutes" if quick else f"still to do: about {round(left, 2):g} hours on one CPU core")
    return "\n".join(lines)


def execute(command: Command) -> None:
    """Run one command to its end, its words on the terminal and in its log; it is ended when this process is.

    Raises:
        BackendError: it failed.
    """
    program, *rest = shlex.split(command.line)
    command.log.parent.mkdir(parents=True, exist_ok=True)
    began = time.perf_counter()
    with command.log.open("a", encoding="utf-8") as log, _told_to_stop():
        began_at = log.tell()
        process = subprocess.Popen(
            [*_PROGRAMS[program], *rest], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace"
        )
        assert process.stdout is not None
        try:
            for line in process.stdout:
                log.write(line)
                print(line, end="", flush=True)
            code = process.wait()
        except BaseException:
            _end(process)
            raise
    if code:
        words = command.log.read_text(encoding="utf-8")[began_at:].strip().splitlines()
        raise BackendError(
            f"The step '{command.step.name}' ended with exit code {code}: {words[-1] if words else 'it said nothing'} "
            f"- see {command.log}; run the same command again to go on from here."
        )
    done = Done(command=command.line, digest=command.digest, seconds=time.perf_counter() - began)
    command.marker.parent.mkdir(parents=True, exist_ok=True)
    part = command.marker.with_suffix(".part")
    part.write_text(done.model_dump_json(indent=1) + "\n", encoding="utf-8")
    part.rename(command.marker)


@contextmanager
def _told_to_stop() -> Iterator[None]:
    """Makes an exception of SIGTERM, which else would end this process alone."""

    def stop(number: int, _: object) -> None:
        raise SystemExit(128 + number)

    before = signal.signal(signal.SIGTERM, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _end(process: subprocess.Popen[str]) -> None:
    process.terminate()
    try:
        process.wait(_PATIENCE)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()


def copy_documents(documents: Documents, folder: Path, output: Path) -> None:
    """Copy the documents of a chain whose file is in `folder`, unless they were copied before.

    Raises:
        ConfigError: one is not there.
    """
    for name in documents.files:
        source, copy = folder / documents.root / name, output / _COPIES / name
        if copy.exists():
            continue
        if not source.is_file():
            raise ConfigError(f"There is no {source} to write figures into. Run this from a checkout of the project.")
        copy.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(source, copy)


def write_tables(commands: Sequence[Command], file: Path) -> None:
    """What the steps marked `report` printed, under their commands."""
    parts = []
    for command in commands:
        if command.step.report and command.log.exists():
            lines = command.log.read_text(encoding="utf-8").splitlines()
            tables = ["\n".join(run) for is_table, run in groupby(lines, lambda line: line[:1] == "|") if is_table]
            parts.append("\n\n".join([f"## {command.step.name}\n\n`{command.line}`", *tables]))
    file.write_text("\n\n".join(parts) + "\n", encoding="utf-8")


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="qzoom reproduce", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("file", type=Path, help="list of steps (YAML)")
    parser.add_argument("--output", type=Path, help="folder of all that is written (default: runs/NAME of its folder)")
    parser.add_argument("--quick", action="store_true", help="the whole chain at toy length")
    parser.add_argument("--until", metavar="STEP", help="stop after this step")
    parser.add_argument("--plan", action="store_true", help="print the plan and stop")
    options = parser.parse_args(argv)
    chain = load_chain(options.file)
    names = [step.name for step in chain.steps]
    if options.until is not None and options.until not in names:
        raise ConfigError(f"There is no step '{options.until}'. The steps are: {', '.join(names)}.")
    name = options.file.resolve().parent.name + ("-quick" if options.quick else "")
    output = options.output or Path("runs") / f"reproduce-{name}"
    every = prepare(chain, options.file.parent, output, quick=options.quick)
    commands = every if options.until is None else every[: names.index(options.until) + 1]
    print(plan(commands, quick=options.quick), flush=True)
    if options.plan:
        return 0
    if chain.documents is not None:
        copy_documents(chain.documents, options.file.parent, output)
    for command in commands:
        if command.done:
            continue
        if command.needs is not None and not command.needs.exists():
            print(f"\n== {command.step.name}: left out, no step made {command.needs}", flush=True)
            continue
        print(f"\n== {command.step.name}\n$ {command.line}", flush=True)
        execute(command)
    output.mkdir(parents=True, exist_ok=True)
    write_tables(every, output / "tables.md")
    print(f"\nwritten {output / 'tables.md'}")
    if chain.documents is not None:
        print(f"and, with their figures, {', '.join(str(output / _COPIES / name) for name in chain.documents.files)}")
    return 0


if __name__ == "__main__":
    sys.exit(finished("qzoom reproduce", main))
