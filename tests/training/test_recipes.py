"""Every recipe in the repository can be run: it loads, names what exists, and stays away from the validation boards."""

from collections.abc import Callable
from inspect import signature
from pathlib import Path

import pytest
from accelerate.commands.config.config_args import ClusterConfig
from pydantic import BaseModel
from yaml import safe_dump, safe_load

import train_nano as base
from nano import examples
from nano.batches import KINDS, VALIDATION_SEED, table, trees_of
from nano.heads import TOLD
from nano.tokenizer import build_tokenizer
from qzoom_agent.errors import ConfigError
from qzoom_agent.evaluation.tasks.needle import FIRST_SEED, sample
from qzoom_agent.evaluation.tasks.needle.boards import Board, draw_board
from qzoom_agent.images import digest
from qzoom_agent.training.branches.branch_recipe import load_branch_recipe
from qzoom_agent.training.branches.dataset import NEEDLE_SEED, NEEDLE_SPAN
from qzoom_agent.training.grpo import launch as grpo
from qzoom_agent.training.grpo.grpo_recipe import load_grpo_recipe
from qzoom_agent.training.recipe_io import read_recipe
from qzoom_agent.training.sft.sft_recipe import load_coldstart_recipe
from reproduce import Chain
from tests.cases import each_case
from train_nano import BaseRecipe, load_recipe

FOLDER = Path(__file__).resolve().parents[2] / "rl" / "recipes"
ACCELERATE = sorted((FOLDER / "accelerate").glob("*.yaml"))
RECIPES = sorted({*FOLDER.rglob("*.yaml")} - {*ACCELERATE})
LOADERS: dict[str, Callable[[Path], BaseModel]] = {
    "base": load_recipe,
    "branches": load_branch_recipe,
    "coldstart": load_coldstart_recipe,
    "grpo": load_grpo_recipe,
    "all": lambda path: read_recipe(path, Chain),
}
"""How the recipes of a stage are read, by file name up to the first underscore: a new stage adds its own."""
BASE = [path for path in RECIPES if path.stem == "base"]
MINIMAL = "stages: [{name: one, steps: 4, mix: {crops: 1.0}, learning_rate: 1.0e-3}]"
EVERY = ("log_steps", "save_steps", "validate_steps", "validate_batches")
LOSSES = {"read", "glyphs", "lines", "answer", "place", "aim", "tally", *TOLD}


def named(path: Path) -> str:
    return str(path.relative_to(FOLDER))


@each_case("path", RECIPES)
def test_every_recipe_loads(path: Path) -> None:
    assert LOADERS[path.stem.partition("_")[0]](path)


@pytest.mark.parametrize("path", ACCELERATE, ids=named)
def test_every_launch_configuration_is_one_that_accelerate_reads(path: Path) -> None:
    kind = ClusterConfig.from_yaml_file(path)
    assert kind.num_processes > 1 and kind.mixed_precision == "bf16"


@pytest.mark.parametrize("path", BASE, ids=named)
def test_base_recipes_name_what_exists(path: Path) -> None:
    recipe = load_recipe(path)
    names = [stage.name for stage in recipe.stages]
    assert len(set(names)) == len(names) > 0
    for stage in recipe.stages:
        assert set(stage.mix) <= set(KINDS)
        assert all(share > 0 for share in stage.mix.values())
        assert set(stage.weights) <= LOSSES
        assert stage.warmup_steps < stage.steps
    assert set(recipe.validate_kinds) <= set(KINDS)
    assert recipe.validate_batches > 0


@pytest.fixture
def boards_of(monkeypatch: pytest.MonkeyPatch) -> Callable[[int], set[tuple[str, int]]]:
    """Split and seed of the boards that a batch draws."""
    drawn: set[tuple[str, int]] = set()

    def draw(layout: str, seed: int, *, split: str, notes: int = 0) -> Board:
        drawn.add((split, seed))
        return draw_board(layout, seed, split=split, notes=notes)

    def boards(batch: int) -> set[tuple[str, int]]:
        drawn.clear()
        trees_of("board144", batch)  # the kind with most boards
        return set(drawn)

    monkeypatch.setattr(examples, "draw_board", draw)
    return boards


def last_batch(recipe: BaseRecipe, index: int) -> int:
    """The highest seed among the rows that a stage trains on."""
    stage = recipe.stages[index]
    rows = table(stage.mix, steps=stage.steps, seed=recipe.seed * 100 + index, tokenizer=build_tokenizer())
    return max(rows.with_format(None)["seed"])


@pytest.mark.parametrize("path", BASE, ids=named)
def test_base_recipes_train_on_boards_that_nothing_else_uses(
    path: Path, boards_of: Callable[[int], set[tuple[str, int]]]
) -> None:
    recipe = load_recipe(path)
    last = max(last_batch(recipe, index) for index in range(len(recipe.stages)))
    trained, validated = boards_of(last), boards_of(VALIDATION_SEED)
    assert {split for split, _ in trained | validated} == {"train"}
    highest = max(seed for _, seed in trained)
    assert highest < min(seed for _, seed in validated), "validation"
    assert highest < NEEDLE_SEED or min(seed for _, seed in trained) > 60 * NEEDLE_SPAN, "branch training"


def test_a_board_of_training_is_another_one_in_evaluation() -> None:
    one, other = (sample("needle-doc", FIRST_SEED, split=split) for split in ("train", "test"))
    assert digest(one.image) != digest(other.image)
    assert signature(sample).parameters["split"].default == "test"


