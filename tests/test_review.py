"""The review's rules, each alone and then together: which call is served, moved or refused, and on what numbers."""

import math
from collections.abc import Callable, Sequence
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from qzoom_agent.config import AgentConfig, ReviewConfig, ViewBudget
from qzoom_agent.geometry import Box, Size, fit_tokens, tokens
from qzoom_agent.policy import CropPolicy
from qzoom_agent.review import (
    BestView,
    Heat,
    ReviewContext,
    ReviewDecision,
    adds_nothing,
    best_view,
    cut_region,
    density,
    format_box,
    gap,
    hotter_region,
    refused_on_opinion,
    suffices,
)
from qzoom_agent.trace import CallRecord, PerceptionRecord
from qzoom_agent.views import View
from qzoom_agent.zoom.zoom import ZoomPlan
from tests.cases import each_case

SIZE = Size(900, 600)
VIEWS = ViewBudget(factor=28, coarse_min_tokens=16, coarse_max_tokens=64, crop_min_tokens=40, crop_max_tokens=64)
HOT = Box(600, 100, 800, 300)
"""Where the map below is hot: columns 6 and 7, rows 1 and 2 of 9 x 6 cells of 100 pixels."""
COLD = Box(0, 400, 200, 600)
RULES = ReviewConfig()


def view(kind: Any, box: Box, size: tuple[int, int], number: int = 1) -> View:
    name = f"crop{number}" if kind == "crop" else kind
    return View(
        id=name, parent=None, kind=kind, box=(box.x1, box.y1, box.x2, box.y2), width=size[0], height=size[1],
        digest="a" * 64, tokens=tokens(size, 28),
    )  # fmt: skip


COARSE = view("coarse", Box(0, 0, *SIZE), (252, 168))


def plan(box: Box) -> ZoomPlan:
    size = fit_tokens((int(box.width), int(box.height)), factor=28, min_tokens=40, max_tokens=64)
    return ZoomPlan("coarse", box, size, tokens(size, 28))


def crop(box: Box, number: int = 1) -> View:
    return view("crop", box, plan(box).size, number)


def look(*, score: float | None = 0.9, regions: Sequence[Box] = (HOT,), background: float = 0.02) -> PerceptionRecord:
    heat = [[background] * 9 for _ in range(6)]
    for row in (1, 2):
        for column in (6, 7):
            heat[row][column] = 0.8
    return PerceptionRecord(
        score=score, threshold=None if score is None else 0.5, heat=heat,
        boxes=[(one.x1, one.y1, one.x2, one.y2) for one in regions], route="zoom" if regions else "direct",
    )  # fmt: skip


NO_NEED = PerceptionRecord(score=0.1, threshold=0.5, route="direct")


def review(
    box: Box,
    *,
    shown: Sequence[View] = (COARSE,),
    found: PerceptionRecord | None = None,
    refused_turns: int = 0,
    crops_read: int | None = None,
    policy: str = "hybrid",
    replan: Callable[[Box], ZoomPlan] = plan,
    **settings: Any,
) -> ReviewDecision:
    read = sum(one.kind == "crop" for one in shown) if crops_read is None else crops_read
    config = AgentConfig().replace(policy=policy, **settings)
    rules = CropPolicy(config, VIEWS, perceives=True)
    context = ReviewContext(
        look=look() if found is None else found, refused_turns=refused_turns, crops_read=read, image=SIZE,
        replan=replan, name=lambda name: f"<{name}>", write=lambda one: f"<{one.as_list()}>",
        config=config.review, map_decides=config.perception.gate == "statistics",
    )  # fmt: skip
    return rules.review(shown, plan(box), context)


# ---- facts, alone --------------------------------------------------------------------------------------------------


def test_density_is_shown_pixels_per_pixel_along_a_side() -> None:
    assert density(Size(252, 168), Box(0, 0, 900, 600)) == pytest.approx(0.28)
    assert density(Size(10, 10), Box(5, 5, 5, 5)) == 0


