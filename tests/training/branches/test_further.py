"""Gate and SD-RPN of further looks: chains of the model's own calls, their labels, and training on them."""

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from datasets import Dataset
from pydantic import ValidationError
from yaml import safe_dump

from qzoom_agent import Agent
from qzoom_agent.errors import ConfigError
from qzoom_agent.geometry import Box
from qzoom_agent.models.hf_session import HFSession
from qzoom_agent.models.presets import NANO_FOLDER
from qzoom_agent.perception.branch_config import FURTHER, WEIGHTS
from qzoom_agent.perception.branches import Branches
from qzoom_agent.perception.labels import LabelRules
from qzoom_agent.perception.maps import MapRegion
from qzoom_agent.training.branches import further, stages
from qzoom_agent.training.branches.base_inference import CoarsePrompt
from qzoom_agent.training.branches.branch_recipe import BranchRecipe, FurtherStage, Labelling, Optimisation
from qzoom_agent.training.branches.dataset import DatasetSpec, Records
from qzoom_agent.training.branches.export import export_model
from qzoom_agent.training.branches.further import (
    Step,
    collect_chains,
    fewest_errors,
    measure,
    split,
    steps_of,
    train_further,
)
from tests.tiny_models import Family
from tests.training.branches.conftest import Load, fast
from tests.training.processes import log_of

CALL = "ZOOM: 0, 0, 250, 500"


def recipe(optimisation: Optimisation | None = None, **stage: Any) -> BranchRecipe:
    # a coarse view of less than all pixels, so that crops add something
    # random attention is spread out: the rules take a part of any map
    rules = LabelRules(foreground=0.9, background=0.8, blur_kernel=1, area_limit=1.0, least_peak=0.0)
    how = Labelling(grounding={4: [0, 1]}, max_new_tokens=8, tokens=4, rules=rules)
    return BranchRecipe(
        data=[DatasetSpec(path="needle")],
        depth=2,
        gate_depth=2,
        k=3,
        box=(0.4, 0.4),
        peak_share=0.5,
        labelling=how,
        further=FurtherStage(optimisation=optimisation or fast(num_train_epochs=8), **stage),
    )


def table(*rows: tuple[str, int, list[str]]) -> Dataset:
    """Rows of right and wrong answers ("01"), the number of calls, and the answers."""
    return Dataset.from_list(
        [
            {
                "row": at,
                "image_id": f"p{at}",
                "right": [mark == "1" for mark in right],
                "answers": answers,
                "maps": [[[[0.0, 1.0]]]] * calls,
            }
            for at, (right, calls, answers) in enumerate(rows)
        ]
    )


def test_crops_are_enough_where_they_lead_to_a_right_answer() -> None:
    """One crop, two, three; wrong whatever is shown; no crop at all."""
    found = steps_of(table(("1", 0, []), ("01", 1, []), ("001", 2, []), ("00", 1, []), ("", 0, [])), recipe())
    assert [(one.row, one.crops, one.more, one.points) for one in found] == [
        (0, 1, False, False),
        (1, 1, True, True),
        (1, 2, False, False),
        (2, 1, True, True),
        (2, 2, True, True),
        (2, 3, False, False),
    ]


def test_without_references_they_are_enough_where_the_answer_stays() -> None:
    chains = table(("00", 1, ["B4", "407"]), ("000", 2, ["407", " 407", "407"]))
    found = steps_of(chains, recipe(enough="same"))
    assert [(one.row, one.crops, one.more) for one in found] == [
        (0, 1, True),
        (0, 2, False),
        (1, 1, False),
        (1, 2, False),
        (1, 3, False),
    ]


@pytest.fixture
def follow(monkeypatch: pytest.MonkeyPatch) -> None:
    """Even questions are right with one crop, odd ones with two; a wrong one calls for the upper left corner."""

    def say(backend: Any, asked: list[CoarsePrompt], *, max_new_tokens: int) -> list[str]:
        said = []
        for one in asked:
            text = str(one.messages)
            odd = "how many" in text
            offered = "ZOOM" in text
            said.append(CALL if offered else "407" if not odd or len(one.shown) > 2 else "B4")
        return said

    monkeypatch.setattr(further, "generate_answers", say)


