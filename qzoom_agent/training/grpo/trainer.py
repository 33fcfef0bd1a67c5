"""TRL's `GRPOTrainer`, given the agent's episodes instead of its own tool loop.

TRL 1.16 has no public way in for episodes with images: a `rollout_func` cannot return images, `tools` cannot reach the
image of their own rollout, and an `environment_factory` (`ZoomEnv` is one) encodes all images and the whole
conversation again in every turn. `EpisodeTrainer` therefore replaces three methods of `GRPOTrainer._generate`:
`_tokenize_prompts` runs the episodes and returns their openings, `_generate_single_turn` returns what follows, and
`_tool_call_loop` the mask of what the model sampled, and the images. Prompt sampling, padding, rewards, advantages,
losses and metrics stay TRL's. `ZoomTrainer` is what it shares with plain TRL over `ZoomEnv`: rewards over rollouts,
metrics, checks, checkpoints that can be resumed.
"""

import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from pathlib import Path
from random import Random
from time import perf_counter
from typing import Any, Final

import torch
from accelerate.utils import gather_object
from PIL import Image
from torch import Tensor
from transformers import PrinterCallback, TrainerCallback
from trl.models.utils import unwrap_model_for_generation
from trl.trainer.grpo_trainer import GRPOTrainer
from trl.trainer.utils import pad

from qzoom_agent.config import AgentConfig
from qzoom_agent.data.samples import Sample
from qzoom_agent.errors import ConfigError
from qzoom_agent.evaluation.sample_result import episode_seed
from qzoom_agent.models.hf import HFBackend
from qzoom_agent.models.hf_batch import BatchEngine
from qzoom_agent.models.hf_generation import GeneratedTurn, GenerationRequest, TextStream
from qzoom_agent.models.prompts import save_processor
from qzoom_agent.training.branches.fitting import WeightSample
from qzoom_agent.training.grpo.callbacks import RolloutPageCallback, measures, reward_measures
from qzoom_agent.training.grpo.checks import (
    LogpDistance,
    SamePrompts,
    joined,
    logp_distances,
    refused_by_trl,
    require_features,
    require_images,
    require_same_model,
)
from qzoom_agent.training.grpo.environment import finished, zoom_environment
from qzoom_agent.training.grpo.grpo_recipe import GRPORecipe
from qzoom_agent.training.grpo.rollouts import FinishedRollout, RolloutScheduler, play
from qzoom_agent.training.reward_list import NamedReward
from qzoom_agent.training.rewards import Accuracy, Rollout
from qzoom_agent.views import ViewStore

Row = dict[str, Any]
_OF_COMPLETIONS: Final = {
    "completion_ids",
    "completion_mask",
    "tool_mask",
    "old_per_token_logps",
    "ref_per_token_logps",
    "sampling_per_token_logps",
    "importance_sampling_ratio",
    "advantages",
}
"""Tensors (rows, completion tokens) of a batch."""
_NO_ADVANTAGE: Final = 1e-6
"""Size below which an advantage is rounding."""


def build_trainer(
    recipe: GRPORecipe, backend: HFBackend, *, config: AgentConfig, looker: HFBackend | None, **kwargs: Any
) -> "ZoomTrainer":
    """Return the trainer for the recipe's `rollouts.by`.

    Args:
        looker: Whose branches look, before the policy or, where it does not, for the record alone; None: nobody's.

    Raises:
        ConfigError: TRL refuses the arguments, or FSDP's sharded weights cannot be used in this way.
    """
    trainer: ZoomTrainer
    rollouts = recipe.rollouts
    kwargs |= {"looker": looker, "tolerance": rollouts.tolerance}
    if rollouts.by == "environment":
        make = zoom_environment(backend, config=config, looker=looker)
        trainer = ZoomTrainer(backend, environment_factory=make, **kwargs)
    else:
        trainer = EpisodeTrainer(backend, config=config, recipe=recipe, **kwargs)
    if trainer.is_fsdp_enabled and rollouts.by == "shared":
        raise ConfigError(
            "Shared rollouts take a different number of passes on each device, which FSDP's sharded weights do not "
            "allow. Use DeepSpeed (zero2, zero3), or rollouts.by: generate."
        )
    if trainer.is_fsdp_enabled and looker is not None and looker.model is backend.model:
        raise ConfigError(
            "The branches would read FSDP's sharded weights outside the trainer's own passes, which is not possible. "
            "Set rollouts.perception: frozen, or use DeepSpeed (zero2, zero3)."
        )
    return trainer


