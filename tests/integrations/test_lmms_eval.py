"""The model for lmms-eval, against a stub with its names (`lmms_real.py` beside this file uses the real package)."""

from __future__ import annotations

import sys
import tomllib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
from PIL import Image

from qzoom_agent.agent import Agent
from qzoom_agent.errors import ConfigError
from qzoom_agent.integrations import lmms_eval as lmms_plugin
from qzoom_agent.models.scripted import ScriptedBackend
from qzoom_agent.trace import Trace

ROOT = Path(__file__).resolve().parents[2]


@dataclass(frozen=True)
class Manifest:
    model_id: str
    chat_class_path: str


@dataclass
class Result:
    text: str
    token_counts: Any


class Model:
    """`lmms_eval.api.model.lmms`, as far as a model needs it."""

    is_simple = True

    def __init__(self) -> None:
        self.rank = 0
        self.kept: list[Any] = []
        self.cache_hook = SimpleNamespace(add_partial=lambda *given: self.kept.append(given))
        self.task_dict: dict[str, Any] = {}


class Messages:
    """`lmms_eval.protocol.ChatMessages`."""

    def __init__(self, messages: list[dict[str, Any]]) -> None:
        self.messages = [
            SimpleNamespace(role=one["role"], content=[SimpleNamespace(**part) for part in one["content"]])
            for one in messages
        ]


@pytest.fixture
def stub(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    names: dict[str, dict[str, Any]] = {
        "lmms_eval": {},
        "lmms_eval.api": {},
        "lmms_eval.api.instance": {"GenerationResult": Result, "TokenCounts": SimpleNamespace},
        "lmms_eval.api.model": {"lmms": Model},
        "lmms_eval.models": {},
        "lmms_eval.models.registry_v2": {"ModelManifest": Manifest},
        "lmms_eval.protocol": {"ChatMessages": Messages},
    }
    for name, members in names.items():
        module = ModuleType(name)
        vars(module).update(members)
        monkeypatch.setitem(sys.modules, name, module)
    yield
    vars(lmms_plugin).pop("QZoomLMM", None)


@pytest.fixture
def settings(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """What an agent was made with; it answers from a script."""
    seen: dict[str, Any] = {}

    def scripted(model: str = "nano", **given: Any) -> Agent:
        seen.update(given, model=model)
        return Agent(ScriptedBackend(lambda _: "B, because it is red.\n\nQuestion: next"))

    monkeypatch.setattr(Agent, "from_pretrained", scripted)
    return seen


def request(doc_id: int, **wanted: Any) -> Any:
    def to_messages(doc: str) -> list[dict[str, Any]]:
        image = {"type": "image", "url": Image.new("RGB", (64, 64))}
        return [{"role": "user", "content": [image, {"type": "text", "text": doc}]}]

    return SimpleNamespace(args=("context", to_messages, wanted, doc_id, "task", "test"))


def test_the_entry_point_names_the_manifest(stub: None) -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    module, _, name = project["project"]["entry-points"]["lmms_eval.models"]["qzoom"].partition(":")
    assert (module, name) == (lmms_plugin.__name__, "manifest")
    found = lmms_plugin.manifest()
    assert found.model_id == "qzoom"
    module, _, name = found.chat_class_path.rpartition(".")
    made = getattr(sys.modules[module], name)
    assert issubclass(made, Model)
    assert made.is_simple is False
    assert made is lmms_plugin.QZoomLMM


def test_final_answers_come_back_in_order(stub: None, settings: dict[str, Any], tmp_path: Path) -> None:
    model = lmms_plugin.QZoomLMM(
        model="nano", policy="direct", device="cpu", batch_size=1, traces=str(tmp_path), **{"budget.max_turns": 2}
    )
    assert settings == {
        "model": "nano", "policy": "direct", "device": "cpu", "budget.max_turns": 2,
    }  # fmt: skip
    model.task_dict = {"task": {"test": ["which?", "what?"]}}
    results = model.generate_until([request(1, until=["\n\n"]), request(0, max_new_tokens=1)])
    assert [one.text for one in results] == ["B, because it is red.", "B, because it is red.\n\nQuestion: next"]
    assert results[0].token_counts.output_tokens > 1
    assert [kept[0] for kept in model.kept] == ["generate_until"] * 2
    assert Trace.load(tmp_path / "task" / "1").question == "what?"


def test_a_question_that_fails_is_named_and_asked_again(
    stub: None, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    failing = Agent(ScriptedBackend([]), policy="direct")
    monkeypatch.setattr(Agent, "from_pretrained", lambda **given: failing)
    model = lmms_plugin.QZoomLMM()
    model.task_dict = {"task": {"test": ["which?"]}}
    (result,) = model.generate_until([request(0)])
    assert result.text == "" and model.kept == [], "a failure is no answer that is kept for the next run"
    assert "Question 0 of task failed" in caplog.text


def test_what_an_agent_cannot_do_is_said(stub: None, settings: dict[str, Any]) -> None:
    model = lmms_plugin.QZoomLMM()
    with pytest.raises(NotImplementedError, match="likelihood"):
        model.loglikelihood([])
    with pytest.raises(NotImplementedError, match="generate_until"):
        model.generate_until_multi_round([])
    with pytest.raises(AttributeError, match="nothing"):
        _ = lmms_plugin.nothing


@pytest.mark.parametrize("images", [0, 2])
def test_a_question_has_one_image(images: int) -> None:
    part = SimpleNamespace(type="image", url=Image.new("RGB", (4, 4)))
    message = SimpleNamespace(role="user", content=[part] * images + [SimpleNamespace(type="text", text="?")])
    with pytest.raises(ConfigError, match=f"has {images} images"):
        lmms_plugin.question_of([message])
