"""rl/train_nano.py end to end on tiny batches: it learns, it writes what it did, and a killed run loses nothing."""

import json
import re
import shutil
from pathlib import Path
from random import Random
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForImageTextToText, TrainingArguments, set_seed
from yaml import safe_dump, safe_load

import train_nano as base
from export_nano import main as ship
from grow_nano import main as grow_main
from keep_stage import keep_stage
from nano import batches, validation
from nano.examples import training_board, whole_tree
from nano.heads import TOLD, TrainingHeads, losses
from nano.model import build_model
from nano.pages import object_page
from nano.tokenizer import build_tokenizer
from nano.trees import Packer, Tree
from qzoom_agent.errors import ConfigError
from qzoom_agent.models.presets import NANO_FOLDER
from qzoom_agent.training.branches.fitting import last_checkpoint

READERS_OF_PAPER = {"training_heads.lines.frames", "training_heads.spell"}
"""Boards alone do not train them."""
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
        return [object_page(rng)]
    return [whole_tree(rng, training_board(rng, seed * 64), tokens=25, questions=3)]


@pytest.fixture(autouse=True)
def _small(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (batches, validation):
        monkeypatch.setattr(module, "trees_of", small)


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
        patch.setattr(validation, "trees_of", small)
        train(folder)
    return folder / "out"


def test_the_losses_of_a_run_are_finite_and_written(straight: Path) -> None:
    terms = {"read", "answer", "place", "focus"}
    for stage, steps in (("read", 2), ("talk", 4)):
        logs = [note for note in notes(straight / stage) if "loss" in note]
        assert [note["step"] for note in logs] == list(range(2, steps + 1, 2))
        assert all(note["of"] == steps for note in logs)
        assert {name for note in logs for name in note} & terms == terms
        assert all(torch.isfinite(torch.tensor(note[name])) for note in logs for name in terms & set(note))
        assert all(note["grad_norm"] > 0 for note in logs)
    recipe = base.load_recipe(straight / "recipe.yaml")
    assert [stage.name for stage in recipe.stages] == ["read", "talk"]


def test_a_validation_counts_right_answers(straight: Path) -> None:
    (found,) = [note["validation"] for note in notes(straight / "talk") if "validation" in note]
    losses = {
        f"{kind} {term} loss" for kind in ("pages", "crops") for term in ("read", "answer", "place", "aim", *TOLD)
    }
    losses |= {f"{kind} tally loss" for kind in ("pages", "crops") if f"{kind} direct count" in found}
    assert {name for name in found if name.endswith("loss")} == losses
    shares = {name: value for name, value in found.items() if not name.endswith("loss")}
    assert all(0 <= share <= 1 and n > 0 for share, n in shares.values())
    seen = {name for name in shares if " sees " in name}
    assert {"pages sees color", "pages sees shape", "pages sees pips"} <= seen
    assert all(" direct " in name for name in shares.keys() - seen)
    assert sum(n for name, (_, n) in shares.items() if name.startswith("crops direct")) == 3
    assert shares["pages direct pips"]


@pytest.mark.slow
def test_a_run_that_stops_in_time_goes_on_where_it_stopped(
    straight: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    train(tmp_path, "--minutes", "0")
    assert "stage read: stopped with a checkpoint after 0 minutes" in capsys.readouterr().out
    stopped = tmp_path / "out" / "read"
    assert last_checkpoint(stopped) == str(stopped / "checkpoint-1") and not (stopped / "final").exists()
    train(tmp_path)
    for stage in ("read", "talk"):
        one, other = weights(straight / stage), weights(tmp_path / "out" / stage)
        assert all(torch.equal(one[name], other[name]) for name in one), stage


def test_a_kept_stage_is_a_place_to_go_on_from_with_its_heads(straight: Path, tmp_path: Path) -> None:
    kept = tmp_path / "kept"
    assert keep_stage([straight / "talk" / "final"], kept) < 12_000_000
    _, model = base.load_shipped(kept)
    trained = weights(straight / "talk")
    for name, parameter in model.named_parameters():
        assert parameter.dtype == torch.float32
        assert torch.equal(parameter, trained[name].to(torch.bfloat16).float()), name


def test_a_grown_stage_computes_the_same_and_can_be_gone_on_from(straight: Path, tmp_path: Path) -> None:
    kept = straight / "talk" / "final"
    small_model = base.load_training(kept)[1]
    sizes = ["--intermediate", "400", "--tower-intermediate", "512", "--windows", "2,5", "--wholes", "4"]
    assert grow_main([str(kept), str(tmp_path / "grown"), *sizes]) == 0
    tokenizer, grown = base.load_shipped(tmp_path / "grown")
    assert grown.config.vision_config.depth == 7 and grown.config.text_config.intermediate_size == 400
    assert grown.config.vision_config.fullatt_block_indexes == [1, 4, 6]
    assert grown.num_parameters() > 1.2 * small_model.num_parameters()
    batch = Packer(tokenizer).batch(small("crops", 3))
    with torch.no_grad():
        one, other = (losses(model, model.training_heads, batch) for model in (small_model, grown))
    assert set(one) == set(other) and "answer" in one
    for name, value in one.items():
        if value.is_floating_point():
            torch.testing.assert_close(value, other[name], rtol=1e-4, atol=1e-5)
    losses(grown, grown.training_heads, batch)["answer"].backward()  # type: ignore[no-untyped-call]
    new = [grown.model.visual.blocks[2].mlp.down_proj.weight, grown.model.language_model.layers[0].mlp.down_proj.weight]
    assert all(weight.grad is not None and weight.grad[:, -8:].abs().max() > 0 for weight in new), "what is new learns"


@pytest.mark.parametrize(
    ("given", "told"),
    [
        (["--intermediate", "100"], "--intermediate is 100, but the model has 320"),
        (["--windows", "2,2"], "Give each once, from 0 to 6"),
        (["--windows", "9"], "no new places in a tower of 6"),
        (["--windows", "4", "--wholes", "4"], "Give each once"),
    ],
)
def test_growing_refuses_smaller_widths_and_impossible_places(
    straight: Path, tmp_path: Path, given: list[str], told: str
) -> None:
    with pytest.raises(ConfigError, match=re.escape(told)):
        grow_main([str(straight / "talk" / "final"), str(tmp_path / "grown"), *given])
    assert not (tmp_path / "grown").exists()


def test_every_stage_changes_the_weights_of_the_one_before(straight: Path) -> None:
    read, talk = weights(straight / "read"), weights(straight / "talk")
    assert set(read) == set(talk)
    unchanged = {name for name in read if torch.equal(read[name], talk[name])}
    assert {name.removesuffix(".weight").removesuffix(".bias") for name in unchanged} == READERS_OF_PAPER


@pytest.mark.parametrize(
    ("tower", "kind", "trained"),
    [(None, "crops", True), (["pages"], "crops", False), (["print", "pages"], "pages", True), ([], "pages", False)],
    ids=["every batch", "questions do not", "pages do", "nothing does"],
)
def test_a_stage_says_which_batches_train_the_tower(
    tmp_path: Path, tower: list[str] | None, kind: str, trained: bool
) -> None:
    set_seed(0)
    tokenizer = build_tokenizer()
    model = build_model(tokenizer)
    model.training_heads = TrainingHeads(model.config.get_text_config().hidden_size)
    text = {"name": "one", "steps": 1, "mix": {"crops": 1.0}, "learning_rate": 1e-3, "tower": tower}
    arguments = TrainingArguments(output_dir=str(tmp_path), use_cpu=True, report_to="none")
    trainer = base.TreeTrainer(base.Stage.model_validate(text), model=model, args=arguments)
    batch = Packer(tokenizer).batch(small("crops", 0)) | {"kind": kind}
    loss, terms = trainer.compute_loss(model, batch, return_outputs=True)
    counted = {"answer": 1.0, "place": 0.3, "aim": 0.3} | dict.fromkeys(TOLD, 0.3) | ({"read": 1.0} if trained else {})
    wanted = sum(weight * terms[name].detach() for name, weight in counted.items())
    assert torch.allclose(loss.detach(), wanted)
    torch.autograd.backward(loss)
    moved = {name for name, parameter in model.named_parameters() if parameter.grad is not None}
    assert any(".visual." in name for name in moved) == trained
    assert any(".language_model." in name for name in moved)


@pytest.mark.slow
def test_a_stage_can_leave_the_lower_layers_alone(straight: Path, tmp_path: Path) -> None:
    stage = "{name: upper, steps: 2, mix: {crops: 1.0}, learning_rate: 1.0e-3, from_layer: 5}"
    (tmp_path / "upper.yaml").write_text(f"{RECIPE}  - {stage}\n")
    for before in ("read", "talk"):
        (tmp_path / "out" / before).mkdir(parents=True)
        (tmp_path / "out" / before / "final").symlink_to(straight / before / "final")
    assert base.main(["--config", str(tmp_path / "upper.yaml"), "--output", str(tmp_path / "out")]) == 0
    talk, upper = weights(straight / "talk"), weights(tmp_path / "out" / "upper")
    changed = {name for name in talk if not torch.equal(talk[name], upper[name])}
    layers = {int(name.split("layers.")[1].split(".")[0]) for name in changed if "layers." in name}
    assert layers == {5, 6, 7, 8}
    assert not any("visual" in name or "embed" in name for name in changed)
    (tmp_path / "high.yaml").write_text(f"{RECIPE}  - {stage.replace('5', '9')}\n".replace("upper", "high"))
    with pytest.raises(ConfigError, match="from_layer is 9, but nano has 9"):
        base.main(["--config", str(tmp_path / "high.yaml"), "--output", str(tmp_path / "out")])


def test_heads_alone_can_be_learned_first(straight: Path, tmp_path: Path) -> None:
    """Of a model that ships without them; nothing else of it moves."""
    stage = "{name: heads, steps: 2, mix: {crops: 1.0}, learning_rate: 1.0e-3, heads_only: true}"
    (tmp_path / "heads.yaml").write_text(f"{RECIPE}  - {stage}\n")
    for before in ("read", "talk"):
        (tmp_path / "out" / before).mkdir(parents=True)
        (tmp_path / "out" / before / "final").symlink_to(straight / before / "final")
    assert base.main(["--config", str(tmp_path / "heads.yaml"), "--output", str(tmp_path / "out")]) == 0
    talk, heads = weights(straight / "talk"), weights(tmp_path / "out" / "heads")
    changed = {name for name in talk if not torch.equal(talk[name], heads[name])}
    assert changed == {
        f"training_heads.{name}.{kind}" for name in ("read", "place", "aim") for kind in ("weight", "bias")
    }


def test_training_goes_on_from_a_shipped_model(tmp_path: Path) -> None:
    stage = "{name: heads, steps: 1, mix: {crops: 1.0}, learning_rate: 1.0e-3, heads_only: true}"
    (tmp_path / "heads.yaml").write_text(f"start: {tmp_path / 'none'}\nstages:\n  - {stage}\n")
    given = ["--config", str(tmp_path / "heads.yaml"), "--output", str(tmp_path / "out")]
    with pytest.raises(ConfigError, match="There is no model"):
        base.main(given)
    assert base.main([*given, "--start", "nano"]) == 0
    before, after = load_file(NANO_FOLDER / "model.safetensors"), weights(tmp_path / "out" / "heads")
    kept = [name for name in after if not name.startswith("training_heads.")]
    shipped = {name.replace("model.layers", "model.language_model.layers"): weight for name, weight in before.items()}
    compared = [name for name in kept if name in shipped]
    assert len(compared) > 50 and all(torch.equal(after[name], shipped[name].float()) for name in compared)


def test_a_finished_run_is_left_alone(straight: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = {path: path.stat().st_mtime_ns for path in straight.rglob("model.safetensors")}
    assert base.main(["--config", str(straight / "recipe.yaml"), "--output", str(straight)]) == 0
    assert {path: path.stat().st_mtime_ns for path in straight.rglob("model.safetensors")} == before
    assert "stage talk:" in capsys.readouterr().out


def test_a_stage_of_more_batches_than_it_has_numbers_is_refused_before_any_is_trained(tmp_path: Path) -> None:
    (tmp_path / "recipe.yaml").write_text(RECIPE)
    with pytest.raises(ConfigError, match=r"at most 1000000 small batches; got 20000 steps of 64"):
        base.load_recipe(tmp_path / "recipe.yaml", overrides=["stages.1.steps=20000", "stages.1.times=64"])


def test_a_stage_goes_on_only_with_what_its_weights_come_of(straight: Path, tmp_path: Path) -> None:
    shutil.copytree(straight, tmp_path / "out")
    changed = safe_load(RECIPE)
    changed["stages"][0]["learning_rate"] = 1.0e-4
    (tmp_path / "recipe.yaml").write_text(safe_dump(changed))
    with pytest.raises(ConfigError, match=r"read was begun with other settings \(stages\.read\.learning_rate: "):
        base.main(["--config", str(tmp_path / "recipe.yaml"), "--output", str(tmp_path / "out")])
    assert (tmp_path / "out" / "recipe.yaml").read_bytes() == (straight / "recipe.yaml").read_bytes()
    shutil.rmtree(tmp_path / "out" / "read")  # what it asks for is not enough: talk came of it
    recipe = base.load_recipe(tmp_path / "recipe.yaml")
    with pytest.raises(ConfigError, match=r"talk was begun with other settings \(stages\.read\.learning_rate: "):
        base.run_stage(recipe, 1, output=tmp_path / "out")
    told = recipe.model_copy(update={"log_steps": 7, "stages": base.load_recipe(straight / "recipe.yaml").stages})
    assert base.run_stage(told, 1, output=tmp_path / "out") == tmp_path / "out" / "talk" / "final"


class Cut(Exception):
    """The power fails."""


def cut_at(step: int) -> type[base.LogCallback]:
    class Interrupted(base.LogCallback):
        def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            if state.global_step == step and "talk" in args.output_dir:
                raise Cut

    return Interrupted


@pytest.mark.slow
@pytest.mark.parametrize("step", [0, 3])
def test_a_killed_run_ends_with_the_same_weights(
    straight: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: int
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(base, "LogCallback", cut_at(step))
        with pytest.raises(Cut):
            train(tmp_path)
    stage = tmp_path / "out" / "talk"
    assert [path.name for path in stage.glob("checkpoint-*")] == (["checkpoint-2"] if step else [])
    assert not (stage / "final").exists()
    # What a cut in the middle of writing leaves behind: a checkpoint without its state, a result without its name.
    for half in ("checkpoint-4", "final.part"):
        (stage / half).mkdir(parents=True)
        (stage / half / "model.safetensors").write_bytes(b"half a fi")
    train(tmp_path)
    for name in ("read", "talk"):
        again, wanted = weights(tmp_path / "out" / name), weights(straight / name)
        assert set(again) == set(wanted)
        assert [key for key in wanted if not torch.equal(again[key], wanted[key])] == []
    assert [note["step"] for note in notes(stage) if "loss" in note] == [2, 4], "no step was trained twice"
    assert not (stage / "final.part").exists()


def test_the_last_whole_checkpoint_is_the_one_with_its_state(tmp_path: Path) -> None:
    assert last_checkpoint(tmp_path) is None
    for step in (100, 1000, 900, 1100):
        (tmp_path / f"checkpoint-{step}").mkdir()
    assert last_checkpoint(tmp_path) is None
    for step in (100, 1000, 900):
        (tmp_path / f"checkpoint-{step}" / "trainer_state.json").write_text("{}")
    assert last_checkpoint(tmp_path) == str(tmp_path / "checkpoint-1000")


@pytest.mark.slow
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
