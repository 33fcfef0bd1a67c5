"""The configuration of an episode, shared by YAML, the command line, traces and `Agent`.

Every section is a frozen pydantic model with a docstring under each field. A wrong key or value raises `ConfigError`
with the dotted key, the value given and the keys known.

A budget is a number of visual tokens, never a resolution. A key that was not given, or is `None`, is the model's to
say: `AgentConfig.resolved` fills in its preset's value, else the default written here. Paths of a machine are arguments
of `Agent`, not configuration, so that a saved configuration repeats a run elsewhere.
"""

from __future__ import annotations

import difflib
from argparse import ArgumentTypeError
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, Self

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator
from pydantic_core import ErrorDetails

from qzoom_agent.errors import ConfigError
from qzoom_agent.files import read_text, read_yaml, write_text
from qzoom_agent.geometry import fit_tokens, tokens
from qzoom_agent.images import MAX_PIXELS

MAX_SEED = 2**62
"""Seeds of all turns stay in the signed 64 bits that torch and servers take."""
Blur = Literal["fixed", "grid", "none"]
Sides = tuple[Annotated[float, Field(gt=0, le=1)], Annotated[float, Field(gt=0, le=1)]]
PolicyName = Literal[
    "direct", "explicit", "implicit", "hybrid", "locate", "always", "random", "oracle", "blind", "masked"
]


def _explain(error: ErrorDetails, section: type[Config]) -> str:
    """Return one pydantic error as a line: the dotted key, the value given, the keys known."""
    key = section.prefix + ".".join(str(part) for part in error["loc"])
    if error["type"] == "extra_forbidden":
        known = sorted(section.model_fields)
        close = difflib.get_close_matches(str(error["loc"][-1]), known, n=1)
        hint = f" Did you mean '{section.prefix}{close[0]}'?" if close else ""
        return f"Unknown key '{key}'.{hint} Known keys: {', '.join(section.prefix + name for name in known)}."
    if not error["loc"]:
        names = ", ".join(section.prefix + name for name in sorted(section.model_fields))
        return f"'{section.prefix.rstrip('.')}' is a section with the keys {names}; got {error['input']!r}."
    field = section.model_fields.get(str(error["loc"][0]))
    secret = field is not None and not field.repr
    given = f"a value of type {type(error['input']).__name__}" if secret else f"{error['input']!r:.200}"
    return f"Bad value for '{key}': {error['msg']}; got {given}."


class Config(BaseModel):
    """A section of the configuration: frozen, no unknown keys, `ConfigError` instead of a validation report."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True, allow_inf_nan=False)

    prefix: ClassVar[str] = ""
    """Prefix of this section's keys in a dotted name, for messages."""

    @model_validator(mode="wrap")
    @classmethod
    def _as_config_error(cls, data: Any, handler: Any) -> Self:
        try:
            return handler(data)  # type: ignore[no-any-return]
        except ValidationError as error:
            raise ConfigError(" ".join(_explain(one, cls) for one in error.errors())) from None


def _is_none(value: object) -> bool:
    # Keys that came later stay out of a saved configuration while unset: its hash names the rows of evaluations.
    return value is None


class ViewBudget(Config):
    """The budget of each view in visual tokens, and the size of a token: a backend's preset, or the resolved budget."""

    factor: int = Field(gt=0)
    """Side in pixels of the square of a shown view that becomes one visual token."""
    coarse_min_tokens: int = Field(gt=0)
    """A coarse view of fewer tokens is enlarged to this many."""
    coarse_max_tokens: int = Field(gt=0)
    """A coarse view of more tokens is shrunk to this many."""
    crop_min_tokens: int = Field(gt=0)
    """A crop of fewer tokens is magnified to this many, which helps even without more pixels."""
    crop_max_tokens: int = Field(gt=0)
    """A crop of more tokens is shrunk to this many."""
    crop_min_side: int = Field(default=28, ge=1)
    """Shortest side of a crop in original pixels; models do not read crops magnified further."""
    roi_tokens: tuple[int, int] | None = None
    """Fewest and most tokens of a crop that the branches propose. None: as any crop."""
    coarse_share: float | None = Field(default=None, gt=0, lt=1)
    """Most of the coarse view's sides, as a share of those that the whole image has as a crop: for models whose tool
    only makes sense after a smaller first view. None: the budget alone."""

    def coarse_limits(self, size: tuple[int, int]) -> tuple[int, int]:
        """Return the least and most tokens of the coarse view of an image of `size` pixels."""
        low, high = self.coarse_min_tokens, self.coarse_max_tokens
        if self.coarse_share is not None:
            least, most = self.crop_min_tokens, self.crop_max_tokens
            whole = tokens(fit_tokens(size, factor=self.factor, min_tokens=least, max_tokens=most), self.factor)
            high = min(high, max(1, int(whole * self.coarse_share**2)))
        return min(low, high), high

    @model_validator(mode="after")
    def _ordered(self) -> Self:
        for view, low, high, most in (
            ("coarse", self.coarse_min_tokens, self.coarse_max_tokens, "coarse_tokens"),
            ("crop", self.crop_min_tokens, self.crop_max_tokens, "crop_max_tokens"),
        ):
            if low > high:
                raise ConfigError(
                    f"The {view} budget is empty: at least {low} tokens but at most {high}. "
                    f"Raise budget.{most} or lower budget.{view}_min_tokens; null leaves one to the model."
                )
        return self


