"""Tiny random models with untrained branches, one of each family a test module."""

from collections.abc import Callable
from functools import cache

import pytest
import torch

from qzoom_agent.models.hf import HFBackend
from qzoom_agent.perception.branches import Branches
from tests.tiny_models import MIXED, Family, build


@pytest.fixture(scope="module")
def load(tmp_path_factory: pytest.TempPathFactory) -> Callable[[Family], HFBackend]:
    """A backend of six layers whose branches start after the third; of eight where every second is passed over."""

    def get(family: Family) -> HFBackend:
        folder = build(family, tmp_path_factory.mktemp(family), layers=8 if family in MIXED else 6)
        backend = HFBackend.load(str(folder), device="cpu", dtype="float32")
        torch.manual_seed(1)
        branches = Branches.from_base(backend.model, k=3)
        return HFBackend(backend.model, backend.processor, name=family, branches=branches)

    return cache(get)
