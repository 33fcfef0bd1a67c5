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
from qzoom_agent.training.rewards import Agreement, Coverage, CropArea, FirstCrop, Rollout

IMAGES = [Image.new("RGB", (800, 400)), Image.new("RGB", (400, 600))]
SECOND = {"name": "image_zoom_in_tool", "arguments": {"bbox_2d": [0, 0, 200, 500], "img_idx": 1}}
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


def test_crops_are_compared_with_the_look_at_their_own_image() -> None:
    def looks(messages: list[Message]) -> list[PerceptionRecord]:
        left = {"heat": [[1.0, 0.0]], "boxes": [(0, 0, 56, 112)], "cells": [(0, 0, 1, 1)]}
        return [PerceptionRecord(score=0.9, threshold=0.5, **left)]

    one = rolled([], looks=looks, policy="implicit", perception={"margin": 0})
    assert {crop.origin for crop in one.trace.views if crop.kind == "crop"} == {"original", "original2"}
    (heat,), (iou,) = Agreement(measure="heat")([one]), Agreement(measure="iou")([one])
    assert heat is not None and 0 < heat <= 0.5 and iou == pytest.approx(1.0, abs=0.05)
