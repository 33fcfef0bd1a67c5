"""The zoom task as an environment: the questions and scores are those of the evaluation."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from PIL import Image

from qzoom_agent.data.samples import TaskSource
from qzoom_agent.errors import ConfigError
from qzoom_agent.evaluation.tasks.task import Task
from qzoom_agent.integrations.zoom_task import ZoomQuestions, ZoomTaskEnv, correct
from tests.evaluation.player import numbers


def task() -> Task:
    """Return the task of the questions: ten small pictures with numbers."""
    return numbers(10)


@pytest.fixture
def questions() -> ZoomQuestions:
    return ZoomQuestions(f"{__name__}:task", n=6)


def test_questions_are_the_tasks_and_scored_by_its_scorer(questions: ZoomQuestions) -> None:
    assert len(questions) == 6 and questions[3].question == numbers(10).load(TaskSource())[3].question
    right = questions[3].answer
    assert questions.score(3, right) == questions.score(3, f"<think>hm</think><answer>{right}</answer>") == 1.0
    assert questions.score(3, "") == questions.score(3, "nothing") == 0.0
    with pytest.raises(IndexError, match="There are 6 questions"):
        questions[6]
    with pytest.raises(ConfigError, match="scorer"):
        ZoomQuestions(f"{__name__}:task", scorer="nothing")


def test_a_question_about_several_images_is_refused(tmp_path: Path) -> None:
    for name in ("a.png", "b.png"):
        Image.new("RGB", (60, 60)).save(tmp_path / name)
    row = {"images": ["a.png", "b.png"], "question": "Which is larger?", "answer": "the first"}
    (tmp_path / "questions.jsonl").write_text(json.dumps(row))
    questions = ZoomQuestions(str(tmp_path / "questions.jsonl"))
    with pytest.raises(ConfigError, match=r"Question 0 of .* is about 2 images"):
        ZoomTaskEnv(questions).reset(index=0)


def test_a_rollout_zooms_and_is_rewarded_for_its_last_message(questions: ZoomQuestions) -> None:
    environments = [ZoomTaskEnv(questions) for _ in range(3)]
    for env in environments:
        image, text = env.reset(index=2, prompt=[])
        assert isinstance(image["image"], Image.Image) and text["text"] == questions[2].question
    crop, told = environments[0].image_zoom_in_tool([0, 0, 500, 500], label="left")
    assert isinstance(crop["image"], Image.Image) and "View 'crop1'" in told["text"]
    _, told = environments[0].image_zoom_in_tool([500, 500, 1000, 1000], view="crop1")
    place = questions.zoom(2)
    place([0, 0, 500, 500])
    assert "'crop2'" in told["text"]
    assert told["text"] == place({"bbox_2d": [500, 500, 1000, 1000], "view": "crop1"}).text
    (told,) = environments[0].image_zoom_in_tool([0, 0])
    assert "could not be read" in told["text"]
    said = {"role": "assistant", "content": [{"type": "text", "text": questions[2].answer}]}
    call = {"role": "assistant", "content": "", "tool_calls": [{}]}
    assert correct([[call, said], [said, call], []], environments) == [1.0, 0.0, 0.0]
    with pytest.raises(ConfigError, match="Call reset"):
        ZoomTaskEnv(questions).image_zoom_in_tool([0, 0, 500, 500])


@pytest.mark.slow
def test_trl_trains_on_it(tmp_path: Path) -> None:
    """A real GRPOTrainer, two rollouts, one step: the image of `reset` and the tool reach the model."""
    from datasets import Dataset
    from trl import GRPOConfig, GRPOTrainer

    from qzoom_agent.models.hf import HFBackend
    from qzoom_agent.training.grpo.checks import fit_for_trl
    from tests.tiny_models import build

    (tmp_path / "tiny").mkdir()
    backend = HFBackend.load(str(build("qwen3_vl", tmp_path / "tiny")), device="cpu", dtype="float32")
    fit_for_trl(backend.processor, factor=backend.defaults.factor)
    made: list[ZoomTaskEnv] = []
    questions = ZoomQuestions(f"{__name__}:task", coarse_tokens=(4, 16))

    def make() -> ZoomTaskEnv:
        made.append(ZoomTaskEnv(questions))
        return made[-1]

    settings = GRPOConfig(
        str(tmp_path / "out"), use_cpu=True, bf16=False, max_steps=1, num_generations=2, per_device_train_batch_size=2
    )
    settings.max_completion_length = 8
    settings.report_to = []
    rows = {"prompt": [[{"role": "user", "content": ""}]] * 2, "index": [0, 1]}
    trainer = GRPOTrainer(
        backend.model,
        reward_funcs=[correct],
        args=settings,
        train_dataset=Dataset.from_dict(rows),
        processing_class=backend.processor,
        environment_factory=make,
    )
    trainer.train()
    assert trainer.state.global_step == 1 and sum(env._zoom is not None for env in made) == 2
