"""docs/formats.md: the table says what the code does, and each format reads the call that is shown for it."""

from __future__ import annotations

import re
from pathlib import Path

from PIL import Image

from qzoom_agent.errors import ConfigError
from qzoom_agent.models.presets import PRESETS
from qzoom_agent.protocols import PROTOCOLS, ZoomProtocol, native_form
from qzoom_agent.protocols.interface import ToolProtocol
from qzoom_agent.views import ViewStore
from tests.cases import each_case

PAGE = (Path(__file__).resolve().parents[2] / "docs" / "formats.md").read_text(encoding="utf-8")
CALLS = dict(re.findall(r"<!-- format: (\w+) -->\n```text\n(.*?)\n```$", PAGE, re.M | re.S))
FRAMES = {"per_mille": "thousandths", "unit": "shares", "pixel": "pixels"}


def has_schema(protocol: ZoomProtocol) -> bool:
    """Return True if calls of the format can be native."""
    try:
        return bool(native_form(protocol))
    except ConfigError:
        return False


def row(protocol: ZoomProtocol) -> str:
    """Return the row of the table about a format."""
    known = [name for name, preset in PRESETS.items() if preset.protocol == protocol.name]
    cells = [
        f"`{protocol.name}`",
        ", ".join(f"`{name}`" for name in known),
        FRAMES[protocol.frame],
        str(protocol.max_calls_per_turn),
        "yes" if has_schema(protocol) else "",
        "yes" if isinstance(protocol, ToolProtocol) else "",
    ]
    return "".join(f"| {cell} " if cell else "| " for cell in cells) + "|"


def test_the_table_has_a_row_for_each_format() -> None:
    assert re.findall(r"^\| `.*$", PAGE, re.M) == [row(protocol) for protocol in PROTOCOLS.values()]


@each_case("name", PROTOCOLS)
def test_the_call_that_is_shown_is_read(name: str) -> None:
    store = ViewStore()
    store.add_original(Image.new("RGB", (400, 400)))
    coarse = store.add_coarse(factor=28, min_tokens=16, max_tokens=64)
    found = PROTOCOLS[name].parse(CALLS[name], [coarse])
    assert len(found.calls) == 1 and not found.problems and not found.repairs, found
    assert set(CALLS) == set(PROTOCOLS)
