"""Every task by its name."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from difflib import get_close_matches
from pathlib import Path
from typing import Any, Final

from qzoom_agent.errors import ConfigError
from qzoom_agent.evaluation.tasks.custom import custom_task
from qzoom_agent.evaluation.tasks.documents import DOCUMENTS
from qzoom_agent.evaluation.tasks.hrbench import HR_BENCH
from qzoom_agent.evaluation.tasks.mme import MME
from qzoom_agent.evaluation.tasks.needle.tasks import NEEDLE
from qzoom_agent.evaluation.tasks.probes import PROBES
from qzoom_agent.evaluation.tasks.task import Task
from qzoom_agent.evaluation.tasks.treebench import TREEBENCH
from qzoom_agent.evaluation.tasks.vstar import VSTAR

TASKS: Final[Mapping[str, Task]] = {
    task.name: task for task in (*NEEDLE, VSTAR, *HR_BENCH, *MME, *DOCUMENTS, TREEBENCH, *PROBES)
}


def find_task(name: str) -> Task:
    """The task of this name, or the user's own task in the file or folder of this path.

    A name goes before a path: write ./chartqa for a folder of yours. ConfigError if it is neither.
    """
    if name in TASKS:
        return TASKS[name]
    if Path(name).expanduser().exists():
        return custom_task(Path(name).expanduser())
    close = get_close_matches(name.lower(), TASKS, n=3, cutoff=0.5)
    hint = f" Did you mean {' or '.join(close)}?" if close else ""
    raise ConfigError(
        f"There is no task {name!r}, and no file or folder of that name.{hint} Tasks: {', '.join(TASKS)}."
    )


def __getattr__(name: str) -> Any:
    """Serve the names of earlier versions, with a warning."""
    if name in ("SUITES", "find_suite"):
        new = {"SUITES": "TASKS", "find_suite": "find_task"}[name]
        warnings.warn(f"{name} is called {new}", DeprecationWarning, stacklevel=2)
        return globals()[new]
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
