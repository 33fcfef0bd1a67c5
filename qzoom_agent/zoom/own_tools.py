"""Own tools: typed Python functions and LangChain tools that a model may call beside zoom.

    def rotate(image: Image.Image, degrees: int = 90) -> Image.Image:
        "Turn an image counter-clockwise by a number of degrees."
        return image.rotate(degrees, expand=True)

    agent = Agent.from_pretrained("qwen3-vl-4b", tools=[rotate])

LangChain makes the schema from type hints and docstring, and checks the arguments. A parameter of type `Image.Image`,
`Image.Image | None` or `list[Image.Image]` is ids of views for the model and their pixels for the function; one of type
`Views` is not shown to the model. A tool returns a text, an image (of Pillow, or an array of uint8), or a tuple or list
of both. Nothing that a tool does raises: the model reads it.
"""

from __future__ import annotations

import asyncio
import inspect
import json
import math
import operator
import re
from collections import OrderedDict
from collections.abc import AsyncIterator, Iterator, Mapping, Set, ValuesView
from copy import deepcopy
from dataclasses import dataclass, is_dataclass
from dataclasses import fields as dataclass_fields
from enum import Enum
from functools import reduce
from itertools import islice
from types import UnionType
from typing import Annotated, Any, Final, Union, get_args, get_origin, get_type_hints

import numpy as np
from langchain_core.messages import BaseMessage
from langchain_core.tools import BaseTool, InjectedToolArg, StructuredTool, Tool
from langchain_core.utils.function_calling import convert_to_openai_tool
from PIL import Image
from pydantic import BaseModel, ValidationError

from qzoom_agent.errors import BoxError, ConfigError, ImageError, describe_error
from qzoom_agent.extensions import awaited, find, reference
from qzoom_agent.geometry import Affine
from qzoom_agent.images import load_image
from qzoom_agent.protocols import ZoomProtocol, get_protocol, with_tools
from qzoom_agent.protocols.parsing import without_marks
from qzoom_agent.zoom import shipped_tools
from qzoom_agent.zoom.tool_images import AffineImage, Views

SHIPPED: Final = ("rotate", "enhance", "read_text")
MOST_CHARACTERS: Final = 8000
"""Longest text of a tool that the model reads; the rest is cut off."""
_Image = Image.Image | np.ndarray[Any, Any]
_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_-]{0,63}")
_GIVEN: Final = "qzoom_views"
_TAKEN: Final = ("self", "args", "kwargs", "config", "callbacks", "run_manager", "model_config", _GIVEN)


@dataclass(frozen=True, slots=True)
class ToolOutput:
    """The outcome of a call, checked and in one form: a text, an image or both, or the reason why there is none."""

    text: str = ""
    image: Image.Image | None = None
    """RGB."""
    parent: str = "coarse"
    """Id of the view that the image was made of."""
    matrix: Affine | None = None
    """Map of pixels of the image to pixels of the original; None: it has no place there."""
    error: str = ""


@dataclass(frozen=True, slots=True)
class OwnTool:
    """A tool that an agent offers beside zoom."""

    tool: BaseTool
    reference: str
    """`module:name`, an entry point or the name of a shipped tool, under which a configuration knows it."""
    schema: str
    """The tool as an OpenAI function schema, in one line of JSON."""

    @property
    def name(self) -> str:
        return self.tool.name

    def __call__(self, arguments: Mapping[str, Any], views: Views, *, max_pixels: int) -> ToolOutput:
        """Run the tool with arguments as the model wrote them. Never raises."""
        schema: Any = self.tool.args_schema
        model = schema if isinstance(schema, type) and issubclass(schema, BaseModel) else None
        fields = model.model_fields if model else {}
        hidden = [key for key, field in fields.items() if field.annotation is Views]
        # A tool may change what it is given, and the trace has the arguments as the model wrote them.
        given = {key: deepcopy(value) for key, value in arguments.items() if key not in hidden}
        # LangChain would leave others out without a word, so the tool would do something else than was asked for. One
        # whose schema is no pydantic model checks them itself.
        strict = model is not None and model.model_config.get("extra") != "allow" and "kwargs" not in fields
        known = {*fields, *json.loads(self.schema)["function"].get("parameters", {}).get("properties", ())}
        if strict and (unknown := ", ".join(sorted(given.keys() - known))):
            return self._wrong(f"there is no parameter {unknown}")
        given |= dict.fromkeys(hidden, views)
        try:
            return _output(_run(self.tool, given), views, max_pixels=max_pixels)
        except ValidationError as error:
            return self._wrong("; ".join(f"{'.'.join(map(str, one['loc']))}: {one['msg']}" for one in error.errors()))
        except (BoxError, ImageError) as error:
            return ToolOutput(error=f"{self.name}: {error}")
        except (Exception, SystemExit, asyncio.CancelledError) as error:  # whatever a tool of somebody else raises
            return ToolOutput(error=f"{self.name} failed: {without_marks(describe_error(error))[:500]}")

    def _wrong(self, reason: str) -> ToolOutput:
        told = without_marks(reason)[:500]
        return ToolOutput(error=f"The arguments of {self.name} are wrong: {told}. Its schema: {self.schema}")


