"""Two policies or two models side by side, from run folders that the evidence command wrote."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from shutil import copytree

import pytest

import evidence
import review_savings as saving
from qzoom_agent.agent import Agent
from qzoom_agent.config import AgentConfig
from qzoom_agent.errors import ConfigError
from qzoom_agent.evaluation.run_log import RunFolder
from qzoom_agent.evaluation.tasks.task import Score
from qzoom_agent.messages import Message, view_ids
from qzoom_agent.models.scripted import ScriptedBackend

CALL = "<zoom><loc_0><loc_0><loc_56><loc_56></zoom>"


class Zooming:
    """Stands for `Agent`: a model that zooms onto the upper left corner as long as it may, then says 7."""

    @contextmanager
    def from_pretrained(self, model: str, *, config: AgentConfig) -> Iterator[Agent]:
        def reply(messages: list[Message]) -> str:
            shown = len(view_ids(messages))
            return CALL if "You may zoom." in str(messages[0]) and shown < int(model) else "7"

        with Agent(ScriptedBackend(reply, name=model), config=config) as agent:
            yield agent


@pytest.fixture(scope="module", autouse=True)
def zooming() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(evidence, "Agent", Zooming())
        yield


@pytest.fixture(scope="module")
def recorded(zooming: None, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model that zooms once and one that zooms twice, asked two questions of each task."""
    folder = tmp_path_factory.mktemp("runs")
    for views in ("2", "3"):
        out = str(folder / views)
        assert evidence.main(["--out", out, "--n", "2", "--model", views, "--policies", "direct,explicit"]) == 0
    return folder


@pytest.fixture
def run(recorded: Path, tmp_path: Path) -> Path:
    """The recorded runs, free to change."""
    return copytree(recorded, tmp_path / "runs")


def cells(line: str) -> list[str]:
    return [cell.strip() for cell in line.strip("|").split("|")]


@pytest.mark.slow
def test_redundant_crops_are_counted_and_compared_in_pairs(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    capsys.readouterr()
    assert saving.main([str(run / "2"), str(run / "3"), "--policies", "explicit"]) == 0
    head, _, once, twice, change = (cells(line) for line in capsys.readouterr().out.splitlines())
    assert head[0] == "10 questions" and once[0] == "2: explicit" and twice[0] == "3: explicit"
    row, other = dict(zip(head, once, strict=True)), dict(zip(head, twice, strict=True))
    assert row["crops for 100 questions"] == "100.0" and other["crops for 100 questions"] == "200.0"
    assert float(other["redundant"]) >= float(row["redundant"]) + 50, "the second crop repeats the first"
    needless = row["needless / repeated / missed"].split(" / ")
    assert needless[0] == "20.0" and row["zoomed on needle-global"] == "100.0%"
    assert float(row["redundant"]) == pytest.approx(sum(map(float, needless)))
    assert change[2].startswith("+100.0") and change[2].endswith("+100%")
    assert row["turns"] == "2.0" and change[4].startswith("+1.0")


def test_without_crops_nothing_is_redundant(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    capsys.readouterr()
    assert saving.main([str(run / "2"), "--policies", "explicit,direct"]) == 0
    head, _, direct, *_ = (cells(line) for line in capsys.readouterr().out.splitlines())
    assert dict(zip(head, direct, strict=True))["redundant"] == "0.0"


def test_what_was_not_run_is_named(run: Path) -> None:
    with pytest.raises(ConfigError, match=r"hybrid--test has no results yet"):
        saving.main([str(run / "2")])
    with pytest.raises(ConfigError, match="no policy greedy"):
        saving.main([str(run / "2"), "--policies", "greedy"])
    with pytest.raises(ConfigError, match="no policy greedy"):
        evidence.main(["--out", str(run / "4"), "--policies", "greedy"])


def test_rows_of_two_folders_can_be_set_beside_each_other(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """So that a policy with another setting, in a folder of its own, is compared with one without."""
    out = ["--out", str(run / "few"), "--n", "2", "--model", "3", "--policies", "explicit"]
    assert evidence.main([*out, "--set", "budget.max_turns=1"]) == 0
    capsys.readouterr()
    assert saving.main([f"{run / '2'}:direct", f"{run / 'few'}:explicit"]) == 0
    head, _, direct, few, _ = (cells(line) for line in capsys.readouterr().out.splitlines())
    assert (direct[0], few[0]) == ("2: direct", "few: explicit")
    assert dict(zip(head, few, strict=True))["crops for 100 questions"] == "100.0", "one turn, one crop"
    with pytest.raises(ConfigError, match="holds another run"):
        evidence.main(out)
    with pytest.raises(ConfigError, match="without --part, --policies and --set"):
        evidence.main([*out[:4], "--set", "seed=1", "--write", "page.md"])
    with pytest.raises(ConfigError, match="KEY=VALUE"):
        evidence.main([*out, "--set", "seed"])


def test_right_answers_are_priced_by_those_of_whole_boards(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Half as many right answers at five times the tokens: a tenth of the price."""
    small, whole = run / "2", run / "whole"
    names = ("needle-scene", "needle-doc")
    copied = [small / f"{name}--explicit--test" for name in names]
    rows = [row for folder in copied for row in RunFolder.existing(folder).latest()]
    right, wrong = ({"exact": Score(value, "7")} for value in (1.0, 0.0))
    for folder in copied:
        mine = RunFolder.existing(folder)
        mine.replace_rows([row.model_copy(update={"scores": right}) for row in mine.latest()])
    ask = RunFolder.existing(copied[0]).ask
    both = ask.model_copy(update={"tasks": {name: next(iter(ask.tasks.values())) for name in names}})
    whole.mkdir()
    there = RunFolder(whole)
    there.write("run.json", both.model_dump_json())
    dear = [
        row.model_copy(
            update={
                "scores": right if at % 2 else wrong,
                "usage": row.usage.model_copy(update={"coarse_tokens": 5 * row.visual_tokens, "crop_tokens": 0}),
            }
        )
        for at, row in enumerate(rows)
    ]
    there.replace_rows(dear)
    asked = [str(small), "--policies", "explicit", "--whole", str(whole)]
    with pytest.raises(ConfigError, match=r"whole has no results yet"):
        saving.main(asked)
    there.write("results.json", "{}")
    capsys.readouterr()
    assert saving.main(asked) == 0
    head, _, base, own = (cells(line) for line in capsys.readouterr().out.rpartition("\n\n")[2].splitlines())
    assert head[0] == "4 questions of needle-scene, needle-doc"
    assert (base[0], base[1], base[3]) == ("whole: whole boards", "50.0", "1")
    assert own[0] == "2: explicit" and own[1] == "100.0" and own[3].startswith("0.100")
    there.replace_rows(dear[1:])
    with pytest.raises(ConfigError, match="asked different questions"):
        saving.main(asked)
