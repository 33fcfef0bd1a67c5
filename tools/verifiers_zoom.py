"""The zoom task for verifiers and prime-rl: a taskset with the zoom tool, and the evaluation's score as reward.

    pip install verifiers "qzoom-agent[eval]"
    cd tools && vf-eval verifiers-zoom --env.taskset.task-name needle-scene --env.agent.harness.id null ...

The zoom tool is an MCP server of each rollout, so any harness that speaks MCP can play it; prime-rl takes the same
taskset id. Pixels are in the prompt and in tool results alone, not in the task's other data.
"""

from collections.abc import Iterator
from functools import cache
from typing import Any

import verifiers.v1 as vf
from mcp.server.mcpserver import Image as ImageBlock

from qzoom_agent.integrations.zoom_task import ZoomQuestions
from qzoom_agent.zoom.image_zoom import ImageZoom, png

__all__ = ["ZoomTaskset"]


@cache
def questions(task: str, count: int | None) -> ZoomQuestions:
    """Return the questions of a task; one object for all rollouts of a process."""
    return ZoomQuestions(task, n=count)


class ZoomData(vf.TaskData):
    """One question, by its place in the task."""

    task_name: str
    count: int | None = None
    index: int


class ZoomToolset(vf.Toolset[vf.ToolsetConfig, vf.State]):
    """The zoom tool on the image of the rollout's question."""

    TOOL_PREFIX = None
    zoom: ImageZoom

    async def setup_task(self, task: ZoomData) -> None:
        """Load the image."""
        self.zoom = questions(task.task_name, task.count).zoom(task.index)

    @vf.tool
    async def image_zoom_in_tool(self, bbox_2d: list[float], label: str = "", view: str = "coarse") -> list[Any]:
        """Zoom in on a region of the image: it is cut out of the full-resolution original and shown.

        bbox_2d is [x1, y1, x2, y2] in thousandths (0 to 1000) of the width and height of view: coarse is the first
        image, crop1 the first crop, and so on.
        """
        reply = self.zoom(bbox_2d=bbox_2d, label=label, view=view)
        return [reply.text, *([] if reply.image is None else [ImageBlock(data=png(reply.image), format="png")])]

    def register(self, mcp: Any) -> None:
        """Register the tool; its result is text and image blocks, not data."""
        mcp.add_tool(self._with_state(self.image_zoom_in_tool), name="image_zoom_in_tool", structured_output=False)


class ZoomTaskConfig(vf.TaskConfig):
    """Placement of the tool's server."""

    tools: vf.ToolsetConfig = vf.ToolsetConfig()


class ZoomTask(vf.Task[ZoomData, vf.State, ZoomTaskConfig]):
    """One question with its reward."""

    @classmethod
    def toolsets(cls, config: ZoomTaskConfig) -> list[vf.Toolset]:
        """Return the zoom tool."""
        return [ZoomToolset(config.tools)]

    @vf.reward
    async def correct(self, trace: vf.Trace) -> float:
        """Return the evaluation's score of the last reply."""
        return questions(self.data.task_name, self.data.count).score(self.data.index, trace.last_reply or "")


class ZoomTasksetConfig(vf.TasksetConfig):
    """The questions that are asked."""

    task: ZoomTaskConfig = ZoomTaskConfig()
    task_name: str = "needle-scene"
    """As `qzoom eval` names it, or `module:function`."""
    count: int | None = None
    """Number of questions."""


class ZoomTaskset(vf.Taskset[ZoomTask, ZoomTasksetConfig]):
    """The questions of a task, each with the coarse view of its image."""

    def load(self) -> Iterator[ZoomTask]:
        """Yield the questions."""
        found = questions(self.config.task_name, self.config.count)
        for index in range(len(found)):
            image = vf.ImageUrlContentPart(image_url=vf.ImageUrlSource(url=found.zoom(index).url))
            parts = [image, vf.TextContentPart(text=found[index].question)]
            data = ZoomData(
                id=found[index].id,
                prompt=[vf.UserMessage(content=parts)],
                task_name=self.config.task_name,
                count=self.config.count,
                index=index,
            )
            yield ZoomTask(data, self.config.task)


if __name__ == "__main__":
    ZoomToolset.run()
