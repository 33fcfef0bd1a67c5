"""Small local copies of the public tasks: their columns and types, our own pictures and texts.

`WRITERS[name](folder)` writes one and gives the path that the task is then read from, in the shape in which people
have it: a saved dataset, a copy of the hub's repository, parquet, a TSV, a JSON file beside its pictures.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from itertools import zip_longest
from pathlib import Path
from typing import Any, Final

from datasets import Image, List, Value

from qzoom_agent.data.samples import Sample, TaskSource
from qzoom_agent.evaluation.tasks.catalog import TASKS
from tests.evaluation.tasks.files import base64_png, dataset, draw, parquet, picture, png
from tests.evaluation.tasks.receipt_folder import receipts

TEXT: Final = Value("string")


def vstar(folder: Path) -> Path:
    """The hub's table, saved by `datasets`."""
    asked = [
        ("direct_attributes", "What colour is the bar?", ("navy", "red", "green", "grey"), "A"),
        ("direct_attributes", "What is the letter?", ("K", "M", "R", "S"), "C"),
        ("relative_position", "Is the bar above or below the text?", ("above", "below"), "A"),
        ("relative_position", "Is the text left or right of the mug?", ("left", "right"), "B"),
    ]
    rows = [
        {
            "image": picture(f"V{number}"),
            "text": question
            + "".join(f"\n({letter}) {option}" for letter, option in zip("ABCD", options, strict=False))
            + "\nAnswer with the option's letter from the given choices directly.",
            "category": category,
            "label": label,
            "question_id": str(number),
        }
        for number, (category, question, options, label) in enumerate(asked)
    ]
    dataset(rows, {"image": Image()}).save_to_disk(str(folder))
    return folder


def vstar_original(folder: Path) -> Path:
    """The authors' folders: one JSON beside each picture, the right option first, boxes as corner and size."""
    for kind, names in (("direct_attributes", ("sa_1", "sa_2", "sa_3")), ("relative_position", ("sa_4",))):
        (folder / kind).mkdir(parents=True)
        for name in names:
            draw(name).save(folder / kind / f"{name}.jpg")
            said = {
                "target_object": ["bar"],
                "bbox": [[8, 8, 32, 16]],
                "question": "What is the colour of the bar?",
                "options": ["navy", "red", "green", "grey"],
            }
            (folder / kind / f"{name}.json").write_text(json.dumps(said))
    return folder


def hr_rows() -> list[dict[str, Any]]:
    """Two questions in four rotations each; the index counts on through them."""
    rows = []
    for number, (category, options) in enumerate(
        (("single", ("seven", "eight", "nine", "ten")), ("cross", ("left", "right", "above", "below")))
    ):
        image = base64_png(draw(f"HR{number}"))
        for turn in range(4):
            turned = (*options[turn:], *options[:turn])
            rows.append(
                {
                    "index": 4 * number + turn,
                    "question": f"Which one is it in picture {number}?",
                    "answer": "ABCD"[turned.index(options[0])],
                    "category": category,
                    **dict(zip("ABCD", turned, strict=True)),
                    "cycle_category": str(turn),
                    "image": image,
                }
            )
    return rows


def hr_bench_4k(folder: Path) -> Path:
    """One parquet file."""
    return parquet(dataset(hr_rows(), {"index": Value("int64")}), folder / "hrbench_4k.parquet")


def hr_bench_8k(folder: Path) -> Path:
    """The repository's TSV."""
    return tsv(hr_rows(), folder / "hr_bench_8k.tsv")


def tsv(rows: Sequence[Mapping[str, Any]], path: Path) -> Path:
    import csv

    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]), delimiter="\t", lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
    return path


def mme(folder: Path) -> Path:
    """Parquet with the pictures as base64 text in the column `bytes`."""
    options = ["(A) 12", "(B) 21", "(C) 112", "(D) 211", "(E) The image does not feature the number."]
    asked = [
        ("Perception/OCR with Complex Context", "phone", "A"),
        ("Perception/OCR with Complex Context", "license", "B"),
        ("Perception/Autonomous_Driving", "vehicle/attribute/colour", "C"),
        ("Perception/Autonomous_Driving", "vehicle/attribute/motion", "D"),
        ("Reasoning/Monitoring", "calculate", "E"),
    ]
    rows = [
        {
            "bytes": base64_png(draw(f"M{number}")),
            "path": f"{number}.jpg",
            "index": str(number),
            "question": "Which number is on the sign?",
            "multi-choice options": options,
            "answer": answer,
            "category": category,
            "l2-category": finer,
        }
        for number, (category, finer, answer) in enumerate(asked)
    ]
    return parquet(dataset(rows, {"multi-choice options": List(TEXT)}), folder / "train.parquet")


