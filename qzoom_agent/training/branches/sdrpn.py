"""SD-RPN from its labels: binary cross-entropy over the cells that have one, only the branch trained (Q-Zoom 3.1).

The branch reads the output of the base's first K layers over the prompt that inference uses. Batches take turns at the
recipe's budgets, so that it meets grids of several sizes, and labels are made on the grid that is read. The mean runs
over all labelled cells of a batch, as published.
"""

import math
from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from torch import Tensor, nn
from torch.nn.functional import binary_cross_entropy_with_logits

from qzoom_agent.errors import ConfigError
from qzoom_agent.geometry import Size
from qzoom_agent.models.hf import HFBackend
from qzoom_agent.perception.branches import SDRPN
from qzoom_agent.perception.decoder import cut
from qzoom_agent.perception.labels import IGNORED, Labels
from qzoom_agent.training.branches.base_inference import LowerLayerStates, ask, branches_of, lower_states
from qzoom_agent.training.branches.branch_recipe import BranchRecipe
from qzoom_agent.training.branches.dataset import Records, spread
from qzoom_agent.training.branches.fitting import Rows, train
from qzoom_agent.training.branches.labelling import labels_on_grid
from qzoom_agent.training.branches.sharded_table import say


class MapLoss(nn.Module):
    """Binary cross-entropy of SD-RPN's map."""

    def __init__(self, sdrpn: SDRPN) -> None:
        super().__init__()
        self.sdrpn = sdrpn

    def forward(self, states: LowerLayerStates, labels: Tensor) -> Tensor:
        """Return the mean over the labelled cells of all rows.

        `labels` are those of the cells of all rows and views, concatenated; -100 where a cell has none.
        """
        logits = torch.cat(map_rows(self.sdrpn, states))
        chosen = labels != IGNORED
        if not bool(chosen.any()):
            return logits.sum() * 0.0
        return binary_cross_entropy_with_logits(logits[chosen], labels[chosen].to(logits.dtype))


def map_rows(sdrpn: SDRPN, lower: LowerLayerStates) -> list[Tensor]:
    """Return the map logits (cells,) of each view of each row, with the query of the row's last token."""
    rotary = lower.rotary
    states = sdrpn.states(lower.hidden, rotary=rotary, mask=lower.mask)
    query = sdrpn.queries(states[:, -1:], cut(rotary, slice(-1, None)))
    logits = []
    for row, views in enumerate(lower.images):
        for start, rows, columns in views:
            where = slice(start, start + rows * columns)
            turned = (rotary[0][row : row + 1, where], rotary[1][row : row + 1, where])
            keys = sdrpn.keys(states[row : row + 1, where], turned)
            logits.append(sdrpn.logits(query[row : row + 1], keys)[0].float())
    return logits


