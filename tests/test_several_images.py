"""Questions about several images: each has its coarse view, its map and its boxes, and calls say which they mean."""

from importlib import resources
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from qzoom_agent import Agent
from qzoom_agent.answer import Answer
from qzoom_agent.cli.main import main
from qzoom_agent.episode_state import add_coarse
from qzoom_agent.errors import ConfigError, ImageError
from qzoom_agent.geometry import Box
from qzoom_agent.messages import Message, image_part, message, plain_text, view_ids
from qzoom_agent.models.scripted import ScriptedBackend
from qzoom_agent.protocols import PROTOCOLS
from qzoom_agent.protocols.interface import view_names
from qzoom_agent.report.episode import render_html
from qzoom_agent.trace import PerceptionRecord, by_digest
from qzoom_agent.views import ViewStore
from tests.cases import each_case

WIDE = Image.linear_gradient("L").resize((800, 600)).convert("RGB")
TALL = Image.radial_gradient("L").resize((400, 900)).convert("RGB")
CALLS = {
    "plain": "ZOOM image 2: 100, 100, 400, 400",
    "nano": "<zoom>2<loc_28><loc_28><loc_84><loc_140></zoom>",
    "qwen3vl": '<tool_call>\n{"name": "image_zoom_in_tool", "arguments": {"bbox_2d": [100, 100, 400, 400], '
    '"label": "x", "img_idx": 1}}\n</tool_call>',
    "qwen3_5": "<tool_call>\n<function=image_zoom_in_tool>\n<parameter=bbox_2d>\n[100, 100, 400, 400]\n</parameter>\n"
    "<parameter=img_idx>\n1\n</parameter>\n</function>\n</tool_call>",
    "deepeyes": '<tool_call>\n{"name": "image_zoom_in_tool", "arguments": {"bbox_2d": [20, 40, 80, 160], '
    '"img_idx": 1}}\n</tool_call>',
    "mini_o3": '<grounding>{"bbox_2d": [0.1, 0.1, 0.4, 0.4], "source": "original_image_2"}</grounding>',
    "pixel_reasoner": '<tool_call>\n{"name": "crop_image_normalized", "arguments": {"bbox_2d": [0.1, 0.1, 0.4, 0.4], '
    '"target_image": 2}}\n</tool_call>',
    "visionthink": '<tool_call>\n{"name": "resize_image", '
    '"arguments": {"action": "resize", "img_idx": 1}}\n</tool_call>',
    "adaptvision": '<tool_call>\n{"name": "request_local_region", "arguments": {"bbox_2d": [20, 40, 80, 160], '
    '"img_idx": 1}}\n</tool_call>',
}
"""A call about the second image, in every format whose calls can say so."""


def scripted(replies: Any, *, protocol: str = "plain", looks: Any = None, **changes: Any) -> Agent:
    return Agent(ScriptedBackend(replies, protocol=protocol, looks=looks), **changes)


@each_case("name", list(PROTOCOLS))
def test_a_call_names_its_image_in_every_format_that_can(name: str) -> None:
    talks: list[list[Message]] = []

    def reply(messages: list[Message]) -> str:
        talks.append(messages)
        return CALLS[name] if len(talks) == 1 else "yes" if name == "nano" else "<answer>\\boxed{yes}</answer>"

    answer = scripted(reply, protocol=name, policy="explicit").run([WIDE, TALL], "which?")
    assert view_ids(talks[0]) == ["coarse", "coarse2"]
    crop = answer.trace.view("crop1")
    assert crop is not None and (crop.image, crop.kind, crop.region.view) == (1, "crop", "original2")
    assert answer.evidence == [(1, crop.box)]
    call = answer.trace.turns[0].calls[0]
    assert (call.view, call.decision in ("served", "grown")) == ("coarse2", True)
    if call.box is not None and call.decision == "served":
        asked = next(view for view in answer.trace.views if view.id == "coarse2")
        inside = asked.to_original(Box(*call.box, frame=call.frame, view="coarse2"))
        assert inside.coverage(crop.region) == pytest.approx(1, abs=0.05)
    assert 0 < crop.box[2] <= 400


def test_a_format_says_in_its_prompt_how_an_image_is_named() -> None:
    for name in ("plain", "deepeyes", "adaptvision", "visionthink", "qwen3vl"):
        spoken: list[str] = []

        def reply(messages: list[Message], spoken: list[str] = spoken) -> str:
            spoken.append(" ".join(map(plain_text, messages)))
            return "<answer>yes</answer>"

        agent = scripted(reply, protocol=name, policy="explicit")
        agent.run([WIDE, TALL], "which?")
        agent.run(WIDE, "which?")
        assert "img_idx" in spoken[0] or "image 2" in spoken[0], name
        assert name == "qwen3vl" or ("img_idx" not in spoken[1] and "image 2" not in spoken[1])


