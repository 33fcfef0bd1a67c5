"""Tiny models for the parts of GRPO."""

import pytest

from qzoom_agent.models.hf import HFBackend
from tests.tiny_models import Family, build


@pytest.fixture(scope="module", params=["qwen2_5_vl", "qwen3_vl"])
def tiny(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> HFBackend:
    family: Family = request.param
    folder = build(family, tmp_path_factory.mktemp(family), max_position_embeddings=16384)
    return HFBackend.load(str(folder), device="cpu", dtype="float32")
