"""Does looking help? One model under its policy and its controls, over the same questions, compared in pairs.

    gain      the policy minus `direct`, the coarse view alone
    call      grey crops minus `direct`: what the call, or room for a crop, is worth without pixels
    tokens    random crops minus `direct`: what more visual tokens are worth, wherever they come from
    content   the policy minus the better of grey and random crops: what the crops show
    headroom  crops around the known boxes minus the policy

Grey crops are `masked` for policies that insert crops, and `blind` for those whose model asks for them. VisualNeedle
(2026) publishes that control alone, as crop-black. Without known boxes there is no headroom, and random crops are of a
fixed area.
"""

from collections import Counter
from collections.abc import Mapping
from typing import Final, Literal

from qzoom_agent.config import PolicyName
from qzoom_agent.errors import ConfigError
from qzoom_agent.evaluation.compare import RIGHT, compare
from qzoom_agent.evaluation.run_log import RunFolder
from qzoom_agent.evaluation.sample_result import Cause
from qzoom_agent.evaluation.stats import Figure, Figures, Paired
from qzoom_agent.evaluation.summary import Results

FILE: Final = "audit.json"
"""Name of an audit in the folder of its run."""
Effect = Literal["gain", "call", "tokens", "content", "headroom"]
_INSERT: Final = ("implicit", "always", "masked")
MEANINGS: Final[Mapping[Effect, str]] = {
    "gain": "the policy against the coarse view alone",
    "call": "grey crops against the coarse view alone",
    "tokens": "random crops against the coarse view alone",
    "content": "the policy against the better of grey and random crops",
    "headroom": "crops at the known boxes against the policy",
}


class Arm(Figures):
    """One policy of the audit on one task."""

    policy: str
    accuracy: Figure
    visual_tokens: float
    """Mean, a question."""
    crops: float
    """Crops shown, a question."""


class TaskAudit(Figures):
    """The audit of one task."""

    task: str
    scorer: str
    policy: str
    arms: list[Arm]
    """The policy itself first, then its controls."""
    effects: dict[Effect, Paired]
    """Differences in accuracy over the same questions; `headroom` is missing where no boxes are known."""
    control: str
    """The better of the two controls, which `content` is against."""
    crops: int
    """Crops shown in all."""
    redundant: int | None
    """Those that added nothing (`redundancy`); None where it is not known of any question."""
    wrong: dict[Cause, int]
    """Wrong answers by cause."""
    verdict: str


class Audit(Figures):
    """An audit (`audit.json`)."""

    version: str = "1.0"
    model: str
    tasks: dict[str, TaskAudit]


def grey_policy(policy: str) -> PolicyName:
    """Return the control whose crops are grey: like `policy` in who decides on crops."""
    return "masked" if policy in _INSERT else "blind"


def _needed(policy: str) -> set[str]:
    """Return the controls that an audit of a policy cannot do without."""
    return {"direct", grey_policy(policy), "random"}


def audit(folder: RunFolder, controls: Mapping[str, RunFolder], *, scorer: str | None = None) -> Audit:
    """Return the audit of a run, from runs of the same questions under its controls.

    Args:
        folder: A finished run.
        controls: Finished runs by policy: `direct`, the grey one, `random` and, where boxes are known, `oracle`.
        scorer: Scorer that decides; None: the one that leads in the run.

    Raises:
        ConfigError: A control is missing, or there is no task whose questions all runs have. Other tasks are left out.
    """
    results = Results.of(folder)
    policy = str(results.config.policy)
    grey = grey_policy(policy)
    if missing := _needed(policy) - controls.keys():
        raise ConfigError(f"An audit of {policy!r} needs runs under {', '.join(sorted(missing))} as well.")
    figures = {policy: results, **{name: Results.of(each) for name, each in controls.items()}}
    decides = {name: scorer or task.scorer for name, task in results.tasks.items()}
    against = {name: compare(other, folder, scorer=decides).tasks for name, other in controls.items()}
    bare = {name: compare(controls["direct"], controls[name], scorer=decides).tasks for name in (grey, "random")}
    rows = folder.by_task()
    tasks = {}
    names = _asked_alike(folder, controls)
    if not names:
        raise ConfigError(
            f"The runs of an audit have to be of the same questions, and those under the controls of {folder.path} are "
            "not. Give the same `qzoom audit` again, with the number of questions that the run has."
        )
    for name in names:
        better = max((grey, "random"), key=lambda control: bare[control][name].accuracy[1])
        effects: dict[Effect, Paired] = {
            "gain": against["direct"][name].difference,
            "call": bare[grey][name].difference,
            "tokens": bare["random"][name].difference,
            "content": against[better][name].difference,
        }
        if "oracle" in controls:
            effects["headroom"] = compare(folder, controls["oracle"], scorer=decides).tasks[name].difference
        deciding = against["direct"][name].scorer
        arms = [
            Arm(
                policy=label,
                accuracy=each.tasks[name].scores[deciding].accuracy,
                visual_tokens=each.tasks[name].cost.visual_tokens.mean,
                crops=each.tasks[name].perception.zooms,
            )
            for label, each in figures.items()
        ]
        own = rows[name]
        known = [row.redundancy for row in own if row.redundancy is not None]
        tasks[name] = TaskAudit(
            task=name,
            scorer=deciding,
            policy=policy,
            arms=arms,
            effects=effects,
            control=better,
            crops=sum(row.zooms for row in own),
            redundant=sum(one.redundant for one in known) if known else None,
            wrong=dict(Counter(row.cause for row in own if row.value(deciding) < RIGHT)),
            verdict=_verdict(effects, better),
        )
    return Audit(model=results.config.model, tasks=tasks)


