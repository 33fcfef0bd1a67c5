"""The shape of the project: one importable package of real folders, whose imports point one way."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from importlib.metadata import packages_distributions
from pathlib import Path

import pytest

from qzoom_agent.cli.main import VERBS

ROOT = Path(__file__).resolve().parents[2]
HEAVY = {"torch", "transformers", "langgraph", "trl"}

LAYERS = [
    {"errors"},
    {"async_events", "confidence", "extensions", "extras", "files", "gate", "moved"},
    {"geometry", "pdf"},
    {"images"},
    {"views"},
    {"config", "messages", "trace"},
    {"telemetry"},
    {"data", "report", "protocols", "zoom"},
    {"perception"},
    {"models"},
    {"policy", "review"},
    {"approval", "episode_state", "first_turns", "graph", "tool_calls"},
    {"answer", "saved_runs"},
    {"agent_parts", "episode_run"},
    {"agent", "chat"},
    {"evaluation"},
    {"training"},
    {"integrations"},
    {"cli"},
    {"__main__"},
]
"""A module imports from its own set and from the sets above it."""
LEVEL = {name: level for level, names in enumerate(LAYERS) for name in names}
WITH_TORCH = ("qzoom_agent.models", "qzoom_agent.perception", "qzoom_agent.training")


def _sources() -> Iterator[tuple[str, Path]]:
    """Yield every module of the package as (dotted name, file)."""
    for path in sorted((ROOT / "qzoom_agent").rglob("*.py")):
        parts = path.relative_to(ROOT).with_suffix("").parts
        yield ".".join(parts[:-1] if parts[-1] == "__init__" else parts), path


SOURCES = dict(_sources())
SCRIPTS = sorted(path for folder in ("rl", "evals", "tools") for path in (ROOT / folder).glob("*.py"))


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


def test_no_file_of_the_repository_is_a_link() -> None:
    listed = subprocess.run(["git", "ls-files", "-s"], cwd=ROOT, capture_output=True, text=True, check=False)
    if listed.returncode:
        pytest.skip("not a git checkout")
    assert not [line for line in listed.stdout.splitlines() if line.startswith("120000")]


def test_lines_end_alike_in_every_checkout() -> None:
    """The digest of a model reads its text files too, so a run folder could not be taken to another system."""
    texts = [path for path in (ROOT / "qzoom_agent/weights/nano").iterdir() if path.suffix in {".json", ".jinja"}]
    asked = ["git", "check-attr", "eol", "--", *map(str, texts)]
    done = subprocess.run(asked, cwd=ROOT, capture_output=True, text=True, check=False)
    if done.returncode:
        pytest.skip("not a git checkout")
    assert texts and [line.rsplit(": ", 1)[1] for line in done.stdout.splitlines()] == ["lf"] * len(texts)


def test_every_module_lies_in_a_package() -> None:
    for name, path in SOURCES.items():
        assert (path.parent / "__init__.py").exists(), f"{name}: {path.parent} has no __init__.py"


def test_every_module_has_a_layer() -> None:
    first = {name.split(".")[1] for name in SOURCES if "." in name}
    assert first <= set(LEVEL), f"put {first - set(LEVEL)} into LAYERS"


@pytest.fixture(scope="module")
def imports() -> list[tuple[str, int, str]]:
    """Every import of the package: the module, the line, and what is imported."""
    return [(name, line, imported) for name, path in SOURCES.items() for line, imported in _imports(path)]


def test_imports_point_one_way(imports: list[tuple[str, int, str]]) -> None:
    wrong = []
    for name, line, imported in imports:
        top, *rest = imported.split(".")
        ours = name != "qzoom_agent" and top == "qzoom_agent" and bool(rest) and rest[0] in LEVEL
        if ours and LEVEL[rest[0]] > LEVEL[name.split(".")[1]]:
            wrong.append(f"{name}:{line} imports {imported}, which is a layer further up")
    assert not wrong


def test_only_models_perception_and_training_import_torch(imports: list[tuple[str, int, str]]) -> None:
    wrong = [
        f"{name}:{line} imports {imported}"
        for name, line, imported in imports
        if not name.startswith(WITH_TORCH) and imported.split(".")[0] in {"torch", "transformers", "trl"}
    ]
    assert not wrong


def test_no_script_hides_a_library() -> None:
    # `python rl/x.py` puts rl/ first on sys.path: a script of that name would be found in place of the library.
    libraries = set(sys.stdlib_module_names) | set(packages_distributions())
    assert not {path.stem for path in SCRIPTS} & libraries


def test_a_first_look_loads_nothing_heavy(tmp_path: Path) -> None:
    looks = [["--help"], ["--version"], *([verb, "--help"] for verb in VERBS)]
    code = (
        f"import sys\nfrom qzoom_agent.cli.main import main\nfor arguments in {looks!r}:\n"
        "    try: main(arguments)\n    except SystemExit: pass\n"
        f"    print('LOADED', arguments, sorted({HEAVY!r} & set(sys.modules)))"
    )
    done = _run(code, cwd=tmp_path)
    assert [line for line in done.stdout.splitlines() if line.startswith("LOADED")] == [
        f"LOADED {arguments} []" for arguments in looks
    ], done.stderr


@pytest.mark.slow
def test_importing_everything_leaves_no_top_level_names() -> None:
    names = [name for name in SOURCES if not name.endswith("__main__")]
    code = (
        f"import importlib, sys\nfrom contextlib import suppress\nfrom qzoom_agent.errors import MissingDependency\n"
        f"for name in {names!r}:\n    with suppress(MissingDependency): importlib.import_module(name)\n"
        "ours = {'tools', 'evals', 'rl', 'nano', 'cli', 'models', 'protocols'} & set(sys.modules)\n"
        "assert not ours, ours\nprint('imported all')"
    )
    # From the repository's root, the one place where `import tools` finds the folder.
    done = _run(code, cwd=ROOT)
    assert done.stdout.strip().endswith("imported all"), done.stderr
