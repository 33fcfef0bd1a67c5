"""The zoom and propose tools as LangChain tools: crops as image blocks, bad calls as text."""

import asyncio
import base64
import io

import pytest
from PIL import Image

from qzoom_agent.geometry import Box
from qzoom_agent.trace import PerceptionRecord
from qzoom_agent.views import ViewStore
from qzoom_agent.zoom import Propose, Zoom, ZoomConfig, ZoomResult, zoom_schema
from qzoom_agent.zoom.image_zoom import NAME
from qzoom_agent.zoom.langchain import as_langchain_tool


@pytest.fixture
def store():
    store = ViewStore()
    store.add_original(Image.linear_gradient("L").resize((900, 700)).convert("RGB"))
    store.add_coarse(factor=28, min_tokens=16, max_tokens=64)
    return store


@pytest.fixture
def tool(store):
    return as_langchain_tool(Zoom(ZoomConfig(min_tokens=32, max_tokens=64)), store)


def call(tool, **arguments):
    return tool.invoke({"type": "tool_call", "id": "call-1", "name": NAME, "args": arguments})


def test_the_two_forms_agree(tool):
    from langchain_core.utils.function_calling import convert_to_openai_tool

    ours, theirs = zoom_schema()["function"], convert_to_openai_tool(tool)["function"]
    assert (ours["name"], ours["description"]) == (theirs["name"], theirs["description"])
    assert ours["parameters"]["properties"] == theirs["parameters"]["properties"]
    assert ours["parameters"]["required"] == theirs["parameters"]["required"]


def test_a_call_gives_text_an_image_and_the_result(tool, store):
    found = call(tool, bbox_2d=[200, 100, 210, 110], view="coarse", label="code")
    assert found.status == "success" and found.tool_call_id == "call-1"
    assert isinstance(found.artifact, ZoomResult)
    assert found.artifact.served == (170, 59, 198, 87) and found.artifact.label == "code"
    text, image = found.content
    assert text["text"] == (
        "View 'crop1' (168x168 px) shows [170, 59, 198, 87] of the original 900x700 px. "
        "Box grown from 9x7 to 28x28 px around its centre."
    )
    assert (image["type"], image["mime_type"]) == ("image", "image/png")
    shown = Image.open(io.BytesIO(base64.b64decode(image["base64"])))
    assert shown.convert("RGB") == store.image("crop1")
    assert [block["type"] for block in found.content_blocks] == ["text", "image"]


def test_a_crop_of_a_second_image_is_described_by_the_size_of_that_image(tool, store):
    store.add_original(Image.new("RGB", (300, 600)), number=1)
    store.add_coarse(factor=28, min_tokens=16, max_tokens=64, number=1)
    text = call(tool, bbox_2d=[0, 0, 500, 500], view="coarse2").content[0]["text"]
    assert "shows [0, 0, 150, 300] of the original2 300x600 px." in text


def test_a_second_call_can_zoom_into_the_first(tool):
    call(tool, bbox_2d=[0, 0, 500, 500])
    assert call(tool, bbox_2d=[500, 500, 1000, 1000], view="crop1").artifact.served == (225, 175, 450, 350)


def test_the_frame_is_the_tools(store):
    tool = as_langchain_tool(Zoom(), store, frame="pixel")
    assert call(tool, bbox_2d=[28, 28, 84, 112]).artifact == Zoom()(
        _same(store), Box(28, 28, 84, 112, view="coarse")
    ).model_copy(update={"view": store.view("crop1")})
    assert store.view("crop1").box == (100, 100, 300, 400)


def _same(store):
    fresh = ViewStore()
    fresh.add_original(store.image("original"))
    fresh.add_coarse(factor=28, min_tokens=16, max_tokens=64)
    return fresh


def test_a_box_that_means_nothing_comes_back_as_text(tool, store):
    found = call(tool, bbox_2d=[1200, 0, 1300, 10])
    assert found.status == "error"
    assert [block["type"] for block in found.content] == ["text"]
    assert "lies outside" in found.content[0]["text"] and "0 to 1000" in found.content[0]["text"]
    assert found.artifact.error == found.content[0]["text"]
    assert len(store.shown) == 1


