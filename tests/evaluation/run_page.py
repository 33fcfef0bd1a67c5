"""Draw a run's report for a person: `python tests/evaluation/run_page.py OUT_FOLDER [N] [chromium]`.

Not a test: what is right here is a matter of taste. It makes up a run of N samples (2,000) with a baseline, writes its
report, says how large it is, and has headless Chromium take it at two widths, in light and dark.
"""

import random
import shutil
import sys
from pathlib import Path

from qzoom_agent.data.samples import TaskSource
from qzoom_agent.evaluation.report import write_run_report
from qzoom_agent.evaluation.run_log import RunFolder
from qzoom_agent.evaluation.runner import evaluate
from tests.evaluation.player import numbers, player
from tests.report.screenshots import shoot


def main(folder: Path, n: int, chromium: str) -> None:
    draw = random.Random(1)
    luck = [draw.random() for _ in range(n)]
    source = TaskSource(n=n)
    run = folder / "run"
    evaluate(player(lambda i: luck[i] < 0.72, zooms=lambda i: luck[i] > 0.3), [numbers()], out=run, source=source)
    for policy, share in (("direct", 0.41), ("random", 0.44)):
        agent = player(lambda i, share=share: (luck[i] * 7) % 1 < share, policy=policy)
        evaluate(agent, [numbers()], out=run / "ablations" / policy, source=source)
    page = write_run_report(RunFolder(run), baseline=RunFolder(run / "ablations" / "direct"))
    print(f"{page}  {page.stat().st_size / 1e6:.1f} MB")
    for width, height in ((1280, 1700), (420, 2600)):
        for theme in ("light", "dark"):
            shot = folder / f"run-{width}-{theme}.png"
            shoot(page, shot, f"{width},{height}", chromium, dark=theme == "dark")
            print(shot)


if __name__ == "__main__":
    if len(sys.argv) < 2:
        sys.exit(__doc__)
    found = sys.argv[3] if len(sys.argv) > 3 else shutil.which("chromium") or shutil.which("google-chrome")
    if found is None:
        sys.exit("No Chromium was found - looked for chromium and google-chrome - give its path as third argument.")
    main(Path(sys.argv[1]), int(sys.argv[2]) if len(sys.argv) > 2 else 2000, found)
