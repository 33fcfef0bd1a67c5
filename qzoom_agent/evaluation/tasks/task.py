"""The interface of tasks: samples to answer, rules to score them by, and the budget they are to be answered at.

The runner knows nothing of any particular benchmark. A task names its scorers and, where the published figure is not
the plain mean, the function that aggregates; resuming, statistics and reports are the same for all.
"""

import hashlib
import inspect
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache, partial, wraps
from typing import Annotated, Any, Final, NamedTuple

from pydantic import BaseModel, Field, JsonValue

from qzoom_agent.data.samples import Sample, Samples, TaskSource
from qzoom_agent.errors import ConfigError
from qzoom_agent.extensions import bound_arguments, calling, reference

RULES: Final = "4"
"""Version of this package's scorers: raised with every change that can change a score."""
MOST_CHARACTERS: Final = 200_000
"""A longer reply is no answer, and is not read."""


class Score(NamedTuple):
    """The worth of an answer."""

    value: Annotated[float, Field(ge=0, le=1)]
    """0 to 1."""
    extracted: str | None
    """The text that was taken for the final answer; None where none was found."""

    @property
    def parsed(self) -> bool:
        return self.extracted is not None


Scorer = Callable[[str | None, Sample], Score]
"""A pure function of the answer's text and the sample; None (no answer came) is worth 0."""
CustomScorer = Callable[[str, Sample], Score | float | bool]
"""A scorer from outside this package; it is called only if an answer came."""


class Scored(NamedTuple):
    """One scored sample, as aggregates take it."""

    kind: str
    value: float
    meta: Mapping[str, JsonValue]


@dataclass(frozen=True)
class Task:
    """A benchmark."""

    name: str
    """Name on the command line and in results."""
    title: str
    """One line for `qzoom eval list`."""
    load: Callable[[TaskSource], Samples]
    """Function that returns the samples, read one at a time."""
    scorers: Mapping[str, Scorer | CustomScorer]
    """By name, the default first: `faithful` is the public implementation's rule, `clean` ours where that is wrong."""
    aggregate: Callable[[Sequence[Scored]], Mapping[str, float]] | None = None
    """Function that returns the task's published figures, where they are more than the mean and the mean by kind."""
    coarse_tokens: tuple[int, int] | None = None
    """(least, most) visual tokens of the coarse view that the task is usually run at; None: the model's own."""
    sources: tuple[str, ...] = ()
    """Hub ids, the preferred one first."""
    columns: tuple[str, ...] = ()
    """Columns that `load` needs."""
    reference: str = ""
    """Name by which `find_task` finds a task from outside this package: `module:function` or an entry point."""
    path: str | None = None
    """Path that `load` reads where its argument names none, of a table of your own."""


def apply(scorer: Scorer | CustomScorer, answer: str | None, sample: Sample) -> Score:
    """Return the worth of an answer by a scorer of this package or another; 0 if none came.

    Raises:
        ConfigError: The scorer failed, or returned neither a `Score` nor a number from 0 to 1.
    """
    if answer is None:
        return Score(0.0, None)
    with calling(reference(scorer), kind="scorer"):
        found = scorer(answer, sample)
    try:
        value = float("nan") if isinstance(found, str) else float(found.value if isinstance(found, Score) else found)
    except (TypeError, ValueError):
        value = float("nan")
    if isinstance(found, Score) and not isinstance(found.extracted, str | None):
        raise ConfigError(
            f"The scorer {reference(scorer)} returned a Score whose `extracted` is {found.extracted!r:.60}. Give the "
            "text that it took for the answer, or None."
        )
    if not 0 <= value <= 1:
        raise ConfigError(
            f"The scorer {reference(scorer)} returned {found!r} for {answer[:60]!r}. Return a Score, a bool, or a "
            "number from 0 to 1."
        )
    return found if isinstance(found, Score) else Score(value, answer)


# -- the rule that a score was given by -------------------------------------------------------------------------------


class PublicRule(BaseModel, frozen=True, use_attribute_docstrings=True):
    """The public code that a scorer repeats."""

    package: str
    version: str
    commit: str
    """Commit or release that was read."""
    function: str
    """File and function in that package."""


def lmms_eval(function: str) -> PublicRule:
    """Return a rule of the release of lmms-eval that the `faithful` scorers repeat."""
    return PublicRule(package="lmms-eval", version="0.7.3", commit="release 0.7.3", function=function)


def vlmevalkit(function: str) -> PublicRule:
    """Return a rule of VLMEvalKit that a `vlmevalkit` scorer repeats: read, never run."""
    commit = _VLMEVALKIT[function.partition(":")[0]]
    return PublicRule(package="VLMEvalKit", version="main", commit=commit, function=function)


_VLMEVALKIT: Final = {
    "vlmeval/dataset/utils/vqa_eval.py": "0a04a1d23a57c404e93e34a76933095fdd46b3d9",
    "vlmeval/dataset/utils/multiple_choice.py": "895762d302b923d9d1f24ac16a7a2cbc461bb1cf",
    "vlmeval/dataset/image_vqa.py": "00b1c8d493bfc5dbf7dec54ebcd9221600df6345",
    "vlmeval/utils/matching_util.py": "d21c5e969983dea6741a98eb2f7ec566ab82ee91",
}
"""Commit at which each file was read."""


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
    """Return the version of a scorer: its attribute `version`, else a digest of the file it stands in; or empty.

    With other arguments, a `functools.partial` is another version.
    """
    version = getattr(scorer, "version", None)
    if isinstance(version, str):
        return version
    made: Any = inspect.unwrap(scorer)
    given = ""
    while isinstance(made, partial):
        made, given = made.func, bound_arguments(made) + given
    try:
        held: Any = made if hasattr(made, "__code__") or isinstance(made, type) else type(made)
        return _source_version(held) + given
    except (OSError, TypeError):
        return ""


@lru_cache(maxsize=256)  # asked for every row, and reading a source takes a millisecond
def _source_version(scorer: Any) -> str:
    """Return a digest of the module of a function or class, since what it calls decides as well."""
    module = sys.modules.get(scorer.__module__)
    held = module if module is not None and getattr(module, "__file__", None) else scorer
    return f"source {hashlib.sha256(inspect.getsource(held).encode()).hexdigest()[:12]}"
