"""`qzoom train grpo`: reinforcement learning of the zooming policy, through TRL.

    qzoom train grpo --config rl/recipes/nano/grpo.yaml --output runs/grpo
    qzoom train grpo --config ... --dry-run                        (what it will do and cost)
    qzoom train grpo --config ... --model runs/coldstart/final     (another model than the recipe's)
    accelerate launch --config_file rl/recipes/accelerate/zero2.yaml -m qzoom_agent.training.grpo --config ...

A run that was killed goes on from its last checkpoint when it is started again with the same recipe (of which
`max_steps`, `watch`, `logging_steps` and `report_to` may change). The output folder gets

    recipe.yaml          the resolved recipe
    log.jsonl            every metric, and warnings
    rollouts/            some episodes as pages, with their rewards
    checkpoint-*/        to go on from
    adapter/             with LoRA: the adapter alone
    final/               the trained model: a folder that `Agent.from_pretrained` loads
"""

import argparse
import copy
import logging
import os
import sys
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Final

import torch
from transformers import PrinterCallback
from transformers.utils.import_utils import is_peft_available
from trl.trainer.grpo_config import GRPOConfig
from yaml import safe_dump

from qzoom_agent.config import AgentConfig, positive_int
from qzoom_agent.errors import ConfigError, MissingDependency, finished
from qzoom_agent.evaluation.scorers.judge import ready
from qzoom_agent.files import require_folder
from qzoom_agent.models.hf import HFBackend
from qzoom_agent.perception.adapters import text_model
from qzoom_agent.policy import LOOK_FIRST, OFFER_TOOLS
from qzoom_agent.protocols import get_protocol
from qzoom_agent.training import recipe_io
from qzoom_agent.training.branches.fitting import last_checkpoint
from qzoom_agent.training.branches.sharded_table import launched_in_bfloat16, together
from qzoom_agent.training.fingerprint import begin, require_same
from qzoom_agent.training.grpo.callbacks import MetricsCallback, RolloutPageCallback, WarningCallback
from qzoom_agent.training.grpo.checks import (
    ProbeConversation,
    fit_for_trl,
    refused_by_trl,
    require_family,
    require_plain_positions,
    require_template,
    require_tool_template,
    require_vllm,
)
from qzoom_agent.training.grpo.environment import ZoomEnv
from qzoom_agent.training.grpo.episode_length import QUESTION_TEXT, accumulation, describe, longest, require_room
from qzoom_agent.training.grpo.grpo_recipe import GRPORecipe, LoRA, load_grpo_recipe
from qzoom_agent.training.grpo.question_rows import load_rows
from qzoom_agent.training.grpo.trainer import EpisodeTrainer, ZoomTrainer
from qzoom_agent.training.recipe_io import add_recipe_arguments
from qzoom_agent.training.reward_list import accuracy_of, build, read_reward
from qzoom_agent.training.rewards import Judge, awaited
from qzoom_agent.training.trackers import require_tracker

FREE: Final = {"max_steps", "watch", "logging_steps", "report_to"}
"""Keys that may change when a run is resumed."""
_SETTINGS: Final = "settings.json"


def train(recipe: GRPORecipe, output: Path, *, rewards: Sequence[Any] | None = None) -> Path:
    """Train, or resume, and return the folder of the trained model.

    Args:
        recipe: What is trained, on what and how.
        output: Gets all that is written.
        rewards: Used instead of the recipe's: rewards, functions, or mappings as in a recipe.

    Raises:
        ConfigError, BackendError: the recipe cannot be run, with the reason.
    """
    if rewards is not None:
        recipe = recipe.model_copy(update={"rewards": [read_reward(one) for one in rewards]})
    trainer = make_trainer(recipe, output)
    trainer.train(resume_from_checkpoint=last_checkpoint(output))
    return _write(trainer, recipe, output)


