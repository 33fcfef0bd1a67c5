"""OCRBench v2's rules by type: what each gives by hand, and that no reply raises or takes long."""

from __future__ import annotations

import json
from dataclasses import replace
from time import process_time
from typing import Any

import pytest
from PIL import Image

from qzoom_agent.data.samples import Sample
from qzoom_agent.evaluation.scorers import ocrbench
from qzoom_agent.evaluation.scorers.ocrbench_v2 import FIELDS, GROUNDING, POSITION, RULES, SPOTTING, clean, faithful
from qzoom_agent.evaluation.tasks.task import MOST_CHARACTERS
from tests.cases import each_case
from tests.protocols.hostile_outputs import hostile_outputs

GOLD: dict[str, Any] = {
    GROUNDING: [100, 100, 300, 200],
    POSITION: {"answers": ["K7"], "bbox": [100, 100, 300, 200]},
    SPOTTING: [
        [10, 20, 90, 40, "SALE!"],
        [10, 60, 50, 80, "K7"],
        [500, 500, 900, 900, "###"],
        [700, 100, 900, 300, "###"],
    ],
    **{kind: {"date": ["1 May", "May 1"], "total": ["9.90"]} for kind in FIELDS},
}


def about(kind: str, *answers: str, way: str = "None") -> Sample:
    meta = {"eval": way, **({"gold": GOLD[kind]} if kind in GOLD else {})}
    image, golds = Image.new("RGB", (1, 1)), answers or ("K7",)
    return Sample("1", "ocrbench-v2", kind, image, "?", golds[0], answers=golds, meta=meta)


@each_case(
    ("sample", "reply", "value"),
    [
        (about("math QA en", "B", way="multiple choice"), "(B)", 1),
        (about("math QA en", "B", way="multiple choice"), "It is B", 0),
        (about("text recognition en", "Sale", way="case sensitive"), "Big Sale!", 1),
        (about("text recognition en", "Sale", way="case sensitive"), "SALE", 0),
        (about("reasoning VQA cn", "北京 大学"), "是北京大学。", 1),
        (about("text counting en", "10", way="regression"), "about 12 words", 0.8),
        (about("reasoning VQA cn", "一,二,三,四"), "一,二,三,五", 6 / 7),
        (about("reasoning VQA cn", "一,二,三"), "一,二,五", 0),
        (about("text counting en", "10", way="regression"), "20", 0),
        (about("text counting en", "10", way="regression"), "4", 0),
        (about("text counting en", "10", way="regression"), "ten", 0),
        (about("text counting en", "3", way="exact match"), "13 times", 1),
        (about("formula recognition en", "x ^ { 2 }"), "$x^{2}$", 1),
        (about("formula recognition cn", r"\text{面积} = 2"), "面积=2", 1),
        (about("handwritten answer extraction cn", "AC"), "答案: A、C", 1),
        (about("handwritten answer extraction cn", "AC"), "CA", 0),
        (about(FIELDS[0]), '{"date": "may 1", "total": "9.90"}', 1),
        (about(FIELDS[0]), "```json\n{'date': 'May 1', 'total': '9'}\n```", 0.5),
        (about(FIELDS[0]), "date: 1 May\ntotal: 9.90\nshop: none", 2 / 3),
        (about(FIELDS[0]), "[1, 2]", 0),
        (about(POSITION), '{"answer": "K7", "bbox": [100, 100, 300, 200]}', 1),
        (about(POSITION), '{"answer": "K8", "bbox": "(100, 100, 300, 150)"}', 0.25),
        (about(POSITION), '{"bbox": [1, 2]}', 0),
        (about(GROUNDING), "(0, 0, 9, 9), no: [100, 100, 300, 150]", 0.5),
        (about(GROUNDING), "(100, 100, 300, 2000)", 0),
        (about(SPOTTING), "[(10, 20, 90, 40, 'sale'), (10, 60, 50, 80, 'K8'), (510, 510, 600, 600, 'x')]", 0.5),
        (about(SPOTTING), "10,20,90,40", 0),
        (about(SPOTTING), "(10, 20, 90, 40, 'SALE!'), (10, 60, 50, 80, \"K7\"), (710, 110, 800, 200, 'x')", 1),
    ],
)
def test_by_hand(sample: Sample, reply: str, value: float) -> None:
    assert faithful(reply, sample).value == pytest.approx(value)


def test_the_final_answer_is_read_by_ours() -> None:
    boxed = about(POSITION)
    reply = '<think>{"answer": "x"}</think> So <answer>{"answer": "K7", "bbox": [100, 100, 300, 200]}</answer>'
    assert clean(reply, boxed).value == 1
    assert clean('{"answer": "K7", "bbox": [100, 100, 300, 200]}', boxed).value == 1
    assert clean("The answer is 12.", about("text counting en", "10", way="regression")).value == pytest.approx(0.8)
    assert clean("2012", about("cognition VQA en", "12")).value == 0
    assert clean("答案：北京大学", about("cognition VQA cn", "北京大学")).value == 1  # noqa: RUF001


@each_case("kind", [kind for kind in FIELDS if kind.endswith("cn")] + ["cognition VQA cn"])
def test_full_width_signs_of_the_right_answer_are_no_mistake(kind: str) -> None:
    name = "北京\uff08中国\uff09有限公司\uff0c一部"
    fields = kind in FIELDS
    sample = replace(about(kind, name), meta={"gold": {"公司": [name]}} if fields else {})
    reply = json.dumps({"公司": name}, ensure_ascii=False) if fields else name
    assert clean(reply, sample).value == clean(f"<answer>{reply}</answer>", sample).value == 1


def test_a_formula_is_known_by_its_kind_where_the_public_rule_does() -> None:
    kinds = (ocrbench.FORMULA_KIND, "Scene Text-centric VQA")
    assert [ocrbench.kit("x^{2}+Y", about(kind, "x ^ { 2 } + Y")).value for kind in kinds] == [1, 0]


def test_nothing_to_spot_and_nothing_spotted_is_worth_nothing() -> None:
    unreadable = replace(about(SPOTTING), meta={"gold": [[10, 20, 90, 40, "###"]]})
    assert faithful("(12, 22, 80, 40, 'x')", unreadable).value == faithful("", unreadable).value == 0


@each_case("kind", RULES)
def test_no_reply_raises(kind: str) -> None:
    for way in ("None", "regression", "exact match", "multiple choice"):
        sample = about(kind, way=way)
        for reply in (*hostile_outputs(60), "\0\ud800", "9" * 5_000, "{'a': 1e999, 'bbox': (1e999, 1, 2, 3)}"):
            for scorer in (faithful, clean):
                assert 0 <= scorer(reply, sample).value <= 1, reply[:80]


@pytest.mark.parametrize("unit", ["(", "(1,", "a ", "```\n", "a: b\n", "[[", "{", '"', "(1, 2, 3, 4, 'a'), "])
def test_the_longest_reply_is_read_in_linear_time(unit: str) -> None:
    reply = (unit * MOST_CHARACTERS)[:MOST_CHARACTERS]
    for kind in (POSITION, GROUNDING, FIELDS[0], "cognition VQA en"):
        started = process_time()
        faithful(reply, about(kind))
        assert process_time() - started < 2, kind