@pytest.mark.parametrize(
    "arguments",
    [
        {},
        {"bbox_2d": [1, 2, 3]},
        {"bbox_2d": [1, 2, 3, 4, 5]},
        {"bbox_2d": "here"},
        {"bbox_2d": [1, 2, 3, "x"]},
        {"bbox_2d": [1, 2, 3, 10**400]},
        {"bbox_2d": [1, 2, 3, 4], "zoom": 2},
        {"bbox_2d": [1, 2, 3, 4], "view": 7},
        {"bbox_2d": [1, 2, 3, 4], "view": "crop9"},
        {"bbox_2d": [1, 2, 3, 4], "img_idx": 1},
        {"bbox_2d": [1, 2, 3, 4], "img_idx": "first"},
        {"bbox_2d": [300, 200, 1900, 1100]},
        {"label": None},
    ],
)
def test_bad_arguments_come_back_as_text(tool, store, arguments):
    found = call(tool, **arguments)
    assert found.status == "error"
    assert found.content.startswith("The zoom call could not be read. ")
    assert "four numbers [x1, y1, x2, y2]" in found.content and "0 to 1000" in found.content
    assert len(store.shown) == 1


@pytest.mark.parametrize(
    "arguments",
    [
        {"bbox_2d": [200, 100, 600, 500], "img_idx": 0},
        {"bbox_2d": [200, 100, 600, 500], "img_idx": "0", "label": None, "view": None},
        {"bbox_2d": "[200, 100, 600, 500]"},
        {"bbox_2d": "200-100-600-500"},
        {"bbox_2d": "20%, 10%, 60%, 50%"},
        {"bbox_2d": [0.2, 0.1, 0.6, 0.5]},
        {"bbox_2d": [[200, 100, 600, 500]]},
        {"bbox_2d": [[200, 100], [600, 500]]},
        {"bbox_2d": {"x1": 200, "y1": 100, "x2": 600, "y2": 500}},
        {"bbox_2d": {"x": 200, "y": 100, "width": 400, "height": 400}},
        {"bbox": [200, 100, 600, 500], "label": None},
        {"box_2d": [100, 200, 500, 600]},
        {"x1": 200, "y1": 100, "x2": 600, "y2": 500},
    ],
)
def test_what_the_text_protocols_mend_is_mended_here_too(tool, arguments):
    found = call(tool, **arguments)
    assert found.status == "success", found.content
    assert found.artifact.served == (180, 70, 540, 350) and found.artifact.label == ""
    read_as_shares = "read as shares" in found.content[0]["text"]
    assert read_as_shares is (arguments.get("bbox_2d") in ([0.2, 0.1, 0.6, 0.5], "20%, 10%, 60%, 50%"))


def test_an_unknown_view_is_an_error_that_names_the_views(tool):
    found = call(tool, bbox_2d=[1, 2, 3, 4], view="crop9")
    assert found.status == "error" and "the views are original, coarse" in found.content


def test_a_store_of_one_image_is_enough():
    store = ViewStore()
    store.add_original(Image.new("RGB", (900, 700)))
    found = call(as_langchain_tool(Zoom(), store), bbox_2d=[200, 100, 600, 500])
    assert found.artifact.served == (180, 70, 540, 350)
    assert [view.id for view in store.views] == ["original", "coarse", "crop1"]


def test_the_tool_runs_asynchronously_with_the_same_status(tool):
    ask = {"type": "tool_call", "id": "1", "name": NAME, "args": {"bbox_2d": [1200, 0, 1300, 10]}}
    assert asyncio.run(tool.ainvoke(ask)).status == "error"


def test_the_name_of_before_gives_the_same_function():
    from qzoom_agent import zoom

    assert zoom.as_langchain_tool is as_langchain_tool


def test_proposals_are_a_tool_too(store):
    found = PerceptionRecord(score=0.9, threshold=0.5, route="zoom", boxes=[(225, 175, 450, 350)])
    tool = Propose(lambda *_: found).as_langchain_tool(store)
    message = tool.invoke({"type": "tool_call", "id": "1", "name": tool.name, "args": {"question": "what?"}})
    assert message.content.startswith("Look closer at [250")
    assert message.artifact.boxes == found.boxes
