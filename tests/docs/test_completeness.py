"""The pages name all there is: flags, settings, tasks, rewards, outcomes and limits; records say what they count."""

from __future__ import annotations

import re
from importlib import resources
from inspect import getsource
from pathlib import Path
from typing import get_args

import pytest

from qzoom_agent.cli.main import EVAL_VERBS, VERBS, main
from qzoom_agent.config import AgentConfig, Config
from qzoom_agent.episode_state import EventKind
from qzoom_agent.evaluation.tasks.catalog import TASKS
from qzoom_agent.geometry import fit_tokens, tokens
from qzoom_agent.images import load_image
from qzoom_agent.integrations.limits import CEILINGS
from qzoom_agent.models.presets import NANO_BUDGET
from qzoom_agent.trace import CallRecord, PerceptionRecord, QuestionRecord, Reply, Seconds, Status, Turn, Usage
from qzoom_agent.training.reward_list import BUILT_IN, PUBLISHED
from tests.cases import each_case

ROOT = Path(__file__).resolve().parents[2]
PAGES = {
    path.name: path.read_text(encoding="utf-8") for path in (ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")))
}
EVERY = "\n".join(PAGES.values())
COMMANDS = [*VERBS, *EVAL_VERBS, "trace show", "trace report", "bench pareto", "bench ablation"]


@each_case("command", COMMANDS)
def test_every_flag_is_on_a_page(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main([*command.split(), "--help"])
    flags = set(re.findall(r"^  (?:-\w, )?(--[\w-]+)", capsys.readouterr().out, re.MULTILINE)) - {"--help"}
    assert not {flag for flag in flags if not re.search(rf"(?<![\w-]){flag}(?![\w-])", EVERY)}


def _keys(section: type[Config]) -> list[str]:
    found = []
    for name, field in section.model_fields.items():
        inner = field.annotation
        found += _keys(inner) if isinstance(inner, type) and issubclass(inner, Config) else [section.prefix + name]
    return found


def test_every_setting_is_on_a_page() -> None:
    # in full, in a table of its section, or as a flag or argument of this name
    names = {key: key.rpartition(".")[2] for key in _keys(AgentConfig)}
    missing = {key for key, name in names.items() if not re.search(rf"[`.\-]{name}\b|\b{name}=", EVERY)}
    assert not missing


@each_case(
    ["page", "names"],
    [
        ("tasks.md", list(TASKS)),
        ("grpo.md", [*BUILT_IN, *PUBLISHED]),
        ("agent.md", [*get_args(Status), *get_args(EventKind)]),
        ("serve.md", [f"{most:,g}" for most in CEILINGS.values()]),
    ],
)
def test_a_page_names_all_of_its_kind(page: str, names: list[str]) -> None:
    # `-hard` stands for `visualprobe-hard` beside `visualprobe-easy`
    short = {name: f"`-{name.rpartition('-')[2]}`" for name in names if page == "tasks.md" and "-" in name}
    named = {name for name in names if re.search(rf"(?<![\w-]){re.escape(name)}(?![\w-])", PAGES[page])}
    assert not {name for name in set(names) - named if short.get(name, name) not in PAGES[page]}


def test_the_whole_board_costs_what_the_pages_say() -> None:
    board = load_image(resources.files("qzoom_agent.data") / "demo" / "2-scene.png")
    whole = tokens(
        fit_tokens(board.size, factor=NANO_BUDGET.factor, min_tokens=1, max_tokens=10_000), NANO_BUDGET.factor
    )
    said = re.findall(r"whole board (?:would cost )?(\d+)", PAGES["index.md"] + PAGES["concepts.md"])
    assert [int(one) for one in said] == [whole] * 2


def test_every_count_of_a_record_says_what_it_counts() -> None:
    plain = {"question", "status", "answer", "turns", "usage", "decision", "frame"}  # named by their type
    bare = set()
    for record in (CallRecord, PerceptionRecord, QuestionRecord, Reply, Seconds, Turn, Usage):
        own = set(record.__annotations__) - plain
        described = set(
            re.findall(r'^    (\w+): [^\n]*\n(?:        [^\n]*\n|    \)\n)*    """', getsource(record), re.MULTILINE)
        )
        bare |= {f"{record.__name__}.{name}" for name in own - described}
    assert not bare
