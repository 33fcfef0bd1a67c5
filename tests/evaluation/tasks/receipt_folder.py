"""A folder of receipts of our own, in the form that the tasks about receipts read."""

from __future__ import annotations

import json
from pathlib import Path

from PIL import Image as Pillow
from PIL import ImageDraw


def receipts(folder: Path, *, count: int = 24) -> Path:
    """A folder of receipts of our own, each printed in letters of 6 x 12 pixels."""
    (folder / "images").mkdir(parents=True, exist_ok=True)
    rows = []
    for number in range(count):
        total = f"{number}.50"
        printed = [
            ("ACME TRADING", 20, 10),
            ("1, MAIN STREET,", 20, 30),
            ("81100 NEWTOWN", 20, 50),
            (f"DATE : {number + 1:02}/03/2018", 20, 70),
            ("SUB TOTAL", 20, 90),
            (total, 140, 90),
            ("TOTAL", 20, 110),
            (f"RM {total}", 140, 110),
        ]
        page = Pillow.new("L", (200, 140), 255)
        for text, x, y in printed:
            ImageDraw.Draw(page).text((x, y), text, fill=0)
        page.save(folder / "images" / f"{number:03}.png")
        fields = {"company": "Acme Trading", "date": f"{number + 1:02}/03/2018", "total": total}
        lines = [{"box": [x, y, x + 6 * len(text), y + 12], "text": text} for text, x, y in printed]
        rows.append(
            {
                "image": f"images/{number:03}.png",
                "fields": {**fields, "address": "1, MAIN STREET, 81100 NEWTOWN"},
                "lines": lines,
            }
        )
    (folder / "receipts.jsonl").write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    return folder
