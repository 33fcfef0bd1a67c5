"""What `--dry-run` says of all kinds of data and bases: rows are counted where they can be, memory is of the shape."""

import json
import sys
from collections.abc import Callable
from pathlib import Path
from shutil import copytree
from typing import Any

import pytest
from datasets import Dataset, DatasetDict
from transformers import AutoConfig, Qwen2_5_VLConfig

from qzoom_agent.errors import ConfigError
from qzoom_agent.models.presets import NANO_FOLDER
from qzoom_agent.training.branches.branch_recipe import BranchRecipe, load_branch_recipe
from qzoom_agent.training.branches.calibrate import candidates
from qzoom_agent.training.branches.cost_estimate import SHAPES, describe, shape_of
from qzoom_agent.training.branches.dataset import DatasetSpec, count_rows
from tests.tiny_models import Family

RECIPES = Path(__file__).resolve().parents[3] / "rl" / "recipes"


def recipe(**changes: Any) -> BranchRecipe:
    return BranchRecipe.model_validate({"data": [{"path": "needle", "limit": 100}], **changes})


def numbers(plan: str) -> dict[str, list[str]]:
    """Lines by their first word."""
    found: dict[str, list[str]] = {}
    for line in plan.splitlines():
        name, _, rest = line.partition(" ")
        found.setdefault(name, []).append(rest.strip())
    return found


def test_rows_of_local_files_and_folders_are_counted(tmp_path: Path) -> None:
    table = Dataset.from_dict({"question": ["a\u2028b", "c", "d"], "image": ["i.png"] * 3, "answer": ["x"] * 3})
    table.save_to_disk(str(tmp_path / "folder"))
    DatasetDict({"train": table, "test": table.select([0])}).save_to_disk(str(tmp_path / "splits"))
    table.to_parquet(str(tmp_path / "rows.parquet"))
    row = {"image": "i.png", "question": "x\u2028", "answer": "y"}
    (tmp_path / "rows.jsonl").write_text(f"{json.dumps(row, ensure_ascii=False)}\n\n{json.dumps(row)}\n")
    (tmp_path / "rows.json").write_text(json.dumps([row] * 5, indent=1))

    def count(name: str, **more: Any) -> int | None:
        return count_rows([DatasetSpec(path=str(tmp_path / name), **more)])

    assert count("folder") == 3 and count("folder", limit=2) == 2 and count("folder", limit=9) == 3
    assert count("splits", split="test") == 1
    assert count("rows.parquet") == 3 and count("rows.jsonl") == 2 and count("rows.json") == 5
    assert count_rows([DatasetSpec(path="owner/on-the-hub")]) is None
    assert count_rows([DatasetSpec(path="owner/on-the-hub", limit=7), DatasetSpec(path="needle")]) == 1007
    assert count_rows([]) == 0
    with pytest.raises(ConfigError, match=r"nothing\.jsonl cannot be read"):
        count("nothing.jsonl")
    with pytest.raises(ConfigError, match="has no column words; it has question, image, answer"):
        count("folder", columns={"question": "words"})


def test_a_folder_has_the_shape_of_its_config(folders: Callable[[Family], Path], tmp_path: Path) -> None:
    copy = copytree(NANO_FOLDER, tmp_path / "copy")
    nano = shape_of(str(copy))
    known = SHAPES["nano"]
    assert nano[:2] == known[:2] and nano.cached == known.cached and nano.head_weights == 0
    assert nano.layer_weights == pytest.approx(known.layer_weights, rel=0.05)
    assert nano.base_gb == pytest.approx(sum(f.stat().st_size for f in copy.glob("*.safetensors")) / 1e9)
    tiny = shape_of(str(folders("llava")))
    assert tiny is not None and tiny.layers == 6 and tiny.head_weights > 0
    assert shape_of("owner/never-downloaded") is None