@pytest.mark.parametrize(
    ("family", "inside"),
    [
        ("qwen2_5_vl", True),
        *(
            pytest.param(family, inside, marks=pytest.mark.slow)
            for family in ("qwen2_5_vl", "qwen3_vl", "llava")
            for inside in (False, True)
            if (family, inside) != ("qwen2_5_vl", True)
        ),
    ],
)
def test_calls_become_labels_and_branches_learn_them(
    family: Family, inside: bool, load: Load, rows: Records, follow: None, tmp_path: Path
) -> None:
    backend = load(family)
    backend.protocol = "plain"
    first = backend.branches
    first.config = first.config.model_copy(update={"gate_threshold": 0.0, "box": (0.4, 0.4), "peak_share": 0.5})
    epochs = 5 if (family, inside) == ("qwen2_5_vl", True) else 8
    how = recipe(fast(num_train_epochs=epochs), inside_crops=inside, held_out=0.2)
    chains = collect_chains(backend, rows, how, tmp_path / "chains", selected=None)
    assert [len(row["boxes"]) for row in chains] == [1, 2, 1] * 4
    assert [row["answers"][-1] for row in chains] == ["407"] * 12
    assert [len(maps) for row in chains for maps in row["maps"]] == [2 if inside else 1] * 4
    assert chains[1]["boxes"][1][:2] == [0.0, 0.0]
    frozen = {name: value.clone() for name, value in backend.model.state_dict().items()}
    settings = first.config.model_dump(include={"k", "depth", "gate_depth", "box", "peak_share"})
    learner = Branches.from_base(backend.model, inside_crops=inside, **settings)
    learner.load_state_dict(first.own_weights)
    held = train_further(backend, learner, rows, chains, how, tmp_path)
    assert {one.row for one in held}.isdisjoint({one.row for one in split(chains, steps_of(chains, how), how)[0]})
    losses = [line["loss"] for line in log_of(tmp_path)]
    assert sum(losses[-3:]) < 0.8 * sum(losses[:3])
    assert all(torch.equal(value, frozen[name]) for name, value in backend.model.state_dict().items())
    assert not any(
        torch.equal(value, first.own_weights[name])
        for name, value in learner.own_weights.items()
        if name.endswith("q_proj.weight")
    )
    found = measure(backend, learner, rows, chains, steps_of(chains, how), how)
    assert (found.questions, found.looks, found.more) == (12, 16, 4)
    assert found.gate is not None and found.gate.missed + found.gate.needless < 0.5


