"""Metrics, warnings and episodes as pages, written while GRPO trains.

Training that fails changes how the model zooms long before it changes the reward: calls stop or are refused, replies
are cut off, all rollouts of a question become the same. Each of these is a metric of every round, by task where it
matters, and `WarningCallback` warns once when one of them leaves its healthy range.
"""

import json
import re
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Final

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from qzoom_agent.report.episode import write_report
from qzoom_agent.trace import by_digest
from qzoom_agent.training.rewards import Accuracy, Rollout
from qzoom_agent.views import ViewStore

COLLAPSE: Final = 0.25
"""Share of the highest call rate so far below which calls have collapsed."""
LITTLE_ENTROPY: Final = 0.1
"""Share of the first entropy below which rollouts of one question are nearly the same."""
SMOOTHING: Final = 0.1
"""Share of the newest value in a running mean."""
NEEDED: Final = "zoom/call_rate_needed"
"""Call rate of the rollouts whose row does not say that the coarse view suffices; where it does, none are wanted."""
_REWARD: Final = re.compile(r"rewards/[^/]+/mean")
_PRINTED: Final = ("reward", "zoom/accuracy", "zoom/call_rate", "zoom/served", "zoom/truncated", "entropy", "step_time")
_LIMITS: Final = {
    "refused": ("zoom/refusal_rate", 0.5, "{:.0%} of the calls are refused"),
    "failed": ("zoom/failure_rate", 0.5, "{:.0%} of the calls cannot be run"),
    "truncated": ("zoom/truncated", 0.3, "{:.0%} of the rollouts are cut off"),
    "equal": ("frac_reward_zero_std", 0.9, "{:.0%} of the groups have equal rewards: nothing to learn from"),
}
"""Warnings, each with a metric, the mean above which it is given, and its text."""


def measures(rollouts: Sequence[Rollout], accuracy: Accuracy) -> dict[str, float]:
    """Return the means over a batch of rollouts, `zoom/...`; call rates and accuracy also by task.

    `NEEDED` is left out where no rollout counts.
    """
    usages = [one.trace.usage for one in rollouts]
    asked = sum(usage.requested for usage in usages)
    right, every = accuracy.right(rollouts), range(len(rollouts))
    found = {
        "zoom/requested": asked / len(rollouts),
        "zoom/served": _mean(usage.served for usage in usages),
        "zoom/inserted": _mean(usage.inserted for usage in usages),
        "zoom/refusal_rate": sum(usage.refused for usage in usages) / max(1, asked),
        "zoom/failure_rate": sum(usage.failed for usage in usages) / max(1, asked),
        "zoom/visual_tokens": _mean(usage.visual_tokens for usage in usages),
        "zoom/written_tokens": _mean(usage.written_tokens for usage in usages),
        "zoom/turns": _mean(len(one.trace.turns) for one in rollouts),
        "zoom/truncated": _mean(one.truncated for one in rollouts),
    }
    tasks = [one.sample.task for one in rollouts]
    of_task = {f"/{task}": [at for at in every if tasks[at] == task] for task in sorted(set(tasks))}
    for task, members in {"": every, **of_task}.items():
        found[f"zoom/accuracy{task}"] = _mean(right[at] for at in members)
        found[f"zoom/call_rate{task}"] = _mean(bool(rollouts[at].crops) for at in members)
        if needed := [rollouts[at] for at in members if rollouts[at].sample.coarse_suffices is not True]:
            found[f"{NEEDED}{task}"] = _mean(bool(one.crops) for one in needed)
    return found


def _mean(values: Iterable[float]) -> float:
    given = list(values)
    return sum(given) / len(given)


class RolloutPageCallback(TrainerCallback):
    """Writes some rollouts as pages, with their rewards: those of the first round after each multiple of `every`."""

    def __init__(self, folder: Path, *, every: int, episodes: int) -> None:
        self.folder, self.every, self.episodes = folder, every, episodes
        self._last = -1

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if state.is_world_process_zero:
            kept = keep_lines(self.folder / "rollouts.jsonl", lambda line: line["step"] < state.global_step)
            self._last = max((line["step"] for line in kept), default=-1)

    def keep(
        self,
        step: int,
        rollouts: Sequence[Rollout],
        names: Sequence[str],
        values: Sequence[Sequence[float]],
        stores: Sequence[ViewStore],
    ) -> None:
        """Write the first rollout of some questions, if it is time.

        Args:
            step: At which the round begins.
            rollouts: Of the round.
            names: Of the rewards.
            values: Of each rollout, the rewards in that order.
            stores: The views of each rollout.
        """
        if step // self.every <= self._last // self.every or not self.episodes:
            return
        self._last = step
        seen: set[str] = set()
        self.folder.mkdir(parents=True, exist_ok=True)
        for one, value, store in zip(rollouts, values, stores, strict=True):
            if one.sample.id in seen or len(seen) == self.episodes:
                continue
            seen.add(one.sample.id)
            path = self.folder / f"step-{step:06d}-{len(seen)}.html"
            write_report(one.trace, by_digest(one.trace.views, store.image), path, expected=one.answer)
            line = {
                "step": step,
                "page": path.name,
                "question": one.trace.question,
                "answer": one.trace.answer,
                "expected": one.answer,
                "status": one.trace.status,
                "calls": len(one.calls),
                # None of a reward becomes not-a-number in the trainer, which JSON does not have
                "rewards": {name: None if x != x else x for name, x in zip(names, value, strict=True)},
            }
            with (self.folder / "rollouts.jsonl").open("a", encoding="utf-8") as file:
                file.write(json.dumps(line) + "\n")


