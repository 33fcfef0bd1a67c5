"""The page of a run: every sample once, nothing of it markup, links that lead somewhere, a bounded size."""

from __future__ import annotations

import html
import json
import math
import re
from base64 import b64decode
from dataclasses import replace
from io import BytesIO
from itertools import count, pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import EpsImagePlugin, Image

from qzoom_agent.agent import Agent
from qzoom_agent.data.samples import Sample, TaskSource
from qzoom_agent.evaluation import report
from qzoom_agent.evaluation.report import ChartPoint, Scatter, write_run_report
from qzoom_agent.evaluation.run_log import RunFolder, environment
from qzoom_agent.evaluation.runner import evaluate, rescore
from qzoom_agent.evaluation.stats import Figure, Interval, Paired
from qzoom_agent.evaluation.summary import Results
from qzoom_agent.evaluation.tasks.catalog import unscored
from qzoom_agent.evaluation.tasks.task import Score, Task
from qzoom_agent.geometry import Box
from qzoom_agent.models.scripted import ScriptedBackend
from qzoom_agent.report import page as pages
from tests.evaluation.player import asked, changed, numbers, player
from tests.report.pages import Page


def text_of(run: RunFolder | Path, **options: Any) -> str:
    """Write the page of a run and read its source."""
    folder = run if isinstance(run, RunFolder) else RunFolder(run)
    return write_run_report(folder, **options).read_text(encoding="utf-8")


def page_of(run: RunFolder | Path, **options: Any) -> Page:
    """Write the page of a run and read it."""
    return Page(text_of(run, **options))


def one_question(width: int = 200, height: int = 100, **fields: Any) -> Task:
    """A task of one question about a black image; fields of its sample may be others."""
    image = Image.new("RGB", (width, height))
    given = {"id": "x", "task": "one", "kind": "all", "image": image, "question": "Which?", "answer": "1"}
    return replace(numbers(), name="one", load=lambda _: [Sample(**given | fields)], aggregate=None)


def rows_of(page: Page) -> list[dict[str, str | None]]:
    return [row for row in page.attributes("tr") if "data-verdict" in row]


def images_of(page: Page) -> list[str]:
    return [image["src"] or "" for image in page.attributes("img")]


@pytest.fixture
def run(tmp_path: Path) -> RunFolder:
    evaluate(player(lambda i: i % 3 > 0, zooms=lambda i: i > 5), [numbers(12)], out=tmp_path / "run")
    direct = player(lambda i: i % 2 > 0, policy="direct")
    evaluate(direct, [numbers(12)], out=tmp_path / "run" / "ablations" / "direct")
    return RunFolder(tmp_path / "run")


def test_every_sample_has_a_row_with_what_filters_need(run: RunFolder) -> None:
    path = write_run_report(run, baseline=RunFolder(run.path / "ablations" / "direct"))
    page = Page(path.read_text(encoding="utf-8"))
    assert path == run.path / "report.html"
    # 0, 3, 6 and 9 are wrong: the coarse view shows 0, nobody looked at 3, and the crops of 6 and 9 hold the number.
    order = [3, 0, 6, 9, *(i for i in range(12) if i % 3)]
    assert [row["data-verdict"] for row in rows_of(page)] == [str(int(i % 3 > 0)) for i in order]
    causes = [row.get("data-cause") for row in rows_of(page)]
    assert causes == ["never looked", *["saw and misread"] * 3, *[None] * 8]
    assert rows_of(page)[4]["data-kind"] == "odd"
    flips = {order[at]: row["data-flip"] for at, row in enumerate(rows_of(page)) if "data-flip" in row}
    wanted = {i: "right" if i % 3 > 0 else "wrong" for i in range(12) if (i % 3 > 0) != (i % 2 > 0)}
    assert flips == wanted
    assert not any("style" in attrs for _, attrs in page.tags)
    assert all(image.startswith("data:image/jpeg") for image in images_of(page))
    assert len(images_of(page)) == 12


