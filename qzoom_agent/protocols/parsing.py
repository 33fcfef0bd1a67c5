"""Parsing of model text, shared by all protocols: the model's own turn, tags, thoughts, answers and foreign calls.

Everything here takes any string, never raises and is linear in its length. Corrections are noted in a `ParsedReply`;
text that cannot be parsed becomes a problem there, which the model reads.
"""

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cache
from itertools import pairwise

from qzoom_agent.files import valid_unicode
from qzoom_agent.protocols.interface import Parsed, ToolCall
from qzoom_agent.views import View

EMPTY_REPLY = "The reply was empty. Answer the question."
ONLY_THOUGHT = "The reply ended before an answer or a call. Give one of them now."
FOREIGN_CALL = "Calls are not read in this format."
MAX_REPLY = 131_072
"""Characters of a reply that are read."""
MAX_CALLS_READ = 16
"""Calls parsed in one reply; a reply with more has degenerated."""
MAX_NAME = 80
MAX_BOXED = 2000
_BOXED = re.compile(r"\\boxed\s{0,4}\{|<\|begin_of_box\|>")
"""The start of a marked answer: of LaTeX, or of GLM-V."""
_BOX_END = "<|end_of_box|>"
_BOXES_READ = 16
_EMPTY_BOX = re.compile(r"\$?\\boxed\s{0,4}\{\s{0,8}\}\$?|<\|begin_of_box\|>\s{0,8}<\|end_of_box\|>")
_STYLED = re.compile(r"\\(?:text|textbf|mathrm|mathbf)\{([^{}]*)\}")
_STRAY = re.compile(r"</?(?:answer|think|tool_response)>", re.IGNORECASE)

_ECHO = re.compile(
    r"\s{0,80}(?:(?:<\|im_start\|>|<start_of_turn>|<\|start_header_id\|>)\s{0,8}(?:assistant|model)\s{0,8}"
    r"(?:<\|end_header_id\|>)?\s{0,8}|assistant[ \t]{0,8}\n(?=\s{0,8}\S))"
)
"""The head of the model's own turn, written once more."""
_MARK = re.compile(
    r"<\|(?:im_start|im_end|endoftext|eot_id|start_header_id|end|user|assistant|observation|vision_start|vision_end|"
    r"image_pad|video_pad|image|image_\d{1,3}|tool_response|tool_outputs?)\|>"
    r"|<(?:image|img|image_\d{1,3}|start_of_image|image_soft_token)>|<(?:tool_response|tool_result|tool_output)s?>"
    r"|<(?:function_results?|observation|start_of_turn|end_of_turn)>|</s>|\[/?INST\]|\[/?TOOL_RESULTS\]|\[IMG\]"
    r"|\u273f(?:RESULT|RETURN)\u273f|<\uff5c(?:User|Assistant|end\u2581of\u2581sentence|tool\u2581outputs\u2581begin)\uff5c>"
    r"|(?<=\n)(?:user|assistant|(?:[Uu]ser|[Hh]uman|[Aa]ssistant|USER|HUMAN|ASSISTANT)[ \t]{0,8}:)[ \t]{0,8}(?=\n|\Z)"
    r"|(?<=\n)(?:USER|ASSISTANT): "
)
"""A mark of the next turn, or of a result that only the tool can give."""
_QUOTED = frozenset({"<image>", "<img>", "</s>", "[IMG]"})
"""Marks that a page or a program may show, too."""
_RESULT = re.compile(
    r"(?:(?<=\n)|(?<=>))[ \t*]{0,8}(?:Observation[ _]?\d{0,3}[ \t*]{0,4}:|After the above Action\b)", re.IGNORECASE
)
"""The head of a result, where it follows a call."""
_TOOL = r"(?:zoom|crop|resize_image|local_region)"
_CALLED = re.compile(
    r"<(?:tool_call|grounding|zoom|function=)|\bAction Input\b"
    rf"|^\W{{0,8}}(?:Action\W{{0,8}}:.{{0,40}}{_TOOL}|ZOOM\W{{0,8}}:)",
    re.M,
)
_END_OF_TURN = ("", "<|im_end|>", "<|endoftext|>", "<|eot_id|>", "</s>", "<end_of_turn>")

