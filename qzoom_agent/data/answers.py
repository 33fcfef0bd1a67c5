"""Whether two short answers are the same: pure functions of two texts, for data, evaluation and rewards alike.

Two answers are the same if their normal forms are (`normalise`). Case, spaces, brackets and the punctuation of prose
are not part of it; every sign that means something is: minus, decimal point and comma, fraction, range, time, date,
relation, currency, per cent, degree, and the sign of a grade. What is equal as written is equal before anything is
normalised.

Deliberately not here: extracting an answer from a longer text. A reply that buries the answer in a sentence is wrong
here, because a rule that accepts it ("contains the gold") rewards replies that list every possibility.
"""

import re
import unicodedata
from collections.abc import Callable, Iterator, Sequence
from decimal import Decimal
from typing import Final, NamedTuple

CJK: Final = "\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uac00-\ud7af\uf900-\ufaff"
"""Scripts whose words no spaces part: each of these characters is a token of its own."""
FULL_WIDTH: Final = {code: code - 0xFEE0 for code in range(0xFF01, 0xFF5F)} | {0x3000: 0x20}
"""Plain signs, digits and letters for full-width ones."""
WIDE: Final = FULL_WIDTH | {0x2019: 0x27} | {0x24B6 + at: 0x41 + at for at in range(26)}
"""The same, a straight apostrophe, and A for the letter A in a circle."""
_SIGNS: Final = str.maketrans(
    dict.fromkeys("\u2010\u2011\u2012\u2013\u2014\u2015\u2212\ufe63\uff0d", "-")
    | {"\u00d7": "x", "\u2044": "/", "\u2215": "/", "\u00f7": "/", "\u2236": ":", "\u2032": "'", "\u2033": '"'}
    | {"\u066a": "%", "\u066b": ".", "\u066c": ","}
    | {"\u2019": "'", "\u201c": " ", "\u201d": " ", "\u00ab": " ", "\u00bb": " ", "\u00ba": "\u00b0"}
)
_MARKS: Final = frozenset("\u00ae\u00a9\u2122|`\u00b4\u00a8")
"""Symbols that mean nothing in an answer."""
_VULGAR: Final = re.compile("(?<=[0-9])(?=[\u00bc-\u00be\u2150-\u215e])")
_RAISED: Final = re.compile(
    "(?<=[0-9)])(?=[\u2070\u00b9\u00b2\u00b3\u2074-\u207b\u207f])|(?=[\u207a\u207b])(?<![\u2070-\u207f])"
)
_LATEX: Final = (
    (re.compile(r"\\[dt]?frac\{(-?[\d.]+)\}\{([\d.]+)\}"), r"\1/\2"),
    (re.compile(r"\\(?:text|textbf|mathrm|mathbf|operatorname)\{([^{}]*)\}"), r"\1"),
    (re.compile(r"\^?\s*\{?\\(?:circ|degree)\}?"), "\u00b0"),
    (re.compile(r"\\times\b"), "x"),
    (re.compile(r"\\[,;!: ]|\\left|\\right|~"), " "),
    (re.compile(r"\\([%$&#_])"), r"\1"),
)
# Case decides here alone: 5 mW is not 5 MW, and 5 Mb is not 5 MB.
_MEGA: Final = re.compile("(?<=[0-9])(\\s*)M(?=(?:W|V|A|J|N|Hz|Pa|\u03a9|Wh|eV)\\b)")
_BITS: Final = re.compile(r"(?<=[0-9])(\s*[KMGT])b(?=\b|ps\b|it/s\b|/s\b)")
_WORDS: Final = tuple(
    (re.compile(pattern), sign)
    for pattern, sign in (
        (r"\b(?:minus|negative)\s+(?=[\d.$\u20ac\u00a3\u00a5])", "-"),
        (r"(?<=\d)\s*(?:percent|per cent|pct)\b", "%"),
        (r"(?<=\d)\s*(?:us dollars?|dollars?|usd)\b|\b(?:usd|us\$)\s*(?=-?\d)", "$"),
        (r"(?<=\d)\s*(?:euros?|eur)\b|\beur\s*(?=-?\d)", "\u20ac"),
        (r"(?<=\d)\s*\u5186(?!\w)", "\u00a5"),
        (r"(?<=\d)\s*\uc6d0(?!\w)", "\u20a9"),
        (r"\brs\.?\s*(?=-?\d)", "\u20b9"),
        (r"(?<=\d)\s*gbp\b|\bgbp\s*(?=-?\d)", "\u00a3"),
        (r"<=|=<", "\u2264"),
        (r">=|=>", "\u2265"),
        (r"!=|<>", "\u2260"),
        (r"\bn/a\b", "na"),
        (r"\s*&\s*", " and "),
    )
)
_ARTICLE: Final = re.compile(rf"\s*(?:the\s+(?=[^\W_])|an?\s+(?=[^\W\d_{CJK}]{{2}}))")
_LETTER: Final = rf"[^\W\d_{CJK}]"
GROUPS: Final = r"(?<!\d)(?<!\d[ .,'])\d{1,3}(?:(?: \d{3})+|(?:'\d{3})+)(?:[.,]\d+)?(?![\d.,']*\d)"
"""Pattern of a number whose thousands are parted by spaces or apostrophes."""
_TOKEN: Final = re.compile(
    rf"(?P<date>(?<![\d/.-])\d{{1,4}}(?P<part>[-/.])\d{{1,2}}(?P=part)\d{{1,4}}(?![\d]|[-/.]\d))"
    r"|(?P<time>(?<![\d:])\d{1,2}(?::\d{2}){1,2}(?![\d:]))"
    rf"|(?P<number>{GROUPS}"
    r"|\d+(?:[.,]\d+)*|(?<![\w.])\.\d+)"
    rf"|(?P<word>{_LETTER}+(?:\d+(?:\.\d+)*{_LETTER}*)*)"
    rf"|(?P<script>[{CJK}])"
    r"|(?P<sign>\S)"
)
_WHOLE_GROUPS: Final = re.compile(r"[1-9]\d{0,2}(?:,\d{3})+(?:\.\d+)?|[1-9]\d?(?:,\d{2})+,\d{3}(?:\.\d+)?")
_POINT_GROUPS: Final = re.compile(r"[1-9]\d{0,2}(?:\.\d{3})+,\d+|[1-9]\d{0,2}(?:\.\d{3}){2,}")
_FIGURES: Final = frozenset({"date", "time", "number"})
_UNITS: Final = re.compile(r"[%\u2030$\u00a2-\u00a5\u20a0-\u20cf\u5143]")
_DECIMAL: Final = re.compile(r"-?(?:0|[1-9][0-9]*)(?:\.[0-9]+)?")
_NEAR: Final = 8
LONGEST: Final = 10_000
"""Characters of a text that can be an answer."""


