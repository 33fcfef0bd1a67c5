"""Every recipe for a published model runs end to end: on a tiny random model of its family, over local rows with the
columns that it names."""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from PIL import Image

from qzoom_agent.geometry import Box, Size
from qzoom_agent.models.hf import HFBackend
from qzoom_agent.perception.branches import Branches
from qzoom_agent.training.grpo import launch as grpo
from qzoom_agent.training.grpo.grpo_recipe import load_grpo_recipe
from qzoom_agent.training.sft import fine_tune as coldstart
from qzoom_agent.training.sft.demonstrations import write_answer, write_call
from qzoom_agent.training.sft.sft_recipe import load_coldstart_recipe
from tests.models.misbehaving import Connection, Misbehaving, completion
from tests.tiny_models import build
from tests.training.processes import log_of

FOLDER = Path(__file__).resolve().parents[2] / "rl" / "recipes"
GRPO = sorted(path for path in FOLDER.rglob("grpo.yaml") if path.parent.name != "nano")
COLDSTART = sorted(path for path in FOLDER.rglob("coldstart.yaml") if path.parent.name != "nano")
QWEN3 = ("qwen3_vl_4b", "zwz_4b")
FAST = {"grpo": (), "coldstart": ("qwen3_vl_4b",)}
"""Recipes that together take most paths: both families, a judge, adapters, columns with dots, a teacher."""
SMALL = {"coarse_tokens": 16, "coarse_min_tokens": 4, "crop_min_tokens": 4, "crop_max_tokens": 9, "max_turns": 2}


def named(path: Path) -> str:
    return path.parent.name


