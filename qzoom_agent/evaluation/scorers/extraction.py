r"""The final answer in a reply: our own reading, the same for every task.

Thinking (`<think>`, closed or not) is not read. Then the first mark that is there decides:
    1. the last complete `<answer>` tag, else one that is not closed
    2. the last `\boxed{}` or `<|begin_of_box|>`
    3. the last `"answer": ...` of a JSON object
    4. the last "answer is X" or "answer: X", in thirteen languages; not "the answer is not X"
    5. for open questions, the only **bold** text
    6. "the answer is not applicable": what it is not, in the words of the reply
    7. nothing: all of the reply
"""

import json
import re
import unicodedata
from collections.abc import Iterator, Sequence
from typing import Final

from qzoom_agent.data.answers import WIDE

_THOUGHT: Final = re.compile(r"<(/?)\s*(?:think|thinking|thought|reasoning|reflection)\s*>", re.IGNORECASE)
_TAG: Final = re.compile("<(/?)answer>", re.IGNORECASE)
_BRACES: Final = re.compile(r"\\f?boxed\s*\{|[{}]|<\|begin_of_box\|>|<\|end_of_box\|>")
_WRAPPED: Final = re.compile(r"\\(?:text|textbf|mathrm|mathbf)\{(.*)\}", re.DOTALL)
_KEY: Final = re.compile(
    r"""["'](?:final[_ ]?)?(?:answer|choice|option|letter|response|result|答案)["']\s*:\s*"""
    r"""("(?:[^"\\]|\\.)*"|'(?:[^'\\]|\\.)*'|\[[^\]\n]{0,300}\]|-?[\d.]+|true|false)""",
    re.IGNORECASE,
)
_NOUN: Final = (
    r"(?:\b(?:answer|choice|option|solution|respuesta|opci[oó]n|réponse|reponse|antwort|lösung|resposta|opção|risposta"
    r"|opzione|antwoord|odpowied[źz]|ответ|вариант|cevap|đáp án)\b|答案|选项|選項|选择|答え|正解|解答|回答|정답|답"
    r"|الإجابة|الجواب|उत्तर)"
)
_VERB: Final = (
    r"(?:\s+(?:is|was|(?:would|should|must|could|might|may|can|will|has to)\s+be|es|est|ist|lautet|wäre|é|è|to|là|هي|هو"
    r"|isn'?t|wasn't|can(?:no|')t\s+be|no\s+es|n'est\s+pas)(?=[\s:*\"'(]|\Z)|\s*[\u2014\u2013]\s"
    r"|\s*(?:应该是|应该为|應該是|应为|應为|应是|不是|是|为|為|選|选|は|이|은|는))"
)
_BESIDE: Final = r"(?:\s+(?:correcta|correcte|corretta|correta|in\s+this\s+case|to\s[^.\n:]{1,80}?))?"
_SAYS: Final = re.compile(
    rf"{_NOUN}[*_\"”」』)]{{0,3}}{_BESIDE}(?:(?P<verb>{_VERB})\s*:?|\s*[*_]{{0,3}}\s*[:=](?!=))[*_\"“「『]{{0,3}}[ \t]*"
    r"|^[#*_\s]{1,8}(?:the\s+)?(?:final\s+)?answer[*_ \t]{0,4}$",
    re.IGNORECASE | re.MULTILINE,
)
_DENIES: Final = re.compile(
    r"\s*(?:(?:not(?! only)|neither|never|no es|nicht|pas|não|non|не)\b(?!-)(?=\W*\w)|(?:不是|不选|不)(?=\W*[a-z]\b))",
    re.IGNORECASE,
)
"""A sentence after "the answer is" that denies something; "neither" and "non-fat" are answers."""
_DENIED: Final = re.compile(r".*(?:(?:n't|not)(?:\s+be)?|no\s+es|n'est\s+pas|不是)\W*\Z", re.IGNORECASE | re.DOTALL)
_END: Final = re.compile(r"[\n。]|[.!?](?=[\"')\]*_]*(?:\s|\Z))")
_TITLES: Final = re.compile(r"dr|mr|mrs|ms|prof|st|ste|mt|ft|lt|col|gen|sgt|capt|rev|hon|gov|sen|rep|pres")
"""Abbreviations that a name follows, and of which some may also end one: "St. Louis", "Main St."."""
_JOINS: Final = re.compile(r"vs|approx|ca|cf|e\.g|i\.e")
"""Abbreviations that something follows."""
_COUNTED: Final = re.compile(r"no|nr|nos|fig|vol|art|sec|ch|pp")
"""Abbreviations that a number follows; without one, "No." is an answer."""
_NUMBER: Final = re.compile(r"\s*[#(]?(?:\d|(?:[A-Z]|[IVXLC]{2,5})\b(?!\s[a-z]))")
_SHORT: Final = re.compile(
    r"inc|ltd|co|corp|llc|plc|jr|sr|etc|ave|blvd|rd|dept|bldg|apt|est|min|max|hr|hrs|sq|oz|lb|lbs|in"
    r"|jan|feb|mar|apr|jun|jul|aug|sep|sept|oct|nov|dec"
)
"""Abbreviations that may end a sentence."""
_NO_NAMES: Final = (
    "It|Its|The|This|That|These|Those|There|We|They|Because|As|If|Since|Therefore|Thus|However|Here|Looking|Based"
    "|From|Both"
)
"""Words that begin a sentence and no person's name."""
_STARTS: Final = re.compile(rf"\s+[\"'(*]*(?:{_NO_NAMES}|I|He|She|So|But|And|You|Not|In|On|For|Or)\b")
_STARTS_ANEW: Final = re.compile(rf"\s+[\"'(*]*(?:{_NO_NAMES})\b")
"""The same after a title: "Dr. He" and "Mr. So" are names."""
_COPULA: Final = re.compile("(?:です|でした|である|だと思います|(?<![ぁ-ん])だ|입니다|이다)[。.]?\\Z")
_REASON: Final = re.compile(
    r"[,;]?\s+(?:because|since|as\s+(?:seen|shown|indicated|it|the|can|we|per)|based\s+on|according\s+to|given\s+that)\b.*",
    re.IGNORECASE | re.DOTALL,
)
_BOLD: Final = re.compile(r"\*\*([^*\n]{1,200})\*\*")
_BULLET: Final = re.compile(r"[-\u2022]\s+")
_EMPHASIS: Final = re.compile(r"(\*{1,3}|_{1,2}|`{1,3})([^*`\n]*)\1")
_HEDGED: Final = re.compile(
    r"\s*(?:or\b|but (?:it )?(?:could|might|may)|alternatively|possibly|maybe|perhaps)", re.IGNORECASE
)
_SENTENCE_VERB: Final = re.compile(
    r"\b(?:is|are|was|were|be|been|says?|reads?|shows?|displays?|has|have|can|cannot|see|seems?|appears?|looks?|indicates?"
    r"|contains?|es|est|ist|sind|son|é|è|sono|sont)\b|n't\b|'s\b",
    re.IGNORECASE,
)
_CLOSING: Final = {'"': '"', "\u201c": "\u201d", "\u300c": "\u300d", "\u300e": "\u300f"}
_NESTED: Final = 3
_LONGEST: Final = 2_000
"""Characters of a statement that are read."""


