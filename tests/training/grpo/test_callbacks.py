"""What is logged while GRPO runs is what the recipe rewards, and a judge that is not there is said before it begins."""

import json
import math
from collections import defaultdict
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from datasets import Dataset
from PIL import Image
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from trl import GRPOTrainer

from qzoom_agent.errors import BackendError, ConfigError
from qzoom_agent.trace import Trace
from qzoom_agent.training.branches.dataset import DatasetSpec
from qzoom_agent.training.grpo import callbacks as watch
from qzoom_agent.training.grpo import launch as run
from qzoom_agent.training.grpo import trainer as trainer_module
from qzoom_agent.training.grpo.callbacks import (
    NEEDED,
    WINDOW,
    MetricsCallback,
    RolloutPageCallback,
    measures,
)
from qzoom_agent.training.grpo.checks import LogpDistance, logp_distances
from qzoom_agent.training.grpo.grpo_recipe import GRPORecipe
from qzoom_agent.training.grpo.trainer import ZoomTrainer
from qzoom_agent.training.reward_list import accuracy_of
from qzoom_agent.training.rewards import Accuracy, Rollout
from qzoom_agent.views import ViewStore
from tests.training.grpo.grpo_script import AGENT, tell, tiny_recipe
from tests.training.processes import log_of
from tests.training.test_rewards import QUESTION, rollout

NOWHERE = "http://127.0.0.1:9/v1"


def said(*answers: str) -> list[Rollout]:
    return [rollout(answer, gold="nokia", group=str(at), task="text") for at, answer in enumerate(answers)]


def warnings_of(output: Path) -> list[str]:
    return [line["warning"] for line in log_of(output) if "warning" in line]


def test_accuracy_is_by_the_recipes_own_rule() -> None:
    batch = said("Answer: nokia", "samsung")
    exact, open_answer = (accuracy_of([Accuracy(rule=rule)]) for rule in ("exact", "open"))  # type: ignore[arg-type]
    assert measures(batch, exact.right(batch))["zoom/accuracy"] == 0.0
    found = measures(batch, open_answer.right(batch))
    assert found["zoom/accuracy"] == found["zoom/accuracy/text"] == 0.5


def test_models_are_compared_by_a_metric_that_held_out_questions_have(monkeypatch: pytest.MonkeyPatch) -> None:
    trainer = object.__new__(ZoomTrainer)
    trainer.args = SimpleNamespace(metric_for_best_model="reward")
    monkeypatch.setattr(GRPOTrainer, "evaluate", lambda self: {"eval_reward": None, "eval_zoom/accuracy": 0.5})
    assert trainer.evaluate()["eval_reward"] == float("-inf")
    trainer.args.metric_for_best_model = "zoom/acuracy"
    with pytest.raises(ConfigError, match=r"'zoom/acuracy', which .* Choose one of: reward, zoom/accuracy"):
        trainer.evaluate()


def test_what_is_logged_counts_the_rollouts_of_all_devices(monkeypatch: pytest.MonkeyPatch) -> None:
    """The one answer here is right, the three of another device are wrong."""
    here, there = said("nokia"), said("samsung", "lg", "htc")
    trainer: Any = object.__new__(ZoomTrainer)
    trainer.model, trainer.accuracy, trainer.reward_func_names = SimpleNamespace(training=True), Accuracy(), []
    trainer.accelerator = SimpleNamespace(is_main_process=True, process_index=0)
    trainer.pages, trainer.state = SimpleNamespace(keep=lambda *_: None), SimpleNamespace(global_step=0)
    trainer._pending_metrics, trainer.reward_weights = defaultdict(list), torch.zeros(0)
    others: dict[type, list[Any]] = {Rollout: there, bool: [False] * 3}
    monkeypatch.setattr(trainer_module, "gather_object", lambda own: own + others[type(own[0])])
    monkeypatch.setattr(GRPOTrainer, "_calculate_rewards", lambda *_: torch.zeros(1, 0))
    monkeypatch.setattr(trainer, "_episodes", lambda *_: (here, []))
    trainer._calculate_rewards([{}], None, None, [[]])
    assert trainer._pending_metrics["zoom/accuracy/text"] == [0.25]
    trainer.accelerator.is_main_process, trainer._pending_metrics = False, defaultdict(list)
    trainer._calculate_rewards([{}], None, None, [[]])
    assert not trainer._pending_metrics, "the others' values would be averaged with it"


