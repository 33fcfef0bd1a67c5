"""The record of one episode: the question, the model's turns, the views shown, and the cost.

A `Trace` is plain data. Pixels are never inside; a view names its image by digest, and a saved trace is a folder of

    trace.json            the record
    images/<digest>.png   every image the model was shown, and the original

Images are written before the record and the record is replaced in one step, so a folder with a readable `trace.json` is
complete. Any text of a model can be stored, and a file of the same major version loads.
"""

# Only ever imported as qzoom_agent.trace, so the standard library's `trace` stays reachable.
# ruff: noqa: A005

from __future__ import annotations

import json
import operator
import platform
import re
import uuid
from collections import Counter
from collections.abc import Callable, Sequence
from functools import cache
from importlib import metadata
from pathlib import Path
from typing import Annotated, Any, Literal

import PIL.Image
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, JsonValue, ValidationError, model_validator

from qzoom_agent.errors import ImageError, TraceError
from qzoom_agent.files import atomic_write, first_fault, remove_parts, valid_unicode, version_numbers
from qzoom_agent.gate import gate_fires
from qzoom_agent.images import MAX_PIXELS, load_image
from qzoom_agent.views import View

VERSION = "1.3"
"""Version of the format, "major.minor"; code of another major version refuses it."""

Status = Literal["answered", "budget", "refused", "error", "waiting"]
"""`waiting`: a person has to decide on a call (`approve`), and the run goes on with `Agent.resume`."""
Decision = Literal["served", "grown", "snapped", "refused", "failed"]
SERVED: frozenset[Decision] = frozenset({"served", "grown", "snapped"})
Images = Callable[[str], PIL.Image.Image]
"""Finds an image by its digest."""
Quad = tuple[float, float, float, float]
"""x1, y1, x2, y2."""
Count = Annotated[int, Field(ge=0, le=10**12)]

_FILE = "trace.json"
_DIGEST = re.compile(r"[A-Za-z0-9_-]{1,128}")


# A model may write half a surrogate pair in JSON; such a string can be neither validated nor written as UTF-8.
Text = Annotated[str, BeforeValidator(lambda value: valid_unicode(value) if isinstance(value, str) else value)]
"""A string from a model or a file; lone surrogates become U+FFFD."""


class _Record(BaseModel):
    # "strings" keeps inf and nan (a model can write 1e999) where JSON alone would turn them into null.
    model_config = ConfigDict(extra="ignore", ser_json_inf_nan="strings")


class Approval(_Record):
    """A person's decision on a call."""

    action: Literal["approve", "move", "refuse"]
    box: Quad | None = None
    """`move`: the region to show instead, in original pixels."""
    reason: Text = ""
    """`refuse`: the reason, for the model."""


class PendingCall(_Record):
    """A call that waits for a person's decision, after the policy's review: what will be run if it is approved."""

    name: Text
    box: Quad | None = None
    """Region that will be shown, in original pixels; None: it is no zoom call."""
    image: Count = Field(default=0, exclude_if=operator.not_)
    """Number of the image that `box` is in, counted from 0."""
    arguments: Text | None = None
    """Arguments of an own tool, as JSON."""
    label: Text = ""
    """The model's words for what it looks for."""
    thought: Text = ""
    """The model's words before the call."""
    tokens: Count = 0
    """Visual tokens of the crop."""
    notes: list[Text] = Field(default_factory=list)
    """Corrections of the box, and the reason of a review that moved it."""
    view: Text = "coarse"
    """Id of the view that the call refers to."""
    source: Text = ""
    """Id of the full-size image of a tool that the crop is cut from; empty: the original."""
    inside: Quad | None = None
    """The region in pixels of `source`."""
    size: tuple[Count, Count] = (0, 0)
    """Pixels of the crop as shown."""
    code: Text = ""
    """Code of a review that moved the box, as in `CallRecord`."""
    reason: Text = ""
    """Text of that review, for the model."""
    numbers: dict[str, float] = Field(default_factory=dict)