class _ModelDefaults(Config):
    """A section whose keys a model's preset may fill in: null leaves one to it."""

    @model_validator(mode="before")
    @classmethod
    def _null_is_not_given(cls, data: Any) -> Any:
        if not isinstance(data, Mapping):
            return data
        return {key: value for key, value in data.items() if value is not None or key not in cls.model_fields}


class BudgetConfig(_ModelDefaults):
    """The limits of an episode, and the budget of each view."""

    prefix: ClassVar[str] = "budget."

    max_turns: int = Field(default=6, ge=1)
    """Assistant turns, the forced last one not counted."""
    max_views: int = Field(default=6, ge=1)
    """Views shown to the model, the coarse view counted."""
    max_visual_tokens: int | None = Field(default=None, ge=1)
    """Visual tokens of all views together; a crop that would pass it is refused, never encoded. None: no limit."""
    max_seconds: float | None = Field(default=None, gt=0)
    """Wall-clock seconds, checked before each turn (a turn under way is not interrupted). None: no limit."""
    max_failed_calls: int = Field(default=3, ge=1)
    """Turns in a row without a served call, after which the model has to answer."""
    coarse_tokens: int | None = Field(default=None, ge=1)
    """Most visual tokens of the coarse view. None: the model's own, or `max_visual_tokens` where that is less."""
    coarse_min_tokens: int | None = Field(default=None, ge=1)
    """Least tokens of the coarse view. None: the backend's preset, or `coarse_tokens` where that is less."""
    crop_min_tokens: int | None = Field(default=None, ge=1)
    """Least tokens of a crop. None: the backend's preset, or `crop_max_tokens` where that is less."""
    crop_max_tokens: int | None = Field(default=None, ge=1)
    """Most tokens of a crop. None: the backend's preset, or `crop_min_tokens` where that is more."""

    def view_budget(self, defaults: ViewBudget) -> ViewBudget:
        """Return the budget of each view: the limits given here, and the preset `defaults` for the rest.

        A preset gives way: a limit on one side moves the other with it, and a coarse view shrinks to fit
        `max_visual_tokens`.

        Raises:
            ConfigError: Given limits contradict each other.
        """
        limit = self.max_visual_tokens
        preset = defaults.coarse_max_tokens if limit is None else min(defaults.coarse_max_tokens, limit)
        coarse_max = self.coarse_tokens or max(preset, self.coarse_min_tokens or 0)
        if limit is not None and coarse_max > limit:
            raise ConfigError(
                f"The coarse view alone may cost {coarse_max} visual tokens, but budget.max_visual_tokens is {limit}. "
                "Raise it, or lower budget.coarse_tokens and budget.coarse_min_tokens; null leaves one to the model."
            )
        crop_max = self.crop_max_tokens or max(defaults.crop_max_tokens, self.crop_min_tokens or 0)
        return ViewBudget(
            factor=defaults.factor,
            coarse_min_tokens=self.coarse_min_tokens or min(defaults.coarse_min_tokens, coarse_max),
            coarse_max_tokens=coarse_max,
            crop_min_tokens=self.crop_min_tokens or min(defaults.crop_min_tokens, crop_max),
            crop_max_tokens=crop_max,
            crop_min_side=defaults.crop_min_side,
            coarse_share=defaults.coarse_share,
            roi_tokens=None if self.crop_min_tokens or self.crop_max_tokens else defaults.roi_tokens,
        )


