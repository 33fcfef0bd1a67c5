"""The loop: how episodes end, what is served and refused, what each policy shows, and that the state is JSON."""

import json
import time
from collections.abc import Callable, Sequence
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from qzoom_agent import Agent, AgentConfig
from qzoom_agent.answer import Answer
from qzoom_agent.config import ViewBudget
from qzoom_agent.episode_state import Context, start
from qzoom_agent.errors import BackendError, ConfigError, ImageError
from qzoom_agent.geometry import Box, Size
from qzoom_agent.graph import compile_graph
from qzoom_agent.messages import Message, plain_text, view_ids
from qzoom_agent.models.interface import ImageSource, Reply, SamplingParams
from qzoom_agent.models.scripted import ScriptedBackend
from qzoom_agent.policy import GREY, CropPolicy
from qzoom_agent.views import ViewStore
from qzoom_agent.zoom.zoom import Zoom, ZoomConfig

SIZE = Size(800, 600)
IMAGE = Image.linear_gradient("L").resize(SIZE).convert("RGB")
ZOOM = "<zoom><loc_84><loc_112><loc_140><loc_154></zoom>"
OTHER = "<zoom><loc_7><loc_14><loc_70><loc_77></zoom>"
OUTSIDE = "<zoom><loc_900><loc_900><loc_990><loc_990></zoom>"
COARSE_TOKENS, ZOOM_TOKENS = 54, 42


class Spy:
    """A scripted backend that keeps what its sessions were given."""

    def __init__(self, replies: Sequence[str] | Callable[[list[Message]], str]) -> None:
        self._inner = ScriptedBackend(replies)
        self.name, self.protocol, self.defaults = "spy", "nano", self._inner.defaults
        self.perceives = False
        self.conversations: list[list[Message]] = []
        self.settings: list[SamplingParams] = []
        self.pixels: dict[str, Image.Image] = {}
        self.opened = self.closed = 0

    def session(self, image: ImageSource) -> "Spy":
        self.opened += 1
        self._image = image
        self._session = self._inner.session(image)
        return self

    def reply(self, messages: Sequence[Message], *, settings: SamplingParams, **rest: Any) -> Reply:
        self.conversations.append(list(messages))
        self.settings.append(settings)
        self.pixels |= {view: self._image(view) for view in view_ids(messages)}
        return self._session.reply(messages, settings=settings, **rest)

    def close(self) -> None:
        self.closed += 1
        self._session.close()


def ask(replies: Any, *, boxes: Any = None, **changes: Any) -> Answer:
    backend = replies if isinstance(replies, Spy) else ScriptedBackend(replies)
    return Agent(backend, config=AgentConfig().replace(**changes)).run(IMAGE, "What?", boxes=boxes)


def decisions(answer: Answer) -> list[str]:
    return [call.decision for turn in answer.trace.turns for call in turn.calls]


# ---- how an episode ends -------------------------------------------------------------------------------------------


def test_an_answer_at_once() -> None:
    answer = ask(["42"])
    assert (answer.status, answer.text, len(answer.trace.turns)) == ("answered", "42", 1)
    assert [view.id for view in answer.trace.views] == ["original", "coarse"]


def test_zoom_then_answer() -> None:
    answer = ask([ZOOM, OTHER, "42"])
    assert (answer.status, answer.text) == ("answered", "42")
    assert [view.id for view in answer.trace.views] == ["original", "coarse", "crop1", "crop2"]
    first = answer.trace.turns[0].calls[0]
    assert (first.decision, first.result, first.raw) == ("served", "crop1", ZOOM)
    assert first.served == answer.trace.views[2].box
    assert first.numbers["crop_tokens"] == answer.trace.views[2].tokens == ZOOM_TOKENS
    assert first.numbers["visual_tokens"] == COARSE_TOKENS
    assert first.numbers["image_share"] == pytest.approx(
        (first.served[2] - first.served[0]) * (first.served[3] - first.served[1]) / SIZE.area
    )
    assert answer.trace.usage.visual_tokens == sum(view.tokens for view in answer.trace.views)