def find_own_tools(given: Any) -> dict[str, OwnTool]:
    """Return own tools by name: functions, LangChain tools, `module:name`, entry points, or names of shipped tools.

    Raises:
        ConfigError: One is none of these, or two have one name.
        MissingDependency: A shipped tool needs a package that is not installed.
    """
    if not isinstance(given, list | tuple):
        raise ConfigError(f"tools is a list of functions, LangChain tools or names; got {given!r:.80}.")
    found: dict[str, OwnTool] = {}
    for tool in map(_own_tool, given):
        if tool.name in found:
            raise ConfigError(f"Two of the tools are called {tool.name!r}. Rename one of them.")
        found[tool.name] = tool
    return found


def require_place(given: Any, protocol: str | ZoomProtocol | None) -> None:
    """Raise ConfigError for own tools that are wrong, or that a protocol cannot offer; before weights are loaded."""
    found = find_own_tools(given)
    known = get_protocol(protocol) if isinstance(protocol, str) else protocol
    if known is not None:
        with_tools(known, {name: tool.schema for name, tool in found.items()})


def _own_tool(given: Any) -> OwnTool:
    name = given if isinstance(given, str) else ""
    if name:
        given = find(name, kind="own tool", known={one: getattr(shipped_tools, one) for one in SHIPPED})
    if isinstance(given, OwnTool):
        return given
    shipped_tools.require_packages(given)
    function = getattr(given, "func", None) or getattr(given, "coroutine", None) or given
    tool = given if isinstance(given, BaseTool) else _as_tool(given)
    if not _NAME.fullmatch(tool.name):
        raise ConfigError(
            f"A tool is named by up to 64 letters, digits, '_' and '-'; got {tool.name!r}. Define it with `def NAME`."
        )
    try:
        schema = json.dumps(convert_to_openai_tool(tool))
    except Exception as error:  # pydantic's and json's, for a type or a default that JSON has not
        raise ConfigError(
            f"The tool {tool.name!r} has parameters that cannot be written as JSON: {_first_line(error)}. {_PARAMETERS}"
        ) from error
    return OwnTool(tool, name or reference(function), schema)


def _as_tool(function: Any) -> BaseTool:
    """Return a function as a LangChain tool whose images are ids of views to the model."""
    if not inspect.isroutine(function):
        raise ConfigError(
            f"A tool is a function with type hints and a docstring, or a LangChain tool; got {function!r:.80}."
        )
    name = function.__name__
    hints, images, parameters, signature = _hints(function), list[str](), [], inspect.signature(function)
    injected = Annotated[Views, InjectedToolArg]
    for key, parameter in signature.parameters.items():
        hint = hints.get(key)
        _require_parameter(parameter, hint, tool=name)
        default = parameter.default
        if (ids := _as_ids(hint)) != hint:
            hint, default = ids, "coarse" if hint is Image.Image else default
            images.append(key)
        elif hint is Views:
            hint, default = injected, inspect.Parameter.empty
        parameters.append(parameter.replace(annotation=hint, default=default, kind=parameter.KEYWORD_ONLY))
    parameters.append(inspect.Parameter(_GIVEN, inspect.Parameter.KEYWORD_ONLY, annotation=injected))

    def call(**arguments: Any) -> tuple[str, _Returned]:
        views, given = arguments.pop(_GIVEN), list[str]()

        def pixels(id: Any) -> Any:
            if not isinstance(id, str):
                return None if id is None else list(map(pixels, id))
            given.append(views.view(id).id)
            return views.image(given[-1])

        arguments |= {key: pixels(arguments[key]) for key in images}
        bound = inspect.BoundArguments(signature, OrderedDict(arguments))
        value = function(*bound.args, **bound.kwargs)  # some parameters may be positional alone
        if inspect.isawaitable(value):
            value = awaited(value)
        if inspect.isasyncgen(value):
            value = awaited(_collected(value))
        return "", _Returned(value, given[0] if given else "coarse")

    call.__name__, call.__doc__ = name, function.__doc__
    call.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    call.__annotations__ = {one.name: one.annotation for one in parameters}
    try:
        return StructuredTool.from_function(
            call, parse_docstring=True, error_on_invalid_docstring=False, response_format="content_and_artifact"
        )
    except Exception as error:  # LangChain's and pydantic's, for a missing docstring or a type without a schema
        raise ConfigError(
            f"The function {name!r} cannot be a tool: {_first_line(error)}. "
            + ("" if function.__doc__ else "It needs a docstring. ")
            + _PARAMETERS
        ) from error


