"""One step of GRPO on tiny models: what the model said in its episodes is what is learned, and nothing else."""

import json
import math
from collections.abc import Iterable, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

import pytest
import torch
from pydantic import ValidationError
from safetensors.torch import load_file
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from grpo_benchmark import _again, measure
from qzoom_agent.errors import BackendError, ConfigError
from qzoom_agent.models.hf import HFBackend
from qzoom_agent.perception.adapters import text_model
from qzoom_agent.perception.branches import Branches
from qzoom_agent.training.grpo.checks import logp_distances
from qzoom_agent.training.grpo.environment import ZoomEnv
from qzoom_agent.training.grpo.grpo_recipe import GRPORecipe
from qzoom_agent.training.grpo.launch import load_model, make_trainer, save_model, train
from qzoom_agent.training.grpo.trainer import EpisodeTrainer, ZoomTrainer, move_looker, trimmed
from qzoom_agent.training.rewards import Rollout
from tests.tiny_models import Family, build
from tests.training.grpo.grpo_script import AGENT, scripted, tiny_model, tiny_recipe
from tests.training.grpo.grpo_script import recipe as script_recipe
from tests.training.processes import log_of

CALL = '<think>look</think><tool_call>{"name": "image_zoom_in_tool", "arguments": {"bbox_2d": %s}}</tool_call>'
NEAR, FAR = CALL % "[5, 5, 60, 60]", CALL % "[40, 20, 90, 90]"
SCRIPTS = {
    "qwen2_5_vl": [[NEAR, "<answer>407</answer>", NEAR, FAR], ["<answer>407</answer>", "no", FAR], ["407"]],
    "qwen3_vl": [
        [
            CALL % '[100, 100, 400, 300], "label": "x", "img_idx": 0',
            "407",
            CALL % "[0, 0, 200, 200]",
            CALL % "[500, 500, 900, 990]",
        ],
        ["407", "no", CALL % "[0, 300, 200, 700]"],
        ["407"],
    ],
}
"""Rows 0 and 1 are one question's, 2 and 3 another's; a row that has answered has no part in later turns."""


ALWAYS: dict[str, Any] = {"policy": "always", "perception": {"threshold": 0.0}}
SHORT = {"generation": {"max_new_tokens": 6}}


class KilledInStep(TrainerCallback):
    """Ends training after the passes of a step, before its update."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_pre_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if state.global_step == self.step - 1:
            raise KeyboardInterrupt


def says(
    patch: pytest.MonkeyPatch, trainer: ZoomTrainer, turns: Iterable[Sequence[str]], *, cut: Sequence[int] = ()
) -> None:
    """Let the model generate these texts, a turn after another, one for every row; those in `cut` do not end."""
    tokenizer, left = trainer.backend.codec.tokenizer, iter(turns)

    def generate(*, input_ids: torch.Tensor, **_: Any) -> torch.Tensor:
        ends = [[] if at in cut else [tokenizer.eos_token_id] for at in range(len(input_ids))]
        rows = [[*tokenizer(text)["input_ids"], *end] for text, end in zip(next(left), ends, strict=True)]
        padded = [[*row, *[tokenizer.pad_token_id] * (max(map(len, rows)) - len(row))] for row in rows]
        return torch.cat((input_ids, torch.tensor(padded)), dim=1)

    patch.setattr(trainer.model, "generate", generate)


@pytest.mark.parametrize("family", ["qwen2_5_vl", pytest.param("qwen3_vl", marks=pytest.mark.slow)])
def test_a_step_learns_from_episodes_with_crops(
    family: Family, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = tiny_recipe(tmp_path, family)
    trainer = make_trainer(recipe, tmp_path / "out")
    scripted(monkeypatch, trainer.backend.codec.tokenizer, SCRIPTS[family])
    before = {name: weight.detach().clone() for name, weight in trainer.backend.model.named_parameters()}
    trainer.train()
    with monkeypatch.context() as other:  # a process that does not write
        other.setattr(type(trainer.args), "should_save", False)
        trainer.save_model(str(tmp_path / "other"), _internal_call=True)
    assert not (tmp_path / "other").exists()
    log = log_of(tmp_path / "out")[0]
    assert math.isfinite(log["loss"]) and log["grad_norm"] > 0
    assert log["rollout/logp_difference"] < 1e-4, "the trainer sees what the model saw when it wrote"
    changed = {name for name, weight in trainer.backend.model.named_parameters() if not weight.equal(before[name])}
    assert any("visual" in name for name in changed) and any("language_model" in name for name in changed)
    assert log["zoom/call_rate"] == 0.75 and log["zoom/served"] == 1.0 and log["zoom/accuracy"] == 0.75
    assert log["rewards/accuracy/mean"] == 0.75 and log["rollout/rewritten_tokens"] == 0


def test_trl_writes_turns_of_our_episodes(tmp_path: Path) -> None:
    """`rollouts.by: generate`: TRL's own generation, from the whole conversation each turn."""
    recipe = tiny_recipe(tmp_path, "qwen2_5_vl", rollouts={"by": "generate"}, agent={**AGENT, **SHORT})
    trainer = make_trainer(recipe, tmp_path / "out")
    assert trainer.generation_config.suppress_tokens == list(trainer.backend.codec.forbidden), "also those of videos"
    trainer.train()
    log = log_of(tmp_path / "out")[0]
    assert math.isfinite(log["loss"])
    assert log["zoom/written_tokens"] > 0 and log["zoom/turns"] >= 1
    assert "rollout/logp_difference" not in log, "HF generation reports no log-probabilities"