def test_turns_run_out_and_the_last_reply_stands() -> None:
    spy = Spy([ZOOM, OTHER, "42"])
    answer = ask(spy, budget={"max_turns": 2})
    assert (answer.status, answer.text) == ("budget", "42")
    assert [turn.forced for turn in answer.trace.turns] == [False, False, True]
    assert decisions(answer) == ["served", "served"]
    assert plain_text(spy.conversations[-1][-1]) == "Answer now."
    assert view_ids(spy.conversations[-1]) == ["coarse", "crop1", "crop2"]


def test_a_call_in_the_last_turn_is_recorded_and_not_run() -> None:
    answer = ask([ZOOM, OTHER], budget={"max_turns": 1})
    assert (answer.status, answer.text, decisions(answer)) == ("budget", "", ["served", "refused"])
    assert len(answer.trace.views) == 3


def test_views_run_out_only_when_one_more_is_asked_for() -> None:
    assert ask([ZOOM, "42"], budget={"max_views": 2}).status == "answered"
    answer = ask([ZOOM, OTHER, "42"], budget={"max_views": 2})
    assert (answer.status, answer.text, decisions(answer)) == ("budget", "42", ["served", "refused"])
    refused = answer.trace.turns[1].calls[0]
    assert refused.numbers["max_views"] == 2
    assert refused.result is None
    assert "2 of 2 views" in refused.reason


def test_a_crop_over_the_visual_budget_is_never_encoded_and_the_model_is_told_why() -> None:
    spy = Spy([ZOOM, OTHER, "42"])
    answer = ask(spy, budget={"max_visual_tokens": COARSE_TOKENS + ZOOM_TOKENS + 10, "coarse_tokens": 64})
    assert (answer.status, answer.text, decisions(answer)) == ("budget", "42", ["served", "refused"])
    assert view_ids(spy.conversations[-1]) == ["coarse", "crop1"]
    assert "visual tokens are spent" in answer.trace.turns[1].calls[0].reason
    assert plain_text(spy.conversations[-1][-2]) == "No crop."


def test_a_crop_too_large_for_the_rest_is_refused_and_the_model_may_ask_for_less() -> None:
    spy = Spy(["<zoom>0 0 252 168</zoom>", "<zoom>84 112 85 113</zoom>", "42"])
    answer = ask(spy, budget={"max_visual_tokens": COARSE_TOKENS + 50, "coarse_tokens": 64})
    assert decisions(answer) == ["refused", "grown"]
    assert (answer.status, answer.text) == ("answered", "42")
    assert "would cost 88 visual tokens and 50 are left" in answer.trace.turns[0].calls[0].reason


def test_a_call_without_its_opening_tag_is_served_and_its_remains_are_told_to_the_model() -> None:
    answer = ask([ZOOM.removeprefix("<zoom>"), "42"])
    assert (answer.status, answer.text, decisions(answer)) == ("answered", "42", ["served"])
    assert answer.trace.turns[0].repairs == ["opening <zoom> added"]
    spy = Spy(["<loc_84><loc_112></zoom>", "42"])
    answer = ask(spy)
    assert (answer.status, answer.text) == ("answered", "42")
    assert "four finite numbers" in answer.trace.turns[0].problems[0]
    assert plain_text(spy.conversations[-1][-1]) == "No crop."


@pytest.mark.parametrize("options", [{}, {"policy": "locate"}, {"perception": {"gate": "answer"}}])
def test_the_seconds_of_a_request_that_failed_are_counted(options: dict[str, Any]) -> None:
    def fails(messages: list[Message]) -> str:
        time.sleep(0.2)
        raise RuntimeError("The server is gone.")

    answer = Agent(ScriptedBackend(fails, protocol="qwen3vl"), **options).run(IMAGE, "What?")
    assert answer.status == "error" and not answer.trace.turns
    assert 0.2 <= answer.usage.seconds.think <= answer.usage.seconds.total < 2


