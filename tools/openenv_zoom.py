"""The zoom task as an environment of OpenEnv: reset, step, and the evaluation's score as reward.

    pip install openenv "qzoom-agent[eval]"
    python tools/openenv_zoom.py --task needle-scene --n 100 --port 8000      # page at /web
    python tools/openenv_zoom.py --client http://localhost:8000 --index 3     # show a question

An action is a zoom call or the answer, which ends the episode. Observations hold content blocks as MCP has them: texts,
and images as base64. `RemoteZoomEnv` is the client for TRL's `environment_factory`.
"""

import argparse
import base64
import io
import os
from typing import Any

from openenv.core.client_types import StepResult
from openenv.core.env_client import EnvClient
from openenv.core.env_server.http_server import create_app
from openenv.core.env_server.interfaces import Environment
from openenv.core.env_server.types import Action, EnvironmentMetadata, Observation, State
from PIL import Image
from pydantic import Field

from qzoom_agent.integrations.zoom_task import Block, ZoomQuestions
from qzoom_agent.zoom.image_zoom import ImageZoom, png


class ZoomAction(Action):
    """A zoom call, or the answer."""

    bbox_2d: list[float] | None = Field(default=None, description="region in thousandths of the view's sides")
    view: str | None = Field(default=None, description="view that the numbers refer to; none: the whole image")
    label: str = ""
    answer: str | None = Field(default=None, description="the answer, which ends the episode")


class ZoomObservation(Observation):
    """The text and images that the model is shown."""

    content: list[dict[str, Any]] = Field(default_factory=list, description="content blocks of MCP")


class ZoomState(State):
    """The question of the episode, and the boxes seen so far."""

    index: int | None = None
    boxes: list[list[float]] = Field(default_factory=list)


def image_block(image: Image.Image) -> dict[str, Any]:
    """Return an image as a content block of MCP."""
    return {"type": "image", "data": base64.b64encode(png(image)).decode("ascii"), "mimeType": "image/png"}


def text_block(text: str) -> dict[str, Any]:
    """Return a text as a content block of MCP."""
    return {"type": "text", "text": text}


class ZoomEnvironment(Environment[ZoomAction, ZoomObservation, ZoomState]):
    """One question an episode, chosen by `index`, or by the seed."""

    SUPPORTS_CONCURRENT_SESSIONS = True

    def __init__(self, questions: ZoomQuestions) -> None:
        super().__init__()
        self._questions = questions
        self._zoom: ImageZoom | None = None
        self._state = ZoomState()

    def reset(
        self, seed: int | None = None, episode_id: str | None = None, *, index: int | None = None, **kwargs: Any
    ) -> ZoomObservation:
        """Begin an episode; show the coarse view and the question."""
        chosen = (seed or 0) % len(self._questions) if index is None else index
        self._zoom = self._questions.zoom(chosen)
        self._state = ZoomState(episode_id=episode_id, step_count=0, index=chosen)
        question = self._questions[chosen].question
        return ZoomObservation(content=[image_block(self._zoom.coarse), text_block(question)])

    def step(self, action: ZoomAction, timeout_s: float | None = None, **kwargs: Any) -> ZoomObservation:
        """Serve a zoom call, or score the answer."""
        if self._zoom is None or self._state.index is None:
            return ZoomObservation(content=[text_block("There is no question yet. Call reset first.")])
        self._state.step_count += 1
        if action.answer is not None:
            reward = self._questions.score(self._state.index, action.answer)
            self._zoom = None
            return ZoomObservation(done=True, reward=reward)
        given = {"bbox_2d": action.bbox_2d, "label": action.label} | ({"view": action.view} if action.view else {})
        reply = self._zoom(given)
        self._state.boxes = [list(view.box) for view in self._zoom.crops]
        image = [] if reply.image is None else [image_block(reply.image)]
        return ZoomObservation(content=[text_block(reply.text), *image], reward=0.0)

    @property
    def state(self) -> ZoomState:
        """The state of the episode."""
        return self._state

    def get_metadata(self) -> EnvironmentMetadata:
        """Describe the environment."""
        return EnvironmentMetadata(
            name="qzoom-zoom", description=f"Zoom into images to answer questions ({self._questions.task.title})."
        )

    def list_splits(self) -> list[str]:
        """Return the one split."""
        return [self._questions.task.name]

    def num_tasks(self, split: str) -> int:
        """Return the number of questions."""
        return len(self._questions)

    def get_task(self, split: str, index: int) -> dict[str, Any]:
        """Return one question, without its answer."""
        sample = self._questions[index]
        return {"id": sample.id, "index": index, "question": sample.question}


