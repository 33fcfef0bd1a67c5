"""The training loop of every stage: a module whose `forward` is its loss, and transformers' Trainer around it.

The frozen base runs in `prepare`, which turns the rows of a batch into the module's arguments. A checkpoint holds only
the weights that are trained. Rows come in a fixed order drawn from the seed, those of one image together, and a run
resumes at the row that was next.

TRL's `SFTTrainer` does not give the same losses: it replaces the model's forward, so it cannot take views that are
encoded already and positions aligned to the coarse view, and it averages over the tokens of all accumulated batches.

Weights of 16 bits are trained in float32: at a learning rate of 1e-6 a step of AdamW rounds to nothing in more than 99
of 100 bfloat16 weights.
"""

import json
import math
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from functools import partial
from multiprocessing import get_start_method
from pathlib import Path
from random import Random
from typing import Any, Final
from zipfile import is_zipfile

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from torch.utils.data import Dataset
from transformers import (
    GradientCheckpointingLayer,
    PrinterCallback,
    Trainer,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
    set_seed,
)
from transformers.integrations.integration_utils import INTEGRATION_TO_CALLBACK, get_available_reporting_integrations

from qzoom_agent.errors import BackendError, ConfigError, MissingDependency
from qzoom_agent.files import atomic_write
from qzoom_agent.training.branches.branch_recipe import Optimisation
from qzoom_agent.training.branches.sharded_table import launched_in_bfloat16, together
from qzoom_agent.training.recipe_io import begin

Rows = list[dict[str, Any]]
WEIGHTS = "trained.safetensors"
NOT_DECISIVE: Final = {"gradient_checkpointing", "logging_steps", "save_steps", "dataloader_num_workers", "report_to"}
"""Keys of `Optimisation` that do not change the weights that come out."""
_SAMPLED: Final = 2**22
"""Most weights that a `WeightSample` compares."""


class _Rows(Dataset[dict[str, Any]]):
    """Rows in the order in which they are trained on, for all epochs."""

    def __init__(self, read: Callable[[int], dict[str, Any]], order: Sequence[int]) -> None:
        self.read, self.order = read, order

    def __len__(self) -> int:
        return len(self.order)

    def __getitem__(self, at: int) -> dict[str, Any]:
        return {**self.read(self.order[at]), "draw": at}


def shuffled(groups: Sequence[str], *, epochs: int, seed: int) -> list[int]:
    """Return the indices of all rows, once an epoch, in an order drawn from the seed; a group stays together."""
    members: dict[str, list[int]] = {}
    for index, group in enumerate(groups):
        members.setdefault(group, []).append(index)
    order = []
    for epoch in range(epochs):
        names = list(members)
        Random(f"{seed}/{epoch}").shuffle(names)
        order += [index for name in names for index in members[name]]
    return order


class StageTrainer(Trainer):
    """Trainer of a module whose forward is its loss."""

    def __init__(self, prepare: Callable[[Rows], dict[str, Any]], **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.prepare = prepare
        self.model_accepts_loss_kwargs = False  # accumulated batches count alike, however many tokens they have

    def _prepare_inputs(self, inputs: Rows) -> dict[str, Any]:  # type: ignore[override]
        return self.prepare(inputs)  # here, because the frozen passes do not run under the autocast of the loss

    def compute_loss(
        self, model: nn.Module, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        loss: Tensor = model(**inputs)
        return (loss, {}) if return_outputs else loss

    def floating_point_ops(self, inputs: Any) -> int:
        return 0  # the Trainer's estimate needs the ids of the batch

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Any] | None = None) -> None:
        assert output_dir is not None
        Path(output_dir).mkdir(parents=True, exist_ok=True)
        # not the frozen base, which may have billions of weights
        weights = trained(self.accelerator.unwrap_model(self.model))
        save_file(weights, Path(output_dir) / WEIGHTS, metadata={"format": "pt"})
        torch.save(self.args, Path(output_dir) / "training_args.bin")

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        module = self.accelerator.unwrap_model(self.model if model is None else model)
        _, unexpected = module.load_state_dict(load_file(Path(resume_from_checkpoint) / WEIGHTS), strict=False)
        assert not unexpected, unexpected


def trained(module: nn.Module) -> dict[str, Tensor]:
    """Return the weights that are trained, by name."""
    return {
        name: weight.detach().contiguous().cpu() for name, weight in module.named_parameters() if weight.requires_grad
    }