def test_published_shapes_follow_from_the_published_configs(tmp_path: Path) -> None:
    """Qwen2.5-VL-7B as its hub repository describes it."""
    text = {
        "hidden_size": 3584,
        "intermediate_size": 18944,
        "num_attention_heads": 28,
        "num_hidden_layers": 28,
        "num_key_value_heads": 4,
        "vocab_size": 152064,
    }
    Qwen2_5_VLConfig(text_config=text, tie_word_embeddings=False).save_pretrained(tmp_path)
    assert not AutoConfig.from_pretrained(tmp_path).tie_word_embeddings
    found, known = shape_of(str(tmp_path)), shape_of("Qwen/Qwen2.5-VL-7B-Instruct")
    assert found is not None and known == SHAPES["qwen2.5-vl-7b"]
    assert found[:2] == known[:2] and found.cached == known.cached
    assert found.layer_weights == pytest.approx(known.layer_weights, rel=1e-3)
    assert found.head_weights == pytest.approx(known.head_weights, rel=1e-3)


@pytest.mark.parametrize("model_type", ["qwen3_5_moe", "gemma4"])
def test_a_family_with_experts_or_unequal_layers_has_a_shape(model_type: str, tmp_path: Path) -> None:
    """The weights of a layer with experts are those of all of them."""
    text = {
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "vocab_size": 400,
    }
    experts = {"num_experts": 8, "moe_intermediate_size": 64, "shared_expert_intermediate_size": 64, "head_dim": 8}
    kinds = {"qwen3_5_moe": "linear_attention", "gemma4": "sliding_attention"}
    more = {**experts, "layer_types": [kinds[model_type], "full_attention"]} if model_type == "qwen3_5_moe" else {}
    AutoConfig.for_model(model_type, text_config={**text, **more}).save_pretrained(tmp_path)
    found = shape_of(str(tmp_path))
    assert found is not None and found[:2] == (2, 32) and found.cached > 0
    assert found.layer_weights > (8 * 3 * 32 * 64 if more else 3 * 32 * 32)
    recipe = BranchRecipe(model=str(tmp_path), data=[DatasetSpec(path="needle", limit=8)], depth=1, gate_depth=1)
    assert "weights      about" in describe(recipe, "sdrpn")


def test_every_stage_tells_all_four() -> None:
    """Of nano: rows, steps, tokens and memory; where nothing is trained it says so."""
    nano = load_branch_recipe(RECIPES / "nano" / "branches.yaml")
    for stage in (*nano.stages, "postsft"):
        told = numbers(describe(nano, stage))
        assert told["rows"] and told["steps"] and told["in"][0].startswith("all") and "GB" in told["memory"][0], stage
        assert "unknown" not in str(told)
    heads = numbers(describe(nano, "select-heads"))
    assert [line.split(",")[0] for line in heads["rows"]] == ["200 answered", "200 read with the answer"]
    assert heads["steps"] == ["none: nothing is trained"] and heads["in"] == ["all       64.0 k tokens"]


def test_answers_labels_and_fits_of_a_stage_are_all_counted() -> None:
    """600 needle rows: the gate's at two budgets and with a crop, 64 + 60 + 100 tokens; post-SFT's and its refit."""
    some = recipe(
        data=[{"path": "needle", "limit": 600}],
        held_out=[{"path": "needle", "limit": 50, "seed": 1}],
        gate={
            "tokens": [64, 128],
            "with_crop": True,
            "records": 500,
            "optimisation": {"num_train_epochs": 2, "per_device_train_batch_size": 10},
        },
        postsft={
            "records": 40,
            "refit_records": 30,
            "optimisation": {"per_device_train_batch_size": 2},
            "refit": {"num_train_epochs": 3, "per_device_train_batch_size": 9},
        },
    )
    gate = numbers(describe(some, "gate", processes=2))
    assert gate["rows"] == [
        "500 answered 2 times, about 156 tokens each",
        "500 looked at, about 124 tokens each",
        "500 answered with a crop, about 224 tokens each",
        "1000 at most to train the gate, about 124 tokens each",
    ]
    assert gate["steps"][0].startswith("at most 50, of 20 rows")
    assert gate["in"] == [f"all       {(500 * (2 * 156 + 124 + 224) + 1000 * 124) / 1e6:.1f} M tokens"]
    tuned = describe(some, "postsft")
    assert [line.split()[0] for line in numbers(tuned)["rows"]] == ["40", "40", "40", "40", "30", "30", "90", "50"]
    assert [line.split(",")[0] for line in numbers(tuned)["steps"]] == ["at most 20", "at most 10"]


