"""Rows of Ray Data are answered in batches, by one agent a worker."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from PIL import Image

from qzoom_agent.agent import Agent
from qzoom_agent.errors import ConfigError
from qzoom_agent.integrations.ray import AskRows
from qzoom_agent.models.scripted import ScriptedBackend
from qzoom_agent.zoom.image_zoom import data_url


def agent() -> Agent:
    return Agent(ScriptedBackend(lambda _: "42"), policy="direct")


def test_each_row_gets_its_answer(tmp_path: Path) -> None:
    Image.new("RGB", (168, 112)).save(tmp_path / "a.png")
    data = data_url(Image.new("RGB", (168, 112)))
    table = pa.table({"image": ["a.png", "missing.png", data], "question": ["what?", "what?", ""], "n": [1, 2, 3]})
    found = AskRows(agent, folder=tmp_path)(table)
    assert found.column_names[:4] == ["image", "question", "n", "answer"]
    rows = found.to_pylist()
    assert [row["status"] for row in rows] == ["answered", "error", "error"]
    assert rows[0]["answer"] == "42" and rows[0]["visual_tokens"] > 0 and rows[0]["boxes"] == []
    assert "missing.png" in rows[1]["error"] and rows[2]["error"]
    again = AskRows(agent, folder=tmp_path, question="which?")(found.drop_columns(["question"]))
    assert [row["status"] for row in again.to_pylist()] == ["answered", "error", "answered"]
    assert again.schema.field("boxes").type == pa.list_(pa.list_(pa.float64()))
    with pytest.raises(ConfigError, match=r"have answer already.*Rename"):
        AskRows(agent)(pa.table({"image": [data], "question": ["what?"], "answer": ["known"]}))
    with pytest.raises(ConfigError, match="lack question"):
        AskRows(agent)(pa.table({"image": ["a.png"]}))


@pytest.mark.slow
def test_a_local_cluster_answers_with_nano(tmp_path: Path) -> None:
    ray = pytest.importorskip("ray")
    data: Any = pytest.importorskip("ray.data")
    from importlib import resources

    demo = Path(str(resources.files("qzoom_agent.data") / "demo"))
    questions = json.loads((demo / "questions.json").read_text())
    lines = [json.dumps({"image": one["image"], "question": one["question"]}) for one in questions]
    (tmp_path / "questions.jsonl").write_text("\n".join(lines))
    ray.init(num_cpus=2, include_dashboard=False, configure_logging=False)
    try:
        rows = data.read_json(str(tmp_path / "questions.jsonl"))
        how: Any = {"model": "nano", "folder": str(demo), "device": "cpu"}
        asked = rows.map_batches(
            AskRows, fn_constructor_kwargs=how, batch_format="pyarrow", batch_size=2, concurrency=1
        ).take_all()
    finally:
        ray.shutdown()
    assert {row["image"]: row["answer"] for row in asked} == {one["image"]: one["answer"] for one in questions}
