"""Measures: edit distance, soft accuracy, boxes."""

from __future__ import annotations

from functools import cache
from statistics import fmean

import pytest
from hypothesis import given
from hypothesis import strategies as st

from qzoom_agent.evaluation.scorers import anls, vqa
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
