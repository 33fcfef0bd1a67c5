"""JSON as models write it: parsed strictly first, then repaired within bounds.

Repaired are quotes of all kinds, unescaped quotes and line breaks inside strings, True/False/None, bare words, numbers
such as `.5` or `007`, tuples, wrong or full-width commas and colons, wrong brackets, and a missing end. One pass over
the tokens builds plain values; it is linear, nesting is capped, and nothing is evaluated.
"""

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

from qzoom_agent.files import valid_unicode

MAX_CHARS = 8192
"""Characters looked at in one value; a zoom call needs about 100."""
MAX_BRACKETS = 256
"""Brackets opened in one value, which bounds the decoder's recursion."""
REPAIRED = "broken JSON repaired"
_STARTS = 4
_OPEN = re.compile(r"[{\[]")
_NUMBER = re.compile(r"[-+]?(?:\d{1,300}(?:\.\d{0,300})?|\.\d{1,300})(?:[eE][-+]?\d{1,3})?")
_NAMES = {"true": True, "false": False, "null": None, "none": None}
_DOUBLE, _SINGLE = '"\u201c\u201d', "'\u2018\u2019"
_WIDE = "\uff0c\u3001\uff1a\uff1b"
"""Full-width commas, colon and semicolon."""
_CLOSERS = {"{": "}", "[": "]", "(": "]"}
_ESCAPE = re.compile(r"\\(?:u([0-9a-fA-F]{4})|(.))", re.DOTALL)
_ESCAPES = {"n": "\n", "t": "\t", "r": "\r", "b": "\b", "f": "\f"}


def _string(name: str, quotes: str) -> str:
    """Return a pattern of a string; a quote ends it only where JSON could go on: before punctuation or a string."""
    wide = rf"[\uff1a]|[\uff0c\u3001]\s*[{_DOUBLE}{_SINGLE}\d\[{{]"
    end = rf"[{quotes}](?=\s*(?:[,:=}}\])]|{wide}|\Z)|\s+[{_DOUBLE}{_SINGLE}])"
    return rf"[{quotes}](?P<{name}>(?:\\.|(?!{end}).)*)[{quotes}]?"


_TOKEN = re.compile(
    rf"\s*(?:{_string('double', _DOUBLE)}|{_string('single', _SINGLE)}|(?P<mark>[{{}}\[\](),:;={_WIDE}])"
    rf"|(?P<word>[^\s{{}}\[\](),:;={_WIDE}{_DOUBLE}{_SINGLE}]+))",
    re.DOTALL,
)


class Repaired(NamedTuple):
    """A JSON value found in a text, the offset just after it, and whether it had to be repaired."""

    value: object
    end: int
    repaired: bool


def read_json(text: str, start: int = 0) -> Repaired | None:
    """Return the first object or array that starts at one of the first brackets after `start`, or None."""
    for _ in range(_STARTS):
        opening = _OPEN.search(text, start)
        if opening is None:
            return None
        piece = text[opening.start() : opening.start() + MAX_CHARS]
        if sum(map(piece.count, _CLOSERS)) <= MAX_BRACKETS:
            try:
                value, length = json.JSONDecoder().raw_decode(piece)
                return Repaired(value, opening.start() + length, False)
            except ValueError:
                value, length = _repair(piece)
                return Repaired(value, opening.start() + length, True)
        start = opening.end()
    return None


def objects_in(text: str, repairs: list[str], *, limit: int) -> Sequence[object]:
    """Return up to `limit` objects and arrays that follow each other in a text; prose between them is skipped."""
    values: list[object] = []
    at = 0
    while len(values) < limit and (found := read_json(text, at)):
        values.append(found.value)
        repairs += [REPAIRED] if found.repaired else []
        at = found.end
    return values


@dataclass(slots=True)
class _Open:
    """An object or array that is not closed yet."""

    value: dict[str, object] | list[object]
    key: str | None = None
    """A key that waits for its value."""
    colon: bool = False

    def add(self, item: object) -> None:
        if isinstance(self.value, list):
            self.value.append(item)
        elif self.key is None:
            self.key = str(item)
        else:
            self.value[self.key] = item
            self.key, self.colon = None, False

    def separate(self) -> None:
        """Drop a key without a value; one with a colon has the value null."""
        if self.key is not None and self.colon:
            self.add(None)
        self.key, self.colon = None, False


def _unescaped(found: re.Match[str]) -> str:
    return chr(int(found[1], 16)) if found[1] else _ESCAPES.get(found[2], found[2])


def _repair(text: str) -> tuple[object, int]:
    """Return the value whose opening bracket is the first character, and the offset just after it."""
    values: list[object] = []
    stack, closers, at = [_Open(values)], [""], 0

    def close() -> str:
        last = stack.pop()
        last.separate()
        stack[-1].add(last.value)
        return closers.pop()

    while found := _TOKEN.match(text, at):
        at = found.end()
        kind = found.lastgroup or "word"
        token = found[kind]
        if kind == "word":
            stack[-1].add(float(token) if _NUMBER.fullmatch(token) else _NAMES.get(token.lower(), token))
        elif kind != "mark":
            stack[-1].add(valid_unicode(_ESCAPE.sub(_unescaped, token)))
        elif token in _CLOSERS:
            stack.append(_Open({} if token == "{" else []))
            closers.append(_CLOSERS[token])
        elif token in ":=\uff1a":
            stack[-1].colon = True
        elif token in ",;\uff0c\u3001\uff1b":
            stack[-1].separate()
        elif (closer := "]" if token == ")" else token) in closers:
            while close() != closer:
                pass
            if values:
                break
    while not values:
        close()
    return values[0], at
