"""Policy `hybrid` through the whole loop, on a scripted model whose looks are fixed."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from qzoom_agent import Agent
from qzoom_agent.answer import Answer
from qzoom_agent.cli.ask import follow, replay, summary
from qzoom_agent.cli.console import Console
from qzoom_agent.config import AgentConfig
from qzoom_agent.errors import ConfigError
from qzoom_agent.messages import Message, plain_text, view_ids
from qzoom_agent.models.scripted import ScriptedBackend
from qzoom_agent.protocols import PROTOCOLS
from qzoom_agent.report.episode import render_html
from qzoom_agent.trace import PerceptionRecord, Trace, by_digest

IMAGE = Image.effect_noise((900, 600), 60).convert("RGB")
HOT = (6, 1, 8, 3)
"""The proposed region in cells of the coarse view: [600, 100, 800, 300] in the original's pixels."""
SAME = "<zoom>168 28 224 84</zoom>"
INSIDE = "<zoom>182 42 203 56</zoom>"
FAR = "<zoom>0 112 56 168</zoom>"
CUTS = "<zoom>154 14 196 84</zoom>"


def sight(*regions: tuple[float, float, float, float], score: float | None = 0.9) -> PerceptionRecord:
    """A look at a coarse view of 252 x 168 pixels, 9 x 6 cells, hot in these regions."""
    heat = [[0.01] * 9 for _ in range(6)]
    for x1, y1, x2, y2 in regions:
        for row in range(int(y1), int(y2)):
            heat[row][int(x1) : int(x2)] = [0.8] * int(x2 - x1)
    return PerceptionRecord(
        view="coarse", score=score, threshold=None if score is None else 0.5, heat=heat if regions else [], cutoff=0.1,
        cells=list(regions), boxes=[tuple(28 * value for value in one) for one in regions],
        reason="", aligned=False, prompt_tokens=66, visual_tokens=54, token_layers=500.0, seconds=0.01,
    )  # fmt: skip


class FinishedRollout:
    """A scripted model with branches, and every conversation it was given."""

    def __init__(self, replies: list[str], found: PerceptionRecord, **changes: Any) -> None:
        self.looked_at: list[list[Message]] = []
        self.asked: list[list[Message]] = []
        left = iter(replies)

        def reply(messages: list[Message]) -> str:
            self.asked.append(messages)
            return next(left)

        def look(messages: list[Message]) -> list[PerceptionRecord]:
            self.looked_at.append(messages)
            return [found]

        crops = {"budget.crop_min_tokens": 40, "budget.crop_max_tokens": 64}
        config = AgentConfig(policy="hybrid").replace(**crops).replace(**changes)
        self.agent = Agent(ScriptedBackend(reply, looks=look), config=config)

    def run(self) -> Answer:
        return self.agent.run(IMAGE, "which?")

    @property
    def told(self) -> str:
        """What the model read last."""
        return plain_text(self.asked[-1][-1])


def outcomes(answer: Answer) -> list[tuple[str, str]]:
    return [(call.decision, call.code) for turn in answer.trace.turns for call in turn.calls]


# ---- looking first, zooming after ----------------------------------------------------------------------------------


def test_the_proposed_crop_stands_there_and_the_tool_is_offered() -> None:
    play = FinishedRollout(["42"], sight(HOT))
    answer = play.run()
    assert view_ids(play.asked[0]) == ["coarse", "crop1"]
    assert plain_text(play.asked[0][0]) == "which? You may zoom."
    assert answer.trace.views[2].box == (600, 100, 800, 300)
    usage = answer.trace.usage
    assert (usage.inserted, usage.requested, usage.saved_tokens) == (1, 0, 0)


def test_where_the_gate_is_silent_nothing_is_inserted_and_the_model_may_still_insist() -> None:
    play = FinishedRollout([FAR, FAR, "42"], sight(score=0.1))
    answer = play.run()
    assert view_ids(play.asked[0]) == ["coarse"]
    assert outcomes(answer) == [("refused", "gate"), ("served", "")]
    first, second = (turn.calls[0] for turn in answer.trace.turns[:2])
    assert "the first image" in first.reason
    assert (first.numbers["gate"], first.numbers["gate_threshold"]) == (0.1, 0.5)
    assert second.numbers["refused_turns"] == 1
    usage = answer.trace.usage
    assert (usage.requested, usage.served, usage.refused, usage.refused_by) == (2, 1, 1, {"gate": 1})
    assert usage.saved_tokens == first.numbers["crop_tokens"] == answer.trace.views[2].tokens
    assert answer.status == "answered"


