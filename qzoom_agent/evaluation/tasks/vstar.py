"""V*Bench: small objects in large photographs (Wu and Xie 2023, arXiv 2312.14135).

191 multiple-choice questions: 115 about an attribute of one object, 76 about how two objects lie. Two layouts are read:
the hub's table, where the options stand in the question in a fixed order, and the authors' folders, one JSON beside
each picture with the boxes of the targets. There the right option comes first in every file; it is asked in an order
that is drawn from the file's name, since a model that always says A would otherwise be perfect.

The table's questions are asked as they are. lmms-eval (tasks/vstar_bench/utils.py, vstar_doc_to_text) writes "A. red"
where they say "(A) red", and repeats the instruction that they end with.
"""

import json
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from random import Random
from typing import Final

from qzoom_agent.data.options import inline_options, letter, listed
from qzoom_agent.data.questions import LETTER, instructed
from qzoom_agent.data.rows import ComputedRows, HubTable, Row, Rows, RowSamples
from qzoom_agent.data.samples import TaskSource
from qzoom_agent.errors import ConfigError
from qzoom_agent.evaluation.scorers import choice
from qzoom_agent.evaluation.tasks.public import Asked, Benchmark, one_letter
from qzoom_agent.files import expanded
from qzoom_agent.geometry import Box

ORIGINAL: Final = "craigwu/vstar_bench"
"""The authors' repository of folders."""
_KINDS: Final = ("direct_attributes", "relative_position")
_PICTURES: Final = (".jpg", ".jpeg", ".png")


def load(source: TaskSource) -> RowSamples:
    """Return the samples; `source.path` may be the folder of the authors' layout, or its hub id."""
    folder = _original(source)
    if folder is None:
        return VSTAR_BENCH.load(source)
    files = [(kind, file) for kind in _KINDS for file in sorted((folder / kind).glob("*.json"))]
    rows = ComputedRows(len(files), partial(_read, files))
    return VSTAR_BENCH.samples(
        Rows(str(folder), rows, VSTAR_BENCH.columns, folder), source, [kind for kind, _ in files]
    )


def _original(source: TaskSource) -> Path | None:
    if source.path == ORIGINAL and not Path(ORIGINAL).exists():
        from huggingface_hub import snapshot_download

        try:
            return Path(snapshot_download(ORIGINAL, repo_type="dataset"))
        except Exception as error:  # the hub's client and its transports each raise their own
            raise ConfigError(f"Cannot fetch {ORIGINAL}: {error}. Give a local copy as the path.") from error
    folder = expanded(source.path) if source.path else None
    return folder if folder is not None and any((folder / kind).is_dir() for kind in _KINDS) else None


def _read(files: Sequence[tuple[str, Path]], index: int) -> Row:
    """Return a file of the authors' layout as a row of the hub's table."""
    kind, file = files[index]
    try:
        said = json.loads(file.read_text(encoding="utf-8"))
        question, options = said["question"], list(said["options"])
        # Corner and size (penghao-wu/vstar, README.md: <x,y,w,h>).
        boxes = tuple(Box(x, y, x + width, y + height) for x, y, width, height in said["bbox"])
    except (ValueError, LookupError, TypeError) as error:
        raise ConfigError(
            f"{file} is not a question of V*Bench: {type(error).__name__}: {error}. Needed: question, options, bbox."
        ) from None
    order = list(range(len(options)))
    Random(f"{VSTAR_BENCH.name}-{kind}-{file.stem}").shuffle(order)
    shown = tuple(options[at] for at in order)
    picture = next((at for suffix in _PICTURES if (at := file.with_suffix(suffix)).is_file()), file.with_suffix(".jpg"))
    return {
        "image": str(picture.absolute()),
        "text": f"{question.rstrip()}\n{listed(shown)}",
        "category": kind,
        "label": letter(order.index(0)),
        "question_id": file.stem,
        "options": shown,
        "boxes": boxes,
        "targets": list(said.get("target_object", [])),
    }


def _ask(row: Row, answers: tuple[str, ...]) -> Asked:
    return Asked(
        instructed(row["text"], LETTER),
        options=row.get("options") or inline_options(row["text"]),
        boxes=row.get("boxes", ()),
        meta={"targets": row["targets"]} if "targets" in row else {},
        id=f"{row['category']}-{row['question_id']}",
    )


VSTAR_BENCH: Final = Benchmark(
    name="vstar",
    title="V*Bench: attributes and positions of small objects in photographs (191, multiple choice)",
    place=HubTable(("lmms-lab-encoder/vstar-bench", "lmms-lab/vstar-bench")),
    columns=("image", "text", "category", "label", "question_id"),
    kind="category",
    ask=_ask,
    answer="label",
    answers=one_letter,
    scorers={"faithful": choice.vstar, "clean": choice.clean, "vlmevalkit": choice.kit},
    coarse_tokens=(512, 4096),
)
VSTAR: Final = replace(VSTAR_BENCH.task, load=load, sources=(*VSTAR_BENCH.place.ids, ORIGINAL))
