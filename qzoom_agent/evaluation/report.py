"""One HTML page per run: the figures, and every sample in a table that sorts, filters and links to its episode.

The page opens from disk and is a plain table without scripts. Beside every trace lies a page of the episode, which
links to the run's shared pictures; thumbnails are inside this page, small enough that thousands of rows stay under
20 MB, and carry the known boxes and the crops. The wrong answers come first, by cause. Of more than `MAX_ROWS` samples
the page shows that many and says so; the rest is in samples.jsonl.
"""

from __future__ import annotations

import math
import os
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any, NamedTuple, get_args

import PIL.Image
import PIL.ImageDraw

from qzoom_agent.data.options import letters_of
from qzoom_agent.errors import ConfigError
from qzoom_agent.evaluation.audit import MEANINGS, TaskAudit, points, read_audit
from qzoom_agent.evaluation.compare import compare, deciding, worth
from qzoom_agent.evaluation.run_log import RunFolder
from qzoom_agent.evaluation.sample_result import Cause, SampleResult, placed
from qzoom_agent.evaluation.stats import Figure
from qzoom_agent.evaluation.summary import Results, TaskResult, by_sample, measured
from qzoom_agent.report import page
from qzoom_agent.report.episode import render_html
from qzoom_agent.report.markdown import percent

MAX_ROWS = 5000
THUMBNAIL_SIDE = 96
GOLD, CROP = (31, 157, 85), (31, 111, 235)
"""Colours of known boxes and of crops on a thumbnail."""
CAUSES: tuple[Cause, ...] = get_args(Cause)
THUMBNAIL_BYTES = 9_000_000
"""For all thumbnails of a page together, before they are written as text."""
_MOST_KINDS = 16
"""Of more kinds the chart shows none, because their labels would not fit in; the bars show all."""
_LINE = 15.0
"""Least distance of two labels."""
_NEAR = 150.0
"""Labels that are further apart than this stand beside each other."""


