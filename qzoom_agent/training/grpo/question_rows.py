"""Questions as the rows of TRL's dataset: `prompt`, which TRL looks at, and `sample`, which the episodes are run from.

The rows are those of the whole run, in their order, so that a run that is resumed goes on with the question it would
have asked. Needle boards are drawn when a row is read, from seeds that no other stage and no evaluation draws, and
never repeat. Other questions come from the same sources as the branches' (`rl.branches.records`), shuffled each time
they have all been asked.
"""

from collections.abc import Mapping
from functools import lru_cache
from random import Random
from typing import Any, Final

from datasets import Dataset
from transformers import PreTrainedTokenizerBase

from qzoom_agent.data.samples import Sample
from qzoom_agent.errors import ConfigError
from qzoom_agent.evaluation.tasks.needle import sample as draw_sample
from qzoom_agent.geometry import Box
from qzoom_agent.training.branches.dataset import ConcatenatedRecords, Records, load_records
from qzoom_agent.training.grpo.grpo_recipe import GRPORecipe, NeedleTask

FIRST_SEED: Final = 1_000_000_000_000
"""Boards of GRPO begin here, above those of every other stage."""
SEEDS_A_RUN: Final = 1_000_000_000
"""Recipes with different seeds share no board."""


def load_rows(
    recipe: GRPORecipe, *, tokenizer: PreTrainedTokenizerBase | None = None, room: int | None = None
) -> Dataset:
    """The rows of a recipe.

    Args:
        tokenizer: counts the tokens of the questions, none of which may have more than `room`; needle boards' have not.

    Raises:
        ConfigError: a source cannot be read, or lacks a column, or has a question that is too long.
    """
    count = recipe.rounds * recipe.prompts
    if recipe.needle:
        rows, draw = list(range(count)), _Needle(recipe.needle, recipe.seed)
        return Dataset.from_dict({"index": rows}).with_transform(draw)
    records = load_records(recipe.data)
    if not len(records):
        raise ConfigError("The recipe's data have no rows. Check `split` and `limit` of its sources.")
    if tokenizer is not None and room is not None:
        _require_short(records, tokenizer, room)
    rows = []
    while len(rows) < count:
        epoch = list(range(len(records)))
        Random(f"grpo/{recipe.seed}/{len(rows)}").shuffle(epoch)
        rows += epoch
    return Dataset.from_dict({"index": rows[:count]}).with_transform(_Other(records))


def _require_short(records: ConcatenatedRecords, tokenizer: PreTrainedTokenizerBase, room: int) -> None:
    """Every question fits beside the longest episode: one that does not would end the run, hours later.

    Raises:
        ConfigError: the first that does not.
    """
    for source, first, asked in records.questions():
        counts = map(len, tokenizer(asked, add_special_tokens=False)["input_ids"])
        for row, (question, count) in enumerate(zip(asked, counts, strict=True), first):
            if count > room:
                raise ConfigError(
                    f"The question of row {row} of the dataset {source} has {count} tokens, but in the model's context "
                    f"there is room for {room} beside the longest episode: {question[:60]!r}... Leave the row out or "
                    "shorten its question, or lower budget.coarse_tokens, budget.crop_max_tokens, budget.max_views, "
                    "budget.max_turns or generation.max_new_tokens."
                )


class _Needle:
    """Draws the questions of rows that are read; an object, so that worker processes can have it."""

    def __init__(self, shares: Mapping[NeedleTask, float], seed: int) -> None:
        self.tasks, self.weights, self.seed = list[str](shares), list(shares.values()), seed

    def __call__(self, rows: dict[str, list[int]]) -> dict[str, list[Any]]:
        return _rows([self._sample(index) for index in rows["index"]])

    def _sample(self, index: int) -> Sample:
        task = Random(f"grpo/{self.seed}/{index}").choices(self.tasks, weights=self.weights)[0]
        return _drawn(task, FIRST_SEED + self.seed * SEEDS_A_RUN + index)


@lru_cache(maxsize=64)
def _drawn(task: str, seed: int) -> Sample:
    # the rollouts of a group ask for the same row one after another
    return draw_sample(task, seed, split="train")


class _Other:
    """Reads questions of other sources."""

    def __init__(self, records: Records) -> None:
        self.records = records

    def __call__(self, rows: dict[str, list[int]]) -> dict[str, list[Any]]:
        read = {index: _sample(self.records[index]) for index in set(rows["index"])}
        return _rows([read[index] for index in rows["index"]])


def _sample(record: Any) -> Sample:
    boxes = record["boxes"]
    return Sample(
        id=record["id"],
        task=record["mode"],
        kind=record["mode"],
        image=record["image"],
        question=record["question"],
        answer=record["answer"],
        answers=tuple(record["answers"]),
        boxes=tuple(Box(*box) for box in boxes or ()),
        coarse_suffices=None if boxes is None else not boxes,
    )


def _rows(samples: list[Sample]) -> dict[str, list[Any]]:
    # TRL appends what an environment shows to the last user message, which is why there is an empty one
    prompts = [[{"role": "user", "content": ""}] for _ in samples]
    return {"prompt": prompts, "sample": samples}