class Token(NamedTuple):
    """A word, a figure or a sign of a text."""

    kind: str
    """"word", "script", "number", "date", "time" or "sign"."""
    text: str
    start: int
    end: int


_NOTHING: Final = Token("", "", 0, 0)
"""The token before the first."""


def normalise(text: str) -> str:
    """Return the normal form of an answer.

    >>> normalise("Exit 24.") == normalise("EXIT-24"), normalise("1,500") == normalise("1500.0")
    (True, True)
    >>> [normalise(text) for text in ("-5 \N{DEGREE SIGN}C", "1,5 kg", "\N{VULGAR FRACTION ONE HALF}", "10 - 20", "B-")]
    ['-5c', '1.5kg', '1/2', '10\u201320', 'b-']
    """
    found = [_NOTHING, _NOTHING]
    for token in tokens(text):
        earlier, before = found[-2:]
        if _currency(before.text) and token.text == "-":
            found.insert(-1, token)  # $-5 is -$5
        elif before.kind in _FIGURES and _currency(token.text) and not _currency(earlier.text):
            found.insert(-1, token)  # 5 $ is $5
        elif before.text == "%" and token.kind in _FIGURES and earlier.kind not in _FIGURES:
            found.insert(-1, token)  # %5 is 5%
        elif before.kind in _FIGURES and token.kind in _FIGURES:
            found += [Token("sign", " ", token.start, token.start), token]  # 1 2 is not 12
        elif before.text == "-" and token.text == "0":
            found[-1] = token
        else:
            found.append(token)
    return "".join(token.text for token in found)


def number(text: str) -> Decimal | None:
    """Return the number that `text` is, or None if it is anything more or less than one number.

    Accepts a sign, grouped thousands ("1,000"), a decimal comma, and one currency or per cent sign. Refuses leading
    zeros ("042"): those are codes.
    """
    form = _UNITS.sub("", normalise(text), count=1) if len(text) <= LONGEST else ""
    return Decimal(form) if _DECIMAL.fullmatch(form) else None


def exact_match(prediction: str | None, gold: str) -> bool:
    """Return whether `prediction` is the answer `gold`; None (no answer came) is wrong.

    A currency or per cent sign that only one of two numbers has does not decide; two different ones do.

    >>> exact_match("Exit 24.", "EXIT-24"), exact_match("7.0", "7"), exact_match("042", "42"), exact_match("-5", "5")
    (True, True, False, False)
    """
    if prediction is None:
        return False
    if prediction.strip() == gold.strip():
        return True
    if max(len(prediction), len(gold)) > LONGEST:
        return False
    said, meant = normalise(prediction), normalise(gold)
    if said == meant:
        # An answer of nothing but punctuation normalises to nothing: any other would match it.
        return bool(meant)
    bare = [_UNITS.sub("", form, count=1) for form in (said, meant)]
    return bare[0] == bare[1] and (bare[0] == said or bare[1] == meant) and _DECIMAL.fullmatch(bare[0]) is not None


def matching(text: str, options: Sequence[str]) -> list[int]:
    """Return the indices of the options that `text` is: as written, else but for case and spaces, else by `normalise`.

    >>> matching("5", ["-5", "5", "5.0"]), matching("5.00", ["-5", "5", "5.0"])
    ([1], [1, 2])
    """
    for form in _FORMS:
        said = form(text)
        found = [index for index, option in enumerate(options) if said and form(option) == said]
        if found:
            return found
    return [index for index, option in enumerate(options) if exact_match(text, option)]