def make_trainer(recipe: GRPORecipe, output: Path) -> ZoomTrainer:
    """The trainer of a recipe, everything checked that can be checked before the first step."""
    os.environ.setdefault("TRL_EXPERIMENTAL_SILENCE", "1")
    require_tracker(recipe.report_to)
    _require_vllm(recipe, _processes())
    judge = _judge(recipe, output)
    backend = load_model(recipe)
    config = recipe.agent_config().resolved(
        model=backend.name, protocol=backend.protocol, defaults=backend.defaults, perceives=backend.perceives
    )
    require_plain_positions(config, backend)
    looker = _looker(backend, recipe, config)
    completion, question = _room(recipe, backend, config)
    arguments = trl_config(recipe, output, completion=completion)
    keeper = RolloutPageCallback(output / "rollouts", every=recipe.watch.every, episodes=recipe.watch.episodes)
    shared: dict[str, Any] = {
        "args": arguments,
        "train_dataset": load_rows(recipe, tokenizer=backend.codec.tokenizer, room=question),
        "peft_config": _peft(recipe.lora, backend, from_layer=recipe.from_layer) if recipe.lora else None,
        "callbacks": [MetricsCallback(output / "log.jsonl"), WarningCallback(output / "log.jsonl"), keeper],
        "tolerance": recipe.rollouts.tolerance,
        "looker": looker,
        "accuracy": accuracy_of(recipe.rewards, judge=judge),
    }
    rewards = build(recipe.rewards, judge=judge, mask_truncated=recipe.loss.mask_truncated)
    if recipe.rollouts.by == "environment":
        fit_for_trl(backend.processor, factor=backend.defaults.factor)
        require_tool_template(backend.processor)
        make = lambda: ZoomEnv(backend, config=config, looker=looker)  # noqa: E731
        trainer = ZoomTrainer(backend, rewards, keeper, environment_factory=make, **shared)
    else:
        trainer = EpisodeTrainer(
            backend,
            rewards,
            keeper,
            config=config,
            seed=recipe.seed,
            rows=recipe.rollouts.rows,
            by_trl=recipe.rollouts.by == "generate",
            **shared,
        )
    if trainer.is_fsdp_enabled and recipe.rollouts.by == "shared":
        raise ConfigError(
            "Shared rollouts take a different number of passes on each device, which FSDP's sharded weights do not "
            "allow. Use DeepSpeed (zero2, zero3), or rollouts.by: generate."
        )
    if trainer.is_fsdp_enabled and looker is not None and looker.model is backend.model:
        raise ConfigError(
            "The branches would read FSDP's sharded weights outside the trainer's own passes, which is not possible. "
            "Set rollouts.perception: frozen, or use DeepSpeed (zero2, zero3)."
        )
    trainer.remove_callback(PrinterCallback)
    # it prints whole rollouts for those that no reward speaks of, which truncated ones are meant to be
    logging.getLogger("trl.trainer.grpo_trainer").addFilter(_not_unscored)
    return trainer


def _not_unscored(record: logging.LogRecord) -> bool:
    return "All reward functions returned None" not in record.getMessage()


def load_model(recipe: GRPORecipe) -> HFBackend:
    """The model to train, on the CPU (accelerate places it), with what is trained marked."""
    backend = HFBackend.load(
        recipe.model, device="cpu", dtype=recipe.dtype, protocol=recipe.protocol, branches=recipe.branches
    )
    require_family(backend.model.config)
    backend.model.set_attn_implementation(recipe.attn_implementation)
    backend.processor.tokenizer.padding_side = "left"
    for name, weight in backend.model.named_parameters():
        weight.requires_grad_(recipe.tower or ".visual." not in f".{name}")
    if recipe.from_layer:
        text = text_model(backend.model)
        if recipe.from_layer >= len(text.layers):
            raise ConfigError(
                f"from_layer is {recipe.from_layer}, but '{backend.name}' has {len(text.layers)} decoder layers. "
                "Lower it."
            )
        for part in (text.embed_tokens, *text.layers[: recipe.from_layer]):
            part.requires_grad_(False)
    return backend


def _looker(backend: HFBackend, recipe: GRPORecipe, config: AgentConfig) -> HFBackend | None:
    """The backend whose branches look: the trained one, or a copy of it as it is now; None if nobody needs a look."""
    needed = [f"the reward '{one.name}'" for one in recipe.rewards if one.needs_look]
    if config.policy in LOOK_FIRST:
        needed.insert(0, f"the policy '{config.policy}'")
    if not needed:
        return None
    if not backend.perceives:
        raise ConfigError(
            f"What gate and SD-RPN see is needed for {' and '.join(needed)}, and '{backend.name}' comes without them. "
            "Set branches (or --branches) to a folder that `qzoom train branches` wrote for it, or leave that out."
        )
    if recipe.rollouts.perception == "current":
        return backend
    model: Any = copy.deepcopy(backend.model)
    model.requires_grad_(False).eval()
    return HFBackend(
        model,
        backend.processor,
        name=backend.name,
        protocol=backend.protocol,
        defaults=backend.defaults,
        branches=backend.branches,
    )


