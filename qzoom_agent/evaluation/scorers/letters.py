r"""The option that a reply to a multiple choice chooses: our own reading, the same for every task.

What the reply marks as its answer is read (`extraction.marked`), else all of it; in this order:
    1. one letter on its own
    2. the text of exactly one option, and nothing else
    3. letters in brackets, in bold, or before a full stop at the start; else letters that stand by themselves
    4. texts of options as whole words, which no sign or unit makes another value
    5. nothing, or more than 10,000 characters that mark no answer: the reply is unparsed. It counts as wrong, and
       `parse_rate` reports how often that happens.

What is denied ("not B", "B is wrong") is not chosen. A reply that names two options chooses none: guessing here would
pay for hedging. "A" before a word is an article ("A man"), and letters in a word, in an option's text ("Gate A") and
after a number ("15 A") never count.
"""

import re
import unicodedata
from collections.abc import Iterator, Sequence
from typing import Final, NamedTuple

from qzoom_agent.data.answers import LONGEST, Token, matching, tokens, written
from qzoom_agent.data.options import letter
from qzoom_agent.evaluation.scorers.extraction import marked, said

_FIRST: Final = 0xE000
"""Character that stands for the first option's text; from `_LETTER` on for the first option's letter."""
_LETTER: Final = 0xE100
_STRONG: Final = 0xE200
_PLACE: Final = "[\ue000-\ue2ff]"
_ALONE: Final = re.compile(r"[\W_]*([A-Za-z])[\W_]*")
_NO_WORD: Final = "0-9A-Za-z\u00c0-\u024f\u0370-\u03ff\u0400-\u04ff"
_LEADING: Final = re.compile(r"([\s*#>\"'`(\[-]*)([A-Za-z])(\s*[).:\]\u3001]+)(?![A-Za-z]\.)")
_LISTED: Final = re.compile(r"(?m)^[\s*#>-]*\(?([A-Z])\s*[.):]\s")
_BRACKETED: Final = re.compile(
    r"[(\[{\u3010\u300c\u300e]\s*\**([A-Z])\**\s*[)\]}\u3011\u300d\u300f]|\*\*\(?([A-Z])\)?[.:]?\*\*"
)
_STANDING: Final = re.compile(
    rf"(?<![{_NO_WORD}'\u2019\u00b0.+#$&-])(?<!\d )(?<!\bN/)([A-Z])(?![{_NO_WORD}'\u2019+#]|-\w|\.\w|&)"
)
_ASKED: Final = re.compile(r"\b(?:option|choice|letter)\s+([a-z])(?=\s*(?:\Z|[.,;:)]|is\b))")
_LOWER: Final = re.compile(r"([a-z])(?=\s*(?:\Z|[).:,;]|(?:because|since|as|due)\b))")
# What may follow the letter A, where an article's noun would stand.
_NO_ARTICLE: Final = re.compile(
    r"\s*(?:\Z|[^\w\s]|\s(?:is|was|or|and|because|as|since|seems|looks|would|must|matches|fits|isn't|are|nor|but|instead"
    r"|over|with|for|not|es|est|ist|é|oder|ou|o|y|und|et|e|no)\b|\s[A-Z]\b|[\u3040-\uffff])"
)
_NO_PRONOUN: Final = re.compile(r"\s*(?:\Z|[^\w\s'\u2019]|\s(?:is|or|and)\b)")
_CLAUSE: Final = re.compile(
    r"[.;!?\n\u3002]|(?<!anything),?\s(?:but|so|therefore|thus|hence|instead(?! of)|rather(?! than)|sondern|sino|pero"
    r"|mais|aber|mas|ma|но)\b|,\s*(?:it'?s|it is|the answer|i think|es ist|c'est|es la|所以|因此|是|[选選](?![项項]))"
    r"|而是|ではなく"
)
_LIST: Final = rf"{_PLACE}\s*(?:,|/|、)?\s*(?:or|and|nor|ni|y|o|und|oder|ou|et|或|和)?"
_FILLER: Final = (
    r"(?:\s|[(\"'*]|(?:be|been|the|an?|is|it'?s?|options?|answers?|choices?|letters?|really|actually|simply|correct|right"
    r"|definitely|necessarily|likely|probably|any|of|either|both|é|è|es|est|ist|la|le|les|el|los|die|der|das|den|eine?"
    r"|opción|réponse|respuesta|antwort|lettre|letra|que|selected|choos\w+|pick\w*|select\w*|say\w*|think\w*|believe"
    rf"|look\w*|like|seem\w*|see|show\w*|have|here|to|选项|选|答案|是)(?![a-z])|{_LIST})*"
)
_DENIED_BEFORE: Final = re.compile(
    r"(?:\b(?:not(?! only)|cannot|never|neither|nor|except(?: for)?|excluding|exclude[sd]?|eliminat\w+|rul\w+ out"
    r"|reject\w*|discard\w*|unlike|other than|rather than|instead of|hardly|unlikely|doubt|anything but|no es|no son"
    r"|excepto|salvo|descart\w+|ni|nicht|kein\w*|außer|weder|noch|pas|sauf|não|nem|exceto|non|tranne|niet|nie|не|нет"
    r"|кроме|không phải|ليست?|without(?! (?:a )?doubt))\b|n't\b|\bno(?=\s)"
    rf"|不是|不选|不選|不为|不為|并非|並非|绝非|除了|排除|非|不应选|不能选){_FILLER}\Z"
)
_AND: Final = rf"(?:\s*(?:,|and|or|nor|&|/|und|et|y|ou|oder|和|或|、)\s*{_PLACE}[)\"'*\]]*)*"
_WRONG: Final = (
    r"(?:not|never|wrong|incorrect|false|impossible|excluded|eliminated|ruled out|out|falsch|nicht|pas|incorrect[oae]"
    r"|fausse?|falsa|falso|errad[oa]|errat[oa]|sbagliat[oa])\b"
)
_DENIED_AFTER: Final = re.compile(
    rf"[)\"'*\]]*{_AND}\s*(?:(?:is|are|was|were|can|could|would|will|does|do|did|has|have|seems?|looks?|must|should|may"
    rf"|might|ist|sind|es|está|est|é|è|n'est|no es)(?:n't\b|\s+(?:\w+\s+){{0,2}}?{_WRONG})|can't\b|cannot\b|won't\b"
    r"|no\s+es\b|не\b|(?:选项)?(?:是)?(?:不对|不正确|错误|错的|错|不是|不符|被排除|除外)"
    r"|以外|では?な|じゃな|ではあり|は違|は間違|(?:가|이|는|은)\s*(?:아니|아닙|틀)|değil|नहीं)"
)
_HENCE: Final = re.compile(
    r"\b(?:so|therefore|thus|hence|i(?:'ll| will|'d| would)? (?:choose|pick|select|go with)|my answer)\b|所以|因此|故"
)
_OPENING: Final = re.compile(rf"\W*{_PLACE}[,.:;!]")
_JOINED: Final = re.compile(
    r"[^\w\n.]*(?:or|and|oder|und|ou|et|o|y|或者|或|和|または|か)?"
    rf"(?:\s+(?:maybe|perhaps|possibly|even|it (?:could|might) be))?[^\w\n.]*(?={_PLACE})"
)
_NEAR: Final = 160
"""Characters around a name that may deny it."""
_BRIEF: Final = 15
"""Words of a reply in which a letter and another option's text contradict one another."""


