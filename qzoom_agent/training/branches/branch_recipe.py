"""The recipe of `qzoom train branches` and its stages: one file for one base.

Defaults are the published settings (Q-Zoom, arXiv 2604.06912, and its released scripts), but for the foreground of a
map: it is a share of the map's peak, and its connected regions get a crop each, as in the successor of the method
(Vision-RL2, arXiv 2609.19745).
"""

from pathlib import Path
from typing import Annotated, Any, ClassVar, Final, Literal, get_args

from pydantic import Field, field_validator, model_validator
from transformers.trainer_utils import SchedulerType

from qzoom_agent.config import Blur, Sides
from qzoom_agent.errors import ConfigError
from qzoom_agent.models.presets import preset_of
from qzoom_agent.perception.branch_config import InsideCrops
from qzoom_agent.perception.labels import HEADS, LabelRules
from qzoom_agent.training.branches.dataset import DatasetSpec
from qzoom_agent.training.recipe_io import Section, read_recipe

StageName = Literal["select-heads", "label", "sdrpn", "postsft", "regions", "gate", "calibrate", "further"]
PUBLISHED_STAGES: tuple[StageName, ...] = tuple(
    stage for stage in get_args(StageName) if stage not in ("regions", "further")
)
"""The published stages, after which the model looks once."""
Tokens = Annotated[int, Field(gt=0)]
"""Most visual tokens of a view."""
Budgets = Annotated[list[Tokens | None], Field(min_length=1)]
"""Budgets of views; None: the model's preset."""
_Share = Annotated[float, Field(gt=0, le=1)]
_Heads = Annotated[dict[int, Annotated[list[int], Field(min_length=1)]], Field(min_length=1)]
Asking = Literal["answer", "prediction"]
"""Tokens whose attention counts: those of the answer but for the last, as published, or those that predict it."""


class HeadSearch(Section):
    """The search of `select-heads` for the heads whose attention makes the labels."""

    records: int = Field(default=200, gt=0)
    """Questions to look at, of each source its share."""
    count: int = Field(default=4, gt=0)
    """Heads to take."""
    from_layer: float = Field(default=0.4, ge=0, lt=1)
    """Share of the depth below which no head is scored: lower ones attend to everything that stands out."""


class Labelling(Section):
    """The collection of attention maps by `label`."""

    tokens: Tokens | None = None
    """Most visual tokens of the view that is labelled; None: the model's preset. Where print is legible, attention is
    sharp."""
    grounding: _Heads | Literal["selected", "published"] = "selected"
    """Heads by layer, those that `select-heads` chose, or those published for this base."""
    sink: dict[int, list[int]] | Literal["norm", "published", "none"] = "none"
    """Attention sinks are found by heads (by layer), by those published for this base, or by norms of hidden states."""
    published_for: str | None = None
    """Base whose published heads are taken (`qwen2.5-vl-7b`); None: `model`, by its preset or hub id."""
    norm_ratio: float = Field(default=4.0, gt=1)
    """`sink: norm`: a token is a sink from this many times the median norm of its image."""
    asking: Asking = "answer"
    response: Literal["own", "gold", "call"] = "own"
    """The answer: the model's own, the dataset's, or the model's own when it is offered the zoom tool: in a call the
    tokens of the box attend to its place."""
    keep: Literal["right", "crop", "all"] = "right"
    """Learn from questions that the model answers right; from those that it answers right with the crop of its own map,
    which tells good maps from bad ones even where print is illegible; or from all."""
    max_new_tokens: int = Field(default=128, gt=0)
    batch: int = Field(default=8, gt=0)
    """Questions a pass."""
    rules: LabelRules = LabelRules()
    """Thresholds between foreground, background and neither."""

    @property
    def used_norm_ratio(self) -> float | None:
        """`norm_ratio`, or None where sinks are not found by norms."""
        return self.norm_ratio if self.sink == "norm" else None

    def published_base(self, model: str) -> str | None:
        """Return the base whose published heads a recipe for this model asks for (None: it asks for none).

        Raises ConfigError if none are published for it.
        """
        if "published" not in (self.grounding, self.sink):
            return None
        base = self.published_for or preset_of(model) or model
        if base not in HEADS:
            raise ConfigError(
                f"No heads are published for '{self.published_for or model}' (there are for {', '.join(HEADS)}). Name "
                "one of these as labelling.published_for if its weights come from there, or set labelling.grounding: "
                "selected and another labelling.sink."
            )
        return base