def test_seconds_run_out() -> None:
    answer = ask(["42"], budget={"max_seconds": 1e-9})
    assert (answer.status, answer.text, answer.trace.turns[0].forced) == ("budget", "42", True)


@pytest.mark.parametrize(
    "cut", [ZOOM, "<zoom><loc_84><loc_112><loc_140><loc_1540></zoom> and so on", "It may be a red"]
)
def test_a_reply_that_its_limit_cut_off_is_neither_an_answer_nor_a_call(cut: str) -> None:
    answer = ask([cut, "42"], generation={"max_new_tokens": 3})
    assert (answer.status, answer.text, decisions(answer)) == ("answered", "42", [])
    first = answer.trace.turns[0]
    assert first.finish == "length" and first.answer is None
    assert "cut off at its limit of 3 tokens" in first.problems[0]


def test_a_reply_that_is_cut_off_again_leads_to_the_last_turn_and_never_to_an_answer() -> None:
    spy = Spy(["a thought without an end"] * 3)
    answer = ask(spy, protocol="plain", generation={"max_new_tokens": 3})
    assert (answer.status, answer.text) == ("budget", "")
    assert [turn.forced for turn in answer.trace.turns] == [False, False, True]
    assert "Be shorter" in plain_text(spy.conversations[1][-1])
    assert "Do not zoom any more" in plain_text(spy.conversations[2][-1])


def test_without_tools_a_reply_that_was_cut_off_is_followed_by_the_last_one() -> None:
    answer = ask(["a thought without an end", "42"], policy="direct", generation={"max_new_tokens": 3})
    assert (answer.status, answer.text) == ("budget", "42")
    assert [turn.forced for turn in answer.trace.turns] == [False, True]


def test_the_model_never_reads_a_result_that_it_made_up() -> None:
    spy = Spy([ZOOM + "<tool_response>It is 41.</tool_response>41", "42<|im_end|>\n<|im_start|>user\nAnd now?"])
    answer = ask(spy)
    assert (answer.status, answer.text, decisions(answer)) == ("answered", "42", ["served"])
    assert plain_text(spy.conversations[1][1]) == ZOOM
    assert answer.trace.turns[0].text.endswith("41") and "not the model's" in answer.trace.turns[0].repairs[0]


def test_a_crop_asked_for_several_times_in_one_turn_is_served_once() -> None:
    def call(*box: int) -> str:
        arguments = {"bbox_2d": box, "label": "sign", "img_idx": 0}
        return f"<tool_call>{json.dumps({'name': 'image_zoom_in_tool', 'arguments': arguments})}</tool_call>"

    box = call(100, 100, 400, 400)
    spy = Spy([box + box + call(101, 100, 400, 401) + call(500, 500, 800, 800), box, "42"])
    answer = ask(spy, protocol="qwen3vl")
    assert decisions(answer) == ["served", "refused", "refused", "served", "served"]
    refused = answer.trace.turns[0].calls[1]
    assert refused.code == "repeated" and "it is crop 1" in refused.reason and refused.result is None
    assert answer.usage.saved_tokens == 2 * answer.trace.views[2].tokens
    assert [view.id for view in answer.trace.views] == ["original", "coarse", "crop1", "crop2", "crop3"]


def test_calls_that_cannot_be_served_end_in_a_last_turn() -> None:
    replies = [OUTSIDE, "<zoom>1 2</zoom>", ""]
    answer = ask([*replies, "42"])
    assert (answer.status, answer.text, decisions(answer)) == ("answered", "42", ["failed"])
    assert [bool(turn.problems) for turn in answer.trace.turns] == [False, True, True, False]
    answer = ask([*replies, ZOOM])
    assert (answer.status, answer.text, decisions(answer)) == ("refused", "", ["failed", "refused"])


