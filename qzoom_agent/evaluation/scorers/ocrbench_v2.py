"""OCRBench v2: a rule for each type of question that needs no language model and no tree distance.

| type | worth |
|---|---|
| questions | a short answer stands in the reply; of one of five words (Chinese: four parts) the similarity from 0.5 |
| multiple choice | the letters of the reply are the answer |
| counting | the number is in the reply, or 1 - error / number, above a half |
| formulas | the formula stands in the reply, spaces apart |
| key information | share of the fields, the reply's and the right ones, that are equal |
| position | half for the answer, half for the IoU of the box |
| grounding | IoU of the last box |
| spotting | F1 of the boxes (IoU over a half) whose text is equal |

Boxes are in thousandths of the image. Full pages, tables, charts, documents and translations are scored elsewhere by
BLEU, METEOR and tree edit distances, which are not here.
"""

import ast
import json
import re
import warnings
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from functools import partial
from typing import Any, Final

from qzoom_agent.data.samples import Sample
from qzoom_agent.evaluation.scorers import choice, extraction, ocrbench
from qzoom_agent.evaluation.scorers.anls import levenshtein
from qzoom_agent.evaluation.scorers.ocrbench import formula, line
from qzoom_agent.evaluation.scorers.open_answer import compared
from qzoom_agent.evaluation.tasks.task import Score, lmms_eval, scorer
from qzoom_agent.geometry import Box

CHOICE: Final = "multiple choice"
CASE: Final = "case sensitive"
QUESTIONS: Final = (
    "APP agent en",
    "ASCII art classification en",
    "math QA en",
    "reasoning VQA en",
    "science QA en",
    "text recognition en",
    "document classification en",
    "cognition VQA en",
    "diagram QA en",
)
QUESTIONS_CN: Final = ("cognition VQA cn", "reasoning VQA cn")
FIELDS: Final = ("key information extraction en", "key information mapping en", "key information extraction cn")
POSITION: Final = "VQA with position en"
GROUNDING: Final = "text grounding en"
SPOTTING: Final = "text spotting en"
HANDWRITTEN: Final = "handwritten answer extraction cn"
_JOINTS: Final = ("", ".", ". ", ",", ", ", "、", ";", "; ", " ", "和")
_LONG: Final = 5
"""Words of an answer that is compared by edit distance."""
_LONG_CN: Final = 4
"""Parts between commas of such an answer in Chinese."""
_MOST_DIGITS: Final = 18
_FENCE: Final = re.compile(r"```(?:python|json)?\n", re.IGNORECASE)
_KEY: Final = re.compile(r"[\w\s]+")
_PAIR: Final = re.compile(r"""([\w\s]++)["']?\s*[:=]\s*["']?([^\n,"'{}]+)["']?""")
_FOUR: Final = re.compile(r"[(\[]" + ",".join([r"\s*(\d{1,9})\s*"] * 4) + r"[)\]]")
_GROUP: Final = re.compile(r"[\[(]([^\[\]()]*)[\])]")
_TEXT_TAG: Final = re.compile(r"\\text\{([^{}]*)\}")
_QUOTED: Final = re.compile(r'\s*"(.*)"\s*')
_EDGES: Final = "!?.:,*\"()·[]/'"
"""Characters that may be missing at either end of a spotted text."""
_SPAN: Final = 1000


@scorer(lmms_eval("tasks/ocrbench_v2/utils.py: ocrbench_v2_process_results"))
def faithful(text: str, sample: Sample) -> Score:
    """Score the whole reply by the public rule of the question's type.

    Traps: a reply that lists every text is right, and so is "2012" where "12" was asked for; a count in words is none;
    "The answer is B" is no choice. Where the public code fails with an error, the reply is worth 0.
    """
    return Score(_worth(text, sample), text)