def train(
    module: nn.Module,
    groups: Sequence[str],
    *,
    read: Callable[[int], dict[str, Any]],
    prepare: Callable[[Rows], dict[str, Any]],
    how: Optimisation,
    folder: Path,
    seed: int,
    epochs: int | None = None,
) -> None:
    """Train the module in place, or resume from the last checkpoint.

    Weights in half precision are trained in float32 under autocast, and get their number format back afterwards.

    Args:
        module: Its trainable weights are those with `requires_grad`.
        groups: Group of each row, such as its image; rows of a group follow each other.
        read: Returns a row by its index.
        prepare: Turns the rows of a batch into arguments of the module.
        folder: Folder of checkpoints and `log.jsonl`.
        epochs: Passes over the rows, where they are other than the recipe's.

    Raises:
        ConfigError: `folder` holds a run that was begun with other settings, rows or processes.
    """
    rows = _Rows(read, shuffled(groups, epochs=how.num_train_epochs if epochs is None else epochs, seed=seed))
    processes = together()
    settings = {"rows": len(rows), "seed": seed, "processes": processes.num_processes}
    settings |= how.model_dump(mode="json", exclude=NOT_DECISIVE)
    begin(folder / "settings.json", settings, made=folder, processes=processes, kind=Optimisation)
    set_seed(seed)
    module.train()
    stored = to_float32(weight for weight in module.parameters() if weight.requires_grad)
    for part in module.modules():
        if isinstance(part, GradientCheckpointingLayer):
            part.gradient_checkpointing = how.gradient_checkpointing
            part._gradient_checkpointing_func = partial(checkpoint, use_reentrant=False)  # type: ignore[assignment]
    warmup, half = how.warmup_steps, torch.bfloat16 in stored.values() or launched_in_bfloat16()
    total = optimizer_steps(how, len(rows), processes=processes.num_processes)
    keys = how.model_dump(exclude={"gradient_checkpointing"})
    keys |= {"num_train_epochs": 1, "warmup_steps": int(warmup if warmup >= 1 else warmup * total)}
    if get_start_method() != "fork":  # `read` holds open tables, and cannot be sent to a process
        keys["dataloader_num_workers"] = 0
    trainer = StageTrainer(
        prepare,
        model=module,
        args=TrainingArguments(
            **keys,  # the rows are those of all epochs
            output_dir=str(folder),
            max_grad_norm=1.0,
            save_total_limit=2,
            seed=seed,
            data_seed=seed,
            dataloader_pin_memory=False,
            train_sampling_strategy="sequential",
            remove_unused_columns=False,
            disable_tqdm=True,
            use_cpu=not torch.accelerator.is_available(),
            bf16=half,
            fp16=torch.float16 in stored.values() and not half,
        ),
        train_dataset=rows,
        data_collator=list,
        callbacks=[LogCallback(folder / "log.jsonl")],
    )
    trainer.remove_callback(PrinterCallback)
    trainer.train(resume_from_checkpoint=checkpoint_to_resume(folder))
    restore(stored)
    module.eval()


def to_float32(weights: Iterable[nn.Parameter]) -> dict[nn.Parameter, torch.dtype]:
    """Turn weights into float32 in place; return the number formats that they had."""
    stored = {weight: weight.dtype for weight in weights}
    for weight in stored:
        weight.data = weight.data.float()
    return stored


def restore(stored: Mapping[nn.Parameter, torch.dtype]) -> None:
    """Give weights back the number formats that `to_float32` found."""
    for weight, number in stored.items():
        weight.data = weight.data.to(number)


