"""One choice of the branches changed, everything else as it was: which way would have been better, and by how much.

Variants that have to be trained are, each in a folder of its own, from the labels of a finished run of `qzoom train
branches`; those that only read the same branches otherwise are not. Each trained variant gets thresholds of its own by
the same calibration. Then all are measured in one interleaved run on boards nobody was trained on.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final, NamedTuple

from yaml import safe_load

from qzoom_agent.agent import Agent
from qzoom_agent.backends.hf import HFBackend
from qzoom_agent.config import AgentConfig, PolicyName
from qzoom_agent.errors import ConfigError
from qzoom_agent.evals.interleaved import Cell, measure
from qzoom_agent.evals.stats import wilson
from qzoom_agent.evals.suites.base import Sample
from qzoom_agent.geometry import Box
from qzoom_agent.perception.branches import CONFIG, BranchConfig
from qzoom_agent.perception.labels import CROP_BASELINE
from qzoom_agent.rl.branches.asking import ask
from qzoom_agent.rl.branches.attending import answers
from qzoom_agent.rl.branches.labelling import collect, heads_for, labels_on
from qzoom_agent.rl.branches.metrics import in_pixels
from qzoom_agent.rl.branches.recipe import BranchRecipe
from qzoom_agent.rl.branches.records import Record
from qzoom_agent.rl.branches.run import STAGES
from qzoom_agent.rl.branches.workshop import Workshop

FINE: Final = ("needle-scene", "needle-doc")
EVERY: Final = (*FINE, "needle-global")


@dataclass(frozen=True)
class Variant:
    """One way to do it."""

    name: str
    recipe: dict[str, Any] = field(default_factory=dict)
    """Keys of the recipe that differ, dotted; any means that SD-RPN is trained again."""
    reading: dict[str, Any] = field(default_factory=dict)
    """Keys of `perception` that differ when the branches are read."""
    policy: PolicyName = "always"
    fine_tuned: bool = True
    """On the base that post-SFT left, if there is one."""


class Ablation(NamedTuple):
    """A choice."""

    summary: str
    variants: Callable[[Workshop], list[Variant]]
    suites: tuple[str, ...] = FINE


def _layers(shop: Workshop) -> list[Variant]:
    config = _config(shop)
    last = config.base_layers - config.depth
    chosen = sorted({value for value in range(config.k - 3, config.k + 3) if 1 <= value <= last})
    return [Variant(f"K = {value}", {"k": value}) for value in chosen]


def _depths(shop: Workshop) -> list[Variant]:
    config = _config(shop)
    deepest = min(4, config.base_layers - config.k)
    return [Variant(f"T = {value}", {"depth": value}) for value in range(1, deepest + 1)]


def _shares(shop: Workshop) -> list[Variant]:
    """Fewer labels, each seen more often: as many steps."""
    epochs = shop.recipe.sdrpn.optimisation.epochs
    return [
        Variant(
            f"{share:.0%} of the labels", {"sdrpn.share": share, "sdrpn.optimisation.epochs": round(epochs / share)}
        )
        for share in (0.05, 0.1, 0.25, 0.5, 1.0)
    ]


def _rules(_: Workshop) -> list[Variant]:
    pairs = ((0.1, 0.1), (0.2, 0.05), (0.25, 0.05), (0.25, 0.1), (0.4, 0.05))
    return [
        Variant(
            f"foreground {high:g}, background {low:g}",
            {"labelling.rules.foreground": high, "labelling.rules.background": low},
        )
        for high, low in pairs
    ]


def _thresholds(_: Workshop) -> list[Variant]:
    found = [Variant("calibrated")]
    found += [Variant(f"{value:g}", reading={"threshold": value}) for value in (0.02, 0.05, 0.1, 0.15, 0.2, 0.3)]
    shares = (0.2, 0.35, 0.5, 0.7)
    return [*found, *(Variant(f"{value:g} of the peak", reading={"peak_share": value}) for value in shares)]


def _gates(shop: Workshop) -> list[Variant]:
    found = _config(shop).evidence.get("training_free")
    if found is None:
        raise ConfigError(f"{shop.final('calibrate')} says nothing of a training-free gate. Calibrate it again.")
    free = {"gate": "statistics", "peak_to_mean": max(1.0, found["threshold"])}
    return [
        Variant("learned", policy="implicit"),
        Variant("training-free", reading=free, policy="implicit"),
        Variant("off", policy="always"),
    ]


ABLATIONS: Final[dict[str, Ablation]] = {
    "k": Ablation("layers before the branches (K)", _layers),
    "depth": Ablation("depth of SD-RPN (T)", _depths),
    "labels": Ablation("how many labels, with as many steps", _shares),
    "label-thresholds": Ablation("what counts as foreground and background of a label", _rules),
    "thresholds": Ablation("what counts as foreground of the map", _thresholds),
    "source": Ablation(
        "SD-RPN, or the attention of the answer that it learned from",
        lambda _: [Variant("SD-RPN"), Variant("raw attention", policy="oracle")],
    ),
    "gate": Ablation("gate learned, training-free or off", _gates, EVERY),
    "positions": Ablation(
        "positions of a crop",
        lambda _: [Variant(name, reading={"positions": name}) for name in ("plain", "aligned")],
    ),
    "postsft": Ablation(
        "with and without post-SFT",
        lambda _: [Variant("without", fine_tuned=False), Variant("with")],
    ),
}


def ablate(
    name: str,
    run: Path,
    out: Path,
    *,
    n: int,
    seed: int = 0,
    progress: Callable[[str], Callable[[int], None]] = lambda suite: lambda done: None,
) -> str:
    """Train what has to be trained, measure all variants, and return a Markdown table, also written to `out`/NAME.md.

    Raises:
        ConfigError: there is no such ablation, or `run` is not a finished run.
    """
    if name not in ABLATIONS:
        raise ConfigError(f"There is no ablation '{name}'. Choose one of: {', '.join(ABLATIONS)}.")
    ablation, shop = ABLATIONS[name], _finished(run)
    variants = ablation.variants(shop)
    if name == "postsft" and shop.base is None:
        raise ConfigError(f"{run} has no base of post-SFT. Run `qzoom train postsft` with its recipe first.")
    folder = out / name
    backends = {one.name: _backend(shop, one, folder) for one in variants}
    agents, boxes = {}, {}
    for one in variants:
        config = AgentConfig(policy=one.policy).replace(perception=one.reading)
        if one.policy == "oracle":
            config = config.replace(oracle_margin=0.0)
            boxes[one.name] = _attended(shop, backends[one.name])
        agents[one.name] = Agent(backends[one.name], config=config)
    measured = {
        suite: measure(
            agents, suite, n=n, seed=seed, boxes=boxes, journal=folder / f"{suite}.jsonl", note=progress(suite)
        )
        for suite in ablation.suites
    }
    lines = [f"| {ablation.summary} | " + " | ".join(f"{suite} | in crop | zooms" for suite in measured) + " |"]
    lines.append("|---" * (1 + 3 * len(measured)) + "|")
    for one in variants:
        lines.append(f"| {one.name} | " + " | ".join(_cells(table[one.name]) for table in measured.values()) + " |")
    text = "\n".join(lines)
    (out / f"{name}.md").write_text(text + "\n", encoding="utf-8")
    return text


def _cells(cells: Sequence[Cell]) -> str:
    right = sum(cell.correct for cell in cells)
    low, high = wilson(right, len(cells))
    covered = [cell.covered for cell in cells if cell.covered is not None]
    inside = f"{sum(covered) / len(covered):.1%}" if covered else "-"
    zooms = sum(cell.zoomed for cell in cells) / len(cells)
    return f"{right / len(cells):.1%} ({low:.1%} to {high:.1%}) | {inside} | {zooms:.0%}"


def _finished(run: Path) -> Workshop:
    file = run / "recipe.yaml"
    if not file.exists() or not (run / "calibrate" / "final").exists():
        raise ConfigError(f"{run} is no finished run of `qzoom train branches`. Give its output folder as --run.")
    return Workshop(BranchRecipe.model_validate(safe_load(file.read_text(encoding="utf-8"))), run)


def _config(shop: Workshop) -> BranchConfig:
    return BranchConfig.model_validate_json((shop.final("calibrate") / CONFIG).read_text(encoding="utf-8"))


def _backend(shop: Workshop, variant: Variant, folder: Path) -> HFBackend:
    """The base with the branches of a variant, trained here if the variant asks for it."""
    if not variant.recipe:
        branches = shop.final("calibrate") if variant.fine_tuned else _calibrated(shop, {}, folder / "without")
        return shop.backend(branches=branches, fine_tuned=variant.fine_tuned)
    return shop.backend(branches=_calibrated(shop, variant.recipe, folder / variant.name.replace(" ", "_")))


def _calibrated(shop: Workshop, changes: dict[str, Any], folder: Path) -> Path:
    """SD-RPN of a changed recipe, without a gate, with thresholds of its own."""
    data = shop.recipe.model_dump(mode="json")
    for key, value in changes.items():
        *sections, last = key.split(".")
        place = data
        for section in sections:
            place = place[section]
        place[last] = value
    other = Workshop(BranchRecipe.model_validate(data), folder)
    folder.mkdir(parents=True, exist_ok=True)
    for made in ("heads.json", "labels"):
        if (shop.output / made).exists() and not (folder / made).exists():
            (folder / made).symlink_to((shop.output / made).resolve())
    for stage in ("sdrpn", "calibrate"):
        if not other.result(stage).exists():
            print(f"== {folder.name}: {stage}", flush=True)
            STAGES[stage](other)
    return other.final("calibrate")


def _attended(shop: Workshop, backend: HFBackend) -> Callable[[Sample], Sequence[Box]]:
    """Where the answer's own attention points: the crop baseline of SD-RPN's paper (it answers twice)."""
    labelling = shop.recipe.labelling
    heads = heads_for(labelling, "textual", model=shop.recipe.model, selected=shop.heads())

    def boxes(question: Sample) -> Sequence[Box]:
        record = Record(
            id=question.id,
            image=question.image,
            image_id=question.id,
            question=question.question,
            answer=question.answer,
            answers=[question.answer],
            exact=True,
            boxes=None,
            mode="textual",
            short_labels=True,
        )
        (one,) = ask(backend, [record], [None])
        said = answers(backend, [one], max_new_tokens=labelling.max_new_tokens)
        ((heat, sink),) = collect(backend, [one], said, heads, asking=labelling.asking)
        _, rows, columns = one.grid
        found = labels_on(heat, sink, (rows, columns), CROP_BASELINE, norm_ratio=None)
        return [in_pixels(found.box, (rows, columns), one.store.view("coarse"))]

    return boxes
