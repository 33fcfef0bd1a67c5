"""The recipe of `qzoom train grpo`, a YAML file.

    model: nano
    max_steps: 200
    prompts: 8
    num_generations: 8
    needle: {needle-hop: 0.5, needle-scene: 0.5}
    agent: {policy: explicit, budget: {max_turns: 4}}
    rewards:
      - {name: accuracy}
      - {name: crop-price, weight: 0.5}

Keys that TRL's `GRPOConfig` has are named as there; those that have no name here go under `trl`. `agent` is an ordinary
agent configuration. `gradient_accumulation_steps` and `steps_per_generation` follow from `prompts`, `minibatches` and
the number of devices, so that a recipe means the same on any number of them.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, ClassVar, Final, Literal

from pydantic import Field, JsonValue, field_validator, model_validator
from transformers.trainer_utils import SchedulerType

from qzoom_agent.config import AgentConfig
from qzoom_agent.errors import ConfigError
from qzoom_agent.evaluation.tasks.needle import NeedleTask
from qzoom_agent.extensions import reference
from qzoom_agent.training.branches.dataset import DatasetSpec
from qzoom_agent.training.branches.fitting import last_checkpoint
from qzoom_agent.training.recipe_io import LoraSection, Section, read_recipe
from qzoom_agent.training.reward_list import PUBLISHED, RewardEntry
from qzoom_agent.training.rewards import Accuracy
from qzoom_agent.training.trained_model import ModelRecipe

LossName = Literal["dapo", "grpo", "dr_grpo", "gspo", "cispo", "bnpo", "sapo"]
LOSSES: Final[dict[LossName, dict[str, Any]]] = {
    "dapo": {"loss_type": "dapo", "epsilon": 0.2, "epsilon_high": 0.28},
    "grpo": {"loss_type": "grpo", "epsilon": 0.2},
    "dr_grpo": {"loss_type": "dr_grpo", "epsilon": 0.2, "scale_rewards": "none"},
    "gspo": {"loss_type": "grpo", "importance_sampling_level": "sequence", "epsilon": 3e-4, "epsilon_high": 4e-4},
    "cispo": {"loss_type": "cispo", "epsilon_high": 5.0},
    "bnpo": {"loss_type": "bnpo", "epsilon": 0.2},
    "sapo": {"loss_type": "sapo"},
}
"""Each loss with the settings of its paper: DAPO 2503.14476, GRPO 2402.03300, Dr. GRPO 2503.20783, GSPO 2507.18071,
CISPO 2506.13585 with the bound of ScaleRL, 2510.13786; of BNPO (beta-normalised) and SAPO (soft gates) TRL's own."""

UNUSABLE: Final = {
    **dict.fromkeys(("use_vllm", "vllm_mode"), "is set elsewhere in the recipe (rollouts.vllm)"),
    "num_train_epochs": "has no effect beside max_steps, which says how long a run is",
    "use_liger_kernel": "computes another loss than the one that is checked here, without the positions of crops",
    "mask_truncated_completions": "leaves images without tokens behind; loss.mask_truncated does the same",
    "sync_ref_model": "is no part of a checkpoint, so a resumed run would compare with the model at the start again",
    "save_only_model": "leaves the optimizer out of checkpoints, so a killed run could not resume",
}
"""Keys of `trl` that cannot be given, each with the reason."""
SAMPLING: Final = {
    "top_k",
    "min_p",
    "repetition_penalty",
    "generation_kwargs",
    "cache_implementation",
    "use_transformers_continuous_batching",
    "use_transformers_paged",
}
"""Keys of `trl` that only TRL's own generation reads."""
FREE: Final = {"max_steps", "watch", "logging_steps", "report_to"}
"""Keys that may change when a run is resumed."""
HUB: Final = {
    "push_to_hub",
    "hub_model_id",
    "hub_strategy",
    "hub_token",
    "hub_private_repo",
    "hub_always_push",
    "hub_revision",
}
"""Keys of `trl` that may change, too: where the model is uploaded, if anywhere."""


