"""Trees: packing changes what training costs and nothing else.

Every branch is held against the stock model's own forward on that branch alone: tokens, positions, pixels and logits.
"""

from collections.abc import Sequence
from random import Random
from typing import Any, cast

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from PIL import Image
from torch.nn.functional import cross_entropy
from transformers import PreTrainedTokenizerFast, Qwen2_5_VLForConditionalGeneration
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

from nano.examples import DENSE_CLASSES, OPEN, coarse_tree, direct, inserted, needles, show, whole_tree
from nano.heads import (
    ENOUGH,
    FOCUS_HEADS,
    FOCUS_LAYER,
    PLACE_LAYER,
    TALLY,
    TOLD,
    TrainingHeads,
    dense_loss,
    focus_loss,
    losses,
)
from nano.model import build_model
from nano.packed import see, think
from nano.pages import object_page
from nano.tokenizer import build_tokenizer
from nano.trees import WINDOW, Look, Packer, Say, Tree, image_blocks, patchify, text_blocks
from qzoom_agent.evaluation.tasks.needle.boards import draw_board
from qzoom_agent.perception.adapters import align

few = settings(max_examples=20, deadline=None, derandomize=True, database=None)
grids = st.lists(st.tuples(st.integers(1, 11), st.integers(1, 11)), min_size=1, max_size=4)


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    return build_tokenizer()


@pytest.fixture(scope="module")
def model(tokenizer: PreTrainedTokenizerFast) -> Qwen2_5_VLForConditionalGeneration:
    torch.manual_seed(0)
    model = build_model(tokenizer)
    for parameter in model.parameters():
        if parameter.ndim > 1:  # as drawn, all logits are nearly equal
            parameter.data.mul_(3.0)
    model.train(False)
    return model


@pytest.fixture(scope="module")
def heads(model: Qwen2_5_VLForConditionalGeneration) -> TrainingHeads:
    torch.manual_seed(1)
    return TrainingHeads(model.config.get_text_config().hidden_size)


@pytest.fixture(scope="module")
def trees() -> list[Tree]:
    """Two trees of unequal sizes, with every kind of branch that an episode has."""
    hop = coarse_tree(Random(3), draw_board("hop", 4), crops=5)
    return [hop, whole_tree(Random(1), draw_board("receipt", 2), tokens=90, questions=3)]


def noise(width: int, height: int, seed: int = 0) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8))


def alone(packer: Packer, tree: Tree) -> list[dict[str, Any]]:
    """A batch for each branch, as a tree with nothing but it."""
    return [packer.batch([Tree(tree.prefix, [branch])]) for branch in tree.branches]


def frames(pixels: torch.Tensor) -> torch.Tensor:
    """Patches of one frame as the stock tower takes them, of two equal ones."""
    return pixels.view(len(pixels), 3, 1, -1).expand(-1, -1, 2, -1).reshape(len(pixels), -1)