@pytest.mark.slow
def test_a_random_model_is_learned_from_with_the_tokens_it_sampled(tmp_path: Path) -> None:
    recipe = tiny_recipe(tmp_path, "qwen3_vl", agent={**AGENT, **SHORT})
    trainer = make_trainer(recipe, tmp_path / "out")
    trainer.train()
    log = log_of(tmp_path / "out")[0]
    assert log["rollout/logp_difference"] < 1e-4
    assert 1 <= log["zoom/written_tokens"] <= 3 * 6, "a reply that is cut off is followed by two more at the most"


@pytest.mark.slow
def test_what_is_rewarded_is_said_more_often(tmp_path: Path) -> None:
    """The whole way from a reward to the weights, by its sign: the share of characters with an even code."""
    shares: list[float] = []

    def even(rollouts: Sequence[Rollout]) -> list[float]:
        texts = [one.trace.turns[0].text for one in rollouts]
        rewards = [sum(ord(character) % 2 == 0 for character in text) / max(1, len(text)) for text in texts]
        shares.append(fmean(rewards))
        return rewards

    letters = build("qwen2_5_vl", tmp_path / "letters", max_position_embeddings=16384)  # a token is a letter or two
    recipe = tiny_recipe(
        tmp_path,
        "qwen2_5_vl",
        model=str(letters),
        agent={**AGENT, "generation": {"max_new_tokens": 4}, "policy": "direct"},
        rewards=[even],
        loss={"mask_truncated": False},
        max_steps=25,
        num_generations=8,
        per_device_train_batch_size=16,
        learning_rate=3e-2,
    )
    make_trainer(recipe, tmp_path / "out").train()
    assert fmean(shares[-3:]) > fmean(shares[:3]) + 0.2, shares


@pytest.mark.parametrize(
    ("steps", "rounds"),
    [
        (2, {"save_steps": 1}),
        pytest.param(3, {"save_steps": 2}, marks=pytest.mark.slow),
        pytest.param(4, {"num_iterations": 2}, marks=pytest.mark.slow),
        pytest.param(4, {"minibatches": 2, "per_device_train_batch_size": 1}, marks=pytest.mark.slow),
    ],
)
def test_a_killed_run_goes_on_where_it_was(steps: int, rounds: dict[str, int], tmp_path: Path) -> None:
    """Some steps, a kill in the last and the rest end with the weights of all in one go."""
    more = {"agent": {**AGENT, **SHORT}, "loss": {"entropy_coef": 0.1}, "tower": False, "save_steps": 1}
    recipe = tiny_recipe(tmp_path, "qwen2_5_vl", max_steps=steps, **{**more, **rounds})
    train(recipe, tmp_path / "whole")
    trainer = make_trainer(recipe, tmp_path / "torn")
    trainer.add_callback(KilledInStep(steps))
    with pytest.raises(KeyboardInterrupt):
        trainer.train()
    train(recipe, tmp_path / "torn")
    weights = [
        dict(HFBackend.load(str(tmp_path / run / "final")).model.named_parameters()) for run in ("whole", "torn")
    ]
    for name, weight in HFBackend.load(recipe.model).model.named_parameters():
        torch.testing.assert_close(weights[0][name], weights[1][name])
        moved = not weight.equal(weights[0][name])
        assert moved == (".visual." not in f".{name}"), name
    assert [line["step"] for line in log_of(tmp_path / "torn") if "loss" in line] == list(range(1, steps + 1))