def test_each_crop_against_the_gate_takes_a_refusal_of_its_own() -> None:
    answer = FinishedRollout([FAR, FAR, SAME, SAME, "42"], sight(score=0.1)).run()
    assert outcomes(answer) == [("refused", "gate"), ("served", ""), ("refused", "gate"), ("served", "")]
    assert [call.numbers["refused_turns"] for turn in answer.trace.turns for call in turn.calls] == [0, 1, 1, 2]
    assert (answer.status, answer.text) == ("answered", "42")


def test_a_crop_of_what_is_shown_is_refused_and_the_view_is_named() -> None:
    play = FinishedRollout([SAME, INSIDE, "42"], sight(HOT))
    answer = play.run()
    assert outcomes(answer) == [("refused", "covered"), ("refused", "native")]
    assert all("crop 1" in turn.calls[0].reason for turn in answer.trace.turns[:2])
    assert answer.trace.usage.refused_by == {"covered": 1, "native": 1}
    assert answer.trace.usage.visual_tokens == sum(view.tokens for view in answer.trace.views)


def test_the_second_crop_of_a_question_in_two_steps_is_served() -> None:
    """The inserted crop is a note that names another place, cold on the map of the question."""
    answer = FinishedRollout([FAR, "42"], sight(HOT)).run()
    assert outcomes(answer) == [("served", "")]
    unasked = FinishedRollout([SAME, FAR, "42"], sight(HOT), review={"insert": False}).run()
    assert outcomes(unasked) == [("served", ""), ("served", "")]


def test_a_proposal_that_adds_nothing_to_the_coarse_view_is_left_out() -> None:
    whole = sight((0, 0, 9, 6))
    play = FinishedRollout(["42"], whole)
    answer = play.run()
    assert view_ids(play.asked[0]) == ["coarse"]
    assert answer.trace.perception is not None and "would add nothing" in answer.trace.perception.reason
    assert FinishedRollout(["42"], whole, policy="implicit").run().trace.usage.inserted == 1


def test_without_insertion_the_map_judges_the_calls() -> None:
    play = FinishedRollout([FAR, SAME, "42"], sight(HOT), review={"insert": False})
    answer = play.run()
    assert view_ids(play.asked[0]) == ["coarse"]
    assert outcomes(answer) == [("refused", "elsewhere"), ("served", "")]
    assert "[168, 28, 224, 84]" in answer.trace.turns[0].calls[0].reason


def test_a_box_that_cuts_the_region_is_moved_and_both_boxes_are_recorded() -> None:
    play = FinishedRollout([CUTS, "42"], sight(HOT), review={"insert": False})
    answer = play.run()
    assert outcomes(answer) == [("snapped", "cut")]
    (call,) = answer.trace.turns[0].calls
    assert (call.box, call.served) == ((154, 14, 196, 84), (600, 100, 800, 300))
    assert call.result == "crop1" and "moved" in call.reason
    assert (answer.trace.usage.served, answer.trace.usage.snapped, answer.trace.usage.refused) == (1, 1, 0)


def test_calls_of_one_turn_are_judged_by_what_the_model_had_read() -> None:
    call = '<tool_call>{"name": "image_zoom_in_tool", "arguments": {"bbox_2d": %s}}</tool_call>'
    two = "".join(call % box for box in ([0, 112, 56, 168], [84, 84, 140, 140]))
    gate = FinishedRollout([two, two, "<answer>42</answer>"], sight(score=0.1), protocol="deepeyes").run()
    assert outcomes(gate) == [("refused", "gate")] * 2 + [("served", "")] * 2
    same = "".join(call % box for box in ([168, 28, 224, 84], [0, 112, 56, 168]))
    heat = FinishedRollout(
        [same, "<answer>42</answer>"], sight(HOT), protocol="deepeyes", review={"insert": False}
    ).run()
    assert outcomes(heat) == [("served", ""), ("served", "")]  # what is hot was shown: there is nothing to offer


def test_refusals_end_like_any_other_failure() -> None:
    answer = FinishedRollout([SAME, SAME, SAME, "42"], sight(HOT)).run()
    assert (answer.status, answer.text) == ("answered", "42")
    assert answer.trace.turns[-1].forced
    ended = FinishedRollout([FAR, "42"], sight(HOT), budget={"max_views": 2}).run()
    assert (ended.status, outcomes(ended)) == ("budget", [("refused", "budget")])


# ---- in every family's words ---------------------------------------------------------------------------------------


def hermes(name: str, **arguments: Any) -> str:
    return f"<tool_call>{json.dumps({'name': name, 'arguments': arguments})}</tool_call>"


