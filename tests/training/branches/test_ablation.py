"""Ablations on a run of toy length: variants are trained or read as they say, and measured on the same questions."""

from pathlib import Path
from shutil import copytree

import pytest
from yaml import safe_load

from qzoom_agent.cli.main import main as qzoom
from qzoom_agent.errors import ConfigError
from qzoom_agent.models.presets import NANO_FOLDER
from qzoom_agent.perception.branch_config import BranchConfig
from qzoom_agent.training.branches import ablation
from qzoom_agent.training.branches.ablation import ABLATIONS, FINE, Variant, _branches, _calibrated, ablate
from qzoom_agent.training.branches.branch_recipe import BranchRecipe
from qzoom_agent.training.branches.export import export_model
from qzoom_agent.training.branches.run_dir import RunDirectory
from tests.training.branches.test_branch_stages import written


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The output of `qzoom train branches` without a gate."""
    folder = tmp_path_factory.mktemp("ablation")
    recipe = written(folder, stages=["select-heads", "label", "sdrpn", "calibrate"], box=[0.3, 0.225])
    assert qzoom(["train", "branches", "--config", str(recipe), "--output", str(folder / "run")]) == 0
    return folder / "run"


def rows(table: str) -> dict[str, list[str]]:
    """The cells of each variant of a Markdown table."""
    found = [[cell.strip() for cell in line.strip("|").split("|")] for line in table.splitlines()[2:]]
    return {name: cells for name, *cells in found}


@pytest.mark.slow
def test_what_is_only_read_otherwise_is_not_trained(finished: Path, tmp_path: Path) -> None:
    found = rows(ablate("thresholds", finished, tmp_path, n=1))
    assert next(iter(found)) == "calibrated" and {"0.02", "0.3", "0.7 of the peak"} < set(found)
    assert all(len(cells) == 3 * len(FINE) for cells in found.values())
    assert not list((tmp_path / "thresholds").glob("*/sdrpn"))
    assert rows((tmp_path / "thresholds.md").read_text()) == found
    # a map that nothing stands out from proposes nothing, so fewer are zoomed the higher the threshold
    zooms = [int(found[name][2].rstrip("%")) for name in ("0.02", "0.1", "0.3")]
    assert zooms == sorted(zooms, reverse=True)


@pytest.mark.slow
def test_variants_are_trained_from_the_same_labels_and_measured_on_the_same_questions(
    finished: Path, tmp_path: Path
) -> None:
    table = ablate("depth", finished, tmp_path, n=1)
    assert list(rows(table)) == ["T = 1", "T = 2", "T = 3", "T = 4"]
    for depth in (1, 2, 3, 4):
        folder = tmp_path / "depth" / f"T_=_{depth}"
        assert (folder / "labels").resolve() == (finished / "labels").resolve()
        config = BranchConfig.model_validate_json((folder / "calibrate" / "final" / "branches.json").read_text())
        assert config.depth == depth and config.evidence["questions"] == 12
    journal = (tmp_path / "depth" / "needle-scene.jsonl").read_text()
    assert journal.count("\n") >= 1
    assert ablate("depth", finished, tmp_path, n=1) == table
    assert (tmp_path / "depth" / "needle-scene.jsonl").read_text() == journal, "it is not measured again"


@pytest.mark.slow
def test_raw_attention_stands_against_the_map(finished: Path, tmp_path: Path) -> None:
    found = rows(ablate("source", finished, tmp_path, n=1))
    assert list(found) == ["SD-RPN", "the attention, all of it", "the attention, a box of the same sides"]
    assert all(cells[2] == "100%" for name, cells in found.items() if name != "SD-RPN")


@pytest.mark.slow
def test_post_sft_is_measured_on_its_own_base_and_everything_else_is_not(finished: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    copytree(finished, run)
    copytree(NANO_FOLDER, run / "postsft" / "base")  # as if it had been trained, after the run was calibrated
    copytree(run / "sdrpn" / "final", run / "postsft" / "final")
    found = rows(ablate("postsft", run, tmp_path / "out", n=1))
    assert list(found) == ["without", "with"]
    for name in found:
        folder = tmp_path / "out" / "postsft" / name
        assert (folder / "sdrpn").is_symlink(), "it is not trained again"
        assert (folder / "calibrate" / "final" / "branches.safetensors").exists()
        assert (folder / "postsft").exists() == (name == "with")
    recipe = BranchRecipe.model_validate(safe_load((run / "recipe.yaml").read_text()))
    done, folder = RunDirectory(recipe, run), tmp_path / "out" / "postsft"
    assert _branches(done, Variant("with", after=("sdrpn", "postsft")), folder)[1]
    assert not _branches(done, Variant("without", after=("sdrpn",)), folder)[1]
    assert _branches(done, Variant("as it is"), folder) == (run / "calibrate" / "final", False)
    assert export_model(run, tmp_path / "shipped") == tmp_path / "shipped"
    assert not (tmp_path / "shipped" / "base_of_postsft").exists(), "calibrated for the base as given"
    stated = run / "settings" / "calibrate.json"
    stated.write_text(stated.read_text().replace('"as given"', '"of postsft"'))  # as if it were calibrated only now
    (run / "postsft" / "base" / "base_of_postsft").touch()
    assert _branches(done, Variant("as it is"), folder)[1]
    tuned = export_model(run, tmp_path / "tuned")
    assert (tuned / "base_of_postsft").exists()
    assert [path.relative_to(tuned).as_posix() for path in sorted(tuned.rglob("*.safetensors"))] == [
        "branches/branches.safetensors",
        "model.safetensors",
    ]


@pytest.mark.slow
def test_a_tuned_base_counts_once_branches_are_fitted_to_it(finished: Path, tmp_path: Path) -> None:
    """Killed between the two, `postsft` leaves a base that no branches fit."""
    run = tmp_path / "run"
    copytree(finished, run)
    copytree(NANO_FOLDER, run / "postsft" / "base")
    directory = RunDirectory(BranchRecipe.model_validate(safe_load((run / "recipe.yaml").read_text())), run)
    assert directory.tuned.exists() and directory.base is None and directory.made_from("gate")["base"] == "as given"
    copytree(run / "sdrpn" / "final", run / "postsft" / "final")
    assert directory.base == directory.tuned and directory.made_from("gate")["base"] == "of postsft"


@pytest.mark.slow
def test_labels_are_made_anew_where_what_is_changed_decides_them(finished: Path, tmp_path: Path) -> None:
    """Which cells are foreground does not change the maps, but with `keep: crop` whose answers are right."""
    run = RunDirectory(BranchRecipe.model_validate(safe_load((finished / "recipe.yaml").read_text())), finished)
    crops = run.recipe.labelling.model_copy(update={"keep": "crop"})
    run.recipe = run.recipe.model_copy(update={"labelling": crops})
    changed = {"labelling.rules.background": 0.01}
    assert (_calibrated(run, changed, tmp_path / "own") / "branches.json").exists()
    assert not (tmp_path / "own" / "labels").is_symlink()


def test_a_run_that_was_moved_is_compared_where_it_is_now(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The labels of a variant are a link into the run's folder."""
    monkeypatch.setattr(ablation, "run_stage", lambda run, stage: None)
    recipe = BranchRecipe.model_validate(safe_load(written(tmp_path).read_text()))
    for place in (tmp_path / "first", tmp_path / "second"):
        if place.name == "second":
            (tmp_path / "first").rename(place)
        else:
            (place / "run" / "labels").mkdir(parents=True)
        _calibrated(RunDirectory(recipe, place / "run"), {"depth": 2}, place / "out" / "T_=_2")
        assert (place / "out" / "T_=_2" / "labels").resolve() == place / "run" / "labels"


def test_what_cannot_be_compared_is_said(tmp_path: Path) -> None:
    run = tmp_path / "run"  # as a finished one begins
    (run / "calibrate" / "final").mkdir(parents=True)
    written(run, stages=["select-heads", "label", "sdrpn", "calibrate"])
    with pytest.raises(ConfigError, match="no ablation 'depht'"):
        ablate("depht", run, tmp_path, n=1)
    with pytest.raises(ConfigError, match="no base of post-SFT"):
        ablate("postsft", run, tmp_path, n=1)
    with pytest.raises(ConfigError, match="no finished run"):
        ablate("depth", tmp_path, tmp_path, n=1)


def test_every_choice_of_the_paper_has_an_ablation() -> None:
    wanted = {"k", "depth", "labels", "thresholds", "source", "gate", "positions", "postsft"}
    assert wanted <= set(ABLATIONS)
