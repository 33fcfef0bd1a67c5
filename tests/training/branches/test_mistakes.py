"""What a user may get wrong ends in a message and exit code 2, before anything expensive was done."""

import json
from pathlib import Path
from typing import Any

import pytest
from yaml import safe_dump

from qzoom_agent.agent import Agent
from qzoom_agent.cli.main import main as qzoom
from qzoom_agent.errors import ConfigError, ImageError
from qzoom_agent.geometry import Box
from qzoom_agent.training.branches.dataset import DatasetSpec, load_records
from tests.training.branches.conftest import picture
from tests.training.branches.test_branch_stages import written


def refused(capsys: pytest.CaptureFixture[str], *command: str) -> str:
    """What is said of a command that is refused, by its own parser or after it."""
    try:
        assert qzoom(list(command)) == 2
    except SystemExit as left:
        assert left.code == 2
    return capsys.readouterr().err


@pytest.mark.parametrize(
    ("command", "told"),
    [
        (("bench", "pareto", "--n", "0"), "--n: a whole number from 1 on is needed; got '0'"),
        (("bench", "ablation", "k", "--n", "-1"), "--n: a whole number from 1 on"),
        (("bench", "pareto", "--budgets", "64,0"), "--budgets: a whole number from 1 on"),
        (("bench", "pareto", "--n", "many"), "got 'many'"),
        (("train", "sdrpn", "--config", "x.yaml", "--devices", "0"), "--devices: a whole number from 1 on"),
        (("train", "grpo", "--config", "x.yaml", "--devices", "0"), "--devices: a whole number from 1 on"),
    ],
)
def test_counts_of_nothing(command: tuple[str, ...], told: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert told in refused(capsys, *command)


@pytest.fixture
def unasked(monkeypatch: pytest.MonkeyPatch) -> None:
    """No model is loaded, so no question is asked."""

    def load(*args: Any, **kwargs: Any) -> Agent:
        raise AssertionError("a model was loaded")

    monkeypatch.setattr(Agent, "from_pretrained", load)


@pytest.mark.usefixtures("unasked")
def test_where_results_go_is_looked_at_before_they_are_measured(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = str(tmp_path / "out")
    told = refused(capsys, "bench", "pareto", "--out", out, "--tasks", "needle-scene,needle-dock")
    assert "Unknown task 'needle-dock'" in told and "needle-doc" in told
    (tmp_path / "file").write_text("")
    for command in (["pareto"], ["ablation", "k"]):
        assert "Choose another folder" in refused(capsys, "bench", *command, "--out", str(tmp_path / "file"))


def test_an_output_that_is_a_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "file").write_text("")
    command = ("train", "select-heads", "--config", str(written(tmp_path)), "--output")
    for output in (tmp_path / "file", tmp_path / "file" / "in-it"):
        assert f"Cannot write into {output}" in refused(capsys, *command, str(output))


def test_data_that_is_not_there(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    lines = tmp_path / "rows.jsonl"
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(safe_dump({"model": "nano", "data": [{"path": str(lines)}]}))
    command = ("train", "select-heads", "--config", str(recipe), "--output", str(tmp_path / "out"))
    lines.write_text("")
    assert "there is nothing in it" in refused(capsys, *command)
    picture(0).save(tmp_path / "one.png")
    names = ["one.png", "two.png", "three.png", None]
    lines.write_text("\n".join(json.dumps({"image": name, "question": "?", "answer": "x"}) for name in names))
    told = refused(capsys, *command)
    assert "3 of 4 rows that cannot be asked: row 2: The image 'two.png' is neither a file in" in told


@pytest.mark.parametrize("dry", [["--dry-run"], []])
def test_layers_that_the_base_has_not_are_said_before_anything_is_asked(
    dry: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(safe_dump({"model": "nano", "k": 9, "depth": 1, "data": [{"path": "needle", "limit": 8}]}))
    told = refused(capsys, "train", "branches", "--config", str(recipe), "--output", str(tmp_path / "out"), *dry)
    assert "k 9 and depth 1 need a base of 10 layers or more; nano has 9. Choose a smaller k or depth." in told
    assert not (tmp_path / "out").exists()


def test_questions_that_are_trained_on_and_held_out_are_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = [{"image": "one.png", "question": "?", "answer": "x"}] * 2
    for name in ("a.jsonl", "b.jsonl"):
        (tmp_path / name).write_text("\n".join(map(json.dumps, rows)))
    a, b = ({"path": str(tmp_path / name)} for name in ("a.jsonl", "b.jsonl"))
    hub = {"path": "owner/table", "limit": 8}
    boards = {"path": "needle", "limit": 8}
    recipe = tmp_path / "recipe.yaml"
    for learned, held, named in (
        (a, b, False), (a, a, True), (a, {**a, "limit": 1, "seed": 1}, True), (a, {**a, "split": "test"}, True),
        (hub, hub, True), (hub, {**hub, "split": "test"}, False),
        (boards, {**boards, "seed": 1}, False), (boards, {**boards, "limit": 4}, True),
    ):  # fmt: skip
        recipe.write_text(safe_dump({"model": "nano", "data": [learned], "held_out": [held]}))
        assert qzoom(["train", "sdrpn", "--config", str(recipe), "--dry-run"]) == 0
        assert ("questions that were trained on" in capsys.readouterr().err) == named


def test_an_image_that_is_none(tmp_path: Path) -> None:
    (tmp_path / "one.png").write_text("no picture")
    (tmp_path / "rows.jsonl").write_text(json.dumps({"image": "one.png", "question": "?", "answer": "x"}))
    with pytest.raises(ConfigError, match=r"rows\.jsonl has 1 of 1 rows .*row 1: Not an image"):
        load_records([DatasetSpec(path=str(tmp_path / "rows.jsonl"))])
    assert not issubclass(ImageError, ConfigError) and ImageError.exit_code == 2


@pytest.mark.parametrize(
    ("row", "told"),
    [
        ({"boxes": [[1, 2, 3]]}, r"row 2: boxes \[1, 2, 3\] is no box"),
        ({"boxes": [[9, 2, 3, 4]]}, "row 2: .* x1 < x2"),
        ({"answer": None}, "row 2: there is neither an answer nor answers"),
    ],
)
def test_rows_that_cannot_be_learned_from_are_named(row: dict[str, Any], told: str, tmp_path: Path) -> None:
    picture(0).save(tmp_path / "a.png")
    good = {"image": "a.png", "question": "what?", "answer": "b", "boxes": [[1, 2, 3, 4]]}
    file = tmp_path / "rows.jsonl"
    file.write_text("".join(json.dumps(one) + "\n" for one in (good, good | row)))
    with pytest.raises(ConfigError, match=told):
        load_records([DatasetSpec(path=str(file))])
    file.write_text("".join(json.dumps(one) + "\n" for one in (good, good | {"boxes": []}, good | {"boxes": None})))
    boxes = [one.known_boxes for one in load_records([DatasetSpec(path=str(file))])]
    assert boxes == [(Box(1, 2, 3, 4),), (), None]


@pytest.mark.usefixtures("unasked")
def test_what_is_not_there_is_said_before_anything_is_loaded(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    told = refused(capsys, "eval", "needle-doc", "--n", "1", "--out", str(tmp_path / "o"), "--branches", "/no/such")
    assert "There is no folder /no/such" in told
    out = tmp_path / "run"
    for section in (
        {"sdrpn": {"optimisation": {"report_to": "wandbb"}}},
        {"postsft": {"refit": {"report_to": "wandbb"}}},
    ):
        recipe = written(tmp_path, stages=["select-heads"], **section)
        told = refused(capsys, "train", "branches", "--config", str(recipe), "--output", str(out))
        assert "no tracker 'wandbb'" in told and not out.exists()
