"""One recorded case, run through our perception as the published evaluation runs the published code.

What only the published code does is here and not in the library: resizing in two steps, its prompt, its blur and box
rounding, its rule for crops that are too small, greedy decoding with the checkpoint's repetition penalty. The rest is
the library's and is what `parity.py` checks: adapters, branches, maps, positions and prefill.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor
from torch.nn.functional import conv2d, pad
from transformers import DynamicCache
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import smart_resize

from qzoom_agent.config import PerceptionConfig
from qzoom_agent.errors import ConfigError
from qzoom_agent.geometry import Size
from qzoom_agent.models.hf import HFBackend
from qzoom_agent.perception.adapters import QWEN2_5_VL, Adapter, align
from qzoom_agent.perception.decoder import Decoder, Embedded, Prefill
from qzoom_agent.perception.labels import Heads
from qzoom_agent.perception.look import BranchOutput, look
from qzoom_agent.perception.maps import MapRegion, regions
from qzoom_agent.perception.transformers_versions import forward, image_features

MIN_SIDE = 28
"""Shortest side of a box in original pixels, in every family."""
_FIRST_UNIT, _FIRST_LIMITS = 28, (4 * 28 * 28, 16384 * 28 * 28)
"""The evaluation resizes every picture once before the processor does, for both families by these numbers."""


@dataclass(frozen=True)
class Recording:
    """A folder of recorded cases."""

    folder: Path
    cases: list[dict[str, Any]]

    @classmethod
    def read(cls, folder: Path) -> "Recording":
        """Read the recording in `folder`. Raises ConfigError if its list of cases is broken or empty."""
        try:
            cases = json.loads((folder / "cases.json").read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise ConfigError(f"{folder / 'cases.json'} cannot be read: {error}. Copy the recording again.") from error
        if not isinstance(cases, list) or not cases or not all(isinstance(case, dict) for case in cases):
            raise ConfigError(f"{folder / 'cases.json'} holds no list of cases. Copy the recording again.")
        return cls(folder, cases)

    @property
    def has_geometry(self) -> bool:
        return (self.folder / "geometry.json").is_file()

    def adapter(self, backend: HFBackend) -> Adapter:
        return Decoder(backend.model).adapter


@dataclass(frozen=True)
class Pictures:
    """Input of the vision tower: the coarse picture, and the crop if there is one."""

    source: Image.Image
    """The original, as crops are cut from it."""
    coarse: Image.Image
    crop: Image.Image | None

    def difference(self, other: "Pictures") -> tuple[int, float]:
        """Return the largest difference of the coarse pictures in grey levels, and the share of values that differ."""
        ours, theirs = (np.asarray(one.coarse, dtype=np.int16) for one in (self, other))
        apart = np.abs(ours - theirs)
        return int(apart.max()), float((apart > 0).mean())


def rebuilt(folder: Path, case: dict[str, Any]) -> Pictures:
    """Load the recorded pictures of a case."""
    crop = case.get("roi_image")
    return Pictures(
        source=Image.open(folder / case["image"]).convert("RGB"),
        coarse=Image.open(folder / case["coarse_image"]).convert("RGB"),
        crop=Image.open(folder / crop).convert("RGB") if crop else None,
    )


def own_pictures(folder: Path, case: dict[str, Any], backend: HFBackend) -> Pictures:
    """Make the same pictures with our own resizing; the crop is cut once the box is known."""
    opened = Image.open(folder / case["image"])
    if opened.mode == "RGBA":  # no other mode with transparency is laid on white there
        shown = Image.new("RGB", opened.size, (255, 255, 255))
        shown.paste(opened, mask=opened.getchannel("A"))
    else:
        shown = opened.convert("RGB")
    low, high = _FIRST_LIMITS
    once = _resized(shown, _FIRST_UNIT, low, high)
    coarse = _resized(once, backend.defaults.factor, case["min_pixels"], case["max_pixels"])
    # crops are cut from a plain conversion, which drops transparency
    return Pictures(source=opened.convert("RGB"), coarse=coarse, crop=None)


def _resized(image: Image.Image, unit: int, low: int, high: int) -> Image.Image:
    height, width = smart_resize(image.height, image.width, factor=unit, min_pixels=low, max_pixels=high)
    return image.resize((width, height), Image.Resampling.BICUBIC)


class Run:
    """One case; its attributes are compared with the recording."""

    def __init__(self, backend: HFBackend, case: dict[str, Any], pictures: Pictures) -> None:
        if backend.branches is None:
            raise ConfigError(f"The checkpoint {backend.name} has no branches, so there is nothing to compare.")
        self.backend, self.case, self.pictures = backend, case, pictures
        self.model: Any = backend.model
        self.branches = backend.branches
        self.decoder = Decoder(backend.model)
        self.vision: Any
        self.ids, inputs, self.vision = self._prompt(case["prompt"])
        self.grid: Tensor = inputs["image_grid_thw"]
        self.pixels: Tensor = inputs["pixel_values"]
        self.features: Tensor = torch.cat(tuple(self.vision.pooler_output))
        self.start = self.ids.index(self.model.config.image_token_id)
        self.rows, self.columns = int(self.grid[0, 1]) // 2, int(self.grid[0, 2]) // 2
        self.positions = self._places(self.ids, self.grid)
        embedded = self._embed(self.ids, [self.vision])
        self.rotary = self.decoder.rotary(embedded.hidden, self.positions)
        prefill = Prefill(self.decoder, self.branches.config.k)
        prefill.extend(embedded, self.rotary)
        assert prefill.hidden is not None
        self.hidden: Tensor = prefill.hidden
        self.look: BranchOutput
        (self.look,) = look(
            self.branches,
            self.decoder.adapter,
            self.hidden,
            rotary=self.rotary,
            mask=None,
            images=[[(self.start, self.rows, self.columns)]],
            options=PerceptionConfig(threshold=case["roi_conf_thresh"], gate_threshold=case.get("high_res_thresh")),
            map_always=True,
        )
        self.blurred = official_blur(self.look.maps[0].heat)
        self.foreground = self.blurred > case["roi_conf_thresh"]
        found = regions(self.look.maps[0].heat, self.foreground.numpy())
        self.region: MapRegion | None = next(iter(found), None)

    @property
    def penalty(self) -> float:
        """The repetition penalty of the checkpoint."""
        return float(self.model.generation_config.repetition_penalty or 1.0)

    @property
    def box(self) -> tuple[int, int, int, int]:
        """The crop in pixels of the original."""
        assert self.region is not None
        return official_pixels(
            self.region,
            rows=self.rows,
            columns=self.columns,
            unit=self.backend.defaults.factor,
            size=Size(*self.pictures.source.size),
        )

    @property
    def crop_used(self) -> bool:
        """True if there is a crop, whatever the gate says."""
        return self.path_if_gate_on == "roi"

    @property
    def gate_fires(self) -> bool:
        """True if the gate asks for more detail, or the checkpoint has no gate."""
        return self.look.fires is not False

    @property
    def path(self) -> str:
        """The path taken at the thresholds of the case."""
        return self.path_if_gate_on if self.gate_fires else "gate_off"

    @property
    def path_if_gate_on(self) -> str:
        if self.region is None:
            return "no_foreground"
        x1, y1, x2, y2 = self.box
        small = min(x2 - x1, y2 - y1)
        # the processor of the version that Qwen2.5-VL was recorded with refuses what is smaller than a visual token
        refused = small < 1 or (self.decoder.adapter is QWEN2_5_VL and small < MIN_SIDE)
        long = max(x2 - x1, y2 - y1) > 200 * max(1, small)
        return "crop_rejected_by_processor" if refused or long else "roi"

    @cached_property
    def _crop(self) -> tuple[dict[str, Tensor], Any]:
        """The crop as the vision tower takes it, and its features."""
        image = self.pictures.crop
        if image is None:
            cut = self.pictures.source.crop(self.box)
            image = _resized(cut, self.backend.defaults.factor, self.case["min_pixels"], self.case["max_pixels"])
        _, inputs = self.backend.codec.pixels(image)
        return inputs, image_features(self.model, inputs)

    @property
    def crop_grid(self) -> list[int]:
        return [int(value) for value in self._crop[0]["image_grid_thw"][0]]

    @property
    def crop_pixels(self) -> Tensor:
        return self._crop[0]["pixel_values"]

    @property
    def crop_vision(self) -> Any:
        return self._crop[1]

    @property
    def crop_features(self) -> Tensor:
        return torch.cat(tuple(self.crop_vision.pooler_output))

    @property
    def inserted(self) -> range:
        """Indices of the crop and its two markers in the merged prompt."""
        after = self.start + self.rows * self.columns + 1
        return range(after, after + self.crop_grid[1] * self.crop_grid[2] // 4 + 2)

    @cached_property
    def merged_ids(self) -> list[int]:
        """The prompt with the crop behind the coarse image."""
        config = self.model.config
        after, count = self.inserted.start, len(self.inserted) - 2
        crop = [config.vision_start_token_id, *[config.image_token_id] * count, config.vision_end_token_id]
        return [*self.ids[:after], *crop, *self.ids[after:]]

    def merged_positions(self, *, aligned: bool) -> Tensor:
        """Return positions (3, 1, tokens) of the merged prompt."""
        plain = self._places(self.merged_ids, torch.cat((self.grid, self._crop[0]["image_grid_thw"])))
        if not aligned:
            return plain
        assert self.region is not None
        rows, columns = self.crop_grid[1] // 2, self.crop_grid[2] // 2
        first = self.start + self.rows * self.columns + 2
        x1, y1, x2, y2, _ = self.region
        return align(
            plain, source=self.start, crop=(first, first + rows * columns), grid=(rows, columns), cells=(x1, y1, x2, y2)
        )

    def next_position(self, *, zooms: bool, aligned: bool) -> int:
        """Return the position of the first generated token, the same on every axis."""
        return int((self.merged_positions(aligned=aligned) if zooms else self.positions).max()) + 1

    def generate(
        self, steps: int, *, zooms: bool, aligned: bool = False, penalty: float = 1.0
    ) -> tuple[list[int], list[Tensor]]:
        """Return greedy tokens and the logits (vocabulary,) of each, on the direct path or with the crop."""
        prefill = Prefill(self.decoder, self.branches.config.k)
        prefill.extend(self._embed(self.ids, [self.vision]), self.rotary)
        positions, rotary = self.positions, self.rotary
        if zooms:
            positions = self.merged_positions(aligned=aligned)
            after = self.start + self.rows * self.columns
            prefill.keep(after)
            new = self._embed(self.merged_ids[after:], [self._crop[1]])
            prefill.extend(new, self.decoder.rotary(new.hidden, positions[..., after:]))
            assert prefill.hidden is not None
            rotary = self.decoder.rotary(prefill.hidden, positions)
        logits, _ = prefill.finish(rotary)
        position = self.next_position(zooms=zooms, aligned=aligned)
        return self._greedy(logits[0], self.ids, position, prefill.cache, steps, penalty)

    def without_system(self, steps: int, *, penalty: float = 1.0) -> tuple[list[int], list[Tensor]]:
        """Run `generate` with the stock model, on the prompt without its system turn."""
        prompt = self.case["prompt"]
        prompt = prompt[prompt.index("<|im_start|>user") :]
        ids, inputs, vision = self._prompt(prompt)
        positions, cache = self._places(ids, inputs["image_grid_thw"]), DynamicCache(config=self.model.config)
        (logits,) = forward(self.model, torch.tensor([ids]), positions=positions, cache=cache, features=vision)
        return self._greedy(logits, ids, int(positions.max()) + 1, cache, steps, penalty)

    def _greedy(
        self, logits: Tensor, prompt: list[int], position: int, cache: DynamicCache, steps: int, penalty: float
    ) -> tuple[list[int], list[Tensor]]:
        tokens: list[int] = []
        seen: list[Tensor] = []
        for step in range(steps):
            seen.append(logits)
            # the penalty is taken over the original prompt and what was written, never over the crop
            repeated = torch.tensor(sorted({*prompt, *tokens}))
            scores = logits.clone()
            scores[repeated] = torch.where(logits[repeated] < 0, logits[repeated] * penalty, logits[repeated] / penalty)
            tokens.append(int(scores.argmax()))
            if step + 1 < steps:
                where = torch.full((3, 1, 1), position + step)
                ids = torch.tensor([[tokens[-1]]])
                (logits,) = forward(self.model, ids, positions=where, cache=cache)
        return tokens, seen

    def _prompt(self, text: str) -> tuple[list[int], dict[str, Tensor], Any]:
        """Return the ids of a prompt with the coarse picture, the input of the vision tower, and its features."""
        codec = self.backend.codec
        image, inputs = codec.pixels(self.pictures.coarse)
        ids: list[int] = []
        for token in codec.tokenizer(text, add_special_tokens=False)["input_ids"]:
            ids += image if token == codec.image_id else [token]
        return ids, inputs, image_features(self.model, inputs)

    def _places(self, ids: list[int], grids: Tensor) -> Tensor:
        tensor = torch.tensor([ids])
        positions, _ = self.model.model.get_rope_index(
            input_ids=tensor,
            mm_token_type_ids=(tensor == self.model.config.image_token_id).int(),
            image_grid_thw=grids,
        )
        placed: Tensor = positions
        return placed

    def _embed(self, ids: list[int], vision: list[Any]) -> Embedded:
        return self.decoder.embed(torch.tensor([ids]), vision)


def official_blur(heat: Tensor) -> Tensor:
    """Blur a map (rows, columns) as the published code does; RuntimeError for a map of one row or column."""
    taps = torch.exp(-0.5 * torch.arange(-1, 2, dtype=torch.float32) ** 2)
    taps = taps / taps.sum()
    kernel = taps[:, None] * taps[None, :]
    return conv2d(pad(heat[None, None], (1,) * 4, mode="reflect"), kernel[None, None])[0, 0]


def official_pixels(region: MapRegion, *, rows: int, columns: int, unit: int, size: Size) -> tuple[int, int, int, int]:
    """Return the box in original pixels exactly as the published code computes it, with its float32 rounding.

    Args:
        region: the box in cells.
        rows: of the grid.
        columns: of the grid.
        unit: side of a visual token in pixels of the coarse image (28 or 32).
        size: of the original.
    """

    def axis(low: float, high: float, cells: int, length: int) -> tuple[float, float]:
        ratio = np.float32(length / (cells * unit))
        start, stop = np.float32(low * unit) * ratio, np.float32(high * unit) * ratio
        if stop - start < MIN_SIDE:
            middle = (start + stop) / np.float32(2)
            start, stop = middle - np.float32(MIN_SIDE / 2), middle + np.float32(MIN_SIDE / 2)
        if start < 0:
            start, stop = np.float32(0), stop - start
        if stop > length:
            start, stop = start - (stop - np.float32(length)), np.float32(length)
        return max(0.0, float(start)), min(float(length), float(stop))

    x1, x2 = axis(region.x1, region.x2, columns, size.width)
    y1, y2 = axis(region.y1, region.y2, rows, size.height)
    return int(x1), int(y1), int(x2), int(y2)


def mean_attention(
    steps: Mapping[int, Sequence[Tensor]], heads: Heads, *, start: int, rows: int, columns: int, official: bool = False
) -> NDArray[np.float32]:
    """Return one map (rows, columns) of attention, the mean over generated tokens and heads, step by step.

    Args:
        steps: by layer, for each step of generation after the prompt's, the attention (heads, keys) of its one query.
        heads: none give a map of zeros.
        start: index of the image's first visual token among the keys.
        official: round to float16 after reading and after the mean over steps, as the published code does.
    Raises:
        ValueError: a layer has no steps (an answer of a single token is never read).
    """
    total = np.zeros(rows * columns, dtype=np.float32)
    for layer, chosen in heads.items():
        if not steps.get(layer):
            raise ValueError(f"layer {layer} has no steps, so its attention has no mean")
        seen = torch.stack([step[list(chosen), start : start + rows * columns] for step in steps[layer]])
        mean = seen.half().float().mean(dim=0).half().float() if official else seen.float().mean(dim=0)
        total += mean.sum(dim=0).cpu().numpy()
    count = sum(len(chosen) for chosen in heads.values())
    return (total / np.float32(max(1, count))).reshape(rows, columns)