def _asked_alike(folder: RunFolder, controls: Mapping[str, RunFolder]) -> list[str]:
    """Return the tasks whose questions, and repeats, are the same in a run and all its controls."""
    runs = [set(each.newest()) for each in (folder, *controls.values())]
    return [
        name for name in folder.ask.tasks if len({frozenset(k for k in keys if k[0] == name) for keys in runs}) == 1
    ]


def read_audit(folder: RunFolder) -> Audit | None:
    """Return the audit of a run; None if it has none, or one that cannot be read."""
    try:
        return Audit.model_validate_json((folder.path / FILE).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None


def audit_again(folder: RunFolder, *, scorer: str | None = None) -> None:
    """Write the audit of a run anew, from its answers as they are scored now, if it has one and its controls are there.

    One of fewer questions than the run has by now is removed.

    Args:
        folder: A finished run, with its controls among its ablations.
        scorer: Scorer that decides; None: the one that did.
    """
    needed = _needed(str(folder.config.policy))
    controls = {name: other for name, other in folder.ablations.items() if name in needed | {"oracle"}}
    was = read_audit(folder)
    if was is None or not needed <= controls.keys():
        return
    if not _asked_alike(folder, controls):
        (folder.path / FILE).unlink()
        return
    decided = {each.scorer for each in was.tasks.values()}
    found = audit(folder, controls, scorer=scorer or (decided.pop() if len(decided) == 1 else None))
    folder.write(FILE, found.model_dump_json(indent=1) + "\n")


def _verdict(effects: Mapping[Effect, Paired], better: str) -> str:
    gain, content = effects["gain"], effects["content"]
    control = "random crops" if better == "random" else "grey crops"
    if _sign(gain) == 0:
        text = f"No effect of looking is shown: {points(gain)} over the coarse view alone."
    elif _sign(gain) < 0:
        text = f"Looking harms: {points(gain)} against the coarse view alone."
    else:
        text = f"Looking helps: {points(gain)} over the coarse view alone. "
        text += {
            1: f"What the crops show is worth {points(content)} over {control}, the better control.",
            0: f"But {control} do as well ({points(content)}), so it is not shown that the crops' content helps.",
            -1: f"But {control} do better ({points(content)}): what the crops show is not what helps.",
        }[_sign(content)]
    headroom = effects.get("headroom")
    if headroom is not None and _sign(headroom) > 0:
        text += f" Crops at the known boxes would add {points(headroom)}."
    return text


def _sign(paired: Paired) -> int:
    """Return 1 or -1 if the whole interval lies on that side of zero, else 0."""
    low, high = paired.interval or (-1.0, 1.0)
    return 1 if low > 0 else -1 if high < 0 else 0


def points(paired: Paired) -> str:
    """Return a difference in accuracy such as "+4.0 points (+1.2 to +6.8)"."""
    text = f"{100 * paired.difference:+z.1f} points"
    if paired.interval is None:
        return text
    return f"{text} ({100 * paired.interval.low:+z.1f} to {100 * paired.interval.high:+z.1f})"