def test_the_largest_difference_is_that_of_all_batches_of_all_devices(monkeypatch: pytest.MonkeyPatch) -> None:
    def batch(*differences: float) -> list[LogpDistance]:
        """One turn, a difference for each of its tokens."""
        apart = torch.tensor([differences])
        return logp_distances(apart, torch.zeros_like(apart), torch.ones_like(apart))

    trainer: Any = object.__new__(ZoomTrainer)
    trainer._held_out, trainer._start, trainer._distances = {}, None, [batch(0.0), batch(0.0, 0.0, 0.1)]
    monkeypatch.setattr(trainer_module, "gather_object", lambda own: [*own, batch(0.0, 0.3, 0.0, 0.0)])
    monkeypatch.setattr(GRPOTrainer, "log", lambda self, logs, start_time: told.update(logs))
    told: dict[str, float] = {}
    trainer.log({"loss": 1.0})
    for turn in ("", "/turn_1"):
        assert told[f"rollout/logp_difference_max{turn}"] == pytest.approx(0.3)
        assert told[f"rollout/logp_difference{turn}"] == pytest.approx(0.4 / 8)
    assert not trainer._distances


def test_a_run_that_diverged_ends_before_it_is_saved(tmp_path: Path) -> None:
    alarm = MetricsCallback(tmp_path / "log.jsonl")
    tell(alarm, grad_norm=0.5)
    with pytest.raises(BackendError, match=r"gradient of step 0 is not finite, .* Lower learning_rate"):
        tell(alarm, grad_norm=math.nan)


def test_accuracy_is_by_the_recipes_judge() -> None:
    def agrees(question: str, answer: str, gold: str) -> bool:
        return answer == "the Finnish brand"

    asked = accuracy_of([Accuracy(judged=True)], judge=agrees)
    batch = said("the Finnish brand", "samsung")
    assert measures(batch, asked.right(batch))["zoom/accuracy"] == 0.5


def test_a_judge_is_tried_before_anything_is_loaded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    given: dict[str, Any] = {
        "max_steps": 1,
        "needle": {"needle-hop": 1.0},
        "rewards": [{"name": "accuracy", "judged": True}],
    }
    recipe = GRPORecipe(**given, judge=NOWHERE, judge_key_variable="MY_JUDGE")
    monkeypatch.setattr(run, "load_model", lambda *_: pytest.fail("a model is loaded"))
    with pytest.raises(BackendError, match=r"gave no verdict.*MY_JUDGE"):
        run.make_trainer(recipe, tmp_path)


def test_calls_that_end_where_none_is_needed_are_no_collapse(tmp_path: Path) -> None:
    """What a price teaches: `needle-global`, whose coarse view suffices, is called on no more."""
    crop = (0.0, 0.0, 100.0, 100.0)

    def round_of(easy_calls: bool, hard_calls: bool) -> dict[str, float]:
        easy = rollout(crops=[crop] * easy_calls, coarse_suffices=True, task="needle-global")
        return measures([easy, rollout(crops=[crop] * hard_calls, task="needle-scene")], [True, True])

    found = round_of(True, False)
    assert (found["zoom/call_rate"], found["zoom/call_rate/needle-global"]) == (0.5, 1.0)
    assert (found["zoom/call_rate_needed"], found["zoom/call_rate_needed/needle-scene"]) == (0.0, 0.0)
    assert "zoom/call_rate_needed/needle-global" not in found
    assert NEEDED not in measures([rollout(coarse_suffices=True)], [True])
    alarm = MetricsCallback(tmp_path / "log.jsonl")
    for at in range(60):
        tell(alarm, **round_of(at < 20, True))
    assert not alarm.warned
    for _ in range(60):
        tell(alarm, **round_of(False, False))
    assert alarm.warned == {"zoom/call_rate_needed", "zoom/call_rate_needed/needle-scene"}


def test_a_reward_that_never_speaks_is_said_once(tmp_path: Path) -> None:
    log = tmp_path / "log.jsonl"
    alarm = MetricsCallback(log)
    for value in (0.5, None, 0.5, None):
        logs: dict[str, Any] = {"rewards/first-crop/mean": value, "rewards/accuracy/mean": 0.5, "entropy": None}
        tell(alarm, **logs)
    (line,) = warnings_of(tmp_path)
    assert "the reward 'first-crop' is None for every rollout" in line
    log.write_text(json.dumps({"step": 1, "rewards/first-crop/mean": None}) + "\n")
    goes_on = MetricsCallback(log)
    begun(goes_on, 1)
    tell(goes_on, **{"rewards/first-crop/mean": None})  # type: ignore[arg-type]
    assert not warnings_of(tmp_path), "said before the run was killed"


def test_a_run_says_that_its_rows_lack_what_a_reward_needs(tmp_path: Path) -> None:
    rewards = [{"name": "accuracy"}, {"name": "first-crop", "weight": 0.1}]
    short = {**AGENT, "generation": {"max_new_tokens": 4}}
    tiny = tiny_recipe(tmp_path, "qwen2_5_vl", rewards=rewards, agent=short, loss={"mask_truncated": False})
    rows = Dataset.load_from_disk(tiny.data[0].path).remove_columns("boxes")
    rows.save_to_disk(str(tmp_path / "bare"))
    run.train(tiny.model_copy(update={"data": [DatasetSpec(path=str(tmp_path / "bare"))]}), tmp_path / "out")
    said = [text for text in warnings_of(tmp_path / "out") if "is None for every rollout" in text]
    assert len(said) == 1 and "first-crop" in said[0]


