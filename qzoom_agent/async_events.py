"""Calls and streams in threads, for code that runs in an event loop."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Callable, Coroutine, Iterator
from concurrent.futures import Executor, Future
from contextlib import closing
from contextvars import copy_context
from functools import partial
from threading import Event as Flag
from typing import Any, TypeVar

from qzoom_agent.errors import ReaderLeft

T = TypeVar("T")


class Receiver:
    """Code in an event loop that waits for work in threads, as these see it."""

    def __init__(self, threads: Executor | None = None) -> None:
        """`threads` do the work; None: those of the loop."""
        self.threads, self._left = threads, Flag()
        self._loop: asyncio.AbstractEventLoop | None = None
        self._awaited = set[Future[Any]]()

    @property
    def left(self) -> bool:
        """True once nobody waits any longer."""
        return self._left.is_set()

    def enter(self) -> asyncio.AbstractEventLoop:
        """Return the running event loop, which is the one that waits."""
        self._loop = asyncio.get_running_loop()
        return self._loop

    def require(self) -> None:
        """Raise ReaderLeft if nobody waits any longer."""
        if self.left:
            raise ReaderLeft("The task that waited for this run was cancelled.")

    def leave(self) -> None:
        """Note that nobody waits any longer, and cancel what the threads have awaited here."""
        self._left.set()
        for coming in list(self._awaited):
            coming.cancel()

    def awaited(self, coroutine: Coroutine[Any, Any, T]) -> T:
        """Return the result of a coroutine of the event loop; called in a thread."""
        assert self._loop is not None
        coming = asyncio.run_coroutine_threadsafe(coroutine, self._loop)
        self._awaited.add(coming)
        if self.left:
            coming.cancel()
        try:
            return coming.result()
        finally:
            self._awaited.discard(coming)


async def result_of(work: Callable[[], T], receiver: Receiver) -> T:
    """Return the result of a function that runs in a thread, with the context variables of this task.

    A cancelled task does not wait for it; the function is told by `receiver`.
    """
    try:
        return await receiver.enter().run_in_executor(receiver.threads, partial(copy_context().run, work))
    finally:
        receiver.leave()


async def events_of(stream: Iterator[T], receiver: Receiver) -> AsyncGenerator[T]:
    """Yield what a generator yields, which a thread runs from its first item to its last, in this task's context.

    Where the receiver stops early or is cancelled, the generator is closed at its next item, and its errors count no
    longer. Else they are raised here.
    """
    loop, items, end = receiver.enter(), asyncio.Queue[Any](), object()

    def follow() -> None:
        try:
            with closing(stream):  # type: ignore[type-var]
                for item in stream:
                    loop.call_soon_threadsafe(items.put_nowait, item)
                    if receiver.left:
                        break
        finally:
            loop.call_soon_threadsafe(items.put_nowait, end)

    thread = loop.run_in_executor(receiver.threads, partial(copy_context().run, follow))
    # Python warns of an error that nobody has seen, also where this is cancelled once more while it waits below.
    thread.add_done_callback(lambda done: done.cancelled() or done.exception())
    try:
        while (item := await items.get()) is not end:
            yield item
        await thread
    finally:
        receiver.leave()
        await asyncio.wait([thread])