class MetricsCallback(TrainerCallback):
    """Appends every metric to `log.jsonl`, and prints the most important ones."""

    def __init__(self, path: Path) -> None:
        self.path, self.began = path, time.perf_counter()

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if state.is_world_process_zero:
            keep_lines(self.path, lambda line: line["step"] <= state.global_step)

    def on_log(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        logs = kwargs.get("logs") or {}
        if not state.is_world_process_zero or "loss" not in logs:
            return  # the trainer's summary at the end has no step of its own
        kept = {name: float(f"{value:.4g}") if isinstance(value, float) else value for name, value in logs.items()}
        minutes = round((time.perf_counter() - self.began) / 60, 1)
        line = {"minutes": minutes, "step": state.global_step, "of": state.max_steps, **kept}
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")
        printed = {name.rsplit("/", 1)[-1]: kept[name] for name in _PRINTED if name in kept}
        print(json.dumps({"minutes": minutes, "step": state.global_step, "of": state.max_steps, **printed}), flush=True)


class WarningCallback(TrainerCallback):
    """Warns once for each thing that goes wrong, from running means, so that one odd batch is no warning.

    Comes after `MetricsCallback`, from whose log it reads the steps before a run was killed.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.warned: list[str] = []
        self._means: dict[str, float] = {}
        self._peaks: dict[str, float] = {}
        self._silent: set[str] = set()
        self._first_entropy: float | None = None

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if state.is_world_process_zero and self.path.exists():
            for line in self.path.read_text(encoding="utf-8").splitlines():
                self._update(json.loads(line))  # its warnings were given then

    def on_log(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if not state.is_world_process_zero:
            return
        for text in self._update(kwargs.get("logs") or {}):
            print(f"warning at step {state.global_step}: {text}", flush=True)
            with self.path.open("a", encoding="utf-8") as file:
                file.write(json.dumps({"step": state.global_step, "warning": text}) + "\n")

    def _update(self, given: Mapping[str, Any]) -> list[str]:
        """Take in the metrics of a step; return new warnings."""
        # None: the trainer's mean over no value at all
        self._silent |= {key for key, value in given.items() if value is None and _REWARD.fullmatch(key)}
        logs = {key: float(value) for key, value in given.items() if isinstance(value, int | float)}
        for key, value in logs.items():
            before = self._means.get(key, value)
            self._means[key] = before + SMOOTHING * (value - before)
            self._peaks[key] = max(self._peaks.get(key, 0.0), self._means[key])
        if self._first_entropy is None:
            self._first_entropy = logs.get("entropy")
        new = {name: text for name, text in self._warnings().items() if name not in self.warned}
        self.warned += new
        return list(new.values())

    def _warnings(self) -> dict[str, str]:
        means, found = self._means, dict[str, str]()
        for key, mean in means.items():
            if key.startswith(NEEDED) and self._peaks[key] > 0.2 and mean < COLLAPSE * self._peaks[key]:
                found[key] = f"{key} fell from {self._peaks[key]:.2f} to {mean:.2f}: the model stops zooming"
        for key in sorted(self._silent):
            found[key] = (
                f"the reward '{key.split('/')[1]}' is None for every rollout: the rows lack what it needs, or all "
                "rollouts were cut off"
            )
        for name, (key, limit, text) in _LIMITS.items():
            if means.get(key, 0.0) > limit:
                found[name] = text.format(means[key])
        if self._first_entropy and means.get("entropy", self._first_entropy) < LITTLE_ENTROPY * self._first_entropy:
            found["entropy"] = f"entropy fell from {self._first_entropy:.3f} to {means['entropy']:.3f}"
        return found


def keep_lines(path: Path, keep: Callable[[dict[str, Any]], bool]) -> list[dict[str, Any]]:
    """Drop the other lines of a JSON-lines file, and one that was cut off; return those that are kept."""
    if not path.exists():
        return []
    found: list[dict[str, Any]] = []
    for text in path.read_text(encoding="utf-8").splitlines():
        try:
            line = json.loads(text)
        except ValueError:  # being written when the run was killed
            continue
        if keep(line):
            found.append(line)
    part = path.with_suffix(".part")
    part.write_text("".join(json.dumps(line) + "\n" for line in found), encoding="utf-8")
    part.replace(path)
    return found
