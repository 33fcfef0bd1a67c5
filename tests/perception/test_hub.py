"""A published checkpoint loads by its hub id: here from a cache that looks as if it had been downloaded."""

import shutil
from pathlib import Path

import pytest
from huggingface_hub import constants

from qzoom_agent.models.hf import HFBackend

CHECKPOINT = Path(__file__).resolve().parents[1] / "parity" / "qwen2_5_vl" / "checkpoint"


def test_a_published_checkpoint_loads_by_its_hub_id(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    repository = tmp_path / "hub" / "models--someone--qzoom"
    snapshot = repository / "snapshots" / ("0" * 40)
    shutil.copytree(CHECKPOINT, snapshot)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text("0" * 40)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    backend = HFBackend.load("someone/qzoom", device="cpu")
    assert backend.perceives and backend.branches is not None
    assert backend.branches.config.k == 4 and backend.branches.gate is not None
