"""2,000 replies that models write, or could: a deterministic generator, shared by tests and by nothing else.

Nearly 300 are written by hand, one for each way we know a reply to go wrong, in the clothes of each family. The rest
are seeds (well-formed replies of all families) put through one to four random mutations: cut, doubled, swapped or
spliced pieces, swapped brackets and quotes, injected marks, changed numbers. `random.Random(seed)` is the only source
of chance.
"""

import random
from collections.abc import Iterator

COUNT = 2000
LONG = 20_000

BOXES = (
    "[100, 200, 300, 400]",
    "[100,200,300,400,]",
    "[300, 400, 100, 200]",
    "[0.1, 0.2, 0.3, 0.4]",
    "[.1, .2, .3, .4]",
    "[-50, -20, 5000, 9999]",
    "[100, 200, 300]",
    "[100, 200, 300, 400, 500]",
    "[]",
    "[[100, 200, 300, 400]]",
    "[[100, 200], [300, 400]]",
    "[[1, 2, 3, 4], [5, 6, 7, 8]]",
    '["100", "200", "300", "400"]',
    '["a", "b", "c", "d"]',
    '"[100, 200, 300, 400]"',
    '"100 200 300 400"',
    '"100,200,300"',
    '{"x1": 100, "y1": 200, "x2": 300, "y2": 400}',
    '{"xmin": 100, "ymin": 200, "xmax": 300, "ymax": 400}',
    '{"left": 1, "top": 2, "right": 3, "bottom": 4}',
    '{"x": 1, "y": 2, "w": 3, "h": 4}',
    "{}",
    "null",
    "None",
    "true",
    "[true, false, true, false]",
    "[null, null, null, null]",
    "[NaN, NaN, NaN, NaN]",
    "[Infinity, -Infinity, 1, 2]",
    "[1e999, 2, 3, 4]",
    "[1e308, 1e308, -1e308, 2]",
    "[" + "9" * 400 + ", 1, 2, 3]",
    "[" + "9" * 5000 + ", 1, 2, 3]",
    "[0x10, 0x20, 0x30, 0x40]",
    "[100 200 300 400]",
    "[100; 200; 300; 400]",
    "(100, 200, 300, 400)",
    "[100, 200, 300, 400",
    "100, 200, 300, 400]",
    "[1+1, 2*3, 300, 400]",
    "[__import__('os').getcwd(), 2, 3, 4]",
    "[007, 08, 09, 10]",
    "[1_000, 2_000, 3_000, 4_000]",
    "[100., 200., 300., 400.]",
    "[0, 0, 0, 0]",
    "[5, 5, 5, 5]",
    "[100, 200, 300, 400]" * 3,
    "[[[[100, 200, 300, 400]]]]",
    "<box>100 200 300 400</box>",
    "[\u0661\u0660\u0660, 2, 3, 4]",
    "[\uff11\uff10\uff10, 2, 3, 4]",
)
INDICES = (
    "0",
    "1",
    "2",
    "-1",
    "7",
    '"0"',
    '"first"',
    "0.0",
    "1.5",
    "null",
    "[0]",
    "true",
    "1e400",
    "99999999999999999999",
)
SOURCES = (
    '"original_image"',
    '"observation_1"',
    '"observation_0"',
    '"observation_9"',
    '"observation_"',
    '"Observation 1"',
    '"image"',
    "1",
    "null",
    '["original_image"]',
    "original_image",
)
NAMES = (
    "image_zoom_in_tool",
    "crop_image_normalized",
    "crop_image",
    "request_local_region",
    "resize_image",
    "image_rotate_tool",
    "select_frames",
    "IMAGE_ZOOM_IN_TOOL",
    "",
    "zoom\u0000",
    "x" * 300,
    "os.system",
)
PROSE = (
    "",
    " ",
    "\n\n\t  \n",
    "\u00a0\u2003\u200b",
    "\ufeff",
    "A",
    "The sign says STOP.",
    "Zoom in on the sign to see that it says STOP.",
    "zoom",
    "ZOOM",
    "ZOOM:",
    "ZOOM: here",
    "ZOOM: 1, 2, 3",
    "ZOOM: 1, 2, 3, 4, 5",
    "ZOOM: 100, 200, 300, 400",
    "**ZOOM: [100, 200, 300, 400]**",
    "- zoom (100 200 300 400)",
    "> Zoom: 300, 400, 100, 200",
    "ZOOM: 1,2,3,4\nZOOM: 5,6,7,8\nZOOM: 9,10,11,12",
    "ZOOM: nan, nan, nan, nan",
    "ZOOM: " + "9" * 400 + ", 1, 2, 3",
    "Answer:",
    "Answer: ",
    "**Answer:** B",
    "Final answer: \\boxed{B}",
    "\\boxed{}",
    "\\boxed{B",
    "\\boxed{\\text{the red car}}",
    "\\boxed{\\frac{1}{2}}",
    "\\boxed{" * 50,
    "\\boxed{A} or \\boxed{B}",
    "<answer>B</answer>",
    "<answer>B",
    "B</answer>",
    "<answer></answer>",
    "<answer>   </answer>",
    "<answer>A</answer><answer>B</answer>",
    "<ANSWER>B</ANSWER>",
    "< answer >B</ answer >",
    "<answer><answer>B</answer></answer>",
    "<answer>B</answer><answer></answer>",
    "</answer>B<answer>",
    "<think>",
    "</think>",
    "<think></think>",
    "<think>I wonder",
    "I wonder</think>B",
    "I wonder</think>",
    "<think>a</think><think>b</think>",
    "<think>a<think>b</think>c</think>d",
    "<think><answer>B</answer></think>",
    "<think>unsure <answer>B",
    "<think>a</think>\n\nThe answer is B.",
    "</think></think></think>",
    "<|im_end|>",
    "B<|im_end|>\n<|im_start|>user\nWhat else?",
    "<|im_start|>assistant\nB<|im_end|>",
    "<tool_call>",
    "</tool_call>",
    "<tool_call></tool_call>",
    "<tool_call>\n\n</tool_call>",
    "<tool_call><tool_call><tool_call>",
    "</tool_call><tool_call>",
    "<tool_call>zoom please</tool_call>",
    "<tool_call>{</tool_call>",
    "<tool_call>}</tool_call>",
    "<tool_call>[</tool_call>",
    "<tool_call>]</tool_call>",
    "<tool_call>{}</tool_call>",
    "<tool_call>[]</tool_call>",
    "<tool_call>[[]]</tool_call>",
    "<tool_call>null</tool_call>",
    "<tool_call>42</tool_call>",
    '<tool_call>"image_zoom_in_tool"</tool_call>',
    "<tool_call>[1, 2, 3, 4]</tool_call>",
    '<tool_call>{"name": null, "arguments": null}</tool_call>',
    '<tool_call>{"name": 5, "arguments": 6}</tool_call>',
    '<tool_call>{"name": [], "arguments": []}</tool_call>',
    '<tool_call>{"name": {"name": {}}, "arguments": {}}</tool_call>',
    '<tool_call>{"function": {"name": "image_zoom_in_tool", "arguments": "{\\"bbox_2d\\": [1, 2, 3, 4]}"}}</tool_call>',
    '<tool_call>{"function": "zoom_in", "bbox_2d": [1, 2, 3, 4], "label": "x"}</tool_call>',
    '<tool_call>{"": ""}</tool_call>',
    '<tool_call>{"name"}</tool_call>',
    "<tool_call>{:}</tool_call>",
    "<tool_call>{,,,}</tool_call>",
    "<tool_call>{name: image_zoom_in_tool, arguments: {bbox_2d: [1, 2, 3, 4]}}</tool_call>",
    "<grounding>",
    "</grounding>",
    "<grounding></grounding>",
    "<grounding>{}</grounding>",
    "<grounding>[0.1, 0.2, 0.3, 0.4]</grounding>",
    "<grounding>original_image</grounding>",
    "<zoom>",
    "</zoom>",
    "<zoom></zoom>",
    "<zoom><loc_1><loc_2><loc_3><loc_4></zoom>",
    "<zoom><loc_1><loc_2><loc_3></zoom>",
    "<zoom><loc_1><loc_2><loc_3><loc_4><loc_5></zoom>",
    "<zoom><loc_1><loc_2><loc_3><loc_4>",
    "<zoom>1 2 3 4</zoom>",
    "<zoom>1, 2, 3, four</zoom>",
    "<zoom><loc_a><loc_b><loc_c><loc_d></zoom>",
    "<zoom><loc_-1><loc_2><loc_3><loc_4></zoom>",
    "<zoom><loc_" + "9" * 500 + "><loc_1><loc_2><loc_3></zoom>",
    "<zoom><zoom><loc_1><loc_2><loc_3><loc_4></zoom></zoom>",
    "<loc_1><loc_2><loc_3><loc_4>",
    "<function=image_zoom_in_tool></function>",
    "<function=image_zoom_in_tool><parameter=bbox_2d>[1, 2, 3, 4]</parameter></function>",
    "<tool_call><function=></function></tool_call>",
    "<tool_call><function=f><parameter=></parameter></function></tool_call>",
    "<tool_call><function=image_zoom_in_tool><parameter=bbox_2d>[1, 2, 3, 4]</function></tool_call>",
    "<tool_call><function=image_zoom_in_tool><parameter=bbox_2d>[1, 2, 3, 4]",
    "<tool_call><function=image_zoom_in_tool><parameter=bbox_2d>1, 2, 3, 4</parameter></function></tool_call>",
    '<tool_call><function="image_zoom_in_tool"><parameter="bbox_2d">[1, 2, 3, 4]</parameter></tool_call>',
    "<code>\n```python\nimport os\n```\n</code>",
    "```json\n[1, 2, 3, 4]\n```",
    '{"thought": "t", "actions": [{"name": "Terminate", "arguments": {"ans": "B"}}]}',
    '[{"bbox_2d": [1, 2, 3, 4], "label": "car"}]',
    "\u0000",
    "\x1b[31mred\x1b[0m",
    "\ud800",
    "\udfff\ud800",
    "<answer>\ud83d</answer>",
    "\U0001f600",
    "\u202e\u2066 reversed \u2069",
    "\u7ea2\u8272",
    "%s %d {0} {answer} %(x)s",
    "{{}} {action} {observation}",
    "${IFS}`id`$(id)",
    "<script>alert(1)</script>",
    "<!-- comment --><![CDATA[ x ]]>",
    "\\",
    "\\u0000\\ud800\\x",
    "nan",
    "None",
    "0",
)
FLOODS = (
    "<tool_call>",
    "</tool_call>",
    "<grounding>",
    "<zoom>",
    "<think>",
    "</think>",
    "<answer>",
    "</answer>",
    "<answer>a</answer>",
    "<function=f>",
    "<parameter=p>",
    "ZOOM: 1, 2, 3, 4\n",
    "zoom ",
    "\\boxed{",
    "[",
    "{",
    '{"name": "image_zoom_in_tool", ',
    '"bbox_2d"',
    "image_zoom_in_tool",
    '"',
    "'",
    "' ",
    "\\",
    "9",
    "9.",
    ".",
    "-",
    "1e",
    "< ",
    "<",
    " ",
    "\n",
    "\u201c",
    "a",
    "\ud800",
)


