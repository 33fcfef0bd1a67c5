"""The agent's zoom tool as an environment of TRL: for plain `GRPOTrainer(environment_factory=...)`.

    trainer = GRPOTrainer(..., environment_factory=zoom_environment(backend, config=config), train_dataset=rows)

`reset` runs the node `perceive` of the agent's graph, a call its node `act`, and the result is a `Trace`. TRL renders
the conversation from its chat template and the signature of the one public method, so this is for protocols with
results in role "tool" (qwen3vl); `EpisodeTrainer` takes every protocol. TRL ends an episode by
`max_tool_calling_iterations`, without a forced last turn. Rows must not have columns `image` or `images`: images are
the environment's.
"""

import json
from collections.abc import Callable, Sequence
from typing import Any

from langgraph.runtime import Runtime

from qzoom_agent.agent import Agent
from qzoom_agent.config import AgentConfig
from qzoom_agent.data.samples import Sample
from qzoom_agent.episode_state import Context, State, advanced
from qzoom_agent.errors import BackendError, ConfigError
from qzoom_agent.graph import act, after_perceive, finish, perceive, to_trace
from qzoom_agent.messages import Message, text
from qzoom_agent.models.hf import HFBackend
from qzoom_agent.policy import LOOK_FIRST
from qzoom_agent.protocols.calls import ZOOM
from qzoom_agent.trace import Trace, Turn, describe_environment
from qzoom_agent.training.grpo.checks import fit_for_trl, require_plain_crops, require_tool_template
from qzoom_agent.views import ViewStore

Block = dict[str, Any]
"""Part of a message as chat templates read it: {"type": "text", "text"} or {"type": "image", "image"}."""


class ZoomEnv:
    """An environment of one rollout at a time; TRL makes as many as run side by side and uses them again."""

    def __init__(self, backend: HFBackend, *, config: AgentConfig, looker: HFBackend | None = None) -> None:
        """
        Args:
            backend: The model that is trained.
            config: Of the episodes.
            looker: Whose branches look, where the policy does not for the record alone; None: the backend's own.

        Raises:
            ConfigError: TRL cannot render the protocol, or would place inserted crops otherwise.
        """
        self.agent = Agent(looker or backend, config=config)
        require_plain_crops(self.agent.config, looker or backend)
        protocol = self.agent.protocol
        if {message["role"] for message in protocol.refusal("")} != {"tool"}:
            raise ConfigError(
                f"The protocol '{protocol.name}' shows results in a user turn, which TRL's tool loop cannot write. "
                "Set protocol to qwen3vl, or rollouts.by to 'shared' or 'generate', which take every protocol."
            )
        self._for_the_record = looker is not None and self.agent.config.policy not in LOOK_FIRST
        self.state: State | None = None
        self.context: Context | None = None

    @property
    def store(self) -> ViewStore:
        """The views of the rollout."""
        assert self.context is not None
        return self.context.store

    def reset(self, sample: Sample, **row: Any) -> list[Block]:
        """Begin a rollout; return the blocks that end its first user turn."""
        if self.context is not None:
            self.context.close()
        self.state, self.context = self.agent.begin(sample.image, sample.question, boxes=sample.boxes)
        self._run(perceive)
        while after_perceive(self.state) == "perceive":
            self._run(perceive)
        if self.state["error"] is not None:
            raise BackendError(self.state["error"])
        if self._for_the_record:
            seen = self.agent.look(sample.image, sample.question).record
            self.state["perception"] = seen.model_dump(mode="json")
        return self._blocks([message for message in self.state["messages"] if message["role"] == "user"])

    def image_zoom_in_tool(self, bbox_2d: list[float], label: str = "", img_idx: int = 0) -> list[Block]:
        """
        Look at a region of an image more closely: it is cut out and shown enlarged.

        Args:
            bbox_2d: The region as x1, y1, x2, y2 in thousandths (0 to 1000) of the image's width and height.
            label: What is expected in the region.
            img_idx: Which of the user's images to zoom into, counted from 0.

        Returns:
            The region as an image.
        """
        assert self.state is not None and self.context is not None
        arguments = {"bbox_2d": bbox_2d, "label": label, "img_idx": img_idx}
        call = f"<tool_call>\n{json.dumps({'name': ZOOM, 'arguments': arguments})}\n</tool_call>"
        parsed = self.context.protocol.parse(call, self.store.shown)
        turn = Turn(index=len(self.state["turns"]), text=call, problems=parsed.problems, repairs=parsed.repairs)
        said = {"messages": [text("assistant", call)], "turn": turn.model_dump(mode="json")}
        self.state = advanced(self.state, said)
        return self._blocks(self._run(act)["messages"])

    def _run(self, node: Callable[[State, Runtime[Context]], dict[str, Any]]) -> dict[str, Any]:
        """Run a node of the agent's graph, and return its update of the state."""
        assert self.state is not None and self.context is not None
        update = node(self.state, Runtime(context=self.context))
        self.state = advanced(self.state, update)
        return update

    def _blocks(self, messages: Sequence[Message]) -> list[Block]:
        assert self.context is not None
        see = self.context.policy.eyes(self.store)
        return [
            {"type": "text", "text": part["text"]}
            if part["type"] == "text"
            else {"type": "image", "image": see(part["view"])}
            for message in messages
            for part in message["content"]
        ]


def zoom_environment(
    backend: HFBackend, *, config: AgentConfig, looker: HFBackend | None = None
) -> Callable[[], ZoomEnv]:
    """Return an `environment_factory` for TRL, and make the backend's processor one that its tool loop can work with.

    Args:
        backend: Its model and processor are those of the trainer.
        config: Of the episodes; the protocol has to show results in role "tool" (qwen3vl).
        looker: See `ZoomEnv`.

    Raises:
        ConfigError: The model's vocabulary has no tokens for a chat template with tools.
    """
    fit_for_trl(backend.processor, factor=backend.defaults.factor)
    require_tool_template(backend.processor)
    return lambda: ZoomEnv(backend, config=config, looker=looker)


def finished(env: ZoomEnv, completion: Sequence[dict[str, Any]], *, cut: bool = False) -> Trace:
    """Return the trace of a rollout whose messages are `completion`, as TRL gives them to rewards.

    With `cut` a limit of tokens ended the last reply, which then is no answer.
    """
    assert env.state is not None and env.context is not None
    last, state = completion[-1] if completion else {}, env.state
    if last.get("tool_calls") or last.get("role") != "assistant":
        state = advanced(state, {"last": "budget"})  # TRL ended it with a call that nobody answered
    else:
        content = last.get("content") or ""
        parts = [{"type": "text", "text": content}] if isinstance(content, str) else content
        written = "".join(part.get("text", "") for part in parts if part.get("type") == "text")
        parsed = env.context.protocol.parse(written, env.store.shown)
        read = parsed.model_dump(include={"problems", "repairs"} if cut else {"answer", "problems", "repairs"})
        thought = last.get("reasoning_content") or parsed.thought
        turn = Turn(
            index=len(state["turns"]), text=written, thought=thought, finish="length" if cut else "stop", **read
        )
        state = advanced(state, {"turns": [turn.model_dump(mode="json")]})
    state = advanced(state, finish(state, Runtime(context=env.context)))
    return to_trace(state, protocol=env.context.protocol.name, environment=describe_environment())
