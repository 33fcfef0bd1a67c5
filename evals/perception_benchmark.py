"""Cost of perception: time and token-layers of each path, as ratios to the stock model's own prefill.

    python evals/perception_benchmark.py [--repeats 5] [--recorded tests/parity] [--json FILE]

Weights are random (time does not depend on them) and image features are given, so only the language model is timed.
Every repetition runs all paths in turn, and a ratio is the median over repetitions of the ratio within one, so that
changes in the machine's speed cancel. `--recorded` also compares with timings of the published code, as ratios to the
stock model in its own environment. Absolute times hold for one machine only.
"""

import argparse
import ctypes
import gc
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from copy import deepcopy
from pathlib import Path
from statistics import median
from time import perf_counter
from typing import Any, Literal

import torch
from PIL import Image
from pydantic import BaseModel
from torch import Tensor
from transformers import DynamicCache, Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration
from transformers.modeling_outputs import BaseModelOutputWithPooling

from qzoom_agent.config import PerceptionConfig, positive_int
from qzoom_agent.messages import Message, image_part, message
from qzoom_agent.models.hf import HFBackend
from qzoom_agent.models.interface import SamplingParams
from qzoom_agent.perception.branches import Branches
from qzoom_agent.perception.decoder import Decoder, Prefill
from qzoom_agent.perception.look import look
from qzoom_agent.perception.transformers_versions import forward

Path_ = Literal["stock", "direct", "direct lean", "stock both", "roi", "roi lean", "roi again"]
"""stock: coarse prompt; direct: the same with the gate; stock both: one pass over coarse and crop; roi: gate, map and
the crop inserted into the unfinished prefill; roi again: the same without reuse."""
_HIDDEN, _VOCABULARY, _IMAGE, _START, _END = 512, 2048, 2002, 1999, 2000


class Setting(BaseModel):
    """One configuration to time."""

    layers: int = 28
    k: int = 18
    depth: int = 3
    coarse: int = 24
    """Side of the coarse grid in tokens."""
    crop: tuple[int, int] = (24, 24)
    """Rows and columns of the crop."""
    text: tuple[int, int] = (10, 50)
    """Text tokens before and after the image."""


class Row(BaseModel):
    """Cost of one path, and its ratio to the path it is compared with."""

    path: str
    seconds: float
    token_layers: float
    against: str = ""
    time_ratio: float | None = None
    work_ratio: float | None = None


def random_model(setting: Setting) -> Qwen2_5_VLForConditionalGeneration:
    """Build a Qwen2.5-VL of this depth, 512 wide, with a vision tower that is never run."""
    config = Qwen2_5_VLConfig(
        text_config={
            "vocab_size": _VOCABULARY,
            "hidden_size": _HIDDEN,
            "intermediate_size": 1408,
            "num_hidden_layers": setting.layers,
            "num_attention_heads": 8,
            "num_key_value_heads": 2,
            "rope_parameters": {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [8, 12, 12]},
            "bos_token_id": None,
            "eos_token_id": 0,
        },
        vision_config={"depth": 1, "hidden_size": 64, "intermediate_size": 64, "num_heads": 2, "out_hidden_size": 512},
        image_token_id=_IMAGE,
        vision_start_token_id=_START,
        vision_end_token_id=_END,
    )
    torch.manual_seed(0)
    model = Qwen2_5_VLForConditionalGeneration(config)
    model.train(False)
    return model


