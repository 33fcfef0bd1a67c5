"""Rows that cannot be used: found before a model is loaded, and refused or left out."""

from __future__ import annotations

from collections.abc import Mapping

from qzoom_agent.errors import ConfigError

_SHOWN = 5


def refuse_rows(name: str, problems: Mapping[int, str], *, total: int, skip_bad: bool = False) -> None:
    """Raise ConfigError that names the rows with problems, unless they are left out and others remain.

    Args:
        name: The table.
        problems: What is wrong, by the row's place from 0.
        total: Number of rows that are wanted.
        skip_bad: Leave them out.
    """
    if not problems or (skip_bad and len(problems) < total):
        return
    told = listed_rows(problems)
    hint = "no row is left" if skip_bad else "Mend these rows, or leave them out: --skip-bad (in a recipe: skip_bad)"
    raise ConfigError(f"{name} has {len(problems)} of {total} rows that cannot be asked: {told}. {hint}.")


def listed_rows(problems: Mapping[int, str]) -> str:
    """Return the first problems in a line, with the numbers of their rows from 1."""
    told = [f"row {place + 1}: {problems[place].rstrip('.')}" for place in sorted(problems)]
    more = [f"and {len(told) - _SHOWN} more"] if len(told) > _SHOWN else []
    return "; ".join(told[:_SHOWN] + more)
