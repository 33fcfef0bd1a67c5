"""What functions of users look like and return: generators, arrays with a place, names that the model cannot write."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass
from enum import Enum
from typing import Any

import numpy as np
import pytest
from langchain_core.tools import BaseTool, tool
from PIL import Image
from pydantic import BaseModel

from qzoom_agent.agent import Agent
from qzoom_agent.errors import ConfigError
from qzoom_agent.models.scripted import ScriptedBackend
from qzoom_agent.zoom.own_tools import find_own_tools
from qzoom_agent.zoom.tool_images import AffineImage
from tests.zoom.test_own_tools import board, run, written


def test_a_generator_is_run_to_its_end() -> None:
    def pages() -> Iterator[Image.Image | str]:
        """Return all pages."""
        for color in ("red", "blue"):
            yield Image.new("RGB", (64, 64), color)
        yield "two pages"

    output = run(pages)
    assert output.image is not None and output.image.getpixel((0, 0)) == (255, 0, 0)
    assert output.text == "two pages\nOnly the first of 2 images is shown."

    def broken() -> Iterator[str]:
        """Fail."""
        yield "one"
        raise OSError("no paper")

    assert run(broken).error == "broken failed: OSError: no paper"


def test_an_array_may_have_a_place_on_the_original() -> None:
    def gray(image: Image.Image) -> AffineImage:
        """Return grey levels."""
        return AffineImage(np.asarray(image.convert("L").resize((400, 300))))

    output = run(gray)
    assert output.image is not None and output.image.size == (400, 300)
    assert output.matrix == (2, 0, 0, 0, 2, 0)


@pytest.mark.parametrize("name", ["_pad", "model_config"])
def test_names_that_would_not_reach_the_function_are_refused(name: str) -> None:
    made: dict[str, Any] = {}
    exec(f'def cut({name}: int = 0) -> str:\n    "Cut."\n    return str({name})', made)
    with pytest.raises(ConfigError, match=f"parameter '{name}' of the tool 'cut' has a name that .* Rename it"):
        find_own_tools([made["cut"]])


def test_only_a_function_without_a_docstring_is_told_to_have_one() -> None:
    def wrong(word: str) -> str:
        """Say a word.

        Args:
            nope: Nothing.
        """
        return word

    def bare(word: str) -> str:
        return word

    with pytest.raises(ConfigError, match="cannot be a tool") as told:
        find_own_tools([wrong])
    assert "needs a docstring" not in str(told.value)
    with pytest.raises(ConfigError, match="It needs a docstring"):
        find_own_tools([bare])


def test_an_argument_that_the_tool_does_not_have_is_told_and_not_left_out() -> None:
    told = run("rotate", {"angle": 45})
    assert told.image is None and "there is no parameter angle" in told.error and '"degrees"' in told.error
    assert run("rotate", {"degrees": 45}).image is not None

    @tool
    def search(query: str, **kwargs: Any) -> str:
        """Search."""
        return query

    assert "there is no parameter" not in run(search, {"query": "a", "page": 2}).error


class Line(BaseModel):
    text: str
    at: tuple[int, int] = (1, 2)


@dataclass
class Page:
    lines: list[Line]
    kind: Kind


class Kind(Enum):
    BILL = "bill"


async def _pages() -> AsyncIterator[str]:
    yield "one"
    yield "two"


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (Line(text="a"), '{"text": "a", "at": [1, 2]}'),
        (Page([Line(text="a")], Kind.BILL), '{"lines": [{"text": "a", "at": [1, 2]}], "kind": "bill"}'),
        ({"found": {3}, "of": range(2)}, '{"found": [3], "of": [0, 1]}'),
        (map(str, (1, 2)), "1\n2"),
        ({"a": 1}.values(), "[1]"),
        (_pages(), "one\ntwo"),
        (Exception("bad"), '"bad"'),
    ],
)
def test_other_values_are_read_as_json(value: Any, text: str) -> None:
    def give() -> Any:
        """Give."""
        return value

    assert run(give).text == text


def test_a_tool_may_change_its_arguments_and_the_trace_has_them_as_written() -> None:
    def sort(groups: dict[str, list[int]], rest: Any) -> str:
        """Sort."""
        groups["a"].clear()
        rest["inner"].clear()
        return "done"

    given = {"groups": {"a": [1]}, "rest": {"inner": [2]}}
    assert run(sort, given).text == "done" and given == {"groups": {"a": [1]}, "rest": {"inner": [2]}}


def test_an_image_of_a_tool_costs_what_the_models_processor_makes_of_it() -> None:
    model: Any = ScriptedBackend([written("qwen3vl", "rotate"), "42"], protocol="qwen3vl")
    model.view_tokens = lambda image: 16
    few = {"max_visual_tokens": 40, "coarse_tokens": 16, "crop_max_tokens": 576, "crop_min_tokens": 4}
    answer = Agent(model, tools=["rotate"], policy="explicit", budget=few).run(board(), "what?")
    assert (answer.trace.turns[0].calls[0].decision, answer.usage.visual_tokens) == ("served", 32)


def test_a_tool_that_raises_is_run_once_whatever_it_raises() -> None:
    """`NotImplementedError` also says that a LangChain tool can only be awaited, and that tool is."""
    runs: list[str] = []

    def book(seat: str) -> str:
        """Book a seat."""
        runs.append(seat)
        raise NotImplementedError("no seats in this class")

    class Own(BaseTool):
        name: str = "own"
        description: str = "Book a seat."

        def _run(self, seat: str) -> str:
            return book(seat)

    class Awaited(Own):
        async def _arun(self, seat: str) -> str:
            return f"booked {seat}"

    for one, calls in ((book, 1), (tool(book), 1), (Own(), 1)):
        assert "no seats in this class" in run(one, {"seat": "4a"}).error and runs == ["4a"] * calls
        runs.clear()
    assert run(Awaited(), {"seat": "4a"}).text == "booked 4a"
