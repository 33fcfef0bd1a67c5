"""Several processes share a run and leave what one process leaves."""

from __future__ import annotations

from pathlib import Path

import pytest

from qzoom_agent.evaluation.run_log import RunFolder
from qzoom_agent.evaluation.runner import Shard, evaluate
from tests.evaluation import killing
from tests.evaluation.player import lines, numbers, player
from tests.evaluation.sharing import two_processes
from tests.evaluation.test_kill import timeless


class Pretend(Shard):
    """One of several processes that run one after the other."""

    def wait(self) -> None:
        pass


def test_parts_are_merged(tmp_path: Path) -> None:
    saw: list[int] = []
    evaluate(player(saw=saw), [numbers(7)], out=tmp_path, repeats=2, limit=4)
    for index in (2, 1, 0):
        results = evaluate(player(saw=saw), [numbers(7)], out=tmp_path, repeats=2, shard=Pretend(index, 3))
    assert sorted(saw) == sorted(list(range(7)) * 2), "each sample is asked twice, whoever asks"
    assert results.tasks["numbers"].n == 7
    assert not results.tasks["numbers"].partial
    assert not list(tmp_path.glob("samples.*.jsonl"))
    assert len(lines(tmp_path / "samples.jsonl")) == 14


def test_rows_of_another_process_count_before_they_are_merged(tmp_path: Path) -> None:
    evaluate(player(), [numbers(6)], out=tmp_path, limit=1)
    evaluate(player(), [numbers(6)], out=tmp_path, shard=Pretend(1, 2))
    assert (tmp_path / "samples.1.jsonl").exists()
    saw: list[int] = []
    evaluate(player(saw=saw), [numbers(6)], out=tmp_path)
    assert not set(saw) & {1, 3, 5}
    assert [row.index for row in RunFolder(tmp_path).latest()] == list(range(6))


def test_an_answer_counts_before_the_failure_that_another_process_left(tmp_path: Path) -> None:
    """A run of three processes was killed before it was merged; one goes on with it."""
    evaluate(player(), [numbers(6)], out=tmp_path, traces=False)
    rows = RunFolder(tmp_path).latest()
    rows[5] = rows[5].model_copy(update={"status": "error", "answer": None})
    (tmp_path / "samples.jsonl").unlink()
    for index in range(3):
        text = "".join(row.model_dump_json() + "\n" for row in rows[index::3])
        (tmp_path / f"samples.{index}.jsonl").write_text(text, encoding="utf-8")
    saw: list[int] = []
    results = evaluate(player(saw=saw), [numbers(6)], out=tmp_path)
    assert saw == [5]
    assert (results.tasks["numbers"].failed, results.tasks["numbers"].accuracy) == (0, 1.0)


def test_without_a_launcher_there_is_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    assert Shard.launched() == Shard(0, 1)
    assert Shard().device is None


@pytest.mark.slow
def test_two_processes_of_accelerate_leave_what_one_leaves(tmp_path: Path) -> None:
    both, one = tmp_path / "both", tmp_path / "one"
    printed = two_processes("tests.evaluation.sharing", str(both), "24")
    # not by line: the two may write at the same time
    assert all(f"process {index} of 2" in printed for index in (0, 1))
    killing.go_on(one, 24)
    assert timeless([row.model_dump(mode="json") for row in RunFolder(both).latest()]) == timeless(
        [row.model_dump(mode="json") for row in RunFolder(one).latest()]
    )
    assert (both / "results.json").exists()
    assert not list(both.glob("samples.*.jsonl"))
