"""A base and its trained branches in one model folder."""

from importlib import resources
from pathlib import Path

from yaml import safe_dump

from qzoom_agent import Agent
from qzoom_agent.confidence import FILE
from qzoom_agent.models.presets import NANO_FOLDER
from qzoom_agent.perception.branches import SUBFOLDER
from qzoom_agent.training.branches.export import export_model
from qzoom_agent.training.branches.run_dir import copy_branches
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
