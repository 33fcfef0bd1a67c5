"""Tables of the results of an evaluation, printed to stdout."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from qzoom_agent.cli.console import print_table, printable
from qzoom_agent.report.markdown import percent

if TYPE_CHECKING:
    from qzoom_agent.evaluation.compare import Comparison, TaskComparison
    from qzoom_agent.evaluation.stats import Figure, Interval, Paired
    from qzoom_agent.evaluation.summary import Results, TaskResult


def show(results: Results, against: Mapping[str, Comparison]) -> None:
    """Print a run, and how it differs from the runs of the same questions under other policies."""
    config = results.config
    total = config.budget.max_visual_tokens
    for result in results.tasks.values():
        part = result.part
        low, high = part.coarse_tokens or (config.budget.coarse_min_tokens, config.budget.coarse_tokens)
        views = f", coarse view of {low} to {high} visual tokens" if high else ""
        split = f"{part.split}, seed {results.seed}" if part.split else f"seed {results.seed}"
        most = f", at most {total} in all" if total else ""
        print(printable(f"{result.task} ({split}): {config.model}, policy {config.policy}{views}{most}"))
        print_table(_facts(result))
        rows = [(name, *_row(each.tasks[result.task])) for name, each in against.items() if result.task in each.tasks]
        if rows:
            print_table(rows, header=("against", *_HEAD))
    if len(results.tasks) > 1:
        rows = [
            (each.task, str(each.n), _mean(each.marks.accuracy), f"{each.cost.visual_tokens.mean:.1f}")
            for each in results.tasks.values()
        ]
        print_table(rows, header=("task", "n", "accuracy", "visual tokens"))
    sys.stdout.flush()


_HEAD = ("difference", "p", "gained", "lost", "visual tokens", "seconds", "tool gain", "tool harm", "gate regret")


def show_comparison(comparison: Comparison) -> None:
    """Print two runs, the second minus the first."""
    print(f"before  {comparison.before}\nafter   {comparison.after}")
    rows = []
    for name, each in comparison.tasks.items():
        rows.append((name, str(each.n), f"{each.accuracy[0]:.3f}", f"{each.accuracy[1]:.3f}", *_row(each)))
    print_table(rows, header=("task", "pairs", "before", "after", *_HEAD))
    if comparison.made_differently:
        print(printable(f"The runs were made with different {', '.join(comparison.made_differently)} (env.json)."))
        print("Seconds depend on these, and qzoom-agent itself has not always counted the same seconds.")
    sys.stdout.flush()


def _row(each: TaskComparison) -> tuple[str, ...]:
    zooming = each.zooming
    return (
        _difference(each.difference, "+z.3f"),
        f"{each.difference.p:.2g}",
        str(each.difference.gained),
        str(each.difference.lost),
        _difference(each.visual_tokens, "+z.1f"),
        _difference(each.seconds, "+z.3f"),
        f"{zooming.tool_gain:.3f}",
        f"{zooming.tool_harm:.3f}",
        f"{zooming.regret_after:.3f}",
    )


def _difference(found: Paired, form: str) -> str:
    return f"{found.difference:{form}}" + (f" {_interval(found.interval, form)}" if found.interval else "")


def _mean(figure: Figure, form: str = ".3f") -> str:
    return f"{figure.mean:{form}}" + (f"  {_interval(figure.interval, form)}" if figure.interval else "")


def _interval(interval: Interval, form: str) -> str:
    return f"[{interval.low:{form}}, {interval.high:{form}}]"


def _facts(result: TaskResult) -> list[Sequence[str]]:
    marks, cost, look = result.marks, result.cost, result.perception
    count = marks.accuracy.mean * result.n  # a sum of worths between 0 and 1 is no number of right answers
    right = f"  {round(count)} of {result.n}" if abs(count - round(count)) < 1e-6 else ""
    error = f"  \u00b1 {result.se:.3f}" if result.se is not None else ""
    name = f"accuracy ({result.scorer})" if result.part.answered else result.scorer
    lines: list[Sequence[str]] = [(name, _mean(marks.accuracy) + error + right)]
    if len(marks.kinds) > 1:
        lines += [(f"  {kind}", f"{_mean(figure)}  n {figure.n}") for kind, figure in marks.kinds.items()]
    lines += [
        (f"accuracy ({name})", _mean(other.accuracy)) for name, other in result.scores.items() if name != result.scorer
    ]
    lines += [(name, f"{value:.4g}") for name, value in marks.published.items()]
    if marks.repeats:
        k = marks.repeats.k
        lines += [
            (f"avg@{k}", _mean(marks.repeats.average)),
            (f"pass@{k}", _mean(marks.repeats.passed)),
            ("consistency", _mean(marks.repeats.consistency)),
        ]
    prose = f"  {marks.sentences} replies are sentences: a judge reads them (--judge URL)" if marks.sentences else ""
    parts = f"  coarse {cost.coarse_tokens:.1f}, crops {cost.crop_tokens:.1f}"
    parts += f", tools {cost.tool_tokens:.1f}" if cost.tool_tokens else ""
    lines += [
        ("parsed", f"{percent(marks.parse_rate, 1)}{prose}"),
        ("visual tokens", _mean(cost.visual_tokens, ".1f") + parts),
        ("token-layers", _mean(cost.token_layers, ".0f")),
        ("seconds", _mean(cost.seconds, ".3f")),
    ]
    lines += [
        (f"  {name}", f"p50 {spread.p50:.3f}  p95 {spread.p95:.3f}")
        for name, spread in cost.phases.items()
        if spread.p95 > 0
    ]
    memory = ", ".join(f"{name} {size / 2**30:.2f} GiB" for name, size in cost.peak_memory.items())
    speed = f"{cost.samples_per_second:.2f} questions a second" if cost.samples_per_second else "not recorded"
    lines += [("throughput", speed), ("peak memory", memory)]
    if look.gate_rate is not None:
        lines.append(("gate asked for more", percent(look.gate_rate, 1)))
    zooms = f"{look.zooms:.2f} a question, in {percent(look.zoom_rate, 1)}"
    if look.calls:
        zooms += f"  calls {look.calls}: served {look.served}, refused {look.refused}, failed {look.failed}"
    lines.append(("zooms", zooms))
    if look.needless_zooms is not None:
        lines.append(
            ("needless zooms", f"{percent(look.needless_zooms, 1)} of the questions that the coarse view answers")
        )
    if look.redundant is not None and look.zooms:
        lines.append(("redundant crops", f"{100 * look.redundant:.1f} for 100 questions"))
    if look.recall and look.iou:
        lines.append(("box recall", f"{_mean(look.recall, '.3f')}  IoU {look.iou.mean:.3f}"))
    lines.append(("ended", ", ".join(f"{status} {count}" for status, count in result.statuses.items())))
    if result.partial:
        planned = f"{result.part.planned} of {result.part.total} planned"
        lines.append(("partial", f"{sum(result.statuses.values())} answers; {planned}"))
    if result.part.left_out:
        lines.append(("left out", f"{len(result.part.left_out)} rows that cannot be asked"))
    return lines
