"""Labels from attention: equal to every recorded one of the published code, and sound on any map."""

import json
from pathlib import Path
from typing import Any, get_args

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as npst
from safetensors.torch import load_file

from parity_run import mean_attention
from qzoom_agent.geometry import Size
from qzoom_agent.perception.labels import (
    BACKGROUND,
    FOREGROUND,
    HEADS,
    IGNORED,
    PUBLISHED,
    LabelRules,
    Mode,
    make_labels,
    picture_cells,
    prepared_prompt,
)

LLAVA = LabelRules(sink=1e-3, blur_kernel=1)
"""The rules for LLaVA-1.5 (rl/recipes/llava_1_5_7b): a sink threshold ten times lower, and a box that does not grow."""
PAPER = LabelRules(foreground=0.2, blur_kernel=1, area_limit=1.0, least_peak=0.0)
"""The papers' formula with the shares that were best in their ablation: a tight box, and no map left out unless its box
is the whole map. Its sinks are visual tokens with a large norm: give norms as the sink map and their limit as
`sink`."""
RECORDED = Path(__file__).parents[1] / "parity" / "pseudo_labels"
FACTS: dict[str, Any] = json.loads((RECORDED / "labels.json").read_text(encoding="utf-8"))
TENSORS = load_file(RECORDED / "labels.safetensors")
PRESETS = {
    "qwen2_5_3b": "qwen2.5-vl-3b",
    "qwen2_5_7b": "qwen2.5-vl-7b",
    "qwen3_4b": "qwen3-vl-4b",
    "qwen3_8b": "qwen3-vl-8b",
}
NAMES = {
    "sink_thresh": "sink",
    "binary_coff": "foreground",
    "bg_coff": "background",
    "pseudo_blur_kernel_size": "blur_kernel",
}


def _rules(case: dict[str, Any]) -> LabelRules:
    return LabelRules(**{ours: case["params"][name] for name, ours in NAMES.items() if name in case["params"]})


def _named(facts: list[dict[str, Any]], key: str) -> Any:
    return pytest.mark.parametrize("case", facts, ids=[str(fact[key]) for fact in facts])


@_named(FACTS["label_cases"], "key")
def test_labels_are_the_recorded_ones(case: dict[str, Any]) -> None:
    heat, sink = (TENSORS[f"{name}_{case['key']}"].numpy() for name in ("attn", "sink"))
    shown = Size(*case["original_image_size_wh"]) if case["params"]["mask_known_bg"] else None
    made = make_labels(heat, sink, _rules(case), shown=shown)
    np.testing.assert_array_equal(made.labels, TENSORS[f"labels_{case['key']}"].numpy())
    np.testing.assert_array_equal(made.excluded, TENSORS[f"excluded_{case['key']}"].numpy().astype(bool))
    assert made.labels.dtype == np.int64
    assert [made.box.y1, made.box.x1, made.box.y2 - 1, made.box.x2 - 1] == case["fg_box_rowcol_inclusive"]
    assert made.box.peak == case["max_after_masking"]
    counts = {name: int((made.labels == label).sum()) for name, label in (("n_fg", 1), ("n_bg", 0), ("n_ignore", -100))}
    assert counts == {name: case[name] for name in counts}
    assert made.usable == (case["n_ignore"] < made.labels.size)


def test_the_defaults_are_those_of_the_published_scripts() -> None:
    scripts = [case for case in FACTS["label_cases"] if case["tag"] == "pipeline"]
    assert scripts
    assert all(_rules(case) == PUBLISHED for case in scripts)


@_named(FACTS["aggregation_cases"], "n")
@pytest.mark.parametrize("which", ["grounding", "sink"])
def test_aggregated_attention_is_the_recorded_one(case: dict[str, Any], which: str) -> None:
    heads = {int(layer): chosen for layer, chosen in case[f"{which}_heads"].items()}
    steps = {
        layer: [TENSORS[f"agg{case['n']}_layer{layer}_step{step}"] for step in range(case["decode_steps"])]
        for layer in heads
    }
    rows, columns = case["map_hw"]
    place: dict[str, Any] = {"start": case["image_start"], "rows": rows, "columns": columns}
    recorded = TENSORS[f"agg{case['n']}_{which}"].numpy()
    official = mean_attention(steps, heads, **place, official=True)
    np.testing.assert_array_equal(official, recorded)
    assert official.dtype == np.float32
    np.testing.assert_allclose(mean_attention(steps, heads, **place), recorded, rtol=1e-3)


