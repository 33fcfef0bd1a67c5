"""Prompt files: a model asked in its authors' own words.

A prompt file is a small YAML or JSON file whose keys are the parts of a conversation. A part that it has replaces the
protocol's text; the others, and all structure (roles, order, parsing, schema, frames), stay the protocol's:

    system: |-
      You can look closer.
      {schema}
    user: "{images}Question: {question}"
    result: "<tool_response>{image}{notes}</tool_response>"

Braces around anything but one word are ordinary text; `{{word}}` writes `{word}`.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Final, Self, cast

from pydantic import model_validator
from yaml import safe_dump

from qzoom_agent.config import Config
from qzoom_agent.errors import ConfigError
from qzoom_agent.files import expanded, read_text, read_yaml
from qzoom_agent.messages import Message, Part, Role, image_part, message
from qzoom_agent.protocols import get_protocol
from qzoom_agent.protocols.interface import ZoomProtocol, schema_of
from qzoom_agent.views import View

FILE: Final = "qzoom_prompt.yaml"
"""Name under which a prompt file is found in a model's folder."""
OWN: Final = "protocol"
"""Value of the key `prompt` for the protocol's own words, whatever the model's folder has."""
_DIGEST: Final = "sha256:"
_PLACE: Final = re.compile(r"\{\{[A-Za-z_]\w*\}\}|\{([A-Za-z_]\w*)\}")
_ASKED: Final = ("images", "question")
_PLACES: Final[dict[str, tuple[str, ...]]] = {
    "system": ("schema",),
    "system_without_tools": (),
    "user": _ASKED,
    "user_without_tools": _ASKED,
    "result": ("image", "notes", "action", "observation", "width", "height"),
    "refusal": ("error",),
    "final": (),
}
"""Placeholders of each part."""
_NEEDED: Final = {"user": "question", "user_without_tools": "question", "refusal": "error"}


class PromptFile(Config):
    """The texts of a prompt file; None where the protocol's own stands."""

    prefix: ClassVar[str] = "prompt."

    system: str | None = None
    """System message when zooming is offered; empty for none. {schema}: the tool's schema as one line of JSON."""
    system_without_tools: str | None = None
    """The same when it is not offered."""
    user: str | None = None
    """First user turn when zooming is offered. {images}, else they come first; {question}."""
    user_without_tools: str | None = None
    """The same when it is not offered."""
    result: str | None = None
    """Turn that shows a crop. {image}, else it comes first; {notes} of the tool, else they come last; {action} (crops
    before this one), {observation} (crops with this one), {width} and {height} of the crop as shown."""
    refusal: str | None = None
    """Turn that tells the model why there is no crop: {error}."""
    final: str | None = None
    """Last turn: zooming is over."""

    @model_validator(mode="after")
    def _has_known_places(self) -> Self:
        for part, known in _PLACES.items():
            text = getattr(self, part)
            if text is None:
                continue
            found = {place[1] for place in _PLACE.finditer(text) if place[1]}
            names = ", ".join(f"{{{name}}}" for name in known) or "none"
            if unknown := sorted(found - set(known)):
                raise ConfigError(
                    f"prompt.{part} has the unknown placeholder {{{unknown[0]}}}. Known there: {names}. Write "
                    f"{{{{{unknown[0]}}}}} for the text {{{unknown[0]}}}."
                )
            if part in _NEEDED and _NEEDED[part] not in found:
                raise ConfigError(f"prompt.{part} lacks the placeholder {{{_NEEDED[part]}}}. Known there: {names}.")
        return self

    @property
    def digest(self) -> str:
        """Digest of the texts, which stands for them in configurations and traces."""
        return _DIGEST + hashlib.sha256(self.model_dump_json(exclude_none=True).encode()).hexdigest()[:16]


def read_prompt(given: str | Path | Mapping[str, Any] | PromptFile) -> PromptFile:
    """Return the prompt in a file, or of these parts.

    Raises:
        ConfigError: The file cannot be read, or a part is wrong.
    """
    if isinstance(given, PromptFile):
        return given
    if not isinstance(given, Mapping):
        where = expanded(given)
        try:
            given = read_yaml(read_text(where, "Give a prompt file in YAML or JSON."))
        except ValueError as error:
            raise ConfigError(f"The prompt file {where} is not YAML: {error}.") from None
        if not isinstance(given, Mapping):
            raise ConfigError(f"The prompt file {where} has no keys. Give one or more of: {', '.join(_PLACES)}.")
    return PromptFile(**{str(key): value for key, value in given.items()})


def read_given(given: str | Mapping[str, Any] | PromptFile | None) -> PromptFile | str | None:
    """Return the prompt that a user gave; what needs the model to decide (None, `OWN`, a digest) comes back as it is.

    Raises:
        ConfigError: The file cannot be read, or a part is wrong.
    """
    later = given is None or (isinstance(given, str) and (given == OWN or given.startswith(_DIGEST)))
    return cast(str | None, given) if later else read_prompt(cast(Any, given))


