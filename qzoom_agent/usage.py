"""What people type, checked in the same way by every command line: counts, and folders to write into."""

from __future__ import annotations

from argparse import ArgumentTypeError
from pathlib import Path

from qzoom_agent.errors import ConfigError


def positive(text: str) -> int:
    """A count, as the `type` of a flag."""
    try:
        count = int(text)
    except ValueError:
        count = 0
    if count < 1:
        raise ArgumentTypeError(f"a whole number from 1 on is needed; got {text!r}")
    return count


def make_folder(folder: Path, *, flag: str) -> None:
    """Make a folder that `flag` named, if it is not there.

    Raises:
        ConfigError: it cannot be made, or is a file.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(f"Cannot write into {folder}: {error.strerror}. Give a folder as {flag}.") from None
