"""JSON as models write it: parsed strictly first, then repaired within bounds.

Repaired are quotes of all kinds, unescaped quotes and line breaks inside strings, True/False/None, bare words, numbers
such as `.5` or `007`, wrong commas and brackets, and a missing end. The repaired text goes to the standard decoder, so
the result is always plain JSON data. The pass is linear and nesting is capped; nothing is evaluated.
"""

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

MAX_CHARS = 8192
"""Characters looked at in one value; a zoom call needs about 100."""
MAX_BRACKETS = 256
"""Brackets opened in one value, which bounds the decoder's recursion."""
_STARTS = 4
_OPEN = re.compile(r"[{\[]")
_WORD = re.compile(r"[^\s,:{}\[\]\"'\u2018\u2019\u201c\u201d]+")
_NUMBER = re.compile(r"[-+]?(?:\d{1,300}(?:\.\d{0,300})?|\.\d{1,300})(?:[eE][-+]?\d{1,3})?")
_NAMES = {"true": "true", "false": "false", "null": "null", "none": "null"}
_QUOTES = {'"': '"', "\u201c": '"', "\u201d": '"', "'": "'", "\u2018": "'", "\u2019": "'"}
_CLOSERS = {"{": "}", "[": "]"}
_ESCAPES = {"n": "\n", "t": "\t", "r": "\r", "b": "\b", "f": "\f"}


class Repaired(NamedTuple):
    """A JSON value found in a text, the offset just after it, and the repairs it needed."""

    value: object
    end: int
    repairs: tuple[str, ...]


def read_json(text: str, start: int = 0) -> Repaired | None:
    """Return the first readable object or array that starts at one of the first brackets after `start`, or None."""
    for _ in range(_STARTS):
        opening = _OPEN.search(text, start)
        if opening is None:
            return None
        found = _read_at(text, opening.start())
        if found is not None:
            return found
        start = opening.end()
    return None


def _read_at(text: str, start: int) -> Repaired | None:
    piece = text[start : start + MAX_CHARS]
    if piece.count("[") + piece.count("{") > MAX_BRACKETS:
        return None
    try:
        value, length = json.JSONDecoder().raw_decode(piece)
        return Repaired(value, start + length, ())
    except ValueError:
        repaired = _Repairer(piece).run()
    try:
        return Repaired(json.loads(repaired.json), start + repaired.at, tuple(dict.fromkeys(repaired.repairs)))
    except ValueError:
        return None


@dataclass(slots=True)
class _Repairer:
    """One left-to-right pass; `out` is JSON so far, `last` and `prior` the kinds of tokens written last."""

    text: str
    at: int = 0
    out: list[str] = field(default_factory=list)
    open: list[str] = field(default_factory=list)
    last: str = ""
    prior: str = ""
    repairs: list[str] = field(default_factory=list)

    @property
    def json(self) -> str:
        return "".join(self.out)

    def run(self) -> "_Repairer":
        while self.at < len(self.text):
            char = self.text[self.at]
            if char in _QUOTES:
                self._value(json.dumps(self._string()))
            elif char in "{[":
                self.at += 1
                self._value(char, kind="open")
                self.open.append(char)
            elif char in "}]":
                self.at += 1
                self._close(char)
                if not self.open:
                    return self
            elif char in ",:":
                self.at += 1
                self._separator(char)
            elif char.isspace():
                self.at += 1
            else:
                self._word()
        self._note("closing brackets added")
        while self.open:
            self._shut()
        return self

    def _note(self, repair: str) -> None:
        self.repairs.append(repair)

    def _value(self, written: str, *, kind: str = "value") -> None:
        if self.last == "value":
            self.out.append(",")
            self.last = ","
            self._note("missing comma added")
        self.out.append(written)
        self.prior, self.last = self.last, kind

    def _separator(self, char: str) -> None:
        if self.last == "value":
            self.out.append(char)
            self.last = char
        else:
            self._note(f"extra {'comma' if char == ',' else 'colon'} dropped")

    def _close(self, char: str) -> None:
        if char not in (_CLOSERS[opened] for opened in self.open):
            self._note("extra bracket dropped")
            return
        while _CLOSERS[self.open[-1]] != char:
            self._note("crossed brackets mended")
            self._shut()
        self._shut()

    def _shut(self) -> None:
        if self.open[-1] == "{" and self.last == "value" and self.prior in ("open", ","):
            self.out.pop()
            self.last = self.prior
            self._note("key without a value dropped")
        if self.last == ",":
            self.out.pop()
            self._note("trailing comma dropped")
        elif self.last == ":":
            self.out.append("null")
            self._note("missing value read as null")
        self.out.append(_CLOSERS[self.open.pop()])
        self.prior, self.last = "", "value"

    def _word(self) -> None:
        found = _WORD.match(self.text, self.at)
        assert found is not None  # run() has handled every character that cannot start a word
        self.at = found.end()
        word = found[0]
        if _NUMBER.fullmatch(word):
            self._value(repr(float(word)))
        elif word.lower() in _NAMES:
            self._value(_NAMES[word.lower()])
        else:
            self._value(json.dumps(word))
            self._note("quotes added")

    def _string(self) -> str:
        """Return the string whose opening quote is at `at`; a quote ends it only where JSON could go on."""
        quote = _QUOTES[self.text[self.at]]
        if self.text[self.at] != '"':
            self._note("quotes replaced")
        letters: list[str] = []
        at = self.at + 1
        while at < len(self.text):
            char = self.text[at]
            if char == "\\" and at + 1 < len(self.text):
                letters.append(_ESCAPES.get(self.text[at + 1], self.text[at + 1]))
                at += 2
                continue
            at += 1
            if _QUOTES.get(char) == quote:
                if _can_end(self.text, at):
                    self.at = at
                    return "".join(letters)
                self._note("quote inside a string kept")
            letters.append(char)
        self.at = at
        self._note("closing quote added")
        return "".join(letters)


def _can_end(text: str, at: int) -> bool:
    """Return whether a string may have ended just before `at`: before the end, punctuation, or a gap and a string."""
    following = at
    while following < len(text) and text[following].isspace():
        following += 1
    if following == len(text) or text[following] in ",:}]":
        return True
    return following > at and text[following] in _QUOTES


def objects_in(text: str, repairs: list[str], *, limit: int) -> Sequence[object]:
    """Return up to `limit` objects and arrays that follow each other in a text; prose between them is skipped."""
    values: list[object] = []
    at = 0
    while len(values) < limit and (found := read_json(text, at)):
        values.append(found.value)
        repairs += found.repairs
        at = found.end
    return values
