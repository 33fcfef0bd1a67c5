"""What people type, checked in the same way by every command line."""

from __future__ import annotations

from argparse import ArgumentTypeError


def positive(text: str) -> int:
    """A count, as the `type` of a flag."""
    try:
        count = int(text)
    except ValueError:
        count = 0
    if count < 1:
        raise ArgumentTypeError(f"a whole number from 1 on is needed; got {text!r}")
    return count
