"""The interface of a model: a Backend opens Sessions, and a Session answers.

The caller always passes the *whole* conversation, and the session works out which part of it is new. So a session can
be dropped and a fresh one given the same messages (resume), a conversation may diverge (retry of a turn), and only the
session knows about caches. Messages are plain JSON; a session asks for pixels by view id.

A reply depends only on the messages, the settings and the weights, never on other sessions. Nothing here imports torch.
"""

from collections.abc import Callable, Sequence
from typing import Final, Protocol, Required, TypedDict, Unpack, runtime_checkable

from PIL import Image
from pydantic import BaseModel, Field

from qzoom_agent.config import PerceptionConfig, ViewBudget
from qzoom_agent.messages import Message
from qzoom_agent.trace import PerceptionRecord
from qzoom_agent.trace import Reply as Reply

ImageSource = Callable[[str], Image.Image]
"""Returns the pixels of a view by its id, exactly as the model is shown them. In a session an id names one image."""
OnText = Callable[[str], None]
"""Receives each new piece of a reply's text as it is written; the pieces joined are `Reply.text`."""
TOO_LONG: Final = "the model was built for"
"""Words in the error of a conversation that is longer than the model's context."""


class SamplingParams(BaseModel, frozen=True, extra="forbid"):
    """Settings that one reply is generated with."""

    max_new_tokens: int = Field(default=256, ge=1)
    """Most tokens of one reply."""
    temperature: float = Field(default=0.0, ge=0.0)
    """0 takes the likeliest token each time; above 0 samples."""
    top_p: float = Field(default=1.0, gt=0.0, le=1.0)
    """Sample only from the likeliest tokens that together have this probability."""
    top_k: int | None = Field(default=None, ge=1)
    """Sample only from so many of the likeliest tokens. None: from all."""
    presence_penalty: float | None = None
    """Amount by which the logit of each token already in the reply is lowered. None: 0."""
    logprobs: bool = False
    """Return the log-probability of each token (`Reply.logprobs`)."""
    seed: int = 0
    """Seed of this reply's own random numbers; no global random state is read or written."""
    stop: tuple[str, ...] = ()
    """Texts that end the reply once written; the reply's text ends with the one met."""
    tools: tuple[str, ...] = ()
    """Native tools: OpenAI function schemas as JSON, which a server is given apart from the messages."""
    may_call: bool = True
    """False: the native tools stay in the prompt, but none may be called in this turn."""


class LookOptions(TypedDict, total=False):
    """How a session looks."""

    options: Required[PerceptionConfig]
    """Rules of the gate and the map."""
    map_always: bool
    """Make the map even if the gate says that it is not needed."""
    further: bool
    """The conversation shows crops of earlier looks: ask the branches of further looks, which a model has if its
    records say `further`. What earlier looks have computed is not computed again."""


@runtime_checkable
class PerceivingSession(Protocol):
    """A session of a model with branches. After a look, `reply` continues from where the coarse pass stopped."""

    def look(self, messages: Sequence[Message], **how: Unpack[LookOptions]) -> list[PerceptionRecord]:
        """Look at a whole conversation; return a record for each of its views, in order.

        Boxes and extent of a record are in shown pixels of its `view`.

        Raises:
            BackendError: there is no image in the conversation, or the model cannot be run on it.
        """

    def place(self, view: str, *, source: str, cells: tuple[float, float, float, float]) -> None:
        """Declare `view` to be the crop of these cells of `source`, for models with aligned positions of crops."""


@runtime_checkable
class SparseSession(Protocol):
    """A session that can show the model some of a view's visual tokens alone (`perception.sparse_crop`)."""

    def show_part(self, view: str, *, kept: Sequence[str]) -> None:
        """Declare that of `view` the tokens marked "1" in these rows of its grid are shown, and no others."""


class Perceiver(Protocol):
    """A model, or any other object, that looks for the model that answers; see `qzoom_agent.models.perceiver`.

    It may have `settings`, a mapping with its recommended values of keys of the configuration, such as
    {"perception.max_regions": 3}.
    """

    def look(
        self, image: Image.Image, question: str, *, options: PerceptionConfig, map_always: bool = False
    ) -> PerceptionRecord:
        """Decide whether a question needs more detail than a small view of the image shows, and where.

        Args:
            image: the original.
            question: the question as the user wrote it.
            options: rules of the gate and the map; those that do not fit are ignored.
            map_always: make the map even if no more detail is needed, to show it.

        Returns:
            A record with `boxes` (best first) and `extent` in pixels of the image; no boxes mean that the coarse view
            suffices. Everything else is for the record.

        Raises:
            BackendError: it cannot be run.
        """


class Session(Protocol):
    """One conversation with a model. Not shared between threads; sessions of one backend may run side by side."""

    def reply(self, messages: Sequence[Message], *, settings: SamplingParams, on_text: OnText | None = None) -> Reply:
        """Continue a whole conversation by one assistant turn.

        Args:
            messages: the conversation.
            settings: limit of tokens, sampling and stop texts.
            on_text: called while the reply is written.

        Raises:
            BackendError: the model cannot be run on these messages.
        """

    def close(self) -> None:
        """Free the session's memory. It may be used again and then starts from nothing."""


@runtime_checkable
class ForkingSession(Session, Protocol):
    """A session that can be continued in two ways, as a conversation with several questions needs."""

    def fork(self, *, shared: bool = False) -> Session:
        """Open another conversation with the views encoded so far.

        `shared`: views encoded later by one are known to the other, and it goes on from the coarse pass that a look has
        left unfinished.
        """


class Backend(Protocol):
    """A loaded model."""

    @property
    def name(self) -> str:
        """The user's name for the model."""

    @property
    def protocol(self) -> str:
        """Name of the zoom protocol that the model was trained on, or that fits best."""

    @property
    def perceives(self) -> bool:
        """True if its sessions can look (`PerceivingSession`): the model has branches."""

    @property
    def defaults(self) -> ViewBudget:
        """Size of a visual token of this model, and the recommended number of tokens of a view."""

    def session(self, image: ImageSource) -> Session:
        """Open a conversation; `image` returns the pixels of its views."""
