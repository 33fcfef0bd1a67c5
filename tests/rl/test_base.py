"""`qzoom train base` end to end on tiny batches: it learns, it writes what it did, and a killed run loses nothing."""

import json
from collections.abc import Iterator
from pathlib import Path
from random import Random
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForImageTextToText, set_seed

from qzoom_agent.errors import ConfigError
from qzoom_agent.rl import base
from qzoom_agent.rl.nano import batches
from qzoom_agent.rl.nano.examples import text_page, training_board, whole_tree
from qzoom_agent.rl.nano.heads import TrainingHeads
from qzoom_agent.rl.nano.model import build_model
from qzoom_agent.rl.nano.ship import main as ship
from qzoom_agent.rl.nano.tokenizer import build_tokenizer
from qzoom_agent.rl.nano.trees import Tree

RECIPE = """
log_steps: 2
save_steps: 2
validate_steps: 4
validate_batches: 1
validate_kinds: [pages, crops]
stages:
  - {name: read, steps: 2, mix: {pages: 1.0}, learning_rate: 2.0e-3, warmup_steps: 1}
  - {name: talk, steps: 4, mix: {crops: 0.6, pages: 0.4}, learning_rate: 1.0e-3, warmup_steps: 1, tower_share: 0.5}
"""


def small(kind: str, seed: int) -> list[Tree]:
    """A batch that costs a hundredth of a real one."""
    rng = Random(f"{kind}/{seed}")
    if kind == "pages":
        return [Tree([text_page(rng)], [])]
    return [whole_tree(rng, training_board(rng, seed * 64), tokens=25, questions=3)]


@pytest.fixture(autouse=True)
def _small(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    for module in (batches, base):
        monkeypatch.setattr(module, "trees_of", small)
    yield
    torch.set_num_threads(before)


def train(folder: Path, *options: str) -> None:
    (folder / "recipe.yaml").write_text(RECIPE)
    assert base.main(["--config", str(folder / "recipe.yaml"), "--output", str(folder / "out"), *options]) == 0


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "final" / "model.safetensors")


def notes(stage: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (stage / "log.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def straight(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The output of a run that nothing interrupted."""
    folder = tmp_path_factory.mktemp("straight")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(batches, "trees_of", small)
        patch.setattr(base, "trees_of", small)
        torch.set_num_threads(1)
        train(folder)
    return folder / "out"


def test_the_losses_of_a_run_are_finite_and_written(straight: Path) -> None:
    for stage, steps, terms in (("read", 2, {"read"}), ("talk", 4, {"read", "answer", "place"})):
        logs = [note for note in notes(straight / stage) if "loss" in note]
        assert [note["step"] for note in logs] == list(range(2, steps + 1, 2))
        assert all(note["of"] == steps for note in logs)
        found = {name for note in logs for name in note} & {"read", "answer", "place"}
        assert found == terms
        assert all(torch.isfinite(torch.tensor(note[name])) for note in logs for name in found & set(note))
        assert all(note["grad_norm"] > 0 for note in logs)
    recipe = base.load_recipe(straight / "recipe.yaml")
    assert [stage.name for stage in recipe.stages] == ["read", "talk"]


def test_a_validation_counts_right_answers(straight: Path) -> None:
    (validation,) = [note["validation"] for note in notes(straight / "talk") if "validation" in note]
    assert {"pages read loss", "crops read loss"} <= set(validation)
    shares = {name: value for name, value in validation.items() if "loss" not in name}
    assert shares
    assert all(name.startswith("crops direct ") and 0 <= share <= 1 and n > 0 for name, (share, n) in shares.items())
    assert sum(n for _, n in shares.values()) == 3


def test_every_stage_changes_the_weights_of_the_one_before(straight: Path) -> None:
    read, talk = weights(straight / "read"), weights(straight / "talk")
    assert set(read) == set(talk)
    still = {name for name in read if torch.equal(read[name], talk[name])}
    assert still == set()
    # A stage that only reads pages trains the tower and its reader, and leaves the language model as it was drawn.
    set_seed(0)
    fresh = build_model(build_tokenizer())
    fresh.training_heads = TrainingHeads(fresh.config.get_text_config().hidden_size)
    begun = fresh.state_dict()
    changed = {name for name in read if not torch.equal(read[name], begun[name])}
    assert changed == {name for name in read if ".visual." in name or name.startswith("training_heads.read.")}


def test_a_finished_run_is_left_alone(straight: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = {path: path.stat().st_mtime_ns for path in straight.rglob("model.safetensors")}
    assert base.main(["--config", str(straight / "recipe.yaml"), "--output", str(straight)]) == 0
    assert {path: path.stat().st_mtime_ns for path in straight.rglob("model.safetensors")} == before
    assert "stage talk:" in capsys.readouterr().out


class Cut(Exception):
    """The power fails."""


def cut_at(step: int) -> type[base.Notebook]:
    class Interrupted(base.Notebook):
        def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            if state.global_step == step and "talk" in args.output_dir:
                raise Cut

    return Interrupted


@pytest.mark.parametrize("step", [0, 3])
def test_a_killed_run_ends_with_the_same_weights(
    straight: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: int
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(base, "Notebook", cut_at(step))
        with pytest.raises(Cut):
            train(tmp_path)
    stage = tmp_path / "out" / "talk"
    assert [path.name for path in stage.glob("checkpoint-*")] == (["checkpoint-2"] if step else [])
    assert not (stage / "final").exists()
    train(tmp_path)
    for name in ("read", "talk"):
        again, wanted = weights(tmp_path / "out" / name), weights(straight / name)
        assert set(again) == set(wanted)
        assert [key for key in wanted if not torch.equal(again[key], wanted[key])] == []
    assert [note["step"] for note in notes(stage) if "loss" in note] == [2, 4], "no step was trained twice"


def test_a_run_can_stop_after_a_stage(tmp_path: Path) -> None:
    train(tmp_path, "--stage", "read")
    assert (tmp_path / "out" / "read" / "final" / "model.safetensors").exists()
    assert not (tmp_path / "out" / "talk").exists()


def test_a_finished_stage_ships_as_a_stock_model(straight: Path, tmp_path: Path) -> None:
    assert ship([str(straight / "talk" / "final"), str(tmp_path / "nano")]) == 0
    loaded: Any = AutoModelForImageTextToText.from_pretrained(tmp_path / "nano", output_loading_info=True)
    model, info = loaded
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    trained = weights(straight / "talk")
    shipped = model.state_dict()
    assert {str(value.dtype) for value in load_file(tmp_path / "nano" / "model.safetensors").values()} == {
        "torch.bfloat16"
    }
    for name, value in trained.items():
        if not name.startswith("training_heads."):
            assert torch.equal(shipped[name].to(torch.bfloat16), value.to(torch.bfloat16)), name
    with pytest.raises(ConfigError, match="no trained model"):
        ship([str(straight), str(tmp_path / "other")])