class GenerationConfig(_ModelDefaults):
    """The sampling of a turn's text. Not given: the model's preset, its generation_config, then these defaults."""

    prefix: ClassVar[str] = "generation."

    max_new_tokens: int = Field(default=256, ge=1)
    """Text tokens of one turn."""
    temperature: float = Field(default=0.0, ge=0)
    """0 takes the likeliest token."""
    top_p: float = Field(default=1.0, gt=0, le=1)
    """Share of the probability mass that sampling draws from; without effect at temperature 0."""
    top_k: int | None = Field(default=None, ge=1, exclude_if=_is_none)
    """Number of likeliest tokens that sampling draws from. None: all."""
    presence_penalty: float | None = Field(default=None, ge=-2, le=2, exclude_if=_is_none)
    """Amount by which the logit of each token that the turn already has is lowered. None: 0."""
    logprobs: bool | None = Field(default=None, exclude_if=_is_none)
    """Ask for the log-probability of each token, which confidence is computed from. None: of local models."""


class CropConfig(Config):
    """The shape of a crop. Other boxes are not refused: they are corrected and the model is told."""

    prefix: ClassVar[str] = "crop."

    min_side: int | None = Field(default=None, ge=1)
    """Shortest side of a crop in original pixels; a smaller box grows around its centre. None: the backend's preset."""
    max_aspect: float = Field(default=20.0, ge=1)
    """Longest side over shortest side; a thinner box is widened."""


class PerceptionConfig(_ModelDefaults):
    """The rules of the coarse pass for policies with branches. Defaults are the published rules."""

    prefix: ClassVar[str] = "perception."

    gate: Literal["learned", "statistics", "answer", "off"] = "learned"
    """The decision to zoom: by the gate branch, by the map alone (`peak_to_mean`), by the log-probabilities of a first
    answer (`confidence`), or always."""
    confidence: float | None = Field(default=None, gt=0, le=1, exclude_if=_is_none)
    """Gate `answer`: an answer from the coarse view is kept if each of its tokens is more probable than this. None:
    0.9."""
    gate_threshold: float | None = Field(default=None, ge=0, le=1)
    """Probability from which the gate asks for more detail. None: the branches' own."""
    threshold: float | None = Field(default=None, ge=0, le=1)
    """Probability above which a cell of the blurred map is foreground. None: the branches' rule."""
    peak_share: float | None = Field(default=None, gt=0, lt=1)
    """Foreground from this share of the map's peak, instead of an absolute `threshold`. None: the branches' rule."""
    peak_to_mean: float | None = Field(default=None, ge=1)
    """A map whose peak is less than this many times its mean has no foreground."""
    blur: Blur | None = None
    """Blur of the map: three cells wide ("fixed"), wider on grids of more than 512 cells ("grid"), or "none". None: as
    the branches say."""
    box: Sides | None = None
    """Sides of a proposed box around the centre of the heat, as shares of the map's width and height, instead of a
    tight box around the foreground: on a map of few cells it is finer than a cell. None: as the branches say.
    Close-ups keep the sides of their branches."""
    max_regions: int = Field(default=1, ge=1, le=16)
    """1: one box around all foreground. More: a box for each connected part, best first, up to this many. Not given: as
    the branches say, else 1."""
    max_looks: int | None = Field(default=None, ge=1, exclude_if=_is_none)
    """Most looks of an episode; 1 for branches that can look again to look once. None: as many as the budgets allow,
    `budget.max_turns` among them."""
    margin: float | None = Field(default=None, ge=0, le=10)
    """Distance by which each edge of a proposed box moves outwards, as a share of its longer side. None: as the
    branches say."""
    roi_min_tokens: int | None = Field(default=None, ge=1)
    """Least tokens of a proposed crop. None: the backend's preset, or as for any crop."""
    roi_max_tokens: int | None = Field(default=None, ge=1)
    """Most tokens of a proposed crop. None: the backend's preset, or as for any crop."""
    sparse_crop: float | None = Field(default=None, gt=1, le=8, exclude_if=_is_none)
    """Encode a proposed crop up to this many times larger a side and show the model only its tokens on the map's
    foreground and beside it, no more than the whole crop would have. None: whole crops."""
    lean: bool = False
    """Compute the last layer of a prefill for its last token alone: a layer cheaper, the same up to rounding."""
    positions: Literal["plain", "aligned"] | None = None
    """Positions of a proposed crop: of an image of its own, or those of its place. None: as the branches say."""
    prompt: Literal["opening", "plain"] = "plain"
    """Messages of a look: "plain", without the offer of tools, as branches are trained, or "opening", those that the
    model then answers, so that nothing is computed twice. They differ where a policy offers tools."""

    @field_validator("gate", mode="before")
    @classmethod
    def _yaml_off(cls, value: Any) -> Any:
        return "off" if value is False else value  # YAML reads an off without quotes as false

    @model_validator(mode="after")
    def _has_a_rule(self) -> Self:
        if self.gate == "statistics" and self.peak_to_mean is None:
            raise ConfigError(
                "perception.gate 'statistics' needs perception.peak_to_mean, the rule it decides by; 3 is usual."
            )
        if self.roi_min_tokens and self.roi_max_tokens and self.roi_min_tokens > self.roi_max_tokens:
            raise ConfigError(
                f"perception.roi_min_tokens is {self.roi_min_tokens} but roi_max_tokens only {self.roi_max_tokens}."
            )
        return self


