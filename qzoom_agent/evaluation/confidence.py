"""Calibrate the confidence of a model's answers on runs whose answers are known, and measure it on others.

    calibration = calibrate([RunFolder.existing("runs/mine")])
    print(expected_error(calibration, [RunFolder.existing("runs/held-out")]))

`qzoom eval calibrate` does this. The runs' rows hold the probability of each answer's least likely token; the fit is a
logistic one of two parameters on its log-odds, for each policy.
"""

from collections import defaultdict
from collections.abc import Iterator, Sequence
from typing import Final, NamedTuple

import numpy as np
from numpy.typing import NDArray

from qzoom_agent.confidence import Calibration, Fitted, log_odds
from qzoom_agent.errors import ConfigError
from qzoom_agent.evaluation.run_log import RunFolder

BINS: Final = 10
_FEWEST: Final = 50
_STEPS: Final = 50
_PRIOR: Final = 1.0
"""Weight of a slope of 1 and an intercept of 0: few answers move them little."""


class Known(NamedTuple):
    """An answer of which it is known whether it is right."""

    policy: str
    task: str
    probability: float
    """Of its least likely token."""
    right: float
    """0 to 1."""


def known_answers(
    runs: Sequence[RunFolder], *, scorer: str | None = None, like: RunFolder | None = None
) -> Iterator[Known]:
    """Yield the scored answers of runs that have probabilities.

    Args:
        runs: Runs of one model.
        scorer: Scorer that says what is right; None: each task's default.
        like: Another run of that model, such as one that was fitted to.

    Raises:
        ConfigError: A run was sampled or has no known answers, is of another model, or has no such scorer.
    """
    for folder in {one.path.resolve(): one for one in runs}.values():  # a run that is named twice counts once
        _require_fit(folder, like or runs[0], scorer)
        policy = folder.config.policy or ""
        for row in folder.in_order():
            if row.repeat:  # a greedy answer that is asked for again is the same
                continue
            by = scorer or next(iter(row.scores), None)
            if by in row.scores and row.answer_probability is not None and row.status != "error":
                yield Known(policy, row.task, row.answer_probability, row.value(by))


def calibrate(runs: Sequence[RunFolder], *, scorer: str | None = None) -> Calibration:
    """Return the calibration that fits the runs' answers.

    Raises:
        ConfigError: A policy has fewer than 50 answers with probabilities, a run was sampled or has no known answers,
            runs are of different models, or none has the scorer.
    """
    by_policy: dict[str, list[Known]] = defaultdict(list)
    for one in known_answers(runs, scorer=scorer):
        by_policy[one.policy].append(one)
    few = min(by_policy, key=lambda policy: len(by_policy[policy]), default="")
    if (count := len(by_policy[few])) < _FEWEST:
        raise ConfigError(
            f"The runs have {count} scored answers with log-probabilities{f' of policy {few!r}' if few else ''}; "
            f"{_FEWEST} are needed. A server is asked for them with --set generation.logprobs=true."
        )
    return Calibration(policies={policy: _fitted(answers) for policy, answers in by_policy.items()})


def _require_fit(folder: RunFolder, first: RunFolder, scorer: str | None) -> None:
    """Raise ConfigError if the answers of a run say nothing about the confidence of the first one's model."""
    if folder.config.generation.temperature:
        raise ConfigError(f"{folder.path} was sampled, and confidence is that of greedy answers. Ask it again at 0.")
    if given := folder.config.additions:
        key, value = next(iter(given.items()))
        raise ConfigError(
            f"{folder.path} was asked with {key}: {value}, and confidence is that of the model as it comes. "
            "Ask it again without."
        )
    if unknown := [name for name, task in folder.ask.tasks.items() if not task.answered]:
        raise ConfigError(f"{folder.path} asked {unknown[0]} without answers, so nothing says which are right.")
    models = [(one.config.model, one.ask.weights) for one in (first, folder)]
    if models[0] != models[1]:
        raise ConfigError(
            f"{folder.path} is of another model than {first.path} ({folder.config.model}, {first.config.model}, or "
            "other weights), and confidence is that of one. Calibrate each by itself."
        )
    known = {name for row in folder.in_order() for name in row.scores}
    if scorer is not None and known and scorer not in known:
        raise ConfigError(f"{folder.path} has no scorer {scorer!r}. It has: {', '.join(sorted(known))}.")


def expected_error(calibration: Calibration, answers: Sequence[Known]) -> float | None:
    """Return the expected calibration error of answers over ten bins of equal width; None without any."""
    sure = [calibration.of(one.probability, policy=one.policy, temperature=0) for one in answers]
    pairs = [(one, known.right) for one, known in zip(sure, answers, strict=True) if one is not None]
    if not pairs:
        return None
    confidence, right = np.array(pairs).T
    bins = np.minimum((confidence * BINS).astype(int), BINS - 1)
    gaps = [abs(float((confidence - right)[bins == at].sum())) for at in range(BINS)]
    return sum(gaps) / len(pairs)


def _fitted(answers: Sequence[Known]) -> Fitted:
    """Fit slope and intercept by Newton's method, whose steps are halved until they lead to a better fit."""
    odds = np.array([[log_odds(one.probability), 1.0] for one in answers])
    right = np.array([one.right for one in answers])
    start: NDArray[np.float64] = np.array([1.0, 0.0])

    def misfit(at: NDArray[np.float64]) -> float:
        return float((np.logaddexp(0, odds @ at) - right * (odds @ at)).sum() + _PRIOR / 2 * ((at - start) ** 2).sum())

    found = start.copy()
    for _ in range(_STEPS):
        sure = 1 / (1 + np.exp(-odds @ found))
        slope = odds.T @ (right - sure) - _PRIOR * (found - start)
        curve = (odds * (sure * (1 - sure))[:, None]).T @ odds + _PRIOR * np.eye(2)
        step = np.linalg.solve(curve, slope)
        # Of answers that are wrong though the model is sure of them, a whole step leads far beyond the best fit.
        while misfit(found + step) > misfit(found) and float(np.abs(step).max()) >= 1e-9:
            step = step / 2
        found = found + step
        if float(np.abs(step).max()) < 1e-9:
            break
    tasks = sorted({one.task for one in answers})
    return Fitted(slope=float(found[0]), intercept=float(found[1]), questions=len(answers), tasks=tasks)
