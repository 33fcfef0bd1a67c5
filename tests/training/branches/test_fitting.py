"""Training on tiny models: the loss is the one of inference, only what is meant to change does, and it learns."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
import pytest
import torch
from datasets import Dataset
from PIL import Image, ImageOps
from pydantic import ValidationError
from safetensors.torch import load_file, save_file
from torch import nn
from torch.nn.functional import binary_cross_entropy_with_logits

from qzoom_agent.agent import Agent
from qzoom_agent.config import AgentConfig, PerceptionConfig
from qzoom_agent.errors import ConfigError
from qzoom_agent.evaluation.scorers.judge import Judge
from qzoom_agent.geometry import Size
from qzoom_agent.models.hf import HFBackend
from qzoom_agent.perception.branches import Branches
from qzoom_agent.perception.decoder import Decoder
from qzoom_agent.perception.labels import BACKGROUND, FOREGROUND, LabelRules
from qzoom_agent.perception.look import look
from qzoom_agent.protocols import get_protocol
from qzoom_agent.training.branches import sdrpn
from qzoom_agent.training.branches.base_inference import ask, lower_states
from qzoom_agent.training.branches.branch_recipe import (
    BranchRecipe,
    GateStage,
    Labelling,
    Optimisation,
    PostSFTStage,
    SDRPNStage,
)
from qzoom_agent.training.branches.dataset import DatasetSpec, Records, load_records
from qzoom_agent.training.branches.fitting import checkpoint_to_resume, last_checkpoint, trained
from qzoom_agent.training.branches.gate import answer_at_budgets, kind_of, train_gate
from qzoom_agent.training.branches.labelling import padded_size
from qzoom_agent.training.branches.postsft import choose_cases, find_cases, random_box, train_postsft
from qzoom_agent.training.branches.proposals import auc, look_at_batch, propose_boxes, with_crop
from qzoom_agent.training.branches.sdrpn import MapLoss, map_rows, train_sdrpn
from tests.tiny_models import Family
from tests.training.branches.conftest import Load, copied, fast, same
from tests.training.processes import log_of

FAMILIES: tuple[Family, ...] = ("qwen2_5_vl", "qwen3_vl", "qwen3_5", "gemma4", "llava")
LEARNERS = ("qwen2_5_vl", *(pytest.param(family, marks=pytest.mark.slow) for family in FAMILIES[1:]))
"""All families; in the quick suite all but one are covered by the tests of equal losses."""


def recipe(**sections: Any) -> BranchRecipe:
    return BranchRecipe(**{"data": [DatasetSpec(path="needle")], **sections}, depth=2, gate_depth=2, k=3)


def labels_of(records: Records, grid: tuple[int, int]) -> Dataset:
    """Every question points at the white box."""
    high, wide = grid
    heat = np.zeros(grid, dtype=np.float32)
    heat[high // 4 : 3 * high // 4, wide // 4 : wide // 2] = 1.0
    rows = [
        {"row": row, "image_id": records[row].cluster, "right": row != 1, "map": heat.tolist(), "sink": None}
        for row in range(len(records))
    ]
    return Dataset.from_list(rows)


@pytest.mark.parametrize("family", LEARNERS)
def test_sdrpn_learns_where_and_leaves_the_base_alone(
    family: Family, load: Load, rows: Records, tmp_path: Path
) -> None:
    backend = load(family)
    branches = backend.branches
    (one,) = ask(backend, [rows[0]], [None])
    grid = one.grids[0][1:]
    base, gate = copied(backend.model), copied(branches.gate or nn.Module())
    before = copied(branches.sdrpn)
    how = Labelling(rules=LabelRules(blur_kernel=1), keep="all")
    fixed = family in ("llava", "gemma4")  # whose views have one size
    how_long = fast(num_train_epochs=6 if family == FAMILIES[0] else 16)
    stage = SDRPNStage(optimisation=how_long, tokens=[None] if fixed else [None, 16])
    train_sdrpn(backend, branches.sdrpn, rows, labels_of(rows, grid), recipe(sdrpn=stage, labelling=how), tmp_path)
    assert same(base, backend.model) and same(gate, branches.gate or nn.Module())
    assert not same(before, branches.sdrpn)
    branches.eval()
    assert not branches.sdrpn.training
    for tokens in stage.tokens:
        (seen,) = look_at_batch(backend, [rows[0]], tokens=tokens)
        found = auc(seen)
        assert found is not None and found > 0.95
    losses = [line["loss"] for line in log_of(tmp_path)]
    assert sum(losses[-4:]) < 0.5 * sum(losses[:4])


def test_a_share_of_the_labels_is_one_of_each_source(
    load: Load, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    taken: list[str] = []
    monkeypatch.setattr(sdrpn, "train", lambda module, images, **_: taken.extend(images))
    sources = [DatasetSpec(path="needle", limit=limit, a_board=1, seed=seed) for limit, seed in ((8, 0), (4, 1))]
    records = load_records(sources)
    labels, backend = labels_of(records, (8, 8)), load("qwen2_5_vl")
    made = Labelling(keep="all", rules=LabelRules(blur_kernel=1))
    for share, first, second in ((0.5, 4, 2), (0.25, 2, 1), (1.0, 8, 4)):
        taken.clear()
        how = recipe(data=sources, sdrpn=SDRPNStage(share=share), labelling=made)
        train_sdrpn(backend, backend.branches.sdrpn, records, labels, how, tmp_path)
        assert taken == [records[at].cluster for at in (*range(first), *range(8, 8 + second))]


def test_the_padding_of_a_view_is_learned_as_background(
    load: Load, rows: Records, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    backend, record = load("llava"), replace(rows[0], image=Image.new("RGB", (200, 100)))
    (one,) = ask(backend, [record], [None])
    high, wide = one.grids[0][1:]
    heat = np.full((high, wide), 1e-4)
    heat[0, 0], heat[high // 2, wide // 2] = 0.9, 0.3  # most of the attention is on padding
    row = {"row": 0, "image_id": "i", "right": True, "map": heat.tolist(), "sink": None, "shown": padded_size(one)}
    made: list[dict[str, Any]] = []
    monkeypatch.setattr(sdrpn, "train", lambda *_, read, prepare, **__: made.append(prepare([{**read(0), "draw": 0}])))
    how = recipe(sdrpn=SDRPNStage(tokens=[None]), labelling=Labelling(rules=LabelRules(blur_kernel=1)))
    train_sdrpn(backend, backend.branches.sdrpn, [record], Dataset.from_list([row]), how, tmp_path)  # type: ignore[arg-type]
    labels = made[0]["labels"].reshape(high, wide)
    assert (int(labels[0, 0]), int(labels[high // 2, wide // 2])) == (BACKGROUND, FOREGROUND)


def test_what_an_image_does_not_show_is_found_nowhere(load: Load, rows: Records, tmp_path: Path) -> None:
    """Questions about dark pictures have no answer in light ones, nor the other way round."""
    backend = load("qwen2_5_vl")
    dark, asked = [rows[0], rows[6]], ("what is the code?", "how many green triangles are there?")
    light = [replace(row, image=ImageOps.invert(row.image), cluster=f"{row.cluster} light") for row in dark]
    shown = [replace(row, question=asked[at // 2]) for at, row in enumerate([*dark, *light])]
    topics = ["dark", "dark", "light", "light"]
    long = fast(num_train_epochs=24)
    data = [DatasetSpec(path="needle", seed=seed, topic=name) for seed, name in enumerate(("dark", "light"))]
    stage, made = SDRPNStage(optimisation=long, absent=1.0), Labelling(rules=LabelRules(blur_kernel=1))
    how = recipe(data=data, sdrpn=stage, labelling=made)
    with pytest.raises(ValueError, match=r"sdrpn\.absent needs two or more sources in data with a topic each"):
        recipe(data=data[:1], sdrpn=stage)
    where = {"labels": labels_of(shown, (4, 4)), "recipe": how}
    train_sdrpn(backend, backend.branches.sdrpn, shown, folder=tmp_path, topics=topics, **where)
    backend.branches.eval()

    def peaks(questions: Sequence[str]) -> list[float]:
        rows = [replace(row, question=question) for row, question in zip(shown, questions, strict=True)]
        return [float(one.heat.max()) for one in look_at_batch(backend, rows, tokens=None)]

    own = peaks([row.question for row in shown])
    other = peaks([asked[1], asked[1], asked[0], asked[0]])
    assert sum(other) < 0.5 * sum(own), (own, other)
    for some, said in (((), "no topics"), (["dark", None, "dark", None], "one topic, dark")):
        with pytest.raises(ConfigError, match=rf"sdrpn.absent is 1, and data has {said}. Give two or more sources"):
            train_sdrpn(backend, backend.branches.sdrpn, shown, folder=tmp_path / "b", topics=some, **where)


@pytest.mark.parametrize("family", FAMILIES)
def test_the_loss_is_that_of_the_maps_that_inference_makes(family: Family, load: Load, rows: Records) -> None:
    """Rows of unequal length in a batch, against one look each; cells that teach nothing do not count."""
    backend = load(family)
    branches = backend.branches
    some = [rows[0], rows[1]]  # a short question and a longer one
    states = lower_states(backend, ask(backend, some, [None] * 2), 3)
    maps = map_rows(branches.sdrpn, states)
    expected = []
    for row, found in zip(some, maps, strict=True):
        alone = lower_states(backend, ask(backend, [row], [None]), 3)
        (single,) = look(
            branches,
            Decoder(backend.model).adapter,
            alone.hidden,
            rotary=alone.rotary,
            mask=alone.mask,
            images=[alone.images[0]],
            options=PerceptionConfig(gate="off"),
        )
        assert torch.allclose(single.maps[0].logits.flatten(), found, atol=1e-4)
        expected.append(found.detach())
    cells = torch.cat(expected)
    labels = torch.full((len(cells),), -100)
    labels[0], labels[3], labels[-1] = 1, 0, 0
    wanted = binary_cross_entropy_with_logits(cells[[0, 3, -1]], torch.tensor([1.0, 0.0, 0.0]))
    loss = MapLoss(branches.sdrpn)(states, labels)
    assert float(loss) == pytest.approx(float(wanted), abs=1e-5)
    nothing = MapLoss(branches.sdrpn)(states, torch.full_like(labels, -100))
    assert float(nothing) == 0.0


def test_only_right_answers_with_a_usable_map_are_learned_from(
    load: Load, rows: Records, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    backend = load("qwen2_5_vl")
    how = Labelling(rules=LabelRules(blur_kernel=1), keep="right")
    stage = SDRPNStage(optimisation=fast(num_train_epochs=1), share=0.5)
    labels = labels_of(rows, (8, 8))
    train_sdrpn(backend, backend.branches.sdrpn, rows, labels, recipe(sdrpn=stage, labelling=how), tmp_path)
    assert "12 maps, 11 with an answer that counts, 11 of them usable" in capsys.readouterr().out
    assert '"of": 2' in (tmp_path / "log.jsonl").read_text()  # six of the eleven, four a step
    everywhere = labels.map(lambda row: {"map": np.ones((8, 8)).tolist()})
    with pytest.raises(
        ConfigError, match=r"nothing to learn from 12 .*: none of the 11 maps that count points anywhere"
    ):
        train_sdrpn(backend, backend.branches.sdrpn, rows, everywhere, recipe(labelling=how), tmp_path / "b")
    wrong = labels.map(lambda row: {"right": False})
    with pytest.raises(ConfigError, match=r"none was answered right\. Set labelling\.keep: all, or label at another"):
        train_sdrpn(backend, backend.branches.sdrpn, rows, wrong, recipe(labelling=how), tmp_path / "c")


@pytest.mark.parametrize("family", LEARNERS)
def test_the_gate_learns_whether_and_leaves_the_rest_alone(
    family: Family, load: Load, rows: Records, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Questions of one text need more at both budgets, those of the others at none."""
    backend = load(family)
    branches = backend.branches
    base, sdrpn, before = copied(backend.model), copied(branches.sdrpn or nn.Module()), copied(branches.gate)
    needs = [row % 3 == 0 for row in range(12)]
    table = Dataset.from_list(
        [
            {"row": row, "image_id": rows[row].cluster, "right": [not need, not need, True]}
            for row, need in enumerate(needs)
        ]
    )
    budgets = [4, 9, 16]
    how_long = fast(num_train_epochs=4 if family == FAMILIES[0] else 8)
    stage = GateStage(tokens=budgets, optimisation=how_long)
    train_gate(backend, branches.gate, rows, table, recipe(gate=stage), tmp_path)
    assert "warning: the gate has very little to learn from. Of 12 questions 4 are" in capsys.readouterr().out
    assert same(base, backend.model) and same(sdrpn, branches.sdrpn or nn.Module())
    assert not same(before, branches.gate)
    scores = [one.score or 0.0 for row in range(12) for one in look_at_batch(backend, [rows[row]], tokens=4)]
    assert min(score for score, need in zip(scores, needs, strict=True) if need) > max(
        score for score, need in zip(scores, needs, strict=True) if not need
    )