_NAME = rf"(?:\w{{1,40}}_)?{_TOOL}(?:_\w{{1,40}}|\b)"
_NUMBERS = r"(?:-?\d{1,9}+(?:\.\d{0,9}+)?%?\s?,\s{0,4}){3}"
"""The first three of four numbers."""
_WRAPPED = tuple(
    re.compile(pattern, re.MULTILINE)
    for pattern in (
        r"<(?:\|(?:python_tag|tool_call|action_start|plugin)|\uff5ctool|(?:[a-z]{1,20}:)?"
        r"(?:tool_(?:calls|code|use|name)|function_?calls?|start_function_call|invoke)\b)",
        r"<(?:action|tool|crop|zoom_in)(?:\s{1,4}\w{1,20}\s?=|\s?>\s{0,8}"
        rf"(?:[\[{{(]|-?\d|[\w.]{{1,40}}\s?\(|<\w|\w{{0,40}}{_TOOL}))",
        r"\u273f(?:FUNCTION|ARGS)\u273f",
        r"\[TOOL_(?:CALLS?|REQUEST)\]",
        r"```\s?(?:tool_|function_call)",
        r"to=functions\.",
        r"^[ \t>*_`#-]{0,8}(?i:Action[ \t]Input[ \t*_`]{0,4}:"
        rf"|(?i:Action|Tool|Function)[ \t*_`]{{0,4}}:[ \t*_`]{{0,4}}{_NAME}[ \t*_`]{{0,4}}(?:$|[(\[{{:,]))",
        rf"{_TOOL}\w{{0,40}}+(?:\(\s{{0,8}}[A-Za-z_]\w{{0,40}}+,|\s?\(\s{{0,8}}(?:\w{{1,40}}+\s?=|[\[{{(]|{_NUMBERS}))",
        r"[\"'](?:actions|action_input|tool_calls?|tool_input|tool_use|function_call)[\"']\s?:\s{0,8}[\[{\"']",
        rf"[\"'](?:action|tool|tool_name)[\"']\s?:\s?[\"']\w{{0,40}}?{_TOOL}",
    )
)
"""Marks of a call in a format that none of the families here writes."""
_FOREIGN = re.compile(
    r"</?(?:tool_call|grounding|zoom)>|<function=|<loc_\d"
    r"|[\"']name[\"']\s?:\s?[\"'](?:[^\"'\n]{1,60}[\"']\s?,\s{0,8}[\"']arguments"
    rf"|[^\"'\n]{{0,60}}{_TOOL}[^\"'\n]{{0,60}}[\"']\s?,\s{{0,8}}[\"']parameters)[\"']\s?:"
)
"""A mark of a call in the format of one of the families."""


@dataclass(slots=True)
class ParsedReply:
    """The result of parsing so far."""

    calls: list[ToolCall] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)
    repairs: list[str] = field(default_factory=list)

    def parsed(self, *, thought: str = "", answer: str | None = None) -> Parsed:
        """Return the result; a reply without an answer, a call or a problem gets a problem."""
        if answer is None and not self.calls and not self.problems:
            self.problems.append(ONLY_THOUGHT if thought else EMPTY_REPLY)
        problems, repairs = list(dict.fromkeys(self.problems)), list(dict.fromkeys(self.repairs))
        return Parsed(thought=thought, answer=answer, calls=self.calls, problems=problems, repairs=repairs)

    def keep(self, limit: int) -> None:
        """Keep the first `limit` calls; further ones become a problem."""
        if len(self.calls) > limit:
            some = "call was" if limit == 1 else f"{limit} calls were"
            self.problems.append(f"Only the first {some} run: at most {limit} in a turn.")
            del self.calls[limit:]


@dataclass(frozen=True, slots=True)
class TagSpan:
    """A tagged part of a text: `text[start:end]` with its tags, `body` without them."""

    body: str
    raw: str
    start: int
    end: int
    closed: bool
    foreign: bool = False
    """A call in another format, which is not read: its numbers may be in another frame."""


def own_turn(text: str, repairs: list[str] | None = None) -> str:
    """Return what is the model's own in a reply: nothing after an invented result or a mark of the next turn.

    `repairs` takes what was left out.
    """
    notes = [] if repairs is None else repairs
    if len(text) > MAX_REPLY:
        notes.append(f"only the first {MAX_REPLY} of {len(text)} characters read")
    text = valid_unicode(text[:MAX_REPLY])
    echo = _ECHO.match(text)
    if echo:
        notes.append("head of the turn dropped")
        text = text[echo.end() :]
    mark = next((one for one in _MARK.finditer(text) if _ends_turn(one, text)), None)
    end = mark.start() if mark else len(text)
    called = _CALLED.search(text, 0, end)
    result = _RESULT.search(text, called.end(), end) if called else None
    mark = result or mark
    if mark is None:
        return text
    if text[mark.start() :].strip() not in _END_OF_TURN:
        notes.append(f"nothing read from {mark[0].strip()[:MAX_NAME]!r} on: results and turns are not the model's")
    return text[: mark.start()]


