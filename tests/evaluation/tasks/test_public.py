"""Every public task, read from a local copy with the public columns."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

import pytest
from datasets import Dataset
from PIL import ImageChops

from qzoom_agent.data.rows import open_path
from qzoom_agent.data.samples import TaskSource
from qzoom_agent.errors import ConfigError
from qzoom_agent.evaluation.tasks.catalog import TASKS, find_task
from qzoom_agent.evaluation.tasks.task import Scored
from qzoom_agent.geometry import Box
from tests.evaluation.tasks import files, fixtures
from tests.evaluation.tasks.fixtures import samples

DIRECTLY = "Answer with the option's letter from the given choices directly."
SHORT = "Answer the question using a single word or phrase."


@pytest.mark.parametrize("name", fixtures.WRITERS)
def test_what_holds_for_every_task(name: str, tmp_path: Path) -> None:
    task = find_task(name)
    read = task.load(TaskSource(path=str(fixtures.WRITERS[name](tmp_path / name))))
    found = list(read)
    assert 4 <= len(read) == len(found) == len({sample.id for sample in found})
    assert list(read.kinds) == [sample.kind for sample in found]
    with pytest.raises(IndexError):
        read[len(found)]
    for sample in found:
        assert sample.task == name == task.name
        assert sample.image.mode == "RGB" and sample.cluster and sample.question.strip() == sample.question
        assert sample.answers[0] == sample.answer and sample.answer
        assert all(0 <= box.x1 < box.x2 <= sample.image.width for box in sample.boxes)
        for scorer in task.scorers.values():
            assert scorer(sample.answer, sample).value == 1, "the right answer is right"
            assert scorer(None, sample) == (0, None)
            assert scorer("No idea whatsoever", sample).value == 0
    if task.aggregate is not None:
        figures = task.aggregate([Scored(sample.kind, 1.0, sample.meta) for sample in found])
        assert figures and all(value >= 0 for value in figures.values())


@pytest.mark.parametrize("name", fixtures.WRITERS)
def test_a_missing_column_is_named(name: str, tmp_path: Path) -> None:
    (tmp_path / "rows.jsonl").write_text('{"image": "a.png", "other": 1}\n')
    with pytest.raises(ConfigError) as caught:
        TASKS[name].load(TaskSource(path=str(tmp_path / "rows.jsonl")))
    missing = [column for column in TASKS[name].columns if column != "image"]
    assert all(column in str(caught.value) for column in missing)
    assert "There are: image, other" in str(caught.value)


def test_vstar_from_the_hubs_table(tmp_path: Path) -> None:
    found = samples("vstar", tmp_path)
    assert found[1].question == f"What is the letter?\n(A) K\n(B) M\n(C) R\n(D) S\n{DIRECTLY}"
    assert (found[1].answer, found[1].options) == ("C", ("K", "M", "R", "S"))
    assert Counter(sample.kind for sample in found) == {"direct_attributes": 2, "relative_position": 2}
    assert found[1].id == "vstar-direct_attributes-1"


def test_vstar_from_the_authors_folders(tmp_path: Path) -> None:
    task, folder = TASKS["vstar"], fixtures.vstar_original(tmp_path / "vstar_bench")
    found = list(task.load(TaskSource(path=str(folder))))
    assert [sample.kind for sample in found] == ["direct_attributes"] * 3 + ["relative_position"]
    for sample in found:
        assert sample.boxes == (Box(8, 8, 40, 24),)
        # The right one is the first of the file, and not always A as it is asked.
        assert sample.options["ABCD".index(sample.answer)] == "navy"
        assert f"({sample.answer}) navy" in sample.question and sample.question.endswith(DIRECTLY)
    assert len({sample.options for sample in found}) > 1
    assert [sample.options for sample in task.load(TaskSource(path=str(folder)))] == [
        sample.options for sample in found
    ]


def test_a_file_of_the_authors_folders_that_lacks_something_is_named(tmp_path: Path) -> None:
    folder = fixtures.vstar_original(tmp_path / "vstar_bench")
    (folder / "direct_attributes" / "sa_1.json").write_text('{"question": "?", "options": ["a"]}')
    with pytest.raises(ConfigError, match=r"sa_1.json is not a question of V\*Bench.*bbox"):
        TASKS["vstar"].load(TaskSource(path=str(folder)))[0]


@pytest.mark.parametrize("name", ["hrbench-4k", "hrbench-8k"])
def test_hr_bench_rotations_are_one_cluster(name: str, tmp_path: Path) -> None:
    found = samples(name, tmp_path)
    assert Counter(sample.cluster for sample in found) == {f"{name}-0": 4, f"{name}-1": 4}
    assert [sample.answer for sample in found] == ["A", "D", "C", "B"] * 2
    assert found[1].question == (
        "Which one is it in picture 0?\nA. eight\nB. nine\nC. ten\nD. seven\nAnswer the option letter directly."
    )
    assert {sample.options["ABCD".index(sample.answer)] for sample in found} == {"seven", "left"}
    assert found[5].meta == {"cycle": "1", "question": 1}


def test_hr_bench_lists_the_options_that_are_there(tmp_path: Path) -> None:
    rows = [row | {"C": "", "D": ""} for row in fixtures.hr_rows()[:1]]
    (only,) = TASKS["hrbench-4k"].load(TaskSource(path=str(fixtures.tsv(rows, tmp_path / "hr.tsv"))))
    assert only.options == ("seven", "eight")
    assert only.question.splitlines()[1:] == ["A. seven", "B. eight", "Answer the option letter directly."]


def test_hr_bench_figures_are_means_over_rotations(tmp_path: Path) -> None:
    task = TASKS["hrbench-4k"]
    always_a = [Scored(one.kind, float(one.answer == "A"), one.meta) for one in samples("hrbench-4k", tmp_path)]
    assert task.aggregate is not None
    assert task.aggregate(always_a) == {
        "single": 0.25,
        "cross": 0.25,
        "average": 0.25,
        "strict circular": 0.0,
        "consistent": 0.0,
    }


def test_mme_realworld_merges_attributes(tmp_path: Path) -> None:
    task, found = TASKS["mme-realworld"], samples("mme-realworld", tmp_path)
    assert found[0].question.startswith("Which number is on the sign? The choices are listed below:\n(A) 12\n(B) 21\n")
    assert "(A, B, C, D, or E)" in found[0].question and found[0].question.endswith("\nThe best answer is:")
    assert found[0].options[:2] == ("12", "21") and len(found[0].options) == 5
    assert found[2].meta == found[3].meta == {"subtask": "vehicle/attribute"}
    assert task.aggregate is not None
    figures = task.aggregate([Scored(one.kind, float(one.answer in "AC"), one.meta) for one in found])
    assert figures["overall"] == pytest.approx(2 / 5) and figures["Perception"] == pytest.approx(2 / 4)
    assert figures["class average"] == pytest.approx((0.5 + 0.5 + 0) / 3)
    assert figures["Perception/Autonomous_Driving/vehicle/attribute"] == 0.5
    assert figures["Reasoning class average"] == 0


def test_document_tasks_share_one_repository(tmp_path: Path) -> None:
    pages, graphics = samples("docvqa", tmp_path), samples("infovqa", tmp_path)
    assert pages[0].question == f"What is the page number?\n{SHORT}"
    assert pages[0].answers == ("7", "page 7") and pages[0].id == "docvqa-100"
    assert pages[1].kind == "handwritten" and len({sample.cluster for sample in pages}) == 1
    assert graphics[1].kind == "multi-span" and graphics[1].answers == ("Oslo, Turin", "Turin, Oslo")
    assert len({sample.cluster for sample in graphics}) == 4


def test_chartqa_keeps_an_answer_that_reads_like_a_list(tmp_path: Path) -> None:
    found = samples("chartqa", tmp_path)
    assert found[1].answers == ("[Yes, No]",)
    assert found[0].question == "How many bars?\nAnswer the question with a single word."
    assert [sample.kind for sample in found] == ["human_test"] * 2 + ["augmented_test"] * 2


def test_textvqa_has_ten_answers(tmp_path: Path) -> None:
    found = samples("textvqa", tmp_path)
    assert found[0].id == "textvqa-34602" and len(found[0].answers) == 10
    assert found[0].question == f"What is the brand on the nokia phone?\n{SHORT}", "as the public code writes it"
    scorers = TASKS["textvqa"].scorers
    assert scorers["faithful"]("noka", found[0]).value == pytest.approx(0.6)
    assert scorers["faithful"]("Seven-Eleven", found[1]).value == 1


def test_ocrbench_has_points_by_group(tmp_path: Path) -> None:
    task, found = TASKS["ocrbench"], samples("ocrbench", tmp_path)
    assert found[0].question == "what is written in the image?" and task.coarse_tokens == (128, 576)
    assert task.scorers["clean"]("X^{2}+y", found[4]).value == 0 and task.scorers["clean"]("x^{2}+y", found[4]).value
    assert task.aggregate is not None
    figures = task.aggregate([Scored(one.kind, 1.0, one.meta) for one in found])
    assert figures["points"] == 5 and figures["score"] == 0.005
    assert figures["points, Text Recognition"] == 2
    assert sum(value for name, value in figures.items() if name.startswith("points, ")) == 5


def test_treebench_has_the_targets(tmp_path: Path) -> None:
    found = samples("treebench", tmp_path)
    assert found[1].boxes == (Box(8, 8, 40, 24), Box(8, 40, 30, 52))
    assert found[2].boxes == (Box(8.5, 40, 30, 52),)
    # "NA" is an option of its own, not a missing cell.
    assert found[0].options == ("blue", "navy", "grey", "NA") and found[0].id == "treebench-0"
    assert found[0].question.splitlines()[:-1] == [
        "What colour is the bar? Options:",
        "A. blue",
        "B. navy",
        "C. grey",
        "D. NA",
    ]
    assert found[0].question.endswith("between <answer> and </answer>.")
    # More than four options, columns that slipped, no columns and no points: the list that is shown decides.
    assert found[1].options[4] == "navy" and found[2].options == ("one", "two", "three")
    assert found[3].options == ("T1", "T2", "T4", "T3") and "\nA T1\n" in found[3].question


def test_treebench_refuses_targets_that_are_no_boxes(tmp_path: Path) -> None:
    file = fixtures.treebench(tmp_path / "tree") / "TreeBench.tsv"
    file.write_text(file.read_text().replace("[[0, 0, 96, 64]]", "[[0, 0, 96]]"))
    read = TASKS["treebench"].load(TaskSource(path=str(file)))
    with pytest.raises(ConfigError, match=r"Row 4 .*Question 3 of TreeBench"):
        read[3]


def test_visual_probe_is_read_from_its_folder_and_from_its_file(tmp_path: Path) -> None:
    found = samples("visualprobe-hard", tmp_path)
    assert found[1].question == "What is it in picture 1?" and found[1].answer == "P7"
    assert found[1].id == "visualprobe-hard-easy_1" and found[1].kind == "hard"
    again = TASKS["visualprobe-hard"].load(TaskSource(path=str(tmp_path / "visualprobe-hard" / "val.json")))
    assert again[1].question == found[1].question


def test_zoombench_has_two_views_of_the_same_questions(tmp_path: Path) -> None:
    whole, crop = samples("zoombench", tmp_path), samples("zoombench-crop", tmp_path)
    for one, other in zip(whole, crop, strict=True):
        assert (one.id, one.question, one.cluster) == (other.id, other.question, other.cluster)
        assert one.image.size == (96, 64) and other.image.size == (40, 40)
    assert whole[1].options == ("red", "blue", "green", "white") and whole[1].answer == "B"
    assert whole[3].options == ("the car", "the tram")
    assert whole[0].options == () and whole[2].answer == "042" and whole[2].id == "zoombench-z2"
    assert [sample.kind for sample in whole] == ["blank", "mcq", "blank", "mcq"]
    assert whole[0].boxes == (Box(8, 8, 48, 48),) and crop[0].boxes == ()


def test_zoombench_refuses_a_box_that_is_none(tmp_path: Path) -> None:
    row = {"id": "z9", "image": files.base64_png(files.draw("Z")), "query": "?", "response": "1"}
    row |= {"crop_image": row["image"], "question_type": "blank", "bbox": "[1, 2, 3]"}
    (tmp_path / "rows.jsonl").write_text(json.dumps(row) + "\n")
    with pytest.raises(ConfigError, match="Question z9 of ZoomBench has boxes that are not"):
        TASKS["zoombench"].load(TaskSource(path=str(tmp_path / "rows.jsonl")))[0]


def test_rows_of_one_id_are_questions_of_their_own(tmp_path: Path) -> None:
    row = {"questionId": 7, "question": "a?", "answers": ["x"], "image": files.base64_png(files.draw("a"))}
    rows = [row | {"question_types": ["layout"]}, row | {"question_types": ["form"]}, row | {"questionId": 8}]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(one) + "\n" for one in rows))
    read = TASKS["docvqa"].load(TaskSource(path=str(tmp_path / "rows.jsonl")))
    assert [one.id for one in read] == ["docvqa-7-row-0", "docvqa-7-row-1", "docvqa-8"]


def test_a_table_without_kinds_and_ids_has_a_kind_for_every_row(tmp_path: Path) -> None:
    row = {"question": "a?", "answers": ["x"], "image": files.base64_png(files.draw("a"))}
    path = files.parquet(Dataset.from_list([row, row]), tmp_path / "rows.parquet")
    read = TASKS["docvqa"].load(TaskSource(path=str(path)))
    assert (list(read.kinds), [one.id for one in read]) == (["other", "other"], ["docvqa-0", "docvqa-1"])


def test_pictures_are_the_ones_of_the_table(tmp_path: Path) -> None:
    for name, text in (("vstar", "V2"), ("hrbench-4k", "HR0"), ("mme-realworld", "M2"), ("treebench", "T2")):
        image = samples(name, tmp_path)[2].image
        assert ImageChops.difference(image, files.draw(text)).getbbox() is None, name


def test_the_whole_table_need_not_be_in_memory(tmp_path: Path) -> None:
    rows = open_path(fixtures.chartqa(tmp_path / "chart"))
    assert set(rows[0]["image"]) == {"bytes", "path"}, "pictures stay encoded until a sample is made"
