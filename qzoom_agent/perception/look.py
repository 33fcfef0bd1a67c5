"""One look at the states after K layers: does the question need more detail, and where?

The gate comes first and most often ends it. Only when it fires, or when nobody asked it, is the map made. What comes
out is plain numbers in cells; where a cell lies in a view is the caller's business (`adapters.Grid`).
"""

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from qzoom_agent.config import PerceptionConfig
from qzoom_agent.errors import ConfigError
from qzoom_agent.gate import gate_fires
from qzoom_agent.perception.adapters import Adapter
from qzoom_agent.perception.branches import SDRPN, BranchConfig, Branches, cut, map_logits
from qzoom_agent.perception.decoder import Rotary
from qzoom_agent.perception.maps import (
    MapRegion,
    cutoff,
    foreground,
    keep_mask,
    probabilities,
    regions,
    smoothed,
)


@dataclass(frozen=True, slots=True)
class Map:
    """The map of one image."""

    logits: Tensor
    """(rows, columns), on the CPU."""
    keep: Tensor
    """(rows, columns) bool: False on attention sinks."""
    heat: Tensor
    """(rows, columns): probabilities, 0 on sinks."""
    cutoff: float
    """Value of the blurred map above which a cell is foreground."""
    regions: list[MapRegion]


@dataclass(frozen=True, slots=True)
class Look:
    """What the branches said of one conversation."""

    score: float | None
    """The gate's probability; None where it was not asked."""
    threshold: float | None
    maps: list[Map] = field(default_factory=list)
    """One for each image, in order; empty where no map was made."""
    reason: str = ""
    token_layers: float = 0.0
    """Work of the branches."""

    @property
    def zooms(self) -> bool:
        """Whether anything is proposed."""
        return any(one.regions for one in self.maps) and gate_fires(self.score, self.threshold) is not False


def reading(config: BranchConfig, options: PerceptionConfig) -> PerceptionConfig:
    """The options with the branches' own rules of blur, foreground, box and margin, where they say none."""
    own: dict[str, object] = {}
    if options.threshold is None:
        own["threshold"] = config.threshold
        if options.peak_share is None:
            own["peak_share"] = config.peak_share
    if options.blur is None:
        own["blur"] = config.blur
    if options.margin is None:
        own["margin"] = config.margin
    if options.box is None:
        own["box"] = config.box
    return options.model_copy(update=own)


Images = Sequence[tuple[int, int, int]]
"""For each image of a conversation the index of its first visual token, and the rows and columns of its grid."""


def look(
    branches: Branches,
    adapter: Adapter,
    hidden: Tensor,
    *,
    rotary: Rotary,
    mask: Tensor | None,
    images: Images,
    options: PerceptionConfig,
    map_always: bool = False,
    official: bool = False,
) -> Look:
    """Ask the branches about one conversation; see `look_batch`, of which this is a batch of one."""
    (found,) = look_batch(
        branches,
        adapter,
        hidden,
        rotary=rotary,
        mask=mask,
        images=[images],
        starts=[0],
        options=options,
        map_always=map_always,
        official=official,
    )
    return found