def write_run_report(folder: RunFolder, *, baseline: RunFolder | None = None, path: Path | None = None) -> Path:
    """Write the page of a run, and the pages of its episodes.

    Args:
        folder: A run with results. The runs below its ablations/ are compared with it.
        baseline: A run of the same samples, against which the page shows flips (default: the first ablation).
        path: File to write (default: report.html of the run folder).
    """
    target = path or folder.path / "report.html"
    others = folder.ablations
    if baseline is not None and baseline.path.resolve() not in {other.path.resolve() for other in others.values()}:
        named = str(baseline.path) if baseline.path.name in others else baseline.path.name
        others = {named: baseline} | others
    against = {name: compare(other, folder) for name, other in others.items()}
    flipped = compare(baseline, folder) if baseline is not None else next(iter(against.values()), None)
    flips = {} if flipped is None else {(f.task, f.id): f.became for one in flipped.tasks.values() for f in one.flips}
    rows = folder.latest()
    _write_episodes(folder, rows)
    figures = {name: Results.of(other) for name, other in others.items()}
    results = Results.of(folder)
    _require_counted(folder, results, rows)
    tasks = list(results.tasks.values())
    shown = _shown(results, rows)
    limit = min(4_000, THUMBNAIL_BYTES // max(1, len(shown)))
    text = page.document(
        "run.html.jinja",
        rules=page.asset("run.css"),
        kind="run",
        folder=folder.path.name,
        results=results,
        tasks=tasks,
        answers=len(rows),
        bars=_bars(tasks),
        scatter=Scatter(_points(results, rows, figures)),
        comparisons=against,
        audits=_audits(folder, results),
        meanings=MEANINGS,
        points=points,
        samples=[_sample(folder, target, each, results, flips, limit) for each in shown],
        flips=flips,
        environment=results.environments[-1] if results.environments else {},
    )
    return page.write_page(text, target)


def _require_counted(folder: RunFolder, results: Results, rows: Sequence[SampleResult]) -> None:
    """Raise ConfigError if the figures are of answers that are no longer there."""
    there = Counter(task for task, _ in {(row.task, row.index) for row in rows})
    for name, task in results.tasks.items():
        if there[name] < task.n:
            raise ConfigError(
                f"The results.json of {folder.path} counts {task.n} answers to {name}, but samples.jsonl holds "
                f"{there[name]}. Ask the others again with the command of the run, or count those that are left: "
                f"qzoom eval rescore {folder.path}."
            )


def _write_episodes(folder: RunFolder, rows: Sequence[SampleResult]) -> None:
    """Write a page beside each trace, unless it is newer than the trace."""
    for row in rows:
        source = folder.trace_path(row.key)
        target = source.with_suffix(".html")
        if not source.exists() or (target.exists() and target.stat().st_mtime >= source.stat().st_mtime):
            continue
        trace = folder.trace(row.key)
        assert trace is not None
        known = trace.model_copy(update={"gold": row.boxes, "gold_images": row.box_images})
        text = render_html(
            known, lambda digest: page.ImageLink(f"images/{digest}.jpg"), expected=row.gold[0], linked=True
        )
        page.write_page(text, target, tidy=False)  # `RunFolder.writing` has done that


def _bars(tasks: Sequence[TaskResult]) -> list[tuple[str, Figure, bool]]:
    """Return the accuracy of every task and every kind: label, figure, and whether it is a task's."""
    lines = []
    for task in tasks:
        lines.append((task.task, task.marks.accuracy, True))
        if len(task.marks.kinds) > 1:
            lines += [(kind, figure, False) for kind, figure in task.marks.kinds.items()]
    return lines


def _points(results: Results, rows: Sequence[SampleResult], figures: Mapping[str, Results]) -> list[ChartPoint]:
    """Return a point for each task and run, or for each kind if there is only one of both."""

    def point(label: str, result: TaskResult, *, main: bool) -> ChartPoint:
        return ChartPoint(label, result.cost.visual_tokens.mean, result.marks.accuracy, main)

    points = []
    one = len(results.tasks) == 1
    for name, task in results.tasks.items():
        points.append(point((results.config.policy or "") if figures and one else name, task, main=True))
        if one:  # the labels of several tasks under several policies would cover each other
            points += [
                point(other, result.tasks[name], main=False)
                for other, result in figures.items()
                if name in result.tasks
            ]
        if one and not figures and 1 < len(task.marks.kinds) <= _MOST_KINDS:
            for kind, figure in task.marks.kinds.items():
                known = measured([row for row in rows if row.kind == kind])
                points.append(ChartPoint(kind, fmean(row.visual_tokens for row in known), figure, False))
    return points


def _audits(folder: RunFolder, results: Results) -> list[tuple[TaskAudit, list[tuple[str, Figure, bool]]]]:
    """Return an audit's parts by task, each with the accuracy of its policies.

    Those of other answers, such as of the fewer that the run had once, are left out.
    """
    found = read_audit(folder)
    if found is None:
        return []  # not every run is audited
    now = {(task.task, name): marks.accuracy for task in results.tasks.values() for name, marks in task.scores.items()}
    return [
        (each, [(arm.policy, arm.accuracy, arm.policy == each.policy) for arm in each.arms])
        for each in found.tasks.values()
        if now.get((each.task, each.scorer)) == each.arms[0].accuracy
    ]


# -- the chart -------------------------------------------------------------------------------------------------------


class ChartPoint(NamedTuple):
    """A run, a task or a kind."""

    label: str
    x: float
    figure: Figure
    main: bool
    """The run that the page is about."""


class Scatter:
    """Accuracy from 0 to 100 % over visual tokens from 0, in units of the picture; drawn by charts.html.jinja."""

    width, height = 640, 320
    left, right, top, bottom = 62.0, 450.0, 12.0, 280.0

    def __init__(self, points: Sequence[ChartPoint]) -> None:
        self.points = sorted(points, key=lambda point: point.main)  # the last one drawn is on top
        most = max((point.x for point in points), default=0.0) or 1.0
        step = _step(most)
        self.end = step * math.ceil(1.02 * most / step)
        self.ticks = [count * step for count in range(round(self.end / step) + 1)]
        places = [(self.x(point.x), self.y(point.figure.mean)) for point in self.points]
        self.heights = _spread(places, self.top, self.bottom)
        self.alt = "; ".join(f"{each.label} {percent(each.figure.mean)} at {each.x:,.0f}" for each in points)

    def x(self, tokens: float) -> float:
        """Return the place of a number of visual tokens."""
        return self.left + (self.right - self.left) * tokens / self.end

    def y(self, share: float) -> float:
        """Return the height of an accuracy."""
        return self.bottom - (self.bottom - self.top) * share


def _step(most: float) -> float:
    """Return a round distance of ticks that makes three to six of them."""
    unit = 10.0 ** math.floor(math.log10(most))
    return next(size * unit for size in (0.2, 0.5, 1.0, 2.0) if most / (size * unit) <= 6)


def _spread(places: Sequence[tuple[float, float]], top: float, bottom: float) -> list[float]:
    """Return heights of labels at these places, moved apart so that none covers another or leaves the chart."""
    heights = [height for _, height in places]
    for down, edge in ((-1, bottom), (1, top)):  # first upwards from the lowest, then down again where they left it
        done: list[int] = []
        for at in sorted(range(len(places)), key=lambda at: down * heights[at]):
            nearest = [heights[other] + down * _LINE for other in done if abs(places[at][0] - places[other][0]) < _NEAR]
            heights[at] = down * max(down * height for height in (heights[at], edge, *nearest))
            done.append(at)
    return heights


# -- samples ---------------------------------------------------------------------------------------------------------


def _shown(results: Results, rows: Sequence[SampleResult]) -> list[list[SampleResult]]:
    """Return the samples that have a row in the table, with their repeats: the wrong ones first, by cause."""
    samples = [each for name in results.tasks for each in by_sample(row for row in rows if row.task == name).values()]

    def order(repeats: list[SampleResult]) -> int:
        row, right = deciding(repeats, results.tasks[repeats[0].task].scorer)
        return len(CAUSES) if right else CAUSES.index(row.cause)

    return sorted(samples, key=order)[:MAX_ROWS]


def _sample(
    folder: RunFolder,
    target: Path,
    repeats: Sequence[SampleResult],
    results: Results,
    flips: Mapping[tuple[str, str], str],
    limit: int,
) -> dict[str, Any]:
    """Return a row of the table: one sample with its repeats."""
    task = results.tasks[repeats[0].task]
    scorer, answered = task.scorer, task.part.answered
    row, right = deciding(repeats, scorer)
    verdicts = ("right", row.cause) if answered else ("replied", "no reply")
    ends = {
        "refused": any(each.usage.refused for each in repeats),
        "failed": any(each.failed_calls for each in repeats),
        "error": any(each.status == "error" for each in repeats),
    }
    episode = folder.trace_path(row.key).with_suffix(".html")
    return {
        "row": row,
        "kind": f"{row.task}: {row.kind}" if len(results.tasks) > 1 else row.kind,
        "value": worth(repeats, scorer),
        "right": right,
        "verdict": verdicts[not right],
        "cause": row.cause if answered and not right else None,
        "became": flips.get((row.task, row.id)),
        "ended": ", ".join(dict.fromkeys(each.status for each in repeats)),
        "ends": " ".join(name for name, found in ends.items() if found),
        "gold": _lettered(row.gold[0], row),
        "answers": "; ".join(dict.fromkeys(_said(each, scorer) for each in repeats)),
        "zooms": fmean(each.zooms for each in repeats),
        "tokens": fmean(each.visual_tokens for each in repeats),
        "seconds": fmean(each.usage.seconds.total for each in repeats),
        "link": Path(os.path.relpath(episode, target.parent)).as_posix() if episode.exists() else None,
        "picture": _picture(folder, row, limit),
    }


def _said(row: SampleResult, scorer: str) -> str:
    """Return the answer; of multiple choice the option that the scorer read in it, with its letter."""
    extracted = row.scores[scorer].extracted if scorer in row.scores else None
    if row.options and extracted and (option := _lettered(extracted, row)) != extracted:
        return option
    return row.answer or row.error or "-"


def _lettered(text: str, row: SampleResult) -> str:
    """Return "B: green" for the letter of an option, else for its text; anything else as it is."""
    named = dict(zip(letters_of(row.options), row.options, strict=True))
    letter = text.upper() if text.isascii() else ""
    if letter not in named:
        letter = next((letter for letter, option in named.items() if option == text), "")
    return f"{letter}: {named[letter]}" if letter else text


def _picture(folder: RunFolder, row: SampleResult, limit: int) -> dict[str, Any] | None:
    if not row.image or min(row.size) < 1:  # a sample that could not be read
        return None
    try:
        # other formats may run a program, as EPS does
        with PIL.Image.open(folder.picture_path(row.image), formats=["JPEG"]) as opened:
            opened.draft("RGB", (2 * THUMBNAIL_SIDE, 2 * THUMBNAIL_SIDE))
            small = opened.convert("RGB")
    except (OSError, SyntaxError, PIL.Image.DecompressionBombError):
        return None  # a run without traces has no pictures
    small.thumbnail((THUMBNAIL_SIDE, THUMBNAIL_SIDE), PIL.Image.Resampling.BILINEAR)
    draw, scale = PIL.ImageDraw.Draw(small), (small.width / row.size[0], small.height / row.size[1]) * 2
    gold, crops = placed(row.boxes, row.box_images), placed(row.crops, row.crop_images)
    # the picture is that of the first image
    marks = [(colour, box) for colour, some in ((CROP, crops), (GOLD, gold)) for number, box in some if not number]
    for colour, box in marks:
        x1, y1, x2, y2 = (by * value for by, value in zip(scale, box, strict=True))
        draw.rectangle((x1 - 1, y1 - 1, max(x1 + 1, x2), max(y1 + 1, y2)), outline=colour)
    return {"src": page.jpeg(small, THUMBNAIL_SIDE, limit), "width": small.width, "height": small.height}
