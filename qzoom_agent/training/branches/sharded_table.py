"""Tables that are expensive to make, written in parts: a run resumes after its last complete part.

With several processes (`accelerate launch`) the parts are shared among them, and all wait for the table. At the end the
parts become one table, and the folder one that `datasets.load_from_disk` reads.
"""

import os
import shutil
from collections.abc import Callable, Iterable, Mapping
from datetime import timedelta
from pathlib import Path
from typing import Any, Final

import torch
from accelerate import PartialState
from datasets import Dataset, concatenate_datasets, disable_progress_bars
from pydantic import BaseModel, JsonValue

from qzoom_agent.training.fingerprint import begin

PART: Final = 128
"""Rows of one part."""
FINISHED: Final = "state.json"
"""The file of a `datasets` folder that is written last."""


def together() -> PartialState:
    """Return the processes that share this run.

    They wait for each other for up to a day: one may still be making a part of a table when the others are done.
    """
    return PartialState(cpu=not torch.accelerator.is_available(), timeout=timedelta(days=1))


def launched_in_bfloat16() -> bool:
    """Return whether `accelerate launch` trains in bfloat16, which DeepSpeed requires the trainer to state as well."""
    return os.environ.get("ACCELERATE_MIXED_PRECISION") == "bf16"


def write_parts(
    folder: Path,
    count: int,
    rows: Callable[[range], Iterable[dict[str, Any]]],
    settings: Mapping[str, JsonValue],
    *,
    progress: str,
    kind: type[BaseModel] | None = None,
) -> Dataset:
    """Make a table, or the parts of it that are missing.

    Args:
        folder: Folder of the table.
        count: Number of rows.
        rows: Makes the rows of a range.
        settings: All settings that decide the rows.
        progress: Verb that is printed with the number of rows done ("labelled: 128 of 300").
        kind: Model of the settings, whose keys may be stored under their old names.

    Raises:
        ConfigError: `folder` holds a table that was made with other settings.
    """
    processes = together()
    made_with: dict[str, JsonValue] = {"count": count, **settings}
    begin(folder / "settings.json", made_with, made=folder, processes=processes, kind=kind)
    disable_progress_bars()  # of a fraction of a second, for every part
    if not (folder / FINISHED).exists():
        for part, start in enumerate(range(0, count, PART)):
            if part % processes.num_processes != processes.process_index:
                continue
            path, stop = folder / f"part-{part:05d}", min(start + PART, count)
            if not path.exists():
                writing = folder / f"writing-{part:05d}"
                Dataset.from_list(list(rows(range(start, stop)))).save_to_disk(str(writing))
                writing.rename(path)
                print(f"{progress}: {stop} of {count}", flush=True)
        processes.wait_for_everyone()
        if processes.is_main_process:
            _join(folder)
    if processes.is_main_process:
        for joined in folder.glob("part-*"):
            shutil.rmtree(joined)
    processes.wait_for_everyone()
    return Dataset.load_from_disk(str(folder))


def _join(folder: Path) -> None:
    """Make one table of the parts, which stay until it is complete."""
    parts = [Dataset.load_from_disk(str(part)) for part in sorted(folder.glob("part-*"))]
    writing = folder / "writing"
    concatenate_datasets(parts).save_to_disk(str(writing))
    for file in sorted(writing.iterdir(), key=lambda file: file.name == FINISHED):
        file.replace(folder / file.name)
    writing.rmdir()
