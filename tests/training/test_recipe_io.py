"""Recipes: single keys set on the command line, and keys that got another name."""

from pathlib import Path
from typing import Any, ClassVar

import pytest
from pydantic import BaseModel, Field
from yaml import safe_dump, safe_load

from qzoom_agent.cli.main import main as qzoom
from qzoom_agent.errors import ConfigError
from qzoom_agent.files import sole_writer
from qzoom_agent.training.branches import stages
from qzoom_agent.training.grpo import launch
from qzoom_agent.training.recipe_io import Section, read_recipe, set_key, with_new_names
from qzoom_agent.training.sft import fine_tune

FOLDER = Path(__file__).resolve().parents[2] / "rl" / "recipes" / "nano"


class Part(Section):
    renamed: ClassVar = {"batch": "per_device_train_batch_size"}

    per_device_train_batch_size: int = 8
    learning_rate: float = 1e-3


class Item(Section):
    path: str
    part: Part | None = None


class Whole(Section):
    renamed: ClassVar = {"steps": "max_steps"}

    max_steps: int = 1
    part: Part = Part(learning_rate=0.5)
    maybe: Part | None = None
    items: list[Item] = Field(default=[])
    free: dict[str, Any] = Field(default={})


def read(tmp_path: Path, text: str, *overrides: str) -> Whole:
    (tmp_path / "mine.yaml").write_text(text)
    return read_recipe(tmp_path / "mine.yaml", Whole, overrides=overrides)


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("max_steps=7", {"max_steps": 7}),
        ("part.learning_rate=1e-6", {"part": {"learning_rate": 1e-6}}),
        ("part.per_device_train_batch_size=2", {"part": {"learning_rate": 0.5, "per_device_train_batch_size": 2}}),
        ("maybe.learning_rate=2", {"maybe": {"learning_rate": 2}}),
        ("maybe={learning_rate: 2}", {"maybe": {"learning_rate": 2}}),
        ("items.1.path=c", {"items": [{"path": "a"}, {"path": "c"}]}),
        ("items.0.part.learning_rate=2", {"items": [{"path": "a", "part": {"learning_rate": 2}}, {"path": "b"}]}),
        ('items=[{"path": "x=y"}]', {"items": [{"path": "x=y"}]}),
        ("items=[]", {"items": []}),
        ("free.generation.top-k=[1, two]", {"free": {"generation": {"top-k": [1, "two"]}}}),
    ],
)
def test_a_key_is_set(tmp_path: Path, override: str, expected: dict[str, Any]) -> None:
    data = {"items": [{"path": "a"}, {"path": "b"}]}
    assert read(tmp_path, safe_dump(data), override) == Whole.model_validate(data | expected)


def test_the_last_of_several_wins(tmp_path: Path) -> None:
    assert read(tmp_path, "{}", "max_steps=2", "max_steps=3").max_steps == 3


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("max_steps", "--set 'max_steps' is not KEY=VALUE"),
        ("learning_rate=1", r"no key 'learning_rate'. Did you mean part.learning_rate"),
        ("part.learning_rat=1", r"no key 'part.learning_rat'. Did you mean part.learning_rate"),
        ("part={learning_rate:1}", r"no key 'part.learning_rate:1'. Did you mean part.learning_rate"),
        ("quite.another=1", r"no key 'quite.another'. Its keys are: max_steps, part"),
        ("max_steps.a=1", "max_steps is 1, which has no keys. Set max_steps as a whole"),
        ("items.2.path=c", "items is a list of 1, which has no item '2'"),
        ("max_steps=many", "'max_steps': Input should be a valid integer.*; got 'many'"),
        ("free=[", r"the value '\[' is neither JSON nor YAML"),
    ],
)
def test_a_key_that_cannot_be_set(tmp_path: Path, override: str, said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        read(tmp_path, "items: [{path: a}]", override)


def test_old_names_are_read_and_the_new_one_is_named(tmp_path: Path) -> None:
    old = "{steps: 3, part: {batch: 4}, items: [{path: a, part: {batch: 5}}]}"
    with pytest.warns(FutureWarning) as warned:
        recipe = read(tmp_path, old, "maybe.batch=6", "part.per_device_train_batch_size=7")
    assert {str(one.message) for one in warned} == {
        "The recipe key `batch` is now called `per_device_train_batch_size`.",
        "The recipe key `steps` is now called `max_steps`.",
    }
    assert (recipe.max_steps, recipe.part.per_device_train_batch_size) == (3, 7)
    assert recipe.maybe is not None and recipe.maybe.per_device_train_batch_size == 6
    assert recipe.items[0].part == Part(per_device_train_batch_size=5)
    with pytest.warns(FutureWarning):
        assert Whole.model_validate(safe_load(old)).max_steps == 3


@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_an_old_name_beside_its_new_one_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="`steps` is the old name of `max_steps`, and both are given"):
        read(tmp_path, "{steps: 3, max_steps: 4}")


