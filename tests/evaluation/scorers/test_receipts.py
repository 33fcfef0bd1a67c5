"""Amounts, dates and names of receipts, as they may be written."""

from __future__ import annotations

from datetime import date
from decimal import Decimal

import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from qzoom_agent.data.samples import Sample
from qzoom_agent.evaluation.scorers.receipts import amount, clean, day_in, exact, same

DAYS = st.dates(date(2000, 1, 1), date(2099, 12, 31))
CENTS = st.integers(0, 9_999_999)
FORMS = ("%d/%m/%Y", "%d-%m-%y", "%d.%m.%Y", "%d %b %Y", "%d-%b-%y", "%b %d, %Y", "%Y-%m-%d", "%Y%m%d", "%d%m%Y")


def sample(kind: str, gold: str) -> Sample:
    return Sample("1", "receipt-field", kind, Image.new("RGB", (1, 1)), "?", gold, answers=(gold,))


@given(DAYS, st.sampled_from(FORMS), st.sampled_from(FORMS))
def test_a_date_is_the_same_however_it_is_written(day: date, one: str, other: str) -> None:
    assert same(day.strftime(one), day.strftime(other), "date")
    assert same(f"{day.strftime(one)} 8:13:39 PM", day.strftime(other), "date")


@given(DAYS, DAYS, st.sampled_from(FORMS))
def test_two_dates_in_one_form_are_two(day: date, other: date, form: str) -> None:
    assert same(day.strftime(form), other.strftime(form), "date") == (day == other)


@given(DAYS)
def test_the_other_order_counts_only_where_the_print_leaves_it_open(day: date) -> None:
    told = day.strftime("%B %d, %Y")
    open_ = day.strftime("%m/%d/%Y")
    assert same(told, open_, "date")
    if day.day <= 12 and day.day != day.month:
        assert not same(day.strftime("%m/%d/%y"), day.strftime("%d/%m/%y"), "date")


def test_a_text_with_no_date_or_several_has_none() -> None:
    assert day_in("31/02/2019") is None and day_in("12.50") is None and day_in("") is None
    assert day_in("01/02/2019 or 02/02/2019") is None and day_in("01/02/2019 9.00") is None
    assert not same("nothing", "no date", "date") and same("No Date", "no date", "date")


@given(CENTS, st.sampled_from(("{:.2f}", "{:,.2f}", "RM{:.2f}", "RM {:,.2f}", "${:.2f}", "{:.2f} SR", "Total: {:.2f}")))
def test_an_amount_is_the_same_in_every_currency_and_grouping(cents: int, form: str) -> None:
    written = form.format(Decimal(cents) / 100)
    assert amount(written) == Decimal(cents) / 100
    assert same(written, f"{cents / 100:.2f}", "total")
    assert not same(written, f"{(cents + 1) / 100:.2f}", "total")


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("-5.00", "-5"),
        ("-RM 0.02", "-0.02"),
        ("RM-0.02", "-0.02"),
        ("TOTAL - 9", "9"),
        ("9-", "9"),
        ("\u22125.00", "-5"),
        ("\xa3 \uff0d12.50", "-12.5"),
    ],
)
def test_a_sign_belongs_to_the_number_that_it_touches(text: str, value: str) -> None:
    assert amount(text) == Decimal(value)


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("CHF 1'234.50", "1234.5"),
        ("1\u2019234.50", "1234.5"),
        ("1\u202f234,50 \u20ac", "1234.5"),
        ("1.234,50 \u20ac", "1234.5"),
        ("\uff19\uff0e\uff10\uff10", "9"),
        ("\u0661\u066c\u0662\u0663\u0664\u066b\u0665\u0660", "1234.5"),
        ("9.00\u5143", "9"),
    ],
)
def test_an_amount_is_read_as_it_is_printed_elsewhere(text: str, value: str) -> None:
    assert amount(text) == Decimal(value) and same(text, value, "total") and same(value, text, "total")
    assert not same(text, f"{value}1", "total")


@pytest.mark.parametrize(
    "text",
    [
        "2018\u5e7412\u670825\u65e5",
        "2018\ub144 12\uc6d4 25\uc77c 18:30",
        "25\u201112\u20112018",
        "\uff12\uff15\uff0f\uff11\uff12\uff0f\uff12\uff10\uff11\uff18",
    ],
)
def test_a_date_is_read_as_it_is_printed_elsewhere(text: str) -> None:
    assert same(text, "25/12/2018", "date") and not same(text, "24/12/2018", "date")
    assert day_in(f"\u5e73\u6210{text[2:]}") is None  # a year of another calendar


@pytest.mark.parametrize(
    ("said", "gold", "right"),
    [
        ("CHF 1'234.50", "1234.50", True),
        ("RM\uff19\uff0e\uff10\uff10", "9.00", True),
        ("zl 1 234,50", "1234,50", True),
        ("RM 9.00", "9.10", False),
        ("A 12", "12", False),
    ],
)
def test_a_price_beside_a_label_may_lack_its_currency(said: str, gold: str, right: bool) -> None:
    assert same(said, gold, "beside") is same(gold, said, "beside") is right


def test_a_value_that_is_no_amount_is_the_same_as_itself() -> None:
    assert same("9.00 / 2", "9.00 / 2", "total") and not same("9.00", "9.00 / 2", "total")


def test_replies_that_list_values_are_wrong() -> None:
    total = sample("total", "9.00")
    assert exact("9.00 or 10.00", total).value == 0 and exact("The total is RM 9.00.", total).value == 1
    assert exact("25/12/2018 or 26/12/2018", sample("date", "25/12/2018")).value == 0
    assert exact("i do not know.", total).value == 0


def test_names_are_worth_their_similarity_and_nothing_else_is() -> None:
    assert clean("ACME TRADINC", sample("company", "Acme Trading")).value == pytest.approx(1 - 1 / 12)
    assert exact("ACME TRADINC", sample("company", "Acme Trading")).value == 0
    assert clean("9.10", sample("total", "9.00")).value == 0 and clean("9", sample("total", "9.00")).value == 1


@given(st.text(max_size=40), st.text(max_size=20), st.sampled_from(("total", "date", "company", "beside")))
def test_any_two_texts_are_compared(said: str, gold: str, kind: str) -> None:
    assert isinstance(same(said, gold, kind), bool)
    assert 0 <= clean(said, sample(kind, gold)).value <= 1
