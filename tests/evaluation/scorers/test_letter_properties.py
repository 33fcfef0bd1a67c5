"""Kinds of replies: one option is named, two are, or one is denied, in any words."""

from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st

from qzoom_agent.evaluation.scorers.letters import choice

COLOURS = ("red", "blue", "green", "black")
LETTER = st.sampled_from("ABCD")
TWO = st.permutations("ABCD").map(lambda letters: letters[:2])
SAYS = st.sampled_from(
    [
        "{}",
        "({})",
        "**{}**",
        "The answer is {}.",
        "Answer: {}",
        "It is {}.",
        "I choose {}.",
        "<answer>{}</answer>",
        r"\boxed{{{}}}",
    ]
)


@settings(max_examples=30)
@given(LETTER, SAYS)
def test_one_named_letter_is_chosen(letter: str, says: str) -> None:
    assert choice(says.format(letter), COLOURS) == letter


@settings(max_examples=40)
@given(
    TWO,
    SAYS,
    st.sampled_from(
        ["{} or {}", "{} and {}", "{}, {}", "{}/{}", "either {} or {}", "both {} and {}", "{} or maybe {}"]
    ),
)
def test_two_named_options_are_no_choice(two: list[str], says: str, both: str) -> None:
    assert choice(says.format(both.format(*two)), COLOURS) is None


@settings(max_examples=40)
@given(
    LETTER,
    st.sampled_from(
        [
            "not {}",
            "It is not {}.",
            "It isn't {}.",
            "{} is wrong.",
            "{} is not correct.",
            "{} isn't right",
            "I rule out {}.",
            "The answer is not {}.",
            "The answer can't be {}",
            "anything but {}",
            "\u4e0d\u662f{}",
            "{}\u4e0d\u5bf9",
            "no es {}",
            "nicht {}",
            "{} ist falsch",
            "ce n'est pas {}",
            "n\u00e3o \u00e9 {}",
            "{}\u3067\u306f\u306a\u3044",
        ]
    ),
    LETTER,
)
def test_a_denied_letter_is_not_chosen_and_another_beside_it_is(letter: str, denies: str, other: str) -> None:
    denial = denies.format(letter)
    assert choice(denial, COLOURS) is None
    assert choice(f"{denial}. The answer is {other}.", COLOURS) == other


@settings(max_examples=30)
@given(
    st.lists(st.integers(-99, 99), min_size=2, max_size=4, unique=True),
    st.sampled_from(["{}", "It shows {}", "{} kg is it"]),
    st.data(),
)
def test_a_number_chooses_its_option_and_never_another_sign(numbers: list[int], says: str, data: st.DataObject) -> None:
    options = [str(one) for one in numbers]
    at = data.draw(st.integers(0, len(options) - 1))
    assert choice(says.format(options[at]), options) == chr(ord("A") + at)
    other = str(-numbers[at])
    if other not in options:
        assert choice(says.format(other), options) is None


def test_only_a_marked_answer_is_looked_for_in_a_long_reply() -> None:
    assert choice("word " * 3_000 + "\nB", COLOURS) is None
    assert choice("word " * 3_000 + "\nThe answer is B", COLOURS) == "B"
