"""`qzoom train grpo`: reinforcement learning of the zooming policy, through TRL.

    qzoom train grpo --config rl/recipes/nano/grpo.yaml --output runs/grpo
    qzoom train grpo --config ... --dry-run                    (print the plan and the cost)
    qzoom train grpo --config ... --set loss.beta=0.01         (override any key of the recipe)
    accelerate launch --config_file rl/recipes/accelerate/zero2.yaml rl/train_grpo.py --config ...

A run that was killed resumes from its last checkpoint when it is started again with the same recipe (`max_steps`,
`watch`, `logging_steps`, `report_to` and the hub's keys of `trl` may change). The output folder gets `recipe.yaml`,
`log.jsonl` (every metric, and warnings), `rollouts/` (some episodes as pages), `checkpoint-*/`, with LoRA `adapter/`,
and `final/`: the trained model, a folder that `Agent.from_pretrained` loads.
"""

import copy
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast

import torch
from huggingface_hub import HfApi
from pydantic import ValidationError
from transformers import Trainer, TrainingArguments, get_scheduler
from trl.import_utils import is_vllm_available
from trl.trainer.grpo_config import GRPOConfig

from qzoom_agent.agent import Agent
from qzoom_agent.config import AgentConfig, positive_int
from qzoom_agent.errors import ConfigError, MissingDependency, QzoomError
from qzoom_agent.files import first_fault, require_folder
from qzoom_agent.models.hf import HFBackend
from qzoom_agent.perception.adapters import text_model
from qzoom_agent.perception.hub import explained
from qzoom_agent.policy import ASK_FIRST, LOOK_FIRST, OFFER_TOOLS, drafts
from qzoom_agent.training import trained_model
from qzoom_agent.training.branches.dataset import load_records
from qzoom_agent.training.branches.fitting import (
    checkpoint_to_resume,
    last_checkpoint,
    require_tracker,
    restore,
    step_of,
    to_float32,
)
from qzoom_agent.training.branches.sharded_table import launched_in_bfloat16, say, together
from qzoom_agent.training.grpo.callbacks import MetricsCallback, RolloutPageCallback
from qzoom_agent.training.grpo.checks import (
    ProbeConversation,
    refused_by_trl,
    require_family,
    require_plain_crops,
    require_template,
)
from qzoom_agent.training.grpo.grpo_recipe import GRPORecipe, load_grpo_recipe
from qzoom_agent.training.grpo.question_rows import load_held_out, load_rows
from qzoom_agent.training.grpo.run_cost import QUESTION_TEXT, describe, longest, require_room
from qzoom_agent.training.grpo.trainer import ZoomTrainer, build_trainer
from qzoom_agent.training.recipe_io import as_yaml, recipe_parser, writing
from qzoom_agent.training.reward_list import accuracy_of, build


def train(recipe: GRPORecipe, output: Path, *, rewards: Sequence[Any] | None = None) -> Path:
    """Train, or resume, and return the folder of the trained model; a finished run of the recipe is not repeated.

    Args:
        rewards: Used instead of the recipe's: rewards, functions, or mappings as in a recipe.

    Raises:
        ConfigError, BackendError, MissingDependency: The recipe cannot be run, or `output` holds a run of another one.
    """
    if rewards is not None:
        try:
            recipe = GRPORecipe(**dict(recipe) | {"rewards": rewards})
        except ValidationError as error:
            raise ConfigError(f"The rewards do not fit the recipe: {first_fault(error)}.") from None
    if trained_model.is_finished(recipe, output):
        return output / "final"
    with writing(output, together()):
        trained_model.keep_recipe(recipe, output)
        trainer = make_trainer(recipe, output)
        trainer.train(resume_from_checkpoint=checkpoint_to_resume(output))
        final = save_model(trainer, recipe, output)
        say(f"written {final}")
        if trainer.args.push_to_hub:
            upload(trainer, final)
    return final