@scorer()
def clean(text: str, sample: Sample) -> Score:
    """Score the final answer by the same rules; choices by `choice.clean`, short English answers as whole words.

    Boxes and fields are read from the last `<answer>` or, where there is none, from the whole reply.
    """
    if sample.options:
        return choice.clean(text, sample)
    if "gold" in sample.meta:
        reply = extraction.without_thinking(text).rpartition("<answer>")[2].partition("</answer>")[0]
        return Score(_worth(reply, sample), reply.strip() or None)
    if sample.kind in QUESTIONS and all(len(gold.split()) < _LONG for gold in sample.answers):
        return ocrbench.clean(text, sample)
    return compared(text, sample, lambda said, golds: _worth(said, replace(sample, answers=tuple(golds))))


def _worth(said: str, sample: Sample) -> float:
    return RULES.get(sample.kind, _question)(said, sample)


def _question(said: str, sample: Sample, *, chinese: bool = False) -> float:
    way = sample.meta.get("eval")
    if way == CHOICE:
        return float("".join(filter(str.isalpha, said)) == sample.answers[0])
    if way == CASE:
        return _similar(said, sample.answers, _plain)
    return _similar(said, sample.answers, _joined if chinese else line, chinese=chinese)


def _similar(said: str, golds: Sequence[str], form: Callable[[str], str], *, chinese: bool = False) -> float:
    """Return 1 if a short answer stands in the reply, else the similarity to the nearest long one."""
    best, reply = 0.0, form(said)
    for meant in map(form, golds):
        if len(meant.split(",")) < _LONG_CN if chinese else len(meant.split()) < _LONG:
            best = max(best, float(meant in reply))
        else:
            longest = max(len(reply), len(meant))
            # Texts of very different lengths are no answer whatever they say: a long reply costs nothing.
            if 2 * abs(len(reply) - len(meant)) <= longest:
                near = 1 - levenshtein(reply, meant) / longest
                best = max(best, near if near >= 0.5 else 0.0)
    return best


def _count(said: str, sample: Sample) -> float:
    golds = [line(gold) for gold in sample.answers]
    if sample.meta.get("eval") == "exact match":
        return float(any(gold in said for gold in golds))
    found = re.search(r"\d+", said)
    if sample.meta.get("eval") != "regression" or found is None or len(found[0]) > _MOST_DIGITS:
        return 0.0
    number = int(found[0])
    near = [1 - abs(number - int(gold)) / int(gold) for gold in golds if gold.isdecimal() and int(gold)]
    return max((one for one in near if one > 0.5), default=0.0) if number else 0.0


def _formula(said: str, sample: Sample, *, tags: bool = True) -> float:
    said, *golds = (formula(one if tags else _TEXT_TAG.sub(r"\1", one)) for one in (said, *sample.answers))
    return float(any(gold in said for gold in golds))


def _handwritten(said: str, sample: Sample) -> float:
    return float(any(joint.join(sample.answers[0]) in said for joint in _JOINTS))


def _fields(said: str, sample: Sample) -> float:
    gold: Any = sample.meta["gold"]
    told = _pairs(said)
    names = {*gold, *told}
    right = sum(_joined(told[name]) in map(_joined, gold.get(name, ())) for name in told)
    return right / len(names) if names else 0.0


def _position(said: str, sample: Sample) -> float:
    told = _pairs(said)
    gold: Any = sample.meta["gold"]
    answer = _similar(told["answer"], gold["answers"], line) if "answer" in told else 0.0
    box = 0.0
    with suppress(TypeError, ValueError, OverflowError, KeyError):  # no box was written
        box = _iou(_literal(told.get("bbox", ""))[:4], gold["bbox"])
    return (answer + box) / 2


def _grounding(said: str, sample: Sample) -> float:
    boxes = [corners for found in _FOUR.finditer(said) if max(corners := [*map(int, found.groups())]) <= _SPAN]
    gold: Any = sample.meta["gold"]
    return _iou(boxes[-1], gold) if boxes else 0.0


def _iou(corners: Sequence[Any], gold: Sequence[int]) -> float:
    (x1, y1, x2, y2), (left, top, right, bottom) = map(int, corners), gold
    return Box(x1, y1, x2, y2).iou(Box(left, top, right, bottom))


