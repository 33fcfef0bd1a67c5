"""Log-probabilities of replies whose characters take several tokens, as a euro sign or a Chinese name does."""

from __future__ import annotations

import math
from types import SimpleNamespace
from typing import Any

import pytest

from qzoom_agent.gate import answer_confidence
from qzoom_agent.models.chat_reply import CompletionReader
from qzoom_agent.models.hf_generation import GeneratedTurn, GenerationRequest
from qzoom_agent.models.interface import SamplingParams

THOUGHT, EURO = math.log(0.05), math.log(0.8)
TOKENS = [(b"<think>hm</think>", THOUGHT), (b"12", -0.1), (b" \xe2\x82", EURO), (b"\xac", -0.02)]
"""A thought, and an answer that ends with a euro sign of two tokens, the first of which is the least likely."""
WHOLE = [("<think>hm</think>", THOUGHT), ("12", -0.1), (" €", EURO)]


def told(*, by: str) -> list[dict[str, Any]]:
    """Return the tokens as a server tells them: with their bytes (OpenAI), or the last with the character (vLLM)."""
    if by == "openai":
        names = ["<think>hm</think>", "12", "bytes: \\xe2\\x82", "bytes:\\xac"]
        return [
            {"token": name, "logprob": value, "bytes": list(data)}
            for name, (data, value) in zip(names, TOKENS, strict=True)
        ]
    texts = ["<think>hm</think>", "12", "", " €"]
    return [
        {"token": text, "logprob": value, "bytes": list(text.encode())}
        for text, (_, value) in zip(texts, TOKENS, strict=True)
    ]


@pytest.mark.parametrize("by", ["openai", "vllm"])
@pytest.mark.parametrize("streamed", [False, True])
def test_the_confidence_of_a_servers_answer_is_that_of_its_own_tokens(by: str, streamed: bool) -> None:
    reader = CompletionReader()
    text = "".join(text for text, _ in WHOLE)
    if streamed:
        for one in told(by=by):
            reader.take({"choices": [{"delta": {"content": ""}, "logprobs": {"content": [one]}}]})
        reader.take({"choices": [{"delta": {"content": text}, "finish_reason": "stop"}]})
    else:
        reader.take({"choices": [{"message": {"content": text}, "logprobs": {"content": told(by=by)}}]})
    found = reader.completion().logprobs
    assert list(found) == WHOLE
    assert answer_confidence(found, "12 €") == pytest.approx(0.8)
    assert answer_confidence(found, "€") == pytest.approx(0.8)


def test_a_character_that_is_cut_off_keeps_its_probability() -> None:
    reader = CompletionReader()
    half = [{"token": "?", "logprob": EURO, "bytes": [0xE2, 0x82]}]
    reader.take({"choices": [{"message": {"content": "\ufffd"}, "logprobs": {"content": half}}]})
    assert list(reader.completion().logprobs) == [("\ufffd", EURO)]


def test_the_confidence_of_a_local_answer_is_that_of_its_own_tokens() -> None:
    vocabulary = [*(data for data, _ in TOKENS), b"<end>"]
    codec = SimpleNamespace(decode=lambda ids: b"".join(vocabulary[one] for one in ids).decode("utf-8", "replace"))
    session: Any = SimpleNamespace(backend=SimpleNamespace(codec=codec, end_ids={4}))
    request = GenerationRequest(session, None, SamplingParams(logprobs=True))  # type: ignore[arg-type]
    values = (*(value for _, value in TOKENS), 0.0)
    assert request._logprobs(GeneratedTurn((0, 1, 2, 3, 4), values, "", "stop")) == WHOLE
    cut = request._logprobs(GeneratedTurn((1, 2), (-0.1, EURO), "", "length"))
    assert cut == [("12", -0.1), (" \ufffd", EURO)]