def test_crops_have_the_positions_of_the_branches_whatever_the_recipe_says(
    load: Load, rows: Records, follow: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Those of a base that postsft tuned, or of published branches, are aligned; a recipe's are plain by default."""
    placed: list[str] = []
    monkeypatch.setattr(HFSession, "place", lambda session, view, **place: placed.append(view))
    backend, how = load("qwen2_5_vl"), recipe()
    backend.protocol = "plain"
    assert backend.branches is not None and how.positions == "plain"
    settings = {"gate_threshold": 0.0, "box": (0.4, 0.4), "peak_share": 0.5, "positions": "aligned"}
    backend.branches.config = backend.branches.config.model_copy(update=settings)
    chains = collect_chains(backend, rows, how, tmp_path / "chains", selected=None)
    collected = len(placed)
    further.show_chains(backend, [{"record": rows[0], "boxes": chains[0]["boxes"], "crops": 1}], 4)
    assert 0 < collected < len(placed)


def test_close_ups_are_learned_from_attention_without_calls_or_a_gate(
    load: Load, rows: Records, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    backend = load("qwen2_5_vl")
    backend.protocol = "plain"
    settings = {"k": 3, "depth": 2, "with_gate": False, "peak_share": 0.5, "box": (0.6, 0.6)}
    backend.branches = Branches.from_base(backend.model, **settings)
    monkeypatch.setattr(further, "generate_answers", lambda *_, **__: pytest.fail("an answer was written"))
    stage = {"follow": "attention", "inside_crops": "only", "crops": 2, "box": (0.5, 0.5), "held_out": 0.1}
    how = recipe(fast(num_train_epochs=8, learning_rate=1e-2), **stage)
    how = how.model_copy(update={"labelling": how.labelling.model_copy(update={"keep": "all"})})
    chains = collect_chains(backend, rows, how, tmp_path / "chains", selected=None)
    assert [len(row["boxes"]) for row in chains] == [2] * len(rows)
    for row in chains:
        crop, close = (Box(*box) for box in row["boxes"])
        (only,) = row["maps"]
        assert len(only) == 1  # that of the crop
        assert crop.coverage(close) > 0.99 and close.area < 0.5 * crop.area
    learner = Branches.from_base(backend.model, **{**settings, "box": (0.5, 0.5)}, inside_crops="only", crops=2)
    learner.load_state_dict(backend.branches.own_weights)
    train_further(backend, learner, rows, chains, how, tmp_path)
    losses = [line["loss"] for line in log_of(tmp_path)]
    assert sum(losses[-3:]) < 0.8 * sum(losses[:3])
    found = measure(backend, learner, rows, chains, steps_of(chains, how), how)
    assert (found.looks, found.more, found.gate) == (len(rows), 0, None)
    assert found.found is not None and found.found > 0.5


def test_views_share_the_peak_of_a_call_which_is_never_a_sink() -> None:
    """The coarse view has a sink of .9; off it the crop is looked at most, with .2."""
    coarse, crop, none = [[0.9, 0.015], [0.0, 0.1]], [[0.2, 0.0], [0.0, 0.0]], [[0.0, 0.0], [0.0, 0.0]]
    sinks = [[[0.5, 0.0], [0.0, 0.0]], none]
    row = {"points": True, "crops": 1, "maps": [[coarse, crop]], "sinks": [sinks]}
    how = recipe().model_copy(update={"labelling": Labelling(rules=LabelRules(blur_kernel=1))})
    found = [one.tolist() for one in further._labels(row, [(2, 2)] * 2, how)]
    assert found == [[0, -100, 0, 1], [1, 0, 0, 0]]
    faint = [[0.9, 0.0], [0.0, 0.04]]  # a fifth of what the crop has
    assert further._labels({**row, "maps": [[faint, crop]]}, [(2, 2)] * 2, how)[0].tolist() == [0] * 4


def test_a_next_crop_is_found_where_its_centre_lies_in_a_proposed_region(
    load: Load, rows: Records, monkeypatch: pytest.MonkeyPatch
) -> None:
    backend = load("qwen2_5_vl")
    one = SimpleNamespace(score=0.0, maps=[SimpleNamespace(regions=[MapRegion(0, 0, 1, 1, 1.0)])])
    monkeypatch.setattr(further, "run_branches", lambda _, __, shown, options, **___: [one] * len(shown))
    nexts = [[0.0, 0.0, 20.0, 20.0], [60.0, 0.0, 80.0, 20.0], [0.0, 60.0, 20.0, 80.0]]
    chains = Dataset.from_list([{"row": at, "boxes": [[28.0, 28.0, 84.0, 84.0], box]} for at, box in enumerate(nexts)])
    held = [Step(at, 1, True, True) for at in range(3)]
    found = measure(backend, backend.branches, rows, chains, held, recipe())
    assert found.found == pytest.approx(1 / 3) and (found.looks, found.more, found.gate) == (3, 3, None)


def test_the_threshold_is_where_the_errors_are_fewest() -> None:
    """Half of the needed looks score lower than all needless ones: to let these through would make every other one."""
    scores, needs = [*[0.9] * 5, *[0.1] * 5, *[0.5] * 10], [*[True] * 10, *[False] * 10]
    found = fewest_errors(scores, needs)
    assert 0.5 < found.threshold < 0.9 and (found.missed, found.needless) == (0.5, 0.0)


def test_questions_that_all_take_one_crop_teach_nothing(load: Load, rows: Records, tmp_path: Path) -> None:
    backend = load("qwen2_5_vl")
    with pytest.raises(ConfigError, match="questions in several steps"):
        train_further(backend, backend.branches, rows, table(("1", 0, ["407"])), recipe(), tmp_path)


def test_the_stage_makes_the_branches_of_nano_look_again(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """From the branches that ship; a second run does nothing, and what is exported answers."""
    out, file = tmp_path / "run", tmp_path / "recipe.yaml"
    stage = {
        "data": [
            {"path": "needle", "limit": 4, "a_board": 2, "seed": 2, "tasks": ["needle-hop"]},
            {"path": "needle", "limit": 2, "a_board": 2, "seed": 2},
        ],
        "tokens": [64],
        "max_new_tokens": 8,
        "optimisation": {"num_train_epochs": 1, "per_device_train_batch_size": 4, "dataloader_num_workers": 0},
    }
    labelling = {"grounding": {5: [0, 1]}, "tokens": 100, "asking": "prediction", "response": "call", "keep": "all"}
    settings = {"k": 5, "depth": 1, "gate_depth": 1, "data": [{"path": "needle"}]}
    file.write_text(safe_dump({**settings, "labelling": {**labelling, "max_new_tokens": 8}, "further": stage}))
    command = ["further", "--config", str(file), "--output", str(out)]
    assert stages.main(command) == 0
    final = out / "further" / "final"
    assert (final / WEIGHTS).read_bytes() == (NANO_FOLDER / "branches" / WEIGHTS).read_bytes()
    stored = json.loads((final / FURTHER / "branches.json").read_text())
    assert stored["evidence"]["looks"] >= 0 and stored["box"] == [0.3, 0.2]
    capsys.readouterr()
    assert stages.main(command) == 0
    assert "is there already" in capsys.readouterr().out
    export_model(out, tmp_path / "model")
    agent = Agent.from_pretrained(str(tmp_path / "model"), device="cpu", check=False)
    assert agent.backend.branches.further is not None  # type: ignore[attr-defined]


def test_stages_that_end_before_further_looks_are_refused_before_anything_is_trained() -> None:
    data, close = [{"path": "needle"}], {"follow": "attention", "inside_crops": "only", "box": [0.5, 0.5]}
    first = ["select-heads", "label", "sdrpn"]
    for stages_named, stage, told in (
        ([*first, "gate", "further"], {}, "calibrate into the stages"),
        ([*first, "calibrate", "further"], {}, "put gate into the stages"),
        ([*first, "calibrate", "further"], close, "labelling.keep: all"),
    ):
        with pytest.raises(ValidationError, match=told):
            BranchRecipe.model_validate({"data": data, "stages": stages_named, "further": stage})
    BranchRecipe.model_validate({"data": data, "stages": ["further"]})  # with the branches of a base


def test_what_is_followed_and_what_is_searched_belong_together() -> None:
    with pytest.raises(ValidationError, match="parts of crops"):
        FurtherStage(follow="attention")
    with pytest.raises(ValidationError, match="name places in the coarse view"):
        FurtherStage(inside_crops="only")
    assert "follow" not in FurtherStage().model_dump()  # folders of earlier versions go on
