"""What surrounds the pages: the navigation, llms.txt, the API reference and CITATION.cff agree with the code."""

from __future__ import annotations

import importlib.util
import re
import tomllib
from pathlib import Path
from types import ModuleType

import pytest
from yaml import safe_load

import qzoom_agent

ROOT = Path(__file__).resolve().parents[2]
DOCS = ROOT / "docs"
SETTINGS = safe_load((ROOT / "mkdocs.yml").read_text(encoding="utf-8"))
REFERENCE = {path: path.read_text(encoding="utf-8") for path in sorted((DOCS / "reference").glob("*.md"))}
SHOWN = [name for text in REFERENCE.values() for name in re.findall(r"^::: (\S+)$", text, re.MULTILINE)]


@pytest.fixture(scope="module")
def hooks() -> ModuleType:
    spec = importlib.util.spec_from_file_location("site_hooks", DOCS / "site_hooks.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_every_page_is_in_the_navigation(hooks: ModuleType) -> None:
    there = {path.relative_to(DOCS).as_posix() for kind in ("*.md", "*.ipynb") for path in DOCS.rglob(kind)}
    named = [page for _, _, page in hooks.pages(SETTINGS["nav"])]
    assert len(named) == len(set(named)) and set(named) == there - {"maintainers/notebook.md"}


def test_llms_txt_is_that_of_the_navigation(hooks: ModuleType) -> None:
    stored = (DOCS / "llms.txt").read_text(encoding="utf-8")
    assert stored == hooks.llms_text(SETTINGS), "run: python docs/site_hooks.py"
    links = re.findall(r"^- \[.+?\]\((\S+?)\): \S", stored, re.MULTILINE)
    assert links and all((DOCS / link).is_file() for link in links)


def test_the_reference_names_what_there_is_and_all_public_names() -> None:
    for module, _, attribute in (name.rpartition(".") for name in SHOWN if name != "qzoom_agent.errors"):
        source = (ROOT / module.replace(".", "/")).with_suffix(".py").read_text(encoding="utf-8")
        assert re.search(rf"^(class|def) {attribute}\b", source, re.MULTILINE), f"{module}.{attribute}"
    public = set(qzoom_agent.__all__) - {"__version__"}
    assert public <= {name.rpartition(".")[2] for name in SHOWN}


def test_the_citation_is_that_of_this_version() -> None:
    cited = safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    assert (cited["title"], cited["version"], cited["license"]) == tuple(
        project[key] for key in ("name", "version", "license")
    )
    assert project["version"] == qzoom_agent.__version__
    assert {"cff-version", "message", "authors"} <= set(cited)
    papers = [paper["identifiers"][0]["value"].removeprefix("arXiv:") for paper in cited["references"]]
    assert papers == re.findall(r"arXiv (\d+\.\d+)\]", (DOCS / "perception.md").read_text(encoding="utf-8"))[:2]
