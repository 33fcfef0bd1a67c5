"""One request to an OpenAI-compatible server: JSON there and back, sent again while that may help."""

import json
import os
import time
from collections.abc import Callable
from http.client import HTTPException
from typing import Any, Final
from urllib.error import HTTPError
from urllib.request import Request, urlopen

_BUSY: Final = frozenset({408, 409, 429, 500, 502, 503, 504})
"""Statuses after which the same request may succeed."""


class NoReply(Exception):
    """The server gave no JSON; its words say why. Callers tell the user what to do about it."""


def post(
    url: str,
    body: dict[str, Any],
    *,
    key_variable: str,
    timeout: float,
    attempts: int,
    first_pause: float,
    sleep: Callable[[float], None] = time.sleep,
) -> Any:
    """The server's answer to a request.

    Args:
        key_variable: environment variable with the key; without it none is sent.
        timeout: seconds to wait for one reply.
        attempts: how often the request is sent before its failure counts.
        first_pause: seconds before it is sent again; doubled each time.
    Raises:
        NoReply: every attempt failed, or one in a way that will not pass.
    """
    key = os.environ.get(key_variable, "").strip()  # a line break would be refused with an error that shows the key
    headers = {"Content-Type": "application/json", **({"Authorization": f"Bearer {key}"} if key else {})}
    request = Request(url, json.dumps(body).encode(), headers)
    for attempt in range(attempts):
        if attempt:
            sleep(first_pause * 2 ** (attempt - 1))
        try:
            with urlopen(request, timeout=timeout) as response:
                return json.load(response)
        except HTTPError as error:
            reason = f"{error} {_said(error)}".strip()
            if error.code not in _BUSY:
                break
        except (OSError, HTTPException, ValueError) as error:
            reason = str(error)
    raise NoReply(reason)


def _said(error: HTTPError) -> str:
    try:
        return error.read(300).decode("utf-8", "replace")
    except (OSError, HTTPException):
        return ""
