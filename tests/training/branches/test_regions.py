"""Reinforcement of SD-RPN by answers: what learns, what is skipped, that it resumes, and the stage on nano."""

import json
from collections.abc import Sequence
from copy import deepcopy
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from datasets import concatenate_datasets
from torch import Tensor
from torch.nn.functional import log_softmax
from torch.utils.data import Subset
from yaml import safe_dump

from qzoom_agent.errors import ConfigError
from qzoom_agent.geometry import Box
from qzoom_agent.models.hf import HFBackend
from qzoom_agent.models.presets import NANO_FOLDER
from qzoom_agent.perception.branch_config import WEIGHTS
from qzoom_agent.training.branches import fitting, regions, stages
from qzoom_agent.training.branches.base_inference import CoarsePrompt, ask, lower_states
from qzoom_agent.training.branches.branch_recipe import BranchRecipe, RegionsStage
from qzoom_agent.training.branches.dataset import DatasetSpec, Records
from qzoom_agent.training.branches.proposals import Localisation, show_crops
from qzoom_agent.training.branches.regions import RegionLoss, answer_log_probabilities, train_regions
from qzoom_agent.training.branches.sdrpn import map_rows
from qzoom_agent.views import ViewStore
from qzoom_agent.zoom.zoom import ZoomPlan
from tests.training.branches.conftest import Load, copied, fast, same

WHITE = Box(28, 28, 56, 84)
"""Where the answers are in the pictures of these tests."""


def recipe(**stage: Any) -> BranchRecipe:
    return BranchRecipe(
        data=[DatasetSpec(path="needle")],
        regions=RegionsStage(**{"optimisation": fast(num_train_epochs=4, save_steps=2), "rounds": 2, **stage}),
    )


def prepared(load: Load) -> HFBackend:
    """Maps of random weights are flat, so their regions are the cells that stand out a little."""
    backend = load("qwen2_5_vl")
    rules = {"box": (0.4, 0.6), "peak_share": 0.98, "blur": "none"}
    backend.branches.config = backend.branches.config.model_copy(update=rules)
    return backend


@pytest.fixture
def reader(monkeypatch: pytest.MonkeyPatch) -> None:
    """A reader that knows the answer as far as a crop shows the white box."""

    def read(backend: Any, asked: Sequence[CoarsePrompt], answers: Sequence[str]) -> list[float]:
        return [-5.0 * (1 - (0.0 if one.crop is None else one.crop.coverage(WHITE))) - 0.01 for one in asked]

    monkeypatch.setattr(regions, "answer_log_probabilities", read)


def test_only_sdrpn_learns_and_it_learns_where_the_answer_is(
    load: Load, rows: Records, reader: None, tmp_path: Path
) -> None:
    backend = prepared(load)
    branches = backend.branches
    base, gate, sdrpn = copied(backend.model), copied(branches.gate), copied(branches.sdrpn)
    stage = {"anchor": 0.01, "controls": 1.0, "next_peaks": 1, "moves": 2}
    some: Any = Subset(rows, range(6))  # type: ignore[type-var]
    found = train_regions(backend, branches.sdrpn, some, recipe(**stage), tmp_path)
    assert same(base, backend.model) and same(gate, branches.gate) and not same(sdrpn, branches.sdrpn)
    assert not branches.sdrpn.training
    assert [(one.questions, one.skipped, one.settled) for one in found] == [(6, 0, 0)] * 2
    assert found[0].recovered > 0 and found[1].probability > 1.2 * found[0].probability


def test_a_share_of_the_questions_is_read_with_a_control(load: Load, rows: Records, reader: None) -> None:
    backend, some = prepared(load), [rows[0], rows[1]]
    for share in (0.0, 1.0):
        found = regions.RegionReader(backend, recipe(controls=share)).read(some, [None] * 2)
        assert [len(one["controls"]) for one in found] == [share] * 2