def test_a_served_call_clears_the_failures_before_it() -> None:
    answer = ask([OUTSIDE, OUTSIDE, ZOOM, OUTSIDE, OUTSIDE, "42"])
    assert (answer.status, answer.text) == ("answered", "42")
    assert not any(turn.forced for turn in answer.trace.turns)


def test_the_model_reads_every_text() -> None:
    spy = Spy(["ZOOM: 1200, 1200, 1300, 1300", "ZOOM: 1, 2", "42"])
    answer = ask(spy, protocol="plain")
    told = [plain_text(message) for message in spy.conversations[-1] if message["role"] == "user"]
    assert answer.trace.turns[0].calls[0].reason in told[1]
    assert answer.trace.turns[1].problems[0] in told[2]
    assert "252x168" in told[1]


@pytest.mark.parametrize(
    ("error", "says"),
    [
        (BackendError("The server said 503. Try later."), "The server said 503. Try later."),
        (RuntimeError("shapes"), "RuntimeError: shapes"),
    ],
)
def test_a_failing_backend_is_a_status_and_keeps_what_was_done(error: Exception, says: str) -> None:
    def reply(messages: list[Message]) -> str:
        if len(messages) > 1:
            raise error
        return ZOOM

    answer = ask(reply)
    assert (answer.status, answer.text, answer.trace.error) == ("error", "", says)
    assert decisions(answer) == ["served"]
    assert says in str(answer)


def test_a_reply_that_is_none_is_named() -> None:
    backend = ScriptedBackend(["42"])
    backend.session = lambda image: SimpleNamespace(reply=lambda *_, **__: "42", close=bool)  # type: ignore[method-assign,assignment,return-value]
    answer = Agent(backend).run(IMAGE, "What?")
    assert answer.status == "error" and "'scripted' returned a str from reply()" in str(answer.trace.error)


def test_a_session_that_cannot_be_closed_costs_no_answer(caplog: pytest.LogCaptureFixture) -> None:
    backend = ScriptedBackend(["42"])
    opened = backend.session
    backend.session = lambda image: SimpleNamespace(reply=opened(image).reply)  # type: ignore[method-assign,assignment,return-value]
    assert Agent(backend).run(IMAGE, "What?").text == "42"
    assert "A session of the model 'scripted' cannot be closed: AttributeError" in caplog.text


def test_each_turn_extends_the_conversation_and_never_rewrites_it() -> None:
    spy = Spy([ZOOM, OUTSIDE, "<zoom>", OTHER, "42"])
    ask(spy, seed=5)
    for before, after in zip(spy.conversations, spy.conversations[1:], strict=False):
        assert after[: len(before)] == before
        assert after[len(before)]["role"] == "assistant"
    assert [settings.seed for settings in spy.settings] == [5, 6, 7, 8, 9]
    assert (spy.opened, spy.closed) == (1, 1)


# ---- policies ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("policy", ["implicit", "always", "hybrid"])
def test_policies_that_need_branches_say_so(policy: str) -> None:
    with pytest.raises(ConfigError, match=f"'{policy}' needs a model with branches"):
        ask(["42"], policy=policy)


@pytest.mark.parametrize("policy", ["direct", "explicit", "implicit", "always"])
def test_an_image_that_cannot_be_shown_is_the_users_mistake_under_every_policy(policy: str) -> None:
    spy = Spy(["42"])
    spy.perceives = True
    with pytest.raises(ImageError, match="5000x10"):
        Agent(spy, config=AgentConfig().replace(policy=policy)).run(Image.new("RGB", (5000, 10)), "What?")
    assert spy.conversations == []


