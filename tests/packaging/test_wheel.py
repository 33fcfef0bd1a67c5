"""What is shipped: the wheel holds every module, recipe and weight, works without the sources, and stays small."""

from __future__ import annotations

import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
MAX_WHEEL_BYTES = 25 * 2**20
NOT_SHIPPED = {".git", ".venv", "__pycache__", "build", "dist", "runs"}

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with wheel and sdist, built from a copy: leftovers of earlier builds would get into the wheel."""
    source = tmp_path_factory.mktemp("source") / "qzoom-agent"
    out = tmp_path_factory.mktemp("dist")
    shutil.copytree(
        ROOT,
        source,
        symlinks=True,
        ignore=lambda _, names: [
            name for name in names if name in NOT_SHIPPED or name.endswith(("_cache", ".egg-info"))
        ],
    )
    code = f"from setuptools import build_meta as b; b.build_sdist({str(out)!r}); b.build_wheel({str(out)!r})"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=source, capture_output=True, text=True, timeout=300, check=False
    )
    assert done.returncode == 0, done.stderr
    return out


@pytest.fixture(scope="module")
def site(built: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The unpacked wheel."""
    site = tmp_path_factory.mktemp("site")
    with zipfile.ZipFile(next(built.glob("*.whl"))) as wheel:
        wheel.extractall(site)
    return site


def _shipped(folder: Path) -> set[str]:
    return {
        path.relative_to(folder).as_posix()
        for path in folder.rglob("*")
        if path.is_file() and not path.is_symlink() and "__pycache__" not in path.parts
    }


def test_the_wheel_holds_every_module_and_data_file(site: Path) -> None:
    inside = {name for name in _shipped(site) if name.startswith("qzoom_agent/")}
    expected = {f"qzoom_agent/{name}" for name in _shipped(ROOT / "qzoom_agent")}
    assert inside == expected


def test_the_wheel_installs_one_top_level_name(site: Path) -> None:
    assert {path.name for path in site.iterdir() if not path.name.endswith(".dist-info")} == {"qzoom_agent"}


def test_no_weights_are_lost(site: Path) -> None:
    source, shipped = ROOT / "qzoom_agent" / "weights", site / "qzoom_agent" / "weights"
    for path in source.rglob("*"):
        if path.is_file():
            assert (shipped / path.relative_to(source)).read_bytes() == path.read_bytes()


def test_the_wheel_is_small(built: Path) -> None:
    assert next(built.glob("*.whl")).stat().st_size < MAX_WHEEL_BYTES


def test_every_module_of_the_wheel_imports_without_the_sources(site: Path, tmp_path: Path) -> None:
    code = f"""
import importlib, pathlib, sys
site = pathlib.Path({str(site)!r})
sys.path.insert(0, str(site))
from qzoom_agent.errors import MissingDependency
for path in sorted(site.glob("qzoom_agent/**/*.py")):
    parts = path.relative_to(site).with_suffix("").parts
    name = ".".join(parts[:-1] if parts[-1] == "__init__" else parts)
    if not name.endswith("__main__"):
        try:
            module = importlib.import_module(name)
        except MissingDependency:  # of an extra, which this environment need not have
            continue
        assert pathlib.Path(module.__file__) == path, (name, module.__file__)
print("imported all")
"""
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, timeout=300, check=False
    )
    assert done.stdout.strip().endswith("imported all"), done.stderr


def test_the_sdist_can_be_tested_and_built_again(built: Path) -> None:
    with tarfile.open(next(built.glob("*.tar.gz"))) as sdist:
        names = {name.partition("/")[2] for name in sdist.getnames()}
    missing = {"constraints.txt", "README.md", "LICENSE", "tests/packaging/test_wheel.py", "rl/train_nano.py"} - names
    assert not missing
