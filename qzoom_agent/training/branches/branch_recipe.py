"""What `qzoom train branches` and its stages do: one recipe for one base.

Stages share an output folder and find in it what the ones before wrote. A section that a base does not need may be left
out; defaults are the published settings (Q-Zoom, arXiv 2604.06912, and its released scripts).
"""

from pathlib import Path
from typing import Annotated, Any, Literal, get_args

from pydantic import Field, model_validator
from transformers.trainer_utils import SchedulerType

from qzoom_agent.config import Blur, Sides
from qzoom_agent.errors import ConfigError
from qzoom_agent.models.presets import preset_of
from qzoom_agent.perception.labels import HEADS, LabelRules
from qzoom_agent.training.branches.attending import Asking
from qzoom_agent.training.branches.dataset import DatasetSpec
from qzoom_agent.training.recipe_io import Section, read_recipe

StageName = Literal["select-heads", "label", "sdrpn", "postsft", "gate", "calibrate"]


class HeadSearch(Section):
    """How `select-heads` finds the heads whose attention makes the labels."""

    records: int = Field(default=200, gt=0)
    """Questions to look at, of each source its share."""
    count: int = Field(default=4, gt=0)
    """Heads to take."""
    from_layer: float = Field(default=0.4, ge=0, lt=1)
    """Share of the depth below which no head is looked at: lower ones look at everything that stands out."""


class Labelling(Section):
    """How `label` collects attention."""

    tokens: int | None = Field(default=None, gt=0)
    """Most visual tokens of the view that is labelled; None: the model's preset. More than the branch will read helps:
    where print is legible, attention is sharp."""
    grounding: dict[int, list[int]] | Literal["selected", "published"] = "selected"
    """Heads by layer; or those that `select-heads` chose, or those published for this base."""
    sink: dict[int, list[int]] | Literal["norm", "published", "none"] = "none"
    """What finds attention sinks: heads by layer, those published for this base, or the norm of hidden states."""
    published_for: str | None = None
    """Whose published heads those are; None: those of `model`, by its preset or hub id. For a folder with a copy of a
    published base, or weights that were tuned from it, say `qwen2.5-vl-7b`."""
    norm_ratio: float = Field(default=4.0, gt=1)
    """`sink: norm`: a token is a sink from this many times the median norm of its image."""
    asking: Asking = "answer"
    """Whose attention counts: the answer's tokens but for the last, as published, or those that predict it."""
    response: Literal["own", "gold", "call"] = "own"
    """The answer: what the model says itself, or the dataset's, or what it says when it is offered the zoom tool. Where
    it calls, the tokens that say where look there: what asking for boxes does for scenes in the published recipe."""
    keep: Literal["right", "crop", "all"] = "right"
    """Learn from questions that the model answers right, by rule; or right once it is shown the crop of its own map,
    which tells a map that finds the place from one that does not where print is illegible too; or from all."""
    max_new_tokens: int = Field(default=128, gt=0)
    batch: int = Field(default=8, gt=0)
    """Questions a pass."""
    rules: LabelRules = LabelRules()
    """Where the lines between foreground, background and neither are."""

    def published_base(self, model: str) -> str | None:
        """The base whose published heads are meant, for this model; None where none are asked for.

        Raises:
            ConfigError: none are published for it.
        """
        if "published" not in (self.grounding, self.sink):
            return None
        base = self.published_for or preset_of(model) or model
        if base not in HEADS:
            raise ConfigError(
                f"No heads are published for '{self.published_for or model}' (there are for {', '.join(HEADS)}). If "
                "its weights are, or come from, one of these, name it as labelling.published_for. Else let "
                "select-heads choose (labelling.grounding: selected), and take another labelling.sink."
            )
        return base


class Optimisation(Section):
    """How one stage is trained."""

    learning_rate: float = Field(default=1e-4, gt=0)
    epochs: int = Field(default=1, gt=0)
    batch: int = Field(default=16, gt=0)
    """Rows on each device."""
    accumulation: int = Field(default=1, gt=0)
    schedule: SchedulerType = SchedulerType.COSINE
    warmup: float = Field(default=0.03, ge=0, lt=1)
    """Share of the steps."""
    weight_decay: float = Field(default=0.0, ge=0)
    adam_beta2: float = Field(default=0.999, gt=0, lt=1)
    gradient_checkpointing: bool = False
    log_steps: int = Field(default=10, gt=0)
    save_steps: int = Field(default=200, gt=0)
    """Steps between checkpoints; a killed run loses at most these."""
    workers: int = Field(default=1, ge=0)
    """Processes that read and draw images."""
    report_to: str = "none"
    """A tracker of transformers: tensorboard, wandb, ..."""