def test_a_gate_with_nothing_to_tell_apart_is_refused(load: Load, rows: Records, tmp_path: Path) -> None:
    backend = load("qwen2_5_vl")
    table = Dataset.from_list([{"row": 0, "image_id": "p0", "right": [True, True, True]}] * 3)
    stage = GateStage(tokens=[4, 9, 16], optimisation=fast())
    said = (
        r"nothing to learn from. Of 3 questions 0 are .* only with more detail .*, 3 at every.*`gate` out of `stages`"
    )
    with pytest.raises(ConfigError, match=said):
        train_gate(backend, backend.branches.gate, rows, table, recipe(gate=stage), tmp_path)


def make_checkpoints(folder: Path, count: int) -> None:
    for step in range(1, count + 1):
        (one := folder / f"checkpoint-{step}").mkdir()
        save_file({"w": torch.zeros(4)}, one / "trained.safetensors")
        torch.save({"step": step}, one / "optimizer.pt")
        (one / "trainer_state.json").write_text("{}")


def test_a_damaged_checkpoint_is_not_resumed_from(tmp_path: Path) -> None:
    make_checkpoints(tmp_path, 3)
    assert last_checkpoint(tmp_path) == str(tmp_path / "checkpoint-3")
    for file in ("checkpoint-3/trained.safetensors", "checkpoint-2/optimizer.pt"):
        content = (tmp_path / file).read_bytes()
        (tmp_path / file).write_bytes(content[:-8])
    assert last_checkpoint(tmp_path) == str(tmp_path / "checkpoint-1")


