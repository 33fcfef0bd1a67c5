"""Metrics, warnings and episodes as pages, written while GRPO trains.

Training that fails changes how the model zooms long before it changes the reward: calls stop or are refused, replies
are cut off, all rollouts of a question become the same. Each of these is a metric of every round, by task where it
matters, and `MetricsCallback` warns when one of them leaves its healthy range.
"""

import re
from collections import deque
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any, Final

import torch
from torch import Tensor
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from trl.trainer.utils import nanstd

from qzoom_agent.report.episode import write_report
from qzoom_agent.trace import by_digest
from qzoom_agent.training.branches.fitting import LogCallback, add_line, keep_lines
from qzoom_agent.training.rewards import Rollout
from qzoom_agent.views import ViewStore

WINDOW: Final = 10
"""Logged steps over which warnings take means; before so many, it warns of nothing that is a mean."""
COLLAPSE: Final = 0.25
"""Share of the highest call rate so far below which calls have collapsed."""
LITTLE_ENTROPY: Final = 0.1
"""Share of the first entropy below which rollouts of one question are nearly the same."""
NEEDED: Final = "zoom/call_rate_needed"
"""Call rate of the rollouts whose row does not say that the coarse view suffices; where it does, none are wanted."""
_REWARD: Final = re.compile(r"rewards/([^/]+)/mean")
_LIMITS: Final = {
    "zoom/refusal_rate": (0.5, "{:.0%} of the calls are refused"),
    "zoom/failure_rate": (0.5, "{:.0%} of the calls cannot be run"),
    "zoom/truncated": (0.3, "{:.0%} of the rollouts are cut off"),
    "frac_reward_zero_std": (0.9, "{:.0%} of the groups have equal rewards: nothing to learn from"),
}
"""Metrics, each with the mean above which a warning is given, and its text."""


def measures(rollouts: Sequence[Rollout], right: Sequence[bool]) -> dict[str, float]:
    """Return the means over a batch of rollouts, `zoom/...`; call rates and accuracy also by task.

    `right` says of each whether its answer is right. `NEEDED` is left out where no rollout counts, written tokens where
    nobody counted them.
    """
    usages = [one.trace.usage for one in rollouts]
    asked = sum(usage.requested for usage in usages)
    found = {
        "zoom/requested": asked / len(rollouts),
        "zoom/served": fmean(usage.served for usage in usages),
        "zoom/inserted": fmean(usage.inserted for usage in usages),
        "zoom/refusal_rate": sum(usage.refused for usage in usages) / max(1, asked),
        "zoom/failure_rate": sum(usage.failed for usage in usages) / max(1, asked),
        "zoom/visual_tokens": fmean(usage.visual_tokens for usage in usages),
        "zoom/turns": fmean(len(one.trace.turns) for one in rollouts),
        "zoom/truncated": fmean(one.truncated for one in rollouts),
    }
    if any(usage.written_tokens for usage in usages):  # TRL's tool loop does not count them
        found["zoom/written_tokens"] = fmean(usage.written_tokens for usage in usages)
    every = list(zip(rollouts, right, strict=True))
    tasks = sorted({one.sample.task for one in rollouts})
    by_task = {f"/{task}": [(one, good) for one, good in every if one.sample.task == task] for task in tasks}
    for task, members in {"": every, **by_task}.items():
        found[f"zoom/accuracy{task}"] = fmean(good for _, good in members)
        found[f"zoom/call_rate{task}"] = fmean(bool(one.crops) for one, _ in members)
        if needed := [bool(one.crops) for one, _ in members if one.sample.coarse_suffices is not True]:
            found[f"{NEEDED}{task}"] = fmean(needed)
    return found


def reward_measures(names: Sequence[str], weights: Tensor, values: Tensor) -> dict[str, float]:
    """Return the means and deviations of rewards under the trainer's names; not-a-number stands for None.

    Args:
        weights: One for each reward.
        values: (rollouts, rewards).
    """
    summed = (values * weights.to(values)).nansum(1)
    summed[values[:, weights != 0].isnan().all(1)] = torch.nan
    found = {"reward": summed.nanmean().item(), "reward_std": nanstd(summed).item()}
    for name, column in zip(names, values.T, strict=True):
        found |= {f"rewards/{name}/mean": column.nanmean().item(), f"rewards/{name}/std": nanstd(column).item()}
    return found