def choose_prompt(given: str | Mapping[str, Any] | PromptFile | None, own: PromptFile | None) -> PromptFile | None:
    """Return the prompt to ask a model with; None for the words of its protocol.

    Args:
        given: The user's: a file, its parts, `OWN`, or the digest that a saved configuration has. None: the model's.
        own: That in the model's folder.

    Raises:
        ConfigError: The file cannot be read, or the digest is of another prompt.
    """
    found = read_given(given)
    if isinstance(found, PromptFile) or found == OWN:
        return found if isinstance(found, PromptFile) else None
    if found is not None and (own is None or own.digest != found):
        raise ConfigError(
            f"This configuration is of a run with the prompt file {found}, which is not the model's own. Give the file "
            f"again: --prompt FILE (in Python: prompt), or '{OWN}' for the protocol's words."
        )
    return own


def write_prompt(prompt: PromptFile | None, folder: Path) -> None:
    """Write a model's prompt file, if it has one, into the folder of a copy or fine-tune of it."""
    if prompt is not None:
        text = safe_dump(prompt.model_dump(mode="json", exclude_none=True), allow_unicode=True, sort_keys=False)
        (folder / FILE).write_text(text, encoding="utf-8")


def own_protocol(backend: Any) -> ZoomProtocol:
    """Return the protocol that a model is asked in, with the texts of its prompt file where its folder has one."""
    protocol, prompt = get_protocol(backend.protocol), getattr(backend, "prompt", None)
    return protocol if prompt is None else cast(ZoomProtocol, Reworded(protocol, prompt))


@dataclass(frozen=True, slots=True)
class Reworded:
    """A protocol whose texts are those of a prompt file, where it has them; all else is the protocol's own."""

    protocol: ZoomProtocol
    prompt: PromptFile

    def __post_init__(self) -> None:
        if "{schema}" in (self.prompt.system or "") and not schema_of(self.protocol, ()):
            raise ConfigError(f"prompt.system has {{schema}}, and the protocol '{self.name}' has no schema of a tool.")

    def __getattr__(self, name: str) -> Any:
        return getattr(self.protocol, name)

    def opening(self, question: str, views: Sequence[View], *, tools: bool) -> list[Message]:
        said = self.protocol.opening(question, views, tools=tools)
        system = self.prompt.system if tools else self.prompt.system_without_tools
        user = self.prompt.user if tools else self.prompt.user_without_tools
        if system is not None:
            filled = _message("system", system, {"schema": [schema_of(self.protocol, views)]})
            said = [*([filled] if system else []), *(one for one in said if one["role"] != "system")]
        if user is not None:
            values: _Values = {"images": [image_part(view.id) for view in views], "question": [question]}
            said = [*said[:-1], _message("user", user, values, first="images")]
        return said

    def result(self, view: View, index: int, notes: Sequence[str]) -> list[Message]:
        said = self.protocol.result(view, index, notes)
        numbers = {"action": index, "observation": index + 1, "width": view.width, "height": view.height}
        values: _Values = {name: [str(number)] for name, number in numbers.items()}
        values |= {"image": [image_part(view.id)], "notes": ["".join(f"\n{note}" for note in notes)]}
        return self._replaced(said, self.prompt.result, values, first="image", last="notes")

    def refusal(self, text: str) -> list[Message]:
        return self._replaced(self.protocol.refusal(text), self.prompt.refusal, {"error": [text]})

    def final(self) -> list[Message]:
        return self._replaced(self.protocol.final(), self.prompt.final, {})

    def require_schema(self, tools: Iterable[str]) -> None:
        """Raise ConfigError if the system message of the prompt file does not list these own tools."""
        if self.prompt.system is not None and "{schema}" not in self.prompt.system:
            raise ConfigError(
                f"The prompt file has no {{schema}} in its system message, where the tools {', '.join(tools)} would be "
                "listed. Add it, or leave the tools out."
            )

    def _replaced(self, said: list[Message], text: str | None, values: _Values, **places: str) -> list[Message]:
        """Return the protocol's turn, or one of its role with this text."""
        return said if text is None else [_message(said[-1]["role"], text, values, **places)]


_Values = dict[str, list[Part | str]]


def _message(role: Role, text: str, values: _Values, *, first: str = "", last: str = "") -> Message:
    """Return a message with the placeholders filled in; `first` and `last` are added where the text lacks them."""
    parts: list[Part | str] = []
    at, used = 0, set()
    for place in _PLACE.finditer(text):
        parts += [text[at : place.start()], *(values[place[1]] if place[1] else [place[0][1:-1]])]
        used.add(place[1])
        at = place.end()
    parts.append(text[at:])
    before = values[first] if first and first not in used else []
    after = values[last] if last and last not in used else []
    return message(role, *_joined([*before, *parts, *after]))


def _joined(parts: Sequence[Part | str]) -> list[Part | str]:
    """Join neighbouring texts, so that a template sees one part where a protocol writes one."""
    out: list[Part | str] = []
    for part in parts:
        if isinstance(part, str) and out and isinstance(out[-1], str):
            out[-1] += part
        else:
            out.append(part)
    return out