def document_repository(folder: Path) -> Path:
    """A copy of the hub's repository that holds DocVQA and InfographicVQA as two configurations."""
    shared, page = {"image": Image(), "answers": List(TEXT)}, picture("page 7")
    pages = [
        {
            "questionId": str(100 + number),
            "question": question,
            "question_types": types,
            "image": page,
            "docId": 5,
            "ucsf_document_id": "abcd0001",
            "ucsf_document_page_no": "7",
            "answers": answers,
            "data_split": "val",
        }
        for number, (question, types, answers) in enumerate(
            [
                ("What is the page number?", ["layout"], ["7", "page 7"]),
                ("Who signed?", ["handwritten", "form"], ["J. Doe"]),
                ("What is the total?", ["table/list"], ["$12.40"]),
                ("What is the heading?", ["layout"], ["Annual report"]),
            ]
        )
    ]
    graphics = [
        {
            "questionId": str(200 + number),
            "question": question,
            "answers": answers,
            "answer_type": [kind],
            "image": picture(f"I{number}"),
            "image_url": f"{number}.jpeg",
            "operation/reasoning": [],
            "ocr": "[]",
            "data_split": "val",
        }
        for number, (question, kind, answers) in enumerate(
            [
                ("How many percent recycle?", "single span", ["35%", "35"]),
                ("Which two cities are shown?", "multi-span", ["Oslo, Turin", "Turin, Oslo"]),
                ("What is the sum?", "non-extractive", ["12"]),
                ("What is the title?", "question span", ["Water"]),
            ]
        )
    ]
    features = shared | {"question_types": List(TEXT), "docId": Value("int32")}
    parquet(dataset(pages, features), folder / "DocVQA" / "validation-00000-of-00001.parquet")
    features = shared | dict.fromkeys(("answer_type", "operation/reasoning"), List(TEXT))
    parquet(dataset(graphics, features), folder / "InfographicVQA" / "validation-00000-of-00001.parquet")
    configs = "".join(
        f"- config_name: {name}\n  data_files:\n  - split: validation\n    path: {name}/validation-*\n"
        for name in ("DocVQA", "InfographicVQA")
    )
    (folder / "README.md").write_text(f"---\nconfigs:\n{configs}---\n")
    return folder


def chartqa(folder: Path) -> Path:
    """One parquet file."""
    chart = picture("chart")
    rows = [
        {"type": kind, "question": question, "answer": answer, "image": chart}
        for kind, question, answer in (
            ("human_test", "How many bars?", "0"),
            ("human_test", "Which two are they?", "[Yes, No]"),
            ("augmented_test", "Which year has the peak?", "2010"),
            ("augmented_test", "What is the share?", "5%"),
        )
    ]
    return parquet(dataset(rows, {"image": Image()}), folder / "test.parquet")


def textvqa(folder: Path) -> Path:
    """Saved by `datasets`."""
    rows = [
        {
            "image_id": f"im{number}",
            "question_id": 34602 + number,
            "question": "what is the brand on the NOKIA phone?",
            "image": picture(answers[0]),
            "image_width": 96,
            "image_height": 64,
            "flickr_original_url": "",
            "ocr_tokens": [answers[0]],
            "answers": answers,
            "set_name": "val",
        }
        for number, answers in enumerate(
            (["nokia"] * 8 + ["noka"] * 2, ["7-eleven"] * 3 + ["seven eleven"] * 7, ["two"] * 10, ["it's"] * 10)
        )
    ]
    numbers = dict.fromkeys(("image_width", "image_height", "question_id"), Value("int32"))
    lists = dict.fromkeys(("ocr_tokens", "answers"), List(TEXT))
    dataset(rows, {**numbers, **lists, "image": Image()}).save_to_disk(str(folder))
    return folder


def ocrbench(folder: Path) -> Path:
    """A parquet file in a folder, without a README."""
    asked = [
        ("IIIT5K", "Regular Text Recognition", ["CENTRE"]),
        ("WordArt", "Artistic Text Recognition", ["dance"]),
        ("STVQA", "Scene Text-centric VQA", ["12", "twelve"]),
        ("SROIE", "Key Information Extraction", ["9.90"]),
        ("HME100k", "Handwritten Mathematical Expression Recognition", ["x ^ { 2 } + y"]),
    ]
    rows = [
        {
            "dataset": name,
            "question": "what is written in the image?",
            "question_type": kind,
            "answer": answer,
            "image": picture(answer[0]),
        }
        for name, kind, answer in asked
    ]
    parquet(dataset(rows, {"answer": List(TEXT), "image": Image()}), folder / "data" / "test-00000-of-00001.parquet")
    return folder


