"""O3-Bench, VisualNeedle, HRScene and XLRS-Bench-lite, read from local copies with the public columns."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from qzoom_agent.data.samples import TaskSource
from qzoom_agent.errors import ConfigError, ImageError
from qzoom_agent.evaluation.tasks.catalog import TASKS
from qzoom_agent.evaluation.tasks.task import Scored
from qzoom_agent.geometry import Box
from tests.evaluation.tasks import files, fixtures
from tests.evaluation.tasks.fixtures import samples


def test_o3_bench_has_the_boxes_of_the_regions_in_their_order(tmp_path: Path) -> None:
    found = samples("o3-bench", tmp_path)
    legend, grid = Box(8, 40, 30, 52), Box(8, 8, 40.5, 24)
    assert [sample.boxes for sample in found] == [(grid, legend), (legend,), (legend, grid), (grid,)]
    # A line break may be written as a backslash and an n.
    assert found[0].question.splitlines()[1:] == ["A. area of grid B4", "B. area of grid B5", "C. area of grid C1"]
    assert found[0].options == ("area of grid B4", "area of grid B5", "area of grid C1") and len(found[2].options) == 5
    assert [sample.kind for sample in found] == ["map", "map", "chart", "chart"]


def test_o3_bench_is_read_as_datasets_saves_it(tmp_path: Path) -> None:
    from datasets import load_dataset

    folder = fixtures.o3_bench(tmp_path / "o3")
    load_dataset("imagefolder", data_dir=str(folder / "test"), split="train").save_to_disk(str(tmp_path / "saved"))
    load = TASKS["o3-bench"].load
    for one, other in zip(
        load(TaskSource(path=str(folder))), load(TaskSource(path=str(tmp_path / "saved"))), strict=True
    ):
        assert (one.question, one.answer, one.boxes) == (other.question, other.answer, other.boxes)
        assert one.image.tobytes() == other.image.tobytes()


def test_o3_bench_names_the_row_whose_region_is_missing(tmp_path: Path) -> None:
    file = fixtures.o3_bench(tmp_path / "o3") / "test" / "metadata.jsonl"
    file.write_text(file.read_text().replace('"target_layouts": [2]', '"target_layouts": [7]'))
    with pytest.raises(ConfigError, match=r"Row 2 of .*metadata.jsonl cannot be asked"):
        TASKS["o3-bench"].load(TaskSource(path=str(file)))[1]


def test_visualneedle_is_read_from_its_folder_only(tmp_path: Path) -> None:
    found = samples("visualneedle", tmp_path)
    assert found[0].answer == "辣" and found[0].boxes == (Box(8, 8, 40, 24),)
    assert found[0].id == "visualneedle-TPROMPT0" and found[0].kind == "OCR Recognition"
    with pytest.raises(ConfigError, match=r"not on the hub.*visualneedle_300en.jsonl"):
        TASKS["visualneedle"].load(TaskSource())


def test_hrscene_has_choices_and_open_questions(tmp_path: Path) -> None:
    found = samples("hrscene", tmp_path)
    assert found[0].question.endswith("\nGive answer in exact this format, <ans>ANSWER</ans>, no redundant words. "
                                      "For example: <ans>A</ans>.")  # fmt: skip
    assert found[0].options == ("upper left", "upper right", "The image does not feature it")
    assert found[3].options == () and TASKS["hrscene"].scorers["clean"]("12", found[3]).value == 1


def test_hrscene_without_answers_can_be_asked_but_not_scored(tmp_path: Path) -> None:
    row = {"id": 1, "image": files.base64_png(files.draw("H")), "question": "?\n(A) a\n(B) b", "answer": "None"}
    (tmp_path / "test.jsonl").write_text(json.dumps(row))
    load, path = TASKS["hrscene"].load, str(tmp_path / "test.jsonl")
    with pytest.raises(ConfigError, match="there is no answer"):
        load(TaskSource(path=path))[0]
    asked = load(TaskSource(path=path, answered=False))[0]
    assert (asked.answer, asked.answers) == ("", ())


def test_xlrs_asks_for_one_letter_or_several(tmp_path: Path) -> None:
    found, scorers = samples("xlrs-lite", tmp_path), TASKS["xlrs-lite"].scorers
    assert found[0].question.startswith("What is shown? The choices are listed below:\n(A) Residential\n(B) Farmland\n")
    assert found[0].question.endswith("(A, B, C, D).\nThe answer is:")
    assert "There may be more than one correct option" in found[3].question
    several = found[3]
    assert several.answer == "AC" and several.options == ("Residential", "Farmland", "Airport", "Water")
    for reply in ("A C", "C, A", "AC", "(A) Residential and (C) Airport", "The answer is A and C."):
        assert scorers["clean"](reply, several).value == 1, reply
    for reply in ("A", "A B C", "a cab", "Airport", "A, C or Water", "A, ca", "A C E", ""):
        assert scorers["clean"](reply, several).value == 0, reply
    assert scorers["clean"]("ABCD", replace(several, answer="ABCD")) == (1, "ABCD")
    assert scorers["clean"]("a, b, c and d", replace(several, answer="ABCD")) == (1, "ABCD")
    assert scorers["faithful"]("A C", several) == (1, "AC")
    assert scorers["clean"]("(C)", found[0]) == (1, "C")


def test_xlrs_has_micro_and_macro_figures(tmp_path: Path) -> None:
    found, aggregate = samples("xlrs-lite", tmp_path), TASKS["xlrs-lite"].aggregate
    assert aggregate is not None and aggregate([]) == {}
    scored = [Scored(one.kind, float("Counting" in one.kind), one.meta) for one in (*found, found[3], found[3])]
    figures = aggregate(scored)
    assert figures["micro"] == pytest.approx(2 / 6) and figures["macro"] == pytest.approx(2 / 4)
    assert figures["Counting"] == 1 and figures["Object properties"] == 0


def test_a_question_about_two_images_is_named(tmp_path: Path) -> None:
    image = files.base64_png(files.draw("X"))
    row = {"index": 7, "question": "What changed?", "multi-choice options": ["(A) a", "(B) b"], "answer": "A"}
    row |= {"category": "Counting/Counting with changing detection", "image": [image, image]}
    (tmp_path / "rows.jsonl").write_text(json.dumps(row))
    with pytest.raises(ImageError, match=r"Row 1 .* has 2 images"):
        TASKS["xlrs-lite"].load(TaskSource(path=str(tmp_path / "rows.jsonl")))[0]


def test_images_are_read_up_to_the_setting(tmp_path: Path) -> None:
    path = str(fixtures.xlrs_lite(tmp_path / "xlrs"))
    with pytest.raises(ImageError, match="limit of 100 px"):
        TASKS["xlrs-lite"].load(TaskSource(path=path, max_pixels=100))[0]
