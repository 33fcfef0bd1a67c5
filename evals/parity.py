"""Compare perception with recorded outputs of the published Q-Zoom code.

    python evals/parity.py FOLDER

FOLDER is a recording (checkpoint/, cases.json, case_XX.safetensors, images/, perhaps geometry.json; see
tests/parity/README.md) or a folder of recordings. It prints one line a case: the path taken and the largest deviation
of each quantity, in float32. The exit status is 1 if one is out of tolerance.

Inputs are the recorded pictures after resizing, from which the pixel values rebuild exactly. A second line a case ("own
pixels") reports the deviation with our own resizing. It decides nothing: image processors of other versions differ by a
grey level here and there.
"""

import argparse
import json
import math
import sys
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Final

import torch
from safetensors.torch import load_file

from parity_run import Recording, Run, official_blur, official_pixels, own_pictures, rebuilt
from qzoom_agent.errors import ConfigError, QzoomError
from qzoom_agent.geometry import Size
from qzoom_agent.models.hf import HFBackend
from qzoom_agent.perception.adapters import Sink, align
from qzoom_agent.perception.maps import keep_mask, probabilities, regions

TOLERANCES: Final[dict[str, float]] = {
    "ids": 0,
    "grid": 0,
    "pixels": 1e-5,
    "features": 1e-4,
    "hidden": 5e-4,
    "gate": 1e-4,
    "map": 1e-3,
    "sinks": 0,
    "blurred": 2e-4,
    "foreground": 0,
    "box": 0,
    "path": 0,
    "positions": 1e-5,
    "logits": 1e-3,
    "tokens": 0,
}
"""Largest allowed deviation of each quantity; for exact ones the number of values that differ."""


class Deviations(dict[str, float]):
    """The largest deviation of each quantity so far."""

    def number(self, quantity: str, ours: torch.Tensor, theirs: torch.Tensor) -> None:
        """Compare values; another shape, and anything that is no number, is an infinite deviation."""
        found = math.inf
        if ours.shape == theirs.shape:
            found = float((ours.double() - theirs.double()).abs().max()) if ours.numel() else 0.0
        self[quantity] = max(self.get(quantity, 0.0), math.inf if math.isnan(found) else found)

    def exact(self, quantity: str, ours: Any, theirs: Any) -> None:
        """Compare what has to be equal."""
        self[quantity] = self.get(quantity, 0.0) + float(ours != theirs)

    def entry(self, quantity: str, ours: Any, recorded: Mapping[str, Any], *keys: str) -> None:
        """Compare with the entries of these keys that the recording has: tensors, numbers or lists."""
        for theirs in (recorded[key] for key in keys if key in recorded):
            if TOLERANCES[quantity]:
                self.number(quantity, torch.as_tensor(ours), torch.as_tensor(theirs))
            else:
                self.exact(quantity, _plain(ours), _plain(theirs))

    @property
    def bad(self) -> list[str]:
        """Quantities out of tolerance."""
        return [name for name, value in self.items() if not value <= TOLERANCES[name]]

    def __str__(self) -> str:
        return "  ".join(
            f"{name} {value:.0e}" if TOLERANCES[name] else f"{name} {'ok' if not value else f'{value:.0f} differ'}"
            for name, value in self.items()
        )


def _plain(value: Any) -> Any:
    return value.tolist() if isinstance(value, torch.Tensor) else value


def check_case(backend: HFBackend, folder: Path, case: dict[str, Any]) -> tuple[str, Deviations]:
    """Compare everything recorded of one case; return the path taken, and the deviations.

    Raises:
        KeyError: the recording lacks something that every case has.
    """
    theirs = load_file(folder / f"case_{case_name(case)}.safetensors")
    run = Run(backend, case, rebuilt(folder, case))
    found = Deviations()
    _check_coarse(found, run, case, theirs)
    found.exact("path", run.path, case["path"])
    found.exact("path", run.path_if_gate_on, case["path_if_gate_on"])
    found.exact("path", run.crop_used, case["roi_found"])
    told = run.path
    if run.crop_used and case["roi_found"]:
        _check_crop(found, run, case, theirs)
        if run.pictures.crop is None:
            told += " (crop not recorded)"
    for name, recorded in case["runs"].items():
        _check_run(found, run, name, recorded, theirs)
    return told, found


