"""What a suite is: samples to answer, rules to score them by, and the budget they are to be answered at.

Seam between the suites (one module or folder each under `evals/suites`) and the runner, which knows nothing of any
particular benchmark. A suite is data: it names its scorers and, where the published figure is not the plain mean, the
function that aggregates; everything that all suites share (journals, statistics, reports) lives outside.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple, Protocol

from PIL import Image
from pydantic import JsonValue

from qzoom_agent.geometry import Box
from qzoom_agent.images import MAX_PIXELS


@dataclass(frozen=True)
class Sample:
    """One question about one image.

    `boxes` are where the answer is, in pixels of `image` and in the order in which they must be read; empty where
    nobody knows or where `coarse_suffices`. `answers` are all accepted ones and `answer` the first of them. `options`
    are the texts of a multiple choice in the order shown (A first). Samples of one `cluster` share an image or are
    rotations of one question: they are not independent.
    """

    id: str
    suite: str
    kind: str
    """Category that is reported by itself."""
    image: Image.Image
    question: str
    """As it is asked, options and instruction included."""
    answer: str
    boxes: tuple[Box, ...] = ()
    coarse_suffices: bool | None = None
    """Whether a coarse view holds the answer; None where nobody knows."""
    answers: tuple[str, ...] = ()
    options: tuple[str, ...] = ()
    cluster: str = ""
    """Empty: the sample's own id."""
    meta: Mapping[str, JsonValue] = field(default_factory=dict)
    """What the suite's scorer or aggregate needs beside."""


class Score(NamedTuple):
    """What an answer is worth."""

    value: float
    """0 to 1."""
    extracted: str | None
    """What was taken for the final answer; None where none was found."""

    @property
    def parsed(self) -> bool:
        return self.extracted is not None


Scorer = Callable[[str | None, Sample], Score]
"""A pure function of the answer's text and the sample; None (no answer came) is worth 0."""


class Samples(Protocol):
    """Samples that are read (images decoded) one at a time."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int, /) -> Sample: ...

    def __iter__(self) -> Iterator[Sample]: ...

    @property
    def kinds(self) -> Sequence[str]:
        """The kind of every sample, without decoding an image."""
        ...


class Scored(NamedTuple):
    """What an aggregate gets of each sample."""

    kind: str
    value: float
    meta: Mapping[str, JsonValue]


class Source(NamedTuple):
    """Where to read a suite from, where that differs from its own."""

    path: str | None = None
    """A local folder or file, or another hub id."""
    split: str | None = None
    seed: int = 0
    """For suites that draw their samples."""
    fonts: Path | None = None
    """For suites that draw their samples: other typefaces."""
    n: int | None = None
    """For suites that draw their samples: how many there are (None: the suite's own number)."""
    max_pixels: int = MAX_PIXELS
    """For suites of your own: most pixels of a picture."""


@dataclass(frozen=True)
class Suite:
    """A benchmark."""

    name: str
    title: str
    """One line for `qzoom eval list`."""
    load: Callable[[Source], Samples]
    scorers: Mapping[str, Scorer]
    """By name, the default first: `faithful` is the public implementation's rule, `clean` ours where that is wrong."""
    aggregate: Callable[[Sequence[Scored]], Mapping[str, float]] | None = None
    """The suite's own published figures, where they are more than the mean and the mean by kind."""
    coarse_tokens: tuple[int, int] | None = None
    """(least, most) visual tokens of the coarse view that the suite is usually run at; None: the model's own."""
    sources: tuple[str, ...] = ()
    """Hub ids, the preferred one first."""
    columns: tuple[str, ...] = ()
    """Columns that `load` needs."""
