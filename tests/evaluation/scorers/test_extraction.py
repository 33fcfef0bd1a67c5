"""What is taken for the answer, and what is not."""

from __future__ import annotations

from dataclasses import replace

from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from qzoom_agent.data.samples import Sample
from qzoom_agent.evaluation.scorers.extraction import final_answer, is_sentence
from qzoom_agent.evaluation.scorers.letters import choice
from qzoom_agent.evaluation.scorers.open_answer import rule
from tests.cases import each_case

OPTIONS = ("red", "dark red", "blue", "A. Smith")


@each_case(
    ("text", "answer"),
    [
        ("<answer> 12.40 </answer>", "12.40"),
        ("<answer>1</answer> wait <ANSWER>2</ANSWER>", "2"),
        ("<answer>cut off", "cut off"),
        ('The answer is "STOP".', "STOP"),
        ('The answer is 5".', '5"'),
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
        ("<answer>1</answer> wait <answer>2", "1"),
        ("The answer is:\n\n**42**", "42"),
        ("**Answer:** 42", "42"),
        ("### Answer\n42", "42"),
        ("Answer:\n- 42", "42"),
        ("**x**", "x"),
        ('{"answer": "3"} or rather {"answer": "4"}', "4"),
        ("I think it reads **42** there.", "42"),
        ("**one** or **two**", "**one** or **two**"),
        ("<|begin_of_box|>42<|end_of_box|>", "42"),
        (r"\boxed{1} then \boxed{2", "1"),
        ("The answer is Dr. Smith.", "Dr. Smith"),
        ("The answer is Mt. Everest. It is high.", "Mt. Everest"),
        ("The answer is St. Louis.", "St. Louis"),
        ("The answer is U.S. Steel.", "U.S. Steel"),
        ("The answer is J. K. Rowling.", "J. K. Rowling"),
        ("The answer is 8 a.m.", "8 a.m."),
        ("The answer is 5 p.m. It says so.", "5 p.m."),
        ("The answer is 10:30 a.m. on Monday.", "10:30 a.m. on Monday"),
        ("Answer: No. 5", "No. 5"),
        ("The answer is No. 5. It is on the left.", "No. 5"),
        ("The answer is Vol. II. It is old.", "Vol. II"),
        ("The answer is `Dr. No`.", "Dr. No"),
        ("The answer is \u201cMr. Smith\u201d. It says so.", "Mr. Smith"),
        ("The answer is Main St. The sign shows it.", "Main St."),
        ("The answer is Elm Dr. It is on the left.", "Elm Dr."),
        ("The answer is Dr. He. He is on the left.", "Dr. He"),
        ("The answer is Dec. The bar is the highest.", "Dec."),
        ("The answer is Jan. to Mar. 2018.", "Jan. to Mar. 2018"),
        ("The answer is Dec. 5, 2018. It says so.", "Dec. 5, 2018"),
        ("The answer is Ali vs. The Rock.", "Ali vs. The Rock"),
        ("The answer is No.", "No"),
        ("The answer is no. The sign says closed.", "no"),
        ("Answer: No. A car stands there.", "No"),
        ("The answer is **Acme Inc.**", "Acme Inc."),
        ("The answer is 42 because the label says so.", "42"),
        ("The answer to the question is 7.", "7"),
        ('{"reason": "it says so", "answer": "St. Louis"}', "St. Louis"),
        ('```json\n{"answer": 42}\n```', "42"),
        ("La respuesta es 42.", "42"),
        ("答案为「上海」。", "上海"),
        ("答えは「東京」です。", "東京"),
        ("答え\uff1aまだ", "まだ"),
        ("Re\u0301ponse : 42", "42"),
        ("Answer: Neither", "Neither"),
        ("The answer is neither.", "neither"),
        ("Answer: NOT FOR SALE", "NOT FOR SALE"),
        ("The answer is non-fat milk.", "non-fat milk"),
        ("Resposta: não", "não"),
        ("答案\uff1a不是", "不是"),
        ("答案是不锈钢。", "不锈钢"),
        ("The answer is 6. The answer is not 5.", "6"),
        ("The answer is Not Applicable.", "Not Applicable"),
        ("<answer>The answer is Not Applicable.</answer>", "Not Applicable"),
        ("The answer is not 5, so **6**.", "6"),
        ("答案是C。答案不是B。", "C"),
        ("答案是C。答案是\uff1a不选B。答案应该是不选B。", "不选B"),
        ("La r\u00e9ponse est 42.", "42"),
        ("Antwort: 42", "42"),
        ("\u7b54\u6848\u662f42\u3002", "42"),
        ("\u7b54\u3048\u306f42\u3067\u3059", "42"),
        ("<think>Is it 4?</think>\n\nThe answer is 5.", "5"),
        ("It is 4. <think>Is it?", "It is 4."),
        ("<think>Is it 4? The answer is 4", None),
    ],
)
def test_final_answer(text: str, answer: str | None) -> None:
    assert final_answer(text) == answer


@each_case(
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


def test_the_longest_text_of_an_option_counts() -> None:
    assert choice("it must be the red car over there", ("red", "red car", "car")) == "B"


@each_case(
    ("text", "golds", "score"),
    [
        ("9", ("7",), (0, "9")),
        ("I cannot see any number on the sign.", ("7",), (0, None)),
        ("The bus is red here", ("red", "here the bus is red"), (0, "The bus is red here")),
        (
            "The sign says that it is closed",
            ("the sign says that it is closed",),
            (1, "The sign says that it is closed"),
        ),
    ],
)
def test_a_wrong_sentence_is_no_answer_that_a_rule_can_compare(
    text: str, golds: tuple[str, ...], score: tuple[float, str | None]
) -> None:
    sample = Sample("1", "t", "k", Image.new("RGB", (1, 1)), "?", golds[0], answers=golds)
    assert rule(text, sample) == score
    assert rule("I cannot see any number on the sign.", replace(sample, answers=())) == (0, None)


@given(st.text(max_size=200), st.integers(0, 8))
def test_any_text_gives_one_of_the_letters_or_none(text: str, options: int) -> None:
    found = choice(text, [f"thing {index}" for index in range(options)])
    assert found is None or 0 <= ord(found) - ord("A") < options


@given(st.text(max_size=100))
def test_a_tag_goes_before_everything_else(text: str) -> None:
    assert choice(f"{text}<answer>B</answer>", OPTIONS) == "B"
    assert final_answer(f"{text}<answer>B</answer>") == "B"


@each_case(
    ("text", "golds", "sentence"),
    [
        ("12.40", ["12.4"], False),
        ("the red car", ["red car"], False),
        ("a man in a long black coat", ["a tall man in a black coat"], False),
        ("The total is 12.40 euros", ["12.40"], True),
        ("I cannot see any number on the sign.", ["7"], True),
        ("one two three four five six seven eight nine", ["7"], True),
        (
            "\u8fd9\u5f20\u56fe\u7247\u91cc\u7684\u724c\u5b50\u4e0a\u5199\u7740\u4e00\u4e2a\u5f88\u5927\u7684\u6570\u5b57\uff0c\u4f46\u662f\u6211\u770b\u4e0d\u6e05\u695a",
            ["7"],
            True,
        ),
        ("it is closed", ["it is closed"], False),
        ("the bus is red here", ["red", "the bus is red"], True),
        ("the bus is red here", ["red", "here the bus is red"], False),
    ],
)
def test_sentences_are_told_from_short_answers(text: str, golds: list[str], sentence: bool) -> None:
    assert is_sentence(text, golds) is sentence
