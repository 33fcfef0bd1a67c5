"""How much memory of a device a pass or a fit needs, by the shape of the base: estimates, to tell 12 GB from 40 GB."""

from pathlib import Path
from typing import Final, NamedTuple

from transformers import AutoConfig

from qzoom_agent.models.presets import PRESETS, preset_of, resolve_model
from qzoom_agent.training.branches.branch_recipe import Optimisation


class Shape(NamedTuple):
    """What decides the memory of a base."""

    layers: int
    hidden: int
    layer_weights: float
    cached: int
    """Numbers that a layer keeps in the cache for each token."""
    head_weights: float = 0.0
    """Of the output layer, where it is not tied to the embeddings: trained with the decoder."""
    base_gb: float | None = None
    """Weights in 16 bit and one run's cache; None where nobody knows."""


SHAPES: Final = {
    name: shape._replace(base_gb=PRESETS[name].memory_gb)
    for name, shape in {
        "nano": Shape(9, 192, 0.3e6, 192),
        "qwen2.5-vl-3b": Shape(36, 2048, 77.1e6, 512),
        "qwen2.5-vl-7b": Shape(28, 3584, 233.0e6, 1024, 545.0e6),
        "qwen3-vl-4b": Shape(36, 2560, 100.9e6, 2048),
        "qwen3-vl-8b": Shape(36, 4096, 192.9e6, 2048, 622.3e6),
        "llava-1.5-7b": Shape(32, 4096, 202.4e6, 8192, 131.3e6),
    }.items()
}
DEVICE_GB: Final = 80
"""What a large device holds."""
_STATES: Final = 20
"""Numbers that a layer works with, or training keeps of it, for each token and unit of width, about."""


def shape_of(model: str) -> Shape | None:
    """The shape of a base, from what is known of its preset or from the config of a folder or of a copy of a hub
    repository on this machine; None where there is none."""
    known = SHAPES.get(preset_of(model) or "")
    if known is not None:
        return known
    source = resolve_model(model).source
    try:
        config = AutoConfig.from_pretrained(source, local_files_only=True)
    except (OSError, ValueError):
        return None
    text = config.get_text_config()
    heads, hidden = text.num_attention_heads, text.hidden_size
    width = getattr(text, "head_dim", None) or hidden // heads
    keys = (getattr(text, "num_key_value_heads", None) or heads) * width
    stored = sum(file.stat().st_size for file in Path(source).glob("*.safetensors"))
    return Shape(
        layers=text.num_hidden_layers,
        hidden=hidden,
        layer_weights=2.0 * hidden * (heads * width + keys) + 3.0 * hidden * text.intermediate_size,
        cached=2 * keys,
        head_weights=0.0 if config.tie_word_embeddings else float(hidden * text.vocab_size),
        base_gb=stored / 1e9 or None,
    )


def passing(shape: Shape, *, rows: int, tokens: float) -> float:
    """GB for so many rows at once, with their cache."""
    return (shape.base_gb or 0.0) + rows * tokens * 2 * (shape.layers * shape.cached + shape.hidden * _STATES) / 1e9


def fitting(
    shape: Shape, how: Optimisation, *, tokens: float, layers: float, own: bool = False, sharded: int = 1
) -> float:
    """GB for training so many layers: weights, gradients and Adam's two moments in float32, and what layers keep.

    Args:
        own: they are the base's own, with its output layer, and not beside it.
        sharded: devices over which ZeRO-2 spreads all of that but the weights in 16 bit.
    """
    states = how.batch * tokens * shape.hidden * _STATES * 4 * (1 if how.gradient_checkpointing else max(1.0, layers))
    weights = trained_weights(shape, layers, own=own)
    held = 16 / sharded - (2 if own and sharded == 1 else 0)  # in place of those in 16 bit
    return (shape.base_gb or 0.0) + (weights * held + states) / 1e9


def trained_weights(shape: Shape, layers: float, *, own: bool = False) -> float:
    """How many weights are trained."""
    return layers * shape.layer_weights + (shape.head_weights if own else 0.0)
