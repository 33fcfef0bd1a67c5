"""Own tools: schemas, results of every kind, places of their images in the original, and wrong tools as turns."""

from __future__ import annotations

import asyncio
import json
import math
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from langchain_core.tools import InjectedToolArg, tool
from PIL import Image, ImageChops, ImageDraw, ImageFont, ImageStat

from qzoom_agent.agent import Agent
from qzoom_agent.answer import Answer
from qzoom_agent.errors import BoxError, ConfigError, MissingDependency
from qzoom_agent.geometry import Affine, Box, composed, inverse, mapped
from qzoom_agent.messages import Message
from qzoom_agent.models.scripted import ScriptedBackend
from qzoom_agent.protocols import PROTOCOLS
from qzoom_agent.review import ReviewDecision
from qzoom_agent.views import View, ViewStore
from qzoom_agent.zoom.image_zoom import image_block, png
from qzoom_agent.zoom.own_tools import MOST_CHARACTERS, ToolOutput, find_own_tools
from qzoom_agent.zoom.shipped_tools import enhance, read_text, rotate
from qzoom_agent.zoom.tool_images import AffineImage, Views
from qzoom_agent.zoom.zoom import Zoom, ZoomConfig
from tests.cases import each_case

BUDGET = {"factor": 28, "min_tokens": 16, "max_tokens": 64}
OFFERING = sorted(set(PROTOCOLS) - {"nano"})


def board() -> Image.Image:
    """A white image with a black square at [600, 60, 660, 120]."""
    image = Image.new("RGB", (800, 600), "white")
    ImageDraw.Draw(image).rectangle((600, 60, 659, 119), fill="black")
    return image


def picture() -> Image.Image:
    return Image.new("RGBA", (64, 48), (255, 0, 0, 128))


def store(image: Image.Image | None = None) -> ViewStore:
    found = ViewStore()
    found.add_original(image or board())
    found.add_coarse(**BUDGET)
    return found


def run(given: Any, arguments: dict[str, Any] | None = None, views: ViewStore | None = None) -> ToolOutput:
    (own,) = find_own_tools([given]).values()
    return own(arguments or {}, Views(views or store()), max_pixels=10**7)


def written(protocol: str, name: str, **arguments: Any) -> str:
    """Return a call as a model of this family writes it."""
    if protocol == "plain":
        return f"TOOL: {name} {json.dumps(arguments)}"
    if protocol == "qwen3_5":
        parts = "".join(f"<parameter={key}>\n{value}\n</parameter>\n" for key, value in arguments.items())
        return f"<tool_call>\n<function={name}>\n{parts}</function>\n</tool_call>"
    return f"<tool_call>{json.dumps({'name': name, 'arguments': arguments})}</tool_call>"


def ask(*replies: str | Callable[[list[Message]], str], protocol: str = "qwen3vl", **options: Any) -> Answer:
    left = iter(replies)

    def reply(messages: list[Message]) -> str:
        one = next(left)
        return one if isinstance(one, str) else one(messages)

    options = {"tools": [rotate], "policy": "explicit", **options}
    return Agent(ScriptedBackend(reply, protocol=protocol), **options).run(board(), "what?")


def said(messages: list[Message]) -> str:
    return "".join(part["text"] for part in messages[-1]["content"] if part["type"] == "text")


# ---- schemas and doors ---------------------------------------------------------------------------------------------


def count(image: Image.Image, views: Views, word: str, times: int = 2, marks: list[str] | None = None) -> str:
    """Count something.

    Args:
        image: Where to count.
        word: What to count.
    """
    return f"{word} {times} {image.size} {views.ids} {marks}"


def mean(values: np.ndarray[Any, Any]) -> float:
    """Return a mean."""
    return float(values.mean())


def compare(images: list[Image.Image], mask: Image.Image | None = None) -> str:
    """Compare images."""
    return f"{[image.size for image in images]} {mask and mask.size}"