def _room(recipe: GRPORecipe, backend: HFBackend, config: AgentConfig) -> tuple[int, int]:
    """The completion length and the most tokens of a question, after the template was checked and its text counted."""
    views = config.budget.view_budget(backend.defaults)
    protocol = get_protocol(config.protocol or backend.protocol)
    talk = ProbeConversation(backend.codec, protocol, factor=views.factor, tools=config.policy in OFFER_TOOLS)
    if recipe.rollouts.by != "environment":  # there TRL checks the template itself
        require_template(talk)
    opening, between = talk.tokens()
    need = longest(config, views, opening=opening + QUESTION_TEXT, between=between)
    context = int(backend.model.config.get_text_config().max_position_embeddings)
    completion = require_room(need, context=context, limit=recipe.max_completion_length)
    return completion, QUESTION_TEXT + context - need.total


def trl_config(recipe: GRPORecipe, output: Path, *, completion: int) -> GRPOConfig:
    """A recipe as TRL's configuration.

    Raises:
        ConfigError: `trl` has a key that the recipe says elsewhere, or TRL refuses one.
    """
    share = accumulation(recipe, _processes())
    free: dict[str, Any] = {"save_total_limit": 2, "dataloader_pin_memory": False, "disable_tqdm": True}
    settings: dict[str, Any] = {
        "output_dir": str(output),
        "seed": recipe.seed,
        "max_steps": recipe.max_steps,
        "per_device_train_batch_size": recipe.per_device_train_batch_size,
        "gradient_accumulation_steps": share,
        "steps_per_generation": share * recipe.minibatches,
        "num_generations": recipe.num_generations,
        "num_iterations": recipe.num_iterations,
        "shuffle_dataset": False,  # the rows are in order, and TRL's own order is another after a resume
        "max_completion_length": completion,
        "max_tool_calling_iterations": recipe.agent_config().budget.max_turns,
        "temperature": recipe.rollouts.temperature,
        "top_p": recipe.rollouts.top_p,
        "learning_rate": recipe.learning_rate,
        "lr_scheduler_type": recipe.lr_scheduler_type,
        "warmup_steps": recipe.warmup_steps,
        "weight_decay": recipe.weight_decay,
        "adam_beta2": recipe.adam_beta2,
        "max_grad_norm": recipe.max_grad_norm,
        "reward_weights": [one.weight for one in recipe.rewards],
        "bf16": recipe.bf16 or launched_in_bfloat16(),
        "gradient_checkpointing": recipe.gradient_checkpointing,
        "use_cpu": not torch.cuda.is_available(),
        "logging_steps": recipe.logging_steps,
        "save_steps": recipe.steps_of_round * -(-recipe.save_steps // recipe.steps_of_round),
        "report_to": recipe.report_to,
        "dataloader_num_workers": recipe.dataloader_num_workers,
        "remove_unused_columns": False,
        **recipe.loss.settings(),
        **(recipe.rollouts.vllm.settings() if recipe.rollouts.vllm else {}),
    }
    if taken := sorted(settings.keys() & recipe.trl.keys()):
        raise ConfigError(
            f"The recipe's `trl` sets {', '.join(taken)}, which follows from keys of its own (prompts, rollouts, "
            "loss, ...). Set those, and leave it out of `trl`."
        )
    with refused_by_trl():
        return GRPOConfig(**{**free, **recipe.trl, **settings})


def keep_recipe(recipe: GRPORecipe, output: Path) -> None:
    """Write the recipe into the output folder.

    Raises:
        ConfigError: It holds checkpoints of another recipe; the message names the keys that differ.
    """
    processes, made = together(), output if last_checkpoint(output) else output / "checkpoint"
    settings = recipe.model_dump(mode="json", exclude=FREE)
    begin(output / _SETTINGS, settings, made=made, processes=processes, kind=GRPORecipe)
    if processes.is_main_process:
        recipe_io.keep_recipe(recipe, output)


def require_same_recipe(recipe: GRPORecipe, output: Path) -> None:
    """Check that the run in `output` is one of this recipe.

    Raises:
        ConfigError: It is one of another; the message names the keys that differ.
    """
    require_same(output / _SETTINGS, recipe.model_dump(mode="json", exclude=FREE), made=output, kind=GRPORecipe)


def _processes() -> int:
    """As `accelerate launch` says it, before anything is loaded."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def _judge(recipe: GRPORecipe, output: Path) -> Judge | None:
    cache = output / "verdicts.jsonl"
    found = ready(recipe.judge, model=recipe.judge_model, key_variable=recipe.judge_key_variable, cache=cache)
    return None if found is None else awaited(found)


def _peft(lora: LoRA, backend: HFBackend, *, from_layer: int) -> Any:
    if not is_peft_available():
        raise MissingDependency("LoRA needs peft. Install it with: pip install 'qzoom-agent[lora]'")
    from peft import LoraConfig

    targets = lora.targets
    if from_layer:
        layers = "|".join(map(str, range(from_layer, len(text_model(backend.model).layers))))
        targets = rf"(?=.*\.layers\.({layers})\.)(?:{targets})"
    return LoraConfig(r=lora.rank, lora_alpha=lora.alpha, lora_dropout=lora.dropout, target_modules=targets)


def _write(trainer: ZoomTrainer, recipe: GRPORecipe, output: Path) -> Path:
    """The trained model as a folder that is whole or not there: weights, processor, and the branches it was given."""
    done, part = output / "final", output / "final.part"
    trainer.save_model(str(output / "adapter") if recipe.lora else str(part))
    if trainer.accelerator.is_main_process:
        backend = trainer.backend
        if recipe.lora:
            from peft import PeftModel

            fresh = load_model(recipe)
            merged: Any = PeftModel.from_pretrained(fresh.model, output / "adapter").merge_and_unload()
            merged.save_pretrained(part)
        backend.processor.save_pretrained(part)
        if backend.branches is not None:
            backend.branches.save(part)
            if recipe.from_layer < backend.branches.config.k:
                k = backend.branches.config.k
                print(f"Layers below {k}, which the branches read, were trained: fit them again, or set from_layer.")
        part.rename(done)
    trainer.accelerator.wait_for_everyone()
    return done


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="qzoom train grpo", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add_recipe_arguments(parser, output="runs/grpo")
    parser.add_argument("--model", help="another model than the recipe's: a preset, a hub id or a folder")
    parser.add_argument("--branches", help="branches to use instead of the recipe's: a folder")
    parser.add_argument("--steps", type=int, help="another number of steps than the recipe's")
    parser.add_argument("--seed", type=int, help="another seed than the recipe's")
    parser.add_argument("--devices", type=positive_int, default=1, help="for --dry-run: how many devices there will be")
    options = parser.parse_args(argv)
    given = {"model": options.model, "branches": options.branches, "max_steps": options.steps, "seed": options.seed}
    changes = {key: value for key, value in given.items() if value is not None}
    recipe = load_grpo_recipe(options.config, overrides=options.overrides, **changes)
    if options.dry_run:
        print(safe_dump(recipe.model_dump(mode="json"), sort_keys=False))
        print(describe(recipe, processes=options.devices))
        for line in _missing(recipe, options.output, processes=options.devices):
            print(line)
        return 0
    output = require_folder(options.output)
    if (output / "final").exists():
        require_same_recipe(recipe, output)
        print(f"{output / 'final'} is there already. Delete {output} to train again.")
        return 0
    keep_recipe(recipe, output)
    final = train(recipe, output)
    if together().is_main_process:
        print(f"written {final}")
    return 0


def _missing(recipe: GRPORecipe, output: Path, *, processes: int) -> list[str]:
    """Lines on what a run would lack on this machine, which a plan may be made without.

    Raises:
        ConfigError: no machine could run the recipe.
    """
    build(recipe.rewards, judge=None if recipe.judge is None else _unasked)
    trl_config(recipe, output, completion=1)
    checks: list[Callable[[], None]] = [
        partial(require_tracker, recipe.report_to),
        partial(_require_vllm, recipe, processes),
    ]
    missing = []
    for require in checks:
        try:
            require()
        except MissingDependency as error:
            missing.append(f"missing      {error}")
    return missing


async def _unasked(question: str, answer: str, given: str) -> bool:
    raise AssertionError("a plan asks no judge")


def _require_vllm(recipe: GRPORecipe, processes: int) -> None:
    if recipe.rollouts.vllm is not None:
        require_vllm(recipe.rollouts.by, processes)


if __name__ == "__main__":
    sys.exit(finished("qzoom train grpo", main))
