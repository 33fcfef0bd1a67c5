"""Flags made from a configuration: type, default and description are said there alone."""

from __future__ import annotations

import argparse
from typing import Literal

import pytest
from pydantic import Field

from qzoom_agent.cli.options import add_fields, given
from qzoom_agent.config import Config


class Oven(Config):
    """An oven."""

    heat: float = Field(default=180.0, gt=0)
    """Degrees of
    the oven. Celsius is meant."""
    mode: Literal["fan", "grill"] | None = None
    """Source of heat: 100% of it. None: `fan` in the evening, else `grill`."""
    trays: tuple[str, ...] = ()
    """JSON names of trays."""
    light: bool = False
    """Keep it lit."""


NAMES = {"heat": "--heat C", "mode": "--mode", "trays": "--tray NAME", "light": "--oven-light"}


@pytest.fixture
def flags() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser()
    add_fields(parser, Oven, NAMES)
    return parser


def test_help_has_the_first_sentence_and_the_default(flags: argparse.ArgumentParser) -> None:
    text = " ".join(flags.format_help().split())
    for line in (
        "--heat C degrees of the oven (default: 180)",
        "--mode {fan,grill} source of heat: 100% of it (default: fan in the evening, else grill)",
        "--tray NAME JSON names of trays; may be repeated",
        "--oven-light keep it lit",
    ):
        assert line in text


def test_flags_that_are_not_given_leave_the_default_to_the_configuration(flags: argparse.ArgumentParser) -> None:
    assert given(flags.parse_args([]), NAMES) == {}
    words = ["--heat", "200", "--mode", "fan", "--tray", "a", "--tray", "b", "--oven-light"]
    assert Oven(**given(flags.parse_args(words), NAMES)) == Oven(heat=200, mode="fan", trays=("a", "b"), light=True)


@pytest.mark.parametrize("words", [["--heat", "hot"], ["--mode", "steam"]])
def test_a_wrong_value_is_a_usage_error(
    flags: argparse.ArgumentParser, words: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as ended:
        flags.parse_args(words)
    assert ended.value.code == 2 and f"argument {words[0]}: invalid" in capsys.readouterr().err
