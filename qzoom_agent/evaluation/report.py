"""One HTML page per run: the figures, and every sample in a table that sorts, filters and links to its episode.

The page opens from disk and is a plain table without scripts. Beside every trace lies a page of the episode, which
links to the run's shared pictures; thumbnails are inside this page, small enough that thousands of rows stay under
20 MB. Of more than `MAX_ROWS` samples the page shows that many, the wrong ones before the right ones, and says so; the
rest is in samples.jsonl.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import fmean

import PIL.Image

from qzoom_agent.evaluation.charts import ChartPoint, bars, scatter
from qzoom_agent.evaluation.compare import RIGHT, Comparison, compare, worth
from qzoom_agent.evaluation.run_log import RunFolder
from qzoom_agent.evaluation.sample_result import SampleResult
from qzoom_agent.evaluation.summary import Results, TaskResult, by_sample
from qzoom_agent.report import page, render_html
from qzoom_agent.report.markup import Html, cut, el

MAX_ROWS = 5000
THUMBNAIL_SIDE = 96
THUMBNAIL_BYTES = 9_000_000
"""For all thumbnails of a page together, before they are written as text."""


def write_run_report(folder: RunFolder, *, baseline: RunFolder | None = None, path: Path | None = None) -> Path:
    """Write the page of a run with results, by default as its report.html, and the pages of its episodes.

    `baseline` is a run of the same samples: flips are against it. The runs under ablations/ are compared in any case.
    """
    results = Results.of(folder)
    rows = folder.latest()
    target = path or folder.path / "report.html"
    others = {each.path.name: each for each in _ablations(folder)}
    if baseline is not None and baseline.path.resolve() not in {each.path.resolve() for each in others.values()}:
        others = {baseline.path.name: baseline} | others
    against = {name: compare(other, folder) for name, other in others.items()}
    flipped = compare(baseline, folder) if baseline is not None else next(iter(against.values()), None)
    flips = {} if flipped is None else {f.id: f.became for task in flipped.tasks.values() for f in task.flips}
    figures = {name: Results.of(other) for name, other in others.items()}
    _write_episodes(folder, rows)
    return page.write_page(_render(folder, target, results, rows, against, figures, flips), target)


def _ablations(folder: RunFolder) -> list[RunFolder]:
    found = sorted(path.parent for path in (folder.path / "ablations").glob("*/results.json"))
    return [RunFolder(path) for path in found]


def _write_episodes(folder: RunFolder, rows: Sequence[SampleResult]) -> None:
    """A page beside each trace; those that are newer than their trace are left."""
    for row in rows:
        source = folder.trace_path(row.key)
        target = source.with_suffix(".html")
        if not source.exists() or (target.exists() and target.stat().st_mtime >= source.stat().st_mtime):
            continue
        trace = folder.trace(row.key)
        assert trace is not None
        known = trace.model_copy(update={"gold": row.boxes})
        text = render_html(
            known, lambda digest: page.ImageLink(f"images/{digest}.jpg"), expected=row.gold[0], linked=True
        )
        page.write_page(text, target)


def _render(
    folder: RunFolder,
    target: Path,
    results: Results,
    rows: Sequence[SampleResult],
    against: Mapping[str, Comparison],
    figures: Mapping[str, Results],
    flips: Mapping[str, str],
) -> str:
    config = results.config
    names = ", ".join(results.tasks)
    shown = _shown(results, rows)
    return page.document(
        f"{names} - qzoom",
        page.brand("evaluation"),
        el("h1", names),
        el(
            "ul",
            page.name("model", config.model),
            page.name("policy", config.policy or ""),
            page.name("protocol", config.protocol or ""),
            page.name("seed", str(results.seed)),
            page.name("scorer", ", ".join(dict.fromkeys(each.scorer for each in results.tasks.values()))),
            el("li", "partial", cls="badge budget") if any(each.partial for each in results.tasks.values()) else None,
            cls="names",
        ),
        _failures(results),
        _totals(next(iter(results.tasks.values()))) if len(results.tasks) == 1 else _tasks(results),
        el("section", _bars(results), _scatter(results, rows, figures), cls="charts"),
        _comparisons(against),
        _samples(folder, target, results, shown, len(rows), flips),
        _footer(folder, results),
        rules=page.asset("run.css", "qzoom_agent.evaluation"),
        script=page.asset("run.js", "qzoom_agent.evaluation"),
    )


def _failures(results: Results) -> Html | None:
    failed = sum(each.failed for each in results.tasks.values())
    return el("p", f"{failed} samples failed and count as wrong.", cls="error") if failed else None


def _totals(result: TaskResult) -> Html:
    """The large numbers of a run of one task."""
    marks, cost, look = result.marks, result.cost, result.perception
    total = cost.phases["total"]
    split = [cost.coarse_tokens, cost.crop_tokens]
    gate = f"gate asked for more in {look.gate_rate:.0%}" if look.gate_rate is not None else None
    calls = f"{look.calls} calls, {look.refused} refused, {look.failed} failed" if look.calls else None
    recall = f"{look.recall.mean:.0%} of the needle covered" if look.recall else None
    return el(
        "dl",
        page.total("Accuracy", f"{100 * result.accuracy:.1f}%", [], page.dots([_interval(result), f"n = {result.n}"])),
        page.total(
            "Visual tokens a question",
            f"{cost.visual_tokens.mean:,.0f}",
            split,
            f"{split[0]:,.0f} coarse, {split[1]:,.0f} in crops",
        ),
        page.total(
            "Seconds a question",
            f"{total.mean:.2f}",
            [cost.phases[name].mean for name in ("perceive", "think", "act")],
            f"p50 {total.p50:.2f}, p95 {total.p95:.2f}",
        ),
        page.total(
            "Crops a question",
            f"{look.zooms:.2f}",
            [],
            page.dots([gate, calls, recall, f"parsed {marks.parse_rate:.0%}"]),
        ),
        cls="totals",
    )


def _interval(result: TaskResult) -> str | None:
    return f"{100 * result.interval.low:.1f} to {100 * result.interval.high:.1f}%" if result.interval else None


def _tasks(results: Results) -> Html:
    head = (
        "task",
        "n",
        "accuracy",
        "95 % interval",
        "parsed",
        "visual tokens",
        "seconds p50 / p95",
        "crops",
        "failed",
    )
    lines = []
    for each in results.tasks.values():
        total = each.cost.phases["total"]
        cells = (
            each.task,
            str(each.n),
            f"{100 * each.accuracy:.1f}%",
            _interval(each) or "-",
            f"{each.marks.parse_rate:.0%}",
            f"{each.cost.visual_tokens.mean:,.0f}",
            f"{total.p50:.2f} / {total.p95:.2f}",
            f"{each.perception.zooms:.2f}",
            str(each.failed),
        )
        lines.append(el("tr", [el("td", cell) for cell in cells]))
    return _table(head, lines, "figures wide")


def _table(head: Sequence[str], lines: Sequence[Html], cls: str) -> Html:
    return el("div", el("table", el("thead", el("tr", [el("th", name) for name in head])), el("tbody", lines)), cls=cls)


def _bars(results: Results) -> Html:
    """Accuracy with its interval, of every task and every kind."""
    lines = []
    for each in results.tasks.values():
        lines.append((each.task, each.marks.accuracy, True))
        if len(each.marks.kinds) > 1:
            lines += [(kind, figure, False) for kind, figure in each.marks.kinds.items()]
    return el("figure", el("h2", "Accuracy, with its 95 % interval"), bars(lines), cls="chart")


def _scatter(results: Results, rows: Sequence[SampleResult], figures: Mapping[str, Results]) -> Html:
    """Accuracy against visual tokens: of each task and run, or of each kind where there is but one of both."""
    points = []
    alone = len(results.tasks) == 1 and not figures
    for name, each in results.tasks.items():
        points.append(_point((results.config.policy or "") if figures else name, each, main=True))
        points += [
            _point(other if len(results.tasks) == 1 else f"{name}, {other}", result.tasks[name], main=False)
            for other, result in figures.items()
            if name in result.tasks
        ]
        if alone:
            tokens = {kind: fmean(row.visual_tokens for row in rows if row.kind == kind) for kind in each.marks.kinds}
            points += [ChartPoint(kind, tokens[kind], figure, False) for kind, figure in each.marks.kinds.items()]
    return el("figure", el("h2", "Accuracy against visual tokens"), scatter(points), cls="chart")


def _point(label: str, result: TaskResult, *, main: bool) -> ChartPoint:
    return ChartPoint(label, result.cost.visual_tokens.mean, result.marks.accuracy, main)


def _comparisons(against: Mapping[str, Comparison]) -> Html | None:
    """This run minus others of the same samples."""
    head = ["minus", "task", "pairs", "accuracy", "p", "gained", "lost", "visual tokens", "seconds"]
    head += ["tool gain", "tool harm", "gate regret"]
    lines = []
    for name, comparison in against.items():
        for task, each in comparison.tasks.items():
            cells = (
                name,
                task,
                str(each.n),
                _difference(each.difference.difference, each.difference.interval, 100, ".1f"),
                f"{each.difference.p:.2g}",
                str(each.difference.gained),
                str(each.difference.lost),
                _difference(each.visual_tokens.difference, each.visual_tokens.interval, 1, ".0f"),
                _difference(each.seconds.difference, each.seconds.interval, 1, ".2f"),
                f"{100 * each.zooming.tool_gain:.1f}%",
                f"{100 * each.zooming.tool_harm:.1f}%",
                f"{100 * each.zooming.regret_after:.1f}%",
            )
            lines.append(el("tr", [el("td", cell) for cell in cells]))
    if not lines:
        return None
    return el("section", el("h2", "In pairs with other runs, with 95 % intervals"), _table(head, lines, "figures wide"))


def _difference(mean: float, interval: tuple[float, float] | None, unit: float, form: str) -> str:
    ends = f" [{unit * interval[0]:+{form}}, {unit * interval[1]:+{form}}]" if interval else ""
    return f"{unit * mean:+{form}}{ends}"


# -- samples ---------------------------------------------------------------------------------------------------------


def _shown(results: Results, rows: Sequence[SampleResult]) -> list[list[SampleResult]]:
    """The samples that have a row in the table, with their repeats, in the order of the run."""
    samples = [each for name in results.tasks for each in by_sample(row for row in rows if row.task == name).values()]
    if len(samples) <= MAX_ROWS:
        return samples
    wrong = [each for each in samples if worth(each, results.tasks[each[0].task].scorer) < RIGHT]
    kept = {id(each) for each in [*wrong, *samples][:MAX_ROWS]}
    return [each for each in samples if id(each) in kept]


_COLUMNS = ("", "question", "right answer", "answer", "score", "kind", "crops", "tokens", "seconds", "ended")
_NUMBERS = {"score", "crops", "tokens", "seconds"}


def _samples(
    folder: RunFolder,
    target: Path,
    results: Results,
    shown: Sequence[Sequence[SampleResult]],
    total: int,
    flips: Mapping[str, str],
) -> Html:
    limit = min(4_000, THUMBNAIL_BYTES // max(1, len(shown)))
    several = len(results.tasks) > 1
    lines = [
        _sample(folder, target, each, results.tasks[each[0].task].scorer, flips, limit=limit, several=several)
        for each in shown
    ]
    samples = sum(each.n for each in results.tasks.values())
    note = f"{len(shown)} of {samples} samples; the wrong ones before the right ones. All are in samples.jsonl."
    head = [
        el("th", name, cls=("num" if name in _NUMBERS else None), data_sort=("n" if name in _NUMBERS else "t"))
        if name
        else el("th", el("span", "picture", cls="unseen"))
        for name in _COLUMNS
    ]
    return el(
        "section",
        el("h2", "Samples"),
        el("p", note, cls="soft") if len(shown) < samples else None,
        _filters(shown, results, flips),
        el("table", el("thead", el("tr", head)), el("tbody", lines), cls="samples", id="samples"),
        id="list",
    )


def _filters(shown: Sequence[Sequence[SampleResult]], results: Results, flips: Mapping[str, str]) -> Html:
    """What narrows the table; hidden until the script shows it, as it is of no use without."""
    kinds = sorted({_kind(each[0], len(results.tasks) > 1) for each in shown})
    choices: list[tuple[str, str, Sequence[tuple[str, str]]]] = [
        ("verdict", "JudgeCacheLine", [("", "right and wrong"), ("1", "right"), ("0", "wrong")]),
        ("kind", "Kind", [("", "every kind"), *((kind, kind) for kind in kinds)]),
    ]
    if flips:
        choices.append(
            ("flip", "Flips", [("", "flipped or not"), ("right", "became right"), ("wrong", "became wrong")])
        )
    ends = [
        ("", "however it ended"),
        ("refused", "a call was refused"),
        ("failed", "a call failed"),
        ("error", "error"),
    ]
    choices.append(("end", "End", ends))
    return el(
        "form",
        el("input", type="search", id="search", placeholder="search questions and answers", aria_label="Search"),
        [
            el(
                "select",
                [el("option", text, value=value) for value, text in options],
                id=id,
                aria_label=label,
                data_filter=id,
            )
            for id, label, options in choices
        ],
        el("output", id="count"),
        id="filters",
        hidden=True,
    )


def _kind(row: SampleResult, several: bool) -> str:
    return f"{row.task}: {row.kind}" if several else row.kind


def _sample(
    folder: RunFolder,
    target: Path,
    repeats: Sequence[SampleResult],
    scorer: str,
    flips: Mapping[str, str],
    *,
    limit: int,
    several: bool,
) -> Html:
    row = repeats[0]
    value = worth(repeats, scorer)
    right = value >= RIGHT
    ends = [
        "refused" if any(each.usage.refused for each in repeats) else "",
        "failed" if any(each.failed_calls for each in repeats) else "",
        "error" if any(each.status == "error" for each in repeats) else "",
    ]
    tokens, seconds = (
        fmean(each.visual_tokens for each in repeats),
        fmean(each.usage.seconds.total for each in repeats),
    )
    question = cut(row.question, 240)
    became = flips.get(row.id)
    return el(
        "tr",
        el("td", _thumbnail(folder, row, limit), cls="pic"),
        el("td", _link(folder, target, row, question), el("span", row.id, cls="id"), cls="q"),
        el("td", cut(row.gold[0], 80)),
        el("td", cut("; ".join(dict.fromkeys(each.answer or row.error or "-" for each in repeats)), 120), dir="auto"),
        el(
            "td",
            el("b", "\u2713" if right else "\u2717", cls="yes" if right else "no"),
            f" {value:.2f}" if value not in (0, 1) else None,
            el("span", f"became {became}", cls=f"flip {became}") if became else None,
            cls="num",
            data_v=f"{value:.4g}",
        ),
        el("td", _kind(row, several)),
        el("td", page.number(fmean(each.zooms for each in repeats)), cls="num"),
        el("td", f"{tokens:,.0f}", cls="num", data_v=f"{tokens:.1f}"),
        el("td", f"{seconds:.2f}", cls="num"),
        el("td", row.status),
        data_verdict=str(int(right)),
        data_kind=_kind(row, several),
        data_flip=became,
        data_end=" ".join(end for end in ends if end) or None,
    )


def _link(folder: RunFolder, target: Path, row: SampleResult, text: str) -> Html | str:
    file = folder.trace_path(row.key).with_suffix(".html")
    return el("a", text, href=Path(os.path.relpath(file, target.parent)).as_posix()) if file.exists() else text


def _thumbnail(folder: RunFolder, row: SampleResult, limit: int) -> Html | None:
    file = folder.path / "traces" / "images" / f"{row.image}.jpg"
    try:
        with PIL.Image.open(file) as opened:
            opened.draft("RGB", (2 * THUMBNAIL_SIDE, 2 * THUMBNAIL_SIDE))
            small = opened.convert("RGB")
    except OSError:
        return None  # a run without traces has no pictures
    small.thumbnail((THUMBNAIL_SIDE, THUMBNAIL_SIDE), PIL.Image.Resampling.BILINEAR)
    return el(
        "img",
        src=page.jpeg(small, THUMBNAIL_SIDE, limit),
        alt="",
        width=str(small.width),
        height=str(small.height),
        decoding="async",
    )


def _footer(folder: RunFolder, results: Results) -> Html:
    environment = results.environments[-1] if results.environments else {}
    lines = [el("tr", el("td", name), el("td", value)) for name, value in environment.items()]
    return el(
        "footer",
        el("details", el("summary", "Environment"), el("table", lines), cls="raw"),
        el("details", el("summary", "Configuration"), el("pre", results.config.to_yaml()), cls="raw"),
        el("p", f"run folder {folder.path.name}, weights {results.weights or 'not local'}", cls="soft"),
    )
