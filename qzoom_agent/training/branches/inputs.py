"""Records as the agent asks them, and the frozen passes over them that training needs.

A branch must read what it will read at inference, so a record becomes the opening conversation of the model's own
protocol over a coarse view of the agent's own making, and its ids and positions are those of the inference session.
Rows about the same image share a session, and with it the encoded view.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from qzoom_agent.config import BudgetConfig
from qzoom_agent.images import load_image
from qzoom_agent.messages import Message
from qzoom_agent.models.hf import HFBackend
from qzoom_agent.models.hf_batch import causal_mask, padded
from qzoom_agent.models.hf_session import HFSession, Prepared
from qzoom_agent.models.prompts import Prompt
from qzoom_agent.perception.adapters import Grid
from qzoom_agent.perception.decoder import Decoder, Embedded, Rotary
from qzoom_agent.perception.look import Images
from qzoom_agent.protocols import get_protocol
from qzoom_agent.training.branches.dataset import Record
from qzoom_agent.views import View, ViewStore


class CoarsePrompt(NamedTuple):
    """One record, asked over its coarse view. Records about the same image share session and store."""

    session: HFSession
    store: ViewStore
    shown: list[View]
    """The views of this conversation."""
    messages: list[Message]
    ready: Prepared

    @property
    def cells(self) -> Grid:
        """The cells of the coarse view's map, and where they lie in it."""
        return self.session.grid(self.ready.prompt.spans[0])

    @property
    def grid(self) -> tuple[int, int, int]:
        """Index of the coarse view's first visual token, and the rows and columns of its map."""
        return self.session.grids(self.ready.prompt)[0]


class LowerLayerStates(NamedTuple):
    """The lower layers' output over a batch, padded on the left."""

    hidden: Tensor
    """(rows, tokens, hidden)."""
    rotary: Rotary
    mask: Tensor
    images: list[Images]
    starts: list[int]
    """Index of the first real token of each row."""


def ask(
    backend: HFBackend, records: Sequence[Record], tokens: Sequence[int | None], *, tools: bool = False
) -> list[CoarsePrompt]:
    """The opening of each record's conversation, over a coarse view of at most so many tokens (None: the preset's)."""
    shared: dict[tuple[str, int | None], tuple[HFSession, ViewStore]] = {}
    asked = []
    for record, limit in zip(records, tokens, strict=True):
        key = record["image_id"], limit
        if key not in shared:
            store = ViewStore()
            store.add_original(load_image(record["image"]))
            views = BudgetConfig(coarse_tokens=limit).view_budget(backend.defaults)
            store.add_coarse(
                factor=views.factor, min_tokens=views.coarse_min_tokens, max_tokens=views.coarse_max_tokens
            )
            shared[key] = backend.session(store.image), store
        session, store = shared[key]
        asked.append(opened(backend, session, store, [store.view("coarse")], record["question"], tools=tools))
    return asked


@torch.no_grad()
def opened(
    backend: HFBackend, session: HFSession, store: ViewStore, shown: list[View], question: str, *, tools: bool = False
) -> CoarsePrompt:
    """A question over these views of a store, as a policy asks it that offers no tools, or does."""
    messages = get_protocol(backend.protocol).opening(question, shown, tools=tools)
    return CoarsePrompt(session, store, shown, messages, session.prepare(messages))


def answered(one: CoarsePrompt, ids: Sequence[int]) -> Prepared:
    """The conversation followed by these ids of an answer."""
    return followed(one.ready, ids)


def followed(ready: Prepared, ids: Sequence[int]) -> Prepared:
    """A prepared conversation with the ids of the answer to it."""
    count = len(ids)
    more = torch.arange(count, device=ready.positions.device) + ready.next_position
    positions = torch.cat((ready.positions, more.expand(*ready.positions.shape[:-1], count)), dim=-1)
    return Prepared(Prompt((*ready.prompt.ids, *ids), ready.prompt.spans), positions, ready.turns, ready.rest)


def answer_ids(backend: HFBackend, text: str) -> list[int]:
    """Ids of an answer as the model writes it, with the token that ends its turn."""
    tokenizer: Any = backend.processor.tokenizer
    return [*tokenizer(text, add_special_tokens=False)["input_ids"], tokenizer.eos_token_id]


def rows_of(
    backend: HFBackend, asked: Sequence[CoarsePrompt], ready: Sequence[Prepared]
) -> tuple[Embedded, Rotary, Tensor, Tensor]:
    """Padded rows ready for the decoder: embedded, rotary embeddings, mask, and which tokens are real."""
    new, positions, valid = padded(backend, [one.session for one in asked], ready, [0] * len(ready))
    rotary = Decoder(backend.model).rotary(new.hidden, positions)
    return new, rotary, causal_mask(valid, valid.shape[1], new.hidden), valid


@torch.no_grad()
def lower_states(backend: HFBackend, asked: Sequence[CoarsePrompt], k: int) -> LowerLayerStates:
    """The base's first `k` layers over the prompts. Plain tensors: a branch may be trained on them."""
    new, rotary, mask, valid = rows_of(backend, asked, [one.ready for one in asked])
    hidden = Decoder(backend.model).run(new, range(k), rotary=rotary, mask=mask)
    starts = [int(count) for count in valid.shape[1] - valid.sum(dim=1)]
    images: list[Images] = []
    for one, start in zip(asked, starts, strict=True):
        at, rows, columns = one.grid
        images.append([(start + at, rows, columns)])
    return LowerLayerStates(hidden, rotary, mask, images, starts)