def treebench(folder: Path) -> Path:
    """The repository's TSV, in a folder: five options, columns that slipped, and none beside a question about text."""
    asked = [
        ("Perception/Attributes", "[[8, 8, 40, 24]]", "B", "A. blue\nB. navy\nC. grey\nD. NA"),
        (
            "Perception/Attributes",
            "[[8, 8, 40, 24], [8, 40, 30, 52]]",
            "E",
            "A. blue\nB. red\nC. grey\nD. tan\nE. navy",
        ),
        ("Reasoning/Ordering", "[[8.5, 40, 30, 52]]", "C", "A. one B. two\nC. three"),
        ("Perception/OCR", "[[0, 0, 96, 64]]", "D", "A T1\nB T2\nC T4\nD T3"),
    ]
    columns = (("blue", "navy", "grey", "NA", ""), ("blue", "red", "grey", "tan", "navy"), ("one B. two", "three"), ())
    rows = [
        {
            "index": number,
            "image": base64_png(draw(f"T{number}")),
            "question": "What colour is the bar?",
            **dict(zip_longest("ABCDE", columns[number], fillvalue="")),
            "multi-choice options": options,
            "answer": answer,
            "category": category,
            "target_instances": targets,
        }
        for number, (category, targets, answer, options) in enumerate(asked)
    ]
    tsv(rows, folder / "TreeBench.tsv")
    return folder


def visual_probe(folder: Path) -> Path:
    """val.json beside the pictures, whose paths lead from the folder above the repository's."""
    (folder / "data").mkdir(parents=True)
    rows = []
    for number, solution in enumerate(("navy", "P7", "14", "left")):
        draw(f"P{number}").save(folder / "data" / f"{number}.jpg")
        problem = f"<image>\nWhat is it in picture {number}?"
        level = folder.name.removeprefix("visualprobe-").title()
        image = f"VisualProbe_{level}/data/{number}.jpg"
        rows.append({"problem": problem, "solution": solution, "images": [image], "doc_id": f"easy_{number}"})
    (folder / "val.json").write_text(json.dumps(rows))
    return folder


def zoombench(folder: Path) -> Path:
    """A copy of the hub's repository without a README."""
    asked = [
        ("How many windows does the tower have?", "14", "blank"),
        ("Which colour is the flag?\nA. red\nB. blue\nC. green\nD. white", "B", "mcq"),
        ("What is the number of the bus?", "042", "blank"),
        ("Which is nearer? (A) the car (B) the tram", "A", "mcq"),
    ]
    rows = [
        {
            "id": f"z{number}",
            "image": picture(f"Z{number}"),
            "crop_image": {"bytes": png(draw(f"Z{number}", size=(40, 40))), "path": None},
            "query": query,
            "response": response,
            "question_type": kind,
            "bbox": [8, 8, 48, 48],
        }
        for number, (query, response, kind) in enumerate(asked)
    ]
    features = {"image": Image(), "crop_image": Image(), "bbox": List(Value("int64"))}
    parquet(dataset(rows, features), folder / "data" / "test.parquet")
    return folder