@pytest.mark.parametrize("how", [{"tools": "native"}, {"prompt": {"system": "You can:\n{schema}"}}])
@pytest.mark.parametrize("name", ["deepeyes", "adaptvision", "visionthink"])
def test_a_schema_outside_the_formats_own_text_says_how_an_image_is_named(name: str, how: dict[str, Any]) -> None:
    def schema(*images: Image.Image) -> str:
        agent = scripted(["yes"], protocol=name, policy="explicit")
        agent.backend.api = "chat"  # type: ignore[attr-defined]  # as a server has, which takes native calls
        _, context = agent.replace(**how).begin(list(images), "which?")
        said = context.protocol.opening("which?", add_coarse(context), tools=True)
        return "".join([*context.tools, *map(plain_text, said)])

    assert "img_idx" in schema(WIDE, TALL) and "img_idx" not in schema(WIDE)


def test_views_have_names_in_every_format() -> None:
    store = ViewStore()
    budget = {"factor": 28, "min_tokens": 1, "max_tokens": 64}
    for number, image in enumerate((WIDE, TALL)):
        store.add_original(image, number=number)
    for number in range(2):
        store.add_coarse(number=number, **budget)
    store.add_crop(Box(10, 10, 100, 100, view="original2"), parent="coarse2", **budget)
    assert [view.id for view in store.views] == ["original", "original2", "coarse", "coarse2", "crop1"]
    assert view_names(PROTOCOLS["plain"], store.shown) == ["image 1", "image 2", "crop 1"]
    assert view_names(PROTOCOLS["qwen3vl"], store.shown)[1] == "the image with img_idx 1"
    assert view_names(PROTOCOLS["mini_o3"], store.shown) == ["original_image_1", "original_image_2", "observation_1"]
    assert view_names(PROTOCOLS["pixel_reasoner"], store.shown)[1:] == ["target_image 2", "target_image 3"]
    call = '<grounding>{"bbox_2d": [0.1, 0.1, 0.4, 0.4], "source": "observation_1"}</grounding>'
    assert PROTOCOLS["mini_o3"].parse(call, store.shown).calls[0].view == "crop1"
    wrong = PROTOCOLS["deepeyes"].parse(CALLS["deepeyes"].replace('"img_idx": 1', '"img_idx": 2'), store.shown)
    assert "from 0 to 1" in wrong.problems[0]
    crop, second = store.view("crop1"), store.view("coarse2")
    assert second.to_original(second.from_original(crop.region)).as_list() == pytest.approx(crop.region.as_list())
    assert store.original("crop1").id == "original2"


def looked(messages: list[Message]) -> list[PerceptionRecord]:
    """One region in each coarse view."""
    found = []
    for at, _ in enumerate(view_ids(messages)):
        box = (28.0 + 28 * at, 28.0, 84.0 + 28 * at, 84.0)
        cells = (box[0] / 28, 1.0, box[2] / 28, 3.0)
        found.append(PerceptionRecord(score=0.9, threshold=0.5, heat=[[0.0, 1.0]], boxes=[box], cells=[cells]))
    return found


def test_images_compete_where_foreground_is_a_share_of_the_peak() -> None:
    """Each image is looked at alone; one whose hottest cell is below the other's cutoff shows less of what is asked."""
    peaks = {"coarse": 0.3, "coarse2": 0.9}

    def look(messages: list[Message]) -> list[PerceptionRecord]:
        (shown,) = view_ids(messages)
        peak = peaks[shown]
        box = (28.0, 28.0, 84.0, 84.0)
        found = {"heat": [[0.0, peak]], "cutoff": 0.95 * peak, "boxes": [box], "cells": [(1.0, 1.0, 3.0, 3.0)]}
        return [PerceptionRecord(score=peak, threshold=0.5, reason=shown, **found)]

    answer = scripted(["yes"], looks=look, policy="implicit").run([WIDE, TALL], "which?")
    looked = answer.trace.perception
    assert looked is not None and [number for number, _ in answer.evidence] == [1]
    assert (looked.score, looked.reason, looked.route, looked.boxes) == (0.9, "coarse2", "zoom", [])
    peaks["coarse"] = 0.89  # as hot as the other: both are cut out
    answer = scripted(["yes"], looks=look, policy="implicit").run([WIDE, TALL], "which?")
    assert [number for number, _ in answer.evidence] == [0, 1]
    for strange in ({"cutoff": float("inf")}, {"heat": [[]], "cutoff": None}, {"heat": []}):  # of other people's models
        odd = [one.model_copy(update=strange) for one in look([_showing("coarse")])]
        answer = scripted(["yes"], looks=lambda _: odd, policy="implicit").run([WIDE, TALL], "which?")  # noqa: B023
        assert [number for number, _ in answer.evidence] == [0, 1]