def test_alarms_ring_once_when_calls_stop(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    alarm = MetricsCallback(tmp_path / "log.jsonl")
    for rate in [0.9] * 10 + [0.0] * 30:
        tell(alarm, **{"zoom/call_rate_needed/needle-hop": rate, "entropy": 1.0})
    assert alarm.warned == {"zoom/call_rate_needed/needle-hop"}
    assert capsys.readouterr().out.count("the model stops zooming") == 1
    assert "fell from 0.90" in warnings_of(tmp_path)[0]


@pytest.mark.parametrize(
    ("metric", "bad"),
    [("zoom/refusal_rate", 0.8), ("zoom/failure_rate", 0.8), ("zoom/truncated", 0.5), ("frac_reward_zero_std", 1.0)],
)
def test_a_mean_over_a_window_is_warned_of_each_time_that_it_leaves_its_range(
    tmp_path: Path, metric: str, bad: float, capsys: pytest.CaptureFixture[str]
) -> None:
    alarm = MetricsCallback(tmp_path / "log.jsonl")
    for _ in range(WINDOW - 1):  # as in the first steps of many runs
        tell(alarm, **{metric: bad})
    assert not alarm.warned
    for value in [bad, bad, 0.25, bad, bad]:  # one good step does not make it healthy
        tell(alarm, **{metric: value})
    assert alarm.warned == {metric} and capsys.readouterr().out.count("warning at") == 1
    for value in [0.0] * WINDOW + [bad] * 3 * WINDOW:
        tell(alarm, **{metric: value})
    assert alarm.warned == {metric} and capsys.readouterr().out.count("warning at") == 1


def test_an_alarm_rings_when_entropy_is_gone(tmp_path: Path) -> None:
    alarm = MetricsCallback(tmp_path / "log.jsonl")
    for value in [1.0] * WINDOW + [0.01] * 2 * WINDOW:
        tell(alarm, entropy=value)
    assert alarm.warned == {"entropy"}


def begun(callback: TrainerCallback, step: int) -> None:
    state = TrainerState(global_step=step)
    callback.on_train_begin(TrainingArguments(output_dir="none"), state, TrainerControl())


def test_an_alarm_of_a_run_that_goes_on_remembers_its_log(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Steps after the checkpoint are dropped from the log, and what was warned of before is not said again."""
    path = tmp_path / "log.jsonl"
    lines: list[dict[str, Any]] = [
        {"step": at, "loss": 0.0, "zoom/call_rate_needed": 0.9, "zoom/truncated": 0.5, "entropy": 1.0}
        for at in range(1, 11)
    ]
    lines += [{"step": 3, "warning": "50% of the rollouts are cut off"}, {"step": 11, "loss": 0.0, "entropy": 9.0}]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines) + '{"step": 12, "lo')
    alarm = MetricsCallback(path)
    begun(alarm, 10)
    assert [json.loads(line) for line in path.read_text().splitlines()] == lines[:-1]
    assert alarm.warned == {"zoom/truncated"} and not capsys.readouterr().out
    for _ in range(30):
        tell(alarm, **{"zoom/call_rate_needed": 0.0, "entropy": 0.01})
    assert alarm.warned == {"zoom/truncated", "zoom/call_rate_needed", "entropy"}, (
        "peaks and the first entropy are known"
    )


def test_episodes_are_kept_although_rounds_begin_between_the_steps(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(watch, "write_report", lambda *_, **__: None)
    trace = Trace(question="?", status="answered")
    one, store = Rollout(trace, QUESTION), ViewStore()
    store.add_original(Image.new("RGB", (28, 28)))

    def steps() -> list[int]:
        return [json.loads(line)["step"] for line in (tmp_path / "rollouts.jsonl").read_text().splitlines()]

    def rounds(keeper: RolloutPageCallback, *at: int) -> None:
        for step in at:
            keeper.keep(step, [one], {"accuracy": [1.0]}, [store])

    first = RolloutPageCallback(tmp_path, every=20, episodes=1)
    begun(first, 0)
    rounds(first, 0, 0, 12, 24, 36, 48, 60)
    assert steps() == [0, 24, 48, 60]
    again = RolloutPageCallback(tmp_path, every=20, episodes=1)
    begun(again, 48)
    assert steps() == [0, 24], "the round of the checkpoint's step is run again"
    rounds(again, 48, 60)
    assert steps() == [0, 24, 48, 60]