def _require_parameter(parameter: inspect.Parameter, hint: Any, *, tool: str) -> None:
    """Raise ConfigError for a parameter that LangChain would not give what the model writes."""
    key = parameter.name
    if hint is None or parameter.kind in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD):
        raise ConfigError(f"The parameter {key!r} of the tool {tool!r} needs a type hint and a name of its own.")
    if key in _TAKEN or key.startswith("_"):
        raise ConfigError(
            f"The parameter {key!r} of the tool {tool!r} has a name that LangChain keeps for itself or leaves "
            "out, so that what the model writes would not reach it. Rename it."
        )


_PARAMETERS: Final = (
    "Parameters have type hints that JSON can express, `Image.Image` (also `| None`, or in a list) for a view, or "
    "`Views`."
)
_IMAGE_ID: Final = (
    'id of an image: "coarse" for the user\'s, "crop1" for the first crop, "tool1" for the first of a tool'
)


@dataclass(frozen=True, slots=True)
class _Returned:
    """The value that a function returned, and the view that it was given."""

    value: Any
    view: str


def _hints(function: Any) -> dict[str, Any]:
    try:
        hints = get_type_hints(function, include_extras=True)
    except Exception as error:  # a name that cannot be resolved
        raise ConfigError(f"The type hints of the tool {function.__name__!r} cannot be read: {error}.") from error
    images = {
        key: get_args(hint)[0]
        for key, hint in hints.items()
        if get_origin(hint) is Annotated and get_args(hint)[0] in (Image.Image, Views)
    }
    return hints | images


def _as_ids(hint: Any) -> Any:
    """Return a type hint with ids of views in place of images."""
    if hint is Image.Image:
        return Annotated[str, _IMAGE_ID]
    origin, inside = get_origin(hint), get_args(hint)
    ids = tuple(map(_as_ids, inside))
    if ids == inside or origin not in (list, Union, UnionType):
        return hint
    return list.__class_getitem__(ids) if origin is list else reduce(operator.or_, ids)


def _first_line(error: Exception) -> str:
    return describe_error(error).partition("\n")[0].rstrip(".")


def _run(tool: BaseTool, arguments: dict[str, Any]) -> Any:
    """Return what a tool returns: of one with an artifact the message, of any other the value itself."""
    request: Any = arguments
    if tool.response_format == "content_and_artifact":
        request = {"type": "tool_call", "id": "0", "name": tool.name, "args": arguments}
    try:
        return tool.invoke(request)
    except NotImplementedError:  # a tool that can only be awaited, such as those of MCP servers
        awaits = type(tool)._arun not in (BaseTool._arun, StructuredTool._arun, Tool._arun)
        if not awaits and getattr(tool, "coroutine", None) is None:
            raise  # by the tool itself, which awaiting would run once more
        return awaited(tool.ainvoke(request))


def _output(value: Any, views: Views, *, max_pixels: int) -> ToolOutput:
    """Return the value of a tool in one form. Raises BoxError or ImageError for an image that cannot be shown."""
    given, failed = "coarse", False
    if isinstance(value, BaseMessage):
        failed = getattr(value, "status", "") == "error"
        artifact, content = getattr(value, "artifact", None), value.content
        if isinstance(artifact, _Returned):
            value, given = artifact.value, artifact.view
        else:
            value = [content, artifact] if isinstance(artifact, Image.Image | AffineImage) else content
    pieces = _pieces(value)
    images = [piece for piece in pieces if not isinstance(piece, str)]
    text = "\n".join(piece for piece in pieces if isinstance(piece, str) and piece)
    if failed:
        return ToolOutput(error=_short(text) or "The tool failed.")
    if not images:
        return ToolOutput(text=_short(text)) if text else ToolOutput(error="The tool returned nothing.")
    if len(images) > 1:
        text += f"\nOnly the first of {len(images)} images is shown."
    first = images[0]
    if not isinstance(first, AffineImage):
        return ToolOutput(_short(text), load_image(first, max_pixels=max_pixels), given)
    view = views.view(first.of or given)
    image = load_image(first.image, max_pixels=max_pixels)
    return ToolOutput(_short(text), image, view.id, first.on_original(view, image.size))


