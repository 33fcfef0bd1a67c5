"""What a path holds is part of what a result depends on: other rows or weights are refused."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from datasets import Dataset, DatasetDict

from qzoom_agent.data.rows import open_table
from qzoom_agent.errors import ConfigError
from qzoom_agent.training.branches.dataset import DatasetSpec
from qzoom_agent.training.contents import contents, digest
from qzoom_agent.training.grpo.grpo_recipe import GRPORecipe
from qzoom_agent.training.sft.sft_recipe import ColdStartRecipe
from qzoom_agent.training.trained_model import is_finished, keep_recipe


def table(path: Path, *answers: str) -> Path:
    rows = [{"image": "a.png", "question": "what?", "answer": answer} for answer in answers]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_a_digest_is_that_of_what_is_read(tmp_path: Path) -> None:
    rows = table(tmp_path / "rows.jsonl", "one", "two")
    first = digest(rows)
    assert first is not None and digest(table(tmp_path / "same.jsonl", "one", "two")) == first
    assert digest(table(rows, "one", "six")) != first
    (folder := tmp_path / "folder").mkdir()
    table(folder / "rows.jsonl", "one")
    (folder / "a.png").write_bytes(b"12")
    before = digest(folder)
    (folder / "a.png").write_bytes(b"123")
    assert digest(folder) != before
    saved = []
    for answer in ("one", "two"):
        Dataset.from_list([{"answer": answer}]).save_to_disk(str(tmp_path / answer))
        saved.append(digest(tmp_path / answer))
    assert None not in saved and len(set(saved)) == 2
    (tmp_path / "two" / "cache-0.arrow").write_bytes(b"12")
    (tmp_path / "two" / ".cache" / "huggingface").mkdir(parents=True)
    (tmp_path / "two" / ".cache" / "huggingface" / "rows.metadata").write_text("1764540000.5")
    assert digest(tmp_path / "two") == saved[1]
    assert digest(tmp_path / "nowhere") is None
    specs = [DatasetSpec(path="needle"), DatasetSpec(path=str(rows)), DatasetSpec(path="someone/somewhere")]
    assert contents("nobody/nothing", specs) == {
        "nobody/nothing": None,
        str(rows): digest(rows),
        "someone/somewhere": None,
    }


def test_a_run_on_other_rows_or_weights_is_refused(tmp_path: Path) -> None:
    (model := tmp_path / "model").mkdir()
    (model / "model.safetensors").write_bytes(b"one")
    rows = table(tmp_path / "rows.jsonl", "one")
    held = table(tmp_path / "held.jsonl", "one")
    evaluation = {"data": [{"path": str(held)}]}
    recipe = GRPORecipe(max_steps=1, model=str(model), needle={}, data=[{"path": str(rows)}], evaluation=evaluation)
    (final := tmp_path / "out" / "final").mkdir(parents=True)
    keep_recipe(recipe, tmp_path / "out")
    assert is_finished(recipe, tmp_path / "out")
    for path, was, other in ((held, "one", "two"), (rows, "one", "two"), (model / "model.safetensors", "one", "two")):
        known = path.read_text()
        path.write_text(known.replace(was, other))
        with pytest.raises(
            ConfigError, match=r"other data or weights \(contents\..* To resume it, give them as they were"
        ):
            is_finished(recipe, tmp_path / "out")
        path.write_text(known)
    stored = tmp_path / "out" / recipe.stored
    older = json.loads(stored.read_text())
    del older["contents"]  # as an older version wrote it
    stored.write_text(json.dumps(older))
    with pytest.warns(
        UserWarning, match="final was begun by an earlier version, which kept no digest of data and weights"
    ):
        assert final.exists() and is_finished(recipe, tmp_path / "out")
    (tmp_path / "out" / "checkpoint-1").mkdir()
    (tmp_path / "out" / "checkpoint-1" / "trainer_state.json").write_text("{}")
    for _ in range(2):  # nor does resuming it claim that it was begun with those of today
        with pytest.warns(UserWarning, match="kept no digest of data and weights"):
            keep_recipe(recipe, tmp_path / "out")
    assert "contents" not in json.loads(stored.read_text())


def test_a_run_with_other_branches_in_the_same_folder_is_refused(tmp_path: Path) -> None:
    """A cold start calls where they look, and both kinds of runs ship them."""
    (branches := tmp_path / "branches").mkdir()
    (branches / "branches.safetensors").write_bytes(b"one")
    data: list[dict[str, object]] = [{"path": "needle"}]
    given = {"branches": str(branches), "data": data}
    for recipe in (ColdStartRecipe(**given), GRPORecipe(max_steps=1, **given)):  # type: ignore[arg-type]
        out = tmp_path / recipe.stored
        (out / "final").mkdir(parents=True)
        (branches / "branches.safetensors").write_bytes(b"one")
        keep_recipe(recipe, out)
        assert is_finished(recipe, out)
        (branches / "branches.safetensors").write_bytes(b"two")
        with pytest.raises(ConfigError, match=r"final was begun with other data or weights \(contents\..*branches"):
            is_finished(recipe, out)


def test_a_folder_with_one_table_is_read_as_that_table(tmp_path: Path) -> None:
    table(tmp_path / "rows.jsonl", "one", "two")
    (tmp_path / "a.png").touch()
    assert len(open_table(str(tmp_path))) == 2
    DatasetDict({"test": Dataset.from_list([{"answer": "one"}])}).save_to_disk(str(tmp_path / "saved"))
    assert len(open_table(str(tmp_path / "saved"))) == 1
    both = DatasetDict({name: Dataset.from_list([{"answer": name}]) for name in ("one", "two")})
    both.save_to_disk(str(tmp_path / "both"))
    with pytest.raises(ConfigError, match=r"has no split 'train'\. There are: one, two"):
        open_table(str(tmp_path / "both"))
