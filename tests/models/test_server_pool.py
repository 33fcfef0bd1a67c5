"""Several servers of one model: conversations are spread, and what one server fails goes to another."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
from PIL import Image

from qzoom_agent.agent import Agent
from qzoom_agent.errors import BackendError, ConfigError
from qzoom_agent.models.scripted import ScriptedBackend
from qzoom_agent.models.server import ServerPool

IMAGE = Image.new("RGB", (168, 112))


class Server(ScriptedBackend):
    """A server that counts what it is asked, and perhaps is down."""

    def __init__(self, name: str, asked: Counter[str]) -> None:
        self.down, self.asked = False, asked
        super().__init__(self._answer, protocol="plain", name="model")
        self.label, self.workers, self.settings, self.api, self.placement = (
            name,
            2,
            dict[str, Any](),
            "chat",
            "a server",
        )
        self.client: Any = type("Client", (), {"owner": "vllm"})

    def _answer(self, _: Any) -> str:
        self.asked[self.label] += 1
        if self.down:
            raise BackendError(f"{self.label} is down.")
        return "42"


@pytest.fixture
def asked() -> Counter[str]:
    return Counter()


@pytest.fixture
def servers(asked: Counter[str]) -> list[Any]:
    return [Server(name, asked) for name in "abc"]


def test_runs_are_spread_evenly(servers: list[Any], asked: Counter[str]) -> None:
    agent = Agent(ServerPool(servers), policy="direct")
    assert agent.backend.workers == 6
    sessions = [agent.backend.session(lambda _: IMAGE) for _ in range(6)]
    assert sorted(session._place for session in sessions) == [0, 0, 1, 1, 2, 2]
    for session in sessions:
        session.close()
        session.close()
    assert agent.backend._open == [0, 0, 0]
    assert [answer.text for answer in agent.batch([(IMAGE, "what?")] * 12)] == ["42"] * 12
    assert asked.total() == 12


def test_a_server_that_is_down_gets_no_more_than_one_conversation_at_a_time(
    servers: list[Any], asked: Counter[str]
) -> None:
    servers[0].down = True
    agent = Agent(ServerPool(servers), policy="direct")
    assert [agent.run(IMAGE, "what?").status for _ in range(9)] == ["answered"] * 9
    assert asked["a"] == 1 and asked["b"] + asked["c"] == 9


def test_a_request_that_all_servers_refuse_fails_and_no_server_is_blamed(
    servers: list[Any], asked: Counter[str]
) -> None:
    for one in servers:
        one.down = True
    agent = Agent(ServerPool(servers), policy="direct")
    answer = agent.run(IMAGE, "what?")
    assert answer.status == "error" and "a is down" in (answer.trace.error or "")
    assert asked == Counter("abc") and agent.backend._rests == [0.0] * 3


def test_a_turn_that_was_heard_in_part_is_not_begun_again(servers: list[Any]) -> None:
    def breaks(messages: Any, *, settings: Any, on_text: Any = None) -> Any:
        on_text("4")
        raise BackendError("The connection broke.")

    pool = ServerPool(servers)
    session: Any = pool.session(lambda _: IMAGE)
    session._sessions = {place: type("Broken", (), {"reply": staticmethod(breaks)})() for place in range(3)}
    heard: list[str] = []
    with pytest.raises(BackendError, match="broke"):
        session.reply([], settings=None, on_text=heard.append)
    assert heard == ["4"]


def test_an_agent_takes_several_addresses() -> None:
    agent = Agent.from_server(["http://one:8000/v1", "http://two:8000/v1"], model="qwen3-vl-4b", concurrency=3)
    assert (
        agent.backend.workers == 6
        and agent.backend.name == Agent.from_server("http://one:8000/v1", model="qwen3-vl-4b").backend.name
    )
    with pytest.raises(ConfigError, match="no server in the list"):
        Agent.from_server([], model="qwen3-vl-4b")
