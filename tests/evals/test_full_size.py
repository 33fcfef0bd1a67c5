"""The shapes that memory and time are measured at are the published ones."""

from typing import Any

import pytest
import torch
from transformers import AutoModelForImageTextToText

import full_size


@pytest.mark.parametrize(
    ("shape", "billions"), [("qwen2.5-vl-3b", 3.75), ("qwen2.5-vl-7b", 8.29), ("qwen3-vl-4b", 4.44)]
)
def test_a_shape_has_as_many_parameters_as_its_model(shape: str, billions: float) -> None:
    auto: Any = AutoModelForImageTextToText
    with torch.device("meta"):
        model = auto.from_config(full_size.config_of(shape))
    assert round(sum(weight.numel() for weight in model.parameters()) / 1e9, 2) == billions