def test_the_densest_view_that_holds_a_box_shows_it_best() -> None:
    box = Box(300, 200, 400, 300)
    wide, tight, beside = crop(Box(200, 100, 600, 400)), crop(box, 2), crop(Box(350, 200, 450, 300), 3)
    assert best_view(box, [COARSE, wide, tight, beside], covered=0.9).view == "crop2"
    assert best_view(box, [COARSE, wide, beside], covered=0.9).view == "crop1"
    assert best_view(box, [COARSE, beside], covered=0.9).view == "coarse"
    nothing = best_view(box, [beside], covered=0.9)
    assert (nothing.view, nothing.share) == ("crop3", 0.5)


@each_case(
    ("share", "seen", "crop_density", "settings", "code"),
    [
        (1.0, 0.5, 0.5, {}, "covered"),
        (0.9, 0.46, 0.5, {}, "covered"),
        (0.89, 0.5, 0.5, {}, None),
        (1.0, 0.44, 0.5, {}, None),
        (1.0, 0.96, 2.0, {}, "native"),
        (1.0, 0.94, 2.0, {}, None),
        (0.5, 3.0, 0.5, {}, None),
        (0.5, 0.5, 0.5, {"covered": 0.5}, "covered"),
        (1.0, 0.5, 1.0, {"density": 0.5}, "covered"),
        (1.0, 0.5, 0.5, {"density": None}, None),
        (1.0, 1.5, 2.0, {"native": None}, None),
        (1.0, 1.5, 2.0, {"native": 1.6}, None),
    ],
)
def test_what_a_shown_view_leaves_to_a_crop(
    share: float, seen: float, crop_density: float, settings: dict[str, Any], code: str | None
) -> None:
    assert adds_nothing(BestView("v", share, seen), crop_density, ReviewConfig(**settings)) == code


# ---- opinions, alone -----------------------------------------------------------------------------------------------


@each_case(
    ("score", "share", "map_decides", "regions", "enough"),
    [
        (0.49, 1.0, False, [], True),
        (0.5, 1.0, False, [], False),
        (0.3, 0.5, False, [], False),
        (0.2, 0.5, False, [], True),
        (0.1, None, False, [], False),
        (None, 1.0, False, [], False),
        (None, 1.0, True, [], True),
        (None, 1.0, True, [HOT], False),
        (0.9, 1.0, True, [], False),
    ],
)
def test_when_the_look_says_that_the_coarse_view_suffices(
    score: float | None, share: float | None, map_decides: bool, regions: list[Box], enough: bool
) -> None:
    assert suffices(look(score=score, regions=regions), share, map_decides=map_decides) is enough


def test_heat_is_what_stands_above_the_maps_mean() -> None:
    heat = Heat.of(look(), SIZE)
    assert heat.share(Box(0, 0, *SIZE)) == pytest.approx(1)
    assert heat.share(HOT) == pytest.approx(1)
    assert heat.share(Box(600, 100, 700, 300)) == pytest.approx(0.5)
    assert heat.share(Box(650, 150, 700, 200)) == pytest.approx(1 / 16)
    assert heat.share(COLD) == 0


@pytest.mark.parametrize("heat", [[], [[]], [[0.3] * 4] * 3, [[0.0]], [[math.nan, math.inf]]])
def test_a_flat_or_missing_map_has_no_heat_to_share(heat: list[list[float]]) -> None:
    assert Heat.of(PerceptionRecord(heat=heat), SIZE).share(HOT) is None


def test_a_map_over_a_padded_view_reaches_outside_the_image() -> None:
    # a 900 x 600 image padded to a square: the map's upper and lower sixth are padding
    cells = [[0.0] * 6 for _ in range(6)]
    cells[2][3] = 0.9
    record = PerceptionRecord(heat=cells, extent=(0, -150, 900, 750))
    heat = Heat.of(record, SIZE)
    assert heat.share(Box(450, 150, 600, 300)) == pytest.approx(1)
    assert heat.share(Box(450, 200, 600, 300)) == pytest.approx(2 / 3)


