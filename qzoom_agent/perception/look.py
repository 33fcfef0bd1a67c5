"""One look at the states after K layers: does the question need more detail, and where?

A first look reads the coarse view. A further look reads a conversation that shows crops already, with branches of its
own (`Branches.further`), and may search these crops as well.

The gate comes first and most often ends it. Only when it fires, or when no gate is asked, is the map made. The output
is plain numbers in cells of the map; `adapters.Grid` converts cells to pixels of a view.

Shapes: hidden states (batch, tokens, hidden), padded on the left; map logits (rows, columns) of one image.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from qzoom_agent.config import PerceptionConfig
from qzoom_agent.errors import BackendError, ConfigError
from qzoom_agent.gate import gate_fires
from qzoom_agent.perception.adapters import Adapter, of_full_layers
from qzoom_agent.perception.branch_config import BranchConfig
from qzoom_agent.perception.branches import SDRPN, Branches
from qzoom_agent.perception.decoder import Rotaries, Rotary, cut
from qzoom_agent.perception.maps import MapRegion, cutoff, keep_mask, probabilities, regions, smoothed
from qzoom_agent.perception.masks import Masks

Images = Sequence[tuple[int, int, int]]
"""For each image of a conversation the index of its first visual token, and the rows and columns of its grid."""


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
    foreground: NDArray[np.bool]
    """(rows, columns)."""
    regions: list[MapRegion]


@dataclass(frozen=True, slots=True)
class BranchOutput:
    """The branches' output for one conversation."""

    score: float | None
    """The gate's probability; None where no gate was asked."""
    threshold: float | None
    maps: list[Map] = field(default_factory=list)
    """One for each image, in order; empty where no map was made."""
    token_layers: float = 0.0
    """Work of the branches."""
    further: bool = False
    """Of a further look."""

    @property
    def fires(self) -> bool | None:
        """The gate's decision: True for more detail; None where no gate was asked."""
        return gate_fires(self.score, self.threshold)

    @property
    def zooms(self) -> bool:
        """True if a region is proposed."""
        return self.fires is not False and any(one.regions for one in self.maps)

    @property
    def reason(self) -> str:
        """Reason why a region is proposed, or none."""
        if self.fires is False:
            return f"the gate says that {'the views so far suffice' if self.further else 'the coarse view suffices'}"
        if not self.zooms:
            return "no part of the map stands out"
        return "the gate asks for more detail" if self.fires else "the map stands out"


def resolve_options(config: BranchConfig, options: PerceptionConfig) -> PerceptionConfig:
    """Fill in the branches' own rules of blur, foreground, box and margin where the options leave them open."""
    names = ["threshold", "blur", "margin", "box"]
    if options.threshold is None:  # a threshold that is given counts for itself
        names.append("peak_share")
    return options.model_copy(update={name: getattr(config, name) for name in names if getattr(options, name) is None})