def _ends_turn(mark: re.Match[str], text: str) -> bool:
    """Return whether a mark stands where one ends a turn, and not where an answer quotes it or lists it."""
    start, end = mark.span()
    if mark[0] in _QUOTED:
        after = text[end : end + 80].lstrip(" \t")
        return text[start - 1 : start] in ("", "\n") or not after or after[0] in "<[\n"
    role = mark[0][0].isalpha()
    return not (role and text[max(0, start - 2) : start] == ":\n")


def without_marks(text: str) -> str:
    """Return a text of a tool as valid Unicode, with the marks of turns and images in it broken up."""
    return _MARK.sub(lambda mark: f"{mark[0][0]} {mark[0][1:]}", valid_unicode(text))


def cut_off(text: str, *, limit: int) -> Parsed:
    """Return the reading of a reply that ended at its limit of tokens: never an answer or a call."""
    problem = (
        f"The reply was cut off at its limit of {limit} tokens, so nothing in it was read. Be shorter: give an answer "
        "or a call after at most a few sentences."
    )
    return Parsed(thought=own_turn(text).strip(), problems=[problem])


@cache
def tag(name: str) -> re.Pattern[str]:
    """Return a pattern of `<name>` and `</name>`; group 1 is the slash."""
    return re.compile(rf"<\s{{0,8}}(/?)\s{{0,8}}{name}\s{{0,8}}>", re.IGNORECASE)


def spans(text: str, name: str, *, limit: int | None = None) -> list[TagSpan]:
    """Return the first `limit` spans opened by `<name>`; each ends at a closing or opening tag, or the text's end."""
    found: list[TagSpan] = []
    opening: re.Match[str] | None = None
    for mark in tag(name).finditer(text):
        closes = bool(mark[1])
        if opening is not None:
            start, end = opening.start(), mark.end() if closes else mark.start()
            found.append(TagSpan(text[opening.end() : mark.start()], text[start:end], start, end, closes))
        opening = None if closes else mark
        if len(found) == limit:
            return found
    if opening is not None:
        found.append(TagSpan(text[opening.end() :], text[opening.start() :], opening.start(), len(text), False))
    return found


def foreign_call(text: str, *, known: bool = True) -> list[TagSpan]:
    """Return a call in another format, without its body.

    Args:
        text: The text, without calls in the format that is read.
        known: Look for the formats of other families here too.
    """
    marks = [mark.start() for one in (*_WRAPPED, *([_FOREIGN] if known else [])) if (mark := one.search(text))]
    return [TagSpan("", text[min(marks) :], min(marks), len(text), True, foreign=True)] if marks else []


def outside(text: str, taken: Sequence[TagSpan]) -> str:
    """Return the text around these spans (in order, not overlapping), stripped and joined by newlines."""
    edges = [0, *(edge for span in taken for edge in (span.start, span.end)), len(text)]
    return _joined(*(text[start:end] for index, (start, end) in enumerate(pairwise(edges)) if index % 2 == 0))


