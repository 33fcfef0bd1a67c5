"""Kill a command at random moments, start it again, and compare its end with that of an uninterrupted run.

    python evals/kills.py ask --kills 50
    python evals/kills.py grpo --kills 5 --seed 3        # a share of the kills: other seeds are other moments

Kinds: `ask` (`qzoom ask --save`), `threads` (`Agent.run(thread=...)`, then `resume`), `run` (`qzoom run` over 2,000
boards), `eval`, `branches` and `grpo`, all with nano, in a process forked from this one. It gets SIGKILL at a moment
drawn from the time that a whole run takes, or a share of it, and is started again in the same folder, until it ends by
itself. Exit code 1 if an end differs.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import random
import signal
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from importlib import resources
from pathlib import Path
from shutil import rmtree
from tempfile import TemporaryDirectory
from typing import Any, Final, NamedTuple

import yaml
from pyarrow import parquet

from qzoom_agent.agent import Agent
from qzoom_agent.cli.main import main as qzoom
from qzoom_agent.data.samples import TaskSource
from qzoom_agent.evaluation.tasks.catalog import find_task
from qzoom_agent.files import write_text

TIMES: Final = frozenset(
    [
        *("seconds", "act_seconds", "perceive_seconds", "phases", "elapsed", "samples_per_second", "peak_memory"),
        *("train_runtime", "train_samples_per_second", "train_steps_per_second"),
        *("id", "environment", "environments", "cached_tokens"),
    ]
)
"""Keys that a clock, the machine or a resumed session's cache decides."""
PICTURE: Final = str(resources.files("qzoom_agent.data") / "demo" / "3-hop.png")
QUESTION: Final = json.loads((resources.files("qzoom_agent.data") / "demo" / "questions.json").read_bytes())[2][
    "question"
]
ROWS: Final = 2000
FITTING: Final = {"per_device_train_batch_size": 4, "save_steps": 1, "logging_steps": 1, "dataloader_num_workers": 0}
BRANCHES: Final[dict[str, Any]] = {
    "model": "nano",
    "k": 5,
    "depth": 1,
    "gate_depth": 1,
    "stages": ["select-heads", "label", "sdrpn", "gate", "calibrate"],
    "data": [
        {
            "path": "needle",
            "limit": 64,
            "a_board": 8,
            "tasks": [f"needle-{kind}" for kind in ("scene", "doc", "global")],
        }
    ],
    "held_out": [{"path": "needle", "limit": 16, "a_board": 4, "seed": 1}],
    "heads": {"records": 8, "count": 2},
    "labelling": {"tokens": 100, "asking": "prediction", "keep": "all", "max_new_tokens": 8},
    "sdrpn": {"tokens": [48, 64], "optimisation": {"learning_rate": 1e-3, **FITTING}},
    "gate": {
        "tokens": [48, 100],
        "read_tokens": [48, 100],
        "with_crop": True,
        "records": 64,
        "max_new_tokens": 8,
        "optimisation": FITTING,
    },
}
GRPO: Final[dict[str, Any]] = {
    "model": "nano",
    "max_steps": 4,
    "prompts": 2,
    "num_generations": 4,
    "per_device_train_batch_size": 4,
    "needle": {"needle-hop": 0.5, "needle-scene": 0.5},
    "agent": {"policy": "explicit", "budget": {"max_turns": 3, "max_views": 3}, "generation": {"max_new_tokens": 12}},
    "rewards": [{"name": "accuracy"}, {"name": "format", "weight": 0.1}],
    "learning_rate": 2e-4,
    "from_layer": 5,
    "rollouts": {"by": "shared", "temperature": 1.2},
    "save_steps": 1,
}


class Kind(NamedTuple):
    """A command that can be started again."""

    go_on: Callable[[Path], int]
    """Start it in a folder, or start it again there; returns the exit code."""
    files: tuple[str, ...]
    """Patterns of the files in which its end is compared."""
    hits: int = 1
    """Kills of one run, about: the moments are drawn from this share of its time, and twice that."""


def _ask(folder: Path) -> int:
    return qzoom(["ask", PICTURE, QUESTION, "--policy", "explicit", "--save", str(folder), "-q"])


def _threads(folder: Path) -> int:
    with Agent.from_pretrained("nano", policy="explicit", state_dir=folder) as agent:
        known = agent.threads()
        answer = agent.resume("one") if known else agent.run(PICTURE, QUESTION, thread="one")
        (folder / "answer.json").write_text(answer.trace.model_dump_json(), encoding="utf-8")
        return 0 if agent.threads() == ["one"] and agent.resume("one").trace == answer.trace else 1


def _run(folder: Path) -> int:
    table = _boards(folder.parent / "boards")
    return qzoom(["run", str(table), "--out", str(folder), "--policy", "direct", "--budget", "48"])


