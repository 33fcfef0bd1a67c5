"""Which rule a score was given by: the version of a scorer, and the public code that it repeats."""

from __future__ import annotations

import hashlib
import inspect
from collections.abc import Callable
from functools import lru_cache, wraps
from typing import Any, Final

from pydantic import BaseModel, ConfigDict

from qzoom_agent.data.samples import Sample
from qzoom_agent.evaluation.tasks.task import Score, Scorer

RULES: Final = "2"
"""Version of this package's scorers: raised with every change that can change a score."""
MOST_CHARACTERS: Final = 200_000
"""A longer reply is no answer, and is not read."""


class PublicRule(BaseModel):
    """The public code that a scorer repeats."""

    model_config = ConfigDict(frozen=True, use_attribute_docstrings=True)

    package: str
    version: str
    commit: str
    """Commit or release that was read."""
    function: str
    """File and function in that package."""


def lmms_eval(function: str) -> PublicRule:
    """Return a rule of the release of lmms-eval that the `faithful` scorers repeat."""
    return PublicRule(package="lmms-eval", version="0.7.3", commit="release 0.7.3", function=function)


def vlmevalkit(function: str, commit: str) -> PublicRule:
    """Return a rule of VLMEvalKit, as it stood at a commit, that a `vlmevalkit` scorer repeats: read, never run."""
    return PublicRule(package="VLMEvalKit", version="main", commit=commit, function=function)


def scorer(repeats: PublicRule | None = None) -> Callable[[Callable[[str, Sample], Score]], Scorer]:
    """Make a scorer of a function that reads a reply: no reply, and one that is too long to read, are worth 0.

    Args:
        repeats: The public code whose rule it is; None for a rule of ours.
    """

    def make(function: Callable[[str, Sample], Score]) -> Scorer:
        @wraps(function)
        def score(text: str | None, sample: Sample) -> Score:
            if text is None or len(text) > MOST_CHARACTERS:
                return Score(0.0, None)
            return function(text, sample)

        vars(score).update(version=RULES, repeats=repeats)
        return score

    return make


def public_rule(scorer: Callable[..., Any]) -> PublicRule | None:
    """Return the public code that a scorer repeats; None for a rule of its own."""
    found = getattr(scorer, "repeats", None)
    return found if isinstance(found, PublicRule) else None


def rule_version(scorer: Callable[..., Any]) -> str:
    """Return the version of a scorer: its attribute `version`, else a digest of its source; empty if it has neither."""
    version = getattr(scorer, "version", None)
    if isinstance(version, str):
        return version
    try:
        return _source_version(inspect.unwrap(scorer))
    except (OSError, TypeError):
        return ""


@lru_cache(maxsize=256)  # asked for every row, and reading a source takes a millisecond
def _source_version(scorer: Callable[..., Any]) -> str:
    return f"source {hashlib.sha256(inspect.getsource(scorer).encode()).hexdigest()[:12]}"
