"""Holds this package to recorded outputs of the published Q-Zoom code.

    python -m qzoom_agent.perception.parity FOLDER

FOLDER is a recording (checkpoint/, cases.json, case_XX.safetensors, images/, perhaps geometry.json; described in
tests/parity/README.md) or a folder of such recordings. For every case one line: the path taken and the largest
deviation of each quantity, all in float32. Exit status 1 if one is out of tolerance.

Inputs are the recorded pictures after resizing, from which the pixel values rebuild exactly. How far our own resizing
is from theirs is a second line a case ("own pixels"): it is reported and decides nothing, because image processors of
other versions differ by a grey level here and there.
"""

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final

import torch
from safetensors.torch import load_file

from qzoom_agent.backends.hf import HFBackend
from qzoom_agent.errors import ConfigError, QzoomError
from qzoom_agent.geometry import Size
from qzoom_agent.perception.layout import align
from qzoom_agent.perception.maps import blur, keep_mask, official_pixels, probabilities, regions
from qzoom_agent.perception.parity_run import Recording, Run, own_pictures, rebuilt

TOLERANCES: Final[dict[str, float]] = {
    "ids": 0,
    "grid": 0,
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
        """Compare values; another shape is an infinite deviation."""
        same = ours.shape == theirs.shape
        found = (
            float((ours.double() - theirs.double()).abs().max()) if same and ours.numel() else float(not same) * 1e30
        )
        self[quantity] = max(self.get(quantity, 0.0), found)

    def exact(self, quantity: str, ours: Any, theirs: Any) -> None:
        """Compare what has to be equal."""
        self[quantity] = self.get(quantity, 0.0) + float(ours != theirs)

    @property
    def bad(self) -> list[str]:
        """Quantities out of tolerance."""
        return [name for name, value in self.items() if not value <= TOLERANCES[name]]

    def __str__(self) -> str:
        return "  ".join(
            f"{name} {value:.0e}" if TOLERANCES[name] else f"{name} {'ok' if not value else f'{value:.0f} differ'}"
            for name, value in self.items()
        )


def check_case(backend: HFBackend, folder: Path, case: dict[str, Any]) -> tuple[str, Deviations]:
    """Everything recorded of one case: the path taken, and the deviations."""
    theirs = load_file(folder / f"case_{case['id']:02d}.safetensors")
    run = Run(backend, case, rebuilt(folder, case))
    found = Deviations()
    _check_coarse(found, run, case, theirs)
    found.exact("path", run.path, case["path"])
    found.exact("path", run.path_if_gate_on, case["path_if_gate_on"])
    if case["roi_found"]:
        assert run.region is not None
        found.exact("box", list(run.region[:4]), case["roi_box_grid_xyxy"])
        found.exact("box", list(run.box), case["roi_box_pixels_xyxy"])
        found.exact("grid", [list(run.crop_grid)], [case["roi_grid_thw"]])
        found.number("features", run.crop_features, theirs["roi_image_embeds"])
        found.exact("ids", run.merged_ids, theirs["merged_input_ids"].tolist())
        for aligned in (False, True):
            positions = run.merged_positions(aligned=aligned)
            found.number("positions", positions[:, 0], theirs[f"merged_position_ids_reuse{int(aligned)}"])
    for name, recorded in case["runs"].items():
        _check_run(found, run, name, recorded, theirs)
    return run.path, found


def _check_coarse(found: Deviations, run: Run, case: dict[str, Any], theirs: dict[str, torch.Tensor]) -> None:
    found.exact("ids", run.ids, theirs["input_ids"].tolist())
    found.exact("grid", run.grid.tolist(), theirs["image_grid_thw"].tolist())
    found.number("positions", run.positions[:, 0], theirs["position_ids"])
    found.number("features", run.features, theirs["image_embeds"])
    found.number("hidden", run.hidden[0, -1], theirs["hidden_K_last"])
    found.number("hidden", run.hidden[0].norm(dim=-1) / 10, theirs["hidden_K_token_norm"] / 10)
    assert run.look.score is not None
    found.number("gate", torch.tensor(run.look.score), torch.tensor(case["gate_prob"]))
    one = run.look.maps[0]
    for name, quantity, ours in (
        ("roi_logits", "map", one.logits),
        ("roi_prob_masked", "blurred", one.heat),
        ("roi_prob_blur", "blurred", run.blurred),
        ("sink_keep_mask", "sinks", one.keep),
        ("roi_binary", "foreground", run.foreground),
    ):
        if name in theirs:
            if TOLERANCES[quantity]:
                found.number(quantity, ours, theirs[name])
            else:
                found.exact(quantity, ours.int().tolist(), theirs[name].int().tolist())


def _check_run(
    found: Deviations, run: Run, name: str, recorded: dict[str, Any], theirs: dict[str, torch.Tensor]
) -> None:
    """One way of running the case: greedy tokens, and the logits recorded on the way."""
    kind = name.removesuffix("_generation_config")
    penalty = run.penalty if kind != name else 1.0
    steps = len(recorded["tokens"])
    if kind == "baseline_nosys":
        tokens, logits = run.without_system(steps)
    else:
        zooms = {"baseline": False, "gate_off": False, "default": run.path == "roi"}.get(kind, run.crop_used)
        tokens, logits = run.generate(steps, zooms=zooms, aligned=kind == "gate_on_reuse1", penalty=penalty)
    found.exact("tokens", tokens, recorded["tokens"])
    if penalty == 1.0 and tokens == recorded["tokens"]:
        at = {f"logits_{name}": 0, f"logits_step1_{name}": 1, f"logits_last_{name}": -1}
        for key, step in at.items():
            if key in theirs and -len(logits) <= step < len(logits):
                found.number("logits", logits[step], theirs[key])


def check_own_pixels(backend: HFBackend, folder: Path, case: dict[str, Any]) -> str:
    """How far the whole pipeline goes astray when we resize the pictures ourselves, in words."""
    recorded, own = rebuilt(folder, case), own_pictures(folder, case, backend)
    if own.coarse.size != recorded.coarse.size:
        return f"another coarse size, {own.coarse.size} for {recorded.coarse.size}"
    ours = Run(backend, case, own)
    grey, share = own.difference(recorded)
    score = 0.0 if ours.look.score is None else abs(ours.look.score - case["gate_prob"])
    box = "box equal" if not case["roi_found"] or (list(ours.box) == case["roi_box_pixels_xyxy"]) else "another box"
    want = case["runs"]["default"]["tokens"]
    same = ours.generate(len(want), zooms=ours.path == "roi", aligned=False)[0] == want
    return f"grey {grey} in {share:.2%}  gate {score:.0e}  {box}  tokens {'equal' if same else 'differ'}"


def check_geometry(folder: Path, family_unit: int, sink: Any) -> Deviations:
    """Boxes and positions recorded apart from any model."""
    found, theirs = Deviations(), load_file(folder / "geometry.safetensors")
    listed = json.loads((folder / "geometry.json").read_text(encoding="utf-8"))
    for row in listed["boxes"]:
        rows, columns = row["map_hw"]
        given = theirs.get(f"keep_{row['key']}")
        keep = keep_mask(sink, rows, columns) if given is None else given.bool()
        heat = probabilities(theirs[f"logits_{row['key']}"].view(rows, columns), keep)
        blurred = blur(heat, official=True)
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
    """Print a line for each case of one recording; whether all are within tolerance."""
    backend = HFBackend.load(str(folder / "checkpoint"), device="cpu", dtype="float32")
    recording = Recording.read(folder)
    fine = True

    def line(name: str, text: str, found: Deviations) -> None:
        nonlocal fine
        fine &= not found.bad
        verdict = f"OUT OF TOLERANCE: {', '.join(found.bad)}" if found.bad else "ok"
        print(f"{folder.name} {name:<8} {text:<26} {verdict:<4} {found}", flush=True)

    for case in recording.cases:
        path, found = check_case(backend, folder, case)
        line(f"case {case['id']:02d}", path, found)
        print(f"{folder.name} {'':<8} own pixels: {check_own_pixels(backend, folder, case)}", flush=True)
    if recording.has_geometry:
        adapter = recording.adapter(backend)
        line("geometry", "", check_geometry(folder, backend.defaults.factor, adapter.sink))
    return fine


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m qzoom_agent.perception.parity",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("folder", type=Path, help="a recording, or a folder of recordings")
    folder: Path = parser.parse_args(argv).folder
    folders = (
        [folder] if (folder / "cases.json").is_file() else sorted(path.parent for path in folder.glob("*/cases.json"))
    )
    try:
        if not folders:
            raise ConfigError(f"No recording found: neither {folder} nor a folder in it has a cases.json.")
        torch.set_grad_enabled(False)
        results = [check_folder(one) for one in folders]
    except QzoomError as error:
        print(error, file=sys.stderr)
        return error.exit_code
    return 0 if all(results) else 1


if __name__ == "__main__":
    sys.exit(main())