def test_the_loss_is_that_of_the_advantages_and_of_the_divergence_from_the_start(load: Load, rows: Records) -> None:
    backend = prepared(load)
    sdrpn = backend.branches.sdrpn
    start = deepcopy(sdrpn)
    with torch.no_grad():
        sdrpn.q_proj.weight.mul_(-3.0)
    states = lower_states(backend, ask(backend, [rows[0], rows[1]], [None] * 2), 3)
    p, q = (torch.sigmoid(torch.cat(map_rows(one, states))).detach() for one in (sdrpn, start))
    targets = torch.zeros(2, len(p))
    targets[0, 1], targets[1, -1] = 0.5, 0.25
    policy = -(0.5 * p[1].log() + 0.25 * (1 - p[-1]).log())
    divergence = (q * (q / p).log() + (1 - q) * ((1 - q) / (1 - p)).log()).sum()
    for anchor in (0.0, 2.0):
        loss = RegionLoss(sdrpn, start, anchor=anchor)(states, targets)
        assert float(loss) == pytest.approx(float(policy + anchor * divergence) / 2, rel=1e-3)
    assert float(divergence) > 0.01


def test_a_run_that_is_stopped_resumes_to_the_same_weights(
    load: Load, rows: Records, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In its second round; what was read is not read again."""

    def read(self: Any, records: Sequence[Any], tokens: Sequence[Any]) -> list[dict[str, Any]]:
        gains = {"gains": [3.0], "added": [], "replaced": 0, "controls": [], "cells": [[5]], "shares": [[1.0]]}
        learned = {"kind": "learned", "nothing": -5.0, "proposed": -2.0, "grid": [8, 8], **gains}
        return [learned for _ in records]

    def run(folder: Path) -> Tensor:
        backend = prepared(load)
        one = fast(save_steps=1)
        some: Any = Subset(rows, range(8))  # type: ignore[type-var]
        train_regions(backend, backend.branches.sdrpn, some, recipe(optimisation=one), folder)
        return backend.branches.sdrpn.q_proj.weight.detach()

    def stop(self: Any, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if "round-1" in args.output_dir and state.global_step == 1:
            raise KeyboardInterrupt

    monkeypatch.setattr(regions.RegionReader, "read", read)
    whole = run(tmp_path / "whole")
    with monkeypatch.context() as stopped:
        stopped.setattr(fitting.LogCallback, "on_save", stop, raising=False)
        with pytest.raises(KeyboardInterrupt):
            run(tmp_path / "killed")
    monkeypatch.setattr(regions.RegionReader, "read", None)
    assert torch.equal(whole, run(tmp_path / "killed"))


def test_questions_that_teach_nothing_are_counted(
    load: Load, rows: Records, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A coarse view that suffices, and maps without regions; if nothing is left to learn from, that is refused."""
    backend = prepared(load)
    reader = regions.RegionReader(backend, recipe())
    monkeypatch.setattr(regions, "answer_log_probabilities", lambda backend, asked, answers: [-0.01] * len(asked))
    settled = reader.table(rows, tmp_path / "settled")
    assert settled["kind"] == ["settled"] * 12
    look = regions.look_at_batch
    monkeypatch.setattr(
        regions, "look_at_batch", lambda *a, **k: [one._replace(heat=one.heat * 0) for one in look(*a, **k)]
    )
    monkeypatch.setattr(regions, "answer_log_probabilities", lambda backend, asked, answers: [-5.0] * len(asked))
    skipped = reader.table(rows, tmp_path / "skipped")
    assert skipped["kind"] == ["skipped"] * 12
    with pytest.raises(ConfigError, match="No region decided the answer to any of 12 questions"):
        regions.reward(skipped, recipe())
    # an answer of many improbable tokens
    learned = settled.select([0]).map(lambda row: {"kind": "learned", "gains": [3.0], "proposed": -900.0})
    targets, figures = regions.reward(concatenate_datasets([learned, settled.select([1, 2])]), recipe())
    assert figures.probability == pytest.approx(2 / 3, abs=0.01)
    assert (figures.questions, figures.settled, figures.pruned) == (3, 2, 0)
    assert [target.any() for target in targets] == [True, False, False]


def test_a_region_too_small_to_crop_is_no_candidate_again(
    load: Load, rows: Records, monkeypatch: pytest.MonkeyPatch
) -> None:
    backend = prepared(load)
    reader = regions.RegionReader(backend, recipe(next_peaks=1, moves=0))
    asked = ask(backend, [rows[0]], [None])
    (seen,) = regions.look_at_batch(backend, [rows[0]], tokens=None, asked=asked)
    first, *_ = regions.proposed_regions(seen.heat, reader.options)
    small, plan = reader._box(first, seen), reader.zoom.plan

    def refuse_small(store: ViewStore, box: Box) -> ZoomPlan:
        return ZoomPlan("original", error="too small") if box == small else plan(store, box)

    monkeypatch.setattr(reader.zoom, "plan", refuse_small)
    question = reader._question(rows[0], asked[0], seen)
    assert question.proposed == [] and len(question.candidates) == 1


def test_the_reader_is_the_base_with_the_crop_in_its_conversation(load: Load, rows: Records) -> None:
    """Against a stock forward over each conversation alone; answers of unequal length share a batch."""
    backend = prepared(load)
    plain = ask(backend, [rows[0]], [None])[0]
    (cropped,) = show_crops(backend, [plain], [[WHITE]], aligned=False)
    assert cropped.crop is not None
    answers = ["407", "green"]
    found = answer_log_probabilities(backend, [plain, cropped], answers)
    for one, text, value in zip((plain, cropped), answers, found, strict=True):
        ids = regions.answer_ids(backend, text)
        session = one.session.fork()
        ready = session.prepare(one.messages)
        logits, _ = session.feed(ready.prompt, ready.positions, 0)
        total = 0.0
        for at, token in enumerate(ids):
            total += float(log_softmax(logits[0].float(), dim=-1)[token])
            where = regions.with_answer(ready, ids[: at + 1]).positions[..., -1:]
            logits = session._forward(torch.tensor([[token]]), where)
        assert value == pytest.approx(total, abs=1e-3)


def test_localisation_is_measured_by_the_rules_of_the_branches(
    load: Load, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    backend, measured = prepared(load), []
    found = Localisation(n=0, recall=None, iou=None, area=None, auc=None, proposed=None)
    monkeypatch.setattr(stages, "look_at_records", lambda *args, **how: [])
    monkeypatch.setattr(stages, "localisation", lambda seen, options: measured.append(options) or found)
    some = recipe().model_copy(update={"held_out": [DatasetSpec(path="needle", limit=1)]})
    stages._report(SimpleNamespace(recipe=some), backend, tmp_path)  # type: ignore[arg-type]
    assert {(one.box, one.blur) for one in measured} == {((0.4, 0.6), "none")}


def test_the_stage_reinforces_the_branches_of_nano(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """From those that ship, whose gate and further looks stay; a second run does nothing, and a gate refuses it."""
    out, file = tmp_path / "run", tmp_path / "recipe.yaml"
    stage = {
        "data": [{"path": "needle", "limit": 4, "a_board": 2, "seed": 3, "tasks": ["needle-doc"]}],
        "tokens": [64],
        "rounds": 2,
        "next_peaks": 1,
        "moves": 1,
        "optimisation": {"num_train_epochs": 1, "per_device_train_batch_size": 4, "dataloader_num_workers": 0},
    }
    file.write_text(safe_dump({"k": 5, "depth": 1, "gate_depth": 1, "data": [{"path": "needle"}], "regions": stage}))
    command = ["regions", "--config", str(file), "--output", str(out)]
    assert stages.main(command) == 0
    final = out / "regions" / "final"
    assert 'round 2: {"questions":4,' in capsys.readouterr().out
    assert (final / WEIGHTS).read_bytes() != (NANO_FOLDER / "branches" / WEIGHTS).read_bytes()
    assert (final / "further" / WEIGHTS).exists()
    stored = json.loads((final / "branches.json").read_text())
    assert stored["gate_threshold"] > 0.1 and not stored["evidence"], "which is that of the map before"
    assert stages.main(command) == 0
    assert "is there already" in capsys.readouterr().out
    (out / "gate" / "final").mkdir(parents=True)
    (out / "regions" / "final").rename(tmp_path / "elsewhere")
    with pytest.raises(ConfigError, match="Run `regions` before `gate`"):
        stages.main(command)
