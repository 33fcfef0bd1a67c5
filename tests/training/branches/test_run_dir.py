"""A folder keeps what its results depend on: it goes on with the same recipe, takes more of it, and refuses another."""

import json
import os
import shutil
from pathlib import Path
from shutil import copytree
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import TrainerCallback
from transformers.integrations.integration_utils import INTEGRATION_TO_CALLBACK
from yaml import safe_load

from qzoom_agent.cli.main import main as qzoom
from qzoom_agent.errors import ConfigError
from qzoom_agent.models.presets import NANO_FOLDER
from qzoom_agent.perception.branch_config import BranchConfig
from qzoom_agent.training.branches import fitting as stage
from qzoom_agent.training.branches import stages
from qzoom_agent.training.branches.base_inference import branches_of
from qzoom_agent.training.branches.branch_recipe import BranchRecipe, Optimisation
from qzoom_agent.training.branches.dataset import DatasetSpec
from qzoom_agent.training.branches.fitting import train
from qzoom_agent.training.branches.run_dir import RunDirectory
from tests.cases import each_case
from tests.training.branches.test_branch_stages import RECIPE, written
from tests.training.processes import log_of

STAGES = ["select-heads", "label", "sdrpn", "calibrate"]


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The output folder of a run without a gate."""
    folder = tmp_path_factory.mktemp("inputs")
    recipe = written(folder, stages=STAGES)
    assert qzoom(["train", "branches", "--config", str(recipe), "--output", str(folder / "run")]) == 0
    return folder / "run"


@pytest.fixture
def out(whole: Path, tmp_path: Path) -> Path:
    """A copy that may be changed."""
    return copytree(whole, tmp_path / "run")


def again(out: Path, stage_name: str, **changes: Any) -> int:
    recipe = written(out.parent, stages=STAGES, **changes)
    return qzoom(["train", stage_name, "--config", str(recipe), "--output", str(out)])


def section(name: str, **changes: Any) -> dict[str, Any]:
    return {name: {**RECIPE[name], **changes}}


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"k": 4}, ("sdrpn was begun", "(recipe.k: ")),
        ({"seed": 1}, ("sdrpn was begun", "recipe.seed")),
        (section("heads", count=3), ("heads.json was begun", "recipe.heads.count")),
        (section("labelling", max_new_tokens=5), ("heads.json was begun", "recipe.labelling.max_new_tokens")),
        (section("labelling", rules={"foreground": 0.4}), ("sdrpn was begun", "recipe.labelling.rules.foreground")),
        (
            section("sdrpn", optimisation={"per_device_train_batch_size": 4, "num_train_epochs": 2}),
            ("sdrpn was", "num_train_epochs", "learning_rate"),
        ),
        ({"held_out": [{"path": "needle", "limit": 9, "seed": 2}]}, ("calibrate was begun", "recipe.held_out")),
    ],
    ids=["k", "seed", "heads", "labelling", "rules", "optimisation", "held-out"],
)
def test_what_is_done_is_not_passed_off_as_of_another_recipe(
    changes: dict[str, Any], told: tuple[str, ...], out: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Whichever stage is asked for, so that recipe.yaml is what the folder was made with."""
    before = (out / "recipe.yaml").read_text()
    assert again(out, "sdrpn", **changes) == 2
    error = capsys.readouterr().err
    assert all(words in error for words in told) and "Delete it" in error and "Traceback" not in error
    assert (out / "recipe.yaml").read_text() == before


