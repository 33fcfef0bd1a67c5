"""`qzoom train branches` from end to end on nano at toy length, killed, and on two processes."""

import json
import shutil
import signal
import subprocess
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import load_from_disk
from safetensors.torch import load_file
from yaml import safe_dump

from qzoom_agent.agent import Agent
from qzoom_agent.cli.main import main as qzoom
from qzoom_agent.config import AgentConfig
from qzoom_agent.models.hf import HFBackend
from qzoom_agent.models.presets import NANO_FOLDER
from qzoom_agent.perception.branch_config import branch_folder
from qzoom_agent.perception.branches import Branches
from qzoom_agent.training.branches import stages
from qzoom_agent.training.branches.dataset import DatasetSpec, load_records
from qzoom_agent.training.branches.export import export_model
from tests.training.branches import killing
from tests.training.processes import finished, start

EVERY_STEP = {"save_steps": 1, "logging_steps": 1, "dataloader_num_workers": 0}
RECIPE: dict[str, Any] = {
    "model": "nano",
    "k": 5,
    "depth": 1,
    "gate_depth": 1,
    "stages": ["select-heads", "label", "sdrpn", "gate", "calibrate"],
    "data": [{"path": "needle", "limit": 16, "a_board": 8}],
    "held_out": [{"path": "needle", "limit": 12, "a_board": 4, "seed": 1}],
    "heads": {"records": 8, "count": 2},
    "labelling": {"tokens": 25, "asking": "prediction", "keep": "all", "max_new_tokens": 4},
    "sdrpn": {
        "tokens": [16, 25],
        "optimisation": {"per_device_train_batch_size": 4, "learning_rate": 1e-3, **EVERY_STEP},
    },
    "gate": {
        "tokens": [16, 25],
        "read_tokens": [16, 25],
        "with_crop": True,
        "records": 16,
        "max_new_tokens": 4,
        "optimisation": {"per_device_train_batch_size": 4, **EVERY_STEP},
    },
}


def written(folder: Path, **changes: Any) -> Path:
    file = folder / "recipe.yaml"
    file.write_text(safe_dump({**RECIPE, **changes}))
    return file


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(branch_folder(folder) / "branches.safetensors")


def equal(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(value, other[name]) for name, value in one.items())