def _call(name: str, arguments: str) -> str:
    return '<tool_call>{"name": "' + name + '", "arguments": {' + arguments + "}}</tool_call>"


def _dressed(box: str, index: str, source: str) -> list[str]:
    """One box in the clothes of each family."""
    return [
        _call("image_zoom_in_tool", f'"bbox_2d": {box}, "label": "sign", "img_idx": {index}'),
        _call("crop_image_normalized", f'"bbox_2d": {box}, "target_image": {index}'),
        _call("request_local_region", f'"bbox_2d": {box}'),
        f'<grounding>{{"bbox_2d": {box}, "source": {source}}}</grounding>',
        f"<tool_call>\n<function=image_zoom_in_tool>\n<parameter=bbox_2d>\n{box}\n</parameter>\n"
        f"<parameter=img_idx>\n{index}\n</parameter>\n</function>\n</tool_call>",
        f"ZOOM: {box}",
        f"<zoom>{box}</zoom>",
    ]


def _by_hand() -> Iterator[str]:
    yield from PROSE
    for place, box in enumerate(BOXES):
        yield _dressed(box, "0", '"original_image"')[place % 7]
    for place, index in enumerate(INDICES):
        yield _dressed("[10, 20, 30, 40]", index, '"original_image"')[(0, 1, 4)[place % 3]]
    for source in SOURCES:
        yield _dressed("[0.1, 0.2, 0.3, 0.4]", "0", source)[3]
    for name in NAMES:
        yield _call(name, '"bbox_2d": [1, 2, 3, 4]')
    for flood in FLOODS:
        yield flood * (LONG // len(flood))
    whole = _dressed("[10, 20, 30, 40]", "0", "0")[0]
    yield whole * 500
    yield whole + "<answer>B</answer>"
    yield "<answer>B</answer>" + whole
    yield f"<think>{whole}</think>"
    yield f"<think>{whole}</think>The sign says STOP."
    yield f"<think>{whole}"
    yield whole + "<tool_response>fake</tool_response>The sign says STOP."
    yield whole.replace("<tool_call>", "<tools>").replace("</tool_call>", "</tools>")
    yield whole.replace("</tool_call>", "<tool_call>")
    yield whole.replace('"', "'")
    yield whole.replace('"', "\u201c")
    yield whole.replace("{", "```json\n{", 1) + "```"
    yield _call("image_zoom_in_tool", '"label": "' + "x" * LONG + '"')
    yield "<tool_call>" + "[" * 5000 + "]" * 5000 + "</tool_call>"
    yield "<tool_call>" + '{"a":' * 2000 + "1" + "}" * 2000 + "</tool_call>"


def _seeds() -> list[str]:
    boxes = ("[100, 200, 300, 400]", "[0.1, 0.2, 0.3, 0.4]", "[12, 30, 440, 331]")
    found = [reply for box in boxes for reply in _dressed(box, "1", '"original_image"')]
    found += ['<tool_call>{"name": "resize_image", "arguments": {"action": "resize"}}</tool_call>']
    found += ["<zoom><loc_84><loc_112><loc_140><loc_154></zoom>", "The red one."]
    found += [f"<think>Too small to read.</think>\n{reply}" for reply in found[:6]]
    found += [f"{found[0]}\n{found[0]}", "<think>Clear.</think><answer>B</answer>", "So it is \\boxed{B}."]
    return found


_MARKS = (
    *("<think>", "</think>", "<answer>", "</answer>", "<tool_call>", "</tool_call>", "<grounding>", "</grounding>"),
    *("<zoom>", "</zoom>", "{", "}", "[", "]", '"', "'", ",", ":", "\\", "\n", "NaN", "null", "None", "```json", "```"),
    *("\u201c", "\u2019", "\u0000", "\ud800", "\\boxed{", "<|im_end|>", "ZOOM:", "-", "1e999", " ", "<", ">", "/"),
)
_TRADES = (
    ('"', "'"),
    ("{", "["),
    ("]", "}"),
    (", ", " "),
    (":", "="),
    ("<", "&lt;"),
    ("0", "-0"),
    ("_", " "),
    ("}", ""),
)


def _mutated(reply: str, seeds: list[str], chance: random.Random) -> str:
    kind = chance.randrange(8)
    start, end = sorted(chance.randrange(len(reply) + 1) for _ in range(2))
    if kind == 0:
        return reply[:end]
    if kind == 1:
        return reply[start:]
    if kind == 2:
        return reply[:start] + reply[end:]
    if kind == 3:
        return reply[:end] + reply[start:]
    if kind == 4:
        return reply[:start] + chance.choice(_MARKS) + reply[start:]
    if kind == 5:
        other = chance.choice(seeds)
        return reply[:start] + other[chance.randrange(len(other)) :]
    if kind == 6:
        old, new = chance.choice(_TRADES)
        return reply.replace(old, new, chance.choice((1, 2, -1)))
    number = str(chance.choice((-1, 0, 1, 1000, 1001, 10**9, 10**18, 0.5, 1e-9, "x", "")))
    digits = [place for place, char in enumerate(reply) if char.isdigit()]
    if not digits:
        return reply + number
    place = chance.choice(digits)
    return reply[:place] + number + reply[place + 1 :]


def hostile_outputs(count: int = COUNT, *, seed: int = 0) -> list[str]:
    """`count` different replies; the hand-written ones come first, and the same arguments give the same list."""
    found = dict.fromkeys(_by_hand())
    chance = random.Random(seed)
    seeds = _seeds()
    while len(found) < count:
        reply = chance.choice(seeds)
        for _ in range(chance.randint(1, 4)):
            reply = _mutated(reply, seeds, chance) if reply else chance.choice(_MARKS)
        found[reply] = None
    return list(found)[:count]


def by_hand() -> list[str]:
    """The hand-written replies alone."""
    return list(dict.fromkeys(_by_hand()))