class Loss(Section):
    """The loss, with TRL's names."""

    renamed: ClassVar[Mapping[str, str]] = {
        "name": "loss_type",
        "entropy": "entropy_coef",
        "scale": "scale_rewards",
        "aggregate": "multi_objective_aggregation",
    }
    loss_type: LossName = "dapo"
    """TRL's, or `gspo`: TRL's `grpo` with importance sampling over sequences."""
    epsilon: float | None = Field(default=None, gt=0)
    """Lower clip; None: the paper's."""
    epsilon_high: float | None = Field(default=None, gt=0)
    """Upper clip; None: the paper's."""
    beta: float = Field(default=0.0, ge=0)
    """Weight of the divergence from the model at the start; above 0 keeps a copy of it in memory (not with LoRA)."""
    entropy_coef: float = 0.0
    """Weight of an entropy bonus."""
    scale_rewards: Literal["group", "batch", "none"] | None = None
    """Deviation that rewards are divided by; None: the paper's, mostly the group's."""
    multi_objective_aggregation: Literal["sum_then_normalize", "normalize_then_sum"] = "sum_then_normalize"
    """Add rewards and compare within the group, or compare each by itself first (GDPO), so that small terms survive."""
    mask_truncated: bool = True
    """Learn nothing from rollouts that were cut off or ran out of turns."""

    @model_validator(mode="after")
    def _reads_its_clips(self) -> "Loss":
        for key in {"sapo": ("epsilon", "epsilon_high"), "cispo": ("epsilon",)}.get(self.loss_type, ()):
            if getattr(self, key) is not None:
                raise ValueError(f"{key} has no effect with loss_type {self.loss_type}, which does not clip by it")
        return self

    def settings(self) -> dict[str, Any]:
        """Return the keys of `GRPOConfig`, those of the paper where none are given."""
        own = self.model_dump(exclude={"loss_type", "mask_truncated"}, exclude_none=True)
        return {**LOSSES[self.loss_type], **own}


class LoRA(LoraSection):
    """Low-rank adapters instead of all weights."""

    target_modules: str = r".*language_model.*\.(q_proj|k_proj|v_proj|o_proj|gate_proj|up_proj|down_proj)"
    """Names of the modules, as one regular expression; the vision tower has modules of the same short names. Of these
    only those in decoder layers from `from_layer` on get adapters."""

    @field_validator("lora_dropout")
    @classmethod
    def _drops_nothing(cls, given: float) -> float:
        if given:
            raise ValueError("with dropout another model is trained than the one that sampled. Leave it out")
        return given


class VLLM(Section):
    """A vLLM that generates the turns (`rollouts.by`: generate or environment); TRL's keys without `vllm_`."""

    mode: Literal["server", "colocate"] = "server"
    """`colocate`: in the trainer's own processes, on the devices that train."""
    server_host: str = "0.0.0.0"
    server_port: int = Field(default=8000, gt=0)
    server_base_url: str | None = None
    gpu_memory_utilization: float | None = Field(default=None, gt=0, le=1)
    """Of `colocate`, as all keys below: the share of a device's memory that vLLM takes; None: TRL's default."""
    tensor_parallel_size: int | None = Field(default=None, gt=0)
    max_model_length: int | None = Field(default=None, gt=0)
    enable_sleep_mode: bool | None = None
    """Free vLLM's memory while the weights are trained."""

    def settings(self) -> dict[str, Any]:
        """Return the keys of `GRPOConfig`."""
        given = self.model_dump(exclude_none=True)
        return {"use_vllm": True, **{f"vllm_{key}": value for key, value in given.items()}}