def test_a_tool_may_take_several_images_or_perhaps_one() -> None:
    (own,) = find_own_tools([compare]).values()
    fields = json.loads(own.schema)["function"]["parameters"]
    assert fields["properties"]["images"]["items"]["type"] == "string" and fields["required"] == ["images"]
    views = store()
    views.add_crop(Box(0, 0, 400, 300), **BUDGET)
    assert run(compare, {"images": ["crop1", "coarse"]}, views).text == "[(400, 300), (800, 600)] None"
    assert run(compare, {"images": [], "mask": "coarse"}).text == "[] (800, 600)"
    assert "There is no image 'crop9'" in run(compare, {"images": ["crop9"]}).error


def test_a_function_becomes_a_schema_without_what_the_model_does_not_write() -> None:
    (own,) = find_own_tools([count]).values()
    function = json.loads(own.schema)["function"]
    assert (function["name"], function["description"]) == ("count", "Count something.")
    fields = function["parameters"]["properties"]
    assert set(fields) == {"image", "word", "times", "marks"} and function["parameters"]["required"] == ["word"]
    assert fields["image"]["type"] == "string" and fields["times"]["type"] == "integer"
    assert fields["word"]["description"] == "What to count."
    assert "\n" not in own.schema and own.reference == f"{__name__}:count"
    assert run(count, {"word": "x", "times": "3"}).text == "x 3 (800, 600) ['coarse'] None"


@pytest.mark.parametrize(
    ("wrong", "told"),
    [
        (lambda: "x", "'<lambda>' cannot be a tool"),
        (7, "got 7"),
        (Zoom, "got <class"),
        (written, "'arguments' of the tool 'written'"),
        (mean, "cannot be written as JSON"),
        (picture, "docstring"),
        ("no_such_tool", "There is no own tool 'no_such_tool'. Known: enhance, read_text, rotate"),
        ("tests.zoom.test_own_tools:nothing", "cannot be imported"),
    ],
)
def test_what_cannot_be_a_tool_is_said_at_once(wrong: Any, told: str) -> None:
    with pytest.raises(ConfigError, match="tool") as error:
        Agent(ScriptedBackend([], protocol="qwen3vl"), tools=[wrong])
    assert told in str(error.value)


def test_what_the_model_writes_reaches_each_parameter_or_the_tool_is_refused() -> None:
    """LangChain takes an argument `config` for its own, and a function may take some by position alone."""

    def shrink(image: Image.Image, by: int, /, times: int = 1, *, label: str = "none") -> str:
        """Shrink an image."""
        return f"{image.size} {by} {times} {label}"

    def scan(config: str = "fast") -> str:
        """Scan."""
        return config

    def count_all(self: int = 1) -> int:
        """Count."""
        return self

    assert run(shrink, {"by": 3, "times": 4, "label": "x"}).text == "(800, 600) 3 4 x"
    assert run(shrink, {"by": 3, "label": "x"}).text == "(800, 600) 3 1 x"
    for taken in (scan, count_all):
        with pytest.raises(ConfigError, match=r"parameter '(config|self)' of .* a name that LangChain keeps .* Rename"):
            find_own_tools([taken])


def test_two_tools_of_one_name_and_the_name_of_zoom_are_refused() -> None:
    with pytest.raises(ConfigError, match="Two of the tools are called 'rotate'"):
        find_own_tools([rotate, "rotate"])

    def image_zoom_in_tool() -> str:
        """Do nothing."""
        return ""

    with pytest.raises(ConfigError, match="name of the zoom tool"):
        ask(tools=[image_zoom_in_tool])


def test_read_text_names_its_extra_before_a_model_is_loaded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "rapidocr", None)
    with pytest.raises(MissingDependency, match=r'The tool \'read_text\' needs .* pip install "qzoom-agent\[ocr\]"'):
        Agent.from_pretrained("qwen3-vl-4b", tools=["read_text"])


@pytest.mark.slow  # loads the models of an OCR program
def test_read_text_reads_print_that_was_turned_upright() -> None:
    pytest.importorskip("rapidocr")
    page = Image.new("RGB", (900, 300), "white")
    ImageDraw.Draw(page).text((40, 40), "TOTAL 42.70 EUR", fill="black", font=ImageFont.load_default(48))
    views = store(page.rotate(180))
    made = run(rotate, {"degrees": 180}, views)
    assert made.image is not None
    views.add_tool_image(made.image, parent=made.parent, matrix=made.matrix, **BUDGET)
    assert run(read_text, {"image": "tool1"}, views).text == "TOTAL 42.70 EUR"
    assert run(read_text, {}, store(Image.new("RGB", (300, 300), "white"))).text == "No text was found."