def _check_coarse(found: Deviations, run: Run, case: dict[str, Any], theirs: dict[str, torch.Tensor]) -> None:
    found.exact("ids", run.ids, theirs["input_ids"].tolist())
    found.entry("ids", len(run.ids), case, "prompt_len")
    found.entry("ids", run.start, case, "image_token_start")
    found.exact("grid", run.grid.tolist(), theirs["image_grid_thw"].tolist())
    found.entry("grid", run.grid[0], case, "image_grid_thw")
    found.entry("grid", [run.rows, run.columns], case, "coarse_map_hw")
    found.entry("pixels", run.pixels[:4], theirs, "pixel_values_head")
    found.number("positions", run.positions[:, 0], theirs["position_ids"])
    found.entry("positions", int(run.positions.max()) + 1 - len(run.ids), case, "rope_delta")
    found.number("features", run.features, theirs["image_embeds"])
    _check_deepstack(found, run.vision, theirs, "deepstack")
    found.number("hidden", run.hidden[0, -1], theirs["hidden_K_last"])
    # norms of whole states are larger than their entries
    found.number("hidden", run.hidden[0].norm(dim=-1) / 10, theirs["hidden_K_token_norm"] / 10)
    if run.look.score is not None:
        found.number("gate", torch.tensor(run.look.score), torch.tensor(case["gate_prob"]))
        found.entry("gate", [run.look.score], theirs, "gate_prob")
        if "gate_logit" in theirs:
            found.number("gate", torch.tensor([run.look.score]), torch.sigmoid(theirs["gate_logit"]))
        found.entry("path", run.gate_fires, case, "gate_decision")
    one = run.look.maps[0]
    found.number("map", one.logits, theirs["roi_logits"])
    found.entry("blurred", one.heat, theirs, "roi_prob_masked")
    found.number("blurred", run.blurred, theirs["roi_prob_blur"])
    found.entry("blurred", float((run.blurred - case["roi_conf_thresh"]).abs().min()), case, "blur_threshold_margin")
    found.entry("sinks", one.keep, theirs, "sink_keep_mask")
    found.entry("sinks", int((~one.keep).sum()), case, "n_sink_masked")
    found.entry("foreground", run.foreground, theirs, "roi_binary")
    found.entry("foreground", int(run.foreground.sum()), case, "n_binary")


def _check_deepstack(found: Deviations, vision: Any, theirs: dict[str, torch.Tensor], name: str) -> None:
    """Compare features that the vision tower adds to the first layers (Qwen3-VL)."""
    for level, parts in enumerate(getattr(vision, "deepstack_features", None) or []):
        whole = torch.cat(tuple(parts)) if isinstance(parts, list | tuple) else parts
        found.entry("features", whole.norm(dim=-1), theirs, f"{name}_norm_{level}")
        found.entry("features", whole[:2], theirs, f"{name}_head_{level}")


def _check_crop(found: Deviations, run: Run, case: dict[str, Any], theirs: dict[str, torch.Tensor]) -> None:
    assert run.region is not None
    found.exact("box", list(run.region[:4]), case["roi_box_grid_xyxy"])
    found.exact("box", list(run.box), case["roi_box_pixels_xyxy"])
    x1, y1, x2, y2 = run.box
    found.entry("box", [x2 - x1, y2 - y1], case, "roi_crop_size_wh")
    found.exact("grid", run.crop_grid, case["roi_grid_thw"])
    found.entry("grid", len(run.inserted) - 2, case, "roi_tokens")
    if run.pictures.crop is not None:
        found.entry("pixels", run.crop_pixels[:4], theirs, "roi_pixel_values_head")
        found.number("features", run.crop_features, theirs["roi_image_embeds"])
        _check_deepstack(found, run.crop_vision, theirs, "roi_deepstack")
    found.exact("ids", run.merged_ids, theirs["merged_input_ids"].tolist())
    found.entry("ids", len(run.merged_ids), case, "merged_len")
    inserted = [int(at in run.inserted) for at in range(len(run.merged_ids))]
    found.entry("ids", inserted, theirs, "merged_inserted_mask")
    for aligned in (False, True):
        positions = run.merged_positions(aligned=aligned)[:, 0]
        found.number("positions", positions, theirs[f"merged_position_ids_reuse{int(aligned)}"])
        found.entry("positions", positions[:, -1], case, f"last_position_reuse{int(aligned)}")


