"""A published checkpoint loads by its hub id: here from a cache that looks as if it had been downloaded."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

CHECKPOINT = Path(__file__).resolve().parents[1] / "parity" / "qwen2_5_vl" / "checkpoint"


def test_a_published_checkpoint_loads_by_its_hub_id(tmp_path: Path) -> None:
    repository = tmp_path / "hub" / "models--someone--qzoom"
    snapshot = repository / "snapshots" / ("0" * 40)
    shutil.copytree(CHECKPOINT, snapshot)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text("0" * 40)
    code = (
        "from qzoom_agent.models.hf import HFBackend\n"
        "backend = HFBackend.load('someone/qzoom', device='cpu')\n"
        "print(backend.perceives, backend.branches.config.k, backend.branches.gate is not None)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, "HF_HOME": str(tmp_path), "HF_HUB_CACHE": str(tmp_path / "hub"), "HF_HUB_OFFLINE": "1"},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.stdout.strip() == "True 4 True", done.stderr
