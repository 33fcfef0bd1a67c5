"""OCR and rules on receipts: the fields that they read, what that costs, scored as `receipt-field` is.

    pip install rapidocr onnxruntime pydantic pillow          (in an environment of its own)
    python evals/receipt_ocr.py DIR [--split test] [--threads 2] [--json FILE]
    python evals/receipt_ocr.py DIR --transcripts             (rules alone, on the transcribed lines instead of OCR)

RapidOCR runs PP-OCR: detection, direction and recognition of lines, with models of ONNX. The rules were tuned on the
transcribed lines of training receipts. Seconds, and those of all processors together, are of OCR and rules with the
scan in memory, after one receipt to warm up; megabytes are those of the models' files.
"""

import argparse
import json
import re
import sys
from collections.abc import Callable, Sequence
from importlib.metadata import version
from pathlib import Path
from statistics import fmean, median
from time import perf_counter, process_time
from typing import Any, Final

from PIL import Image

from qzoom_agent.data.image_column import headers_only
from qzoom_agent.data.receipts import Line, Receipt, read_receipts
from qzoom_agent.data.samples import TaskSource
from qzoom_agent.evaluation.scorers.receipts import day_in
from qzoom_agent.evaluation.tasks.receipts import FIELD, RECEIPTS, row_of
from qzoom_agent.evaluation.tasks.task import apply

Reader = Callable[[Image.Image], Sequence[Line]]
_MONEY: Final = re.compile(r"(?<![\d.,])-?\d[\d,]*[.,]\s?\d\d(?!\d|[.,]\d)")
_DATE: Final = re.compile(
    r"\d{1,4}\s?[-/.]\s?\d{1,2}\s?[-/.]\s?\d{2,4}(?!\d)|\d{1,2}[-/.,\s]{0,2}[A-Z]{3,9}[-/.,\s]{0,2}\d{2,4}(?!\d)"
    r"|(?<![A-Z])[A-Z]{3,9}[-/.,\s]{1,2}\d{1,2}[-/.,\s]{1,2}\d{4}(?!\d)|(?<!\d)20\d{6}(?!\d)",
    re.IGNORECASE,
)
_TOTAL: Final = re.compile(r"TOTAL|AMOUNT DUE|BALANCE DUE|NETT|PAYABLE|AMOUNT")
_ROUNDED: Final = re.compile(r"ROUND|GRAND|NETT?\b|DUE|PAYABLE|INCL|AFTER|TO BE PAID")
_OTHER: Final = re.compile(
    r"QTY|QUANTITY|ITEM|DISC|SAVING|EXCL|CHANGE|\bADJ(?!.*INCL)|POINT|BEFORE|LOADING|ACCEPTED|ROUNDING\b"
    r"|^\W*(?:GST|TAX|SR|ZR)\b|INCLUDED IN"
)
_TAX: Final = re.compile(r"GST|TAX")
_LEGAL: Final = re.compile(
    r"\bS[DO]N\b|\bBHD\b|ENTERPRISE|TRADING|RESTAURANT|RESTORAN|HARDWARE|\bLTD\b|\bINC\b|S/B\b|STATIONERY|\bCO\b"
)
_END: Final = re.compile(
    r"\bTEL|\bFAX|\bGST|PHONE|INVOICE|RECEIPT|\bDATE|CASH|\bH/?P\b|E-?MAIL|WWW|HTTP|\bBILL|\bDOC|CO\.? ?REG|\bTAX\b|@|"
    r"^\W*\(?\d{5,7}-?[A-Z]\)?\W*$|\bROC\b|COMPANY|CASHIER|TABLE|WELCOME"
)
_TOP: Final = 14
"""Lines from the top among which company and address are looked for."""


def fields_of(lines: Sequence[Line]) -> dict[str, str]:
    """Return what rules find of the four fields in lines of print, in reading order; what they do not find is empty."""
    ordered = sorted(lines, key=lambda line: line.middle)
    return {"date": _date(ordered), "total": _total(ordered), **_names(ordered[:_TOP])}


def _date(lines: Sequence[Line]) -> str:
    """Return the first date, one on a line that says so before others."""
    found = [
        (0 if "DATE" in " ".join(one.text.upper() for one in row_of(lines, line)) else 1, at, match[0])
        for at, line in enumerate(lines)
        for match in _DATE.finditer(line.text)
        if day_in(match[0]) is not None
    ]
    return min(found)[2] if found else ""


def _total(lines: Sequence[Line]) -> str:
    """Return the amount of the last row that names a total best; without any, the largest amount of the receipt."""
    found: list[tuple[int, int, str]] = []
    for at, line in enumerate(lines):
        text = line.text.upper()
        if not _TOTAL.search(text) or _OTHER.search(text) or ("INCL" not in text and _TAX.search(text)):
            continue
        money = _MONEY.findall(" ".join(one.text for one in row_of(lines, line) if one.box[0] >= line.box[0]))
        if not money and at + 1 < len(lines):
            money = _MONEY.findall(lines[at + 1].text)
        if len(money) == 1:  # several stand in a summary of taxes
            rank = 0 if "SUB" in text else (2 if _ROUNDED.search(text) else 1) + ("TOTAL" in text)
            found.append((rank, at, money[0]))
    if found:
        return max(found)[2]
    return max((amount for line in lines for amount in _MONEY.findall(line.text)), key=_value, default="")


