"""Files: every failure to read or write one is an error that says what to do; output is whole or not there.

Files being written are called `<name>.<32 hex digits>.part` and locked, so that those of a killed process can be told
from those of another that is still at work.
"""

from __future__ import annotations

import errno
import math
import os
import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from tempfile import TemporaryFile
from typing import IO, Any, TypeVar
from uuid import uuid4
from weakref import WeakSet

import yaml
from pydantic import TypeAdapter, ValidationError
from pydantic_core import from_json

from qzoom_agent.errors import ConfigError, QzoomError

_Data = TypeVar("_Data")
_PART = re.compile(r".+\.[0-9a-f]{32}\.part")
_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_MOST_REPEATED = 10_000_000
_LOCKED = WeakSet[IO[Any]]()
"""Files that this process has locked."""


@contextmanager
def translating(
    verb: str,
    path: Path | str,
    advice: str = "Check the path and its permissions.",
    *,
    error: type[QzoomError] = ConfigError,
) -> Iterator[None]:
    """Raise what the system says against reading or writing a file as an error of ours."""
    try:
        yield
    except OSError as failure:
        cause = failure.strerror or str(failure)
        if isinstance(failure, FileExistsError | NotADirectoryError):
            cause = "there is a file where a folder is needed"
        if failure.errno in _FULL:
            advice = "Free some space, then run it again."
        raise error(f"Cannot {verb} {path}: {cause}. {advice}") from failure
    except UnicodeDecodeError as failure:
        raise error(f"Cannot {verb} {path}: it is not UTF-8 text ({failure.reason}). {advice}") from failure


def valid_unicode(text: str) -> str:
    """Return a text that can be written as UTF-8: half a surrogate pair, or a byte of a file's name, is U+FFFD."""
    return text.encode("utf-16-le", "surrogatepass").decode("utf-16-le", "replace")


def expanded(path: Path | str) -> Path:
    """Return a path with the home folder in place of its ~; one such as ~$a.png, of no user here, as it is."""
    try:
        return Path(path).expanduser()
    except RuntimeError:  # there is no such user, or no home folder is known
        return Path(path)


def _named(path: Path | str, kind: str) -> Path:
    if path == "":  # such as "$OUT" in a script that has not set it
        raise ConfigError(f"The name of the {kind} to write is empty. Give one.")
    return Path(path)


def require_folder(path: Path | str) -> Path:
    """Return a folder to write into, made if there is none. Raises ConfigError if that is impossible."""
    path = _named(path, "folder")
    with translating("write into", path, "Choose another folder."):
        path.mkdir(parents=True, exist_ok=True)
        with TemporaryFile(dir=path):
            pass
    return path


def require_file(path: Path | str) -> Path:
    """Return a file to write, its folder made if there is none. Raises ConfigError if that is impossible."""
    path = _named(path, "file")
    with translating("write", path, "Choose another file."):
        if path.is_dir():
            raise ConfigError(f"Cannot write {path}: it is a folder. Give the path of a file.")
        if not path.exists():
            require_folder(path.parent)
    return path


def write_text(path: Path | str, text: str) -> Path:
    """Write a text file in one step, its folder made if there is none. Raises ConfigError if that is impossible."""
    path = require_file(path)
    with atomic_write(path) as part:
        part.write_text(text, encoding="utf-8")
    return path


def read_text(path: Path | str, advice: str = "Check the path.") -> str:
    """Return a UTF-8 text file. Raises ConfigError, with `advice` on what to do."""
    with translating("read", path, advice):
        return Path(path).read_text(encoding="utf-8")


def read_json(path: Path | str, kind: type[_Data], advice: str) -> _Data:
    """Return the content of a JSON file as `kind`. Raises ConfigError, with `advice` on what to do.

    Of a model with a `version`, "major.minor", a file of a later major version is refused.
    """
    with translating("read", path, advice):
        data = Path(path).read_bytes()
    if (ours := getattr(kind, "model_fields", {}).get("version")) is not None:
        with suppress(ValueError, AttributeError):  # is no JSON, or no mapping
            written = from_json(data).get("version")
            if version_numbers(written)[:1] > version_numbers(ours.default)[:1]:
                raise ConfigError(
                    f"Cannot read {path}: it has the format {written} of a later qzoom-agent, and this one reads "
                    f"{ours.default}. Install the release that wrote it."
                )
    try:
        return TypeAdapter(kind).validate_json(data)
    except ValidationError as error:
        fault = first_fault(error)
        raise ConfigError(f"Cannot read {path}: it is damaged or another file: {fault}. {advice}") from None
    except ConfigError as error:  # of a part that checks itself, such as a configuration
        raise ConfigError(f"Cannot read {path}: {error} {advice}") from None


def version_numbers(version: object) -> tuple[int, ...]:
    """Return the numbers of a version of a format, "major.minor"; empty for anything else."""
    found = re.fullmatch(r"(\d{1,6})\.(\d{1,6})", version) if isinstance(version, str) else None
    return tuple(map(int, found.groups())) if found else ()


