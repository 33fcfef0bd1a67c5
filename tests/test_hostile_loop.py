"""Whatever a model writes, the loop goes on: no exception, every reply on the record, every record storable."""

import runpy
from collections.abc import Iterator
from pathlib import Path

import pytest
from PIL import Image

from qzoom_agent import Agent, AgentConfig, Trace
from qzoom_agent.answer import Answer
from qzoom_agent.models.scripted import ScriptedBackend
from qzoom_agent.protocols import PROTOCOLS

HOSTILE = runpy.run_path(str(Path(__file__).parent / "protocols" / "hostile_outputs.py"))
IMAGE = Image.linear_gradient("L").resize((320, 200)).convert("RGB")
# Budgets so wide that an episode ends with the model's answer or at its turns, so that one takes many replies.
WIDE = AgentConfig().replace(
    budget={"max_turns": 24, "max_views": 1000, "max_failed_calls": 1000, "crop_min_tokens": 1, "crop_max_tokens": 4},
    generation={"max_new_tokens": 100_000},
)


def episodes(outputs: list[str], protocol: str, **run: object) -> Iterator[Answer]:
    """Episodes whose model writes these outputs, one a turn, until they are used up; then it says "end"."""
    waiting = list(reversed(outputs))
    backend = ScriptedBackend(lambda _: waiting.pop() if waiting else "end", protocol=protocol)
    agent = Agent(backend, config=WIDE.replace(protocol=protocol), **run)  # type: ignore[arg-type]
    while waiting:
        yield agent.run(IMAGE, "What?", thread=f"left{len(waiting)}" if run else None)
    agent.close()


def check(answers: list[Answer], outputs: list[str]) -> None:
    turns = [turn for answer in answers for turn in answer.trace.turns][: len(outputs)]
    assert len(turns) == len(outputs)
    for turn, output in zip(turns, outputs, strict=True):
        # A stop string may have cut the reply; half surrogate pairs are mended.
        assert output.encode("utf-16-le", "surrogatepass").decode("utf-16-le", "replace").startswith(turn.text)
        assert turn.forced or turn.answer is not None or turn.calls or turn.problems
        for call in turn.calls:
            assert (call.result is not None) == (call.decision in ("served", "grown"))
            assert call.result is not None or call.reason
    for answer in answers:
        assert answer.status in ("answered", "budget")
        assert Trace.model_validate_json(answer.trace.model_dump_json()) == answer.trace
        for view in answer.trace.views[1:]:
            assert answer.store.image(view.id).size == view.size


@pytest.mark.parametrize("protocol", sorted(PROTOCOLS))
def test_hostile_replies(protocol: str) -> None:
    """Every protocol gets its share of the replies written by hand, and of the others an eighth of it."""
    outputs = HOSTILE["hostile_outputs"]()
    assert len(outputs) == 2000
    by_hand, first, count = HOSTILE["by_hand"](), sorted(PROTOCOLS).index(protocol), len(PROTOCOLS)
    share = [*by_hand[first % 3 :: 3], *outputs[len(by_hand) + first :: 8 * count]]
    check(list(episodes(share, protocol)), share)


@pytest.mark.slow
@pytest.mark.parametrize("protocol", sorted(PROTOCOLS))
def test_all_hostile_replies_in_every_protocol(protocol: str) -> None:
    outputs = HOSTILE["hostile_outputs"]()
    check(list(episodes(outputs, protocol)), outputs)


def test_hostile_replies_can_be_saved_at_every_step(tmp_path: Path) -> None:
    outputs = HOSTILE["by_hand"]()[::3]
    check(list(episodes(outputs, "qwen3vl", state_dir=tmp_path)), outputs)