@torch.inference_mode()
def look(
    branches: Branches,
    adapter: Adapter,
    hidden: Tensor,
    *,
    rotary: Rotaries,
    mask: Masks,
    images: Sequence[Images],
    options: PerceptionConfig,
    starts: Sequence[int] | None = None,
    map_always: bool = False,
    further: bool = False,
) -> list[BranchOutput]:
    """Ask the branches about the conversations of a batch, each of which ends with the last token of its prompt.

    Each row is decided by itself: maps are made only for the rows that the gate lets through.

    Args:
        hidden: states after K layers, (batch, tokens, hidden), padded on the left.
        mask: additive mask (batch, 1, tokens, tokens), or one for each kind of layer; None for the causal mask of
            unpadded rows.
        starts: index of the first token of each row that is no padding; None: no row is padded.
        map_always: make the map even if the gate says that it is not needed (to show it; nothing is then proposed).
        further: this is a further look, in which the maps of a row compete: foreground is a share of the highest peak
            of all, and `options.max_regions` limits the regions of all together. Else each map stands for itself.

    Raises:
        ConfigError: these branches have no SD-RPN.
        BackendError: the output of a branch is not finite.
    """
    sdrpn = branches.sdrpn
    if sdrpn is None:
        raise ConfigError(
            "These branches have no SD-RPN, so they cannot say where to look. Train one: qzoom train sdrpn."
        )
    if further and branches.config.inside_crops == "only":
        options = options.model_copy(update={"box": None})  # what is asked for are sides of the coarse view
    options, rotary, mask = resolve_options(branches.config, options), of_full_layers(rotary), of_full_layers(mask)
    starts = [0] * len(images) if starts is None else starts
    scores: list[float | None] = [None] * len(images)
    threshold, gate_work = None, 0.0
    if options.gate == "learned" and branches.gate is not None:
        own = branches.config.gate_threshold
        threshold = own if options.gate_threshold is None else options.gate_threshold
        scores = torch.sigmoid(_finite(branches.gate(hidden, rotary=rotary, mask=mask))).tolist()
        gate_work = branches.gate.layers_a_token
    lengths = [hidden.shape[1] - start for start in starts]
    found = [
        BranchOutput(score, threshold, [], gate_work * n, further) for score, n in zip(scores, lengths, strict=True)
    ]
    rows = [at for at, one in enumerate(found) if map_always or one.fires is not False]
    if not rows:
        return found
    if len(rows) < len(found):
        # SD-RPN costs as much as the gate: leave out the rows that need no map
        hidden, rotary = hidden[rows], (rotary[0][rows], rotary[1][rows])
        mask = None if mask is None else mask[rows]
    states = sdrpn.states(hidden, rotary=rotary, mask=mask)
    for at, row in enumerate(rows):
        one, turned = states[at : at + 1], (rotary[0][at : at + 1], rotary[1][at : at + 1])
        heats = _heats(sdrpn, adapter, one, rotary=turned, images=images[row], begin=starts[row])
        maps = _regions_of(heats, options, joint=further)
        work = found[row].token_layers + sdrpn.layers_a_token * lengths[row]
        found[row] = replace(found[row], maps=maps, token_layers=work)
    return found


def _finite(logits: Tensor) -> Tensor:
    """Return the logits of a branch. Raises BackendError if one is not finite."""
    if not bool(logits.isfinite().all()):
        raise BackendError(
            "The logits of the gate or SD-RPN are not finite: weights of the model or its branches are damaged. "
            "Download or train them again."
        )
    return logits


def _heats(
    sdrpn: SDRPN, adapter: Adapter, states: Tensor, *, rotary: Rotary, images: Images, begin: int
) -> list[tuple[Tensor, Tensor, Tensor]]:
    """Return logits, kept cells and heat of each image of one conversation, whose first token is at `begin`."""
    query = sdrpn.queries(states[:, -1:], cut(rotary, slice(-1, None)))
    sink = None
    if adapter.sink == "first_token":
        # the published rule: of the first token, the first head alone asks
        opening = slice(begin, begin + 1)
        sink = sdrpn.queries(states[:, opening], cut(rotary, opening))[:, :1].expand(-1, query.shape[1], -1, -1)
    found = []
    for start, rows, columns in images:
        span = slice(start, start + rows * columns)
        keys = sdrpn.keys(states[:, span], cut(rotary, span))
        logits = _finite(sdrpn.logits(query, keys)[0]).view(rows, columns)
        keep = keep_mask(adapter.sink, rows, columns, None if sink is None else sdrpn.logits(sink, keys)[0])
        found.append((logits.float().cpu(), keep, probabilities(logits, keep)))
    return found


def _regions_of(heats: Sequence[tuple[Tensor, Tensor, Tensor]], options: PerceptionConfig, *, joint: bool) -> list[Map]:
    """Return the maps of one conversation with their regions; none where no view is searched."""
    if not heats:
        return []
    blurred = [smoothed(heat, options) for *_, heat in heats]
    if joint and options.peak_share is not None:
        peak = max(float(one.max()) for one in blurred)
        options = options.model_copy(update={"peak_share": None, "threshold": options.peak_share * peak})
    maps = []
    for (logits, keep, heat), smooth in zip(heats, blurred, strict=True):
        limit = cutoff(smooth, options.threshold or 0.0, options)
        found = (smooth > limit).numpy()
        boxes = regions(heat, found, limit=options.max_regions, sides=options.box)
        maps.append(Map(logits, keep, heat, limit, found, boxes))
    if joint:
        ranked = sorted((region for one in maps for region in one.regions), key=lambda region: -region.peak)
        best = ranked[: options.max_regions]
        maps = [replace(one, regions=[region for region in one.regions if region in best]) for one in maps]
    return maps
