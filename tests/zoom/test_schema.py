"""One definition of the zoom arguments: what a model is told and what is checked."""

import json
import subprocess
import sys

import pytest

from qzoom_agent.zoom import zoom_schema
from qzoom_agent.zoom.image_zoom import NAME


def test_the_schema_is_an_openai_function():
    found = zoom_schema()
    assert json.loads(json.dumps(found)) == found
    assert found["type"] == "function"
    function = found["function"]
    assert function["name"] == NAME
    parameters = function["parameters"]
    assert list(parameters["properties"]) == ["bbox_2d", "view", "label"]
    # A published prompt requires "bbox" and calls the property "bbox_2d"; the two must agree.
    assert parameters["required"] == ["bbox_2d"]
    assert parameters["additionalProperties"] is False
    box = parameters["properties"]["bbox_2d"]
    assert (box["items"], box["minItems"], box["maxItems"]) == ({"type": "number"}, 4, 4)
    assert all(field["description"] for field in parameters["properties"].values())


@pytest.mark.parametrize(
    ("frame", "says"), [("per_mille", "0 to 1000"), ("unit", "0 to 1"), ("pixel", "pixels"), ("cell", "token grid")]
)
def test_the_schema_names_its_frame(frame, says):
    assert says in zoom_schema(frame=frame)["function"]["description"]


def test_the_tools_load_no_framework():
    code = (
        "import sys, qzoom_agent.zoom; "
        "print([m for m in ('torch', 'transformers', 'langgraph', 'langchain_core', 'trl') if m in sys.modules])"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "[]\n"
