"""A protocol, a policy rule and a tool of one's own: as an object, as `module:name`, and as an entry point."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from importlib.metadata import EntryPoint, EntryPoints
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from qzoom_agent import extensions
from qzoom_agent.agent import Agent
from qzoom_agent.config import AgentConfig
from qzoom_agent.errors import ConfigError
from qzoom_agent.geometry import Box
from qzoom_agent.models.scripted import ScriptedBackend
from qzoom_agent.protocols.nano import Nano
from qzoom_agent.review import ReviewContext, ReviewDecision, hybrid_rule
from qzoom_agent.views import View, ViewStore
from qzoom_agent.zoom.zoom import Zoom, ZoomPlan, ZoomResult

IMAGE = Image.linear_gradient("L").resize((900, 600)).convert("RGB")
SCRIPT = ["<zoom>20 20 90 90</zoom>", "42"] * 10
MODULE = "my_doors"


@dataclasses.dataclass(frozen=True)
class Shouting(Nano):
    """The format of nano with questions in capitals."""

    name: str = "shouting"

    def opening(self, question: str, views: Sequence[View], *, tools: bool) -> Any:
        return super().opening(question.upper(), views, tools=tools)


SHOUTING = Shouting()


def never(plan: ZoomPlan, shown: Sequence[View], context: ReviewContext) -> ReviewDecision:
    """Refuse every crop."""
    assert plan.box is not None and shown
    return ReviewDecision("never", {"asked": float(plan.tokens)}, "There is nothing to see there.")


class TopLeft:
    """A tool that cuts the same corner, whatever is asked."""

    def __init__(self, config: Any = None) -> None:
        self.zoom = Zoom(config)

    def plan(self, store: ViewStore, box: Box) -> ZoomPlan:
        return dataclasses.replace(self.zoom.plan(store, Box(0, 0, 200, 160)), parent=box.view)

    def cut(self, store: ViewStore, plan: ZoomPlan, *, label: str = "") -> ZoomResult:
        return self.zoom.cut(store, plan, label=label)


OBJECTS: dict[str, Any] = {"protocol": SHOUTING, "rule": never, "tool": TopLeft}
NAMES = {"protocol": "SHOUTING", "rule": "never", "tool": "TopLeft"}
KEYS = {"protocol": "protocol", "rule": "review.rule", "tool": "tool"}
GROUPS = {"protocol": "protocol", "rule": "policy rule", "tool": "tool"}


def agent(**overrides: Any) -> Agent:
    return Agent(ScriptedBackend(SCRIPT), **overrides)


def works(one: Agent, door: str) -> bool:
    """Return whether an agent shows that it uses the extension of a door."""
    answer = one.run(IMAGE, "What?")
    (call,) = answer.trace.turns[0].calls
    if door == "protocol":
        return answer.trace.protocol == "shouting"
    if door == "rule":
        return (call.decision, call.code, call.reason) == ("refused", "never", "There is nothing to see there.")
    return call.served == (0, 0, 200, 160)


@pytest.fixture(params=["object", "module", "entry point"])
def given(
    request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Callable[[str], Any]]:
    (tmp_path / f"{MODULE}.py").write_text(f"import sys\nglobals().update(vars(sys.modules[{__name__!r}]))\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.delitem(__import__("sys").modules, MODULE, raising=False)
    points = [EntryPoint("mine", f"{MODULE}:{NAMES[door]}", extensions.GROUPS[GROUPS[door]]) for door in NAMES]
    monkeypatch.setattr(extensions, "entry_points", lambda group: EntryPoints(points).select(group=group))
    monkeypatch.syspath_prepend(tmp_path)
    forms = {
        "object": lambda door: OBJECTS[door],
        "module": lambda door: f"{MODULE}:{NAMES[door]}",
        "entry point": lambda door: "mine",
    }
    yield forms[request.param]


@pytest.mark.parametrize("door", NAMES)
def test_each_door_takes_each_form(given: Callable[[str], Any], door: str) -> None:
    made = agent(**{door: given(door)})
    assert works(made, door)
    assert works(made.replace(seed=3), door), "a change of something else keeps the extension"
    assert not works(made.replace(**{KEYS[door]: None}), door)
    assert works(agent().replace(**{door: given(door)}), door)


@pytest.mark.parametrize("door", NAMES)
def test_a_saved_configuration_brings_the_extension_back(
    given: Callable[[str], Any], door: str, tmp_path: Path
) -> None:
    answer = agent(**{door: given(door)}).run(IMAGE, "What?")
    answer.save(tmp_path / "run")
    config = AgentConfig.load(tmp_path / "run" / "config.yaml")
    assert works(agent(config=config), door)


def test_an_object_is_recorded_by_its_name() -> None:
    config = agent(**OBJECTS).config
    assert config.protocol == f"{__name__}:SHOUTING"
    assert config.review.rule == f"{__name__}:never"
    assert config.tool == f"{__name__}:TopLeft"


def test_a_partial_is_recorded_with_its_arguments_and_resumes(tmp_path: Path) -> None:
    def most(plan: ZoomPlan, shown: Sequence[View], context: ReviewContext, *, crops: int) -> ReviewDecision:
        return ReviewDecision("" if context.crops_read < crops else "enough", {}, "Enough.")

    none, one = (agent(rule=partial(most, crops=crops), state_dir=tmp_path) for crops in (0, 1))
    assert none.config.review.rule != one.config.review.rule
    assert not none.run(IMAGE, "What?", thread="a").boxes and one.run(IMAGE, "What?", thread="b").boxes
    assert one.resume("b").status == "answered"
    with pytest.raises(
        ConfigError, match=r"begun with the review.rule .*most\(crops=1\), and the agent has .*most\(crops=0\)"
    ):
        none.resume("b")


def test_unset_doors_leave_no_trace_in_a_configuration() -> None:
    data = agent().config.model_dump(mode="json")
    assert "tool" not in data and "rule" not in data["review"]


def test_a_tool_may_be_an_object_too() -> None:
    assert works(agent(tool=TopLeft()), "tool")


def test_a_run_resumes_with_the_objects_of_its_agent(tmp_path: Path) -> None:
    local = type("Local", (Shouting,), {"__module__": "nowhere"})()
    with agent(protocol=local, state_dir=tmp_path) as one:
        one.run(IMAGE, "What?", thread="a")
        assert one.resume("a").trace.protocol == "shouting"
    with agent(state_dir=tmp_path) as other, pytest.raises(ConfigError, match="begun with the protocol nowhere:Local"):
        other.resume("a")


def test_a_rule_may_build_on_those_of_hybrid() -> None:
    def mild(plan: ZoomPlan, shown: Sequence[View], context: ReviewContext) -> ReviewDecision:
        decision = hybrid_rule(plan, shown, context)
        return ReviewDecision("", decision.numbers) if decision.code == "native" else decision

    small = IMAGE.resize((112, 112))
    (call,) = agent(rule="hybrid").run(small, "What?").trace.turns[0].calls
    assert (call.decision, call.code) == ("refused", "native")
    (call,) = agent(rule=mild).run(small, "What?").trace.turns[0].calls
    assert call.decision != "refused" and call.numbers["covered"] == 1


@pytest.mark.parametrize("door", NAMES)
def test_an_unknown_name_tells_the_door(door: str) -> None:
    kind = GROUPS[door]
    with pytest.raises(ConfigError, match=f"There is no {kind} 'nothing'. .* 'module:name'.*{extensions.GROUPS[kind]}"):
        agent(**{door: "nothing"})


@pytest.mark.parametrize(
    ("door", "says"),
    [("protocol", "lacks name, frame, stop"), ("rule", "lacks __call__"), ("tool", "lacks plan, cut")],
)
def test_an_object_that_does_not_fit_tells_what_it_lacks(door: str, says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        agent(**{door: object()})


def test_an_extension_that_goes_wrong_is_named() -> None:
    class Needy(TopLeft):
        def __init__(self) -> None:
            raise OSError("no camera")

    with pytest.raises(ConfigError, match=r"The tool '.*Needy' cannot be made: .*ZoomConfig"):
        agent(tool=Needy)
    with pytest.raises(ConfigError, match=r"policy rule '.*<lambda>' returned None\. Return a ReviewDecision"):
        agent(rule=lambda plan, shown, context: None).run(IMAGE, "What?")
    with pytest.raises(ConfigError, match=r"policy rule '.*<lambda>' failed with .*division by zero.*test_doors\.py"):
        agent(rule=lambda plan, shown, context: 1 / 0).run(IMAGE, "What?")
    with pytest.raises(ConfigError, match=r"returned {'heat': 'cold'} among its numbers"):
        agent(rule=lambda plan, shown, context: ReviewDecision("", {"heat": "cold", "n": 1})).run(IMAGE, "What?")  # type: ignore[dict-item]


@pytest.mark.parametrize("method", ["plan", "cut"])
def test_a_tool_that_goes_wrong_is_named(method: str) -> None:
    def broken(*given: Any, **named: Any) -> Any:
        return {}["camera"]

    cases = (
        (broken, r"failed with KeyError.*test_doors\.py"),
        (lambda *_, **__: None, r"returned None\. Return a Zoom"),
    )
    for member, says in cases:
        tool = type("Mine", (TopLeft,), {method: member})
        with pytest.raises(ConfigError, match=rf"The tool '.*Mine' {says}"):
            agent(tool=tool).run(IMAGE, "What?")


@pytest.mark.parametrize(
    ("parse", "says"),
    [
        (lambda *_: {}["answer"], r"failed with KeyError.*test_doors\.py"),
        (lambda *_: None, r"returned None from parse\. Return a Parsed"),
    ],
)
def test_a_protocol_whose_parse_goes_wrong_is_named(parse: Any, says: str) -> None:
    mine = type("Mine", (Nano,), {"parse": parse})()
    trace = Agent(ScriptedBackend(["red"]), protocol=mine, policy="explicit").run(IMAGE, "What?").trace
    assert trace.status == "error" and re.search(rf"protocol '.*Mine' {says}", trace.error or "")