def make_trainer(recipe: GRPORecipe, output: Path) -> ZoomTrainer:
    """Return the trainer of a recipe, after every check that is possible before the first step."""
    require_packages(recipe, processes=together().num_processes)
    if recipe.trl.get("push_to_hub"):
        create_repository(trl_config(recipe, output, completion=1))
    judge = recipe.ready_judge(output)
    records = None if recipe.needle else load_records(recipe.data)  # wrong rows show before the model is loaded
    backend = load_model(recipe)
    config = episode_config(recipe, backend)
    looker = load_looker(recipe, backend, config)
    completion, question = episode_room(recipe, backend, config)
    return build_trainer(
        recipe,
        backend,
        config=config,
        looker=looker,
        rewards=build(recipe.rewards, judge=judge, mask_truncated=recipe.loss.mask_truncated),
        accuracy=accuracy_of(recipe.rewards, judge=judge),
        args=trl_config(recipe, output, completion=completion),
        train_dataset=load_rows(recipe, records=records, tokenizer=backend.codec.tokenizer, room=question),
        eval_dataset=load_held_out(recipe, tokenizer=backend.codec.tokenizer, room=question),
        peft_config=lora_config(recipe, backend),
        callbacks=[MetricsCallback(output / "log.jsonl")],
        pages=RolloutPageCallback(output / "rollouts", every=recipe.watch.every, episodes=recipe.watch.episodes),
    )


def require_packages(recipe: GRPORecipe, *, processes: int) -> None:
    """Check that the tracker and vLLM are there, where the recipe asks for them.

    Raises MissingDependency if not, ConfigError if they cannot be had in this way at all.
    """
    require_tracker(recipe.report_to)
    if recipe.rollouts.vllm is None:
        return
    if recipe.rollouts.by == "environment" and processes > 1:
        raise ConfigError(
            f"TRL's tool loop asks a vLLM server once a turn and process, and {processes} processes with different "
            "numbers of turns would get one another's answers, or wait for ever. Set rollouts.by: generate."
        )
    if not is_vllm_available():
        raise MissingDependency(
            "rollouts.vllm needs vLLM beside the trainer, too. Install it with: pip install 'trl[vllm]'. Or leave "
            "rollouts.vllm out."
        )


def load_model(recipe: GRPORecipe) -> HFBackend:
    """Load the model to train, on the CPU (accelerate places it), with gradients for the weights that are trained.

    These are float32, whatever `dtype` says of the others; adapters, which peft makes, are float32 by themselves.
    """
    backend = HFBackend.load(
        recipe.model, device="cpu", dtype=recipe.dtype, protocol=recipe.protocol, branches=recipe.branches
    )
    require_family(backend.model.config)
    backend.model.set_attn_implementation(recipe.attn_implementation)
    backend.processor.tokenizer.padding_side = "left"
    for name, weight in backend.model.named_parameters():
        weight.requires_grad_(recipe.tower or ".visual." not in f".{name}")
    if recipe.from_layer:
        text, first = text_model(backend.model), trained_model.layers_from(backend, recipe.from_layer).start
        for part in (text.embed_tokens, *text.layers[:first]):
            part.requires_grad_(False)
    if recipe.lora is None:
        to_float32(weight for weight in backend.model.parameters() if weight.requires_grad)
    return backend


def episode_config(recipe: GRPORecipe, backend: HFBackend) -> AgentConfig:
    """Return the configuration of the episodes, resolved for the model.

    Raises ConfigError if rollouts would place crops otherwise than the policy does, an episode is no single
    conversation, or another model looks.
    """
    looks = {key: value for key, value in backend.settings.items() if key.startswith("perception.")}
    config = recipe.agent_config().resolved(
        model=backend.name,
        protocol=backend.protocol,
        defaults=backend.defaults,
        perceives=backend.perceives,
        settings=looks,  # sampling and limits of a reply are the recipe's
    )
    ours = recipe.rollouts.by != "environment" and recipe.rollouts.vllm is None
    require_plain_crops(config, backend, aligned=ours)
    if config.perceiver is not None:
        raise ConfigError(
            f"GRPO looks with the branches of the model that it trains, and agent.perceiver is '{config.perceiver}'. "
            "Leave it out."
        )
    if config.policy in ASK_FIRST or drafts(config.policy, config.perception.gate):
        raise ConfigError(
            f"The policy '{config.policy}' with perception.gate '{config.perception.gate}' asks the model in several "
            "conversations, and GRPO trains on one. Choose 'explicit', 'hybrid' or 'implicit', and another gate."
        )
    return config