class ReviewConfig(Config):
    """The rules by which policy `hybrid` refuses a zoom call or serves another box: see `qzoom_agent.review`."""

    prefix: ClassVar[str] = "review."

    insert: bool = True
    """Show the proposed crops unasked, as `implicit` does. False: the look only judges what the model asks for."""
    covered: float = Field(default=0.9, gt=0, le=1)
    """Share of a box that a shown view has to hold for the box to count as shown."""
    density: float | None = Field(default=0.9, gt=0)
    """A shown view is in as much detail as a crop from this share of the crop's shown pixels per pixel of the original.
    None: never refuse for it."""
    native: float | None = Field(default=0.95, gt=0)
    """Shown pixels per pixel of the original (along a side) from which a view holds all there is, so that a crop of it
    would only be larger. None: a larger crop is worth its tokens."""
    gate: float | None = Field(default=1.0, gt=0)
    """Refuse a crop where the gate's score is below this share of its threshold. None: never."""
    cold: float | None = Field(default=0.05, ge=0, le=1)
    """Share of the map's heat below which a box holds next to nothing. None: the map never refuses."""
    hot: float = Field(default=0.5, ge=0, le=1)
    """Share of the map's heat that a proposed region has to hold for a cold box to be turned down in its favour."""
    elsewhere: Literal["offer", "snap"] = "offer"
    """Treatment of a cold box: refuse it and name the hot region, or serve the hot region instead."""
    snap: float | None = Field(default=0.5, ge=0, le=1)
    """A box that shares at least this share of the smaller of the two with a proposed region, but cuts it, gets the
    region. None: never, nor for a box beside it."""
    snap_gap: float = Field(default=0.25, ge=0)
    """The same for a box that misses the region by at most this share of the region's longer side."""
    snap_keep: float = Field(default=0.8, gt=0, le=1)
    """A box that holds this share of the region's heat does not cut it; of a region of fixed sides, its middle."""
    insist: int = Field(default=1, ge=0)
    """Refusals for an opinion of the branches, in turns, after which the model's calls are served; where the gate
    refuses, for each crop anew. 0: their opinions never count."""
    rule: str | None = Field(default=None, exclude_if=_is_none)
    """Rule that reviews the model's zoom calls under any policy that offers tools: `hybrid`, `module:name` or an entry
    point of the group qzoom_agent.policy_rules. None: `hybrid` under policy `hybrid`, else none."""


def read_setting(text: str) -> tuple[str, Any]:
    """Return key and value of a setting from a command line: KEY=VALUE, the value in YAML.

    Raises:
        ConfigError: The text is not of that form.
    """
    key, equals, value = text.partition("=")
    if not equals or not key.strip():
        raise ConfigError(f"--set takes KEY=VALUE; got {text!r}. Write for example --set budget.max_turns=3")
    try:
        return key.strip(), read_yaml(value)
    except ValueError:
        raise ConfigError(f"The value in --set {text} cannot be read. Put quotes around it.") from None


def positive_int(text: str) -> int:
    """Return a count of 1 or more; the `type` of a command line flag."""
    if not text.strip().isdecimal() or int(text) < 1:
        raise ArgumentTypeError(f"a whole number from 1 on is needed; got {text!r}")
    return int(text)


