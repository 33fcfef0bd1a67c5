"""What to look at while it trains: numbers that warn early, and episodes as pages.

Training that goes wrong shows in how the model zooms long before it shows in the reward: calls stop, or are refused, or
replies are cut off, or all rollouts of a question become the same. Each is a metric of every round, by task where it
matters, and `WarningCallback` says so once when one of them leaves what is healthy.
"""

import json
import re
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Final

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from qzoom_agent.report.episode import write_report
from qzoom_agent.trace import by_digest
from qzoom_agent.training.rewards import Accuracy, Rollout
from qzoom_agent.views import ViewStore

COLLAPSE: Final = 0.25
"""Of the highest call rate so far, below which calls have collapsed."""
LITTLE_ENTROPY: Final = 0.1
"""Of the first entropy, below which rollouts of one question are nearly the same."""
SMOOTHING: Final = 0.1
"""Share of the newest value in a running mean."""
NEEDED: Final = "zoom/call_rate_needed"
"""Call rate of the rollouts whose row does not say that the coarse view suffices: where it does, no calls are what is
wanted, and their end is no collapse."""
_REWARD: Final = re.compile(r"rewards/[^/]+/mean")
_TOLD: Final = ("reward", "zoom/accuracy", "zoom/call_rate", "zoom/served", "zoom/truncated", "entropy", "step_time")


def measures(rollouts: Sequence[Rollout], tasks: Sequence[str], accuracy: Accuracy) -> dict[str, float]:
    """Means over a batch of rollouts: `zoom/...`, and call rate and accuracy (by the recipe's own) of each task.

    `NEEDED`, and that of a task, are left out where no rollout counts.
    """
    usages = [one.trace.usage for one in rollouts]
    asked = sum(usage.requested for usage in usages)
    count = len(rollouts)
    right = accuracy.right(rollouts)
    called = [bool(one.crops) for one in rollouts]
    found = {
        "zoom/call_rate": sum(called) / count,
        "zoom/requested": asked / count,
        "zoom/served": sum(usage.served for usage in usages) / count,
        "zoom/inserted": sum(usage.inserted for usage in usages) / count,
        "zoom/refusal_rate": sum(usage.refused for usage in usages) / max(1, asked),
        "zoom/failure_rate": sum(usage.failed for usage in usages) / max(1, asked),
        "zoom/visual_tokens": sum(usage.visual_tokens for usage in usages) / count,
        "zoom/written_tokens": sum(usage.written_tokens for usage in usages) / count,
        "zoom/turns": sum(len(one.trace.turns) for one in rollouts) / count,
        "zoom/truncated": sum(one.truncated for one in rollouts) / count,
        "zoom/accuracy": sum(right) / count,
    }
    needed = [at for at, one in enumerate(rollouts) if one.coarse_suffices is not True]
    if needed:
        found[NEEDED] = sum(called[at] for at in needed) / len(needed)
    for task in sorted(set(tasks)):
        members = [at for at, name in enumerate(tasks) if name == task]
        if counted := [at for at in needed if tasks[at] == task]:
            found[f"{NEEDED}/{task}"] = sum(called[at] for at in counted) / len(counted)
        found[f"zoom/call_rate/{task}"] = sum(called[at] for at in members) / len(members)
        found[f"zoom/accuracy/{task}"] = sum(right[at] for at in members) / len(members)
    return found


class RolloutPageCallback(TrainerCallback):
    """Writes some rollouts of every so many steps as pages, with what they were rewarded for.

    Rounds of rollouts begin at some steps only: of those between two multiples of `every`, the first is kept.
    """

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
        """Keep the first rollout of some questions, if it is time."""
        if step // self.every <= self._last // self.every or not self.episodes:
            return
        self._last = step
        seen: set[str] = set()
        self.folder.mkdir(parents=True, exist_ok=True)
        for one, value, store in zip(rollouts, values, stores, strict=True):
            if one.group in seen or len(seen) == self.episodes:
                continue
            seen.add(one.group)
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
                # a reward that says nothing of a rollout is not a number, which JSON does not have
                "rewards": {name: None if x != x else x for name, x in zip(names, value, strict=True)},
            }
            with (self.folder / "rollouts.jsonl").open("a", encoding="utf-8") as file:
                file.write(json.dumps(line) + "\n")


