"""Caches that can be cropped, whatever their layers hold.

Keys and values are cropped token by token. Two kinds of layers cannot: a sliding-window layer of a stock cache has
dropped what is outside its window, so here it keeps every token, which its mask hides; and linear attention holds one
state of everything so far, so copies of it are kept at a few lengths (`Snapshots`), and a crop goes back to the last
copy that is short enough.
"""

from collections.abc import Callable, Sequence
from copy import copy
from typing import Any, Final

from torch import Tensor
from transformers import DynamicCache, PretrainedConfig
from transformers.cache_utils import DynamicLayer

from qzoom_agent.perception.adapters import LINEAR, SLIDING, layer_kinds
from qzoom_agent.perception.transformers_versions import crop

_KEPT: Final = 4
"""Snapshots of a conversation; one of Qwen3.5-4B has about 50 MB."""


def new_cache(config: PretrainedConfig) -> DynamicCache:
    """Return an empty cache for a model, whose attention layers keep every token."""
    text = config.get_text_config()
    kinds = set(layer_kinds(text))
    if SLIDING not in kinds or LINEAR in kinds:
        return DynamicCache(config=config)
    cache = DynamicCache()
    # layers that share the keys of others, always the last ones, hold none
    count = text.num_hidden_layers - getattr(text, "num_kv_shared_layers", 0)
    layer: Any = DynamicLayer
    cache.layers = [layer() for _ in range(count)]
    return cache


def recurrent(cache: DynamicCache) -> dict[int, Any]:
    """Return the layers of a cache, by index, that hold one state instead of keys and values."""
    return {at: layer for at, layer in enumerate(cache.layers) if hasattr(layer, "recurrent_states")}


def joined(layers: Sequence[Any], join: Callable[[list[Tensor]], Tensor]) -> Any:
    """Return a recurrent layer each of whose tensors is made of those of other layers, by `join`."""
    made = copy(layers[0])
    for name, value in vars(made).items():
        every = [getattr(layer, name) for layer in layers]
        if isinstance(value, Tensor):
            setattr(made, name, join(every))
        elif isinstance(value, dict):  # a layer may have several states
            parts = {key: [one[key] for one in every] for key in value}
            setattr(
                made, name, {key: join(one) if isinstance(one[0], Tensor) else one[0] for key, one in parts.items()}
            )
    return made


def copied(layer: Any, rows: slice | Tensor = slice(None)) -> Any:
    """Return a copy of a recurrent layer, or of some of its rows, that does not change with it."""
    return joined([layer], lambda same: same[0][rows].clone())


def copied_cache(cache: DynamicCache) -> DynamicCache:
    """Return a cache that does not change with another one. Keys and values are shared: new ones are never written
    into the old tensors.
    """
    other, stateful = copy(cache), recurrent(cache)
    other.layers = [copied(layer) if at in stateful else copy(layer) for at, layer in enumerate(cache.layers)]
    return other


class Snapshots:
    """Copies of the recurrent states of one cache, by the number of tokens that they have seen."""

    def __init__(self) -> None:
        self._held: dict[int, dict[int, Any]] = {}

    def copy(self) -> "Snapshots":
        """Return the same copies, for another cache."""
        other = Snapshots()
        other._held = dict(self._held)
        return other

    def take(self, cache: DynamicCache, tokens: int) -> None:
        """Copy the states of a cache of so many tokens, unless there are none."""
        if layers := recurrent(cache):
            self._held[tokens] = {at: copied(layer) for at, layer in layers.items()}
            for old in sorted(self._held)[:-_KEPT]:
                del self._held[old]

    def crop(self, cache: DynamicCache, tokens: int, *, surplus: int) -> int:
        """Crop a cache that holds `surplus` tokens more than `tokens`; return how many are left.

        These are fewer than `tokens` where states have to go back further, and 0 for a cache that has to be made anew.
        """
        if not surplus:
            return tokens
        if stateful := recurrent(cache):
            at = max((count for count in self._held if count <= tokens), default=0)
            self._held = {count: held for count, held in self._held.items() if count <= at}
            surplus, tokens = surplus + tokens - at, at
            for index in stateful:
                if at:
                    cache.layers[index] = copied(self._held[at][index])
        elif not all(type(layer) is DynamicLayer for layer in cache.layers):
            tokens = 0
        if tokens:
            crop((layer for layer in cache.layers if type(layer) is DynamicLayer), surplus)
        return tokens
