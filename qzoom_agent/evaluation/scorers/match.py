"""Rules that compare an answer with the right one: pure functions of two texts, for evaluation and rewards alike.

`exact_match` compares two short answers. Case, spaces and punctuation never decide; numbers are compared as numbers,
so "12.40", "12.4" and "$12.40" are one answer while "12.40" and "1240" are two. Digits with a leading zero are a code
and not a number: "042" is not 42.

Deliberately not here: extracting an answer from a longer text. A reply that buries the answer in a sentence is wrong
here, because a rule that accepts it ("contains the gold") rewards replies that list every possibility.
"""

from __future__ import annotations

import re
import unicodedata
from decimal import Decimal

from qzoom_agent.data.questions import normalise as normalise

_NUMBER = re.compile(r"([+-]?)(0|[1-9]\d{0,2}(?:,\d{3})+|[1-9]\d*)?(\.\d+)?")


def number(text: str) -> Decimal | None:
    """Return the number that `text` is, or None if it is anything more or less than one number.

    Accepts a sign, grouped thousands ("1,000"), a currency sign before and a percent sign or full stop after.
    Refuses leading zeros ("042"): those are codes.
    """
    text = unicodedata.normalize("NFKC", text).replace("\N{MINUS SIGN}", "-").strip()
    text = text.removesuffix(".").removesuffix("%").strip()
    if text and unicodedata.category(text[0]) == "Sc":
        text = text[1:].lstrip()
    match = _NUMBER.fullmatch(text)
    if match is None or match[2] is match[3] is None or not text.isascii():
        return None
    return Decimal(text.replace(",", ""))


def exact_match(prediction: str | None, gold: str) -> bool:
    """Return whether `prediction` is the answer `gold`; None (no answer came) is wrong.

    >>> exact_match("Exit 24.", "EXIT-24"), exact_match("7.0", "7"), exact_match("042", "42")
    (True, True, False)
    """
    if prediction is None:
        return False
    said, meant = number(prediction), number(gold)
    if said is not None and meant is not None:
        return said == meant
    wanted = normalise(gold)
    # A gold answer of nothing but signs ("+") normalises to nothing: every punctuation would match it.
    return normalise(prediction) == wanted if wanted else prediction.strip() == gold.strip()
