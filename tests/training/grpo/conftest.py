"""Tiny models for the parts of GRPO."""

import pytest

from qzoom_agent.models.hf import HFBackend
from tests.tiny_models import Family
from tests.training.grpo.grpo_script import tiny_model


@pytest.fixture(scope="module", params=["qwen2_5_vl", "qwen3_vl"])
def tiny(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> HFBackend:
    family: Family = request.param
    folder = tiny_model(family, tmp_path_factory.mktemp(family))
    return HFBackend.load(str(folder), device="cpu", dtype="float32")
