"""Spans of runs by OpenTelemetry's conventions for generative AI, where its API is installed (extra `[otel]`).

    invoke_agent qzoom          a run
        chat MODEL              each turn that the model is asked for
        execute_tool NAME       each call that was served or refused

Spans go to the tracer provider that the program sets up. They hold names, settings, tokens and outcomes: never the
question, an image or what the model wrote.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import cache
from importlib.util import find_spec
from typing import Any, Final, Literal

from qzoom_agent.errors import ReaderLeft
from qzoom_agent.trace import QuestionRecord

Operation = Literal["invoke_agent", "chat", "execute_tool"]
AGENT: Final = "qzoom"


class Span:
    """A span under way, or nothing without OpenTelemetry."""

    def __init__(self, span: Any = None) -> None:
        self.span = span

    def set(self, attributes: Mapping[str, Any]) -> None:
        """Add attributes, without those that are None."""
        if self.span is not None:
            self.span.set_attributes({key: value for key, value in attributes.items() if value is not None})

    def fail(self, reason: str) -> None:
        """Mark the operation as failed; `reason` is the class of an error or a short code."""
        if self.span is not None:
            from opentelemetry.trace import Status, StatusCode

            self.span.set_status(Status(StatusCode.ERROR))
            self.span.set_attribute("error.type", reason)


@contextmanager
def span(
    operation: Operation, name: str, attributes: Mapping[str, Any] | None = None, *, parent: Span | None = None
) -> Iterator[Span]:
    """Open a span that ends with the block; an exception marks it as failed, but not that the reader of a stream left.

    Args:
        attributes: By their conventional names; those that are None are left out.
        parent: The span that it belongs to; None: the program's current one.
    """
    if not installed():
        yield Span()
        return
    from opentelemetry import trace

    tracer = trace.get_tracer("qzoom_agent")
    inside = None if parent is None or parent.span is None else trace.set_span_in_context(parent.span)
    opened = Span(tracer.start_span(f"{operation} {name}", context=inside))
    opened.set({"gen_ai.operation.name": operation, **(attributes or {})})
    try:
        yield opened
    except (GeneratorExit, ReaderLeft):
        raise
    except BaseException as error:
        opened.fail(type(error).__name__)
        raise
    finally:
        opened.span.end()


def describe_run(run: Span, record: QuestionRecord | None, *, id: str) -> None:
    """Write the outcome and the cost of a run on its span; None: a person has to decide before it goes on."""
    run.set({"gen_ai.conversation.id": id, "gen_ai.agent.name": AGENT})
    if record is not None:
        usage = record.usage
        run.set(
            {
                "gen_ai.usage.input_tokens": usage.prompt_tokens,
                "gen_ai.usage.output_tokens": usage.written_tokens,
                "qzoom.usage.visual_tokens": usage.visual_tokens,
                "qzoom.status": record.status,
            }
        )
        if record.error:
            run.fail("_OTHER")  # its class is on the span of the turn that failed


@cache
def installed() -> bool:
    """Return True if OpenTelemetry's API is there to record spans."""
    return find_spec("opentelemetry") is not None and find_spec("opentelemetry.trace") is not None
