"""Reproduce nano: every stage from random weights to the published tables.

    python rl/reproduce.py rl/recipes/nano/all.yaml             (hours: the plan is printed first)
    python rl/reproduce.py rl/recipes/nano/all.yaml --plan      (only the plan)
    python rl/reproduce.py rl/recipes/nano/all.yaml --quick     (the whole chain at toy length, in minutes)

The file lists steps, each a command line that runs as its own process; start this in the root of the checkout. A
finished step leaves `done/NAME.json` in the output folder and is skipped from then on; a killed one is started again,
and resumes where its stage can. All output goes to `logs/NAME.log` too, the tables of steps marked `report` to
`tables.md`, and figures into copies of the documents.

In command lines {out} is the output folder, {documents} the folder of those copies, {bundled} the model inside the
package, {NAME} the recipe of that name; the rest are the file's `values`. Recipes are rewritten with their `change`,
and with --quick with their `quick` as well.
"""

import argparse
import hashlib
import json
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import groupby
from pathlib import Path
from string import Formatter
from typing import Any, Final

from pydantic import BaseModel, Field, model_validator
from yaml import YAMLError, safe_dump, safe_load

from qzoom_agent.errors import BackendError, ConfigError, finished
from qzoom_agent.files import write_text
from qzoom_agent.models.presets import NANO_FOLDER
from qzoom_agent.training.recipe_io import Section, read_recipe

_PROGRAMS: Final = {"qzoom": [sys.executable, "-m", "qzoom_agent"], "python": [sys.executable]}
_PATIENCE: Final = 30
"""Seconds that a step gets to end after it was told to."""


class RecipeFile(Section):
    """A recipe that steps use."""

    file: Path
    """Relative to the file that names it."""
    change: dict[str, Any] = Field(default_factory=dict)
    """Changes to it, by dotted keys; `*` stands for every item of a list."""
    quick: dict[str, Any] = Field(default_factory=dict)
    """Further changes with --quick."""


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
    """Rough duration on one CPU core."""
    needs: str | None = None
    """A path that an earlier step writes only if there is something to do; without it this step is left out."""
    report: bool = False
    """True if the tables that it prints are part of `tables.md`."""

    @model_validator(mode="after")
    def _known_program(self) -> "Step":
        if next(iter(shlex.split(self.run)), None) not in _PROGRAMS:
            raise ValueError(f"a command begins with {' or '.join(_PROGRAMS)}; got {self.run!r}")
        return self


class Chain(Section):
    """The file."""

    recipes: dict[str, RecipeFile] = Field(default_factory=dict)
    values: dict[str, str | int | float] = Field(default_factory=dict)
    """Further names that command lines may use."""
    quick: dict[str, str | int | float] = Field(default_factory=dict)
    """Values of --quick."""
    documents: Documents | None = None
    steps: list[Step] = Field(min_length=1)

    @model_validator(mode="after")
    def _consistent(self) -> "Chain":
        names = [step.name for step in self.steps]
        if len(set(names)) < len(names):
            raise ValueError(f"every step needs a name of its own; got {', '.join(names)}")
        used = {name for step in self.steps for name in _names(f"{step.run} {step.needs or ''}")}
        if unknown := used - {"out", "documents", "bundled", *self.recipes, *self.values}:
            raise ValueError(f"commands use {', '.join(sorted(unknown))}, which is neither recipe nor value")
        if unknown := set(self.quick) - set(self.values):
            raise ValueError(f"quick has values that are none: {', '.join(sorted(unknown))}")
        return self


def _names(text: str) -> set[str]:
    """Return the names in braces."""
    return {name for _, name, _, _ in Formatter().parse(text) if name is not None}


class Command(BaseModel):
    """A step, ready to be run."""

    step: Step
    line: str
    digest: str
    """Of the command line and the recipes in it."""
    needs: Path | None
    marker: Path
    log: Path

    @property
    def done(self) -> bool:
        """True if the step has finished before.

        Raises:
            ConfigError: It was another command, or had another recipe.
        """
        if not self.marker.exists():
            return False
        before = json.loads(self.marker.read_text(encoding="utf-8"))
        if before["digest"] != self.digest:
            raise ConfigError(
                f"The step '{self.step.name}' was done with another command or recipe ({before['command']}). "
                f"Delete {self.marker} and what it wrote, or choose another --output."
            )
        return True


def load_chain(path: Path) -> Chain:
    """Read the list of steps; see `read_recipe`."""
    return read_recipe(path, Chain)


def prepare(chain: Chain, folder: Path, output: Path, *, quick: bool) -> list[Command]:
    """Return the commands of a chain, and write the recipes that are changed.

    Args:
        chain: Read from a file.
        folder: The folder of that file.
        output: Gets everything.
        quick: Make it short.

    Raises:
        ConfigError: A recipe cannot be read, or has no such key as is changed.
    """
    files = {name: folder / one.file for name, one in chain.recipes.items()}
    texts = {}
    for name, one in chain.recipes.items():
        try:
            data = safe_load(files[name].read_text(encoding="utf-8"))
        except (OSError, UnicodeDecodeError, YAMLError) as error:
            raise ConfigError(f"Cannot read the recipe {files[name]}: {error}.") from error
        changes = {**one.change, **(one.quick if quick else {})}
        for key, value in changes.items():
            put(data, key, str(NANO_FOLDER) if value == "{bundled}" else value)
        texts[name] = safe_dump(data)
        if changes:
            files[name] = output / "recipes" / f"{name}.yaml"
            files[name].parent.mkdir(parents=True, exist_ok=True)
            write_text(files[name], safe_dump(data, sort_keys=False))
    values: dict[str, Any] = {**chain.values, **(chain.quick if quick else {}), **files}
    values |= {"out": output, "documents": output / "documents", "bundled": NANO_FOLDER}
    commands = []
    for step in chain.steps:
        line = step.run.format(**{name: shlex.quote(str(value)) for name, value in values.items()})
        recipes = [texts[name] for name in sorted(_names(step.run) & texts.keys())]
        commands.append(
            Command(
                step=step,
                line=line,
                digest=hashlib.sha256("\0".join((line, *recipes)).encode()).hexdigest()[:16],
                needs=None if step.needs is None else Path(step.needs.format(**values)),
                marker=output / "done" / f"{step.name}.json",
                log=output / "logs" / f"{step.name}.log",
            )
        )
    return commands


