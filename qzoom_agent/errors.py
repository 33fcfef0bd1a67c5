"""The errors of this package, one class for each boundary.

A message says what happened, what was given and what to do; the command line prints it without a traceback and exits
with `exit_code`. Text that a model writes never raises: it becomes a reply to the model and an entry on the trace.
"""

import sys
from collections.abc import Callable


class QzoomError(Exception):
    """Base class of every error that this package raises on purpose."""

    exit_code: int = 1


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


class MissingDependency(QzoomError):
    """An optional package that is not installed; the message holds the command that installs it."""

    exit_code = 4


def describe_error(error: Exception) -> str:
    """Return the message of an error; of a foreign one, with its class."""
    return str(error) if isinstance(error, QzoomError) else f"{type(error).__name__}: {error}"


def finished(name: str, main: Callable[[], int]) -> int:
    """Run `main` as the command `name` and return its exit code; print our errors without a traceback."""
    try:
        return main()
    except QzoomError as error:
        print(f"{name}: {error}", file=sys.stderr)
        return error.exit_code