async def _collected(value: AsyncIterator[Any]) -> list[Any]:
    return [one async for one in value]


def _pieces(value: Any) -> list[str | _Image | AffineImage]:
    """Return the texts and images in the value of a tool, in order; anything else as JSON, and then its images."""
    value = _listed(value)
    if value is None:
        return []
    if isinstance(value, bytes | bytearray):
        return [_encoded(value)]
    if isinstance(value, str | AffineImage) or _is_image(value):
        return [value]
    if isinstance(value, tuple | list) and value and all(map(_is_piece, value)):
        return [piece for one in value for piece in _pieces(one)]
    if _is_block(value):
        return [_block(value)]
    found: list[str | _Image | AffineImage] = []

    def plain(one: Any) -> Any:
        if isinstance(one, bytes | bytearray):
            one = _encoded(one)
        if isinstance(one, str):
            return one
        if not isinstance(one, AffineImage) and not (_is_image(one) and getattr(one, "ndim", 3) == 3):
            return _plain(one)
        found.append(one)
        return "(an image)"

    return [json.dumps(value, default=plain, ensure_ascii=False), *found]


def _encoded(value: bytes | bytearray) -> str | Image.Image:
    """Return the image in the bytes of a file, such as what `read` of a PNG gives; of others the reason."""
    try:
        return load_image(bytes(value))
    except ImageError as error:
        return f"({str(error).partition('. ')[0]})"


def _is_piece(value: Any) -> bool:
    plain = value is None or isinstance(value, str | bytes | bytearray | AffineImage | list | tuple)
    return plain or _is_image(value) or _is_block(value)


def _is_image(value: Any) -> bool:
    """Return whether a value is pixels: an array of other numbers is a result, not an image."""
    return isinstance(value, Image.Image) or (isinstance(value, np.ndarray) and value.dtype == np.uint8)


def _listed(value: Any) -> Any:
    """Return what a generator, `map` or other iterator gives as a list, and any other value as it is."""
    some = isinstance(value, Iterator) and not hasattr(value, "read")
    return list(islice(value, MOST_CHARACTERS)) if some else value


def _plain(value: Any) -> Any:
    """Return a value that JSON does not know as one that it does.

    Records become objects, sets and iterators lists, numbers of NumPy and torch numbers and lists, unless they are too
    many, and others their text.
    """
    if isinstance(value, BaseModel):
        return dict(value)
    if is_dataclass(value) and not isinstance(value, type):
        return {field.name: getattr(value, field.name) for field in dataclass_fields(value)}
    if isinstance(value, Enum):
        return value.value
    if isinstance(value, Set | range | ValuesView):
        return list(value)
    if (listed := _listed(value)) is not value:
        return listed
    if not hasattr(value, "tolist"):
        return str(value)
    shape = tuple(getattr(value, "shape", ()))
    if math.prod(shape) > MOST_CHARACTERS:
        sides = "x".join(map(str, shape))
        return f"({sides} numbers of {value.dtype}, too many to be shown; an image is an array of uint8)"
    return value.tolist()


def _is_block(value: Any) -> bool:
    return isinstance(value, Mapping) and value.get("type") in ("text", "image", "image_url")


def _block(block: Mapping[str, Any]) -> str | Image.Image:
    """Return a content block of LangChain as a text or an image. Raises ImageError for a damaged one."""
    if block["type"] == "text":
        return str(block.get("text", ""))
    url: Any = block.get("image_url") or block.get("url")
    url = url.get("url") if isinstance(url, Mapping) else url
    data = block.get("base64") or block.get("data")
    if isinstance(data, str):
        url = f"data:{block.get('mime_type') or 'image/png'};base64,{data}"
    if not isinstance(url, str) or not url.startswith("data:"):
        raise ImageError("An image of a tool is given as base64 data; an address is not fetched.")
    return load_image(url)


def _short(text: str) -> str:
    """Return a text without marks of a template, cut off where it is too long."""
    text = without_marks(text)
    if len(text) <= MOST_CHARACTERS:
        return text
    return f"{text[:MOST_CHARACTERS]}\n(cut off after {MOST_CHARACTERS} of {len(text)} characters)"
