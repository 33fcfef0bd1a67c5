"""Calls and streams in threads, for code that runs in an event loop."""

import asyncio
from collections.abc import AsyncGenerator, Callable, Iterator
from concurrent.futures import Executor
from contextlib import closing
from contextvars import copy_context
from functools import partial
from threading import Event as Flag
from typing import Any, TypeVar

T = TypeVar("T")


async def result_of(work: Callable[[], T], *, threads: Executor | None = None) -> T:
    """Return the result of a function that runs in one of `threads`, with the context variables of this task."""
    return await asyncio.get_running_loop().run_in_executor(threads, partial(copy_context().run, work))


async def events_of(stream: Iterator[T], *, threads: Executor | None = None) -> AsyncGenerator[T]:
    """Yield what a generator yields, which one of `threads` runs from its first item to its last.

    Where the receiver stops early or is cancelled, the generator is closed at its next item. Its errors are raised
    here.
    """
    loop, items, left = asyncio.get_running_loop(), asyncio.Queue[Any](), Flag()
    end = object()

    def follow() -> None:
        try:
            with closing(stream):  # type: ignore[type-var]
                for item in stream:
                    loop.call_soon_threadsafe(items.put_nowait, item)
                    if left.is_set():
                        break
        finally:
            loop.call_soon_threadsafe(items.put_nowait, end)

    thread = loop.run_in_executor(threads, follow)
    try:
        while (item := await items.get()) is not end:
            yield item
    finally:
        left.set()
        await thread
