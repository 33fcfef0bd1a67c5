"""This process among several that share a run, as `accelerate launch` starts them.

    accelerate launch --multi_gpu --num_processes 4 -m qzoom_agent eval vstar --out runs/vstar

Each process asks every k-th sample and appends to its own file in the run folder, which all of them must see; process 0
merges. Every answer is the same as in one process, so a run may go on with another number of them.
"""

from __future__ import annotations

import os
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from datetime import timedelta
from typing import Any


@dataclass(frozen=True)
class Shard:
    """Process `index` of `count`; alone by default."""

    index: int = 0
    count: int = 1
    state: Any = None
    """accelerate's `PartialState`, where there are several."""

    @classmethod
    def launched(cls) -> Shard:
        """This process, as its launcher's environment says."""
        if int(os.environ.get("WORLD_SIZE", "1")) == 1:
            return cls()
        from accelerate import PartialState

        # They only wait for each other, which needs no accelerator (cpu=True) and may take the slowest of them hours
        # longer than the fastest: the usual ten minutes would end the run.
        state = PartialState(cpu=True, timeout=timedelta(days=14))
        return cls(state.process_index, state.num_processes, state)

    @property
    def device(self) -> str | None:
        """The accelerator that is this process's own, or "auto"; None where there is one process."""
        if self.state is None:
            return None
        from qzoom_agent.models.devices import accelerator

        return accelerator(self.state.local_process_index)

    def wait(self) -> None:
        """Until every process is here."""
        if self.state is not None:
            self.state.wait_for_everyone()

    def leads(self, guard: AbstractContextManager[None]) -> AbstractContextManager[None]:
        """`guard` in process 0, nothing in the others."""
        return guard if self.index == 0 else nullcontext()