class ZoomTrainer(GRPOTrainer):
    """`GRPOTrainer` whose rewards see rollouts; with `environment_factory` it is plain TRL."""

    args: Any
    model: Any
    environments: Any
    train_dataset: Any
    pad_to_multiple_of: Any
    num_generations: Any

    def __init__(
        self,
        backend: HFBackend,
        *,
        rewards: Sequence[NamedReward],
        accuracy: Accuracy,
        pages: RolloutPageCallback,
        tolerance: float,
        callbacks: Sequence[TrainerCallback] = (),
        looker: HFBackend | None = None,
        **kwargs: Any,
    ) -> None:
        """
        Args:
            backend: The model that is trained, with its processor.
            rewards: Their weights are in `args`.
            accuracy: Decides what is logged as right.
            pages: Keeps some rollouts to look at.
            tolerance: See `require_same_model`.
            callbacks: In the order in which they are called; `pages` comes last.
            looker: Whose branches look; None: nobody's.
            kwargs: Further arguments of `GRPOTrainer`.
        """
        self.backend, self.looker, self.pages = backend, looker, pages
        self.accuracy, self.tolerance, self.rewards = accuracy, tolerance, rewards
        self._sampled_at = -1
        """Step whose weights the rollouts in training were sampled from."""
        self._logps: Tensor | None = None
        self._distances: list[list[LogpDistance]] = []
        """Of the batches since the last log."""
        self._learned: Row | None = None
        """The batch that is being learned from."""
        self._held_out: dict[str, tuple[Rollout, bool, Tensor]] = {}
        """Rollouts of the evaluation that is running, whether their answers are right, and the values of their rewards,
        by the id of their question."""
        with refused_by_trl():
            super().__init__(
                model=backend.model,
                processing_class=backend.processor,
                reward_funcs=[self._as_trl(one) for one in rewards],
                callbacks=[*callbacks, pages],
                **kwargs,
            )
        if self.use_vllm and self.vllm_mode == "colocate":
            self.vllm_generation.llm = SamePrompts(self.vllm_generation.llm, backend.codec.image_id)
        elif not self.use_vllm:
            self.generation_config.suppress_tokens = list(backend.codec.forbidden)  # TRL's are placeholders of images
        # sharded weights are other tensors than those of the model
        sharded = self.is_deepspeed_enabled or self.is_fsdp_enabled
        self._start = None if sharded else WeightSample(self.model)
        self.remove_callback(PrinterCallback)  # `MetricsCallback` prints
        # TRL prints whole rollouts for which every reward is None, which truncated ones are meant to be
        logging.getLogger("trl.trainer.grpo_trainer").addFilter(_is_not_about_unscored_rollouts)

    def _as_trl(self, named: NamedReward) -> Callable[..., list[float | None]]:
        def score(*, rollout: list[Rollout], **_: Any) -> list[float | None]:
            return named.reward(rollout, masks=self.model.training)  # held out, a reply that was cut off counts

        score.__name__ = named.name
        return score

    def _episodes(
        self, rows: Sequence[Row], completions: Sequence[Any], ids: Sequence[Sequence[int]]
    ) -> tuple[list[Rollout], list[ViewStore]]:
        """Return the finished rollouts of a batch, in the order of its rows, and the views of each.

        `completions` and their token ids are as TRL gives them to rewards.
        """
        ends = {*self.eos_token_ids, self.backend.processor.tokenizer.pad_token_id}
        cut = [not one or one[-1] not in ends for one in ids]
        done = zip(self.environments, completions, cut, rows, strict=True)
        rollouts = [Rollout(finished(env, messages, cut=end), row["sample"]) for env, messages, end, row in done]
        return rollouts, [env.store for env in self.environments]

    def _calculate_rewards(self, inputs: list[Row], prompts: Any, completions: Any, completion_ids_list: Any) -> Any:
        rollouts, stores = self._episodes(inputs, completions, completion_ids_list)
        for row, rollout in zip(inputs, rollouts, strict=True):
            row["rollout"] = rollout
        # the mean of equal rewards can differ from them in float32, and Adam makes a whole step of such a difference
        values = super()._calculate_rewards(inputs, prompts, completions, completion_ids_list).double()
        values[values[:, self.reward_weights != 0].isnan().all(1)] = torch.nan  # a weight of 0 logs, and scores nothing
        blank = Image.new("RGB", (1, 1))
        # All devices are counted together: of rates, such as that of refused calls, the mean over devices is another.
        own_right = self.accuracy.right(rollouts)
        told = gather_object([Rollout(one.trace, replace(one.sample, image=blank)) for one in rollouts])
        right = gather_object(own_right)
        if not self.model.training:
            # a question that fills the last batch of another process is counted once
            found = zip(told, right, values, strict=True)
            self._held_out |= {one.sample.id: (one, good, row) for one, good, row in found}
            return values
        if self.accelerator.is_main_process:
            for name, value in measures(told, right).items():
                self._log_metric(name, value)
            first = self.accelerator.process_index * len(inputs)
            own = values[first : first + len(inputs)].T.tolist()
            self.pages.keep(
                self.state.global_step, rollouts, dict(zip(self.reward_func_names, own, strict=True)), stores
            )
        return values

    def _generate_and_score_completions(self, inputs: list[Row]) -> dict[str, Any]:
        if self.looker is not None:
            move_looker(self.looker, self.accelerator.device, trained=self.backend)
        self._sampled_at = self.state.global_step
        batch: dict[str, Any] = super()._generate_and_score_completions(inputs)
        batch["advantages"] = batch["advantages"].float()
        if (
            self.model.training
        ):  # TRL counts no group that is masked, nor any by itself where deviations are the batch's
            groups = torch.tensor([*self._logs["advantages"]]).view(-1, self.num_generations)
            equal = (groups.abs() < _NO_ADVANTAGE).all(1).float().mean()
            self._metrics["train"]["frac_reward_zero_std"][-1] = equal.item()
        require_images(batch, sum(batch.get("num_images") or []))
        if self.use_vllm and self.model.training:  # greedy in evaluation, where its log-probabilities say nothing
            self._compare(batch, batch["old_per_token_logps"], writer="vLLM", refuse=True)
        return batch

    def _get_per_token_logps_and_entropies(self, *args: Any, **kwargs: Any) -> Any:
        if kwargs.get("batch_size") is not None:  # rows of an evaluation are as many as can be rolled out
            kwargs["batch_size"] = self.args.per_device_train_batch_size
        found = super()._get_per_token_logps_and_entropies(*args, **kwargs)
        self._logps = found[0].detach()
        return found

    def _compute_loss(self, model: Any, inputs: dict[str, Any]) -> Any:
        inputs = self._learned = trimmed(inputs)
        compute: Any = super()._compute_loss
        loss = compute(model, inputs)
        self._learned = None
        if self._logps is not None and not self.use_vllm and self.model.training:
            now = self._sampled_at == self.state.global_step  # later steps of a round have other weights
            self._compare(inputs, self._logps, writer="shared decoding", refuse=now)
        return loss

    def prediction_step(self, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> tuple[None, None, None]:
        self._prepare_inputs(inputs)  # the metrics of an evaluation are those of its rollouts; its loss says nothing
        return None, None, None

    def evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        """Ask the held-out questions. Raises ConfigError if they have no metric that the recipe compares by."""
        metrics: dict[str, Any] = super().evaluate(*args, **kwargs)
        if (best := self.args.metric_for_best_model) is not None:
            key = f"eval_{best.removeprefix('eval_')}"
            if key not in metrics:
                names = ", ".join(sorted(name.removeprefix("eval_") for name in metrics))
                raise ConfigError(
                    f"evaluation.metric_for_best_model is '{best}', which held-out questions have no metric of. "
                    f"Choose one of: {names}."
                )
            if metrics[key] is None:  # no reply has a value, so that any other model is better
                metrics[key] = float("-inf")
        return metrics

    def _compare(self, batch: Row, trained: Tensor, *, writer: str, refuse: bool) -> None:
        """Log how far the sampled log-probabilities are from the model's own, and refuse what is no rounding."""
        if (sampled := batch.get("sampling_per_token_logps")) is None:
            return  # Hugging Face's generation gives none
        distances = logp_distances(sampled, trained, batch["completion_mask"] * batch.get("tool_mask", 1))
        self._distances.append(distances)
        if refuse:
            exact = self.backend.model.dtype == torch.float32 and not (
                self.args.bf16 or self.args.fp16 or self.use_vllm
            )
            require_same_model(distances, tolerance=self.tolerance, writer=writer, exact=exact)

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        if self._held_out:  # over all questions, where TRL takes the mean of batches, whatever their size
            rollouts, right, values = zip(*self._held_out.values(), strict=True)
            found = reward_measures(self.reward_func_names, self.reward_weights, torch.stack(values))
            found |= measures(rollouts, right)
            self._metrics["eval"].update({name: [value] for name, value in found.items()})
            self._held_out = {}
        if "loss" in logs:
            # over the batches of all devices; TRL would log the mean of their largest differences as the largest
            for turn, one in enumerate(joined(gather_object(self._distances))):
                name = f"/turn_{turn}" if turn else ""
                logs |= {f"rollout/logp_difference{name}": one.mean, f"rollout/logp_difference_max{name}": one.largest}
            self._distances = []
            if self._start is not None:
                logs["weights/changed"] = self._start.changed()
        super().log(logs, start_time)

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Any] | None = None) -> None:
        # Checkpoints would be written under the hub's parameter names, which `Trainer` does not translate back when it
        # resumes: it would silently continue from fresh weights. An adapter has no such names.
        model = self.accelerator.unwrap_model(self.model)
        assert output_dir is not None
        if model is not self.backend.model:
            super()._save(output_dir, state_dict)
            (Path(output_dir) / "training_args.bin").unlink(missing_ok=True)  # a pickle, which nothing reads
            return
        if not self.args.should_save:  # called on all processes, and one of them writes
            return
        model.save_pretrained(output_dir, state_dict=state_dict, save_original_format=False)
        save_processor(self.backend.processor, Path(output_dir))


