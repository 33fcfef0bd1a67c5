"""The command line: results on stdout, people on stderr, exit codes to trust, no tracebacks for mistakes."""

from __future__ import annotations

import io
import json
import os
import re
import shlex
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from qzoom_agent.agent import Agent
from qzoom_agent.cli import ask, demo, doctor, train
from qzoom_agent.cli.console import Console, Progress, opening, printable, table
from qzoom_agent.cli.main import BUDGET, VERBS, main
from qzoom_agent.evaluation.runner import evaluate
from qzoom_agent.evaluation.sample_result import SampleResult
from qzoom_agent.evaluation.tasks.needle import sample, sample_seed
from qzoom_agent.evaluation.tasks.task import Score
from qzoom_agent.messages import Message
from qzoom_agent.models.presets import PRESETS
from qzoom_agent.models.scripted import ScriptedBackend
from qzoom_agent.trace import Trace
from tests.evaluation.player import numbers, player

ZOOM = "<zoom>28 28 112 112</zoom>"
PROBE = 'print(\'{"version": "9", "threads": 1, "device": "cpu", "bf16": null}\')'
"""What `qzoom doctor` runs to look at torch, without torch."""
Replies = Callable[[list[Message]], str]


def zoom_then(answer: str) -> Replies:
    """A model that zooms once and then answers."""

    def reply(messages: list[Message]) -> str:
        shown = sum(part["type"] == "image" for message in messages for part in message["content"])
        return ZOOM if shown == 1 else answer

    return reply


def run(*argv: str) -> int:
    try:
        return main(argv)
    except SystemExit as left:
        return int(left.code or 0)


# ---- the command itself --------------------------------------------------------------------------------------------


def test_help_lists_every_verb(capsys: pytest.CaptureFixture[str]) -> None:
    assert run("--help") == 0
    out = capsys.readouterr().out
    assert all(f"  {verb} " in out for verb in VERBS)