@torch.inference_mode()
def look_batch(
    branches: Branches,
    adapter: Adapter,
    hidden: Tensor,
    *,
    rotary: Rotary,
    mask: Tensor | None,
    images: Sequence[Images],
    starts: Sequence[int],
    options: PerceptionConfig,
    map_always: bool = False,
    official: bool = False,
) -> list[Look]:
    """Ask the branches about conversations whose last token is the last of the prompt.

    Each row is decided by itself: maps are made for those rows only that the gate lets through.

    Args:
        hidden: states after K layers, (batch, tokens, hidden), padded on the left.
        mask: (batch, 1, tokens, tokens), what may be seen; None for the causal mask of unpadded rows.
        images: the images of each row.
        starts: index of the first token of each row that is no padding.
        map_always: make the map even if the gate says that it is not needed (to show it; nothing is then proposed).
        official: maps exactly as the published code makes them (see `maps`).
    Raises:
        ConfigError: these branches have no SD-RPN.
    """
    sdrpn = branches.sdrpn
    if sdrpn is None:
        raise ConfigError(
            "These branches have no SD-RPN, so they cannot say where to look. Train one: qzoom train sdrpn."
        )
    options = reading(branches.config, options)
    tokens = [hidden.shape[1] - start for start in starts]
    scores: list[float | None] = [None] * len(tokens)
    threshold, gate_work = None, 0.0
    if options.gate == "learned" and branches.gate is not None:
        own = branches.config.gate_threshold
        threshold = own if options.gate_threshold is None else options.gate_threshold
        scores = torch.sigmoid(branches.gate(hidden, rotary=rotary, mask=mask)).tolist()
        gate_work = branches.gate.layers_a_token
    found = [
        Look(score, threshold, [], "the gate says that the coarse view suffices", gate_work * count)
        for score, count in zip(scores, tokens, strict=True)
    ]
    open_ = [at for at, score in enumerate(scores) if gate_fires(score, threshold) is not False]
    rows = list(range(len(tokens))) if map_always else open_
    if not rows:
        return found
    if len(rows) < len(tokens):
        hidden, rotary = hidden[rows], (rotary[0][rows], rotary[1][rows])
        mask = None if mask is None else mask[rows]
    states = sdrpn.states(hidden, rotary=rotary, mask=mask)
    for at, row in enumerate(rows):
        one, turned = states[at : at + 1], (rotary[0][at : at + 1], rotary[1][at : at + 1])
        maps = [
            _read(logits.view(height, width), first, adapter, options, official=official)
            for logits, first, (_, height, width) in _logits(sdrpn, adapter, one, turned, images[row], starts[row])
        ]
        work = found[row].token_layers + sdrpn.layers_a_token * tokens[row]
        found[row] = Look(scores[row], threshold, maps, _reason(scores[row], threshold, maps), work)
    return found


def _reason(score: float | None, threshold: float | None, maps: Sequence[Map]) -> str:
    if gate_fires(score, threshold) is False:
        return "the gate says that the coarse view suffices"
    if not any(one.regions for one in maps):
        return "no part of the map stands out"
    return "the gate asks for more detail" if score is not None else "the map stands out"


def _logits(
    sdrpn: SDRPN, adapter: Adapter, states: Tensor, rotary: Rotary, images: Images, begin: int
) -> list[tuple[Tensor, Tensor | None, tuple[int, int, int]]]:
    """For each image its map logits, and those of the sequence's first token where the sink rule needs them."""
    query = sdrpn.queries(states[:, -1:], cut(rotary, slice(-1, None)))
    sink = None
    if adapter.sink == "first_token":
        # the published rule: of the first token, the first head alone asks
        opening = slice(begin, begin + 1)
        sink = sdrpn.queries(states[:, opening], cut(rotary, opening))[:, :1].expand(-1, query.shape[1], -1, -1)
    found = []
    for image in images:
        start, rows, columns = image
        span = slice(start, start + rows * columns)
        keys = sdrpn.keys(states[:, span], cut(rotary, span))
        found.append((map_logits(query, keys)[0], None if sink is None else map_logits(sink, keys)[0], image))
    return found


def _read(logits: Tensor, first: Tensor | None, adapter: Adapter, options: PerceptionConfig, *, official: bool) -> Map:
    floor = options.threshold or 0.0
    rows, columns = logits.shape
    keep = keep_mask(adapter.sink, rows, columns, first)
    heat = probabilities(logits, keep)
    level = cutoff(smoothed(heat, options, official=official), floor, options)
    found = foreground(heat, floor, options, official=official)
    return Map(
        logits.float().cpu(), keep, heat, level, regions(heat, found, limit=options.max_regions, sides=options.box)
    )
