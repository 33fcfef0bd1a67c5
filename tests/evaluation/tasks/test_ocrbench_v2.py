"""OCRBench v2: the types that a rule scores, and those that are left to a judge."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from qzoom_agent.data.samples import TaskSource
from qzoom_agent.errors import ConfigError
from qzoom_agent.evaluation.runner import select
from qzoom_agent.evaluation.tasks.catalog import TASKS
from qzoom_agent.evaluation.tasks.task import Scored
from tests.evaluation.tasks import files
from tests.evaluation.tasks.fixtures import samples


def test_every_question_is_in_one_of_the_two_tasks(tmp_path: Path) -> None:
    ruled, paged = samples("ocrbench-v2", tmp_path), samples("ocrbench-v2-pages", tmp_path)
    assert len(ruled) == 14 and {sample.kind for sample in paged} == {
        "handwritten answer extraction cn",  # whose answer is long
        "table parsing en",
        "full-page OCR cn",
        "chart parsing en",
    }
    numbers = {int(sample.id.rsplit("-", 1)[1]) for sample in (*ruled, *paged)}
    assert numbers == set(range(18)) and not any(sample.boxes for sample in ruled)


def test_what_a_rule_compares_with_is_read_from_the_columns(tmp_path: Path) -> None:
    found = {sample.kind: sample for sample in samples("ocrbench-v2", tmp_path)}
    assert found["math QA en"].options == ("4", "5", "6") and found["math QA en"].answer == "B"
    assert found["text grounding en"].answer == "(120, 340, 455, 600)"
    assert found["text spotting en"].meta["gold"] == [[10, 20, 90, 40, "SALE!"], [10, 60, 50, 80, "K7"]]
    assert found["VQA with position en"].meta["gold"] == {"answers": ["K7", "k7"], "bbox": [100, 200, 300, 400]}
    fields = found["key information extraction en"]
    assert fields.meta["gold"] == {"date": ["1 May", "May 1"], "total": ["9.90"]}
    assert json.loads(fields.answer) == {"date": "1 May", "total": "9.90"}
    assert found["key information extraction cn"].meta["gold"] == {"日期": ["五月"]}


def test_figures_are_the_complete_groups() -> None:
    aggregate = TASKS["ocrbench-v2"].aggregate
    assert aggregate is not None and aggregate([]) == {}
    scored = [Scored(kind, value, {}) for kind, value in (("text counting en", 0.6), ("math QA en", 1.0))]
    assert aggregate([*scored, Scored("formula recognition en", 1.0, {})]) == {
        "mathematical calculation": pytest.approx(0.8)
    }


def test_fields_that_are_none_are_named(tmp_path: Path) -> None:
    row = {"id": 3, "question": "?", "type": "key information mapping en", "answers": ["no fields"], "eval": "None"}
    row |= {"image": files.base64_png(files.draw("Q")), "bbox": None, "bbox_list": None, "content": None}
    (tmp_path / "rows.jsonl").write_text(json.dumps(row))
    with pytest.raises(ConfigError, match=r"Row 1 .*the answer holds no fields: 'no fields'"):
        TASKS["ocrbench-v2"].load(TaskSource(path=str(tmp_path / "rows.jsonl")))[0]


def test_a_wrong_row_is_named_by_its_number_in_the_file(tmp_path: Path) -> None:
    row = {"question": "?", "eval": "None", "image": files.base64_png(files.draw("Q")), "answers": ["no box"]}
    row |= {"bbox": None, "bbox_list": None, "content": None}
    types = ("full-page OCR cn", "text recognition en", "text grounding en")
    rows = [row | {"id": at, "type": kind} for at, kind in enumerate(types)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(one) + "\n" for one in rows))
    source = TaskSource(path=str(tmp_path / "rows.jsonl"))
    task = TASKS["ocrbench-v2"]
    with pytest.raises(ConfigError, match=r"Row 3 of .*rows.jsonl cannot be asked"):
        task.load(source)[1]
    with pytest.raises(ConfigError, match=r"1 of 2 rows that cannot be asked: row 3: "):
        select([task], source=source)
    assert select([task], source=source._replace(skip_bad=True))[task.name].selection.left_out[0].startswith("row 3: ")
