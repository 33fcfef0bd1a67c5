"""The frozen base at work on records: prompts, hidden states, attention, answers, and whether those are right.

A branch reads in training what it reads at inference: prompts are those of the model's own protocol over the agent's
coarse view, in an inference session. Records about the same image share a session, and with it the encoded view.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Final, NamedTuple

import torch
from torch import Tensor

from qzoom_agent.config import BudgetConfig
from qzoom_agent.data.samples import Sample
from qzoom_agent.evaluation.scorers import ocrbench
from qzoom_agent.evaluation.scorers.judge import Judge, judged
from qzoom_agent.evaluation.tasks.needle.tasks import exact
from qzoom_agent.geometry import Box
from qzoom_agent.images import load_image
from qzoom_agent.messages import Message
from qzoom_agent.models.hf import HFBackend
from qzoom_agent.models.hf_batch import BatchEngine, padded
from qzoom_agent.models.hf_generation import GenerationRequest, Prepared
from qzoom_agent.models.hf_session import HFSession
from qzoom_agent.models.interface import SamplingParams
from qzoom_agent.models.prompts import Prompt
from qzoom_agent.perception.adapters import Grid, of_full_layers
from qzoom_agent.perception.attention import LayerInputs, layer_inputs
from qzoom_agent.perception.branch_config import InsideCrops, searched
from qzoom_agent.perception.branches import Branches
from qzoom_agent.perception.decoder import Decoder, Embedded, Rotaries, Rotary
from qzoom_agent.perception.look import Images
from qzoom_agent.perception.masks import Masks, layer_masks
from qzoom_agent.protocols.wording import own_protocol
from qzoom_agent.training.branches.branch_recipe import Asking, Labelling
from qzoom_agent.training.branches.dataset import Record
from qzoom_agent.training.branches.sharded_table import together
from qzoom_agent.views import View, ViewStore

_BY_RULE: Final = Judge()


class CoarsePrompt(NamedTuple):
    """One record, asked over its coarse view."""

    question: str
    session: HFSession
    store: ViewStore
    shown: list[View]
    messages: list[Message]
    ready: Prepared
    crop: Box | None = None
    """The crop among these views, in pixels of the image; None: nothing was cropped."""

    @property
    def cells(self) -> Grid:
        """The cells of the coarse view's map, and where they lie in the view."""
        return self.session.grid(self.ready.prompt.spans[0])

    @property
    def grids(self) -> list[tuple[int, int, int]]:
        """For each view, the coarse one first, the index of its first visual token and rows and columns of its map."""
        return self.session.grids(self.ready.prompt)


class LowerLayerStates(NamedTuple):
    """Output of the lower layers for a batch, padded on the left, with rotary embeddings and mask of the branches."""

    hidden: Tensor
    """(rows, tokens, hidden)."""
    rotary: Rotary
    mask: Tensor | None
    images: list[Images]
    starts: list[int]
    """Index of the first real token of each row."""


class Attended(NamedTuple):
    """One pass over prompts and answers, from which attention can be read."""

    kept: LayerInputs
    valid: Tensor
    """(rows, tokens) bool: real tokens; rows are padded on the left."""
    asking: list[list[int]]
    """For each row the tokens whose attention counts."""
    images: list[tuple[int, int, int]]
    """For each row the first visual token, and the rows and columns of the map."""


def load_frozen(model: str, *, dtype: str, protocol: str | None, branches: Path | str | None) -> HFBackend:
    """Load a base, frozen, with these branches (None: its own), onto the device of this process."""
    processes = together()
    device = str(processes.device) if processes.num_processes > 1 else "auto"
    backend = HFBackend.load(model, device=device, dtype=dtype, protocol=protocol, branches=branches)
    backend.model.requires_grad_(False)
    return backend


def branches_of(backend: HFBackend) -> Branches:
    """Return the branches of a backend, which the stage that loaded it gave it."""
    assert backend.branches is not None
    return backend.branches


def ask(
    backend: HFBackend, records: Sequence[Sample], tokens: Sequence[int | None] | int | None, *, tools: bool = False
) -> list[CoarsePrompt]:
    """Open the conversation of each record over a coarse view of at most so many visual tokens (None: the preset's)."""
    limits = tokens if isinstance(tokens, Sequence) else [tokens] * len(records)
    shared: dict[tuple[str, int | None], tuple[HFSession, ViewStore]] = {}
    asked = []
    for row, limit in zip(records, limits, strict=True):
        key = row.cluster, limit
        if key not in shared:
            store = ViewStore()
            original = store.add_original(load_image(row.image))
            views = BudgetConfig(coarse_tokens=limit).view_budget(backend.defaults)
            low, high = views.coarse_limits(original.size)
            store.add_coarse(factor=views.factor, min_tokens=low, max_tokens=high)
            shared[key] = backend.session(store.image), store
        session, store = shared[key]
        asked.append(open_prompt(backend, session, store, [store.view("coarse")], row.question, tools=tools))
    return asked


@torch.no_grad()
def open_prompt(
    backend: HFBackend, session: HFSession, store: ViewStore, shown: list[View], question: str, *, tools: bool = False
) -> CoarsePrompt:
    """Ask a question over these views of a store, as a policy does that offers tools or none."""
    messages = own_protocol(backend).opening(question, shown, tools=tools)
    return CoarsePrompt(question, session, store, shown, messages, session.prepare(messages))


