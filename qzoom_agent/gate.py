"""The gate's decision: does a question need more detail than the coarse view shows?

The gate is a learned branch; its score is the probability that it does. Only this module compares a score with a
threshold: the coarse look, the review of tool calls, traces, rewards and reports all ask here.
"""

from __future__ import annotations


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
