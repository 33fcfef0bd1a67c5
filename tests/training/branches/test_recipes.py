"""Recipes of the branches: what they say is legal, and what it costs can be told without loading anything."""

from pathlib import Path

import pytest
from yaml import safe_load

from qzoom_agent.cli.main import main as qzoom
from qzoom_agent.errors import ConfigError
from qzoom_agent.models.presets import PRESETS
from qzoom_agent.perception.labels import HEADS
from qzoom_agent.training.branches.branch_recipe import BranchRecipe, load_branch_recipe
from qzoom_agent.training.branches.cost_estimate import SHAPES
from qzoom_agent.training.branches.proposals import higher_budgets
from qzoom_agent.training.branches.stages import STAGES

FOLDER = Path(__file__).resolve().parents[3] / "rl" / "recipes"
RECIPES = sorted(FOLDER.rglob("branches*.yaml"))
MINIMAL = "data: [{path: needle}]"


def named(path: Path) -> str:
    return f"{path.parent.name}/{path.stem}"


def test_there_is_one_for_each_of_the_published_bases() -> None:
    models = {load_branch_recipe(path).model for path in RECIPES}
    assert models == {
        "nano",
        "nano-paper",
        "qwen2.5-vl-3b",
        "qwen2.5-vl-7b",
        "qwen3-vl-4b",
        "qwen3-vl-8b",
        "llava-1.5-7b",
    }
    assert models <= set(PRESETS) and models == set(SHAPES)


@pytest.mark.parametrize("path", RECIPES, ids=named)
def test_they_name_heads_that_are_there_and_hold_out_what_they_measure(path: Path) -> None:
    recipe = load_branch_recipe(path)
    if "published" in (recipe.labelling.grounding, recipe.labelling.sink):
        assert recipe.model in HEADS
    assert recipe.held_out
    learned = {(one.path, one.split, one.seed) for stage in recipe.stages for one in recipe.asked(stage)}
    assert not learned & {(one.path, one.split, one.seed) for one in recipe.held_out}
    shape = SHAPES[recipe.model]
    assert recipe.k is not None and recipe.k + max(recipe.depth, recipe.gate_depth) <= shape.layers


def beside_its_tables(path: Path, folder: Path, monkeypatch: pytest.MonkeyPatch) -> BranchRecipe:
    """Return a recipe, in a working folder with the tables that are made before it is run."""
    monkeypatch.chdir(folder)
    recipe = load_branch_recipe(path)
    for source in (*recipe.data, *recipe.held_out):
        if source.path.startswith("runs/"):
            Path(source.path).parent.mkdir(parents=True)
            Path(source.path).write_text('{"image": "a.png", "question": "which?", "answer": "this"}\n')
    return recipe


