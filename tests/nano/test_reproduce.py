"""One command from nothing to tables: the plan comes first, what is done is skipped, what failed goes on."""

from __future__ import annotations

import json
import os
import signal
import threading
import time
from pathlib import Path
from typing import Any

import pytest
from yaml import safe_dump, safe_load

import reproduce
from qzoom_agent.errors import ConfigError, finished
from qzoom_agent.training.branches.ablation import ABLATIONS
from qzoom_agent.training.branches.branch_recipe import load_branch_recipe
from qzoom_agent.training.grpo.grpo_recipe import load_grpo_recipe
from qzoom_agent.training.recipe_io import read_recipe
from qzoom_agent.training.sft.sft_recipe import load_coldstart_recipe
from reproduce import Chain, prepare, put
from train_nano import load_recipe

NANO = Path(__file__).resolve().parents[2] / "rl" / "recipes" / "nano"
ORDER = ["base", "select-heads", "label", "sdrpn", "gate", "calibrate", "coldstart", "grpo"]
REWARDS = ("deepeyes", "accuracy", "price")
SAY = 'python -c \'import sys; print("| " + sys.argv[1] + " |"); open(sys.argv[2], "a").write(sys.argv[1])\' '


def load_chain(path: Path) -> Chain:
    return read_recipe(path, Chain)


def chain(folder: Path, *steps: dict[str, Any], **more: Any) -> Path:
    path = folder / "all.yaml"
    path.write_text(safe_dump({"steps": list(steps), **more}))
    return path


def step(name: str, run: str, **more: Any) -> dict[str, Any]:
    return {"name": name, "run": run, "hours": 0.5, **more}


def run(path: Path, out: Path, *flags: str) -> int:
    return reproduce.main([str(path), "--output", str(out), *flags])


@pytest.fixture
def two(tmp_path: Path) -> Path:
    """Two steps that note in `said` that they ran."""
    said = tmp_path / "said"
    return chain(
        tmp_path,
        step("one", f"{SAY}1 {said}"),
        step("two", f"{SAY}{{word}} {said}", report=True),
        values={"word": "long"},
        quick={"word": "short"},
    )