def even(rollouts: Sequence[Rollout]) -> list[float]:
    """Share of written characters with an even code; 1 for one of the questions."""
    texts = [one.trace.turns[0].text for one in rollouts]
    shares = [sum(ord(character) % 2 == 0 for character in text) / max(1, len(text)) for text in texts]
    return [1.0 if one.trace.question.endswith("3") else share for one, share in zip(rollouts, shares, strict=True)]


@pytest.mark.parametrize("killed", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_the_best_held_out_checkpoint_is_written_also_after_a_kill(killed: bool, tmp_path: Path) -> None:
    """Questions whose rollouts are worth the same are replaced before a step, which a resumed run repeats."""
    recipe = tiny_recipe(
        tmp_path,
        "qwen2_5_vl",
        max_steps=3,
        agent={**AGENT, **SHORT, "policy": "direct"},
        rewards=[even],
        rollouts={"max_resample_times": 2},
        loss={"mask_truncated": False},
        learning_rate=3e-2,
        evaluation={"eval_steps": 1, "questions": 3, "data": [{"path": str(tmp_path / "questions")}]},
    )
    final = train(recipe, tmp_path / "whole")
    log = log_of(tmp_path / "whole")
    curve = {line["step"]: line["eval_reward"] for line in log if "eval_reward" in line}
    assert set(curve) == {0, 1, 2, 3} and len(set(curve.values())) > 1
    steps = [line for line in log if "loss" in line]
    assert {line["rollout/equal_groups"] for line in steps} == {0.0, 0.5}
    assert {line["rollout/equal_groups_left"] for line in steps} == {0.0}
    state = json.loads((tmp_path / "whole" / "checkpoint-3" / "trainer_state.json").read_text())
    best = state["best_global_step"]
    assert curve[best] == pytest.approx(max(curve[step] for step in (1, 2, 3)), abs=1e-4)
    kept = load_file(tmp_path / "whole" / f"checkpoint-{best}" / "model.safetensors")
    written = load_file(final / "model.safetensors")
    assert all(value.equal(written[name]) for name, value in kept.items())
    if not killed:
        return
    trainer = make_trainer(recipe, tmp_path / "torn")
    trainer.add_callback(KilledInStep(3))
    with pytest.raises(KeyboardInterrupt):
        trainer.train()
    again = load_file(train(recipe, tmp_path / "torn") / "model.safetensors")
    torn = {line["step"]: line["eval_reward"] for line in log_of(tmp_path / "torn") if "eval_reward" in line}
    assert torn == pytest.approx(curve) and len(torn) == len(log) - len(steps)
    for name, value in written.items():
        torch.testing.assert_close(value, again[name])


def test_another_model_than_the_one_that_sampled_is_refused_in_any_round(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One token of one rollout is off in the second round: too little for a mean to show."""
    recipe = tiny_recipe(tmp_path, "qwen2_5_vl", max_steps=3, agent={**AGENT, **SHORT}, loss={"mask_truncated": False})
    trainer = make_trainer(recipe, tmp_path / "out")
    compute = trainer._get_per_token_logps_and_entropies

    def shifted(*args: Any, **kwargs: Any) -> Any:
        logps, *rest = compute(*args, **kwargs)
        if trainer.state.global_step == 1:
            trainer._logps = logps.detach().clone()
            trainer._logps[0, 0] += 0.012
        return logps, *rest

    monkeypatch.setattr(trainer, "_get_per_token_logps_and_entropies", shifted)
    with pytest.raises(BackendError, match=r"0\.00\d\d in the mean and 0\.0120 at most"):
        trainer.train()
    (log,) = [line for line in log_of(tmp_path / "out") if "loss" in line]
    assert log["step"] == 1 and 0 <= log["rollout/logp_difference_max"] < 1e-4


@pytest.mark.parametrize("nano", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_weights_of_16_bits_are_trained_in_float32(nano: bool, tmp_path: Path) -> None:
    """In place, three steps at this rate change 0.4 % of nano's bfloat16 weights."""

    def second(rollouts: Sequence[Rollout]) -> list[float]:
        return [float(at % 2) for at in range(len(rollouts))]

    given = {"dtype": "bfloat16", "learning_rate": 1e-6, "max_steps": 3, "prompts": 1, "rewards": [second]}
    given |= {"agent": {**AGENT, "policy": "direct", "generation": {"max_new_tokens": 2}}, "save_steps": 3}
    given |= {"loss": {"mask_truncated": False}, "rollouts": {"temperature": 3.0, "tolerance": 9.0}}
    if nano:
        recipe = script_recipe(model="nano", tower=True, **given)
    else:  # whose embeddings have rows of bytes that nobody writes
        recipe = tiny_recipe(tmp_path, "qwen2_5_vl", **given | {"from_layer": 1, "tower": False})
    trainer = make_trainer(recipe, tmp_path)
    trainer.train()
    save_model(trainer, recipe, tmp_path)
    assert log_of(tmp_path)[2]["weights/changed"] > 0.95
    for folder, number in (("checkpoint-3", torch.float32), ("final", torch.bfloat16)):
        weights = load_file(tmp_path / folder / "model.safetensors")
        assert {one.dtype for name, one in weights.items() if "layers.1." in name and "visual" not in name} == {number}
    assert not (tmp_path / "final" / "training_args.bin").exists(), "no pickle is shipped"


@pytest.mark.slow
def test_layers_below_the_branches_can_be_left_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    recipe = tiny_recipe(tmp_path, "qwen2_5_vl", tower=False, from_layer=1)
    scripted(monkeypatch, HFBackend.load(recipe.model).codec.tokenizer, SCRIPTS["qwen2_5_vl"])
    final = train(recipe, tmp_path / "out")
    before = dict(HFBackend.load(recipe.model).model.named_parameters())
    after = dict(HFBackend.load(str(final)).model.named_parameters())
    changed = {name for name, weight in before.items() if not weight.equal(after[name])}
    assert changed and not any(part in name for name in changed for part in ("visual", "embed", "layers.0"))
    assert not list((tmp_path / "out").rglob("training_args.bin")), "no pickle is shipped"
    with pytest.raises(ConfigError, match=r"from_layer is 99, but .* decoder layers"):
        load_model(recipe.model_copy(update={"from_layer": 99}))
    with pytest.raises(ValidationError, match="from_layer"):
        tiny_recipe(tmp_path, "qwen2_5_vl", from_layer=2, tower=True)


def test_adapters_are_trained_and_merged(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """From a layer up: what branches read stays as it is."""
    recipe = tiny_recipe(tmp_path, "qwen2_5_vl", lora={"r": 4}, tower=False, from_layer=1)
    scripted(monkeypatch, HFBackend.load(recipe.model).codec.tokenizer, SCRIPTS["qwen2_5_vl"])
    final = train(recipe, tmp_path / "out")
    before, after = HFBackend.load(recipe.model).model, HFBackend.load(str(final)).model
    changed = {
        name
        for (name, one), other in zip(before.named_parameters(), after.parameters(), strict=True)
        if not one.equal(other)
    }
    assert changed and all("language_model" in name and "_proj" in name for name in changed)
    layers = {int(name.partition("layers.")[2].partition(".")[0]) for name in changed}
    assert layers == set(range(1, len(text_model(before).layers)))
    assert log_of(tmp_path / "out")[0]["rollout/logp_difference"] < 1e-4
    assert (tmp_path / "out" / "adapter" / "adapter_config.json").exists()
    assert not list((tmp_path / "out").rglob("training_args.bin"))


@pytest.fixture(scope="module")
def looking(tmp_path_factory: pytest.TempPathFactory) -> GRPORecipe:
    """A recipe whose policy inserts the crops of untrained branches, which always zoom."""
    folder = tmp_path_factory.mktemp("looking")
    recipe = tiny_recipe(folder, "qwen2_5_vl", agent={**AGENT, **SHORT, **ALWAYS})
    backend = HFBackend.load(recipe.model, device="cpu", dtype="float32")
    Branches.from_base(backend.model, k=1, depth=1, gate_depth=1).save(folder / "branches")
    return recipe.model_copy(update={"branches": str(folder / "branches")})


def rolled_out(recipe: GRPORecipe, **changes: Any) -> GRPORecipe:
    return recipe.model_copy(update={"rollouts": recipe.rollouts.model_copy(update=changes)})


@pytest.mark.parametrize("perception", ["current", pytest.param("frozen", marks=pytest.mark.slow)])
def test_gate_and_proposals_insert_crops_that_are_trained_on(
    looking: GRPORecipe, perception: str, tmp_path: Path
) -> None:
    """The crop stands in the prompt of every rollout."""
    trainer = make_trainer(rolled_out(looking, perception=perception), tmp_path)
    trainer.train()
    log = log_of(tmp_path)[0]
    assert log["zoom/inserted"] == 1.0
    assert log["rollout/logp_difference"] < 1e-4


@pytest.mark.parametrize("by", ["shared", "environment"])
def test_a_reward_can_have_somebody_look_where_the_policy_does_not(
    looking: GRPORecipe, by: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rewards = [{"name": "accuracy"}, {"name": "agreement"}, {"name": "redundant", "opinions": True}]
    given = rolled_out(looking, by=by).model_dump() | {"agent": {**AGENT, **SHORT}, "protocol": "qwen3vl"}
    given |= {"rewards": rewards, "loss": {"mask_truncated": False}}
    trainer = make_trainer(GRPORecipe.model_validate(given), tmp_path)
    if by == "environment":
        says(monkeypatch, trainer, [["407"] * 4])
    trainer.train()
    log = log_of(tmp_path)[0]
    assert 0 <= log["rewards/agreement/mean"] <= 1 and log["rewards/redundant/mean"] <= 0
    assert log["zoom/inserted"] == 0, "a look for the record shows the model nothing"


def test_rewards_that_need_branches_are_refused_without(tmp_path: Path) -> None:
    recipe = tiny_recipe(tmp_path, "qwen2_5_vl", rewards=[{"name": "agreement"}])
    with pytest.raises(ConfigError, match=r"needed for the reward 'agreement'.*Set branches \(or --branches\)"):
        make_trainer(recipe, tmp_path / "out")
    always = recipe.model_copy(update={"agent": {**AGENT, **ALWAYS}, "rewards": []})
    with pytest.raises(ConfigError, match="needed for the policy 'always'"):
        make_trainer(always, tmp_path / "out")


def aligned(recipe: GRPORecipe, **changes: Any) -> GRPORecipe:
    look = {**ALWAYS["perception"], "positions": "aligned"}
    return recipe.model_copy(update={"agent": {**recipe.agent, "perception": look}, **changes})


@pytest.mark.parametrize("family", ["qwen2_5_vl", pytest.param("qwen3_vl", marks=pytest.mark.slow)])
def test_crops_in_their_place_are_trained_on(family: Family, looking: GRPORecipe, tmp_path: Path) -> None:
    recipe = aligned(looking, num_iterations=2, max_steps=2)
    if family == "qwen3_vl":
        model = tiny_model(family, tmp_path / family)
        backend = HFBackend.load(str(model), device="cpu", dtype="float32")
        Branches.from_base(backend.model, k=1, depth=1, gate_depth=1).save(tmp_path / "branches")
        recipe = recipe.model_copy(update={"model": str(model), "branches": str(tmp_path / "branches")})
    trainer = make_trainer(recipe, tmp_path / "out")
    trainer.train()
    log = log_of(tmp_path / "out")[0]
    assert log["zoom/inserted"] == 1.0 and log["rollout/logp_difference_max"] < 1e-5
    trainer.model.train()
    batch = trainer._generate_and_score_completions([dict(trainer.train_dataset[0])] * 2)
    sampled, mask = batch["sampling_per_token_logps"], batch["completion_mask"] * batch["tool_mask"]
    assert (batch["positions"] % 1).any(), "fractions of a cell"
    assert logp_distances(sampled, batch["old_per_token_logps"], mask)[0].largest < 1e-5
    assert logp_distances(sampled, _again(trainer, batch), mask)[0].largest < 1e-5
    trainer._finished = []
    assert logp_distances(sampled, _again(trainer, batch), mask)[0].largest > 1e-4, "as plain positions have it"


def test_trl_writes_turns_after_crops_in_their_place(
    looking: GRPORecipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trainer = make_trainer(rolled_out(aligned(looking), by="generate"), tmp_path)
    generate, given = trainer.model.generate, list[torch.Tensor]()

    def kept(**inputs: Any) -> Any:
        given.append(inputs["position_ids"])
        return generate(**inputs)

    monkeypatch.setattr(trainer.model, "generate", kept)
    trainer.model.train()
    batch = trainer._generate_and_score_completions([dict(trainer.train_dataset[at]) for at in (0, 0, 1, 1)])
    (before, *_), width = given, batch["prompt_ids"].shape[1]
    assert before.shape[1:] == (4, width) and (before % 1).any()
    assert before.permute(1, 2, 0).equal(batch["positions"][:, :width])


def test_crops_in_their_place_are_refused_where_trl_places_them(looking: GRPORecipe, tmp_path: Path) -> None:
    base = HFBackend.load(looking.model, device="cpu", dtype="float32").model
    Branches.from_base(base, k=1, depth=1, gate_depth=1, positions="aligned").save(tmp_path)
    changes = {"protocol": "qwen3vl", "branches": str(tmp_path)}
    recipe = rolled_out(looking, by="environment").model_copy(update=changes)
    with pytest.raises(ConfigError, match=r"or perception\.positions to 'plain'"):
        make_trainer(recipe, tmp_path / "out")
    plain = {**recipe.agent, "perception": {**ALWAYS["perception"], "positions": "plain"}}
    make_trainer(recipe.model_copy(update={"agent": plain}), tmp_path / "out")


def test_an_environment_of_plain_trl_refuses_them_too_and_sparse_crops(looking: GRPORecipe) -> None:
    backend = HFBackend.load(looking.model, device="cpu", dtype="float32", branches=looking.branches)
    for perception, why in (
        ({"positions": "aligned"}, "positions of their place"),
        ({"sparse_crop": 2.0}, "Sparse crops cannot be trained on"),
    ):
        config = looking.agent_config().replace(protocol="qwen3vl", perception=perception)
        with pytest.raises(ConfigError, match=why):
            ZoomEnv(backend, config=config)


@pytest.mark.parametrize("perception", ["current", "frozen"])
@pytest.mark.parametrize("by", ["shared", "environment"])
def test_what_looks_is_on_the_device_of_the_training(
    looking: GRPORecipe, by: str, perception: str, tmp_path: Path
) -> None:
    recipe = rolled_out(looking, by=by, perception=perception).model_copy(update={"protocol": "qwen3vl"})
    trainer = make_trainer(recipe, tmp_path)
    move_looker(trainer.looker, torch.device("meta"), trained=trainer.backend)
    assert {weight.device.type for weight in trainer.looker.branches.parameters()} == {"meta"}
    base = {weight.device.type for weight in trainer.looker.model.parameters()}
    assert base == {"meta" if perception == "frozen" else "cpu"}, "the trained model is placed by accelerate"


@pytest.mark.parametrize("family", ["qwen2_5_vl", pytest.param("qwen3_vl", marks=pytest.mark.slow)])
def test_plain_trl_runs_the_same_tool(family: Family, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`rollouts.by: environment`: TRL's tool loop, with what the model says replaced and no second zoom."""
    recipe = tiny_recipe(tmp_path, family, rollouts={"by": "environment"}, protocol="qwen3vl")
    trainer = make_trainer(recipe, tmp_path / "out")
    says(monkeypatch, trainer, [SCRIPTS["qwen3_vl"][0], ["407", "407", "no"]])
    trainer.train()
    log = log_of(tmp_path / "out")[0]
    assert math.isfinite(log["loss"]) and log["grad_norm"] > 0
    assert log["zoom/served"] == 0.75 and log["zoom/accuracy"] == 0.75
    page = next((tmp_path / "out" / "rollouts").glob("step-000000-1.html")).read_text()
    assert "407" in page


def test_a_reply_that_trl_cuts_off_is_no_answer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is not learned from, as in every other way of rolling out, whatever it begins with."""
    recipe = tiny_recipe(tmp_path, "qwen2_5_vl", rollouts={"by": "environment"}, protocol="qwen3vl")
    trainer = make_trainer(recipe, tmp_path / "out")
    says(monkeypatch, trainer, [["407", "no", "no", "407" * 9]], cut=[3])
    trainer.train()
    log = log_of(tmp_path / "out")[0]
    assert log["zoom/truncated"] == log["completions/clipped_ratio"] == 0.25
    assert log["zoom/accuracy"] == 0.25 and log["rewards/accuracy/mean"] == pytest.approx(1 / 3, abs=1e-4)
    assert "zoom/written_tokens" not in log, "nobody counts them there"


@pytest.mark.slow
def test_nano_takes_part_in_the_tool_loop_of_trl(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    recipe = script_recipe(model="nano", agent=AGENT, rollouts={"by": "environment"}, protocol="qwen3vl", max_steps=1)
    trainer = make_trainer(recipe, tmp_path)
    says(monkeypatch, trainer, [SCRIPTS["qwen3_vl"][0], ["407", "407", "no"]])
    trainer.train()
    log = log_of(tmp_path)[0]
    assert math.isfinite(log["loss"]) and log["zoom/served"] == 0.75


def test_sharded_weights_need_plain_generation_and_a_look_apart(
    looking: GRPORecipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As FSDP says that it is on, after which no step may begin."""
    made = EpisodeTrainer.__init__

    def sharded(self: EpisodeTrainer, *args: Any, **kwargs: Any) -> None:
        made(self, *args, **kwargs)
        self.is_fsdp_enabled = True

    monkeypatch.setattr(EpisodeTrainer, "__init__", sharded)
    recipe = tiny_recipe(tmp_path, "qwen2_5_vl")
    with pytest.raises(ConfigError, match=r"FSDP.*Use DeepSpeed .* or rollouts\.by: generate"):
        make_trainer(recipe, tmp_path / "out")
    with pytest.raises(ConfigError, match=r"branches would read FSDP.*rollouts\.perception: frozen"):
        make_trainer(rolled_out(looking, by="generate"), tmp_path / "out")
    assert make_trainer(rolled_out(looking, by="generate", perception="frozen"), tmp_path / "out").looker is not None


@pytest.mark.slow
def test_speeds_are_measured_without_learning(tmp_path: Path) -> None:
    recipe = tiny_recipe(tmp_path, "qwen2_5_vl", agent={**AGENT, **SHORT})
    plain, shared = (measure(recipe, by, rounds=1) for by in ("generate", "shared"))
    assert plain.distance is None and shared.distance is not None and shared.distance < 1e-4
    for one in (plain, shared):
        assert one.seconds > 0 and 1 <= one.written <= 4 * 3 * 6


def test_padding_that_all_rows_share_is_left_out() -> None:
    batch = {
        "prompt_ids": torch.tensor([[0, 0, 1], [0, 2, 3]]),
        "prompt_mask": torch.tensor([[0, 0, 1], [0, 1, 1]]),
        "completion_ids": torch.tensor([[4, 0, 0, 0], [5, 6, 0, 0]]),
        "completion_mask": torch.tensor([[1, 0, 0, 0], [1, 1, 0, 0]]),
        "mm_token_type_ids": torch.arange(14).reshape(2, 7),
        "advantages": torch.tensor([1.0, -1.0]),
        "pixel_values": torch.zeros(4, 4),
    }
    cut = trimmed(batch)
    assert cut["prompt_ids"].tolist() == [[0, 1], [2, 3]]
    assert cut["completion_ids"].tolist() == [[4, 0], [5, 6]]
    assert cut["mm_token_type_ids"].tolist() == [[1, 2, 3, 4], [8, 9, 10, 11]]
    assert cut["pixel_values"].shape == (4, 4) and cut["advantages"].shape == (2,)
    masked = {**batch, "completion_mask": torch.zeros(2, 4)}
    assert trimmed(masked) is masked, "a batch that is masked wholly keeps its shape"
