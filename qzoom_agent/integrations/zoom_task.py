"""The zoom task as an environment: a question about an image, the zoom tool, and the evaluation's scorer as reward.

    questions = ZoomQuestions("needle-scene", n=100)
    trainer = GRPOTrainer(..., environment_factory=lambda: ZoomTaskEnv(questions), reward_funcs=[correct])

Any task of `qzoom eval`, and questions of your own, are asked with the same rows and scored by the same rules. No model
of ours is needed. `tools/openenv_zoom.py` and `tools/verifiers_zoom.py` give the task to OpenEnv and to verifiers.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any, Final

from qzoom_agent.data.samples import Sample, TaskSource
from qzoom_agent.errors import ConfigError
from qzoom_agent.evaluation.tasks.catalog import find_task, with_scorer
from qzoom_agent.evaluation.tasks.task import apply
from qzoom_agent.protocols import get_protocol
from qzoom_agent.zoom.image_zoom import ImageZoom
from qzoom_agent.zoom.zoom import ZoomConfig

Block = dict[str, Any]
"""Part of a message as chat templates read it: {"type": "text", "text"} or {"type": "image", "image"}."""
_KEPT: Final = 64


class ZoomQuestions:
    """The questions of a task, about one image each, by index. Processes and threads may share one."""

    def __init__(
        self,
        task: str = "needle-scene",
        *,
        n: int | None = None,
        seed: int = 0,
        split: str | None = None,
        path: str | Path | None = None,
        scorer: str | None = None,
        coarse_tokens: tuple[int, int] = (64, 256),
        crop: ZoomConfig | None = None,
    ) -> None:
        """
        Args:
            task: A name of `qzoom eval list`, or `module:function`.
            n: Number of questions, where the task draws them; else the first so many. None: all.
            seed: Of tasks that draw their questions.
            split: Of a task that reads a table.
            path: Folder, file or hub id to read instead of the task's own.
            scorer: Name of the task's scorer that gives the reward; None: its default.
            coarse_tokens: Least and most visual tokens of the view that the model is shown first.
            crop: Budget and shape of crops; None: 64 to 1024 tokens.

        Raises:
            ConfigError: There is no such task or scorer, or it cannot be read; later, that a question has several
                images.
        """
        (self.task,), name = with_scorer([find_task(task)], scorer)
        source = TaskSource(None if path is None else str(path), split, seed, n=n)
        self._samples = self.task.load(source)
        self._count = len(self._samples) if n is None else min(n, len(self._samples))
        self._scorer = self.task.scorers[name or next(iter(self.task.scorers))]
        self._coarse, self._crop = coarse_tokens, crop
        self._read = lru_cache(maxsize=_KEPT)(self._samples.__getitem__)

    def __len__(self) -> int:
        return self._count

    def __getitem__(self, index: int) -> Sample:
        if not 0 <= index < self._count:
            raise IndexError(f"There are {self._count} questions, counted from 0; got {index}.")
        sample = self._read(index)
        if sample.others:
            raise ConfigError(
                f"Question {index} of '{self.task.name}' is about {len(sample.images)} images, and the zoom task shows "
                "one. Give it questions about one image each."
            )
        return sample

    def zoom(self, index: int) -> ImageZoom:
        """Return a fresh image with its zoom tool."""
        return ImageZoom(self[index].image, coarse_tokens=self._coarse, crop=self._crop)

    def score(self, index: int, reply: str) -> float:
        """Return the worth of a model's last reply, 0 to 1: its answer is read as the agent reads it."""
        parsed = get_protocol("qwen3vl").parse(reply, [])
        return apply(self._scorer, parsed.answer, self[index]).value


class ZoomTaskEnv:
    """An environment of one rollout at a time, as TRL's `environment_factory` makes them.

    A row of the dataset has a column `index`. Rewards are given by `correct`.
    """

    def __init__(self, questions: ZoomQuestions) -> None:
        self._questions = questions
        self._index: int | None = None
        self._zoom: ImageZoom | None = None

    def reset(self, index: int, **row: Any) -> list[Block]:
        """Begin a rollout; return the blocks that end its first user turn."""
        sample = self._questions[index]
        self._index, self._zoom = index, self._questions.zoom(index)
        return [{"type": "image", "image": self._zoom.coarse}, {"type": "text", "text": sample.question}]

    def image_zoom_in_tool(self, bbox_2d: list[float], label: str = "", view: str = "coarse") -> list[Block]:
        """
        Zoom in on a region of the image: it is cut out of the full-resolution original and shown.

        Args:
            bbox_2d: The region as x1, y1, x2, y2 in thousandths (0 to 1000) of the view's width and height.
            label: What is expected in the region.
            view: The view that the numbers refer to: coarse for the first image, crop1 for the first crop, and so on.

        Returns:
            The region as an image.
        """
        if self._zoom is None:
            raise ConfigError("There is no question yet. Call reset(index) first.")
        reply = self._zoom(bbox_2d=bbox_2d, label=label, view=view)
        shown: list[Block] = [] if reply.image is None else [{"type": "image", "image": reply.image}]
        return [*shown, {"type": "text", "text": reply.text}]

    def _score(self, reply: str) -> float:
        """Return the worth of the last reply."""
        return 0.0 if self._index is None else self._questions.score(self._index, reply)


def correct(completions: Sequence[Any], environments: Sequence[ZoomTaskEnv], **_: Any) -> list[float]:
    """Return the reward of each rollout: the evaluation's score of its last message. TRL passes the environments."""
    return [env._score(_last_text(one)) for one, env in zip(completions, environments, strict=True)]


def _last_text(completion: Any) -> str:
    """Return the text of the last message of a completion, which is a list of messages or a text."""
    if isinstance(completion, str):
        return completion
    last = completion[-1] if completion else {}
    if last.get("role") != "assistant" or last.get("tool_calls"):
        return ""
    content = last.get("content") or ""
    if isinstance(content, str):
        return content
    return "".join(part.get("text", "") for part in content if part.get("type") == "text")
