"""`rollouts.by: environment`: TRL's own tool loop."""

from pathlib import Path
from typing import Any

import pytest
import torch

from qzoom_agent.training.grpo.launch import make_trainer
from tests.training.grpo.grpo_script import tiny_recipe
from tests.training.processes import log_of


def test_a_reply_that_trl_cuts_off_is_no_answer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is not learned from, as in every other way of rolling out, whatever it begins with."""
    recipe = tiny_recipe(tmp_path, "qwen2_5_vl", rollouts={"by": "environment"}, protocol="qwen3vl")
    trainer = make_trainer(recipe, tmp_path / "out")
    tokenizer = trainer.backend.codec.tokenizer

    def generate(*, input_ids: torch.Tensor, **_: Any) -> torch.Tensor:
        rows = [[*tokenizer(text)["input_ids"], tokenizer.eos_token_id] for text in ("407", "no", "no")]
        rows.append(tokenizer("407" * 9)["input_ids"])
        padded = [[*row, *[tokenizer.pad_token_id] * (len(rows[-1]) - len(row))] for row in rows]
        return torch.cat((input_ids, torch.tensor(padded)), dim=1)

    monkeypatch.setattr(trainer.model, "generate", generate)
    trainer.train()
    log = log_of(tmp_path / "out")[0]
    assert log["zoom/truncated"] == log["completions/clipped_ratio"] == 0.25
    assert log["zoom/accuracy"] == 0.25 and log["rewards/accuracy/mean"] == pytest.approx(1 / 3, abs=1e-4)
    assert "zoom/written_tokens" not in log, "nobody counts them there"
