"""The evidence command: every row once, whatever interrupts it, in a table that says what was measured."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

import evidence
from evidence import BEGIN, CASES, END, Case, table, write
from qzoom_agent.agent import Agent
from qzoom_agent.config import AgentConfig
from qzoom_agent.errors import ConfigError
from qzoom_agent.evaluation.tasks.needle import SPLITS, TASK_NAMES, sample, sample_seed
from qzoom_agent.messages import Message
from qzoom_agent.models.scripted import ScriptedBackend

DOC, OOD = Case("needle-doc", "direct"), Case("needle-scene", "direct", split="ood")
ROOT = Path(__file__).resolve().parents[2]


class Loader:
    """Stands for `Agent`: hands out agents on a script, and keeps what was asked for."""

    def __init__(self) -> None:
        self.asked = 0
        self.stop_at: int | None = None

    @contextmanager
    def from_pretrained(self, model: str, *, config: AgentConfig) -> Iterator[Agent]:
        with Agent(ScriptedBackend(self.reply, name=model), config=config) as agent:
            yield agent

    def reply(self, messages: list[Message]) -> str:
        if self.asked == self.stop_at:
            raise KeyboardInterrupt
        self.asked += 1
        return sample("needle-doc", sample_seed(0, 0)).answer


@pytest.fixture
def loader(monkeypatch: pytest.MonkeyPatch) -> Loader:
    loader = Loader()
    monkeypatch.setattr(evidence, "Agent", loader)
    monkeypatch.setattr(evidence, "CASES", (DOC, OOD))
    return loader


def main(folder: Path, *options: str) -> int:
    return evidence.main(["--out", str(folder), "--n", "2", *options])


def cells(line: str) -> list[str]:
    return [cell.strip() for cell in line.strip("|").split("|")]


def test_only_whole_tables_are_written(loader: Loader, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="--write takes the whole table"):
        main(tmp_path / "runs", "--write", str(tmp_path / "page.md"), "--policies", "direct")


# ---- the rows ------------------------------------------------------------------------------------------------------


def test_every_task_is_judged_and_every_row_has_a_folder_of_its_own() -> None:
    assert {case.task for case in CASES} == set(TASK_NAMES)
    assert {case.split for case in CASES} <= set(SPLITS)
    assert len({case.name for case in CASES}) == len(CASES)
    assert all(Path(case.name).name == case.name for case in CASES)
    for task in TASK_NAMES:
        policies = {case.policy for case in CASES if case.task == task}
        assert policies >= set(evidence.POLICIES) - ({"oracle", "random"} if task == "needle-global" else set())


def test_a_table_says_what_was_measured(loader: Loader, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(tmp_path) == 0
    printed = capsys.readouterr()
    header, rule, doc, ood = printed.out.splitlines()
    assert len(cells(header)) == len(cells(rule)) == len(cells(doc)) == len(cells(ood)) == 12
    row = dict(zip(cells(header), cells(doc), strict=True))
    assert float(row.pop("seconds")) < 10
    assert 40 <= int(row.pop("visual tokens")) <= 64
    assert row == {
        "task": "needle-doc",
        "split": "test",
        "policy": "direct",
        "accuracy": "50.0%",
        "95 % interval": "9.5% to 90.5%",
        "n": "2",
        "zooms": "0.00",
        "gate": "-",
        "box recall": "0%",
        "failed calls": "-",
    }
    row = dict(zip(cells(header), cells(ood), strict=True))
    assert (row["task"], row["split"], row["n"]) == ("needle-scene", "ood", "2")
    assert printed.err.splitlines()[0] == "needle-doc--direct--test: 50.0% of 2"


def test_policies_with_branches_are_left_out_for_a_model_without(
    loader: Loader, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(evidence, "CASES", (Case("needle-doc", "implicit"), Case("needle-doc", "hybrid"), DOC))
    assert main(tmp_path) == 0
    assert len(capsys.readouterr().out.splitlines()) == 3


def test_what_a_policy_is_worth_is_paired_by_question(
    loader: Loader, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(evidence, "CASES", (DOC, Case("needle-doc", "explicit"), Case("needle-doc", "oracle")))
    assert main(tmp_path) == 0
    head, rule, doc = capsys.readouterr().out.split("\n\n")[1].splitlines()
    assert len(cells(head)) == len(cells(rule)) == len(cells(doc)) == 1 + len(evidence.PAIRS)
    worth = dict(zip(cells(head), cells(doc), strict=True))
    assert worth["explicit - direct"].startswith("+0.0 (") and worth["oracle - explicit"].startswith("+0.0 (")
    assert worth["explicit - blind"] == worth["hybrid - explicit"] == "-"


def test_a_table_of_nothing_is_its_head() -> None:
    assert len(table([]).splitlines()) == 2


def test_the_table_goes_between_its_marks(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text(f"before\n{BEGIN}\nold\n{END}\nafter\n")
    write("| new |", page)
    assert page.read_text() == f"before\n{BEGIN}\n\n| new |\n\n{END}\nafter\n"
    with pytest.raises(ConfigError, match="no place for the table"):
        write("| new |", tmp_path / "absent.md")


def test_the_page_of_nano_has_a_place_for_the_table() -> None:
    text = (ROOT / "docs" / "nano.md").read_text(encoding="utf-8")
    assert text.index(BEGIN) < text.index(END)


# ---- going on ------------------------------------------------------------------------------------------------------


def test_a_row_on_disk_is_not_run_again(loader: Loader, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(tmp_path) == 0
    first = capsys.readouterr()
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(case.name for case in (DOC, OOD))
    assert main(tmp_path) == 0
    again = capsys.readouterr()
    assert again.out == first.out
    assert not again.err
    assert loader.asked == 4


def test_a_row_of_another_evaluation_is_refused(loader: Loader, tmp_path: Path) -> None:
    assert main(tmp_path) == 0
    with pytest.raises(ConfigError, match=r"seed: 0 then, 1 now"):
        main(tmp_path, "--seed", "1")


def test_an_interrupted_row_goes_on(loader: Loader, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    loader.stop_at = 3  # one of the second row is answered
    with pytest.raises(KeyboardInterrupt):
        main(tmp_path)
    assert not (tmp_path / OOD.name / "results.json").exists()
    loader.stop_at = None
    assert main(tmp_path) == 0
    assert loader.asked == 4
    assert cells(capsys.readouterr().out.splitlines()[-1])[5] == "2"


# ---- parts ---------------------------------------------------------------------------------------------------------


def test_parts_share_the_rows_out(
    loader: Loader, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    cases = tuple(Case("needle-doc", "direct", split) for split in ("train", "test", "ood"))
    cases += tuple(Case("needle-scene", "direct", split) for split in ("test", "ood"))
    monkeypatch.setattr(evidence, "CASES", cases)
    ran: list[str] = []
    for part in (1, 2, 3):
        assert main(tmp_path, "--part", f"{part}/3") == 0
        rows = capsys.readouterr().out.splitlines()[2:]
        assert abs(len(rows) - len(cases) / 3) < 1
        ran += rows
    assert main(tmp_path) == 0
    assert sorted(capsys.readouterr().out.splitlines()[2:]) == sorted(ran)
    with pytest.raises(ConfigError, match="without --part"):
        main(tmp_path, "--part", "1/2", "--write", "docs.md")


@pytest.mark.parametrize("part", ["0/2", "3/2", "1", "1/", "/2", "a/b", "-1/2", "1/2/3"])
def test_a_part_that_is_none(loader: Loader, tmp_path: Path, part: str) -> None:
    with pytest.raises(ConfigError, match=rf"--part is I/K with 1 <= I <= K.*got '{part}'"):
        main(tmp_path / "out", f"--part={part}")
    assert not (tmp_path / "out").exists()
