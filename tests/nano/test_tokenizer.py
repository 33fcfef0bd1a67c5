"""Nano's tokenizer, and the seam it guards: what training writes is, token for token, what the agent sends.

The same conversation is written twice here: by `rl.nano.examples` as training pieces, and by the `nano` protocol as
messages under the chat template. The zoom call is read back by the protocol and served by the real zoom tool.
"""

import json
from collections.abc import Sequence
from hashlib import sha256
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from export_nano import ship
from nano.examples import (
    COARSE_TOKENS,
    CROP_TOKENS,
    OPEN,
    PROPOSED_GROWTH,
    PROPOSED_SIDES,
    PROPOSED_TOKENS,
    Frame,
    beside,
    call_for,
    calling,
    coarse_tree,
    direct,
    show,
    whole_tree,
    zooming,
)
from nano.heads import TrainingHeads
from nano.model import CELL, build_model
from nano.tokenizer import LOCATIONS, SPECIALS, build_tokenizer, padded, with_locations
from nano.trees import Look, Packer, Piece, Say, Tree, patchify
from qzoom_agent.agent import Agent
from qzoom_agent.config import AgentConfig
from qzoom_agent.evaluation.tasks.needle.boards import FIELDS, HEADLINES, ITEMS, LAYOUTS, Fact, draw_board
from qzoom_agent.evaluation.tasks.needle.ink import COLORS, SHAPES
from qzoom_agent.geometry import Box
from qzoom_agent.messages import Message, text, view_ids
from qzoom_agent.models.hf import HFBackend
from qzoom_agent.models.presets import NANO_BUDGET, NANO_FOLDER
from qzoom_agent.models.scripted import ScriptedBackend
from qzoom_agent.protocols import get_protocol
from qzoom_agent.views import ViewStore
from qzoom_agent.zoom.zoom import Zoom, ZoomConfig
from train_nano import load_shipped

NANO = get_protocol("nano")
ZOOM = Zoom(ZoomConfig.of(NANO_BUDGET))
VOCABULARY = (796, "b2e7bda64990106b")
"""Its size, and the beginning of the SHA-256 of its words and ids."""


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    return build_tokenizer()


# ---- the tokenizer alone -------------------------------------------------------------------------------------------


def test_the_vocabulary_is_the_one_weights_were_trained_with(tokenizer: PreTrainedTokenizerFast) -> None:
    words = json.dumps(tokenizer.get_vocab(), sort_keys=True)
    assert build_tokenizer().backend_tokenizer.to_str() == tokenizer.backend_tokenizer.to_str()
    assert (len(tokenizer), sha256(words.encode()).hexdigest()[:16]) == VOCABULARY
    shipped = AutoTokenizer.from_pretrained(NANO_FOLDER).get_vocab()
    assert shipped == {word: number for word, number in tokenizer.get_vocab().items() if number < 753}


def test_a_model_gets_the_locations_that_it_lacks() -> None:
    kept, model = load_shipped(NANO_FOLDER)
    before = model.get_input_embeddings().weight.detach().clone()
    tokenizer = with_locations(kept, model)
    after = model.get_input_embeddings().weight
    (first, last) = (tokenizer.convert_tokens_to_ids(name) for name in ("<loc_511>", LOCATIONS[-1]))
    assert torch.equal(after[:first], before[:first]) and len(after) == padded(last + 1)
    assert all(torch.equal(row, before[first - 1]) for row in after[first : last + 1])
    assert with_locations(tokenizer, model) is tokenizer