class Paths:
    """The paths of one setting."""

    def __init__(self, setting: Setting, model: Any = None) -> None:
        """`model` instead of a random one; its depth has to be the setting's."""
        self.setting = setting
        self.model: Any = random_model(setting) if model is None else model
        config = self.model.config
        image, opens, closes = config.image_token_id, config.vision_start_token_id, config.vision_end_token_id
        self.image, self.width = image, config.get_text_config().hidden_size
        self.decoder = Decoder(self.model)
        self.branches = Branches.from_base(self.model, k=setting.k, depth=setting.depth, gate_depth=setting.depth)
        before, after = setting.text
        side, (rows, columns) = setting.coarse, setting.crop
        self.first = before
        coarse = [*[7] * (before - 1), opens, *[image] * side**2, closes]
        crop = [opens, *[image] * (rows * columns), closes]
        self.prompt, self.merged = [*coarse, *[8] * (after - 1)], [*coarse, *crop, *[8] * (after - 1)]
        self.kept = len(coarse)
        self.features = [self._features(side**2), self._features(rows * columns)]
        grids = torch.tensor([[1, 2 * side, 2 * side], [1, 2 * rows, 2 * columns]])
        self.positions = self._positions(self.prompt, grids[:1])
        self.merged_positions = self._positions(self.merged, grids)

    def _positions(self, ids: list[int], grids: Tensor) -> Tensor:
        tensor = torch.tensor([ids])
        found: Tensor = self.model.model.get_rope_index(
            tensor, mm_token_type_ids=(tensor == self.image).int(), image_grid_thw=grids
        )[0]
        return found

    def _features(self, tokens: int) -> BaseModelOutputWithPooling:
        return BaseModelOutputWithPooling(pooler_output=[torch.randn(tokens, self.width)])  # type: ignore[arg-type]

    def run(self, path: str) -> float:
        """Run a path once and return its token-layers."""
        with torch.inference_mode():
            if path == "stock":
                return self._stock(self.prompt, self.positions, self.features[:1])
            if path == "stock both":
                return self._stock(self.merged, self.merged_positions, self.features)
            lean = path.endswith("lean")
            if path.startswith("direct"):
                return self._ours(crop=False, reuse=True, lean=lean)
            return self._ours(crop=True, reuse=path != "roi again", lean=lean)

    def _stock(self, ids: list[int], positions: Tensor, features: list[BaseModelOutputWithPooling]) -> float:
        joined = BaseModelOutputWithPooling(pooler_output=[part for one in features for part in one.pooler_output])  # type: ignore[arg-type, union-attr]
        cache = DynamicCache(config=self.model.config)
        forward(self.model, torch.tensor([ids]), positions=positions, cache=cache, features=joined)
        return float(self.setting.layers * len(ids))

    def _ours(self, *, crop: bool, reuse: bool, lean: bool) -> float:
        decoder, side = self.decoder, self.setting.coarse
        prefill = Prefill(decoder, self.setting.k)
        new = decoder.embed(torch.tensor([self.prompt]), self.features[:1])
        rotary = decoder.rotary(new.hidden, self.positions)
        work: float = prefill.extend(new, rotary)
        assert prefill.hidden is not None
        (found,) = look(
            self.branches,
            decoder.adapter,
            prefill.hidden,
            rotary=rotary,
            mask=None,
            images=[[(self.first, side, side)]],
            options=PerceptionConfig(gate_threshold=0.0 if crop else 1.0, threshold=0.0),
        )
        work += found.token_layers
        if crop:
            if reuse:
                prefill.keep(self.kept)
                ids, start, features = self.merged[self.kept :], self.kept, self.features[1:]
            else:
                prefill = Prefill(decoder, self.setting.k)
                ids, start, features = self.merged, 0, self.features
            new = decoder.embed(torch.tensor([ids]), features)
            work += prefill.extend(new, decoder.rotary(new.hidden, self.merged_positions[..., start:]))
            assert prefill.hidden is not None
            rotary = decoder.rotary(prefill.hidden, self.merged_positions)
        return work + prefill.finish(rotary, lean=lean)[1]


def interleaved(runs: dict[str, Callable[[], float]], repeats: int) -> dict[str, tuple[list[float], float]]:
    """Return seconds of every repetition and the work of each path; paths run in turn after one warm-up each."""
    for run in runs.values():
        run()
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    work: dict[str, float] = {}
    for _ in range(repeats):
        for name, run in runs.items():
            began = perf_counter()
            work[name] = run()
            seconds[name].append(perf_counter() - began)
    return {name: (seconds[name], work[name]) for name in runs}


def compare(paths: Paths, pairs: Sequence[tuple[str, str]], repeats: int) -> list[Row]:
    """Time the paths of `pairs`: (path, the path it is compared with)."""
    names = list(dict.fromkeys(name for pair in pairs for name in reversed(pair) if name))
    runs: dict[str, Callable[[], float]] = {name: (lambda name=name: paths.run(name)) for name in names}  # type: ignore[misc]
    timed = interleaved(runs, repeats)
    rows = [Row(path=name, seconds=median(timed[name][0]), token_layers=timed[name][1]) for name in names]
    for row in rows:
        against = dict(pairs).get(row.path)
        if against:
            (ours, work), (theirs, base) = timed[row.path], timed[against]
            row.against = against
            row.time_ratio = median(a / b for a, b in zip(ours, theirs, strict=True))
            row.work_ratio = work / base
    return rows


