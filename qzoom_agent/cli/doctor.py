"""`qzoom doctor`: versions, devices, extras and disk space of this machine, as a table to paste into a bug report.

It reads package metadata and imports nothing heavy. torch is imported in a child process, because a broken installation
can crash the interpreter. Paths are shown with the home folder as `~`. With `--model` the model is loaded and examined
too: is it the stock model, which tokens does it show, how fast is it?
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import platform
import shutil
import subprocess
import sys
from collections.abc import Iterator
from importlib import metadata, resources
from pathlib import Path
from typing import Final, Literal, NamedTuple

from packaging.requirements import Requirement

from qzoom_agent import __version__
from qzoom_agent.cli.console import print_table
from qzoom_agent.cli.main import BACKEND, OK
from qzoom_agent.errors import BackendError
from qzoom_agent.extras import obstacle
from qzoom_agent.files import expanded

Verdict = Literal["ok", "note", "bad"]
SHOWN: Final = ("transformers", "langgraph", "pydantic", "pillow", "numpy")
"""Packages that get a line of their own; the others share one."""
EXTRAS: Final = {"eval": "evaluation", "train": "training"}
"""Extras of the package, and what needs them."""
LOW_DISK_BYTES: Final = 2 * 2**30
_PROBE: Final = """
import importlib.util, json, torch
found = {"version": torch.__version__, "threads": torch.get_num_threads(), "device": "cpu", "bf16": None}
if torch.cuda.is_available():
    found["device"] = f"cuda ({torch.cuda.device_count()} x {torch.cuda.get_device_name(0)})"
    found["bf16"] = torch.cuda.is_bf16_supported()
elif torch.backends.mps.is_available():
    found["device"] = "mps"
if importlib.util.find_spec("torchvision"):
    try:
        import torchvision
        found["torchvision"] = ""
    except Exception as error:
        found["torchvision"] = f"{type(error).__name__}: {error}"
