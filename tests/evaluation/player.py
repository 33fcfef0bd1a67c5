"""A tiny task and agents on scripts that answer it: what the tests of runs, reports and kills share."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from PIL import Image, ImageDraw

from qzoom_agent.agent import Agent
from qzoom_agent.config import AgentConfig
from qzoom_agent.data.samples import Sample, TaskSource
from qzoom_agent.evaluation.sample_result import SampleResult
from qzoom_agent.evaluation.tasks.task import Score, Scored, Task
from qzoom_agent.geometry import Box
from qzoom_agent.messages import Message
from qzoom_agent.models.scripted import ScriptedBackend

ZOOM = "<zoom>28 28 84 84</zoom>"
KINDS = ("odd", "even", "tenth")


Change = Callable[[int, Sample], Sample]
"""Makes another sample of one, given its place as well."""


@dataclass(frozen=True)
class Numbers:
    """Sample i asks for the number i; every tenth is a kind of its own, two neighbours share a cluster."""

    name: str
    n: int
    clustered: bool = False
    change: Change = lambda _, sample: sample

    def __len__(self) -> int:
        return self.n

    def __getitem__(self, index: int, /) -> Sample:
        if not 0 <= index < self.n:
            raise IndexError(index)
        image = Image.new("RGB", (168, 112), (index * 7 % 256, index * 13 % 256, 90))
        ImageDraw.Draw(image).text((40, 40), str(index), fill="white")
        sample = Sample(
            id=f"{self.name}-{index}",
            task=self.name,
            kind=self.kinds[index],
            image=image,
            question=f"which number is on board {index}?",
            answer=str(index),
            answers=(str(index), f"no. {index}"),
            boxes=(Box(36, 36, 60, 56),),
            coarse_suffices=index % 4 == 0,
            cluster=str(index // 2) if self.clustered else "",
            meta={"half": index % 2},
        )
        return self.change(index, sample)

    def __iter__(self) -> Iterator[Sample]:
        return (self[index] for index in range(self.n))

    @property
    def kinds(self) -> Sequence[str]:
        return [KINDS[2] if index % 10 == 0 else KINDS[(index + 1) % 2] for index in range(self.n)]


def faithful(text: str | None, sample: Sample) -> Score:
    """Right if the number is anywhere in the reply: a rule with a fault."""
    return Score(float(text is not None and sample.answer in text), text)


def clean(text: str | None, sample: Sample) -> Score:
    """Right if the last number of the reply is it; a reply without a number has no final answer."""
    found = re.findall(r"\d+", text or "")
    return Score(float(bool(found) and found[-1] == sample.answer), found[-1] if found else None)


def halves(scored: Sequence[Scored]) -> dict[str, float]:
    """A figure of the task's own: the accuracy of its second half."""
    second = [one.value for one in scored if one.meta["half"]]
    return {"second half": sum(second) / max(1, len(second))}


def numbers(n: int = 20, *, change: Change = Numbers.change, name: str = "numbers", clustered: bool = False) -> Task:
    """The task, of `n` samples (or as many as the source says)."""

    def load(source: TaskSource) -> Numbers:
        return Numbers(name, source.n or n, clustered, change)

    return Task(name=name, title="numbers", load=load, scorers={"faithful": faithful, "clean": clean}, aggregate=halves)


def changed(n: int = 20, **fields: Any) -> Task:
    """The task, of samples with other values of some fields."""
    return numbers(n, change=lambda _, sample: replace(sample, **fields))


def asked(messages: list[Message]) -> int:
    """The number of the sample that a conversation is about."""
    text = " ".join(part["text"] for message in messages for part in message["content"] if part["type"] == "text")
    found = re.search(r"on board (\d+)", text)
    assert found
    return int(found[1])


def player(
    right: Callable[[int], bool] = lambda index: True,
    *,
    zooms: Callable[[int], bool] = lambda index: False,
    saw: list[int] | None = None,
    **config: Any,
) -> Agent:
    """An agent that answers where `right` and otherwise says 'x', after one zoom where `zooms`."""

    def reply(messages: list[Message]) -> str:
        index = asked(messages)
        shown = sum(part["type"] == "image" for message in messages for part in message["content"])
        if zooms(index) and shown == 1:
            return ZOOM
        if saw is not None:
            saw.append(index)
        return str(index) if right(index) else "x"

    return Agent(ScriptedBackend(reply), config=AgentConfig(**config))


class Watcher:
    """A `ProgressListener` that keeps what it is told, and may stop the run."""

    def __init__(self, stop_after: int | None = None) -> None:
        self.rows: list[tuple[SampleResult, bool]] = []
        self.begun: list[tuple[str, int]] = []
        self.stop_after = stop_after

    def begin(self, task: str, planned: int) -> None:
        self.begun.append((task, planned))

    def row(self, row: SampleResult, *, new: bool) -> None:
        self.rows.append((row, new))
        if len(self.rows) == self.stop_after:
            raise KeyboardInterrupt


def lines(path: Path) -> list[str]:
    return path.read_text(encoding="utf-8").splitlines()
