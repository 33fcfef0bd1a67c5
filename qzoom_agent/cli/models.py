"""`qzoom models` lists the models known by name; `qzoom convert` reads and writes branches of published checkpoints."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from qzoom_agent.cli.console import Console, print_table, printable
from qzoom_agent.cli.main import OK

if TYPE_CHECKING:
    from qzoom_agent.models.presets import Preset


def add_flags(flags: argparse.ArgumentParser) -> None:
    """Add the flags of `qzoom models`."""
    flags.description = "List the models that --model knows by name. A folder or a hub id works too."
    flags.add_argument("model", nargs="?", metavar="M", help="show how this preset, folder or hub id would be run")


def run(args: argparse.Namespace) -> int:
    """Print the table, or one model; nothing is loaded or looked up on the network.

    Raises:
        ConfigError: There is no such model.
    """
    from qzoom_agent.models.presets import PRESETS, guess_of, resolve_model

    if args.model:
        preset = resolve_model(args.model)
        print_table(_details(preset))
        if guess := guess_of(preset):
            print(printable(guess))
        return OK
    rows = [
        (
            preset.name,
            preset.protocol or "",
            f"{preset.memory_gb:g} GB" if preset.memory_gb else "",
            f"{preset.budget.coarse_max_tokens} + {preset.budget.crop_max_tokens} a crop" if preset.budget else "",
            _weights(preset),
            preset.note,
        )
        for preset in PRESETS.values()
    ]
    print_table(rows, header=("name", "protocol", "memory", "visual tokens", "weights", ""))
    return OK


def _details(preset: Preset) -> list[tuple[str, str]]:
    """Return what is known of a model: name of a fact, or the key of a setting, and its value."""
    from qzoom_agent.protocols.wording import FILE

    rows = [("model", preset.name), ("weights", _weights(preset)), ("protocol", preset.protocol or "plain")]
    if (budget := preset.budget) is not None:
        share = f", at most {budget.coarse_share:g} of the full sides" if budget.coarse_share else ""
        rows.append(("first view", f"{budget.coarse_min_tokens} to {budget.coarse_max_tokens} tokens{share}"))
        rows.append(("crop", f"{budget.crop_min_tokens} to {budget.crop_max_tokens} tokens"))
    rows += [(key, str(value)) for key, value in preset.settings.items()]
    own = Path(preset.source) / FILE
    if own.is_file():
        rows.append(("prompt", str(own)))
    elif preset.wording:
        rows.append(("prompt", f"ours; the authors' is in {preset.wording} (for --prompt, or {FILE} in the folder)"))
    return [(printable(key), printable(value)) for key, value in [*rows, ("", preset.note)] if value]


def _weights(preset: Preset) -> str:
    if not preset.local:
        return preset.source  # a hub id
    if not any(Path(preset.source).glob("*.safetensors")):
        return f"missing in {preset.source}"
    return "in the package" if preset.name == "nano" else preset.source


def add_convert_flags(flags: argparse.ArgumentParser) -> None:
    """Add the flags of `qzoom convert`."""
    flags.description = (
        "Write the branches (gate and SD-RPN) of a checkpoint of the published Q-Zoom code as a small "
        "folder that any copy of the base can be used with; or, with --official, write ours into such a checkpoint."
    )
    flags.add_argument("source", help="official checkpoint or branches of ours: folder or hub id")
    flags.add_argument("target", metavar="DIR", help="folder to write")
    flags.add_argument(
        "--base", metavar="M", help="the model the branches belong to: preset, folder or hub id (default: the source)"
    )
    form = flags.add_mutually_exclusive_group()
    form.add_argument("--int8", action="store_true", help="store matrices as bytes, half the size")
    form.add_argument(
        "--official", action="store_true", help="write base and branches as one checkpoint for the published code"
    )
    flags.add_argument("--force", action="store_true", help="overwrite files in the target")


def run_convert(args: argparse.Namespace) -> int:
    """Run `qzoom convert`: files and sizes go to stdout, notes on the source's config to stderr.

    Raises:
        ConfigError, BackendError: Nothing can be converted.
    """
    console = Console()

    from qzoom_agent.models.convert import to_branches, to_checkpoint

    if args.official:
        done = to_checkpoint(args.source, args.target, base=args.base, force=args.force)
    else:
        done = to_branches(args.source, args.target, base=args.base, int8=args.int8, force=args.force)
    print_table([(str(path), f"{path.stat().st_size:,} bytes") for path in done.files])
    ratio = f" ({done.after / done.before:.2f} of it)" if done.before else ""
    print(f"branches: {done.before:,} bytes in the source, {done.after:,} in the target{ratio}", flush=True)
    for note in done.notes:
        console.line(f"note: {printable(note)}", "yellow")
    return OK
