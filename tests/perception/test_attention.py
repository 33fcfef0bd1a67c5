"""Recomputed attention is the stock model's own, on every family, and a recording leaves no trace on the model."""

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from copy import deepcopy
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

from parity_run import mean_attention
from qzoom_agent.errors import BackendError
from qzoom_agent.models.hf import HFBackend
from qzoom_agent.perception.adapters import text_model
from qzoom_agent.perception.attention import norm_map, record, response_map
from tests.tiny_models import Family, build

FAMILIES: tuple[Family, ...] = ("qwen2_5_vl", "qwen3_vl", "llava")
LAYERS, HEADS = 3, 4
ROWS, COLUMNS = {"qwen2_5_vl": 3, "qwen3_vl": 3, "llava": 4}, {"qwen2_5_vl": 5, "qwen3_vl": 5, "llava": 4}
PICKED = {0: (3, 1), 2: (0, 2, 3)}


@pytest.fixture(scope="module")
def load(tmp_path_factory: pytest.TempPathFactory) -> Callable[[Family], PreTrainedModel]:
    loaded: dict[Family, PreTrainedModel] = {}

    def get(family: Family) -> PreTrainedModel:
        if family not in loaded:
            folder = build(family, tmp_path_factory.mktemp(family), layers=LAYERS)
            loaded[family] = HFBackend.load(str(folder), device="cpu", dtype="float32").model
        return loaded[family]

    return get


def example(
    model: PreTrainedModel, family: Family, *, before: int = 6, after: int = 9, seed: int = 0
) -> dict[str, Any]:
    """Inputs of a prompt of random text around an image of noise."""
    random = torch.Generator().manual_seed(seed)
    tokens = ROWS[family] * COLUMNS[family]
    words = torch.randint(20, 200, (before + after,), generator=random)
    image = torch.full((tokens,), int(model.config.image_token_id))
    marks = [] if family == "llava" else [model.config.vision_start_token_id, model.config.vision_end_token_id]
    parts = [words[:before], torch.tensor(marks[:1]), image, torch.tensor(marks[1:]), words[before:]]
    ids = torch.cat([part.long() for part in parts])[None]
    inputs: dict[str, Any] = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    if family == "llava":
        return inputs | {"pixel_values": torch.randn(1, 3, 56, 56, generator=random)}
    grid = torch.tensor([[1, 2 * ROWS[family], 2 * COLUMNS[family]]])
    patch = 3 * 2 * int(model.config.vision_config.patch_size) ** 2
    return inputs | {
        "pixel_values": torch.randn(4 * tokens, patch, generator=random),
        "image_grid_thw": grid,
        "mm_token_type_ids": (ids == model.config.image_token_id).int(),
    }


def image_start(model: PreTrainedModel, inputs: dict[str, Any], row: int = 0) -> int:
    return int((inputs["input_ids"][row] == model.config.image_token_id).nonzero()[0])


@torch.no_grad()
def stock_attention(model: PreTrainedModel, inputs: dict[str, Any]) -> tuple[Tensor, ...]:
    """All attention of the model itself, (batch, heads, tokens, tokens) a layer, and its kernel as it was."""
    kernel = model.config._attn_implementation
    model.set_attn_implementation("eager")
    try:
        found: tuple[Tensor, ...] = model(**inputs, use_cache=False, output_attentions=True).attentions
    finally:
        model.set_attn_implementation(kernel)
    assert len(found) == LAYERS and found[0] is not None
    return found


def hooks(model: PreTrainedModel) -> int:
    return sum(len(module._forward_pre_hooks) + len(module._forward_hooks) for module in model.modules())


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("kernel", ["sdpa", "eager"])
def test_attention_is_the_stock_models_on_any_kernel(
    load: Callable[[Family], PreTrainedModel], family: Family, kernel: str
) -> None:
    model = load(family)
    inputs = example(model, family)
    stock = stock_attention(model, inputs)
    before = model.config._attn_implementation
    model.set_attn_implementation(kernel)
    try:
        with torch.no_grad(), record(model, range(LAYERS)) as recorded:
            model(**inputs)
    finally:
        model.set_attn_implementation(before)
    everything = slice(None)
    for layer in range(LAYERS):
        rows = recorded.attention(layer, range(HEADS), everything, everything)
        assert rows.dtype == torch.float32 and not rows.requires_grad
        torch.testing.assert_close(rows, stock[layer], atol=1e-5, rtol=0)
        assert rows.std() > 0.02, "flat attention would prove nothing"
    # a part of the rows, columns and heads is cut from the whole
    part = recorded.attention(2, (3, 0), (-1, 12), slice(5, 11))
    torch.testing.assert_close(part, stock[2][:, [3, 0]][:, :, [-1, 12], 5:11], atol=1e-5, rtol=0)