ZOOM = "image_zoom_in_tool"
CALLS: dict[str, tuple[str, str, str, str]] = {
    "nano": (SAME, "crop 1", FAR, "[168, 28, 224, 84]"),
    "plain": ("ZOOM: 667, 167, 889, 500", "crop 1", "ZOOM: 0, 667, 222, 1000", "[667, 167, 889, 500]"),
    "deepeyes": (
        hermes(ZOOM, bbox_2d=[168, 28, 224, 84]), "crop 1",
        hermes(ZOOM, bbox_2d=[0, 112, 56, 168]), "[168, 28, 224, 84]",
    ),
    "qwen3vl": (
        hermes(ZOOM, bbox_2d=[667, 167, 889, 500], img_idx=0), "crop 1",
        hermes(ZOOM, bbox_2d=[0, 667, 222, 1000], img_idx=0), "[667, 167, 889, 500]",
    ),
    "mini_o3": (
        '<grounding>{"bbox_2d": [0.667, 0.167, 0.889, 0.5], "source": "original_image"}</grounding>', "observation_1",
        '<grounding>{"bbox_2d": [0, 0.667, 0.222, 1], "source": "original_image"}</grounding>',
        "[0.667, 0.167, 0.889, 0.500]",
    ),
    "pixel_reasoner": (
        hermes("crop_image_normalized", bbox_2d=[0, 0, 1, 1], target_image=2), "target_image 2",
        hermes("crop_image_normalized", bbox_2d=[0.02, 0.8, 0.1, 0.9], target_image=1), "[0.667, 0.167, 0.889, 0.500]",
    ),
    "adaptvision": (
        hermes("request_local_region", bbox_2d=[168, 28, 224, 84]), "crop 1",
        hermes("request_local_region", bbox_2d=[0, 112, 56, 168]), "[168, 28, 224, 84]",
    ),
}  # fmt: skip
"""Protocol: a call on the inserted crop's place, that crop's name; a call on a cold place, the hot one as a box."""


@pytest.mark.parametrize("protocol", CALLS)
def test_a_refusal_speaks_the_protocols_language(protocol: str) -> None:
    again, name, cold, hot = CALLS[protocol]
    play = FinishedRollout([again, "42"], sight(HOT), protocol=protocol)
    answer = play.run()
    assert outcomes(answer)[0][0] == "refused", answer.trace.turns[0]
    told = play.asked[1][-1]
    reason = answer.trace.turns[0].calls[0].reason
    assert [told] == play.agent.protocol.refusal(reason)
    assert f"shown in {name} " in reason
    offered = FinishedRollout([cold, "42"], sight(HOT), protocol=protocol, review={"insert": False})
    answer = offered.run()
    assert outcomes(answer)[0] == ("refused", "elsewhere")
    reason = answer.trace.turns[0].calls[0].reason
    assert hot in reason
    assert [offered.asked[1][-1]] == offered.agent.protocol.refusal(reason)
    assert reason in offered.told or protocol == "nano"


def test_every_protocol_has_a_name_for_every_view() -> None:
    own = {"mini_o3": ["original_image", "observation_2"], "pixel_reasoner": ["target_image 1", "target_image 3"]}
    for name, protocol in PROTOCOLS.items():
        assert [protocol.view_name(0), protocol.view_name(2)] == own.get(name, ["the first image", "crop 2"])


def test_a_protocol_that_can_only_resize_is_told_of_the_gate_and_served_when_it_insists() -> None:
    call = hermes("resize_image", action="resize")
    found = FinishedRollout([call, call, "<answer>42</answer>"], sight(score=0.1), protocol="visionthink",
                   budget={"crop_max_tokens": 400}).run()  # fmt: skip
    assert outcomes(found) == [("refused", "gate"), ("served", "")]


def test_a_moved_box_is_told_where_results_carry_text() -> None:
    play = FinishedRollout(["ZOOM: 611, 83, 778, 500", "42"], sight(HOT), protocol="plain", review={"insert": False})
    assert outcomes(play.run()) == [("snapped", "cut")]
    assert "moved to [667, 167, 889, 500]" in play.told


# ---- sessions, checkpoints, defaults -------------------------------------------------------------------------------


def test_a_look_reads_the_question_without_the_offer_of_tools_or_the_very_opening() -> None:
    play = FinishedRollout(["42"], sight(score=0.1), perception={"prompt": "opening"})
    play.run()
    assert play.looked_at == play.asked
    plain = FinishedRollout(["42"], sight(score=0.1))
    plain.run()
    assert plain_text(plain.looked_at[0][0]) == "which?"
    assert plain_text(plain.asked[0][0]) == "which? You may zoom."