def load_looker(recipe: GRPORecipe, backend: HFBackend, config: AgentConfig) -> HFBackend | None:
    """Return the backend whose branches look: the trained one, or a copy of it as it is now; None if none is needed.

    Raises ConfigError if one is needed, and the model has no branches.
    """
    needed = [f"the policy '{config.policy}'"] if config.policy in LOOK_FIRST else []
    needed += [f"the reward '{one.name}'" for one in recipe.rewards if one.needs_look]
    if not needed:
        return None
    if not backend.perceives:
        raise ConfigError(
            f"Gate and SD-RPN are needed for {' and '.join(needed)}, and '{backend.name}' comes without them. "
            "Set branches (or --branches) to a folder that `qzoom train branches` wrote for it, or leave that out."
        )
    if recipe.rollouts.perception == "current":
        return backend
    looker, model = copy.copy(backend), cast(Any, copy.deepcopy(backend.model))
    looker.model = model.requires_grad_(False).eval()
    restore(dict.fromkeys(looker.model.parameters(), getattr(torch, recipe.dtype)))
    return looker


def episode_room(recipe: GRPORecipe, backend: HFBackend, config: AgentConfig) -> tuple[int, int]:
    """Return the completion length, and the most tokens of a question.

    Raises ConfigError if the chat template cannot be trained with, or the longest episode does not fit into the model.
    """
    views = config.budget.view_budget(backend.defaults)
    protocol = Agent(backend, config=config).protocol  # in the words of the model's prompt file, if it has one
    probe = ProbeConversation(backend.codec, protocol, factor=views.factor, tools=config.policy in OFFER_TOOLS)
    if recipe.rollouts.by != "environment":  # there TRL checks the template itself
        require_template(probe)
    opening, between = probe.tokens()
    need = longest(config, views, opening=opening + QUESTION_TEXT, between=between)
    context = int(backend.model.config.get_text_config().max_position_embeddings)
    completion = require_room(need, context=context, limit=recipe.max_completion_length)
    return completion, QUESTION_TEXT + context - need.total


