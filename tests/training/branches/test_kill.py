"""Gate and post-SFT on nano at toy length, killed at a checkpoint: the same command goes on to the same weights."""

import json
import signal
import subprocess
import sys
from pathlib import Path
from shutil import copytree

import pytest
from safetensors.torch import load_file

from qzoom_agent.cli.main import main as qzoom
from tests.training.branches import killing
from tests.training.branches.test_branch_stages import EVERY_STEP, equal, weights, written
from tests.training.processes import ENVIRONMENT

pytestmark = pytest.mark.slow

HOW = {"per_device_train_batch_size": 2, "learning_rate": 1e-4, **EVERY_STEP}


@pytest.fixture(scope="module")
def begun(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A recipe, and an output folder with all that comes before both stages."""
    folder = tmp_path_factory.mktemp("kill")
    postsft = {"records": 8, "max_new_tokens": 2, "positions": "plain", "target": "gold", "optimisation": HOW}
    recipe = written(
        folder, peak_share=0.3, postsft={**postsft, "refit_records": 8, "refit": {**HOW, "learning_rate": 1e-3}}
    )
    for stage in ("select-heads", "label", "sdrpn"):
        assert qzoom(["train", stage, "--config", str(recipe), "--output", str(folder / "run")]) == 0
    return folder


@pytest.mark.parametrize("stage", ["gate", "postsft"])
def test_a_killed_stage_goes_on_to_the_same_weights(
    stage: str, begun: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole, killed = (copytree(begun / "run", tmp_path / name) for name in ("whole", "killed"))
    arguments = ["train", stage, "--config", str(begun / "recipe.yaml"), "--output"]
    script = [sys.executable, killing.__file__, "2", *arguments[1:], str(killed)]
    done = subprocess.run(script, env=ENVIRONMENT, capture_output=True, text=True, timeout=300)
    assert done.returncode == -signal.SIGKILL, done.stdout + done.stderr
    assert (killed / stage / "checkpoint-2" / "trainer_state.json").exists()
    assert not (killed / stage / "final").exists() and not (killed / stage / "base").exists()
    killing.make_up(monkeypatch.setattr)
    for output in (whole, killed):
        assert qzoom([*arguments, str(output)]) == 0
    steps = {out: [json.loads(line)["step"] for line in (out / stage / "log.jsonl").open()] for out in (whole, killed)}
    assert steps[whole] == steps[killed] == list(range(1, 1 + len(steps[whole]))) and len(steps[whole]) > 2
    assert equal(weights(whole / stage / "final"), weights(killed / stage / "final"))
    assert not equal(weights(whole / "sdrpn" / "final"), weights(whole / stage / "final"))
    if stage == "postsft":
        bases = [load_file(out / "postsft" / "base" / "model.safetensors") for out in (whole, killed)]
        assert equal(*bases)