class SDRPNStage(Section):
    """How `sdrpn` is trained."""

    optimisation: Optimisation = Optimisation()
    tokens: list[int | None] = Field(default=[None])
    """Budgets of coarse views to train on, each row at one of them."""
    share: float = Field(default=1.0, gt=0, le=1)
    """Share of the usable labels to train on."""
    report: int | None = Field(default=None, gt=0)
    """Held-out questions that localisation is measured on afterwards, at each budget (None: all)."""


class GateStage(Section):
    """How `gate` is labelled and trained."""

    optimisation: Optimisation = Optimisation()
    tokens: list[int] = Field(default=[64, 128, 256, 512], min_length=2)
    """Ascending budgets that each question is answered at."""
    read_tokens: list[int] | None = None
    """Those of them that the gate will read at; None: all but the last."""
    with_crop: bool = False
    """Answer with the crop that SD-RPN proposes as well, as if that were the highest budget."""
    own_calls: bool = False
    """Where that crop does not answer it, let the model zoom by itself, and count that instead."""
    consensus: bool = False
    """Learn from no question whose two highest budgets do not both give one right answer, as published."""
    data: list[DatasetSpec] | None = Field(default=None, min_length=1)
    """What is asked; None: the recipe's `data`."""
    records: int | None = Field(default=None, gt=0)
    """Questions to answer, of each source its share (None: all there are)."""
    max_new_tokens: int = Field(default=32, gt=0)
    batch: int = Field(default=8, gt=0)

    @model_validator(mode="after")
    def _ascending(self) -> "GateStage":
        if self.own_calls and not self.with_crop:
            raise ValueError("own_calls come after a crop that was not enough: they need with_crop")
        if self.consensus and self.with_crop:
            raise ValueError("a consensus of the two highest budgets drops what only the crop answers: with_crop or it")
        if sorted(set(self.tokens)) != self.tokens:
            raise ValueError(f"budgets have to ascend; got {self.tokens}")
        strange = sorted(set(self.read_tokens or ()) - set(self.tokens))
        if strange:
            raise ValueError(f"read_tokens has budgets that are not in tokens: {strange}")
        return self

    @property
    def budgets_read(self) -> list[int]:
        """Indices of the budgets that the gate reads at."""
        chosen = self.tokens[:-1] if self.read_tokens is None else self.read_tokens
        return [self.tokens.index(budget) for budget in chosen]


class PostSFTStage(Section):
    """How the base learns to live with crops (`postsft`)."""

    optimisation: Optimisation = Optimisation(learning_rate=1e-6, batch=1, accumulation=16)
    data: list[DatasetSpec] | None = Field(default=None, min_length=1)
    """What is asked; None: the recipe's `data`."""
    records: int | None = Field(default=None, gt=0)
    """Questions to answer with and without a crop, of each source its share (None: all there are)."""
    helped: float = Field(default=0.0, ge=0)
    """Cases in which the crop helped, for each case in which it hurt."""
    noise: float = Field(default=0.8, ge=0, le=1)
    """Probability that a proposed box is replaced by a random one."""
    noise_side: tuple[float, float] = (0.1, 0.6)
    """Sides of random boxes, as a share of the image's."""
    positions: Literal["plain", "aligned"] = "aligned"
    """Positions of the crop."""
    target: Literal["own", "gold"] = "own"
    """Answers to learn: the model's own right one without a crop, or the dataset's."""
    judge: str | None = None
    """Base URL of an OpenAI-compatible server that judges free-form answers; None: by rule."""
    judge_model: str = "default"
    refit: Optimisation = Optimisation()
    """How SD-RPN is fitted again to the base that came out, from the weights it has."""
    refit_records: int | None = Field(default=20_000, gt=0)
    """Questions of the recipe's `data` that are labelled anew for that, of each source its share (None: all)."""
    max_new_tokens: int = Field(default=128, gt=0)
    batch: int = Field(default=8, gt=0)


