"""Small local copies of the public tasks: their columns and types, our own pictures and texts.

`WRITERS[name](folder)` writes one and gives the path that the task is then read from, in the shape in which people
have it: a saved dataset, a copy of the hub's repository, parquet, a TSV, a JSON file beside its pictures.
"""

from __future__ import annotations

import base64
import io
import json
from collections.abc import Callable, Mapping, Sequence
from itertools import zip_longest
from pathlib import Path
from typing import Any, Final

from datasets import Dataset, Features, Image, List, Value
from PIL import Image as Pillow
from PIL import ImageDraw

TEXT: Final = Value("string")


def draw(text: str, *, colour: str = "navy", size: tuple[int, int] = (96, 64)) -> Pillow.Image:
    """A small picture of its own: a coloured bar and a text."""
    image = Pillow.new("RGB", size, "white")
    pen = ImageDraw.Draw(image)
    pen.rectangle((8, 8, 40, 24), fill=colour)
    pen.text((8, 40), text, fill="black")
    return image


def png(image: Pillow.Image) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return buffer.getvalue()


def base64_png(image: Pillow.Image) -> str:
    return base64.b64encode(png(image)).decode()


def dataset(rows: Sequence[Mapping[str, Any]], features: Mapping[str, Any]) -> Dataset:
    return Dataset.from_list([dict(row) for row in rows], features=Features(features))


def parquet(data: Dataset, path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    data.to_parquet(str(path))
    return path


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
            "image": {"bytes": png(draw(f"V{number}")), "path": None},
            "text": question
            + "".join(f"\n({letter}) {option}" for letter, option in zip("ABCD", options, strict=False))
            + "\nAnswer with the option's letter from the given choices directly.",
            "category": category,
            "label": label,
            "question_id": str(number),
        }
        for number, (category, question, options, label) in enumerate(asked)
    ]
    columns = {"image": Image(), "text": TEXT, "category": TEXT, "label": TEXT, "question_id": TEXT}
    dataset(rows, columns).save_to_disk(str(folder))
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
    columns = dict.fromkeys(("question", "answer", "category", *"ABCD", "cycle_category", "image"), TEXT)
    return parquet(dataset(hr_rows(), {"index": Value("int64"), **columns}), folder / "hrbench_4k.parquet")


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
    columns = dict.fromkeys(("bytes", "path", "index", "question", "answer", "category", "l2-category"), TEXT)
    return parquet(dataset(rows, {**columns, "multi-choice options": List(TEXT)}), folder / "train.parquet")


def document_repository(folder: Path) -> Path:
    """A copy of the hub's repository that holds DocVQA and InfographicVQA as two configurations."""
    shared = {"questionId": TEXT, "question": TEXT, "image": Image(), "answers": List(TEXT), "data_split": TEXT}
    page = draw("page 7")
    pages = [
        {
            "questionId": str(100 + number),
            "question": question,
            "question_types": types,
            "image": {"bytes": png(page), "path": None},
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
            "image": {"bytes": png(draw(f"I{number}")), "path": None},
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
    parquet(
        dataset(
            pages,
            shared
            | {"question_types": List(TEXT), "docId": Value("int32")}
            | dict.fromkeys(("ucsf_document_id", "ucsf_document_page_no"), TEXT),
        ),
        folder / "DocVQA" / "validation-00000-of-00001.parquet",
    )
    parquet(
        dataset(
            graphics,
            shared
            | dict.fromkeys(("answer_type", "operation/reasoning"), List(TEXT))
            | dict.fromkeys(("image_url", "ocr"), TEXT),
        ),
        folder / "InfographicVQA" / "validation-00000-of-00001.parquet",
    )
    configs = "".join(
        f"- config_name: {name}\n  data_files:\n  - split: validation\n    path: {name}/validation-*\n"
        for name in ("DocVQA", "InfographicVQA")
    )
    (folder / "README.md").write_text(f"---\nconfigs:\n{configs}---\n")
    return folder


def chartqa(folder: Path) -> Path:
    """One parquet file."""
    chart = draw("chart")
    rows = [
        {"type": kind, "question": question, "answer": answer, "image": {"bytes": png(chart), "path": None}}
        for kind, question, answer in (
            ("human_test", "How many bars?", "0"),
            ("human_test", "Which two are they?", "[Yes, No]"),
            ("augmented_test", "Which year has the peak?", "2010"),
            ("augmented_test", "What is the share?", "5%"),
        )
    ]
    return parquet(
        dataset(rows, {"type": TEXT, "question": TEXT, "answer": TEXT, "image": Image()}), folder / "test.parquet"
    )


def textvqa(folder: Path) -> Path:
    """Saved by `datasets`."""
    rows = [
        {
            "image_id": f"im{number}",
            "question_id": 34602 + number,
            "question": "what is the brand on the NOKIA phone?",
            "image": {"bytes": png(draw(answers[0])), "path": None},
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
    sizes = dict.fromkeys(("image_width", "image_height"), Value("int32"))
    lists = dict.fromkeys(("ocr_tokens", "answers"), List(TEXT))
    words = dict.fromkeys(("image_id", "question", "flickr_original_url", "set_name"), TEXT)
    dataset(rows, {**words, **sizes, **lists, "question_id": Value("int32"), "image": Image()}).save_to_disk(
        str(folder)
    )
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
            "image": {"bytes": png(draw(answer[0])), "path": None},
        }
        for name, kind, answer in asked
    ]
    columns = {"dataset": TEXT, "question": TEXT, "question_type": TEXT, "answer": List(TEXT), "image": Image()}
    parquet(dataset(rows, columns), folder / "data" / "test-00000-of-00001.parquet")
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
            "image": {"bytes": png(draw(f"Z{number}")), "path": None},
            "crop_image": {"bytes": png(draw(f"Z{number}", size=(40, 40))), "path": None},
            "query": query,
            "response": response,
            "question_type": kind,
            "bbox": [8, 8, 48, 48],
        }
        for number, (query, response, kind) in enumerate(asked)
    ]
    columns = dict.fromkeys(("id", "query", "response", "question_type"), TEXT)
    features = {**columns, "image": Image(), "crop_image": Image(), "bbox": List(Value("int64"))}
    parquet(dataset(rows, features), folder / "data" / "test.parquet")
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
}
"""By the task's name; the tasks that are drawn need none."""