def test_a_format_without_a_place_for_tools_is_refused_before_weights_are_loaded() -> None:
    with pytest.raises(ConfigError, match="format 'nano' writes zoom calls alone, so the tools rotate cannot") as error:
        Agent.from_pretrained("nano", tools=["rotate"], device="no such device")
    assert "qwen3vl" in str(error.value)


def test_a_run_needs_the_tools_it_was_begun_with(tmp_path: Path) -> None:
    def agent(**options: Any) -> Agent:
        replies = [written("qwen3vl", "rotate"), RuntimeError("stop"), "42"]

        def reply(messages: list[Message]) -> str:
            one = replies[len(done)]
            done.append(1)
            if isinstance(one, RuntimeError):
                raise one
            return one

        return Agent(ScriptedBackend(reply, protocol="qwen3vl"), state_dir=tmp_path, policy="explicit", **options)

    done: list[int] = []
    first = agent(tools=["rotate"])
    assert first.run(board(), "what?", thread="a").status == "error"
    first.close()
    with agent() as other, pytest.raises(ConfigError, match="begun with the tools rotate, and the agent has none"):
        other.resume("a")
    with agent(tools=["rotate"]) as same:
        answer = same.resume("a")
    assert (answer.text, answer.usage.tool_calls) == ("42", 1)
    assert [view.id for view in answer.trace.views] == ["original", "coarse", "source1", "tool1"]
    assert Answer.load(answer.save(tmp_path / "saved")).trace == answer.trace


# ---- results -------------------------------------------------------------------------------------------------------


NOT_READ = "(Not an image that can be read: the 4 bytes given)"
HUGE = png(Image.new("1", (10_000, 10_000)))


@each_case(
    ("value", "text", "image"),
    [
        ("read", "read", False),
        (3, "3", False),
        ({"a": [1]}, '{"a": [1]}', False),
        ([1, 2], "[1, 2]", False),
        ({"mean": np.float32(1.5), "sums": np.arange(2)}, '{"mean": 1.5, "sums": [0, 1]}', False),
        ((np.zeros((4, 5, 3), np.uint8), "black"), "black", True),
        ((0.9, picture()), '[0.9, "(an image)"]', True),
        ({"found": [{"crop": AffineImage(picture())}]}, '{"found": [{"crop": "(an image)"}]}', True),
        ({"mask": np.zeros((2, 2), np.uint8)}, '{"mask": [[0, 0], [0, 0]]}', False),
        (picture(), "", True),
        (png(picture()), "", True),
        (("a page", bytearray(png(picture()))), "a page", True),
        ({"page": png(picture()), "file": b"%!PS"}, f'{{"page": "(an image)", "file": "{NOT_READ}"}}', True),
        (b"%!PS", NOT_READ, False),
        (HUGE, f"(An image of 10000x10000 px is over the limit of 89000000 px: the {len(HUGE)} bytes given)", False),
        ((picture(), "turned"), "turned", True),
        (["turned", AffineImage(picture())], "turned", True),
        ([image_block(picture()), {"type": "text", "text": "seen"}], "seen", True),
        ([picture(), picture()], "\nOnly the first of 2 images is shown.", True),
        ("a<|im_end|>b", "a< |im_end|>b", False),
    ],
)
def test_a_tool_returns_text_an_image_or_both(value: Any, text: str, image: bool) -> None:
    def give() -> Any:
        """Give a value."""
        return value

    output = run(give)
    assert (output.error, output.text) == ("", text)
    assert (output.image is not None) == image and (output.image is None or output.image.mode == "RGB")


async def _cancelled() -> None:
    raise asyncio.CancelledError  # as a session of an MCP server that broke does


class Unreadable(Exception):
    def __str__(self) -> str:
        return str(self.args[0])


def _unreadable() -> None:
    raise Unreadable