def test_links_lead_to_pages_of_the_episodes_with_their_pictures(run: RunFolder, tmp_path: Path) -> None:
    elsewhere = tmp_path / "deep" / "page.html"
    for path in (write_run_report(run), write_run_report(run, path=elsewhere)):
        page = Page(path.read_text(encoding="utf-8"))
        links = page.attributes("a")
        assert len(links) == 12
        for link in links:
            episode = path.parent / (link["href"] or "")
            assert episode.is_file()
            pictures = images_of(Page(episode.read_text(encoding="utf-8")))
            assert pictures
            assert all((episode.parent / picture).is_file() for picture in pictures)
            assert "img-src data: 'self' file:" in html.unescape(episode.read_text(encoding="utf-8"))


def test_a_run_compares_itself_with_its_ablations(run: RunFolder) -> None:
    text = text_of(run)
    assert "In pairs with other runs" in text
    assert "tool gain" in text
    assert re.search(r"direct: 50\.0% at \d+ tokens", text)


def test_a_run_that_is_scored_again_compares_itself_with_its_ablations(tmp_path: Path) -> None:
    """By a scorer that none of them was asked with."""

    def lenient(text: str, sample: Sample) -> bool:
        return bool(text)

    evaluate(player(lambda i: i > 0), [numbers(4)], out=tmp_path, traces=False)
    evaluate(
        player(lambda i: i > 1, policy="direct"), [numbers(4)], out=tmp_path / "ablations" / "direct", traces=False
    )
    assert rescore(RunFolder(tmp_path), [numbers(4)], scorer=lenient).tasks["numbers"].accuracy == 1
    text = text_of(tmp_path)
    assert re.search(r"direct: 100\.0% at \d+ tokens", text)


def test_an_answer_is_text(tmp_path: Path) -> None:
    evil = "<script>alert(1)</script><img src=x onerror=alert(1)>\u202e"
    evaluate(Agent(ScriptedBackend(lambda _: evil)), [numbers(2)], out=tmp_path)
    text = text_of(tmp_path)
    assert "<script>alert" not in text
    assert "onerror=alert(1)&gt;" in text
    assert text.count("<script>") == 1


def test_options_that_are_letters_keep_their_places(tmp_path: Path) -> None:
    row = {"image": "i.png", "question": "Which letter?", "answer": "A", "options": ["B", "A", "C"]}
    Image.new("RGB", (56, 56)).save(tmp_path / "i.png")
    (tmp_path / "letters.jsonl").write_text(json.dumps(row) + "\n", encoding="utf-8")
    evaluate(Agent(ScriptedBackend(lambda _: "(C)")), [str(tmp_path / "letters.jsonl")], out=tmp_path / "run")
    text = text_of(tmp_path / "run")
    assert re.findall(r"[ABC]: [ABC]\b", text) == ["B: A", "C: C"]  # what is right, and what was said


def test_flips_are_those_of_the_task(tmp_path: Path) -> None:
    """Two tasks whose questions share their ids, as the views of ZoomBench do."""

    def shared(index: int, sample: Sample) -> Sample:
        return replace(sample, id=f"shared-{index}")

    tasks = [numbers(2, name=name, change=shared) for name in ("one", "two")]
    evaluate(player(), tasks, out=tmp_path / "a")
    asked = count()
    evaluate(player(lambda _: next(asked) != 2), tasks, out=tmp_path / "b")  # the first question of the second task
    page = page_of(tmp_path / "b", baseline=RunFolder(tmp_path / "a"))
    assert [(row["data-kind"], row.get("data-flip")) for row in rows_of(page)] == [
        ("two: tenth", "wrong"),
        ("one: tenth", None),
        ("one: odd", None),
        ("two: odd", None),
    ]


def test_an_episode_is_shown_with_the_right_answer_of_now(tmp_path: Path) -> None:
    evaluate(player(), [numbers(2)], out=tmp_path)
    write_run_report(RunFolder(tmp_path))
    evaluate(player(), [changed(2, answer="4711", answers=("4711",))], out=tmp_path)
    write_run_report(RunFolder(tmp_path))
    found = [path.read_text(encoding="utf-8") for path in (tmp_path / "traces").glob("*.html")]
    assert len(found) == 2 and all("4711" in page for page in found)


