"""V*Bench: small objects in large photographs (Wu and Xie 2023, arXiv 2312.14135).

191 multiple-choice questions: 115 about an attribute of one object, 76 about how two objects lie. Two layouts are read:
the hub's table, where the options stand in the question in a fixed order, and the authors' folders, one JSON beside
each picture with the boxes of the targets. There the right option comes first in every file; it is asked in an order
that is drawn from the file's name, since a model that always says A would otherwise be perfect.

The table's questions are asked as they are. lmms-eval (tasks/vstar_bench/utils.py, vstar_doc_to_text) writes "A. red"
where they say "(A) red", and repeats the instruction that they end with.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from random import Random
from typing import Final

from qzoom_agent.data.image_column import seen
from qzoom_agent.data.options import inline_options, letter, listed
from qzoom_agent.data.questions import LETTER, instructed
from qzoom_agent.data.rows import HubTable, Row, Rows, RowSamples, open_rows
from qzoom_agent.data.samples import Sample, TaskSource
from qzoom_agent.errors import ConfigError
from qzoom_agent.evaluation.scorers import choice
from qzoom_agent.evaluation.tasks.task import Task
from qzoom_agent.geometry import Box

NAME: Final = "vstar"
PLACE: Final = HubTable(("lmms-lab-encoder/vstar-bench", "lmms-lab/vstar-bench"))
COLUMNS: Final = ("image", "text", "category", "label", "question_id")
ORIGINAL: Final = "craigwu/vstar_bench"
"""The authors' repository of folders."""
_KINDS: Final = ("direct_attributes", "relative_position")
_PICTURES: Final = (".jpg", ".jpeg", ".png")


def load(source: TaskSource) -> RowSamples:
    """Return the samples; `source.path` may be the folder of the authors' layout, or its hub id."""
    folder = _original(source)
    if folder is not None:
        found = list(_files(folder))
        return RowSamples(
            Rows(str(folder), found, ("file", "category"), folder),
            partial(_from_file, folder),
            [row["category"] for row in found],
        )
    rows = open_rows(source, PLACE, COLUMNS)
    return RowSamples(rows, partial(_from_row, rows.folder), [row["category"] for row in rows.only("category")])


def _from_row(folder: Path | None, row: Row, index: int) -> Sample:
    image, cluster = seen(row["image"], folder)
    answer = str(row["label"]).strip().upper()
    return Sample(
        id=f"{NAME}-{row['category']}-{row['question_id']}",
        task=NAME,
        kind=row["category"],
        image=image,
        question=instructed(row["text"], LETTER),
        answer=answer,
        answers=(answer,),
        options=inline_options(row["text"]),
        cluster=cluster,
    )


def _original(source: TaskSource) -> Path | None:
    if source.path == ORIGINAL and not Path(ORIGINAL).exists():
        from huggingface_hub import snapshot_download

        try:
            return Path(snapshot_download(ORIGINAL, repo_type="dataset"))
        except Exception as error:  # the hub's client and its transports each raise their own
            raise ConfigError(f"Cannot fetch {ORIGINAL}: {error}. Give a local copy as the path.") from error
    folder = Path(source.path).expanduser() if source.path else None
    return folder if folder is not None and any((folder / kind).is_dir() for kind in _KINDS) else None


def _files(folder: Path) -> Iterator[Row]:
    for kind in _KINDS:
        for file in sorted((folder / kind).glob("*.json")):
            yield {"file": file, "category": kind}


def _from_file(folder: Path, row: Row, index: int) -> Sample:
    file, kind = row["file"], row["category"]
    name = f"{NAME}-{kind}-{file.stem}"
    try:
        said = json.loads(file.read_text(encoding="utf-8"))
        question, options, boxes = said["question"], list(said["options"]), [_box(*box) for box in said["bbox"]]
    except (ValueError, LookupError, TypeError) as error:
        raise ConfigError(
            f"{file} is not a question of V*Bench: {type(error).__name__}: {error}. Needed: question, options, bbox."
        ) from None
    picture = next((at for suffix in _PICTURES if (at := file.with_suffix(suffix)).is_file()), file.with_suffix(".jpg"))
    order = list(range(len(options)))
    Random(name).shuffle(order)
    shown = tuple(options[at] for at in order)
    answer = letter(order.index(0))
    image, cluster = seen(str(picture), None)
    return Sample(
        id=name,
        task=NAME,
        kind=kind,
        image=image,
        question=instructed(f"{question.rstrip()}\n{listed(shown)}", LETTER),
        answer=answer,
        boxes=tuple(boxes),
        answers=(answer,),
        options=shown,
        cluster=cluster,
        meta={"targets": list(said.get("target_object", []))},
    )


def _box(x: float, y: float, width: float, height: float) -> Box:
    """Return the box of the corner and size that the files give (penghao-wu/vstar, README.md: <x,y,w,h>)."""
    return Box(x, y, x + width, y + height)


VSTAR: Final = Task(
    name=NAME,
    title="V*Bench: attributes and positions of small objects in photographs (191, multiple choice)",
    load=load,
    scorers={"faithful": choice.vstar, "clean": choice.clean, "vlmevalkit": choice.kit},
    coarse_tokens=(512, 4096),
    sources=(*PLACE.ids, ORIGINAL),
    columns=COLUMNS,
)
