"""Scripted replies: counted, streamed and cut like a model's, and the same on every run."""

import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

from qzoom_agent.errors import BackendError, ConfigError
from qzoom_agent.messages import Message, image_part, message, text
from qzoom_agent.models import Backend, SamplingParams, ScriptedBackend, Session
from qzoom_agent.models.presets import NANO_FOLDER, PRESETS, resolve_model

VIEWS = {"coarse": Image.new("RGB", (224, 168)), "crop1": Image.new("RGB", (112, 84))}


def opened(backend: ScriptedBackend) -> Session:
    as_backend: Backend = backend
    return as_backend.session(VIEWS.__getitem__)


def test_replies_in_order_and_counts_only_what_is_new() -> None:
    session = opened(ScriptedBackend(["<zoom>1 2 3 4</zoom>", "407"]))
    asked = [message("user", image_part("coarse"), "What is the code?")]
    first = session.reply(asked, settings=SamplingParams())
    assert (first.text, first.finish) == ("<zoom>1 2 3 4</zoom>", "stop")
    assert (first.visual_tokens, first.cached_tokens) == (8 * 6, 0)
    assert first.prompt_tokens == 8 * 6 + 5  # 17 characters are five tokens of four

    asked += [text("assistant", first.text), message("user", image_part("crop1"))]
    second = session.reply(asked, settings=SamplingParams())
    assert second.text == "407"
    assert second.visual_tokens == 4 * 3
    assert second.cached_tokens == first.prompt_tokens + first.new_tokens
    assert second.prompt_tokens == second.cached_tokens + 4 * 3


def test_a_changed_past_is_not_counted_as_cached() -> None:
    session = opened(ScriptedBackend(["a", "b"]))
    session.reply([message("user", image_part("coarse"), "one")], settings=SamplingParams())
    again = session.reply([message("user", image_part("crop1"), "one")], settings=SamplingParams())
    assert (again.cached_tokens, again.visual_tokens) == (0, 4 * 3)


def test_a_closed_session_starts_from_nothing() -> None:
    session = opened(ScriptedBackend(["a", "b"]))
    asked = [message("user", image_part("coarse"), "one")]
    session.reply(asked, settings=SamplingParams())
    session.close()
    assert session.reply(asked, settings=SamplingParams()).visual_tokens == 48


def test_stop_string_and_token_limit_cut_the_text() -> None:
    session = opened(ScriptedBackend(["<a>1</a> and <b>", "0123456789"]))
    stopped = session.reply([text("user", "q")], settings=SamplingParams(stop=("<b>", "</a>")))
    assert (stopped.text, stopped.finish) == ("<a>1</a>", "stop")
    cut = session.reply([text("user", "q")], settings=SamplingParams(max_new_tokens=2))
    assert (cut.text, cut.finish, cut.new_tokens) == ("01234567", "length", 2)


def test_streamed_pieces_are_the_text() -> None:
    pieces: list[str] = []
    reply = opened(ScriptedBackend(["the code is 407"])).reply(
        [text("user", "q")], settings=SamplingParams(), on_text=pieces.append
    )
    assert len(pieces) > 1
    assert "".join(pieces) == reply.text


def test_a_function_sees_the_conversation_but_cannot_change_it() -> None:
    def answer(messages: list[Message]) -> str:
        messages.append(text("user", "x"))
        return f"{len(messages)} messages"

    asked = [text("user", "q")]
    assert opened(ScriptedBackend(answer)).reply(asked, settings=SamplingParams()).text == "2 messages"
    assert len(asked) == 1


def test_running_out_of_replies_says_so() -> None:
    session = opened(ScriptedBackend(["only one"]))
    session.reply([text("user", "q")], settings=SamplingParams())
    with pytest.raises(BackendError, match=r"ran out of replies: 1 were given .* Give it more"):
        session.reply([text("user", "q")], settings=SamplingParams())


def test_presets_resolve_without_torch() -> None:
    code = (
        "import sys; from qzoom_agent.models import presets, scripted; presets.resolve_model('nano'); "
        "assert not {'torch', 'transformers'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_model_names(tmp_path: Path) -> None:
    nano = resolve_model("nano")
    assert nano.source == str(NANO_FOLDER)
    assert nano.protocol == "nano"
    assert nano.budget is not None
    assert (nano.budget.coarse_min_tokens, nano.budget.coarse_max_tokens) == (16, 64)
    assert (nano.budget.crop_min_tokens, nano.budget.crop_max_tokens) == (40, 100)
    assert all(name == preset.name and preset.budget and preset.protocol for name, preset in PRESETS.items())
    assert resolve_model(str(tmp_path)).local
    assert resolve_model("owner/name").source == "owner/name"


@pytest.mark.parametrize("name", ["qwen3vl-4b", "", "/no/such/folder", "./no/folder", "a/b/c"])
def test_a_name_that_is_no_model_gets_the_presets_listed(name: str) -> None:
    with pytest.raises(ConfigError, match=r"There is no model .* Presets: nano, "):
        resolve_model(name)


def test_a_misspelt_preset_is_recognised() -> None:
    with pytest.raises(ConfigError, match="Did you mean 'qwen3-vl-4b'"):
        resolve_model("Qwen3VL-4B")
