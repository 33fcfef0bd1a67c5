"""Presets: a model is recognised by every name that it goes by, and run with its authors' limits."""

import json
from pathlib import Path
from shutil import copy

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qzoom_agent.agent import Agent
from qzoom_agent.config import AgentConfig, BudgetConfig
from qzoom_agent.geometry import fit_tokens, tokens
from qzoom_agent.models.hf import HFBackend
from qzoom_agent.models.presets import (
    FAMILIES,
    PRESETS,
    SHIPPED,
    guess_of,
    keep_origin,
    recognised,
    resolve_model,
    served_model,
)
from qzoom_agent.models.scripted import ScriptedBackend
from qzoom_agent.protocols import PROTOCOLS
from qzoom_agent.trace import Status

PUBLISHED = {
    "deepeyes": "ChenShawn/DeepEyes-7B",
    "mini-o3": "Mini-o3/Mini-o3-7B-v1",
    "pixel-reasoner": "TIGER-Lab/PixelReasoner-RL-v1",
    "visionthink": "Senqiao/VisionThink-Efficient",
    "adaptvision": "AdaptVision/AdaptVision-7B",
    "q-zoom-qwen2.5-vl-3b": "YuhengSSS/Q-Zoom-Qwen2.5VL-3B",
    "q-zoom-qwen2.5-vl-7b": "YuhengSSS/Q-Zoom-Qwen2.5VL-7B",
    "q-zoom-qwen3-vl-4b": "YuhengSSS/Q-Zoom-Qwen3VL-4B",
    "qwen3-vl-2b": "Qwen/Qwen3-VL-2B-Instruct",
    "qwen3-vl-4b": "Qwen/Qwen3-VL-4B-Instruct",
    "qwen3-vl-8b": "Qwen/Qwen3-VL-8B-Instruct",
    "qwen3.5-4b": "Qwen/Qwen3.5-4B",
    "qwen3.5-9b": "Qwen/Qwen3.5-9B",
    "gemma-4-12b": "google/gemma-4-12B-it",
    "zwz-4b": "inclusionAI/ZwZ-4B",
    "zwz-7b": "inclusionAI/ZwZ-7B",
    "zwz-8b": "inclusionAI/ZwZ-8B",
    "qwen2.5-vl-3b": "Qwen/Qwen2.5-VL-3B-Instruct",
    "qwen2.5-vl-7b": "Qwen/Qwen2.5-VL-7B-Instruct",
    "llava-1.5-7b": "llava-hf/llava-1.5-7b-hf",
}


def model_folder(path: Path, *, card: str = "", **config: object) -> Path:
    path.mkdir(parents=True)
    (path / "config.json").write_text(json.dumps(config))
    if card:
        (path / "README.md").write_text(card)
    return path


@pytest.mark.parametrize(("name", "hub_id"), PUBLISHED.items(), ids=PUBLISHED)
def test_a_published_model_is_known_by_every_name(name: str, hub_id: str, tmp_path: Path) -> None:
    preset, repository = PRESETS[name], hub_id.split("/")[1]
    base = {"_name_or_path": "Qwen/Qwen2.5-VL-7B-Instruct", "model_type": "qwen2_5_vl"}
    folders = [
        model_folder(tmp_path / "models" / repository, **base),
        model_folder(tmp_path / f"models--{hub_id.replace('/', '--')}" / "snapshots" / "0a1b2c", **base),
        model_folder(tmp_path / "tuned", _name_or_path=hub_id, model_type="qwen2_5_vl"),
        model_folder(tmp_path / "merged", card=f"---\nbase_model:\n- {hub_id}\n---\n# Mine\n"),
        model_folder(tmp_path / "of-a-copy", card=f"---\nlicense: mit\nbase_model: /data/{repository}\n---\n"),
    ]
    found = [resolve_model(one) for one in (name, hub_id, hub_id.lower(), f"someone/{repository}-AWQ")]
    found += [resolve_model(str(folder)) for folder in folders]
    found += [served_model(one) for one in (name, hub_id, f"/srv/{repository}")]
    for one in found:
        assert (one.protocol, one.budget, one.settings) == (preset.protocol, preset.budget, preset.settings)
        assert not one.guessed and guess_of(one) == ""
    assert resolve_model(str(folders[0])).source == str(folders[0])
    assert served_model(hub_id).source == hub_id
    assert served_model(name).source == preset.source


