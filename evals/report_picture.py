"""The picture of the README: the report of nano-paper's answer about the receipt of `qzoom demo`.

    python evals/report_picture.py docs/images/report.png       (needs Chromium)

The receipt is drawn, and was chosen because nano-paper answers it: `rl/demo_receipt.py`, which is to be run first
where the weights of nano-paper are new.
"""

import argparse
import json
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from importlib.resources import files
from pathlib import Path
from typing import Final

from PIL import Image

from qzoom_agent import Agent
from qzoom_agent.errors import ConfigError, finished
from qzoom_agent.geometry import Box
from qzoom_agent.report.episode import render_html
from qzoom_agent.trace import by_digest

WINDOW: Final = "1280,1160"
"""Width and height of the page in pixels."""
TALL: Final = "720px"
"""Height of the receipt on it, in place of a share of the window, so that all of it is seen."""


def report(page: Path) -> None:
    """Ask about the receipt and write the report of the answer."""
    demo = files("qzoom_agent.data") / "demo"
    row = json.loads((demo / "questions.json").read_text(encoding="utf-8"))[-1]
    boxes = [Box(*box) for box in row["boxes"]]
    with Agent.from_pretrained(row["model"]) as agent:
        answer = agent.run(str(demo / row["image"]), row["question"], boxes=boxes)
    print(f"{answer.text}, expected {row['answer']}")
    trace, images = answer.trace, by_digest(answer.trace.views, answer.store.image)
    text = render_html(trace, images, expected=row["answer"])
    text = re.sub("<meta[^>]*Content-Security-Policy[^>]*>", "", text)  # forbids other styles than its own
    page.write_text(text.replace("</style>", f":root {{ --tall: {TALL} }}</style>", 1), encoding="utf-8")


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("path", type=Path, help="PNG to write")
    parser.add_argument("--chromium", default=shutil.which("chromium") or shutil.which("google-chrome"))
    options = parser.parse_args(argv)
    if options.chromium is None:
        raise ConfigError("There is no chromium or google-chrome on the PATH. Give the path of one: --chromium PATH.")
    with tempfile.TemporaryDirectory() as folder:
        page, shot = Path(folder, "report.html"), Path(folder, "report.png")
        report(page)
        flags = ["--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars", "--disable-background-networking"]
        paths = [f"--user-data-dir={folder}/profile", f"--screenshot={shot}", f"--window-size={WINDOW}", page.as_uri()]
        subprocess.run([options.chromium, *flags, *paths], check=True, capture_output=True, timeout=240)
        with Image.open(shot) as taken:
            # Without k-means the many greys leave no colour for the boxes.
            taken.convert("RGB").quantize(256, kmeans=3, dither=Image.Dither.NONE).save(options.path, optimize=True)
    print(options.path)
    return 0


if __name__ == "__main__":
    sys.exit(finished("evals/report_picture.py", main))
