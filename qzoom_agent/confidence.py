"""The confidence of answers: the probability that one is right, from the probabilities of its tokens.

The probability of an answer's least likely token is too high or too low for that, by an amount that depends on the
model and the policy. A `Calibration` corrects it: two numbers a policy, fitted to questions with known answers
(`qzoom eval calibrate`) and kept in confidence.json beside the model's weights.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Final

from pydantic import BaseModel, Field

from qzoom_agent.files import read_json

FILE: Final = "confidence.json"
"""Name of a model's calibration, in the folder of its weights."""
_LEAST: Final = 1e-6


class Fitted(BaseModel, frozen=True, use_attribute_docstrings=True, allow_inf_nan=False):
    """The correction for one policy, and the questions that it was fitted to."""

    slope: float
    """Factor of the log-odds of the probability."""
    intercept: float
    """Added to them."""
    questions: int = Field(ge=1)
    tasks: list[str] = []

    def __call__(self, probability: float) -> float:
        """Return the probability that an answer is right, from that of its least likely token."""
        return 1 / (1 + math.exp(-max(-500.0, min(500.0, self.slope * log_odds(probability) + self.intercept))))


class Calibration(BaseModel, frozen=True, use_attribute_docstrings=True):
    """Corrections by policy, for greedy answers of one model."""

    version: str = "1.0"
    policies: dict[str, Fitted]

    @classmethod
    def load(cls, path: Path | str) -> Calibration:
        """Read a file. Raises ConfigError."""
        return read_json(path, cls, "Write it again: qzoom eval calibrate.")

    def of(self, probability: float | None, *, policy: str, temperature: float) -> float | None:
        """Return the confidence in an answer, from the probability of its least likely token.

        None for a policy or a temperature that nothing was fitted to.
        """
        fitted = self.policies.get(policy)
        return None if probability is None or fitted is None or temperature else fitted(probability)


def log_odds(probability: float) -> float:
    """Return the log-odds of a probability, limited to 1e-6 from 0 and 1."""
    inside = min(max(probability, _LEAST), 1 - _LEAST)
    return math.log(inside / (1 - inside))
