"""Samples: questions about images, and where to read them from."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple, Protocol

from PIL import Image
from pydantic import JsonValue

from qzoom_agent.geometry import Box
from qzoom_agent.images import MAX_PIXELS


@dataclass(frozen=True)
class Sample:
    """One question about one image, or several.

    `boxes` are those of the answer, in pixels of `image` and in the order in which they must be read; empty if unknown
    or if `coarse_suffices`. A box with `view` original2 is one of the first of `others`. `answers` are all accepted
    ones and `answer` the first of them. `options` are the texts of a multiple choice in the order shown (A first).
    Samples of one `cluster` share an image or are rotations of one question: they are not independent.
    """

    id: str
    """Name of the question in results, different for each question of the task."""
    task: str
    """Name of the task."""
    kind: str
    """Category that is reported by itself."""
    image: Image.Image
    question: str
    """As it is asked, options and instruction included."""
    answer: str
    boxes: tuple[Box, ...] = ()
    coarse_suffices: bool | None = None
    """A coarse view holds the answer; None if unknown."""
    answers: tuple[str, ...] = ()
    options: tuple[str, ...] = ()
    cluster: str = ""
    """Empty: the sample's own id."""
    meta: Mapping[str, JsonValue] = field(default_factory=dict)
    """Further values that the task's scorer or aggregate needs."""
    others: tuple[Image.Image, ...] = ()
    """Further images that the question is about."""

    @property
    def images(self) -> list[Image.Image]:
        """All images of the question, in order."""
        return [self.image, *self.others]

    @property
    def known_boxes(self) -> tuple[Box, ...] | None:
        """The boxes, empty if no part in particular is meant; None if nothing is known of them."""
        return self.boxes if self.boxes or self.coarse_suffices else None


class Samples(Protocol):
    """Samples that are read (images decoded) one at a time."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int, /) -> Sample: ...

    def __iter__(self) -> Iterator[Sample]: ...

    @property
    def kinds(self) -> Sequence[str]:
        """The kind of every sample, without decoding an image."""

    # Samples that can be checked also have `problems(places)`, see `data.rows.RowSamples`.


class TaskSource(NamedTuple):
    """The place to read a task from, if that is not its own source."""

    path: str | None = None
    """A local folder or file, or another hub id."""
    split: str | None = None
    """Name of the split; None: the task's own, or the only one."""
    seed: int = 0
    """For tasks that draw their samples: which ones."""
    fonts: Path | None = None
    """For tasks that draw their samples: other typefaces."""
    n: int | None = None
    """For tasks that draw their samples: how many there are (None: the task's own number)."""
    max_pixels: int = MAX_PIXELS
    """Most pixels of an image that is read."""
    answered: bool = True
    """Require an answer to every question; False: a test split whose answers are kept back may be asked."""
    skip_bad: bool = False
    """Leave out samples that cannot be asked, instead of stopping at them."""
    columns: Mapping[str, str] | None = None
    """Names that `image`, `question`, `answer` and so on have in a table of your own, where they differ."""
