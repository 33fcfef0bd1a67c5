"""Tiny random models of all families, and questions about small pictures with a known box."""

from collections.abc import Callable
from copy import deepcopy
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from datasets import Dataset
from PIL import Image

from qzoom_agent.models.hf import HFBackend
from qzoom_agent.perception.branches import Branches
from qzoom_agent.training.branches.branch_recipe import Optimisation
from qzoom_agent.training.branches.dataset import DatasetSpec, Records, load_records
from tests.tiny_models import Family, build

Load = Callable[..., HFBackend]


@pytest.fixture(scope="session")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Callable[[Family], Path]:
    """The folder of a family's tiny model, six layers deep; of two kinds of layers, half have full attention."""
    return cache(lambda family: build(family, tmp_path_factory.mktemp(family), layers=6))


@pytest.fixture(scope="session")
def _loaded(folders: Callable[[Family], Path]) -> Callable[[Family], tuple[HFBackend, Branches]]:
    def get(family: Family) -> tuple[HFBackend, Branches]:
        backend = HFBackend.load(str(folders(family)), device="cpu", dtype="float32")
        backend.model.requires_grad_(False)
        torch.manual_seed(1)
        return backend, Branches.from_base(backend.model, k=3, depth=2, gate_depth=2)

    return cache(get)


@pytest.fixture
def load(_loaded: Callable[[Family], tuple[HFBackend, Branches]]) -> Load:
    """A backend of this test alone, with untrained branches behind the third layer."""

    def get(family: Family) -> HFBackend:
        backend, branches = _loaded(family)
        model, branches = deepcopy((backend.model, branches))
        return HFBackend(model, backend.processor, name=family, defaults=backend.defaults, branches=branches)

    return get


def fast(**changes: Any) -> Optimisation:
    """Return settings with which a tiny branch learns in some steps."""
    how = {"learning_rate": 3e-3, "per_device_train_batch_size": 4, "warmup_steps": 0.0}
    return Optimisation(**how | {"logging_steps": 1, "dataloader_num_workers": 0} | changes)


def copied(module: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in module.state_dict().items()}


def same(before: dict[str, torch.Tensor], module: torch.nn.Module) -> bool:
    after = module.state_dict()
    return all(torch.equal(value, after[name]) for name, value in before.items())


def picture(seed: int) -> Image.Image:
    """Dark noise of 112 x 112 pixels with a white box, which is where answers are."""
    pixels = np.random.default_rng(seed).integers(0, 128, (112, 112, 3), dtype=np.uint8)
    pixels[28:84, 28:56] = 255
    return Image.fromarray(pixels)


@pytest.fixture(scope="session")
def rows(tmp_path_factory: pytest.TempPathFactory) -> Records:
    """Twelve questions about four pictures; those with an even number have a box, the others need none."""
    folder = tmp_path_factory.mktemp("rows") / "table"
    questions = ("what is the code?", "how many green triangles are there?", "what is on the red circle?")
    Dataset.from_dict(
        {
            "id": [f"q{index}" for index in range(12)],
            "image": [picture(index // 3) for index in range(12)],
            "question": [questions[index % 3] for index in range(12)],
            "answer": ["407" for _ in range(12)],
            "boxes": [[] if index % 2 else [[28.0, 28.0, 56.0, 84.0]] for index in range(12)],
        }
    ).save_to_disk(str(folder))
    return load_records([DatasetSpec(path=str(folder))])


@pytest.fixture(scope="session")
def boxless(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Eight questions about two boards, none of which says where its answer is; nano needs a zoom for some."""
    folder = tmp_path_factory.mktemp("boxless") / "table"
    boards = load_records([DatasetSpec(path="needle", limit=8, a_board=4, seed=1)])
    columns = ("id", "image", "question", "answer")
    rows = [{name: getattr(boards[index], name) for name in columns} for index in range(len(boards))]
    Dataset.from_list(rows).save_to_disk(str(folder))
    return folder
