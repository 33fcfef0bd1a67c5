"""Train nano: a small vision-language model from random weights, stage by stage.

A recipe lists stages; each has its own mix of batches, learning rate and loss weights, and starts from the weights of
the one before. Everything runs through `transformers.Trainer` over `datasets` tables whose rows are drawn when read, so
a killed run continues from its last checkpoint with the batches it would have seen.

    python rl/train_nano.py --config rl/recipes/nano/base.yaml --output runs/nano
    python rl/train_nano.py --config ... --stage read        (only up to and including this stage)
    python rl/train_nano.py --config ... --dry-run           (print the resolved recipe)
"""

import json
import math
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Final, Literal, cast

import torch
from datasets import Dataset
from pydantic import BaseModel, ConfigDict, Field, JsonValue, field_validator, model_validator
from safetensors import safe_open
from safetensors.torch import load_file
from transformers import (
    AutoTokenizer,
    GenerationConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    PrinterCallback,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Trainer,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
    set_seed,
)
from transformers.trainer_utils import SchedulerType
from yaml import safe_dump

from nano.batches import NUMBERS_A_STAGE, PAPER_TOKENS, Kind, single, table
from nano.heads import TrainingHeads, losses
from nano.line_scores import score_lines
from nano.model import build_model
from nano.paper_batches import HEIGHTS, PAPER_KINDS, REAL_KINDS
from nano.receipts import Receipts, read_pages
from nano.tokenizer import build_tokenizer, with_locations
from nano.trees import Packer
from nano.validation import to_device, validate
from qzoom_agent.errors import ConfigError, finished
from qzoom_agent.files import require_folder
from qzoom_agent.models.presets import resolve_model
from qzoom_agent.training.branches.fitting import checkpoint_to_resume
from qzoom_agent.training.branches.sharded_table import together
from qzoom_agent.training.recipe_io import begin, keep_recipe, read_recipe, recipe_parser

ONLY_TOLD: Final = {
    "compile",
    "log_steps",
    "save_steps",
    "validate_steps",
    "validate_batches",
    "validate_kinds",
    "validate_lines",
    "data_workers",
}
"""Keys of a recipe that change no weight, but for rounding."""


class Stage(BaseModel):
    """One stretch of training with one mix of batches."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)

    name: str = Field(pattern=r"^[a-z][a-z0-9_-]*$")
    """Folder of the stage below the output folder."""
    steps: int = Field(gt=0)
    """Optimizer steps; one step is one batch of the mix."""
    mix: dict[Kind, Annotated[float, Field(gt=0, allow_inf_nan=False)]] = Field(min_length=1)
    """Share of each kind of batch (see `nano.batches`)."""
    times: int = Field(default=1, gt=0, le=64)
    """Small batches in one batch: 1 on a CPU, more where a GPU would wait."""
    paper_tokens: int = Field(default=PAPER_TOKENS, gt=0, le=8192)
    """Visual tokens from which on a batch of paper is full."""
    heights: tuple[Annotated[float, Field(ge=14, le=200)], Annotated[float, Field(ge=14, le=200)]] = HEIGHTS
    """Least and greatest height of a line in a view of part of a page, in pixels; large print is learned first."""
    learning_rate: float = Field(gt=0)
    schedule: SchedulerType = SchedulerType.CONSTANT_WITH_WARMUP
    """A scheduler of transformers: constant_with_warmup, linear, cosine, ..."""
    warmup_steps: int = Field(default=50, ge=0)
    tower_share: float = Field(default=1.0, ge=0)
    """Learning rate of the vision tower as a share of the rest's."""
    tower: list[Kind] | None = None
    """Kinds of batch that train the vision tower; the others leave it as it is and cost half. None: all of them.

    Whatever trains it has to look like everything it will see: trained on pages alone it forgets coarse views.
    """
    aligned: bool = False
    """Crops beside a coarse view get the positions of their place in it (Q-Zoom 3.3) instead of a grid of their own."""
    from_layer: int = Field(default=0, ge=0)
    """Lowest decoder layer that is trained; above 0 tower and embeddings stay as they are, too. From the layer up that
    branches leave at, they stay valid."""
    heads_only: bool = False
    """Only the training heads learn. For a start from a shipped model, which has none: while they know nothing, what
    they ask of the layers below destroys more than it teaches."""
    weights: dict[
        Literal["answer", "read", "place", "focus", "ground", "point", "aim", "tally", "glyphs", "lines", "spell"],
        float,
    ] = {
        "answer": 1.0,
        "read": 1.0,
        "place": 0.3,
        "focus": 0.3,
        "ground": 0.3,
        "point": 0.3,
        "aim": 0.3,
        "tally": 0.3,
        "glyphs": 1.0,
        "lines": 1.0,
    }
    """Weight of each loss term; a term that is not named does not count."""

    @model_validator(mode="after")
    def _has_numbers(self) -> "Stage":
        if self.steps * self.times > NUMBERS_A_STAGE:
            told = f"got {self.steps} steps of {self.times} (times)"
            raise ValueError(f"a stage has at most {NUMBERS_A_STAGE} small batches; {told}: make two stages of it")
        return self


