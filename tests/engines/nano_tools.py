"""A plug-in for vLLM that reads nano's calls as native tool calls (`--tool-parser-plugin`, `--tool-call-parser nano`).

None of vLLM's parsers reads them: nano writes location tokens, `<zoom><loc_84><loc_112><loc_140><loc_154></zoom>`.
"""

import json
import re
from collections.abc import Sequence
from typing import Any

from vllm.entrypoints.generate.base.protocol import (
    DeltaFunctionCall,
    DeltaMessage,
    DeltaToolCall,
    ExtractedToolCallInformation,
    FunctionCall,
    ToolCall,
)
from vllm.tool_parsers.abstract_tool_parser import ToolParser, ToolParserManager

NAME = "image_zoom_in_tool"
CALL = re.compile(r"<zoom>((?:<loc_\d+>){4})</zoom>")


def arguments(call: re.Match[str]) -> str:
    """Return the arguments of a call as JSON."""
    return json.dumps({"bbox_2d": [int(number) for number in re.findall(r"\d+", call[1])]})


@ToolParserManager.register_module("nano")
class NanoToolParser(ToolParser):  # type: ignore[misc]  # vLLM is in another environment
    """nano's location tokens."""

    def extract_tool_calls(self, model_output: str, request: Any) -> ExtractedToolCallInformation:
        calls = [
            ToolCall(function=FunctionCall(name=NAME, arguments=arguments(one))) for one in CALL.finditer(model_output)
        ]
        content = CALL.sub("", model_output) or None
        return ExtractedToolCallInformation(tools_called=bool(calls), tool_calls=calls, content=content)

    def extract_tool_calls_streaming(
        self,
        previous_text: str,
        current_text: str,
        delta_text: str,
        previous_token_ids: Sequence[int],
        current_token_ids: Sequence[int],
        delta_token_ids: Sequence[int],
        request: Any,
    ) -> DeltaMessage | None:
        if not current_text.lstrip().startswith("<"):
            return DeltaMessage(content=delta_text)
        call = CALL.search(current_text)
        if call is None or self.prev_tool_call_arr:
            return None
        written = arguments(call)
        self.prev_tool_call_arr.append({"name": NAME, "arguments": written})
        self.streamed_args_for_tool.append(written)
        function = DeltaFunctionCall(name=NAME, arguments=written)
        return DeltaMessage(tool_calls=[DeltaToolCall(index=0, id="call_of_nano", type="function", function=function)])
