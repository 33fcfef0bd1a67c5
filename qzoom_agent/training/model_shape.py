"""Sizes of base models and the memory that follows from them, which the dry runs of all training stages share.

Memory is estimated from the shape of a base before anything is loaded, well enough to tell 12 GB from 40 GB.
"""

from pathlib import Path
from typing import Final, NamedTuple

from transformers import AutoConfig

from qzoom_agent.models.presets import PRESETS, preset_of, resolve_model

DEVICE_GB: Final = 80
"""Memory of a large device."""
_STATES: Final = 20
"""Numbers that a layer works with, or training keeps of it, for each token and unit of width, roughly."""


class Shape(NamedTuple):
    """Sizes of a base that decide its memory."""

    layers: int
    hidden: int
    layer_weights: float
    """Number of weights of one decoder layer."""
    cached: int
    """Numbers that a layer keeps in the cache for each token."""
    head_weights: float = 0.0
    """Number of weights of the output layer, where it is not tied to the embeddings: trained with the decoder."""
    base_gb: float | None = None
    """GB of the weights in 16 bit and the cache of one run; None: unknown."""

    def cache_gb(self, tokens: float, *, number: int) -> float:
        """Return the cache of so many tokens in GB, in numbers of so many bytes."""
        return tokens * self.layers * self.cached * number / 1e9

    def states_gb(self, tokens: float, *, number: int, layers: float = 1) -> float:
        """Return what so many layers work with for these tokens in GB, in numbers of so many bytes."""
        return tokens * self.hidden * _STATES * layers * number / 1e9


SHAPES: Final = {
    name: shape._replace(base_gb=PRESETS[name].memory_gb)
    for name, shape in {
        "nano": Shape(9, 192, 0.3e6, 192),
        "nano-paper": Shape(9, 192, 0.48e6, 192),
        "qwen2.5-vl-3b": Shape(36, 2048, 77.1e6, 512),
        "qwen2.5-vl-7b": Shape(28, 3584, 233.0e6, 1024, 545.0e6),
        "qwen3-vl-4b": Shape(36, 2560, 100.9e6, 2048),
        "qwen3-vl-8b": Shape(36, 4096, 192.9e6, 2048, 622.3e6),
        "llava-1.5-7b": Shape(32, 4096, 202.4e6, 8192, 131.3e6),
    }.items()
}
_FINE_TUNES: Final = {"deepeyes": "qwen2.5-vl-7b", "mini-o3": "qwen2.5-vl-7b", "zwz-4b": "qwen3-vl-4b"}
"""Presets with the shape of another one."""


def shape_of(model: str) -> Shape | None:
    """Return the shape of a model by its preset, or by its config if that is on this machine; None: unknown."""
    name = preset_of(model) or ""
    known = SHAPES.get(_FINE_TUNES.get(name, name))
    if known is not None:
        return known
    source = resolve_model(model).source
    try:
        config = AutoConfig.from_pretrained(source, local_files_only=True, trust_remote_code=False)
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
