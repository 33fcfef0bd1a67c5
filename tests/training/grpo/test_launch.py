"""The recipe of GRPO and its command: keys, plans, questions, resuming."""

import json
import runpy
import sys
from pathlib import Path
from typing import Any

import pytest
from datasets import Dataset
from PIL import Image
from pydantic import ValidationError

from qzoom_agent.errors import ConfigError, MissingDependency
from qzoom_agent.training.branches.dataset import NEEDLE_SEED, NEEDLE_SPAN
from qzoom_agent.training.branches.fitting import require_tracker
from qzoom_agent.training.grpo import launch as run
from qzoom_agent.training.grpo.grpo_recipe import GRPORecipe, load_grpo_recipe
from qzoom_agent.training.grpo.launch import make_trainer
from qzoom_agent.training.grpo.question_rows import FIRST_SEED, SEEDS_A_RUN, load_held_out, load_rows
from qzoom_agent.training.grpo.run_cost import describe
from qzoom_agent.training.rewards import Accuracy, Rollout
from qzoom_agent.training.trained_model import is_finished, keep_recipe
from tests.training.grpo.grpo_script import questions, recipe

HOP = "max_steps: 40\nneedle: {needle-hop: 1}\n"


def written(folder: Path, text: str) -> Path:
    path = folder / "grpo.yaml"
    path.write_text(text)
    return path


def any_value(rollouts: list[Rollout], table: object = None) -> list[float]:
    """A reward with a setting that JSON does not have."""
    return [0.0 for _ in rollouts]


def test_rows_are_those_of_the_run_and_of_no_other_stage() -> None:
    rows = load_rows(recipe(seed=3))
    assert len(rows) == 8
    names = [rows[at]["sample"].id for at in range(8)]
    assert len(set(names)) == 8
    seeds = [int(name.rsplit("-", 1)[1]) for name in names]
    assert min(seeds) >= FIRST_SEED + 3 * SEEDS_A_RUN > NEEDLE_SEED + 4 * NEEDLE_SPAN
    assert rows[5]["sample"].question == load_rows(recipe(seed=3))[5]["sample"].question
    assert len(load_rows(recipe(minibatches=2))) == 4, "two steps a round"


def test_held_out_boards_are_the_same_for_every_seed_and_asked_in_no_run() -> None:
    held = load_held_out(recipe(seed=3, evaluation={"questions": 5}))
    other = load_held_out(recipe(seed=999, evaluation={"questions": 5}))
    assert held is not None and other is not None and load_held_out(recipe()) is None
    names = [row["sample"].id for row in held]
    assert names == [row["sample"].id for row in other] and len(names) == 5
    assert all(int(name.rsplit("-", 1)[1]) >= FIRST_SEED + 1000 * SEEDS_A_RUN for name in names)


def test_held_out_rows_are_the_first_of_their_data(tmp_path: Path) -> None:
    source = {"path": str(questions(tmp_path / "table"))}
    held = load_held_out(recipe(needle={}, data=[source], evaluation={"questions": 9, "data": [source]}))
    assert held is not None and [row["sample"].question[-1] for row in held] == ["0", "1", "2", "3"]
    with pytest.raises(ValidationError, match=r"are those of `evaluation\.data`"):
        recipe(needle={}, data=[source], evaluation={"questions": 9})


def test_questions_of_other_sources_keep_all_their_answers(tmp_path: Path) -> None:
    image = Image.new("RGB", (56, 56))
    Dataset.from_list([{"image": image, "question": "When?", "answer": ["noon", "12:00"]}]).save_to_disk(tmp_path / "t")
    rows = load_rows(recipe(needle={}, data=[{"path": str(tmp_path / "t")}]))
    assert rows[0]["sample"].answer == "noon" and rows[0]["sample"].answers == ("noon", "12:00")