def _check_run(
    found: Deviations, run: Run, name: str, recorded: dict[str, Any], theirs: dict[str, torch.Tensor]
) -> None:
    """Compare one way of running the case: greedy tokens, and the logits recorded on the way."""
    kind = name.removesuffix("_generation_config")
    penalty = run.penalty if kind != name else 1.0
    steps = len(recorded["tokens"])
    # of the two layouts, aligned positions alone are floats: where a run's name does not tell
    aligned = any(isinstance(one, float) for step in recorded.get("decode_positions_step1_step2", []) for one in step)
    zooms = {"baseline": False, "gate_off": False, "default": run.path == "roi"}.get(kind, run.crop_used)
    if kind == "baseline_nosys":
        tokens, logits = run.without_system(steps, penalty=penalty)
    elif zooms and run.pictures.crop is None:
        return  # a picture resized here is not quite theirs
    else:
        aligned = {"gate_on_reuse0": False, "gate_on_reuse1": True}.get(kind, aligned)
        tokens, logits = run.generate(steps, zooms=zooms, aligned=aligned, penalty=penalty)
        first = run.next_position(zooms=zooms, aligned=aligned)
        found.entry("positions", [[first] * 3, [first + 1] * 3], recorded, "decode_positions_step1_step2")
    found.exact("tokens", tokens, recorded["tokens"])
    found.entry("tokens", tokens, theirs, f"tokens_{name}")
    if logits:
        found.entry("logits", logits[0], theirs, f"logits_{name}")
        if f"hidden_last_{name}" in theirs:
            found.number("logits", logits[0], run.model.lm_head(theirs[f"hidden_last_{name}"]))
    if tokens == recorded["tokens"] and len(tokens) > 1:
        found.entry("logits", logits[1], theirs, f"logits_step1_{name}")
        found.entry("logits", logits[-1], theirs, f"logits_last_{name}")


def check_own_pixels(backend: HFBackend, folder: Path, case: dict[str, Any]) -> str:
    """Describe the deviation of the whole pipeline when the pictures are resized by this package."""
    recorded, own = rebuilt(folder, case), own_pictures(folder, case, backend)
    if own.coarse.size != recorded.coarse.size:
        return f"another coarse size, {own.coarse.size} for {recorded.coarse.size}"
    ours = Run(backend, case, own)
    grey, share = own.difference(recorded)
    told = [f"grey {grey} in {share:.2%}"]
    if ours.look.score is not None:
        told.append(f"gate {abs(ours.look.score - case['gate_prob']):.0e}")
    box = list(ours.box) if ours.crop_used else None
    told.append("box equal" if box == case.get("roi_box_pixels_xyxy") else "another box")
    if "default" in case["runs"]:
        want = case["runs"]["default"]["tokens"]
        same = ours.generate(len(want), zooms=ours.path == "roi")[0] == want
        told.append(f"tokens {'equal' if same else 'differ'}")
    return "  ".join(told)


