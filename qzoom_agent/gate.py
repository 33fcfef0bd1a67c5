"""The gate's decision: does a question need more detail than the coarse view shows?

The gate is a learned branch; its score is the probability that it does. Where there is none, a first answer of the
model can decide: its score is the doubt about its least likely token. Only this module compares a score with a
threshold: the coarse look, the review of tool calls, traces, rewards and reports all ask here.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

CONFIDENCE = 0.9
"""Confidence above which an answer from the coarse view is kept, where the user gives none."""


def gate_fires(score: float | None, threshold: float | None, *, share: float = 1.0) -> bool | None:
    """Return whether the gate asks for more detail; None where no gate was asked.

    Args:
        score: The gate's probability, 0 to 1.
        threshold: The probability from which it asks for a crop.
        share: Lower the threshold to this share of itself (`review.gate`).
    """
    if score is None or threshold is None:
        return None
    return score >= share * threshold


def answer_confidence(tokens: Sequence[tuple[str, float]], answer: str) -> float:
    """Return the probability of the least likely token of an answer, 0 to 1.

    Args:
        tokens: Text and log-probability of each token of the reply; at least one.
        answer: The answer in it. If it is not found there, as after a repair, all tokens count.
    """
    start = "".join(text for text, _ in tokens).rfind(answer) if answer else -1
    inside, at = [], 0
    for text, logprob in tokens:
        if start < 0 or (at < start + len(answer) and at + len(text) > start):
            inside.append(logprob)
        at += len(text)
    return math.exp(min(0.0, *inside))
