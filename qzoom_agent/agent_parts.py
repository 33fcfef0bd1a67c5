"""The parts of an agent: its configuration, and the objects that stand for parts of it, from its keyword arguments."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from copy import copy
from inspect import iscoroutinefunction
from operator import attrgetter
from pathlib import Path
from typing import Any, cast

from langchain_core.callbacks import BaseCallbackHandler

from qzoom_agent.approval import Decision
from qzoom_agent.async_events import Receiver
from qzoom_agent.config import AgentConfig
from qzoom_agent.episode_state import Context
from qzoom_agent.errors import BoxError, ConfigError
from qzoom_agent.extensions import reference, satisfying
from qzoom_agent.geometry import Box
from qzoom_agent.images import ImageSource
from qzoom_agent.models.interface import Backend, Perceiver
from qzoom_agent.models.perceiver import load_perceiver, name_of
from qzoom_agent.policy import CropPolicy
from qzoom_agent.protocols import PROTOCOLS, ZoomProtocol, get_protocol, native_form, with_tools
from qzoom_agent.protocols.interface import schema_of
from qzoom_agent.protocols.wording import OWN, Reworded, choose_prompt
from qzoom_agent.trace import PendingCall, describe_environment
from qzoom_agent.views import ViewStore
from qzoom_agent.zoom.own_tools import find_own_tools
from qzoom_agent.zoom.zoom import Zoom, ZoomConfig, find_tool

Images = ImageSource | Sequence[ImageSource]
"""One image, or a list or tuple of several."""
Boxes = Sequence[Box | Sequence[float]]
"""Boxes of the original: `Box` in any frame, or four numbers in pixels. A `Box` with `view` original2 is one of the
second image.
"""

_EXTENSIONS = {"protocol": "protocol", "tool": "tool", "rule": "review.rule"}
_OBJECTS = {**_EXTENSIONS, "prompt": "prompt", "perceiver": "perceiver", "own_tools": "own_tools", "approve": "approve"}
"""Key of the configuration of each part that an agent also takes as an object."""
_ASIDE = ("callbacks", "checkpointer", "receiver")
"""Objects that no key of the configuration names."""


class AgentParts:
    """A model, the configuration of its runs, and what was given as objects.

    Raises:
        ConfigError: This backend cannot run the configuration.
    """

    objects: dict[str, Any]
    """Parts that were given as objects, by key of the configuration; `callbacks` and `checkpointer`; and the `Receiver`
    of runs beside an event loop."""
    given: AgentConfig
    """The configuration as it was given."""
    config: AgentConfig
    """The same with the backend's presets filled in."""
    perceiver: Perceiver | None

    def __init__(self, backend: Backend, config: AgentConfig | None, overrides: dict[str, Any]) -> None:
        lacks = ", ".join(name for name in vars(Backend) if name[0] != "_" and not hasattr(backend, name))
        if lacks or isinstance(backend, type):
            raise ConfigError(
                f"Agent takes a loaded model (a `Backend`); got {backend!r:.80}"
                f"{f', which lacks {lacks}' if lacks else ', a class'}. Agent.from_pretrained('nano') "
                "loads one by its name, and Agent.from_server names one behind a server."
            )
        self.backend = backend
        changes, self.objects = split_objects(overrides)
        names: dict[str, Any] = {
            _EXTENSIONS[key]: reference(value) for key, value in self.objects.items() if key in _EXTENSIONS
        }
        handlers = self.objects.get("callbacks", [])
        if not isinstance(handlers, list | tuple) or not all(isinstance(one, BaseCallbackHandler) for one in handlers):
            raise ConfigError(f"callbacks is a list of callback handlers of LangChain; got {handlers!r:.80}.")
        self.perceiver = self.objects.get("perceiver")
        if self.perceiver is not None:
            self.perceiver = satisfying(self.perceiver, Perceiver, kind="perceiver")
            names["perceiver"] = name_of(self.perceiver)
        if "own_tools" in self.objects:
            self.objects["own_tools"] = list(find_own_tools(self.objects["own_tools"]).values())
            names["own_tools"] = tuple(tool.reference for tool in self.objects["own_tools"])
        if "approve" in self.objects:
            if not callable(self.objects["approve"]):
                raise ConfigError(
                    f"approve is a function that decides on a call, or True; got {self.objects['approve']!r:.80}."
                )
            names["approve"] = True
        self.given = changed(config, {**names, **changes})
        self._own = find_own_tools(self.objects.get("own_tools", self.given.own_tools or ()))
        if self.perceiver is None and self.given.perceiver is not None:
            self.perceiver = load_perceiver(self.given.perceiver)
        self._prompt = choose_prompt(self.objects.get("prompt", self.given.prompt), getattr(backend, "prompt", None))
        self.config = self.given.resolved(
            model=backend.name,
            protocol=backend.protocol,
            defaults=backend.defaults,
            perceives=self.perceives,
            settings=self._settings(),
            prompt=None if self._prompt is None else self._prompt.digest,
        )

    @property
    def perceives(self) -> bool:
        """True if something looks before the model answers: its own branches, or a perceiver."""
        return self.backend.perceives or self.perceiver is not None

    @property
    def waits(self) -> bool:
        """True if a run stops before each call until somebody decides on it."""
        return bool(self.config.approve) and "approve" not in self.objects

    @property
    def awaits(self) -> bool:
        """True if an asynchronous function decides on calls."""
        decide = self.objects.get("approve")
        return iscoroutinefunction(decide) or iscoroutinefunction(type(decide).__call__)

    def require_caller(self) -> None:
        """Raise an error if nobody can wait for a run.

        Raises:
            ConfigError: `approve` has to be awaited, which happens in the methods for event loops alone.
            BackendError: The task that did was cancelled.
        """
        if (receiver := self.objects.get("receiver")) is not None:
            receiver.require()
        if self.awaits:
            raise ConfigError(
                "approve is an asynchronous function, which only arun, astream and abatch await. Use one of these, or "
                "give approve a function that returns the decision."
            )

    def received_by(self, receiver: Receiver) -> AgentParts:
        """Return these parts for a thread beside an event loop, which awaits an asynchronous `approve`.

        The runs end at their next step once the receiver has left.
        """
        found, decide = copy(self), self.objects.get("approve")

        def approve(call: PendingCall) -> Decision:
            assert decide is not None
            return cast(Decision, receiver.awaited(decide(call)))

        found.objects = {**self.objects, "receiver": receiver, **({"approve": approve} if self.awaits else {})}
        return found

    def as_published(self, config: AgentConfig) -> bool:
        """Return whether a run asks the model in its own format and words, and nothing else has a part in it."""
        own = getattr(self.backend, "prompt", None)
        words = getattr(self._prompt, "digest", None) == getattr(own, "digest", None)
        return words and config.protocol == self.backend.protocol and not config.additions

    @property
    def environment(self) -> dict[str, str]:
        """Versions, and the device and number format with the reason for them, or the API of a server."""
        placement = str(getattr(self.backend, "placement", ""))
        return {**describe_environment(), **({"placement": placement} if placement else {})}

    def _settings(self) -> dict[str, Any]:
        """Return the recommended values of the configuration: the model's, and those of a perceiver for the look."""
        own: dict[str, Any] = dict(getattr(self.backend, "settings", None) or {})
        if self.perceiver is None:
            return own
        own = {key: value for key, value in own.items() if not key.startswith("perception.")}
        return {**own, **getattr(self.perceiver, "settings", {})}

    def context(self, config: AgentConfig, store: ViewStore) -> Context:
        """Return what an episode under a configuration runs with.

        Raises:
            ConfigError: This agent cannot run the configuration, or a part differs from those of the run.
        """
        views = config.budget.view_budget(self.backend.defaults)
        crops = ZoomConfig.of(views, **config.crop.model_dump())
        self._require_parts_of(config)
        if config.perception.sparse_crop is not None and (
            self.perceiver is not None or not getattr(self.backend, "takes_sparse_crops", False)
        ):
            raise ConfigError(
                f"Sparse crops (perception.sparse_crop) need a local model whose own branches look and whose images "
                f"may have any size, such as Qwen2.5-VL, Qwen3-VL or Qwen3.5. Leave them out for '{self.backend.name}'"
                f"{'' if self.perceiver is None else ' with a perceiver'}."
            )
        known = {reference(value): value for key, value in self.objects.items() if key in _EXTENSIONS}
        protocol = get_protocol(config.protocol or self.backend.protocol, known={**PROTOCOLS, **known})
        policy, tools = CropPolicy(config, views, perceives=self.perceives, known=known), tuple[str, ...]()
        offered = self._own if policy.offers_tools else {}
        protocol = with_tools(protocol, {name: tool.schema for name, tool in offered.items()})
        if config.tools == "native":
            if not getattr(self.backend, "api", ""):
                raise ConfigError(
                    f"Native tool calls (--tools native) are a server's, and '{self.backend.name}' runs without one. "
                    "Leave them out, or name a server with --server (in Python: Agent.from_server)."
                )
            protocol = native_form(protocol)
            tools = tuple(schema_of(protocol, store.originals).splitlines()) if policy.offers_tools else ()
        if self._prompt is not None:
            reworded = Reworded(protocol, self._prompt)
            if offered and not tools:
                reworded.require_schema(offered)
            protocol = cast(ZoomProtocol, reworded)
        return Context(
            backend=self.backend,
            protocol=protocol,
            policy=policy,
            tools=tools,
            own=offered,
            approve=self.objects.get("approve"),
            receiver=self.objects.get("receiver"),
            config=config,
            views=views,
            tool=find_tool(config.tool, crops, known=known),
            zoom=Zoom(crops),
            roi_zoom=Zoom(crops.for_proposals(config.perception)),
            store=store,
            perceiver=self.perceiver,
        )

    def _require_parts_of(self, config: AgentConfig) -> None:
        """Raise ConfigError if a run was begun with other parts than these."""
        own = None if self._prompt is None else self._prompt.digest
        if config.prompt not in ({own} if own else {None, OWN}):
            raise _changed("prompt file", "prompt", config.prompt, own)
        if config.perceiver != self.given.perceiver:
            raise _changed("perceiver", "perceiver", config.perceiver, self.given.perceiver)
        for key, argument in (("protocol", "protocol"), ("tool", "tool"), ("review.rule", "rule")):
            begun, now = map(attrgetter(key), (config, self.config))
            if begun != now and ":" in (begun or ""):  # code that only a file of saved steps names is not imported
                raise _changed(key, argument, begun, now, flag=f"set {key}=NAME")
        own_tools = [tool.reference for tool in self._own.values()]
        if list(config.own_tools or ()) != own_tools:
            raise _changed("tools", "tools", ", ".join(config.own_tools or ()), ", ".join(own_tools), flag="tool")