def _showing(view: str) -> Message:
    return message("user", image_part(view))


@pytest.mark.parametrize("policy", ["implicit", "hybrid"])
def test_a_look_proposes_regions_of_each_image(policy: str, tmp_path: Path) -> None:
    agent = scripted(["yes"], looks=looked, policy=policy)
    answer = agent.run([WIDE, TALL], "which?", boxes=[[1, 2, 30, 40], Box(5, 6, 50, 60, view="original2")])
    look = answer.trace.perception
    assert look is not None and [(one.image, one.score) for one in look.every] == [(0, 0.9), (1, 0.9)]
    assert [number for number, _ in answer.evidence] == [0, 1]
    first, second = (answer.trace.view(f"crop{at}") for at in (1, 2))
    assert first is not None and second is not None
    assert Box(*look.others[0].boxes[0], view="original2").coverage(second.region) > 0.7
    assert answer.trace.gold == [(1, 2, 30, 40), (5, 6, 50, 60)] and answer.trace.gold_images == [0, 1]
    answer.save(tmp_path)
    loaded = Answer.load(tmp_path)
    assert loaded.trace == answer.trace
    page = render_html(loaded.trace, by_digest(loaded.trace.all_views, loaded.store.image))
    assert page.count('class="stage') == 2 and "Original 2" in page and "in image 2 px" in page
    assert answer._repr_html_().count("<img") == 2
    assert main(["trace", "show", str(tmp_path)]) == 0


def test_switches_and_findings_of_a_report_are_for_all_images() -> None:
    def look(messages: list[Message]) -> list[PerceptionRecord]:
        (shown,) = view_ids(messages)
        if shown == "coarse":
            return [PerceptionRecord(view=shown, score=0.1, threshold=0.5, visual_tokens=30, prompt_tokens=35)]
        boxes = [(28.0, 28.0, 84.0, 84.0)]
        cost = {"visual_tokens": 40, "prompt_tokens": 50, "token_layers": 300.0}
        return [PerceptionRecord(view=shown, score=0.9, threshold=0.5, heat=[[0, 1]], boxes=boxes, cells=boxes, **cost)]

    answer = scripted(["yes"], looks=look, policy="implicit").run([WIDE, TALL], "which?")
    page = render_html(answer.trace, by_digest(answer.trace.all_views, answer.store.image))
    first, second = page.index('class="stage"'), page.index('class="stage s1"')
    assert page.index('class="heat"') > second
    for switch in ("warmth", "boxes", "proposals"):
        assert first < page.index(f'id="{switch}"') < second and page.count(f'id="{switch}"') == 1
        assert f"main:has(#{switch}:" in page
    for fact in ("1 proposed box", "hottest cell 1", "70 visual of 85 tokens", "300 token-layers"):
        assert fact in page


def test_a_review_knows_the_image_of_a_call() -> None:
    """The call is cold on the second image's map, and the region that is offered instead is of that image."""

    def look(messages: list[Message]) -> list[PerceptionRecord]:
        hot = [[0.0, 0.0], [0.0, 1.0]]
        boxes = {"coarse": (140.0, 140.0, 160.0, 160.0), "coarse2": (75.0, 160.0, 138.0, 300.0)}
        (shown,) = view_ids(messages)  # each image is looked at alone
        return [PerceptionRecord(score=0.9, threshold=0.5, heat=hot, boxes=[boxes[shown]], cells=[(0, 0, 1, 1)])]

    call = "ZOOM image 2: 0, 0, 200, 200"
    answer = scripted([call, "yes"], looks=look, policy="hybrid", review={"insert": False}).run([WIDE, TALL], "which?")
    refused = answer.trace.turns[0].calls[0]
    assert (refused.decision, refused.code) == ("refused", "elsewhere")
    same = scripted([call, "yes"], looks=look, policy="hybrid", review={"insert": False}).run(TALL, "which?")
    assert same.trace.turns[0].problems or same.trace.turns[0].answer  # of one image, nothing is called image 2


