"""Gate and SD-RPN of further looks, from the model's own calls or its attention: no boxes are needed.

A question that the first gate lets through is shown the crop of the first look. It is answered with the crops so far;
while that is wrong, the model is offered its zoom tool, and the crop of its call is shown as well. After each crop the
gate learns "enough" where the answer is right, and "more" where only a later crop made it right. SD-RPN learns where
the tokens of the next call attend, with the earlier crops in context. Both start from the branches of the first look.

Or the attention is followed (`follow: attention`): SD-RPN learns where in the crops the token attends that would begin
the answer, and that place is the next crop. The gate then learns from the answers with one crop and the next.

A share of the images is held out: it gives the gate's threshold and the figures that are stored with the branches.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Any, NamedTuple

import numpy as np
import torch
from datasets import Dataset
from torch import Tensor, nn

from qzoom_agent.config import PerceptionConfig, ReviewConfig
from qzoom_agent.data.answers import normalise
from qzoom_agent.errors import ConfigError
from qzoom_agent.evaluation.stats import Figures
from qzoom_agent.gate import gate_fires
from qzoom_agent.geometry import Box
from qzoom_agent.models.hf import HFBackend
from qzoom_agent.perception.branch_config import searched
from qzoom_agent.perception.branches import Branches
from qzoom_agent.perception.labels import BACKGROUND, FOREGROUND, Heads, LabelRules
from qzoom_agent.perception.look import resolve_options
from qzoom_agent.perception.maps import regions
from qzoom_agent.protocols import get_protocol
from qzoom_agent.review import adds
from qzoom_agent.training.branches.base_inference import (
    CoarsePrompt,
    LowerLayerStates,
    ask,
    branches_of,
    generate_answers,
    is_right,
    lower_states,
    open_prompt,
)
from qzoom_agent.training.branches.branch_recipe import BranchRecipe, Calibration
from qzoom_agent.training.branches.calibrate import GateFigures, gate_figures
from qzoom_agent.training.branches.dataset import Record, Records
from qzoom_agent.training.branches.fitting import Rows, train
from qzoom_agent.training.branches.gate import GateLoss
from qzoom_agent.training.branches.labelling import collect, heads_for, labels_on_grid, sink_cells
from qzoom_agent.training.branches.proposals import in_pixels, look_at_batch, proposal_zoom, run_branches, show_crops
from qzoom_agent.training.branches.sdrpn import MapLoss
from qzoom_agent.training.branches.sharded_table import say, write_table


class FurtherFigures(Figures):
    """Figures of further looks on held-out questions; stored in `branches.json`."""

    questions: int
    looks: int
    """Conversations with crops, of these questions."""
    more: int
    """Those of them that need another crop."""
    gate: GateFigures | None
    """None where all or none of them need one."""
    found: float | None
    """Share of the next crops whose centre lies in the region that is proposed."""


class Step(NamedTuple):
    """A conversation with crops to learn from: the first `crops` of a row of the table."""

    row: int
    crops: int
    more: bool | None
    """Another crop is needed; None: that cannot be told."""
    points: bool
    """The map of the next call is learned."""


@dataclass
class _Chain:
    """A question under way: its crops, answers and calls so far."""

    record: Record
    prompt: CoarsePrompt
    box: Box
    """The next crop, in pixels of the image."""
    row: dict[str, Any]


def collect_chains(
    backend: HFBackend, records: Records, recipe: BranchRecipe, folder: Path, *, selected: Heads | None
) -> Dataset:
    """Return for each record the crops that were shown one after another, the answers with them and the maps of calls.

    Columns: `row`, `image_id`, `boxes` (crops in pixels of the image), `answers` and `right` (with the first 1, 2, ...
    crops), `maps` and `sinks` (of the call for the next crop: for each view that counts, rows of cells). The lists of a
    question that needs no crop are empty. The table is kept in `folder`.
    """
    stage, config = recipe.further, branches_of(backend).config
    options, tokens = resolve_options(config, PerceptionConfig()), recipe.labelling.tokens

    def rows(_: range, some: list[Record]) -> list[dict[str, Any]]:
        made: list[dict[str, Any]] = [{key: [] for key in ("boxes", "answers", "right", "maps", "sinks")} for _ in some]
        chains = []
        asked = ask(backend, some, tokens)
        seen = look_at_batch(backend, some, tokens=tokens, asked=asked)
        for record, prompt, found, row in zip(some, asked, seen, made, strict=True):
            box = found.proposal(options)
            if box is not None and gate_fires(found.score, config.gate_threshold) is not False:
                chains.append(_Chain(record, prompt, box, row))
        for step in range(stage.crops):
            chains = _advance(backend, chains, recipe, selected, last=step == stage.crops - 1)
        return made

    return write_table(folder, records, rows, batch=stage.batch, progress=f"followed by {stage.follow}")


def _advance(
    backend: HFBackend, chains: Sequence[_Chain], recipe: BranchRecipe, selected: Heads | None, *, last: bool
) -> list[_Chain]:
    """Show each chain its next crop and answer; return the chains whose answer is wrong and that call again."""
    stage = recipe.further
    shown = []
    prompts = show_crops(backend, [one.prompt for one in chains], [[one.box] for one in chains])
    for chain, prompt in zip(chains, prompts, strict=True):
        if prompt is not chain.prompt and prompt.crop is not None:
            chain.prompt = prompt
            chain.row["boxes"].append(prompt.crop.as_list())
            shown.append(chain)
    if not shown:
        return []
    if branches_of(backend).gate is not None:
        answers = generate_answers(backend, [one.prompt for one in shown], max_new_tokens=stage.max_new_tokens)
        for chain, answer in zip(shown, answers, strict=True):
            chain.row["answers"].append(answer)
            chain.row["right"].append(is_right(answer, chain.record))
    if stage.follow == "attention":
        return [] if last else _attend(backend, shown, recipe, selected)
    going = [one for one in shown if stage.enough == "same" or not one.row["right"][-1]]
    return [] if last or not going else _call(backend, going, recipe, selected)


def _call(backend: HFBackend, going: Sequence[_Chain], recipe: BranchRecipe, selected: Heads | None) -> list[_Chain]:
    """Offer each chain the zoom tool, and keep the maps of the calls; return the chains whose call adds something."""
    asked = [
        open_prompt(backend, one.session, one.store, one.shown, one.question, tools=True)
        for one in (chain.prompt for chain in going)
    ]
    said = generate_answers(backend, asked, max_new_tokens=recipe.labelling.max_new_tokens)
    zoom = proposal_zoom(backend)
    calling, prompts, texts = list[_Chain](), list[CoarsePrompt](), list[str]()
    for chain, prompt, text in zip(going, asked, said, strict=True):
        box = _called(backend, prompt, text)
        if box is not None and adds(zoom.plan(prompt.store, box), prompt.shown, ReviewConfig()):
            chain.box = box
            calling.append(chain)
            prompts.append(prompt)
            texts.append(text)
    _keep_maps(backend, calling, prompts, texts, recipe, selected)
    return calling


def _attend(backend: HFBackend, going: Sequence[_Chain], recipe: BranchRecipe, selected: Heads | None) -> list[_Chain]:
    """Keep the maps of the token that would begin each answer; return the chains that these point at a next place."""
    prompts, stage, pointed = [chain.prompt for chain in going], recipe.further, list[_Chain]()
    _keep_maps(backend, going, prompts, [""] * len(going), recipe, selected)
    for chain, prompt in zip(going, prompts, strict=True):
        spans = searched(prompt.ready.prompt.spans, stage.inside_crops)
        grids = [(grid.rows, grid.columns) for grid in map(prompt.session.grid, spans)]
        row = {**chain.row, "crops": len(chain.row["maps"]), "points": True}
        found = []  # the foreground of the labels, which is never a sink
        for span, grid, label, heat in zip(spans, grids, _labels(row, grids, recipe), row["maps"][-1], strict=True):
            learned = (label == FOREGROUND).numpy().reshape(grid)
            found += [(span, region) for region in regions(torch.tensor(heat), learned, sides=stage.box)]
        if found:
            span, region = max(found, key=lambda pair: pair[1].peak)
            chain.box = in_pixels(region, prompt.session.grid(span), prompt.store.view(span.view))
            pointed.append(chain)
    return pointed


def _keep_maps(
    backend: HFBackend,
    chains: Sequence[_Chain],
    prompts: Sequence[CoarsePrompt],
    texts: Sequence[str],
    recipe: BranchRecipe,
    selected: Heads | None,
) -> None:
    """Append to each row the maps of what was said, on the views that a further look searches."""
    how, inside = recipe.labelling, recipe.further.inside_crops
    for mode in {chain.record.mode for chain in chains}:
        some = [each for each in zip(chains, prompts, texts, strict=True) if each[0].record.mode == mode]
        every = collect(
            backend,
            [prompt for _, prompt, _ in some],
            [text for *_, text in some],
            heads_for(how, mode, model=backend.name, selected=selected),
            how,
            k=branches_of(backend).config.k,
            views=None if inside else 1,
        )
        for (chain, *_), found in zip(some, every, strict=True):
            maps = searched(found, inside)
            chain.row["maps"].append([one.heat.tolist() for one in maps])
            chain.row["sinks"].append([[] if one.sink is None else one.sink.tolist() for one in maps])


def _called(backend: HFBackend, prompt: CoarsePrompt, text: str) -> Box | None:
    """Return the box that a call asks for, in pixels of the image; None for a text that is no call with a box."""
    calls = get_protocol(backend.protocol).parse(text, prompt.shown).calls
    box = calls[0].as_box if calls else None
    if box is None or not box.finite or box.view not in prompt.store:
        return None
    original = prompt.store.view("original").size
    return prompt.store.to_original(box.ordered()).clamp(original)


def steps_of(table: Dataset, recipe: BranchRecipe) -> list[Step]:
    """Return the conversations with crops that teach something."""
    found = []
    for at, row in enumerate(table):
        right = row["right"]
        if recipe.further.enough == "same" and right:
            final = normalise(row["answers"][-1])
            right = [normalise(answer) == final for answer in row["answers"]]
        for crops in range(1, 1 + max(len(right), len(row["maps"]))):
            fine = right[crops - 1] if right else None
            more = False if fine else True if any(right[crops:]) else None
            called = crops <= len(row["maps"])
            points = called and (more is True or (more is None and recipe.labelling.keep == "all"))
            if more is not None or points:
                found.append(Step(at, crops, more, points))
    return found


def split(table: Dataset, steps: Sequence[Step], recipe: BranchRecipe) -> tuple[list[Step], list[Step]]:
    """Return the steps to learn from and those held out, by image."""
    images = table["image_id"]
    draw = {name: Random(f"further/{recipe.seed}/{name}").random() < recipe.further.held_out for name in set(images)}
    return [one for one in steps if not draw[images[one.row]]], [one for one in steps if draw[images[one.row]]]


class FurtherLoss(nn.Module):
    """Sum of the losses of SD-RPN and gate at conversations with crops."""

    def __init__(self, branches: Branches) -> None:
        super().__init__()
        assert branches.sdrpn is not None
        self.map = MapLoss(branches.sdrpn)
        self.gate = None if branches.gate is None else GateLoss(branches.gate)

    def forward(self, states: LowerLayerStates, labels: Tensor, more: Tensor) -> Tensor:
        """Return the loss; `more` is 1 or 0 for each row, NaN where that cannot be told. Else see `MapLoss`."""
        loss: Tensor = self.map(states, labels)
        known = ~more.isnan()
        if self.gate is not None and bool(known.any()):
            mask, (cos, sin) = states.mask, states.rotary
            some = states._replace(
                hidden=states.hidden[known],
                rotary=(cos[known], sin[known]),
                mask=None if mask is None else mask[known],
            )
            loss = loss + self.gate(some, more[known])
        return loss


def train_further(
    backend: HFBackend, further: Branches, records: Records, table: Dataset, recipe: BranchRecipe, folder: Path
) -> list[Step]:
    """Train the branches in place; return the steps held out. ConfigError if there is nothing to tell apart."""
    stage = recipe.further
    steps, held = split(table, steps_of(table, recipe), recipe)
    counts = f"{sum(one.more is True for one in steps)} need another crop, {sum(one.more is False for one in steps)} do"
    say(f"{len(steps)} conversations with crops, {counts} not; {len(held)} more are held out")
    told = further.gate is None or {True, False} <= {one.more for one in steps}
    if not told or not any(one.points for one in steps):
        raise ConfigError(
            f"There is nothing to tell apart: of {len(steps)} conversations with crops {counts} not. Give questions in "
            "several steps that the model answers by its own calls, and some that one crop answers."
        )

    def read(index: int) -> dict[str, Any]:
        one = steps[index]
        row = table[one.row]
        chain = {key: row[key] for key in ("boxes", "maps", "sinks")}
        return {"record": records[row["row"]], **chain, "crops": one.crops, "more": one.more, "points": one.points}

    def prepare(rows: Rows) -> dict[str, Any]:
        turn = rows[0]["draw"] // stage.optimisation.per_device_train_batch_size
        shown = show_chains(backend, rows, stage.tokens[turn % len(stage.tokens)])
        states = lower_states(backend, shown, further.config.k, inside_crops=stage.inside_crops)
        labels = [
            label
            for row, images in zip(rows, states.images, strict=True)
            for label in _labels(row, [(high, wide) for _, high, wide in images], recipe)
        ]
        more = torch.tensor([float("nan") if row["more"] is None else float(row["more"]) for row in rows])
        device = states.hidden.device
        return {
            "states": states,
            "labels": torch.cat(labels).to(device),
            "more": more.to(device),
        }

    images = [table[one.row]["image_id"] for one in steps]
    module, how = FurtherLoss(further.requires_grad_(True)), stage.optimisation
    train(module, images, read=read, prepare=prepare, how=how, folder=folder, seed=recipe.seed)
    further.eval()
    return held


def show_chains(backend: HFBackend, rows: Sequence[Mapping[str, Any]], tokens: int | None) -> list[CoarsePrompt]:
    """Ask each row's question with its first `crops` boxes shown, over a coarse view of at most `tokens`."""
    asked = ask(backend, [row["record"] for row in rows], tokens)
    boxes = [[Box(*box) for box in row["boxes"][: row["crops"]]] for row in rows]
    return show_crops(backend, asked, boxes)