boxes = st.tuples(st.floats(-50, 950), st.floats(-50, 650), st.floats(1, 900), st.floats(1, 600)).map(
    lambda four: Box(four[0], four[1], four[0] + four[2], four[1] + four[3])
)
maps = st.integers(1, 5).flatmap(
    lambda width: st.lists(st.lists(st.floats(0, 1), min_size=width, max_size=width), min_size=1, max_size=5)
)


@given(cells=maps, box=boxes)
def test_a_share_of_heat_is_a_share_and_grows_with_the_box(cells: list[list[float]], box: Box) -> None:
    heat = Heat.of(PerceptionRecord(heat=cells), SIZE)
    share, more = heat.share(box), heat.share(Box(box.x1 - 30, box.y1 - 30, box.x2 + 30, box.y2 + 30))
    assert (share is None) == (more is None)
    if share is not None and more is not None:
        assert 0 <= share <= more + 1e-9 <= 1 + 2e-9


def test_the_gap_between_boxes() -> None:
    assert gap(HOT, Box(800, 100, 850, 300)) == 0
    assert gap(HOT, Box(830, 320, 850, 330)) == 30
    assert gap(Box(0, 0, 10, 10), HOT) == 590


@each_case(
    ("box", "settings", "snapped"),
    [
        (Box(550, 50, 700, 300), {}, True),  # cuts the region in half
        (Box(620, 110, 800, 300), {}, False),  # leaves out little of it
        (Box(620, 110, 800, 300), {"snap_keep": 0.9}, True),
        (Box(650, 150, 750, 250), {}, True),  # inside it, with a quarter of the heat
        (Box(550, 50, 850, 350), {}, False),  # holds all of it
        (Box(300, 100, 650, 300), {}, False),  # overlaps by a quarter of the region only
        (Box(300, 100, 650, 300), {"snap": 0.2}, True),
        (Box(820, 100, 900, 300), {}, True),  # beside it
        (Box(820, 100, 900, 300), {"snap_gap": 0.05}, False),
        (Box(0, 400, 200, 600), {}, False),  # far away
        (Box(550, 50, 700, 300), {"snap": None}, False),
        (Box(820, 100, 900, 300), {"snap": None}, False),
    ],
)
def test_a_box_that_cuts_a_region_gets_the_region(box: Box, settings: dict[str, Any], snapped: bool) -> None:
    found = cut_region(box, [HOT], Heat.of(look(), SIZE), ReviewConfig(**settings))
    assert found == (HOT if snapped else None)


@pytest.mark.parametrize(
    ("box", "snapped"),
    [
        (Box(650, 150, 750, 250), False),  # a quarter of the heat, around the middle
        (Box(600, 100, 705, 205), False),
        (Box(600, 100, 695, 300), True),  # nearly half of the region, but not its middle
        (Box(820, 100, 900, 300), True),  # beside it
        (Box(0, 400, 200, 600), False),  # far away
    ],
)
def test_of_a_region_of_fixed_sides_the_middle_counts(box: Box, snapped: bool) -> None:
    heat = Heat.of(look(), SIZE)
    assert cut_region(box, [HOT], heat, RULES, fixed=True) == (HOT if snapped else None)


def test_without_heat_a_region_is_cut_by_area() -> None:
    flat = Heat.of(PerceptionRecord(), SIZE)
    assert cut_region(Box(600, 100, 700, 300), [HOT], flat, RULES) == HOT
    assert cut_region(Box(600, 100, 790, 300), [HOT], flat, RULES) is None
    other = Box(0, 0, 100, 100)
    assert cut_region(Box(0, 0, 100, 70), [HOT, other], flat, RULES) == other


