"""No reply raises, however it is written, and none is worth less than 0 or more than 1."""

from __future__ import annotations

from time import process_time

import pytest
from PIL import Image

from qzoom_agent.data.samples import Sample
from qzoom_agent.evaluation.scorers import anls, ocrbench
from qzoom_agent.evaluation.scorers.choice import clean
from qzoom_agent.evaluation.scorers.open_answer import rule
from qzoom_agent.evaluation.tasks.catalog import TASKS
from qzoom_agent.evaluation.tasks.task import MOST_CHARACTERS, Scorer
from tests.cases import each_case
from tests.protocols.hostile_outputs import hostile_outputs

SCORERS = {scorer: f"{task.name} {name}" for task in TASKS.values() for name, scorer in task.scorers.items()}
REPLIES = (
    *hostile_outputs(100),
    "<answer>" * 20_000,
    r"\boxed{" * 20_000,
    "answer is " * 10_000,
    "answer: A. " * 10_000,
    "(" * 50_000,
    "A " * 20_000,
    "9" * 400 + "%",
    "1e999",
    "nan",
    "\0\ud800",
    "İ<answer>İ",
)


@pytest.mark.parametrize("scorer", SCORERS, ids=SCORERS.values())
def test_every_reply_is_worth_something(scorer: Scorer) -> None:
    for gold, options in (("12%", ()), ("B", ("red", "dark red")), ("0", ())):
        sample = Sample("1", "s", "all", Image.new("RGB", (1, 1)), "?", gold, answers=(gold,), options=options)
        for reply in REPLIES:
            score = scorer(reply[:2_000], sample)  # how long replies are read: the tests below
            assert 0 <= score.value <= 1, reply[:80]


REPEATS = (
    "<answer>",
    "<answer>A</answer>",
    r"\boxed{",
    "answer: A. ",
    "(A) or ",
    "A ",
    "9",
    "9,",
    "<think>",
    '"answer": "',
    "**",
    "_",
    "Dr. ",
    "not ",
    "red ",
)


@each_case("unit", REPEATS)
def test_a_million_characters_take_no_time(unit: str) -> None:
    sample = Sample("1", "s", "all", Image.new("RGB", (1, 1)), "?", "B", answers=("B",), options=("red", "dark red"))
    started = process_time()
    for scorer in SCORERS:
        assert scorer((unit * (1_000_000 // len(unit) + 1))[:1_000_000], sample) == (0.0, None)
    assert process_time() - started < 2


@pytest.mark.parametrize("unit", REPEATS)
def test_a_reply_that_is_just_short_enough_is_read_in_linear_time(unit: str) -> None:
    sample = Sample("1", "s", "all", Image.new("RGB", (1, 1)), "?", "B", answers=("B",), options=("red", "dark red"))
    reply = (unit * MOST_CHARACTERS)[:MOST_CHARACTERS]
    for scorer in (clean, rule, anls.clean, ocrbench.clean):
        started = process_time()
        scorer(reply, sample)
        assert process_time() - started < 2, scorer