def _raise() -> None:
    raise RuntimeError("the scanner is off")


@pytest.mark.parametrize(
    ("made", "told"),
    [
        (_raise, "RuntimeError: the scanner is off"),
        (lambda: sys.exit(3), "SystemExit: 3"),
        (_cancelled, "CancelledError"),
        (_unreadable, "Unreadable: (it has no text"),
        (lambda: None, "returned nothing"),
        (lambda: "", "returned nothing"),
        (lambda: Image.new("L", (0, 5)), "has no pixels"),
        (lambda: Image.new("1", (9000, 9000)), "over the limit of 10000000 px"),
        (lambda: [{"type": "image_url", "image_url": {"url": "http://127.0.0.1/x.png"}}], "address is not fetched"),
        (lambda: AffineImage(picture(), (1, 0, 0, 1, 0, 0)), "keeps no area"),
        (lambda: AffineImage(picture(), (1, 0)), "six numbers"),  # type: ignore[arg-type]
        (lambda: AffineImage(picture(), (1, 0, math.nan, 0, 1, 0)), "finite"),
        (lambda: AffineImage(picture(), of="crop9"), "There is no image 'crop9'"),
    ],
)
def test_a_tool_that_fails_is_a_text_for_the_model(made: Callable[[], Any], told: str) -> None:
    def broken(level: int = 1) -> Any:
        """Break."""
        return made()

    assert told in run(broken).error
    assert "level: Input should be a valid integer" in run(broken, {"level": "high"}).error
    answer = ask(written("qwen3vl", "broken"), lambda messages: said(messages), tools=[broken], max_pixels=10**7)
    assert told in answer.text and answer.trace.turns[0].calls[0].decision == "failed"


def test_an_array_that_is_no_image_is_not_written_out() -> None:
    """As text, one of a photo would take minutes and gigabytes, of which the model reads 8000 characters."""

    def shares(image: Image.Image) -> Any:
        """Give shares."""
        return {"shares": np.broadcast_to(np.float32(0.5), (100_000, 100_000, 3))}

    assert "100000x100000x3 numbers of float32, too many" in run(shares).text


def test_a_long_text_is_cut_off() -> None:
    def long() -> str:
        """Say much."""
        return "x" * (MOST_CHARACTERS + 9)

    text = run(long).text
    assert text.startswith("x" * MOST_CHARACTERS + "\n(cut off") and len(text) < MOST_CHARACTERS + 80


def test_langchain_tools_and_coroutines_run_too() -> None:
    @tool
    def shout(text: str) -> str:
        """Say a text louder."""
        return text.upper()

    @tool(response_format="content_and_artifact")
    def draw(colour: str, views: Annotated[Views, InjectedToolArg]) -> tuple[str, Image.Image]:
        """Draw a colour."""
        return f"beside {views.ids}", Image.new("RGB", (60, 60), colour)

    @tool
    async def wait(seconds: float) -> str:
        """Wait a while."""
        return f"waited {seconds}"

    async def think() -> str:
        """Think a while."""
        return "thought"

    assert run(shout, {"text": "hey"}).text == "HEY"
    drawn = run(draw, {"colour": "red"})
    assert (drawn.text, drawn.matrix) == ("beside ['coarse']", None) and drawn.image is not None
    assert "views" not in json.loads(find_own_tools([draw])["draw"].schema)["function"]["parameters"]["properties"]
    assert run(wait, {"seconds": 2}).text == "waited 2.0" and run(think).text == "thought"