@pytest.mark.parametrize("path", BASE, ids=named)
def test_a_dry_run_prints_the_resolved_recipe(path: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert base.main(["--config", str(path), "--output", str(tmp_path / "out"), "--dry-run"]) == 0
    printed = safe_load(capsys.readouterr().out)
    assert BaseRecipe.model_validate(printed) == load_recipe(path)
    assert set(printed) == set(BaseRecipe.model_fields), "every default is printed"
    assert not (tmp_path / "out").exists()


def one(**stage: object) -> str:
    """A recipe of one stage with these settings."""
    stage = {"name": "one", "steps": 4, "mix": {"crops": 1.0}, "learning_rate": 1.0e-3} | stage
    return safe_dump({"stages": [stage]})


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (MINIMAL + "\nlearning_rate: 1.0", "no key 'learning_rate'"),
        (one(lr=1), r"no key 'stages\.0\.lr'"),
        (one(steps=0), r"stages\.0\.steps"),
        (one(learning_rate=-1), r"stages\.0\.learning_rate"),
        (one(mix=None), r"stages\.0\.mix"),
        (one(mix={}), r"stages\.0\.mix': Dictionary should have at least 1"),
        (one(mix={"books": 1.0}), r"stages\.0\.mix\.books'.* Input should be 'print', 'pages'"),
        (
            one(weights={"style": 1.0}),
            r"stages\.0\.weights\.style'.* Input should be 'answer', 'read', 'place', 'focus'",
        ),
        (one(schedule="sometimes"), r"stages\.0\.schedule': Input should be 'linear', 'cosine'"),
        (one(warmup_steps=-1), r"stages\.0\.warmup_steps"),
        (one(tower_share=-0.5), r"stages\.0\.tower_share"),
        (MINIMAL + "\nseed: 5", r"seed': Input should be less than 5"),
        (MINIMAL + "\nseed: -1", r"seed': Input should be greater than or equal to 0"),
        *((MINIMAL + f"\n{name}: 0", rf"{name}': Input should be greater than 0") for name in EVERY),
        (MINIMAL + "\nvalidate_kinds: [books]", r"validate_kinds\.0': Input should be 'print', 'pages'"),
        ("stages: []", r"stages': List should have at least 1"),
        (MINIMAL[:-1] + ", " + MINIMAL[9:], r"stages: .*a name of its own; got one, one"),
        ("stages: [{name: one, steps: 4, learning_rate: 1.0}]", r"lacks the key 'stages\.0\.mix'"),
        ("seed: 1", r"lacks the key 'stages'"),
        ("", "valid"),
    ],
)
def test_a_bad_recipe_says_what_is_wrong(tmp_path: Path, text: str, said: str) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text(text)
    with pytest.raises(ConfigError, match=said) as raised:
        load_recipe(path)
    assert str(path) in str(raised.value)


def test_grpo_takes_another_seed(capsys: pytest.CaptureFixture[str]) -> None:
    assert grpo.main(["--config", str(FOLDER / "nano" / "grpo.yaml"), "--seed", "1", "--steps", "3", "--dry-run"]) == 0
    printed = safe_load(capsys.readouterr().out.partition("\nmodel  ")[0])
    assert (printed["seed"], printed["max_steps"]) == (1, 3)


def test_a_recipe_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"Cannot read the recipe .*none\.yaml: No such file"):
        load_recipe(tmp_path / "none.yaml")


@pytest.mark.parametrize(
    ("content", "said"),
    [(b"stages: [", r": while parsing(.|\n)*line 1"), (("# gr\u00f6\u00dfer\n" + MINIMAL).encode("latin-1"), "")],
)
def test_a_recipe_that_is_not_yaml_in_utf_8(content: bytes, said: str, tmp_path: Path) -> None:
    (tmp_path / "mine.yaml").write_bytes(content)
    with pytest.raises(ConfigError, match=r"mine\.yaml is not YAML in UTF-8" + said):
        load_recipe(tmp_path / "mine.yaml")


@pytest.mark.parametrize("seed", [0, 4])
def test_no_seed_reaches_the_validation_boards(seed: int, boards_of: Callable[[int], set[tuple[str, int]]]) -> None:
    recipe = BaseRecipe.model_validate(safe_load(one(steps=100)) | {"seed": seed})
    stage = recipe.stages[0]
    recipe = recipe.model_copy(update={"stages": [stage] * 100})
    trained, validated = boards_of(last_batch(recipe, 99)), boards_of(VALIDATION_SEED)
    assert max(seed for _, seed in trained) < min(seed for _, seed in validated)


def test_an_output_that_is_a_file_is_named(tmp_path: Path) -> None:
    (tmp_path / "mine.yaml").write_text(MINIMAL)
    with pytest.raises(ConfigError, match=r"Cannot write into .*mine\.yaml: .* Choose another folder"):
        base.main(["--config", str(tmp_path / "mine.yaml"), "--output", str(tmp_path / "mine.yaml")])


def test_an_unknown_stage_is_named(tmp_path: Path) -> None:
    (tmp_path / "mine.yaml").write_text(MINIMAL)
    options = ["--config", str(tmp_path / "mine.yaml"), "--output", str(tmp_path / "out")]
    with pytest.raises(ConfigError, match=r"no stage 'two'. Its stages are: one"):
        base.main([*options, "--stage", "two"])
    assert not (tmp_path / "out").exists()
