"""`qzoom train coldstart` as a command: on two processes, with another recipe, and with one that is not there."""

import runpy
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from safetensors.torch import load_file
from yaml import safe_dump

from qzoom_agent.errors import ConfigError
from qzoom_agent.training.sft import fine_tune as run
from tests.tiny_models import build
from tests.training.processes import finished, log_of, start

RECIPE: dict[str, Any] = {
    "dtype": "float32",
    "data": [{"path": "needle", "limit": 4, "a_board": 2, "tasks": ["needle-scene", "needle-hop"]}],
    "budget": {"coarse_tokens": 25, "crop_min_tokens": 4, "crop_max_tokens": 9},
    "needed": 0.9,
    "optimisation": {
        "learning_rate": 1e-2,
        "per_device_train_batch_size": 2,
        "warmup_steps": 0.0,
        "save_steps": 1,
        "logging_steps": 1,
        "dataloader_num_workers": 0,
    },
}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(build("qwen2_5_vl", tmp_path_factory.mktemp("model") / "tiny", prompts=True))


def written(folder: Path, **changes: Any) -> str:
    file = folder / "recipe.yaml"
    file.write_text(safe_dump({**RECIPE, **changes}))
    return str(file)


@pytest.mark.slow
def test_two_processes_share_the_work(model: str, tmp_path: Path) -> None:
    """What `accelerate launch` starts on two devices: one table, half the steps, one model."""
    needle = {"path": "needle", "limit": 136, "a_board": 8, "tasks": ["needle-scene", "needle-hop"]}
    optimisation = {**RECIPE["optimisation"], "per_device_train_batch_size": 16, "save_steps": 50}
    recipe = written(tmp_path, model=model, data=[needle], optimisation=optimisation)
    out = {processes: tmp_path / str(processes) for processes in (1, 2)}
    for processes, folder in out.items():
        line = ("--config", recipe, "--output", str(folder))
        told = finished(start("qzoom_agent.training.sft.fine_tune", *line, processes=processes))
        assert told.count("episodes kept") == told.count("written") == 1, processes
    tables = [Dataset.load_from_disk(str(folder / "conversations")) for folder in out.values()]
    assert tables[0]["id"][:] == tables[1]["id"][:] and tables[0]["messages"][:] == tables[1]["messages"][:]
    logs = [log_of(folder / "train") for folder in out.values()]
    assert logs[1][0]["of"] == -(-logs[0][0]["of"] // 2)
    assert len(logs[1]) == logs[1][0]["of"], "one process writes the log"
    before, after = load_file(Path(model) / "model.safetensors"), load_file(out[2] / "final" / "model.safetensors")
    assert any(not torch.equal(before[name], after[name]) for name in before)


def test_what_was_made_with_another_recipe_is_refused(
    model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def again(**changes: Any) -> int:
        return run.main(["--config", written(tmp_path, model=model, **changes), "--output", str(tmp_path / "out")])

    def dies(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    other: dict[str, Any] = {"data": [{**RECIPE["data"][0], "seed": 1}]}
    with monkeypatch.context() as patch:  # killed between demonstrations and training
        patch.setattr(run, "fine_tune", dies)
        with pytest.raises(KeyboardInterrupt):
            again()
        with pytest.raises(ConfigError, match=r"conversations was begun with other settings \(data.0.seed: "):
            again(**other)
        with pytest.raises(KeyboardInterrupt):  # other settings of training are no other demonstrations
            again(from_layer=1)
    with monkeypatch.context() as patch:  # killed after a checkpoint
        patch.setattr(run, "save_model", dies)
        with pytest.raises(KeyboardInterrupt):
            again()
    assert list((tmp_path / "out" / "train").glob("checkpoint-*"))
    with pytest.raises(ConfigError, match=r"train was begun with other settings \(from_layer: "):
        again(from_layer=1)
    faster = {**RECIPE["optimisation"], "learning_rate": 1e-3, "save_steps": 7}
    with pytest.raises(ConfigError, match=r"train was begun with other settings \(optimisation.learning_rate: "):
        again(optimisation=faster)
    assert again() == 0
    assert again() == 0
    assert "is there already" in capsys.readouterr().out
    with pytest.raises(ConfigError, match=r"final was begun with other settings \(data.0.seed: "):
        again(**other)


def test_a_mistake_is_told_without_a_traceback(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["run", "--config", str(tmp_path / "none.yaml")])
    with pytest.raises(SystemExit) as ended, pytest.warns(RuntimeWarning, match="found in sys.modules"):
        runpy.run_module("qzoom_agent.training.sft.fine_tune", run_name="__main__")
    assert ended.value.code == 2
    assert capsys.readouterr().err.startswith("qzoom train coldstart: Cannot read the recipe")


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"from_layer": 2}, "from_layer is 2, but .* has 2 decoder layers"),
        (
            {"lora": {"target_modules": ["z_proj"]}},
            r"lora\.target_modules names no linear layer .*such as model\.",
        ),
        ({"lora": {"target_modules": ["("]}}, r"lora\.target_modules: '\(' is no regular expression"),
        ({"lora": {"target_modules": []}}, r"lora\.target_modules': Tuple should have at least 1 item"),
    ],
)
def test_nothing_to_train_is_told_before_demonstrations_are_made(
    changes: dict[str, Any], said: str, model: str, tmp_path: Path
) -> None:
    with pytest.raises(ConfigError, match=said):
        run.main(["--config", written(tmp_path, model=model, **changes), "--output", str(tmp_path / "out")])
    assert not (tmp_path / "out" / "episodes").exists()