def check_geometry(folder: Path, sink: Sink) -> Deviations:
    """Compare boxes and positions that were recorded without a model."""
    found, theirs = Deviations(), load_file(folder / "geometry.safetensors")
    listed = json.loads((folder / "geometry.json").read_text(encoding="utf-8"))
    for row in listed["boxes"]:
        rows, columns = row["map_hw"]
        given = theirs.get(f"keep_{row['key']}")
        keep = keep_mask(sink, rows, columns) if given is None else given.bool()
        heat = probabilities(theirs[f"logits_{row['key']}"].view(rows, columns), keep)
        blurred = official_blur(heat)
        found.number("blurred", blurred, theirs[f"blur_{row['key']}"])
        marked = (blurred > row["conf"]).numpy()
        found.exact("foreground", int(marked.sum()), row["n_binary"])
        boxes = regions(heat, marked)
        found.exact("box", [list(box[:4]) for box in boxes], [row["box_grid_xyxy"]] if row["box_grid_xyxy"] else [])
        for box in boxes:
            pixels = official_pixels(box, rows=rows, columns=columns, unit=row["unit"], size=Size(*row["src_wh"]))
            found.exact("box", list(pixels), row["box_pixels_xyxy"])
    for row in listed["roi_positions"]:
        first, (rows, columns), (x1, y1, x2, y2) = row["first_image_position"], row["roi_hw"], row["box_grid_xyxy"]
        start = first + max(row["map_hw"]) + 2
        plain = torch.full((3, 1, 1 + rows * columns), float(start))
        plain[:, 0, 0] = first
        ours = align(plain, source=0, crop=(1, 1 + rows * columns), grid=(rows, columns), cells=(x1, y1, x2, y2))
        found.number("positions", ours[:, 0, 1:], theirs[f"roipos_{row['key']}"])
    return found


def check_folder(folder: Path) -> bool:
    """Print a line for each case of one recording; return True if all are within tolerance.

    Raises:
        QzoomError: the recording's list of cases or its checkpoint cannot be read.
    """
    recording = Recording.read(folder)
    backend = HFBackend.load(str(folder / "checkpoint"), device="cpu", dtype="float32")
    fine = True

    def check(name: str, compare: Callable[[], tuple[str, Deviations]]) -> None:
        nonlocal fine
        try:
            path, found = compare()
        except Exception as error:  # a case that cannot even be run must not hide the others
            fine = False
            print(f"{folder.name} {name:<8} FAILED: {_reason(error)}", flush=True)
            return
        fine &= not found.bad
        verdict = f"OUT OF TOLERANCE: {', '.join(found.bad)}" if found.bad else "ok"
        print(f"{folder.name} {name:<8} {path:<26} {verdict:<4} {found}", flush=True)

    for case in recording.cases:
        check(f"case {case_name(case)}", partial(check_case, backend, folder, case))
        try:
            own = check_own_pixels(backend, folder, case)
        except Exception as error:
            own = f"failed: {_reason(error)}"
        print(f"{folder.name} {'':<8} own pixels: {own}", flush=True)
    if recording.has_geometry:
        adapter = recording.adapter(backend)
        check("geometry", lambda: ("", check_geometry(folder, adapter.sink)))
    return fine


def case_name(case: dict[str, Any]) -> str:
    """Return the name of a case, as in its file name."""
    return str(case.get("id", "?")).zfill(2)


def _reason(error: Exception) -> str:
    """Describe an unexpected error in one line."""
    if isinstance(error, KeyError):
        return f"the recording has no {error}"
    return f"{type(error).__name__}: {' '.join(str(error).split()) or 'no message'}"


def main(argv: Sequence[str] | None = None) -> int:
    """Check all recordings in a folder; return 0 if every case is within tolerance."""
    parser = argparse.ArgumentParser(
        prog="parity.py",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("folder", type=Path, help="a recording, or a folder of recordings")
    folder: Path = parser.parse_args(argv).folder.resolve()  # "." has a name too
    folders = (
        [folder] if (folder / "cases.json").is_file() else sorted(path.parent for path in folder.glob("*/cases.json"))
    )
    status = 0
    if not folders:
        print(
            f"No recording found: neither {folder} nor a folder in it has a cases.json. tests/parity has recordings.",
            file=sys.stderr,
        )
        status = ConfigError.exit_code
    with torch.no_grad():
        for one in folders:
            try:
                fine = check_folder(one)
            except QzoomError as error:
                print(f"{one.name}: {error}", file=sys.stderr)
                status = error.exit_code
            else:
                status = status or (0 if fine else 1)
    return status


if __name__ == "__main__":
    sys.exit(main())
