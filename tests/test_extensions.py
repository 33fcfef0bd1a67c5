"""Extensions by name, by `module:attribute` and by entry point; what is wrong is said with the way to mend it."""

from __future__ import annotations

from functools import partial
from importlib.metadata import EntryPoint, EntryPoints
from pathlib import Path
from textwrap import shorten

import pytest

from qzoom_agent import extensions
from qzoom_agent.errors import ConfigError

KNOWN = {"exact": "ours"}


def test_own_names_come_first() -> None:
    assert extensions.find("exact", kind="scorer", known=KNOWN) == "ours"


def test_a_module_of_the_working_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "my_scorers_1.py").write_text("class Group:\n    loose = 'theirs'\n")
    monkeypatch.chdir(tmp_path)
    assert extensions.find("my_scorers_1:Group.loose", kind="scorer", known=KNOWN) == "theirs"


def test_an_entry_point_of_an_installed_package(monkeypatch: pytest.MonkeyPatch) -> None:
    points = [
        EntryPoint("good", "textwrap:dedent", "qzoom_agent.scorers"),
        EntryPoint("bad", "textwrap:nothing", "qzoom_agent.scorers"),
    ]
    monkeypatch.setattr(extensions, "entry_points", lambda group: EntryPoints(points).select(group=group))
    assert extensions.find("good", kind="scorer", known=KNOWN)("  a") == "a"
    with pytest.raises(ConfigError, match=r"scorer .bad.*cannot be loaded: AttributeError"):
        extensions.find("bad", kind="scorer", known=KNOWN)
    with pytest.raises(ConfigError, match=r"no scorer .good2.. Known: bad, exact, good\. .*qzoom_agent\.scorers"):
        extensions.find("good2", kind="scorer", known=KNOWN)


def test_a_name_that_two_packages_have_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    def points(*values: str) -> None:
        found = EntryPoints(EntryPoint("short", value, "qzoom_agent.scorers") for value in values)
        monkeypatch.setattr(extensions, "entry_points", lambda group: found.select(group=group))

    points("textwrap:dedent", "textwrap:shorten")
    with pytest.raises(ConfigError, match=r"Several .* the scorer 'short': textwrap:dedent, textwrap:shorten\. Write"):
        extensions.find("short", kind="scorer", known=KNOWN)
    points("textwrap:dedent", "textwrap:dedent")  # one package, found in two places of the path
    assert extensions.find("short", kind="scorer", known=KNOWN)("  a") == "a"


def test_partials_with_other_arguments_have_other_names() -> None:
    named = extensions.reference(partial(shorten, width=20))
    assert named == "textwrap:shorten(width=20)" == extensions.reference(partial(shorten, width=20))
    assert extensions.reference(partial(shorten, "a", width=[1])) == "textwrap:shorten('a', width=builtins:list)"
    assert extensions.reference(partial(shorten, placeholder=shorten)) == (
        "textwrap:shorten(placeholder=textwrap:shorten)"
    )


@pytest.mark.parametrize(
    ("name", "says"), [("no_such_module_x:f", "ModuleNotFoundError"), ("textwrap:nothing", "AttributeError")]
)
def test_what_cannot_be_imported_is_named(name: str, says: str) -> None:
    with pytest.raises(ConfigError, match=f"'{name}' cannot be imported: {says}"):
        extensions.find(name, kind="reward", known={})


@pytest.mark.parametrize("name", ["C:\\runs\\a.jsonl", "http://host:80/v1", "a b:c", ":f", "m:", "./m:f"])
def test_paths_and_addresses_are_no_references(name: str) -> None:
    assert not extensions.is_reference(name)
