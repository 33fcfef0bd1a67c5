"""A run as other tools read it."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import pytest
import yaml

from qzoom_agent.cli.main import main
from qzoom_agent.errors import ConfigError
from qzoom_agent.evaluation.export import export
from qzoom_agent.evaluation.run_log import RunFolder
from qzoom_agent.evaluation.runner import evaluate
from tests.evaluation.player import numbers, player


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> RunFolder:
    folder = tmp_path_factory.mktemp("export") / "run"
    evaluate(player(lambda i: i % 3 > 0), [numbers(6)], out=folder, traces=False)
    return RunFolder(folder)


def test_parquet_has_typed_columns(run: RunFolder, tmp_path: Path) -> None:
    datasets, pandas = pytest.importorskip("datasets"), pytest.importorskip("pandas")
    path = export(run, "parquet", tmp_path / "rows.parquet")
    frame = pandas.read_parquet(path)
    scorer = next(iter(run.latest()[0].scores))
    assert frame[f"score_{scorer}"].dtype == "float64" and frame[f"parsed_{scorer}"].dtype == "bool"
    assert frame[f"score_{scorer}"].mean() == pytest.approx(4 / 6)
    assert list(frame["id"]) == [row.id for row in run.latest()]
    table = datasets.Dataset.from_parquet(str(path), cache_dir=str(tmp_path / "cache"))
    assert table.features["gold"].feature.dtype == "string" and table[0]["gold"] == run.latest()[0].gold


def test_csv(run: RunFolder) -> None:
    path = export(run, "csv")
    assert path == run.path / "samples.csv"
    with path.open(encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    scorer = next(iter(run.latest()[0].scores))
    assert [float(row[f"score_{scorer}"]) for row in rows] == [row.value(scorer) for row in run.latest()]
    assert json.loads(rows[0]["gold"]) == run.latest()[0].gold and rows[0]["error"] == ""


def test_results_for_a_model_card(run: RunFolder, tmp_path: Path) -> None:
    cards = pytest.importorskip("huggingface_hub").repocard_data
    index = yaml.safe_load(export(run, "hf", tmp_path / "card.yaml").read_text(encoding="utf-8"))["model-index"]
    _, (found, *others) = cards.model_index_to_eval_results(index)
    assert len(others) == 1  # a result for each scorer
    assert found.metric_type == "accuracy" and found.metric_value == pytest.approx(4 / 6)
    assert found.dataset_name == run.latest()[0].task and "6" in found.metric_name


def test_submissions(run: RunFolder, tmp_path: Path) -> None:
    lines = export(run, "submission", tmp_path / "answers.jsonl").read_text(encoding="utf-8").splitlines()
    assert [json.loads(line)["answer"] for line in lines] == [row.answer or "" for row in run.latest()]
    as_docvqa = RunFolder(tmp_path / "docvqa")
    as_docvqa.path.mkdir()
    spec = json.loads((run.path / "run.json").read_text())
    spec["tasks"] = {"docvqa": next(iter(spec["tasks"].values()))}
    (as_docvqa.path / "run.json").write_text(json.dumps(spec))
    row = run.latest()[1].model_copy(update={"task": "docvqa", "id": "docvqa-49153", "answer": "7"})
    (as_docvqa.path / "samples.jsonl").write_text(row.model_dump_json() + "\n")
    assert json.loads(export(as_docvqa, "submission").read_text()) == [{"questionId": 49153, "answer": "7"}]


def test_a_submission_without_all_answers_says_so(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    evaluate(player(), [numbers(6)], out=tmp_path, traces=False, limit=2)
    assert main(["eval", "export", str(tmp_path), "--to", "submission"]) == 0
    assert "The run asked 2 of 6 questions" in capsys.readouterr().err
    evaluate(player(), [numbers(6)], out=tmp_path, traces=False)
    assert main(["eval", "export", str(tmp_path), "--to", "submission"]) == 0
    assert capsys.readouterr().err == ""


def test_a_submission_is_of_one_answer_to_each_question(tmp_path: Path) -> None:
    evaluate(player(), [numbers(2)], out=tmp_path, traces=False, repeats=3)
    with pytest.raises(ConfigError, match="the run asks numbers, each question 3 times"):
        export(RunFolder(tmp_path), "submission")


def test_nothing_to_export(tmp_path: Path, run: RunFolder) -> None:
    empty = RunFolder(tmp_path)
    (tmp_path / "run.json").write_text((run.path / "run.json").read_text())
    with pytest.raises(ConfigError, match="nothing to export"):
        export(empty, "csv")