class _Name(NamedTuple):
    """An option that is named in a text, and how strongly."""

    option: int
    strength: int
    """2: a letter in brackets, or what the reply opens with; 1: a letter by itself; 0: the option's text."""
    at: int


def choice(text: str, options: Sequence[str]) -> str | None:
    """Return the letter (A for the first option) that a reply chooses, or None if it does not say.

    >>> options = ["red", "green", "blue"]
    >>> [choice(text, options) for text in ("So it is (C)", "A man", "A or B", "It is not blue. B", "Green!")]
    ['C', None, None, 'B', 'B']
    """
    reply = said(text)
    found = marked(reply)
    index = _chosen(reply if found is None else found, options, answer=found is not None)
    return None if index is None else letter(index)


def _chosen(text: str, options: Sequence[str], *, answer: bool) -> int | None:
    """Return the index of the option that `text` names; `answer`: the reply says that this is its answer."""
    if len(text) > LONGEST:
        return None
    alone = _ALONE.fullmatch(text)
    if (
        alone
        and (index := ord(alone[1].upper()) - ord("A")) < len(options)
        and not text.rstrip().endswith(("+", "-", "#"))
    ):
        return index
    whole = matching(text, options)
    if whole:
        return whole[0] if len(whole) == 1 else None
    form, names = _names(text, options, answer=answer)
    denied = {one.option for one in names if _denied(form, one.at)}
    names = [one for one in names if one.option not in denied]
    strongest = max((one.strength for one in names), default=0)
    if strongest == 2:
        strong = {one.at for one in names if one.strength == 2}
        chosen = {one.option for one in names if one.at in strong or _joins(form, one.at, strong)}
        if len(chosen) == 1 and _contradicted(form, names):
            return None
    else:
        chosen = {one.option for one in names if one.strength == strongest}
        if strongest == 1 and len(form.split()) <= _BRIEF:
            chosen = {one.option for one in names}
    if len(chosen) > 1:
        chosen = _concluded(form, names)
    return chosen.pop() if len(chosen) == 1 else None