_NEEDS_MORE: Final = {
    SchedulerType.COSINE_WITH_MIN_LR,
    SchedulerType.COSINE_WARMUP_WITH_MIN_LR,
    SchedulerType.WARMUP_STABLE_DECAY,
    SchedulerType.REDUCE_ON_PLATEAU,
    SchedulerType.GREEDY,
}
"""Schedules that cannot be made from a learning rate, a warm-up and a number of steps."""


class Optimisation(Section):
    """Training of one stage; keys are named as in transformers' `TrainingArguments`."""

    renamed: ClassVar = {
        "epochs": "num_train_epochs",
        "batch": "per_device_train_batch_size",
        "accumulation": "gradient_accumulation_steps",
        "schedule": "lr_scheduler_type",
        "warmup": "warmup_steps",
        "log_steps": "logging_steps",
        "workers": "dataloader_num_workers",
    }

    learning_rate: float = Field(default=1e-4, gt=0)
    num_train_epochs: int = Field(default=1, gt=0)
    per_device_train_batch_size: int = Field(default=16, gt=0)
    gradient_accumulation_steps: int = Field(default=1, gt=0)
    lr_scheduler_type: SchedulerType = SchedulerType.COSINE
    warmup_steps: float = Field(default=0.03, ge=0)
    """Steps of warm-up, or below 1 their share of all steps."""
    weight_decay: float = Field(default=0.0, ge=0)
    adam_beta2: float = Field(default=0.999, gt=0, lt=1)
    gradient_checkpointing: bool = False
    logging_steps: int = Field(default=10, gt=0)
    save_steps: int = Field(default=200, gt=0)
    """Steps between checkpoints: the most that an interruption loses."""
    dataloader_num_workers: int = Field(default=1, ge=0)
    """Processes that read and draw images. None where Python does not fork (macOS, Windows, and from 3.14 on Linux)."""
    report_to: str = "none"
    """A tracker of transformers: tensorboard, wandb, ..."""

    @field_validator("lr_scheduler_type")
    @classmethod
    def _needs_nothing_else(cls, given: SchedulerType) -> SchedulerType:
        if given in _NEEDS_MORE:
            left = ", ".join(one.value for one in SchedulerType if one not in _NEEDS_MORE)
            raise ValueError(f"{given.value} needs settings of its own or held-out losses. Choose one of: {left}")
        return given


class SDRPNStage(Section):
    """Training of SD-RPN (`sdrpn`)."""

    optimisation: Optimisation = Optimisation()
    tokens: Budgets = Field(default=[None])
    """Budgets of coarse views to train on, each row at one of them."""
    share: float = Field(default=1.0, gt=0, le=1)
    """Share of the usable labels to train on, of each source its part."""
    absent: float = Field(default=0.0, ge=0, le=1, exclude_if=lambda given: given == 0)
    """Questions more, as a share of the labels, that are asked of an image of another `topic`, where nothing is to be
    found: so that of several images the right one has the highest map."""
    report: int | None = Field(default=None, gt=0)
    """Held-out questions that localisation is measured on afterwards, at each budget (None: all)."""


class AskingStage(Section):
    """A stage that asks questions, and learns from the answers."""

    optimisation: Optimisation = Optimisation()
    data: list[DatasetSpec] | None = Field(default=None, min_length=1)
    """Questions; None: the recipe's `data`."""
    records: int | None = Field(default=None, gt=0)
    """Questions to ask, of each source its share (None: all there are)."""
    batch: int = Field(default=8, gt=0)
    """Conversations of one pass."""


class GateStage(AskingStage):
    """Labels and training of the gate (`gate`)."""

    tokens: list[Tokens] = Field(default=[64, 128, 256, 512], min_length=2)
    """Ascending budgets that each question is answered at."""
    read_tokens: list[Tokens] | None = Field(default=None, min_length=1)
    """Those of them that the gate will read at; None: all but the last."""
    with_crop: bool = False
    """Answer with the crop that SD-RPN proposes as well, which counts as the highest budget."""
    own_calls: bool = False
    """If that crop does not lead to the answer, let the model zoom by itself, and count that instead."""
    consensus: bool = False
    """Learn from no question whose two highest budgets do not both give one right answer, as published."""
    max_new_tokens: int = Field(default=32, gt=0)

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
        """The indices of the budgets that the gate reads at, in ascending order."""
        chosen = self.tokens[:-1] if self.read_tokens is None else self.read_tokens
        return sorted(self.tokens.index(budget) for budget in chosen)


