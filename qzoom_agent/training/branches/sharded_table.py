"""Tables that are expensive to make, written in parts: a run resumes after its last complete part.

With several processes (`accelerate launch`) the parts are shared among them, and all wait for the table. At the end the
parts become one table, and the folder one that `datasets.load_from_disk` reads.
"""

import os
import shutil
from collections.abc import Callable, Iterable, Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any, Final

import torch
from accelerate import PartialState
from datasets import Dataset, concatenate_datasets, disable_progress_bars

from qzoom_agent.training.branches.dataset import Record, Records, record_batches

PART: Final = 128
FINISHED: Final = "dataset_info.json"
"""The file of a `datasets` folder that is written last."""


def together() -> PartialState:
    """Return the processes that share this run, which wait for each other's parts of a table for up to a day."""
    return PartialState(cpu=not torch.accelerator.is_available(), timeout=timedelta(days=1))


def say(text: str) -> None:
    """Print a line, in one of the processes that share this run."""
    if together().is_main_process:
        print(text, flush=True)


def launched_in_bfloat16() -> bool:
    """Return whether `accelerate launch` trains in bfloat16, which DeepSpeed requires the trainer to state as well."""
    return os.environ.get("ACCELERATE_MIXED_PRECISION") == "bf16"


def write_parts(
    folder: Path, count: int, rows: Callable[[range], Iterable[dict[str, Any]]], *, progress: str
) -> Dataset:
    """Make a table, or the parts of it that are missing. The caller checks the settings that it is made with.

    Args:
        progress: Verb that is printed with the number of rows done ("labelled: 128 of 300").
    """
    processes = together()
    disable_progress_bars()  # of a fraction of a second, for every part
    paths = [folder / f"part-{part:05d}" for part in range(-(-count // PART))]
    if not (folder / FINISHED).exists():
        for part in range(processes.process_index, len(paths), processes.num_processes):
            start, stop = part * PART, min((part + 1) * PART, count)
            if not paths[part].exists():
                writing = folder / f"writing-{part:05d}"
                Dataset.from_list(list(rows(range(start, stop)))).save_to_disk(str(writing))
                writing.rename(paths[part])
                print(f"{progress}: {stop} of {count}", flush=True)
        processes.wait_for_everyone()
        if processes.is_main_process:
            concatenate_datasets([Dataset.load_from_disk(str(path)) for path in paths]).save_to_disk(str(folder))
    if processes.is_main_process:  # parts stay until the table is complete
        for path in paths:
            shutil.rmtree(path, ignore_errors=True)
    processes.wait_for_everyone()
    return Dataset.load_from_disk(str(folder))


def write_table(
    folder: Path,
    records: Records,
    rows: Callable[[range, list[Record]], Iterable[dict[str, Any]]],
    *,
    batch: int,
    progress: str,
) -> Dataset:
    """Make a table with a row for each record, which begins with its index (`row`) and `image_id`; see `write_parts`.

    `rows` makes the further columns of some records, in order, from their indices and themselves.
    """

    def part(indices: range) -> Iterator[dict[str, Any]]:
        for chosen, some in record_batches(records, indices, batch):
            for index, record, row in zip(chosen, some, rows(chosen, some), strict=True):
                yield {"row": index, "image_id": record.cluster, **row}

    return write_parts(folder, len(records), part, progress=progress)