class BaseRecipe(BaseModel):
    """The recipe of nano's training."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)

    seed: int = Field(default=0, ge=0, lt=5)
    """Five seeds have boards of their own below those of validation."""
    size: Literal["boards", "paper"] = "boards"
    """Widths and depths of the model (see `nano.model`): for boards alone, or for paper as well."""
    start: str | None = None
    """Shipped model (preset or folder) to go on from instead of from nothing; its training heads are learned anew. Or a
    kept stage (`keep_stage.py`), which has them."""
    stages: list[Stage] = Field(min_length=1)
    mixed_precision: bool = False
    """Matrix products in bfloat16. Faster on a GPU, and on a CPU whose instructions include it (AVX512_BF16, AMX)."""
    compile: bool = False
    """Compile what lies between two attentions: half the time a step, for a C++ compiler and a minute at the start."""
    weight_decay: float = 0.02
    adam_beta2: float = 0.98
    data_workers: int = Field(default=1, gt=0, le=64)
    """Processes that draw batches."""
    log_steps: int = Field(default=20, gt=0)
    save_steps: int = Field(default=100, gt=0)
    """Steps between checkpoints; a killed run loses at most these."""
    validate_steps: int = Field(default=200, gt=0)
    validate_batches: int = Field(default=3, gt=0)
    """Batches of each kind in a validation; their boards are never trained on."""
    validate_kinds: list[Kind] = ["coarse", "crops"]
    validate_lines: int = Field(default=0, ge=0)
    """Lines of each validation receipt that are read in a validation; 0: none."""

    @field_validator("stages")
    @classmethod
    def _own_folders(cls, stages: list[Stage]) -> list[Stage]:
        names = [stage.name for stage in stages]
        if len(set(names)) < len(names):
            raise ValueError(f"every stage needs a name of its own; got {', '.join(names)}")
        return stages


def load_recipe(path: Path, **changes: Any) -> BaseRecipe:
    """Read a recipe; see `read_recipe`."""
    return read_recipe(path, BaseRecipe, **changes)


class TreeTrainer(Trainer):
    """`Trainer` whose batches are packed trees and whose loss is a weighted sum of named terms."""

    def __init__(self, stage: Stage, *, mixed: bool = False, fuse: bool = False, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.stage, self.mixed, self.fuse = stage, mixed, fuse
        self.model_accepts_loss_kwargs = False
        self.terms: dict[str, list[float]] = {}

    def _prepare_inputs(self, inputs: dict[str, Any]) -> dict[str, Any]:
        return to_device(inputs, self.args.device)

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Any] | None = None) -> None:
        # By default checkpoints are written under the hub's parameter names, which `Trainer` does not translate back
        # when it resumes: it would silently go on from fresh weights.
        assert output_dir is not None and isinstance(self.model, PreTrainedModel)
        self.model.save_pretrained(output_dir, state_dict=state_dict, save_original_format=False)
        if self.processing_class is not None:
            self.processing_class.save_pretrained(output_dir)

    def floating_point_ops(self, inputs: dict[str, Any]) -> int:
        return 0

    def compute_loss(
        self, model: Any, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        wanted = self.stage.tower is None or inputs["kind"] in self.stage.tower
        tower = wanted and not self.stage.from_layer
        with torch.autocast(self.args.device.type, torch.bfloat16, enabled=self.mixed):
            terms = losses(model, model.training_heads, inputs, tower=tower, fuse=self.fuse)
        total = torch.zeros(())
        for name, weight in self.stage.weights.items():
            if name in terms and weight:
                total = total + weight * terms[name]
                for told in (name, f"{inputs['kind']} {name}"):
                    self.terms.setdefault(told, []).append(float(terms[name].detach()))
        if not total.requires_grad:  # parts of pages about which nothing can be asked: such a batch teaches nothing
            total = 0 * sum(parameter.sum() for parameter in model.parameters() if parameter.requires_grad)
        return (total, terms) if return_outputs else total

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        for name, values in self.terms.items():
            logs[name] = round(sum(values) / len(values), 4)
        self.terms.clear()
        super().log(logs, start_time)

    def create_optimizer(self, model: Any = None) -> torch.optim.Optimizer:
        if self.optimizer is None:
            rate, betas = self.args.learning_rate, (0.9, self.args.adam_beta2)
            groups = _groups(self.model, rate, self.stage.tower_share, self.args.weight_decay)
            self.optimizer = torch.optim.AdamW(groups, lr=rate, betas=betas, fused=True)
        return self.optimizer


def _groups(model: Any, rate: float, tower_share: float, decay: float) -> list[dict[str, Any]]:
    """Return parameter groups: matrices decay, vectors do not; the vision tower has a rate of its own."""
    groups = []
    for tower in (True, False):
        for matrix in (True, False):
            chosen = [
                parameter
                for name, parameter in model.named_parameters()
                if parameter.requires_grad and (".visual." in name) == tower and (parameter.ndim > 1) == matrix
            ]
            own_rate, own_decay = rate * (tower_share if tower else 1.0), decay if matrix else 0.0
            groups.append({"params": chosen, "lr": own_rate, "weight_decay": own_decay})
    return groups


class LogCallback(TrainerCallback):
    """Appends every log line and every validation to `log.jsonl`, and prints them."""

    def __init__(self, path: Path, recipe: BaseRecipe, packer: Packer, receipts: Receipts | None = None) -> None:
        self.path, self.recipe, self.packer, self.receipts = path, recipe, packer, receipts
        self.start = time.perf_counter()

    def write(self, record: dict[str, Any]) -> None:
        record = {"minutes": round((time.perf_counter() - self.start) / 60, 1), **record}
        with self.path.open("a") as file:
            file.write(json.dumps(record) + "\n")
        print(json.dumps(record), flush=True)

    def on_log(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        self.write({"step": state.global_step, "of": state.max_steps, **(kwargs.get("logs") or {})})

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if state.global_step % self.recipe.validate_steps == 0 or state.global_step == state.max_steps:
            scores = validate(
                kwargs["model"],
                self.packer,
                kinds=self.recipe.validate_kinds,
                batches=self.recipe.validate_batches,
                receipts=self.receipts,
            )
            if self.receipts is not None and self.recipe.validate_lines:
                pages = [self.receipts[at] for at in range(len(self.receipts))]
                read = score_lines(kwargs["model"], pages, most=self.recipe.validate_lines)
                scores["receipts character errors"] = (round(read.error, 4), read.characters)
                scores["receipts lines exact"] = (round(read.exact, 4), read.lines)
            self.write({"step": state.global_step, "validation": scores})


class StopCallback(TrainerCallback):
    """Saves a checkpoint and ends the training at a time of `time.monotonic`; the next run goes on from there."""

    def __init__(self, at: float) -> None:
        self.at, self.stopped = at, False

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if time.monotonic() >= self.at and state.global_step < state.max_steps:
            self.stopped = control.should_save = control.should_training_stop = True


def run_stage(
    recipe: BaseRecipe,
    index: int,
    *,
    output: Path,
    receipts: Path | None = None,
    pages: Path | None = None,
    until: float | None = None,
) -> Path | None:
    """Train one stage (or continue it from its last checkpoint) and return the folder of its finished weights.

    Args:
        recipe: All stages.
        index: Which of them.
        output: Folder of all stages.
        receipts: Folder of real receipts, for stages that read them; those of its test split are never read.
        pages: Folder of other real pages (`pdf_pages.py`) that are shown among the receipts.
        until: Time of `time.monotonic` at which to stop with a checkpoint and return None.

    Raises:
        ConfigError: the folder holds a stage that was trained with other settings, or whose weights come of such.
    """
    require_folder(output)
    stage, folder = recipe.stages[index], output / recipe.stages[index].name
    done = folder / "final"
    stated = output / "settings" / f"{stage.name}.json"
    begin(stated, _decisive(recipe, index), made=folder, processes=together())
    keep_recipe(recipe, output)
    if done.exists():
        return done
    seed = recipe.seed * 100 + index
    set_seed(seed)
    tokenizer, model = _start(recipe, index, output)
    if stage.from_layer:
        _freeze_below(model, stage.from_layer)
    if stage.heads_only:
        model.requires_grad_(False)
        model.training_heads.requires_grad_(True)
    read, unseen = _receipts(recipe, stage, receipts, pages)
    data: Dataset = table(
        stage.mix,
        steps=stage.steps,
        seed=seed,
        tokenizer=tokenizer,
        receipts=read,
        paper_tokens=stage.paper_tokens,
        heights=stage.heights,
        times=stage.times,
        aligned=stage.aligned,
    )
    folder.mkdir(parents=True, exist_ok=True)
    packer, stop = Packer(tokenizer, aligned=stage.aligned), StopCallback(math.inf if until is None else until)
    trainer = TreeTrainer(
        stage,
        mixed=recipe.mixed_precision,
        fuse=recipe.compile,
        model=model,
        args=_arguments(recipe, stage, folder, seed=seed),
        train_dataset=data,
        data_collator=single,
        processing_class=tokenizer,
        callbacks=[LogCallback(folder / "log.jsonl", recipe, packer, unseen), stop],
    )
    trainer.remove_callback(PrinterCallback)
    trainer.train(resume_from_checkpoint=checkpoint_to_resume(folder))
    if stop.stopped:
        return None
    writing = folder / "final.part"
    model.save_pretrained(writing, save_original_format=False)
    tokenizer.save_pretrained(writing)
    writing.rename(done)  # so that a folder of this name is always whole
    return done


def _receipts(
    recipe: BaseRecipe, stage: Stage, receipts: Path | None, pages: Path | None
) -> tuple[Receipts | None, Receipts | None]:
    """Return the real receipts to train on, with other pages among them, and those to validate on."""
    needing = sorted({*stage.mix, *recipe.validate_kinds} & REAL_KINDS)
    if needing and receipts is None:
        raise ConfigError(f"Stage {stage.name!r} reads real receipts ({', '.join(needing)}). Give --receipts DIR.")
    if pages is not None and receipts is None:
        raise ConfigError(f"The pages of {pages} are shown among real receipts. Give --receipts DIR, too.")
    if receipts is None:
        return None, None
    others = None if pages is None else read_pages(pages)
    return Receipts(receipts, "train", pages=others), Receipts(receipts, "validation")


def _arguments(recipe: BaseRecipe, stage: Stage, folder: Path, *, seed: int) -> TrainingArguments:
    return TrainingArguments(
        output_dir=str(folder),
        per_device_train_batch_size=1,
        max_steps=stage.steps,
        learning_rate=stage.learning_rate,
        lr_scheduler_type=stage.schedule,
        warmup_steps=stage.warmup_steps,
        weight_decay=recipe.weight_decay,
        adam_beta2=recipe.adam_beta2,
        max_grad_norm=1.0,
        logging_steps=recipe.log_steps,
        save_steps=recipe.save_steps,
        save_total_limit=2,
        seed=seed,
        data_seed=seed,
        dataloader_num_workers=recipe.data_workers,
        dataloader_prefetch_factor=3,
        dataloader_pin_memory=False,
        remove_unused_columns=False,
        report_to="none",
        disable_tqdm=True,
        use_cpu=not torch.cuda.is_available(),
    )


def _decisive(recipe: BaseRecipe, index: int) -> dict[str, JsonValue]:
    """Return the keys of a recipe that decide the weights of a stage."""
    stages = {stage.name: stage.model_dump(mode="json") for stage in recipe.stages[: index + 1]}
    return recipe.model_dump(mode="json", exclude=ONLY_TOLD) | {"stages": stages}


def _freeze_below(model: Qwen2_5_VLForConditionalGeneration, layer: int) -> None:
    text = model.model.language_model
    if layer >= len(text.layers):
        raise ConfigError(f"from_layer is {layer}, but nano has {len(text.layers)} decoder layers. Lower it.")
    for part in (model.model.visual, text.embed_tokens, *text.layers[:layer]):
        part.requires_grad_(False)


def _start(
    recipe: BaseRecipe, index: int, output: Path
) -> tuple[PreTrainedTokenizerFast, Qwen2_5_VLForConditionalGeneration]:
    """Load tokenizer and model (with its training heads) for the start of a stage."""
    if index == 0 and recipe.start is not None:
        tokenizer, model = load_shipped(Path(resolve_model(recipe.start).source))
        if any(kind in PAPER_KINDS for stage in recipe.stages for kind in stage.mix):
            tokenizer = with_locations(tokenizer, model)  # pages are taller than boards
        return tokenizer, model
    if index == 0:
        tokenizer = build_tokenizer()
        model = build_model(tokenizer, recipe.size)
        model.training_heads = TrainingHeads(model.config.get_text_config().hidden_size)
        return tokenizer, model
    before = output / recipe.stages[index - 1].name / "final"
    return load_training(before)


def load_shipped(folder: Path) -> tuple[PreTrainedTokenizerFast, Qwen2_5_VLForConditionalGeneration]:
    """Load a shipped model in float32, with fresh training heads, or a kept stage (`keep_stage.py`) with its own.

    Raises:
        ConfigError: `folder` holds no such model.
    """
    if not (folder / "model.safetensors").is_file():
        raise ConfigError(f"There is no model in {folder} to start from. Give the folder of a shipped model.")
    tokenizer = cast(PreTrainedTokenizerFast, AutoTokenizer.from_pretrained(folder))
    if not tokenizer.get_vocab().items() <= build_tokenizer().get_vocab().items():
        raise ConfigError(f"The model in {folder} has another vocabulary than nano. Start from nothing.")
    with safe_open(folder / "model.safetensors", framework="pt") as weights:
        if any(name.startswith("training_heads.") for name in weights.keys()):  # noqa: SIM118 (no mapping)
            return load_training(folder)
    model = Qwen2_5_VLForConditionalGeneration.from_pretrained(folder, dtype=torch.float32)
    model.training_heads = TrainingHeads(model.config.get_text_config().hidden_size)
    return tokenizer, model


def load_training(folder: Path) -> tuple[PreTrainedTokenizerFast, Qwen2_5_VLForConditionalGeneration]:
    """Load a model saved by a stage, with its training heads, in the architecture that it was saved with."""
    tokenizer = cast(PreTrainedTokenizerFast, AutoTokenizer.from_pretrained(folder))
    model = Qwen2_5_VLForConditionalGeneration(Qwen2_5_VLConfig.from_pretrained(folder))
    model.generation_config = GenerationConfig.from_pretrained(folder)
    model.training_heads = TrainingHeads(model.config.get_text_config().hidden_size)
    missing, unexpected = model.load_state_dict(load_file(folder / "model.safetensors"), strict=False)
    lost = [name for name in missing if not name.startswith(("lm_head.", "training_heads."))]  # newer heads begin fresh
    assert not unexpected and not lost, (missing, unexpected)
    model.tie_weights()
    return tokenizer, model


def load_mean(folders: Sequence[Path]) -> tuple[PreTrainedTokenizerFast, Qwen2_5_VLForConditionalGeneration]:
    """Load the model of a stage, with its training heads, or the mean of the weights of several."""
    (tokenizer, model), *others = map(load_training, folders)
    with torch.no_grad():
        for weights in zip(model.parameters(), *(other.parameters() for _, other in others), strict=True):
            weights[0].copy_(torch.stack(weights).mean(0))
    return tokenizer, model


def main(argv: Sequence[str] | None = None) -> int:
    parser = recipe_parser(__doc__, output="runs/nano")
    parser.add_argument(
        "--receipts", type=Path, metavar="DIR", help="folder of real receipts (receipts.jsonl, images/)"
    )
    parser.add_argument(
        "--pages", type=Path, metavar="DIR", help="folder of pages of PDFs (pdf_pages.py), among the receipts"
    )
    parser.add_argument("--minutes", type=float, help="stop with a checkpoint after so many minutes")
    parser.add_argument("--start", metavar="M", help="shipped model to go on from: a preset or a folder")
    parser.add_argument("--stage", help="stop after this stage")
    options = parser.parse_args(argv)
    changes = {} if options.start is None else {"start": options.start}
    recipe = load_recipe(options.config, overrides=options.overrides, **changes)
    names = [stage.name for stage in recipe.stages]
    if options.stage is not None and options.stage not in names:
        raise ConfigError(f"The recipe has no stage {options.stage!r}. Its stages are: {', '.join(names)}.")
    if options.dry_run:
        print(safe_dump(recipe.model_dump(mode="json"), sort_keys=False), end="")
        return 0
    until = None if options.minutes is None else time.monotonic() + 60 * options.minutes
    for index, name in enumerate(names):
        folders = {"receipts": options.receipts, "pages": options.pages}
        done = run_stage(recipe, index, output=options.output, until=until, **folders)
        if done is None:
            print(f"stage {name}: stopped with a checkpoint after {options.minutes:g} minutes", flush=True)
            break
        print(f"stage {name}: {done}", flush=True)
        if name == options.stage:
            break
    return 0


if __name__ == "__main__":
    sys.exit(finished("train_nano", main))
