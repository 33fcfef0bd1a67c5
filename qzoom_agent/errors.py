"""What can go wrong for a user, one class a boundary crossed.

Every error says what happened, what was given and what to do, and the command line prints it without a traceback and
exits with its `exit_code`. Errors are for *user* input and for the machine the run depends on; what a *model* writes
never raises, it becomes text that the model reads and an entry on the trace.
"""

import sys
from collections.abc import Callable


class QzoomError(Exception):
    """Base of every error this package raises on purpose."""

    exit_code: int = 1


class ImageError(QzoomError):
    """An image cannot be read, is over a limit, or its stored pixels are gone or changed."""

    exit_code = 2


class BoxError(QzoomError):
    """A box is used where its frame or view does not fit, or its numbers are not numbers."""

    exit_code = 2


class ConfigError(QzoomError):
    """A setting, or a combination of settings, that cannot work."""

    exit_code = 2


class TraceError(QzoomError):
    """A saved trace cannot be read."""

    exit_code = 2


class BackendError(QzoomError):
    """A model could not be loaded or failed to answer."""

    exit_code = 4


class MissingDependency(QzoomError):
    """An optional package is not installed; the message holds the command that installs it."""

    exit_code = 4


def finished(name: str, main: Callable[[], int]) -> int:
    """The exit code of a command that is run as a module; an error of ours is printed, without a traceback."""
    try:
        return main()
    except QzoomError as error:
        print(f"{name}: {error}", file=sys.stderr)
        return error.exit_code
