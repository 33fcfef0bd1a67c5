"""One pass of the base over question and answer, with the inputs of some layers kept for `perception.attention`."""

from collections.abc import Sequence
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from qzoom_agent.models.hf import HFBackend
from qzoom_agent.models.hf_batch import BatchEngine
from qzoom_agent.models.interface import SamplingParams
from qzoom_agent.perception.attention import Recording, record
from qzoom_agent.perception.decoder import Decoder
from qzoom_agent.protocols import get_protocol
from qzoom_agent.training.branches.inputs import CoarsePrompt, answer_ids, answered, rows_of

Asking = Literal["answer", "prediction"]
"""Whose attention counts: the answer's own tokens, as published, or the tokens that predict it."""


class Attended(NamedTuple):
    """What a pass left to read attention from."""

    recorded: Recording
    valid: Tensor
    """(rows, tokens) bool: which tokens are real; rows are padded on the left."""
    asking: list[list[int]]
    """For each row the tokens whose attention counts."""
    images: list[tuple[int, int, int]]
    """For each row the first visual token, and the rows and columns of the map."""


def answers(backend: HFBackend, asked: Sequence[CoarsePrompt], *, max_new_tokens: int) -> list[str]:
    """What the model says to each, greedily: its answer, or the first zoom call as it is written where it may zoom.

    Empty where it says nothing that can be read.
    """
    protocol, settings = get_protocol(backend.protocol), SamplingParams(max_new_tokens=max_new_tokens)
    # questions about one image share its encoded view, but each is a conversation of its own
    sessions = [one.session.fork() for one in asked]
    messages = [one.messages for one in asked]
    replies = BatchEngine(backend).reply(sessions, messages, settings=[settings] * len(asked), stop=protocol.stop)
    read = [protocol.parse(reply.text, one.shown) for reply, one in zip(replies, asked, strict=True)]
    return [one.calls[0].raw if one.calls else one.answer or "" for one in read]


@torch.no_grad()
def attend(
    backend: HFBackend, asked: Sequence[CoarsePrompt], said: Sequence[str], layers: Sequence[int], asking: Asking
) -> Attended:
    """Run the base over each prompt and its answer, up to the deepest of `layers`."""
    texts = [answer_ids(backend, text) for text in said]
    ready = [answered(one, ids) for one, ids in zip(asked, texts, strict=True)]
    with record(backend.model, layers) as recorded:
        new, rotary, mask, valid = rows_of(backend, asked, ready)
        Decoder(backend.model).run(new, range(max(layers) + 1), rotary=rotary, mask=mask)
    end = valid.shape[1]
    queries, images = [], []
    for one, ids, real in zip(asked, texts, valid.sum(dim=1).tolist(), strict=True):
        first, last = end - len(ids), end - 1  # the last token ends the turn, and nothing is read for it
        # generation feeds back every token of an answer to learn that it ends; of an empty one that end asks
        predicting, fed = range(first - 1, max(first, last - 1)), range(first, max(first + 1, last))
        queries.append(list(predicting if asking == "prediction" else fed))
        start, rows, columns = one.grid
        images.append((end - real + start, rows, columns))
    return Attended(recorded, valid, queries, images)
