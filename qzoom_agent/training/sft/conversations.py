"""Episodes as rows of a table, and rows as the very ids that a session would see.

A row has `messages` in the usual conversational form and `images`, one for each image part in order, at the size that
the model sees. Tool results stand in user turns, because TRL and other trainers allow no images in role "tool". Where a
family's results have that role, its own template makes a user turn of them, and the row contains the template's words
for that (`<tool_response>`), so that it gives the same ids as the episode.

For training, a conversation goes through a session turn by turn, as in an episode. Learned are the ids of the
assistant's turns, with the token that ends each. Where a template rewrites old turns (drops thoughts), the model sees
something else at each turn, so such a conversation gives several training rows.
"""

from collections.abc import Sequence
from itertools import groupby
from typing import Any, Final, NamedTuple

import torch
from PIL import Image

from qzoom_agent.errors import ConfigError
from qzoom_agent.messages import Message, image_part, message, plain_text, text, text_part, view_ids
from qzoom_agent.models.hf import HFBackend
from qzoom_agent.models.hf_generation import Prepared
from qzoom_agent.models.hf_session import HFSession
from qzoom_agent.models.prompts import PromptCodec
from qzoom_agent.perception.labels import IGNORED
from qzoom_agent.training.branches.base_inference import answer_ids, with_answer

_NO_USER_TURN: Final = (
    "The protocol shows crops in role 'tool', which the model's chat template does not write as a user turn, so no "
    "other trainer could read the conversations. Choose a protocol whose results are user turns (deepeyes, mini_o3, "
    "plain), or give the model a template that knows tools (Qwen3-VL's)."
)


class TrainingConversation(NamedTuple):
    """A conversation, or its beginning, ready for the decoder."""

    session: HFSession
    ready: Prepared
    labels: tuple[int, ...]
    """For each id of the prompt that id if it is learned, else IGNORED."""


def to_row(conversation: Sequence[Message], images: Sequence[Image.Image], *, codec: PromptCodec) -> dict[str, Any]:
    """Return `messages` and `images` of an episode, whose images are in the order of its parts; see `in_user_turns`."""
    messages: list[dict[str, Any]] = []
    for one in in_user_turns(conversation, codec):
        parts = [{"type": part["type"], "text": part.get("text")} for part in one["content"]]
        messages.append({"role": one["role"], "content": parts})
    return {"messages": messages, "images": list(images)}


def in_user_turns(conversation: Sequence[Message], codec: PromptCodec) -> list[Message]:
    """Return a conversation that renders to the same text, with the results of role "tool" in user turns.

    Raises ConfigError if the template does not write them as user turns.
    """
    if all(one["role"] != "tool" for one in conversation):
        return list(conversation)
    before, between, after = _tool_words(codec)
    said: list[Message] = []
    for is_tool, run in groupby(conversation, lambda one: one["role"] == "tool"):
        if not is_tool:
            said += run
            continue
        first, *rest = (one["content"] for one in run)  # results that follow each other are one turn
        joined = [part for content in rest for part in (text_part(between), *content)]
        said.append(message("user", before, *first, *joined, after))
    if codec.render(said) != codec.render(conversation):
        raise ConfigError(_NO_USER_TURN)
    return said


def _tool_words(codec: PromptCodec) -> tuple[str, str, str]:
    """Return the template's text around tool results: before the first, between two, and after the last."""
    # after a question alone, because some templates change an assistant's turn once a user turn follows it
    asked, mark = text("user", "What is written there?"), "a result of the tool"
    start, _, end = codec.render([asked, text("user", mark)]).partition(mark)
    first, *between, last = codec.render([asked, text("tool", mark), text("tool", mark)]).split(mark)
    if len(between) != 1 or not first.startswith(start) or not last.endswith(end):
        raise ConfigError(_NO_USER_TURN)
    return first.removeprefix(start), between[0], last.removesuffix(end)


def from_row(row: dict[str, Any]) -> tuple[list[Message], list[Image.Image]]:
    """Return the conversation of a row, with its images named view0, view1 and so on, and those images."""
    images = [image.convert("RGB") for image in row["images"]]
    numbers = iter(range(len(images)))
    conversation = [
        message(
            one["role"],
            *(
                image_part(f"view{next(numbers)}") if part["type"] == "image" else text_part(part["text"])
                for part in one["content"]
            ),
        )
        for one in row["messages"]
    ]
    assert len(view_ids(conversation)) == len(images), "a conversation shows each of its images once"
    return conversation, images


def training_conversations(backend: HFBackend, row: dict[str, Any]) -> list[TrainingConversation]:
    """Prepare a row for training: one conversation, or more where the template rewrites old turns.

    Raises BackendError if the conversation is longer than the model's context.
    """
    conversation, images = from_row(row)
    session = backend.session(lambda view: images[int(view.removeprefix("view"))])
    entries: list[TrainingConversation] = []
    with torch.no_grad():
        for at, turn in enumerate(conversation):
            if turn["role"] != "assistant":
                continue
            ready = session.prepare(conversation[:at])
            answer = answer_ids(backend, plain_text(turn))
            labels = [IGNORED] * len(ready.prompt.ids)
            # a prompt that begins with the earlier one and its answer, but for the token that ends the turn
            last = len(entries[-1].labels) - 1 if entries else 0
            if entries and ready.prompt.ids[:last] == entries[-1].ready.prompt.ids[:last]:
                labels[:last] = entries.pop().labels[:last]
                end = ready.prompt.ids[last]  # as the template wrote it
                labels[last] = end if end in backend.end_ids else IGNORED
            entries.append(TrainingConversation(session, with_answer(ready, answer), (*labels, *answer)))
            session.remember(ready, answer[:-1], plain_text(turn))
    return entries