def _names(text: str, options: Sequence[str], *, answer: bool) -> tuple[str, list[_Name]]:
    """Return `text` in lower case with a character for every name of an option, and the names."""
    form = written(_with_letters(text, len(options), answer=answer))
    read = list(tokens(form))
    spans = sorted(_spans(read, options), key=lambda span: (span[0] - span[1], span[0]))
    taken: list[tuple[int, int, int]] = []
    used = bytearray(len(form) + 1)
    for start, end, option in spans:  # the longest first: "dark red" is not "red"
        if not any(used[start:end]):
            used[start:end] = b"\1" * (end - start)
            taken.append((start, end, option))
    parts, at = [], 0
    for start, end, option in sorted(taken):
        parts += [form[at:start], chr(_FIRST + option)]
        at = end
    form = "".join([*parts, form[at:]])
    names = [_name(ord(char), place) for place, char in enumerate(form) if _FIRST <= ord(char) < _STRONG + 26]
    if names and _OPENING.match(form):  # "Yes, there is no car."
        names[0] = names[0]._replace(strength=2)
    return form, names


def _name(code: int, at: int) -> _Name:
    strength = (code >= _LETTER) + (code >= _STRONG)
    return _Name(code - (_FIRST, _LETTER, _STRONG)[strength], strength, at)


def _with_letters(text: str, count: int, *, answer: bool) -> str:
    """Return `text` with a character in place of each letter that names one of `count` options."""

    def name(char: str, base: int, otherwise: str) -> str:
        index = ord(char.upper()) - ord("A")
        return f" {chr(base + index)} " if index < count else otherwise

    leading = _LEADING.match(text)
    if len({found[1] for found in _LISTED.finditer(text)}) > 1:  # "A. red, B. blue" in lines: all are named
        text = _LISTED.sub(lambda found: "\n" + name(found[1], _STRONG, found[0]), text)
    elif leading:
        text = leading[1].rstrip("([") + name(leading[2], _STRONG, leading[2] + leading[3]) + text[leading.end() :]
    elif answer and (lower := _LOWER.match(text)):
        text = name(lower[1], _LETTER, lower[1]) + text[lower.end() :]
    text = _BRACKETED.sub(lambda found: name(found[1] or found[2], _STRONG, found[0]), text)
    text = _ASKED.sub(lambda found: name(found[1], _LETTER, found[0]), text)

    def standing(found: re.Match[str]) -> str:
        rest = text[found.end() : found.end() + 24]
        article = (found[1] == "A" and not _NO_ARTICLE.match(rest)) or (found[1] == "I" and not _NO_PRONOUN.match(rest))
        return found[0] if article else name(found[1], _LETTER, found[0])

    return _STANDING.sub(standing, text)


