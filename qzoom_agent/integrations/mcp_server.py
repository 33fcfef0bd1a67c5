"""The agent for clients of the Model Context Protocol (`qzoom mcp`, extra `[mcp]`): look, propose, zoom and ask.

A client names an image by its path, below the folders that the server was given, or as a data URI. Each result is a
text and, for clients that show them, the image that it is about. The model is loaded when a tool first needs it.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path
from threading import Lock
from typing import TYPE_CHECKING, Any, Final
from urllib.parse import unquote

from PIL import Image
from pydantic import BaseModel

from qzoom_agent.errors import ImageError, QzoomError
from qzoom_agent.extras import require
from qzoom_agent.files import expanded
from qzoom_agent.geometry import Box
from qzoom_agent.images import MAX_PIXELS, load_image
from qzoom_agent.integrations.limits import MAX_IMAGES
from qzoom_agent.pdf import file_of
from qzoom_agent.report.overlay import overlay
from qzoom_agent.trace import PerceptionRecord
from qzoom_agent.zoom.image_zoom import ImageZoom, png
from qzoom_agent.zoom.propose import Propose

if TYPE_CHECKING:
    from qzoom_agent.agent import Agent

_SHOWN: Final = 768
"""Longer side in pixels of pictures that explain a result."""
INSTRUCTIONS: Final = (
    "Tools to see detail in a large image. look shows it small; zoom shows a region in full resolution; propose says "
    "which regions matter for a question; ask lets the server's own model answer. Boxes are [x1, y1, x2, y2] in "
    "thousandths (0 to 1000) of the image's width and height."
)


class ImageAccess(BaseModel, frozen=True):
    """The images that clients may name."""

    folders: tuple[Path, ...] = ()
    """Folders whose files may be read; relative paths begin at the first."""
    allow_urls: bool = False
    """Fetch http(s) addresses."""
    max_pixels: int = MAX_PIXELS

    def load(self, source: str) -> Image.Image:
        """Return an image. Raises ImageError if it may not be read, or cannot be."""
        if not source.lower().startswith(("data:", "http://", "https://")):
            return load_image(self._path(source), max_pixels=self.max_pixels)
        return load_image(source, allow_url=self.allow_urls, max_pixels=self.max_pixels)

    def _path(self, source: str) -> Path:
        if not self.folders:
            raise ImageError("This server reads no files. Send the image as a data URI.")
        try:
            named = str(self.folders[0] / expanded(_named(source)))
            file = file_of(named)  # FILE.pdf#page=2 is no link, and FILE.pdf may be one
            path = Path(file).resolve()
        except (OSError, ValueError) as error:
            raise ImageError(f"{source[:100]!r} is no path: {error}. Give the path of an image.") from None
        if not any(path.is_relative_to(folder.resolve()) for folder in self.folders):
            readable = ", ".join(str(folder) for folder in self.folders)
            raise ImageError(f"{source[:200]} lies outside the folders that may be read: {readable}.")
        return Path(f"{path}{named[len(file) :]}")


class ImageTools:
    """The four tools; each returns a text and images. Errors that the caller can mend are `QzoomError`s."""

    def __init__(self, load_agent: Callable[[], Agent], access: ImageAccess) -> None:
        """`load_agent` is called once, by the first tool that needs a model."""
        self._load, self._access, self._loading = cache(load_agent), access, Lock()

    @property
    def agent(self) -> Agent:
        """The agent, loaded at the first call."""
        with self._loading:
            return self._load()

    def look(self, image: str) -> list[Any]:
        """Show an image reduced to a small view, and tell its real size. Zoom into what you cannot read."""
        zoom = ImageZoom(self._access.load(image))
        width, height = zoom.store.view("original").size
        shown = zoom.coarse
        text = (
            f"The image has {width}x{height} px and is shown at {shown.width}x{shown.height} px. zoom shows a region "
            "of it in full resolution."
        )
        return [text, shown]

    def propose(self, image: str, question: str) -> list[Any]:
        """Say which regions of an image to zoom into to answer a question, or that no closer look is needed."""
        pixels = self._access.load(image)
        found: list[PerceptionRecord] = []

        def looked(picture: Image.Image, text: str) -> PerceptionRecord:
            found.append(self.agent.look(picture, text).record)
            return found[0]

        proposals = Propose(looked)(ImageZoom(pixels).store, question)
        return [proposals.text, _small(overlay(pixels, found[0]))]

    def zoom(self, image: str, bbox_2d: list[float], label: str = "", view: str = "coarse") -> list[Any]:
        """Show a region of an image in full resolution. Crops are not kept: boxes are always those of the whole image.

        Args:
            image: Path or data URI of the image.
            bbox_2d: The region as [x1, y1, x2, y2] in thousandths (0 to 1000) of the image's width and height.
            label: What you expect to find there.
            view: "coarse", the whole image.
        """
        reply = ImageZoom(self._access.load(image))(bbox_2d=bbox_2d, label=label, view=view)
        if reply.image is None:
            raise ImageError(reply.text)
        return [reply.text.replace("View 'crop1'", "The region", 1), reply.image]

    def ask(self, image: str, question: str, further_images: Sequence[str] = ()) -> list[Any]:
        """Let the server's own model answer a question about an image, or several; it zooms by itself.

        Args:
            image: Path or data URI of the image.
            question: The question.
            further_images: Other images that the question is about, too.
        """
        if len(further_images) >= MAX_IMAGES:
            raise ImageError(
                f"A question is about at most {MAX_IMAGES} images; got {1 + len(further_images)}. Ask twice."
            )
        pixels = [self._access.load(one) for one in (image, *further_images)]
        answer = self.agent.run(pixels, question)
        if answer.status == "error":
            raise QzoomError(f"The model failed: {answer.trace.error}")
        looked = [
            str([round(side) for side in Box(*box).to_frame("per_mille", pixels[number].size).as_list()])
            + (f" of image {number + 1}" if number else "")
            for number, box in answer.evidence
        ]
        where = f" It looked closer at {', then '.join(looked)}." if looked else ""
        text = f"{answer.text or 'No answer.'}\n\n(status {answer.status}.{where})"
        look, shown = answer.trace.perception or PerceptionRecord(), []
        for at, one in enumerate(pixels):
            boxes = [box for number, box in answer.evidence if number == at]
            shown.append(overlay(one, (look.of(at) or PerceptionRecord()).model_copy(update={"boxes": boxes})))
        return [text, *map(_small, shown)]


def create_server(tools: ImageTools) -> Any:
    """Return the MCP server (`mcp.server.MCPServer`). Raises MissingDependency."""
    require("mcp", extra="mcp", use="`qzoom mcp`")
    from mcp.server import MCPServer
    from mcp.server.mcpserver import Image as ImageBlock
    from mcp.server.mcpserver.exceptions import ToolError

    from qzoom_agent import __version__

    server = MCPServer("qzoom", instructions=INSTRUCTIONS, version=__version__, log_level="WARNING")

    def blocks(tool: Callable[..., list[Any]]) -> Callable[..., list[Any]]:
        def call(**arguments: Any) -> list[Any]:
            try:
                found = tool(**arguments)
            except QzoomError as error:
                raise ToolError(str(error)) from error
            return [ImageBlock(data=png(one), format="png") if isinstance(one, Image.Image) else one for one in found]

        call.__signature__ = inspect.signature(tool, eval_str=True)  # type: ignore[attr-defined]
        call.__name__, call.__doc__ = tool.__name__, tool.__doc__
        return call

    for tool in (tools.look, tools.propose, tools.zoom, tools.ask):
        server.add_tool(blocks(tool), structured_output=False)
    return server


def _named(source: str) -> str:
    """Return the path that a client means; in a file:// address, as of MCP's roots, blanks and letters are escaped."""
    if not source.lower().startswith("file://"):
        return source
    return unquote(source[len("file://") :].removeprefix("localhost"))


def _small(picture: Image.Image) -> Image.Image:
    picture.thumbnail((_SHOWN, _SHOWN))
    return picture
