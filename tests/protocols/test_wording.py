"""Prompt files: texts are replaced, structure stays, and a wrong file is refused."""

import json
from collections.abc import Sequence
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from qzoom_agent.agent import Agent
from qzoom_agent.errors import ConfigError
from qzoom_agent.messages import Message, plain_text
from qzoom_agent.models.scripted import ScriptedBackend
from qzoom_agent.protocols import PROTOCOLS, ZoomProtocol
from qzoom_agent.protocols.tagged import Tagged
from qzoom_agent.protocols.wording import PromptFile, Reworded, choose_prompt, read_prompt
from qzoom_agent.views import View
from tests.cases import each_case

VIEW = View(id="crop1", parent="coarse", kind="crop", box=(0, 0, 1, 1), width=56, height=28, digest="", tokens=2)
CALL = "<zoom><loc_0><loc_0><loc_56><loc_56></zoom>"


def turns(protocol: ZoomProtocol) -> list[Sequence[Message]]:
    return [
        protocol.opening("Why?", [VIEW, VIEW], tools=True),
        protocol.opening("Why?", [VIEW], tools=False),
        protocol.result(VIEW, 2, ["grown", "cut"]),
        protocol.refusal("no box"),
        protocol.final(),
    ]


@each_case("name", PROTOCOLS)
def test_an_empty_file_changes_nothing(name: str) -> None:
    same = Reworded(PROTOCOLS[name], PromptFile())
    assert turns(same) == turns(PROTOCOLS[name])
    for member in ("name", "frame", "stop", "max_calls_per_turn"):
        assert getattr(same, member) == getattr(PROTOCOLS[name], member)
    assert same.view_name(1) == PROTOCOLS[name].view_name(1)
    assert same.parse(CALL, [VIEW]) == PROTOCOLS[name].parse(CALL, [VIEW])


@pytest.mark.parametrize("name", [name for name, one in PROTOCOLS.items() if isinstance(one, Tagged)])
def test_a_familys_own_words_as_a_file_are_the_family(name: str, tmp_path: Path) -> None:
    family = PROTOCOLS[name]
    assert isinstance(family, Tagged)
    say = family.wording
    parts = {
        "system": say.system,
        "system_without_tools": say.plain_system,
        "user": say.before + "{images}" + say.between + "{question}" + say.after,
        "user_without_tools": say.plain_before + "{images}" + say.between + "{question}" + say.plain_after,
        "result": say.result_before + "{image}" + say.result_after + "{notes}" + say.result_end,
        "refusal": say.refusal_before + "{error}" + say.refusal_after,
        "final": say.final,
    }
    file = tmp_path / "prompt.json"
    file.write_text(json.dumps(parts))
    again = Reworded(family, read_prompt(file))
    assert turns(again) == turns(family)


def test_parts_are_replaced_one_by_one_and_places_may_be_left_out() -> None:
    said = Reworded(
        PROTOCOLS["qwen3vl"], PromptFile(user="Q: {question} {{x}}", result="Crop {observation}.", final="")
    )
    (system, user), _, (result,), refusal, (final,) = turns(said)
    assert system == PROTOCOLS["qwen3vl"].opening("Why?", [VIEW], tools=True)[0]
    assert user["content"] == [
        {"type": "image", "view": "crop1"},
        {"type": "image", "view": "crop1"},
        {"type": "text", "text": "Q: Why? {x}"},
    ]
    assert (result["role"], [part["type"] for part in result["content"]]) == ("tool", ["image", "text"])
    assert result["content"][1] == {"type": "text", "text": "Crop 3.\ngrown\ncut"}
    assert refusal == PROTOCOLS["qwen3vl"].refusal("no box")
    assert final["content"] == []
    none = Reworded(PROTOCOLS["qwen3vl"], PromptFile(system="")).opening("Why?", [VIEW], tools=True)
    assert [one["role"] for one in none] == ["user"]
    added = Reworded(PROTOCOLS["plain"], PromptFile(system="Hi")).opening("Why?", [VIEW], tools=True)
    assert [one["role"] for one in added] == ["system", "user"]


@settings(max_examples=25, deadline=None)
@given(question=st.text(min_size=1), around=st.text().filter(lambda text: "{" not in text and "}" not in text))
def test_a_question_is_never_read_as_a_template(question: str, around: str) -> None:
    said = Reworded(PROTOCOLS["plain"], PromptFile(user=around + "{question}")).opening(question, [VIEW], tools=True)
    assert said[0]["content"][-1] == {"type": "text", "text": around + question}


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("system: 'a {tools}'", r"prompt\.system has the unknown placeholder \{tools\}.*\{schema\}.*\{\{tools\}\}"),
        ("final: '{question}'", r"unknown placeholder \{question\}. Known there: none"),
        ("user: hello", r"prompt\.user lacks the placeholder \{question\}"),
        ("sytem: a", r"Unknown key 'prompt\.sytem'.*Did you mean 'prompt\.system'.*prompt\.result"),
        ("system: 3", r"Bad value for 'prompt\.system'.*got 3"),
        ("- system", r"has no keys.*system_without_tools"),
        ("system: [", r"is not YAML"),
    ],
)
def test_a_wrong_file_is_named(text: str, says: str, tmp_path: Path) -> None:
    file = tmp_path / "prompt.yaml"
    file.write_text(text)
    with pytest.raises(ConfigError, match=says):
        read_prompt(file)
    with pytest.raises(ConfigError, match=r"nowhere\.yaml"):
        read_prompt(tmp_path / "nowhere.yaml")
    with pytest.raises(ConfigError, match=r"'plain' has no schema"):
        Reworded(PROTOCOLS["plain"], PromptFile(system="{schema}"))