def test_steps_run_once_and_in_order(two: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(two, tmp_path / "out") == 0
    first = capsys.readouterr().out
    assert first.index("still to do: about 1 hours") < first.index("== one") < first.index("== two")
    assert (tmp_path / "said").read_text() == "1long"
    assert "| long |" in (tmp_path / "out" / "tables.md").read_text()
    assert "| 1 |" not in (tmp_path / "out" / "tables.md").read_text(), "not a step that reports"
    assert run(two, tmp_path / "out") == 0
    assert "still to do: about 0 hours" in capsys.readouterr().out
    assert (tmp_path / "said").read_text() == "1long"


def test_tables_of_one_step_stay_apart(tmp_path: Path) -> None:
    said = "print('| one |'); print('| 1 |'); print('written'); print(); print('| two |'); print('| 2 |')"
    path = chain(tmp_path, {**step("one", f'python -c "{said}"'), "report": True})
    assert run(path, tmp_path / "out") == 0
    assert (tmp_path / "out" / "tables.md").read_text().endswith("`\n\n| one |\n| 1 |\n\n| two |\n| 2 |\n")


def test_tables_are_those_of_the_last_run_of_a_step(tmp_path: Path) -> None:
    (tmp_path / "figure").write_text("old")
    prints = f"print('| ' + open('{(tmp_path / 'figure').as_posix()}').read() + ' |')"
    path = chain(tmp_path, {**step("one", f'python -c "{prints}"'), "report": True})
    assert run(path, tmp_path / "out") == 0
    (tmp_path / "out" / "done" / "one.json").unlink()
    (tmp_path / "figure").write_text("new")
    assert run(path, tmp_path / "out") == 0
    tables = (tmp_path / "out" / "tables.md").read_text()
    assert "| new |" in tables and "| old |" not in tables
    log = (tmp_path / "out" / "logs" / "one.log").read_text()
    assert "| old |" in log and "| new |" in log


def test_quick_uses_its_own_values_and_the_plan_runs_nothing(
    two: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(two, tmp_path / "out", "--quick", "--plan") == 0
    assert "short" in capsys.readouterr().out
    assert not (tmp_path / "said").exists()
    for _ in range(2):  # the second time it is done already, and what follows is still not begun
        assert run(two, tmp_path / "out", "--quick", "--until", "one") == 0
        assert (tmp_path / "said").read_text() == "1"


def test_a_failed_step_is_named_and_the_next_run_goes_on_there(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    said, flag = tmp_path / "said", tmp_path / "flag"
    fails = (
        f"python -c 'import pathlib, sys; sys.exit(0 if pathlib.Path(sys.argv[1]).exists() else \"no flag\")' {flag}"
    )
    path = chain(tmp_path, step("one", f"{SAY}1 {said}"), step("two", fails), step("three", f"{SAY}3 {said}"))
    arguments = [str(path), "--output", str(tmp_path / "out")]
    assert finished("reproduce", lambda: reproduce.main(arguments)) == 4
    error = capsys.readouterr().err
    assert "The step 'two' ended with exit code 1: no flag" in error and "two.log" in error
    assert "Traceback" not in error
    flag.touch()
    assert reproduce.main(arguments) == 0
    assert said.read_text() == "13"


@pytest.mark.parametrize(("number", "raised"), [(signal.SIGTERM, SystemExit), (signal.SIGINT, KeyboardInterrupt)])
def test_who_ends_the_run_ends_its_step(
    tmp_path: Path, request: pytest.FixtureRequest, number: int, raised: type[BaseException]
) -> None:
    said = tmp_path / "pid"
    waits = "import os, sys, time; open(sys.argv[1], 'w').write(str(os.getpid()) + '.'); time.sleep(600)"
    path = chain(tmp_path, step("one", f'python -c "{waits}" {said}'), step("two", f"{SAY}2 {tmp_path / 'two'}"))

    def end() -> None:
        while not (said.exists() and said.read_text().endswith(".")):
            time.sleep(0.01)
        os.kill(os.getpid(), number)

    before = signal.getsignal(signal.SIGTERM)
    # tests may have been started in the background, where a SIGINT is ignored
    interrupted = signal.signal(signal.SIGINT, signal.default_int_handler)
    request.addfinalizer(lambda: signal.signal(signal.SIGINT, interrupted))
    threading.Thread(target=end, daemon=True).start()
    with pytest.raises(raised):
        run(path, tmp_path / "out")
    with pytest.raises(ProcessLookupError):
        os.kill(int(said.read_text()[:-1]), 0)
    assert signal.getsignal(signal.SIGTERM) is before
    assert not list((tmp_path / "out").glob("done/*")) and not (tmp_path / "two").exists()


def test_a_step_whose_need_no_other_made_is_left_out(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    said = tmp_path / "said"
    path = chain(tmp_path, step("one", f"{SAY}1 {said}", needs="{out}/mended"), step("two", f"{SAY}2 {said}"))
    assert run(path, tmp_path / "out") == 0
    assert said.read_text() == "2" and "one: left out" in capsys.readouterr().out
    (tmp_path / "out" / "mended").touch()
    assert run(path, tmp_path / "out") == 0
    assert said.read_text() == "21"


def test_figures_go_into_copies_of_documents(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "docs").mkdir()
    (tmp_path / "docs" / "page.md").write_text("old")
    path = chain(tmp_path, step("one", f"{SAY}1 {{documents}}/docs/page.md"), documents=["docs/page.md"])
    assert run(path, tmp_path / "out") == 0
    copy = tmp_path / "out" / "documents" / "docs" / "page.md"
    assert copy.read_text() == "old1" and (tmp_path / "docs" / "page.md").read_text() == "old"
    assert run(path, tmp_path / "out") == 0
    assert copy.read_text() == "old1"
    (tmp_path / "docs" / "page.md").unlink()
    with pytest.raises(ConfigError, match=r"no docs/page\.md to write figures into"):
        run(path, tmp_path / "elsewhere")


def test_a_step_that_was_done_otherwise_is_refused(two: Path, tmp_path: Path) -> None:
    assert run(two, tmp_path / "out") == 0
    with pytest.raises(ConfigError, match="step 'two' was done with another command or recipe"):
        run(two, tmp_path / "out", "--quick")


def test_a_changed_recipe_is_another_recipe_and_a_changed_comment_is_not(tmp_path: Path) -> None:
    (tmp_path / "one.yaml").write_text("a: 1\n")
    said = tmp_path / "said"
    path = chain(tmp_path, step("one", f"{SAY}{{one}} {said}"), recipes={"one": {"file": "one.yaml"}})
    assert run(path, tmp_path / "out") == 0
    (tmp_path / "one.yaml").write_text("# new words\na: 1\n")
    assert run(path, tmp_path / "out") == 0
    (tmp_path / "one.yaml").write_text("a: 2\n")
    with pytest.raises(ConfigError, match="done with another command or recipe"):
        run(path, tmp_path / "out")


def test_quick_rewrites_recipes(tmp_path: Path) -> None:
    (tmp_path / "one.yaml").write_text(safe_dump({"stages": [{"steps": 9}, {"steps": 8}], "deep": {"er": 1}}))
    changes = {"stages.*.steps": 2, "deep.er": 3, "new": [4]}
    path = chain(tmp_path, step("one", "qzoom {one}"), recipes={"one": {"file": "one.yaml", "quick": changes}})
    (command,) = prepare(load_chain(path), tmp_path, tmp_path / "out", quick=True)
    written = tmp_path / "out" / "recipes" / "one.yaml"
    assert command.line == f"qzoom {written}"
    assert safe_load(written.read_text()) == {"stages": [{"steps": 2}] * 2, "deep": {"er": 3}, "new": [4]}
    (command,) = prepare(load_chain(path), tmp_path, tmp_path / "out", quick=False)
    assert command.line == f"qzoom {tmp_path / 'one.yaml'}"


@pytest.mark.parametrize("key", ["a.b.c", "*.a", "list.a", "list.*"])
def test_a_place_that_is_not_there(key: str) -> None:
    with pytest.raises(ConfigError, match="no place"):
        put({"a": {}, "list": [{}]}, key, 1)


@pytest.mark.parametrize(
    ("steps", "said"),
    [
        ([step("one", "rm -r /")], r"should match pattern '\^\(qzoom\|python\)"),
        ([step("one", "")], "should match pattern"),
        ([step("one", "qzoom", needs="{two}")], "step 'one' names 'two', which is neither recipe nor value"),
        ([step("one", "qzoom {two}")], "step 'one' names 'two', which is neither recipe nor value"),
        ([step("one", "qzoom"), step("one", "qzoom")], "a name of its own"),
        ([], "at least 1 item"),
    ],
)
def test_a_bad_file_says_what_is_wrong(tmp_path: Path, steps: list[dict[str, Any]], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        run(chain(tmp_path, *steps), tmp_path / "out", "--plan")
    with pytest.raises(ConfigError, match="Cannot read"):
        load_chain(tmp_path / "none.yaml")


def test_an_unknown_step_is_named(two: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"There is no step 'three'. The steps are: one, two"):
        run(two, tmp_path / "out", "--until", "three")


def test_recipes_are_changed_whether_it_is_quick_or_not(tmp_path: Path) -> None:
    (tmp_path / "one.yaml").write_text("{a: 1, b: 1}")
    recipe = {"file": "one.yaml", "change": {"a": 2}, "quick": {"b": 3}}
    path = chain(tmp_path, step("one", "qzoom {one}"), recipes={"one": recipe})
    for quick, b in ((False, 1), (True, 3)):
        prepare(load_chain(path), tmp_path, tmp_path / "out", quick=quick)
        assert safe_load((tmp_path / "out" / "recipes" / "one.yaml").read_text()) == {"a": 2, "b": b}


def test_nano_goes_through_every_stage_and_each_finds_what_the_one_before_wrote(tmp_path: Path) -> None:
    nano = load_chain(NANO / "all.yaml")
    names = [one.name for one in nano.steps]
    assert [name for name in names if name in ORDER] == ORDER
    commands = {one.step.name: one.line for one in prepare(nano, NANO, tmp_path, quick=True)}
    last = load_recipe(NANO / "base.yaml").stages[-1].name
    assert f"{tmp_path}/base/{last}/final {tmp_path}/nano" in commands["ship"]
    for name in ("select-heads", "label", "sdrpn", "gate", "calibrate"):
        assert commands[name].startswith(f"qzoom train {name} ")
        assert f"--model {tmp_path}/nano --output {tmp_path}/branches" in commands[name]
    made = {"recipes", "documents"}
    for name, line in commands.items():
        *given, target = [word for word in line.split() if word.startswith(f"{tmp_path}/")]
        where = [Path(word).relative_to(tmp_path).parts for word in given]
        for parts in where:
            folder = "/".join(parts[:2]) if parts[0] == "evidence" else parts[0]
            writes = f"--out {tmp_path}/{folder}" in line
            assert writes or folder in made, f"{name} reads {folder}, which no step before it made"
        for word in (*given, target):
            parts = Path(word).relative_to(tmp_path).parts
            made.add("/".join(parts[:2]) if parts[0] == "evidence" else parts[0])
    # the shortened recipes are recipes
    quick = tmp_path / "recipes"
    assert {stage.steps for stage in load_recipe(quick / "base.yaml").stages} == {2}
    assert load_branch_recipe(quick / "branches.yaml").gate.records == 64
    assert "postsft" not in load_branch_recipe(quick / "branches.yaml").stages
    assert "postsft" in load_branch_recipe(quick / "mended.yaml").stages
    for name in ("coldstart", "hungry"):
        assert load_coldstart_recipe(quick / f"{name}.yaml").data[0].limit == 16
    for name in ("grpo", "accuracy", "deepeyes"):
        assert load_grpo_recipe(quick / f"{name}.yaml").max_steps == 2


def test_nano_reaches_every_table_of_the_documents(tmp_path: Path) -> None:
    """What README.md, docs/results.md, docs/nano.md and docs/grpo.md show, each with the command that they give."""
    commands = {one.step.name: one for one in prepare(load_chain(NANO / "all.yaml"), NANO, tmp_path, quick=False)}
    lines = {name: one.line for name, one in commands.items()}
    documents = tmp_path / "documents"
    assert f"--write {documents}/docs/nano.md" in lines["evidence"]
    assert f"--model {tmp_path}/perceiving" in lines["evidence"] and "--n 500" in lines["evidence"]
    assert lines["pages"] == f"python evals/pareto_pages.py {tmp_path}/pareto --checkout {documents}"
    page = (NANO.resolve().parents[2] / "docs" / "results.md").read_text(encoding="utf-8")
    (told,) = [line for line in page.splitlines() if line.startswith("qzoom bench pareto ")]
    words, asked = told.split(), lines["pareto"].split()
    for flag in ("--budgets", "--coarse"):
        assert words[words.index(flag) + 1] == asked[asked.index(flag) + 1]
    assert "--tasks" not in words and "--tasks" not in asked  # all three, in both
    assert "--rival" in words and asked[asked.index("--rival") + 1] == lines["ship-whole"].split()[-1]
    asked = lines["saving"].split()
    assert asked[asked.index("--whole") + 1] == lines["evidence-whole"].split()[-1]
    assert "--budget 576" in lines["evidence-whole"] and "--policy direct" in lines["evidence-whole"]
    for reward in REWARDS:
        for seed in (0, 1):
            assert f"--seed {seed} --model {tmp_path}/hungry/final" in lines[f"{reward}-{seed}"]
            assert f"--model {tmp_path}/{reward}-{seed}/final" in lines[f"evidence-{reward}-{seed}"]
    assert {name for name in ABLATIONS if f"ablation-{name}" in lines} == set(ABLATIONS)
    reports = {name for name, one in commands.items() if one.step.report}
    assert reports == {name for name in lines if name.startswith(("evidence", "saving", "ablation", "pareto"))}
    hours = sum(one.step.hours for one in commands.values())
    assert commands["base"].step.hours < hours < 20


def test_the_readme_says_how_long_it_takes() -> None:
    hours = sum(step.hours for step in load_chain(NANO / "all.yaml").steps)
    readme = (Path(__file__).resolve().parents[2] / "README.md").read_text(encoding="utf-8")
    assert f"in about {hours:.0f} hours" in readme


def test_demonstrations_of_nano_are_of_boards_of_their_own() -> None:
    branches = load_branch_recipe(NANO / "branches.yaml")
    cold = [load_coldstart_recipe(NANO / f"{name}.yaml") for name in ("coldstart", "coldstart_hungry")]
    sources = (*branches.data, *branches.held_out, *(source for one in cold for source in one.data))
    assert len({source.seed for source in sources}) == len(sources)


@pytest.mark.slow
def test_the_whole_chain_at_toy_length(tmp_path: Path) -> None:
    out = tmp_path / "out"
    assert run(NANO / "all.yaml", out, "--quick") == 0
    names = [one.name for one in load_chain(NANO / "all.yaml").steps]
    done = {path.stem for path in (out / "done").iterdir()}
    assert set(names) - done <= {"ablation-postsft"}, "at toy length no crop may hurt"
    assert (out / "grpo" / "final" / "model.safetensors").is_file()
    tables = (out / "tables.md").read_text()
    assert tables.count("| needle-hop |") >= 2 and "price-1: explicit minus accuracy-1: explicit" in tables
    assert " at 576 |" in (out / "documents" / "README.md").read_text()
    assert (out / "documents" / "docs" / "images" / "pareto.png").is_file()
    spent = [json.loads(path.read_text())["seconds"] for path in (out / "done").iterdir()]
    assert run(NANO / "all.yaml", out, "--quick") == 0
    assert [json.loads(path.read_text())["seconds"] for path in (out / "done").iterdir()] == spent