@pytest.fixture(scope="module")
def three_stages(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An output folder in which SD-RPN is trained."""
    folder = tmp_path_factory.mktemp("three")
    recipe = written(folder, stages=["select-heads", "label", "sdrpn"])
    assert qzoom(["train", "branches", "--config", str(recipe), "--output", str(folder / "out")]) == 0
    return folder / "out"


def test_the_stages_of_sdrpn_in_order(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A fresh run, then the same command again, which does nothing; the base that ships is untouched."""
    before = (NANO_FOLDER / "model.safetensors").read_bytes()
    stages = ["select-heads", "label", "sdrpn", "calibrate"]
    recipe, out = written(tmp_path, stages=stages), tmp_path / "out"
    command = ["train", "branches", "--config", str(recipe), "--output", str(out)]
    assert qzoom(command) == 0
    told = capsys.readouterr().out
    assert "attention inside boxes" in told and "recall" in told and "training-free gate" in told
    assert (NANO_FOLDER / "model.safetensors").read_bytes() == before
    config = json.loads((out / "calibrate" / "final" / "branches.json").read_text())
    assert config["k"] == 5 and config["depth"] == 1 and config["evidence"]["questions"] == 12
    assert config["peak_share"] == config["evidence"]["threshold"]
    assert config["max_regions"] == 2
    metrics = json.loads((out / "sdrpn" / "final" / "metrics.json").read_text())
    assert {row["tokens"] for row in metrics} == {16, 25} and all(row["n"] == metrics[0]["n"] for row in metrics)
    backend = HFBackend.load("nano", branches=out / "calibrate" / "final")
    assert backend.perceives and backend.branches is not None and backend.branches.gate is None
    assert qzoom(command) == 0
    assert capsys.readouterr().out.count("is there already") == 4


@pytest.mark.slow
def test_a_gate_is_added_to_sdrpn(three_stages: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    recipe, out = written(tmp_path), shutil.copytree(three_stages, tmp_path / "out")
    killing.make_up(monkeypatch.setattr)
    assert qzoom(["train", "gate", "--config", str(recipe), "--output", str(out)]) == 0
    before, after = weights(out / "sdrpn" / "final"), weights(out / "gate" / "final")
    assert equal(before, {name: value for name, value in after.items() if name.startswith("sdrpn")})
    assert any(name.startswith("gate.") for name in after)
    assert qzoom(["train", "calibrate", "--config", str(recipe), "--output", str(out)]) == 0
    config = json.loads((out / "calibrate" / "final" / "branches.json").read_text())
    assert config["gate_threshold"] == config["evidence"]["gate"]["threshold"]
    backend = HFBackend.load("nano", branches=out / "calibrate" / "final")
    assert isinstance(backend.branches, Branches) and backend.branches.gate is not None


def test_stages_out_of_order_say_what_is_missing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    recipe = str(written(tmp_path))
    for stage, told in (("sdrpn", "select-heads"), ("gate", "no branches of sdrpn"), ("calibrate", "no branches")):
        assert qzoom(["train", stage, "--config", recipe, "--output", str(tmp_path / "out")]) == 2
        assert told in capsys.readouterr().err


@pytest.mark.slow
def test_a_base_that_no_crop_hurts_is_left_as_it_is(
    three_stages: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = written(tmp_path, postsft={"records": 4, "max_new_tokens": 2, "positions": "plain"})
    out = shutil.copytree(three_stages, tmp_path / "out")
    monkeypatch.setattr(stages, "choose_cases", lambda cases, stage, seed: [])
    assert qzoom(["train", "postsft", "--config", str(recipe), "--output", str(out)]) == 0
    assert "nothing to learn" in capsys.readouterr().out
    assert not (out / "postsft" / "base").exists() and not (out / "postsft" / "final").exists()


@pytest.mark.slow
def test_a_base_that_crops_hurt_is_tuned_refitted_calibrated_and_shipped(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """With cases that are made up: at toy length no crop hurts. Questions of the stage's own data, of two sources."""
    fast = {"learning_rate": 1e-3, "per_device_train_batch_size": 2, **EVERY_STEP}
    sources = [{"path": "needle", "limit": limit, "seed": seed} for limit, seed in ((12, 2), (4, 3))]
    postsft = {"data": sources, "records": 8, "refit_records": 6, "max_new_tokens": 2, "positions": "plain"}
    recipe = written(
        tmp_path,
        stages=["select-heads", "label", "sdrpn", "postsft", "calibrate"],
        peak_share=0.2,
        box=[0.3, 0.225],  # always a proposal
        labelling={**RECIPE["labelling"], "rules": {"blur_kernel": 1, "area_limit": 1.0, "least_peak": 0.0}},
        postsft={**postsft, "optimisation": fast, "refit": fast},
    )
    out, shipped = tmp_path / "out", tmp_path / "shipped"
    command = ["train", "branches", "--config", str(recipe), "--output", str(out)]
    monkeypatch.setattr(stages, "choose_cases", lambda cases, stage, seed: [0, 5, 7])
    assert qzoom(command) == 0
    assert "3 of 8 cases to learn from" in capsys.readouterr().out
    cases = load_from_disk(str(out / "postsft" / "cases"))
    assert [name[: len("needle-8")] for name in cases["image_id"]] == ["needle-8"] * 6 + ["needle-9"] * 2

    stock, tuned = (load_file(folder / "model.safetensors") for folder in (NANO_FOLDER, out / "postsft" / "base"))
    changed = {name for name in stock if not torch.equal(stock[name], tuned[name])}
    assert stock.keys() == tuned.keys() and changed
    assert all(name.startswith(("model.layers", "lm_head")) for name in changed)
    assert len(load_from_disk(str(out / "postsft" / "labels"))) == 6
    assert not equal(weights(out / "sdrpn" / "final"), weights(out / "postsft" / "final"))

    # a run that was killed after the base was written goes on with the base that is there
    (out / "postsft" / "final").rename(tmp_path / "first")
    monkeypatch.setattr(stages, "choose_cases", lambda *_, **__: pytest.fail("the base is there"))
    (out / "postsft" / "fit").rename(tmp_path / "fit")
    assert qzoom(command) == 0
    assert equal(weights(tmp_path / "first"), weights(out / "postsft" / "final"))

    export_model(out, shipped)
    assert equal(load_file(shipped / "model.safetensors"), tuned)
    assert equal(weights(shipped), weights(out / "calibrate" / "final"))
    backend = HFBackend.load(str(shipped), device="cpu", dtype="float32")
    looking = HFBackend.load(str(out / "postsft" / "base"), branches=out / "calibrate" / "final", device="cpu")
    for one in (backend, looking):
        assert one.perceives
    board = load_records([DatasetSpec(path="needle", limit=1, seed=1)])[0]
    agents = [Agent(one, config=AgentConfig(policy="always")) for one in (backend, looking)]
    traces = [agent.run(board.image, board.question).trace for agent in agents]
    assert [view.kind for view in traces[0].views] == ["original", "coarse", "crop"]
    assert traces[0].turns[0].answer == traces[1].turns[0].answer


def run(folder: Path, recipe: Path, stage: str = "branches", *, processes: int = 1) -> subprocess.Popen[str]:
    line = (stage, "--config", str(recipe), "--output", str(folder))
    return start("qzoom_agent.training.branches.stages", *line, processes=processes)


@pytest.mark.slow
def test_a_killed_run_goes_on_to_the_same_weights(tmp_path: Path) -> None:
    """Killed (SIGKILL) as soon as the first checkpoint of SD-RPN is whole; the second run starts from there."""
    recipe = written(tmp_path, stages=["select-heads", "label", "sdrpn"])
    finished(run(tmp_path / "whole", recipe))
    killed = run(tmp_path / "killed", recipe)
    checkpoint = tmp_path / "killed" / "sdrpn" / "fit" / "checkpoint-1" / "trainer_state.json"
    until = time.monotonic() + 240
    while not checkpoint.exists() and time.monotonic() < until and killed.poll() is None:
        time.sleep(0.01)
    killed.send_signal(signal.SIGKILL)
    killed.wait()
    assert checkpoint.exists() and not (tmp_path / "killed" / "sdrpn" / "final").exists()
    told = finished(run(tmp_path / "killed", recipe))
    assert "is there already" in told and '"step": 1,' not in told
    assert equal(weights(tmp_path / "whole" / "sdrpn" / "final"), weights(tmp_path / "killed" / "sdrpn" / "final"))


@pytest.mark.slow
def test_two_processes_share_the_work(tmp_path: Path) -> None:
    """What `accelerate launch` starts on two devices: half the steps, one result, and the same table of labels."""
    recipe = written(
        tmp_path, stages=["select-heads", "label", "sdrpn"], data=[{"path": "needle", "limit": 160, "a_board": 8}]
    )
    told = finished(run(tmp_path / "two", recipe, processes=2))
    one = finished(run(tmp_path / "one", recipe))
    assert told.count("written") == one.count("written") == 1
    steps = [json.loads(line)["of"] for line in told.splitlines() if line.startswith("{")]
    alone = [json.loads(line)["of"] for line in one.splitlines() if line.startswith("{")]
    assert len(set(steps)) == len(set(alone)) == 1 and steps[0] == -(-alone[0] // 2)
    # the labels of both are those of the same questions
    tables = [load_from_disk(str(tmp_path / name / "labels")) for name in ("one", "two")]
    assert tables[0]["answer"][:] == tables[1]["answer"][:]
    found = [weights(tmp_path / name / "sdrpn" / "final") for name in ("one", "two")]
    assert not equal(*found)  # larger batches


@pytest.mark.slow
def test_two_processes_calibrate_by_answers(tmp_path: Path, boxless: Path) -> None:
    """Where no box is known the held-out questions are answered, which all processes have to share."""
    gate = {**RECIPE["gate"], "max_new_tokens": 8}
    recipe = written(tmp_path, held_out=[{"path": str(boxless)}], gate=gate, max_regions=1)
    configs = []
    for name, processes in (("two", 2), ("one", 1)):
        final = tmp_path / name / "sdrpn" / "final"
        final.mkdir(parents=True)
        for file in ("branches.json", "branches.safetensors"):
            shutil.copy(NANO_FOLDER / "branches" / file, final)
        told = finished(run(tmp_path / name, recipe, "calibrate", processes=processes))
        assert told.count("of which need a zoom") == told.count("written") == 1
        configs.append((tmp_path / name / "calibrate" / "final" / "branches.json").read_text())
    assert configs[0] == configs[1]
    assert 0 < json.loads(configs[0])["evidence"]["needing"] < 8
