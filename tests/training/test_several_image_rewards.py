"""Rewards of rollouts about several images, and of those that called own tools."""

import json
from typing import Any

import pytest
from PIL import Image

from qzoom_agent.agent import Agent
from qzoom_agent.data.samples import Sample
from qzoom_agent.geometry import Box
from qzoom_agent.messages import Message
from qzoom_agent.models.scripted import ScriptedBackend
from qzoom_agent.trace import PerceptionRecord
from qzoom_agent.training.rewards import Agreement, Coverage, CropArea, FirstCrop, Redundant, Rollout

IMAGES = [Image.new("RGB", (800, 400)), Image.new("RGB", (400, 600))]
SECOND = {"name": "image_zoom_in_tool", "arguments": {"bbox_2d": [0, 0, 200, 500], "img_idx": 1}}
LEFT, RIGHT = (0, 0, 200, 400), (240, 0, 400, 400)
INSIDE, ELSEWHERE = Box(10, 10, 60, 200, view="original2"), Box(10, 10, 60, 200)


def rolled(calls: list[dict[str, Any]], *boxes: Box, looks: Any = None, **options: Any) -> Rollout:
    replies = [f"<tool_call>{json.dumps(call)}</tool_call>" for call in calls]
    backend = ScriptedBackend([*replies, "407"], protocol="qwen3vl", looks=looks)
    trace = Agent(backend, **{"policy": "explicit", **options}).run(IMAGES, "Which?").trace
    return Rollout(trace, Sample("", "", "", IMAGES[0], "Which?", "407", boxes=boxes))


@pytest.mark.parametrize(("boxes", "shown"), [([INSIDE], 1.0), ([ELSEWHERE], 0.0), ([INSIDE, ELSEWHERE], 0.0)], ids=str)
def test_a_crop_shows_boxes_of_its_own_image_alone(boxes: list[Box], shown: float) -> None:
    one = rolled([SECOND], *boxes)
    assert [*Coverage()([one]), *FirstCrop()([one])] == [shown, shown]
    assert CropArea()([one]) == [pytest.approx(-0.1)]  # of the second image


def test_the_image_of_a_tool_is_no_crop() -> None:
    one = rolled([{"name": "rotate", "arguments": {}}, SECOND], ELSEWHERE, tools=["rotate"])
    assert [crop.id for crop in one.crops] == ["crop1"]
    assert FirstCrop()([one]) == [0.0] and CropArea()([one]) == [pytest.approx(-0.1)]


def test_a_crop_of_an_image_that_has_no_place_in_the_original_shows_no_box() -> None:
    def chart() -> Image.Image:
        """Draw a chart."""
        return Image.new("RGB", (300, 300))

    replies = ["TOOL: chart {}", "ZOOM tool 1: 0, 0, 400, 400", "407"]
    trace = (
        Agent(ScriptedBackend(replies, protocol="plain"), policy="explicit", tools=[chart]).run(IMAGES[0], "?").trace
    )
    one = Rollout(trace, Sample("", "", "", IMAGES[0], "?", "407", boxes=(ELSEWHERE,)))
    assert [crop.source for crop in one.crops] == ["source1"]
    assert [*FirstCrop()([one]), *Coverage()([one])] == [0.0, 0.0]


def test_crops_are_compared_with_the_look_at_their_own_image() -> None:
    def looks(messages: list[Message]) -> list[PerceptionRecord]:
        left = {"heat": [[1.0, 0.0]], "boxes": [(0, 0, 56, 112)], "cells": [(0, 0, 1, 1)]}
        return [PerceptionRecord(score=0.9, threshold=0.5, **left)]

    one = rolled([], looks=looks, policy="implicit", perception={"margin": 0})
    assert {crop.origin for crop in one.trace.views if crop.kind == "crop"} == {"original", "original2"}
    (heat,), (iou,) = Agreement(measure="heat")([one]), Agreement(measure="iou")([one])
    assert heat is not None and 0 < heat <= 0.5 and iou == pytest.approx(1.0, abs=0.05)


def test_a_crop_is_unwanted_by_the_look_at_its_own_image() -> None:
    one = rolled([SECOND])  # (0, 0, 80, 300) of the second image
    left, right = ({"heat": heat, "boxes": [box]} for heat, box in (([[1.0, 0.0]], LEFT), ([[0.0, 1.0]], RIGHT)))
    found = []
    for first, second in ((right, left), (left, right)):
        other = PerceptionRecord(image=1, score=0.9, threshold=0.5, **second)
        one.trace.perception = PerceptionRecord(score=0.9, threshold=0.5, others=[other], **first)
        found += Redundant(opinions=True)([one])
    assert found == [0.0, -1.0]


def test_no_map_says_that_the_coarse_views_suffice_where_one_has_a_region() -> None:
    def looks(messages: list[Message]) -> list[PerceptionRecord]:
        if "coarse2" not in str(messages):
            return [PerceptionRecord(heat=[[1.0, 1.0]])]
        return [PerceptionRecord(heat=[[1.0, 0.0]], boxes=[(0, 0, 56, 112)], cells=[(0, 0, 1, 1)])]

    one = rolled(
        [], looks=looks, policy="implicit", perception={"gate": "statistics", "peak_to_mean": 1.1, "margin": 0}
    )
    assert [crop.origin for crop in one.trace.views if crop.kind == "crop"] == ["original2"]
    assert Agreement(measure="iou")([one]) == [pytest.approx(1.0, abs=0.05)]