def _changed(part: str, argument: str, begun: str | None, now: str | None, *, flag: str = "") -> ConfigError:
    """Return the error of a run that is gone on with by an agent that has another part."""
    return ConfigError(
        f"This run was begun with the {part} {begun or 'none'}, and the agent has {now or 'none'}. Give it the same "
        f"(--{flag or argument}, in Python: {argument})."
    )


def changed(config: AgentConfig | None, changes: Mapping[str, Any]) -> AgentConfig:
    """Return a configuration, or the default one, with changes. Raises ConfigError for a wrong one."""
    if not isinstance(config, AgentConfig | None):
        raise ConfigError(
            f"config is an AgentConfig; got {config!r:.80}. AgentConfig.load(FILE) reads one, and "
            "AgentConfig().replace(policy='direct') makes one."
        )
    return (config or AgentConfig()).replace(**changes)


def split_objects(overrides: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Separate changes of the configuration from extensions given as objects."""
    overrides = {key: str(value) if isinstance(value, Path) else value for key, value in overrides.items()}
    if not isinstance(overrides.get("tools"), str | None):
        overrides["own_tools"] = overrides.pop("tools")
    objects = {key: overrides[key] for key in _OBJECTS if not isinstance(overrides.get(key), str | bool | None)}
    objects |= {key: given for key in _ASIDE if (given := overrides.pop(key, None)) is not None}
    return {_OBJECTS.get(key, key): value for key, value in overrides.items() if key not in objects}, objects


def gold_boxes(context: Context, boxes: Boxes | None) -> list[list[float]] | None:
    """Return gold boxes as a state has them. Raises ConfigError for a wrong one, or if the policy needs some."""
    if isinstance(boxes, Box) or not isinstance(boxes, Iterable | None):
        raise ConfigError(f"boxes is a list of boxes; got {boxes!r:.80}. Write [box] for a single one.")
    gold = None if boxes is None else [_gold(box, context.store) for box in boxes]
    context.policy.require(gold)
    if gold is None:
        return None
    numbers = [context.store.view(box.view).image for box in gold]
    return [[*box.as_list(), *([number] if number else [])] for box, number in zip(gold, numbers, strict=True)]


def _gold(box: Box | Sequence[float], store: ViewStore) -> Box:
    """Return a gold box in pixels of its original, inside it."""
    if not isinstance(box, Box):
        try:
            x1, y1, x2, y2 = box
            box = Box(x1, y1, x2, y2)
        except (TypeError, ValueError, BoxError):
            raise ConfigError(
                f"A box is four numbers x1, y1, x2, y2 in pixels of the original; got {box!r:.80}. Give a list of them."
            ) from None
    size = next((view.size for view in store.originals if view.id == box.view), None)
    if size is None or not box.finite:
        raise ConfigError(f"A gold box has finite numbers and refers to the original; got {box}.")
    pixel = box.to_pixel(size).ordered()
    if pixel.x1 >= size.width or pixel.x2 <= 0 or pixel.y1 >= size.height or pixel.y2 <= 0:
        raise ConfigError(f"The gold box {box} lies outside the image of {size.width}x{size.height} pixels.")
    return pixel.clamp(size)