def final_answer(text: str) -> str | None:
    """Return the final answer of a reply, or all of it if it marks none; None if that is empty.

    >>> final_answer("I see 12.\\n<answer>12.40</answer>"), final_answer("The answer is 12.4."), final_answer("**red**")
    ('12.40', '12.4', 'red')
    >>> final_answer("The answer is Dr. Smith. He is on the left."), final_answer("<think>Is it 4?</think>It is 5.")
    ('Dr. Smith', 'It is 5.')
    """
    text = said(text)
    found = marked(text)
    if found is None:
        bold = {one.strip() for one in _BOLD.findall(text) if one.strip().strip(":")}
        found = bold.pop() if len(bold) == 1 else _denial(text)
    return _plain(found) or None


def said(text: str) -> str:
    """Return a reply in plain letters (`plain`), without its thinking: empty if that was never ended."""
    return without_thinking(plain(text))


def plain(text: str) -> str:
    """Return a text with composed letters, and full-width ones as plain ones: the form in which answers are compared.

    >>> plain("\uff21\uff0c\uff11"), plain("e\u0301") == "\u00e9"
    ('A,1', True)
    """
    return unicodedata.normalize("NFC", text).translate(WIDE)


def without_thinking(text: str) -> str:
    """Return a reply without its thinking: empty if that was never ended."""
    thoughts = list(_THOUGHT.finditer(text))
    if not thoughts:
        return text.strip()
    last = thoughts[-1]
    if last[1]:
        return text[last.end() :].strip()
    closed = [tag.end() for tag in thoughts if tag[1]]
    return text[closed[-1] if closed else 0 : last.start()].strip()


def marked(text: str) -> str | None:
    """Return what a reply itself marks as its answer, by the strongest mark; None if it marks nothing."""
    tagged = _tagged(text)
    if tagged:
        # <answer>\boxed{B}</answer> and <answer>The answer is B</answer> are common.
        return marked(tagged) or _denial(tagged)
    return _boxed(text) or _keyed(text) or next(_statements(text), None)


