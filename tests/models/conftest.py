"""Tiny random models with untrained branches, and a server that misbehaves."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from qzoom_agent.models import chat_client
from qzoom_agent.models import server as module
from tests.models.misbehaving import KEY, Misbehaving
from tests.perception.conftest import load

__all__ = ["load"]


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[Misbehaving]:
    monkeypatch.setattr(module, "_PAUSE", 0.01)
    monkeypatch.setattr(chat_client, "_GRACE", 0.2)
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    with Misbehaving() as playing:
        yield playing