def test_json_and_latex_are_ordinary_text() -> None:
    text = 'Write {"name": "zoom", "arguments": {"bbox_2d": [x, y]}} and \\boxed{}.'
    said = Reworded(PROTOCOLS["qwen3vl"], PromptFile(system=text)).opening("Why?", [VIEW], tools=True)
    assert said[0]["content"] == [{"type": "text", "text": text}]


def test_an_agent_asks_in_these_words_and_the_trace_has_their_digest(tmp_path: Path, picture: Path) -> None:
    file = tmp_path / "words.yaml"
    file.write_text("user: 'Look: {images} {question}'\nresult: 'Larger: {image}'\n")
    seen: list[Message] = []

    def reply(messages: list[Message]) -> str:
        seen[:] = messages
        return CALL if len(messages) == 1 else "42"

    agent = Agent(ScriptedBackend(reply), policy="explicit", prompt=file, state_dir=tmp_path / "state")
    answer = agent.run(picture, "Why?", thread="one")
    assert answer.text == "42"
    assert seen[0]["content"][0] == {"type": "text", "text": "Look: "}
    assert seen[2]["content"][0] == {"type": "text", "text": "Larger: "}
    digest = read_prompt(file).digest
    assert answer.trace.config["prompt"] == digest and len(digest) == 23
    assert agent.replace(seed=3).config.prompt == digest
    assert Agent(ScriptedBackend(reply), prompt={"final": "Stop."}).config.prompt != digest
    plain = Agent(ScriptedBackend(reply), policy="explicit", state_dir=tmp_path / "state")
    assert "prompt" not in plain.config.model_dump()
    saved = answer.save(tmp_path / "run") / "config.yaml"
    with pytest.raises(ConfigError, match=rf"prompt file {digest}, which is not the model's own. Give the file again"):
        Agent(ScriptedBackend(reply), config=type(agent.config).load(saved))
    again = Agent(ScriptedBackend(reply), config=type(agent.config).load(saved), prompt=str(file))
    assert again.config == agent.config
    file.write_text("final: Stop.\n")
    with pytest.raises(ConfigError, match=f"begun with the prompt file {digest}"):
        Agent(ScriptedBackend(reply), policy="explicit", prompt=file)._parts.context(agent.config, answer.store)
    agent.close()


def test_the_prompt_of_the_models_folder_counts_unless_another_is_given() -> None:
    own, other = PromptFile(final="Stop."), PromptFile(final="Halt.")
    assert choose_prompt(None, own) == own == choose_prompt(own.digest, own)
    assert choose_prompt("protocol", own) is None and choose_prompt(None, None) is None
    assert choose_prompt({"final": "Halt."}, own) == other
    with pytest.raises(ConfigError, match="which is not the model's own"):
        choose_prompt(other.digest, own)


@pytest.fixture
def picture(tmp_path: Path) -> Path:
    path = tmp_path / "picture.png"
    Image.new("RGB", (560, 560), "white").save(path)
    return path


def test_a_prompt_file_lists_own_tools_where_it_has_the_schema() -> None:
    seen: list[Message] = []

    def ask(system: str) -> str:
        backend = ScriptedBackend(lambda messages: seen.extend(messages) or "42", protocol="qwen3vl")
        agent = Agent(backend, policy="explicit", tools=["rotate"], prompt={"system": system})
        agent.run(Image.new("RGB", (60, 60)), "what?")
        return plain_text(seen[0])

    assert "You can:" in (said := ask("You can:\n{schema}")) and "image_zoom_in_tool" in said and "rotate" in said
    with pytest.raises(ConfigError, match=r"no \{schema\} in its system message, where the tools rotate would be"):
        ask("You cannot.")


def test_an_own_tool_is_called_under_a_prompt_file() -> None:
    call = '<tool_call>{"name": "enhance", "arguments": {"image": "coarse"}}</tool_call>'
    backend = ScriptedBackend([call, "<answer>42</answer>"], protocol="qwen3vl")
    agent = Agent(backend, policy="explicit", tools=["enhance"], prompt={"system": "{schema}"})
    answer = agent.run(Image.new("RGB", (60, 60)), "what?")
    assert answer.text == "42" and answer.record.turns[0].calls[0].decision == "served"


@pytest.mark.parametrize("name", ["plain", "qwen3vl", "nano"])
def test_a_box_that_the_model_names_first_is_read_under_a_prompt_file(name: str, picture: Path) -> None:
    named = CALL if name == "nano" else '{"bbox_2d": [0, 0, 500, 500]}'
    found = [
        Agent(ScriptedBackend([named, "42"], protocol=name), policy="locate", prompt=prompt).run(picture, "Why?")
        for prompt in (None, {"user": "{images}Question: {question}"})
    ]
    assert found[0].boxes == found[1].boxes and len(found[0].boxes) == 1
    assert [answer.text for answer in found] == ["42", "42"]