def _spotting(said: str, sample: Sample) -> float:
    meant: Any = sample.meta["gold"]
    every = [(Box(*corners), _unquoted(text)) for *corners, text in meant]
    golds, ignored = ([one for one in every if (one[1] == "###") is skip] for skip in (False, True))
    told = [
        (box, _unquoted(text))
        for x1, y1, x2, y2, text in _spotted(said)
        if (box := Box(x1, y1, x2, y2)).area and not any(other.coverage(box) > 0.5 for other, _ in ignored)
    ]
    taken: set[int] = set()
    right = 0
    for gold, text in golds:
        at = next((at for at, (box, _) in enumerate(told) if at not in taken and box.iou(gold) > 0.5), None)
        if at is not None:
            taken.add(at)
            right += _same_text(text.upper(), told[at][1].upper())
    return 2 * right / (len(golds) + len(told)) if right else 0.0


def _same_text(gold: str, said: str) -> bool:
    """Compare two texts; the gold may have one more punctuation mark at either end."""
    start, end = gold[:1] in _EDGES, gold[-1:] in _EDGES
    forms = {gold} | ({gold[1:]} if start else set()) | ({gold[:-1]} if end else set())
    return said in forms | ({gold[1:-1]} if start and end else set())


def _spotted(said: str) -> list[tuple[int, int, int, int, str]]:
    """Return the boxes and texts that a reply lists, each once; boxes beyond the image are none."""
    try:
        data = _literal(said)
        listed = [item for item in data if isinstance(item, list | tuple)] if isinstance(data, list | tuple) else []
    except ValueError:
        listed = [group.split(",", 4) for group in _GROUP.findall(said)]
    found: dict[tuple[int, int, int, int, str], None] = {}
    for item in listed:
        try:
            x1, y1, x2, y2 = (int(str(number).strip()) for number in item[:4])
            text = str(item[4]).replace("\n", "").strip().strip('"').strip("'")
        except (ValueError, IndexError):
            continue
        if all(0 <= number <= _SPAN for number in (x1, y1, x2, y2)):
            found[x1, y1, x2, y2, text] = None
    return list(found)


def _pairs(said: str) -> dict[str, str]:
    """Return the fields of a reply: JSON, a Python dict, or "name: value" pairs, in a code fence or without."""
    fence = _FENCE.search(said)
    end = said.find("\n```", fence.end()) if fence else -1
    said = said[fence.end() : end] if fence and end >= 0 else said.strip()
    data: Any = None
    for read in (json.loads, _literal):
        try:
            data = read(said)
            break
        except (ValueError, RecursionError):
            continue
    if data is None:
        data = _written_pairs(said)
    if not isinstance(data, Mapping) or not all(isinstance(name, str) for name in data):
        return {}
    return {name.strip(): str(value).strip() for name, value in data.items()}


def _written_pairs(said: str) -> dict[str, str]:
    # The public pattern is tried at every character; a name can only begin where a run of such characters does.
    found, at = {}, 0
    while run := _KEY.search(said, at):
        pair = _PAIR.match(said, run.start())
        if pair:
            found[pair[1].strip()] = pair[2].strip()
        at = pair.end() if pair else run.end()
    return found


def _literal(text: str) -> Any:
    """Return the Python value that a text writes; raise ValueError if it is none."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return ast.literal_eval(text)
    except (SyntaxError, TypeError, MemoryError, RecursionError) as error:
        raise ValueError(f"not a Python value: {error}") from None


def _unquoted(text: str) -> str:
    found = _QUOTED.fullmatch(text)
    return found[1].replace("\\\\", "\\").replace('\\"', '"') if found else text


def _plain(text: str) -> str:
    return text.strip().replace("\n", " ")


def _joined(text: str) -> str:
    return formula(text.lower())


RULES: Final[Mapping[str, Callable[[str, Sample], float]]] = {
    **dict.fromkeys(QUESTIONS, _question),
    **dict.fromkeys(QUESTIONS_CN, partial(_question, chinese=True)),
    **dict.fromkeys(FIELDS, _fields),
    "text counting en": _count,
    "formula recognition en": _formula,
    "formula recognition cn": partial(_formula, tags=False),
    HANDWRITTEN: _handwritten,
    POSITION: _position,
    GROUNDING: _grounding,
    SPOTTING: _spotting,
}
"""The rule of each type that is scored."""
