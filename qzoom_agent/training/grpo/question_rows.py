"""Questions as the rows of TRL's dataset: `prompt` for TRL, and `sample` for the episodes.

The rows are those of the whole run, in order, so that a resumed run asks the question it would have asked. Needle
boards are drawn when a row is read, from seeds that no other stage and no evaluation draws. Other questions come from
the same sources as the branches' (`training.branches.dataset`), shuffled each time they have all been asked.
"""

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import lru_cache, partial
from random import Random
from typing import Any, Final

from datasets import Dataset
from transformers import PreTrainedTokenizerBase

from qzoom_agent.data.samples import Sample
from qzoom_agent.errors import ConfigError
from qzoom_agent.evaluation.tasks.needle import NeedleTask
from qzoom_agent.evaluation.tasks.needle import sample as draw_sample
from qzoom_agent.training.branches.dataset import ConcatenatedRecords, Records, load_records
from qzoom_agent.training.grpo.grpo_recipe import GRPORecipe

FIRST_SEED: Final = 1_000_000_000_000
"""Boards of GRPO begin here, above those of every other stage."""
SEEDS_A_RUN: Final = 1_000_000_000
"""Recipes with different seeds share no board."""
HELD_OUT: Final = 1000
"""In place of a recipe's seed, which is lower: the boards that are held out from all of them."""


def load_rows(
    recipe: GRPORecipe,
    *,
    records: ConcatenatedRecords | None = None,
    tokenizer: PreTrainedTokenizerBase | None = None,
    room: int | None = None,
) -> Dataset:
    """Return the rows of a recipe.

    Args:
        recipe: Names the questions, and how many are asked.
        records: The recipe's questions, where they are loaded already.
        tokenizer: Counts the tokens of the questions; those of needle boards are short.
        room: Most tokens of a question.

    Raises:
        ConfigError: A source cannot be read, lacks a column, or has a question that is too long.
    """
    rows = list(range(recipe.rounds * recipe.prompts))
    if recipe.needle:
        read: Callable[[int], Sample] = partial(_draw, shares=tuple(recipe.needle.items()), seed=recipe.seed)
        return _dataset(rows, read)
    records = _checked(load_records(recipe.data) if records is None else records, tokenizer, room)
    epochs = [list(range(len(records))) for _ in range(0, len(rows), len(records))]
    for number, epoch in enumerate(epochs):
        Random(f"grpo/{recipe.seed}/{number * len(records)}").shuffle(epoch)
    rows = [at for epoch in epochs for at in epoch][: len(rows)]
    return _dataset(rows, partial(_read, records=records))


def load_held_out(
    recipe: GRPORecipe, *, tokenizer: PreTrainedTokenizerBase | None = None, room: int | None = None
) -> Dataset | None:
    """Return the rows of a recipe's `evaluation`; None without one. See `load_rows`."""
    if recipe.evaluation is None:
        return None
    rows = range(recipe.evaluation.questions)
    if not recipe.evaluation.data:
        assert recipe.needle
        return _dataset(rows, partial(_draw, shares=tuple(recipe.needle.items()), seed=HELD_OUT))
    records = _checked(load_records(recipe.evaluation.data), tokenizer, room)
    return _dataset(rows[: len(records)], partial(_read, records=records))


def _dataset(rows: Sequence[int], read: Callable[[int], Sample]) -> Dataset:
    return Dataset.from_dict({"index": list(rows)}).with_transform(partial(_rows, read=read))


def _checked(
    records: ConcatenatedRecords, tokenizer: PreTrainedTokenizerBase | None, room: int | None
) -> ConcatenatedRecords:
    """Return the records; raise ConfigError for none, and for a question that would not fit and end the run later."""
    if not len(records):
        raise ConfigError("The recipe's data have no rows. Check `split` and `limit` of its sources.")
    if tokenizer is None or room is None:
        return records
    for source, numbers, asked in records.questions():
        counts = map(len, tokenizer(asked, add_special_tokens=False)["input_ids"])
        for row, question, count in zip(numbers, asked, counts, strict=True):
            if count > room:
                raise ConfigError(
                    f"The question of row {row + 1} of the dataset {source} has {count} tokens, but in the model's "
                    f"context there is room for {room} beside the longest episode: {question[:60]!r}... Leave the row "
                    "out or shorten its question, or lower budget.coarse_tokens, budget.crop_max_tokens, "
                    "budget.max_views, budget.max_turns or generation.max_new_tokens."
                )
    return records


def _rows(rows: dict[str, list[int]], *, read: Callable[[int], Sample]) -> dict[str, list[Any]]:
    """Return the columns of some rows; those of a group have the same index, one after another."""
    samples = {index: read(index) for index in dict.fromkeys(rows["index"])}
    # TRL appends what an environment shows to the last user message, which is why there is an empty one
    prompts = [[{"role": "user", "content": ""}] for _ in rows["index"]]
    return {"prompt": prompts, "sample": [samples[index] for index in rows["index"]]}


@lru_cache(maxsize=64)  # the rollouts of a group ask for the same row one after another
def _draw(index: int, *, shares: tuple[tuple[NeedleTask, float], ...], seed: int) -> Sample:
    tasks, weights = zip(*shares, strict=True)
    task = Random(f"grpo/{seed}/{index}").choices(tasks, weights=weights)[0]
    return draw_sample(task, FIRST_SEED + seed * SEEDS_A_RUN + index, split="train")


def _read(index: int, *, records: Records) -> Sample:
    sample = records[index]
    # ids of rows are those of their source, which another may have as well, and rollouts of one id are a group
    return replace(sample, id=f"{index}/{sample.id}")