class PostSFTStage(AskingStage):
    """Fine-tuning of the base on questions that a crop made it answer wrongly (`postsft`)."""

    optimisation: Optimisation = Optimisation(
        learning_rate=1e-6, per_device_train_batch_size=1, gradient_accumulation_steps=16
    )
    helped: float = Field(default=0.0, ge=0)
    """Cases in which the crop helped, for each case in which it hurt."""
    noise: float = Field(default=0.8, ge=0, le=1)
    """Probability that a proposed box is replaced by a random one."""
    noise_side: tuple[_Share, _Share] = (0.1, 0.6)
    """Sides of random boxes, as a share of the image's."""
    positions: Literal["plain", "aligned"] = "aligned"
    """Positions of the crop."""
    target: Literal["own", "gold"] = "own"
    """Answers to learn: the model's own right one without a crop, or the dataset's."""
    judge: str | None = None
    """Base URL of an OpenAI-compatible server that judges free-form answers; None: by rule."""
    judge_model: str = "default"
    refit: Optimisation = Optimisation()
    """Training of SD-RPN, from the weights it has, for the base that came out."""
    refit_records: int | None = Field(default=20_000, gt=0)
    """Questions of the recipe's `data` that are labelled anew for that, of each source its share (None: all)."""
    max_new_tokens: int = Field(default=128, gt=0)


class Calibration(Section):
    """The target of `calibrate`."""

    needed_recall: float = Field(default=0.98, gt=0, le=1)
    """Share of the questions that need a zoom that the gate has to let through ..."""
    zoom_share: float | None = Field(default=None, gt=0, lt=1)
    """... or, instead, share of all questions that may zoom ..."""
    needless: float | None = Field(default=None, ge=0, lt=1)
    """... or, instead, share of the questions that need no zoom that may be zoomed all the same; the lowest threshold
    that allows it is taken."""
    box_recall: float = Field(default=0.98, gt=0, le=1)
    """Share of the needles of which 95 % have to lie in the proposed box, as far as it can be reached. Where no box is
    known, the threshold is taken instead whose crops make most of the questions right that need a zoom."""
    blurs: list[Blur] | None = Field(default=None, min_length=1)
    """Blurs of the map to try; None: the recipe's own alone."""
    margins: list[Annotated[float, Field(ge=0, le=10)]] | None = Field(default=None, min_length=1)
    """Margins of the box to try; None: the recipe's own alone. The pair with the smallest boxes is taken."""
    records: int | None = Field(default=None, gt=0)
    """Held-out questions to take (None: all)."""
    tokens: Tokens | None = None
    """Most visual tokens of the view that is looked at; None: the model's preset."""
    higher_tokens: list[Tokens] | None = Field(default=None, min_length=1)
    """Without a known box: higher budgets for questions that are wrong over that view; those that become right need a
    zoom. None: those of `gate.tokens`."""

    @model_validator(mode="after")
    def _one_target_of_the_gate(self) -> "Calibration":
        if self.zoom_share is not None and self.needless is not None:
            raise ValueError("`zoom_share` and `needless` both say where the gate's threshold lies: give one of them")
        return self


class RegionsStage(AskingStage):
    """Region-level reinforcement of SD-RPN from answers (`regions`)."""

    tokens: Budgets = Field(default=[None])
    """Budgets of coarse views that questions are read at in turn."""
    rounds: int = Field(default=1, gt=0)
    """Times that all questions are read, each time with the map so far, and then trained on. Epochs are those of one
    round."""
    certain: float = Field(default=0.9, gt=0, lt=1)
    """Probability of the answer from which nothing is missed: no candidate is read where the proposed regions reach it,
    and nothing is learned where the coarse view alone does."""
    next_peaks: int = Field(default=4, ge=0)
    """Candidates around the next peaks of a map ..."""
    moves: int = Field(default=4, ge=0)
    """... and candidates that are proposed regions, moved at random ..."""
    reach: float = Field(default=0.5, gt=0, le=1)
    """... by at most this share of their sides."""
    controls: float = Field(default=0.25, ge=0, le=1)
    """Share of the questions for which a control region is read."""
    noise: float = Field(default=0.75, gt=0, le=1)
    """The noise margin is this quantile of what control regions gain in a round ..."""
    least_margin: float = Field(default=0.5, ge=0)
    """... but at least this much log-odds."""
    anchor: float = Field(default=0.3, ge=0)
    """Weight of the divergence from the map that training began with."""
    batch: int = Field(default=16, gt=0)