def _value(money: str) -> float:
    plain = re.sub(r"\s", "", money)
    return float(re.sub(r"[.,](?=.*[.,])", "", plain).replace(",", "."))


def _names(lines: Sequence[Line]) -> dict[str, str]:
    """Return the company, which is the first line with a word such as SDN BHD, and the lines below it up to a label."""
    texts = [line.text.strip() for line in lines]
    legal = [at for at, text in enumerate(texts) if _LEGAL.search(text.upper())]
    worded = [at for at, text in enumerate(texts) if sum(map(str.isalpha, text)) >= 4]
    if not worded:
        return {"company": "", "address": ""}
    first = legal[0] if legal else worded[0]
    address: list[str] = []
    for text in texts[first + 1 :]:
        if _END.search(text.upper()):
            if address:
                break
            continue
        if re.search(r"[A-Za-z]{3}", text) or re.search(r"\b\d{5}\b", text):
            address.append(text)
    return {"company": texts[first], "address": " ".join(address[:5])}


def ocr_reader(threads: int) -> tuple[Reader, float, str]:
    """Return RapidOCR as a reader of lines, the megabytes of its models, and its name."""
    import rapidocr
    from rapidocr import RapidOCR

    engine = RapidOCR(
        params={
            "EngineConfig.onnxruntime.intra_op_num_threads": threads,
            "EngineConfig.onnxruntime.inter_op_num_threads": 1,
            "Global.log_level": "error",
        }
    )

    def read(image: Image.Image) -> list[Line]:
        import numpy as np

        found = engine(np.asarray(image)[:, :, ::-1])
        if found.boxes is None:
            return []
        corners = [(box[:, 0].min(), box[:, 1].min(), box[:, 0].max(), box[:, 1].max()) for box in found.boxes]
        boxes: list[tuple[float, ...]] = [tuple(map(float, box)) for box in corners]
        return [Line((a, b, c, d), text) for (a, b, c, d), text in zip(boxes, found.txts, strict=True)]

    models = list((Path(rapidocr.__file__).parent / "models").glob("*.onnx"))
    return read, sum(path.stat().st_size for path in models) / 1e6, f"rapidocr {version('rapidocr')}"


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, metavar="DIR", help="folder with receipts.jsonl and its scans")
    parser.add_argument("--split", default="test", help="train, validation, test or all (default: test)")
    parser.add_argument("--threads", type=int, default=2, help="threads of OCR (default: 2)")
    parser.add_argument("--transcripts", action="store_true", help="apply the rules to the transcribed lines")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write figures and answers")
    options = parser.parse_args(argv)
    receipts = read_receipts(options.folder, options.split)
    read, size, name = (None, 0.0, "transcripts") if options.transcripts else ocr_reader(options.threads)
    if read is not None:
        read(_scan(options.folder, receipts[0]))
    found, seconds, processor = {}, [], []
    for number, receipt in enumerate(receipts, start=1):
        image = None if read is None else _scan(options.folder, receipt)
        start, busy = perf_counter(), process_time()
        lines = receipt.lines if read is None or image is None else read(image)
        found[receipt.image] = fields_of(lines)
        seconds.append(perf_counter() - start)
        processor.append(process_time() - busy)
        print(f"\r{number} of {len(receipts)} receipts", end="", file=sys.stderr, flush=True)
    print(file=sys.stderr)
    scores = _scores(options.folder, options.split, found)
    report: dict[str, Any] = {
        "reader": name,
        "split": options.split,
        "receipts": len(receipts),
        "threads": options.threads,
        "megabytes": round(size, 1),
        "seconds": {"mean": round(fmean(seconds), 3), "median": round(median(seconds), 3)},
        "processor_seconds": {"mean": round(fmean(processor), 3), "median": round(median(processor), 3)},
        "scores": scores,
    }
    print(json.dumps(report, indent=1))
    if options.json is not None:
        options.json.write_text(json.dumps(report | {"answers": found}, indent=1), encoding="utf-8")
    return 0


def _scan(folder: Path, receipt: Receipt) -> Image.Image:
    with Image.open(folder / receipt.image) as opened:
        return opened.convert("RGB")


def _scores(folder: Path, split: str, found: dict[str, dict[str, str]]) -> dict[str, dict[str, float]]:
    """Return the mean score by field and scorer of `receipt-field`, and the number of questions."""
    (task,) = (one for one in RECEIPTS if one.name == FIELD)
    values: dict[str, dict[str, list[float]]] = {}
    with headers_only():
        for sample in task.load(TaskSource(path=str(folder), split=split)):
            answer = found[str(sample.meta["image"])][sample.kind]
            for name, scorer in task.scorers.items():
                values.setdefault(sample.kind, {}).setdefault(name, []).append(apply(scorer, answer, sample).value)
    return {
        kind: {"n": len(scores["exact"]), **{name: round(fmean(one), 4) for name, one in scores.items()}}
        for kind, scores in values.items()
    }


if __name__ == "__main__":
    sys.exit(main())