class RolloutPageCallback(TrainerCallback):
    """Writes some rollouts as pages, with their rewards: those of the first round after each multiple of `every`."""

    def __init__(self, folder: Path, *, every: int, episodes: int) -> None:
        self.folder, self.every, self.episodes = folder, every, episodes
        self._last = -1

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        if state.is_world_process_zero:
            kept = keep_lines(self.folder / "rollouts.jsonl", lambda line: line["step"] < state.global_step)
            self._last = max((line["step"] for line in kept), default=-1)

    def keep(
        self,
        step: int,
        rollouts: Sequence[Rollout],
        rewards: Mapping[str, Sequence[float]],
        stores: Sequence[ViewStore],
    ) -> None:
        """Write the first rollout of some questions of the round that begins at `step`, if it is time.

        `rewards` are those of each rollout by name, `stores` the views of each.
        """
        if step // self.every <= self._last // self.every or not self.episodes:
            return
        self._last = step
        firsts = {one.sample.id: at for at, one in reversed(list(enumerate(rollouts)))}
        for count, at in enumerate(sorted(firsts.values())[: self.episodes], 1):
            one, trace = rollouts[at], rollouts[at].trace
            path = self.folder / f"step-{step:06d}-{count}.html"
            write_report(trace, by_digest(trace.views, stores[at].image), path, expected=one.answer)
            line = {
                "step": step,
                "page": path.name,
                "question": trace.question,
                "answer": trace.answer,
                "expected": one.answer,
                "status": trace.status,
                "calls": len(one.calls),
                # None of a reward becomes not-a-number in the trainer, which JSON does not have
                "rewards": {name: None if of[at] != of[at] else of[at] for name, of in rewards.items()},
            }
            add_line(self.folder / "rollouts.jsonl", line)


class MetricsCallback(LogCallback):
    """Logs every metric, and warns of what goes wrong.

    Warnings rest on means over `WINDOW` steps, so that one odd batch is no warning. Each is given once, and again only
    after its metric was healthy in between. A resumed run knows the steps before it from the log.
    """

    printed = ("reward", "zoom/accuracy", "zoom/call_rate", "zoom/served", "zoom/truncated", "entropy", "step_time")

    def __init__(self, path: Path) -> None:
        super().__init__(path)
        self.warned: set[str] = set()
        """Metrics of the warnings that hold."""
        self._windows: dict[str, deque[float]] = {}
        self._peaks: dict[str, float] = {}
        self._first_entropy: float | None = None

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        super().on_train_begin(args, state, control)
        if state.best_global_step is not None:  # the path that is stored is that of the folder before it was moved
            best = Path(str(args.output_dir)) / f"checkpoint-{state.best_global_step}"
            state.best_model_checkpoint = str(best) if best.is_dir() else None

    def note(self, logs: Mapping[str, Any]) -> list[str]:
        new: list[str] = []
        for key, value in logs.items():
            if value is None and (reward := _REWARD.fullmatch(key)):  # the trainer's mean over no value at all
                text: str | None = (
                    f"the reward '{reward[1]}' is None for every rollout: the rows lack what it needs, or all rollouts "
                    "were cut off"
                )
            elif isinstance(value, int | float) and (key.startswith(NEEDED) or key == "entropy" or key in _LIMITS):
                window = self._windows.setdefault(key, deque(maxlen=WINDOW))
                window.append(value)
                text = self._judge(key, fmean(window)) if len(window) == WINDOW else None
                if text is None:
                    self.warned.discard(key)
            else:
                continue
            if text is not None and key not in self.warned:
                self.warned.add(key)
                new.append(text)
        return new

    def _judge(self, key: str, mean: float) -> str | None:
        """Return the warning that the mean of a metric deserves, if any."""
        if key in _LIMITS:
            limit, text = _LIMITS[key]
            return text.format(mean) if mean > limit else None
        if key == "entropy":
            first = self._first_entropy = mean if self._first_entropy is None else self._first_entropy
            return f"entropy fell from {first:.3f} to {mean:.3f}" if mean < LITTLE_ENTROPY * first else None
        peak = self._peaks[key] = max(self._peaks.get(key, 0.0), mean)
        stops = peak > 0.2 and mean < COLLAPSE * peak
        return f"{key} fell from {peak:.2f} to {mean:.2f}: the model stops zooming" if stops else None