@pytest.mark.parametrize("lost", ["trained.safetensors", "optimizer.pt"])
def test_a_checkpoint_that_was_copied_in_part_is_not_resumed_from(lost: str, tmp_path: Path) -> None:
    make_checkpoints(tmp_path, 2)
    (tmp_path / "checkpoint-2" / lost).unlink()
    assert last_checkpoint(tmp_path) == str(tmp_path / "checkpoint-1")
    (tmp_path / "checkpoint-1" / lost).unlink()
    assert last_checkpoint(tmp_path) == str(tmp_path / "checkpoint-2")
    with pytest.raises(ConfigError, match=r"checkpoint-2 has no weights or no optimizer.* Copy the whole folder"):
        checkpoint_to_resume(tmp_path)


def cases(*patterns: tuple[bool, bool, bool]) -> Dataset:
    """(has a box, right without the crop, right with it)."""
    return Dataset.from_list(
        [
            {
                "row": row,
                "image_id": f"p{row}",
                "box": [10.0, 10.0, 50.0, 50.0] if box else None,
                "plain": "407",
                "cropped": "407",
                "plain_right": plain,
                "cropped_right": cropped,
            }
            for row, (box, plain, cropped) in enumerate(patterns)
        ]
    )


def test_cases_are_those_that_a_crop_hurt_and_a_share_of_those_it_helped() -> None:
    table = cases(
        (True, True, False),
        (True, True, True),
        (True, False, True),
        (False, True, False),
        (True, True, False),
        (True, False, True),
        (True, False, False),
    )
    assert choose_cases(table, PostSFTStage(), seed=0) == [0, 4]
    both = choose_cases(table, PostSFTStage(helped=0.5), seed=0)
    assert len(both) == 3 and set(both) - {0, 4} <= {2, 5}
    assert choose_cases(table, PostSFTStage(helped=9.0), seed=0) == [0, 2, 4, 5]


