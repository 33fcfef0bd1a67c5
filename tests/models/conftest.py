"""Tiny random models with untrained branches."""

from tests.perception.conftest import _one_thread, load

__all__ = ["_one_thread", "load"]