# ---- every format --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("protocol", OFFERING)
def test_every_format_offers_tools_and_shows_their_results(protocol: str) -> None:
    seen: list[list[Message]] = []

    def note(word: str) -> str:
        """Write a word down."""
        return f"noted {word} {{schema}}"

    def keep(reply: str) -> Callable[[list[Message]], str]:
        def told(messages: list[Message]) -> str:
            seen.append(messages)
            return reply

        return told

    answer = ask(
        keep(written(protocol, "rotate", degrees=90)),
        keep(written(protocol, "note", word="owl")),
        keep(written(protocol, "paint", colour="red")),
        keep("42" if protocol != "pixel_reasoner" else "\\boxed{42}"),
        protocol=protocol,
        tools=[rotate, note],
    )
    assert (answer.text, answer.status, answer.usage.tool_calls, answer.usage.requested) == ("42", "answered", 2, 0)
    opening = "".join(part["text"] for one in seen[0] for part in one["content"] if part["type"] == "text")
    assert '"name": "rotate"' in opening and '"name": "note"' in opening and "{schema}" not in opening
    assert "tool1" in said(seen[1]) and {"type": "image", "view": "tool1"} in seen[1][-1]["content"]
    assert "noted owl {schema}" in said(seen[2])
    assert "no tool 'paint'" in said(seen[3]) and "rotate, note" in said(seen[3])
    first, second = (call for turn in answer.trace.turns for call in turn.calls)
    assert (first.decision, first.result, json.loads(first.arguments or "")["degrees"]) in [
        ("served", "tool1", 90),
        ("served", "tool1", 90.0),
    ]
    assert (second.result, second.text) == (None, "noted owl {schema}")
    assert answer.usage.tool_tokens == answer.trace.views[-1].tokens and answer.usage.crop_tokens == 0
    bare = PROTOCOLS[protocol].opening("what?", [answer.trace.views[1]], tools=True)
    assert "rotate" not in json.dumps(bare)


ZOOMS = {
    "qwen3vl": written("qwen3vl", "image_zoom_in_tool", bbox_2d=[0, 500, 500, 1000], img_idx=1),
    "qwen3_5": written("qwen3_5", "image_zoom_in_tool", bbox_2d=[0, 500, 500, 1000], img_idx=1),
    "deepeyes": written("deepeyes", "image_zoom_in_tool", bbox_2d=[0, 154, 112, 308], view="tool1"),
    "mini_o3": '<grounding>{"bbox_2d": [0, 0.5, 0.5, 1], "source": "observation_1"}</grounding>',
    "pixel_reasoner": written("", "crop_image_normalized", bbox_2d=[0.1, 0.6, 0.4, 0.9], target_image=2),
    "adaptvision": written("", "request_local_region", bbox_2d=[0, 154, 112, 308], view="tool1"),
    "plain": "ZOOM tool1: 0, 500, 500, 1000",
}


@pytest.mark.parametrize("protocol", sorted(ZOOMS))
def test_a_zoom_into_a_rotated_image_shows_it_rotated_and_refers_to_the_original(protocol: str) -> None:
    answer = ask(written(protocol, "rotate", degrees=90), ZOOMS[protocol], "42", protocol=protocol)
    made, crop = answer.trace.views[-2:]
    assert (made.id, made.size) == ("tool1", (224, 308))
    assert (crop.id, crop.kind, crop.parent, crop.source) == ("crop1", "crop", "tool1", "source1")
    # The left, lower quarter of the turned image is the upper, left quarter of the original.
    assert crop.box == (0, 0, 400, 300) and answer.boxes == [(0, 0, 400, 300)]
    turned = board().transpose(Image.Transpose.ROTATE_90).crop((0, 400, 300, 800)).resize(crop.size)
    assert ImageStat.Stat(ImageChops.difference(answer.store.image("crop1"), turned)).mean == pytest.approx(
        [0] * 3, abs=1
    )


# ---- places --------------------------------------------------------------------------------------------------------

ANGLES = st.one_of(st.sampled_from([0, 90, 180, 270]), st.floats(-400, 400))


@settings(max_examples=20)
@given(ANGLES, st.booleans(), st.integers(40, 160), st.integers(40, 160))
def test_a_mark_is_found_where_the_map_of_rotate_says(degrees: float, mirror: bool, wide: int, high: int) -> None:
    image = Image.new("RGB", (wide, high), "white")
    ImageDraw.Draw(image).rectangle((5, 8, 14, 17), fill="black")
    turned = rotate(image, degrees, mirror)
    assert turned.matrix is not None
    place = mapped(Box(5, 8, 15, 18), inverse(turned.matrix))
    x, y = (round(value) for value in place.center)
    assert turned.image.getpixel((x, y)) == (0, 0, 0)
    back = mapped(place, turned.matrix)
    assert back.coverage(Box(5, 8, 15, 18)) > 0.999


