"""Requests with native tools, and the replies that the tests play, are of the types in the openai package of vLLM."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path
from typing import Any

import pytest

from tests.engines.test_engines import ENGINES, pytestmark
from tests.models.conftest import server
from tests.models.misbehaving import Misbehaving
from tests.models.replies import call, events, turn
from tests.models.test_native_tools import ask, play

__all__ = ["pytestmark", "server"]


@pytest.mark.parametrize("api", ["chat", "responses"])
def test_requests_and_replies_are_of_the_types_of_the_openai_package(server: Misbehaving, api: str) -> None:
    replies = [
        turn(api, "I look.", call(0), call(1, "{broken"), thought=True),
        turn(api, "Let me", call(0, '{"bbox', id="call_7"), cut=True),
        turn(api, "It says 42."),
    ]
    play(server, api, *replies)
    assert ask(server, api).text == "It says 42." and len(server.requests) == 3
    conversation = "messages" if api == "chat" else "input"
    told: list[tuple[str, Any]] = []
    for one in server.requests:
        told += [(conversation, one.body[conversation]), (f"{api} tools", one.body["tools"])]
    for reply in replies:
        told.append((f"{api} reply", reply))
        told += [("chat chunk" if api == "chat" else "responses event", event) for event in events(api, reply)]
    checked = subprocess.run(
        [ENGINES / "bin" / "python", Path(__file__).with_name("openai_types.py")],
        input=json.dumps(told),
        capture_output=True,
        text=True,
        check=True,
    )
    assert not checked.stdout, checked.stdout
