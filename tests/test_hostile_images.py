"""No file, however broken, does anything but become an RGB image or an ImageError, in bounded time and memory."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.hostile_images import COUNT, digest, hostile_images, load

SCRIPT = Path(__file__).parent / "hostile_images.py"


@pytest.mark.filterwarnings("ignore")
def test_every_hostile_file_is_an_image_or_an_image_error():
    files = hostile_images()
    assert len({name for name, _ in files}) == len({data for _, data in files}) == len(files) == COUNT >= 300
    found = [load(name, data) for name, data in files]
    assert {one.kind for one in found} == {"ImageError", "RGB image"}
    assert [one for one in found if one.seconds > 2] == []
    families = {one.name.partition("/")[0] for one in found if one.kind == "RGB image"}
    assert families >= {"valid", "flips", "exif", "endless"} and not families & {"bomb", "thin", "other"}
    assert digest(files) == digest(hostile_images()), "other files were made"


@pytest.mark.slow  # makes and refuses files of up to 600 MB
def test_large_files_take_less_than_2_seconds_and_2_gb():
    # A process of its own: peak memory only ever grows, and other tests have grown it here already.
    run = subprocess.run(
        [sys.executable, str(SCRIPT), "--large", "-v"], capture_output=True, text=True, timeout=900, check=False
    )
    assert run.returncode == 0, run.stderr[-3000:]
    print(run.stdout)
    found = json.loads(run.stdout.splitlines()[-1])
    assert found["files"] > COUNT and set(found["outcomes"]) == {"ImageError", "RGB image"}
    assert found["peak_growth_bytes"] < 2 * 2**30
    assert found["seconds"] < 2, found["slowest"]
