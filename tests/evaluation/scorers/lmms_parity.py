"""The real scorers of lmms-eval beside our `faithful` ones, on generated replies: `.ci/lmms_eval [VENV]`.

Called with the Python of an environment that has lmms-eval, it writes 5,000 replies a suite, scores them here and
there, and prints how many scores differ, with the first of them. Exit status 0: none does.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from random import Random
from tempfile import TemporaryDirectory
from typing import Any, Final

from PIL import Image

from qzoom_agent.data.samples import Sample
from qzoom_agent.evaluation.tasks.catalog import TASKS
from qzoom_agent.evaluation.tasks.task import public_rule

REPLIES: Final = 5_000
SEED: Final = 0
SUITES: Final = (
    "vstar", "hrbench-4k", "mme-realworld", "xlrs-lite", "docvqa", "infovqa", "chartqa", "textvqa", "ocrbench",
    "ocrbench formulas",
)  # fmt: skip
TYPES: Final = {
    "ocrbench-v2 english": ("cognition VQA en", "None"),
    "ocrbench-v2 case": ("text recognition en", "case sensitive"),
    "ocrbench-v2 chinese": ("reasoning VQA cn", "None"),
    "ocrbench-v2 formula": ("formula recognition en", "None"),
    "ocrbench-v2 count": ("text counting en", "regression"),
    "ocrbench-v2 ground": ("text grounding en", "None"),
}
"""Type and way of scoring of the questions of a suite."""
OPTIONS: Final = ("red", "the left one", "12", "A bus", "dark red")
PHRASES: Final = (
    "The best answer is", "The answer is", "The correct option is", "Best answer:", "Best option:", "Answer:", "option",
    "Sorry, I can't help with images of people yet.", "Cannot determine the answer", "Failed to obtain answer via API",
    "<answer>", "</answer>", "Based on the crop", "Definitely", "Z", "A man", "because", "or", "not", "**", r"\boxed{",
)  # fmt: skip
WORDS: Final = (
    "yes", "Yes.", "no", "12", "12.4", "12.40", "1,000", "1000", "5%", "5 %", "0", "0.0", "2019", "-3", "nan",
    "inf", "1e3", "the cat", "A Cat", "two", "it's", "don't", "dont", "7-eleven", "U.S.A.", "(left)", "a/b",
    "x^{2}", "x ^ { 2 }", "X", "+ y", "\uff21\uff22", "\uff11\uff12", "\u3000", "Stra\xdfe", "\u0130", "caf\xe9",
    "$5", "?", "!", ",", ".", "\n", "\t", "  ", "none", "None", "ten", "somebody'd", "yes,no", "\u4e2d\u6587", "_",
    "@", ";",
)  # fmt: skip
CHILD: Final = """
import json, sys
from lmms_eval.api.metrics import anls
from lmms_eval.tasks.chartqa.utils import relaxed_correctness
from lmms_eval.tasks.hrbench.hrbench_evals import HRBenchEval
from lmms_eval.tasks.mme_realworld.utils import extract_characters_regex
from lmms_eval.tasks.ocrbench.utils import ocrbench_process_results
from lmms_eval.tasks.ocrbench_v2 import IoUscore_metric as iou, vqa_metric as vqa
from lmms_eval.tasks.textvqa.utils import textvqa_process_results
from lmms_eval.tasks.vstar_bench.utils import extract_answer_letter
from lmms_eval.tasks.xlrs.mcq_utils import extract_characters_regex as xlrs_letters
hr = HRBenchEval(api_key="")
def score(row):
    suite, reply, golds, options = row["suite"], row["reply"], row["golds"], row["options"]
    if suite == "vstar":
        return float(extract_answer_letter(reply) == golds[0])
    if suite == "hrbench-4k":
        return float(hr.can_infer(reply.strip(), dict(zip("ABCDE", options))) == golds[0])
    if suite == "mme-realworld":
        said, gold = extract_characters_regex(reply).lower(), golds[0].lower()
        return float(said == gold or gold in said)
    if suite == "xlrs-lite":
        return float(set(xlrs_letters(reply)) == set(golds[0]))
    if suite == "ocrbench-v2 english":
        return float(vqa.vqa_evaluation(reply, golds))
    if suite == "ocrbench-v2 case":
        return float(vqa.vqa_evaluation_case_sensitive(reply, golds))
    if suite == "ocrbench-v2 chinese":
        return float(vqa.cn_vqa_evaluation(reply, golds))
    if suite == "ocrbench-v2 formula":
        return float(vqa.math_expression_evaluation(reply, golds))
    if suite == "ocrbench-v2 count":
        return float(vqa.counting_evaluation(reply, golds, "regression"))
    if suite == "ocrbench-v2 ground":
        box = iou.extract_coordinates(reply)
        return float(iou.calculate_iou(box, golds) if box else 0)
    if suite in ("docvqa", "infovqa"):
        return float(anls(references=golds, predictions=[reply])["anls"])
    if suite == "chartqa":
        return float(relaxed_correctness(reply, golds[0]))
    if suite == "textvqa":
        return float(textvqa_process_results({"answers": list(golds), "question_id": 0}, [reply])["exact_match"])
    doc = {"answer": golds, "dataset": row["dataset"], "question_type": row["kind"]}
    return float(ocrbench_process_results(doc, [reply])["ocrbench_accuracy"]["score"])
