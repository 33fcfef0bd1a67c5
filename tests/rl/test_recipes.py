"""Every recipe in the repository can be run: it loads, names what exists, and stays away from the validation boards."""

from collections.abc import Callable
from pathlib import Path

import pytest
from pydantic import BaseModel
from transformers import SchedulerType
from yaml import safe_load

import qzoom_agent.rl
from qzoom_agent.errors import ConfigError
from qzoom_agent.rl import base
from qzoom_agent.rl.base import BaseRecipe, load_recipe
from qzoom_agent.rl.nano.batches import KINDS, VALIDATION_SEED

FOLDER = Path(qzoom_agent.rl.__path__[0]) / "recipes"
RECIPES = sorted(FOLDER.rglob("*.yaml"))
LOADERS: dict[str, Callable[[Path], BaseModel]] = {"base": load_recipe}
"""How the recipes of a stage are read, by file name: a new stage adds its own."""
BASE = [path for path in RECIPES if path.stem == "base"]
MINIMAL = "stages: [{name: one, steps: 4, mix: {crops: 1.0}, learning_rate: 1.0e-3}]"
LOSSES = {"read", "answer", "place"}


def named(path: Path) -> str:
    return str(path.relative_to(FOLDER))


@pytest.mark.parametrize("path", RECIPES, ids=named)
def test_every_recipe_loads(path: Path) -> None:
    assert LOADERS[path.stem](path)


@pytest.mark.parametrize("path", BASE, ids=named)
def test_base_recipes_name_what_exists(path: Path) -> None:
    recipe = load_recipe(path)
    names = [stage.name for stage in recipe.stages]
    assert len(set(names)) == len(names) > 0
    for stage in recipe.stages:
        assert set(stage.mix) <= set(KINDS)
        assert all(share > 0 for share in stage.mix.values())
        assert set(stage.weights) <= LOSSES
        assert stage.schedule in {kind.value for kind in SchedulerType}
        assert stage.warmup_steps < stage.steps
    assert set(recipe.validate_kinds) <= set(KINDS)
    assert recipe.validate_batches > 0


@pytest.mark.parametrize("path", BASE, ids=named)
def test_base_recipes_never_train_on_validation_boards(path: Path) -> None:
    recipe = load_recipe(path)
    last = max((recipe.seed * 100 + index) * 1_000_000 + stage.steps - 1 for index, stage in enumerate(recipe.stages))
    assert last < VALIDATION_SEED


@pytest.mark.parametrize("path", BASE, ids=named)
def test_a_dry_run_prints_the_resolved_recipe(path: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert base.main(["--config", str(path), "--output", str(tmp_path / "out"), "--dry-run"]) == 0
    printed = safe_load(capsys.readouterr().out)
    assert BaseRecipe.model_validate(printed) == load_recipe(path)
    assert set(printed) == set(BaseRecipe.model_fields), "every default is printed"
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (MINIMAL + "\nlearning_rate: 1.0", r"learning_rate\s+Extra inputs"),
        ("stages: [{name: one, steps: 4, mix: {crops: 1.0}, learning_rate: 1.0e-3, lr: 1}]", r"stages\.0\.lr\s+Extra"),
        ("stages: [{name: one, steps: 0, mix: {crops: 1.0}, learning_rate: 1.0e-3}]", r"stages\.0\.steps"),
        ("stages: [{name: one, steps: 4, mix: {crops: 1.0}, learning_rate: -1}]", r"stages\.0\.learning_rate"),
        ("stages: [{name: one, steps: 4, learning_rate: 1.0}]", r"stages\.0\.mix\s+Field required"),
        ("seed: 1", r"stages\s+Field required"),
        ("", "valid"),
    ],
)
def test_a_bad_recipe_says_what_is_wrong(tmp_path: Path, text: str, said: str) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text(text)
    with pytest.raises(ConfigError, match=said) as raised:
        load_recipe(path)
    assert str(path) in str(raised.value)


def test_a_recipe_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"Cannot read the recipe .*none\.yaml: No such file"):
        load_recipe(tmp_path / "none.yaml")


@pytest.mark.xfail(strict=True, reason="load_recipe lets the parser's own error through")
def test_a_recipe_that_is_not_yaml(tmp_path: Path) -> None:
    (tmp_path / "mine.yaml").write_text("stages: [")
    with pytest.raises(ConfigError, match="not valid"):
        load_recipe(tmp_path / "mine.yaml")


def test_an_unknown_stage_is_named(tmp_path: Path) -> None:
    (tmp_path / "mine.yaml").write_text(MINIMAL)
    options = ["--config", str(tmp_path / "mine.yaml"), "--output", str(tmp_path / "out")]
    with pytest.raises(ConfigError, match=r"no stage 'two'. Its stages are: one"):
        base.main([*options, "--stage", "two"])
    assert not (tmp_path / "out").exists()