def test_a_folder_of_many_episodes_is_not_searched_for_each_of_them(
    run: RunFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    searched: list[Path] = []
    monkeypatch.setattr("qzoom_agent.files.remove_parts", searched.append)
    write_run_report(run)
    assert len(list((run.path / "traces").glob("*.html"))) == 12
    assert searched == [run.path]


def test_a_run_without_traces_has_a_page_without_links(tmp_path: Path) -> None:
    evaluate(player(), [numbers(3)], out=tmp_path, traces=False)
    page = page_of(tmp_path)
    assert (len(rows_of(page)), page.attributes("a"), images_of(page)) == (3, [], [])


def test_a_picture_of_a_run_from_elsewhere_runs_no_program(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Pillow gives an EPS file, whatever its name, to Ghostscript."""
    evaluate(player(), [numbers(3)], out=tmp_path)
    for path in (tmp_path / "traces" / "images").iterdir():
        path.write_bytes(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\n")
    monkeypatch.setattr(EpsImagePlugin, "Ghostscript", lambda *_, **__: pytest.fail("Ghostscript was run"))
    assert len(rows_of(page_of(tmp_path))) == 3


def test_a_row_whose_image_has_no_size_has_no_picture(tmp_path: Path) -> None:
    evaluate(player(), [numbers(3)], out=tmp_path)
    first, *others = (tmp_path / "samples.jsonl").read_text().splitlines()
    rows = [json.dumps(json.loads(first) | {"size": [0, 0]}), *others]
    (tmp_path / "samples.jsonl").write_text("\n".join(rows) + "\n")
    assert len(images_of(page_of(tmp_path))) == 2


def test_repeats_are_one_row(tmp_path: Path) -> None:
    evaluate(player(), [numbers(3)], out=tmp_path, repeats=2)
    assert len(rows_of(page_of(tmp_path))) == 3


def test_a_long_table_keeps_the_wrong_ones_and_says_so(tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.setattr(report, "MAX_ROWS", 5)
    evaluate(player(lambda i: i not in {3, 8, 9}), [numbers(10)], out=tmp_path)
    text = text_of(tmp_path)
    rows = rows_of(Page(text))
    assert [row["data-verdict"] for row in rows] == ["0", "0", "0", "1", "1"]
    assert "5 of 10 samples" in text


def test_several_tasks_are_told_apart(tmp_path: Path) -> None:
    evaluate(player(), [numbers(3, name="one"), numbers(3, name="two")], out=tmp_path)
    text = text_of(tmp_path)
    assert {row["data-kind"] for row in rows_of(Page(text))} == {
        f"{task}: {kind}" for task in ("one", "two") for kind in ("odd", "even", "tenth")
    }


def test_box_recall_is_told_of_every_task(tmp_path: Path) -> None:
    evaluate(player(zooms=lambda i: True), [numbers(3, name="one"), numbers(3, name="two")], out=tmp_path)
    text = text_of(tmp_path)
    recall = RunFolder(tmp_path).latest()[0].recall
    assert recall and text.count(f"<td>1.00</td><td>{recall:.0%}</td>") == 2
    evaluate(player(zooms=lambda i: True), [numbers(3)], out=tmp_path / "one")
    assert f"box recall {recall:.0%}" in text_of(tmp_path / "one")


def test_options_are_written_out_on_both_sides(tmp_path: Path) -> None:
    options, long = ["a red kite", "a blue van"], "Which one? " + 60 * "Look at the hall again. "

    def letter(text: str | None, sample: Sample) -> Score:
        return Score(float(text == sample.answer), text)

    task = one_question(question=long, answer="B", options=tuple(options))
    evaluate(Agent(ScriptedBackend(lambda _: "A")), [replace(task, scorers={"letter": letter})], out=tmp_path)
    text = text_of(tmp_path)
    assert '<td dir="auto">B: a blue van</td>\n<td dir="auto">A: a red kite</td>' in text
    assert long.strip() in text


def close(picture: Image.Image, colour: tuple[int, int, int]) -> int:
    """Return the number of pixels that are about of this colour."""
    return sum(math.dist(pixel, colour) < 60 for row in np.asarray(picture).tolist() for pixel in row)


def test_pictures_carry_the_known_boxes_and_the_crops(run: RunFolder) -> None:
    page = page_of(run)
    pictures = [Image.open(BytesIO(b64decode(image.partition(",")[2]))) for image in images_of(page)]
    never, _, saw, *_ = pictures
    assert all(close(picture, report.GOLD) >= 10 for picture in pictures)
    assert close(saw, report.CROP) >= 10 > close(never, report.CROP)


def test_boxes_are_drawn_on_the_image_that_they_are_of(tmp_path: Path) -> None:
    boxes = (Box(50, 100, 90, 160, view="original2"),)
    task = one_question(boxes=boxes, others=(Image.new("RGB", (100, 200)),))
    replies = ["ZOOM image 2: 250, 250, 750, 750", "1"]
    evaluate(Agent(ScriptedBackend(replies, protocol="plain")), [task], out=tmp_path)
    run = RunFolder(tmp_path)
    [picture] = images_of(page_of(run))
    colours = np.asarray(Image.open(BytesIO(b64decode(picture.partition(",")[2]))))
    assert colours.max() < 60, "neither the crop nor the known box is on the first image"
    [row] = run.latest()
    assert (row.boxes, row.box_images, row.crop_images) == ([(50, 100, 90, 160)], [1], [1])
    assert row.sample().boxes == boxes
    _, second = run.trace_path(row.key).with_suffix(".html").read_text(encoding="utf-8").split('<div class="stage s1">')
    assert 'class="box gold' in second


def test_boxes_keep_their_place_on_a_long_thin_picture(tmp_path: Path) -> None:
    thin = Image.new("RGB", (105, 4000), "white")  # 3 x 96 as drawn, not 2.52 x 96
    evaluate(player(policy="direct"), [changed(1, image=thin, boxes=(Box(0, 3000, 105, 3400),))], out=tmp_path)
    shown = images_of(page_of(tmp_path))[0]
    drawn = np.asarray(Image.open(BytesIO(b64decode(shown.partition(",")[2])))).astype(int)
    rows = np.flatnonzero((drawn.min(axis=2) < 150).any(axis=1))
    assert (rows.min(), rows.max() + 1) == pytest.approx((72, 82), abs=2)


def test_a_page_tells_when_and_with_what_it_was_made(tmp_path: Path) -> None:
    made = environment("cpu, float32", command="qzoom eval numbers --n 2")
    evaluate(player(), [numbers(2)], out=tmp_path, environment=made, weights="abc123")
    text = text_of(tmp_path)
    for part in (made["date"], f"torch {made['torch']}", "cpu, float32", "weights abc123", "qzoom eval numbers --n 2"):
        assert part in text


def test_charts_hold_their_marks() -> None:
    charts: Any = pages.environment().get_template("charts.html.jinja").module
    half = Figure(4, 0.5, 0.25, Interval(0.2, 0.8))
    drawn = charts.bars([("<b>", half, True), ("none", Figure(1, 1.0, None, None), False)])
    assert "&lt;b&gt;" in drawn
    assert drawn.count("whisker") == 1
    assert 'width="50.00"' in drawn
    plot = charts.scatter(
        Scatter([ChartPoint("a", 60, half, True), ChartPoint("b", 61, half, False), ChartPoint("c", 600, half, False)])
    )
    heights = [float(y) for y in re.findall(r'y="([\d.]+)" text-anchor="start"', plot)]
    assert len(heights) == 3
    assert abs(heights[0] - heights[2]) >= 14, "labels of neighbours do not cover each other"
    assert charts.scatter(Scatter([]))


@pytest.mark.parametrize("mean", [0.0, 0.5, 1.0])
def test_every_label_of_a_chart_is_inside_it_and_the_run_itself_on_top(mean: float) -> None:
    charts: Any = pages.environment().get_template("charts.html.jinja").module
    figure = Figure(4, mean, 0.25, Interval(0.0, 1.0))
    points = [ChartPoint(f"kind {at}", 60 + at, figure, at == 0) for at in range(16)]
    plot = charts.scatter(Scatter(points))
    heights = sorted(float(y) for y in re.findall(r'y="([-\d.]+)" text-anchor="start"', plot))
    assert len(heights) == 16 and all(after - before >= 14 for before, after in pairwise(heights))
    assert heights[0] >= 10 and heights[-1] <= Scatter.height - 20, "below are the numbers of the axis"
    assert plot.rindex("<circle") == plot.index("<circle", plot.index('r="6"') - 40)


def test_a_chart_of_one_kind_has_one_point(tmp_path: Path) -> None:
    evaluate(Agent(ScriptedBackend(["1"])), [one_question()], out=tmp_path)
    assert text_of(tmp_path).count("<circle") == 1


def test_the_interval_of_a_figure_has_its_digits() -> None:
    charts: Any = pages.environment().get_template("charts.html.jinja").module
    drawn = charts.bars([("long run", Figure(2000, 0.9995, 0.0005, Interval(0.9972, 0.9999)), True)])
    assert "99.95%<i> [99.7, 100.0] n 2000</i>" in drawn


def test_a_difference_of_less_than_its_digits_has_no_negative_zero() -> None:
    assert report.points(Paired(4, -0.0001, Interval(-0.0004, 0.0002), 0, 0, 1.0)) == "+0.0 points (+0.0 to +0.0)"


def test_a_page_of_questions_without_answers_calls_no_reply_right_or_wrong(tmp_path: Path) -> None:
    def reply(messages: list[Any]) -> str:
        if asked(messages) == 1:
            raise RuntimeError("gone")
        return "7"

    task = unscored(numbers(3))
    evaluate(Agent(ScriptedBackend(reply)), [task], out=tmp_path, source=TaskSource(answered=False))
    text = text_of(tmp_path)
    assert "Replied, with its 95 % interval" in text and "Replied against visual tokens" in text
    assert "1 of 3 answers failed; a failed one counts as no reply." in text
    shown = re.sub(r"<(style|script)>.*?</\1>", "", text, flags=re.DOTALL)
    assert not re.search(r">(Accuracy|right|wrong|right and wrong|failed|saw and misread)\b(?! answer)", shown)
    assert re.findall(r'colspan="10">([^<]*)<', shown) == ["no reply", "replied"]


def test_times_of_less_than_ten_milliseconds_are_not_shown_as_none(tmp_path: Path) -> None:
    evaluate(player(), [numbers(2)], out=tmp_path)
    run = RunFolder(tmp_path)
    for row in (rows := run.latest()):
        row.usage.seconds.perceive, row.usage.seconds.think, row.usage.seconds.act = 0.001, 0.0034, 0.0
    (tmp_path / "samples.jsonl").write_text("".join(f"{row.model_dump_json()}\n" for row in rows), encoding="utf-8")
    rescore(RunFolder(tmp_path), [numbers(2)])
    text = text_of(tmp_path)
    assert text.count('<td class="num">0.0044</td>') == 2
    assert "p50 0.0044, p95 0.0044" in text


def test_a_baseline_named_as_an_ablation_is_a_row_of_its_own(run: RunFolder, tmp_path: Path) -> None:
    evaluate(player(), [numbers(12)], out=(other := tmp_path / "elsewhere" / "direct"))
    text = text_of(run, baseline=RunFolder(other))
    against = re.findall(r"<tr><td>([^<]*)</td><td>numbers</td><td>12</td>", text)
    assert against == [str(other), "direct"]


def test_the_parts_of_the_visual_tokens_hold_those_of_tools(tmp_path: Path) -> None:
    replies = ['TOOL: rotate {"degrees": 90}', "1"]
    agent = Agent(ScriptedBackend(replies, protocol="plain"), policy="explicit", tools=["rotate"])
    evaluate(agent, [one_question(280, 560)], out=tmp_path)
    text = text_of(tmp_path)
    cost = Results.of(RunFolder(tmp_path)).tasks["one"].cost
    assert cost.tool_tokens > 0
    assert cost.visual_tokens.mean == cost.coarse_tokens + cost.crop_tokens + cost.tool_tokens
    assert f"{cost.coarse_tokens:.0f} coarse, 0 in crops, {cost.tool_tokens:.0f} of tools" in text


def test_a_row_of_repeats_tells_of_the_ones_that_decide_it(tmp_path: Path) -> None:
    """Of three replies the first is right, the second fails, and the third is wrong."""
    turn = count()

    def reply(messages: list[Any]) -> str:
        if (at := next(turn)) == 1:
            raise RuntimeError("gone")
        return "1" if at == 0 else "x"

    evaluate(Agent(ScriptedBackend(reply)), [one_question()], out=tmp_path, repeats=3)
    text = text_of(tmp_path)
    assert "1 of 3 answers failed; a failed one counts as wrong." in text
    [row] = rows_of(Page(text))
    assert row["data-cause"] == "failed" and 'colspan="10">failed<' in text
    assert "<td>answered, error</td></tr>" in text
    failed = next(one for one in RunFolder(tmp_path).latest() if one.status == "error")
    assert [link["href"] for link in Page(text).attributes("a")] == [f"traces/{failed.key}.html"]
