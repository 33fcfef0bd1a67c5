"""`qzoom audit TASK...`: does looking help? The policy against its controls on the same questions, and one verdict.

The policy's run, its controls and the page lie in one run folder, as `qzoom eval --ablate` leaves them: the same
command resumes. Works with any model and server, with boxes or without.
"""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING

from qzoom_agent.cli.console import opener, print_table
from qzoom_agent.cli.evaluate import add_question_flags, exit_code, planned
from qzoom_agent.cli.main import OK
from qzoom_agent.files import write_text

if TYPE_CHECKING:
    from qzoom_agent.evaluation.audit import Audit


def add_flags(flags: argparse.ArgumentParser) -> None:
    """Add the flags of `qzoom audit`."""
    flags.description = (
        "Run a policy and its controls (no crop, grey crops, random crops, crops at the known boxes) on "
        "the same questions, and say how much of the gain is what the crops show."
    )
    add_question_flags(flags)


def run(args: argparse.Namespace) -> int:
    """Run the verb; exit code 4 if the model failed on every question."""
    plan = planned(args)
    if plan is None:
        return OK

    from qzoom_agent.evaluation.audit import audit, grey_policy
    from qzoom_agent.evaluation.report import write_run_report
    from qzoom_agent.evaluation.summary import Results

    agent, folder = plan.agent(), plan.folder
    plan.ask(agent, folder, label=f"{agent.config.policy}: ")
    names: list[str] = ["direct", grey_policy(str(agent.config.policy)), "random"]
    if all(row.boxes or row.coarse_suffices for row in folder.latest()):
        names.append("oracle")
    controls = plan.ask_others(agent, names)
    if plan.shard.index:
        return OK
    found = audit(folder, controls, scorer=args.scorer)
    folder.write("audit.json", found.model_dump_json(indent=1) + "\n")
    if args.json:
        write_text(args.json, found.model_dump_json(indent=1) + "\n")
    _show(found)
    print(f"report: {opener()} {write_run_report(folder, baseline=controls['direct'])}", flush=True)
    return exit_code(folder, Results.of(folder), plan.console)


def _show(found: Audit) -> None:
    from qzoom_agent.evaluation.audit import MEANINGS, points

    for each in found.tasks.values():
        print(f"{each.task}: {found.model}, policy {each.policy}, scorer {each.scorer}, n = {each.arms[0].accuracy.n}")
        arms = [
            (arm.policy, f"{arm.accuracy.mean:.3f}", f"{arm.visual_tokens:.0f}", f"{arm.crops:.2f}")
            for arm in each.arms
        ]
        print_table(arms, header=("policy", "accuracy", "visual tokens", "crops"))
        effects = [(name, points(effect), f"p {effect.p:.2g}", MEANINGS[name]) for name, effect in each.effects.items()]
        print_table(effects, header=("effect", "difference", "p", "what is compared"))
        if each.redundant is not None and each.crops:
            print(f"{each.redundant} of {each.crops} crops were redundant.")
        if each.wrong:
            print("Wrong answers: " + ", ".join(f"{count} {cause}" for cause, count in each.wrong.items()) + ".")
        print(each.verdict + "\n")
