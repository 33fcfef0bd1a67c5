"""No reply raises, hangs, vanishes, or leaves something that cannot be served, shown or stored."""

import json
import math
import runpy
from collections import Counter
from pathlib import Path
from time import process_time

import pytest

from qzoom_agent.protocols import PROTOCOLS, Parsed
from tests.protocols.shown_views import COARSE, CROP1

MADE = runpy.run_path(str(Path(__file__).parent / "hostile_outputs.py"))
REPLIES: list[str] = MADE["hostile_outputs"]()
SECONDS = 15.0
VIEWS = [COARSE, CROP1]


def test_the_replies_are_many_different_and_the_same_each_time() -> None:
    by_hand = MADE["by_hand"]()
    assert len(REPLIES) == len(set(REPLIES)) == 2000
    assert 200 <= len(by_hand) <= 300
    assert REPLIES[: len(by_hand)] == by_hand
    assert MADE["hostile_outputs"]() == REPLIES
    assert MADE["hostile_outputs"](seed=1) != REPLIES


@pytest.fixture(scope="module", params=[4, pytest.param(1, marks=pytest.mark.slow)], ids=["a part", "all"])
def read(request: pytest.FixtureRequest) -> tuple[dict[str, list[Parsed]], float]:
    """The replies by hand and every fourth of the others, or all, as read by every protocol; the seconds it took."""
    by_hand = len(MADE["by_hand"]())
    replies = [*REPLIES[:by_hand], *REPLIES[by_hand :: request.param]]
    found: dict[str, list[Parsed]] = {name: [] for name in PROTOCOLS}
    slowest = (0.0, "", "")
    began = process_time()
    for reply in replies:
        for name, protocol in PROTOCOLS.items():
            start = process_time()
            found[name].append(protocol.parse(reply, VIEWS))
            slowest = max(slowest, (process_time() - start, name, ascii(reply[:30])))
    seconds = process_time() - began
    print(f"\n{len(replies)} replies x {len(PROTOCOLS)} protocols in {seconds:.1f} s; slowest {slowest}")
    return found, seconds


def test_every_protocol_reads_every_reply_in_time(read: tuple[dict[str, list[Parsed]], float]) -> None:
    (count,) = {len(replies) for replies in read[0].values()}
    assert 600 < count <= len(REPLIES)
    assert read[1] < SECONDS


@pytest.mark.parametrize("name", PROTOCOLS)
def test_every_reading_is_an_answer_a_call_or_a_problem(name: str, read: tuple[dict[str, list[Parsed]], float]) -> None:
    outcomes = Counter[str]()
    for parsed in read[0][name]:
        outcomes["answer" if parsed.answer is not None else "calls" if parsed.calls else "problem"] += 1
        assert parsed.answer is None or (parsed.answer.strip() == parsed.answer != "" and not parsed.calls)
        assert parsed.answer is not None or parsed.calls or parsed.problems
        assert len(parsed.calls) <= PROTOCOLS[name].max_calls_per_turn
        json.loads(parsed.model_dump_json())
        for problem in parsed.problems:
            assert problem.strip() and len(problem) < 1000
    print(f"\n{name:15} {dict(outcomes)}")
    assert set(outcomes) == {"answer", "calls", "problem"}


@pytest.mark.parametrize("name", PROTOCOLS)
def test_every_call_has_a_box_that_can_be_resolved(name: str, read: tuple[dict[str, list[Parsed]], float]) -> None:
    shown = {view.id: view for view in VIEWS}
    for call in (call for parsed in read[0][name] for call in parsed.calls):
        box = call.as_box
        assert box is not None and box.finite
        pixels = shown[call.view].to_original(box.ordered())
        assert all(math.isfinite(edge) for edge in pixels.clamp(COARSE.size).as_list())


@pytest.mark.parametrize("name", PROTOCOLS)
def test_time_is_linear_in_the_length_of_a_flood(name: str) -> None:
    """Floods several times as long as the ones above; anything quadratic would take minutes."""
    began = process_time()
    for unit in ("<", "< ", "<think>", "<tool_call>{", '"', "'\n", "9", "{ ", "zoom ", "\\boxed{"):
        PROTOCOLS[name].parse(unit * (50_000 // len(unit)), VIEWS)
    assert process_time() - began < SECONDS / 3