def test_gold_boxes_budgets_and_mistakes() -> None:
    agent = scripted(["yes"] * 9, policy="oracle")
    gold = [Box(40, 60, 80, 90, view="original2")]
    assert [number for number, _ in agent.run([WIDE, TALL], "which?", boxes=gold).evidence] == [1]
    with pytest.raises(ConfigError, match="refers to the original"):
        agent.run(WIDE, "which?", boxes=gold)
    with pytest.raises(ConfigError, match=r"up to budget.max_views, which is 6; got 7"):
        agent.run([WIDE] * 7, "which?")
    with pytest.raises(ConfigError, match="got 0"):
        agent.run([], "which?")
    one = agent.replace(policy="direct").run([WIDE, TALL], "which?", boxes=[])
    half = agent.replace(policy="direct", budget={"max_visual_tokens": 60}).run([WIDE, TALL], "which?")
    assert half.usage.visual_tokens <= 60 < one.usage.visual_tokens
    with pytest.raises(ImageError, match=r"max_visual_tokens is 2"):
        agent.replace(policy="direct", budget={"max_visual_tokens": 2}).run([WIDE, TALL, WIDE], "which?")


def test_a_batch_a_chat_and_a_saved_run_have_several_images(tmp_path: Path) -> None:
    def reply(messages: list[Message]) -> str:
        return f"{len(view_ids(messages))} {plain_text(messages[-1])[:1]}"

    agent = scripted(reply, policy="direct", state_dir=tmp_path)
    assert [one.text for one in agent.batch([([WIDE, TALL], "a"), (WIDE, "b")])] == ["2 a", "1 b"]
    with agent.chat([WIDE, TALL], thread="two") as chat:
        assert [chat.ask("a").text, chat.ask("b").text] == ["2 a", "2 b"]
    assert [view.id for view in agent.resume("two").trace.all_views] == ["original", "original2", "coarse", "coarse2"]


def test_the_command_line_takes_several_images(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    demo = resources.files("qzoom_agent.data") / "demo"
    boards = [str(demo / "2-scene.png"), str(demo / "1-global.png")]
    assert main(["ask", *boards, "what is the code on the orange circle?", "--report", str(tmp_path / "r.html")]) == 0
    printed = capsys.readouterr()
    assert printed.out.strip()
    assert printed.err.count("look coarse") == 2 and "of image 1" in printed.err
    assert main(["ask", "-", "-", "what?"]) == 2


@pytest.mark.parametrize("protocol", ["qwen3vl", "plain"])
def test_a_system_prompt_joins_what_the_format_says_there(protocol: str) -> None:
    talks: list[list[Message]] = []

    def reply(messages: list[Message]) -> str:
        talks.append(messages)
        return "yes"

    agent = scripted(reply, protocol=protocol, policy="explicit", system="Answer in Latin.")
    with agent.chat(WIDE, history=True) as chat:
        answers = [chat.ask("one?"), chat.ask("two?")]
    assert [one["role"] for one in talks[1]] == ["system", "user", "assistant", "user"]
    said = plain_text(talks[0][0])
    assert said.startswith("Answer in Latin.") and ("image_zoom_in_tool" in said) == (protocol == "qwen3vl")
    assert answers[0].trace.config["system"] == "Answer in Latin."
    assert "system" not in scripted(["yes"], protocol=protocol).run(WIDE, "one?").trace.config


def test_the_gate_names_the_image_that_a_call_is_about() -> None:
    def look(messages: list[Message]) -> list[PerceptionRecord]:
        return [PerceptionRecord(score=0.1, threshold=0.5)]

    for number in (0, 1):
        call = CALLS["qwen3vl"].replace('"img_idx": 1', f'"img_idx": {number}')
        agent = scripted([call, "yes"], protocol="qwen3vl", looks=look, policy="hybrid")
        (refused,) = agent.run([WIDE, TALL], "which?").trace.turns[0].calls
        assert refused.code == "gate" and f"the image with img_idx {number}." in refused.reason


@each_case("scores", [(0.9, 0.1), (0.1, 0.9)])
def test_where_the_gate_fires_for_one_image_it_lets_calls_about_every_image_through(scores: tuple[float, ...]) -> None:
    def look(messages: list[Message]) -> list[PerceptionRecord]:
        (shown,) = view_ids(messages)
        return [PerceptionRecord(score=scores[shown == "coarse2"], threshold=0.5)]

    calls = [CALLS["qwen3vl"].replace('"img_idx": 1', f'"img_idx": {number}') for number in (0, 1)]
    trace = scripted([*calls, "yes"], protocol="qwen3vl", looks=look, policy="hybrid").run([WIDE, TALL], "which?").trace
    assert [call.decision for turn in trace.turns for call in turn.calls] == ["served", "served"]
    assert trace.perception is not None and [one.score for one in trace.perception.every] == [0.9, 0.9]
