"""Output files: checked before the work begins, and written whole or not at all."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryFile
from typing import Any
from uuid import uuid4

import yaml

from qzoom_agent.errors import ConfigError


def require_folder(path: Path | str) -> Path:
    """Return a folder to write into, made if there is none. Raises ConfigError if that is impossible."""
    path = Path(path)
    try:
        path.mkdir(parents=True, exist_ok=True)
        with TemporaryFile(dir=path):
            pass
    except OSError as error:
        raise ConfigError(f"Cannot write into {path}: {error.strerror or error}. Choose another folder.") from None
    return path


def require_file(path: Path | str) -> Path:
    """Return a file to write, its folder made if there is none. Raises ConfigError if that is impossible."""
    path = Path(path)
    if path.is_dir():
        raise ConfigError(f"Cannot write {path}: it is a folder. Give the path of a file.")
    if not path.exists():
        require_folder(path.parent)
    return path


def write_text(path: Path | str, text: str) -> Path:
    """Write a text file, its folder made if there is none. Raises ConfigError if that is impossible."""
    path = require_file(path)
    try:
        path.write_text(text, encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"Cannot write {path}: {error.strerror or error}. Choose another file.") from None
    return path


def read_yaml(text: str) -> Any:
    """Return the content of a YAML text. Raises ValueError if it is not YAML or holds an impossible value."""
    try:
        return yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise ValueError(str(error)) from None
    except RecursionError:
        raise ValueError("it is nested too deeply") from None


@contextmanager
def atomic_write(path: Path) -> Iterator[Path]:
    """Give a file beside `path` to write, which replaces it at the end; after an error nothing is left of it."""
    part = path.with_name(f"{path.name}.{uuid4().hex}.part")
    try:
        yield part
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)