def sizes(setting: Setting) -> list[tuple[str, float]]:
    """Return the bytes of branch files as a share of the published branch weights (2 x T layers and a head)."""
    model: Any = random_model(setting)
    branches = Branches.from_base(model, k=setting.k, depth=setting.depth, gate_depth=setting.depth)
    layer = sum(weight.numel() for weight in model.model.language_model.layers[0].parameters())
    published = 2 * (2 * setting.depth * layer + _HIDDEN + 1)  # bytes in bfloat16
    with tempfile.TemporaryDirectory() as folder:
        return [
            (f"branch file, {name}", branches.save(folder, int8=int8) / published)
            for name, int8 in (("bfloat16", False), ("int8", True))
        ]


def peak_memory(setting: Setting) -> float:
    """Return the peak memory of a look over that of a stock prefill, without the weights; each in its own process."""

    def grown(path: str) -> int:
        command = [sys.executable, __file__, "--peak", path, "--setting", setting.model_dump_json()]
        # freed memory is returned at once, so that the peak is that of live tensors
        kind = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}
        return int(subprocess.run(command, capture_output=True, text=True, check=True, env=kind).stdout)

    return grown("direct") / grown("stock")


def _peak(path: str, setting: Setting) -> int:
    """Return the kilobytes by which resident memory grows at most while a path runs (Linux)."""
    paths = Paths(setting)
    gc.collect()
    ctypes.CDLL("libc.so.6").malloc_trim(0)  # memory freed while loading must not be used again
    Path("/proc/self/clear_refs").write_text("5", encoding="ascii")  # the peak counts from here
    before = _status("VmRSS")
    paths.run(path)
    return _status("VmHWM") - before


def _status(field: str) -> int:
    lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    return int(next(line for line in lines if line.startswith(field)).split()[1])


def episode(setting: Setting, repeats: int, *, turns: int = 4) -> Row:
    """Time an episode of a coarse view and three crops of 256 tokens in one session, over a fresh session each turn.

    A turn writes one token, so this compares encoding and prefill. On nano's processor and a random model of the
    setting's depth; the vision tower is of nano's size and timed too.
    """
    nano = HFBackend.load("nano", device="cpu", dtype="float32")
    config: Any = deepcopy(nano.model.config)
    text = config.text_config
    text.num_hidden_layers, text.layer_types = setting.layers, ["full_attention"] * setting.layers
    text.hidden_size, text.intermediate_size, config.vision_config.out_hidden_size = _HIDDEN, 1408, _HIDDEN
    text.num_attention_heads, text.num_key_value_heads = 8, 2
    text.rope_parameters = text.rope_parameters | {"mrope_section": [8, 12, 12]}
    torch.manual_seed(0)
    model = Qwen2_5_VLForConditionalGeneration(config)
    model.train(False)
    backend = HFBackend(model, nano.processor, name="random")
    sides = [setting.coarse, *[16] * (turns - 1)]
    pictures = {
        f"view{at}": Image.new("RGB", (28 * side, 28 * side), (40 * at, 90, 160)) for at, side in enumerate(sides)
    }
    settings = SamplingParams(max_new_tokens=1)

    def run(fresh: bool) -> float:
        session, talk, work = backend.session(pictures.__getitem__), list[Message](), 0.0
        for view in pictures:
            talk.append(message("user", image_part(view), "what is the code?"))
            session = backend.session(pictures.__getitem__) if fresh else session
            reply = session.reply(talk, settings=settings)
            work += reply.token_layers
            talk.append(message("assistant", reply.text or "."))
        return work

    timed = interleaved({"session": lambda: run(False), "again": lambda: run(True)}, repeats)
    (ours, work), (theirs, base) = timed["session"], timed["again"]
    return Row(
        path="session",
        seconds=median(ours),
        token_layers=work,
        against="re-encoding",
        time_ratio=median(a / b for a, b in zip(ours, theirs, strict=True)),
        work_ratio=work / base,
    )


def recorded_ratios(folder: Path) -> dict[str, dict[str, float]]:
    """Return direct and RoI paths of the published code over the stock model, for each recorded family."""
    out: dict[str, dict[str, float]] = {}
    for file in sorted(folder.glob("*/timing.json")):
        data = json.loads(file.read_text(encoding="utf-8"))
        key = "language_model_and_rest_median_s"
        stock = data["stock_transformers_reference"]["results"]["stock_baseline_256_tokens"][key]
        rows = data["results"]
        roi = next(row for name, row in rows.items() if name.startswith("qzoom_roi"))
        out[file.parent.name] = {"direct": rows["qzoom_gate_off_256"][key] / stock, "roi": roi[key] / stock}
    return out


