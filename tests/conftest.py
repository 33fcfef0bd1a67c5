"""Settings of every test run: the same examples each time, and one thread of torch for each worker."""

import gc
import os
from contextlib import suppress
from importlib import import_module
from pathlib import Path

import pytest
from hypothesis import settings

# Before torch is imported: the workers of pytest-xdist share the cores, and so do the processes that tests start.
# Runs that are compared bit for bit need one thread, too.
os.environ["OMP_NUM_THREADS"] = "1"
# Until the tests begin: what is imported stays, and the collector would look through all of it again and again.
gc.disable()
settings.register_profile("fixed", derandomize=True, deadline=None, max_examples=20)
settings.load_profile("fixed")


def pytest_sessionstart() -> None:
    """Let the second worker import the test modules from the last one on.

    Every worker imports all of them, and on a fresh clone pytest rewrites their assertions, which takes ten seconds. It
    keeps what it rewrote, so that two workers that begin at either end rewrite one half each.
    """
    if os.environ.get("PYTEST_XDIST_WORKER") == "gw1":
        for path in sorted(Path(__file__).parent.rglob("test_*.py"), reverse=True):
            with suppress(Exception, pytest.skip.Exception):  # what is wrong is told when they are collected
                import_module(".".join(path.relative_to(Path(__file__).parents[1]).with_suffix("").parts))


@pytest.hookimpl(tryfirst=True)
def pytest_runtestloop() -> None:
    """Let the garbage collector pass over what was imported: half a million objects, a fifth of the tests' time."""
    gc.freeze()
    gc.enable()