class ZoomClient(EnvClient[ZoomAction, ZoomObservation, ZoomState]):
    """The client of the environment's server."""

    def _step_payload(self, action: ZoomAction) -> dict[str, Any]:
        return dict(action.model_dump(exclude_none=True))

    def _parse_result(self, payload: dict[str, Any]) -> StepResult[ZoomObservation]:
        seen = payload.get("observation", {})
        observation = ZoomObservation(content=seen.get("content", []), done=payload.get("done", False))
        return StepResult(observation=observation, reward=payload.get("reward"), done=payload.get("done", False))

    def _parse_state(self, payload: dict[str, Any]) -> ZoomState:
        return ZoomState(**payload)


class RemoteZoomEnv:
    """An environment for TRL on that server: `GRPOTrainer(environment_factory=RemoteZoomEnv, ...)`.

    Its address is in the variable OPENENV_URL. Rows have a column `index`; the reward is the score of the answer, which
    the model gives by the tool `submit_answer`.
    """

    def __init__(self) -> None:
        self._client = ZoomClient(os.environ.get("OPENENV_URL", "http://localhost:8000")).sync()
        self._reward = 0.0

    def reset(self, index: int, **row: Any) -> list[Block]:
        """Begin a rollout; return the blocks that end its first user turn."""
        self._reward = 0.0
        return _blocks(self._client.reset(index=index).observation)

    def image_zoom_in_tool(self, bbox_2d: list[float], label: str = "", view: str = "coarse") -> list[Block]:
        """
        Zoom in on a region of the image: it is cut out of the full-resolution original and shown.

        Args:
            bbox_2d: The region as x1, y1, x2, y2 in thousandths (0 to 1000) of the view's width and height.
            label: What is expected in the region.
            view: The view that the numbers refer to: coarse for the first image, crop1 for the first crop, and so on.

        Returns:
            The region as an image.
        """
        return _blocks(self._client.step(ZoomAction(bbox_2d=bbox_2d, label=label, view=view)).observation)

    def submit_answer(self, answer: str) -> str:
        """
        Give the final answer.

        Args:
            answer: The answer.

        Returns:
            A confirmation.
        """
        self._reward = float(self._client.step(ZoomAction(answer=answer)).reward or 0.0)
        return "The answer was taken down."

    def get_reward(self) -> float:
        """Return the score of the answer; 0 if none was given."""
        return self._reward


def _blocks(observation: ZoomObservation) -> list[Block]:
    """Return content blocks of MCP as blocks of a chat template."""
    return [
        {"type": "image", "image": Image.open(io.BytesIO(base64.b64decode(part["data"]))).convert("RGB")}
        if part["type"] == "image"
        else part
        for part in observation.content
    ]


def make_app(questions: ZoomQuestions) -> Any:
    """Return the server's application, with the page at /web."""
    return create_app(lambda: ZoomEnvironment(questions), ZoomAction, ZoomObservation, env_name="qzoom-zoom")


def main() -> None:
    """Serve the environment, or show one of its questions."""
    parser = argparse.ArgumentParser(description="Serve the zoom task as an environment of OpenEnv.")
    parser.add_argument("--task", default="needle-scene", help="as `qzoom eval` names it")
    parser.add_argument("--n", type=int, help="number of questions")
    parser.add_argument("--host", default="127.0.0.1")
    parser.add_argument("--port", type=int, default=8000)
    parser.add_argument("--client", metavar="URL", help="show a question of this server instead")
    parser.add_argument("--index", type=int, default=0, help="number of the question")
    given = parser.parse_args()
    if given.client:
        with ZoomClient(given.client).sync() as client:
            print(client.reset(index=given.index).observation.content[-1]["text"])
        return
    import uvicorn

    uvicorn.run(make_app(ZoomQuestions(given.task, n=given.n)), host=given.host, port=given.port)


if __name__ == "__main__":
    main()