def test_a_resumed_run_remembers_what_was_refused(tmp_path: Path) -> None:
    replies = iter([FAR, FAR, "42"])
    backend = ScriptedBackend(lambda _: next(replies), looks=lambda _: [sight(score=0.1)])
    with Agent(backend, config=AgentConfig(policy="hybrid"), state_dir=tmp_path) as agent:
        stream = agent.stream(IMAGE, "which?", thread="one")
        for event in stream:
            if event.kind == "call":
                break
        stream.close()  # type: ignore[attr-defined]
        answer = agent.resume("one")
    assert outcomes(answer) == [("refused", "gate"), ("served", "")]


@pytest.mark.parametrize(("sees", "policy"), [(True, "implicit"), (False, "explicit")])
def test_the_default_policy_follows_the_model_and_is_recorded(sees: bool, policy: str) -> None:
    backend = ScriptedBackend(["42"], looks=(lambda _: [sight(HOT)]) if sees else None)
    agent = Agent(backend)
    answer = agent.run(IMAGE, "which?")
    assert agent.config.policy == answer.trace.policy == answer.trace.config["policy"] == policy
    assert answer.trace.usage.inserted == int(sees)
    chosen = Agent(ScriptedBackend(["42"], looks=backend.looks), config=AgentConfig(policy="direct"))
    assert chosen.run(IMAGE, "which?").trace.policy == "direct"


def test_a_model_without_branches_is_told_what_it_lacks() -> None:
    with pytest.raises(ConfigError, match=r"'hybrid' needs a model with branches.*Use 'explicit'"):
        Agent(ScriptedBackend(["42"]), config=AgentConfig(policy="hybrid"))


def test_settings_of_the_review_travel_with_the_run(tmp_path: Path) -> None:
    answer = FinishedRollout(["42"], sight(HOT), review={"covered": 0.7, "native": None, "elsewhere": "snap"}).run()
    again = AgentConfig.load(answer.save(tmp_path) / "config.yaml").review
    assert (again.covered, again.native, again.elsewhere, again.snap) == (0.7, None, "snap", 0.5)
    loaded = Trace.load(tmp_path)
    assert loaded == answer.trace
    with pytest.raises(ConfigError, match=r"'review\.covred'.*'review\.covered'"):
        AgentConfig().replace(review={"covred": 1})


# ---- seen by people ------------------------------------------------------------------------------------------------


@pytest.fixture
def episode() -> Callable[[], FinishedRollout]:
    """Refused on the gate's word, served, refused as shown before."""
    return lambda: FinishedRollout([FAR, FAR, FAR, "42"], sight(score=0.1))


def test_the_report_shows_what_was_refused_and_why(episode: Callable[[], FinishedRollout]) -> None:
    answer = episode().run()
    html = render_html(answer.trace, by_digest(answer.trace.views, answer.store.image))
    for part in ("refused: gate", "refused: covered", "2 refused (covered 1, gate 1)", "saved by refusals",
                 "What the question needs can be seen in the first image", "gate threshold 0.5"):  # fmt: skip
        assert part in html, part
    assert html.count('class="decision refused"') == 2
    moved = FinishedRollout([CUTS, "42"], sight(HOT), review={"insert": False}).run()
    html = render_html(moved.trace, by_digest(moved.trace.views, moved.store.image))
    assert "snapped: cut" in html and "1 moved" in html and "The box was moved to" in html


def test_the_terminal_shows_it_as_it_happens_and_again(
    episode: Callable[[], FinishedRollout], capsys: pytest.CaptureFixture[str]
) -> None:
    answer = follow(episode().agent.stream(IMAGE, "which?"), Console(), [IMAGE.width * IMAGE.height])
    lines = capsys.readouterr().err.splitlines()
    assert [line.split()[0] for line in lines] == ["look", "refused", "zoom", "refused"]
    assert lines[1].startswith("refused (gate) [0,112,56,168] of coarse, pixel - What the question needs")
    assert lines[3].startswith("refused (covered) ") and "crop 1" in lines[3]
    assert "1 zoom (2 more not served)" in summary(answer.trace)
    assert f"{answer.trace.usage.saved_tokens} saved by refusals" in summary(answer.trace)
    replay(answer.trace, answer.record, Console())
    assert [line.split()[0] for line in capsys.readouterr().err.splitlines()] == ["look", "refused", "zoom", "refused"]
    moved = FinishedRollout([CUTS, "42"], sight(HOT), review={"insert": False})
    follow(moved.agent.stream(IMAGE, "which?"), Console(), [IMAGE.width * IMAGE.height])
    assert "The box was moved to" in capsys.readouterr().err
