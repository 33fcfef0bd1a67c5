"""What a run cost, and where it looked: the figures that stand beside every accuracy.

All means are over all samples, the failed ones included. Nothing here says whether looking was worth it: that takes a
second run of the same samples (`evals.compare`).
"""

from __future__ import annotations

import resource
import sys
from collections.abc import Callable, Sequence
from statistics import fmean

import numpy as np
from pydantic import BaseModel, ConfigDict

from qzoom_agent.evaluation.sample_result import SampleResult
from qzoom_agent.evaluation.stats import Figure, figure


class _Figures(BaseModel):
    model_config = ConfigDict(use_attribute_docstrings=True)


class Spread(_Figures):
    """Seconds of one phase over the samples."""

    mean: float
    p50: float
    p95: float


class Cost(_Figures):
    """What the answers cost, a sample."""

    visual_tokens: Figure
    coarse_tokens: float
    crop_tokens: float
    written_tokens: float
    turns: float
    token_layers: Figure
    """Prefill work: tokens times decoder layers."""
    seconds: Figure
    """In the model, the policy and the tool."""
    phases: dict[str, Spread]
    """Seconds of perceive, think, act and of all three together."""
    samples_per_second: float | None
    """Throughput of one process, everything around the model included; None where no time was recorded."""
    peak_memory: dict[str, int]
    """Bytes: "host", and "device" where there is an accelerator. Of the process that wrote the figures."""


class Perception(_Figures):
    """Where the run looked."""

    gate_rate: float | None
    """Share of the samples with a gate in which it asked for more detail; None without a gate."""
    zoom_rate: float
    """Share of the samples in which a crop was shown."""
    zooms: float
    """Crops shown, a sample."""
    inserted: int
    """Crops that the policy showed unasked, in all."""
    calls: int
    """Attempts to call the zoom tool, in all, the unreadable ones counted."""
    served: int
    refused: int
    failed: int
    """Calls that could not be read or run."""
    needless_zooms: float | None
    """Share of the samples answerable from the coarse view that were zoomed all the same; None if there are none."""
    redundant: float | None
    """Crops a sample that added nothing (`evals.redundancy`), over samples of which that is known; None if it never
    is."""
    recall: Figure | None
    """Share of the needle inside the best crop, 0 where nothing was cropped; None where no needle is known."""
    iou: Figure | None
    """Intersection over union of needle and best crop; None where no needle is known."""

    @property
    def failed_call_share(self) -> float | None:
        """None if the zoom tool was never called."""
        return self.failed / self.calls if self.calls else None


def cost(rows: Sequence[SampleResult]) -> Cost:
    """Of at least one row."""
    elapsed = sum(row.elapsed for row in rows)
    return Cost(
        visual_tokens=_mean(rows, lambda row: row.visual_tokens),
        coarse_tokens=fmean(row.usage.coarse_tokens for row in rows),
        crop_tokens=fmean(row.usage.crop_tokens for row in rows),
        written_tokens=fmean(row.usage.written_tokens for row in rows),
        turns=fmean(row.turns for row in rows),
        token_layers=_mean(rows, lambda row: row.token_layers),
        seconds=_mean(rows, lambda row: row.usage.seconds.total),
        phases={name: _spread([getattr(row.usage.seconds, name) for row in rows]) for name in _PHASES},
        samples_per_second=len(rows) / elapsed if elapsed > 0 else None,
        peak_memory=peak_memory(),
    )


_PHASES = ("perceive", "think", "act", "total")


def perception(rows: Sequence[SampleResult]) -> Perception:
    """Of at least one row."""
    gated = [row.fired for row in rows if row.fired is not None]
    easy = [row for row in rows if row.coarse_suffices]
    known = [row.redundancy for row in rows if row.redundancy is not None]
    return Perception(
        gate_rate=fmean(gated) if gated else None,
        zoom_rate=fmean(row.zooms > 0 for row in rows),
        zooms=fmean(row.zooms for row in rows),
        inserted=sum(row.usage.inserted for row in rows),
        calls=sum(row.calls for row in rows),
        served=sum(row.usage.served for row in rows),
        refused=sum(row.usage.refused for row in rows),
        failed=sum(row.failed_calls for row in rows),
        needless_zooms=fmean(row.zooms > 0 for row in easy) if easy else None,
        redundant=fmean(one.redundant for one in known) if known else None,
        recall=_known(rows, lambda row: row.recall),
        iou=_known(rows, lambda row: row.iou),
    )


def peak_memory() -> dict[str, int]:
    """Most bytes this process held: of host memory, and of the accelerator's if torch is in use."""
    unit = 1 if sys.platform == "darwin" else 1024
    found = {"host": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit}
    if "torch" in sys.modules:
        from qzoom_agent.models.devices import peak_memory as device

        held = device()
        found |= {"device": held} if held else {}
    return found


def _mean(rows: Sequence[SampleResult], value: Callable[[SampleResult], float]) -> Figure:
    found = figure([value(row) for row in rows], clusters=[row.cluster for row in rows])
    assert found is not None
    return found


def _known(rows: Sequence[SampleResult], value: Callable[[SampleResult], float | None]) -> Figure | None:
    pairs = [(known, row.cluster) for row in rows if (known := value(row)) is not None]
    return figure([known for known, _ in pairs], clusters=[cluster for _, cluster in pairs])


def _spread(values: Sequence[float]) -> Spread:
    low, high = np.quantile(values, [0.5, 0.95])
    return Spread(mean=fmean(values), p50=float(low), p95=float(high))
