"""qwen3_5 (Qwen3.5, 3.6, 3.8): a call is a function tag with one tag per parameter, values as plain text.

    <tool_call>
    <function=image_zoom_in_tool>
    <parameter=bbox_2d>
    [412, 300, 520, 391]
    </parameter>
    </function>
    </tool_call>

The rest is as in qwen3vl. A JSON call between the same tags is parsed too, and so is a function tag without
`<tool_call>` around it, which these models are known to write.
"""

import re
from itertools import islice

from qzoom_agent.protocols.hermes import CALLS_PER_TURN, QWEN3VL, hermes_payloads, qwen_schema, user_image_region
from qzoom_agent.protocols.json_repair import read_json
from qzoom_agent.protocols.parsing import MAX_CALLS_READ, ParsedReply, TagSpan
from qzoom_agent.protocols.tagged import Arguments, Payload, PromptTexts, Tagged

_FUNCTION = re.compile(r"<\s{0,4}function\s{0,4}=\s{0,4}([^<>\n]{1,80})>", re.IGNORECASE)
_PARAMETER = re.compile(r"<\s{0,4}parameter\s{0,4}=\s{0,4}([^<>\n]{1,80})>", re.IGNORECASE)
_CLOSING = re.compile(r"<\s{0,4}/\s{0,4}(?:parameter|function)\s{0,4}>", re.IGNORECASE)


def function_payloads(body: str, reply: ParsedReply) -> list[Payload]:
    """Return the calls of the function tags in a body, or of JSON if there are none."""
    functions = _headed(_FUNCTION, body)
    if functions:
        return [Payload(name, _arguments(inside)) for name, inside in functions]
    found = hermes_payloads(body, reply)
    if found:
        reply.repairs.append("JSON call read in place of a function tag")
    return found


def _arguments(body: str) -> Arguments:
    found: Arguments = {}
    for name, inside in _headed(_PARAMETER, body):
        closing = _CLOSING.search(inside)
        found[name] = _value(inside[: closing.start()] if closing else inside)
    return found


def _headed(head: re.Pattern[str], body: str) -> list[tuple[str, str]]:
    """Return the name of each opening tag and the text up to the next one."""
    heads = list(islice(head.finditer(body), MAX_CALLS_READ))
    ends = [*(found.start() for found in heads[1:]), len(body)]
    return [(found[1].strip().strip("\"'"), body[found.end() : end]) for found, end in zip(heads, ends, strict=False)]


def _value(written: str) -> object:
    text = written.strip()
    parsed = read_json(text) if text.startswith(("[", "{")) else None
    if parsed is not None:
        return parsed.value
    try:
        return float(text)
    except ValueError:
        return text


def _loose(text: str) -> TagSpan | None:
    head = _FUNCTION.search(text)
    if head is None:
        return None
    closing = text.find("</function>", head.end())
    end = len(text) if closing < 0 else closing + len("</function>")
    whole = text[head.start() : end]
    return TagSpan(whole, whole, head.start(), end, True)


_SYSTEM = (
    f"# Tools\n\nYou have access to the following functions:\n\n<tools>\n{qwen_schema('bbox_2d')}\n</tools>\n\n"
    "If you choose to call a function ONLY reply in the following format with NO suffix:\n\n"
    "<tool_call>\n<function=example_function_name>\n<parameter=example_parameter_1>\nvalue_1\n</parameter>\n"
    "<parameter=example_parameter_2>\nvalue_2\n</parameter>\n</function>\n</tool_call>\n\n"
    "Nest the function in <tool_call></tool_call>, give every required parameter, and put reasoning before the call "
    "only. Without a call, just answer the question."
)
QWEN3_5 = Tagged(
    name="qwen3_5",
    frame="per_mille",
    tools=QWEN3VL.tools,
    how="Write <tool_call>\n<function=image_zoom_in_tool>\n<parameter=bbox_2d>\n[x1, y1, x2, y2]\n</parameter>\n"
    "</function>\n</tool_call> with x and y from 0 to 1000.",
    payloads=function_payloads,
    region=user_image_region,
    loose=_loose,
    max_calls_per_turn=CALLS_PER_TURN,
    result_role="tool",
    mark=None,
    wording=PromptTexts(system=_SYSTEM, refusal_before="Error: "),
)
