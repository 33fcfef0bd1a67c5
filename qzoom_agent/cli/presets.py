"""`qzoom models`: the names that `--model` knows, and what each needs."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from qzoom_agent.cli.console import table
from qzoom_agent.cli.main import OK


def parser() -> argparse.ArgumentParser:
    """The verb's flags: none."""
    return argparse.ArgumentParser(
        prog="qzoom models", description="List the models that --model knows by name. A folder or a hub id works too."
    )


def main(argv: Sequence[str]) -> int:
    """Print the table; nothing is loaded or looked up on the network."""
    parser().parse_args(argv)

    from qzoom_agent.models.presets import PRESETS, Preset

    def weights(preset: Preset) -> str:
        # A hub id is never a folder here; a folder without weights is a checkout before they were trained.
        if not Path(preset.source).is_absolute():
            return preset.source
        return "in the package" if any(Path(preset.source).glob("*.safetensors")) else "missing"

    rows = [
        (
            preset.name,
            preset.protocol or "",
            f"{preset.memory_gb:g} GB" if preset.memory_gb else "",
            f"{preset.budget.coarse_max_tokens} + {preset.budget.crop_max_tokens} a crop" if preset.budget else "",
            weights(preset),
            preset.note,
        )
        for preset in PRESETS.values()
    ]
    for line in table(rows, header=("name", "protocol", "memory", "visual tokens", "weights", "")):
        print(line)
    return OK