def test_an_answer_of_one_token_has_no_attention_to_aggregate() -> None:
    with pytest.raises(ValueError, match="layer 3 has no steps"):
        mean_attention({3: []}, {3: (0,)}, start=0, rows=2, columns=2)


@_named(FACTS["padding_boxes"], "size_wh")
def test_padding_is_where_it_was_recorded(case: dict[str, Any]) -> None:
    rows, columns = picture_cells(Size(*case["size_wh"]), case["grid"])
    assert [rows.start, columns.start, rows.stop - 1, columns.stop - 1] == case["box_rowcol_inclusive"]


@pytest.mark.parametrize("case", FACTS["prepared_prompts"])
def test_prompts_are_the_recorded_ones(case: dict[str, Any]) -> None:
    assert prepared_prompt(case["raw"], case["mode"], keep_short=case["short_prompt"]) == case["prepared"]


def test_a_short_answer_may_be_left_unasked() -> None:
    asked = "Who?\nAnswer the question using a single word or phrase."
    assert prepared_prompt(asked, "textual", keep_short=False) == "Who?"
    assert prepared_prompt(" Who? ", "textual", keep_short=False) == " Who? "


def test_heads_are_the_published_ones() -> None:
    assert set(FACTS["head_table"]) == set(PRESETS)
    for name, modes in FACTS["head_table"].items():
        assert set(modes) == set(get_args(Mode))
        for mode, sets in modes.items():
            ours = HEADS[PRESETS[name]][mode]
            for which, heads in (("grounding", ours.grounding), ("sink", ours.sink)):
                assert {str(layer): list(chosen) for layer, chosen in heads.items()} == sets[which]


# any map ------------------------------------------------------------------------------------------------------------

SHAPES = st.tuples(st.integers(1, 12), st.integers(1, 12))
# no share so small that a share of a share is no number any more
SHARES = st.one_of(st.just(0.0), st.floats(2.0**-20, 0.9))
RULES = st.builds(
    LabelRules,
    sink=st.sampled_from([0.01, 0.5, 2.0]),
    foreground=SHARES,
    background=SHARES,
    blur_kernel=st.integers(1, 7),
    area_limit=st.sampled_from([0.5, 1.0]),
    least_peak=st.sampled_from([0.0, 0.005]),
)
# float32 far from its limits, so that doubling and halving are exact
VALUES = st.one_of(st.just(0.0), st.floats(2.0**-20, 1.0, width=32))


@st.composite
def maps(draw: st.DrawFn, square: bool = False) -> tuple[Any, Any]:
    rows, columns = draw(SHAPES)
    shape = (rows, rows if square else columns)
    heat = draw(npst.arrays(np.float32, shape, elements=VALUES, fill=st.just(0.0)))
    return heat, draw(npst.arrays(np.float32, shape, elements=VALUES, fill=st.just(0.0)))


@given(maps(), RULES)
def test_foreground_lies_inside_the_box_and_background_outside(pair: tuple[Any, Any], rules: LabelRules) -> None:
    heat, sink = pair
    made = make_labels(heat, sink, rules)
    inside = np.zeros(heat.shape, dtype=bool)
    inside[made.box.y1 : made.box.y2, made.box.x1 : made.box.x2] = True
    assert not (made.labels[~inside] == FOREGROUND).any()
    assert not (made.labels[inside] == BACKGROUND).any()
    assert not (made.labels[made.excluded] == FOREGROUND).any()
    assert set(np.unique(made.labels)) <= {FOREGROUND, BACKGROUND, IGNORED}
    np.testing.assert_array_equal(made.excluded, sink.astype(np.float64) >= rules.sink)
    if made.usable:
        # the peak itself is foreground, so a labelled map always has both a place and a reason
        where = np.unravel_index(np.argmax(np.where(made.excluded, -1, heat)), heat.shape)
        assert made.labels[where] == FOREGROUND