def test_of_several_regions_the_one_that_overlaps_most_is_touched_and_else_the_nearest() -> None:
    line, below, twin = Box(300, 200, 700, 240), Box(300, 320, 700, 350), Box(300, 310, 700, 350)
    nothing = Heat([], Box(0, 0, *SIZE))
    between = Box(400, 250, 500, 300)  # 10 pixels under the line, 20 over the other
    assert cut_region(between, [below, line], nothing, RULES) is line
    assert cut_region(between, [twin, line], nothing, RULES) is twin, "as near: the first"
    assert cut_region(Box(400, 300, 500, 350), [line, below], nothing, RULES) is below
    # the gap may be a share of the longer side
    assert cut_region(between, [line], nothing, ReviewConfig(snap_gap=10 / 400)) is line
    assert cut_region(between, [line], nothing, ReviewConfig(snap_gap=9 / 400)) is None


def test_what_is_proposed_is_shown_unasked_unless_it_adds_nothing_or_waits_to_be_asked_for() -> None:
    def kept_back(policy: str, shown: Sequence[View], *, insert: bool = True, **how: bool) -> str:
        config = AgentConfig().replace(policy=policy, review={"insert": insert})
        return CropPolicy(config, VIEWS, perceives=True).keeps_back(shown, plan(HOT), **how)

    beside = [COARSE, crop(HOT)]
    assert kept_back("implicit", beside) == kept_back("implicit", [COARSE], insert=False, further=True) == ""
    assert kept_back("implicit", beside, further=True) == kept_back("hybrid", beside) == "a crop would add nothing"
    assert kept_back("hybrid", [COARSE]) == ""
    assert kept_back("hybrid", [COARSE], insert=False) == "crops are shown when asked for"


def test_a_cold_box_is_turned_down_for_a_region_that_is_hot() -> None:
    heat = Heat.of(look(), SIZE)
    assert hotter_region(0.0, [COLD, HOT], heat, RULES) == HOT
    assert hotter_region(0.05, [HOT], heat, RULES) is None
    assert hotter_region(0.05, [HOT], heat, ReviewConfig(cold=0.1)) == HOT
    assert hotter_region(0.0, [COLD], heat, RULES) is None
    assert hotter_region(0.0, [], heat, RULES) is None
    assert hotter_region(None, [HOT], heat, RULES) is None
    assert hotter_region(0.0, [HOT], heat, ReviewConfig(cold=None)) is None
    half = Box(600, 100, 700, 300)
    assert hotter_region(0.0, [half], heat, ReviewConfig(hot=0.6)) is None


# ---- together: which rule decides ----------------------------------------------------------------------------------


def test_a_call_on_the_hot_region_is_served_as_it_is() -> None:
    found = review(HOT)
    assert (found.serve, found.code, found.plan, found.reason) == (True, "", None, "")
    assert found.numbers["heat"] == pytest.approx(1)
    assert (found.numbers["gate"], found.numbers["gate_threshold"]) == (0.9, 0.5)
    assert found.numbers["covered"] == 1
    assert found.numbers["density"] == pytest.approx(0.28)
    assert found.numbers["crop_density"] > 0.9


def test_the_gates_word() -> None:
    found = review(HOT, found=NO_NEED)
    assert (found.serve, found.code, found.last) == (False, "gate", None)
    assert "<coarse>" in found.reason
    assert found.numbers["gate"] == 0.1
    assert review(HOT, found=NO_NEED, review={"gate": None}).serve
    assert review(HOT, found=NO_NEED, review={"gate": 0.1}).serve


def test_what_contradicts_the_gate() -> None:
    assert review(HOT, found=NO_NEED, refused_turns=1).serve
    assert not review(HOT, found=NO_NEED, refused_turns=1, review={"insist": 2}).serve
    assert review(HOT, found=NO_NEED, refused_turns=2, review={"insist": 2}).serve
    assert review(HOT, found=NO_NEED, review={"insist": 0}).serve


