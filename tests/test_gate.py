"""The confidence of an answer: that of its least likely token, wherever it stands in the reply."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from qzoom_agent.gate import answer_confidence, gate_fires

REPLY = [("<think>", -3.0), ("4?", -4.0), ("</think>", 0.0), ("4", -0.5), ("2", -0.1)]


@pytest.mark.parametrize(
    ("answer", "logprob"),
    [
        ("42", -0.5),
        ("2", -0.1),
        ("", -4.0),
        ("not there", -4.0),
        ("4?</think>42", -4.0),
        ("<think>", -3.0),
        ("</think>", 0.0),
    ],
)
def test_only_the_tokens_of_the_answer_count(answer: str, logprob: float) -> None:
    assert answer_confidence(REPLY, answer) == pytest.approx(math.exp(logprob))


@given(st.lists(st.tuples(st.text(max_size=4), st.floats(max_value=0, allow_nan=False)), min_size=1), st.text())
def test_it_is_a_probability(tokens: list[tuple[str, float]], answer: str) -> None:
    assert 0.0 <= answer_confidence(tokens, answer) <= 1.0


def test_no_gate_was_asked_where_a_score_or_its_threshold_is_missing() -> None:
    assert [gate_fires(*one) for one in ((None, 0.5), (0.5, None), (0.5, 0.5), (0.4, 0.5))] == [None, None, True, False]
    assert gate_fires(0.4, 0.5, share=0.8) is True
