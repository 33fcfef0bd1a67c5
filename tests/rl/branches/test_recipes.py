"""Recipes of the branches: what they say is legal, and what it costs can be told without loading anything."""

from pathlib import Path

import pytest
from yaml import safe_load

import qzoom_agent.rl
from qzoom_agent.backends.presets import PRESETS
from qzoom_agent.cli.main import main as qzoom
from qzoom_agent.errors import ConfigError
from qzoom_agent.perception.labels import HEADS
from qzoom_agent.rl.branches.memory import SHAPES
from qzoom_agent.rl.branches.recipe import BranchRecipe, load_branch_recipe
from qzoom_agent.rl.branches.run import STAGES

FOLDER = Path(qzoom_agent.rl.__path__[0]) / "recipes"
RECIPES = sorted(FOLDER.rglob("branches.yaml"))
MINIMAL = "data: [{path: needle}]"


def named(path: Path) -> str:
    return path.parent.name


def test_there_is_one_for_each_of_the_published_bases() -> None:
    models = {load_branch_recipe(path).model for path in RECIPES}
    assert models == {"nano", "qwen2.5-vl-3b", "qwen2.5-vl-7b", "qwen3-vl-4b", "qwen3-vl-8b", "llava-1.5-7b"}
    assert models <= set(PRESETS) and models == set(SHAPES)


@pytest.mark.parametrize("path", RECIPES, ids=named)
def test_they_name_heads_that_are_there_and_hold_out_what_they_measure(path: Path) -> None:
    recipe = load_branch_recipe(path)
    if "published" in (recipe.labelling.grounding, recipe.labelling.sink):
        assert recipe.model in HEADS
    assert recipe.held_out
    learned = {(one.path, one.split, one.seed) for one in recipe.data}
    assert not learned & {(one.path, one.split, one.seed) for one in recipe.held_out}
    shape = SHAPES[recipe.model]
    assert recipe.k is not None and recipe.k + max(recipe.depth, recipe.gate_depth) <= shape.layers


@pytest.mark.parametrize("path", RECIPES, ids=named)
@pytest.mark.parametrize("stage", [*STAGES, "branches"])
def test_a_dry_run_tells_the_cost_and_makes_nothing(
    path: Path, stage: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert qzoom(["train", stage, "--config", str(path), "--dry-run", "--devices", "4"]) == 0
    told = capsys.readouterr().out
    resolved, _, plan = told.partition("model      ")
    assert BranchRecipe.model_validate(safe_load(resolved)) == load_branch_recipe(path)
    assert all(words in plan for words in ("rows ", "steps ", "tokens", "GB a device"))
    if stage in ("sdrpn", "postsft", "gate"):
        assert "on 4 devices" in plan
    assert list(tmp_path.iterdir()) == []


def test_the_published_settings() -> None:
    """Q-Zoom, arXiv 2604.06912, and its released scripts: batches of 128, 1e-4, K = 18, labels at .25 and .05."""
    recipe = load_branch_recipe(FOLDER / "qwen2_5_vl_7b" / "branches.yaml")
    how = recipe.sdrpn.optimisation
    assert (recipe.k, recipe.depth, recipe.gate_depth, recipe.positions) == (18, 3, 3, "aligned")
    assert how.learning_rate == 1e-4 and how.batch * how.accumulation * 4 == 128 and how.epochs == 1
    assert recipe.labelling.rules.foreground == 0.25 and recipe.labelling.rules.background == 0.05
    assert recipe.postsft.optimisation.learning_rate == 1e-6 and recipe.postsft.noise == 0.8


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("model: nano", "data"),
        (f"{MINIMAL}\nsurprise: 1", "surprise"),
        (f"{MINIMAL}\nsdrpn: {{optimisation: {{learning_rate: -1}}}}", "learning_rate"),
        (f"{MINIMAL}\ngate: {{tokens: [256, 64]}}", "ascend"),
        (f"{MINIMAL}\nstages: [sdrpn, dessert]", "stages"),
        (f"{MINIMAL}\nlabelling: {{grounding: published}}", "No heads are published for 'nano'"),
        (f"{MINIMAL}\nmodel: ./mine\nlabelling: {{sink: published}}", "labelling.published_for"),
        (f"{MINIMAL}\nlabelling: {{grounding: published, published_for: gpt}}", "published for 'gpt'"),
        ("[1, 2", "not YAML"),
        ("", "not valid"),
    ],
)
def test_a_wrong_recipe_is_refused_with_its_reason(tmp_path: Path, text: str, told: str) -> None:
    (tmp_path / "recipe.yaml").write_text(text)
    with pytest.raises(ConfigError, match=told):
        load_branch_recipe(tmp_path / "recipe.yaml")


def test_a_missing_recipe_and_another_base(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="Cannot read the recipe"):
        load_branch_recipe(tmp_path / "none.yaml")
    (tmp_path / "latin.yaml").write_bytes("model: nanó".encode("latin-1"))
    with pytest.raises(ConfigError, match="not text in UTF-8"):
        load_branch_recipe(tmp_path / "latin.yaml")
    (tmp_path / "recipe.yaml").write_text(MINIMAL)
    assert load_branch_recipe(tmp_path / "recipe.yaml", model="qwen2.5-vl-3b").model == "qwen2.5-vl-3b"
