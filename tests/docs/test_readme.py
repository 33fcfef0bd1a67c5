"""The documentation is true: code runs, commands parse, the set-up lines are what CI runs, links lead somewhere."""

from __future__ import annotations

import re
import shlex
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType
from typing import NamedTuple

import pytest

from qzoom_agent.cli import train
from qzoom_agent.cli.main import main, read
from qzoom_agent.models.presets import NANO_FOLDER
from tests.cases import each_case
from tests.test_extras import EXTRAS

ROOT = Path(__file__).resolve().parents[2]
PAGES = ["README.md", "CONTRIBUTING.md", *sorted(f"docs/{path.name}" for path in (ROOT / "docs").glob("*.md"))]

needs_nano = pytest.mark.skipif(
    not (NANO_FOLDER / "model.safetensors").exists(),
    reason="the weights of nano are not in the package yet (weights/nano/model.safetensors)",
)


class Block(NamedTuple):
    """A fenced block of a page, the comment right above it, and the output block right below it."""

    page: str
    language: str
    code: str
    comment: str
    output: str | None


def _blocks(page: str) -> list[Block]:
    text = (ROOT / page).read_text(encoding="utf-8")
    pattern = (
        r"(?:<!-- (?P<comment>[^\n]*?) -->\n)?"
        r"^```(?P<language>\w+)\n(?P<code>.*?)^```$"
        r"(?:\n\n```text\n(?P<output>.*?)^```$)?"
    )
    return [
        Block(page, match["language"], match["code"], match["comment"] or "", match["output"])
        for match in re.finditer(pattern, text, re.M | re.S)
    ]


BLOCKS = [block for page in PAGES for block in _blocks(page)]


def _command(name: str) -> str:
    (block,) = [block for block in BLOCKS if block.comment == f"command: {name}"]
    return block.code


def _run(code: str, cwd: Path) -> str:
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=cwd, capture_output=True, text=True, timeout=300, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def _needs_nano(block: Block) -> bool:
    return "from_pretrained" in block.code


@pytest.mark.parametrize(
    "block",
    [
        pytest.param(block, marks=needs_nano if _needs_nano(block) else (), id=f"{block.page}-{number}")
        for number, block in enumerate(BLOCKS)
        if block.language == "python" and not block.comment.startswith("not run")
    ],
)
def test_python_runs_and_prints_what_is_shown(
    block: Block, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    # in this process, because a new one needs seconds to import torch, and under the name of a script
    script = ModuleType("__main__")
    monkeypatch.setitem(sys.modules, "__main__", script)
    exec(compile(block.code, block.page, "exec"), vars(script))
    if block.output is not None:
        assert capsys.readouterr().out == block.output


def test_python_that_is_not_run_says_why_and_compiles() -> None:
    for block in BLOCKS:
        if block.language == "python":
            compile(block.code, block.page, "exec")
            assert not block.comment.startswith("not run") or len(block.comment) > len("not run: ")


def _qzoom_lines(pages: Sequence[str] = PAGES) -> list[str]:
    shown = [block for block in BLOCKS if block.language == "bash" and block.page in pages]
    return [line for block in shown for line in map(str.strip, block.code.splitlines()) if line.startswith("qzoom ")]


@each_case("line", _qzoom_lines())
def test_commands_parse(line: str) -> None:
    _, verb, *rest = shlex.split(line)
    if verb == "train":
        assert rest[0] in train.STAGES
        assert (ROOT / rest[rest.index("--config") + 1]).is_file()
    else:
        read([verb, *rest])


@needs_nano
@pytest.mark.parametrize("all_of_them", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_commands_run(
    all_of_them: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    # In the order of the page, in one process: `ask` reads a board that `demo` wrote. Evaluations and training take
    # minutes, and the other pages' commands name models that are not in the package. None of these needs an extra.
    skipped = {"bench", "eval", "train"} | (set() if all_of_them else {"chat", "doctor"})
    lines = [shlex.split(line)[1:] for line in _qzoom_lines(["README.md"]) if line.split()[1] not in skipped]
    assert lines[0] == ["demo"]
    if all_of_them:  # as a user has it, who starts without the extras
        code = (
            f"import sys; sys.modules.update(dict.fromkeys({EXTRAS!r}))\nfrom qzoom_agent.cli.main import main\n"
            f"for line in {lines!r}:\n    assert main(line) == 0, line"
        )
        said = _run(code, tmp_path)
    else:  # in this process, which may have imported them
        for name in {*EXTRAS, *(name for name in sys.modules if name.partition(".")[0] in EXTRAS)}:
            monkeypatch.setitem(sys.modules, name, None)
        monkeypatch.chdir(tmp_path)
        assert [main(line) for line in lines] == [0] * len(lines)
        said = capsys.readouterr().out
    assert said.count("(right)") == 4, "the pictures are chosen so that a first run succeeds"
    assert (tmp_path / "report.html").exists()
    assert (tmp_path / "run" / "trace.json").exists()


@pytest.mark.parametrize(
    ("name", "ending"),
    [("demo", ".venv/bin/qzoom demo"), ("tests", ".venv/bin/python -m pytest -n auto --dist loadfile")],
)
def test_a_set_up_command_is_one_line_from_nothing(name: str, ending: str) -> None:
    (line,) = _command(name).splitlines()
    venv, torch, project, run = line.split(" && ")
    assert venv == "python3.11 -m venv .venv"
    assert re.fullmatch(r"\.venv/bin/pip install torch==[\d.]+ -c constraints\.txt", torch)
    assert re.fullmatch(r'\.venv/bin/pip install -e (\.|"\.\[test\]") -c constraints\.txt', project)
    assert run == ending


def test_ci_runs_the_test_command_of_the_readme() -> None:
    script = (ROOT / ".ci" / "run").read_text(encoding="utf-8")
    extract = re.search(r'command="\$\((.*)\)"', script)
    assert extract
    done = subprocess.run(["bash", "-c", extract[1]], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout == _command("tests")
    assert "set -euo pipefail" in script
    for tool in ('ruff" check', 'ruff" format --check', 'mypy" --strict'):
        assert tool in script


def test_the_readme_is_short() -> None:
    assert len((ROOT / "README.md").read_text(encoding="utf-8").splitlines()) < 150


@each_case("page", [*PAGES, "CHANGELOG.md"])
def test_links_lead_to_files(page: str) -> None:
    text = re.sub(r"^```.*?^```$", "", (ROOT / page).read_text(encoding="utf-8"), flags=re.M | re.S)
    links = {link.partition("#")[0] for link in re.findall(r"\]\((?!https?:)([^)]+)\)", text)}
    missing = {link for link in links if link and not ((ROOT / page).parent / link).exists()}
    if missing and not (NANO_FOLDER / "model.safetensors").exists():
        pytest.skip(f"made together with the weights of nano: {sorted(missing)}")
    assert not missing


def test_nothing_is_left_to_measure_once_nano_ships() -> None:
    if not (NANO_FOLDER / "model.safetensors").exists():
        pytest.skip("the weights of nano are not in the package yet (weights/nano/model.safetensors)")
    assert "TO MEASURE" not in (ROOT / "README.md").read_text(encoding="utf-8")
