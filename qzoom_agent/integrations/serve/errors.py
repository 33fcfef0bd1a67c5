"""Requests that cannot be answered."""

from __future__ import annotations

from qzoom_agent.errors import QzoomError


class RequestError(QzoomError):
    """A request that cannot be answered, with its HTTP status and OpenAI's code and type of the error."""

    def __init__(self, message: str, *, status: int = 400, code: str | None = None, param: str | None = None) -> None:
        super().__init__(message)
        self.status, self.code, self.param = status, code, param

    @property
    def type(self) -> str:
        """OpenAI's type of the error."""
        known = {401: "authentication_error", 404: "not_found_error", 429: "rate_limit_error"}
        return known.get(self.status, "server_error" if self.status >= 500 else "invalid_request_error")