def o3_bench(folder: Path) -> Path:
    """A copy of the hub's repository: test/metadata.jsonl beside the pictures."""
    asked = [
        (
            "map",
            "Which booth is next to 233?",
            "A. area of grid B4\\nB. area of grid B5\\nC. area of grid C1",
            "C",
            [1, 2],
        ),
        ("map", "Where is the exit?", "A. north\nB. south\nC. east\nD. west", "A", [2]),
        ("chart", "Which year has both peaks?", "A. 2019\nB. 2020\nC. 2021\nD. 2022\nE. 2023", "E", [2, 1]),
        ("chart", "How many bars exceed 5?", "A. 1\nB. 2", "B", [1]),
    ]
    rows = []
    for number, (subset, question, options, answer, layouts) in enumerate(asked):
        name = f"images/{subset}/{number}.png"
        (folder / "test" / name).parent.mkdir(parents=True, exist_ok=True)
        draw(f"O{number}").save(folder / "test" / name)
        rows.append(
            {
                "file_name": name,
                "subset": subset,
                "question": question,
                "options": options,
                "answer": answer,
                "explanation": "Step 1. Refer to the legend [layout 2].",
                "target_layouts": layouts,
                "layout_infos": {
                    "1": {"layout_id": 1, "bbox": [8.0, 8.0, 40.5, 24.0]},
                    "2": {"layout_id": 2, "bbox": [8.0, 40.0, 30.0, 52.0]},
                },
                "img_width": 96,
                "img_height": 64,
            }
        )
    (folder / "test" / "metadata.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    return folder


def visual_needle(folder: Path) -> Path:
    """The publisher's JSON lines beside the folder of pictures."""
    (folder / "images").mkdir(parents=True)
    asked = [
        ("OCR Recognition", "What is the second character to the right of '8元'?", "辣"),
        ("Color Recognition", "What colour is the bar?", "navy"),
        ("Spatial Relationship", "Where is the text?", "below the bar"),
        ("Entity Recognition", "What stands on the table?", "a vase"),
    ]
    lines = []
    for number, (category, question, answer) in enumerate(asked):
        name = f"TPROMPT{number}.jpg"
        draw(f"N{number}").save(folder / "images" / name)
        row = {"id": f"TPROMPT{number}", "category": category, "question": question, "answer": answer}
        row |= {"image_path": f"images/{name}", "image_url": f"https://example.org/{name}"}
        lines.append(json.dumps({**row, "bbox": [8, 8, 40, 24]}, ensure_ascii=False))
    (folder / "visualneedle_300en.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    return folder


def hr_scene(folder: Path) -> Path:
    """One parquet file of the configuration realworld_combined."""
    asked = [
        ("Where is the tricycle?\n(A) upper left \n(B) upper right \n(C) The image does not feature it", "B"),
        ("What is written?\n(A) K7\n(B) K1", "A"),
        ("Which is larger?\n(A) left\n(B) right\n(C) both\n(D) none", "D"),
        ("How many cells are there?", "12"),
    ]
    rows = [
        {"id": number, "image": picture(f"H{number}"), "question": question, "answer": answer}
        for number, (question, answer) in enumerate(asked)
    ]
    return parquet(dataset(rows, {"id": Value("int64"), "image": Image()}), folder / "testmini.parquet")


def xlrs_lite(folder: Path) -> Path:
    """Saved by `datasets`: a list of pictures each, and one category with several right options."""
    options = ["(A) Residential", "(B) Farmland", "(C) Airport", "(D) Water"]
    asked = [
        ("Counting/Overall counting", "C"),
        ("Counting/Regional counting", "A"),
        ("Object properties/Object color", "D"),
        ("Land use classification/Overall Land use classification", "AC"),
    ]
    rows = [
        {
            "path": f"{number}.png",
            "index": number,
            "question": "What is shown?",
            "multi-choice options": options,
            "answer": answer,
            "category": category,
            "l2-category": category.split("/")[1],
            "image": [picture(f"X{number}")],
        }
        for number, (category, answer) in enumerate(asked)
    ]
    features = {"index": Value("int32"), "multi-choice options": List(TEXT), "image": List(Image())}
    dataset(rows, features).save_to_disk(str(folder))
    return folder


def charxiv(folder: Path) -> Path:
    """One parquet file: a chart a row, with the numbers of four questions and one in words."""
    asked = [
        (
            0,
            0,
            None,
            (7, 13, 11, 18),
            ("60", "Ours, Joint-CNN", "Yes", "1 by 1"),
            "Which model declines?",
            "Joint-CNN",
            1,
        ),
        (1, 2, None, (1, 17, 16, 19), ("(b) OPT", "14", "increases", "2"), "By how much?", "9.17", 4),
        (0, 0, "the bottom subplot", (2, 8, 10, 14), ("q", "0.1", "7", "Not Applicable"), "How many?", "3", 4),
        (2, 1, None, (3, 4, 12, 15), ("PPL", "0", "4", "1.0"), "Up or down?", "moving up", 2),
        (2, 1, None, (5, 6, 9, 12), ("1", "2", "3", "5"), "Which value is the largest?", "94", 3),
    ]
    rows = [
        {
            "category": "cs",
            "year": "20",
            "original_figure_path": f"{number}.jpg",
            "original_id": f"2004.1095{number}",
            "figure_path": f"images/{number}.jpg",
            "image": picture(f"C{number}"),
            "num_subplots": 1 + row,
            "subplot_row": row,
            "subplot_col": column,
            "subplot_loc": place,
            **{f"descriptive_q{at}": one for at, one in enumerate(numbers, start=1)},
            **{f"descriptive_a{at}": one for at, one in enumerate(answers, start=1)},
            "reasoning_q": question,
            "reasoning_q_source": 3,
            "reasoning_a": answer,
            "reasoning_a_type": kind,
        }
        for number, (row, column, place, numbers, answers, question, answer, kind) in enumerate(asked)
    ]
    numbers = ("num_subplots", "subplot_row", "subplot_col", "reasoning_q_source", "reasoning_a_type")
    whole = dict.fromkeys((*numbers, *(f"descriptive_q{at}" for at in range(1, 5))), Value("int64"))
    return parquet(dataset(rows, {**whole, "image": Image()}), folder / "validation.parquet")


def ocrbench_v2(folder: Path) -> Path:
    """A parquet file in a folder: one question of every form."""
    spotted = {"bbox_list": [[10, 20, 90, 20, 90, 40, 10, 40], [10, 60, 50, 80]], "content": ["SALE!", "K7"]}
    choices = "Which sum is right?\nA. 4\nB. 5\nC. 6"
    asked: list[tuple[str, str, list[str], Mapping[str, Any]]] = [
        ("cognition VQA en", "What is the brand?", ["nokia", "NOKIA"], {}),
        ("math QA en", choices, ["B"], {"eval": "multiple choice"}),
        ("text recognition en", "What is written?", ["One Long Line Of Text"], {"eval": "case sensitive"}),
        ("cognition VQA cn", "图中写了什么", ["北京 大学"], {}),
        ("text counting en", "How many words are there?", ["12"], {"eval": "regression"}),
        ("text counting en", "How often does e occur?", ["3"], {"eval": "exact match"}),
        ("formula recognition en", "Write the formula.", ["x ^ { 2 }"], {}),
        ("formula recognition cn", "写出公式。", ["\\text{面积} = 2"], {}),
        ("handwritten answer extraction cn", "选择题答案是什么", ["AC"], {}),
        ("handwritten answer extraction cn", "请写出简答题的答案。", ["因为光合作用"], {}),
        (
            "key information extraction en",
            "Give date and total.",
            ['{"date": ["1 May", "May 1"], "total": ["9.90"]}'],
            {},
        ),
        ("key information extraction cn", "给出日期。", ["{'日期': '五月'}"], {}),
        ("VQA with position en", "What is written on the cabin?", ["K7", "k7"], {"bbox": [100, 200, 300, 400]}),
        ("text grounding en", "Where is 'SALE'?", ["120", "340", "455", "600"], {}),
        ("text spotting en", "Spot all the text.", [], spotted),
        ("table parsing en", "Write the table in html.", ["<table><tr><td>1</td></tr></table>"], {}),
        ("full-page OCR cn", "写出全文。", ["全文"], {}),
        ("chart parsing en", "Write the chart.", ['{"a": "1"}'], {}),
    ]
    rows = [
        {
            "id": number,
            "dataset_name": "own",
            "question": question,
            "type": kind,
            "answers": answers,
            "image": picture(f"Q{number}"),
            "eval": "None",
            "bbox": None,
            "bbox_list": None,
            "content": None,
            **more,
        }
        for number, (kind, question, answers, more) in enumerate(asked)
    ]
    lists = {"answers": List(TEXT), "content": List(TEXT), "bbox": List(Value("int32"))}
    features = {**lists, "bbox_list": List(List(Value("int32"))), "id": Value("int32"), "image": Image()}
    parquet(dataset(rows, features), folder / "data" / "test-00000-of-00001.parquet")
    return folder


WRITERS: Final[Mapping[str, Callable[[Path], Path]]] = {
    "vstar": vstar,
    "hrbench-4k": hr_bench_4k,
    "hrbench-8k": hr_bench_8k,
    "mme-realworld": mme,
    "mme-realworld-lite": mme,
    "docvqa": document_repository,
    "infovqa": document_repository,
    "chartqa": chartqa,
    "textvqa": textvqa,
    "ocrbench": ocrbench,
    "treebench": treebench,
    "visualprobe-easy": visual_probe,
    "visualprobe-medium": visual_probe,
    "visualprobe-hard": visual_probe,
    "zoombench": zoombench,
    "zoombench-crop": zoombench,
    "o3-bench": o3_bench,
    "visualneedle": visual_needle,
    "hrscene": hr_scene,
    "xlrs-lite": xlrs_lite,
    "charxiv-reasoning": charxiv,
    "charxiv-descriptive": charxiv,
    "ocrbench-v2": ocrbench_v2,
    "ocrbench-v2-pages": ocrbench_v2,
    "receipt-field": receipts,
    "receipt-line": receipts,
}
"""By the task's name; the tasks that are drawn need none."""


def samples(name: str, folder: Path) -> list[Sample]:
    """Return the samples of a task, of a copy that is written into the folder."""
    return list(TASKS[name].load(TaskSource(path=str(WRITERS[name](folder / name)))))
