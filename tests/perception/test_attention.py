"""Attention that is computed from the inputs of layers is the stock model's own, on every family."""

from collections.abc import Callable, Collection
from copy import deepcopy
from functools import cache
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

from parity_run import mean_attention
from qzoom_agent.errors import BackendError
from qzoom_agent.models.hf import HFBackend
from qzoom_agent.perception.attention import LayerInputs, layer_inputs, norm_map, response_map
from qzoom_agent.perception.decoder import Decoder
from qzoom_agent.perception.masks import layer_masks
from qzoom_agent.perception.transformers_versions import image_features
from tests.tiny_models import Family, build

FAMILIES: tuple[Family, ...] = ("qwen2_5_vl", "qwen3_vl", "llava")
LAYERS, HEADS = 3, 4
ROWS, COLUMNS = {"qwen2_5_vl": 3, "qwen3_vl": 3, "llava": 4}, {"qwen2_5_vl": 5, "qwen3_vl": 5, "llava": 4}
PICKED = {0: (3, 1), 2: (0, 2, 3)}


@pytest.fixture(scope="module")
def load(tmp_path_factory: pytest.TempPathFactory) -> Callable[[Family], PreTrainedModel]:
    def get(family: Family) -> PreTrainedModel:
        folder = build(family, tmp_path_factory.mktemp(family), layers=LAYERS)
        return HFBackend.load(str(folder), device="cpu", dtype="float32").model

    return cache(get)


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


@torch.no_grad()
def kept_inputs(model: PreTrainedModel, inputs: dict[str, Any], layers: Collection[int]) -> LayerInputs:
    """The inputs of these layers, of rows that may be padded on the left."""
    decoder, ids, valid = Decoder(model), inputs["input_ids"], inputs["attention_mask"].bool()
    pixels = {name: inputs[name] for name in ("pixel_values", "image_grid_thw") if name in inputs}
    new = decoder.embed(ids, [image_features(model, pixels)])
    if "image_grid_thw" in inputs:
        places = {name: inputs[name] for name in ("mm_token_type_ids", "image_grid_thw", "attention_mask")}
        positions = model.base_model.get_rope_index(ids, **places)[0]
    else:
        positions = (valid.cumsum(1) - 1).clamp(min=0)
    rotary, mask = decoder.rotary(new.hidden, positions), layer_masks(model.config, valid, new.hidden)
    return layer_inputs(decoder, new, layers, rotary=rotary, mask=mask)


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
        kept = kept_inputs(model, inputs, range(LAYERS))
    finally:
        model.set_attn_implementation(before)
    everything = slice(None)
    for layer in range(LAYERS):
        rows = kept.attention(layer, range(HEADS), everything, everything)
        assert rows.dtype == torch.float32 and not rows.requires_grad
        torch.testing.assert_close(rows, stock[layer], atol=1e-5, rtol=0)
        assert rows.std() > 0.02, "flat attention would prove nothing"
    # a part of the rows, columns and heads is cut from the whole
    part = kept.attention(2, (3, 0), (-1, 12), slice(5, 11))
    torch.testing.assert_close(part, stock[2][:, [3, 0]][:, :, [-1, 12], 5:11], atol=1e-5, rtol=0)


