"""The shape of the project: every folder is packaged, imports point one way, nothing leaks to the top level."""

from __future__ import annotations

import ast
import os
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest

from qzoom_agent.cli.main import VERBS

ROOT = Path(__file__).resolve().parents[2]
FOLDERS = {
    "qzoom_agent": "qzoom_agent",
    "tools": "qzoom_agent.tools",
    "evals": "qzoom_agent.evals",
    "rl": "qzoom_agent.rl",
}
HEAVY = {"torch", "transformers", "langgraph", "trl"}

LAYERS = [
    {"errors"},
    {"files", "usage"},
    {"geometry"},
    {"images"},
    {"views"},
    {"config", "markup", "messages", "trace"},
    {"overlay", "page", "protocols", "report", "report_look"},
    {"tools"},
    {"backends", "perception"},
    {"policy", "review", "serving"},
    {"graph"},
    {"agent"},
    {"evals"},
    {"rl"},
    {"cli"},
    {"__main__"},
]
"""What may import what: a module imports from its own set and from the sets above it."""
LEVEL = {name: level for level, names in enumerate(LAYERS) for name in names}


def _sources() -> Iterator[tuple[str, Path]]:
    """Every module of the package as (dotted name, file), by its real path and once."""
    for folder, package in FOLDERS.items():
        for at, subfolders, files in os.walk(ROOT / folder):
            here = Path(at)
            subfolders[:] = sorted(d for d in subfolders if d != "__pycache__" and not (here / d).is_symlink())
            for file in sorted(files):
                if file.endswith(".py"):
                    parts = [package, *here.relative_to(ROOT / folder).parts]
                    stem = file.removesuffix(".py")
                    yield ".".join(parts if stem == "__init__" else [*parts, stem]), here / file


SOURCES = dict(_sources())


def _imports(path: Path) -> Iterator[tuple[int, str]]:
    """(line, dotted name) of every import in a file, those inside functions included."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}:{node.lineno}: relative import; write 'from qzoom_agent...'"
            assert node.module is not None
            # `from qzoom_agent import errors` names a module in its list, not in its path.
            names = [alias.name for alias in node.names]
            yield from (
                (node.lineno, f"{node.module}.{name}" if node.module == "qzoom_agent" else node.module)
                for name in names
            )


def _run(code: str, *, cwd: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", code], cwd=cwd, capture_output=True, text=True, timeout=300, check=False
    )


def test_every_package_is_listed() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    packages = {name for name, path in SOURCES.items() if path.name == "__init__.py"}
    assert set(project["tool"]["setuptools"]["packages"]) == packages, "pyproject.toml [tool.setuptools] packages"


def test_every_module_lies_in_a_package() -> None:
    for name, path in SOURCES.items():
        assert (path.parent / "__init__.py").exists(), f"{name}: {path.parent} has no __init__.py"


def test_links_show_the_folders_inside_the_package() -> None:
    for folder in ("tools", "evals", "rl"):
        link = ROOT / "qzoom_agent" / folder
        assert link.is_symlink() or link.is_file(), "a committed link (a small file where the checkout has no links)"
        if link.is_symlink():
            assert link.readlink() == Path("..") / folder


def test_every_module_has_a_layer() -> None:
    first = {name.split(".")[1] for name in SOURCES if "." in name}
    assert first <= set(LEVEL), f"put {first - set(LEVEL)} into LAYERS"


@pytest.mark.parametrize("name", [name for name in SOURCES if name != "qzoom_agent"])
def test_imports_point_one_way(name: str) -> None:
    own = LEVEL[name.split(".")[1]]
    for line, imported in _imports(SOURCES[name]):
        top, *rest = imported.split(".")
        assert top not in {"tools", "evals", "rl"}, f"{name}:{line} imports {top}; write qzoom_agent.{top}"
        if top == "qzoom_agent" and rest and rest[0] in LEVEL:
            assert LEVEL[rest[0]] <= own, f"{name}:{line} imports {imported}, which is a layer further up"


@pytest.mark.parametrize("name", SOURCES)
def test_only_backends_perception_and_rl_import_torch(name: str) -> None:
    if name.startswith(("qzoom_agent.backends.", "qzoom_agent.perception", "qzoom_agent.rl")):
        return
    for line, imported in _imports(SOURCES[name]):
        assert imported.split(".")[0] not in {"torch", "transformers", "trl"}, f"{name}:{line} imports {imported}"


def test_no_module_is_named_like_a_library_used_beside_it() -> None:
    # `python rl/x.py` puts rl/ first on sys.path: a module of that name would be found in place of the library.
    used = {imported.split(".")[0] for path in SOURCES.values() for _, imported in _imports(path)} - {"qzoom_agent"}
    for name, path in SOURCES.items():
        if path.name not in {"__init__.py", "__main__.py"}:
            inside = name.startswith(("qzoom_agent.tools.", "qzoom_agent.evals.", "qzoom_agent.rl."))
            assert not (inside and path.stem in used), f"{name} hides the library {path.stem}"


@pytest.mark.parametrize("folder", ["tools", "evals", "rl"])
def test_a_folder_refuses_to_be_a_top_level_package(folder: str) -> None:
    done = _run(f"import {folder}", cwd=ROOT)
    assert done.returncode == 1
    assert "ImportError" in done.stderr
    assert f"import qzoom_agent.{folder}" in done.stderr


@pytest.mark.parametrize(
    "code",
    [
        "import qzoom_agent",
        "import qzoom_agent; dir(qzoom_agent)",
        "from qzoom_agent.cli.main import main; main(['--help'])",
        "from qzoom_agent.cli.main import main; main(['--version'])",
        *(f"from qzoom_agent.cli.main import main; main([{verb!r}, '--help'])" for verb in VERBS),
    ],
)
def test_a_first_look_loads_nothing_heavy(code: str, tmp_path: Path) -> None:
    show = f"print('LOADED', sorted({HEAVY!r} & set(sys.modules)))"
    done = _run(f"import sys\ntry:\n    exec({code!r})\nexcept SystemExit:\n    pass\n{show}", cwd=tmp_path)
    assert "LOADED []" in done.stdout, done.stdout + done.stderr


def test_importing_everything_leaves_no_top_level_names() -> None:
    names = [name for name in SOURCES if not name.endswith("__main__")]
    code = (
        f"import importlib, sys\nfor name in {names!r}: importlib.import_module(name)\n"
        "ours = {'tools', 'evals', 'rl', 'cli', 'backends', 'protocols'} & set(sys.modules)\n"
        "assert not ours, ours\nprint('imported all')"
    )
    # From the repository's root, the one place where `import tools` finds the folder.
    done = _run(code, cwd=ROOT)
    assert done.stdout.strip().endswith("imported all"), done.stderr
