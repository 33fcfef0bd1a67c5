"""No file, however broken, does anything but become an RGB image or an ImageError, in bounded memory."""

import json
import runpy
import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).parent


def test_every_hostile_file_is_an_image_or_an_image_error():
    # A process of its own: peak memory only ever grows, and other tests have grown it here already.
    script = HERE / "hostile_images.py"
    run = subprocess.run([sys.executable, str(script)], capture_output=True, text=True, timeout=120, check=False)
    assert run.returncode == 0, run.stderr[-3000:]
    print(run.stdout)
    found = json.loads(run.stdout.splitlines()[-1])
    assert found["files"] == 200
    assert set(found["outcomes"]) == {"ImageError", "RGB image"}
    assert sum(found["outcomes"].values()) == 200
    assert found["outcomes"]["RGB image"] >= 60
    assert found["outcomes"]["ImageError"] >= 60
    assert found["peak_growth_bytes"] < 2 * 2**30

    made = runpy.run_path(str(script))
    files = made["hostile_images"]()
    assert len({name for name, _ in files}) == len({data for _, data in files}) == 200
    assert made["digest"](files) == found["digest"], "another process made other files"
