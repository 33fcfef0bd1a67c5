"""Errors as OpenAI's clients read them: status and body of a reply that is no success."""

from __future__ import annotations

from typing import Any, Final

from fastapi import HTTPException
from fastapi.exceptions import RequestValidationError
from pydantic import BaseModel
from starlette.authentication import AuthenticationError
from starlette.exceptions import HTTPException as AnyHTTPException
from starlette.requests import ClientDisconnect

from qzoom_agent.errors import BackendError, MissingDependency, QzoomError, redact
from qzoom_agent.files import valid_unicode
from qzoom_agent.models.interface import TOO_LONG


class Left(Exception):
    """The client went away."""


class RequestError(QzoomError, HTTPException):  # type: ignore[misc,unused-ignore]
    """A request that cannot be answered, with its HTTP status and OpenAI's code of the error."""

    def __init__(self, message: str, *, status: int = 400, code: str | None = None, param: str | None = None) -> None:
        HTTPException.__init__(self, status, message)
        self.code, self.param = code or ("invalid_request" if status < 500 else "server_error"), param

    def __str__(self) -> str:
        return str(self.detail)  # Starlette's has the status before it

    @property
    def body(self) -> dict[str, Any]:
        """The body of the reply."""
        known = {401: "authentication_error", 404: "not_found_error", 429: "rate_limit_error"}
        kind = known.get(self.status_code, "invalid_request_error" if self.status_code < 500 else "server_error")
        # Half a surrogate pair in a name that the client sent cannot be written as UTF-8.
        message = valid_unicode(str(self))
        return {"error": {"message": message, "type": kind, "param": self.param, "code": self.code}}


class ErrorDetail(BaseModel):
    """An error as OpenAI's clients read it."""

    message: str
    type: str
    param: str | None = None
    code: str | None = None


class ErrorBody(BaseModel):
    """The body of a reply that is no success."""

    error: ErrorDetail


ERRORS: Final = {
    400: "The request is wrong",
    401: "The key is missing or wrong",
    403: "A web page from elsewhere asks a server without a key",
    404: "There is no such model, path or trace",
    408: "The body did not arrive in time",
    413: "The body is too large",
    429: "Too many requests wait",
    500: "The model failed",
    503: "The server is shutting down",
    504: "The answer took too long",
}
"""Description of each status."""


def failure(message: str) -> QzoomError:
    """Return the error of a failed episode; a question that is too long for the model is the client's."""
    if TOO_LONG in message:
        return RequestError(message, code="context_length_exceeded", param="messages")
    return BackendError(message)


def _wrong_request(error: RequestValidationError) -> RequestError:
    # of the forms that a part may have, the one that it comes closest to
    first = max(error.errors(), key=lambda one: len(one["loc"]))
    if first["type"] == "json_invalid":
        why = (first.get("ctx") or {}).get("error", "it cannot be read")
        return RequestError(f"The body is not JSON: {why}, at character {first['loc'][-1]}.")
    if first["loc"] == ("body",) and isinstance(error.body, bytes | str):
        return RequestError("The body was not sent as JSON. Give the header 'Content-Type: application/json'.")
    names = [str(part) for part in first["loc"] if part != "body" and not _is_form(part)]
    param = ".".join(one for one, before in zip(names, [None, *names], strict=False) if one != before)[:200] or None
    return RequestError(redact(f"The request is wrong: {param or 'body'}: {first['msg']}."), param=param)


def _is_form(part: object) -> bool:
    """Return whether a part of a location names one of several types, and not a key or a place."""
    return isinstance(part, str) and (part in ("str", "int", "float", "bool", "dict") or "[" in part)


def of_request(error: BaseException) -> RequestError:
    """Return any error as the one that a client is told."""
    if isinstance(error, RequestError):
        return error
    if isinstance(error, Left) or isinstance(error.__cause__, ClientDisconnect):  # also while it sent its body
        return RequestError("The client left.", status=500, code="left")
    if isinstance(error, AuthenticationError):
        message = "The key is missing or wrong. Send it as 'Authorization: Bearer KEY' (api_key of the client)."
        return RequestError(message, status=401, code="invalid_api_key")
    if isinstance(error, RequestValidationError):
        return _wrong_request(error)
    if isinstance(error, AnyHTTPException) and error.status_code == 400:  # FastAPI's, of a body that it cannot parse
        return RequestError("The body cannot be read. Send JSON in UTF-8 that is neither compressed nor nested deeply.")
    if isinstance(error, AnyHTTPException):
        code = "not_found_error" if error.status_code == 404 else "invalid_request_error"
        return RequestError(f"{error.detail}.", status=error.status_code, code=code)
    if isinstance(error, BackendError | MissingDependency):
        return RequestError(str(error), status=500)
    if isinstance(error, QzoomError):  # of the image or of a setting
        return RequestError(str(error))
    return RequestError("The server failed. Its log says more.", status=500)