def cases(paths: list[Path]) -> list[Any]:
    slow = pytest.mark.slow
    return [pytest.param(path, id=named(path), marks=() if named(path) in FAST[path.stem] else slow) for path in paths]


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A tiny model of each family, with branches of its own."""
    root = tmp_path_factory.mktemp("models")
    found = {
        family: build(family, root / family, layers=4, prompts=True, max_position_embeddings=8192)
        for family in ("qwen2_5_vl", "qwen3_vl")
    }  # type: ignore[arg-type]
    for folder in found.values():
        model = HFBackend.load(str(folder), device="cpu", dtype="float32").model
        torch.manual_seed(0)
        branches = Branches.from_base(model, k=2, depth=1, gate_depth=1, with_sdrpn=True, with_gate=False)
        branches.config = branches.config.model_copy(update={"threshold": 0.0})
        branches.save(folder)
    return found


def judge_and_teacher(asked: Connection) -> None:
    """Agree with every answer as a judge, and zoom once as a teacher."""
    text, messages = "yes", asked.body["messages"]
    if isinstance(messages[0]["content"], list):
        again = any(one["role"] == "assistant" for one in messages)
        box = Box(0.1, 0.1, 0.6, 0.6, frame="unit")
        text = write_answer("deepeyes", "407") if again else write_call("deepeyes", box, Size(112, 112))
    asked.reply(completion(text))


@pytest.fixture(scope="module")
def server() -> Iterator[str]:
    with Misbehaving(judge_and_teacher) as http:
        yield http.url


def local(sources: list[Any], folder: Path) -> list[dict[str, Any]]:
    """Rows on disk with the columns that these sources name and no others (so no boxes, which none of them has); and
    the sources that read them."""
    found = []
    for number, source in enumerate(sources):
        names = {name: source.columns.get(name, name) for name in ("image", "question", "answer")}
        rows = []
        for at in range(4):
            image = Image.effect_noise((160, 160), 40 + at).convert("RGB")
            values = {"image": [image] if names["image"] == "images" else image, "question": "What code?"}
            row: dict[str, Any] = {}
            for name, value in {**values, "answer": "407"}.items():
                at_field = row
                *outer, last = names[name].split(".")
                for part in outer:
                    at_field = at_field.setdefault(part, {})
                at_field[last] = value
            rows.append(row)
        Dataset.from_list(rows).save_to_disk(str(folder / str(number)))
        found.append({"path": str(folder / str(number)), "columns": source.columns, "suffix": source.suffix})
    return found


def changed(before: Path, after: Path) -> list[str]:
    """Names of the weights that differ; none of them may be broken."""
    old, new = (HFBackend.load(str(at), device="cpu", dtype="float32").model.state_dict() for at in (before, after))
    assert all(bool(torch.isfinite(value).all()) for value in new.values())
    return [name for name in old if not torch.equal(old[name], new[name])]


@pytest.mark.parametrize("path", cases(GRPO))
def test_a_step_of_grpo(
    path: Path, folders: dict[str, Path], server: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    written = load_grpo_recipe(path)
    model = folders["qwen3_vl" if named(path) in QWEN3 else "qwen2_5_vl"]
    agent = {**written.agent, "budget": {**SMALL, "max_views": 3}, "generation": {"max_new_tokens": 6}}
    changes: dict[str, Any] = {
        "model": str(model),
        "branches": None,  # its own
        "from_layer": min(written.from_layer, 2),
        "protocol": written.protocol or HFBackend.load(str(model), device="cpu").protocol,
        "dtype": "float32",
        "max_steps": 1,
        "prompts": 2,
        "num_generations": 2,
        "per_device_train_batch_size": 2,
        "minibatches": 1,
        "learning_rate": 1e-2,
        "warmup_steps": 0,
        "dataloader_num_workers": 0,
        "save_steps": 50,
        "agent": agent,
        "data": local(written.data, tmp_path / "rows"),
        "judge": None if written.judge is None else server,
        # a random model is never right and never ends its turn, so that only the entropy has a gradient
        "loss": {**written.loss.model_dump(), "entropy_coef": 0.1, "mask_truncated": False},
    }
    recipe = load_grpo_recipe(path, **changes)
    final = grpo.train(recipe, tmp_path / "out")
    outgrown = "Layers below 2, which the branches read, were trained" in capsys.readouterr().out
    assert outgrown == (written.from_layer == 0), "whoever trains adapters is told as well"
    lines = log_of(tmp_path / "out")
    losses = [line["loss"] for line in lines if "loss" in line]
    assert losses and all(math.isfinite(loss) for loss in losses)
    for reward in recipe.rewards:
        mean = lines[0][f"rewards/{reward.name}/mean"]
        assert mean is not None and math.isfinite(mean), f"{reward.name} says nothing of any rollout"
    names = changed(model, final)
    assert names
    assert not any("visual" in name for name in names)


@pytest.mark.parametrize("path", cases(GRPO))
def test_a_step_of_its_twin_on_nano(path: Path, server: str, tmp_path: Path) -> None:
    """The same rewards and loss, on boards: some rollouts are right, some zoom, and the loss has a gradient."""
    changes: dict[str, Any] = {
        "model": "nano",
        "branches": None,
        "protocol": None,
        "dtype": "float32",
        "from_layer": 5,
        "lora": None,
        "max_steps": 1,
        "prompts": 2,
        "num_generations": 6,
        "per_device_train_batch_size": 12,
        "data": [],
        "needle": {"needle-scene": 1, "needle-global": 1},
        "dataloader_num_workers": 0,
        "agent": {"policy": "explicit", "budget": {"max_turns": 3}, "generation": {"max_new_tokens": 12}},
        "rollouts": {"temperature": 2.0},
        "judge": None if load_grpo_recipe(path).judge is None else server,
    }
    recipe = load_grpo_recipe(path, **changes)
    grpo.make_trainer(recipe, tmp_path).train()
    log = log_of(tmp_path)[0]
    assert log["grad_norm"] > 0 and log["zoom/call_rate"] > 0
    assert log["rewards/accuracy/mean"] > 0
    assert all(log[f"rewards/{reward.name}/mean"] is not None for reward in recipe.rewards)


@pytest.mark.parametrize("path", cases(COLDSTART))
def test_a_cold_start(path: Path, folders: dict[str, Path], server: str, tmp_path: Path) -> None:
    written = load_coldstart_recipe(path)
    model = folders["qwen3_vl" if named(path) in QWEN3 else "qwen2_5_vl"]
    changes: dict[str, Any] = {
        "model": str(model),
        "dtype": "float32",
        "data": local(written.data, tmp_path / "rows"),
        "records": 4,
        "budget": {**SMALL, "max_views": 3},
        "generation": {"max_new_tokens": 6},
        "answer": "gold",  # a random model is never right, and looks everywhere
        "redundant": True,
        "optimisation": {
            **written.optimisation.model_dump(),
            "per_device_train_batch_size": 2,
            "gradient_accumulation_steps": 1,
            "dataloader_num_workers": 0,
        },
    }
    if written.teacher is not None:
        changes |= {"teacher": {"url": server}}
    recipe = load_coldstart_recipe(path, **changes)
    backend = HFBackend.load(recipe.model, device="cpu", dtype="float32", protocol=recipe.protocol)
    backend.model.requires_grad_(False)
    table = coldstart.demonstrations(backend, recipe, tmp_path / "out")
    assert len(table) == 4 and set(table["crops"]) == {1}
    coldstart.fine_tune(backend, table, recipe, tmp_path / "out" / "train")
    backend.model.save_pretrained(tmp_path / "final")
    backend.processor.save_pretrained(tmp_path / "final")
    names = changed(model, tmp_path / "final")
    assert names and all("language_model" in name or "layers" in name for name in names)