@pytest.mark.filterwarnings("error")
def test_a_key_is_set_in_one_place_of_what_yaml_names_twice(tmp_path: Path) -> None:
    file = tmp_path / "recipe.yaml"
    file.write_text("free: {one: &same {held: {a: 1}}, two: *same}\n")
    assert read_recipe(file, Whole, overrides=["free.one.held.a=2"]).free == {
        "one": {"held": {"a": 2}},
        "two": {"held": {"a": 1}},
    }


def test_settings_of_saved_runs_get_the_new_names() -> None:
    stored = {"steps": 3, "part": {"batch": 4}, "items": [{"part": {"batch": 5}}], "else": {"batch": 1}}
    assert with_new_names(stored, Whole) == {
        "max_steps": 3,
        "part": {"per_device_train_batch_size": 4},
        "items": [{"part": {"per_device_train_batch_size": 5}}],
        "else": {"batch": 1},
    }


def test_a_model_without_old_names() -> None:
    class Plain(BaseModel):
        seed: int = 0

    data: dict[str, Any] = {}
    set_key(data, "seed", 4, kind=Plain)
    assert data == {"seed": 4}


@pytest.mark.parametrize(
    ("main", "options", "expected"),
    [
        (launch.main, ["--config", str(FOLDER / "grpo.yaml"), "--set", "loss.beta=0.01"], ("loss", "beta", 0.01)),
        (stages.main, ["gate", "--config", str(FOLDER / "branches.yaml"), "--set", "gate.read_tokens=[48]"],
         ("gate", "read_tokens", [48])),
        (fine_tune.main, ["--config", str(FOLDER / "coldstart.yaml"), "--set", "generation.max_new_tokens=9"],
         ("generation", "max_new_tokens", 9)),
    ],
)  # fmt: skip
def test_every_stage_takes_set(
    main: Any, options: list[str], expected: tuple[str, str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([*options, "--dry-run"]) == 0
    text = capsys.readouterr().out
    printed = safe_load(text[: text.index("\nmodel  ")])
    section, key, value = expected
    assert printed[section][key] == value


@pytest.mark.parametrize(
    ("verb", "recipe"),
    [
        (["train", "branches"], "branches.yaml"),
        (["train", "coldstart"], "coldstart.yaml"),
        (["train", "grpo"], "grpo.yaml"),
        (["calibrate"], "branches.yaml"),
    ],
)
def test_two_runs_cannot_write_into_one_folder(
    verb: list[str], recipe: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The settings that the second one stores would stand beside the result of the first."""
    with sole_writer(tmp_path, flag="--output"):
        assert qzoom([*verb, "--config", str(FOLDER / recipe), "--output", str(tmp_path)]) == 2
    assert "Another process is writing into" in (told := capsys.readouterr().err) and "another --output" in told
    assert [path.name for path in tmp_path.iterdir()] == [".lock"]
