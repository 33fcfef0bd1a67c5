"""Redundant crops, counted from the truth: needless, repeated, missed."""

from dataclasses import replace
from typing import Any

from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from qzoom_agent.evaluation.redundancy import Redundancy, count, reasons
from qzoom_agent.geometry import Box
from qzoom_agent.views import View, ViewStore

NOTE, CELL = Box(100, 100, 180, 130), Box(500, 400, 580, 430)
AROUND_NOTE, AROUND_CELL = Box(60, 60, 220, 170), Box(460, 360, 620, 470)
ELSEWHERE = Box(300, 20, 420, 100)


def views(*crops: Box, tokens: tuple[int, int] = (40, 64), coarse: int = 64) -> list[View]:
    store = ViewStore()
    store.add_original(Image.new("RGB", (700, 600)))
    store.add_coarse(factor=28, min_tokens=16, max_tokens=coarse)
    for box in crops:
        store.add_crop(box, factor=28, min_tokens=tokens[0], max_tokens=tokens[1])
    return store.views


def why(shown: list[View], *needles: Box, **known: Any) -> list[str | None]:
    return [reason for _, reason in reasons(shown, needles, **{"coarse_suffices": False, **known})]


def test_crops_that_show_the_needles_are_not_redundant() -> None:
    assert why(views(AROUND_NOTE), NOTE) == [None]
    assert why(views(AROUND_NOTE, AROUND_CELL), NOTE, CELL) == [None, None]
    assert why(views(AROUND_CELL, AROUND_NOTE), NOTE, CELL) == [None, None]


def test_every_crop_is_needless_where_the_coarse_view_suffices() -> None:
    assert why(views(AROUND_NOTE, ELSEWHERE), coarse_suffices=True) == ["needless", "needless"]


def test_a_crop_without_a_needle_missed() -> None:
    assert why(views(ELSEWHERE, AROUND_NOTE), NOTE) == ["missed", None]
    assert why(views(Box(60, 60, 175, 170)), NOTE) == ["missed"]  # it cuts off a sixteenth of the needle
    assert why(views(Box(60, 60, 177, 170)), NOTE) == [None]


def test_a_crop_of_what_was_shown_is_repeated() -> None:
    assert why(views(AROUND_NOTE, AROUND_NOTE), NOTE) == [None, "repeated"]
    assert why(views(ELSEWHERE, ELSEWHERE), NOTE) == ["missed", "repeated"]
    # another place, but the only needle in it was shown as well before
    assert why(views(AROUND_NOTE, Box(90, 90, 300, 250)), NOTE) == [None, "repeated"]
    # a larger picture of pixels that were all shown
    assert why(views(AROUND_NOTE, Box(95, 95, 185, 135)), NOTE) == [None, "repeated"]


def test_one_crop_may_show_both_needles_and_the_next_adds_nothing() -> None:
    both = Box(90, 90, 590, 440)
    shown = views(both, AROUND_NOTE, AROUND_CELL, tokens=(40, 600))
    assert why(shown, NOTE, CELL) == [None, "repeated", "repeated"]


def test_more_detail_is_not_a_repetition() -> None:
    wide = Box(0, 0, 400, 400)
    assert why(views(wide, AROUND_NOTE), NOTE) == [None, None]
    first, second = views(wide, AROUND_NOTE)[2:]
    assert first.width / 400 < 0.7
    assert second.width / 160 > 1


def test_a_coarse_view_in_full_detail_leaves_nothing_to_a_crop() -> None:
    assert why(views(AROUND_NOTE, coarse=600), NOTE) == ["repeated"]


def test_where_nothing_is_known_only_repetition_is_seen() -> None:
    assert why(views(AROUND_NOTE, ELSEWHERE, AROUND_NOTE), coarse_suffices=None) == [None, None, "repeated"]


def test_a_crop_of_a_turned_image_repeats_what_that_image_has_shown() -> None:
    store = ViewStore()
    store.add_original(Image.new("RGB", (1400, 1000)))
    store.add_coarse(factor=28, min_tokens=16, max_tokens=64)
    budget = {"factor": 28, "min_tokens": 16, "max_tokens": 64}
    turned = Image.new("RGB", (1000, 1400), "white")
    store.add_tool_image(turned, matrix=(0, -1, 1400, 1, 0, 0), **budget)
    for place in (NOTE, NOTE, ELSEWHERE):
        store.add_crop(replace(place, view="source1"), parent="tool1", **budget)
    found = reasons(store.views, [], coarse_suffices=None)
    assert found == [("crop1", None), ("crop2", "repeated"), ("crop3", None)]


def test_counts_add_up() -> None:
    one = count(views(ELSEWHERE, AROUND_NOTE, AROUND_NOTE), [NOTE], coarse_suffices=False)
    assert one == Redundancy(crops=3, needless=0, repeated=1, missed=1)
    other = count(views(AROUND_NOTE), [], coarse_suffices=True)
    assert other == Redundancy(crops=1, needless=1) and one.redundant == 2
    assert count(views(), [NOTE], coarse_suffices=False) == Redundancy()


places = st.tuples(st.integers(0, 600), st.integers(0, 500), st.integers(28, 300), st.integers(28, 300)).map(
    lambda four: Box(four[0], four[1], min(700, four[0] + four[2]), min(600, four[1] + four[3]))
)


@given(crops=st.lists(places, max_size=4), suffices=st.sampled_from([True, False, None]), needles=st.integers(0, 2))
def test_each_crop_has_one_reason_at_most_and_asking_twice_is_always_redundant(
    crops: list[Box], suffices: bool | None, needles: int
) -> None:
    shown = views(*crops, *crops)
    gold = [NOTE, CELL][:needles]
    found = reasons(shown, gold, coarse_suffices=suffices)
    assert [id for id, _ in found] == [view.id for view in shown if view.kind == "crop"]
    assert all(reason is not None for _, reason in found[len(crops) :])
    total = count(shown, gold, coarse_suffices=suffices)
    assert total.redundant == sum(reason is not None for _, reason in found) <= total.crops == 2 * len(crops)