class MetricsCallback(TrainerCallback):
    """Appends every metric to `log.jsonl`, and prints those that one reads while it runs."""

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
            return  # the trainer's closing remarks have no step of their own
        kept = {name: float(f"{value:.4g}") if isinstance(value, float) else value for name, value in logs.items()}
        minutes = round((time.perf_counter() - self.began) / 60, 1)
        line = {"minutes": minutes, "step": state.global_step, "of": state.max_steps, **kept}
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")
        told = {name.rsplit("/", 1)[-1]: kept[name] for name in _TOLD if name in kept}
        print(json.dumps({"minutes": minutes, "step": state.global_step, "of": state.max_steps, **told}), flush=True)


class WarningCallback(TrainerCallback):
    """Warns once for each thing that goes wrong. Keeps running means, so one odd batch is no alarm.

    Comes after `MetricsCallback`, whose log tells it of the steps before a run was killed.
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
                self._follow(json.loads(line))  # it was said then

    def on_log(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if state.is_world_process_zero:
            for text in self._follow(kwargs.get("logs") or {}):
                self._say(state.global_step, text)

    def _follow(self, given: Mapping[str, Any]) -> list[str]:
        """Take in the metrics of a step; returns what is newly wrong."""
        # None: the trainer's mean over no value at all
        self._silent |= {key for key, value in given.items() if value is None and _REWARD.fullmatch(key)}
        logs = {key: float(value) for key, value in given.items() if isinstance(value, int | float)}
        for key, value in logs.items():
            before = self._means.get(key, value)
            self._means[key] = before + SMOOTHING * (value - before)
            self._peaks[key] = max(self._peaks.get(key, 0.0), self._means[key])
        if self._first_entropy is None:
            self._first_entropy = logs.get("entropy")
        new = {name: text for name, text in self._troubles().items() if name not in self.warned}
        self.warned += new
        return list(new.values())

    def _troubles(self) -> dict[str, str]:
        means, found = self._means, dict[str, str]()
        for key, mean in means.items():
            if key.startswith(NEEDED) and self._peaks[key] > 0.2 and mean < COLLAPSE * self._peaks[key]:
                found[key] = f"{key} fell from {self._peaks[key]:.2f} to {mean:.2f}: the model stops zooming"
        for key in sorted(self._silent):
            name = key.split("/")[1]
            found[key] = (
                f"the reward '{name}' says nothing of any rollout: the rows lack what it needs, or all were cut off"
            )
        if means.get("zoom/refusal_rate", 0.0) > 0.5:
            found["refused"] = f"{means['zoom/refusal_rate']:.0%} of the calls are refused"
        if means.get("zoom/failure_rate", 0.0) > 0.5:
            found["failed"] = f"{means['zoom/failure_rate']:.0%} of the calls cannot be run"
        if means.get("zoom/truncated", 0.0) > 0.3:
            found["truncated"] = f"{means['zoom/truncated']:.0%} of the rollouts are cut off"
        if means.get("frac_reward_zero_std", 0.0) > 0.9:
            found["equal"] = "nine groups of ten have equal rewards: there is nothing to learn from them"
        if self._first_entropy and means.get("entropy", self._first_entropy) < LITTLE_ENTROPY * self._first_entropy:
            found["entropy"] = f"entropy fell from {self._first_entropy:.3f} to {means['entropy']:.3f}"
        return found

    def _say(self, step: int, text: str) -> None:
        print(f"warning at step {step}: {text}", flush=True)
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps({"step": step, "warning": text}) + "\n")


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