def trl_config(recipe: GRPORecipe, output: Path, *, completion: int) -> GRPOConfig:
    """Return a recipe as TRL's configuration.

    Raises ConfigError if `trl` has a key that follows from the recipe's own, TRL refuses one, or `output` holds a run
    of more steps.
    """
    done = 0 if (last := last_checkpoint(output)) is None else step_of(Path(last))
    if done > recipe.max_steps:
        raise ConfigError(
            f"{output} holds a run of {done} steps, and max_steps is {recipe.max_steps}: its model would be taken for "
            f"one of fewer steps. Set max_steps to {done} or more, or choose another --output."
        )
    share = recipe.accumulation(together().num_processes)
    agent = recipe.agent_config()
    free: dict[str, Any] = {"save_total_limit": 2, "dataloader_pin_memory": False, "disable_tqdm": True}
    free["top_k"] = agent.generation.top_k or 0  # read by TRL's own generation alone
    stored = "float32" if recipe.lora else recipe.dtype  # other weights of 16 bits are trained as float32, see above
    half = recipe.bf16 or stored == "bfloat16" or launched_in_bfloat16()
    settings: dict[str, Any] = {
        **{
            key: getattr(recipe, key) for key in GRPOConfig.__dataclass_fields__.keys() & GRPORecipe.model_fields.keys()
        },
        "output_dir": str(output),
        "gradient_accumulation_steps": share,
        "steps_per_generation": share * recipe.minibatches,
        "shuffle_dataset": False,  # the rows are in order, and TRL's own order is another after a resume
        "max_completion_length": completion,
        "max_tool_calling_iterations": agent.budget.max_turns,
        "temperature": recipe.rollouts.temperature,
        "top_p": recipe.rollouts.top_p,
        "reward_weights": [one.weight for one in recipe.rewards],
        "bf16": half,
        **({"fp16": True} if stored == "float16" and not half else {}),
        "use_cpu": not torch.cuda.is_available(),
        "save_steps": recipe.whole_rounds(recipe.save_steps),
        **evaluation_settings(recipe, output),
        "remove_unused_columns": False,
        **recipe.loss.settings(),
        **(recipe.rollouts.vllm.settings() if recipe.rollouts.vllm else {}),
    }
    if taken := sorted(settings.keys() & recipe.trl.keys()):
        raise ConfigError(
            f"The recipe's `trl` sets {', '.join(taken)}, which follows from keys of its own (the same key, "
            "prompts, rollouts, loss, ...). Set those, and leave it out of `trl`."
        )
    with refused_by_trl():
        args = GRPOConfig(**{**free, **recipe.trl, **settings})
        # which the trainer makes once the model is loaded and the held-out questions are asked
        get_scheduler(
            args.lr_scheduler_type,
            torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=args.learning_rate),
            num_warmup_steps=recipe.warmup_steps,
            num_training_steps=recipe.max_steps,
            scheduler_specific_kwargs=cast(Any, args.lr_scheduler_kwargs),
        )
    return args


def evaluation_settings(recipe: GRPORecipe, output: Path) -> dict[str, Any]:
    """Return the keys of `GRPOConfig` for held-out questions: the best checkpoint is loaded at the end."""
    if (how := recipe.evaluation) is None:
        return {}
    steps = recipe.whole_rounds(how.eval_steps)
    return {
        "eval_strategy": "steps",
        "eval_steps": steps,
        "save_steps": steps,  # what is evaluated can be kept
        "eval_on_start": last_checkpoint(output) is None,
        "per_device_eval_batch_size": min(recipe.rollouts.rows, how.questions),
        "num_generations_eval": 1,
        "load_best_model_at_end": True,
        "metric_for_best_model": how.metric_for_best_model,
        "greater_is_better": True,
    }


def lora_config(recipe: GRPORecipe, backend: HFBackend) -> Any:
    """Return peft's configuration of the adapters; None where all weights are trained."""
    if recipe.lora is None:
        return None
    modules = recipe.lora.target_modules
    if recipe.from_layer:
        layers = "|".join(map(str, trained_model.layers_from(backend, recipe.from_layer)))
        modules = rf"(?=.*\.layers\.({layers})\.)(?:{modules})"
    return trained_model.lora_config(recipe.lora, modules, backend.model)


def save_model(trainer: ZoomTrainer, recipe: GRPORecipe, output: Path) -> Path:
    """Write the trained model with its processor and branches, as a folder that is whole or not there."""

    state, name = trainer.state, trainer.args.metric_for_best_model
    if state.best_metric is not None and trainer.accelerator.is_main_process:
        key = f"eval_{str(name).removeprefix('eval_')}"
        start = next((one[key] for one in state.log_history if one["step"] == 0 and one.get(key) is not None), None)
        before = "" if start is None else f"; before training {start:.4g}"
        if state.best_global_step is None:
            print(f"best: unknown, as no held-out reply has a value of {name}; final/ is the last model")
        else:
            print(f"best: step {state.best_global_step}, {name} {state.best_metric:.4g} held out{before}")
            if state.best_model_checkpoint is None:
                print(f"The checkpoint of step {state.best_global_step} is gone, so final/ is the last model.")

    def save(part: Path) -> None:
        adapter = output / "adapter"
        if not (recipe.lora or trainer.is_deepspeed_enabled or trainer.is_fsdp_enabled):
            restore(dict.fromkeys(trainer.backend.model.parameters(), getattr(torch, recipe.dtype)))
        # _internal_call: without it this would upload, and an upload that fails would leave no `final`
        trainer.save_model(str(adapter if recipe.lora else part), _internal_call=True)
        if recipe.lora and trainer.accelerator.is_main_process:
            from peft import PeftModel

            merged: Any = PeftModel.from_pretrained(load_model(recipe).model, adapter).merge_and_unload()
            merged.save_pretrained(part)

    return trained_model.write_final(trainer.backend, output, from_layer=recipe.from_layer, save=save)