@pytest.mark.parametrize("family", FAMILIES)
def test_generation_is_joined_to_what_one_forward_gives(
    load: Callable[[Family], PreTrainedModel], family: Family
) -> None:
    model = load(family)
    inputs = example(model, family)
    length = inputs["input_ids"].shape[1]
    with record(model, tuple(PICKED)) as recorded:
        ids = model.generate(**inputs, max_new_tokens=5, min_new_tokens=5, do_sample=False)
    assert ids.shape[1] == length + 5
    fed = ids[:, :-1]  # the last token is never fed back
    whole: dict[str, Any] = {**inputs, "input_ids": fed, "attention_mask": torch.ones_like(fed)}
    if "mm_token_type_ids" in inputs:
        whole["mm_token_type_ids"] = (fed == model.config.image_token_id).int()
    stock = stock_attention(model, whole)
    for layer, heads in PICKED.items():
        rows = recorded.attention(layer, heads, slice(None), slice(None))
        torch.testing.assert_close(rows, stock[layer][:, list(heads)], atol=1e-5, rtol=0)

    # and the map is the mean of the published collection, which reads the same rows step by step
    place: dict[str, Any] = {"start": image_start(model, inputs), "rows": ROWS[family], "columns": COLUMNS[family]}
    steps = {layer: [stock[layer][0, :, row, : row + 1] for row in range(length, length + 4)] for layer in PICKED}
    made = response_map(recorded, PICKED, response=slice(length, length + 4), **place)
    assert made.shape == (ROWS[family], COLUMNS[family]) and made.dtype == np.float32
    np.testing.assert_allclose(made, mean_attention(steps, PICKED, **place), atol=1e-5)
    assert made.max() > 0.01


@pytest.mark.parametrize("family", FAMILIES)
def test_rows_padded_on_the_left_are_those_of_their_own(
    load: Callable[[Family], PreTrainedModel], family: Family
) -> None:
    model = load(family)
    long, short = example(model, family), example(model, family, before=3, after=5, seed=1)
    gap = long["input_ids"].shape[1] - short["input_ids"].shape[1]
    padded = {
        name: torch.nn.functional.pad(short[name], (gap, 0))
        for name in ("input_ids", "attention_mask", "mm_token_type_ids")
        if name in short
    }
    both = {name: torch.cat((long[name], padded.get(name, short[name]))) for name in long}
    with torch.no_grad(), record(model, [1]) as recorded:
        model(**both)
    rows = recorded.attention(1, range(HEADS), slice(None), slice(None), mask=both["attention_mask"])
    for row, inputs, skipped in ((0, long, 0), (1, short, gap)):
        alone = stock_attention(model, inputs)[1][0]
        torch.testing.assert_close(rows[row, :, skipped:, skipped:], alone, atol=1e-5, rtol=0)
        assert (rows[row, :, skipped:, :skipped] == 0).all()
        place: dict[str, Any] = {
            "start": skipped + image_start(model, inputs),
            "rows": ROWS[family],
            "columns": COLUMNS[family],
        }
        made = response_map(
            recorded, {1: (2,)}, response=slice(-3, None), row=row, mask=both["attention_mask"], **place
        )
        start, tokens = image_start(model, inputs), ROWS[family] * COLUMNS[family]
        expected = alone[2, -3:, start : start + tokens].mean(0)
        np.testing.assert_allclose(made.ravel(), expected.numpy(), atol=1e-5)


@pytest.mark.parametrize("family", FAMILIES)
def test_norms_are_of_the_states_between_layers(load: Callable[[Family], PreTrainedModel], family: Family) -> None:
    model = load(family)
    inputs = example(model, family)
    with torch.no_grad(), record(model, [0, 2]) as recorded:
        states = model(**inputs, use_cache=False, output_hidden_states=True).hidden_states
    visual = inputs["input_ids"][0] == model.config.image_token_id
    for layer in (0, 2):
        norms, expected = recorded.states(layer)[0].norm(dim=-1), states[layer][0].norm(dim=-1)
        # Qwen3-VL adds image features to a layer's output after the copy that `hidden_states` holds
        same = ~visual if family == "qwen3_vl" and layer else torch.ones_like(visual)
        torch.testing.assert_close(norms[same], expected[same], atol=0, rtol=1e-5)
        place = {"start": image_start(model, inputs), "rows": ROWS[family], "columns": COLUMNS[family]}
        np.testing.assert_array_equal(norm_map(recorded, layer, **place).ravel(), norms[visual].numpy())


