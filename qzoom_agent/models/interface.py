"""What a model must offer to the agent: a Backend that opens Sessions, and a Session that answers.

One idea: the caller always passes the *whole* conversation and the session works out what of it is new. So a session
can be dropped and a fresh one given the same messages (resume), a conversation may diverge (retry a turn), and nobody
but the session knows about caches. Messages are plain JSON: pixels stay with whoever made the views, and a session
asks for them by view id.

Invariants: a reply depends only on the messages, the settings and the weights, never on what another session does;
nothing here imports torch. Deliberately absent: tools, protocols and policies, which live above.
"""

from collections.abc import Callable, Sequence
from typing import Literal, NamedTuple, Protocol, runtime_checkable

from PIL import Image
from pydantic import BaseModel, ConfigDict, Field

from qzoom_agent.config import PerceptionConfig, ViewBudget
from qzoom_agent.geometry import Box
from qzoom_agent.messages import Message

ImageSource = Callable[[str], Image.Image]
"""Gives the pixels of a view by its id, exactly as the model is to see them. Within a session an id names one image."""


class SamplingParams(BaseModel):
    """How one reply is generated."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    max_new_tokens: int = Field(default=256, ge=1)
    """Most tokens a single reply may have."""
    temperature: float = Field(default=0.0, ge=0.0)
    """0 takes the likeliest token each time; above 0 samples."""
    top_p: float = Field(default=1.0, gt=0.0, le=1.0)
    """Sample only among the likeliest tokens that together hold this probability."""
    seed: int = 0
    """Seed of this reply's own random generator; no global random state is read or written."""


class Reply(BaseModel):
    """One assistant turn and what it cost."""

    model_config = ConfigDict(frozen=True)

    text: str
    """What the model wrote, without the end-of-turn token; up to and including a stop string that ended it."""
    finish: Literal["stop", "length"]
    """`stop`: the model ended its turn or wrote a stop string. `length`: it was cut off."""
    prompt_tokens: int
    """Tokens of the whole conversation before this reply, visual tokens included."""
    cached_tokens: int
    """How many of those were already held and not computed again."""
    new_tokens: int
    """Tokens generated, the end-of-turn token included."""
    visual_tokens: int
    """Visual tokens encoded for this reply (images that were not held)."""
    token_layers: float = 0.0
    """Prefill work: tokens times decoder layers that were run for this reply before it began to write."""
    seconds: float
    """Wall time of the call."""


class Proposal(NamedTuple):
    """A part of a view that deserves a closer look."""

    cells: tuple[float, float, float, float]
    """x1, y1, x2, y2 in cells of the view's map, right and bottom exclusive."""
    box: Box
    """The same in shown pixels of the view; it may reach outside a view that the model was shown padded."""


class Sight(NamedTuple):
    """What a coarse pass found in one view: whether the question needs more detail, and where."""

    view: str
    score: float | None
    """The gate's probability that it does; None without a gate."""
    threshold: float | None
    heat: list[list[float]]
    """Rows of the map's cells, 0 to 1; empty where no map was made."""
    cutoff: float | None
    proposals: list[Proposal]
    """Best first; empty when the coarse view suffices."""
    reason: str
    aligned: bool
    """Whether a crop of it is to be given the positions of its place: tell the session by `place`."""
    prompt_tokens: int
    visual_tokens: int
    token_layers: float
    """Work of the pass: tokens times decoder layers, those of the branches included."""
    seconds: float
    extent: Box | None = None
    """What the map covers, in shown pixels of the view: more than it where it was padded. None: the view."""
    margin: float = 0.0
    """What the branches want added on each side of a proposal, as a share of its longer side."""
    fixed: bool = False
    """The proposals have sides that were chosen beforehand: they say where, and not how much."""


@runtime_checkable
class PerceivingSession(Protocol):
    """A session of a model with branches. After a look, `reply` goes on from where the coarse pass stopped."""

    def look(self, messages: Sequence[Message], *, options: PerceptionConfig, map_always: bool = False) -> list[Sight]:
        """The coarse pass over the whole conversation `messages`: a Sight for each of its views, in order.

        map_always: give the map even where the gate says that it is not needed.
        Raises BackendError when there is no image in it, or the model cannot be run on it.
        """
        ...

    def place(self, view: str, *, source: str, cells: tuple[float, float, float, float]) -> None:
        """Say that `view` is the crop of these cells of `source`, for models that give crops aligned positions."""
        ...


class Session(Protocol):
    """One conversation with a model. Not shared between threads; several sessions of one backend may run at once."""

    def reply(
        self,
        messages: Sequence[Message],
        *,
        settings: SamplingParams,
        stop: tuple[str, ...] = (),
        on_text: Callable[[str], None] | None = None,
    ) -> Reply:
        """Continue the whole conversation `messages` by one assistant turn.

        stop: texts that end the reply once written; the text ends with the one met.
        on_text: called with each new piece of text as it is written; the pieces joined are `Reply.text`.
        Raises BackendError when the model cannot be run on these messages.
        """
        ...

    def close(self) -> None:
        """Free what the session holds. The session may be used again; it then starts from nothing."""
        ...


class Backend(Protocol):
    """A loaded model."""

    @property
    def name(self) -> str:
        """What the user called the model."""
        ...

    @property
    def protocol(self) -> str:
        """Name of the zoom protocol this model was trained on, or fits best."""
        ...

    @property
    def perceives(self) -> bool:
        """Whether its sessions can look (`PerceivingSession`): the model has branches."""
        ...

    @property
    def defaults(self) -> ViewBudget:
        """How large a visual token of this model is, and how many a view had best have."""
        ...

    def session(self, image: ImageSource) -> Session:
        """Open a conversation whose image parts are resolved by `image`."""
        ...
