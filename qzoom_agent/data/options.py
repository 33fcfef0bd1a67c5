"""The options of a multiple choice, and which of them an answer means."""

import re
from collections.abc import Mapping, Sequence
from typing import Any, Final, NamedTuple

from qzoom_agent.data.answers import CJK, WIDE, matching
from qzoom_agent.data.columns import items, text, written
from qzoom_agent.errors import ConfigError

# Of a text in plain signs (`WIDE`), which has as many characters as the text itself.
_LABEL: Final = re.compile(r"\s*(?:\(([A-Za-z]|\d{1,2})\)|([A-Za-z]|\d{1,2})[.):、])\s*(?=\S)")
_MARK: Final = re.compile(rf"(?:(?:^|(?<=[\s?:;,{CJK}]))\(([A-H])\)|(?:^|(?<=\s))([A-H])[.):、])[ \t]*")
_MOST: Final = 26


class Options(NamedTuple):
    """The options in the order shown, and the labels that the table gives them (A, B, ... where it gives none)."""

    texts: tuple[str, ...] = ()
    labels: tuple[str, ...] = ()


def letter(index: int) -> str:
    """Return the letter of an option: A for 0."""
    return chr(ord("A") + index)


def letters_of(options: Sequence[object]) -> list[str]:
    """Return the letters of these options, A for the first."""
    return [letter(index) for index in range(len(options))]


def listed(options: Sequence[str]) -> str:
    """Return the options one a line, as (A) ..., (B) ..."""
    return "\n".join(f"({letter(index)}) {option}" for index, option in enumerate(options))


def inline_options(text: str) -> tuple[str, ...]:
    """Return the options that a question lists itself, as "(A) red (B) blue" or "A. red" lines; none if it has none.

    >>> inline_options("Which colour? (A) red (B) dark blue\\nAnswer directly.")
    ('red', 'dark blue')
    """
    marks: list[re.Match[str]] = []
    for mark in _MARK.finditer(text.translate(WIDE)):
        if (mark[1] or mark[2]) == letter(len(marks)):
            marks.append(mark)
    if len(marks) < 2:
        return ()
    ends = [*(mark.start() for mark in marks[1:]), len(text)]
    return tuple((text[mark.end() : end].split("\n") or [""])[0].strip() for mark, end in zip(marks, ends, strict=True))


def bare(option: str) -> str:
    """Return an option without the letter before it: "(A) red" is red."""
    mark = _MARK.match(option.strip().translate(WIDE))
    return option.strip()[mark.end() :] if mark else option.strip()


def read_options(cell: object) -> Options:
    """Return the options in a cell: a list, a mapping of labels, or either written as text; none of an empty one.

    Letters that the options repeat ("A. red", "B. green") are their labels, not part of them.

    Raises:
        ConfigError: The cell holds something else, one option, an empty one, or one twice.
    """
    if isinstance(cell, str):
        found: Any = written(cell)
        cell = found if found is not None else inline_options(cell)
        if found is None and not cell:
            raise ConfigError('options are a list: write ["red", "blue"]')
    if isinstance(cell, Mapping) and {"label", "text"} <= cell.keys():
        return _checked(Options(tuple(map(text, cell["text"])), tuple(map(text, cell["label"]))))
    if isinstance(cell, Mapping):
        there = {str(label).strip(): option for label, option in cell.items() if option is not None}
        labels = sorted(there, key=lambda label: (len(label), label))
        return _checked(Options(tuple(text(there[label]) for label in labels), tuple(labels)))
    if not isinstance(cell, Sequence):
        cell = items(cell)
    return _checked(_unlabelled([text(option) for option in cell]))


def gold_letter(gold: object, options: Options) -> str | None:
    """Return the letter (A, B, ...) of the option that a right answer means, or None if it is none of them.

    An answer is the text of an option (compared as replies are, `answers.matching`), its label, its label and text
    ("B. green"), or its place as a number from 0. A text that is an option as written goes before a label. ConfigError
    if it can be read as two different options.
    """
    said = text(gold).strip()
    labels = options.labels or letters_of(options.texts)
    by_text = [at for at, option in enumerate(options.texts) if option.strip() == said]
    place = _place(gold, said, options) if not isinstance(gold, bool) else None
    if not by_text and place is None:
        by_text = _by_label(said, labels, options.texts) or matching(said, options.texts)
    found = {*by_text, *([] if place is None else [place])}
    if len(found) > 1:
        meant = " or ".join(f"({letter(at)}) {options.texts[at]}" for at in sorted(found))
        raise ConfigError(f"the answer {gold!r} may mean {meant}: write the letter")
    return letter(found.pop()) if found else None


def _by_label(said: str, labels: Sequence[str], texts: Sequence[str]) -> list[int]:
    """Return the option whose label stands alone, in brackets or with a point, or before its text."""
    keys = [label.translate(WIDE).casefold() for label in labels]
    alone = said.translate(WIDE).strip("(). :、").casefold()
    if alone in keys:
        return [keys.index(alone)]
    mark = _LABEL.match(said.translate(WIDE))
    key = (mark[1] or mark[2]).casefold() if mark else ""
    if mark is None or key not in keys or not matching(said[mark.end() :], texts[keys.index(key) :][:1]):
        return []
    return [keys.index(key)]


def _place(gold: object, said: str, choice: Options) -> int | None:
    """Return the place that a whole number means; options with numbers as labels are not counted from 0."""
    number = int(gold) if isinstance(gold, float) and gold.is_integer() else gold
    if isinstance(number, str) and said.isascii() and said.isdigit():
        number = int(said)
    counted = any(label.isdigit() for label in choice.labels)
    return number if isinstance(number, int) and not counted and 0 <= number < len(choice.texts) else None


def _unlabelled(options: Sequence[str]) -> Options:
    marks = [_LABEL.match(option.translate(WIDE)) for option in options]
    labels = [(mark[1] or mark[2]).upper() for mark in marks if mark]
    counted = [str(at + 1) for at in range(len(options))]
    if len(options) < 2 or labels not in (letters_of(options), counted):
        return Options(tuple(option.strip() for option in options))
    texts = (option[mark.end() :].strip() for option, mark in zip(options, marks, strict=True) if mark)
    return Options(tuple(texts), tuple(labels))


def _checked(options: Options) -> Options:
    texts = [option.strip() for option in options.texts]
    if not texts:  # an open question among others
        return Options()
    twice = min((text for text in texts if texts.count(text) > 1), default=None)
    if not 2 <= len(texts) <= _MOST:
        raise ConfigError(f"a question has 2 to {_MOST} options; got {len(texts)}")
    if "" in texts or twice is not None:
        raise ConfigError(f"the option {twice!r} stands twice" if twice else "an option is empty")
    if options.labels and len(set(options.labels)) != len(texts):
        raise ConfigError(f"each option has a label of its own; got {', '.join(options.labels)}")
    return Options(tuple(texts), options.labels)