def test_regions_are_read_at_most_so_often() -> None:
    """Both regions and a control: without any, with both, without each, with the control, and two candidates."""
    stage = {"next_peaks": 1, "moves": 1, "rounds": 3, "tokens": [64]}
    rows = numbers(describe(recipe(regions=stage), "regions"))["rows"]
    assert rows[0] == "100 looked at 3 times, about 124 tokens each"
    assert rows[1] == "100 at most read with the answer 21 times, about 324 tokens each"
    assert numbers(describe(recipe(regions=stage, max_regions=1), "regions"))["rows"][1].startswith(
        "100 at most read with the answer 15 times, about 224"
    )


def test_what_cannot_be_known_is_said_to_be_unknown() -> None:
    hub = recipe(model="owner/model", data=[{"path": "owner/data"}], held_out=[{"path": "owner/other", "limit": 9}])
    told = numbers(describe(hub, "sdrpn"))
    assert told["rows"][0].startswith("unknown at most") and told["steps"][0].startswith("unknown")
    assert told["weights"] == ["unknown"] and told["in"][0].endswith("and those of unknown rows")
    assert told["memory"] == ["unknown: the config of owner/model cannot be looked at without a download"]
    assert any("9 answered if their boxes are unknown" in line for line in numbers(describe(hub, "calibrate"))["rows"])


@pytest.mark.parametrize("path", ["mine.jsonl", "tables/mine.parquet", "./mine", "a/b/c"])
def test_a_file_that_is_not_there_is_told_before_it_is_needed(path: str) -> None:
    with pytest.raises(ConfigError, match="nothing at that path"):
        describe(recipe(data=[{"path": path}]), "sdrpn")


def test_calibration_without_boxes_counts_what_answers_may_be_asked_for() -> None:
    """Looked at and answered over the view; what is wrong at each higher budget, and with the crop of each rule."""
    some = recipe(
        held_out=[{"path": "owner/other", "limit": 9}],
        calibration={"tokens": 64, "higher_tokens": [48, 144, 256], "margins": [0.0, 0.2]},
        gate={"with_crop": True, "own_calls": True},
    )
    rows = numbers(describe(some, "calibrate"))["rows"]
    assert [line.split(",")[0].split(" about")[0] for line in rows] == [
        "9 held out",
        "9 answered if their boxes are unknown",
        "9 at most answered at more tokens 2 times",
        f"9 at most answered with a crop {len(candidates(some))} times",
        "9 at most answered by own calls",
    ]


@pytest.mark.parametrize("size", ["7", "8"])
def test_a_fit_that_no_device_holds_says_what_to_do(size: str) -> None:
    name = {"7": "qwen2_5_vl_7b", "8": "qwen3_vl_8b"}[size]
    told = describe(load_branch_recipe(RECIPES / name / "branches.yaml"), "postsft", processes=4)
    assert "do not fit a device of 80 GB" in told and "zero2.yaml" in told
    whole, spread = (float(part.split("about ")[1].split(" GB")[0]) for part in told.split("memory")[1].split("large"))
    assert whole > 110 and 30 < spread < 60
    for stage in ("label", "sdrpn", "gate"):
        assert "too large" not in describe(load_branch_recipe(RECIPES / name / "branches.yaml"), stage)


def test_a_plan_loads_no_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    from qzoom_agent.models.hf import HFBackend

    monkeypatch.setattr(HFBackend, "load", lambda *args, **kwargs: sys.exit("a model was loaded"))
    for path in sorted(RECIPES.glob("*/branches.yaml")):
        some = load_branch_recipe(path)
        for stage in some.stages:
            assert "tokens" in describe(some, stage)


def test_the_advice_is_to_spread_over_as_many_devices_as_hold_it() -> None:
    """On two devices the 8B base needs more than each has."""
    told = describe(load_branch_recipe(RECIPES / "qwen3_vl_8b" / "branches.yaml"), "postsft")
    assert "GB on each of 3)" in told and "--num_processes 3 " in told