class Calibration(Section):
    """Which thresholds `calibrate` chooses."""

    needed_recall: float = Field(default=0.98, gt=0, le=1)
    """Share of the questions that need a zoom of which the gate has to let this many through ..."""
    zoom_share: float | None = Field(default=None, gt=0, lt=1)
    """... or, instead, share of all questions that may zoom ..."""
    needless: float | None = Field(default=None, ge=0, lt=1)
    """... or, instead, share of the questions that need no zoom that may be zoomed all the same. The lowest threshold
    that allows it is taken: a zoom too many costs a crop, one too few the answer."""
    box_recall: float = Field(default=0.98, gt=0, le=1)
    """Share of the needles that have to lie (95 % of them) in the proposed box. The highest threshold that does so is
    taken, or where none does the one that comes closest. Where no box is known it says nothing: then the threshold is
    taken whose crops make most of the questions right that need a zoom."""
    blurs: list[Blur] | None = Field(default=None, min_length=1)
    """Blurs of the map to try; None: the recipe's own alone."""
    margins: list[Annotated[float, Field(ge=0, le=10)]] | None = Field(default=None, min_length=1)
    """Margins of the box to try; None: the recipe's own alone. Of all pairs that reach `box_recall`, each at its
    highest threshold, the one with the smallest boxes is taken."""
    records: int | None = Field(default=None, gt=0)
    """Held-out questions to take (None: all)."""
    tokens: int | None = Field(default=None, gt=0)
    """Most visual tokens of the view that is looked at; None: the model's preset."""
    higher_tokens: list[Annotated[int, Field(gt=0)]] | None = Field(default=None, min_length=1)
    """Where no box is known: budgets at which the questions are asked again that are wrong over that view. Those that
    become right need a zoom. None: those budgets of `gate.tokens` that are higher."""

    @model_validator(mode="after")
    def _one_target_of_the_gate(self) -> "Calibration":
        if self.zoom_share is not None and self.needless is not None:
            raise ValueError("`zoom_share` and `needless` both say where the gate's threshold lies: give one of them")
        return self


class BranchRecipe(Section):
    """What the stages do with one base."""

    model: str = "nano"
    """Preset, hub id or folder of the base."""
    dtype: str = "auto"
    seed: int = Field(default=0, ge=0)
    k: int | None = Field(default=None, gt=0)
    """Decoder layers before the branches; None: about 0.65 of them."""
    depth: int = Field(default=3, ge=1)
    gate_depth: int = Field(default=3, ge=1)
    positions: Literal["plain", "aligned"] = "plain"
    """Positions of an inserted crop that the base was trained with."""
    peak_share: float | None = Field(default=None, gt=0, lt=1)
    """Foreground of a map from this share of its peak on, a start that calibration changes. None: as published, from an
    absolute threshold, of which calibration then finds one."""
    blur: Blur = "fixed"
    """Blur of a map before that; a start likewise."""
    margin: float = Field(default=0.0, ge=0)
    """What is added on each side of a proposed box, as a share of its longer side; a start likewise."""
    box: Sides | None = None
    """Sides of a proposed box around the centre of the heat (`perception.box`); None: tight around the foreground."""
    stages: list[StageName] = Field(default=list(get_args(StageName)))
    """What `qzoom train branches` runs, in order."""
    data: list[DatasetSpec] = Field(min_length=1)
    """What is learned from; `gate` and `postsft` may have `data` of their own."""
    held_out: list[DatasetSpec] = Field(default=[])
    """What metrics and thresholds are measured on; never trained on."""
    heads: HeadSearch = HeadSearch()
    labelling: Labelling = Labelling()
    sdrpn: SDRPNStage = SDRPNStage()
    gate: GateStage = GateStage()
    postsft: PostSFTStage = PostSFTStage()
    calibration: Calibration = Calibration()

    def asked(self, stage: str) -> list[DatasetSpec]:
        """The questions of a stage."""
        return {"gate": self.gate.data, "postsft": self.postsft.data}.get(stage) or self.data

    @model_validator(mode="after")
    def _heads_are_published(self) -> "BranchRecipe":
        self.labelling.published_base(self.model)
        return self


def load_branch_recipe(path: Path, **changes: Any) -> BranchRecipe:
    """Read a recipe; see `read_recipe`."""
    return read_recipe(path, BranchRecipe, **changes)