def test_every_crop_against_the_gates_word_has_to_be_insisted_on() -> None:
    one, two = [COARSE, crop(COLD)], [COARSE, crop(COLD), crop(Box(0, 300, 200, 500), 2)]
    for shown, needed in ((one, 2), (two, 3)):
        assert review(HOT, found=NO_NEED, shown=shown, refused_turns=needed - 1).code == "gate"
        assert review(HOT, found=NO_NEED, shown=shown, refused_turns=needed).serve
    assert review(HOT, found=NO_NEED, shown=one, refused_turns=3, review={"insist": 2}).code == "gate"
    assert review(HOT, found=NO_NEED, shown=one, refused_turns=4, review={"insist": 2}).serve
    assert review(HOT, found=NO_NEED, shown=two, review={"insist": 0}).serve
    # a turn that insists does so with every call in it: crops that it brought itself were not read when it was written
    assert review(HOT, found=NO_NEED, shown=one, refused_turns=1, crops_read=0).serve
    # where the gate asked for more, a crop that was read speaks against the map, and none is counted
    assert review(COLD, shown=[COARSE, crop(HOT)]).serve


def test_without_a_gate_the_map_may_say_that_nothing_is_needed() -> None:
    flat = PerceptionRecord(heat=[[0.1] * 9] * 6)
    assert review(HOT, found=flat).serve
    statistics = {"perception": {"gate": "statistics", "peak_to_mean": 3.0}}
    assert review(HOT, found=flat, **statistics).code == "gate"
    assert review(HOT, found=look(score=None), **statistics).serve


def test_a_box_that_was_shown_is_refused_whatever_the_branches_say() -> None:
    shown = [COARSE, crop(HOT)]
    for found in (look(), NO_NEED, PerceptionRecord()):
        again = review(HOT, shown=shown, found=found, refused_turns=5)
        assert (again.serve, again.code, again.last) == (False, "covered", None)
        assert "<crop1>" in again.reason
        assert again.numbers["density"] == again.numbers["crop_density"]
    assert review(Box(550, 100, 750, 300), shown=shown).serve  # three quarters of it


def test_a_crop_that_would_only_be_larger_is_refused_unless_the_rules_allow_it() -> None:
    shown = [COARSE, crop(HOT)]
    inside = Box(650, 150, 720, 200)
    found = review(inside, shown=shown)
    assert (found.serve, found.code) == (False, "native")
    assert found.numbers["crop_density"] > found.numbers["density"] > 0.95
    assert "all its pixels" in found.reason
    assert review(inside, shown=shown, review={"native": None}).serve
    whole = view("coarse", Box(0, 0, *SIZE), (900, 600))
    assert review(inside, shown=[whole]).code == "native"


def test_a_second_crop_elsewhere_is_never_a_matter_of_opinion() -> None:
    """The first crop of a question in two steps says where to look next, which the heat map cannot know."""
    found = review(COLD, shown=[COARSE, crop(HOT)])
    assert (found.serve, found.code) == (True, "")
    assert "heat" not in found.numbers


def test_a_cold_box_is_refused_and_the_hot_region_offered() -> None:
    found = review(COLD)
    assert (found.serve, found.code, found.last) == (False, "elsewhere", None)
    assert f"<{HOT.as_list()}>" in found.reason
    assert found.numbers["heat"] == 0
    assert found.numbers["region_heat"] == pytest.approx(1)
    assert review(COLD, refused_turns=1).serve
    assert review(COLD, review={"cold": None}).serve
    assert review(COLD, found=look(regions=[])).serve


def test_a_cold_box_may_be_moved_instead() -> None:
    found = review(COLD, review={"elsewhere": "snap"})
    assert (found.serve, found.code) == (True, "elsewhere")
    assert found.plan == plan(HOT)
    assert found.reason == f"The box was moved to <{HOT.as_list()}>: there is little for this question where it was."
    assert found.numbers["crop_tokens"] == plan(HOT).tokens
    assert found.numbers["asked_tokens"] == plan(COLD).tokens


def test_a_box_that_cuts_the_region_is_moved_to_it() -> None:
    found = review(Box(550, 50, 700, 300))
    assert (found.serve, found.code, found.plan) == (True, "cut", plan(HOT))
    assert found.reason == f"The box was moved to <{HOT.as_list()}>, so that nothing there is cut off."
    assert review(Box(550, 50, 700, 300), refused_turns=1).plan is None
    assert review(Box(550, 50, 700, 300), review={"snap": None}).plan is None
    fixed = look().model_copy(update={"fixed": True})
    assert review(Box(550, 50, 705, 300), found=fixed).plan is None
    assert review(Box(550, 50, 695, 300), found=fixed).plan == plan(HOT)


