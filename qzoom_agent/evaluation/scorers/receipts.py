"""Fields of receipts: totals are compared as amounts, dates as dates, names and addresses as text.

An amount is the only number of the final answer, whatever currency stands beside it. A date may be written in any of
the usual ways. "05/04/2018" may be read with the day or the month first; both are tried, but for the reply and the
right answer in the same way, so that "04/05/2018" is another date. "25/04/2018" can only be read in one way.
"""

import re
from datetime import date
from decimal import Decimal
from functools import partial
from typing import Final

from qzoom_agent.data.answers import GROUPS, LONGEST, exact_match, number, written
from qzoom_agent.data.samples import Sample
from qzoom_agent.evaluation.scorers.anls import anls
from qzoom_agent.evaluation.scorers.open_answer import compared
from qzoom_agent.evaluation.tasks.task import Score, scorer

TOTAL: Final = "total"
DATE: Final = "date"
_CURRENCY: Final = r"(?:[A-Za-z]{1,3}\s?|[^\w\s]\s?)?"
NUMBER: Final = re.compile(rf"{GROUPS}|\d(?:[\d.,']*\d)?")
_MINUS: Final = re.compile(rf"(?<![A-Za-z]{{4}})-{_CURRENCY}\Z")
"""A sign right before a number or its currency; what stands between words or spaces is a dash."""
_PRICE: Final = re.compile(rf"-?{_CURRENCY}-?(?:{NUMBER.pattern})(?<=[.,]\d\d)")
"""Nothing but an amount, perhaps with a currency before it."""
_MONTHS: Final = ("jan", "feb", "mar", "apr", "may", "jun", "jul", "aug", "sep", "oct", "nov", "dec")
_MONTH: Final = rf"(?P<month>{'|'.join(_MONTHS)})[a-z]*"
_GAP: Final = r"[-/.,\s]{0,3}"
_DATES: Final = re.compile(
    r"(?<!\d)(?<!\d[-/.])(?:"
    r"(?P<y>\d{4})(?P<a>\s?[-/.]\s?)(?P<m>\d{1,2})(?P=a)(?P<d>\d{1,2})"
    r"|(?P<one>\d{1,2})(?P<b>\s?[-/.]\s?)(?P<two>\d{1,2})(?P=b)(?P<year>\d{4}|\d{2})"
    rf"|(?P<day>\d{{1,2}})(?:st|nd|rd|th)?{_GAP}{_MONTH}{_GAP}(?P<named>\d{{4}}|\d{{2}})"
    rf"|(?<![a-z]){_MONTH.replace('month', 'first')}{_GAP}(?P<second>\d{{1,2}})(?:st|nd|rd|th)?{_GAP}(?P<last>\d{{4}})"
    r"|(?P<whole>\d{8})"
    r")(?!\d)(?![-/.]\d)",
    re.IGNORECASE,
)
_EAST_ASIAN: Final = re.compile(r"(?<!\d)(\d{4})\s?[年년]\s?(\d{1,2})\s?[月월]\s?(?=\d)")


@scorer()
def clean(text: str, sample: Sample) -> Score:
    """Score the final answer: companies and addresses by ANLS, everything else as right or wrong (`same`)."""
    if sample.kind in ("company", "address"):
        return compared(text, sample, partial(anls, raw_length=False))
    return exact(text, sample)


@scorer()
def exact(text: str, sample: Sample) -> Score:
    """Return 1 if the final answer is the right one: as an amount, as a date, or as text."""
    return compared(text, sample, lambda said, golds: float(any(same(said, gold, sample.kind) for gold in golds)))


def same(said: str, gold: str, kind: str) -> bool:
    """Return whether two values of a field are the same.

    Args:
        said: The final answer.
        gold: The right value.
        kind: "total" and "date" are compared as such; any other as text, amounts with or without their currency.

    >>> same("RM 9", "9.00", "total"), same("25 Dec 2018", "25/12/2018", "date"), same("RM 9.00", "9.00", "beside")
    (True, True, True)
    >>> same("12/25/18", "25/12/2018", "date"), same("04/05/18", "05/04/2018", "date")
    (True, False)
    """
    if kind == TOTAL:
        return exact_match(said, gold) or (amount(gold) is not None and amount(said) == amount(gold))
    if kind == DATE:
        both = [(day_in(said, day_first=order), day_in(gold, day_first=order)) for order in (True, False)]
        return exact_match(said, gold) or any(told is not None and told == meant for told, meant in both)
    return exact_match(said, gold) or (_is_price(gold) and _is_price(said) and amount(said) == amount(gold))


def _is_price(text: str) -> bool:
    return len(text) <= LONGEST and _PRICE.fullmatch(written(text)) is not None


def amount(text: str) -> Decimal | None:
    """Return the only number in a text, with its sign; None if there is none, or several.

    >>> amount("RM 1,234.50"), amount("-$5"), amount("Total - 5"), amount("5 and 6")
    (Decimal('1234.5'), Decimal('-5'), Decimal('5'), None)
    """
    form = written(text) if len(text) <= LONGEST else ""
    found = list(NUMBER.finditer(form))
    if len(found) != 1:
        return None
    value = number(found[0][0])
    return -value if value is not None and _MINUS.search(form, 0, found[0].start()) else value


def day_in(text: str, *, day_first: bool = True) -> date | None:
    """Return the only date in a text; None if there is none, or several.

    Args:
        text: A date, perhaps with the time of day, but without other numbers.
        day_first: How to read a date that could be read in two ways.

    >>> day_in("03/04/18 8:13 PM"), day_in("03/04/18", day_first=False), day_in("Dec 5, 2018 or Dec 6, 2018")
    (datetime.date(2018, 4, 3), datetime.date(2018, 3, 4), None)
    """
    if len(text) > LONGEST:
        return None
    form = _EAST_ASIAN.sub(r"\1-\2-", written(text))
    found = [day for match in _DATES.finditer(form) if (day := _day(match, day_first)) is not None]
    rest = re.sub(r"\d{1,2}:\d{2}(?::\d{2})?", " ", _DATES.sub(" ", form))
    return found[0] if len(found) == 1 and not any(char.isdigit() for char in rest) else None


def _day(match: re.Match[str], day_first: bool) -> date | None:
    """Return the date that a match of `_DATES` writes; None if there is no such day."""
    parts = match.groupdict()
    if parts["y"]:
        return _date(parts["y"], parts["m"], parts["d"])
    if parts["one"]:
        return _ordered(parts["one"], parts["two"], parts["year"], day_first)
    if whole := parts["whole"]:
        found = _date(whole[:4], whole[4:6], whole[6:]) if whole[:2] in ("19", "20") else None
        return found or _ordered(whole[:2], whole[2:4], whole[4:], day_first)
    name = (parts["month"] or parts["first"]).lower()[:3]
    return _date(parts["named"] or parts["last"], _MONTHS.index(name) + 1, parts["day"] or parts["second"])


def _ordered(one: str, two: str, year: str, day_first: bool) -> date | None:
    """Return the date in the order that is asked for, else in the other."""
    day, month = (one, two) if day_first else (two, one)
    return _date(year, month, day) or _date(year, day, month)


def _date(year: str, month: str | int, day: str) -> date | None:
    """Return a date; a year of two digits is one of this century."""
    try:
        return date(int(year) + (2000 if len(year) == 2 else 0), int(month), int(day))
    except ValueError:
        return None