class Rollouts(Section):
    """Settings of the episodes."""

    by: Literal["shared", "generate", "environment"] = "shared"
    """`shared`: our loop and generation. `generate`: our loop, TRL's generation (HF or vLLM). `environment`: TRL's tool
    loop over `ZoomEnv`, for protocols whose results are in role "tool"."""
    temperature: float = Field(default=1.0, gt=0)
    top_p: float = Field(default=1.0, gt=0, le=1)
    rows: int = Field(default=256, gt=0)
    """Most episodes at a time on a device."""
    perception: Literal["current", "frozen"] = "current"
    """Model whose lower layers gate and SD-RPN read: the trained one, or a copy of it from the start."""
    tolerance: float = Field(default=0.05, gt=0)
    """Largest mean distance of sampled log-probabilities from the trainer's own, over all turns or those of one number;
    beyond it training is refused. In float32 a fiftieth of it is the limit for each token."""
    max_resample_times: int | None = Field(default=None, gt=0)
    """Times that questions whose rollouts all have the same rewards, so that nothing is learned from them, are replaced
    by others before a step (dynamic sampling, DAPO 2503.14476); None: they stay."""
    vllm: VLLM | None = None

    @model_validator(mode="after")
    def _has_its_writer(self) -> "Rollouts":
        if self.vllm is not None and self.by == "shared":
            raise ValueError("vllm writes turns for `by: generate` or `by: environment`, not for `shared`")
        if self.max_resample_times and self.by == "environment":
            raise ValueError("max_resample_times needs our loop: set `by` to shared or generate, or leave it out")
        return self


class Evaluation(Section):
    """Held-out questions, asked before training and during it; `final/` is the best of the checkpoints."""

    eval_steps: int = Field(default=50, gt=0)
    """Steps between evaluations, rounded up to whole rounds of rollouts. Each writes a checkpoint, as `save_steps`."""
    questions: int = Field(default=200, gt=0)
    """Number of questions: the first of `data`, or boards that no run trains on, the same for every seed."""
    data: list[DatasetSpec] = Field(default=[])
    """The questions of a recipe with `data`."""
    metric_for_best_model: str = "reward"
    """Metric whose largest value is best, by its name in the log without `eval_`: reward, zoom/accuracy, ..."""


class Watch(Section):
    """Episodes that are kept as pages."""

    every: int = Field(default=20, gt=0)
    """Steps between them."""
    episodes: int = Field(default=2, ge=0)
    """Their number each time, each of another question."""