@pytest.mark.parametrize("name", ["mini-o3", "q-zoom-qwen3-vl-4b-hr", "qwen3-vl-4b"])
def test_a_fine_tune_under_another_name_is_run_as_its_base(name: str, tmp_path: Path) -> None:
    preset = PRESETS[name]
    source = preset.source.split("/")[1]
    named = (name, *(() if name.endswith("-hr") else (str(model_folder(tmp_path / source, model_type="llava")),)))
    for at, model in enumerate(named):
        tuned = model_folder(tmp_path / str(at) / "mine", model_type="qwen2_5_vl")
        keep_origin(tuned, model, protocol=preset.protocol)
        found = resolve_model(str(tuned))
        assert (found.protocol, found.budget, found.settings) == (preset.protocol, preset.budget, preset.settings)
        assert not found.guessed and found.source == str(tuned)
    other = model_folder(tmp_path / "other", model_type="qwen2_5_vl")
    keep_origin(other, name, protocol="a format of its own")
    keep_origin(other, str(model_folder(tmp_path / "unknown", model_type="qwen2_5_vl")))
    assert json.loads((other / "config.json").read_text()) == {"model_type": "qwen2_5_vl"}


def test_every_preset_is_published_or_ours() -> None:
    assert set(PRESETS) - set(PUBLISHED) == set(SHIPPED) | {
        f"{name}-hr" for name in PUBLISHED if name.startswith("q-zoom")
    }
    for preset in PRESETS.values():
        assert preset.protocol in PROTOCOLS
        AgentConfig().with_defaults(preset.settings)
    assert set(FAMILIES.values()) <= set(PRESETS)


def test_a_model_of_a_known_family_is_a_guess_that_says_so(tmp_path: Path) -> None:
    family = resolve_model(str(model_folder(tmp_path / "a", model_type="qwen3_vl", _name_or_path="/tmp/run7")))
    assert (family.protocol, family.guessed) == ("qwen3vl", True)
    assert family.settings == {"generation.max_new_tokens": 1024}, "sampling is the checkpoint's own to say"
    assert "only the family is known" in guess_of(family) and "base_model" in guess_of(family)
    assert resolve_model("Qwen/Qwen3-VL-30B-A3B-Instruct").guessed
    assert served_model("qwen3.5-27b-fp8").protocol == "qwen3_5"
    unknown = resolve_model(str(model_folder(tmp_path / "b", model_type="smolvlm")))
    assert (unknown.protocol, unknown.budget) == (None, None)
    assert "nothing is known of it: it is asked in the format 'plain'" in guess_of(unknown)
    # its own config knows better than a part of its name
    renamed = recognised(resolve_model("me/not-qwen3-vl"), {"_name_or_path": "Mini-o3/Mini-o3-7B-v1"})
    assert (renamed.protocol, renamed.guessed, renamed.source) == ("mini_o3", False, "me/not-qwen3-vl")


@pytest.mark.parametrize("name", SHIPPED)
def test_a_copy_of_a_model_in_the_package_is_run_as_that_model_whatever_its_name(name: str, tmp_path: Path) -> None:
    shipped = PRESETS[name]
    for file in ("config.json", "tokenizer.json"):  # as a fine-tune writes them
        copy(Path(shipped.source) / file, tmp_path)
    found = resolve_model(str(tmp_path))
    assert (found.protocol, found.budget, found.guessed) == ("nano", shipped.budget, False)
    assert found.note == f"{name}, or trained from it", "a fine-tune does not ship with the package"


@pytest.mark.parametrize("name", SHIPPED)
def test_loaded_weights_of_the_package_have_their_own_budget(name: str) -> None:
    loaded = HFBackend.load(name)
    assert HFBackend(loaded.model, loaded.processor, name="mine").defaults == PRESETS[name].budget


_ENDLESS = "".join(f"x{at}: &x{at} [*x{at - 1}, *x{at - 1}]\n" for at in range(1, 64))


@pytest.mark.parametrize(
    "text",
    [
        *("", "no metadata", "---\nbase_model: [\n---\n", "---\n- a\n---\n", "---\n"),
        f"---\nx0: &x0 [a]\n{_ENDLESS}base_model: *x63\n---\n",  # of 2**63 names
    ],
)
def test_damaged_files_of_a_folder_are_no_obstacle(text: str, tmp_path: Path) -> None:
    folder = model_folder(tmp_path / "x", card=text)
    (folder / "config.json").write_text("[1" if text else "[]")
    assert resolve_model(str(folder)).protocol is None


class Recommending(ScriptedBackend):
    """A backend with the settings of a preset."""

    def __init__(self, preset: str) -> None:
        super().__init__(["1"])
        self.settings = PRESETS[preset].settings