class EpisodeTrainer(ZoomTrainer):
    """GRPO over episodes of the agent, see above; the recipe says how many run at a time, and who writes the turns."""

    def __init__(
        self,
        backend: HFBackend,
        *,
        config: AgentConfig,
        recipe: GRPORecipe,
        **kwargs: Any,
    ) -> None:
        super().__init__(backend, **kwargs)
        self.config, self.seed, self.rows = config, recipe.seed, recipe.rollouts.rows
        self.resamples, self._greedy = recipe.rollouts.max_resample_times or 0, False
        # Without tools TRL processes the images of prompts alone. All images of a row, the opening's too, are returned
        # as tool images, so that one processor call makes the pixels of the forward pass.
        self.tools = [_placeholder_tool]
        self._written_by_trl = recipe.rollouts.by == "generate"
        write = self._generate_by_trl if self._written_by_trl else BatchEngine(backend).generate
        self._scheduler = RolloutScheduler(backend, write, looker=self.looker, encode=not self._written_by_trl)
        self._inputs: list[Row] = []
        self._finished: list[FinishedRollout] = []

    def _episodes(
        self, rows: Sequence[Row], completions: Sequence[Any], ids: Sequence[Sequence[int]]
    ) -> tuple[list[Rollout], list[ViewStore]]:
        return [one.rollout for one in self._finished], [one.answer.store for one in self._finished]

    def _generate_and_score_completions(self, inputs: list[Row]) -> dict[str, Any]:
        self._inputs = inputs
        batch = super()._generate_and_score_completions(inputs)
        positions = self._positions(batch["prompt_ids"].shape[1], batch["completion_ids"].shape[1])
        return batch if positions is None else {**batch, "positions": positions}

    def _get_per_token_logps_and_entropies(
        self, model: Any, input_ids: Tensor, attention_mask: Tensor, logits_to_keep: int, *args: Any, **kwargs: Any
    ) -> Any:
        if self._learned is not None:
            positions = self._learned.get("positions")
        else:
            positions = self._positions(input_ids.shape[1] - logits_to_keep, logits_to_keep)
        placed = model if positions is None else _PlacedModel(model, positions)
        return super()._get_per_token_logps_and_entropies(
            placed, input_ids, attention_mask, logits_to_keep, *args, **kwargs
        )

    def _positions(self, width: int, length: int) -> Tensor | None:
        """Return the positions of a round's padded rows, (rows, tokens, 3); None where TRL computes the same itself."""
        every = [one.tokens for one in self._finished]
        if not any(one.positions.is_floating_point() for one in every):
            return None
        padded = torch.zeros(len(every), width + length, 3, device=self.accelerator.device)
        for row, one in zip(padded, every, strict=True):
            row[width - len(one.prompt) : width + len(one.completion)] = one.positions.T
        return padded

    def _tokenize_prompts(self, prompts: list[Any]) -> tuple[list[list[int]], None, dict[str, Any]]:
        began = perf_counter()
        self._greedy = not self.model.training  # in evaluation
        self._finished = []
        with self._generation_mode():
            self._finished = self._play(range(len(self._inputs)))
            if not self._greedy:
                self._resample()
            if self._written_by_trl:
                self._join_other_devices()
        self._scheduler.forget()
        seconds = perf_counter() - began
        tokens = [one.tokens for one in self._finished]
        for one in tokens:
            require_features([*one.prompt, *one.completion], one.images, self.backend)
        self._log_metric("rollout/seconds", seconds)
        self._log_metric("rollout/tokens_per_second", sum(sum(one.mask) for one in tokens) / seconds)
        self._log_metric("rollout/rewritten_tokens", sum(one.rewritten for one in tokens) / len(tokens))
        return [one.prompt for one in tokens], None, {}

    def _play(self, rows: Sequence[int]) -> list[FinishedRollout]:
        """Run the episodes of some rows of the round."""
        samples: list[Sample] = [self._inputs[at]["sample"] for at in rows]
        place = f"{'held-out' if self._greedy else self.state.global_step}/{self.accelerator.process_index}"
        seeds = [episode_seed(self.seed, f"{place}/{at}/{one.id}") for at, one in zip(rows, samples, strict=True)]
        config = self.config.replace(generation={"temperature": 0.0}) if self._greedy else self.config
        lots = [slice(at, at + self.rows) for at in range(0, len(samples), self.rows)]
        return [one for lot in lots for one in play(self._scheduler, samples[lot], config, seeds[lot])]

    def _resample(self) -> None:
        """Replace questions whose rollouts all have the same rewards by others of the run, and roll these out."""
        if not self.resamples:
            return
        questions, equal = len({row["sample"].id for row in self._inputs}), self._equal_groups()
        self._log_metric("rollout/equal_groups", len(equal) / questions)
        for attempt in range(self.resamples):
            others = self._other_questions(len(equal), f"{self.seed}/{self.state.global_step}/{attempt}")
            pairs = [(at, sample) for group, sample in zip(equal, others, strict=False) for at in group]
            if not pairs:
                break
            for at, sample in pairs:
                self._inputs[at]["sample"] = sample
            replaced = [at for at, _ in pairs]
            for at, one in zip(replaced, self._play(replaced), strict=True):
                self._finished[at] = one
            equal = self._equal_groups()
        self._log_metric("rollout/equal_groups_left", len(equal) / questions)

    def _equal_groups(self) -> list[list[int]]:
        """Return the rows of each question whose rollouts all have the same rewards, or none."""
        rollouts = [one.rollout for one in self._finished]
        values = list(zip(*(one.reward(rollouts) for one in self.rewards if one.weight), strict=True))
        groups: dict[str, list[int]] = {}
        for at, row in enumerate(self._inputs):
            groups.setdefault(row["sample"].id, []).append(at)
        scored = {at for at, some in enumerate(values) if any(value is not None for value in some)}
        return [group for group in groups.values() if len({values[at] for at in group if at in scored}) < 2]

    def _other_questions(self, count: int, key: str) -> list[Sample]:
        """Return up to so many questions of the run that are not asked in this round, drawn by `key`."""
        asked, found = {row["sample"].id for row in self._inputs}, list[Sample]()
        drawn = Random(f"resample/{key}/{self.accelerator.process_index}")
        for at in drawn.sample(range(len(self.train_dataset)), len(self.train_dataset)):
            if len(found) == count:
                break
            sample = self.train_dataset[at]["sample"]
            if sample.id not in asked:
                asked.add(sample.id)
                found.append(sample)
        return found

    def _generate_single_turn(self, *args: Any, **kwargs: Any) -> tuple[list[list[int]], list[list[float]] | None]:
        tokens = [one.tokens for one in self._finished]
        known = not self._written_by_trl or self.use_vllm
        return [list(one.completion) for one in tokens], [list(one.logps) for one in tokens] if known else None

    def _tool_call_loop(
        self, prompts: Any, prompt_ids: Any, completion_ids: Any, completions: Any, logprobs: Any, *_: Any
    ) -> tuple[Any, ...]:
        traces = [one.rollout.trace for one in self._finished]
        conversations = [[{"role": "assistant", "content": turn.text} for turn in trace.turns] for trace in traces]
        failed = sum(trace.usage.failed for trace in traces)
        asked = sum(trace.usage.requested for trace in traces)
        shown = [one.tokens.images for one in self._finished]
        mask = [one.tokens.mask for one in self._finished]
        return mask, conversations, completion_ids, logprobs, asked, failed, shown

    @contextmanager
    def _generation_mode(self) -> Iterator[None]:
        """Unwrap the model and gather its weights, in eval mode and the trainer's own precision."""
        training = self.model.training
        gathered = unwrap_model_for_generation(
            self.model_wrapped,
            self.accelerator,
            gather_deepspeed3_params=self.args.ds3_gather_for_generation,
            gradient_checkpointing_kwargs=self.args.gradient_checkpointing_kwargs,
        )
        with (
            # TRL's own generation does this itself, once a turn
            gathered if self._scheduler.encode or self._scheduler.looker is not None else nullcontext(),
            torch.no_grad(),
            self.accelerator.autocast(),
        ):
            self.model.eval()
            try:
                yield
            finally:
                self.model.train(training)

    def _generate_by_trl(self, requests: Sequence[GenerationRequest]) -> list[GeneratedTurn]:
        """Generate turns with TRL, which begins with the whole conversation and all its images."""
        if not requests:
            return []
        prompts = [list(one.ready.prompt.ids) for one in requests]
        images = [[one.session.image(span.view) for span in one.ready.prompt.spans] for one in requests]
        limit = requests[0].settings.max_new_tokens
        self._any_device_generates(True)
        ids, logps = self._trl_pass(prompts, images, limit, [one.ready.positions[..., 0, :] for one in requests])
        known = [None] * len(ids) if logps is None else logps
        written = zip(requests, ids, known, strict=True)
        return [_read(one, sampled, probable, self.backend) for one, sampled, probable in written]

    def _trl_pass(
        self, prompts: list[list[int]], images: list[list[Any]], limit: int, positions: Sequence[Tensor] = ()
    ) -> Any:
        """Take one pass of TRL's generation; return ids, and their log-probabilities where vLLM gives them."""
        generate: Any = super()._generate_single_turn
        if self.use_vllm:
            self.vllm_generation.max_completion_length = limit
            self.vllm_generation.temperature = 0.0 if self._greedy else self.args.temperature
            rows = len(prompts)
            # TRL finds a process's answers by its number times its own rows, so all have to ask for as many
            most = int(self.accelerator.gather(torch.tensor([rows], device=self.accelerator.device)).max())
            asked = [at % rows for at in range(most)]
            ids, logps = generate([prompts[at] for at in asked], [images[at] for at in asked], {}, num_generations=1)
            return ids[:rows], logps[:rows]
        self.generation_config.max_new_tokens, self.generation_config.do_sample = limit, not self._greedy
        flat = [image for row in images for image in row]
        fields = dict(self.backend.processor.image_processor(images=flat, return_tensors="pt")) if flat else {}
        if any(one.is_floating_point() for one in positions):
            columns = [one.T.float() for one in positions]
            padded = pad(columns, padding_side="left", pad_to_multiple_of=self.pad_to_multiple_of)
            fields["position_ids"] = padded.permute(2, 0, 1)
        return generate(prompts, images, fields, num_generations=1, has_tool_images=True)

    def _any_device_generates(self, busy: bool) -> bool:
        """Return True if any device has turns to write. All devices ask together, once for each pass."""
        return bool(self.accelerator.gather(torch.tensor([busy], device=self.accelerator.device)).any())

    def _join_other_devices(self) -> None:
        """Take part in the passes of devices whose episodes are longer: sharded weights and vLLM need everybody."""
        one = self._finished[0]
        shown = one.tokens.images[: len(one.rollout.trace.views) - 1 - len(one.rollout.crops)]  # of the opening
        # the first process says how long the turns are that a server writes for all
        limit = self.config.generation.max_new_tokens if self.use_vllm else 1
        while self._any_device_generates(False):
            self._trl_pass([one.tokens.prompt], [shown], limit)


