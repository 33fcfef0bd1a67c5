"""Optional packages: what the extras of pyproject.toml install, and what answering does not need.

A module that needs such a package imports it where it is used, after `require`. For training and the server, which need
them throughout, `__init__.py` of each sub-package asks.
"""

from __future__ import annotations

import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Literal

from qzoom_agent.errors import MissingDependency

Extra = Literal["eval", "mcp", "ocr", "pdf", "run", "serve", "train", "web"]


def require(package: str, *, extra: Extra, use: str) -> Path:
    """Return the folder of an optional package, which is not imported.

    Args:
        package: Its name as it is imported.
        extra: The extra of `qzoom-agent` that installs it.
        use: What needs it, as the subject of a sentence in the singular.

    Raises:
        MissingDependency: It is not installed; the message holds the command that installs it.
    """
    spec = find_spec(package)
    if spec is None or spec.origin is None or not spec.submodule_search_locations:  # no origin: a folder of that name
        raise MissingDependency(
            f'{use} needs the package {package}, which is not installed. Run: pip install "qzoom-agent[{extra}]"'
        )
    return Path(spec.submodule_search_locations[0])


def obstacle() -> str:
    """Return why this Python cannot load the models of the package, and what to do; empty if it can."""
    if sys.flags.optimize > 1:
        return "Python strips docstrings (-OO, PYTHONOPTIMIZE=2), which transformers reads. Run it without."
    if not Path(__file__).is_file():
        return "The package is imported from a zip file, but its weights have to be files. Install it with pip."
    return ""
