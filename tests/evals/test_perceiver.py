"""The measurement of perceivers: every way of asking is a configuration that can be run, and requests are counted."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from perceiver import ARMS, agent_of, count_sent
from qzoom_agent.models.scripted import ScriptedBackend
from qzoom_agent.trace import PerceptionRecord


@pytest.mark.parametrize("arm", [arm for arm in ARMS if arm != "local"])
def test_every_way_of_asking_is_a_configuration(arm: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    looking = ScriptedBackend([], name="nano", looks=lambda messages: [PerceptionRecord(view="coarse")])
    monkeypatch.setattr("qzoom_agent.models.hf.load_backend", lambda model, **how: looking)
    agent = agent_of(arm, "http://127.0.0.1:9/v1", "served")
    backend: Any = agent.backend
    assert agent.config.policy == ARMS[arm]["policy"]
    assert agent.config.perceiver == ARMS[arm].get("perceiver")

    def complete(messages: Any, **fields: Any) -> None:
        raise RuntimeError("asked")

    backend.client.complete = complete
    count_sent(agent, tmp_path / "sent")
    answer = agent.run(Image.new("RGB", (600, 400)), "which?")
    assert answer.status == "error" and "asked" in str(answer.trace.error)
    assert (tmp_path / "sent").read_text() == f"{answer.trace.views[1].tokens}\n"
