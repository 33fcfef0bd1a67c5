"""Perceivers: a small local model looks, another one answers.

    agent = Agent.from_server("http://localhost:8000/v1", model="qwen3-vl-8b", perceiver="q-zoom-qwen2.5-vl-3b")

Gate and SD-RPN of the local model decide whether a question needs more detail, and where. The answering model, which
may be behind a server, is shown the crops. `Perceiver` in `interface` is all that this takes; torch is imported only
when a model is loaded.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

from PIL import Image

from qzoom_agent.config import PerceptionConfig, ViewBudget
from qzoom_agent.errors import BackendError, ConfigError
from qzoom_agent.extensions import find, is_reference, reference, satisfying
from qzoom_agent.geometry import Box
from qzoom_agent.models.interface import Backend, Perceiver, PerceivingSession
from qzoom_agent.protocols.wording import own_protocol
from qzoom_agent.trace import PerceptionRecord, Quad
from qzoom_agent.views import ViewStore


class LocalPerceiver:
    """A model with branches that looks for another model.

    It is shown an image at its own budget and asked in its own words. Looks are independent, so that any number of
    threads may share one perceiver.
    """

    def __init__(self, backend: Backend, *, views: ViewBudget | None = None) -> None:
        """
        Args:
            backend: The model; its sessions can look.
            views: Budget of its coarse view; None: the model's own.

        Raises:
            ConfigError: The model has no branches.
        """
        if not backend.perceives:
            raise ConfigError(
                f"The model '{backend.name}' has no branches (gate and SD-RPN), so it cannot be a perceiver. Name one "
                "that has, such as nano, or train branches for it with `qzoom train branches`."
            )
        self.backend, self.name = backend, backend.name
        self.views = views or backend.defaults
        self.settings = {
            key: value for key, value in getattr(backend, "settings", {}).items() if key.startswith("perception.")
        }
        """Recommended values of keys of the configuration: a preset's thresholds."""

    @classmethod
    def load(
        cls, model: str, *, branches: str | Path | None = None, device: str = "auto", dtype: str = "auto"
    ) -> LocalPerceiver:
        """Load a perceiver.

        Args:
            model: A preset name, a folder or a hub id.
            branches: Folder or hub id of branches instead of those that come with the model.
            device: Such as "cpu" or "cuda:1"; "auto" takes the best there is.
            dtype: Number format of the weights.

        Raises:
            ConfigError: There is no such model, or it has no branches.
            BackendError: It cannot be loaded.
        """
        from qzoom_agent.models.hf import load_backend

        return cls(load_backend(model, branches=branches, device=device, dtype=dtype))

    def look(
        self, image: Image.Image, question: str, *, options: PerceptionConfig, map_always: bool = False
    ) -> PerceptionRecord:
        """Look at an image; see `Perceiver`."""
        store = ViewStore(count=getattr(self.backend, "view_tokens", None))
        size = store.add_original(image).size
        low, high = self.views.coarse_limits(size)
        coarse = store.add_coarse(factor=self.views.factor, min_tokens=low, max_tokens=high)
        asked = own_protocol(self.backend).opening(question, [coarse], tools=False)
        session = self.backend.session(store.image)
        try:
            seen = cast(PerceivingSession, session).look(asked, options=options, map_always=map_always)[0]
        finally:
            session.close()
        return seen.model_copy(
            update={
                "view": "original",
                "boxes": [
                    coarse.to_original(Box(*box, view=coarse.id).clamp(coarse.size)).corners for box in seen.boxes
                ],
                "extent": seen.extent and coarse.to_original(Box(*seen.extent, view=coarse.id)).corners,
            }
        )


def name_of(perceiver: Perceiver) -> str:
    """Return the name of a perceiver on traces and in configurations: that of a model, or `module:name`."""
    return perceiver.name if isinstance(perceiver, LocalPerceiver) else reference(perceiver)


def look_with(
    perceiver: Perceiver, image: Image.Image, question: str, *, options: PerceptionConfig, map_always: bool
) -> PerceptionRecord:
    """Return the checked result of a perceiver's look: boxes with their margin, inside the image, corners in order.

    Raises:
        BackendError: It is no `PerceptionRecord`, has a box without finite numbers, or an extent without an area.
    """
    name, size = name_of(perceiver), image.size  # before the perceiver shrinks the image in place
    seen = perceiver.look(image, question, options=options, map_always=map_always)
    if not isinstance(seen, PerceptionRecord):
        raise BackendError(
            f"The perceiver '{name}' returned a {type(seen).__name__} from look(). It has to return a "
            "qzoom_agent.trace.PerceptionRecord."
        )
    given = [Box(*box) for box in seen.boxes[: options.max_regions]]
    if not all(box.finite for box in given):
        raise BackendError(f"The perceiver '{name}' proposed a box with a number that is not finite: {seen.boxes}.")
    if seen.extent is not None and not 0 < Box(*seen.extent).area < math.inf:
        raise BackendError(f"The perceiver '{name}' gave an extent without an area: {seen.extent}.")
    margin = seen.margin if options.margin is None else options.margin
    boxes = [box.ordered().clamp(size).padded(margin).clamp(size) for box in given]
    return seen.model_copy(
        update={
            "perceiver": name,
            "aligned": False,  # the model that answers takes a crop as an image of its own
            "further": False,  # a perceiver is shown the image alone, no crops
            "boxes": [box.corners for box in boxes],
            "cells": cells_of(seen, boxes, size),
            "route": "zoom" if boxes else "direct",
        }
    )


def cells_of(seen: PerceptionRecord, boxes: Sequence[Box], size: tuple[int, int]) -> list[Quad]:
    """Return the first boxes of a look at an image of this size in cells of its map; without a map, of a single cell.

    `boxes` are computed where the look gives no cells of its own.
    """
    if len(seen.cells) == len(seen.boxes):
        return seen.cells[: len(boxes)]
    extent, heat = Box(*(seen.extent or (0, 0, *size))), seen.heat
    across, down = (len(heat[0]) if heat else 1) / extent.width, (len(heat) or 1) / extent.height
    x, y = extent.x1, extent.y1
    return [((box.x1 - x) * across, (box.y1 - y) * down, (box.x2 - x) * across, (box.y2 - y) * down) for box in boxes]


def load_perceiver(name: str, **how: Any) -> Perceiver:
    """Return the perceiver of this name: a model (preset, folder, hub id), or an object or class as `module:name`.

    Args:
        how: Arguments of `LocalPerceiver.load`.

    Raises:
        ConfigError: There is none, or it does not satisfy `Perceiver`.
        BackendError: The model cannot be loaded.
    """
    if is_reference(name):
        found: Perceiver = satisfying(find(name, kind="perceiver", known={}), Perceiver, kind="perceiver")
        return found
    return LocalPerceiver.load(name, **how)
