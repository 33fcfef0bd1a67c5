"""Tiled (AnyRes) models perceive on their base view, and the base view is what the stock model makes of it."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from PIL import Image

from qzoom_agent.config import PerceptionConfig
from qzoom_agent.errors import BackendError
from qzoom_agent.geometry import Box, Size
from qzoom_agent.messages import image_part, message
from qzoom_agent.models import SamplingParams
from qzoom_agent.models.hf import HFBackend
from qzoom_agent.perception.adapters import base_view, grid_of
from qzoom_agent.perception.branches import Branches
from tests.tiny_families import SIDE, llava_next
from tests.tiny_models import noise


@pytest.fixture(scope="module")
def backend(tmp_path_factory: pytest.TempPathFactory) -> HFBackend:
    torch.manual_seed(0)
    folder = llava_next(tmp_path_factory.mktemp("next"), num_hidden_layers=6)
    loaded = HFBackend.load(str(folder), device="cpu", dtype="float32")
    return HFBackend(
        loaded.model, loaded.processor, name="next", branches=Branches.from_base(loaded.model, k=3, gate_depth=2)
    )


def pictures(width: int = 112, height: int = 112) -> dict[str, Image.Image]:
    return noise({"coarse": (width, height), "crop1": (70, 70)}, seed=3)


def test_the_base_view_is_the_first_part_of_the_stock_features(backend: HFBackend) -> None:
    _, inputs = backend.codec.pixels(pictures()["coarse"])
    with torch.inference_mode():
        stock = backend.model.get_image_features(**inputs, return_dict=True).pooler_output[0]
        ours = base_view(backend.model, inputs["pixel_values"]).pooler_output[0]
    cells = (SIDE // 14) ** 2
    assert len(stock) > len(ours) == cells + 1
    assert torch.allclose(ours[:cells], stock[:cells], atol=1e-5)
    assert torch.equal(ours[cells], backend.model.base_model.image_newline)


def test_crops_take_the_place_of_tiles(backend: HFBackend) -> None:
    shown = pictures()
    session = backend.session(shown.__getitem__)
    one = [message("user", image_part("coarse"), "what is the code?")]
    two = [message("user", image_part("coarse"), image_part("crop1"), "what is the code?")]
    sight = session.look(one, options=PerceptionConfig(gate="off", threshold=0.3))[0]
    assert (len(sight.heat), len(sight.heat[0]), sight.visual_tokens) == (4, 4, 17)
    settings = SamplingParams(max_new_tokens=6)
    looked, whole = (
        session.reply(two, settings=settings),
        backend.session(shown.__getitem__).reply(two, settings=settings),
    )
    assert (looked.text, looked.prompt_tokens) == (whole.text, whole.prompt_tokens)
    stock = HFBackend(backend.model, backend.processor, name="stock").session(shown.__getitem__)
    assert stock.reply(one, settings=settings).visual_tokens > 2 * 17


@pytest.mark.parametrize(("width", "height"), [(112, 112), (140, 70)])
def test_cells_lie_where_the_processor_put_them(backend: HFBackend, width: int, height: int) -> None:
    session = backend.session(pictures(width, height).__getitem__)
    one = [message("user", image_part("coarse"), "what is the code?")]
    sight = session.look(one, options=PerceptionConfig(gate="off", threshold=0.0))[0]
    assert sight.cells == [(0, 0, 4, 4)]
    (box,) = (Box(*corners) for corners in sight.boxes)
    square = max(width, height)  # a centre-cropping processor is given a padded square
    assert (box.width, box.height) == (square, square)
    assert box.center == pytest.approx((width / 2, height / 2), abs=1)


def test_one_more_token_is_a_newline_of_tiled_models_alone() -> None:
    """Elsewhere it is a class token before the grid, with which each cell of a map would stand for its neighbour."""
    tiled, fixed = (_of_family(name) for name in ("llava_next", "llava"))
    view = Size(SIDE, SIDE)
    assert (grid_of(tiled, view, None, 17, given=view).rows, grid_of(fixed, view, None, 16, given=view).rows) == (4, 4)
    with pytest.raises(BackendError, match="17 visual tokens do not form a square grid"):
        grid_of(fixed, view, None, 17, given=view)


def _of_family(name: str) -> Any:
    return SimpleNamespace(config=SimpleNamespace(model_type=name))
