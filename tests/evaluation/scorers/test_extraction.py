"""What is taken for the answer, and what is not."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from qzoom_agent.evaluation.scorers.extraction import choice, final_answer

OPTIONS = ("red", "dark red", "blue", "A. Smith")


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        ("<answer> 12.40 </answer>", "12.40"),
        ("<answer>1</answer> wait <ANSWER>2</ANSWER>", "2"),
        ("<answer>cut off", "cut off"),
        ("<answer></answer> The answer is 7.", "7"),
        (r"so \boxed{\frac{1}{2}}", r"\frac{1}{2}"),
        (r"so \boxed{\text{two}}", "two"),
        (r"\boxed{not closed", r"\boxed{not closed"),
        ("The answer is 12.4. It stands on the left.", "12.4"),
        ("Answer: Exit 24\nbecause", "Exit 24"),
        ("My answer is: **K7T**", "K7T"),
        (r"<answer>\boxed{9}</answer>", "9"),
        ("K7T", "K7T"),
        ("  ", None),
    ],
)
def test_final_answer(text: str, answer: str | None) -> None:
    assert final_answer(text) == answer


@pytest.mark.parametrize(
    ("text", "letter"),
    [
        ("d", "D"),
        ("(c)", "C"),
        ("C.", "C"),
        ("b) dark red", "B"),
        ("B. Not A, because that one is larger.", "B"),
        ("A, B", None),
        ("(A) or (B)", None),
        ("B/C", None),
        ("E", None),
        ("A man", None),
        ("It has a plan B.", "B"),
        ("It isn't C's", None),
        ("X-A", None),
        ("dark red", "B"),
        ("It is dark red, I think", "B"),
        ("redder", None),
        ("A. Smith", "D"),
        ("the answer is: blue", "C"),
        ("<answer>blue</answer> (A)", "C"),
        ("<answer>none of them</answer> (A)", None),
        ("", None),
    ],
)
def test_choice(text: str, letter: str | None) -> None:
    assert choice(text, OPTIONS) == letter


@given(st.text(max_size=200), st.integers(0, 8))
def test_any_text_gives_one_of_the_letters_or_none(text: str, options: int) -> None:
    found = choice(text, [f"thing {index}" for index in range(options)])
    assert found is None or 0 <= ord(found) - ord("A") < options


@given(st.text(max_size=100))
def test_a_tag_goes_before_everything_else(text: str) -> None:
    assert choice(f"{text}<answer>B</answer>", OPTIONS) == "B"
    assert final_answer(f"{text}<answer>B</answer>") == "B"