def _spans(read: Sequence[Token], options: Sequence[str]) -> Iterator[tuple[int, int, int]]:
    """Yield (start, end, option) of the options' texts among tokens, unless a sign beside one changes its value."""
    plain = [_plain(token) for token in read]
    places: dict[str, list[int]] = {}
    for at, word in enumerate(plain):
        places.setdefault(word, []).append(at)
    for index, option in enumerate(options):
        wanted = [token.text for token in tokens(option)]
        for at in places.get(wanted[0], ()) if wanted else ():
            end = at + len(wanted)
            start, stop = read[at].start, read[min(end, len(read)) - 1].end
            if plain[at:end] == wanted and not (_alters(read, at - 1, start) or _alters(read, end, stop)):
                yield start, stop, index


def _plain(token: Token) -> str:
    code = ord(token.text[0])
    letter = len(token.text) == 1 and _LETTER <= code < _STRONG + 26
    return chr(ord("a") + (code - _LETTER) % (_STRONG - _LETTER)) if letter else token.text


def _alters(read: Sequence[Token], at: int, edge: int) -> bool:
    """Return whether a token changes the value of the text that begins or ends at `edge`."""
    if not 0 <= at < len(read) or ord(read[at].text[0]) >= _FIRST:
        return False
    token = read[at]
    if token.kind == "word":  # it goes on after a vowel sign
        return at > 0 and token.start == edge and _is_mark(read[at - 1])
    if _is_mark(token):  # of another word, unless it touches
        return edge in (token.start, token.end)
    return token.kind == "sign" and token.text not in "='\""


def _is_mark(token: Token) -> bool:
    """Return whether a token is a vowel sign or an accent."""
    return unicodedata.category(token.text[0])[0] == "M"


def _denied(form: str, at: int) -> bool:
    before, after = form[max(0, at - _NEAR) : at], form[at + 1 : at + _NEAR]
    clause = [match.end() for match in _CLAUSE.finditer(before)]
    before = before[clause[-1] :] if clause else before
    end = _CLAUSE.search(after)
    return (
        _DENIED_BEFORE.search(before) is not None
        or _DENIED_AFTER.match(after[: end.end()] if end else after) is not None
    )


def _joins(form: str, at: int, strong: set[int]) -> bool:
    """Return whether the name at `at` is joined to a strong one: "(A) or B"."""
    after = _JOINED.match(form, at + 1, at + 24)
    if after and after.end() in strong and after.end() > at + 1:
        return True
    return any(at - 24 < one < at and (joint := _JOINED.match(form, one + 1)) and joint.end() == at for one in strong)


def _contradicted(form: str, names: Sequence[_Name]) -> bool:
    """Return whether the reply is a letter and the text of another option: "(B) red" where red is A."""
    return len(names) == 2 and len({one.option for one in names}) == 2 and not re.sub(rf"{_PLACE}|\W", "", form)


def _concluded(form: str, names: Sequence[_Name]) -> set[int]:
    """Return what the last clause names, if it is a conclusion: "... so it is C"."""
    hence = [match.end() for match in _HENCE.finditer(form)]
    after = [one for one in names if hence and one.at >= hence[-1]]
    strongest = max((one.strength for one in after), default=0)
    return {one.option for one in after if one.strength == strongest}
