"""The needle tasks: questions about generated boards whose answer is, or is not, legible in a coarse view.

| task | question | needs |
|---|---|---|
| needle-global | headline, count, colour, shape | the coarse view |
| needle-scene | code or dots on one object, code of an object's neighbour | one crop |
| needle-doc | field of a form, line of a receipt, cell of a table | one crop |
| needle-hop | a note names the cell to read | two crops, the second depends on the first |
| needle-pair | as needle-scene or needle-doc, about the first or the second of two boards | one crop |
| needle-chain | a note names a cell whose note names the cell to read | three crops, each depends on the one before |

The same task, seed and split give the same pixels on any machine that has the pinned packages.
"""

from dataclasses import replace
from pathlib import Path
from random import Random
from typing import Final, Literal, get_args

from qzoom_agent.data.samples import Sample
from qzoom_agent.errors import ConfigError
from qzoom_agent.evaluation.tasks.needle.boards import draw_board
from qzoom_agent.geometry import Box
from qzoom_agent.views import original_id

NeedleTask = Literal["needle-global", "needle-scene", "needle-doc", "needle-hop", "needle-chain"]
TASK_NAMES: Final[tuple[NeedleTask, ...]] = get_args(NeedleTask)
SPLITS: Final = ("train", "test", "ood")
FIRST_SEED: Final = 1_000_000_000
"""Evaluation draws its boards from here on. Training may use the same numbers and still shares no board: the name of
the split is part of the random seed."""
SEEDS_A_RUN: Final = 1_000_000
"""Runs with different seeds share no board."""
_LAYOUTS: Final = {
    "needle-global": ("scene", "scene", "scene", "form", "receipt", "table"),
    "needle-scene": ("scene",),
    "needle-doc": ("form", "receipt", "table"),
    "needle-hop": ("hop",),
    "needle-chain": ("chain",),
}


PAIR: Final = "needle-pair"
"""Two boards of different layouts; the question is about one of them."""
_PAIRED: Final = ("needle-scene", "needle-doc")


def sample_seed(seed: int, index: int) -> int:
    """Return the generator's seed for question `index` of the run `seed`."""
    return FIRST_SEED + seed * SEEDS_A_RUN + index


def require_task(task: str) -> None:
    """Raise ConfigError if this is none of the needle tasks."""
    if task not in TASK_NAMES:
        raise ConfigError(f"Unknown task {task!r}. The needle tasks are: {', '.join(TASK_NAMES)}.")


def require_split(split: str) -> None:
    """Raise ConfigError if there is no such split."""
    if split not in SPLITS:
        raise ConfigError(f"Unknown split {split!r}. The splits are: {', '.join(SPLITS)}.")


def sample(task: str, seed: int, *, split: str = "test", fonts: Path | None = None) -> Sample:
    """Return the question of this task, seed and split; ConfigError for unknown ones, or no typeface in `fonts`."""
    require_task(task)
    require_split(split)
    rng = Random(f"{task}/{split}/{seed}")
    layout = rng.choice(_LAYOUTS[task])
    board = draw_board(layout, seed, split=split, fonts=fonts)
    facts = [fact for fact in board.facts if fact.task == task]
    kind = rng.choice(sorted({fact.kind for fact in facts}))
    fact = rng.choice([fact for fact in facts if fact.kind == kind])
    return Sample(
        id=f"{task}-{split}-{seed}",
        task=task,
        kind=kind,
        image=board.image,
        question=fact.question,
        answer=fact.answer,
        answers=(fact.answer,),
        boxes=tuple(Box(*box) for box in fact.boxes),
        coarse_suffices=fact.coarse_suffices,
    )


def pair(seed: int, *, split: str = "test", fonts: Path | None = None) -> Sample:
    """Return a question as `sample`, of needle-scene or needle-doc, with a board of the other's layout beside it."""
    require_split(split)
    rng = Random(f"{PAIR}/{split}/{seed}")
    task = rng.choice(_PAIRED)
    asked = sample(task, seed, split=split, fonts=fonts)
    layout = rng.choice(_LAYOUTS[next(one for one in _PAIRED if one != task)])
    other = draw_board(layout, seed, split=split, fonts=fonts).image
    second = rng.random() < 0.5
    boxes = tuple(replace(box, view=original_id(1)) for box in asked.boxes) if second else asked.boxes
    return replace(
        asked,
        id=f"{PAIR}-{split}-{seed}",
        task=PAIR,
        kind=f"{task.removeprefix('needle-')} on the {'second' if second else 'first'} board",
        image=other if second else asked.image,
        others=(asked.image if second else other,),
        boxes=boxes,
        meta={"board": int(second)},
    )
