"""Pictures of the report, to be looked at by a person: `python tests/report/screenshots.py OUT_FOLDER [chromium]`.

Not a test: what is right here is a matter of taste. It makes up one episode (a board, two crops, one refused call),
writes its report and the page of its first look, and has headless Chromium take both at two widths, in light and dark.
"""

import math
import random
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

from qzoom_agent.geometry import Box
from qzoom_agent.report.episode import write_report
from qzoom_agent.report.look import write_look
from qzoom_agent.report.overlay import overlay
from qzoom_agent.trace import CallRecord, PerceptionRecord, Trace, Turn, Usage, by_digest, describe_environment
from qzoom_agent.views import ViewStore

COLOURS = {"teal": "#2a9d8f", "amber": "#e9a23b", "brick": "#c8553d", "navy": "#33507a", "plum": "#7d4f84"}
CELL = 28


def board() -> Image.Image:
    """896 x 672: twelve shapes with small printed codes."""
    draw_at, picture = random.Random(4), Image.new("RGB", (1792, 1344), "#f6f1e7")
    draw = ImageDraw.Draw(picture)
    draw.text((80, 56), "Harbour depot, row C", font=ImageFont.load_default(84), fill="#2c2c34")
    draw.line((80, 180, 1712, 180), fill="#cfc6b4", width=4)
    for index in range(12):
        x, y = 230 + (index % 4) * 440, 380 + (index // 4) * 350
        colour, radius = list(COLOURS.values())[draw_at.randrange(5)], 110
        sides = (3, 4, 5, 6, 40)[draw_at.randrange(5)]
        turn = -math.pi / 2
        points = [
            (
                x + radius * math.cos(turn + 2 * math.pi * k / sides),
                y + radius * math.sin(turn + 2 * math.pi * k / sides),
            )
            for k in range(sides)
        ]
        draw.polygon(points, fill=colour)
        code = f"{draw_at.randrange(100, 1000)}"
        draw.text((x, y + 12), code, font=ImageFont.load_default(46), fill="#fffdf8", anchor="mm")
    return picture.resize((896, 672), Image.Resampling.LANCZOS)


def episode() -> tuple[Trace, ViewStore]:
    store = ViewStore()
    store.add_original(board())
    store.add_coarse(factor=CELL, min_tokens=36, max_tokens=64)
    budget = {"factor": CELL, "min_tokens": 32, "max_tokens": 64}
    store.add_crop(Box(440, 270, 680, 430), **budget)
    store.add_crop(Box(500, 322, 612, 392), **budget, parent="crop1")
    heat = [
        [
            math.exp(-((x - 4.9) ** 2 + (y - 2.7) ** 2) / 1.3) + 0.25 * math.exp(-((x - 1.2) ** 2 + (y - 3.9) ** 2))
            for x in range(9)
        ]
        for y in range(6)
    ]
    first = CallRecord(
        name="zoom",
        raw="<zoom><loc_119><loc_84><loc_196><loc_140></zoom>",
        box=(119, 84, 196, 140),
        view="coarse",
        label="second row, third object",
        decision="served",
        served=(440, 270, 680, 430),
        result="crop1",
        numbers={"views": 1, "visual_tokens": 63, "crop_tokens": 54},
    )
    second = CallRecord(
        name="zoom",
        raw="<zoom>[70, 42, 78, 48]</zoom>",
        box=(150, 50, 172, 62),
        view="crop1",
        label="code",
        decision="grown",
        reason="Box grown from 20x10 to 112x70 px around its centre.",
        served=(500, 322, 612, 392),
        result="crop2",
        numbers={"views": 2, "visual_tokens": 117, "crop_tokens": 40},
    )
    third = CallRecord(
        name="zoom",
        raw="<zoom><loc_7><loc_126><loc_63><loc_182></zoom>",
        box=(7, 126, 63, 182),
        view="coarse",
        decision="refused",
        reason="Little is expected there (0.04 of the heat), and the crops already shown hold 0.81 of it.",
        numbers={"heat": 0.04, "covered": 0.81},
    )
    turns = [
        Turn(
            index=0,
            text="The object is in the second row, the third from the left. Its code is too small."
            "\n<zoom><loc_119><loc_84><loc_196><loc_140></zoom>",
            thought="The object is in the second row, the third from the left. Its code is too small.",
            calls=[first],
            prompt_tokens=92,
            cached_tokens=0,
            new_tokens=31,
            visual_tokens=54,
            seconds=0.61,
            act_seconds=0.01,
        ),
        Turn(
            index=1,
            text="I see it now, but one digit is not clear; let me look closer.\n<zoom>[150, 50, 172, 62]</zoom",
            thought="I see it now, but one digit is not clear; let me look closer.",
            calls=[second],
            repairs=["the closing tag was cut off and has been completed"],
            prompt_tokens=179,
            cached_tokens=123,
            new_tokens=24,
            visual_tokens=54,
            seconds=0.38,
            act_seconds=0.01,
        ),
        Turn(
            index=2,
            text="<zoom><loc_7><loc_126><loc_63><loc_182></zoom>",
            calls=[third],
            prompt_tokens=245,
            cached_tokens=203,
            new_tokens=9,
            visual_tokens=40,
            seconds=0.17,
        ),
        Turn(
            index=3,
            text="<answer>368</answer>",
            answer="368",
            prompt_tokens=278,
            cached_tokens=254,
            new_tokens=6,
            seconds=0.12,
        ),
    ]
    views = store.views
    trace = Trace(
        id="c41f09d2a7be",
        question="What code is printed on the third object of the second row?",
        status="answered",
        answer="368",
        model="nano",
        protocol="nano",
        policy="hybrid",
        seed=7,
        views=views,
        turns=turns,
        config={"policy": "hybrid", "budget": {"max_turns": 6, "max_views": 6}},
        usage=Usage.tally(views, turns, perceive=0.21),
        perception=PerceptionRecord(
            score=0.83,
            threshold=0.5,
            heat=heat,
            cutoff=0.19,
            cells=[(4, 2, 6, 4), (0, 3, 2, 5)],
            boxes=[(398, 224, 597, 448), (0, 336, 199, 560)],
            route="zoom",
            reason="the gate asks for more detail",
            prompt_tokens=92,
            visual_tokens=54,
            token_layers=552,
            seconds=0.21,
        ),
        gold=[(536, 356, 576, 384)],
        environment=describe_environment(),
    )
    return trace, store


def main(folder: Path, chromium: str) -> None:
    trace, store = episode()
    images = by_digest(trace.views, store.image)
    found = trace.perception
    assert found is not None
    overlay(store.image("original"), found).save(folder / "overlay.png")
    for page in (
        write_report(trace, images, folder / "report.html", expected="368"),
        write_look(found, store, trace.question, trace.model, folder / "look.html"),
    ):
        print(f"{page}  {page.stat().st_size / 1000:.0f} kB")
        for width, height in ((1280, 1560), (420, 3000)):
            for theme in ("light", "dark"):
                shot = folder / f"{page.stem}-{width}-{theme}.png"
                shoot(page, shot, f"{width},{height}", chromium, dark=theme == "dark")
                print(shot)


def shoot(page: Path, shot: Path, window: str, chromium: str, *, dark: bool) -> None:
    with tempfile.TemporaryDirectory() as profile:
        command = [
            chromium, "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run",
            "--disable-background-networking", "--disable-component-update", "--disable-sync",
            "--hide-scrollbars", f"--user-data-dir={profile}", f"--screenshot={shot}",
            f"--window-size={window}", page.resolve().as_uri(),
        ]  # fmt: skip
        if dark:
            command.insert(-1, "--blink-settings=preferredColorScheme=0")
        subprocess.run(command, check=True, capture_output=True, timeout=120)


if __name__ == "__main__":
    if len(sys.argv) < 2:
        sys.exit(__doc__)
    found = sys.argv[2] if len(sys.argv) > 2 else shutil.which("chromium") or shutil.which("google-chrome")
    if found is None:
        sys.exit("No Chromium was found - looked for chromium and google-chrome - give its path as second argument.")
    main(Path(sys.argv[1]), found)