class _PlacedModel:
    """A model that is called with positions of its rows, which TRL passes in order and some at a time."""

    def __init__(self, model: Any, positions: Tensor) -> None:
        self._model, self._left = model, positions

    def __call__(self, *, input_ids: Tensor, **kwargs: Any) -> Any:
        now, self._left = self._left[: len(input_ids)], self._left[len(input_ids) :]
        return self._model(input_ids=input_ids, position_ids=now.permute(2, 0, 1), **kwargs)


def move_looker(looker: HFBackend, device: torch.device, *, trained: HFBackend) -> None:
    """Put the branches that look, and a base of their own, where the trained model is: accelerate moves that alone."""
    assert looker.branches is not None
    looker.branches.to(device)
    if looker.model is not trained.model:
        looker.model.to(device)  # type: ignore[arg-type]


def trimmed(inputs: dict[str, Any]) -> dict[str, Any]:
    """Return a batch without the columns that are padding in all its rows.

    TRL pads a whole round of rollouts to its longest and divides it afterwards; one long episode would otherwise be
    computed for every row.
    """
    prompts, completions = inputs["prompt_mask"].any(0), inputs["completion_mask"].any(0)
    if not completions.any():
        return inputs
    left = int(prompts.int().argmax())
    right = int(completions.nonzero().max()) + 1
    width, length = len(prompts), len(completions)
    columns = dict.fromkeys(("prompt_ids", "prompt_mask"), slice(left, None))
    columns |= dict.fromkeys(("mm_token_type_ids", "token_type_ids", "positions"), slice(left, width + right))
    cut = dict(inputs)
    for key, value in inputs.items():
        if isinstance(value, Tensor) and value.dim() > 1:
            of_completion = key in _OF_COMPLETIONS and value.shape[1] == length
            cut[key] = value[:, slice(right) if of_completion else columns.get(key, slice(None))]
    return cut


def _read(
    request: GenerationRequest, ids: Sequence[int], logps: Sequence[float] | None, backend: HFBackend
) -> GeneratedTurn:
    """Return a turn up to its end or its first stop string."""
    stream = TextStream(backend.codec.decode, request.settings.stop, None)
    ends = (at for at, token in enumerate(ids, 1) if token in backend.end_ids or stream.push(token))
    end = next(ends, None)
    count = len(ids) if end is None else end
    if end is None or ids[end - 1] in backend.end_ids:
        stream.finish()
    known = tuple(logps[:count]) if logps is not None else (0.0,) * count
    return GeneratedTurn(tuple(ids[:count]), known, stream.text, "length" if end is None else "stop")


def _placeholder_tool() -> None:
    """Stand in `GRPOTrainer.tools`; never called."""


def _is_not_about_unscored_rollouts(record: logging.LogRecord) -> bool:
    return "All reward functions returned None" not in record.getMessage()