def with_answer(ready: Prepared, ids: Sequence[int]) -> Prepared:
    """Append the ids of an answer to a prepared conversation."""
    count = len(ids)
    # text after an image has the same position on all axes of a multimodal rotary embedding
    more = torch.arange(count, device=ready.positions.device) + ready.next_position
    positions = torch.cat((ready.positions, more.expand(*ready.positions.shape[:-1], count)), dim=-1)
    return Prepared(Prompt((*ready.prompt.ids, *ids), ready.prompt.spans), positions, ready.turns, ready.rest)


def answer_ids(backend: HFBackend, text: str) -> list[int]:
    """Return the ids of an answer as the model writes it, with the token that ends its turn."""
    return [*backend.processor.tokenizer(text, add_special_tokens=False)["input_ids"], backend.turn_end]


def embed_rows(
    backend: HFBackend, sessions: Sequence[HFSession], ready: Sequence[Prepared]
) -> tuple[Embedded, Rotaries, Masks, Tensor]:
    """Return embeddings, rotary embeddings, masks and real tokens (bool) of conversations, padded on the left."""
    new, positions, valid = padded(sessions, ready, [0] * len(ready))
    rotary = Decoder(backend.model).rotary(new.hidden, positions)
    return new, rotary, layer_masks(backend.model.config, valid, new.hidden, visual=new.visual), valid


@torch.no_grad()
def lower_states(
    backend: HFBackend, asked: Sequence[CoarsePrompt], k: int, *, inside_crops: InsideCrops = False
) -> LowerLayerStates:
    """Run the base's first `k` layers over the prompts, to make maps of their views (see `searched`)."""
    new, rotary, mask, valid = embed_rows(backend, [one.session for one in asked], [one.ready for one in asked])
    hidden = Decoder(backend.model).run(new, range(k), rotary=rotary, mask=mask)
    starts = [int(count) for count in valid.shape[1] - valid.sum(dim=1)]
    images: list[Images] = [
        [(start + at, rows, columns) for at, rows, columns in searched(one.grids, inside_crops)]
        for start, one in zip(starts, asked, strict=True)
    ]
    return LowerLayerStates(hidden, of_full_layers(rotary), of_full_layers(mask), images, starts)


@torch.no_grad()
def attend(
    backend: HFBackend, asked: Sequence[CoarsePrompt], said: Sequence[str], layers: Sequence[int], asking: Asking
) -> Attended:
    """Run the base over each prompt and its answer up to the deepest of `layers`, whose inputs are kept."""
    texts = [answer_ids(backend, text) for text in said]
    ready = [with_answer(one.ready, ids) for one, ids in zip(asked, texts, strict=True)]
    new, rotary, mask, valid = embed_rows(backend, [one.session for one in asked], ready)
    kept = layer_inputs(Decoder(backend.model), new, layers, rotary=rotary, mask=mask)
    end, back, queries = valid.shape[1], 1 if asking == "prediction" else 0, []
    for ids in texts:
        # generation feeds back every token of an answer but the last, which ends it; of an empty one that end asks
        first = end - len(ids) - back
        queries.append(list(range(first, max(first + 1, end - 1 - back))))
    places = [
        (int(end - count) + at, rows, columns)
        for count, (at, rows, columns) in zip(valid.sum(dim=1), (one.grids[0] for one in asked), strict=True)
    ]
    return Attended(kept, valid, queries, places)


def generate_answers(backend: HFBackend, asked: Sequence[CoarsePrompt], *, max_new_tokens: int) -> list[str]:
    """Decode a reply to each prompt greedily; return its answer, its first zoom call as written, or ""."""
    protocol = own_protocol(backend)
    settings = SamplingParams(max_new_tokens=max_new_tokens, stop=protocol.stop)
    # questions about one image share its encoded view, but each is a conversation of its own
    sessions = [one.session.fork() for one in asked]
    with torch.no_grad():
        ready = [session.prepare(one.messages) for session, one in zip(sessions, asked, strict=True)]
    replies = BatchEngine(backend).reply(
        [GenerationRequest(*both, settings) for both in zip(sessions, ready, strict=True)]
    )
    read = [protocol.parse(reply.text, one.shown) for reply, one in zip(replies, asked, strict=True)]
    return [one.calls[0].raw if one.calls else one.answer or "" for one in read]


def attended_answers(
    backend: HFBackend, records: Sequence[Sample], labelling: Labelling
) -> tuple[list[CoarsePrompt], list[str]]:
    """Return prompts and answers whose attention is read: the model's own answers or calls, or the dataset's."""
    asked = ask(backend, records, labelling.tokens, tools=labelling.response == "call")
    if labelling.response == "gold":
        return asked, [row.answer for row in records]
    return asked, generate_answers(backend, asked, max_new_tokens=labelling.max_new_tokens)


def is_right(said: str | None, record: Record, judge: Judge = _BY_RULE) -> bool:
    """Return whether a reply (None: there is none) is right, by the scorers of evaluation.

    On generated boards it has to be the answer and nothing else. A multiple choice is right if the right option is
    chosen. On other data a reply may hold an accepted answer as whole words early on ("The date is January 5."); the
    judge is asked about what these rules refuse (BackendError if it does not answer).
    """
    # as a word of a reply, the letter of an option may be another word: "A" in "B. A red car"
    found_early = () if record.options else (ocrbench.clean,)
    scorers = (exact,) if record.exact else (*found_early, judged(judge))
    return any(score(said, record).value for score in scorers)