class GRPORecipe(ModelRecipe):
    """The recipe of one run."""

    stored = "settings.json"

    renamed: ClassVar[Mapping[str, str]] = {
        "steps": "max_steps",
        "group": "num_generations",
        "batch": "per_device_train_batch_size",
        "iterations": "num_iterations",
        "attention": "attn_implementation",
        "schedule": "lr_scheduler_type",
        "mixed_precision": "bf16",
        "log_steps": "logging_steps",
        "workers": "dataloader_num_workers",
    }
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    """Number format of the weights. Those that are trained are kept in float32 while they are, and written in this."""
    attn_implementation: Literal["sdpa", "eager"] = "sdpa"
    seed: int = Field(default=0, ge=0, lt=1000)
    max_steps: int = Field(gt=0)
    """Optimizer steps."""
    prompts: int = Field(default=8, gt=0)
    """Questions of one round of rollouts, over all devices."""
    num_generations: int = Field(default=8, ge=2)
    """Rollouts of each question."""
    per_device_train_batch_size: int = Field(default=8, gt=0)
    """Rollouts in one forward and backward pass on a device."""
    minibatches: int = Field(default=1, gt=0)
    """Optimizer steps that one round of rollouts is divided into."""
    num_iterations: int = Field(default=1, gt=0)
    """Times that each round is learned from."""
    needle: dict[NeedleTask, Annotated[float, Field(gt=0, allow_inf_nan=False)]] | None = None
    """Shares of the needle tasks, drawn without end."""
    data: list[DatasetSpec] = Field(default=[])
    """Questions from elsewhere, instead of `needle`."""
    agent: dict[str, Any] = Field(default={})
    """Configuration of the agent that runs the episodes."""
    rewards: list[RewardEntry] = Field(default=[Accuracy(name="accuracy")])
    """A list, see `reward_list`, or the name of a published one (deepeyes, visionthink, ...). An `accuracy` that is
    `judged: true` asks the `judge`."""
    loss: Loss = Loss()
    learning_rate: float = Field(default=1e-6, gt=0)
    lr_scheduler_type: SchedulerType = SchedulerType.CONSTANT_WITH_WARMUP
    warmup_steps: int = Field(default=0, ge=0)
    weight_decay: float = Field(default=0.0, ge=0)
    adam_beta2: float = Field(default=0.999, gt=0, lt=1)
    max_grad_norm: float = Field(default=1.0, gt=0)
    tower: bool = False
    """Train the vision tower as well."""
    lora: LoRA | None = None
    bf16: bool = False
    """bfloat16 products over float32 weights."""
    gradient_checkpointing: bool = False
    max_completion_length: int | None = Field(default=None, gt=0)
    """Most tokens after the opening, crops included; None: what the budgets can come to."""
    rollouts: Rollouts = Rollouts()
    watch: Watch = Watch()
    logging_steps: int = Field(default=1, gt=0)
    save_steps: int = Field(default=50, gt=0)
    """Steps between checkpoints, rounded up to whole rounds of rollouts; a killed run loses at most these."""
    evaluation: Evaluation | None = None
    """Held-out questions; None: none are asked, and `final/` is the last model."""
    report_to: str = "none"
    """A tracker of transformers: tensorboard, wandb, trackio, ..."""
    dataloader_num_workers: int = Field(default=0, ge=0)
    """Processes that read and draw images."""
    trl: dict[str, Any] = Field(default={})
    """Further settings of TRL's GRPOConfig, by its names."""

    @model_validator(mode="before")
    @classmethod
    def _leaves_out_what_follows(cls, given: Any) -> Any:
        following = {"gradient_accumulation_steps", "steps_per_generation", "generation_batch_size"}
        if taken := sorted(following & set(given if isinstance(given, Mapping) else ())):
            raise ValueError(
                f"{', '.join(taken)} follows from `prompts`, `num_generations`, `minibatches`, "
                "`per_device_train_batch_size` and the number of devices. Set those, and leave it out"
            )
        return given

    @field_validator("rewards", mode="before")
    @classmethod
    def _published(cls, given: Any) -> Any:
        if not isinstance(given, str):
            return given
        if given not in PUBLISHED:
            raise ValueError(f"there is no published list {given!r}; there are {', '.join(PUBLISHED)}")
        return list(PUBLISHED[given])

    @field_validator("trl")
    @classmethod
    def _keeps_what_it_rests_on(cls, given: dict[str, Any]) -> dict[str, Any]:
        for key in UNUSABLE.keys() & given.keys():
            raise ValueError(f"{key} {UNUSABLE[key]}. Leave it out")
        if not given.get("vllm_importance_sampling_correction", True):
            raise ValueError(
                "without vllm_importance_sampling_correction TRL does not compute what the trainer itself would have "
                "sampled, and nobody could tell that vLLM read another prompt. Leave it out"
            )
        return given

    @field_validator("agent")
    @classmethod
    def _is_a_configuration(cls, given: dict[str, Any]) -> dict[str, Any]:
        taken = sorted({"model", "protocol", "seed"} & set(given)) + [
            f"generation.{key}" for key in ("temperature", "top_p") if key in (given.get("generation") or {})
        ]
        if taken:
            raise ValueError(f"{', '.join(taken)} is set elsewhere in the recipe (model, protocol, seed, rollouts)")
        if AgentConfig().replace(**given).generation.presence_penalty:
            raise ValueError(
                "generation.presence_penalty makes rollouts another model's than the one that is trained. Leave it out"
            )
        return given

    @model_validator(mode="after")
    def _fits_together(self) -> "GRPORecipe":
        if bool(self.needle) == bool(self.data):
            raise ValueError("questions come from `needle` or from `data`: give one of them")
        if self.data and self.evaluation is not None and not self.evaluation.data:
            raise ValueError("the held-out questions of a recipe with `data` are those of `evaluation.data`: name some")
        judged = any(isinstance(one, Accuracy) and one.judged for one in self.rewards)
        if judged != (self.judge is not None):
            raise ValueError(
                "`judge`, a server, and `judged: true` of the reward `accuracy`, which asks it, belong together; only "
                f"{'`judged: true`' if judged else '`judge`'} is given. Give both or neither"
            )
        for one in self.rewards if self.loss.multi_objective_aggregation == "normalize_then_sum" else ():
            if one.scales and max(getattr(one, key) for key in one.scales) != 1:
                raise ValueError(
                    f"normalize_then_sum divides the reward '{one.name}' by its own deviation, so the size of its "
                    f"{' and '.join(one.scales)} has no effect. Set the largest to 1 and price it by `weight`, or use "
                    "sum_then_normalize"
                )
        if self.rollouts.by == "shared" and (unread := sorted(SAMPLING & self.trl.keys())):
            raise ValueError(
                f"trl.{', trl.'.join(unread)} has no effect with `rollouts.by: shared`, which samples by "
                "rollouts.temperature and rollouts.top_p. Leave it out, or set rollouts.by to generate"
            )
        if self.lora and self.tower:
            raise ValueError("with lora adapters alone are trained, so tower has no effect. Leave one of them out")
        if self.from_layer and self.tower:
            raise ValueError("from_layer keeps what lies below a layer as it is, and the vision tower lies below all")
        self.accumulation(1)
        if left := self.max_steps % self.steps_of_round:
            more = self.max_steps - left + self.steps_of_round
            raise ValueError(
                f"each round of rollouts is learned from in {self.steps_of_round} steps (minibatches x "
                f"num_iterations), so {self.max_steps} steps would end within one. Set max_steps to {more}"
            )
        return self

    def decisive(self) -> dict[str, JsonValue]:
        exclude: Any = {**dict.fromkeys(FREE, True), "trl": HUB}
        return self.model_dump(mode="json", exclude=exclude, fallback=reference)

    @property
    def sources(self) -> list[DatasetSpec]:
        return [*self.data, *(self.evaluation.data if self.evaluation else ())]

    def begun(self, output: Path) -> Path:
        return output if last_checkpoint(output) else output / "checkpoint"

    def agent_config(self) -> AgentConfig:
        """Return the configuration of the episodes."""
        sampling = self.rollouts.model_dump(include={"temperature", "top_p"})
        return (
            AgentConfig().replace(**self.agent).replace(model=self.model, protocol=self.protocol, generation=sampling)
        )

    def accumulation(self, processes: int) -> int:
        """Return TRL's `gradient_accumulation_steps` on so many devices.

        Raises ConfigError if the rollouts of a round do not divide into batches, or a group would be torn.
        """
        if self.prompts % processes:  # rewards compare the rollouts of a group, so a device gets whole ones
            raise ConfigError(
                f"{self.prompts} prompts do not divide over {processes} devices, so rollouts of one question would be "
                f"scored apart. Set prompts to a multiple of {processes}."
            )
        rows, batch = self.prompts * self.num_generations, self.per_device_train_batch_size
        share, left = divmod(rows, batch * processes * self.minibatches)
        if left:
            raise ConfigError(
                f"{self.prompts} prompts x {self.num_generations} rollouts do not divide into {self.minibatches} "
                f"minibatches of batches of {batch} on {processes} device(s). Change prompts or "
                "per_device_train_batch_size."
            )
        return share

    @property
    def steps_of_round(self) -> int:
        """Optimizer steps that learn from one round of rollouts."""
        return self.minibatches * self.num_iterations

    def whole_rounds(self, steps: int) -> int:
        """Return a number of steps, rounded up so that it ends with a round."""
        return self.steps_of_round * -(-steps // self.steps_of_round)

    @property
    def rounds(self) -> int:
        """Rounds of rollouts in a run."""
        return self.max_steps // self.steps_of_round


def load_grpo_recipe(path: Path, *, overrides: Sequence[str] = (), **changes: Any) -> GRPORecipe:
    """Read a recipe; see `read_recipe`."""
    return read_recipe(path, GRPORecipe, overrides=overrides, **changes)