def test_no_heads_make_an_empty_map(load: Callable[[Family], PreTrainedModel]) -> None:
    model = load("llava")
    with record(model, []) as recorded:
        pass
    made = response_map(recorded, {}, response=[3], start=0, rows=2, columns=3)
    np.testing.assert_array_equal(made, np.zeros((2, 3)))


def test_half_precision_is_summed_in_full(load: Callable[[Family], PreTrainedModel]) -> None:
    model = load("llava")
    half = deepcopy(model).to(torch.bfloat16)
    inputs = example(model, "llava")
    with torch.inference_mode(), record(half, [1]) as recorded:
        half(**inputs | {"pixel_values": inputs["pixel_values"].bfloat16()})
    rows = recorded.attention(1, range(HEADS), slice(None), slice(None))
    assert rows.dtype == torch.float32
    torch.testing.assert_close(rows.sum(-1), torch.ones(rows.shape[:-1]), atol=1e-6, rtol=0)
    torch.testing.assert_close(rows, stock_attention(model, inputs)[1], atol=0.05, rtol=0)


def test_recordings_nest_and_leave_nothing_behind(load: Callable[[Family], PreTrainedModel]) -> None:
    model = load("qwen2_5_vl")
    first, second = example(model, "qwen2_5_vl"), example(model, "qwen2_5_vl", seed=5)
    before, names = hooks(model), {id(module): sorted(vars(module)) for module in model.modules()}
    with torch.no_grad(), record(model, [0, 1]) as outer:
        model(**first)
        with record(model, [1]) as inner:
            assert hooks(model) == before + 3
            model(**second)
        assert hooks(model) == before + 2
        model(**first)
    assert hooks(model) == before
    for recorded, inputs in ((outer, first), (inner, second)):
        rows = recorded.attention(1, [0], slice(None), slice(None))
        torch.testing.assert_close(rows, stock_attention(model, inputs)[1][:, :1], atol=1e-5, rtol=0)
    with pytest.raises(RuntimeError, match="stop"), record(model, range(LAYERS)):
        assert hooks(model) == before + LAYERS
        raise RuntimeError("stop")
    assert hooks(model) == before
    assert {id(module): sorted(vars(module)) for module in model.modules()} == names


def test_a_recording_sees_only_its_own_thread(load: Callable[[Family], PreTrainedModel]) -> None:
    model = load("qwen2_5_vl")
    inputs = example(model, "qwen2_5_vl")
    with record(model, [0]) as recorded, ThreadPoolExecutor(1) as pool:
        pool.submit(lambda: model(**inputs)).result()
    with pytest.raises(BackendError, match="Nothing was recorded of layer 0"):
        recorded.attention(0, [0], [0], [0])


def test_what_cannot_be_computed_is_refused(load: Callable[[Family], PreTrainedModel]) -> None:
    model = load("qwen2_5_vl")
    inputs = example(model, "qwen2_5_vl")
    with pytest.raises(BackendError, match="layers are 0 to 2"), record(model, [1, 16]):
        pass
    with torch.no_grad():
        held = model(**inputs).past_key_values
        with pytest.raises(BackendError, match="tokens that were not recorded"), record(model, [1]):
            model(input_ids=torch.tensor([[33]]), past_key_values=held)
        assert not any(layer._forward_pre_hooks for layer in text_model(model).layers)
        with record(model, [1]) as recorded:
            model(**inputs)
    with pytest.raises(BackendError, match=r"Nothing was recorded of layer 2 \(recorded: 1\)"):
        recorded.attention(2, [0], [0], [0])
    with pytest.raises(BackendError, match="heads are 0 to 3"):
        recorded.attention(1, [0, 4], [0], [0])
    with pytest.raises(ValueError, match="no token of the answer"):
        response_map(recorded, {1: (0,)}, response=[], start=7, rows=3, columns=5)