@given(maps(square=True), RULES, st.integers(1, 400), st.integers(1, 400))
def test_padding_is_background_or_the_map_is_left_out(
    pair: tuple[Any, Any], rules: LabelRules, width: int, height: int
) -> None:
    heat, sink = pair
    made = make_labels(heat, sink, rules, shown=Size(width, height))
    padding = np.ones(heat.shape, dtype=bool)
    padding[picture_cells(Size(width, height), len(heat))] = False
    assert made.excluded[padding].all()
    assert set(made.labels[padding].tolist()) <= ({BACKGROUND} if made.usable else {IGNORED})


@given(maps(), RULES, st.integers(-20, 20))
def test_labels_do_not_depend_on_the_scale_of_attention(pair: tuple[Any, Any], rules: LabelRules, power: int) -> None:
    heat, sink = pair
    scaled = heat * np.float32(2.0**power)
    free = rules.model_copy(update={"least_peak": 0.0})
    made, again = make_labels(heat, sink, free), make_labels(scaled, sink, free)
    np.testing.assert_array_equal(made.labels, again.labels)
    assert made.box[:4] == again.box[:4]
    # the one absolute rule only ever takes all labels away
    strict = make_labels(scaled, sink, rules)
    assert not strict.usable or (strict.labels == made.labels).all()


@given(maps(), RULES)
def test_a_transposed_map_has_transposed_labels(pair: tuple[Any, Any], rules: LabelRules) -> None:
    heat, sink = pair
    np.testing.assert_array_equal(make_labels(heat.T, sink.T, rules).labels, make_labels(heat, sink, rules).labels.T)


@given(maps(), RULES)
def test_a_wider_blur_only_takes_background_away(pair: tuple[Any, Any], rules: LabelRules) -> None:
    heat, sink = pair
    tight = make_labels(heat, sink, rules.model_copy(update={"blur_kernel": 1}))
    wide = make_labels(heat, sink, rules)
    assert wide.box.x1 <= tight.box.x1 and wide.box.x2 >= tight.box.x2
    if wide.usable:
        assert ((wide.labels == tight.labels) | (wide.labels == IGNORED)).all()
        np.testing.assert_array_equal(wide.labels == FOREGROUND, tight.labels == FOREGROUND)


def test_even_kernels_count_as_the_next_odd_one() -> None:
    heat = np.zeros((9, 9))
    heat[4, 4] = 1
    two, three = (make_labels(heat, rules=LabelRules(blur_kernel=width)).box for width in (2, 3))
    assert two == three == (3, 3, 6, 6, 1.0)


def test_presets_differ_where_they_say() -> None:
    heat = np.full((10, 10), 0.001)
    heat[2, 3] = 0.004
    sink = np.zeros((10, 10))
    sink[0, 0] = 0.002
    assert not make_labels(heat, sink, PUBLISHED).usable
    paper = make_labels(heat, sink, PAPER)
    assert not paper.usable, "0.001 is more than a fifth of the peak everywhere, so the box is the whole map"
    heat[heat < 0.004] = 0.0001
    assert make_labels(heat, sink, PAPER).box == (3, 2, 4, 3, 0.004)
    assert (make_labels(heat, sink, PAPER).labels == BACKGROUND).sum() == 99
    assert make_labels(heat, sink, LLAVA).excluded[0, 0]


@pytest.mark.parametrize(
    ("heat", "sink", "shown", "message"),
    [
        (np.ones((2, 3)), np.ones((3, 2)), None, "same"),
        (np.ones(6), None, None, "same"),
        (np.ones((0, 3)), None, None, "same"),
        (np.full((2, 2), np.nan), None, None, "not finite"),
        (np.ones((2, 3)), None, Size(4, 4), "square map, not 2 x 3"),
    ],
)
def test_maps_that_are_none(heat: Any, sink: Any, shown: Size | None, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make_labels(heat, sink, shown=shown)