class WeightSample:
    """Trained weights as they are now, at equal steps through all of them, to be compared with later."""

    def __init__(self, model: nn.Module) -> None:
        weights = [weight for weight in model.parameters() if weight.requires_grad]
        self._step = max(1, sum(weight.numel() for weight in weights) // _SAMPLED)
        self._kept = [(weight, self._read(weight).clone()) for weight in weights]

    def changed(self) -> float:
        """Return the share of the weights that differ from what they were."""
        differ = [(self._read(weight) != before.to(weight.device)) for weight, before in self._kept]
        return float(sum(int(one.sum()) for one in differ) / max(1, sum(one.numel() for one in differ)))

    def _read(self, weight: nn.Parameter) -> Tensor:
        return weight.detach().flatten()[:: self._step]


class LogCallback(TrainerCallback):
    """Callback that appends the metrics of each logged step to a file and prints the most important ones.

    The file has one JSON line a logged step; a resumed run continues it from its checkpoint.
    """

    printed: tuple[str, ...] = ("loss", "grad_norm", "learning_rate")
    """Metrics that are printed; those of held-out rows, `eval_...`, as well."""

    def __init__(self, path: Path) -> None:
        self.path, self.began = path, time.perf_counter()

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        if state.is_world_process_zero:
            # from the beginning, what was logged before the first step is logged again
            for line in keep_lines(self.path, lambda line: line["step"] <= state.global_step > 0):
                self.note(line)

    def on_log(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        logs = kwargs.get("logs") or {}
        norm = logs.get("grad_norm", 0.0)
        if norm is not None and not math.isfinite(norm) and not args.fp16:  # with 16-bit floats such steps are left out
            raise BackendError(
                f"The gradient of step {state.global_step} is not finite, so training diverged. Lower learning_rate, "
                "or raise warmup_steps, in another --output: checkpoints of this run may have diverged already."
            )
        held_out = any(name.startswith("eval_") for name in logs)
        if not state.is_world_process_zero or not (held_out or "loss" in logs):
            return  # the trainer's summary at the end has no step of its own
        # the rows of a trainer are those of all epochs, so its own count of epochs says nothing
        kept = {name: value for name, value in logs.items() if name != "epoch"}
        kept = {name: float(f"{value:.4g}") if isinstance(value, float) else value for name, value in kept.items()}
        minutes = round((time.perf_counter() - self.began) / 60, 1)
        when = {"minutes": minutes, "step": state.global_step, "of": state.max_steps}
        add_line(self.path, when | kept)
        names = [name for one in self.printed for name in (one, f"eval_{one}") if name in kept]
        print(json.dumps(when | {name.replace("zoom/", ""): kept[name] for name in names}), flush=True)
        for text in self.note(logs):
            print(f"warning at step {state.global_step}: {text}", flush=True)
            add_line(self.path, {"step": state.global_step, "warning": text})

    def note(self, logs: Mapping[str, Any]) -> list[str]:
        """Take in the metrics of a step, or those of one before a run was resumed; return new warnings."""
        return []


def add_line(path: Path, line: Mapping[str, Any]) -> None:
    """Append a line to a JSON-lines file."""
    with path.open("a", encoding="utf-8") as file:
        file.write(json.dumps(line) + "\n")


def keep_lines(path: Path, keep: Callable[[dict[str, Any]], bool]) -> list[dict[str, Any]]:
    """Drop the other lines of a JSON-lines file, and one that was cut off; return those that are kept."""
    found: list[dict[str, Any]] = []
    for text in path.read_text(encoding="utf-8").splitlines() if path.exists() else ():
        try:
            line = json.loads(text)
        except ValueError:  # being written when the run was killed
            continue
        if keep(line):
            found.append(line)
    if path.exists():
        with atomic_write(path) as part:
            part.write_text("".join(json.dumps(line) + "\n" for line in found), encoding="utf-8")
    return found


def optimizer_steps(optimisation: Optimisation, rows: int, *, processes: int = 1) -> int:
    """Return the number of optimizer steps for so many rows."""
    batches = math.ceil(rows / (optimisation.per_device_train_batch_size * processes))
    return max(1, math.ceil(batches / optimisation.gradient_accumulation_steps))


def last_checkpoint(folder: Path) -> str | None:
    """Return the latest complete checkpoint, if any: one whose state, which is written last, and files can be read.

    One without its weights or its optimizer, such as a copy that left out large files, counts where no other is there.
    """
    found: list[Path] = []
    states = folder.glob("checkpoint-*/trainer_state.json")
    for state in sorted(states, key=lambda one: step_of(one.parent), reverse=True):
        with suppress(ValueError, SafetensorError):
            json.loads(state.read_text(encoding="utf-8"))
            for weights in state.parent.glob("*.safetensors"):
                with safe_open(weights, "pt"):  # which reads the header, and compares the length
                    pass
            if all(map(is_zipfile, state.parent.glob("*.pt"))):
                found.append(state.parent)
    best = next(filter(_is_whole, found), found[0] if found else None)
    return None if best is None else str(best)


def checkpoint_to_resume(folder: Path) -> str | None:
    """Return the `last_checkpoint`. Raises ConfigError if it lacks its weights or its optimizer."""
    last = last_checkpoint(folder)
    if last is not None and not _is_whole(Path(last)):
        raise ConfigError(
            f"{last} has no weights or no optimizer, so its learning rate and momentum would begin anew. Copy the "
            "whole folder again, or choose another --output."
        )
    return last


def _is_whole(checkpoint: Path) -> bool:
    return _has(checkpoint, "*.safetensors", "pytorch_model*") and _has(checkpoint, "optimizer*")


def _has(checkpoint: Path, *patterns: str) -> bool:
    """Return True if there is a file of one of these names, or the folder where DeepSpeed has weights and optimizer."""
    return any(any(checkpoint.glob(pattern)) for pattern in (*patterns, "global_step*"))


def step_of(checkpoint: Path) -> int:
    """Return the number of steps after which a checkpoint was written, from its name."""
    return int(checkpoint.name.split("-")[1])


def require_tracker(name: str) -> None:
    """Raise ConfigError for an unknown tracker of `report_to`, MissingDependency for one that is not installed."""
    installed = get_available_reporting_integrations()  # type: ignore[no-untyped-call]
    if name in ("none", "all", *installed):
        return
    if name not in INTEGRATION_TO_CALLBACK:
        names = ", ".join(INTEGRATION_TO_CALLBACK)
        raise ConfigError(f"There is no tracker '{name}' for report_to. Choose from none, {names}.")
    raise MissingDependency(
        f"report_to: {name} needs the package of that tracker, which is not installed. Install it (for most: pip "
        f"install {name}), or set report_to: none."
    )
