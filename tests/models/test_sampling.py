"""How the next token of each row is drawn, how many are, and what their texts are."""

from pathlib import Path

import pytest
import torch
from PIL import Image
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers

from qzoom_agent.agent import Agent
from qzoom_agent.errors import BackendError
from qzoom_agent.messages import image_part, message
from qzoom_agent.models import SamplingParams
from qzoom_agent.models.hf import HFBackend, load_backend
from qzoom_agent.models.hf_generation import Sampler, text_logprobs
from tests.tiny_models import build


def test_top_p_keeps_the_likeliest_tokens() -> None:
    logits = torch.tensor([0.5, 0.3, 0.15, 0.05]).log()
    seen = set()
    for seed in range(40):
        sampler = Sampler([SamplingParams(temperature=1.0, top_p=0.7, seed=seed)], [], torch.device("cpu"))
        seen.add(int(sampler(logits[None])[0]))
    assert seen == {0, 1}


def test_top_k_and_the_presence_penalty() -> None:
    logits = torch.tensor([[3.0, 2.9, 2.8, 0.0]]).expand(200, 4)
    some = [SamplingParams(temperature=1.0, top_k=2, seed=seed) for seed in range(200)]
    assert set(Sampler(some, [], torch.device("cpu"))(logits)[0].tolist()) == {0, 1}
    shy = Sampler([SamplingParams(presence_penalty=0.15, max_new_tokens=4)], [], torch.device("cpu"))
    assert [int(shy(logits[:1])[0]) for _ in range(4)] == [0, 1, 0, 0]


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_a_token_is_not_drawn_from_logits_that_are_not_finite(value: float, temperature: float) -> None:
    sampler = Sampler([SamplingParams(temperature=temperature)] * 2, [], torch.device("cpu"))
    logits = torch.tensor([[0.0, 1.0, 2.0], [0.0, value, 2.0]])
    if value == -torch.inf:  # a token that the model rules out
        assert all(token != 1 for token in sampler(logits)[0][1:].tolist())
    else:
        with pytest.raises(BackendError, match="not finite"):
            sampler(logits)


def test_loading_a_model_takes_nothing_of_the_users_seed() -> None:
    before = torch.random.get_rng_state()
    assert load_backend("nano", check=False).perceives
    assert torch.equal(torch.random.get_rng_state(), before)


def byte_level() -> Tokenizer:
    made = Tokenizer(
        models.BPE(vocab={one: at for at, one in enumerate(pre_tokenizers.ByteLevel.alphabet())}, merges=[])
    )
    made.pre_tokenizer, made.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    return made


def words_of_llama() -> Tokenizer:
    """A tokenizer whose decoder drops the space before the first word."""
    made = Tokenizer(models.WordLevel({"\u2581New": 0, "\u2581York": 1, "?": 2}, unk_token="?"))
    made.normalizer = normalizers.Sequence([normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")])
    made.pre_tokenizer = pre_tokenizers.Split("\u2581", "merged_with_next")
    made.decoder = decoders.Sequence([decoders.Replace("\u2581", " "), decoders.Fuse(), decoders.Strip(" ", 1, 0)])
    return made


@pytest.mark.parametrize(
    ("tokenizer", "text"), [(byte_level(), "It is \u6771\u4eac, 5 \u20ac"), (words_of_llama(), "New York")]
)
def test_the_texts_of_tokens_are_joined_the_text_of_all(tokenizer: Tokenizer, text: str) -> None:
    ids = tokenizer.encode(text).ids
    told = [(token, -float(at)) for at, token in enumerate(ids)]
    found = text_logprobs(lambda some: tokenizer.decode(some, skip_special_tokens=False), told)
    assert "".join(piece for piece, _ in found) == text
    assert len(found) > 1 and found[-1][1] == told[-1][1]


def test_a_limit_far_beyond_the_models_context_draws_the_same_and_takes_no_memory(tmp_path: Path) -> None:
    backend = HFBackend.load(str(build("qwen2_5_vl", tmp_path, max_position_embeddings=60)), device="cpu")
    asked = [message("user", image_part("coarse"), "What?")]
    told = [
        backend.session(lambda view: Image.new("RGB", (56, 56))).reply(asked, settings=some).text
        for some in (SamplingParams(max_new_tokens=limit, temperature=1.0) for limit in (60, 10**15))
    ]
    assert told[0] == told[1] != ""


def test_a_reply_cut_off_by_the_models_context_is_told_its_own_length(tmp_path: Path) -> None:
    backend = HFBackend.load(str(build("qwen2_5_vl", tmp_path, max_position_embeddings=200)), device="cpu")
    agent = Agent(backend, policy="direct", generation={"max_new_tokens": 500}, budget={"coarse_tokens": 16})
    turn = agent.run(Image.new("RGB", (60, 60)), "What?").trace.turns[0]
    assert (turn.finish, turn.new_tokens < 200) == ("length", True)
    assert f"cut off at its limit of {turn.new_tokens} tokens" in turn.problems[0]