def _tagged(text: str) -> str:
    """Return the text of the last complete `<answer>`, else from the last one on; empty if there is none."""
    start, found = None, ""
    for tag in _TAG.finditer(text):
        if not tag[1]:
            start = tag.end()
        elif start is not None:
            found, start = text[start : tag.start()].strip() or found, None
    return found or (text[start:].strip() if start is not None else "")


def _boxed(text: str) -> str:
    """Return the content of the last complete box, braces balanced; empty if there is none."""
    found, opened = "", list[tuple[str, int]]()
    for mark in _BRACES.finditer(text):
        if mark[0] == "<|end_of_box|>" or mark[0] == "}":
            start = opened.pop() if opened else ("", 0)
            if start[0] in ("\\", "<"):
                found = text[start[1] : mark.start()].strip() or found
        else:
            opened.append((mark[0][0], mark.end()))
    inner = _WRAPPED.fullmatch(found)
    return inner[1].strip() if inner else found


def _keyed(text: str) -> str:
    value = next((match[1] for match in reversed(list(_KEY.finditer(text)))), "")
    if value.startswith('"'):
        try:
            return str(json.loads(value)).strip()
        except ValueError:
            pass
    return value.strip("\"'[] ").replace('"', "")


def _statements(text: str, *, denials: bool = False) -> Iterator[str]:
    """Yield what is said to be the answer, the last statement first; or what it is said not to be (`denials`)."""
    for match in reversed(list(_SAYS.finditer(text))):
        sentence = _sentence(text, match.end())
        # "Answer: not for sale" denies nothing.
        denies = bool(match["verb"] and ":" not in match[0] and _DENIES.match(sentence))
        if sentence and denies is denials and not _DENIED.match(match[0]):
            yield sentence


def _denial(text: str) -> str:
    """Return what the answer is said not to be, where nothing is said to be it ("not applicable"), else all of it."""
    return next(_statements(text, denials=True), text)


def _sentence(text: str, start: int) -> str:
    """Return the sentence that begins at `start`, after line breaks, without its full stop; empty if there is none."""
    body = text[start : start + _LONGEST].lstrip(" \t*_:")
    if body[:1] in "\r\n":
        body = _BULLET.sub("", body.lstrip(), count=1).lstrip("*_")
    end = len(body)
    for mark in _END.finditer(body):
        word = _abbreviation(body, mark.start(), mark.end()) if mark[0] == "." else ""
        if word and _goes_on(word, body, mark.end()):
            continue
        if not _HEDGED.match(body, mark.end()):  # "B. Or maybe C." is one answer
            end = mark.end() if len(word) > 1 else mark.start()
            break
    sentence = _COPULA.sub("", body[:end].strip())
    found = _REASON.sub("", sentence).strip().strip("*_").strip() or sentence
    return found.removesuffix(_CLOSING.get(text[start - 1 : start], ""))


def _abbreviation(text: str, at: int, end: int) -> str:
    """Return the abbreviation in lower case, or initial, that the full stop at `at` ends; empty if it is none."""
    last = text[max(0, at - 16) : at].split()[-1:] or [""]
    word = last[0].strip("(\"'*`\u201c\u2018")
    dotted = "." in word and all(len(part) <= 2 and part.isalpha() for part in word.split("."))
    initial = len(word) == 1 and word.isalpha() and word.isupper()
    known = any(kind.fullmatch(word.lower()) for kind in (_TITLES, _JOINS, _SHORT))
    counted = _COUNTED.fullmatch(word.lower()) and _NUMBER.match(text, end)
    return word.lower() if dotted or initial or known or counted else ""


def _goes_on(word: str, text: str, end: int) -> bool:
    """Return whether a sentence goes on after the full stop of an abbreviation: another word that begins none."""
    if not text[end:].strip("\"')*_ \t\r\n") or text[end : end + 1] == "\n":
        return False
    if _JOINS.fullmatch(word) or _COUNTED.fullmatch(word):
        return True
    return (_STARTS_ANEW if _TITLES.fullmatch(word) else _STARTS).match(text, end) is None


def _plain(text: str) -> str:
    """Return a text without the emphasis and the fences around it."""
    text = text.strip()
    for _ in range(_NESTED):
        whole = _EMPHASIS.fullmatch(text)
        text = whole[2].strip() if whole and whole[2].strip() else text
    return text


def is_sentence(text: str, golds: Sequence[str]) -> bool:
    """Return whether a final answer is prose rather than a short answer such as the accepted ones are."""
    length, longest = len(text.split()), max((len(gold.split()) for gold in golds), default=1)
    if length <= 2 and len(text) > 24 and not text.isascii():  # written without spaces
        return len(text) > 3 * max((len(gold) for gold in golds), default=1)
    return length > max(3, longest) and (length > max(8, 3 * longest) or _SENTENCE_VERB.search(text) is not None)