print(json.dumps(found))
"""


class Check(NamedTuple):
    """One line of the table."""

    name: str
    found: str
    verdict: Verdict = "ok"
    advice: str = ""


def add_flags(flags: argparse.ArgumentParser) -> None:
    flags.description = (
        "Check this machine, and a model on it: one table to paste into a bug report. "
        "Exit code 4 if something is wrong."
    )
    flags.add_argument("--model", metavar="M", help="also load and examine this preset, folder or hub id")
    flags.add_argument("--branches", metavar="B", help="gate and SD-RPN: folder or hub id (default: the model's)")
    flags.add_argument("--device", default="auto", help="cpu, cuda, cuda:1, mps (default: the best there is)")


def run(args: argparse.Namespace) -> int:
    """Print the table; exit code 4 if something is wrong."""
    checks = list(examine())
    if args.model and all(check.verdict != "bad" for check in checks if check.name == "torch"):
        checks += _model(args)
    print_table([(check.name, check.found, check.verdict) for check in checks], header=("what", "found", ""))
    for check in checks:
        if check.advice:
            print(f"{check.verdict}: {check.name}: {check.advice}")
    return BACKEND if any(check.verdict == "bad" for check in checks) else OK


def _model(args: argparse.Namespace) -> Iterator[Check]:
    """Yield the findings about --model; a model that cannot be run is one of them."""
    from qzoom_agent.models.examination import examine_model

    try:
        for found in examine_model(args.model, branches=args.branches, device=args.device):
            yield Check(*found)
    except BackendError as error:
        yield Check("model", f"{args.model} cannot be run", "bad", str(error))


def examine() -> Iterator[Check]:
    """Yield every check, in the order shown."""
    yield Check("qzoom-agent", f"{__version__} at {_short(str(resources.files('qzoom_agent')))}")
    wrong = obstacle()
    yield Check("python", f"{platform.python_version()} at {_short(sys.executable)}", "bad" if wrong else "ok", wrong)
    yield Check("platform", platform.platform())
    yield Check("cpu", f"{os.cpu_count()} cores, OMP_NUM_THREADS={os.environ.get('OMP_NUM_THREADS', 'unset')}")
    yield from _torch()
    yield from _packages()
    yield nano()
    yield from _disk()
    hub = {name: os.environ[name] for name in ("HF_HUB_OFFLINE", "HF_HOME", "HF_ENDPOINT") if name in os.environ}
    yield Check("model hub", ", ".join(f"{name}={_short(value)}" for name, value in hub.items()) or "default settings")


def _torch() -> Iterator[Check]:
    try:
        done = subprocess.run([sys.executable, "-c", _PROBE], capture_output=True, text=True, timeout=120, check=False)
        found = json.loads(done.stdout.strip().splitlines()[-1])
    except subprocess.TimeoutExpired:
        yield Check("torch", "no answer within 120 s", "bad", "Run python -c 'import torch' and see where it hangs.")
        return
    except (ValueError, IndexError):
        last = (done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[-1]
        yield Check("torch", f"cannot be imported: {last}", "bad", "Install: pip install --force-reinstall torch")
        return
    yield Check("torch", f"{found['version']}, {found['threads']} threads")
    yield Check("device", found["device"] + {None: "", True: ", bf16", False: ", no bf16"}[found["bf16"]])
    yield torchvision(found.get("torchvision"))


def torchvision(error: str | None) -> Check:
    """Check torchvision: few model families need it, but transformers imports it wherever it is installed.

    `error` is None if it is absent, "" if it can be imported, and otherwise the text of the error.
    """
    if error is None:
        return Check("torchvision", "absent; only a few families, such as Mistral 3, need it")
    if error:
        advice = "It does not fit this torch, and transformers would fail on it. Run: pip uninstall torchvision"
        return Check("torchvision", f"broken: {error}", "bad", advice)
    return Check("torchvision", f"{_version('torchvision')}, needed by few families", "note")


def _packages() -> Iterator[Check]:
    try:
        needed = [Requirement(line) for line in metadata.requires("qzoom-agent") or ()]
    except metadata.PackageNotFoundError:
        yield Check("packages", "qzoom-agent is not installed", "bad", "Run in a checkout: pip install -e .")
        return
    fine = True
    for need in needed:
        if need.marker is not None and not need.marker.evaluate():
            continue
        found = _version(need.name)
        if found is None or not need.specifier.contains(found, prereleases=True):
            fine, text = False, f"{found or 'missing'}, needs {need.specifier or 'any version'}"
            yield Check(need.name, text, "bad", f'Run: pip install "{need.name}{need.specifier}"')
        elif need.name in SHOWN:
            yield Check(need.name, found)
    if fine:
        yield Check("packages", "all in the range that qzoom-agent needs")
    for extra in EXTRAS:
        asked = (need for need in needed if need.marker and need.marker.evaluate({"extra": extra}))
        versions = {need: _version(need.name) for need in asked}
        missing = [need.name for need, version in versions.items() if version is None]
        unfit = [
            f"{need.name} {version} (needs {need.specifier})"
            for need, version in versions.items()
            if version is not None and not need.specifier.contains(version, prereleases=True)
        ]
        texts = [f"not installed: {_first(missing)}"] if missing else []
        texts += [f"other versions: {_first(unfit)}"] if unfit else []
        advice = f'Only {EXTRAS[extra]} needs it: pip install "qzoom-agent[{extra}]"' if texts else ""
        yield Check(f"extra [{extra}]", "; ".join(texts) or "installed", "note" if texts else "ok", advice)


def nano() -> Check:
    """Check that the weights of the model in the package are there."""
    weights = resources.files("qzoom_agent") / "weights" / "nano" / "model.safetensors"
    if not weights.is_file():
        advice = "Install a release, or train them: python rl/train_nano.py --help"
        return Check("nano", "no weights in the package", "bad", advice)
    data = weights.read_bytes()
    return Check("nano", f"{len(data) / 1e6:.1f} MB, sha256 {hashlib.sha256(data).hexdigest()[:12]}")


def _disk() -> Iterator[Check]:
    places = {"disk here": Path.cwd(), "disk of models": expanded(os.environ.get("HF_HOME", "~/.cache"))}
    for name, place in places.items():
        there = next(folder for folder in (place, *place.parents) if folder.exists())
        free = shutil.disk_usage(there).free
        text = f"{free / 2**30:.1f} GiB free at {_short(str(there))}"
        if not os.access(there, os.W_OK):
            advice = "Set HF_HOME to another folder." if name == "disk of models" else "Work in another folder."
            yield Check(name, f"{_short(str(there))} cannot be written", "note", advice)
        elif free < LOW_DISK_BYTES:
            yield Check(name, text, "note", "Little space for runs and downloaded models.")
        else:
            yield Check(name, text)


def _first(names: list[str]) -> str:
    return f"{', '.join(names[:3])}{f' and {len(names) - 3} more' if names[3:] else ''}"


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _short(path: str) -> str:
    home = str(expanded("~"))
    return "~" + path[len(home) :] if path == home or path.startswith(home + os.sep) else path
