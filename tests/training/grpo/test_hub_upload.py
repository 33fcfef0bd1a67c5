"""`trl.push_to_hub`: the model is written first, and a hub that cannot be written to is told without a traceback."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import constants
from transformers.utils import hub as transformers_hub

from qzoom_agent.cli.main import main as qzoom
from qzoom_agent.errors import BackendError
from qzoom_agent.models.hf import HFBackend
from qzoom_agent.training.grpo import launch
from qzoom_agent.training.grpo.grpo_recipe import GRPORecipe
from qzoom_agent.training.trained_model import is_finished, keep_recipe
from tests.perception.local_hub import TOKEN, LocalHub
from tests.training.grpo.grpo_script import AGENT, tiny_recipe


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[LocalHub]:
    """A hub on this machine, with a token that may write."""
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    with LocalHub().running() as running:
        hub_at(running.address, monkeypatch)
        yield running


def hub_at(address: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constants, "ENDPOINT", address)
    monkeypatch.setattr(transformers_hub, "_hf_api", None)  # which keeps the address


NOWHERE = "http://127.0.0.1:1"


def pushed(folder: Path) -> GRPORecipe:
    trl = {"push_to_hub": True, "hub_model_id": "me/trained"}
    agent = {**AGENT, "policy": "direct", "generation": {"max_new_tokens": 2}}
    return tiny_recipe(folder, "qwen2_5_vl", max_steps=1, trl=trl, agent=agent, tower=False)


def test_a_hub_that_refuses_is_told_before_the_model_is_loaded(
    hub: LocalHub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """First somebody who is not logged in, then nobody who answers."""
    monkeypatch.setattr(launch, "load_model", lambda recipe: pytest.fail("too late"))
    (tmp_path / "recipe.yaml").write_text(json.dumps(pushed(tmp_path).model_dump(mode="json")))
    command = ["train", "grpo", "--config", str(tmp_path / "recipe.yaml"), "--output", str(tmp_path / "run")]
    monkeypatch.setenv("HF_TOKEN", "hf_of_somebody_else")
    assert qzoom(command) == 4
    told = capsys.readouterr().err.splitlines()[-1]
    assert "Log in with `hf auth login`" in told and "Or leave push_to_hub out" in told
    hub_at(NOWHERE, monkeypatch)
    assert qzoom(command) == 4
    assert "The hub cannot be reached for 'me/trained'" in capsys.readouterr().err


def test_an_upload_that_fails_leaves_the_trained_model(
    hub: LocalHub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It can then be uploaded by hand, and the run is finished, also without the key; with the hub, it is uploaded."""
    recipe = pushed(tmp_path)
    final = launch.train(recipe, tmp_path / "whole")
    assert {"README.md", "final/model.safetensors"} <= hub.repositories["me/trained"].files.keys()
    make = launch.make_trainer

    def make_and_go_offline(*given: Any) -> Any:
        made = make(*given)
        hub_at(NOWHERE, monkeypatch)
        return made

    monkeypatch.setattr(launch, "make_trainer", make_and_go_offline)
    keep_recipe(recipe, tmp_path / "run")
    with pytest.raises(
        BackendError, match=r"The trained model is in .*final, but it was not uploaded\. The hub cannot"
    ):
        launch.train(recipe, tmp_path / "run")
    assert HFBackend.load(str(tmp_path / "run" / "final"), device="cpu").name
    assert is_finished(recipe.model_copy(update={"trl": {}}), tmp_path / "run")
    assert {path.name for path in final.iterdir()} == {path.name for path in (tmp_path / "run" / "final").iterdir()}
