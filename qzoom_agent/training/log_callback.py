"""The log of a training run: one JSON line a logged step, which a resumed run continues from its checkpoint."""

import json
import time
from collections.abc import Callable, Mapping
from math import isfinite
from pathlib import Path
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from qzoom_agent.errors import BackendError
from qzoom_agent.files import atomic_write


class LogCallback(TrainerCallback):
    """Callback that appends the metrics of each logged step to a file and prints the most important ones."""

    printed: tuple[str, ...] = ("loss", "grad_norm", "learning_rate")
    """Metrics that are printed; those of held-out rows, `eval_...`, as well."""

    def __init__(self, path: Path) -> None:
        self.path, self.began = path, time.perf_counter()

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        if state.is_world_process_zero:
            for line in keep_lines(self.path, lambda line: line["step"] <= state.global_step):
                self.note(line)

    def on_log(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        logs = kwargs.get("logs") or {}
        norm = logs.get("grad_norm", 0.0)
        if norm is not None and not isfinite(norm) and not args.fp16:  # with 16-bit floats such steps are left out
            raise BackendError(
                f"The gradient of step {state.global_step} is not finite, so training diverged. Lower learning_rate, "
                "or raise warmup_steps, in another --output: checkpoints of this run may have diverged already."
            )
        held_out = any(name.startswith("eval_") for name in logs)
        if not state.is_world_process_zero or not (held_out or "loss" in logs):
            return  # the trainer's summary at the end has no step of its own
        # the rows of a trainer are those of all epochs, so its own count of epochs says nothing
        kept = {name: value for name, value in logs.items() if name != "epoch"}
        kept = {name: float(f"{value:.4g}") if isinstance(value, float) else value for name, value in kept.items()}
        minutes = round((time.perf_counter() - self.began) / 60, 1)
        when = {"minutes": minutes, "step": state.global_step, "of": state.max_steps}
        add_line(self.path, when | kept)
        names = [name for one in self.printed for name in (one, f"eval_{one}") if name in kept]
        print(json.dumps(when | {name.replace("zoom/", ""): kept[name] for name in names}), flush=True)
        for text in self.note(logs):
            print(f"warning at step {state.global_step}: {text}", flush=True)
            add_line(self.path, {"step": state.global_step, "warning": text})

    def note(self, logs: Mapping[str, Any]) -> list[str]:
        """Take in the metrics of a step, or those of one before a run was resumed; return new warnings."""
        return []


def add_line(path: Path, line: Mapping[str, Any]) -> None:
    """Append a line to a JSON-lines file."""
    with path.open("a", encoding="utf-8") as file:
        file.write(json.dumps(line) + "\n")


def keep_lines(path: Path, keep: Callable[[dict[str, Any]], bool]) -> list[dict[str, Any]]:
    """Drop the other lines of a JSON-lines file, and one that was cut off; return those that are kept."""
    found: list[dict[str, Any]] = []
    for text in path.read_text(encoding="utf-8").splitlines() if path.exists() else ():
        try:
            line = json.loads(text)
        except ValueError:  # being written when the run was killed
            continue
        if keep(line):
            found.append(line)
    if path.exists():
        with atomic_write(path) as part:
            part.write_text("".join(json.dumps(line) + "\n" for line in found), encoding="utf-8")
    return found