@settings(max_examples=20)
@given(ANGLES, ANGLES, st.floats(0.1, 5), st.floats(-50, 50))
def test_maps_are_composed_and_undone(first: float, then: float, scale: float, shift: float) -> None:
    a, b = (math.radians(angle) for angle in (first, then))
    one: Affine = (scale * math.cos(a), -math.sin(a), shift, math.sin(a), scale * math.cos(a), -shift)
    two: Affine = (math.cos(b), -math.sin(b), 3.0, math.sin(b), math.cos(b), 5.0)
    assert composed(composed(one, two), inverse(composed(one, two))) == pytest.approx((1, 0, 0, 0, 1, 0), abs=1e-6)
    box = mapped(Box(3, 4, 3, 4), one)
    assert mapped(box, two).as_list() == pytest.approx(mapped(Box(3, 4, 3, 4), composed(one, two)).as_list())


def test_a_tool_of_a_tool_and_of_a_crop_keeps_the_place() -> None:
    views = store()
    views.add_crop(Box(500, 0, 800, 200), **BUDGET)
    (own,) = find_own_tools([rotate]).values()
    for name in ("crop 1", "tool1"):
        made = own({"image": name}, Views(views), max_pixels=10**6)
        assert made.image is not None
        views.add_tool_image(made.image, parent=made.parent, matrix=made.matrix, **BUDGET)
    twice = views.view("tool2")
    assert (twice.parent, twice.source, twice.box) == ("source2", "source2", (500, 0, 800, 200))
    mark = twice.from_original(Box(600, 60, 660, 120))
    assert ImageStat.Stat(views.image("tool2").crop([round(side) for side in mark.as_list()])).mean[0] < 60
    assert twice.to_original(mark).as_list() == pytest.approx([600, 60, 660, 120])
    again = View(**json.loads(twice.model_dump_json()))
    assert again == twice


def test_views_are_named_by_id_first_and_then_as_the_format_names_them() -> None:
    views = store()
    views.add_tool_image(Image.new("RGB", (90, 90)), **BUDGET)
    views.add_crop(Box(0, 0, 90, 90), **BUDGET)
    counted = Views(views, names=["the first image", "crop 1", "crop 2"])
    names = ("coarse", "", "The first image", "original", "tool_1", "crop1", "crop 1", "crop 2")
    assert [counted.view(name).id for name in names] == [*["coarse"] * 4, "tool1", *["crop1"] * 3]
    counted.image("tool1").paste("red", (0, 0, 9, 9))
    assert views.image("source1").getpixel((0, 0)) == (0, 0, 0), "a tool gets a copy"


def test_the_tool_of_a_second_image_and_zooms_into_it_refer_to_that_image() -> None:
    calls = [
        written("qwen3vl", "rotate", image="coarse2", degrees=180),
        written("qwen3vl", "image_zoom_in_tool", bbox_2d=[0, 0, 500, 500], img_idx=2),
    ]
    asked: list[Any] = []
    agent = Agent(
        ScriptedBackend([*calls, "42"], protocol="qwen3vl"),
        tools=[rotate],
        policy="explicit",
        approve=lambda call: asked.append(call) is None,
    )
    answer = agent.run([Image.new("RGB", (300, 300)), board()], "which?")
    made, crop = answer.trace.views[-2:]
    assert (made.id, made.parent, made.image, made.origin) == ("tool1", "source1", 1, "original2")
    assert (crop.source, crop.image, crop.box) == ("source1", 1, (400, 300, 800, 600))
    assert asked[1].box == crop.box and asked[1].image == 1
    turned = board().rotate(180).crop((0, 0, 400, 300)).resize(crop.size)
    assert ImageStat.Stat(ImageChops.difference(answer.store.image("crop1"), turned)).mean[0] < 1