class CallRecord(_Record):
    """One call of zoom or of an own tool, and its outcome."""

    id: Text = Field(default="", exclude_if=operator.not_)
    """The server's id of a native tool call."""
    name: Text
    """Name of the tool, as the model wrote it."""
    raw: Text = ""
    """The exact text of the call."""
    box: Quad | None = None
    """As asked, in `frame` of `view`; None if no box could be read."""
    frame: Literal["pixel", "unit", "per_mille", "cell"] = "pixel"
    view: Text = "original"
    """Id of the view that the box refers to."""
    label: Text = ""
    """The model's words for what it looks for."""
    arguments: Text | None = Field(default=None, exclude_if=lambda value: value is None)
    """Arguments of an own tool, as JSON; None: it is a zoom call."""
    decision: Decision
    """`grown`: served with a corrected box; `snapped`: served with another box that the review chose; `refused`: by the
    review; `failed`: a call that cannot be run."""
    code: Text = ""
    """The rule that refused or snapped: "budget", "covered", "gate" and so on; else empty."""
    reason: Text = ""
    """The text for the model, or the policy's reason."""
    numbers: dict[str, float] = Field(default_factory=dict)
    """Measurements behind the decision, such as {"covered": 0.93, "heat": 0.02}."""
    served: Quad | None = None
    """The box really cut, in original pixels."""
    result: str | None = None
    """Id of the view that came back."""
    text: Text = Field(default="", exclude_if=operator.not_)
    """Text that an own tool returned."""
    approval: Approval | None = Field(default=None, exclude_if=lambda value: value is None)
    """Decision of a person, where one was asked."""

    @property
    def serves(self) -> bool:
        """True if the model got what it asked for, or another crop instead."""
        return self.decision in SERVED


class Reply(_Record):
    """One assistant turn as a session returns it, and its cost."""

    text: Text
    """Text of the turn without the end-of-turn token, up to and including a stop string that ended it."""
    finish: Literal["stop", "length"] = "stop"
    """`stop`: the model ended its turn or wrote a stop string. `length`: it reached the limit of tokens."""
    prompt_tokens: Count = 0
    """Tokens of the whole conversation before this reply, visual tokens included."""
    cached_tokens: Count = 0
    """Prompt tokens that were in the cache and not computed again."""
    new_tokens: Count = 0
    """Tokens generated, the end-of-turn token included."""
    visual_tokens: Count = 0
    """Visual tokens of the images that were encoded for this reply."""
    token_layers: float = 0.0
    """Work of the prefill: tokens times decoder layers."""
    seconds: float = 0.0
    """Wall time in the model; in a batch, its share of it."""
    withheld: Text = Field(default="", exclude_if=operator.not_)
    """The reason why the model or a filter kept the answer back."""
    logprobs: list[tuple[Text, float]] = Field(default_factory=list, exclude=True, repr=False)
    """Text and log-probability of each token, where `SamplingParams.logprobs` asks for them; tokens that share
    a character are one, as likely as the least likely of them. Not part of the record."""
    items: list[dict[str, Any]] = Field(default_factory=list, exclude=True, repr=False)
    """A turn with native tool calls as items of the Responses API (reasoning, message, function_call), which the server
    is sent again unchanged. Not part of the record: `text` has the calls too."""


class Turn(Reply):
    """One assistant turn and its outcome."""

    index: Count
    """Number of the turn, counted from 0."""
    thought: Text = ""
    """Reasoning, and any text around the calls or the answer."""
    answer: Text | None = None
    """The answer that the turn gave; None if it gave none."""
    calls: list[CallRecord] = Field(default_factory=list)
    """The calls that could be read, in order."""
    problems: list[Text] = Field(default_factory=list)
    """Texts to the model about calls that could not be parsed."""
    repairs: list[Text] = Field(default_factory=list)
    """Corrections made while parsing; the model was not told."""
    act_seconds: float = 0.0
    """Time in the policy's review and the tool."""
    confidence: float | None = Field(default=None, exclude_if=lambda value: value is None)
    """Probability of the least likely token of the answer, not calibrated; None without log-probabilities."""
    forced: bool = False
    """The last turn, without tools, after a budget was spent or too many turns had no served call."""