def train_sdrpn(
    backend: HFBackend,
    sdrpn: SDRPN,
    records: Records,
    labels: Dataset,
    recipe: BranchRecipe,
    folder: Path,
    *,
    topics: Sequence[str | None] = (),
) -> None:
    """Train the branch in place on a table of attention maps.

    Args:
        backend: The frozen base.
        sdrpn: The branch.
        records: The questions.
        labels: Their maps.
        recipe: The recipe; its `sdrpn.absent` needs topics.
        folder: Folder of checkpoints.
        topics: The topic of each record.

    Raises:
        ConfigError: No row was answered right, if that is required, with a map that is usable; or there are no two
            topics for questions about what an image does not show.
    """
    stage, k, made_with = recipe.sdrpn, branches_of(backend).config.k, recipe.labelling

    def on(row: dict[str, Any], grid: tuple[int, int] | None = None) -> Labels:
        heat, sink = np.array(row["map"]), None if row["sink"] is None else np.array(row["sink"])
        shown = Size(*row["shown"]) if row.get("shown") else None  # missing in tables of earlier versions
        ratio = made_with.used_norm_ratio
        return labels_on_grid(heat, sink, grid or heat.shape, made_with.rules, norm_ratio=ratio, shown=shown)

    right = [at for at, good in enumerate(labels["right"]) if good or made_with.keep == "all"]
    chosen = [at for at in right if on(labels[at]).usable]
    if not chosen:
        why = f"none of the {len(right)} maps that count points anywhere" if right else "none was answered right"
        keep = "" if made_with.keep == "all" else "Set labelling.keep: all, or "
        advice = f"{keep}label at another budget (labelling.tokens), with other heads (labelling.grounding) or rules"
        raise ConfigError(
            f"There is nothing to learn from {len(labels)} labelled questions: {why}. {advice[0].upper()}{advice[1:]} "
            "(labelling.rules)."
        )
    say(f"{len(labels)} maps, {len(right)} with an answer that counts, {len(chosen)} of them usable")
    labels = labels.select(_share_of_each(chosen, labels["row"], records, stage.share))

    places = labels["row"]
    absent = _absent([topics[at] for at in places] if topics else [], stage.absent, seed=recipe.seed)

    def read(index: int) -> dict[str, Any]:
        if index >= len(labels):
            question, image = absent[index - len(labels)]
            return {"record": replace(records[places[image]], question=records[places[question]].question), "map": None}
        row = labels[index]
        return {"record": records[row["row"]], "map": row["map"], "sink": row["sink"], "shown": row.get("shown")}

    def prepare(rows: Rows) -> dict[str, Any]:
        turn = rows[0]["draw"] // stage.optimisation.per_device_train_batch_size
        asked = ask(backend, [row["record"] for row in rows], stage.tokens[turn % len(stage.tokens)])
        states = lower_states(backend, asked, k)
        made = [
            torch.zeros(high * wide, dtype=torch.long)
            if row["map"] is None
            else torch.from_numpy(on(row, (high, wide)).labels).flatten()
            for row, ((_, high, wide),) in zip(rows, states.images, strict=True)
        ]
        return {"states": states, "labels": torch.cat(made).to(states.hidden.device)}

    module, how = MapLoss(sdrpn.requires_grad_(True)), stage.optimisation
    images = labels["image_id"]
    images = [*images, *(images[image] for _, image in absent)]
    train(module, images, read=read, prepare=prepare, how=how, folder=folder, seed=recipe.seed)


def _share_of_each(chosen: Sequence[int], rows: Sequence[int], records: Records, share: float) -> list[int]:
    """Return the first of the chosen labels of each source of the records, together this share of all chosen ones."""
    ends = getattr(records, "cumulative_sizes", [len(records)])
    of_source: list[list[int]] = [[] for _ in ends]
    for at in chosen:
        of_source[bisect_right(ends, rows[at])].append(at)
    counts = spread([len(some) for some in of_source], math.ceil(share * len(chosen)))
    return [at for some, count in zip(of_source, counts, strict=True) for at in some[:count]]


def _absent(topics: Sequence[str | None], share: float, *, seed: int) -> list[tuple[int, int]]:
    """Return pairs of a question and an image that has no answer to it, as indices of labelled rows.

    Raises:
        ConfigError: There are to be some, and fewer than two topics.
    """
    if not share:
        return []
    named = [at for at, topic in enumerate(topics) if topic is not None]
    known = sorted({topics[at] or "" for at in named})
    if len(known) < 2:
        given = f"one topic, {known[0]}" if known else "no topics"
        raise ConfigError(
            f"sdrpn.absent is {share:g}, and data has {given}. Give two or more sources a topic (data: topic), or "
            "leave sdrpn.absent out."
        )
    rng, count = Random(f"absent/{seed}"), round(share * len(topics))
    pairs: list[tuple[int, int]] = []
    while len(pairs) < count:
        question, image = rng.choices(named, k=2)
        if topics[question] != topics[image]:
            pairs.append((question, image))
    return pairs