def create_repository(args: TrainingArguments) -> None:
    """Create the repository that a run pushes to, unless it is there.

    Raises BackendError or ConfigError if the hub cannot be reached, or refuses; the message says what to do.
    """
    if not together().is_main_process:
        return
    name = args.hub_model_id or Path(str(args.output_dir)).absolute().name
    with _told(
        name, after=f"Or leave push_to_hub out of `trl`, and run `hf upload {name} {args.output_dir}/final` later."
    ):
        HfApi(token=args.hub_token).create_repo(name, private=args.hub_private_repo, exist_ok=True)


def upload(trainer: Trainer, final: Path) -> None:
    """Upload a run whose model is written already, with a model card. All processes have to call this.

    Raises BackendError or ConfigError if that fails; the message says where the model is.
    """
    name = str(trainer.hub_model_id)
    with _told(
        name,
        before=f"The trained model is in {final}, but it was not uploaded.",
        after=f"Then run `hf upload {name} {final}`.",
    ):
        trainer.push_to_hub(commit_message="Model save", revision=trainer.args.hub_revision)


@contextmanager
def _told(
    repository: str, *, before: str = "The recipe uploads its model (trl.push_to_hub), and that would fail.", after: str
) -> Iterator[None]:
    """Put a sentence before and after errors of the hub."""
    try:
        with explained(repository, None):
            yield
    except QzoomError as error:
        raise type(error)(f"{before} {error} {after}") from error


def print_plan(recipe: GRPORecipe, output: Path, *, processes: int, tflops: float | None = None) -> None:
    """Print what a run does and costs, and what it would lack here; ConfigError if no machine could run the recipe."""
    print(as_yaml(recipe))
    print(describe(recipe, processes=processes, output=output, tflops=tflops))
    build(recipe.rewards, judge=None if recipe.judge is None else lambda *_: False)
    trl_config(recipe, output, completion=1)
    try:
        require_packages(recipe, processes=processes)
    except MissingDependency as error:
        print(f"missing      {error}")


def main(argv: Sequence[str] | None = None) -> int:
    parser = recipe_parser(__doc__, output="runs/grpo", prog="qzoom train grpo")
    parser.add_argument("--model", help="another model than the recipe's: a preset, a hub id or a folder")
    parser.add_argument("--branches", help="branches to use instead of the recipe's: folder or hub id")
    parser.add_argument("--steps", type=int, dest="max_steps", help="another number of steps than the recipe's")
    parser.add_argument("--seed", type=int, help="another seed than the recipe's")
    parser.add_argument("--devices", type=positive_int, default=1, help="for --dry-run: how many devices there will be")
    parser.add_argument(
        "--tflops", type=float, help="for --dry-run: sustained throughput of a device in TFLOP/s, to tell hours by"
    )
    options = parser.parse_args(argv)
    given = {key: getattr(options, key) for key in ("model", "branches", "max_steps", "seed")}
    changes = {key: value for key, value in given.items() if value is not None}
    recipe = load_grpo_recipe(options.config, overrides=options.overrides, **changes)
    if options.dry_run:
        print_plan(recipe, options.output, processes=options.devices, tflops=options.tflops)
        return 0
    train(recipe, require_folder(options.output))
    return 0
