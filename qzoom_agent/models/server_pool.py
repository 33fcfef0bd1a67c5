"""Several servers of one model, such as vLLM on several machines: conversations are spread over them.

A turn that one server fails goes to another, which a conversation loses nothing by: it is sent whole each time. A
server that failed where another did not is asked last for half a minute.
"""

from collections.abc import Sequence
from threading import Lock
from time import monotonic
from typing import Final

from qzoom_agent.errors import BackendError
from qzoom_agent.messages import Message
from qzoom_agent.models.interface import ImageSource, OnText, Reply, SamplingParams, Session
from qzoom_agent.models.server import ServerBackend

_REST: Final = 30.0
"""Seconds for which a server that failed is asked last."""


class ServerPool:
    """A model behind several servers."""

    perceives = False

    def __init__(self, servers: Sequence[ServerBackend]) -> None:
        """`servers` are asked for the same model in the same form; at least one."""
        first = servers[0]
        self.name, self.protocol, self.defaults = first.name, first.protocol, first.defaults
        self.settings, self.api, self.client = first.settings, first.api, first.client
        self.placement = f"{first.placement}, one of {len(servers)}"
        self.workers = sum(one.workers for one in servers)
        self._servers = list(servers)
        self._open = [0] * len(servers)
        self._rests = [0.0] * len(servers)
        self._lock = Lock()

    def session(self, image: ImageSource) -> Session:
        with self._lock:
            place = self._order()[0]
            self._open[place] += 1
        return _PooledSession(self, image, place)

    def _order(self, first: int | None = None) -> list[int]:
        """Return the places of the servers, best first: those that work, then those with the fewest conversations."""
        now = monotonic()
        return sorted(range(len(self._servers)), key=lambda at: (self._rests[at] > now, at != first, self._open[at]))

    def _moved(self, old: int, new: int | None, failed: Sequence[int] = ()) -> None:
        """Count a conversation at another server, or as closed."""
        with self._lock:
            self._open[old] -= 1
            if new is not None:
                self._open[new] += 1
            for at in failed:
                self._rests[at] = monotonic() + _REST


class _PooledSession:
    """One conversation, at one server as long as that works."""

    def __init__(self, pool: ServerPool, image: ImageSource, place: int) -> None:
        self._pool, self._image, self._place = pool, image, place
        self._sessions: dict[int, Session] = {}
        self._counted = True

    def reply(self, messages: Sequence[Message], *, settings: SamplingParams, on_text: OnText | None = None) -> Reply:
        pool, failed, said = self._pool, list[int](), False

        def hear(piece: str) -> None:
            nonlocal said
            said = True
            if on_text is not None:
                on_text(piece)

        fault: BackendError | None = None
        for place in pool._order(self._place):
            session = self._sessions.setdefault(place, pool._servers[place].session(self._image))
            try:
                reply = session.reply(messages, settings=settings, on_text=None if on_text is None else hear)
            except BackendError as error:
                if said:
                    raise  # the listener cannot unhear the beginning
                fault = fault or error
                failed.append(place)
                continue
            if failed:  # not the fault of the request
                pool._moved(self._place, place, failed)
                self._place = place
            return reply
        assert fault is not None
        raise fault

    def close(self) -> None:
        for session in self._sessions.values():
            session.close()
        self._sessions = {}
        if self._counted:
            self._pool._moved(self._place, None)
        self._counted = False
