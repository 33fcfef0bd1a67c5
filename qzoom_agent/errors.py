"""The errors of this package, one class for each boundary.

A message says what happened, what was given and what to do; the command line prints it without a traceback and exits
with `exit_code`. Text that a model writes never raises: it becomes a reply to the model and an entry on the trace.

Errors become text here alone, without secrets: those made known by `hide_secret`, and those in an address.
"""

import os
import re
import select
import sys
import unicodedata
from collections.abc import Callable
from typing import Final, TextIO

_SHORTEST_SECRET: Final = 6
"""Length from which a secret is masked; shorter ones, such as EMPTY, are placeholders that occur in ordinary text."""
_SECRETS: Final = set[str]()
_UNSEEN: Final = frozenset({"Cc", "Cf", "Cs", "Co", "Zl", "Zp"})
_IN_ADDRESS: Final = re.compile(
    r"(?<=://)\S{1,300}(?=@)"
    r"|(?<=[?&])(?P<field>[\w.-]{0,40}(?:key|token|secret|passw|sig|auth)[\w.-]{0,40}=)[^\s&#'\"]+"
    r"|\b(?P<scheme>Bearer )[\w.~+/=-]{6,}",
    re.IGNORECASE,
)


def hide_secret(secret: str) -> None:
    """Mask this text, a key or a password, in every error and reply of this process from now on."""
    if len(secret) >= _SHORTEST_SECRET:
        _SECRETS.add(secret)


def mask_secrets(text: str) -> str:
    """Return the text with every hidden secret replaced by ***."""
    for secret in sorted(_SECRETS, key=len, reverse=True):
        text = text.replace(secret, "***")
    return text


def secret_begins(text: str) -> int:
    """Return how many characters at the end of a text may be the beginning of a hidden secret."""
    return max((n for secret in _SECRETS for n in range(1, len(secret)) if text.endswith(secret[:n])), default=0)


def redact(text: str) -> str:
    """Return the text of an error without hidden secrets, and without keys and passwords of an address or header."""
    return _IN_ADDRESS.sub(lambda found: f"{found['field'] or found['scheme'] or ''}***", mask_secrets(text))


def visible(text: str) -> str:
    """Return the text with control characters as escapes such as \\x1b, so that it cannot steer a terminal.

    Line breaks, tabs, and the spaces and joiners of all scripts stay.
    """
    return "".join(repr(char)[1:-1] if is_unseen(char) and char not in "\n\t" else char for char in text)


def is_unseen(char: str) -> bool:
    """Return whether a character is one that a screen hides or obeys: control, direction, private or half a pair."""
    # Joiners carry meaning in emoji and in several scripts and cannot reorder a line.
    return unicodedata.category(char) in _UNSEEN and char not in "\u200c\u200d"


class QzoomError(Exception):
    """Base class of every error that this package raises on purpose."""

    exit_code: int = 1

    def __str__(self) -> str:
        return redact(super().__str__())


class ImageError(QzoomError):
    """An image that cannot be read or is over a limit, or stored pixels that are gone or changed."""

    exit_code = 2


class BoxError(QzoomError):
    """A box whose frame, view or numbers do not fit its use."""

    exit_code = 2


class ConfigError(QzoomError):
    """A setting, or a combination of settings, that cannot work."""

    exit_code = 2


class TraceError(QzoomError):
    """A saved trace that cannot be read or written."""

    exit_code = 2


class BackendError(QzoomError):
    """A model that could not be loaded or failed to answer."""

    exit_code = 4


class ReaderLeft(BackendError):
    """Nobody waits for a run any longer, so it was stopped. Nothing failed."""


class MissingDependency(QzoomError):
    """An optional package that is not installed; the message holds the command that installs it."""

    exit_code = 4


def describe_error(error: BaseException) -> str:
    """Return the message of an error; of a foreign one, which may have none that can be read, with its class."""
    try:
        return redact(str(error) if isinstance(error, QzoomError) else f"{type(error).__name__}: {error}")
    except Exception:  # of a class whose own __str__ is broken
        return f"{type(error).__name__}: (it has no text that can be read)"


def finished(name: str, main: Callable[[], int]) -> int:
    """Run `main` as the command `name` and return its exit code; print our errors without a traceback."""
    try:
        return main()
    except KeyboardInterrupt as stopped:
        print(stopped.args[0] if stopped.args else "interrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:
        # The reader (`| head`) went away; Python would complain once more when it flushes the stream at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        if _unread(sys.stderr):  # by `2>&1 | head`: the work was not finished
            os.dup2(sys.stdout.fileno(), sys.stderr.fileno())
            return 128 + 13  # as of a program that SIGPIPE ended
        return 0
    except QzoomError as error:
        print(visible(f"{name}: {error}"), file=sys.stderr)
        return error.exit_code
    except OSError as error:
        print(visible(f"{name}: {error}. Check the path, its permissions and the free space."), file=sys.stderr)
        return 2


def _unread(stream: TextIO) -> bool:
    """Return whether a stream is a pipe whose reader went away."""
    if sys.platform == "win32":
        return False
    poll = select.poll()
    poll.register(stream.fileno(), 0)
    return any(events & select.POLLERR for _, events in poll.poll(0))
