"""Spans of a run, by OpenTelemetry's conventions for generative AI."""

from __future__ import annotations

import asyncio
from contextlib import aclosing, closing
from typing import Any

import pytest

from qzoom_agent.agent import Agent
from qzoom_agent.models.scripted import ScriptedBackend
from qzoom_agent.telemetry import Span, span
from tests.test_resume import IMAGE, SCRIPT, recording


def test_without_opentelemetry_nothing_is_recorded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("qzoom_agent.telemetry.installed", lambda: False)
    with span("chat", "nano", {"a": 1}, parent=Span()) as opened:
        opened.set({"b": 2})
        opened.fail("Error")
    assert opened.span is None
    assert Agent(recording([])).run(IMAGE, "What?").text == "42"


@pytest.fixture
def spans() -> Any:
    """The finished spans, by an exporter of OpenTelemetry's own."""
    export = pytest.importorskip("opentelemetry.sdk.trace.export.in_memory_span_exporter")
    from opentelemetry import trace
    from opentelemetry.sdk.trace import TracerProvider
    from opentelemetry.sdk.trace.export import SimpleSpanProcessor

    exporter = export.InMemorySpanExporter()
    if not isinstance(trace.get_tracer_provider(), TracerProvider):
        trace.set_tracer_provider(TracerProvider())
    provider: Any = trace.get_tracer_provider()
    provider.add_span_processor(SimpleSpanProcessor(exporter))
    return exporter.get_finished_spans


def test_a_run_has_a_span_and_its_turns_and_calls_have_theirs(spans: Any) -> None:
    answer = Agent(recording([]), policy="explicit").run(IMAGE, "What?")
    (run,) = [one for one in spans() if one.name == "invoke_agent qzoom"]
    chats = [one for one in spans() if one.name == "chat scripted"]
    tools = [one for one in spans() if one.name.startswith("execute_tool ")]
    assert len(chats) == len(SCRIPT) and len(tools) == len(SCRIPT) - 1
    assert all(one.parent.span_id == run.context.span_id for one in (*chats, *tools))
    assert {one.attributes["gen_ai.operation.name"] for one in (run, *chats, *tools)} == {
        "invoke_agent",
        "chat",
        "execute_tool",
    }
    assert run.attributes["gen_ai.conversation.id"] == answer.trace.id
    assert run.attributes["gen_ai.usage.output_tokens"] == answer.usage.written_tokens
    assert run.attributes["gen_ai.usage.input_tokens"] == sum(
        one.attributes["gen_ai.usage.input_tokens"] for one in chats
    )
    assert list(chats[0].attributes["gen_ai.response.finish_reasons"]) == ["stop"]
    assert [one.attributes["qzoom.tool.decision"] for one in tools] == [
        call.decision for turn in answer.trace.turns for call in turn.calls
    ]
    assert all(one.attributes["gen_ai.tool.name"] for one in tools)
    said = " ".join(str(one.attributes) for one in spans())
    assert "What?" not in said and "42" not in said.split(answer.trace.id), "no content"


def test_known_attributes_have_their_conventional_names(spans: Any) -> None:
    conventions = pytest.importorskip("opentelemetry.semconv._incubating.attributes.gen_ai_attributes")
    known = {value for name, value in vars(conventions).items() if name.startswith("GEN_AI_")}
    Agent(recording([]), policy="explicit").run(IMAGE, "What?")
    used = {key for one in spans() for key in one.attributes if key.startswith("gen_ai.")}
    assert used <= known


@pytest.mark.parametrize("awaited", [False, True])
def test_a_run_whose_reader_leaves_has_not_failed(awaited: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("opentelemetry.trace")
    failed, agent = list[str](), Agent(recording([]), policy="explicit")
    monkeypatch.setattr(Span, "fail", lambda self, reason: failed.append(reason))

    async def leave() -> None:
        async with aclosing(agent.astream(IMAGE, "What?")) as events:
            async for event in events:
                if event.kind == "token":
                    return

    if awaited:
        asyncio.run(leave())
    else:
        with closing(agent.stream(IMAGE, "What?")) as events:  # type: ignore[type-var]
            next(event for event in events if event.kind == "token")
    assert failed == []


def test_a_failed_turn_is_an_error(spans: Any) -> None:
    Agent(ScriptedBackend([]), policy="direct").run(IMAGE, "What?")
    run, chat = ([one for one in spans() if one.name.startswith(name)][-1] for name in ("invoke_agent", "chat"))
    assert {one.status.status_code.name for one in (run, chat)} == {"ERROR"}
    assert (run.attributes["error.type"], chat.attributes["error.type"]) == ("_OTHER", "BackendError")