@pytest.mark.parametrize("family", FAMILIES)
def test_the_map_of_an_answer_is_that_of_the_published_collection(
    load: Callable[[Family], PreTrainedModel], family: Family
) -> None:
    model = load(family)
    inputs = example(model, family)
    length = inputs["input_ids"].shape[1] - 4
    stock, kept = stock_attention(model, inputs), kept_inputs(model, inputs, PICKED)
    # which reads the same rows step by step
    place: dict[str, Any] = {"start": image_start(model, inputs), "rows": ROWS[family], "columns": COLUMNS[family]}
    steps = {layer: [stock[layer][0, :, row, : row + 1] for row in range(length, length + 4)] for layer in PICKED}
    made = response_map(kept, PICKED, response=slice(length, length + 4), **place)
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
    kept = kept_inputs(model, both, [1])
    rows = kept.attention(1, range(HEADS), slice(None), slice(None), mask=both["attention_mask"])
    for row, inputs, skipped in ((0, long, 0), (1, short, gap)):
        alone = stock_attention(model, inputs)[1][0]
        torch.testing.assert_close(rows[row, :, skipped:, skipped:], alone, atol=1e-5, rtol=0)
        assert (rows[row, :, skipped:, :skipped] == 0).all()
        place: dict[str, Any] = {
            "start": skipped + image_start(model, inputs),
            "rows": ROWS[family],
            "columns": COLUMNS[family],
        }
        made = response_map(kept, {1: (2,)}, response=slice(-3, None), row=row, mask=both["attention_mask"], **place)
        start, tokens = image_start(model, inputs), ROWS[family] * COLUMNS[family]
        expected = alone[2, -3:, start : start + tokens].mean(0)
        np.testing.assert_allclose(made.ravel(), expected.numpy(), atol=1e-5)


@pytest.mark.parametrize("family", FAMILIES)
def test_norms_are_of_the_states_between_layers(load: Callable[[Family], PreTrainedModel], family: Family) -> None:
    model = load(family)
    inputs = example(model, family)
    kept = kept_inputs(model, inputs, [0, 2])
    with torch.no_grad():
        states = model(**inputs, use_cache=False, output_hidden_states=True).hidden_states
    visual = inputs["input_ids"][0] == model.config.image_token_id
    for layer in (0, 2):
        norms, expected = kept.states[layer][0].norm(dim=-1), states[layer][0].norm(dim=-1)
        # Qwen3-VL adds image features to a layer's output after the copy that `hidden_states` holds
        same = ~visual if family == "qwen3_vl" and layer else torch.ones_like(visual)
        torch.testing.assert_close(norms[same], expected[same], atol=0, rtol=1e-5)
        place = {"start": image_start(model, inputs), "rows": ROWS[family], "columns": COLUMNS[family]}
        np.testing.assert_array_equal(norm_map(kept, layer, **place).ravel(), norms[visual].numpy())


def test_no_heads_make_an_empty_map(load: Callable[[Family], PreTrainedModel]) -> None:
    model = load("llava")
    kept = kept_inputs(model, example(model, "llava"), [])
    made = response_map(kept, {}, response=[3], start=0, rows=2, columns=3)
    np.testing.assert_array_equal(made, np.zeros((2, 3)))


def test_half_precision_is_summed_in_full(load: Callable[[Family], PreTrainedModel]) -> None:
    model = load("llava")
    half = deepcopy(model).to(torch.bfloat16)
    inputs = example(model, "llava")
    kept = kept_inputs(half, inputs | {"pixel_values": inputs["pixel_values"].bfloat16()}, [1])
    rows = kept.attention(1, range(HEADS), slice(None), slice(None))
    assert rows.dtype == torch.float32
    torch.testing.assert_close(rows.sum(-1), torch.ones(rows.shape[:-1]), atol=1e-6, rtol=0)
    torch.testing.assert_close(rows, stock_attention(model, inputs)[1], atol=0.05, rtol=0)


def test_what_cannot_be_computed_is_refused(load: Callable[[Family], PreTrainedModel]) -> None:
    model = load("qwen2_5_vl")
    inputs = example(model, "qwen2_5_vl")
    with pytest.raises(BackendError, match="layers are 0 to 2"):
        kept_inputs(model, inputs, [1, 16])
    kept = kept_inputs(model, inputs, [1])
    with pytest.raises(BackendError, match="heads are 0 to 3"):
        kept.attention(1, [0, 4], [0], [0])
    with pytest.raises(ValueError, match="no token of the answer"):
        response_map(kept, {1: (0,)}, response=[], start=7, rows=3, columns=5)