def test_an_image_without_a_place_is_zoomed_into_as_itself() -> None:
    views = store()
    chart = Image.linear_gradient("L").resize((900, 300)).convert("RGB")
    view = views.add_tool_image(chart, **BUDGET)
    assert not view.placed and view.box == (0, 0, 800, 600)
    with pytest.raises(BoxError, match="no place in the original"):
        view.to_original(Box(0, 0, 9, 9, view="tool1"))
    result = Zoom(ZoomConfig(**BUDGET))(views, Box(0, 0, 500, 1000, "per_mille", "tool1"))
    assert result.view is not None and (result.view.id, result.view.kind) == ("tool2", "tool")
    assert result.view.inside == (0, 0, 450, 300)


# ---- budgets and review --------------------------------------------------------------------------------------------


def test_images_of_tools_count_in_the_budgets_and_are_shown_once() -> None:
    turns = [written("qwen3vl", "rotate", degrees=degrees) for degrees in (90, 90, 180)]
    answer = ask(*turns, lambda messages: said(messages), budget={"max_views": 3})
    calls = [call for one in answer.trace.turns for call in one.calls]
    assert [(call.decision, call.code, call.result) for call in calls] == [
        ("served", "", "tool1"),
        ("refused", "repeated", None),
        ("served", "", "tool2"),
    ]
    assert calls[1].reason == "This image was already shown: it is tool1."
    full = ask(*turns[1:], lambda messages: said(messages[:-1]), budget={"max_views": 2})
    assert [call.code for one in full.trace.turns for call in one.calls] == ["", "budget"] and full.status == "budget"
    assert full.text == "Error: The image is not shown. No more zooming: 2 of 2 views were shown."
    few = ask(turns[0], lambda messages: said(messages), budget={"max_visual_tokens": 100, "coarse_tokens": 50})
    assert few.usage.tool_tokens == 0 and "visual tokens" in few.text


def test_the_report_shows_calls_of_tools_and_their_images(tmp_path: Path) -> None:
    def note(word: str) -> str:
        """Write a word down."""
        return f"noted {word}"

    def chart(image: Image.Image) -> Image.Image:
        """Draw a chart."""
        return image.convert("L").resize((300, 300))

    far = written("qwen3vl", "image_zoom_in_tool", bbox_2d=[1200, 0, 1300, 90], img_idx=2)
    calls = [written("qwen3vl", "rotate"), written("qwen3vl", "note", word="<owl>"), written("qwen3vl", "chart"), far]
    answer = ask(*calls, "42", tools=[rotate, note, chart])
    assert answer.trace.turns[3].calls[0].view == "tool2" and answer.trace.turns[3].calls[0].decision == "failed"
    page = answer.report(tmp_path / "report.html").read_text(encoding="utf-8")
    assert "Image tool1 of rotate" in page and "3 calls of other tools" in page
    assert "noted &lt;owl&gt;" in page and "<owl>" not in page and page.count("not shown") == 3


def test_a_rule_may_review_own_tools() -> None:
    class Rule:
        def __call__(self, plan: Any, shown: Any, context: Any) -> ReviewDecision:
            raise AssertionError

        def review_tool(self, call: Any, shown: Any, context: Any) -> ReviewDecision:
            return ReviewDecision("upright", {"seen": float(len(shown))}, "It is upright.")

    answer = ask(written("qwen3vl", "rotate"), lambda messages: said(messages), rule=Rule())
    (call,) = answer.trace.turns[0].calls
    assert (call.decision, call.code, call.numbers) == ("refused", "upright", {"seen": 1.0})
    assert answer.text == "Error: It is upright."


def test_policies_without_tools_offer_none() -> None:
    answer = ask(lambda messages: json.dumps(messages), policy="direct")
    assert "rotate" not in answer.text and answer.trace.config["own_tools"] == ["qzoom_agent.zoom.shipped_tools:rotate"]


def test_enhance_has_more_contrast_and_the_same_place() -> None:
    faint = Image.linear_gradient("L").resize((400, 300)).point(lambda value: 100 + value // 8).convert("RGB")
    output = run(enhance, {"contrast": 3}, store(faint))
    assert output.image is not None and output.matrix == (1, 0, 0, 0, 1, 0)
    assert ImageStat.Stat(output.image).stddev[0] > 2 * ImageStat.Stat(faint).stddev[0]
