"""Measures: edit distance, soft accuracy, boxes."""

from __future__ import annotations

from functools import cache
from statistics import fmean

import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from qzoom_agent.data.samples import Sample
from qzoom_agent.evaluation.scorers import anls, chartqa, ocrbench, open_answer, vqa
from tests.cases import each_case

SHORT = st.text(alphabet="ab cB", max_size=8)


def by_definition(one: str, other: str) -> int:
    @cache
    def left(i: int, j: int) -> int:
        if not i or not j:
            return i + j
        return min(left(i - 1, j) + 1, left(i, j - 1) + 1, left(i - 1, j - 1) + (one[i - 1] != other[j - 1]))

    return left(len(one), len(other))


@given(SHORT, SHORT)
def test_distance_is_the_definitions(one: str, other: str) -> None:
    assert anls.levenshtein(one, other) == by_definition(one, other)


@given(SHORT, st.lists(SHORT, min_size=1, max_size=3))
def test_anls_is_the_formula(said: str, golds: list[str]) -> None:
    def share(gold: str) -> float:
        longest = max(len(said), len(gold))
        one, other = (" ".join(text.lower().split()) for text in (said, gold))
        return by_definition(one, other) / longest if longest else 0.0

    best = 1 - min(map(share, golds))
    assert anls.anls(said, golds, raw_length=True) == (best if best >= 0.5 else 0.0)


def test_a_long_reply_costs_nothing() -> None:
    assert anls.anls("x" * 1_000_000, ["short", "y" * 1_000], raw_length=True) == 0.0


@each_case(
    ("text", "normal"),
    [
        ("The  Cat", "cat"),
        ("None", "0"),
        ("ten; seven", "10 7"),
        ("U.S.A.", "usa"),
        ("3.5", "3.5"),
        ("3.", "3"),
        ("a/b c", "b c"),
        ("(left)", "left"),
        ("wont youll", "won't you'll"),
        ("couldnt've", "couldn't've"),
        ("somebody'd", "somebodyd"),
        ("tab\tand\nline", "tab and line"),
    ],
)
def test_evalai_normaliser(text: str, normal: str) -> None:
    assert vqa.normalise(text) == normal


@given(st.lists(st.sampled_from(["nokia", "Nokia", "the noka", "2", "two"]), min_size=1, max_size=10))
def test_soft_accuracy_leaves_one_out(golds: list[str]) -> None:
    before = list(golds)
    normal = [vqa.normalise(gold) for gold in golds]
    expected = fmean(min(1, sum(one == "2" for one in normal[:at] + normal[at + 1 :]) / 3) for at in range(len(golds)))
    assert vqa.soft_accuracy("two", golds) == pytest.approx(expected)
    assert golds == before


@each_case(
    "gold",
    [
        "你好\uff0c世界",
        "北京\uff08中国\uff09",
        "it\u2019s",
        "\uff21\uff22\uff23",
        "東京\u3000タワー",
        "\uff15\uff10\uff05",
        "Mu\u0308ller",
        "Hà Nội",
    ],
)
def test_the_accepted_answer_itself_is_right_in_any_script(gold: str) -> None:
    sample = Sample("1", "t", "", Image.new("RGB", (1, 1)), "?", gold, answers=(gold,) * 10)
    for scorer in (anls.clean, chartqa.clean, ocrbench.clean, open_answer.rule, vqa.clean):
        assert scorer(gold, sample).value == scorer(f"<answer>{gold}</answer>", sample).value == 1


@each_case(
    ("text", "gold", "value"),
    [
        ("图中的文字是北京。", "北京", 1),
        ("上面写着ABC。", "ABC", 1),
        ("It says ABCD.", "ABC", 0),
        ("คำตอบคือกา", "กา", 1),
        ("ที่นี่มีกี่", "ก", 0),
        ("यह कला है", "कल", 0),
        ("यह कला है", "कला", 1),
        ("2012年", "12", 0),
        ("共12个", "12", 1),
    ],
)
def test_words_are_whole_where_spaces_part_them(text: str, gold: str, value: float) -> None:
    sample = Sample("1", "ocrbench", "", Image.new("RGB", (1, 1)), "?", gold, answers=(gold,))
    assert ocrbench.clean(text, sample).value == value


def test_a_per_cent_sign_is_read_wherever_it_stands() -> None:
    sample = Sample("1", "chartqa", "", Image.new("RGB", (1, 1)), "?", "0.5", answers=("0.5",))
    assert [chartqa.clean(said, sample).value for said in ("50%", "%50", "\u0665\u0660\u066a", "50")] == [1, 1, 1, 0]