def read_reply(
    text: str,
    *,
    find: Callable[[str, ParsedReply], list[TagSpan]],
    read: Callable[[TagSpan, ParsedReply], None],
    how: str,
    limit: int,
    mark: str | None,
) -> Parsed:
    """Parse a whole reply, first outside the thought (`<think>`), then, if nothing stands outside it, inside.

    1. `<answer>`: the answer; calls beside it are dropped and noted. One that is nothing but a call is a call.
    2. Calls, at most `limit`; other text is thought, and a `\\boxed{}` beside a call does not end the episode.
    3. Any other text: the answer, or the content of its `\\boxed{}`.

    Args:
        read: Adds a call to the result, or a problem.
        how: Description of a well-formed call, for a model that wrote another.
        limit: Calls served in one turn.
        mark: The family's way to mark an answer, "answer" or "boxed"; free text instead of it is noted. None: free
            text is the family's way.
    """
    reply = ParsedReply()
    thought, rest = split_thought(own_turn(text, reply.repairs))
    answers, blank = _answers(rest)
    inside = not answers and not outside(rest, blank)
    if inside:
        thought, rest = "", thought
        answers, blank = _answers(rest)
    held = _calls_in(answers[-1].body, find, read) if answers else []
    if held and not outside(answers[-1].body, held):
        reply.repairs.append("call read from inside <answer>")
        answers = []
    if answers:
        if inside:
            reply.repairs.append("read from inside the thought")
        if find(around := outside(rest, answers), ParsedReply()) or held:
            reply.repairs.append("call beside an answer not run")
        if not answers[-1].closed:
            reply.repairs.append("closing </answer> added")
        body = outside(answers[-1].body, held)
        return reply.parsed(thought=_joined(thought, around), answer=_boxed(body) or body)
    calls = find(rest, reply)
    if inside and calls:
        reply.repairs.append("read from inside the thought")
    if calls:
        for span in calls:
            if span.foreign:
                reply.problems.append(f"{FOREIGN_CALL} {how}")
            else:
                read(span, reply)
        reply.keep(limit)
        return reply.parsed(thought=_joined(thought, outside(rest, calls)))
    if inside:
        return reply.parsed(thought=rest.strip())
    return _free_text(reply, thought, _STRAY.sub("", rest).strip(), mark)


def _free_text(reply: ParsedReply, thought: str, free: str, mark: str | None) -> Parsed:
    """Return the reading of a text without a call or a tagged answer: it, or what its box holds, is the answer."""
    boxed = _boxed(free)
    if not boxed and _EMPTY_BOX.search(free):
        left = _EMPTY_BOX.sub("", free).strip()
        if mark == "boxed" or not left:
            return reply.parsed(thought=_joined(thought, left))
        free = left
    if free and (mark == "answer" or (mark == "boxed" and not boxed)):
        reply.repairs.append("free text taken as the answer")
    return reply.parsed(thought=_joined(thought, free) if boxed else thought.strip(), answer=boxed or free or None)


def _answers(text: str) -> tuple[list[TagSpan], list[TagSpan]]:
    """Return the `<answer>` spans with a body, and those without; where one is closed, none that is left open."""
    full, blank = list[TagSpan](), list[TagSpan]()
    for span in spans(text, "answer"):
        (full if _EMPTY_BOX.sub("", span.body).strip() else blank).append(span)
    return [span for span in full if span.closed] or full, blank


def _calls_in(
    body: str, find: Callable[[str, ParsedReply], list[TagSpan]], read: Callable[[TagSpan, ParsedReply], None]
) -> list[TagSpan]:
    """Return the calls in an answer, if they can be read; what only looks like one is part of the answer."""
    reply = ParsedReply()
    found = [span for span in find(body, reply) if not span.foreign]
    for span in found:
        read(span, reply)
    return found if reply.calls and not reply.problems else []


def split_thought(text: str) -> tuple[str, str]:
    """Return the thought (`<think>`) in a text, and the text around it."""
    first = tag("think").search(text)
    head = ""
    if first is not None and first[1]:
        head, text = text[: first.start()], text[first.end() :]
    thoughts = spans(text, "think")
    return _joined(head, *(span.body for span in thoughts)), outside(text, thoughts)


def _boxed(text: str) -> str:
    """Return the content of the last box that is not empty, braces balanced; empty if there is none."""
    for start in reversed(list(_BOXED.finditer(text))[-_BOXES_READ:]):
        inside = text[start.end() : start.end() + MAX_BOXED]
        held = (_in_braces(inside) if start[0][-1] == "{" else inside.partition(_BOX_END)[0]).strip()
        if held:
            styled = _STYLED.fullmatch(held)
            return styled[1].strip() if styled else held
    return ""


def _in_braces(text: str) -> str:
    """Return the text up to the brace that closes one opened before it."""
    depth, end = 1, 0
    while end < len(text) and depth:
        depth += {"{": 1, "}": -1}.get(text[end], 0)
        end += 1
    return text[: end - 1 if depth == 0 else end]


def _joined(*pieces: str) -> str:
    return "\n".join(stripped for piece in pieces if (stripped := piece.strip()))


def first_view(views: Sequence[View]) -> str:
    """Return the id of the first view shown."""
    return views[0].id if views else "coarse"
