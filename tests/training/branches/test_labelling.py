"""Labels from attention: the maps are the base's own, the labels those that a hand computes."""

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from datasets import Dataset, load_from_disk

from qzoom_agent.errors import ConfigError
from qzoom_agent.geometry import Box, fit_tokens
from qzoom_agent.models.hf import HFBackend
from qzoom_agent.perception.decoder import Decoder
from qzoom_agent.perception.labels import BACKGROUND, FOREGROUND, IGNORED, HeadSet, LabelRules
from qzoom_agent.protocols import PROTOCOLS
from qzoom_agent.training.branches import base_inference, labelling
from qzoom_agent.training.branches import sharded_table as parts
from qzoom_agent.training.branches.base_inference import (
    answer_ids,
    ask,
    attend,
    embed_rows,
    generate_answers,
    with_answer,
)
from qzoom_agent.training.branches.branch_recipe import Asking, Labelling
from qzoom_agent.training.branches.dataset import DatasetSpec, Record, Records, load_records, record_batches
from qzoom_agent.training.branches.labelling import collect, heads_for, label, labels_on_grid, resized
from tests.tiny_models import MIXED, Family
from tests.training.branches.conftest import Load, picture

SLOW = pytest.mark.slow
FAMILIES: tuple[Family, ...] = ("qwen2_5_vl", "qwen3_vl", "qwen3_5", "gemma4", "llava")


def test_resizing_keeps_the_attention() -> None:
    heat = np.arange(16, dtype=np.float32).reshape(4, 4)
    smaller = resized(heat, (2, 2))
    assert smaller.tolist() == [[0 + 1 + 4 + 5, 2 + 3 + 6 + 7], [8 + 9 + 12 + 13, 10 + 11 + 14 + 15]]
    assert resized(heat, (8, 8)).sum() == pytest.approx(heat.sum(), rel=0.05)
    # of norms the mean counts, not the sum
    assert resized(heat, (2, 2), mass=False)[0, 0] == pytest.approx(2.5)


def test_labels_are_those_that_a_hand_computes() -> None:
    """4 x 6 cells joined to 2 x 3 first, which then hold .6, .02, .01 and .1, .28, 0 of the attention."""
    heat = np.zeros((4, 6), dtype=np.float32)
    heat[0, 0], heat[1, 1], heat[0, 3], heat[1, 5], heat[3, 0], heat[3, 3] = 0.4, 0.2, 0.02, 0.01, 0.1, 0.28
    rules = LabelRules(foreground=0.25, background=0.05, blur_kernel=1, area_limit=1.0)
    fg, bg, ignored = FOREGROUND, BACKGROUND, IGNORED
    found = labels_on_grid(heat, None, (2, 3), rules, norm_ratio=None).labels
    # .28 is above a quarter of .6, and what lies in the box around both is neither
    assert found.tolist() == [[fg, ignored, bg], [ignored, fg, bg]]
    heat[3, 3] = 0.1
    found = labels_on_grid(heat, None, (2, 3), rules, norm_ratio=None).labels
    # .02 is below a twentieth of .6, .1 between the two
    assert found.tolist() == [[fg, bg, bg], [ignored, ignored, bg]]