@pytest.mark.parametrize("verb", VERBS)
def test_every_verb_explains_itself(verb: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(verb, "--help") == 0
    assert f"qzoom {verb}" in capsys.readouterr().out


@pytest.mark.parametrize(
    "argv", [[], ["nonsense"], ["ask"], ["ask", "only-an-image"], ["trace"], ["train", "nonsense"]]
)
def test_wrong_usage_is_2(argv: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert run(*argv) == 2
    captured = capsys.readouterr()
    assert "usage:" in captured.err
    assert captured.out == ""


def test_help_does_little_work_of_its_own() -> None:
    code = (
        "import time; began = time.process_time()\n"
        "from qzoom_agent.cli.main import main\n"
        "try: main(['--help'])\nexcept SystemExit: pass\n"
        "print('SECONDS', time.process_time() - began)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert float(done.stdout.split("SECONDS")[1]) < 0.3


# ---- ask -----------------------------------------------------------------------------------------------------------


def test_ask_prints_the_answer_alone(play: Any, board: str, capsys: pytest.CaptureFixture[str]) -> None:
    play(zoom_then("EXIT 24"))
    assert run("ask", board, "what is on the sign?") == 0
    captured = capsys.readouterr()
    assert captured.out == "EXIT 24\n"
    look, zoom, summary = captured.err.splitlines()
    assert look == "look coarse 54 tokens"
    assert zoom.startswith("zoom [") and "% of image +" in zoom and zoom.endswith(" s")
    assert summary.startswith("answered: 1 zoom, ")
    assert "\x1b" not in captured.err


def test_quiet_and_verbose(play: Any, board: str, capsys: pytest.CaptureFixture[str]) -> None:
    play(zoom_then("42"))
    assert run("ask", board, "?", "-q") == 0
    assert capsys.readouterr() == ("42\n", "")
    assert run("ask", board, "?", "-v") == 0
    assert ZOOM in capsys.readouterr().err
    assert run("ask", board, "?", "-q", "-v") == 2


def test_ask_json_is_the_trace_and_nothing_else(play: Any, board: str, capsys: pytest.CaptureFixture[str]) -> None:
    play(zoom_then("42"))
    assert run("ask", board, "how many?", "--json") == 0
    trace = Trace.model_validate_json(capsys.readouterr().out)
    assert (trace.answer, trace.status, trace.usage.served) == ("42", "answered", 1)


def test_a_run_is_saved_though_nobody_reads_the_answer(
    play: Any, board: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Full(io.StringIO):
        def write(self, text: str, /) -> int:
            raise OSError(28, "No space left on device")

    play(zoom_then("42"))
    monkeypatch.setattr(sys, "stdout", Full())
    page = tmp_path / "page.html"
    assert run("ask", board, "how many?", "--json", "--save", str(tmp_path / "run"), "--report", str(page)) == 2
    assert Trace.load(tmp_path / "run").answer == "42" and page.exists()


@pytest.mark.skipif(sys.platform == "win32", reason="of shells of Unix")
def test_streams_may_be_closed() -> None:
    line = f"{sys.executable} -m qzoom_agent ask nowhere.png ? <&- 2>&-"
    assert subprocess.run(["sh", "-c", line], check=False, capture_output=True).returncode == 2


@pytest.mark.skipif(sys.platform == "win32", reason="of pipes of Unix")
def test_files_are_written_also_if_nobody_reads_the_results(tmp_path: Path) -> None:
    """As with `| head -1`."""
    for policy in ("direct", "explicit"):
        evaluate(player(policy=policy), [numbers(3)], out=tmp_path / policy, traces=False)
    reading, writing = os.pipe()
    os.close(reading)
    argv = ["eval", "compare", "direct", "explicit", "--json", "found.json", "--report", "page.html"]
    with os.fdopen(writing, "wb") as broken:
        line = [sys.executable, "-u", "-m", "qzoom_agent", *argv]
        assert subprocess.run(line, check=False, stdout=broken, cwd=tmp_path).returncode == 0
    assert json.loads((tmp_path / "found.json").read_text())["tasks"]["numbers"] and (tmp_path / "page.html").exists()


@pytest.mark.parametrize(("stream", "code"), [("stdout", 0), ("stderr", 141)])
def test_a_command_whose_messages_nobody_reads_is_not_done(stream: str, code: int) -> None:
    work = (
        f"import sys; from qzoom_agent.errors import finished; say = lambda: print('x', file=sys.{stream}, flush=True)"
    )
    reading, writing = os.pipe()
    os.close(reading)
    argv = [sys.executable, "-c", f"{work}; sys.exit(finished('qzoom', lambda: say() or 0))"]
    with os.fdopen(writing, "wb") as broken:
        assert subprocess.run(argv, check=False, **{stream: broken}).returncode == code


def test_own_tools_are_named_by_flags(play: Any, board: str, capsys: pytest.CaptureFixture[str]) -> None:
    play(['TOOL: rotate {"degrees": 180}', "TOOL: rotate {}", "42"])
    assert run("ask", board, "?", "--protocol", "plain", "--tool", "rotate", "--tool", "enhance") == 0
    captured = capsys.readouterr()
    assert captured.out == "42\n" and 'tool rotate {"degrees": 180} -> tool1 +' in captured.err
    assert captured.err.splitlines()[-1].startswith("answered: 0 zooms, 2 tool calls, ")


def test_a_spent_budget_is_3(play: Any, board: str, capsys: pytest.CaptureFixture[str]) -> None:
    play(zoom_then("42"))
    assert run("ask", board, "?", "--set", "budget.max_visual_tokens=70") == 3
    captured = capsys.readouterr()
    assert captured.out == ""
    assert "refused" in captured.err and "There is no answer." in captured.err


def test_a_failing_model_is_4(play: Any, board: str, capsys: pytest.CaptureFixture[str]) -> None:
    play([])
    assert run("ask", board, "?") == 4
    captured = capsys.readouterr()
    assert captured.out == ""
    assert "ran out of replies" in captured.err
    assert "Traceback" not in captured.err


@pytest.mark.parametrize(
    ("argv", "says"),
    [
        (["ask", "nowhere.png", "?"], "nowhere.png"),
        (["ask", "~nobody-here/a.png", "?"], "~nobody-here/a.png"),
        (["ask", "~nobody-here/a.pdf#page=2", "?"], "~nobody-here/a.pdf"),
        (["ask", "{board}", "?", "--model", "~nobody-here"], "There is no model '~nobody-here'"),
        (["ask", "{board}", "?", "--prompt", "~nobody-here/p.yaml"], "~nobody-here/p.yaml"),
        (["run", "~nobody-here/t.csv", "--out", "done"], "There is nothing at ~nobody-here/t.csv"),
        (["eval", "~nobody-here/t.csv"], "~nobody-here/t.csv"),
        (["ask", "{board}", "   "], "question"),
        (["ask", "{board}", "?", "--set", "budget.max_tuns=3"], "Did you mean 'budget.max_turns'?"),
        (["ask", "{board}", "?", "--set", "policy"], "KEY=VALUE"),
        (["ask", "{board}", "?", "--set", "policy=[1"], "cannot be read"),
        (["ask", "{board}", "?", "--policy", "hybrid"], "Its own branches are given by --branches"),
        (["ask", "{board}", "?", "--protocol", "morse"], "morse"),
        (["ask", "{board}", "?", "--protocol", "qwen3-vl-4b"], "Did you mean qwen3vl"),
        (["ask", "{board}", "what", "is", "it?"], "The question comes last, and in quotes"),
        (["ask", "what is it?", "{board}"], "The question comes last, and in quotes"),
        (["ask", "{board}", "?", "--policy", "oracle"], "`qzoom eval` reads those of a task"),
        (["ask", "{board}", "?", "--tool", "rotate"], "The format 'nano' writes zoom calls alone"),
        (["ask", "{board}", "?", "--protocol", "plain", "--tool", "nothing"], "There is no own tool 'nothing'"),
        (["ask", "{board}", "?", "--budget", "0"], "budget.coarse_tokens"),
        (["ask", "{board}", "?", "--config", "nowhere.yaml"], "nowhere.yaml"),
        (["trace", "show", "nowhere"], "nowhere"),
        (["eval", "needle-nowhere"], "needle-scene"),
        (["eval", "needle-scene", "--n", "0"], "n = 0"),
        (["eval", "needle-scene", "--ablate", "nowhere"], "--ablate takes policies; got nowhere"),
        (["eval", "compare", "here", "there"], "no run in here"),
        (["eval", "rescore", "here"], "no run in here"),
        (["demo", "--seed", "-1"], "-1"),
        (["ask", "{board}", "?", "--model", "nanoo"], "Did you mean 'nano'?"),
        (
            ["ask", "{board}", "?", "--server", "http://localhost:1/v1"],
            "the name of a model that the server has: --model",
        ),
        (["ask", "{board}", "?", "--server", "foo", "--model", "m"], "'foo' is no address of a server"),
        (
            ["ask", "{board}", "?", "--budget", "50", "--set", "budget.coarse_min_tokens=100"],
            "Raise budget.coarse_tokens",
        ),
        (["ask", "{board}", "?", "--set", "seed=99999999999999999999999999"], "'seed'"),
        (["ask", "{board}", "?", "--set", "max_pixels=1000"], "raise the setting max_pixels"),
        (["ask", "http://localhost:1/a.png", "?"], "Download it and give the file"),
        (["ask", "{board}", "?", "--report", "{folder}"], "is a folder"),
        (["ask", "{board}", "?", "--report", "{board}/page.html"], "Cannot write into"),
        (["ask", "{board}", "?", "--save", "{board}"], "Cannot write into"),
        (["look", "{board}", "?", "--png", "{folder}"], "is a folder"),
        (["demo", "--out", "{board}"], "Cannot write into"),
        (["demo", "--out", ""], "The name of the folder to write is empty"),
        (["ask", "{board}", "?", "--save", ""], "The name of the folder to write is empty"),
        (["ask", "{board}", "?", "--report", ""], "The name of the file to write is empty"),
        (["look", "{board}", "?", "--html", ""], "The name of the file to write is empty"),
        (["eval", "needle-scene", "--scorer", "nobody"], "Known: exact"),
        (["eval", "needle-scene", "--out", "{folder}/out", "--split", "nope"], "Unknown split 'nope'"),
        (["eval", "needle-scene", "--out", "{folder}/out", "--fonts", "{folder}/none"], "No typeface found"),
        (["eval", "needle-scene", "--json", "{board}/x.json"], "Cannot write into"),
        (["eval", "needle-scene", "--n", "2", "--out", "{board}"], "Cannot write into"),
        (["eval", "compare", "a", "b", "--json", "{board}/x.json"], "Cannot write into"),
        (["bench", "pareto", "--out", "{board}"], "Cannot write into"),
    ],
)
def test_mistakes_are_2_without_a_traceback(
    argv: list[str], says: str, play: Any, board: str, here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    play(lambda _: pytest.fail("the model was asked"))
    assert run(*[word.format(board=board, folder=here) for word in argv]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert says in captured.err
    assert captured.err.startswith(f"qzoom {argv[0]}: ")
    assert "Traceback" not in captured.err
    assert [path.name for path in here.iterdir()] == ["board.png"], "nothing is left behind"


def test_a_demo_board_that_cannot_be_written_is_named(
    play: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    play(lambda _: pytest.fail("the model was asked"))
    (tmp_path / "2-scene.png").mkdir()
    assert run("demo", "--out", str(tmp_path)) == 2
    assert "2-scene.png: it is a folder" in capsys.readouterr().err


def test_a_comparison_is_written_into_a_new_folder(play: Any, here: Path) -> None:
    play(lambda _: "7")
    assert run("eval", "needle-doc", "--n", "1", "--out", "run") == 0
    assert run("eval", "compare", "run", "run", "--json", "new/x.json") == 0
    assert json.loads((here / "new" / "x.json").read_text())["tasks"]["needle-doc"]["n"] == 1


def test_flags_win_over_set_and_set_over_the_file(
    play: Any, board: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    play(["42"])
    config = tmp_path / "config.yaml"
    config.write_text("policy: blind\nseed: 5\nbudget: {max_turns: 2, max_views: 2}\n")
    changes = ["--set", "budget.max_turns=4", "--set", "policy=oracle", "--policy", "direct"]
    assert run("ask", board, "?", "--json", "--config", str(config), *changes) == 0
    used = json.loads(capsys.readouterr().out)["config"]
    assert (used["policy"], used["seed"]) == ("direct", 5)
    assert (used["budget"]["max_turns"], used["budget"]["max_views"]) == (4, 2)


def test_an_answer_cannot_drive_the_terminal(play: Any, board: str, capsys: pytest.CaptureFixture[str]) -> None:
    play(["\x1b]0;owned\x07first\nsecond\x1b[2J"])
    assert run("ask", board, "?", "-v") == 0
    captured = capsys.readouterr()
    assert captured.out == "\\x1b]0;owned\\x07first\nsecond\\x1b[2J\n"
    assert "\x1b" not in captured.err


# ---- saved runs ----------------------------------------------------------------------------------------------------


def test_a_saved_run_can_be_shown_and_reported(
    play: Any, board: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    play(zoom_then("EXIT 24"))
    saved, page = str(tmp_path / "run"), tmp_path / "page.html"
    assert run("ask", board, "what is on the sign?", "--save", saved, "--report", str(page)) == 0
    live = [line.rpartition(" tokens")[0] for line in capsys.readouterr().err.splitlines()[:2]]
    assert "EXIT 24" in page.read_text()

    assert run("trace", "show", saved) == 0
    out = capsys.readouterr().out
    assert "what is on the sign?" in out and "answer EXIT 24" in out
    assert all(line in out for line in live)

    assert run("trace", "report", saved, "--expected", "EXIT 25") == 0
    written = Path(capsys.readouterr().out.strip())
    assert written == tmp_path / "run" / "report.html"
    assert "EXIT 25" in written.read_text()

    # The saved configuration repeats the run.
    assert run("ask", board, "what is on the sign?", "-q", "--config", str(tmp_path / "run" / "config.yaml")) == 0
    assert capsys.readouterr().out == "EXIT 24\n"
    # It has the model's own limits written out, which give way only when they are left to the model again.
    less = ["ask", board, "?", "-q", "--config", str(tmp_path / "run" / "config.yaml"), "--budget", "9"]
    assert run(*less) == 2
    assert "lower budget.coarse_min_tokens; null leaves one to the model" in capsys.readouterr().err
    assert run(*less, "--set", "budget.coarse_min_tokens=null") == 0


# ---- eval, demo ----------------------------------------------------------------------------------------------------


@pytest.mark.skipif(not Path("/proc/self/fd/1").is_symlink(), reason="of Linux")
def test_a_report_may_go_to_stdout(play: Any, board: str, tmp_path: Path) -> None:
    play(zoom_then("EXIT 24"))
    assert run("ask", board, "what is on the sign?", "--save", str(tmp_path / "run")) == 0
    argv = [sys.executable, "-m", "qzoom_agent", "trace", "report", str(tmp_path / "run"), "--out"]
    argv.append("/proc/self/fd/1")  # which is what /dev/stdout is, and nothing can take its place
    with (tmp_path / "page.html").open("wb") as page:
        for out in (subprocess.PIPE, page):
            done = subprocess.run(argv, stdout=out, check=True)
            written = done.stdout or (tmp_path / "page.html").read_bytes()
            assert written.startswith(b"<!doctype html>") and written.endswith(b"</html>\n")


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_progress_is_a_bar_on_a_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NO_COLOR", "1")
    stream = Terminal()
    progress = Progress(Console(stream=stream), "direct: ")
    progress.begin("needle-doc", 4)
    row = SampleResult(
        key="k", task="needle-doc", index=0, id="a", kind="x", cluster="a", seed=0, image="", size=(1, 1),
        question="?", gold=["7"], status="answered", scores={"exact": Score(1.0, "7")}, fired=True,
    )  # fmt: skip
    progress.row(row, new=True)
    progress.row(row.model_copy(update={"status": "error", "error": "gone", "scores": {}, "fired": False}), new=True)
    text = progress.text()
    assert text.startswith("direct: needle-doc \u2588\u2588\u2588\u2588\u2588\u2588\u2588\u2588\u2591")
    for part in ("2/4", "accuracy 0.500 \u00b1 0.500", "gate 50%", "parsed 50%", "/s", "left", "1 failed"):
        assert part in text
    assert "a: gone" in stream.getvalue()
    progress.begin("vstar", 1)
    progress.row(row.model_copy(update={"scores": {"replied": Score(1.0, "7")}}), new=True)
    assert "replied 1.000" in progress.text() and "accuracy" not in progress.text()


@pytest.mark.parametrize(
    ("argv", "asked"),
    [
        ([], "nano, nano, nano, nano-paper"),
        (["--model", "qwen3-vl-4b"], "qwen3-vl-4b, qwen3-vl-4b, qwen3-vl-4b, qwen3-vl-4b"),
        (["--seed", "2"], "nano, nano, nano"),
    ],
)
def test_demo_writes_pictures_and_reports(
    argv: list[str], asked: str, play: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    play(zoom_then(demo._shipped()[-1]["answer"]))
    out = tmp_path / "deep" / "demo"
    assert run("demo", "--out", str(out), *argv) == 0
    pictures = ["1-global.png", "2-scene.png", "3-hop.png", "4-receipt.jpg"][: len(asked.split(", "))]
    pages = [f"{Path(name).stem}.html" for name in pictures]
    assert {path.name for path in out.iterdir()} == {*pictures, *pages}
    texts = [(out / page).read_text(encoding="utf-8") for page in pages]
    assert ", ".join(model[1] for text in texts if (model := re.search(r"<span>model</span> ([^<]*)<", text))) == asked
    captured = capsys.readouterr()
    assert [line.endswith("(right)") for line in captured.out.splitlines()] == [False] * 3 + [True] * (len(pages) - 3)
    assert str(out) in captured.err


@pytest.mark.parametrize("number", [1, 2, 3])
def test_the_demo_ships_boards_of_the_generator(number: int) -> None:
    row = demo._shipped()[number - 1]
    shipped = demo._sample(row, number, None)
    drawn = demo._sample(row, number, 2)
    assert shipped.image.tobytes() == drawn.image.tobytes()
    assert (shipped.question, shipped.answer, shipped.boxes) == (drawn.question, drawn.answer, drawn.boxes)


# ---- models, train, doctor -----------------------------------------------------------------------------------------


def test_models_lists_every_preset(capsys: pytest.CaptureFixture[str]) -> None:
    assert run("models") == 0
    lines = capsys.readouterr().out.splitlines()[2:]
    assert [line.split()[0] for line in lines] == list(PRESETS)
    assert [line.split()[0] for line in lines if "in the package" in line] == ["nano", "nano-paper"]


def test_models_shows_how_one_is_run(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert run("models", "Mini-o3/Mini-o3-7B-v1") == 0
    out = capsys.readouterr().out
    for line in (
        "protocol +mini_o3",
        "first view +52 to 2551 tokens",
        r"budget.max_turns +12",
        "prompt +ours; .*Mini-o3",
    ):
        assert re.search(line, out), line
    (tmp_path / "config.json").write_text('{"model_type": "qwen3_vl"}')
    (tmp_path / "qzoom_prompt.yaml").write_text("final: Stop.")
    assert run("models", str(tmp_path)) == 0
    out = capsys.readouterr().out
    assert "only the family is known of it" in out and f"{tmp_path}/qzoom_prompt.yaml" in out
    assert run("models", "visionthink") == 0
    assert "at most 0.5 of the full sides" in capsys.readouterr().out
    assert run("models", "minio3") != 0
    assert "Did you mean 'mini-o3'" in capsys.readouterr().err


def test_ask_takes_a_prompt_file(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    wrong = tmp_path / "words.yaml"
    wrong.write_text("user: 'Say it'")
    Image.new("RGB", (64, 64)).save(tmp_path / "a.png")
    assert run("ask", str(tmp_path / "a.png"), "What?", "--prompt", str(wrong), "-q") == 2
    assert "prompt.user lacks the placeholder {question}" in capsys.readouterr().err


def test_train_hands_over_everything_after_the_stage(monkeypatch: pytest.MonkeyPatch) -> None:
    got: list[list[str]] = []

    class Stage:
        @staticmethod
        def main(argv: list[str]) -> int | None:
            got.append(argv)
            return None if len(got) == 1 else 5

    grpo = train.STAGES["grpo"].module
    monkeypatch.setattr(train.importlib, "import_module", lambda name: Stage if name == grpo else None)
    assert main(["train", "grpo", "--config", "r.yaml", "--help"]) == 0
    assert main(["train", "grpo"]) == 5
    assert got == [["--config", "r.yaml", "--help"], []]


def test_doctor_prints_one_table(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(doctor, "_PROBE", PROBE)
    code = run("doctor")
    captured = capsys.readouterr()
    names = [line.split("  ")[0] for line in captured.out.splitlines()]
    for name in ("qzoom-agent", "python", "torch", "device", "torchvision", "transformers", "nano", "disk here"):
        assert name in names
    assert code == (4 if "bad: " in captured.out else 0)
    assert str(Path.home()) + "/" not in captured.out


def test_doctor_needs_no_home_folder(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def homeless(path: Path) -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.setattr(doctor, "_PROBE", PROBE)
    monkeypatch.setattr(Path, "expanduser", homeless)
    monkeypatch.delenv("HF_HOME", raising=False)
    assert run("doctor") in (0, 4)
    assert "disk of models" in capsys.readouterr().out


def test_doctor_survives_a_broken_torch(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(doctor, "_PROBE", "import os; os.abort()")
    assert run("doctor") == 4
    assert "bad: torch: " in capsys.readouterr().out


@pytest.mark.parametrize(("error", "verdict"), [(None, "ok"), ("", "note"), ("RuntimeError: nms", "bad")])
def test_doctor_knows_the_torchvision_trap(error: str | None, verdict: str) -> None:
    assert doctor.torchvision(error).verdict == verdict


def test_a_terminal_without_the_letters_of_an_answer_shows_what_it_can(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The run is saved, and nothing ends in a traceback."""
    board, saved = tmp_path / "board.png", tmp_path / "saved"
    Image.new("RGB", (64, 64), "white").save(board)
    monkeypatch.setattr(ask, "load_agent", lambda args: Agent(ScriptedBackend(["\u51fa 24"])))
    terminals = {name: io.TextIOWrapper(io.BytesIO(), encoding="cp1252") for name in ("stdout", "stderr")}
    for name, terminal in terminals.items():
        monkeypatch.setattr(sys, name, terminal)
    assert main(["ask", str(board), "what?", "--save", str(saved)]) == 0
    terminals["stdout"].flush()
    assert terminals["stdout"].buffer.getvalue().split() == [b"\\u51fa", b"24"] and (saved / "trace.json").exists()


def test_a_crop_that_the_budget_keeps_back_is_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """nano's gate asks for one: the answer is given without it, and neither line nor exit code calls that answered."""
    question = sample("needle-doc", sample_seed(0, 0))
    question.image.save(tmp_path / "board.png")
    ask = ["ask", str(tmp_path / "board.png"), question.question]
    assert main([*ask, "--set", "budget.max_views=1", "--save", str(tmp_path / "saved")]) == BUDGET
    err = capsys.readouterr().err
    assert "gate 1.00 of 0.83: " in err and "the budget has no room for a crop" in err and "budget: 0 zooms" in err
    assert main([*ask, "-v"]) == 0
    err = capsys.readouterr().err
    assert "model   nano on " in err and "gate 1.00 of 0.83: the gate asks for more detail" in err
    assert main(["trace", "show", str(tmp_path / "saved")]) == 0
    assert "no room for a crop" in "".join(capsys.readouterr())


# ---- the console ---------------------------------------------------------------------------------------------------


def test_colours_need_a_terminal_that_wants_them(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("NO_COLOR", raising=False)
    monkeypatch.setenv("TERM", "xterm")
    assert Console(stream=Terminal()).style("x", "red") == "\x1b[31mx\x1b[0m"
    assert Console(stream=io.StringIO()).style("x", "red") == "x"
    monkeypatch.setenv("TERM", "dumb")
    assert Console(stream=Terminal()).style("x", "red") == "x"
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("NO_COLOR", "1")
    assert Console(stream=Terminal()).style("x", "red") == "x"


def test_progress_is_one_line_on_a_terminal_and_about_ten_in_a_file() -> None:
    terminal, file = Terminal(), io.StringIO()
    for stream in (terminal, file):
        console = Console(stream=stream)
        for done in range(1, 201):
            console.progress(done, 200, f"{done}/200")
        console.line("end")
    assert terminal.getvalue().count("\n") == 1
    assert terminal.getvalue().endswith("\r\x1b[Kend\n")
    assert file.getvalue().splitlines() == [*(f"{done}/200" for done in range(20, 201, 20)), "end"]


def test_the_command_that_opens_a_report_can_be_copied() -> None:
    command, path = shlex.split(opening(Path("my runs #1/report.html")))
    assert command in ("open", "xdg-open") and path == str(Path("my runs #1/report.html"))


def test_tables_and_printable() -> None:
    assert table([("a", "1"), ("long", "")], header=("x", "y")) == ["x     y", "----  -", "a     1", "long"]
    assert table([]) == []
    assert printable("a\nb\t\x9b\u202e\ud800'") == "a\\nb\\t\\x9b\\u202e\\ud800'"


def test_texts_from_a_file_do_not_steer_the_terminal(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """An escape sequence sets the title of a terminal, moves the cursor or hides what was printed before."""
    steering = "\x1b]0;title\x07\x1b[2J\u202e"
    assert table([(steering, "1")]) == ["\\x1b]0;title\\x07\\x1b[2J\\u202e  1"]
    Console(stream=sys.stderr).line(f"model {steering}\nnext")
    (tmp_path / "config.yaml").write_text(json.dumps({f"bud{steering}": 1}))
    assert main(["ask", "x.png", "What?", "--config", str(tmp_path / "config.yaml")]) == 2
    Image.new("RGB", (80, 60)).save(tmp_path / "a.png")
    (tmp_path / "table.jsonl").write_text(
        json.dumps({"id": steering, "image": "a.png", "question": "What?", "answer": "a"})
    )
    command = ["eval", str(tmp_path / "table.jsonl"), "--model", "nano", "--out", str(tmp_path / "run"), "--dry-run"]
    assert main(command) == 0
    out, told = capsys.readouterr()
    assert "Unknown key 'bud\\x1b]0;title" in told and "\\x1b]0;title" in out
    assert not any(char in out + told for char in "\x1b\x07\u202e")
