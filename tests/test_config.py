"""The configuration: views of the same fields (code, mapping, YAML, dotted keys), and errors that name the key."""

import hashlib
import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from qzoom_agent.config import (
    AgentConfig,
    BudgetConfig,
    Config,
    CropConfig,
    GenerationConfig,
    PerceptionConfig,
    ReviewConfig,
    ViewBudget,
    read_setting,
)
from qzoom_agent.errors import ConfigError
from qzoom_agent.models.presets import NANO_BUDGET

PRESET = ViewBudget(factor=28, coarse_min_tokens=16, coarse_max_tokens=64, crop_min_tokens=32, crop_max_tokens=64)


SECTIONS = [AgentConfig, BudgetConfig, CropConfig, GenerationConfig, PerceptionConfig, ReviewConfig, ViewBudget]


@pytest.mark.parametrize("section", SECTIONS)
def test_every_field_has_its_text(section: type[Config]) -> None:
    for name, field in section.model_fields.items():
        assert field.description, f"{section.__name__}.{name} has no docstring under it"


def test_yaml_out_and_in_is_the_same_configuration(tmp_path: Path) -> None:
    config = AgentConfig().replace(policy="blind", seed=7, budget={"max_seconds": 1.5, "coarse_tokens": 40})
    assert AgentConfig.from_yaml(config.to_yaml()) == config
    config.save(tmp_path / "config.yaml")
    assert AgentConfig.load(tmp_path / "config.yaml") == config


def test_yaml_gives_only_what_differs() -> None:
    assert AgentConfig.from_yaml("") == AgentConfig()
    config = AgentConfig.from_yaml("policy: direct\nbudget:\n  max_turns: 2\n")
    assert (config.policy, config.budget.max_turns, config.budget.max_views) == ("direct", 2, 6)


def test_the_gate_is_off_with_or_without_quotes() -> None:
    key, value = read_setting("perception.gate=off")
    assert AgentConfig().replace(**{key: value}).perception.gate == "off"
    for written in ("off", "'off'"):
        assert AgentConfig.from_yaml(f"perception: {{gate: {written}}}").perception.gate == "off"


def test_replace_takes_dotted_keys_and_merges_mappings() -> None:
    base = AgentConfig(budget=BudgetConfig(max_turns=3))
    changed = base.replace(**{"budget.max_views": 2, "generation": {"temperature": 0.5}})
    assert (changed.budget.max_turns, changed.budget.max_views, changed.generation.temperature) == (3, 2, 0.5)
    assert base.budget.max_views == 6


def test_the_policy_follows_the_model_unless_it_is_given() -> None:
    def resolved(config: AgentConfig, *, perceives: bool) -> str | None:
        return config.resolved(model="m", protocol="p", defaults=PRESET, perceives=perceives).policy

    assert resolved(AgentConfig(), perceives=True) == "implicit"
    assert resolved(AgentConfig(), perceives=False) == "explicit"
    assert resolved(AgentConfig(policy="direct"), perceives=True) == "direct"


def test_proposed_crops_have_the_presets_budget_unless_crops_are_given_one() -> None:
    preset = PRESET.model_copy(update={"roi_tokens": (30, 40)})

    def roi(**given: object) -> tuple[int | None, int | None]:
        found = AgentConfig().replace(**given).resolved(model="m", protocol="p", defaults=preset).perception
        return found.roi_min_tokens, found.roi_max_tokens

    assert roi() == (30, 40)
    assert roi(**{"perception.roi_max_tokens": 40}) == (30, 40)  # the preset's own value changes nothing
    assert roi(**{"perception.roi_max_tokens": 20}) == (20, 20)
    assert roi(**{"perception.roi_min_tokens": 35}) == (35, 40)
    assert roi(**{"perception.roi_min_tokens": 50}) == (50, 50)
    assert roi(**{"budget.crop_max_tokens": 99}) == (None, None)
    assert AgentConfig().resolved(model="m", protocol="p", defaults=PRESET).perception.roi_max_tokens is None