def test_nothing_is_moved_to_what_was_shown_or_cannot_be_cut_or_afforded() -> None:
    cutting = Box(550, 50, 700, 300)
    beside = [COARSE, crop(HOT)]
    assert review(cutting, shown=beside, crops_read=0).plan is None
    assert review(cutting, replan=lambda box: ZoomPlan("coarse", error="no")).plan is None
    wide = Box(450, 0, 900, 450)
    assert plan(wide).tokens > plan(Box(460, 0, 560, 40)).tokens
    thin = Box(460, 0, 560, 40)
    room = {"budget": {"max_visual_tokens": COARSE.tokens + plan(thin).tokens}}
    found = look(regions=[wide])
    assert review(thin, found=found).plan == plan(wide)
    kept = review(thin, found=found, **room)
    assert (kept.serve, kept.plan, kept.code) == (True, None, "")


def test_budgets_come_first() -> None:
    found = review(HOT, found=NO_NEED, budget={"max_views": 1})
    assert (found.serve, found.code, found.last) == (False, "budget", "budget")
    tight = review(HOT, found=NO_NEED, budget={"max_visual_tokens": COARSE.tokens + 45, "coarse_tokens": 64})
    assert (tight.code, tight.last) == ("budget", None)


def test_explicit_is_the_same_without_review() -> None:
    shown = [COARSE, crop(HOT)]
    for box in (HOT, COLD, Box(650, 150, 720, 200)):
        for views in (shown, [COARSE]):
            found = review(box, shown=views, found=NO_NEED, policy="explicit")
            assert (found.serve, found.code, found.plan) == (True, "", None)
    assert review(HOT, policy="explicit", budget={"max_views": 1}).code == "budget"


@given(box=boxes, score=st.none() | st.floats(0, 1), turns=st.integers(0, 2), crops=st.lists(boxes, max_size=3))
def test_every_verdict_has_its_numbers_and_a_refusal_its_text(
    box: Box, score: float | None, turns: int, crops: list[Box]
) -> None:
    asked = box.grow_to(28, SIZE).rounded()
    shown = [COARSE, *(crop(one.grow_to(28, SIZE).rounded(), n) for n, one in enumerate(crops, start=1))]
    found = review(asked, shown=shown, found=look(score=score), refused_turns=turns)
    assert {"views", "visual_tokens", "crop_tokens", "covered", "density", "crop_density"} <= found.numbers.keys()
    assert all(math.isfinite(value) for value in found.numbers.values())
    assert bool(found.reason) == (not found.serve or found.plan is not None) == bool(found.code)
    if found.code in ("elsewhere", "cut"):
        assert turns == 0 and not crops
    if found.code == "gate":
        assert score is not None and score < 0.5 and turns <= len(crops)


# ---- words and counts ----------------------------------------------------------------------------------------------


def test_a_box_is_written_in_the_frame_of_the_protocol() -> None:
    assert format_box(HOT, COARSE, "pixel") == "[168, 28, 224, 84]"
    assert format_box(HOT, COARSE, "per_mille") == "[667, 167, 889, 500]"
    assert format_box(HOT, COARSE, "unit") == "[0.667, 0.167, 0.889, 0.500]"
    assert format_box(HOT, COARSE, "cell") == "[6, 1, 8, 3]"


def test_turns_refused_on_the_branches_word_are_counted_once_each() -> None:
    def call(decision: Any, code: str) -> CallRecord:
        return CallRecord(name="zoom", decision=decision, code=code)

    gate, moved, covered = call("refused", "gate"), call("snapped", "elsewhere"), call("refused", "covered")
    assert refused_on_opinion([[gate, gate], [moved], [covered], [], [call("refused", "elsewhere")]]) == 2