def _boards(folder: Path) -> Path:
    """Return a table of questions about boards, drawn at the first call."""
    table = folder / "questions.jsonl"
    if not table.exists():
        folder.mkdir(parents=True, exist_ok=True)
        rows: list[dict[str, str]] = []
        for board in find_task("needle-scene").load(TaskSource(n=ROWS // 10, seed=9)):
            for cut in range(10):  # drawing a board takes longer than asking about it
                image, name = board.image.crop((cut, 0, *board.image.size)), f"{len(rows)}.png"
                image.save(folder / name, compress_level=1)
                rows.append({"image": name, "question": board.question})
        write_text(table, "".join(json.dumps(row) + "\n" for row in rows))
    return table


def _eval(folder: Path) -> int:
    return qzoom(["eval", "needle-scene", "needle-hop", "--n", "12", "--policy", "hybrid", "--out", str(folder)])


def _train(verb: str, recipe: dict[str, Any]) -> Callable[[Path], int]:
    def go_on(folder: Path) -> int:
        file = folder.with_suffix(".yaml")
        if not file.exists():
            file.write_text(yaml.safe_dump(recipe), encoding="utf-8")
        return qzoom(["train", verb, "--config", str(file), "--output", str(folder)])

    return go_on


KINDS: Final = {
    "ask": Kind(_ask, ("trace.json", "config.yaml", "images/*.png", "**/*.part")),
    "threads": Kind(_threads, ("answer.json", "one/*.png", "**/*.part")),
    "run": Kind(_run, ("results.parquet", "*.jsonl", "run.json", "config.yaml", "**/*.part"), hits=20),
    "eval": Kind(
        _eval,
        ("*.jsonl", "results.json", "run.json", "config.yaml", "traces/*.json", "traces/images/*", "**/*.part"),
    ),
    "branches": Kind(_train("branches", BRANCHES), ("*/final/*.safetensors", "*/final/*.json")),
    "grpo": Kind(_train("grpo", GRPO), ("final/*.safetensors", "final/*.json")),
}


def content(folder: Path, files: Sequence[str]) -> dict[str, Any]:
    """Return what was written, without times."""
    found: dict[str, Any] = {}
    for path in (path for pattern in files for path in folder.glob(pattern) if path.is_file()):
        data = path.read_bytes()
        if path.suffix in (".json", ".jsonl"):
            lines = data.splitlines() if path.suffix == ".jsonl" else [data]
            found[str(path.relative_to(folder))] = [_timeless(json.loads(line)) for line in lines]
        elif path.suffix == ".parquet":
            found[str(path.relative_to(folder))] = _timeless(parquet.read_table(path).to_pylist())
        else:
            found[str(path.relative_to(folder))] = data
    return found


def _timeless(value: Any) -> Any:
    if isinstance(value, dict):
        kept = {key: _timeless(each) for key, each in value.items() if key not in TIMES}
        if "cached_tokens" in value:  # a turn: a resumed session computes the whole conversation anew
            kept = {key: each for key, each in kept.items() if key not in ("visual_tokens", "token_layers")}
        return kept
    return [_timeless(each) for each in value] if isinstance(value, list) else value


def same(one: Any, other: Any) -> bool:
    """Return whether two contents are equal, numbers up to what a batch of other rows changes in them."""
    if isinstance(one, float) and isinstance(other, float):
        return math.isclose(one, other, rel_tol=1e-3, abs_tol=1e-4)
    if isinstance(one, dict) and isinstance(other, dict):
        return one.keys() == other.keys() and all(same(one[key], other[key]) for key in one)
    if isinstance(one, list) and isinstance(other, list):
        return len(one) == len(other) and all(map(same, one, other))
    return bool(one == other)


def _child(kind: Kind, folder: Path) -> int:
    """Fork a process that goes on with the command, and return its id."""
    child = os.fork()
    if child:
        return child
    code = 70
    try:
        log = os.open(folder.with_suffix(".log"), os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(log, 1)
        os.dup2(log, 2)
        code = kind.go_on(folder)
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def _kill_until_done(kind: Kind, folder: Path, longest: float, draw: random.Random, kills: int) -> int:
    """Kill the command again and again within `longest` seconds, at most `kills` times, until it ends; return how often
    it was hit.
    """
    hit = 0
    while True:
        child = _child(kind, folder)
        if hit < kills:
            time.sleep(draw.uniform(0, longest))
            os.kill(child, signal.SIGKILL)
        _, status = os.waitpid(child, 0)
        if not os.WIFSIGNALED(status):
            if status:
                raise SystemExit(f"The command ended with {os.waitstatus_to_exitcode(status)}, see {folder}.log")
            return hit
        hit += 1


def main(argv: Sequence[str] | None = None) -> int:
    """Kill a command as often as asked for, print the outcome, and return 1 if an end differs."""
    flags = argparse.ArgumentParser(description="Kill a command at random moments and compare its end.")
    flags.add_argument("kind", choices=KINDS)
    flags.add_argument("--kills", type=int, default=50)
    flags.add_argument("--seed", type=int, default=0, help="seed of the moments")
    flags.add_argument("--out", type=Path, help="keep all folders here (default: a temporary folder)")
    options = flags.parse_args(argv)
    kind, draw = KINDS[options.kind], random.Random(f"{options.kind} {options.seed}")
    import qzoom_agent.models.hf  # noqa: F401  (before the forks, so that each starts in a moment)

    with TemporaryDirectory() as temporary:
        out = options.out or Path(temporary)
        out.mkdir(parents=True, exist_ok=True)
        began = time.perf_counter()
        _kill_until_done(kind, out / "whole", 0.0, draw, kills=0)
        whole = time.perf_counter() - began
        expected = content(out / "whole", kind.files)
        hit, ends, different = 0, 0, 0
        while hit < options.kills:
            folder = out / f"killed{ends}"
            hit += _kill_until_done(kind, folder, whole * min(1, 2 / kind.hits), draw, options.kills - hit)
            ends += 1
            found = content(folder, kind.files)
            names = {name for name in {*expected, *found} if not same(expected.get(name), found.get(name))}
            different += bool(names)
            if names:
                print(f"{folder}: {', '.join(sorted(names))} differ", flush=True)
            elif options.out is None:
                rmtree(folder)
        print(
            f"{options.kind}: {hit} kills of a run of {whole:.1f} s, {ends} ends, {different} differ; "
            f"{len(expected)} files compared"
        )
    return int(different > 0)


if __name__ == "__main__":
    sys.exit(main())
