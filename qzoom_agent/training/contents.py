"""Digests of what a training reads: a recipe names a path, which can hold other rows or weights tomorrow."""

import hashlib
import re
from collections.abc import Iterable
from functools import lru_cache
from pathlib import Path
from typing import Final

from pydantic import JsonValue

from qzoom_agent.data.rows import SUFFIXES
from qzoom_agent.evaluation.run_log import fingerprint
from qzoom_agent.files import expanded
from qzoom_agent.training.branches.dataset import DatasetSpec

_SKIPPED: Final = re.compile(r"/\.|/cache-[^/]*$")
"""Hidden files and folders, and caches: what `datasets` and downloads of the hub write beside tables."""


def contents(model: str, sources: Iterable[DatasetSpec], *, branches: str | None = None) -> dict[str, JsonValue]:
    """Return a digest of a model's weights, of these branches for it and of each source of questions, by path.

    It is None for what is on the hub. Branches that come with the model are not looked at.
    """
    found: dict[str, JsonValue] = {model: fingerprint(model, base_only=True)}
    if branches is not None:
        found[branches] = fingerprint(str(Path(branches).absolute()))
    return found | {one.path: digest(expanded(one.path)) for one in sources if not one.is_needle}


def digest(path: Path) -> str | None:
    """Return a digest of a table, or of a folder: of its tables, and of the names and sizes of its other files.

    None if there is nothing on this machine. Images beside the file of a table are not looked at.
    """
    if path.is_dir():
        files = [one for one in sorted(path.rglob("*")) if one.is_file()]
        files = [one for one in files if not _SKIPPED.search(f"/{one.relative_to(path).as_posix()}")]
    else:
        files = [path] if path.is_file() else []
    if not files:
        return None
    found = hashlib.sha256()
    for file in files:
        stat = file.stat()
        if len(files) > 1:
            found.update(f"{file.relative_to(path)} {stat.st_size}\n".encode())
        if len(files) == 1 or file.suffix.lower() in SUFFIXES:
            found.update(_content(file, stat.st_size, stat.st_mtime_ns))
    return found.hexdigest()[:16]


@lru_cache(maxsize=1024)  # several stages ask for the same files
def _content(file: Path, size: int, changed: int) -> bytes:
    with file.open("rb") as opened:
        return hashlib.file_digest(opened, "sha256").digest()
