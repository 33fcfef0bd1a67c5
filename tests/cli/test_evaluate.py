"""`qzoom eval` and `qzoom audit` as a user runs them."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from qzoom_agent.cli.main import main
from qzoom_agent.errors import BackendError
from qzoom_agent.evaluation.scorers.judge import Judge
from qzoom_agent.messages import Message
from tests.cli.test_cli import run, zoom_then


def test_eval_prints_figures_and_leaves_a_run(play: Any, here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    play(zoom_then("red"))
    assert run("eval", "needle-global", "--n", "5", "--json", "result.json") == 0
    captured = capsys.readouterr()
    headline, _, _ = captured.out.partition("\n")
    assert headline == "needle-global (seed 0): nano, policy explicit, coarse view of 16 to 64 visual tokens"
    for line in ("accuracy (exact)", "zooms", "visual tokens", "seconds", "parsed", "peak memory", "ended"):
        assert f"\n{line} " in captured.out
    assert "5/5" in captured.err
    result = json.loads((here / "result.json").read_text())
    assert result["n"] == len(result["rows"]) == 5
    (made,) = json.loads(next((here / "runs").glob("*/env.json")).read_text())
    assert made["command"] == "qzoom eval needle-global --n 5 --json result.json" and made["date"]
    assert result["interval"][0] <= result["accuracy"] <= result["interval"][1]
    (folder,) = (here / "runs").iterdir()
    assert folder.name.startswith("needle-global--nano--default--")
    assert captured.out.splitlines()[-1].endswith(f"{Path('runs') / folder.name / 'report.html'}")
    assert (folder / "report.html").is_file()


def test_a_budget_shows_the_whole_board_at_that_many_tokens(
    play: Any, here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    play(lambda _: "red")
    argv = ["eval", "needle-doc", "--n", "2", "--policy", "direct", "--budget", "576", "--json", "result.json"]
    assert run(*argv) == 0
    assert " to 576 visual tokens\n" in capsys.readouterr().out
    assert all(64 < row["visual_tokens"] <= 576 for row in json.loads((here / "result.json").read_text())["rows"])


def test_an_interrupted_eval_says_so_and_goes_on(play: Any, here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    asked = 0

    def interrupted(messages: list[Message]) -> str:
        nonlocal asked
        asked += 1
        if asked == 3:
            raise KeyboardInterrupt
        return "red"

    argv = ["eval", "needle-global", "--n", "4", "--policy", "direct"]
    play(interrupted)
    assert run(*argv) == 130
    captured = capsys.readouterr()
    assert re.search(r"^accuracy .* of 2$", captured.out, re.M)
    assert re.search(r"^partial .* 4 of 4 planned$", captured.out, re.M)
    assert "Interrupted after 2 of 4 questions." in captured.err
    assert run(*argv) == 0
    assert asked == 5
    assert run(*argv) == 0
    assert asked == 5


def test_an_eval_in_which_everything_fails_is_4(play: Any, here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    play([])
    assert run("eval", "needle-scene", "--n", "2") == 4
    assert "2 of 2 questions failed" in capsys.readouterr().err


def test_ablations_run_beside_and_are_compared(play: Any, here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    play(zoom_then("7"))
    assert run("eval", "needle-doc", "--n", "2", "--ablate", "direct,oracle", "--out", "run") == 0
    captured = capsys.readouterr()
    assert re.search(r"^direct +\+0\.000 ", captured.out, re.M)
    assert re.search(r"^oracle +\+0\.000 ", captured.out, re.M)
    assert {path.name for path in (here / "run" / "ablations").iterdir()} == {"direct", "oracle"}
    assert "direct: needle-doc 2/2" in captured.err
    assert (
        run("eval", "compare", "run/ablations/direct", "run", "--json", "compared.json", "--report", "flips.html") == 0
    )
    captured = capsys.readouterr()
    assert re.search(r"^needle-doc +2 ", captured.out, re.M)
    found = json.loads((here / "compared.json").read_text())["tasks"]["needle-doc"]
    assert found["n"] == 2
    assert found["visual_tokens"][1] > 0
    assert (here / "flips.html").is_file()


def test_an_audit_runs_the_controls_and_gives_a_verdict(
    play: Any, here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    play(lambda _: "B7K")
    assert (
        main(["audit", "needle-scene", "--n", "3", "--policy", "explicit", "--out", "audited", "--json", "a.json"]) == 0
    )
    out = capsys.readouterr().out
    assert [line.split()[0] for line in out.splitlines()[3:8]] == ["explicit", "direct", "blind", "random", "oracle"]
    assert "No effect of looking is shown" in out
    found = json.loads((here / "a.json").read_text())["tasks"]["needle-scene"]
    assert found["wrong"] == {"never looked": 3} and set(found["effects"]) >= {"gain", "content", "headroom"}
    assert "Does looking help?" in (here / "audited" / "report.html").read_text()
    play(lambda _: pytest.fail("everything was asked"))
    assert main(["audit", "needle-scene", "--n", "3", "--policy", "explicit", "--out", "audited"]) == 0


@pytest.mark.parametrize(
    ("flags", "told"),
    [(["--policy", "direct"], "'direct' is a control of an audit"), (["--no-answers"], "needs answers")],
)
def test_an_audit_that_would_say_nothing_asks_nothing(
    flags: list[str], told: str, play: Any, here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    play(lambda _: pytest.fail("asked"))
    assert main(["audit", "needle-scene", "--n", "2", *flags]) == 2
    assert told in capsys.readouterr().err


def test_a_run_is_scored_again_without_a_model(play: Any, here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    play(lambda _: "7")
    assert run("eval", "needle-doc", "--n", "2", "--out", "run") == 0
    play([])
    assert run("eval", "rescore", "run") == 0
    assert "accuracy (exact)" in capsys.readouterr().out
    assert run("eval", "rescore", "run", "--scorer", "nobody") == 2
    assert "Known: exact" in capsys.readouterr().err


def test_a_run_folder_cannot_have_code_imported(
    play: Any, here: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    play(lambda _: "B7K")
    assert run("eval", "needle-global", "--n", "2", "--out", "run") == 0
    (here / "planted.py").write_text("open('ran', 'w').close()\n")
    monkeypatch.syspath_prepend(str(here))
    for field in ("name", "path", "reference"):
        spec = json.loads((here / "run" / "run.json").read_text())
        task = spec["tasks"].pop("needle-global") | ({} if field == "name" else {field: "planted:task"})
        spec["tasks"] = {"planted:task" if field == "name" else "other": task}
        folder = shutil.copytree(here / "run", here / field)
        (folder / "run.json").write_text(json.dumps(spec))
        assert run("eval", "rescore", str(folder)) == 2
        assert "give --task planted:task" in capsys.readouterr().err
    assert not (here / "ran").exists()


def test_a_judge_is_a_scorer_of_its_own(
    play: Any, here: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    asked: list[str] = []

    def ask(self: Judge, found: dict[str, str], *, attempts: int) -> str:
        asked.append(found["question"])
        return "yes"

    monkeypatch.setattr(Judge, "_ask", ask)
    play(lambda _: "seven")
    assert run("eval", "needle-doc", "--n", "2", "--out", "run") == 0
    argv = ["eval", "rescore", "run", "--judge", "http://there/v1", "--judge-model", "wise", "--scorer", "judge"]
    for _ in range(2):
        assert run(*argv) == 0
    out = capsys.readouterr().out
    assert "accuracy (judge)  1.000" in out
    assert "accuracy (exact)  0.000" in out
    assert len(asked) == 2, "a verdict is kept"
    assert json.loads((here / "run" / "judge.json").read_text())["model"] == "wise"


def test_a_judge_that_gave_no_score_is_not_named_as_the_one_that_did(
    play: Any, here: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def ask(self: Judge, found: dict[str, str], *, attempts: int) -> str:
        if self.record.model != "wise":
            raise BackendError("The judge gave no verdict.")
        return "yes"

    monkeypatch.setattr(Judge, "_ask", ask)
    play(lambda _: "seven")
    judged = ["--out", "run", "--judge", "http://there/v1", "--judge-model"]
    assert run("eval", "needle-doc", "--n", "2", *judged, "wise") == 0
    assert run("eval", "rescore", "run", "--judge", "http://there/v1", "--judge-model", "away") == 4
    assert run("eval", "needle-doc", "--n", "2", "--seed", "1", *judged, "other") == 2, "the folder holds another run"
    assert json.loads((here / "run" / "judge.json").read_text())["model"] == "wise"


def test_a_dry_run_asks_nothing(play: Any, here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    play([])
    assert run("eval", "needle-doc", "needle-hop", "--n", "8", "--limit", "3", "--dry-run") == 0
    out = capsys.readouterr().out
    assert "policy: " in out
    assert "needle-doc: 3 of 8 questions (partial), 1 x, scored by exact" in out
    assert re.search(r"^  \| \w", out, re.M)
    assert not list(here.iterdir())


def test_a_dry_run_counts_what_a_run_would_ask(play: Any, here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    Image.new("RGB", (60, 40), "red").save(here / "meter.png")
    rows = [{"image": "gone.png"}, {"image": "meter.png"}, {"image": "meter.png", "question": ""}]
    lines = [json.dumps({"question": "What?", "answer": "7"} | row) for row in rows]
    (here / "mine.jsonl").write_text("\n".join(lines))
    play([])
    assert run("eval", "mine.jsonl", "--dry-run", "--skip-bad", "--scorer", "builtins:isinstance") == 0
    captured = capsys.readouterr()
    assert "mine: 1 of 3 questions (partial), 1 x, scored by builtins:isinstance, rule" in captured.out
    assert "  mine-1, 60 x 40 px" in captured.out and "mine: 2 rows left out. The first: row 1: " in captured.err
    assert run("eval", "mine.jsonl", "--dry-run") == 2
    assert "rows that cannot be asked" in capsys.readouterr().err
    assert run("eval", "needle-doc", "--dry-run", "--scorer", "exat") == 2
    assert "There is no scorer 'exat'" in capsys.readouterr().err
    assert run("eval", "needle-doc", "--dry-run", "--judge", "http://localhost:9/v1", "--scorer", "judge") == 0
    assert "scored by judge, exact" in capsys.readouterr().out and not (here / "runs").exists()


def test_your_own_questions_are_a_task(play: Any, here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    Image.new("RGB", (60, 40), "red").save(here / "meter.png")
    rows = [{"image": "meter.png", "question": f"What is {n}?", "answer": "7"} for n in range(3)]
    (here / "mine.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    play(lambda _: "7")
    assert run("eval", "mine.jsonl", "--limit", "2", "--out", "run") == 0
    captured = capsys.readouterr()
    assert captured.out.startswith("mine (")
    assert "2 of 3 planned" in captured.out
    assert run("eval", "rescore", "run") == 0
    for wrong in ("mine.jsnl", "there/mine", "mine.csv"):
        told = (
            "There is no task 'mine.jsnl'" if wrong == "mine.jsnl" else f"There is nothing at {wrong}, seen from {here}"
        )
        assert run("eval", wrong) == 2 and told in capsys.readouterr().err


def test_own_questions_named_as_a_benchmark_keep_their_own_rule(
    play: Any, here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    Image.new("RGB", (60, 40), "red").save(here / "meter.png")
    row = {"image": "meter.png", "question": "What?", "strict": "WRONG", "loose": "7"}
    (here / "docvqa.jsonl").write_text(json.dumps(row) + "\n")
    play(lambda _: "7")
    shared = ("eval", "./docvqa.jsonl", "--column")
    for column, worth in (("strict", "0.000"), ("loose", "1.000")):  # in folders of their own
        assert run(*shared, f"answer={column}") == 0
        out = capsys.readouterr().out
        assert out.startswith("own-docvqa (") and f"accuracy (rule)  {worth}" in out
    for folder in (here / "runs").iterdir():
        assert run("eval", "rescore", str(folder)) == 0
        assert "accuracy (rule)" in capsys.readouterr().out
    (here / "v1.0").mkdir()
    (here / "v1.0" / "rows.jsonl").write_text(json.dumps({"image": "../meter.png", "question": "?", "answer": "7"}))
    assert run("eval", "v1.0", "./v1.0", "--dry-run") == 2
    assert "Two of the tasks are called 'v1.0'" in capsys.readouterr().err


def test_a_run_is_scored_again_where_its_table_is_not(
    play: Any, here: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The answers of every scorer that was given stay, too."""
    Image.new("RGB", (60, 40), "red").save(here / "meter.png")
    (here / "mine.jsonl").write_text(json.dumps({"image": "meter.png", "question": "What?", "answer": "7"}))
    (here / "own_scorer.py").write_text("def long(answer, sample):\n    return len(answer) > 1\n")
    play(lambda _: "7")
    assert run("eval", "mine.jsonl", "--scorer", "own_scorer:long", "--out", "run") == 0
    (elsewhere := here / "elsewhere").mkdir()
    monkeypatch.chdir(elsewhere)
    capsys.readouterr()
    assert run("eval", "rescore", "../run") == 0
    out = capsys.readouterr().out
    assert "accuracy (rule)             1.000" in out and "accuracy (own_scorer:long)  0.000" in out


def test_the_tasks_are_listed(capsys: pytest.CaptureFixture[str]) -> None:
    assert run("eval", "list") == 0
    out = capsys.readouterr().out
    assert re.search(r"^needle-scene +exact ", out, re.M)


@pytest.mark.parametrize(
    "command", [["bench", "pareto", "--seed", "-1"], ["eval", "compare", "a", "b", "--flips", "-1"]]
)
def test_numbers_below_zero_are_refused(command: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert run(*command) == 2
    assert "a whole number from 0 on" in capsys.readouterr().err


def test_a_run_at_another_server_or_with_other_requests_has_a_folder_of_its_own(
    capsys: pytest.CaptureFixture[str],
) -> None:
    def folder(*more: str) -> str:
        asked = ("needle-scene", "--n", "1", "--model", "qwen3-vl-4b")
        assert main(["eval", *asked, *more, "--dry-run"]) == 0
        return str(re.findall(r"run folder: (.*)", capsys.readouterr().out)[0])

    one, two = ("--server", "http://one:8000/v1"), ("--server", "http://two:8000/v1")
    asked = [(), one, two, (*one, "--extra-body", "{top_k: 1}")]
    assert len({folder(*more) for more in asked}) == len(asked) and folder(*one) == folder(*one)
