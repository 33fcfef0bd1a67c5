"""`python killing.py STEP train-arguments...`: a stage with answers that are made up, killed at a checkpoint."""

import os
import signal
import sys
from collections.abc import Callable
from typing import Any

from qzoom_agent.training.branches import fitting as stage
from qzoom_agent.training.branches import gate
from qzoom_agent.training.branches import stages as run

Set = Callable[[object, str, Any], None]


def make_up(put: Set) -> None:
    """At toy length nano reads nothing: every other question needs more detail, and every crop hurts."""
    real = gate.write_table

    def write_table(folder: Any, records: Any, rows: Any, **how: Any) -> Any:
        patterns = ([False, True, True], [True, True, True])

        def made(chosen: range, some: Any) -> list[dict[str, Any]]:
            return [{**row, "right": patterns[at % 2]} for at, row in zip(chosen, rows(chosen, some), strict=True)]

        return real(folder, records, made, **how)

    def choose_cases(cases: Any, *args: Any, **kwargs: Any) -> list[int]:
        return [at for at, box in enumerate(cases["box"]) if box]

    put(gate, "write_table", write_table)
    put(run, "choose_cases", choose_cases)


def die_at(step: int) -> None:
    """Of SIGKILL, as soon as the checkpoint of this step is whole."""

    def on_save(self: Any, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == step:
            os.kill(os.getpid(), signal.SIGKILL)

    stage.LogCallback.on_save = on_save  # type: ignore[method-assign]


if __name__ == "__main__":
    make_up(setattr)
    die_at(int(sys.argv[1]))
    sys.exit(run.main(sys.argv[2:]))
