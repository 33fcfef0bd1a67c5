"""Names and files of earlier versions, which said "suite" where the field says "task"."""

from __future__ import annotations

import importlib
import json
import sys
from pathlib import Path

import pytest

from qzoom_agent.confidence import Calibration
from qzoom_agent.errors import ConfigError
from qzoom_agent.evaluation.run_log import RunFolder
from qzoom_agent.evaluation.runner import evaluate
from qzoom_agent.evaluation.summary import Results
from qzoom_agent.evaluation.tasks import catalog
from qzoom_agent.training.branches.dataset import DatasetSpec
from tests.evaluation.player import Watcher, numbers, player


def _old(value: object) -> object:
    """The same document with the keys of earlier versions."""
    if isinstance(value, dict):
        return {{"task": "suite", "tasks": "suites"}.get(key, key): _old(one) for key, one in value.items()}
    return [_old(one) for one in value] if isinstance(value, list) else value


def test_files_of_a_later_format_are_refused_by_name(tmp_path: Path) -> None:
    evaluate(player(), [numbers()], out=tmp_path)
    (tmp_path / "confidence.json").write_text('{"version": "1.0", "policies": {}}')
    folder = RunFolder.existing(tmp_path)
    readers = {
        "run.json": lambda: folder.ask,
        "results.json": lambda: Results.of(folder),
        "confidence.json": lambda: Calibration.load(tmp_path / "confidence.json"),
    }
    for name, read in readers.items():
        data = json.loads((tmp_path / name).read_text())
        for later in ("1.7", "2.0"):  # of a later minor version what is not known is left out
            (tmp_path / name).write_text(json.dumps(data | {"version": later, "unknown": 1}))
            if later == "1.7":
                assert read().version == later
                continue
            with pytest.raises(
                ConfigError, match=f"{name}: it has the format 2.0 of a later qzoom-agent, .* reads 1.0"
            ):
                read()
    (tmp_path / "config.yaml").write_text("unknown: 1\n")
    with pytest.raises(ConfigError, match=r"config\.yaml: Unknown key 'unknown'"):
        _ = folder.config


def test_a_run_folder_of_an_earlier_version_opens_and_resumes(tmp_path: Path) -> None:
    results = evaluate(player(), [numbers()], out=tmp_path)
    for name in ("run.json", "results.json"):
        (tmp_path / name).write_text(json.dumps(_old(json.loads((tmp_path / name).read_text()))))
    rows = (tmp_path / "samples.jsonl").read_text().splitlines()
    (tmp_path / "samples.jsonl").write_text("".join(json.dumps(_old(json.loads(row))) + "\n" for row in rows))
    assert '"suites"' in (tmp_path / "results.json").read_text()

    folder = RunFolder.existing(tmp_path)
    assert Results.of(folder).tasks["numbers"].accuracy == results.tasks["numbers"].accuracy
    assert [row.task for row in folder.latest()] == ["numbers"] * len(rows)
    watch = Watcher()
    evaluate(player(), [numbers()], out=tmp_path, watch=watch)
    assert watch.rows and not any(new for _, new in watch.rows)


def test_old_names_warn(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in sys.modules if name.startswith("qzoom_agent.evals")]:
        monkeypatch.delitem(sys.modules, name)  # another test of this process may have imported it
    with pytest.warns(DeprecationWarning, match=r"evaluation\.tasks\.catalog"):
        old = importlib.import_module("qzoom_agent.evals.suites.catalog")
    assert old.find_suite("vstar") is catalog.TASKS["vstar"] is old.SUITES["vstar"]
    results = evaluate(player(), [numbers()], out=tmp_path)
    with pytest.warns(DeprecationWarning, match=r"Results\.tasks"):
        assert results.suites is results.tasks  # type: ignore[deprecated]


def test_recipes_may_still_say_suites() -> None:
    old = DatasetSpec.model_validate({"path": "needle", "suites": ["needle-hop"]})
    assert old == DatasetSpec(path="needle", tasks=("needle-hop",))
