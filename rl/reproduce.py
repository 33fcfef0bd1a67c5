"""Reproduce nano: every stage from random weights to the published tables.

    python rl/reproduce.py rl/recipes/nano/all.yaml             (hours: the plan is printed first)
    python rl/reproduce.py rl/recipes/nano/all.yaml --plan      (only the plan)
    python rl/reproduce.py rl/recipes/nano/all.yaml --quick     (the whole chain at toy length, in minutes)

The file lists steps, each a command line that runs as its own process; start this in the root of the checkout. A
finished step leaves `done/NAME.json` in the output folder and is skipped from then on; a killed one is started again,
and resumes where its stage can. All output goes to `logs/NAME.log` too, the tables of steps marked `report` to
`tables.md`, and figures into copies of the documents.
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
from collections.abc import Sequence
from itertools import groupby
from pathlib import Path
from typing import Any, NamedTuple

from pydantic import Field
from yaml import safe_dump

from qzoom_agent.errors import BackendError, ConfigError, finished
from qzoom_agent.files import atomic_write, read_yaml, require_file, write_text
from qzoom_agent.models.presets import NANO_FOLDER
from qzoom_agent.training.recipe_io import Section, read_recipe

PROGRAMS = {"qzoom": [sys.executable, "-m", "qzoom_agent"], "python": [sys.executable]}


class RecipeFile(Section):
    """A recipe that steps use."""

    file: Path
    """Relative to the file that names it."""
    change: dict[str, Any] = Field(default={})
    """Changes to it, by dotted keys; `*` stands for every item of a list."""
    quick: dict[str, Any] = Field(default={})
    """Further changes with --quick."""


class Step(Section):
    """One command."""

    name: str = Field(pattern=r"^[a-z][a-z0-9-]*$")
    run: str = Field(pattern=r"^(qzoom|python)\b")
    """A command line. In it {out} is the output folder, {documents} the folder of the copied documents, {bundled} the
    model inside the package, {NAME} the recipe or the value of that name."""
    hours: float = Field(ge=0)
    """Rough duration on one CPU core."""
    needs: str | None = None
    """A path that an earlier step writes only if there is something to do; without it this step is left out."""
    report: bool = False
    """True if the tables that it prints are part of `tables.md`."""


class Chain(Section):
    """The file."""

    recipes: dict[str, RecipeFile] = Field(default={})
    values: dict[str, str | int | float] = Field(default={})
    """Further names that command lines may use."""
    quick: dict[str, str | int | float] = Field(default={})
    """Values of --quick."""
    documents: list[Path] = Field(default=[])
    """Files of the checkout that steps write figures into: copies of them."""
    steps: list[Step] = Field(min_length=1)


class Command(NamedTuple):
    """A step, ready to be run."""

    step: Step
    line: str
    digest: str
    """Of the command line and the recipes in it."""
    needs: Path | None
    output: Path

    @property
    def done(self) -> bool:
        """True if the step has finished before. Raises ConfigError if it was another command or recipe then."""
        marker = self.output / "done" / f"{self.step.name}.json"
        before = json.loads(marker.read_text(encoding="utf-8")) if marker.exists() else None
        if before is not None and before["digest"] != self.digest:
            raise ConfigError(
                f"The step '{self.step.name}' was done with another command or recipe ({before['command']}). "
                f"Delete {marker} and what it wrote, or choose another --output."
            )
        return before is not None


def prepare(chain: Chain, folder: Path, output: Path, *, quick: bool) -> list[Command]:
    """Return the commands of a chain, and write the recipes that are changed.

    Args:
        chain: Read from a file.
        folder: The folder of that file.
        output: Gets everything.
        quick: Make it short.

    Raises:
        ConfigError: A recipe cannot be read or has no such key as is changed, or a command names what is not there.
    """
    values: dict[str, Any] = chain.values | (chain.quick if quick else {})
    values |= {"out": output, "documents": output / "documents", "bundled": NANO_FOLDER}
    recipes = {}
    for name, one in chain.recipes.items():
        values[name] = folder / one.file
        try:
            data = read_yaml(values[name].read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise ConfigError(f"Cannot read the recipe {values[name]}: {error}.") from error
        if changes := one.change | (one.quick if quick else {}):
            for key, value in changes.items():
                put(data, key, str(NANO_FOLDER) if value == "{bundled}" else value)
            values[name] = write_text(output / "recipes" / f"{name}.yaml", safe_dump(data, sort_keys=False))
        recipes[name] = safe_dump(data)
    quoted = {name: shlex.quote(str(value)) for name, value in values.items()}
    commands: dict[str, Command] = {}
    for step in chain.steps:
        try:
            line = step.run.format(**quoted)
            needs = None if step.needs is None else Path(step.needs.format(**values))
        except LookupError as error:
            raise ConfigError(f"The step '{step.name}' names {error}, which is neither recipe nor value.") from None
        used = [text for name, text in sorted(recipes.items()) if f"{{{name}}}" in step.run]
        digest = hashlib.sha256("\0".join((line, *used)).encode()).hexdigest()[:16]
        if step.name in commands:
            raise ConfigError(f"Every step needs a name of its own; '{step.name}' comes twice.")
        commands[step.name] = Command(step, line, digest, needs, output)
    return list(commands.values())


def put(data: Any, key: str, value: Any) -> None:
    """Set a dotted key in nested mappings and lists; `*` is every item. Only the last key may be new."""
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


def execute(command: Command) -> None:
    """Run one command to its end, its output on the terminal and in its log. Raises BackendError if it fails."""
    name, (program, *rest) = command.step.name, shlex.split(command.line)
    print(f"\n== {name}\n$ {command.line}", flush=True)
    file = require_file(command.output / "logs" / f"{name}.log")
    began, last = time.perf_counter(), "it printed nothing"
    with (
        file.open("a", encoding="utf-8") as log,
        subprocess.Popen(
            [*PROGRAMS[program], *rest], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace"
        ) as process,
    ):
        log.write(f"$ {command.line}\n")
        assert process.stdout is not None
        try:
            for line in process.stdout:
                log.write(line)
                print(line, end="", flush=True)
                last = line.strip() or last
        except BaseException:
            process.terminate()
            raise
    if process.returncode:
        raise BackendError(
            f"The step '{name}' ended with exit code {process.returncode}: {last} - see {file}; run the same command "
            "again to resume from here."
        )
    done = {"command": command.line, "digest": command.digest, "seconds": time.perf_counter() - began}
    marker = command.output / "done" / f"{name}.json"
    marker.parent.mkdir(parents=True, exist_ok=True)
    with atomic_write(marker) as part:
        part.write_text(json.dumps(done, indent=1) + "\n", encoding="utf-8")


def print_plan(commands: Sequence[Command], *, quick: bool) -> None:
    for at, command in enumerate(commands, 1):
        hours = "minutes" if quick else f"{command.step.hours:g} h"
        print(f"{at:>2}  {command.step.name:<24} {'done' if command.done else hours:<8} {command.line}")
    left = sum(command.step.hours for command in commands if not command.done)
    print("in all a few minutes" if quick else f"still to do: about {round(left, 2):g} hours on one CPU core")


def tables_of(commands: Sequence[Command], output: Path) -> str:
    """Return the tables that steps have printed, under their names and commands."""
    parts = []
    for step, line, *_ in commands:
        log = output / "logs" / f"{step.name}.log"
        if step.report and log.exists():
            # a step that was started again printed its tables anew
            lines = log.read_text(encoding="utf-8").rpartition(f"$ {line}\n")[2].splitlines()
            found = ["\n".join(run) for is_table, run in groupby(lines, lambda text: text[:1] == "|") if is_table]
            parts.append("\n\n".join([f"## {step.name}\n\n`{line}`", *found]))
    return "\n\n".join(parts) + "\n"


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("file", type=Path, help="list of steps (YAML)")
    parser.add_argument("--output", type=Path, help="folder for all results (default: runs/reproduce-FOLDER)")
    parser.add_argument("--quick", action="store_true", help="the whole chain at toy length")
    parser.add_argument("--until", metavar="STEP", help="stop after this step")
    parser.add_argument("--plan", action="store_true", help="print the plan and stop")
    options = parser.parse_args(argv)
    chain = read_recipe(options.file, Chain)
    name = options.file.resolve().parent.name + ("-quick" if options.quick else "")
    output = options.output or Path("runs") / f"reproduce-{name}"
    every = prepare(chain, options.file.parent, output, quick=options.quick)
    names = [command.step.name for command in every]
    if options.until not in (None, *names):
        raise ConfigError(f"There is no step '{options.until}'. The steps are: {', '.join(names)}.")
    commands = every[: names.index(options.until) + 1] if options.until else every

    print_plan(commands, quick=options.quick)
    if options.plan:
        return 0

    for document in chain.documents:
        copy = output / "documents" / document
        if not document.is_file():
            raise ConfigError(f"There is no {document} to write figures into. Start this in the root of the checkout.")
        if not copy.exists():
            copy.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(document, copy)
    before = signal.signal(signal.SIGTERM, lambda number, _: sys.exit(128 + number))  # ends the running step as well
    try:
        for command in commands:
            if command.needs is not None and not command.needs.exists():
                print(f"\n== {command.step.name}: left out, no step made {command.needs}", flush=True)
            elif not command.done:
                execute(command)
    finally:
        signal.signal(signal.SIGTERM, before)

    print(f"\nwritten {write_text(output / 'tables.md', tables_of(every, output))}")
    for document in chain.documents:
        print(f"and, with its figures, {output / 'documents' / document}")
    return 0


if __name__ == "__main__":
    sys.exit(finished("reproduce", main))