def test_direct_offers_no_tool_and_serves_none() -> None:
    spy = Spy([ZOOM, "42"])
    answer = ask(spy, policy="direct")
    assert plain_text(spy.conversations[0][0]) == "What?"
    assert (answer.status, answer.text, decisions(answer)) == ("answered", "42", ["refused"])
    assert "no zoom tool" in answer.trace.turns[0].calls[0].reason
    assert view_ids(spy.conversations[-1]) == ["coarse"]
    assert ask([ZOOM, ZOOM], policy="direct").status == "refused"


def test_explicit_offers_the_tool() -> None:
    spy = Spy(["42"])
    ask(spy)
    assert plain_text(spy.conversations[0][0]) == "What? You may zoom."


def test_oracle_shows_the_gold_box_with_its_margin_beside_the_coarse_view() -> None:
    spy = Spy(["42"])
    answer = ask(
        spy,
        policy="oracle",
        boxes=[(300, 200, 360, 220), Box(0.9, 0.9, 1.0, 1.0, frame="unit")],
        crop={"min_side": 28},
    )
    assert view_ids(spy.conversations[0]) == ["coarse", "crop1", "crop2"]
    assert answer.trace.views[2].box == (279, 179, 381, 241)
    assert answer.trace.views[3].box == (692, 512, 800, 600)
    assert answer.trace.usage.inserted == 2
    assert answer.trace.gold[0] == (300, 200, 360, 220)
    assert ask(["42"], policy="oracle", boxes=[]).trace.usage.inserted == 0
    with pytest.raises(ConfigError, match="boxes="):
        ask(["42"], policy="oracle")


@pytest.mark.parametrize("policy", ["oracle", "random"])
def test_crops_that_a_policy_inserts_stay_within_the_budgets(policy: str) -> None:
    boxes = [(20.0 + 90 * at, 20.0, 60.0 + 90 * at, 60.0) for at in range(8)]
    few = ask(["42"], policy=policy, boxes=boxes, budget={"max_views": 3}).trace
    assert (few.usage.inserted, few.answer) == (2, "42")
    assert (
        ask(
            ["42"], policy=policy, boxes=boxes, budget={"max_visual_tokens": 70, "coarse_tokens": 64}
        ).trace.usage.inserted
        == 0
    )


def test_random_is_the_oracles_size_somewhere_else_and_follows_the_seed() -> None:
    def crop(seed: int, boxes: Any = None) -> Box:
        return ask(["42"], policy="random", boxes=boxes, seed=seed, crop={"min_side": 28}).trace.views[2].region

    assert crop(1) == crop(1) != crop(2)
    assert crop(1).area / SIZE.area == pytest.approx(1 / 16, rel=0.03)
    gold = [(300, 200, 360, 220)]
    sized = crop(1, gold)
    assert (sized.width, sized.height) == (pytest.approx(102, abs=1), pytest.approx(62, abs=1))
    assert crop(2, gold) != sized
    assert ask(["42"], policy="random", boxes=[]).trace.usage.inserted == 0  # as many as the oracle's


def test_blind_serves_grey_of_the_same_size_and_records_what_was_withheld() -> None:
    spy = Spy([ZOOM, "42"])
    answer = ask(spy, policy="blind")
    crop = answer.trace.views[2]
    assert spy.pixels["crop1"].size == crop.size
    assert spy.pixels["crop1"].getcolors() == [(crop.size.area, GREY)]
    assert spy.pixels["coarse"] == answer.store.image("coarse")
    assert answer.store.image("crop1") != spy.pixels["crop1"]
    assert "Withheld" in answer.trace.turns[0].calls[0].reason


def test_a_coarse_view_over_the_whole_budget_is_a_configuration_error() -> None:
    with pytest.raises(ConfigError, match=r"64 visual tokens, but budget\.max_visual_tokens is 50"):
        ask(["42"], budget={"max_visual_tokens": 50, "coarse_tokens": 64})
    assert ask(["42"], budget={"max_visual_tokens": 50}).trace.usage.visual_tokens <= 50


