"""Texts on a terminal, in the letters of every script."""

from __future__ import annotations

from qzoom_agent.cli.console import Console, printable, table
from qzoom_agent.errors import visible
from tests.cases import each_case
from tests.cli.test_cli import Terminal


@each_case(
    "text",
    [
        "12\u202f500\xa0\u20ac",
        "\u6771\u4eac\u3000\u30bf\u30ef\u30fc",
        "\U0001f468\u200d\U0001f469\u200d\U0001f467",
        "\u0645\u06cc\u200c\u062e\u0648\u0627\u0647\u0645",
        "\U0001fae8",
    ],
)
def test_a_text_is_printed_with_the_spaces_and_joiners_of_its_script(text: str) -> None:
    assert printable(text) == visible(text) == text


@each_case("text", ["\x1b[2J", "\u202e", "\u2066", "\u2028", "\ue000", "\x9b"])
def test_what_steers_a_terminal_is_spelt_out(text: str) -> None:
    assert visible(text)[0] == "\\" and text[0] not in visible(text)


def test_the_columns_of_a_table_stand_below_each_other_in_wide_letters() -> None:
    assert table([("\u7ea2\u8272", "1"), ("Mu\u0308ller", "2")], header=("kind", "n")) == [
        "kind    n",
        "------  -",
        "\u7ea2\u8272    1",
        "Mu\u0308ller  2",
    ]


def test_a_progress_line_is_not_wrapped_in_a_narrow_terminal() -> None:
    stream = Terminal()
    Console(stream=stream).progress(1, 1, "x" * 200)
    assert stream.getvalue() == f"\r\x1b[K\x1b[?7l{'x' * 200}\x1b[?7h"