def test_sinks_by_norm_are_no_foreground() -> None:
    heat = np.full((3, 3), 0.001, dtype=np.float32)
    heat[0, 0], heat[2, 2] = 0.9, 0.3
    norms = np.ones((3, 3), dtype=np.float32)
    norms[0, 0] = 5.0
    rules = LabelRules(blur_kernel=1)
    assert labels_on_grid(heat, norms, (3, 3), rules, norm_ratio=4.0).labels[0, 0] == BACKGROUND
    assert labels_on_grid(heat, norms, (3, 3), rules, norm_ratio=4.0).labels[2, 2] == FOREGROUND
    # no sink by a higher ratio, and the box around both is the whole map: nothing is labelled
    assert set(labels_on_grid(heat, norms, (3, 3), rules, norm_ratio=6.0).labels.flatten()) == {IGNORED}


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("asking", ["answer", pytest.param("prediction", marks=SLOW)])
def test_maps_are_the_attention_of_the_answer(family: Family, asking: Asking, load: Load, rows: Records) -> None:
    """Against what the model itself reports when it is made to report its attention."""
    backend = load(family)
    some = [rows[0], rows[1], rows[4]]
    asked = ask(backend, some, [None] * 3)
    said = ["407", "the green one", ""]
    lower = 1 if family in MIXED else 4  # every second layer has full attention
    heads = HeadSet({lower: (1, 3), 5: (0,)}, {3: (2,)})
    found = [maps for (maps,) in collect(backend, asked, said, heads, Labelling(asking=asking))]
    backend.model.set_attn_implementation("eager")
    for one, text, (heat, sink) in zip(asked, said, found, strict=True):
        ids = answer_ids(backend, text)
        new, rotary, mask, _ = embed_rows(backend, [one.session], [with_answer(one.ready, ids)])
        weights = attention(backend, new, rotary, mask)
        length, (start, high, wide) = new.hidden.shape[1], one.grids[0]
        first = length - len(ids)
        queries = {"answer": slice(first, length - 1), "prediction": slice(first - 1, length - 2)}
        where = queries[asking] if len(ids) > 1 else slice(first - (asking == "prediction"), length)
        if len(ids) == 1 and asking == "prediction":
            where = slice(first - 1, first)
        image = slice(start, start + high * wide)
        rows_ = [weights[layer][0, head, where, image].mean(0) for layer, head in ((lower, 1), (lower, 3), (5, 0))]
        assert torch.allclose(torch.from_numpy(heat).flatten(), torch.stack(rows_).mean(0), atol=1e-5)
        assert torch.allclose(torch.from_numpy(sink).flatten(), weights[3][0, 2, where, image].mean(0), atol=1e-5)


def test_the_tokens_that_ask_are_those_that_generation_feeds_back(load: Load, rows: Records) -> None:
    """Published maps are read in the steps of generation that decode: one for each token of an answer that ends."""
    backend = load("qwen2_5_vl")
    (asked,) = ask(backend, [rows[0]], [None])
    prompt = torch.tensor([[9, 8, 7, 6]])
    fed: list[int] = []
    hook = (
        Decoder(backend.model)
        .text.layers[0]
        .register_forward_pre_hook(
            lambda _m, args, kwargs: fed.append((args[0] if args else kwargs["hidden_states"]).shape[1]),
            with_kwargs=True,
        )
    )
    free = backend.model.generate(input_ids=prompt, max_new_tokens=6, do_sample=False, eos_token_id=None)
    said = free[0, 4:].tolist()
    ends = next(at for at in range(1, 6) if said[at] not in said[:at])
    fed.clear()
    backend.model.generate(input_ids=prompt, max_new_tokens=9, do_sample=False, eos_token_id=said[ends])
    hook.remove()
    text = "x" * ends
    assert len(answer_ids(backend, text)) == ends + 1  # one token a letter, and the end
    assert fed[0] > 1 and fed[1:] == [1] * ends
    assert len(attend(backend, [asked], [text], [5], "answer").asking[0]) == ends


