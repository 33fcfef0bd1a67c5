r"""The final answer in a reply, and the option that a reply chooses: our own reading, the same for every task.

In this order, the first that is there decides:
    1. the last `<answer>` tag
    2. the last `\boxed{}`
    3. the last "answer is X" (or "answer: X")
    4. for a choice: one option's letter on its own ("B", "(B) red", "... so it is (B)", "Definitely C")
    5. for a choice: the text of exactly one option
    6. nothing: the reply is unparsed. It counts as wrong, and `parse_rate` reports how often that happens.

Inside a tag, a box or after "answer is" steps 4 and 5 apply to what stands there. A reply that names two letters
without saying which it means chooses nothing: guessing here would pay for hedging. "A" before a word in lower case is
an article ("A man"), and letters in the middle of a word never count ("Based" is not B).
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from typing import Final

from qzoom_agent.evaluation.scorers.match import normalise

_OPEN: Final = re.compile("<answer>", re.IGNORECASE)
_CLOSE: Final = re.compile("</answer>", re.IGNORECASE)
_SAYS: Final = re.compile(r"\b(?:answer|choice|option)\b\**(?:\s+(?:is|was)\b|\s*[:=])[ \t]*:?\**[ \t]*", re.IGNORECASE)
# A sentence ends at a line's end or at a full stop before a space: 12.4 and "(B). It" are read rightly.
_SENTENCE: Final = re.compile(r"(.*?)(?:\.(?=\s|\Z)|\n|\Z)", re.DOTALL)
_BOXED: Final = "\\boxed{"
_LEADING: Final = re.compile(r"[\s*(\[]*([A-Za-z])\s*[)\].:,*]")
# Right after a leading letter: "(A) or (B)" chooses nothing, "B. Not A, because ..." chooses B.
_HEDGE: Final = re.compile(r"\s*(?:(?:or|and|[/,&])\s*)?[(\[]?([A-Za-z])(?:[)\].:,]|\s*\Z)")
_BRACKETED: Final = re.compile(r"[(\[]\s*\**([A-Z])\**\s*[)\]]")
_STANDING: Final = re.compile(r"(?<![\w'\u2019-])([A-Z])(?![\w'\u2019]|-\w)(?! [a-z])")
_ALONE: Final = re.compile(r"[\W_]*([A-Za-z])[\W_]*")


def final_answer(text: str) -> str | None:
    """Return the final answer of a reply, or all of it if it marks none; None if that is empty.

    >>> final_answer("I see 12.\\n<answer>12.40</answer>"), final_answer("The answer is 12.4."), final_answer("red")
    ('12.40', '12.4', 'red')
    """
    for found in _marked(text):
        return found
    return text.strip() or None


def choice(text: str, options: Sequence[str]) -> str | None:
    """Return the letter (A for the first option) that a reply chooses, or None if it does not say.

    >>> choice("Based on the crop it is (C)", ["red", "green", "blue"]), choice("A man", ["hat", "scarf"])
    ('C', None)
    """
    for found in _marked(text):
        return _chosen(found, options)
    return _chosen(text, options)


def _marked(text: str) -> Iterator[str]:
    """Yield what the reply itself marks as its answer, the strongest mark first; empty marks are none."""
    tagged = _last_tagged(text)
    if tagged:
        # <answer>\boxed{B}</answer> and <answer>The answer is B</answer> are common.
        yield next(_marked(tagged), tagged)
    boxed = _last_boxed(text)
    if boxed:
        yield boxed
    said = [match.end() for match in _SAYS.finditer(text)]
    if said:
        sentence = _SENTENCE.match(text, said[-1])
        answer = sentence[1].strip().strip("*").strip() if sentence else ""
        if answer:
            yield answer


def _last_tagged(text: str) -> str:
    """Return the text of the last `<answer>`, as far as its end tag; empty if there is none."""
    starts = [match.end() for match in _OPEN.finditer(text)]
    return _CLOSE.split(text[starts[-1] :], maxsplit=1)[0].strip() if starts else ""


def _last_boxed(text: str) -> str | None:
    """Return the content of the last `\\boxed{}`, braces balanced; None if there is none or it is not closed."""
    start = text.rfind(_BOXED)
    if start < 0:
        return None
    depth = 1
    for at in range(start + len(_BOXED), len(text)):
        depth += {"{": 1, "}": -1}.get(text[at], 0)
        if depth == 0:
            inner = text[start + len(_BOXED) : at].strip()
            plain = re.fullmatch(r"\\(?:text|textbf|mathrm|mathbf)\{(.*)\}", inner, re.DOTALL)
            return plain[1].strip() if plain else inner
    return None


def _chosen(text: str, options: Sequence[str]) -> str | None:
    letters = "".join(chr(ord("A") + index) for index in range(len(options)))
    alone = _ALONE.fullmatch(text)
    if alone and alone[1].upper() in letters:
        return alone[1].upper()
    by_text = _by_text(text, options)
    if by_text is not None and normalise(text) == normalise(options[letters.index(by_text)]):
        # "A. Smith" may be an option's text, and then the A in it is no letter.
        return by_text
    leading = _LEADING.match(text)
    if leading and leading[1].upper() in letters:
        other = _HEDGE.match(text, leading.end())
        return None if other and other[1].upper() in letters else leading[1].upper()
    for pattern in (_BRACKETED, _STANDING):
        named = {letter for letter in pattern.findall(text) if letter in letters}
        if named:
            return named.pop() if len(named) == 1 else None
    return by_text


def _by_text(text: str, options: Sequence[str]) -> str | None:
    """Return the letter of the one option whose text stands in `text` as whole words.

    An option that is part of another one that is found ("red" in "dark red") does not count beside it.
    """
    said = f" {_words(text)} "
    found = {index: f" {_words(option)} " for index, option in enumerate(options)}
    found = {index: words for index, words in found.items() if words.strip() and words in said}
    longest = [
        index
        for index, words in found.items()
        if not any(words in other and words != other for other in found.values())
    ]
    return chr(ord("A") + longest[0]) if len(longest) == 1 else None


def _words(text: str) -> str:
    return " ".join(filter(None, map(normalise, text.split())))
