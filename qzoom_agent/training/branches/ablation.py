"""Ablations: one choice of the branches changed and everything else kept, measured side by side.

Variants that change the training are trained, each in a folder of its own, from the labels of a finished run of `qzoom
train branches` (or from new labels, where the change affects those). Each variant that changes SD-RPN or its base is
calibrated anew. Then all are measured in one interleaved run on boards that nothing trained on.
"""

from collections.abc import Callable, Sequence
from copy import copy
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final, Literal, NamedTuple

import numpy as np
import torch

from qzoom_agent.agent import Agent
from qzoom_agent.config import AgentConfig, PolicyName
from qzoom_agent.data.samples import Sample
from qzoom_agent.errors import ConfigError
from qzoom_agent.evaluation.interleaved import Cell, measure
from qzoom_agent.evaluation.stats import wilson
from qzoom_agent.geometry import Box
from qzoom_agent.models.hf import HFBackend
from qzoom_agent.perception.branch_config import CONFIG, BranchConfig
from qzoom_agent.perception.branches import Branches
from qzoom_agent.perception.labels import CROP_BASELINE
from qzoom_agent.perception.maps import regions
from qzoom_agent.report.markdown import markdown_table, percent
from qzoom_agent.training.branches.base_inference import attended_answers, branches_of
from qzoom_agent.training.branches.branch_recipe import BranchRecipe, StageName, load_branch_recipe
from qzoom_agent.training.branches.labelling import collect, heads_for, labels_on_grid, padded_size
from qzoom_agent.training.branches.proposals import in_pixels
from qzoom_agent.training.branches.run_dir import RunDirectory, keys_read_by
from qzoom_agent.training.branches.stages import run_stage
from qzoom_agent.training.recipe_io import set_key

FINE: Final = ("needle-scene", "needle-doc")
EVERY: Final = (*FINE, "needle-global")


@dataclass(frozen=True)
class Variant:
    """One of the options that an ablation compares."""

    name: str
    recipe: dict[str, Any] = field(default_factory=dict)
    """Keys of the recipe that differ, by dotted path; with any, SD-RPN is trained again."""
    reading: dict[str, Any] = field(default_factory=dict)
    """Keys of `perception` that differ when the branches are read."""
    policy: PolicyName = "always"
    after: tuple[StageName, ...] = ()
    """Stages whose results are calibrated again; empty: the calibrated branches of the run are used."""
    attention: Literal["tight", "fixed"] | None = None
    """With policy `oracle`: crop around all of the answer's attention, or in a box of the recipe's sides."""


class Ablation(NamedTuple):
    """A choice and its variants."""

    summary: str
    variants: Callable[[RunDirectory], list[Variant]]
    tasks: tuple[str, ...] = FINE


def _layers(directory: RunDirectory) -> list[Variant]:
    config = _config(directory)
    last = config.base_layers - config.depth
    chosen = sorted({value for value in range(config.k - 3, config.k + 3) if 1 <= value <= last})
    return [Variant(f"K = {value}", {"k": value}) for value in chosen]


def _depths(directory: RunDirectory) -> list[Variant]:
    deepest = min(4, _config(directory).base_layers - _config(directory).k)
    return [Variant(f"T = {value}", {"depth": value}) for value in range(1, deepest + 1)]


def _shares(directory: RunDirectory) -> list[Variant]:
    """Fewer labels, each seen more often, for the same number of steps."""
    key, epochs = "sdrpn.optimisation.num_train_epochs", directory.recipe.sdrpn.optimisation.num_train_epochs
    return [
        Variant(f"{share:.0%} of the labels", {"sdrpn.share": share, key: round(epochs / share)})
        for share in (0.05, 0.1, 0.25, 0.5, 1.0)
    ]


def _rules(_: RunDirectory) -> list[Variant]:
    foreground, background = "labelling.rules.foreground", "labelling.rules.background"
    return [
        Variant(f"foreground {high:g}, background {low:g}", {foreground: high, background: low})
        for high, low in ((0.1, 0.1), (0.2, 0.05), (0.25, 0.05), (0.25, 0.1), (0.4, 0.05))
    ]