class PerceptionRecord(_Record):
    """The result of a look: the gate's score, the heat map and the proposed boxes.

    Sessions return one for each view, with boxes in that view's shown pixels; on a trace they are in original pixels.
    """

    view: Text = Field(default="original", exclude=True)
    """Id of the view whose pixels `extent` and `boxes` are in."""
    aligned: bool = Field(default=False, exclude=True)
    """Crops of the view are to be given the positions of their place (`PerceivingSession.place`)."""
    margin: float = Field(default=0.0, exclude=True)
    """Margin that the branches want on each side of a box, as a share of its longer side; not yet in `boxes`."""
    image: Count = Field(default=0, exclude_if=operator.not_)
    """Number of the image, counted from 0, that map and boxes are about."""
    others: list[PerceptionRecord] = Field(default_factory=list, exclude_if=operator.not_)
    """The same for the other images of the question, in order; the gate's score is one for all."""
    perceiver: Text = Field(default="", exclude_if=operator.not_)
    """Name of the perceiver that looked; empty: the model that answers."""
    further: bool = Field(default=False, exclude=True)
    """The branches can look again once the crops of this look are shown."""
    close: bool = Field(default=False, exclude=True)
    """The boxes are close-ups of crops that are shown: what is shown at full resolution is magnified, too."""
    score: float | None = None
    """The gate's probability that more detail is needed; None without a gate."""
    threshold: float | None = None
    """The score from which the gate asks for it."""
    heat: list[list[float]] = Field(default_factory=list)
    """Rows of the coarse view's token grid, top to bottom; any non-negative scale. Empty where no map was made."""
    extent: Quad | None = None
    """Box that the map covers: larger than the view where the model was shown it padded. None: the whole view."""
    cutoff: float | None = None
    """Value of the blurred map above which a cell is foreground; None where no map was made."""
    cells: list[Quad] = Field(default_factory=list)
    """Proposed boxes in cells of the heat map, right and bottom exclusive, best first."""
    boxes: list[Quad] = Field(default_factory=list)
    """The same boxes in pixels of `view`."""
    foreground: list[Quad] = Field(default_factory=list, exclude_if=operator.not_)
    """Foreground of the map in pixels of `view`, row by row, where crops are sparse (`perception.sparse_crop`)."""
    fixed: bool = False
    """The boxes have fixed sides: they tell a place, not an extent."""
    route: Literal["direct", "zoom"] = "direct"
    """`zoom`: crops were proposed."""
    reason: Text = ""
    """The reason of the route, in a few words."""
    prompt_tokens: Count = 0
    """Tokens that were looked at, visual ones included."""
    visual_tokens: Count = 0
    """Visual tokens that were looked at."""
    token_layers: float = 0.0
    """Cost of the look: new tokens times decoder layers, and the work of the branches."""
    seconds: float = 0.0
    """Wall time of the look; in a batch, its share of it."""
    withheld: bool = False
    """The gate asked for a crop, and the budget had no room for any."""

    @property
    def every(self) -> list[PerceptionRecord]:
        """The record of each image, in order."""
        return [self, *self.others]

    def of(self, image: int) -> PerceptionRecord | None:
        """Return the record of an image; None if it was not looked at."""
        return next((one for one in self.every if one.image == image), None)

    @property
    def fired(self) -> bool | None:
        """True if the gate asked for more detail; None without a gate."""
        return gate_fires(self.score, self.threshold)

    @model_validator(mode="after")
    def _rectangular(self) -> PerceptionRecord:
        if len({len(row) for row in self.heat}) > 1:
            raise ValueError("rows of the heat map differ in length")
        return self


