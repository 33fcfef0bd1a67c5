"""llms.txt (llmstxt.org) for programs that read the documentation, and the pages as Markdown beside the site's own.

    python docs/site_hooks.py        writes docs/llms.txt from the navigation in mkdocs.yml

mkdocs calls `on_post_build`.
"""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml

DOCS = Path(__file__).resolve().parent


def llms_text(settings: dict[str, Any]) -> str:
    """Return the text: title, summary, and each page of the navigation with its first sentence."""
    parts = [f"# {settings['site_name']}", f"> {settings['site_description']}"]
    sections: dict[str, list[str]] = {}
    for section, title, page in pages(settings["nav"]):
        sections.setdefault(section, []).append(f"- [{title}]({page}): {first_sentence(DOCS / page)}")
    parts += [f"## {section}\n\n" + "\n".join(lines) for section, lines in sections.items()]
    return "\n\n".join(parts) + "\n"


def pages(nav: list[Any], section: str = "") -> Iterator[tuple[str, str, str]]:
    """Yield the section, the title and the file of each page."""
    for entry in nav:
        for title, below in entry.items() if isinstance(entry, dict) else [("Overview", entry)]:
            if isinstance(below, list):
                yield from pages(below, title)
            else:
                yield section or title, title, below


def first_sentence(page: Path) -> str:
    """Return the first sentence of a page or a notebook after its title, as plain text."""
    text = page.read_text(encoding="utf-8")
    if page.suffix == ".ipynb":
        text = "".join(json.loads(text)["cells"][0]["source"])
    found = re.search(r"^# .+\n+(?P<paragraph>(?!:::|```|<!--|[#|]).+(?:\n.+)*)", text, re.MULTILINE)
    if found is None:
        raise ValueError(f"{page} has no paragraph below its title.")
    plain = re.sub(r"\[([^]]+)\]\([^)]+\)|[*`]", r"\1", " ".join(found["paragraph"].split()))
    return re.split(r"(?<=[.!?])\s", plain)[0].rstrip(":")


def on_post_build(config: Any) -> None:
    """Copy the sources of the pages into the site, for the links of llms.txt."""
    for _, _, page in pages(config["nav"]):
        target = Path(config["site_dir"]) / page
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(DOCS / page, target)


def main() -> None:
    """Write docs/llms.txt."""
    settings = yaml.safe_load((DOCS.parent / "mkdocs.yml").read_text(encoding="utf-8"))
    (DOCS / "llms.txt").write_text(llms_text(settings), encoding="utf-8")


if __name__ == "__main__":
    main()
