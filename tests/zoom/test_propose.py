"""Proposals say where to look in the frame that was asked for, or that nothing stands out."""

import pytest
from PIL import Image

from qzoom_agent.geometry import Frame
from qzoom_agent.trace import PerceptionRecord
from qzoom_agent.views import ViewStore
from qzoom_agent.zoom import Propose, propose_schema

FOUND = PerceptionRecord(score=0.9, threshold=0.5, route="zoom", boxes=[(100, 50, 200, 100), (0, 0, 400, 200)])


def store() -> ViewStore:
    made = ViewStore()
    made.add_original(Image.new("RGB", (400, 200)))
    return made


@pytest.mark.parametrize(
    ("frame", "first"),
    [("pixel", "[100, 50, 200, 100]"), ("unit", "[0.25, 0.25, 0.5, 0.5]"), ("per_mille", "[250, 250, 500, 500]")],
)
def test_boxes_are_written_in_the_frame_asked_for(frame: Frame, first: str) -> None:
    asked: list[tuple[tuple[int, int], str]] = []

    def look(image: Image.Image, question: str) -> PerceptionRecord:
        asked.append((image.size, question))
        return FOUND

    found = Propose(look, frame=frame)(store(), "what?")
    assert asked == [((400, 200), "what?")]
    assert found.boxes == FOUND.boxes
    assert f"Look closer at {first}, then [" in found.text
    assert "probability 0.90" in found.text


def test_pixels_of_a_large_image_are_written_in_full() -> None:
    large = ViewStore()
    large.add_original(Image.new("RGB", (20_000, 100)))
    found = Propose(lambda *_: PerceptionRecord(boxes=[(12_344, 10.4, 12_399, 90)]), frame="pixel")(large, "what?")
    assert "Look closer at [12344, 10.4, 12399, 90], in pixel" in found.text


def test_nothing_proposed_is_said_with_its_reason() -> None:
    calm = PerceptionRecord(score=0.01, threshold=0.5, reason="the gate says that the coarse view suffices")
    found = Propose(lambda *_: calm)(store(), "what?")
    assert found.boxes == []
    assert "the gate says that the coarse view suffices" in found.text


def test_the_schema_names_its_argument() -> None:
    function = propose_schema()["function"]
    assert function["parameters"]["required"] == ["question"]
    assert set(function["parameters"]["properties"]) == {"question"}