def first_fault(error: ValidationError) -> str:
    """Return the first of the faults that pydantic found, on one line."""
    fault = error.errors(include_url=False, include_input=False)[0]
    where = ".".join(str(part) for part in fault["loc"])
    told = fault["msg"].removeprefix("Value error, ")  # which pydantic puts before messages of ours
    return f"{where}: {told}" if where else told


def read_yaml(text: str) -> Any:
    """Return the content of a YAML text. Raises ValueError if it is not YAML or holds an impossible value.

    A text may repeat a part by an alias, but not so often that the whole would fill the memory once it is written out.
    """
    try:
        if "&" in text and "*" in text and _written_out(yaml.compose(text, yaml.SafeLoader)) > _MOST_REPEATED:
            raise ValueError(
                f"its aliases (*) stand for more than {_MOST_REPEATED:,} characters, or contain themselves"
            )
        return yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise ValueError(str(error)) from None
    except RecursionError:
        raise ValueError("it is nested too deeply") from None


def _written_out(root: yaml.Node | None) -> float:
    """Return about how long a YAML document is with a copy in place of each alias; inf for an endless one."""
    sizes: dict[int, float] = {}

    def size(node: Any) -> float:
        if id(node) not in sizes:
            sizes[id(node)] = math.inf  # until it is known: an alias of itself
            if isinstance(node, yaml.MappingNode):
                sizes[id(node)] = sum(2 + size(key) + size(value) for key, value in node.value)
            elif isinstance(node, yaml.SequenceNode):
                sizes[id(node)] = sum(2 + size(one) for one in node.value)
            else:
                sizes[id(node)] = len(node.value)
        return sizes[id(node)]

    return 0 if root is None else size(root)


@contextmanager
def atomic_write(path: Path, *, tidy: bool = True, error: type[QzoomError] = ConfigError) -> Iterator[Path]:
    """Give a file beside `path` to write, which replaces it at the end; after an error nothing is left of it.

    Args:
        path: The file; its folder is made if there is none.
        tidy: Remove what killed processes left in the folder; for folders of many files call `remove_parts` once.
        error: Class of what is raised if the file cannot be written.

    A device, a pipe or a stream such as /dev/stdout is written itself: nothing may take its place.
    """
    if is_stream(path):
        with translating("write", path, "Choose another place.", error=error):
            yield path
        return
    part = path.with_name(f"{path.name}.{uuid4().hex}.part")
    with translating("write", path, "Choose another place.", error=error):
        path.parent.mkdir(parents=True, exist_ok=True)
        if tidy:
            remove_parts(path.parent)
        try:
            with _held(part):
                yield part
                part.replace(path)
        finally:
            part.unlink(missing_ok=True)


def is_stream(path: Path) -> bool:
    """Return whether a path is that of a device, a pipe or a stream such as /dev/stdout."""
    with suppress(OSError, ValueError):  # no file can have that name
        # Of /dev/stdout and /dev/fd/N, links to whatever the shell has opened, the link must stay.
        linked = path.is_symlink() and path.absolute().parts[1] in ("dev", "proc")
        return path.exists() and (linked or not path.is_file())
    return False


@contextmanager
def _held(part: Path) -> Iterator[None]:
    if sys.platform == "win32":  # where an open file cannot be replaced, nor removed by others
        yield
        return
    with part.open("wb") as file:
        with suppress(OSError):
            lock(file)
        yield


def remove_parts(folder: Path) -> None:
    """Remove the unfinished files that killed processes left in a folder."""
    with suppress(OSError):
        for path in folder.iterdir():
            if _PART.fullmatch(path.name):
                with suppress(OSError), open_lock(path) as file:
                    if lock(file):
                        path.unlink(missing_ok=True)


@contextmanager
def sole_writer(folder: Path, *, flag: str) -> Iterator[None]:
    """Keep other processes from writing into a folder, which is made if there is none; a killed one holds nothing.

    Raises ConfigError if another process writes there, or the folder cannot be written; `flag` names another one.
    """
    require_folder(folder)
    with translating("write into", folder, f"Choose another {flag}."):
        file = open_lock(folder / ".lock")
        held = lock(file)
    with file:
        if not held:
            raise ConfigError(f"Another process is writing into {folder}. Wait for it, or choose another {flag}.")
        yield


def open_lock(path: Path) -> IO[bytes]:
    """Open a file in order to lock it, made if there is none; its content stays.

    Raises:
        OSError: It cannot be opened, or is a link or a pipe: a folder from elsewhere may hold a link to any file.
    """
    if path.is_symlink():
        raise OSError(errno.ELOOP, f"{path.name} there is a link to another file")
    waiting = getattr(os, "O_NONBLOCK", 0)  # else a pipe is waited for
    return os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | waiting, 0o666), "ab")


def lock(file: IO[Any], *, wait: bool = False) -> bool:
    """Lock an open file until it is closed or its process ends; return False if another holds it.

    A forked child does not hold it. On Windows nothing is locked.
    """
    if sys.platform != "win32":
        import fcntl

        try:
            fcntl.flock(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        except BlockingIOError:
            return False
        _LOCKED.add(file)
    return True


def _close_locked() -> None:
    for file in _LOCKED:
        file.close()


if sys.platform != "win32":
    os.register_at_fork(after_in_child=_close_locked)