def whole_number(text: str) -> int:
    """Return a number of 0 or more; the `type` of a command line flag."""
    if not text.strip().isdecimal():
        raise ArgumentTypeError(f"a whole number from 0 on is needed; got {text!r}")
    return int(text)


class AgentConfig(Config):
    """The whole configuration of an episode, saved with every trace."""

    model: str = "nano"
    """Preset name, folder or hub id. Where `Agent` is given a backend, its name."""
    policy: PolicyName | None = None
    """Rule that decides which crops the model sees. See `qzoom_agent.policy`. None: `implicit` with branches or a
    perceiver (`hybrid` with own tools), else `explicit`."""
    protocol: str | None = None
    """Format of the model's zoom calls: a name, `module:name` or an entry point of the group qzoom_agent.protocols.
    None: the model's own."""
    tools: Literal["text", "native"] | None = Field(default=None, exclude_if=_is_none)
    """Form of the model's zoom calls: in its text, or native calls of a server's API, which is given the tool's schema.
    None: native where a hosted model's preset says so, else text."""
    tool: str | None = Field(default=None, exclude_if=_is_none)
    """Tool that serves the model's zoom calls: `module:name` or an entry point of the group qzoom_agent.tools. None:
    `zoom`."""
    own_tools: tuple[str, ...] | None = Field(default=None, exclude_if=_is_none)
    """Tools that the model may call beside zoom: `rotate`, `enhance`, `read_text`, `module:name`, or an entry point of
    the group qzoom_agent.own_tools. Policies that offer no tools (such as `direct`) offer none of these."""
    approve: bool | None = Field(default=None, exclude_if=_is_none)
    """A person decides on each call before it is run, see `qzoom_agent.approval`."""
    prompt: str | None = Field(default=None, exclude_if=_is_none)
    """YAML or JSON file with the model's own words for any part of the conversation. In a saved run the digest of its
    texts, as "sha256:..."; "protocol": the protocol's words. See `qzoom_agent.protocols.wording`. None: the file
    qzoom_prompt.yaml in the model's folder, else the protocol's words."""
    system: str | None = Field(default=None, min_length=1, exclude_if=_is_none)
    """System prompt of the model that answers, put before what the format itself says there, such as its tools. A look
    does not read it, unless `perception.prompt` is "opening"."""
    perceiver: str | None = Field(default=None, exclude_if=_is_none)
    """Local model with branches that looks for the model that answers: a preset, a folder, a hub id or `module:name`.
    None: the model's own branches, if it has any."""
    budget: BudgetConfig = BudgetConfig()
    """Limits of an episode, and the budget of each view."""
    generation: GenerationConfig = GenerationConfig()
    """Sampling of a turn's text."""
    crop: CropConfig = CropConfig()
    """Shape of a crop."""
    perception: PerceptionConfig = PerceptionConfig()
    """Rules of the coarse pass of a model with branches."""
    review: ReviewConfig = ReviewConfig()
    """Rules by which zoom calls are refused or moved: see `qzoom_agent.review`."""
    oracle_margin: float = Field(default=0.35, ge=0, le=10)
    """Policy `oracle`: distance by which each edge of a gold box moves outwards, as a share of its longer side."""
    max_pixels: int = Field(default=MAX_PIXELS, ge=1)
    """Most pixels (width times height) of an image, checked before it is decoded."""
    seed: int = Field(default=0, ge=0, le=MAX_SEED)
    """Seed of the episode: sampling of turn i uses seed + i, and policy `random` draws its box from it."""

    def replace(self, **changes: Any) -> AgentConfig:
        """Return a changed copy. Keys may be dotted (`"budget.max_turns"`); a mapping merges into its section."""
        # Only what was given is copied, so that the rest stays the model's to say.
        data = self.model_dump(exclude_unset=True)
        for name, section in self:
            if isinstance(section, Config):
                data.setdefault(name, {})
        for key, value in changes.items():
            _put(data, key, value)
        return AgentConfig(**data)

    def with_defaults(self, defaults: Mapping[str, Any]) -> AgentConfig:
        """Return a copy with the values of these dotted keys where none was given (None is none).

        Sampling is one setting: with a temperature of the user's, none of its keys is filled in.
        """
        given = self.model_dump(exclude_unset=True, exclude_none=True)
        sampled = "temperature" in given.get("generation", {})

        def lacks(key: str) -> bool:
            section, _, name = key.partition(".")
            if sampled and section == "generation" and name != "max_new_tokens":
                return False
            return section not in given if not name else name not in given.get(section, {})

        return self.replace(**{key: value for key, value in defaults.items() if lacks(key)})

    @property
    def additions(self) -> dict[str, str]:
        """Settings given here that have a part in the answers beside the model itself, by dotted key."""
        found = {
            "system": self.system,
            "tool": self.tool,
            "own_tools": ", ".join(self.own_tools or ()),
            "perceiver": self.perceiver,
            "review.rule": self.review.rule,
        }
        return {key: value for key, value in found.items() if value}

    def policy_for(self, *, perceives: bool) -> PolicyName:
        """Return the policy given, or the default of a model with branches (`perceives`) or without."""
        looks: PolicyName = "hybrid" if self.own_tools else "implicit"
        return self.policy or (looks if perceives else "explicit")

    def resolved(
        self,
        *,
        model: str,
        protocol: str,
        defaults: ViewBudget,
        perceives: bool = False,
        settings: Mapping[str, Any] | None = None,
        prompt: str | None = None,
    ) -> AgentConfig:
        """Return the configuration with the backend's presets filled in, so that it repeats a run if they change.

        Args:
            model: Name of the backend.
            protocol: Its format of zoom calls.
            defaults: Its budget of each view.
            perceives: The model has branches, or a perceiver looks for it.
            settings: Its other recommended values, by dotted key.
            prompt: Digest of the prompt file that it is asked with; None: the protocol's words.
        """
        self = self.with_defaults(settings or {})
        views = self.budget.view_budget(defaults)
        low, high = self.perception.roi_min_tokens, self.perception.roi_max_tokens
        if views.roi_tokens is not None:  # a side that is not given is the preset's, as far as the other allows
            least, most = views.roi_tokens
            low = low or (least if high is None else min(least, high))
            high = high or max(most, low)
        filled = self.replace(
            model=model,
            policy=self.policy_for(perceives=perceives),
            protocol=self.protocol or protocol,
            prompt=prompt or self.prompt,
            crop={"min_side": self.crop.min_side or views.crop_min_side},
            perception={"roi_min_tokens": low, "roi_max_tokens": high},
            budget={
                "coarse_tokens": views.coarse_max_tokens,
                "coarse_min_tokens": views.coarse_min_tokens,
                "crop_min_tokens": views.crop_min_tokens,
                "crop_max_tokens": views.crop_max_tokens,
            },
        )
        return AgentConfig(**filled.model_dump())  # every key counts as given now

    def to_yaml(self) -> str:
        """Return the configuration as YAML, every key written out."""
        return yaml.safe_dump(self.model_dump(mode="json"), sort_keys=False)

    @classmethod
    def from_yaml(cls, text: str) -> AgentConfig:
        """Return the configuration in a YAML text; missing keys keep their defaults."""
        try:
            data = read_yaml(text)
        except ValueError as error:
            raise ConfigError(f"The configuration is not YAML: {error}") from None
        if not isinstance(data, Mapping | None):
            raise ConfigError(
                f"A configuration is a mapping of keys to values; got a {type(data).__name__}: {data!r:.80}. "
                "Write for example `policy: explicit`."
            )
        return cls().replace(**{str(key): value for key, value in (data or {}).items()})

    def save(self, path: str | Path) -> None:
        """Write `to_yaml()` to `path`. Raises ConfigError if that is impossible."""
        write_text(path, self.to_yaml())

    @classmethod
    def load(cls, path: str | Path) -> AgentConfig:
        """Return the configuration in a YAML file. Raises ConfigError."""
        text = read_text(path, "Give the path of a YAML file.")
        try:
            return cls.from_yaml(text)
        except ConfigError as error:
            raise ConfigError(f"{path}: {error}") from None


def _put(data: dict[str, Any], key: str, value: Any) -> None:
    """Set one dotted key; mappings merge. An unknown last key is left for validation to name."""
    section, _, rest = key.partition(".")
    inside = data.get(section)
    if rest:
        if not isinstance(inside, dict):
            known = ", ".join(sorted(AgentConfig.model_fields))
            raise ConfigError(f"There is no section '{section}' (in '{key}'). Known keys: {known}.")
        _put(inside, rest, value)
    elif isinstance(inside, dict) and isinstance(value, Mapping):
        for name, inner in value.items():
            _put(inside, str(name), inner)
    else:
        data[section] = value