rows = [json.loads(line) for line in open(sys.argv[1], encoding="utf-8")]
json.dump([score(row) for row in rows], open(sys.argv[2], "w"))
"""


def generated(suite: str, count: int = REPLIES) -> list[dict[str, Any]]:
    """Return the first `count` questions and replies of one suite."""
    random = Random(f"{SEED} {suite}")
    choice = suite in ("vstar", "hrbench-4k", "mme-realworld", "xlrs-lite")
    kind, way = TYPES.get(suite, ("Regular Text Recognition", "None"))
    rows = []
    for _ in range(count):
        if choice:
            letters = "ABCDE"[: 5 if suite == "mme-realworld" else 4]
            golds = [random.choice(letters)]
            write: tuple[Callable[[], str], ...] = (
                lambda letters=letters: random.choice(("{}", "({})", "{}.", "**{}**", "{}:", "[{}]")).format(
                    random.choice(letters + letters.lower())
                ),
                lambda: random.choice(PHRASES),
                lambda: random.choice(OPTIONS),
                lambda: random.choice(WORDS),
            )
            reply = " ".join(random.choice(write)() for _ in range(random.choice((0, 1, 1, 1, 2, 2, 3, 5, 12))))
        elif suite in ("ocrbench-v2 count", "ocrbench-v2 ground"):
            golds = [str(random.randrange(1, 40)) for _ in range(1 if suite.endswith("count") else 2)]
            golds += [str(int(number) + random.randrange(1, 40)) for number in golds] if len(golds) > 1 else []
            told = [str(max(0, int(number) + random.randrange(-4, 5))) for number in golds]
            box = random.choice(("({})", "[{}]", "{}", "({}]", "({}) or (1, 2, 3, 2000)")).format(", ".join(told))
            reply = random.choice((box, box, f"{_words(random)} {box}", _words(random)))
        else:
            text = " ".join(_words(random) for _ in range(random.choice((1, 1, 4)) if suite in TYPES else 1))
            golds = [text, *(_words(random) for _ in range(random.choice((0, 0, 1, 9))))]
            golds = golds[:1] if suite == "chartqa" else golds + golds[:1] * random.randrange(4)
            reply = random.choice((text, text, _changed(random, text), _changed(random, text), _words(random)))
            reply = random.choice(("{}", "{}", "{}", " {}", "{} ", "The answer is {}.", "{}%")).format(reply)
        rows.append(
            {
                "suite": suite,
                "reply": reply,
                "golds": golds,
                "options": OPTIONS[: 5 if suite == "mme-realworld" else 4] if choice else [],
                "dataset": "HME100k" if suite.endswith("formulas") else "IIIT5K",
                "kind": kind,
                "meta": {"eval": way, "gold": list(map(int, golds)) if suite.endswith("ground") else []},
            }
        )
    return rows


def _words(random: Random) -> str:
    return random.choice(("", " ")).join(random.choice(WORDS) for _ in range(random.choice((1, 1, 2, 3))))


def _changed(random: Random, text: str) -> str:
    at = random.randrange(len(text) + 1)
    change = random.choice(
        (str.upper, str.lower, str.strip, lambda one: one[:at] + one[at + 1 :], lambda one: one[::-1])
    )
    return str(change(text))


def ours(row: dict[str, Any], name: str = "faithful") -> float:
    """Return the score of a row by a scorer of ours."""
    sample = Sample(
        id="1",
        task=row["suite"],
        kind=row["kind"],
        image=Image.new("RGB", (1, 1)),
        question="?",
        answer=row["golds"][0],
        answers=tuple(row["golds"]),
        options=tuple(row["options"]),
        meta={"dataset": row["dataset"], **row["meta"]},
    )
    scorer = TASKS[row["suite"].split()[0]].scorers[name]
    found = scorer(row["reply"], sample)
    return float(getattr(found, "value", found))


def main(python: str) -> int:
    suites = (*SUITES, *TYPES)
    rows = [row for suite in suites for row in generated(suite)]
    with TemporaryDirectory() as folder:
        asked, answered = Path(folder) / "rows.jsonl", Path(folder) / "scores.json"
        asked.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
        subprocess.run([python, "-c", CHILD, str(asked), str(answered)], check=True, cwd=folder)
        theirs = json.loads(answered.read_text(encoding="utf-8"))
    version = "import importlib.metadata as m; print(m.version('lmms-eval'))"
    found = subprocess.run([python, "-c", version], check=True, capture_output=True, text=True).stdout.strip()
    rule = public_rule(TASKS["vstar"].scorers["faithful"])
    print(f"lmms-eval {found}; the scorers repeat {rule.version if rule else None}")
    wrong = 0
    for suite in suites:
        pairs = [(row, ours(row), score) for row, score in zip(rows, theirs, strict=True) if row["suite"] == suite]
        differ = [(row, one, other) for row, one, other in pairs if abs(one - other) > 1e-9]
        right = sum(other for _, _, other in pairs) / len(pairs)
        print(f"{suite:20} n {len(pairs)}  mean score {right:.3f}  differences {len(differ)}")
        for row, one, other in differ[:5]:
            print(f"  {row['reply']!r} for {row['golds']!r}: {one} here, {other} there")
        wrong += len(differ)
    return int(wrong > 0 or (rule is not None and rule.version != found))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