def test_a_long_image_that_costs_more_than_the_budget_is_refused() -> None:
    """No view of it has as few visual tokens as the limit allows: one row of 28 pixels, and 200 columns."""
    config = AgentConfig(policy="direct").replace(budget={"max_visual_tokens": 64})
    agent = Agent(ScriptedBackend(["42"]), config=config)
    with pytest.raises(ImageError, match=r"5600x28 .*visual tokens at the least.*max_visual_tokens is 64"):
        agent.run(Image.new("RGB", (5600, 28)), "What?")


def test_a_changed_copy_is_what_it_would_have_been_from_the_start() -> None:
    """Limits that were the preset's give way to those given later, as they do to those given at once."""
    for changes in ({"max_visual_tokens": 40}, {"crop_max_tokens": 20}, {"crop_min_tokens": 90}):
        first = Agent(ScriptedBackend(["42"]), config=AgentConfig().replace(budget=changes))
        assert Agent(ScriptedBackend(["42"])).replace(budget=changes).config == first.config


# ---- properties ----------------------------------------------------------------------------------------------------

calls = st.builds("<zoom>{} {} {} {}</zoom>".format, *[st.integers(0, 260)] * 4)


@settings(max_examples=20, deadline=None)
@given(
    replies=st.lists(calls, min_size=8, max_size=8),
    turns=st.integers(1, 7),
    views=st.integers(1, 7),
    tokens=st.integers(64, 300),
)
def test_no_budget_is_ever_passed(replies: list[str], turns: int, views: int, tokens: int) -> None:
    answer = ask(replies, budget={"max_turns": turns, "max_views": views, "max_visual_tokens": tokens})
    assert len(answer.trace.turns) <= turns + 1
    assert len(answer.trace.views) - 1 <= views
    assert answer.trace.usage.visual_tokens <= tokens
    assert answer.trace.usage.requested == len(answer.trace.turns)


def test_the_state_is_json_after_every_step() -> None:
    script = [ZOOM, OUTSIDE, '<zoom>1 "\ud800"</zoom>', OTHER, "42 \ud800"]
    config, backend = AgentConfig(seed=3), ScriptedBackend(script)
    views = ViewBudget(factor=28, coarse_min_tokens=16, coarse_max_tokens=64, crop_min_tokens=32, crop_max_tokens=64)
    store = ViewStore()
    original = store.add_original(IMAGE)
    agent = Agent(backend, config=config)
    context = Context(
        backend=backend,
        protocol=agent.protocol,
        policy=CropPolicy(config, views),
        roi_zoom=Zoom(),
        config=config,
        views=views,
        zoom=Zoom(),
        tool=Zoom(ZoomConfig(factor=28, min_tokens=32, max_tokens=64)),
        store=store,
    )
    gold = [[0.0, 1.0, 2.0, 3.0]]
    first = start(id="x", question="What?", backend="b", config=config, gold=gold, originals=[original])
    steps = 0
    for state in compile_graph().stream(first, context=context, stream_mode="values"):
        assert json.loads(json.dumps(state, ensure_ascii=False).encode()) == state
        steps += 1
    assert steps == 1 + 1 + 5 + 4 + 1
    assert state["status"] == "answered"


def test_the_drawing_shows_the_loop() -> None:
    edges = {(edge.source, edge.target, edge.conditional) for edge in compile_graph().get_graph().edges}
    assert edges == {
        *{("__start__", first, True) for first in ("draft", "locate", "perceive")},
        *{("draft", then, True) for then in ("locate", "perceive", "finish")},
        *{(look, then, True) for look in ("locate", "perceive") for then in ("perceive", "think", "finish")},
        *{("think", then, True) for then in ("act", "approve", "finish")},
        *{("approve", then, True) for then in ("act", "__end__")},
        *{("act", then, True) for then in ("approve", "think")},
        ("finish", "__end__", False),
    }