@pytest.mark.parametrize(
    ("path", "stage"),
    [
        pytest.param(
            path,
            stage,
            id=f"{named(path)}-{stage}",
            # by default all stages of one recipe, and of the others their run as a whole
            marks=() if stage == "branches" or path == RECIPES[0] else pytest.mark.slow,
        )
        for path in RECIPES
        for stage in (*STAGES, "branches")
    ],
)
def test_a_dry_run_tells_the_cost_and_makes_nothing(
    path: Path, stage: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = beside_its_tables(path, tmp_path, monkeypatch)
    before = sorted(tmp_path.rglob("*"))
    assert qzoom(["train", stage, "--config", str(path), "--dry-run", "--devices", "4"]) == 0
    told = capsys.readouterr().out
    resolved, _, plan = told.partition("model      ")
    assert BranchRecipe.model_validate(safe_load(resolved)) == recipe
    assert all(words in plan for words in ("rows ", "steps ", "tokens", "GB a device"))
    if stage in ("sdrpn", "postsft", "gate"):
        assert "on 4 devices" in plan
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.parametrize("path", RECIPES, ids=named)
def test_what_is_held_out_can_tell_which_questions_need_a_zoom(path: Path) -> None:
    """By its boxes; else by answers with more detail than the look has, and then no target of boxes is stated."""
    recipe = load_branch_recipe(path)
    budget = PRESETS[recipe.model].budget
    if any(one.path != "needle" for one in recipe.held_out):
        higher = higher_budgets(recipe, recipe.calibration.tokens or budget.coarse_max_tokens)
        assert higher or recipe.gate.with_crop
        assert "box_recall" not in recipe.calibration.model_fields_set


def test_the_published_settings() -> None:
    """Q-Zoom, arXiv 2604.06912, and its released scripts: batches of 128, 1e-4, K = 18, labels at .25 and .05."""
    recipe = load_branch_recipe(FOLDER / "qwen2_5_vl_7b" / "branches.yaml")
    how = recipe.sdrpn.optimisation
    assert (recipe.k, recipe.depth, recipe.gate_depth, recipe.positions) == (18, 3, 3, "aligned")
    assert how.learning_rate == 1e-4 and how.num_train_epochs == 1
    assert how.per_device_train_batch_size * how.gradient_accumulation_steps * 4 == 128
    assert recipe.labelling.rules.foreground == 0.25 and recipe.labelling.rules.background == 0.05
    assert recipe.postsft.optimisation.learning_rate == 1e-6 and recipe.postsft.noise == 0.8


def test_published_pools_have_the_published_sizes() -> None:
    """185,000 labels; 129,000 questions for the gate; of post-SFT's 154,000 those that are to be had."""
    recipe = load_branch_recipe(FOLDER / "qwen2_5_vl_7b" / "branches.yaml")
    sizes = {stage: [one.limit or 0 for one in recipe.asked(stage)] for stage in recipe.stages}
    assert sum(sizes["label"]) == 185_000 and sum(sizes["gate"]) == 129_000
    assert sizes["postsft"] == [34_000, 28_000, 33_000]
    llava = load_branch_recipe(FOLDER / "llava_1_5_7b" / "branches.yaml")
    assert sum(one.limit or 0 for one in llava.data) == 152_000


@pytest.mark.parametrize("path", RECIPES, ids=named)
def test_questions_of_hub_datasets_ask_for_the_short_answer_that_they_are_compared_with(path: Path) -> None:
    recipe = load_branch_recipe(path)
    sources = [one for stage in recipe.stages for one in recipe.asked(stage)] + recipe.held_out
    for one in sources:
        ours = one.is_needle or one.path.startswith("runs/")  # a table whose answers are as they are printed
        assert ours or one.suffix == "\nAnswer the question using a single word or phrase.", one.path


@pytest.mark.parametrize("path", RECIPES, ids=named)
def test_the_stages_are_those_that_the_header_tells_of(
    path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    header = "".join(line for line in path.read_text().splitlines() if line.startswith("#"))
    without = "without post-SFT" in header or "No stage postsft" in header
    recipe = beside_its_tables(path, tmp_path, monkeypatch)
    assert ("postsft" in recipe.stages) is not without
    assert without is (path.parent.name in ("llava_1_5_7b", "nano"))
    assert qzoom(["train", "branches", "--config", str(path), "--dry-run"]) == 0
    assert ("stage        postsft" in capsys.readouterr().out) is not without


def test_a_stage_may_have_data_of_its_own(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    own = "gate: {data: [{path: needle, limit: 70, seed: 2}], records: 90}"
    (tmp_path / "recipe.yaml").write_text(f"data: [{{path: needle, limit: 50}}]\n{own}\npostsft: {{records: 20}}")
    for stage, rows in (("sdrpn", "50 at most"), ("postsft", "20 answered"), ("gate", "70 answered")):
        assert qzoom(["train", stage, "--config", str(tmp_path / "recipe.yaml"), "--dry-run"]) == 0
        assert f"rows         {rows} " in capsys.readouterr().out


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("model: nano", "data"),
        (f"{MINIMAL}\nsurprise: 1", "surprise"),
        (f"{MINIMAL}\nsdrpn: {{optimisation: {{learning_rate: -1}}}}", "learning_rate"),
        (f"{MINIMAL}\ngate: {{tokens: [256, 64]}}", "ascend"),
        (f"{MINIMAL}\ngate: {{read_tokens: []}}", "read_tokens"),
        (f"{MINIMAL}\nsdrpn: {{tokens: []}}", "sdrpn.tokens"),
        (f"{MINIMAL}\nregions: {{tokens: [64, 0]}}", "regions.tokens"),
        (f"{MINIMAL}\nfurther: {{tokens: [-1]}}", "further.tokens"),
        (f"{MINIMAL}\npostsft: {{noise_side: [0.5, 1.5]}}", "noise_side"),
        (f"{MINIMAL}\nlabelling: {{grounding: {{}}}}", "labelling.grounding"),
        ("data: [{path: needle, tasks: [needle-scene, needle-dok]}]", "data.0.tasks.1"),
        (f"{MINIMAL}\nmargin: 11", "margin"),
        (f"{MINIMAL}\nstages: [sdrpn, dessert]", "stages"),
        (f"{MINIMAL}\nstages: [sdrpn, gate, regions]", "builds on those before it: sdrpn, regions, gate"),
        (f"{MINIMAL}\nlabelling: {{grounding: published}}", "No heads are published for 'nano'"),
        (f"{MINIMAL}\nmodel: ./mine\nlabelling: {{sink: published}}", "labelling.published_for"),
        (f"{MINIMAL}\nlabelling: {{grounding: published, published_for: gpt}}", "published for 'gpt'"),
    ],
)
def test_a_wrong_recipe_is_refused_with_its_reason(tmp_path: Path, text: str, told: str) -> None:
    (tmp_path / "recipe.yaml").write_text(text)
    with pytest.raises(ConfigError, match=told):
        load_branch_recipe(tmp_path / "recipe.yaml")


def test_another_base_than_the_recipes(tmp_path: Path) -> None:
    (tmp_path / "recipe.yaml").write_text(MINIMAL)
    assert load_branch_recipe(tmp_path / "recipe.yaml", model="qwen2.5-vl-3b").model == "qwen2.5-vl-3b"