def stock(model: Qwen2_5_VLForConditionalGeneration, one: dict[str, Any]) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits (N, vocabulary) and positions (3, N) of one conversation by the stock code."""
    ids = one["ids"][None]
    kinds = (ids == model.config.image_token_id).int()
    pixels = frames(one["pixels"])
    said = model(input_ids=ids, pixel_values=pixels, image_grid_thw=one["grids"], mm_token_type_ids=kinds)
    positions, _ = model.model.get_rope_index(ids, mm_token_type_ids=kinds, image_grid_thw=one["grids"])
    return said.logits[0], positions[:, 0]


@pytest.fixture(scope="module")
def by_stock(
    model: Qwen2_5_VLForConditionalGeneration, tokenizer: PreTrainedTokenizerFast, trees: list[Tree]
) -> list[list[tuple[dict[str, Any], torch.Tensor, torch.Tensor]]]:
    """Of each tree every branch as a batch of its own, and what the stock code makes of it."""
    packer = Packer(tokenizer)
    with torch.no_grad():
        return [[(one, *stock(model, one)) for one in alone(packer, tree)] for tree in trees]


@torch.no_grad()
def test_every_branch_is_what_the_stock_model_computes_alone(
    model: Qwen2_5_VLForConditionalGeneration,
    tokenizer: PreTrainedTokenizerFast,
    trees: list[Tree],
    by_stock: list[list[tuple[dict[str, Any], torch.Tensor, torch.Tensor]]],
) -> None:
    packer = Packer(tokenizer)
    batch = packer.batch(trees)
    seen = see(model, batch["pixels"], batch["grids"], windows=batch["windows"], whole=batch["whole"])
    image = batch["ids"] == model.config.image_token_id
    embeds = model.model.language_model.embed_tokens(batch["ids"]).masked_scatter(image[:, None], seen)
    thought = think(model, embeds, batch["positions"], batch["blocks"], tap=(PLACE_LAYER,), watch=tuple(TOLD.values()))
    logits = model.lm_head(thought.hidden)

    number, spread = 0, 0.0
    prefixes = _prefixes(batch, trees)
    for branches, prefix in zip(by_stock, prefixes, strict=True):
        for one, wanted, positions in branches:
            own = torch.nonzero(batch["branch"] == number)[:, 0]
            where = torch.cat([prefix, own])
            assert torch.equal(batch["ids"][where], one["ids"])
            assert torch.equal(batch["labels"][where], one["labels"])
            assert torch.equal(batch["positions"][:, where], positions)
            assert torch.equal(one["positions"], positions)
            assert torch.allclose(logits[where], wanted, atol=1e-4)
            spread = max(spread, float(wanted.std()))
            number += 1
    assert number == sum(len(tree.branches) for tree in trees) >= 8
    assert spread > 0.1, "logits that are all alike would prove nothing"


def _prefixes(batch: dict[str, Any], trees: Sequence[Tree]) -> list[torch.Tensor]:
    """Where the prefix of each tree stands in the batch: its first image is the first one after the tree before."""
    free = torch.nonzero(batch["branch"] == -1)[:, 0]
    breaks = torch.nonzero(free[1:] != free[:-1] + 1)[:, 0] + 1
    parts = list(torch.tensor_split(free, breaks.tolist()))
    assert len(parts) == len(trees)
    return parts


@torch.no_grad()
def test_the_answer_loss_is_the_stock_loss_over_all_branches(
    model: Qwen2_5_VLForConditionalGeneration,
    heads: TrainingHeads,
    tokenizer: PreTrainedTokenizerFast,
    trees: list[Tree],
    by_stock: list[list[tuple[dict[str, Any], torch.Tensor, torch.Tensor]]],
) -> None:
    terms = losses(model, heads, Packer(tokenizer).batch(trees))
    logits, labels = [], []
    for branches in by_stock:
        for one, found, _ in branches:
            where = torch.nonzero(one["labels"] != -100)[:, 0]
            logits.append(found[where - 1])
            labels.append(one["labels"][where])
    wanted = cross_entropy(torch.cat(logits), torch.cat(labels))
    assert float(terms["answer"]) == pytest.approx(float(wanted), abs=1e-5)
    assert {name for name, value in terms.items() if value.ndim == 0} == {
        "answer",
        "read",
        "place",
        "aim",
        "tally",
        *TOLD,
    }


def attended(
    model: Qwen2_5_VLForConditionalGeneration, tokenizer: PreTrainedTokenizerFast, one: dict[str, Any]
) -> tuple[torch.Tensor, ...]:
    """The attention of every layer, (1, heads, tokens, tokens) each, of the eager model over one conversation."""
    eager = build_model(tokenizer)
    eager.load_state_dict(model.state_dict())
    eager.set_attn_implementation("eager")
    eager.train(False)
    ids = one["ids"][None]
    said = eager(
        input_ids=ids,
        pixel_values=frames(one["pixels"]),
        image_grid_thw=one["grids"],
        mm_token_type_ids=(ids == model.config.image_token_id).int(),
        output_attentions=True,
    )
    return cast(tuple[torch.Tensor, ...], said.attentions)


@pytest.fixture(scope="module")
def conversations(
    model: Qwen2_5_VLForConditionalGeneration, tokenizer: PreTrainedTokenizerFast, trees: list[Tree]
) -> list[tuple[dict[str, Any], tuple[torch.Tensor, ...]]]:
    """Every branch as a batch of its own, and the attention of the eager model in each layer."""
    packer = Packer(tokenizer)
    with torch.no_grad():
        return [(one, attended(model, tokenizer, one)) for tree in trees for one in alone(packer, tree)]


@pytest.mark.slow
@torch.no_grad()
@pytest.mark.parametrize(("name", "layer"), list(TOLD.items()))
def test_the_focus_losses_are_those_of_the_stock_models_attention(
    name: str,
    layer: int,
    model: Qwen2_5_VLForConditionalGeneration,
    heads: TrainingHeads,
    tokenizer: PreTrainedTokenizerFast,
    trees: list[Tree],
    conversations: list[tuple[dict[str, Any], tuple[torch.Tensor, ...]]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """-log of the attention that lands on the right tokens, read off the weights that the eager model gives out."""
    packer = Packer(tokenizer)
    each: list[torch.Tensor] = []
    monkeypatch.setattr("nano.heads.LARGE", 0.0)  # attention does not tell how large its scores are
    for one, attention in conversations:
        weights = attention[layer][0, :FOCUS_HEADS]
        assert weights.shape[1:] == (len(one["ids"]),) * 2
        asking, seen = one[name]
        for token in asking.unique():
            each.append(-weights[:, token, seen[asking == token]].sum(-1).log())
    wanted = torch.stack(each)
    assert wanted.shape[0] >= (30 if name == "focus" else 10)
    assert float(wanted.std()) > 0.1, "attention that is all alike would prove nothing"
    expected = (wanted - ENOUGH).clamp(min=0).mean()
    assert float(losses(model, heads, packer.batch(trees))[name]) == pytest.approx(float(expected), abs=1e-4)


def test_scores_that_are_large_cost_though_attention_is_the_same(
    tokenizer: PreTrainedTokenizerFast, trees: list[Tree]
) -> None:
    """What all scores have in common is not seen by attention, and drifts if nothing holds it."""
    batch = Packer(tokenizer).batch(trees[:1])
    torch.manual_seed(0)
    query, key = torch.randn(len(batch["ids"]), 4, 8), torch.randn(len(batch["ids"]), 2, 8)
    query[..., 0], key[..., 0] = 8.0**0.5, 0.0
    plain = float(focus_loss(query, key, batch))
    for common in (100.0, -100.0):
        shifted = key.clone()
        shifted[..., 0] = common
        shifted.requires_grad_()
        loss = focus_loss(query, shifted, batch)
        assert float(loss.detach()) == pytest.approx(plain + 0.01 * 2 * (100 - 16), abs=0.1)
        torch.autograd.backward(loss)
        assert shifted.grad is not None and float(shifted.grad[..., 0].sum()) * common > 0, "it is pushed back"


@torch.no_grad()
def test_counting_heads_share_their_attention_with_the_first_token(
    model: Qwen2_5_VLForConditionalGeneration, heads: TrainingHeads, tokenizer: PreTrainedTokenizerFast
) -> None:
    """The divergence from the shares that tell a number, read off the weights that the eager model gives out."""
    board = draw_board("scene", 2)
    frame = show(board, None, tokens=(16, 64))
    counts = [fact for fact in board.facts if fact.kind == "count"]
    tree = Tree([Say(OPEN), frame.look], [direct(frame, fact) for fact in counts])
    packer, each = Packer(tokenizer), []
    for one in alone(packer, tree):
        weights = attended(model, tokenizer, one)[FOCUS_LAYER][0]
        asking, seen = one["tally"]
        assert len(set(asking.tolist())) == 1
        for head, first in TALLY.items():
            shares = torch.cat([weights[head, asking[0], :1], weights[head, asking[0], seen]])
            wanted = torch.tensor([first, *[1.0] * len(seen)])
            wanted = wanted / wanted.sum()
            each.append(float((wanted * (wanted / shares).log()).sum()))
    assert len(each) >= 6
    found = float(losses(model, heads, packer.batch([tree]))["tally"])
    assert found == pytest.approx(sum(each) / len(each), abs=1e-4)


def test_the_focus_loss_teaches_the_layers_up_to_its_own(
    model: Qwen2_5_VLForConditionalGeneration, heads: TrainingHeads, tokenizer: PreTrainedTokenizerFast
) -> None:
    tree = page(3)
    model.zero_grad()
    torch.autograd.backward(losses(model, heads, Packer(tokenizer).batch([tree]))["focus"])
    layers = model.model.language_model.layers
    own = layers[FOCUS_LAYER].self_attn
    width = own.head_dim * FOCUS_HEADS
    gradient = own.q_proj.weight.grad
    assert gradient is not None
    assert gradient[:width].abs().sum() > 0
    assert gradient[width:].abs().sum() == 0, "the other heads look where they like"
    assert own.k_proj.weight.grad is not None
    assert own.v_proj.weight.grad is None
    taught = [layer.self_attn.q_proj.weight.grad is not None for layer in layers]
    assert taught == [index <= FOCUS_LAYER for index in range(len(layers))]
    model.zero_grad()


def page(questions: int) -> Tree:
    """A page of objects with its first questions."""
    tree = object_page(Random(0))
    return Tree(tree.prefix, tree.branches[:questions], tree.names[:questions])


def test_the_vision_tower_can_be_left_as_it_is(
    model: Qwen2_5_VLForConditionalGeneration, heads: TrainingHeads, tokenizer: PreTrainedTokenizerFast
) -> None:
    batch = Packer(tokenizer).batch([page(2)])
    names = [name for name, _ in model.named_parameters()]
    gradients: dict[bool, dict[str, torch.Tensor]] = {}
    values: dict[bool, dict[str, float]] = {}
    for tower in (True, False):
        model.zero_grad()
        heads.zero_grad()
        terms = losses(model, heads, batch, tower=tower)
        values[tower] = {name: float(term.detach()) for name, term in terms.items() if term.ndim == 0}
        torch.autograd.backward(terms["answer"] + terms["focus"])
        gradients[tower] = {
            name: parameter.grad.clone() for name, parameter in model.named_parameters() if parameter.grad is not None
        }
    assert set(gradients[True]) == set(names)
    assert set(gradients[False]) == {name for name in names if ".visual." not in name}
    for name, gradient in gradients[False].items():
        assert torch.allclose(gradient, gradients[True][name], atol=1e-6), name
    # What is said is the same, and reading is not scored: its head would learn from a tower that cannot.
    said = {name: values[True][name] for name in ("answer", "place", *TOLD)}
    assert {name: values[False][name] for name in said} == pytest.approx(said)
    assert set(values[True]) - set(values[False]) == {"read"}
    model.zero_grad()
    heads.zero_grad()


def test_a_branch_learns_nothing_from_its_neighbours(
    model: Qwen2_5_VLForConditionalGeneration, tokenizer: PreTrainedTokenizerFast
) -> None:
    look = Look(noise(84, 56))
    packer = Packer(tokenizer)
    one = packer.batch([Tree([look], [[Say("read cell A1."), Say("7K", learn=True)]])])
    two = packer.batch(
        [
            Tree(
                [look], [[Say("count the rings."), Say("3", learn=True)], [Say("read cell A1."), Say("7K", learn=True)]]
            ),
            Tree([Look(noise(28, 28, 1))], [[Say("how many?"), Say("9", learn=True)]]),
        ]
    )
    heads = TrainingHeads(model.config.get_text_config().hidden_size)
    with torch.no_grad():
        first, second = losses(model, heads, one), losses(model, heads, two)
    assert torch.allclose(second["logits"][1:3], first["logits"], atol=1e-5)
    assert two["branch"].unique().tolist() == [-1, 0, 1, 2]
    assert "dense" not in one


def test_no_gradient_is_lost_on_the_way(
    model: Qwen2_5_VLForConditionalGeneration, heads: TrainingHeads, tokenizer: PreTrainedTokenizerFast
) -> None:
    """Gradients through the packed forward are those of the stock one; every weight of the model gets one."""
    tree = Tree([Look(noise(140, 112))], [[Say("read cell A1."), Say("7K<|im_end|>", learn=True)]])
    packer = Packer(tokenizer)
    batch = packer.batch([tree])
    model.zero_grad()
    torch.autograd.backward(losses(model, heads, batch)["answer"])
    packed = {
        name: parameter.grad.clone() for name, parameter in model.named_parameters() if parameter.grad is not None
    }
    model.zero_grad()
    where = torch.nonzero(batch["labels"] != -100)[:, 0]
    torch.autograd.backward(cross_entropy(stock(model, batch)[0][where - 1], batch["labels"][where]))
    wanted = {name: parameter.grad for name, parameter in model.named_parameters() if parameter.grad is not None}
    assert set(packed) == set(wanted) == {name for name, _ in model.named_parameters()}
    for name, gradient in wanted.items():
        assert torch.allclose(packed[name], gradient, atol=1e-4, rtol=1e-3), name
    model.zero_grad()


def test_an_image_wider_than_the_fused_kernel_starts_at(
    model: Qwen2_5_VLForConditionalGeneration, tokenizer: PreTrainedTokenizerFast
) -> None:
    """Whole boards have 2,000 patches and more, and take another attention kernel."""
    batch = Packer(tokenizer).batch([Tree([Look(noise(28 * 15, 28 * 13))], [[Say("hi"), Say("9", learn=True)]])])
    assert max(block.query.shape[1] for block in batch["whole"]) == 4 * 15 * 13 >= 700
    with torch.no_grad():
        seen = see(model, batch["pixels"], batch["grids"], windows=batch["windows"], whole=batch["whole"])
        wanted = model.model.visual(frames(batch["pixels"]), grid_thw=batch["grids"]).pooler_output
    assert torch.allclose(seen, wanted, atol=1e-4)


# ---- pixels --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [(28, 28), (112, 56), (56, 140), (252, 224)])
def test_patches_are_those_of_the_stock_image_processor(size: tuple[int, int]) -> None:
    image = noise(*size)
    processor = Qwen2VLImageProcessorPil(do_resize=False, patch_size=14, merge_size=2, temporal_patch_size=2)
    coded = processor(images=[image], return_tensors="np")
    assert np.abs(patchify(image) - coded["pixel_values"]).max() < 1e-5
    assert patchify(image).dtype == np.float32
    assert coded["image_grid_thw"].tolist() == [[1, size[1] // 14, size[0] // 14]]


# ---- index sets ----------------------------------------------------------------------------------------------------


@few
@given(grids, st.sampled_from([None, WINDOW]))
def test_every_patch_is_in_one_window(sizes: list[tuple[int, int]], window: int | None) -> None:
    blocks = image_blocks(sizes, window=window)
    patches = torch.cat([block.query.reshape(-1) for block in blocks])
    assert sorted(patches.tolist()) == list(range(4 * sum(rows * columns for rows, columns in sizes)))
    assert all(block.bias is None and torch.equal(block.query, block.key) for block in blocks)
    side = window or 11
    assert all(block.query.shape[1] <= 4 * side * side for block in blocks)
    windows = sum(-(-rows // side) * -(-columns // side) for rows, columns in sizes)
    assert sum(len(block.query) for block in blocks) == windows


@few
@given(st.lists(st.tuples(st.integers(0, 40), st.lists(st.integers(1, 30), max_size=5)), min_size=1, max_size=4))
def test_every_token_asks_once_and_sees_its_prefix_and_past(shape: list[tuple[int, list[int]]]) -> None:
    spans: list[tuple[NDArray[np.int64], NDArray[np.int64]]] = []
    sees: dict[int, set[int]] = {}
    offset = 0
    for prefix_length, lengths in shape:
        prefix = offset + np.arange(prefix_length)
        offset += prefix_length
        trunk = [(prefix[:0], prefix)] if prefix_length else []
        for before, own in [
            *trunk,
            *((prefix, offset + sum(lengths[:at]) + np.arange(n)) for at, n in enumerate(lengths)),
        ]:
            spans.append((before, own))
            sees.update({int(token): {*before.tolist(), *own[: at + 1].tolist()} for at, token in enumerate(own)})
        offset += sum(lengths)
    if not spans:
        return
    found: dict[int, set[int]] = {}
    for block in text_blocks(spans):
        assert block.bias is not None
        assert block.bias.shape == (len(block.query), 1, block.query.shape[1], block.key.shape[1])
        assert torch.isfinite(block.bias).any(-1).all(), "a row that sees nothing becomes NaN"
        for query, key, bias in zip(block.query, block.key, block.bias[:, 0], strict=True):
            for token, row in zip(query.tolist(), bias, strict=True):
                if token >= 0:
                    assert token not in found
                    found[token] = set(key[row == 0].tolist())
                    assert set(row.tolist()) <= {0.0, float("-inf")}
    assert found == sees


# ---- rows and dense loss -------------------------------------------------------------------------------------------


def test_a_batch_holds_what_its_rows_hold(tokenizer: PreTrainedTokenizerFast, trees: list[Tree]) -> None:
    packer = Packer(tokenizer)
    rows, batch = [packer.row(tree) for tree in trees], packer.batch(trees)
    assert batch["ids"].tolist() == [token for row in rows for token in row.ids]
    looks = [look for row in rows for look in row.looks]
    tokens = sum(look.grid[0] * look.grid[1] for look in looks)
    assert batch["dense"].shape == (tokens, len(DENSE_CLASSES))
    assert batch["pixels"].shape == (4 * tokens, 3 * 14 * 14)
    assert batch["grids"].tolist() == [[1, 2 * look.grid[0], 2 * look.grid[1]] for look in looks]
    assert int((batch["ids"] == packer.pad).sum()) == tokens
    assert ((batch["labels"] == -100) | (batch["labels"] == batch["ids"])).all()
    assert (batch["labels"][batch["branch"] == -1] == -100).all(), "a prefix is never learned"


def test_an_image_without_a_question_is_only_read(
    model: Qwen2_5_VLForConditionalGeneration, heads: TrainingHeads, tokenizer: PreTrainedTokenizerFast
) -> None:
    batch = Packer(tokenizer).batch([Tree(page(0).prefix, [])])
    assert batch["focus"].shape == (2, 0)
    with torch.no_grad():
        assert set(losses(model, heads, batch)) == {"read", "dense"}


def test_a_batch_without_places_has_no_focus(
    model: Qwen2_5_VLForConditionalGeneration, heads: TrainingHeads, tokenizer: PreTrainedTokenizerFast
) -> None:
    batch = Packer(tokenizer).batch([Tree([Look(noise(56, 56))], [[Say("how many?"), Say("9", learn=True)]])])
    with torch.no_grad():
        assert {name for name, term in losses(model, heads, batch).items() if term.ndim == 0} == {"answer", "place"}


def test_unknown_dense_labels_cost_nothing() -> None:
    torch.manual_seed(0)
    logits = torch.randn(6, sum(DENSE_CLASSES))
    labels = torch.tensor([[1, 0, 2, 0, 3, 1]] * 3 + [[-100] * len(DENSE_CLASSES)] * 3)
    changed = logits.clone()
    changed[3:] += 5.0
    assert float(dense_loss(logits, labels)) == pytest.approx(float(dense_loss(changed, labels)))
    assert float(dense_loss(logits, labels)) > 0
    assert float(dense_loss(logits, torch.full_like(labels, -100))) == 0
    certain = torch.full((1, sum(DENSE_CLASSES)), -50.0)
    for slot, label in enumerate([4, 0, 1, 0, 6, 1]):
        certain[0, sum(DENSE_CLASSES[:slot]) + label] = 50.0
    assert float(dense_loss(certain, torch.tensor([[4, 0, 1, 0, 6, 1]]))) == pytest.approx(0.0, abs=1e-6)


def test_a_crop_beside_a_coarse_view_stands_where_the_library_would_put_it(tokenizer: PreTrainedTokenizerFast) -> None:
    rng = Random("aligned")
    board = draw_board("scene", 3, split="train")
    coarse = show(board, None, tokens=(16, 64))
    crop = inserted(rng, coarse, needles(board)[0])
    tree = Tree([Say(OPEN), coarse.look], [[crop.look, Say("?")]])
    plain, aligned = (Packer(tokenizer, aligned=aligned).batch([tree]) for aligned in (False, True))
    assert plain["positions"].dtype == torch.long

    pad = tokenizer.convert_tokens_to_ids("<|image_pad|>")
    visual = torch.nonzero(plain["ids"] == pad)[:, 0].tolist()
    first = coarse.look.grid[0] * coarse.look.grid[1]
    assert crop.look.place is not None
    wanted = align(
        plain["positions"][:, None],
        source=visual[0],
        crop=(visual[first], visual[-1] + 1),
        grid=crop.look.grid,
        cells=crop.look.place[1],
    )
    torch.testing.assert_close(aligned["positions"][:, None], wanted)
    left, top, right, bottom = crop.look.place[1]
    assert 0 <= left < right <= coarse.look.grid[1] and 0 <= top < bottom <= coarse.look.grid[0]