def _thresholds(_: RunDirectory) -> list[Variant]:
    absolute, shares = (0.02, 0.05, 0.1, 0.15, 0.2, 0.3), (0.2, 0.35, 0.5, 0.7)
    return [
        Variant("calibrated"),
        *(Variant(f"{value:g}", reading={"threshold": value}) for value in absolute),
        *(Variant(f"{value:g} of the peak", reading={"peak_share": value}) for value in shares),
    ]


def _gates(directory: RunDirectory) -> list[Variant]:
    found = _config(directory).evidence.get("training_free")
    if found is None:
        raise ConfigError(
            f"{directory.final('calibrate')} has no figures of a training-free gate. Calibrate it again, "
            "on held-out questions that need a zoom and ones that need none."
        )
    free = {"gate": "statistics", "peak_to_mean": max(1.0, found["threshold"])}
    learned = Variant("learned", policy="implicit")
    return [learned, Variant("training-free", reading=free, policy="implicit"), Variant("off")]


def _sources(directory: RunDirectory) -> list[Variant]:
    found = [Variant("SD-RPN"), Variant("the attention, all of it", policy="oracle", attention="tight")]
    if directory.recipe.box is not None:
        found.append(Variant("the attention, a box of the same sides", policy="oracle", attention="fixed"))
    return found


def _positions(_: RunDirectory) -> list[Variant]:
    return [Variant(name, reading={"positions": name}) for name in ("plain", "aligned")]


def _postsft(directory: RunDirectory) -> list[Variant]:
    if directory.base is None:
        raise ConfigError(
            f"{directory.output} has no base of post-SFT. Run `qzoom train postsft` with its recipe first."
        )
    return [Variant("without", after=("sdrpn",)), Variant("with", after=("sdrpn", "postsft"))]


ABLATIONS: Final[dict[str, Ablation]] = {
    "k": Ablation("layers before the branches (K)", _layers),
    "depth": Ablation("depth of SD-RPN (T)", _depths),
    "labels": Ablation("how many labels, with as many steps", _shares),
    "label-thresholds": Ablation("what counts as foreground and background of a label", _rules),
    "thresholds": Ablation("what counts as foreground of the map", _thresholds),
    "source": Ablation("SD-RPN, or the attention of the answer that it learned from", _sources),
    "gate": Ablation("gate learned, training-free or off", _gates, EVERY),
    "positions": Ablation("positions of a crop", _positions),
    "postsft": Ablation("with and without post-SFT", _postsft),
}


def ablate(
    name: str,
    run: Path,
    out: Path,
    *,
    n: int,
    seed: int = 0,
    progress: Callable[[str], Callable[[int], None]] = lambda task: lambda done: None,
) -> str:
    """Train the variants that need it, measure all, and return a Markdown table, also written to `out`/NAME.md.

    Args:
        name: One of `ABLATIONS`.
        run: Output folder of a finished run of `qzoom train branches`.
        out: Folder for the results.
        n: Boards of each task.
        seed: Seed of the boards.
        progress: Returns for a task the function that is called with the number of rows done.

    Raises:
        ConfigError: There is no such ablation, or `run` is not a finished run.
    """
    if name not in ABLATIONS:
        raise ConfigError(f"There is no ablation '{name}'. Choose one of: {', '.join(ABLATIONS)}.")
    if not (run / "recipe.yaml").exists() or not (run / "calibrate" / "final").exists():
        raise ConfigError(f"{run} is no finished run of `qzoom train branches`. Give its output folder as --run.")
    ablation, folder = ABLATIONS[name], out / name
    directory = RunDirectory(load_branch_recipe(run / "recipe.yaml"), run)
    variants = ablation.variants(directory)
    bases: dict[bool, HFBackend] = {}
    agents, boxes = {}, {}
    for one in variants:
        branches, tuned = _branches(directory, one, folder)
        if tuned not in bases:
            bases[tuned] = directory.backend(base=directory.base if tuned else None)
        backend = copy(bases[tuned])  # the weights are those of all variants
        backend.branches = Branches.load(branches, backend.model)
        config = AgentConfig(policy=one.policy).replace(perception=one.reading)
        if one.attention is not None:
            config = config.replace(oracle_margin=0.0)
            boxes[one.name] = _attended(directory, backend, one.attention)
        agents[one.name] = Agent(backend, config=config)
    measured = {
        task: measure(agents, task, n=n, seed=seed, boxes=boxes, journal=folder / f"{task}.jsonl", note=progress(task))
        for task in ablation.tasks
    }
    header = [ablation.summary, *(name for task in measured for name in (task, "in crop", "zooms"))]
    rows = [[one.name, *(cell for table in measured.values() for cell in _cells(table[one.name]))] for one in variants]
    text = markdown_table(header, rows)
    (out / f"{name}.md").write_text(text + "\n", encoding="utf-8")
    return text