def test_random_boxes_lie_in_the_image_with_sides_of_the_share_asked_for() -> None:
    rng = Random(0)
    for _ in range(200):
        box = random_box(rng, Size(300, 100), (0.1, 0.6))
        assert box.clamp(Size(300, 100)) == box
        assert 30 <= box.width <= 180 and 10 <= box.height <= 60


@pytest.mark.parametrize("family", LEARNERS)
def test_postsft_trains_the_decoder_alone(family: Family, load: Load, rows: Records, tmp_path: Path) -> None:
    backend = load(family)
    branches, before = copied(backend.branches), copied(backend.model)
    aligned = "plain" if family in ("llava", "gemma4") else "aligned"
    stage = PostSFTStage(
        optimisation=fast(num_train_epochs=2, per_device_train_batch_size=2, gradient_checkpointing=True),
        positions=aligned,
        target="gold",
        noise=0.5,
    )
    table = cases(*[(True, True, False)] * 3, (True, False, True))
    chosen = choose_cases(table, stage, seed=0)
    train_postsft(backend, rows, table, chosen, recipe(postsft=stage), tmp_path)
    assert same(branches, backend.branches)
    changed = {name for name, value in backend.model.state_dict().items() if not torch.equal(value, before[name])}
    assert changed and all("language_model.layers" in name or "lm_head" in name for name in changed)
    assert not any(weight.requires_grad for weight in backend.model.parameters())
    losses = [line["loss"] for line in log_of(tmp_path)]
    assert losses[-1] < losses[0]


