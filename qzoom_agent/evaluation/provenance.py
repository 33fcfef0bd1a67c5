"""Which weights, and on which machine: what a run folder says about how its answers came about."""

from __future__ import annotations

import hashlib
import os
import subprocess
from pathlib import Path

from qzoom_agent.models.presets import PRESETS
from qzoom_agent.trace import describe_environment

_SIZE = 1 << 20
_BRANCHES = "branches"
"""Stem of the files that a folder of branches consists of."""
_KINDS = {".safetensors", ".json", ".jinja", ".bin", ".model", ".txt"}


def fingerprint(model: str, branches: str | Path | None = None, *, base_only: bool = False) -> str | None:
    """A digest that changes when weights do; None for a model that is not a folder on this machine.

    `base_only` leaves out branches that lie beside the weights: what does not use them does not change with them.

    Of large files the size, the first and the last MiB are read: enough to tell one training run from another in a
    moment, whatever the weights weigh.
    """
    source = PRESETS[model].source if model in PRESETS else str(Path(model).expanduser())
    if not Path(source).is_dir():
        return None
    found = hashlib.sha256()
    for folder in (Path(source), Path(branches) if branches else None):
        for path in sorted(folder.rglob("*")) if folder else ():
            if path.is_file() and path.suffix in _KINDS and not (base_only and path.stem == _BRANCHES):
                found.update(f"{path.name} {path.stat().st_size}\n".encode())
                with path.open("rb") as file:
                    found.update(file.read(_SIZE))
                    file.seek(max(file.tell(), path.stat().st_size - _SIZE))
                    found.update(file.read())
    return found.hexdigest()[:16]


def environment(placement: str = "") -> dict[str, str]:
    """Versions, revision and machine. `placement` is the backend's device and number format, and why."""
    found = describe_environment() | {"cores": str(os.cpu_count())}
    if placement:
        found["placement"] = placement
    done = subprocess.run(
        ["git", "-C", str(Path(__file__).resolve().parent), "describe", "--always", "--dirty"],
        capture_output=True,
        text=True,
        check=False,
    )
    return found | ({"revision": done.stdout.strip()} if done.returncode == 0 else {})