@each_case("stored", [2, None])
def test_branches_keep_the_number_of_regions_that_they_were_made_with(
    stored: int | None, out: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Also those of an earlier version, which knew one region alone and did not write the key."""
    file = out / "sdrpn" / "final" / "branches.json"
    config = json.loads(file.read_text())
    assert config.pop("max_regions") == BranchRecipe.model_fields["max_regions"].default == 2
    file.write_text(json.dumps(config | ({} if stored is None else {"max_regions": stored})))
    was, other = (2, 3) if stored else (1, 2)
    assert again(out, "sdrpn", max_regions=other) == 2
    told = capsys.readouterr().err
    assert f"was made with max_regions {was}, and the recipe has {other}. Set max_regions: {was}" in told
    assert again(out, "sdrpn", max_regions=was) == 0


def test_a_damaged_file_of_a_result_is_named(out: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (out / "heads.json").write_text("{}")
    assert again(out, "label") == 2
    assert "heads.json: it is damaged or another file" in capsys.readouterr().err


def test_what_changes_no_result_may_change_and_later_stages_may_be_added(
    out: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    how = {**RECIPE["sdrpn"]["optimisation"], "dataloader_num_workers": 1, "save_steps": 7}
    changes = {
        **section("sdrpn", optimisation=how, report=5),
        **section("labelling", batch=3),
        **section("gate", records=12),
        "postsft": {"records": 3},
    }
    assert again(out, "branches", **changes) == 0
    assert capsys.readouterr().out.count("is there already") == len(STAGES)
    assert safe_load((out / "recipe.yaml").read_text())["postsft"]["records"] == 3


def test_a_folder_with_old_names_of_keys_is_that_of_the_same_recipe(
    out: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """As an earlier version wrote it; a value that differs is refused all the same."""
    old = {new: name for name, new in (Optimisation.renamed | DatasetSpec.renamed).items()}
    for file in [*(out / "settings").glob("*.json"), out / "sdrpn" / "fit" / "settings.json"]:
        text = file.read_text()
        for new, name in old.items():
            text = text.replace(f'"{new}"', f'"{name}"')
        assert text != file.read_text()
        file.write_text(text)
    shutil.rmtree(out / "sdrpn" / "final")
    assert again(out, "branches") == 0
    assert capsys.readouterr().out.count("is there already") == len(STAGES) - 1
    assert "num_train_epochs" in (out / "settings" / "sdrpn.json").read_text()
    file = out / "settings" / "sdrpn.json"
    file.write_text(file.read_text().replace('"num_train_epochs": 1', '"epochs": 2'))
    assert again(out, "sdrpn") == 2
    assert "(recipe.sdrpn.optimisation.num_train_epochs: 2, now 1)" in capsys.readouterr().err


def test_what_was_deleted_may_be_made_otherwise(out: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (out / "heads.json").unlink()
    assert again(out, "select-heads", **section("heads", count=1)) == 0
    assert "to keep this choice" in capsys.readouterr().out.lower()
    # with other heads the labels are others
    assert again(out, "label", **section("heads", count=1)) == 2
    assert "labels was begun with other settings (made_from.heads" in capsys.readouterr().err


def test_thresholds_belong_to_the_base_and_branches_they_were_chosen_for(
    out: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """As if postsft had been run in a finished folder."""
    copytree(out / "sdrpn" / "final", out / "postsft" / "final")
    config = out / "postsft" / "final" / "branches.json"
    config.write_text(config.read_text().replace('"positions": "plain"', '"positions": "aligned"'))
    (out / "postsft" / "base").mkdir()
    assert again(out, "calibrate") == 2
    error = capsys.readouterr().err
    assert "calibrate was begun with other settings (made_from.base: " in error and "; made_from.branches: " in error
    # what is of the base as it was given stays what it is
    for stage_name in ("select-heads", "label", "sdrpn"):
        assert again(out, stage_name) == 0


def test_branches_of_the_base_do_not_stand_in_for_those_that_were_trained(tmp_path: Path) -> None:
    """Nano comes with branches, which `further` starts from only where no others were made."""
    run = RunDirectory(BranchRecipe.model_validate({**RECIPE, "stages": ["further"]}), tmp_path)
    assert run.before("further") == NANO_FOLDER / "branches"
    copytree(NANO_FOLDER / "branches", run.final("gate"))
    with pytest.raises(ConfigError, match="no branches of calibrate yet"):
        run.before("further")


def test_a_gate_starts_from_the_layer_that_its_branches_read(tmp_path: Path) -> None:
    """Without `k` a recipe takes another layer of nano than its own branches, which `regions` reinforces."""
    run = RunDirectory(BranchRecipe(data=[DatasetSpec(path="needle")]), tmp_path)
    backend = run.backend()
    assert branches_of(backend).config.k == 5 != run.fresh(backend, sdrpn=True, gate=False).config.k
    assert run.fresh(backend, sdrpn=False, gate=True).config.k == 5


def test_a_new_gate_does_not_keep_the_threshold_of_the_one_before(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nano's own branches, which `regions` reinforced, have a gate with a calibrated threshold."""
    run = RunDirectory(BranchRecipe.model_validate(RECIPE), tmp_path)
    copytree(NANO_FOLDER / "branches", run.final("regions"))
    for name in ("answer_at_budgets", "kinds", "train_gate"):
        monkeypatch.setattr(stages, name, lambda *_: [])
    stages.run_gate(run)
    before, after = (
        json.loads((folder / "branches.json").read_text())["gate_threshold"]
        for folder in (run.final("regions"), run.final("gate"))
    )
    assert before > 0.5 and after == BranchConfig.model_fields["gate_threshold"].default


def test_questions_of_a_stage_of_its_own_are_those_it_began_with(tmp_path: Path) -> None:
    tables = {name: tmp_path / f"{name}.jsonl" for name in ("all", "own")}
    for table in tables.values():
        table.write_text('{"image": "a.png", "question": "a?", "answer": "b"}\n')
    own = [{"path": str(tables["own"])}]
    data = {"data": [{"path": str(tables["all"])}], "regions": {"data": own}}
    recipe = BranchRecipe.model_validate({**RECIPE, **data, "stages": ["regions"]})
    run = RunDirectory(recipe, tmp_path / "out")
    copytree(NANO_FOLDER / "branches", run.final("sdrpn"))
    run.begin_stage("regions")
    (tmp_path / "out" / "regions").mkdir()
    run.begin_stage("regions")
    tables["own"].write_text(tables["own"].read_text() * 2)
    with pytest.raises(ConfigError, match=r"other data or weights \(contents\..*own\.jsonl"):
        run.begin_stage("regions")


class Line(nn.Module):
    """A loss with one weight."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(1))

    def forward(self, x: Tensor) -> Tensor:
        return ((self.weight * x - 1) ** 2).mean()


FIT = Optimisation(
    per_device_train_batch_size=2,
    learning_rate=0.1,
    save_steps=1,
    logging_steps=1,
    dataloader_num_workers=0,
    warmup_steps=0.5,
)


def fit(folder: Path, *, rows: int = 8, how: Optimisation = FIT) -> Line:
    line = Line()
    train(
        line,
        ["one group"] * rows,
        read=lambda at: {"x": float(at)},
        prepare=lambda some: {"x": torch.tensor([row["x"] for row in some])},
        how=how,
        folder=folder,
        seed=0,
    )
    return line


def test_a_fit_goes_on_only_as_it_was_begun(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = fit(tmp_path)
    assert torch.equal(fit(tmp_path).weight, first.weight)
    assert torch.equal(fit(tmp_path, how=FIT.model_copy(update={"logging_steps": 3})).weight, first.weight)
    with pytest.raises(ConfigError, match=r"other settings \(learning_rate:"):
        fit(tmp_path, how=FIT.model_copy(update={"learning_rate": 0.2}))
    with pytest.raises(ConfigError, match=r"other settings \(rows:"):
        fit(tmp_path, rows=10)
    several(monkeypatch, 2)
    with pytest.raises(ConfigError, match=r"other settings \(processes:"):
        fit(tmp_path)


def test_rows_are_read_by_this_process_where_others_are_not_forked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What reads a row cannot be pickled, as a spawned process would need."""
    monkeypatch.setattr(stage, "get_start_method", lambda: "spawn")
    readers = set()

    def prepare(some: Any) -> dict[str, torch.Tensor]:
        readers.update(row["pid"] for row in some)
        return {"x": torch.ones(len(some))}

    how = FIT.model_copy(update={"dataloader_num_workers": 1})
    train(Line(), ["a"] * 4, read=lambda at: {"pid": os.getpid()}, prepare=prepare, how=how, folder=tmp_path, seed=0)
    assert readers == {os.getpid()}


def test_a_tracker_hears_of_every_step(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One that transformers knows by the name that the recipe gives."""
    heard: list[tuple[int, float]] = []

    class Tracker(TrainerCallback):
        def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, float] | None = None, **_: Any) -> None:
            if logs and "loss" in logs:
                heard.append((state.global_step, float(f"{logs['loss']:.4g}")))

    monkeypatch.setitem(INTEGRATION_TO_CALLBACK, "toy", Tracker)
    fit(tmp_path / "untold")
    assert not heard
    fit(tmp_path / "told", how=FIT.model_copy(update={"report_to": "toy"}))
    assert heard == [(line["step"], line["loss"]) for line in log_of(tmp_path / "told")] and len(heard) == 4


def several(monkeypatch: pytest.MonkeyPatch, count: int) -> None:
    """As if this were the first of some processes."""
    processes = SimpleNamespace(num_processes=count, is_main_process=True, wait_for_everyone=lambda: None)
    monkeypatch.setattr(stage, "together", lambda: processes)


@pytest.mark.parametrize(("processes", "warm_up"), [(1, 8), (4, 2)])
def test_warm_up_is_a_share_of_the_steps_of_all_processes(
    processes: int, warm_up: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """32 rows, two on each device: sixteen steps alone, four of them by four."""
    told: list[int] = []

    class CoarsePrompt(Exception):
        pass

    def trainer(*args: Any, **kwargs: Any) -> None:
        told.append(kwargs["args"].warmup_steps)
        raise CoarsePrompt

    several(monkeypatch, processes)
    monkeypatch.setattr(stage, "StageTrainer", trainer)
    with pytest.raises(CoarsePrompt):
        fit(tmp_path, rows=32)
    assert told == [warm_up]
