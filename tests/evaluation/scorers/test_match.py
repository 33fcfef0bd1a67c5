"""Which answers count as the same."""

from decimal import Decimal

import pytest
from hypothesis import given
from hypothesis import strategies as st

from qzoom_agent.evaluation.scorers.match import exact_match, normalise, number


@pytest.mark.parametrize(
    ("prediction", "gold"),
    [
        ("EXIT 24", "exit 24"),
        ("exit24.", "EXIT-24"),
        ("  red\n", "red"),
        ("Red circle", "red  circle!"),
        ("7", "7.0"),
        ("12.4", "$12.40"),
        ("1,000", "1000"),
        ("+5", "5"),
        ("\N{MINUS SIGN}3", "-3"),
        ("25%", "25 %"),
        (".5", "0.5"),
        ("\N{FULLWIDTH DIGIT FOUR}\N{FULLWIDTH DIGIT TWO}", "42"),
        ("na\u00efve", "NAI\u0308VE"),
        ("Stra\u00dfe", "STRASSE"),
        ("042", "042"),
        ("+", "+"),
    ],
)
def test_same_answer(prediction: str, gold: str) -> None:
    assert exact_match(prediction, gold)
    assert exact_match(gold, prediction)


@pytest.mark.parametrize(
    ("prediction", "gold"),
    [
        ("12.40", "1240"),
        ("042", "42"),
        ("-3", "3"),
        ("12.40 kg", "1240 kg"),
        ("the code is 24", "24"),
        ("24 25", "24"),
        ("", "red"),
        ("", "+"),
        ("-", "+"),
        ("naive", "na\u00efve"),
        ("1,00", "100.5"),
    ],
)
def test_different_answer(prediction: str, gold: str) -> None:
    assert not exact_match(prediction, gold)
    assert not exact_match(gold, prediction)


def test_no_answer_is_wrong() -> None:
    assert not exact_match(None, "")
    assert not exact_match(None, "red")


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("12", 12),
        ("-1,234.50", Decimal("-1234.5")),
        ("\u20ac 3.", 3),
        ("0", 0),
        ("0.0", 0),
        ("", None),
        ("-", None),
        (".", None),
        ("$", None),
        ("1,23", None),
        ("12,3456", None),
        ("007", None),
        ("1e5", None),
        ("12 a", None),
        ("NaN", None),
        ("\u0664\u0662", None),
    ],
)
def test_number(text: str, value: object) -> None:
    assert number(text) == value


@given(st.text())
def test_any_text_scores_and_matches_itself(text: str) -> None:
    assert exact_match(text, text)
    assert normalise(normalise(text)) == normalise(text)


@given(st.text(min_size=1), st.sampled_from(["red", "042", "3.5", "1,200", "EXIT 24"]))
def test_added_punctuation_never_decides_but_added_letters_do(noise: str, gold: str) -> None:
    assert exact_match(f" {gold}! ", gold)
    if any(char.isalpha() for char in noise):
        assert not exact_match(f"{gold} x{noise}", gold)


@given(st.decimals(allow_nan=False, allow_infinity=False, places=2, min_value=-(10**6), max_value=10**6))
def test_every_way_to_print_a_number_is_the_number(value: Decimal) -> None:
    assert exact_match(f"{value:,}", f"{value:f}")
    assert exact_match(f"{value:.4f}", f"{value:f}")
    assert not exact_match(f"{value + 1:f}", f"{value:f}")