def test_settings_hold_where_the_user_gives_none() -> None:
    config = Agent(Recommending("mini-o3")).config
    assert (config.generation.max_new_tokens, config.generation.temperature) == (4096, 1.0)
    assert (config.budget.max_turns, config.budget.max_views) == (12, 12)
    own = Agent(Recommending("mini-o3"), budget={"max_turns": 2}, **{"generation.temperature": 0.0}).config
    assert (own.budget.max_turns, own.budget.max_views, own.generation.temperature) == (2, 12, 0.0)
    back = Agent(Recommending("mini-o3"), **{"generation.temperature": 0.5}).replace(**{"generation.temperature": None})
    assert back.config.generation.temperature == 1.0
    assert Agent(Recommending("zwz-4b")).config.policy == "direct"
    assert Agent(Recommending("zwz-4b"), policy="explicit").config.policy == "explicit"
    greedy = Agent(Recommending("qwen3-vl-4b"), **{"generation.temperature": 0.0}).config.generation
    assert (greedy.temperature, greedy.top_p, greedy.top_k, greedy.presence_penalty) == (0.0, 1.0, None, None)
    assert greedy.max_new_tokens == 1024
    low, high = (AgentConfig().with_defaults(PRESETS[f"q-zoom-qwen2.5-vl-7b{end}"].settings) for end in ("", "-hr"))
    assert (low.perception.threshold, low.perception.gate_threshold) == (0.15, 0.05)
    assert (high.perception.threshold, high.perception.gate_threshold) == (0.04, 0.02)


def test_a_saved_configuration_repeats_a_run_whatever_the_preset() -> None:
    saved = AgentConfig.from_yaml(Agent(ScriptedBackend([])).config.to_yaml())
    again = Agent(Recommending("mini-o3"), config=saved).config
    assert again == saved and again.generation.max_new_tokens == 256


@settings(max_examples=25, deadline=None)
@given(
    size=st.tuples(st.integers(4, 6000), st.integers(4, 6000)).filter(lambda size: max(size) < 190 * min(size)),
    coarse=st.none() | st.integers(1, 9000),
    crop=st.none() | st.integers(16, 20000),
)
@pytest.mark.parametrize("name", ["visionthink", "adaptvision"])
def test_the_first_view_is_always_smaller_than_the_full_size(
    name: str, size: tuple[int, int], coarse: int | None, crop: int | None
) -> None:
    defaults = PRESETS[name].budget
    assert defaults is not None
    views = BudgetConfig(coarse_tokens=coarse, crop_max_tokens=crop).view_budget(defaults)

    def shown(low: int, high: int) -> tuple[int, int]:
        return fit_tokens(size, factor=views.factor, min_tokens=low, max_tokens=high)

    first, full = shown(*views.coarse_limits(size)), shown(views.crop_min_tokens, views.crop_max_tokens)
    assert tokens(first, views.factor) < tokens(full, views.factor)
    assert first[0] <= full[0] and first[1] <= full[1]
    if min(size) > 500 and max(size) < 2000 and coarse is None and crop is None:
        assert first[0] == pytest.approx(full[0] / 2, abs=views.factor)


@pytest.mark.parametrize(
    ("name", "call", "region"),
    [
        ("visionthink", '{"name": "resize_image", "arguments": {"action": "resize"}}', (0, 0, 1120, 840)),
        (
            "adaptvision",
            '{"name": "request_local_region", "arguments": {"bbox_2d": [0, 0, 280, 210]}}',
            (0, 0, 560, 420),
        ),
    ],
)
def test_the_call_brings_more_than_the_first_view(name: str, call: str, region: tuple[int, ...], board: Path) -> None:
    preset = PRESETS[name]
    assert preset.budget is not None and preset.protocol is not None
    replies = [f"<think>small</think><tool_call>{call}</tool_call>", "<answer>7</answer>"]
    backend = ScriptedBackend(replies, protocol=preset.protocol, defaults=preset.budget)
    answer = Agent(backend, policy="explicit").run(board, "What is it?")
    status: Status = "answered"
    assert (answer.status, answer.text) == (status, "7")
    _, first, crop = answer.trace.views
    assert (first.width, first.height) == (560, 420)
    assert crop.box == region
    per_pixel = (first.width / 1120, crop.width / (crop.box[2] - crop.box[0]))
    assert per_pixel == (0.5, 1.0)


@pytest.fixture
def board(tmp_path: Path) -> Path:
    from PIL import Image

    path = tmp_path / "board.png"
    Image.new("RGB", (1120, 840), "white").save(path)
    return path