def put(data: Any, key: str, value: Any) -> None:
    """Set a dotted key in nested mappings and lists; `*` is every item. Only the last key may be new.

    Raises:
        ConfigError: There is no such place.
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
    """Return the steps with their durations, as lines of text."""
    lines = []
    width = max(len(command.step.name) for command in commands)
    for at, command in enumerate(commands, 1):
        hours = "minutes" if quick else f"{command.step.hours:g} h"
        lines.append(f"{at:>2}  {command.step.name:<{width}} {'done' if command.done else hours:<8} {command.line}")
    left = sum(command.step.hours for command in commands if not command.done)
    lines.append("in all a few minutes" if quick else f"still to do: about {round(left, 2):g} hours on one CPU core")
    return "\n".join(lines)


def execute(command: Command) -> None:
    """Run one command to its end, its output on the terminal and in its log; it is ended when this process is.

    Raises:
        BackendError: It failed.
    """
    program, *rest = shlex.split(command.line)
    command.log.parent.mkdir(parents=True, exist_ok=True)
    began, last = time.perf_counter(), "it printed nothing"
    with command.log.open("a", encoding="utf-8") as log, _terminated_as_exception():
        process = subprocess.Popen(
            [*_PROGRAMS[program], *rest], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace"
        )
        assert process.stdout is not None
        try:
            for line in process.stdout:
                log.write(line)
                print(line, end="", flush=True)
                last = line.strip() or last
            code = process.wait()
        except BaseException:
            process.terminate()
            try:
                process.wait(_PATIENCE)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
            raise
    if code:
        raise BackendError(
            f"The step '{command.step.name}' ended with exit code {code}: {last} - see {command.log}; run the same "
            "command again to resume from here."
        )
    done = {"command": command.line, "digest": command.digest, "seconds": time.perf_counter() - began}
    command.marker.parent.mkdir(parents=True, exist_ok=True)
    part = command.marker.with_suffix(".part")
    part.write_text(json.dumps(done, indent=1) + "\n", encoding="utf-8")
    part.rename(command.marker)  # so that a marker is whole or not there


@contextmanager
def _terminated_as_exception() -> Iterator[None]:
    """Raise SystemExit on SIGTERM, which would otherwise end this process and not its step."""

    def stop(number: int, _: object) -> None:
        raise SystemExit(128 + number)

    before = signal.signal(signal.SIGTERM, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def copy_documents(documents: Documents, folder: Path, target: Path) -> None:
    """Copy the documents of a chain, except those that were copied before.

    Args:
        documents: With paths relative to `folder`.
        folder: The folder of the chain's file.
        target: Gets the copies.

    Raises:
        ConfigError: One is not there.
    """
    for name in documents.files:
        source, copy = folder / documents.root / name, target / name
        if copy.exists():
            continue
        if not source.is_file():
            raise ConfigError(f"There is no {source} to write figures into. Run this from a checkout of the project.")
        copy.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(source, copy)


def write_tables(commands: Sequence[Command], file: Path) -> None:
    """Write the tables of the steps marked `report`, under their commands."""
    parts = []
    for command in commands:
        if command.step.report and command.log.exists():
            lines = command.log.read_text(encoding="utf-8").splitlines()
            tables = ["\n".join(run) for is_table, run in groupby(lines, lambda line: line[:1] == "|") if is_table]
            parts.append("\n\n".join([f"## {command.step.name}\n\n`{command.line}`", *tables]))
    file.write_text("\n\n".join(parts) + "\n", encoding="utf-8")


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("file", type=Path, help="list of steps (YAML)")
    parser.add_argument("--output", type=Path, help="folder for all results (default: runs/reproduce-FOLDER)")
    parser.add_argument("--quick", action="store_true", help="the whole chain at toy length")
    parser.add_argument("--until", metavar="STEP", help="stop after this step")
    parser.add_argument("--plan", action="store_true", help="print the plan and stop")
    options = parser.parse_args(argv)
    chain, folder = load_chain(options.file), options.file.parent
    names = [step.name for step in chain.steps]
    if options.until is not None and options.until not in names:
        raise ConfigError(f"There is no step '{options.until}'. The steps are: {', '.join(names)}.")
    name = options.file.resolve().parent.name + ("-quick" if options.quick else "")
    output = options.output or Path("runs") / f"reproduce-{name}"
    every = prepare(chain, folder, output, quick=options.quick)
    commands = every if options.until is None else every[: names.index(options.until) + 1]
    print(plan(commands, quick=options.quick), flush=True)
    if options.plan:
        return 0
    if chain.documents is not None:
        copy_documents(chain.documents, folder, output / "documents")
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
        print(
            f"and, with their figures, {', '.join(str(output / 'documents' / name) for name in chain.documents.files)}"
        )
    return 0


if __name__ == "__main__":
    sys.exit(finished("reproduce", main))
