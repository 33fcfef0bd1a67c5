"""Measure the overhead of this software around the model: of a step of the loop, and of a sample of an evaluation.

    python evals/overhead.py

Replies are scripted. A step is a node of the graph, over many episodes of four zooms, the crops' resizing and hashing
included, since every backend pays for them. A sample is what a run folder adds to an episode that costs nothing: key,
score, measurements, trace with pictures, one flushed line; the picture and the loop itself are taken off. Memory is the
process's own, after a tenth of the samples and after all.
"""

import argparse
import resource
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from statistics import median, quantiles
from tempfile import TemporaryDirectory
from time import perf_counter
from typing import NamedTuple

from PIL import Image

from qzoom_agent.agent import Agent
from qzoom_agent.answer import Answer
from qzoom_agent.config import AgentConfig
from qzoom_agent.data.samples import Sample
from qzoom_agent.evaluation.runner import evaluate
from qzoom_agent.evaluation.sample_result import SampleResult
from qzoom_agent.evaluation.tasks.task import Score, Task
from qzoom_agent.geometry import Box
from qzoom_agent.messages import Message
from qzoom_agent.models.scripted import ScriptedBackend

EPISODES = 200
SAMPLES = 5000
_REPLIES = (*(f"<zoom><loc_{x}><loc_28><loc_{x + 84}><loc_112></zoom>" for x in (0, 28, 56, 84)), "done")
STEPS = 2 + len(_REPLIES) + len(_REPLIES) - 1
"""perceive and finish, one think a reply, one act a call."""
_SIZE = (700, 660)


def picture(index: int = 0) -> Image.Image:
    """Return a picture with detail everywhere; another for each index."""
    image = _MANDELBROT.copy()
    image.putpixel((index % _SIZE[0], index // _SIZE[0]), (1, 2, 3))
    return image


_MANDELBROT = Image.effect_mandelbrot(_SIZE, (-2.0, -1.5, 1.0, 1.5), 40).convert("RGB")


def milliseconds_a_step(episodes: int = EPISODES) -> list[float]:
    """Return the mean milliseconds a step of each episode."""

    def reply(messages: list[Message]) -> str:
        return _REPLIES[sum(message["role"] == "assistant" for message in messages)]

    agent = Agent(ScriptedBackend(reply))
    agent.run(picture(), "warm up")
    times = []
    for _ in range(episodes):
        began = perf_counter()
        answer = agent.run(picture(), "what is there?")
        times.append(1000 * (perf_counter() - began) / STEPS)
        assert answer.text == "done" and len(answer.trace.turns) == len(_REPLIES)
    return times


class Harness(NamedTuple):
    """The overhead of a run folder."""

    milliseconds: list[float]
    """Of each sample, beside its episode and its board."""
    megabytes: tuple[float, float]
    """Resident memory after a tenth of the samples, and after all of them."""


class _Measure:
    """Samples, an agent that answers them, and the run's progress: what is not the harness's time is known."""

    def __init__(self, n: int) -> None:
        def reply(messages: list[Message]) -> str:
            shown = sum(part["type"] == "image" for message in messages for part in message["content"])
            return _REPLIES[0] if shown == 1 else "done"

        self.agent = Agent(ScriptedBackend(reply))
        self.n = n
        self.inside = self.last = 0.0
        self.times: list[float] = []
        self.memory: list[float] = []

    @property
    def config(self) -> AgentConfig:
        return self.agent.config

    def run(
        self, image: Image.Image, question: str, *, boxes: Sequence[Box] | None = None, seed: int | None = None
    ) -> Answer:
        began = perf_counter()
        answer = self.agent.run(image, question, boxes=boxes, seed=seed)
        self.inside += perf_counter() - began
        return answer

    def __len__(self) -> int:
        return self.n

    def __iter__(self) -> Iterator[Sample]:
        return (self[index] for index in range(self.n))

    @property
    def kinds(self) -> Sequence[str]:
        return ["one"] * self.n

    def __getitem__(self, index: int, /) -> Sample:
        began = perf_counter()
        sample = Sample(
            id=str(index),
            task="overhead",
            kind="one",
            image=picture(index),
            question="what is there?",
            answer="done",
            boxes=(Box(100, 100, 200, 200),),
        )
        self.inside += perf_counter() - began
        return sample

    def begin(self, task: str, planned: int) -> None:
        self.last = perf_counter()

    def row(self, row: SampleResult, *, new: bool) -> None:
        now = perf_counter()
        self.times.append(1000 * (now - self.last - self.inside))
        if len(self.times) in {max(1, self.n // 10), self.n}:
            self.memory.append(resident())
        self.last, self.inside = perf_counter(), 0.0


def harness(folder: Path, n: int = SAMPLES) -> Harness:
    """Evaluate `n` samples of one zoom each into `folder`, and say what that cost beside them."""
    measure = _Measure(n)

    def right(text: str | None, sample: Sample) -> Score:
        return Score(float(text == sample.answer), text)

    task = Task(name="overhead", title="", load=lambda _: measure, scorers={"right": right})
    evaluate(measure, [task], out=folder, watch=measure)
    return Harness(measure.times, (measure.memory[0], measure.memory[-1]))


def resident() -> float:
    """Return the MB of memory that this process has now; the most it ever had, if the system does not say."""
    try:
        pages = int(Path("/proc/self/statm").read_text().split()[1])
    except OSError:
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    return pages * resource.getpagesize() / 1e6


def _line(times: Sequence[float], what: str) -> str:
    low, _, high = quantiles(times, n=4)
    return f"{median(times):.2f} ms {what} (quartiles {low:.2f} to {high:.2f}"


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.parse_args(argv)
    times = milliseconds_a_step()
    print(f"{_line(times, 'a step')}; {len(times)} episodes of {STEPS} steps)")
    with TemporaryDirectory() as folder:
        found = harness(Path(folder))
    print(f"{_line(found.milliseconds, 'a sample')}; {len(found.milliseconds)} samples)")
    early, late = found.megabytes
    print(f"{early:.0f} MB after a tenth of the samples, {late:.0f} MB after all")
    return 0


if __name__ == "__main__":
    sys.exit(main())
