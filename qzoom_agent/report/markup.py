"""HTML from untrusted text, small enough to check by eye.

`el` builds an element. The only strings it takes as markup are `Html`, which only `el` and `join` make from parts;
everything else is text or an attribute's value, and is escaped there and nowhere else, so that nothing is escaped
twice or forgotten. Characters that a browser would hide or obey (controls, direction overrides) are spelled out.
Deliberately no templates: a template is a second language in which to forget an escape.
"""

from __future__ import annotations

import html
import re
import unicodedata
from collections.abc import Iterable, Sequence

MAX_TEXT = 8_000
"""Characters of one text that a page shows."""


class Html(str):
    """Markup; any other string is text."""

    __slots__ = ()


Child = str | None | Sequence[str | None]
_VOID = frozenset({"img", "input", "meta"})
_NAMES = {"cls": "class"}
# Everything but tab, newline and plain Latin is looked up, which keeps the common case fast.
_UNUSUAL = re.compile("[^\\t\\n\\x20-\\x7e\\xa1-\\xac\\xae-\\u02ff]")
_SPELLED = frozenset({"Cc", "Cf", "Cs", "Co", "Zl", "Zp"})
# Joiners carry meaning in emoji and in several scripts and cannot reorder a line.
_JOINERS = "\u200c\u200d"


def el(tag: str, *children: Child, **attributes: str | bool | None) -> Html:
    """An element. `cls` stands for class, `_` in a name for `-`; None and False leave an attribute out."""
    written = "".join(
        f" {_NAMES.get(name, name.replace('_', '-'))}" + ("" if value is True else f'="{html.escape(legible(value))}"')
        for name, value in attributes.items()
        if value is not None and value is not False
    )
    return Html(f"<{tag}{written}>" if tag in _VOID else f"<{tag}{written}>{join(children)}</{tag}>")


def join(children: Iterable[Child]) -> Html:
    """Children one after another; None is nothing, a list is its items."""
    parts: list[str] = []
    for child in children:
        if isinstance(child, Html):
            parts.append(child)
        elif isinstance(child, str):
            parts.append(html.escape(legible(child), quote=False))
        elif child is not None:
            parts.append(join(child))
    return Html("".join(parts))


def legible(text: str) -> str:
    """`text` with control, direction and private characters written as [U+202E]."""

    def spell(match: re.Match[str]) -> str:
        character = match[0]
        unseen = unicodedata.category(character) in _SPELLED and character not in _JOINERS
        return f"[U+{ord(character):04X}]" if unseen else character

    return _UNUSUAL.sub(spell, text)


def cut(text: str, limit: int) -> str:
    """The beginning of a text, for a place with room for one line or two."""
    return text if len(text) <= limit else text[:limit].rstrip() + "..."


def bounded(text: str) -> str:
    """A text as far as a page shows it, and how much is missing."""
    if len(text) <= MAX_TEXT:
        return text
    return f"{text[:MAX_TEXT]}\n[{len(text) - MAX_TEXT:,} more characters are in the trace]"
