"""What functions of users look like and return: generators, arrays with a place, names that the model cannot write."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
from PIL import Image

from qzoom_agent.errors import ConfigError
from qzoom_agent.zoom.own_tools import find_own_tools
from qzoom_agent.zoom.tool_images import AffineImage
from tests.zoom.test_own_tools import run


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