@pytest.mark.parametrize("family", LEARNERS)
def test_both_answers_of_a_case_are_those_of_an_agent(
    family: Family, load: Load, rows: Records, tmp_path: Path
) -> None:
    """The crop stands beside the coarse view as a policy puts it, and boxes are those of the map."""
    backend = load(family)
    branches = backend.branches
    branches.config = branches.config.model_copy(update={"threshold": 0.3, "positions": "plain"})
    stage = PostSFTStage(positions="plain", max_new_tokens=4)
    table = find_cases(backend, rows, stage, tmp_path, judge=Judge())
    assert len(table) == 12
    settings = {"generation": {"max_new_tokens": 4}}
    for row in range(0, 12, 7):
        record, case = rows[row], table[row]
        for policy, said in (("direct", "plain"), ("always", "cropped")):
            agent = Agent(backend, config=AgentConfig(policy=policy).replace(**settings))
            answer = agent.run(record.image, record.question)
            turn = answer.trace.turns[0]
            # Four tokens cut most replies off, which an agent takes for no answer; the case keeps what was written.
            read = get_protocol(backend.protocol).parse(turn.text, answer.store.shown)
            assert read.answer == (case[said] or None)
            if policy == "always":
                crops = [view.region.as_list() for view in answer.trace.views if view.kind == "crop"]
                assert crops == ([] if case["box"] is None else [case["box"]])


def test_boxes_are_proposed_whatever_the_gate_says(load: Load, rows: Records) -> None:
    backend = load("qwen2_5_vl")
    backend.branches.config = backend.branches.config.model_copy(update={"threshold": 0.0, "gate_threshold": 1.0})
    boxes = propose_boxes(backend, [rows[0], rows[1]], tokens=None)
    assert all(box is not None for box in boxes)
    nothing = with_crop(backend, [rows[0]], [None], tokens=None, aligned=False)[0]
    assert nothing.crop is None and [view.kind for view in nothing.shown] == ["coarse"]


@pytest.mark.slow
def test_what_only_its_own_calls_answer_needs_a_zoom(tmp_path: Path) -> None:
    """No one crop answers a question in two steps; the shipped nano's own calls do."""
    backend = HFBackend.load("nano", device="cpu", dtype="float32")
    hops = load_records([DatasetSpec(path="needle", limit=6, a_board=3, seed=3, tasks=("needle-hop",))])
    patterns = {}
    for own in (False, True):
        stage = GateStage(tokens=[48, 64], with_crop=True, own_calls=own, max_new_tokens=8)
        folder = tmp_path / str(own)
        table = answer_at_budgets(backend, hops, recipe(gate=stage), folder)
        patterns[own] = [kind_of(right) for right in table["right"]]
    assert patterns[False] == ["never"] * 6
    assert patterns[True].count("transition") >= 4
    with pytest.raises(ValueError, match="with_crop"):
        GateStage(own_calls=True)


def test_half_precision_is_trained_in_float32_and_comes_back(load: Load, rows: Records, tmp_path: Path) -> None:
    backend = load("qwen2_5_vl")
    backend.model.to(torch.bfloat16)
    branches = Branches.from_base(backend.model, k=3, depth=2, with_gate=False)
    backend.branches = branches
    how = Labelling(rules=LabelRules(blur_kernel=1), keep="all")
    stage = SDRPNStage(optimisation=fast(save_steps=1, num_train_epochs=1))
    train_sdrpn(backend, branches.sdrpn, rows, labels_of(rows, (8, 8)), recipe(sdrpn=stage, labelling=how), tmp_path)
    assert {weight.dtype for weight in branches.sdrpn.parameters()} == {torch.bfloat16}
    saved = load_file(sorted(tmp_path.glob("checkpoint-*"))[-1] / "trained.safetensors")
    assert {value.dtype for value in saved.values()} == {torch.float32}
    assert set(saved) == {f"sdrpn.{name}" for name in trained(branches.sdrpn)}


def test_a_schedule_that_needs_more_than_a_stage_has_is_refused() -> None:
    for name in ("cosine_with_min_lr", "warmup_stable_decay", "reduce_lr_on_plateau"):
        with pytest.raises(ValidationError, match=f"{name} needs settings of its own or held-out losses"):
            Optimisation.model_validate({"lr_scheduler_type": name})
    assert Optimisation.model_validate({"lr_scheduler_type": "linear"}).lr_scheduler_type == "linear"
