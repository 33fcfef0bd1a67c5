"""Old module names, kept until version 0.3: importing one works, and warns with the new name.

`python -m OLD` runs the new module too. Nothing here is imported before an old name is used.
"""

from __future__ import annotations

import sys
import warnings
from importlib import import_module
from importlib.abc import InspectLoader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

MOVED = {
    "qzoom_agent.backends": "qzoom_agent.models",
    "qzoom_agent.backends.hf": "qzoom_agent.models.hf",
    "qzoom_agent.evals.lmms_plugin": "qzoom_agent.integrations.lmms_eval",
    "qzoom_agent.evals.scoring.judge": "qzoom_agent.evaluation.scorers.judge",
    "qzoom_agent.evals.suites.base": "qzoom_agent.data.samples",
    "qzoom_agent.evals.suites.catalog": "qzoom_agent.evaluation.tasks.catalog",
    "qzoom_agent.evals.suites.needle": "qzoom_agent.evaluation.tasks.needle",
    "qzoom_agent.rl.branches.run": "qzoom_agent.training.branches.stages",
    "qzoom_agent.rl.branches.ship": "qzoom_agent.training.branches.export",
    "qzoom_agent.rl.coldstart.run": "qzoom_agent.training.sft.fine_tune",
    "qzoom_agent.rl.grpo": "qzoom_agent.training.grpo",
    "qzoom_agent.tools": "qzoom_agent.zoom",
}
"""New module of each old name that the documentation used."""
RENAMED = {"Settings": "SamplingParams", "Source": "TaskSource", "SUITES": "TASKS", "find_suite": "find_task"}
"""New name of each class that the documentation imported from these modules."""
_PACKAGES = {name.rpartition(".")[0] for name in MOVED} - {"qzoom_agent"}


def warn(old: str, *, stacklevel: int) -> None:
    """Warn that the module `old` has another name."""
    text = f"The module {old} is now {MOVED[old]}; the old name goes in qzoom-agent 0.3."
    warnings.warn(text, DeprecationWarning, stacklevel + 1)


class _Finder(MetaPathFinder, InspectLoader):
    """A finder of the names in `MOVED`, and of the packages that hold them."""

    def find_spec(self, fullname: str, path: object, target: object = None) -> ModuleSpec | None:
        known = fullname in MOVED or fullname in _PACKAGES
        return ModuleSpec(fullname, self, is_package=fullname in _PACKAGES) if known else None

    def exec_module(self, module: ModuleType) -> None:
        old = module.__name__
        if old not in MOVED:
            return
        warn(old, stacklevel=2)  # of the importing line: frames of importlib do not count
        new = import_module(MOVED[old])

        def find(name: str) -> Any:
            if name == "__path__":  # or Python would look for submodules under the old name
                raise AttributeError(name)
            return getattr(new, RENAMED.get(name, name))

        module.__dict__.update(__doc__=new.__doc__, __getattr__=find, __dir__=lambda: dir(new))

    def get_source(self, fullname: str) -> str:
        """Return what `python -m` of an old name runs."""
        run = f"runpy.run_module({MOVED[fullname]!r}, run_name='__main__', alter_sys=True)"
        return f"import runpy, qzoom_agent.moved\nqzoom_agent.moved.warn({fullname!r}, stacklevel=1)\n{run}\n"


def install() -> None:
    """Make old names importable."""
    sys.meta_path.append(_Finder())
