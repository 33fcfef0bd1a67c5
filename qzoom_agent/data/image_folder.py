"""The images of a folder as rows: every file that is read, in its subfolders too, and every page of a PDF."""

from __future__ import annotations

import logging
from collections import Counter
from pathlib import Path

from PIL import Image

from qzoom_agent.data.rows import Rows
from qzoom_agent.files import translating
from qzoom_agent.images import FORMATS
from qzoom_agent.pdf import pages

logger = logging.getLogger(__name__)


def image_rows(path: Path) -> Rows | None:
    """Return the images in a folder, sorted, or the one image or PDF at `path`; None if there are none.

    Hidden files are left out, and so are files of other kinds, with a warning that counts them.

    Raises:
        ConfigError: The folder cannot be read.
        MissingDependency: There is a PDF, and pypdfium2 is not installed.
    """
    folder = path if path.is_dir() else path.parent
    known = {suffix for suffix, name in Image.registered_extensions().items() if name in FORMATS}
    names, others = list[str](), Counter[str]()
    with translating("read", path):
        files = path.rglob("*") if path.is_dir() else [path]
        for name in sorted(file.relative_to(folder).as_posix() for file in files):
            file, suffix = folder / name, Path(name).suffix.lower()
            if name.startswith(".") or "/." in name or file.is_dir():
                continue
            if suffix in known:
                names.append(name)
            elif suffix == ".pdf":
                names += [f"{name}#page={page + 1}" for page in range(pages(file))]
            else:
                others[suffix or "without an ending"] += 1
    if names and others:
        told = ", ".join(f"{count} {suffix}" for suffix, count in sorted(others.items()))
        logger.warning("%s: files of other kinds are left out (%s)", path, told)
    return Rows(str(path), [{"image": name} for name in names], ("image",), folder) if names else None