class FurtherStage(AskingStage):
    """Labels and training of gate and SD-RPN for further looks (`further`)."""

    follow: Literal["calls", "attention"] = Field(default="calls", exclude_if=lambda given: given == "calls")
    """The next crop is that of the model's own call. Or it is about the place that the token which would begin the
    answer attends to, where that is the place of the answer (such as a close-up of a crop): no call is needed, nor is a
    gate, without which every question gets all `crops`."""
    crops: int = Field(default=3, ge=2)
    """Most crops of a question: the crop of the first look, and those that follow."""
    enough: Literal["right", "same"] = "right"
    """The gate learns that the crops so far are enough where they lead to a right answer, or to the same answer as all
    crops that the model asks for, which needs no reference answers."""
    inside_crops: InsideCrops = False
    """Learn and propose regions inside crops, too, or `only` there. Without, regions of the coarse view alone."""
    box: Sides | None = Field(default=None, exclude_if=lambda given: given is None)
    """Sides of a proposed box, as shares of the view that it is a part of; None: as of the first look."""
    tokens: Budgets = Field(default=[None])
    """Budgets of coarse views to train on, each batch at one of them. Calls are made at `labelling.tokens`."""
    held_out: float = Field(default=0.15, gt=0, lt=1)
    """Share of the images that the gate's threshold is chosen on: where its errors are fewest."""
    max_new_tokens: int = Field(default=32, gt=0)

    @model_validator(mode="after")
    def _searches_what_it_follows(self) -> "FurtherStage":
        if self.follow == "attention" and not (self.inside_crops and self.box):
            raise ValueError("follow: attention looks for parts of crops: it needs inside_crops: only, and their box")
        if self.follow == "calls" and self.inside_crops == "only":
            raise ValueError("calls name places in the coarse view: inside_crops: only goes with follow: attention")
        return self


class BranchRecipe(Section):
    """The stages for one base."""

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
    peak_share: float | None = Field(default=0.3, gt=0, lt=1)
    """Foreground of a map from this share of its peak on, which holds for faint maps and clear ones; None: from an
    absolute threshold, as published. Calibration chooses the value."""
    max_regions: int = Field(default=2, ge=1, le=16)
    """Connected regions of the foreground that get a crop each, unless a user asks for another number; 1: one box
    around all foreground, as published. The stages themselves show one box."""
    blur: Blur = "fixed"
    """Blur of a map before that; calibration may change it, and the margin."""
    margin: float = Field(default=0.0, ge=0, le=10)
    """Margin added on each side of a proposed box, as a share of its longer side."""
    box: Sides | None = None
    """Sides of a proposed box around the centre of the heat (`perception.box`); None: tight around the foreground."""
    stages: list[StageName] = Field(default=list(PUBLISHED_STAGES), min_length=1)
    """Stages that `qzoom train branches` runs, in their order; with `further` at the end, the branches look again."""
    data: list[DatasetSpec] = Field(min_length=1)
    """Questions to learn from; `postsft`, `regions`, `gate` and `further` may have `data` of their own."""
    held_out: list[DatasetSpec] = Field(default=[])
    """Questions that metrics and thresholds are measured on; never trained on."""
    heads: HeadSearch = HeadSearch()
    labelling: Labelling = Labelling()
    sdrpn: SDRPNStage = SDRPNStage()
    gate: GateStage = GateStage()
    postsft: PostSFTStage = PostSFTStage()
    calibration: Calibration = Calibration()
    regions: RegionsStage = RegionsStage()
    further: FurtherStage = FurtherStage()

    def asked(self, stage: str) -> list[DatasetSpec]:
        """Return the questions of a stage."""
        return getattr(getattr(self, stage, None), "data", None) or self.data

    @model_validator(mode="after")
    def _can_be_run(self) -> "BranchRecipe":
        self.labelling.published_base(self.model)
        order = [stage for stage in get_args(StageName) if stage in self.stages]
        if self.stages != order:
            raise ValueError(f"each of the stages builds on those before it: {', '.join(order)}")
        if {"sdrpn", "further"} <= set(self.stages):
            if "calibrate" not in self.stages:
                raise ValueError("further starts from calibrated branches: put calibrate into the stages, before it")
            if "gate" not in self.stages and self.further.follow == "calls":
                raise ValueError("calls are followed until a gate ends it: put gate into the stages, before calibrate")
            if "gate" not in self.stages and self.labelling.keep != "all":
                raise ValueError("without a gate, further writes no answers: put gate in, or set labelling.keep: all")
        if self.sdrpn.absent and len({one.topic for one in self.data} - {None}) < 2:
            raise ValueError(
                "sdrpn.absent needs two or more sources in data with a topic each; give them, or leave it out"
            )
        return self


def load_branch_recipe(path: Path, **changes: Any) -> BranchRecipe:
    """Read a recipe; see `read_recipe`."""
    return read_recipe(path, BranchRecipe, **changes)
