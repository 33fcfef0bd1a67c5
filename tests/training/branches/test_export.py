"""A base and its trained branches in one model folder."""

from importlib import resources
from pathlib import Path

from yaml import safe_dump

from qzoom_agent import Agent
from qzoom_agent.confidence import FILE
from qzoom_agent.models.hf import HFBackend
from qzoom_agent.models.presets import NANO_FOLDER, PRESETS
from qzoom_agent.perception.branch_config import SUBFOLDER
from qzoom_agent.perception.branches import Branches
from qzoom_agent.training.branches.export import export_model
from qzoom_agent.training.branches.run_dir import copy_branches
from tests.tiny_models import build
from tests.training.branches.test_branch_stages import RECIPE


def test_the_confidence_of_a_base_is_not_that_of_other_branches(tmp_path: Path) -> None:
    run, shipped = tmp_path / "run", tmp_path / "shipped"
    copy_branches(NANO_FOLDER, run / "calibrate" / "final")
    (run / "recipe.yaml").write_text(safe_dump({**RECIPE, "model": "nano"}))
    assert (NANO_FOLDER / FILE).exists()
    export_model(run, shipped)
    assert (shipped / SUBFOLDER / "branches.json").exists() and not (shipped / FILE).exists()
    image = Path(str(resources.files("qzoom_agent.data") / "demo" / "1-global.png"))
    answers = [Agent.from_pretrained(model, policy="direct").run(image, "which?") for model in ("nano", str(shipped))]
    assert str(answers[0]) == str(answers[1])
    assert answers[0].confidence is not None and answers[1].confidence is None


def test_a_model_of_known_settings_is_run_with_them_under_its_new_name(tmp_path: Path) -> None:
    """Its folder was known by its name. Thresholds are those of our branches, not of the published ones."""
    base, run, shipped = build("qwen3_vl", tmp_path / "Q-Zoom-Qwen3VL-4B"), tmp_path / "run", tmp_path / "mine"
    branches = Branches.from_base(HFBackend.load(str(base)).model, k=1, depth=1, gate_depth=1, gate_threshold=0.7)
    branches.save(run / "calibrate" / "final")
    (run / "recipe.yaml").write_text(safe_dump({**RECIPE, "model": str(base)}))
    export_model(run, shipped)
    preset, found = PRESETS["q-zoom-qwen3-vl-4b"], HFBackend.load(str(shipped))
    assert found.protocol == preset.protocol == "plain" and found.defaults == preset.budget
    assert found.settings["generation.max_new_tokens"] == preset.settings["generation.max_new_tokens"]
    assert "perception.gate_threshold" in preset.settings and "perception.gate_threshold" not in found.settings
    assert found.branches is not None and found.branches.config.gate_threshold == 0.7