def test_a_sink_of_one_token_is_dropped_before_the_map_is_joined() -> None:
    """On 24 x 24 tokens one has ten times the norm of the others and most of the attention; the answer is elsewhere."""
    heat = np.full((24, 24), 1e-5, dtype=np.float32)
    heat[15:17, 15:17], heat[2, 2] = 0.05, 0.5
    norms = np.ones((24, 24), dtype=np.float32)
    norms[2, 2] = 10.0
    rules = LabelRules(blur_kernel=1)
    for side in (24, 12, 8):
        found = labels_on_grid(heat, norms, (side, side), rules, norm_ratio=4.0)
        step = 24 // side
        assert found.usable and found.labels[2 // step, 2 // step] == BACKGROUND
        assert found.labels[15 // step, 15 // step] == FOREGROUND
        by_heads = labels_on_grid(
            heat, norms / 100, (side, side), rules.model_copy(update={"sink": 0.05}), norm_ratio=None
        )
        assert (by_heads.labels == found.labels).all()


def attention(backend, new, rotary, mask):  # type: ignore[no-untyped-def]
    """Attention of every layer as the stock layers compute it."""
    kept = {}
    decoder = Decoder(backend.model)
    hooks = [
        layer.self_attn.register_forward_hook(lambda _m, _i, out, at=at: kept.__setitem__(at, out[1]))
        for at, layer in enumerate(decoder.text.layers)
        if hasattr(layer, "self_attn")
    ]
    with torch.no_grad():
        decoder.run(new, range(decoder.depth), rotary=rotary, mask=mask)
    for hook in hooks:
        hook.remove()
    return kept


@pytest.mark.parametrize(
    "family",
    [pytest.param(name, marks=pytest.mark.slow if name in ("qwen3_vl", "gemma4") else ()) for name in FAMILIES],
)
def test_answers_do_not_depend_on_who_shares_the_image(family: Family, load: Load, rows: Records) -> None:
    backend = load(family)
    some = [rows[index] for index in range(4)]  # three of one picture, one of another
    together = generate_answers(backend, ask(backend, some, [None] * 4), max_new_tokens=4)
    alone = [generate_answers(backend, ask(backend, [row], [None]), max_new_tokens=4)[0] for row in some]
    assert together == alone and any(together)


def test_a_killed_labelling_goes_on_behind_its_last_part(
    load: Load,
    rows: Records,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(parts, "PART", 4)
    backend = load("qwen2_5_vl")
    how = Labelling(grounding={5: [0]}, max_new_tokens=4, batch=2, sink="norm")
    whole = label(backend, rows, how, tmp_path / "whole", k=3)
    assert list(whole["row"]) == list(range(12)) and np.shape(whole[0]["map"]) == np.shape(whole[0]["sink"]) == (8, 8)

    class Killed(Exception):
        pass

    def killed(records: Records, indices: range, size: int) -> Iterator[tuple[range, list[Record]]]:
        if indices.start == 8:
            raise Killed
        return record_batches(records, indices, size)

    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(parts, "record_batches", killed)
        label(backend, rows, how, tmp_path / "twice", k=3)
    assert "labelled: 8 of 12" in capsys.readouterr().out
    again = label(backend, rows, how, tmp_path / "twice", k=3)
    assert capsys.readouterr().out == "labelled: 12 of 12\n" and again.to_dict() == whole.to_dict()
    # and what is there is a table like any other
    assert load_from_disk(str(tmp_path / "twice")).to_dict() == whole.to_dict()
    assert not list((tmp_path / "twice").glob("*part*"))


def test_a_table_that_was_killed_while_it_was_joined_is_joined_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(parts, "PART", 2)

    def made(indices: range) -> list[dict[str, int]]:
        return [{"row": index} for index in indices]

    def write(folder: Path) -> Dataset:
        return parts.write_parts(folder, 5, made, progress="made")

    real = Dataset.save_to_disk

    def killed(self: Dataset, folder: str) -> None:
        real(self, folder)
        if Path(folder) == tmp_path / "table":
            (Path(folder) / parts.FINISHED).unlink()
            raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(Dataset, "save_to_disk", killed)
        write(tmp_path / "table")
    assert list(write(tmp_path / "table")["row"]) == list(load_from_disk(str(tmp_path / "table"))["row"]) == [*range(5)]
    assert sorted(path.name for path in (tmp_path / "table").iterdir() if not path.suffix) == []


def test_what_is_right_is_judged_by_all_answers(load: Load, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """DocVQA's second reference, said in a sentence."""
    rows = {"image": [picture(0)] * 2, "question": ["When?"] * 2, "answer": [["5/1", "January 5"], ["noon"]]}
    Dataset.from_dict(rows).save_to_disk(str(tmp_path / "table"))
    monkeypatch.setattr(base_inference, "generate_answers", lambda *_, **__: ["The date is January 5."] * 2)
    found = label(
        load("qwen2_5_vl"),
        load_records([DatasetSpec(path=str(tmp_path / "table"))]),
        Labelling(grounding={5: [0]}),
        tmp_path / "labels",
        k=3,
    )
    assert list(found["right"]) == [True, False]


@pytest.mark.parametrize("short", [True, False])
def test_published_labels_may_be_asked_for_without_the_wish_for_a_short_answer(
    short: bool, load: Load, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    Dataset.from_dict({"image": [picture(0)], "question": ["When?"], "answer": ["noon"]}).save_to_disk(
        str(tmp_path / "table")
    )
    asked: list[str] = []
    real = base_inference.ask

    def heard(backend, records, *args, **kwargs):  # type: ignore[no-untyped-def]
        asked.extend(record.question for record in records)
        return real(backend, records, *args, **kwargs)

    monkeypatch.setattr(base_inference, "ask", heard)
    monkeypatch.setitem(labelling.HEADS, "qwen2_5_vl", {"textual": HeadSet({5: (0,)}, {})})
    wish = "Answer the question using a single word or phrase."
    source = DatasetSpec(path=str(tmp_path / "table"), suffix=f"\n{wish}", short_labels=short)
    how = Labelling(grounding="published", max_new_tokens=2)
    label(load("qwen2_5_vl"), load_records([source]), how, tmp_path / "labels", k=3)
    assert asked == [f"When?\n{wish}" if short else "When?"]


def test_of_a_call_its_own_tokens_say_where_to_look(tmp_path: Path) -> None:
    backend = HFBackend.load("nano")
    rows = load_records([DatasetSpec(path="needle", limit=6, a_board=2, tasks=("needle-scene",))])
    how = Labelling(tokens=64, grounding={5: [0, 1]}, response="call", asking="prediction", max_new_tokens=8, batch=3)
    table = label(backend, rows, how, tmp_path, k=5)
    found = 0
    for row in table:
        assert row["answer"].startswith("<zoom>") and row["answer"].endswith("</zoom>")
        (needle,) = rows[row["row"]].boxes
        size = rows[row["row"]].image.size
        (call,) = PROTOCOLS["nano"].parse(row["answer"], []).calls
        coarse = fit_tokens(size, factor=28, min_tokens=16, max_tokens=64)
        scale = (size[0] / coarse.width, size[1] / coarse.height) * 2
        called = Box(*(value * by for value, by in zip(call.box, scale, strict=True)))
        found += called.coverage(needle) >= 0.95
        heat = np.array(row["map"])
        y, x = np.unravel_index(int(heat.argmax()), heat.shape)
        hottest = Box(x, y, x + 1, y + 1)
        wide, high = heat.shape[1] / size[0], heat.shape[0] / size[1]
        in_cells = Box(called.x1 * wide, called.y1 * high, called.x2 * wide, called.y2 * high)
        assert in_cells.coverage(hottest) > 0, "the cell that its tokens look at most lies in the box it asks for"
    assert found >= 5


def test_heads_that_are_not_there_are_explained() -> None:
    with pytest.raises(ConfigError, match="select-heads"):
        heads_for(Labelling(), "textual", model="nano", selected=None)
    with pytest.raises(ConfigError, match="No heads are published for 'nano'"):
        heads_for(Labelling(grounding="published"), "textual", model="nano", selected=None)
    pair = heads_for(
        Labelling(grounding="published", sink="published"), "natural", model="qwen2.5-vl-7b", selected=None
    )
    assert pair == ({16: [1, 7, 17], 19: [17, 20]}, {9: (4, 22)})
    assert heads_for(Labelling(), "textual", model="nano", selected={5: (0, 1)}) == ({5: [0, 1]}, {})


@pytest.mark.parametrize(
    ("model", "named"),
    [
        ("qwen2.5-vl-7b", None),
        ("Qwen/Qwen2.5-VL-7B-Instruct", None),
        ("./a-copy-of-mine", "qwen2.5-vl-7b"),
        ("qwen2.5-vl-3b", "qwen2.5-vl-7b"),
    ],
)
def test_published_heads_are_found_by_preset_hub_id_or_what_the_recipe_says(model: str, named: str | None) -> None:
    how = Labelling(grounding="published", published_for=named)
    assert heads_for(how, "textual", model=model, selected=None).grounding == {22: [1, 4], 23: [6, 11]}