def _cells(cells: Sequence[Cell]) -> tuple[str, ...]:
    right = sum(cell.correct for cell in cells)
    low, high = wilson(right, len(cells))
    covered = [cell.covered for cell in cells if cell.covered is not None]
    inside = percent(sum(covered) / len(covered), 1) if covered else "-"
    zooms = sum(cell.zoomed for cell in cells) / len(cells)
    return f"{percent(right / len(cells), 1)} ({percent(low, 1)} to {percent(high, 1)})", inside, percent(zooms)


def _config(directory: RunDirectory) -> BranchConfig:
    return BranchConfig.model_validate_json((directory.final("calibrate") / CONFIG).read_text(encoding="utf-8"))


def _branches(directory: RunDirectory, variant: Variant, folder: Path) -> tuple[Path, bool]:
    """Return the branches of a variant, trained and calibrated if needed, and whether they are for the tuned base."""
    if variant.recipe:
        return _calibrated(directory, variant.recipe, folder / variant.name.replace(" ", "_")), False
    if variant.after:
        return _calibrated(directory, {}, folder / variant.name, after=variant.after), "postsft" in variant.after
    return directory.final("calibrate"), directory.base_of("calibrate") is not None


def _calibrated(
    directory: RunDirectory, changes: dict[str, Any], folder: Path, *, after: Sequence[StageName] = ()
) -> Path:
    """Train and calibrate SD-RPN with a changed recipe, or calibrate the results of the stages `after`; no gate."""
    data = directory.recipe.model_dump(mode="json")
    for key, value in changes.items():
        set_key(data, key, value, kind=BranchRecipe)
    other = RunDirectory(BranchRecipe.model_validate(data), folder)
    folder.mkdir(parents=True, exist_ok=True)
    same_maps = keys_read_by(other.recipe, "label") == keys_read_by(directory.recipe, "label")
    for made in ("heads.json", *(("labels",) if same_maps else ()), *after):
        if (directory.output / made).exists() and not (folder / made).exists():
            (folder / made).unlink(missing_ok=True)  # a link to where the run was before it was moved
            (folder / made).symlink_to((directory.output / made).resolve())
    run_stage(other, "sdrpn")
    run_stage(other, "calibrate")
    return other.final("calibrate")


def _attended(
    directory: RunDirectory, backend: HFBackend, around: Literal["tight", "fixed"]
) -> Callable[[Sample], Sequence[Box]]:
    """Return a crop around the attention that labels are made of, the baseline of SD-RPN's paper.

    It is "tight" around all attention, as published, or "fixed" in a box of the recipe's sides, as SD-RPN's.
    """
    recipe, labelling = directory.recipe, directory.recipe.labelling
    if labelling.response == "gold":  # which is not known here
        labelling = labelling.model_copy(update={"response": "own"})
    heads = heads_for(labelling, "textual", model=recipe.model, selected=directory.heads())
    ratio = labelling.used_norm_ratio

    def boxes(question: Sample) -> Sequence[Box]:
        (one,), said = attended_answers(backend, [question], labelling)
        (((heat, sink),),) = collect(backend, [one], said, heads, labelling, k=branches_of(backend).config.k)
        found = labels_on_grid(heat, sink, heat.shape, CROP_BASELINE, norm_ratio=ratio, shown=padded_size(one))
        box = found.box
        if around == "fixed":
            clean = np.where(found.excluded, 0.0, heat)
            share = 0.0 if recipe.peak_share is None else recipe.peak_share
            some = regions(torch.as_tensor(clean), clean > share * clean.max(), sides=recipe.box)
            box = some[0] if some else box
        return [in_pixels(box, one.cells, one.store.view("coarse"))]

    return boxes