class Seconds(_Record):
    """Wall-clock seconds by phase. Of looks and turns that are computed in a batch, an episode has its share, without
    the time that it waited for the others.
    """

    perceive: float = 0.0
    """Before the first turn: the views of the opening, and the looks."""
    think: float = 0.0
    """In the model, over all turns."""
    act: float = 0.0
    """In the review of calls and in the tools."""

    @property
    def total(self) -> float:
        """Seconds of all phases."""
        return self.perceive + self.think + self.act


class Usage(_Record):
    """Totals of an episode. Visual tokens are counted once, when their view is first shown."""

    coarse_tokens: Count = 0
    """Visual tokens of the coarse views."""
    crop_tokens: Count = 0
    """Visual tokens of the crops, whoever asked for them."""
    tool_tokens: Count = Field(default=0, exclude_if=operator.not_)
    """Visual tokens of images that own tools returned."""
    text_tokens: Count = 0
    """Text in the last context and the last reply: everything that is not visual."""
    written_tokens: Count = 0
    """Tokens the model wrote, over all turns."""
    prompt_tokens: Count = 0
    """Tokens that the model was sent, over all turns, visual and cached ones counted."""
    requests: Count = 0
    """Turns that the model was asked for."""
    requested: Count = 0
    """Zoom calls of the model: the sum of `served`, `refused` and `failed`."""
    tool_calls: Count = Field(default=0, exclude_if=operator.not_)
    """Calls of own tools."""
    served: Count = 0
    """Zoom calls that were answered with a crop."""
    snapped: Count = 0
    """Served calls that got another box than they asked for."""
    refused: Count = 0
    """Zoom calls that the review, a budget, a person or the last turn turned down."""
    refused_by: dict[Text, Count] = Field(default_factory=dict)
    """Refused calls by `CallRecord.code`."""
    failed: Count = 0
    """Zoom calls that could not be run, such as those without a box that can be meant."""
    inserted: Count = 0
    """Crops that the policy showed unasked."""
    saved_tokens: Count = 0
    """Visual tokens that the refused calls would have cost."""
    seconds: Seconds = Field(default_factory=Seconds)
    """Wall-clock seconds by phase."""

    @property
    def visual_tokens(self) -> int:
        """Visual tokens of all views."""
        return self.coarse_tokens + self.crop_tokens + self.tool_tokens

    @classmethod
    def tally(cls, views: Sequence[View], turns: Sequence[Turn], *, perceive: float = 0.0, before: int = 0) -> Usage:
        """Add up an episode.

        Args:
            views: The views that it added.
            turns: Its turns.
            perceive: Seconds spent before the first turn.
            before: Visual tokens of the views that earlier questions of the conversation added.
        """
        every = [call for turn in turns for call in turn.calls]
        calls = [call for call in every if call.arguments is None]
        asked = {call.result for call in calls}
        coarse, crops, made = (
            sum(view.tokens for view in views if view.kind == kind) for kind in ("coarse", "crop", "tool")
        )
        last = turns[-1] if turns else None
        decisions = [call.decision for call in calls]
        return cls(
            coarse_tokens=coarse,
            crop_tokens=crops,
            tool_tokens=made,
            text_tokens=max(0, last.prompt_tokens + last.new_tokens - before - coarse - crops - made) if last else 0,
            written_tokens=sum(turn.new_tokens for turn in turns),
            prompt_tokens=sum(turn.prompt_tokens for turn in turns),
            requests=len(turns),
            requested=len(calls),
            tool_calls=len(every) - len(calls),
            served=sum(call.serves for call in calls),
            snapped=decisions.count("snapped"),
            refused=decisions.count("refused"),
            refused_by=dict(Counter(call.code for call in calls if call.decision == "refused" and call.code)),
            failed=decisions.count("failed"),
            inserted=sum(view.kind == "crop" and view.id not in asked for view in views),
            saved_tokens=sum(int(call.numbers.get("crop_tokens", 0)) for call in calls if call.decision == "refused"),
            seconds=Seconds(
                perceive=perceive,
                think=sum(turn.seconds for turn in turns),
                act=sum(turn.act_seconds for turn in turns),
            ),
        )

    @classmethod
    def total(cls, parts: Sequence[Usage]) -> Usage:
        """Add up the questions of a conversation; `text_tokens` are those of the last context."""
        plain = {name for name, value in cls() if isinstance(value, int)} - {"text_tokens"}
        return cls(
            **{name: sum(getattr(one, name) for one in parts) for name in plain},
            text_tokens=parts[-1].text_tokens,
            refused_by=dict(sum((Counter(one.refused_by) for one in parts), Counter())),
            seconds=Seconds(
                **{name: sum(getattr(one.seconds, name) for one in parts) for name in Seconds.model_fields}
            ),
        )