def test_frozen() -> None:
    with pytest.raises(ValidationError, match="frozen"):
        AgentConfig().seed = 1  # type: ignore[misc]


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda: AgentConfig(polcy="direct"), ["Unknown key 'polcy'", "Did you mean 'policy'", "oracle_margin"]),
        (lambda: AgentConfig(budget={"max_turn": 1}), ["'budget.max_turn'", "'budget.max_turns'", "budget.max_views"]),
        (lambda: AgentConfig.from_yaml("budget:\n  zzz: 1"), ["Unknown key 'budget.zzz'", "budget.crop_max_tokens"]),
        (lambda: AgentConfig().replace(**{"budgt.max_turns": 1}), ["'budgt'", "budget"]),
        (lambda: AgentConfig().replace(**{"seed.x": 1}), ["'seed'", "'seed.x'"]),
        (lambda: AgentConfig(policy="sometimes"), ["'policy'", "'sometimes'", "'explicit'"]),
        (lambda: BudgetConfig(max_turns=0), ["'budget.max_turns'", "greater than or equal to 1", "got 0"]),
        (lambda: AgentConfig(generation={"temperature": float("nan")}), ["'generation.temperature'", "finite"]),
        (lambda: AgentConfig(budget=3), ["'budget' is a section", "budget.max_turns", "got 3"]),
        (lambda: AgentConfig.from_yaml("budget:\n"), ["'budget' is a section", "got None"]),
        (lambda: AgentConfig.from_yaml("- policy"), ["mapping", "list"]),
        (lambda: AgentConfig.from_yaml("policy: ["), ["not YAML"]),
        (lambda: AgentConfig.from_yaml("seed: 2001-99-99"), ["not YAML", "month"]),
        (lambda: AgentConfig.from_yaml("a: " + "[" * 5000), ["not YAML", "nested too deeply"]),
        (lambda: read_setting("seed=0b_"), ["--set seed=0b_", "quotes"]),
        (lambda: AgentConfig().save("/dev/null/config.yaml"), ["Cannot write", "/dev/null"]),
        (lambda: AgentConfig.load("no/such.yaml"), ["no/such.yaml"]),
        (
            lambda: BudgetConfig(crop_min_tokens=80, crop_max_tokens=40).view_budget(PRESET),
            ["crop budget is empty", "80", "40"],
        ),
    ],
)
def test_what_is_wrong_is_named(make: object, says: list[str]) -> None:
    with pytest.raises(ConfigError) as caught:
        make()  # type: ignore[operator]
    for piece in says:
        assert piece in str(caught.value)
    assert "validation error" not in str(caught.value)


def test_nothing_given_is_the_preset() -> None:
    assert BudgetConfig().view_budget(PRESET) == PRESET


limits = st.one_of(st.none(), st.integers(1, 500))


@given(coarse=limits, coarse_min=limits, low=limits, high=limits, all_views=limits)
def test_what_is_given_holds_and_the_preset_gives_way(
    coarse: int | None, coarse_min: int | None, low: int | None, high: int | None, all_views: int | None
) -> None:
    budget = BudgetConfig(
        coarse_tokens=coarse,
        coarse_min_tokens=coarse_min,
        crop_min_tokens=low,
        crop_max_tokens=high,
        max_visual_tokens=all_views,
    )
    given = [value for value in (coarse_min, coarse, all_views) if value is not None]
    if given != sorted(given) or (low and high and low > high):
        with pytest.raises(ConfigError, match=r"budget is empty|coarse view alone"):
            budget.view_budget(PRESET)
        return
    views = budget.view_budget(PRESET)
    assert views.coarse_max_tokens == coarse or coarse is None
    assert views.coarse_min_tokens == coarse_min or coarse_min is None
    assert views.crop_min_tokens == low or low is None
    assert views.crop_max_tokens == high or high is None
    assert views.factor == PRESET.factor
    assert all_views is None or views.coarse_max_tokens <= all_views
    config = AgentConfig(budget=budget).resolved(model="m", protocol="p", defaults=PRESET)
    assert (config.model, config.protocol) == ("m", "p")
    assert config.budget.view_budget(PRESET) == views
    assert config == config.resolved(model="m", protocol="q", defaults=PRESET)


@pytest.mark.parametrize(
    ("perceives", "key"), [(True, "36a31b071969e96e8c99d013"), (False, "9c717ced7d6a8ea7427e011f")]
)
def test_later_keys_leave_the_key_of_saved_rows_as_it_was(perceives: bool, key: str) -> None:
    config = AgentConfig().resolved(model="nano", protocol="nano", defaults=NANO_BUDGET, perceives=perceives)
    written = json.dumps(config.model_dump(mode="json"), sort_keys=True)
    assert hashlib.sha256(written.encode()).hexdigest()[:24] == key


def test_the_models_values_fill_in_only_what_was_not_given() -> None:
    defaults = {"budget.max_turns": 12, "generation.temperature": 1.0, "policy": "direct", "perception.threshold": 0.2}
    filled = AgentConfig().with_defaults(defaults)
    assert (filled.budget.max_turns, filled.generation.temperature, filled.policy) == (12, 1.0, "direct")
    own = AgentConfig(policy="explicit").replace(**{"budget.max_turns": 6, "generation.temperature": None})
    own = own.replace(seed=3).with_defaults(defaults)
    assert (own.budget.max_turns, own.generation.temperature, own.policy, own.seed) == (6, 1.0, "explicit", 3)
    regions = {"perception.max_regions": 2}
    given = AgentConfig().replace(**{"perception.max_regions": 3}).replace(**{"perception.max_regions": None})
    assert given.with_defaults(regions).perception.max_regions == 2, "null returns a key to the branches, too"
    saved = AgentConfig.from_yaml(AgentConfig().to_yaml()).with_defaults(defaults)
    assert (saved.budget.max_turns, saved.generation.temperature) == (6, 0.0), "a saved configuration has every key"
    with pytest.raises(ConfigError, match=r"Unknown key 'generation.max_tokens'.*generation.top_k"):
        AgentConfig().replace(**{"generation.max_tokens": None})