def test_it_survives_being_saved(tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    tokenizer.save_pretrained(tmp_path)
    again = AutoTokenizer.from_pretrained(tmp_path)
    said = "what is the code on the red circle? <zoom><loc_84><loc_504></zoom> 7K.Q<|im_end|>\n"
    assert again.encode(said) == tokenizer.encode(said)
    assert again.decode(again.encode(said)) == said
    assert again.chat_template == tokenizer.chat_template
    assert (again.eos_token, again.pad_token, again.padding_side) == ("<|im_end|>", "<|endoftext|>", "left")


def test_printable_ascii_round_trips(tokenizer: PreTrainedTokenizerFast) -> None:
    ascii_ = "".join(map(chr, range(32, 127))) + "\t\n\r"
    for said in (ascii_, ascii_[::-1], *ascii_):
        assert tokenizer.decode(tokenizer.encode(said, add_special_tokens=False)) == said


@settings(max_examples=50, deadline=None, derandomize=True, database=None)
@given(said=st.text(max_size=60))
def test_any_text_round_trips(tokenizer: PreTrainedTokenizerFast, said: str) -> None:
    ids = tokenizer.encode(said, add_special_tokens=False)
    assert tokenizer.decode(ids) == said
    assert tokenizer.unk_token_id is None


@settings(max_examples=20, deadline=None, derandomize=True, database=None)
@given(code=st.text(alphabet="ABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789.", min_size=1, max_size=12))
def test_a_code_costs_a_token_a_character(tokenizer: PreTrainedTokenizerFast, code: str) -> None:
    assert len(tokenizer.encode(code, add_special_tokens=False)) == len(code)
    # ... and the characters are the same tokens after a space or a tag.
    assert tokenizer.encode(f"is {code}")[-len(code) :] == tokenizer.encode(code)


def test_words_of_the_tasks_are_single_tokens(tokenizer: PreTrainedTokenizerFast) -> None:
    for word in (*FIELDS, *ITEMS, *COLORS, *SHAPES, *(word.lower() for word in HEADLINES)):
        assert len(tokenizer.encode(word)) == 1, word
        assert len(tokenizer.encode(f" {word}")) == 1, word


def test_places_are_single_tokens_that_are_never_hidden(tokenizer: PreTrainedTokenizerFast) -> None:
    call = "<zoom>" + "".join(LOCATIONS) + "</zoom>"
    ids = tokenizer.encode(call, add_special_tokens=False)
    assert len(ids) == len(LOCATIONS) + 2
    assert ids[1:-1] == list(range(ids[1], ids[1] + len(LOCATIONS))), "validation takes their distance as pixels"
    assert tokenizer.decode(ids, skip_special_tokens=True) == call
    assert LOCATIONS[0] == "<loc_0>"
    assert LOCATIONS[-1] == "<loc_805>"


def test_specials_are_hidden_where_asked(tokenizer: PreTrainedTokenizerFast) -> None:
    for mark in SPECIALS:
        (token,) = tokenizer.encode(mark, add_special_tokens=False)
        assert tokenizer.decode([token], skip_special_tokens=True) == ""


# ---- what training writes is what the agent sends ------------------------------------------------------------------


class Scene:
    """A board as training shows it and as the agent does."""

    def __init__(self, layout: str, seed: int = 1) -> None:
        self.board = draw_board(layout, seed, split="test")
        self.frame: Frame = show(self.board, None, tokens=(NANO_BUDGET.coarse_min_tokens, COARSE_TOKENS))
        self.store = ViewStore()
        self.store.add_original(self.board.image)
        self.coarse = self.store.add_coarse(
            factor=CELL, min_tokens=NANO_BUDGET.coarse_min_tokens, max_tokens=NANO_BUDGET.coarse_max_tokens
        )
        self.opening: list[Piece] = [Say(OPEN), self.frame.look]

    def fact(self, kind: str) -> Fact:
        return next(fact for fact in self.board.facts if fact.kind == kind)

    def trained(self, tokenizer: PreTrainedTokenizerFast, branch: Sequence[Piece]) -> tuple[list[int], list[Look]]:
        """Ids of one branch after the coarse view, and the images in it."""
        row = Packer(tokenizer).row(Tree(self.opening, [branch]))
        return row.ids, row.looks


def sent(tokenizer: PreTrainedTokenizerFast, messages: Sequence[Message], looks: Sequence[Look]) -> list[int]:
    """Ids of a conversation under the chat template, each image as many tokens as `looks` says."""
    plain: Any = [
        {"role": one["role"], "content": [{"type": "image"} if "view" in part else part for part in one["content"]]}
        for one in messages
    ]
    ids: Any = tokenizer.encode(tokenizer.apply_chat_template(plain, tokenize=False), add_special_tokens=False)
    pad = tokenizer.convert_tokens_to_ids("<|image_pad|>")
    sizes = iter(looks)
    wide: list[int] = []
    for token in ids:
        wide += [token] * (np.prod(next(sizes).grid) if token == pad else 1)
    assert next(sizes, None) is None
    return wide


def check(tokenizer: PreTrainedTokenizerFast, scene: Scene, branch: Sequence[Piece], messages: list[Message]) -> None:
    """The branch and the conversation are the same tokens; the template only adds the line break after the end."""
    ids, looks = scene.trained(tokenizer, branch)
    assert len(view_ids(messages)) == len(looks)
    assert sent(tokenizer, messages, looks) == [*ids, *tokenizer.encode("\n")]


def test_nanos_budget_is_about_the_trained_one() -> None:
    assert (NANO_BUDGET.crop_min_tokens, NANO_BUDGET.crop_max_tokens) == CROP_TOKENS
    (least, most), box = NANO_BUDGET.roi_tokens or (0, 0), HFBackend.load("nano").branches.config.box
    assert box is not None
    grown = [side / trained for side, trained in zip(box, PROPOSED_SIDES, strict=True)]
    growth = (grown[0] * grown[1]) ** 0.5
    assert PROPOSED_GROWTH[0] <= growth <= PROPOSED_GROWTH[1]
    # Chosen on validation boards, the box came out a little wider and lower (notebook, 20): not by much.
    assert grown == pytest.approx([growth, growth], rel=0.07)
    for served, trained in zip((least, most), PROPOSED_TOKENS, strict=True):
        assert 0.9 < (served / trained) ** 0.5 / growth <= 1.01
    assert NANO_BUDGET.coarse_max_tokens == COARSE_TOKENS
    assert NANO_BUDGET.factor == CELL


@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_coarse_view_is_the_trained_one(layout: str) -> None:
    scene = Scene(layout)
    assert scene.store.image("coarse").tobytes() == scene.frame.look.image.tobytes()
    for tree in (coarse_tree(Random(0), scene.board), whole_tree(Random(0), scene.board, tokens=COARSE_TOKENS)):
        opened, look = tree.prefix
        assert opened == scene.opening[0]
        assert isinstance(look, Look)
        assert look.image.tobytes() == scene.frame.look.image.tobytes()


@pytest.mark.parametrize(("layout", "kind"), [("scene", "count"), ("scene", "code"), ("form", "headline")])
def test_a_direct_question(tokenizer: PreTrainedTokenizerFast, layout: str, kind: str) -> None:
    scene = Scene(layout)
    fact = scene.fact(kind)
    messages = NANO.opening(fact.question, [scene.coarse], tools=False)
    check(tokenizer, scene, direct(scene.frame, fact), [*messages, text("assistant", fact.answer)])


@pytest.mark.parametrize(("layout", "kind"), [("scene", "pips"), ("hop", "hop")])
def test_crops_beside_the_coarse_view(tokenizer: PreTrainedTokenizerFast, layout: str, kind: str) -> None:
    scene = Scene(layout)
    fact = scene.fact(kind)
    frames = [show(scene.board, box, tokens=CROP_TOKENS) for box in fact.boxes]
    crops = [ZOOM(scene.store, Box(*frame.box)).view for frame in frames]
    views = [scene.coarse, *(crop for crop in crops if crop is not None)]
    messages = NANO.opening(fact.question, views, tools=False)
    check(tokenizer, scene, beside(fact, frames), [*messages, text("assistant", fact.answer)])


@pytest.mark.parametrize("final", [False, True])
@pytest.mark.parametrize("kind", ["code", "form", "receipt", "table", "hop"])
def test_an_episode(tokenizer: PreTrainedTokenizerFast, kind: str, final: bool) -> None:
    """The graph's own messages, also where it runs out of turns and asks for the answer."""
    scene = Scene({"code": "scene"}.get(kind, kind))
    fact = scene.fact(kind)
    script = [*(call_for(scene.frame, needle)[0] for needle in fact.boxes), fact.answer]
    heard: list[list[Message]] = []

    def reply(messages: list[Message]) -> str:
        heard.append(messages)
        return script[len(heard) - 1]

    config = AgentConfig.model_validate({"budget": {"max_turns": len(fact.boxes)}} if final else {})
    answer = Agent(ScriptedBackend(reply), config=config).run(scene.board.image, fact.question)
    assert answer.text == fact.answer
    assert [turn.forced for turn in answer.trace.turns] == [False] * len(fact.boxes) + [final]
    assert ({"role": "user", "content": [{"type": "text", "text": "Answer now."}]} in heard[-1]) == final
    branch = zooming(scene.frame, fact, final=final)
    check(tokenizer, scene, branch, [*heard[-1], text("assistant", fact.answer)])
    crops = [piece for piece in branch if isinstance(piece, Look)]
    shown = [view for view in answer.trace.views if view.kind == "crop"]
    for needle, crop, view in zip(fact.boxes, crops, shown, strict=True):
        assert view.box == show(scene.board, call_for(scene.frame, needle)[1], tokens=CROP_TOKENS).box
        assert view.region.coverage(Box(*needle)) == 1.0
        assert answer.store.image(view.id).size == crop.image.size


def test_a_question_that_needs_no_zoom(tokenizer: PreTrainedTokenizerFast) -> None:
    scene = Scene("scene")
    fact = scene.fact("count")
    messages = NANO.opening(fact.question, [scene.coarse], tools=True)
    check(tokenizer, scene, zooming(scene.frame, fact), [*messages, text("assistant", fact.answer)])


def test_a_call_that_is_not_served_is_the_one_that_is(tokenizer: PreTrainedTokenizerFast) -> None:
    scene = Scene("scene")
    fact = scene.fact("code")
    said, _ = call_for(scene.frame, fact.boxes[0])
    messages = NANO.opening(fact.question, [scene.coarse], tools=True)
    check(tokenizer, scene, calling(scene.frame, fact), [*messages, text("assistant", said)])
    alone = calling(scene.frame, fact)
    assert alone == list(zooming(scene.frame, fact)[: len(alone)])


@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_protocol_reads_every_call_that_training_writes(layout: str) -> None:
    scene = Scene(layout, 2)
    for fact in scene.board.facts:
        for needle in fact.boxes:
            said, asked = call_for(scene.frame, needle)
            parsed = NANO.parse(said, [scene.coarse])
            assert (parsed.answer, parsed.problems, parsed.repairs) == (None, [], [])
            (call,) = parsed.calls
            assert (call.name, call.view, call.frame, call.raw) == ("zoom", "coarse", "pixel", said)
            assert call.as_box is not None
            read = scene.coarse.to_original(call.as_box)
            assert read.as_list() == pytest.approx(asked)
            assert read.coverage(Box(*needle)) == pytest.approx(1.0)


def test_an_answer_ends_where_generation_stops(tokenizer: PreTrainedTokenizerFast) -> None:
    scene = Scene("scene")
    fact = scene.fact("code")
    row = Packer(tokenizer).row(Tree(scene.opening, [zooming(scene.frame, fact)]))
    learned = [label for label in row.labels if label != -100]
    call, _ = call_for(scene.frame, fact.boxes[0])
    assert tokenizer.decode(learned) == f"{call}<|im_end|>{fact.answer}<|im_end|>"
    assert tokenizer.eos_token_id == tokenizer.convert_tokens_to_ids("<|im_end|>")


# ---- through the real backend --------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def shipped(tokenizer: PreTrainedTokenizerFast, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An untrained nano, saved by the training code and shipped."""
    folder = tmp_path_factory.mktemp("nano")
    torch.manual_seed(0)
    model = build_model(tokenizer)
    model.training_heads = TrainingHeads(model.config.get_text_config().hidden_size)
    model.save_pretrained(folder / "final", save_original_format=False)
    tokenizer.save_pretrained(folder / "final")
    assert ship([folder / "final"], folder / "shipped") < 20_000_000
    return folder / "shipped"


def test_the_backend_prefills_the_trained_tokens_and_pixels(tokenizer: PreTrainedTokenizerFast, shipped: Path) -> None:
    backend = HFBackend.load(str(shipped), device="cpu", dtype="float32", protocol="nano")
    scene = Scene("scene")
    fact = scene.fact("code")
    ids, looks = scene.trained(tokenizer, direct(scene.frame, fact))
    messages = NANO.opening(fact.question, [scene.coarse], tools=False)
    codec = backend.codec
    image_ids, pixels = codec.pixels(scene.store.image("coarse"))
    rendered = codec.tokenize(codec.render(messages), [])[1]
    prompt = codec.expand(rendered.ids, ["coarse"], {"coarse": image_ids})
    answer = tokenizer.encode(f"{fact.answer}<|im_end|>")
    assert [*prompt.ids, *answer] == ids
    assert torch.allclose(pixels["pixel_values"], torch.from_numpy(patchify(looks[0].image)), atol=1e-5)
    assert pixels["image_grid_thw"].tolist() == [[1, 2 * looks[0].grid[0], 2 * looks[0].grid[1]]]