class QuestionRecord(_Record):
    """One question, what was shown and written for it, its answer and its cost."""

    question: Text
    status: Status
    answer: Text | None = None
    views: list[View] = Field(default_factory=list)
    """In the order shown, without those that an earlier question of the conversation added. The first of all is the
    original, which the model never saw at full size."""
    perception: PerceptionRecord | None = None
    """The first look, at the coarse view."""
    further_looks: list[PerceptionRecord] = Field(default_factory=list)
    """Looks at the conversation with the crops so far, in order; `heat` is the map of the view with the best region."""
    turns: list[Turn] = Field(default_factory=list)
    confidence: float | None = Field(default=None, exclude_if=lambda value: value is None)
    """Calibrated probability that the answer is right; None for a model without a calibration (`confidence`)."""
    usage: Usage = Field(default_factory=Usage)
    gold: list[Quad] = Field(default_factory=list)
    """Boxes known to hold the answer, in original pixels (a task's, or those given to the oracle policy)."""
    gold_images: list[Count] = Field(default_factory=list, exclude_if=operator.not_)
    """Number of the image of each box, counted from 0; empty where the question is about one image."""
    error: Text | None = None
    """The error that ended the episode, with status "error"."""
    waiting: PendingCall | None = Field(default=None, exclude_if=lambda value: value is None)
    """The call that a person has to decide on, with status "waiting"."""

    @property
    def answer_probability(self) -> float | None:
        """Probability of the least likely token of the answer, not calibrated; None without log-probabilities."""
        return next((turn.confidence for turn in reversed(self.turns) if turn.answer is not None), None)

    @property
    def looks(self) -> list[PerceptionRecord]:
        """All looks in order."""
        return [*([] if self.perception is None else [self.perception]), *self.further_looks]

    @property
    def token_layers(self) -> float:
        """Work of the decoder in all looks and turns."""
        looked = sum(one.token_layers for look in self.looks for one in look.every)
        return looked + sum(turn.token_layers for turn in self.turns)