def _labels(row: Mapping[str, Any], grids: Sequence[tuple[int, int]], recipe: BranchRecipe) -> list[Tensor]:
    """Return the labels of the cells of each view; the views of one call share the peak of its attention off sinks."""
    blank = [torch.full((high * wide,), -100) for high, wide in grids]
    if not row["points"]:
        return blank
    how, at = recipe.labelling, row["crops"] - 1
    maps = [np.array(one, dtype=np.float32) for one in row["maps"][at]]
    sinks = [np.array(one, dtype=np.float32) if one else None for one in row["sinks"][at]]
    peaks = [
        float(heat.max() if sink is None else heat[~sink_cells(sink, how.rules, how.used_norm_ratio)].max(initial=0.0))
        for heat, sink in zip(maps, sinks, strict=True)
    ]
    labels = []
    for heat, sink, grid, peak, none in zip(maps, sinks, grids, peaks, blank, strict=True):
        share = max(peaks) / max(peak, 1e-12)
        if how.rules.foreground * share < 1:
            shares = {"foreground": how.rules.foreground * share, "background": how.rules.background * share}
            rules = LabelRules.model_validate({**how.rules.model_dump(), **shares})
            made = labels_on_grid(heat, sink, grid, rules, norm_ratio=how.used_norm_ratio)
            labels.append(torch.from_numpy(made.labels).flatten())
        else:  # the call does not attend to this view
            labels.append(torch.full_like(none, BACKGROUND))
    return labels


