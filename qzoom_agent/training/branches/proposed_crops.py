"""The second look of a batch: the crop that SD-RPN proposes, inserted beside the coarse view."""

from collections.abc import Sequence
from dataclasses import dataclass

from qzoom_agent.config import AgentConfig, PerceptionConfig
from qzoom_agent.geometry import Box
from qzoom_agent.models.hf import HFBackend
from qzoom_agent.perception.look import resolve_options
from qzoom_agent.training.branches.dataset import Record
from qzoom_agent.training.branches.inputs import CoarsePrompt, ask, opened
from qzoom_agent.training.branches.localisation import maps_of
from qzoom_agent.zoom.zoom import Zoom, ZoomConfig


@dataclass(frozen=True)
class Cropped:
    """One record asked with a crop beside its coarse view (None: nothing was cropped)."""

    asked: CoarsePrompt
    box: Box | None
    """In pixels of the image."""


def propose(backend: HFBackend, records: Sequence[Record], *, tokens: int | None) -> list[Box | None]:
    """The box that SD-RPN proposes for each record by the branches' own rules, whatever the gate says."""
    branches = backend.branches
    assert branches is not None
    options = resolve_options(branches.config, PerceptionConfig())
    seen = maps_of(backend, records, tokens=tokens)
    return [one.proposal(options) for one in seen]


def with_crop(
    backend: HFBackend,
    records: Sequence[Record],
    boxes: Sequence[Box | None],
    *,
    tokens: int | None,
    aligned: bool,
) -> list[Cropped]:
    """Each record asked with the crop of its box beside its coarse view, as a policy that looks first would ask it."""
    views = backend.defaults
    config = AgentConfig().resolved(model=backend.name, protocol=backend.protocol, defaults=views)
    tool = ZoomConfig(
        factor=views.factor,
        min_tokens=views.crop_min_tokens,
        max_tokens=views.crop_max_tokens,
        min_side=views.crop_min_side,
    )
    zoom = Zoom(tool.for_proposals(config.perception))
    out = []
    for record, box, one in zip(records, boxes, ask(backend, records, [tokens] * len(records)), strict=True):
        cut = None if box is None else zoom(one.store, box).view
        if cut is None:
            out.append(Cropped(one, None))
            continue
        if aligned:
            coarse = one.store.view("coarse")
            cells = coarse.from_original(cut.region).to_frame("cell", coarse.size, coarse.cell)
            x1, y1, x2, y2 = cells.as_list()
            one.session.place(cut.id, source="coarse", cells=(x1, y1, x2, y2))
        asked = opened(backend, one.session, one.store, [*one.shown, cut], record["question"])
        out.append(Cropped(asked, cut.region))
    return out