class Trace(QuestionRecord):
    """The record of one episode. `Trace.load(folder)` reads what `save(folder, images)` wrote.

    Of a conversation it is the record of the first question, and `follow_ups` has the others.
    """

    version: str = VERSION
    id: Text = Field(default_factory=lambda: uuid.uuid4().hex[:12])
    model: Text = ""
    protocol: Text = ""
    policy: Text = ""
    config: dict[str, JsonValue] = Field(default_factory=dict)
    seed: int = 0
    environment: dict[str, Text] = Field(default_factory=dict)
    follow_ups: list[QuestionRecord] = Field(default_factory=list, exclude_if=operator.not_)
    """Later questions of a conversation, in order."""

    @property
    def questions(self) -> list[QuestionRecord]:
        """The record of each question, in order; of a run, the trace alone."""
        return [self, *self.follow_ups]

    @property
    def total(self) -> Usage:
        """The cost of all questions; `usage` is that of the first."""
        return Usage.total([one.usage for one in self.questions])

    @property
    def all_views(self) -> list[View]:
        """The views of all questions, in the order shown."""
        return [view for one in self.questions for view in one.views]

    @property
    def all_turns(self) -> list[Turn]:
        """The turns of all questions, in order."""
        return [turn for one in self.questions for turn in one.turns]

    def view(self, id: str) -> View | None:
        """Return the view of that id, or None."""
        return next((view for view in self.all_views if view.id == id), None)

    def save(self, folder: Path | str, images: Images) -> Path:
        """Write the record and its images into `folder` (created if missing); return the folder.

        `images` gives the image of a digest. Images already there are kept, so traces may share a folder.

        Raises:
            TraceError: The folder cannot be written.
        """
        folder = Path(folder)
        remove_parts(folder / "images")
        for digest in {view.digest for view in self.all_views}:
            target = _image_path(folder, digest)
            if not target.exists():
                with atomic_write(target, tidy=False, error=TraceError) as part:
                    images(digest).save(part, format="PNG", compress_level=1)
        with atomic_write(folder / _FILE, error=TraceError) as part:
            part.write_text(self.model_dump_json(indent=1) + "\n", encoding="utf-8")
        return folder

    @classmethod
    def load(cls, path: Path | str) -> Trace:
        """Read a saved trace: its folder, or the `trace.json` in it. Raises TraceError if it is missing or damaged."""
        path = Path(path)
        file = path / _FILE if path.is_dir() else path
        try:
            data = json.loads(file.read_bytes())
        except OSError as error:
            raise TraceError(
                f"No trace could be read - {file}: {error.strerror or error} - give the folder of a saved run."
            ) from error
        except (ValueError, RecursionError) as error:
            raise TraceError(
                f"A trace is not valid JSON - {file}: {error} - the file is damaged or no trace; record the run again."
            ) from error
        version = data.get("version") if isinstance(data, dict) else None
        written, ours = version_numbers(version), version_numbers(VERSION)
        if not written:
            raise TraceError(
                f'A file is not a trace - {file}: no "version" such as "{VERSION}" - give the folder of a saved run.'
            )
        if written[0] != ours[0]:
            raise TraceError(
                f"A trace has another format - {file}: version {version}, this qzoom-agent reads {ours[0]}.x"
                " - install the release that wrote it, or a newer one."
            )
        try:
            return cls.model_validate(data)
        except ValidationError as error:
            what = (
                f"it has version {version}, this qzoom-agent knows {VERSION} - install the release that wrote it"
                if written > ours
                else "the file was edited or is not a trace; record the run again"
            )
            raise TraceError(
                f"A trace does not have the expected fields - {file}: {first_fault(error)} "
                f"({error.error_count()} in all) - {what}."
            ) from error


def _image_path(folder: Path, digest: str) -> Path:
    # A digest names a file here: one from elsewhere must not be able to leave the folder.
    if not _DIGEST.fullmatch(digest):
        raise TraceError(f"An image has no legal digest - {digest[:80]!r} - ask for a digest of the trace's own views.")
    return folder / "images" / f"{digest}.png"


def saved_images(folder: Path | str) -> Images:
    """Return the images of a saved trace, by digest, read when asked for. Raises TraceError for a damaged one."""
    folder = Path(folder)

    def image(digest: str) -> PIL.Image.Image:
        path = _image_path(folder if folder.is_dir() else folder.parent, digest)
        # An evaluation keeps small pictures, see `qzoom_agent.evaluation.run_log`.
        path = path if path.exists() or not (small := path.with_suffix(".jpg")).exists() else small
        try:
            return load_image(path, max_pixels=2 * MAX_PIXELS)  # and no format that runs programs
        except ImageError as error:
            raise TraceError(
                f"An image of a trace could not be read - {path}: {error} - copy the whole folder of the trace."
            ) from error

    return image


def by_digest(views: Sequence[View], image: Callable[[str], PIL.Image.Image]) -> Images:
    """Turn a look-up by view id (`ViewStore.image`) into one by digest, for `save` and reports."""
    ids = {view.digest: view.id for view in views}
    return lambda digest: image(ids[digest])


@cache
def describe_environment() -> dict[str, str]:
    """Return the versions that a result may depend on, from package metadata, without heavy imports."""
    found = {"python": platform.python_version(), "platform": platform.platform(terse=True)}
    for package in ("qzoom-agent", "torch", "transformers", "langgraph", "pillow"):
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            found[package] = "missing"
    return found