def test_rows_of_two_sources_with_the_same_ids_are_different_groups(tmp_path: Path) -> None:
    for name in ("a", "b"):
        Image.new("RGB", (56, 56), "red" if name == "a" else "blue").save(tmp_path / f"{name}.png")
        row = {"id": 1, "image": f"{name}.png", "question": "What is the total?", "answer": name}
        (tmp_path / f"{name}.jsonl").write_text(json.dumps(row) + "\n")
    sources = [{"path": str(tmp_path / f"{name}.jsonl")} for name in ("a", "b")]
    held = load_held_out(recipe(needle={}, data=sources, evaluation={"data": sources}))
    rows = load_rows(recipe(needle={}, data=sources, max_steps=1))
    for table in (rows, held):
        assert {row["sample"].answer for row in table} == {"a", "b"}
        assert len({row["sample"].id for row in table}) == 2


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("needle: {needle-hop: 1.0}", "it lacks the key 'max_steps'"),
        ("max_steps: 1", "give one of them"),
        (HOP + "gradient_accumulation_steps: 4", "steps follows from `prompts`"),
        (
            HOP + "prompts: 3\nnum_generations: 3\nper_device_train_batch_size: 2",
            "3 prompts x 3 rollouts do not divide into 1 minibatches of batches of 2 on 1 device",
        ),
        (HOP + "rewards: [{name: charm}]", "charm"),
        (HOP + "rewards: charm", "no published list 'charm'"),
        (HOP + "rewards: deepeyes\njudge: http://one/v1", "only `judge` is given"),
        (HOP + "rewards: [{name: accuracy, judged: true}]", "only `judged: true` is given"),
        (
            HOP + "rewards: [{name: crops-among-right, cost: 0.5}]\n"
            "loss: {multi_objective_aggregation: normalize_then_sum}",
            "reward 'crops-among-right' by its own deviation, so the size of its cost has no effect",
        ),
        (HOP + "agent: {polcy: direct}", "Did you mean 'policy'"),
        (HOP + "agent: {seed: 3}", "set elsewhere"),
        (HOP + "rollouts: {vllm: {}}", "by: generate"),
        (HOP + "trl: {use_vllm: true}", "set elsewhere"),
        (HOP + "max_steps: 5\nnum_iterations: 2", "5 steps would end within one. Set max_steps to 6"),
        (HOP + "trl: {top_k: 5}", "trl.top_k has no effect with `rollouts"),
        (HOP + "trl: {num_train_epochs: 3}", "no effect beside max_steps"),
        (HOP + "trl: {use_liger_kernel: true}", "another loss"),
        (HOP + "trl: {mask_truncated_completions: true}", "loss.mask_truncated does"),
        (HOP + "tower: true\nlora: {r: 2}", "so tower has no effect"),
        (HOP + "loss: {loss_type: sapo, epsilon_high: 0.3}", "epsilon_high has no effect"),
        (HOP + "trl: {sync_ref_model: true}", "with the model at the start again"),
        (HOP + "trl: {save_only_model: true}", "a killed run could not resume"),
        (HOP + "lora: {target_modules: '('}", "lora.target_modules: '.' is no regular"),
        (HOP + "lora: {lora_dropout: 0.1}", "dropout: with dropout another model"),
        (HOP + "agent: {generation: {presence_penalty: 1}}", "another model's"),
        (HOP + "learning_rate: .inf", "'learning_rate': Input should be a finite"),
        ("max_steps: 0\nneedle: {needle-hop: 1}", r"not valid: bad value for 'max_steps': [^\n]*; got 0\.$"),
        (
            "max_step: 1\nneedle: {needle-hop: 1}\nheads: 1\nk: 2",
            "lacks the key 'max_steps'. The recipe has no key 'max_step'. Did you mean max_steps.* Nor has it heads, k",
        ),
        (HOP + "trl: {vllm_importance_sampling_correction: false}", "nobody could tell"),
    ],
)
def test_a_bad_recipe_says_what_is_wrong(tmp_path: Path, text: str, said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        load_grpo_recipe(written(tmp_path, text))


def test_a_price_by_weight_alone_can_be_normalised() -> None:
    """The size of a cost cancels, whatever it is; that of the weight does not."""
    priced = {"name": "crops-among-right", "cost": 1, "weight": 0.1}
    recipe(rewards=[{"name": "accuracy"}, priced], loss={"multi_objective_aggregation": "normalize_then_sum"})


def test_losses_are_those_of_their_papers() -> None:
    gspo = recipe(loss={"loss_type": "gspo", "epsilon": 1e-3}).loss.settings()
    assert gspo["importance_sampling_level"] == "sequence" and gspo["epsilon"] == 1e-3 and gspo["epsilon_high"] == 4e-4
    assert recipe(loss={"loss_type": "dr_grpo"}).loss.settings()["scale_rewards"] == "none"


def test_a_token_for_the_hub_is_neither_printed_nor_written(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = written(tmp_path, "max_steps: 1\ntrl: {hub_token: hf_secret, push_to_hub: true}\nneedle: {needle-hop: 1}\n")
    assert run.main(["--config", str(path), "--output", str(tmp_path / "out"), "--dry-run"]) == 0
    assert "hf_secret" not in (printed := capsys.readouterr().out) and "push_to_hub: true" in printed
    given = load_grpo_recipe(path)
    assert given.trl["hub_token"] == "hf_secret"
    keep_recipe(given, tmp_path)
    assert "hf_secret" not in (tmp_path / "recipe.yaml").read_text()


def test_a_dry_run_prints_the_recipe_and_the_plan(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = written(tmp_path, HOP + "minibatches: 2\nrewards: visionthink\n")
    assert run.main(["--config", str(path), "--output", str(tmp_path / "out"), "--dry-run"]) == 0
    printed = capsys.readouterr().out
    assert "policy       implicit" in printed  # as nano would answer, too
    assert "40, 20 rounds of rollouts" in printed and "8 questions x 8 rollouts = 64 episodes" in printed
    assert "rewards      1 x accuracy, 0.5 x format, 1 x visionthink-price" in printed
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("rewards: [{name: accuracy, judged: true}]", "belong together"),
        ("rewards: [{name: format}, {name: format}]", "different names"),
        ("trl: {num_generations: 3}", "`trl` sets num_generations"),
        ("report_to: notes", "no tracker 'notes'"),
        ("protocol: morse", "no protocol 'morse'"),
        ("from_layer: 99", "from_layer is 99, but 'nano' has 9 decoder layers"),
        ("lr_scheduler_type: warmup_stable_decay", "num_decay_steps"),
    ],
)
def test_a_dry_run_refuses_what_a_run_would(tmp_path: Path, text: str, said: str) -> None:
    path = written(tmp_path, HOP + text)
    with pytest.raises(ConfigError, match=said):
        run.main(["--config", str(path), "--dry-run"])


def test_a_dry_run_tells_how_often_each_question_is_asked(tmp_path: Path) -> None:
    rows = tmp_path / "rows.jsonl"
    rows.write_text('{"image": "a.png", "question": "?", "answer": "b"}\n' * 10)
    held = {"data": [{"path": str(rows), "limit": 4}]}
    plan = describe(recipe(max_steps=40, needle=None, data=[{"path": str(rows)}], evaluation=held))
    assert "questions    10 rows, 8 times each; 4 rows are held out" in plan
    with pytest.raises(ConfigError, match=r"none\.jsonl cannot be read: there is nothing at that path"):
        describe(recipe(needle=None, data=[{"path": "/no/such/none.jsonl"}]))


def test_a_dry_run_says_what_this_machine_lacks(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = written(tmp_path, HOP + "rollouts: {by: generate, vllm: {}}\n")
    assert run.main(["--config", str(path), "--dry-run"]) == 0
    assert "missing      rollouts.vllm needs vLLM" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("devices", "said"),
    [
        (7, "8 prompts do not divide over 7 devices"),
        (8, "minibatches of batches of 16 on 8"),
    ],
)
def test_a_dry_run_refuses_what_the_run_would(tmp_path: Path, devices: int, said: str) -> None:
    path = written(tmp_path, HOP + "per_device_train_batch_size: 16\n")
    with pytest.raises(ConfigError, match=said):
        run.main(["--config", str(path), "--dry-run", "--devices", str(devices)])


def test_a_tracker_that_is_not_there_is_named(tmp_path: Path) -> None:
    for known in ("none", "all"):
        require_tracker(known)
    with pytest.raises(ConfigError, match=r"no tracker 'wandbb'.*Choose from none, .*wandb"):
        require_tracker("wandbb")
    with pytest.raises(MissingDependency, match="report_to: swanlab needs"):
        make_trainer(recipe(report_to="swanlab"), tmp_path)


def test_branches_can_be_given_on_the_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = written(tmp_path, HOP)
    assert run.main(["--config", str(path), "--branches", "some/folder", "--dry-run"]) == 0
    assert "branches: some/folder" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("module", "arguments"),
    [
        ("grpo_benchmark", ["--config", "none.yaml"]),
        ("grpo_benchmark", ["--config", "some.yaml", "--rounds", "0"]),
        ("train_nano", ["--config", "none.yaml"]),
        ("qzoom_agent.training.sft.fine_tune", ["--config", "none.yaml"]),
        ("export_nano", ["no/folder", "no/folder"]),
        ("reproduce", ["none.yaml"]),
        ("review_savings", ["no/folder"]),
        ("overhead", ["--what"]),
        ("perception_benchmark", ["--repeats", "0"]),
    ],
)
def test_modules_say_what_is_missing_without_a_traceback(
    module: str, arguments: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("sys.argv", [module, *arguments])
    monkeypatch.delitem(sys.modules, module, raising=False)
    with pytest.raises(SystemExit) as ended:
        runpy.run_module(module, run_name="__main__")
    assert ended.value.code == 2
    assert arguments[-1] in capsys.readouterr().err


def test_a_finished_run_is_not_repeated(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "out" / "final").mkdir(parents=True)
    path = written(tmp_path, HOP)
    assert run.main(["--config", str(path), "--output", str(tmp_path / "out")]) == 0
    assert f"delete {tmp_path / 'out'} to train anew" in capsys.readouterr().out


def test_a_finished_run_is_not_passed_off_as_one_of_another_recipe(tmp_path: Path) -> None:
    path = written(tmp_path, HOP + "model: nano")
    keep_recipe(recipe(model="other"), tmp_path / "out")
    (tmp_path / "out" / "final").mkdir()
    with pytest.raises(ConfigError, match=r"final was begun with other settings .*model: 'other', now 'nano'"):
        run.main(["--config", str(path), "--output", str(tmp_path / "out")])


def test_the_setting_of_a_list_that_differs_is_named(tmp_path: Path) -> None:
    """However long the entries before it are."""
    rewards = [{"name": "accuracy", "weight": 0.5}, {"name": "crop-price", "weight": 0.5, "cost": 0.2}]
    keep_recipe(recipe(rewards=rewards), tmp_path)
    (tmp_path / "final").mkdir()
    rewards[1]["cost"] = 0.3
    with pytest.raises(ConfigError, match=r"begun with other settings \(rewards\.1\.cost: 0\.2, now 0\.3\)"):
        is_finished(recipe(rewards=rewards), tmp_path)


def test_an_output_that_is_a_file_is_named(tmp_path: Path) -> None:
    path = written(tmp_path, HOP)
    (tmp_path / "out").write_text("")
    with pytest.raises(ConfigError, match="Cannot write into"):
        run.main(["--config", str(path), "--output", str(tmp_path / "out")])


@pytest.mark.parametrize(
    ("keys", "said"),
    [
        ({"num_generations": 3, "max_steps": 1}, "`trl` sets max_steps, num_generations, which follows"),
        ({"loss_type": "grpo"}, "`trl` sets loss_type"),
        ({"no_such_key": 1}, "TRL refuses the recipe: .*no_such_key"),
        ({"generation_batch_size": 3}, "TRL refuses the recipe"),
        ({"deepspeed": "zero9.json"}, "TRL refuses the recipe"),
    ],
)
def test_further_settings_of_trl_change_none_of_the_recipes_own(
    keys: dict[str, Any], said: str, tmp_path: Path
) -> None:
    with pytest.raises(ConfigError, match=said):
        run.trl_config(recipe(trl=keys), tmp_path, completion=64)
    kept = run.trl_config(
        recipe(trl={"save_total_limit": 5, "importance_sampling_level": "sequence"}), tmp_path, completion=64
    )
    assert kept.save_total_limit == 5 and kept.importance_sampling_level == "sequence"


def test_the_agents_top_k_is_that_of_trls_generation(tmp_path: Path) -> None:
    narrow = {"agent": {"generation": {"top_k": 5}}, "rollouts": {"by": "generate"}}
    assert run.trl_config(recipe(**narrow), tmp_path, completion=64).top_k == 5
    assert run.trl_config(recipe(**narrow, trl={"top_k": 3}), tmp_path, completion=64).top_k == 3
    assert run.trl_config(recipe(), tmp_path, completion=64).top_k == 0


def test_checkpoints_are_written_between_rounds(tmp_path: Path) -> None:
    config = run.trl_config(recipe(max_steps=12, num_iterations=3, save_steps=4), tmp_path, completion=64)
    assert config.save_steps == 6
    evaluated = recipe(max_steps=12, num_iterations=3, save_steps=12, evaluation={"eval_steps": 4})
    config = run.trl_config(evaluated, tmp_path, completion=64)
    assert config.eval_steps == config.save_steps == 6, "what is evaluated can be kept"


@pytest.mark.parametrize("launched", ["bf16", "no"])
def test_the_precision_is_that_of_the_launch(launched: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """DeepSpeed compares both and refuses others."""
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", launched)
    assert run.trl_config(recipe(), tmp_path, completion=64).bf16 == (launched == "bf16")
    assert run.trl_config(recipe(bf16=True), tmp_path, completion=64).bf16


def checkpoint(output: Path, step: int) -> None:
    folder = output / f"checkpoint-{step}"
    folder.mkdir(parents=True)
    (folder / "trainer_state.json").write_text("{}")


def test_a_run_goes_on_under_its_own_recipe_only(tmp_path: Path) -> None:
    keep_recipe(recipe(model="one"), tmp_path)
    keep_recipe(recipe(model="two"), tmp_path)  # nothing was trained yet
    checkpoint(tmp_path, 2)
    with pytest.raises(ConfigError, match=r"other settings \(model: 'two', now 'one'; seed: 0, now 7\)"):
        keep_recipe(recipe(model="one", seed=7), tmp_path)
    assert load_grpo_recipe(tmp_path / "recipe.yaml").model == "two"
    keep_recipe(recipe(model="two", max_steps=9, watch={"every": 3}, logging_steps=2, report_to="wandb"), tmp_path)
    assert load_grpo_recipe(tmp_path / "recipe.yaml").max_steps == 9


def test_the_command_does_not_report_one_recipe_as_another(tmp_path: Path) -> None:
    path = written(tmp_path, HOP + "model: nano")
    checkpoint(tmp_path / "out", 2)
    keep_recipe(recipe(model="other"), tmp_path / "out")
    with pytest.raises(ConfigError, match="model: 'other', now 'nano'"):
        run.main(["--config", str(path), "--output", str(tmp_path / "out")])


OLD_NAMES = {new: old for old, new in GRPORecipe.renamed.items()}


def test_a_recipe_with_the_keys_of_the_first_version_is_read(tmp_path: Path) -> None:
    (tmp_path / "grpo.yaml").write_text(
        "steps: 3\ngroup: 2\nneedle: {needle-hop: 1}\nloss: {name: grpo, entropy: 0.1}\n"
    )
    with pytest.warns(FutureWarning, match="`group` is now called `num_generations`"):
        read = load_grpo_recipe(tmp_path / "grpo.yaml", overrides=["loss.beta=0.01", "rewards.0.rule=open"])
    assert (read.max_steps, read.num_generations, read.loss.loss_type, read.loss.entropy_coef) == (3, 2, "grpo", 0.1)
    assert read.loss.beta == 0.01 and read.rewards == [Accuracy(rule="open")]


def test_a_run_of_the_first_version_is_resumed_under_the_same_recipe(tmp_path: Path) -> None:
    """Its settings were saved under old keys."""
    keep_recipe(recipe(model="one"), tmp_path)
    checkpoint(tmp_path, 2)
    saved = json.loads((tmp_path / "settings.json").read_text())
    saved["loss"] = {{"loss_type": "name"}.get(key, key): value for key, value in saved["loss"].items()}
    old = {OLD_NAMES.get(key, key): value for key, value in saved.items()}
    assert {"group", "batch", "schedule"} <= old.keys()
    (tmp_path / "settings.json").write_text(json.dumps(old))
    keep_recipe(recipe(model="one"), tmp_path)
    (tmp_path / "settings.json").write_text(json.dumps(old | {"group": 16}))
    with pytest.raises(ConfigError, match="num_generations: 16, now 2"):
        keep_recipe(recipe(model="one"), tmp_path)


def test_a_schedule_that_lacks_a_setting_is_refused_before_the_model_is_loaded(tmp_path: Path) -> None:
    for name in ("cosine_with_min_lr", "warmup_stable_decay"):
        with pytest.raises(ConfigError, match=r"TRL refuses the recipe: .*(min_lr|num_decay_steps)"):
            run.trl_config(recipe(lr_scheduler_type=name), tmp_path, completion=1)
    given = recipe(lr_scheduler_type="cosine_with_min_lr", trl={"lr_scheduler_kwargs": {"min_lr": 1e-7}})
    assert run.trl_config(given, tmp_path, completion=1).lr_scheduler_kwargs == {"min_lr": 1e-7}


def test_a_run_of_more_steps_is_not_passed_off_as_one_of_fewer(tmp_path: Path) -> None:
    checkpoint(tmp_path, 4)
    assert run.trl_config(recipe(max_steps=4), tmp_path, completion=1).max_steps == 4
    with pytest.raises(ConfigError, match=r"holds a run of 4 steps, and max_steps is 2.* Set max_steps to 4 or more"):
        run.trl_config(recipe(max_steps=2), tmp_path, completion=1)


def test_python_refuses_and_repeats_no_more_than_the_command(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def begun(given: GRPORecipe, output: Path) -> None:
        raise InterruptedError

    monkeypatch.setattr(run, "make_trainer", begun)
    priced, summed = {"name": "crop-price"}, recipe(loss={"multi_objective_aggregation": "normalize_then_sum"})
    with pytest.raises(
        ConfigError,
        match=r"do not fit the recipe: normalize_then_sum divides the reward 'crop-price' by its own deviation",
    ):
        run.train(summed, tmp_path, rewards=[any_value, priced])
    with pytest.raises(InterruptedError):
        run.train(recipe(), tmp_path, rewards=[{"name": any_value, "table": {1.5: recipe}}])
    checkpoint(tmp_path, 2)
    with pytest.raises(InterruptedError):
        run.train(recipe(), tmp_path, rewards=[{"name": any_value, "table": {1.5: recipe}}])
    for other in ({"learning_rate": 1e-3}, {"seed": 7}):
        with pytest.raises(ConfigError, match=f"was begun with other settings .*{next(iter(other))}"):
            run.train(recipe(**other), tmp_path, rewards=[any_value])
    (tmp_path / "final").mkdir()
    assert run.train(recipe(), tmp_path, rewards=[{"name": any_value, "table": {1.5: recipe}}]) == tmp_path / "final"
    assert "is there already" in capsys.readouterr().out
    with pytest.raises(ConfigError, match="was begun with other settings"):
        run.train(recipe(), tmp_path)
