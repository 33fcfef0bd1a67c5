"""Shipping: from a stage's folder to the model in the package, in stock parts, within its size, or not at all."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from transformers import AutoTokenizer
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

import export_nano as ship
from nano.heads import TrainingHeads
from nano.model import CELL, build_model
from nano.tokenizer import build_tokenizer
from nano.trees import patchify
from qzoom_agent.errors import ConfigError
from qzoom_agent.models.presets import NANO_FOLDER
from train_nano import BaseRecipe, load_shipped, load_training, run_stage


@pytest.fixture(scope="module")
def final(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What a stage leaves behind, untrained."""
    folder = tmp_path_factory.mktemp("stage") / "final"
    torch.manual_seed(0)
    tokenizer = build_tokenizer()
    model = build_model(tokenizer)
    model.training_heads = TrainingHeads(model.config.get_text_config().hidden_size)
    model.save_pretrained(folder, save_original_format=False)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def shipped(final: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("package") / "weights" / "nano"
    size = ship.ship([final], folder)
    assert size == (folder / "model.safetensors").stat().st_size < ship.LIMIT_BYTES
    return folder


def test_nothing_of_training_is_left(final: Path, shipped: Path) -> None:
    before, after = load_file(final / "model.safetensors"), load_file(shipped / "model.safetensors")
    assert any(name.startswith("training_heads.") for name in before)
    assert not any("training" in name for name in after)
    assert {value.dtype for value in after.values()} == {torch.bfloat16}
    # The names are those of the hub, which other programs know.
    assert {name.split(".")[0] for name in after} == {"model", "visual"}
    kept = sum(value.numel() for name, value in before.items() if not name.startswith("training_heads."))
    assert sum(value.numel() for value in after.values()) == kept
    config = json.loads((shipped / "config.json").read_text())
    assert config["architectures"] == ["Qwen2_5_VLForConditionalGeneration"]
    assert config["dtype"] == "bfloat16"
    assert "auto_map" not in config, "no code of ours is needed to load it"


def test_of_two_stages_the_mean_is_shipped(final: Path, shipped: Path, tmp_path: Path) -> None:
    tokenizer, other = load_training(final)
    with torch.no_grad():
        for weight in other.parameters():
            weight.add_(0.5)
    other.save_pretrained(tmp_path / "later", save_original_format=False)
    tokenizer.save_pretrained(tmp_path / "later")
    ship.ship([final, tmp_path / "later"], tmp_path / "mean")
    alone, mean = (load_file(folder / "model.safetensors") for folder in (shipped, tmp_path / "mean"))
    for name, weight in alone.items():
        assert torch.allclose(mean[name].float(), weight.float() + 0.25, atol=0.02), name


def test_a_stage_goes_on_in_the_architecture_of_the_one_before(tmp_path: Path) -> None:
    torch.manual_seed(0)
    tokenizer = build_tokenizer()
    model = build_model(tokenizer)
    model.config.text_config.rope_parameters["rope_theta"] = 30.0
    model.training_heads = TrainingHeads(model.config.get_text_config().hidden_size)
    model.save_pretrained(tmp_path, save_original_format=False)
    tokenizer.save_pretrained(tmp_path)
    _, again = load_training(tmp_path)
    assert again.config.text_config.rope_parameters["rope_theta"] == 30.0
    assert again.generation_config.eos_token_id == tokenizer.eos_token_id


def test_what_was_loaded_in_float32_does_not_say_so_when_it_ships(final: Path, tmp_path: Path) -> None:
    tokenizer, model = load_training(final)
    for part in (model.config.text_config, model.config.vision_config):
        part.dtype = torch.float32
    model.save_pretrained(tmp_path / "later", save_original_format=False)
    tokenizer.save_pretrained(tmp_path / "later")
    ship.ship([tmp_path / "later"], tmp_path / "shipped")
    written = json.loads((tmp_path / "shipped" / "config.json").read_text())
    assert written["dtype"] == "bfloat16"
    assert not {"float32"} & {written["text_config"].get("dtype"), written["vision_config"].get("dtype")}


def test_the_image_processor_makes_the_trained_patches(shipped: Path) -> None:
    processor = Qwen2VLImageProcessorPil.from_pretrained(shipped)
    image = Image.effect_mandelbrot((8 * CELL, 7 * CELL), (-2.0, -1.5, 1.0, 1.5), 40).convert("RGB")
    coded = processor(images=[image], return_tensors="np")
    assert coded["image_grid_thw"].tolist() == [[1, 14, 16]]
    assert np.abs(coded["pixel_values"] - patchify(image)).max() < 1e-5


def test_the_tokenizer_is_the_trained_one(shipped: Path) -> None:
    again, trained = AutoTokenizer.from_pretrained(shipped), build_tokenizer()
    assert again.get_vocab() == trained.get_vocab()
    assert again.chat_template == trained.chat_template


def test_the_command_says_what_it_wrote(final: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert ship.main([str(final), str(tmp_path / "nano")]) == 0
    megabytes = (tmp_path / "nano" / "model.safetensors").stat().st_size / 1e6
    assert capsys.readouterr().out == f"{tmp_path / 'nano'}: {megabytes:.1f} MB\n"


def test_a_folder_that_is_no_finished_stage(final: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"no trained model in .*Give the `final` folder"):
        ship.main([str(final.parent), str(tmp_path / "nano")])
    assert not (tmp_path / "nano").exists()


def test_weights_too_large_for_the_package(final: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ship, "LIMIT_BYTES", 1_000_000)
    with pytest.raises(ConfigError, match=r"The weights are \d+\.\d MB; the package takes at most 1 MB"):
        ship.ship([final], tmp_path / "nano")


@pytest.mark.slow
def test_a_shipped_model_is_a_place_to_go_on_from(tmp_path: Path) -> None:
    stage = {"name": "more", "steps": 2, "mix": {"crops": 1.0}, "learning_rate": 1e-5, "warmup_steps": 0}
    recipe = BaseRecipe.model_validate(
        {"start": "nano", "validate_kinds": ["crops"], "validate_batches": 1, "stages": [stage]}
    )
    before = dict(load_shipped(NANO_FOLDER)[1].named_parameters())
    after = dict(load_training(run_stage(recipe, 0, output=tmp_path))[1].named_parameters())
    moved = [
        float((after[name] - value).detach().abs().max())
        for name, value in before.items()
        if not name.startswith("training_heads.")
    ]
    assert 0 < max(moved) < 1e-3, "the shipped weights, a little further"
    with pytest.raises(ConfigError, match="no model in"):
        load_shipped(tmp_path)