def fewest_errors(scores: Sequence[float], needs: Sequence[bool | None]) -> GateFigures:
    """Return the gate's errors at the threshold where their sum is least.

    No share of needed looks is demanded, as of the first gate: a crop that is misread alone, and read right beside
    another one, makes a label that no threshold should follow.
    """
    needing = sum(need is True for need in needs)
    tried = [
        gate_figures(scores, needs, Calibration(needed_recall=through / needing), most=1.0)
        for through in range(1, needing + 1)
    ]
    return min(tried, key=lambda one: one.missed + one.needless)


def measure(
    backend: HFBackend,
    further: Branches,
    records: Records,
    table: Dataset,
    held: Sequence[Step],
    recipe: BranchRecipe,
) -> FurtherFigures:
    """Choose the gate's threshold on held-out conversations, and measure gate and regions there."""
    scores: list[float] = []
    hits: list[bool] = []
    options = resolve_options(further.config, PerceptionConfig(gate_threshold=0.0))
    for start in range(0, len(held), recipe.further.batch):
        steps = held[start : start + recipe.further.batch]
        rows = [
            {"record": records[table[one.row]["row"]], "boxes": table[one.row]["boxes"], "crops": one.crops}
            for one in steps
        ]
        shown = show_chains(backend, rows, recipe.calibration.tokens)
        found = run_branches(backend, further, shown, options, further=True)
        for one, row, prompt, seen in zip(steps, rows, shown, found, strict=True):
            scores += [] if seen.score is None else [seen.score]
            if one.points and one.crops < len(row["boxes"]):
                centre = Box(*row["boxes"][one.crops]).center
                spans = searched(prompt.ready.prompt.spans, further.config.inside_crops)
                boxes = [
                    in_pixels(region, prompt.session.grid(span), prompt.store.view(span.view))
                    for span, one_map in zip(spans, seen.maps, strict=True)
                    for region in one_map.regions
                ]
                hits.append(any(box.x1 <= centre[0] <= box.x2 and box.y1 <= centre[1] <= box.y2 for box in boxes))
    needs = [one.more for one in held]
    decided = bool(scores) and {True, False} <= set(needs)
    return FurtherFigures(
        questions=len({one.row for one in held}),
        looks=len(held),
        more=needs.count(True),
        gate=fewest_errors(scores, needs) if decided else None,
        found=sum(hits) / len(hits) if hits else None,
    )