def _print(title: str, rows: Sequence[Row]) -> None:
    print(f"\n{title}\n{'path':<14}{'seconds':>9}{'token-layers':>14}   {'against':<12}{'time':>7}{'work':>7}")
    for row in rows:
        ratios = "" if row.time_ratio is None else f"{row.against:<12}{row.time_ratio:>7.3f}{row.work_ratio:>7.3f}"
        print(f"{row.path:<14}{row.seconds:>9.3f}{row.token_layers:>14.0f}   {ratios}", flush=True)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="perception_benchmark.py",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--repeats", type=positive_int, default=5, help="repetitions of every path (default 5)")
    parser.add_argument("--recorded", type=Path, help="folder of recordings to compare timings with")
    parser.add_argument("--json", type=Path, help="write all rows")
    parser.add_argument("--peak", help=argparse.SUPPRESS)
    parser.add_argument("--setting", type=Setting.model_validate_json, default=Setting(), help=argparse.SUPPRESS)
    options = parser.parse_args(argv)
    torch.set_num_threads(1)
    if options.peak:
        print(_peak(options.peak, options.setting))
        return 0
    pairs = [
        ("stock", ""),
        ("direct", "stock"),
        ("direct lean", "stock"),
        ("stock both", ""),
        ("roi", "stock both"),
        ("roi lean", "stock both"),
        ("roi again", ""),
    ]
    setting: Setting = options.setting
    main_rows = compare(Paths(setting), pairs, options.repeats)
    _print(
        f"{setting.layers} layers, K = {setting.k}, T = {setting.depth}, {setting.coarse**2} coarse tokens", main_rows
    )
    seconds = {row.path: row for row in main_rows}
    print(f"prefix reuse on / off: time {seconds['roi'].seconds / seconds['roi again'].seconds:.3f}, ", end="")
    print(f"work {seconds['roi'].token_layers / seconds['roi again'].token_layers:.3f}")
    out: dict[str, Any] = {"setting": setting.model_dump(), "rows": [row.model_dump() for row in main_rows]}
    nano = HFBackend.load("nano", device="cpu", dtype="float32").model
    own = Setting(layers=9, k=6, coarse=8, crop=(6, 7), text=(5, 15))
    nano_rows = compare(Paths(own, nano), pairs, 20 * options.repeats)
    _print("nano: 9 layers, K = 6, T = 3, 64 coarse and 42 crop tokens", nano_rows)
    out["nano"] = [row.model_dump() for row in nano_rows]
    turns = episode(setting, options.repeats)
    _print("Four turns: a coarse view, then three crops", [turns])
    out["episode"] = turns.model_dump()
    out["sizes"] = dict(sizes(setting))
    for name, share in out["sizes"].items():
        print(f"{name} / published branch weights: {share:.3f}")
    if Path("/proc/self/clear_refs").exists():
        out["peak"] = peak_memory(setting)
        print(f"peak memory of a look and its answer / of a stock prefill: {out['peak']:.3f}")
    if options.recorded:
        out["recorded"] = {}
        for family, theirs in recorded_ratios(options.recorded).items():
            crop = (15, 15) if family == "qwen2_5_vl" else (16, 16)
            small = Setting(layers=12, k=8, coarse=16, crop=crop, text=(24, 50))
            against = [("direct", "stock"), ("direct lean", "stock"), ("roi", "stock"), ("roi lean", "stock")]
            rows = compare(Paths(small), [("stock", ""), *against], options.repeats)
            _print(f"The configuration of {family}'s recording: 12 layers, K = 8, 256 coarse tokens", rows)
            for row in rows[1:]:
                published = theirs[row.path.split()[0]]
                assert row.time_ratio is not None
                print(f"{row.path}: {row.time_ratio:.3f} of stock; published code {published:.3f}; ", end="")
                print(f"{1 - row.time_ratio / published:.1%} cheaper")
            out["recorded"][family] = {"published": theirs, "rows": [row.model_dump() for row in rows]}
    if options.json:
        options.json.write_text(json.dumps(out, indent=1) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
