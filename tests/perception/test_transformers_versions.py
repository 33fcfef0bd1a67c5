"""Each form that a version of transformers has gives the same result, whichever version the tests run with."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from PIL import Image
from torch import Tensor
from transformers import DynamicCache

from qzoom_agent.messages import image_part, message
from qzoom_agent.models.hf import HFBackend, _missing_package
from qzoom_agent.perception import transformers_versions as versions
from tests.tiny_models import Family

ASKED = [message("user", image_part("a"), image_part("b"), "What is the code?")]


def prepared(backend: HFBackend) -> tuple[Any, Any]:
    """Return a session and its prepared conversation about two images."""
    side = backend.defaults.factor
    pictures = {"a": Image.new("RGB", (2 * side, 2 * side), "red"), "b": Image.new("RGB", (3 * side, 2 * side), "blue")}
    session = backend.session(pictures.__getitem__)
    return session, session.prepare(ASKED)


@pytest.mark.parametrize("family", ["qwen2_5_vl", "qwen3_vl", "llava"])
@torch.inference_mode()
def test_features_go_into_a_forward_that_takes_none(
    family: Family, load: Callable[[Family], HFBackend], monkeypatch: pytest.MonkeyPatch
) -> None:
    session, ready = prepared(load(family))
    expected, _ = session.feed(ready.prompt, ready.positions, 0)
    session, ready = prepared(load(family))
    before_5_18 = frozenset({"past_key_values", "cache"} & versions._parameters(type(load(family).model).forward))
    monkeypatch.setattr(versions, "_parameters", lambda function: before_5_18)
    found, _ = session.feed(ready.prompt, ready.positions, 0)
    assert torch.allclose(found, expected, atol=1e-5)
    assert session.cache.get_seq_length() == len(ready.prompt.ids)


@torch.inference_mode()
def test_deepstack_features_are_divided_into_those_of_each_image(load: Callable[[Family], HFBackend]) -> None:
    backend = load("qwen3_vl")
    inner: Any = backend.model.base_model
    side = backend.defaults.factor
    parts = [backend.codec.pixels(Image.new("RGB", (n * side, side), "red"))[1] for n in (2, 3)]
    inputs = {key: torch.cat([one[key] for one in parts]) for key in parts[0]}
    found = versions.image_features(backend.model, inputs)
    assert [[len(part) for part in level] for level in found.deepstack_features] == [[2, 3], [2, 3]]

    class Whole:
        """A model of before transformers 5.18: one tensor for all images."""

        def get_image_features(self, **named: Tensor) -> Any:
            old = inner.get_image_features(**named)
            old.deepstack_features = [torch.cat(tuple(level)) for level in found.deepstack_features]
            return old

    older = versions.image_features(Whole(), inputs)  # type: ignore[arg-type]
    for level, expected in zip(older.deepstack_features, found.deepstack_features, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(level, expected, strict=True))


def test_a_cache_is_cropped_whose_upper_layers_hold_nothing(load: Callable[[Family], HFBackend]) -> None:
    cache = DynamicCache(config=load("qwen2_5_vl").model.config)
    states = torch.arange(5.0)[None, None, :, None]
    cache.update(states, states, 0)
    versions.crop(cache.layers, 2)
    first: Any = cache.layers[0]
    assert first.keys.flatten().tolist() == [0, 1, 2]
    assert not any(layer.is_initialized for layer in cache.layers[1:])  # type: ignore[union-attr]


def test_a_package_that_transformers_misses_is_named_in_every_form_of_its_messages() -> None:
    imported = ModuleNotFoundError("Could not import module 'Gemma4Processor'.")
    imported.__cause__ = ModuleNotFoundError("No module named 'torchvision'", name="torchvision.transforms")
    assert _missing_package(imported) == "torchvision"
    assert _missing_package(ImportError("This requires the Torchvision library")) == "torchvision"
    assert _missing_package(ValueError("None could be imported. Missing optional dependencies: torchvision.")) == (
        "torchvision"
    )
    assert _missing_package(ImportError("circular")) == ""