_FORMS: Final[tuple[Callable[[str], str], ...]] = (
    str.strip,
    lambda text: " ".join(unicodedata.normalize("NFKC", text).casefold().split()).rstrip("."),
    normalise,
)


def tokens(text: str) -> Iterator[Token]:
    """Yield the tokens of a text; places are those in its written form (`written`)."""
    form = written(text)
    article = _ARTICLE.match(form)
    last: Token | None = None
    for match in _TOKEN.finditer(form, article.end() if article else 0):
        kind, raw = "date" if match["date"] else str(match.lastgroup), match[0]
        kept = _sign(form, match.start(), last) if kind == "sign" else raw
        if kind == "number":
            kept = _figure(raw)
        elif kind == "date":
            kept = "/".join(part.lstrip("0") or "0" for part in re.split("[-/.]", raw))
        elif kind == "time":
            kept = raw[1:] if raw[0] == "0" and raw[1] != ":" else raw
        if kept:
            last = Token(kind, kept, match.start(), match.end())
            yield last


def written(text: str) -> str:
    """Return a text in one way of writing: Unicode's compatibility form, plain signs, lower case, signs for words."""
    text = _RAISED.sub("^", _VULGAR.sub(" ", text))
    text = unicodedata.normalize("NFKC", text.translate(_SIGNS)).translate(_SIGNS).strip()
    if "\\" in text:
        for pattern, plain in _LATEX:
            text = pattern.sub(plain, text)
    if len(text) > 2 and text[0] == text[-1] and text[0] in "$\"'`":
        text = text[1:-1].strip()
    text = _BITS.sub(r"\1bit", _MEGA.sub(r"\1mega", text)).casefold().replace("i\u0307", "i")  # of the Turkish \u0130
    for pattern, sign in _WORDS:
        text = pattern.sub(sign, text)
    return text


def _figure(raw: str) -> str:
    """Return a number without groups and needless zeros; a code with a leading zero, and a list, as they are."""
    if not raw.isascii():
        raw = "".join(str(unicodedata.digit(char, char)) for char in raw)
    raw = raw.replace(" ", "").replace("'", "")
    if _WHOLE_GROUPS.fullmatch(raw):
        raw = raw.replace(",", "")
    elif _POINT_GROUPS.fullmatch(raw):
        raw = raw.replace(".", "").replace(",", ".")
    elif raw.count(",") == 1 and "." not in raw:
        raw = raw.replace(",", ".")
    elif "." not in raw:
        raw = raw.replace(",", " ")
    whole, _, part = raw.partition(".")
    if (len(whole) > 1 and whole[0] == "0") or not (whole + part).isdigit():
        return raw
    part = part.rstrip("0")
    return (whole or "0") + (f".{part}" if part else "")


def _sign(form: str, at: int, last: Token | None) -> str:
    """Return what a sign means at its place: itself, another writing of it, or nothing."""
    char, before, after = form[at], form[at - 1] if at else " ", form[at + 1] if at + 1 < len(form) else " "
    left, right = form[max(0, at - _NEAR) : at].rstrip()[-1:], form[at + 1 : at + 1 + _NEAR].lstrip()[:1]
    category = unicodedata.category(char)
    if char == "-":
        return _dash(form, at, last)
    if char == "+":
        return char if before.isalnum() or before in "+#" or not right.isdigit() else ""
    if char == "/":
        return char if left.isalnum() and right.isalnum() else ""
    if char in ":^*":
        return {"*": "x"}.get(char, char) if left.isdigit() and right.isdigit() else ""
    if char in "'\"":
        return char if before.isdigit() else ""
    if char == "#":
        return char if before.isalpha() else ""
    if char == "@":
        return char if before.isalnum() and after.isalnum() else ""
    if char == "\u00b0":
        return "" if right in ("c", "f") else char
    if category[0] == "M":
        return "" if char in "\ufe0e\ufe0f" else char
    kept = (category[0] == "S" and char not in _MARKS) or category == "Co" or char in "%\u2030"
    return char if kept else ""


def _dash(form: str, at: int, last: Token | None) -> str:
    """Return "-" for a minus and the sign of a grade, an en dash for a range, nothing for a hyphen."""
    before = form[at - 1] if at else " "
    left, rest = form[max(0, at - _NEAR) : at].rstrip()[-1:], form[at + 1 : at + 1 + _NEAR]
    right, after = rest.lstrip()[:1], rest[:1] or " "
    figure = re.match(r"[$\u00a3\u00a5\u20ac]?\.?\d", rest.lstrip()) is not None
    if left.isdigit() and right.isdigit() and (before == left) == (after == right):
        return "\u2013"
    if figure and not before.isalnum() and (after == right or not left):
        return "-"
    if before.isalnum() and not after.isalnum() and last is not None:
        return "-" if last.kind in _FIGURES or len(last.text) <= 2 else ""
    return ""


def _currency(text: str) -> bool:
    return len(text) == 1 and unicodedata.category(text) == "Sc"
