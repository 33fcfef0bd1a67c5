"""The needle tasks as `Task`s: questions that are drawn when they are asked for.

The questions depend on (task, split, seed, index) and nothing else, so two policies, two models or two machines answer
the same ones and can be compared one by one.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Final

from qzoom_agent.data.answers import exact_match
from qzoom_agent.data.samples import Sample, TaskSource
from qzoom_agent.errors import ConfigError
from qzoom_agent.evaluation.tasks.needle import PAIR, SEEDS_A_RUN, TASK_NAMES, pair, require_split, sample, sample_seed
from qzoom_agent.evaluation.tasks.needle.ink import photo_folder, typefaces
from qzoom_agent.evaluation.tasks.task import Score, Task, scorer

QUESTIONS: Final = 100
"""Default number of questions."""
_TITLES: Final = {
    "needle-global": "generated boards: headline, count, colour, shape; the coarse view suffices",
    "needle-scene": "generated boards: a code or dots on one object; one crop",
    "needle-doc": "generated forms, receipts and tables: one field; one crop",
    "needle-hop": "generated boards: a note names the cell to read; two crops in order",
    PAIR: "two generated boards, and a question of needle-scene or needle-doc about one of them; one crop",
    "needle-chain": "generated boards: a note names a cell whose note names the cell to read; three crops in order",
}


@dataclass(frozen=True)
class NeedleSamples:
    """The first `n` questions of one task, split and seed."""

    task: str
    source: TaskSource

    def __len__(self) -> int:
        return QUESTIONS if self.source.n is None else self.source.n

    def __getitem__(self, index: int, /) -> Sample:
        if not 0 <= index < len(self):
            raise IndexError(index)
        source = self.source
        seed, split = sample_seed(source.seed, index), source.split or "test"
        if self.task == PAIR:
            return pair(seed, split=split, fonts=source.fonts)
        return sample(self.task, seed, split=split, fonts=source.fonts)

    def __iter__(self) -> Iterator[Sample]:
        return (self[index] for index in range(len(self)))

    @cached_property
    def kinds(self) -> Sequence[str]:
        """The kind of every question. All are drawn: it depends on what came to lie on the board."""
        return [question.kind for question in self]


def load(name: str, source: TaskSource) -> NeedleSamples:
    """Return the questions of the needle task `name`; ConfigError for what they cannot be drawn with."""
    if source.path is not None:
        raise ConfigError(f"{name} draws its own boards: it cannot be read from {source.path!r}. Leave the path out.")
    if source.n is not None and not 1 <= source.n <= SEEDS_A_RUN:
        raise ConfigError(f"An evaluation has 1 to {SEEDS_A_RUN} samples; got n = {source.n}.")
    if source.seed < 0:
        raise ConfigError(f"A seed is 0 or more; got {source.seed}.")
    split = source.split or "test"
    require_split(split)
    typefaces(split, source.fonts)
    photo_folder()
    return NeedleSamples(name, source)


@scorer()
def exact(text: str, question: Sample) -> Score:
    """Return 1 for the very answer (`match.exact_match`): nothing is extracted, it must be all of the reply."""
    return Score(float(exact_match(text, question.answer)), text)


NEEDLE: Final[tuple[Task, ...]] = tuple(
    Task(name=name, title=_TITLES[name], load=partial(load, name), scorers={"exact": exact}) for name in TASK_NAMES
)
NEEDLE_PAIR: Final = Task(name=PAIR, title=_TITLES[PAIR], load=partial(load, PAIR), scorers={"exact": exact})
