"""Every suite by its name."""

from __future__ import annotations

from collections.abc import Mapping
from difflib import get_close_matches
from pathlib import Path
from typing import Final

from qzoom_agent.errors import ConfigError
from qzoom_agent.evaluation.tasks.custom import own_suite
from qzoom_agent.evaluation.tasks.documents import DOCUMENTS
from qzoom_agent.evaluation.tasks.hrbench import HR_BENCH
from qzoom_agent.evaluation.tasks.mme import MME
from qzoom_agent.evaluation.tasks.needle.suite import NEEDLE
from qzoom_agent.evaluation.tasks.probes import PROBES
from qzoom_agent.evaluation.tasks.task import Suite
from qzoom_agent.evaluation.tasks.treebench import TREEBENCH
from qzoom_agent.evaluation.tasks.vstar import VSTAR

SUITES: Final[Mapping[str, Suite]] = {
    suite.name: suite for suite in (*NEEDLE, VSTAR, *HR_BENCH, *MME, *DOCUMENTS, TREEBENCH, *PROBES)
}


def find_suite(name: str) -> Suite:
    """The suite of this name, or the user's own suite in the file or folder of this path.

    A name goes before a path: write ./chartqa for a folder of yours. ConfigError if it is neither.
    """
    if name in SUITES:
        return SUITES[name]
    if Path(name).expanduser().exists():
        return own_suite(Path(name).expanduser())
    close = get_close_matches(name.lower(), SUITES, n=3, cutoff=0.5)
    hint = f" Did you mean {' or '.join(close)}?" if close else ""
    raise ConfigError(
        f"There is no suite {name!r}, and no file or folder of that name.{hint} Suites: {', '.join(SUITES)}."
    )
