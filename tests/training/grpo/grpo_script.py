"""Models that say what a test wants, with the log-probabilities they really have for it; and questions to ask them."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from PIL import Image
from torch import Tensor
from transformers import TrainerControl, TrainerState, TrainingArguments

from qzoom_agent.models import hf_generation
from qzoom_agent.models.interface import SamplingParams
from qzoom_agent.training.grpo.callbacks import MetricsCallback
from qzoom_agent.training.grpo.grpo_recipe import GRPORecipe
from tests.tiny_models import Family, build

AGENT = {
    "policy": "explicit",
    "budget": {
        "max_turns": 3,
        "max_views": 3,
        "coarse_tokens": 16,
        "coarse_min_tokens": 4,
        "crop_min_tokens": 4,
        "crop_max_tokens": 9,
    },
    "generation": {"max_new_tokens": 200},
}
"""Episodes that are short for a byte-level tokenizer."""


def questions(folder: Path) -> Path:
    """Four questions about pictures of different colours and sizes, saved as a dataset."""
    rows = {
        "image": [Image.new("RGB", (300 + 40 * at, 260), (60 * at, 90, 200 - 50 * at)) for at in range(4)],
        "question": [f"What is the code? {at}" for at in range(4)],
        "answer": ["407"] * 4,
        "boxes": [[[100.0, 100.0, 160.0, 140.0]]] * 4,
    }
    Dataset.from_dict(rows).save_to_disk(str(folder))
    return folder


_built: dict[Family, Path] = {}


def tiny_model(family: Family, folder: Path) -> Path:
    """Return the folder of a tiny model of the family: `folder`, unless one was made before, as all are the same."""
    if family not in _built:
        _built[family] = build(family, folder, prompts=True, max_position_embeddings=16384)
    return _built[family]


def tiny_recipe(folder: Path, family: Family, **changes: Any) -> GRPORecipe:
    """Two questions with two rollouts each, on a tiny random model."""
    model = tiny_model(family, folder / family)
    given: dict[str, Any] = {
        "model": str(model),
        "max_steps": 1,
        "prompts": 2,
        "num_generations": 2,
        "per_device_train_batch_size": 2,
        "data": [{"path": str(questions(folder / "questions"))}],
        "agent": AGENT,
        "learning_rate": 1e-3,
        "tower": "lora" not in changes,
        "watch": {"every": 1, "episodes": 1},
    }
    return GRPORecipe.model_validate({**given, **changes})


def tell(alarm: MetricsCallback, **logs: float) -> None:
    """What a trainer tells its callbacks after a step."""
    alarm.on_log(TrainingArguments(output_dir="none"), TrainerState(), TrainerControl(), logs={"loss": 0.0, **logs})


class Script:
    """Stands for `hf_generation.draw`: row r of turn t says `turns[t][r]`, every row of a turn at the same time."""

    def __init__(self, tokenizer: Any, turns: Sequence[Sequence[str]]) -> None:
        end = tokenizer.eos_token_id
        self.turns = [[[*tokenizer(text)["input_ids"], end] for text in rows] for rows in turns]
        self.turn = self.step = 0

    def __call__(
        self, logits: Tensor, chance: Tensor, *, settings: SamplingParams, forbidden: Tensor
    ) -> tuple[Tensor, Tensor]:
        rows = self.turns[self.turn % len(self.turns)]
        assert len(rows) == len(logits), "a turn of the script has another number of rows"
        tokens = torch.tensor([row[min(self.step, len(row) - 1)] for row in rows])
        self.step += 1
        if self.step == max(map(len, rows)):
            self.turn, self.step = self.turn + 1, 0
        return tokens, torch.log_softmax(logits.float(), 1).gather(1, tokens[:, None])[:, 0]


def scripted(patch: pytest.MonkeyPatch, tokenizer: Any, turns: Sequence[Sequence[str]]) -> Script:
    """Let every model that decodes say this."""
    script = Script(tokenizer, turns)
    patch.setattr(hf_generation, "draw", script)
    return script


def recipe(**changes: Any) -> GRPORecipe:
    """Four steps on needle boards."""
    return GRPORecipe.model_validate(
        {"max_steps": 4, "prompts": 2, "num_generations": 2, "needle": {"needle-hop": 1.0}}
        | {"per_device_train_batch_size": 2}
        | changes
    )
