"""Multiple choice about large images: HR-Bench, MME-RealWorld, HRScene and XLRS-Bench-lite.

HR-Bench 4K and 8K (Wang et al. 2024, arXiv 2408.15556): 200 questions, each asked four times with its options rotated,
so 800 rows that are not 800 independent questions: those of one question are a cluster. Prompt and figure: lmms-eval,
tasks/hrbench/utils.py. MME-RealWorld and its Lite subset (Zhang et al. 2024, arXiv 2408.13257): five options; a kind is
a class ("Perception/Remote Sensing"). Prompt, without its last space, and figures: lmms-eval,
tasks/mme_realworld/utils.py. HRScene (Zhang et al. 2025, arXiv 2504.18406): 25 sources, read from its table of real
images; the diagnostic grids are not here. XLRS-Bench-lite (Wang et al. 2025, arXiv 2503.23771): satellite images; the
60 questions about changes have two images and cannot be asked.

Images above the setting `max_pixels` are refused: XLRS-Bench needs 100,000,000, HRScene's largest 946,000,000.
"""

from collections.abc import Mapping, Sequence
from functools import partial
from statistics import fmean
from typing import Final

from qzoom_agent.data.columns import is_empty, texts
from qzoom_agent.data.options import bare, inline_options, letters_of
from qzoom_agent.data.rows import HubTable, Row
from qzoom_agent.evaluation.scorers import choice, high_resolution
from qzoom_agent.evaluation.scorers.open_answer import rule
from qzoom_agent.evaluation.tasks.public import Asked, Benchmark, grouped, one_letter, one_text, options_of
from qzoom_agent.evaluation.tasks.task import Scored

HR_BENCH_ROTATIONS: Final = 4
_HR_BENCH_INSTRUCTION: Final = "Answer the option letter directly."
_MME_INSTRUCTION: Final = (
    "Select the best answer to the above multiple-choice question based on the image. Respond with only the letter "
    "({letters}) of the correct option.\nThe best answer is:"
)
_HR_SCENE_INSTRUCTION: Final = (
    "Give answer in exact this format, <ans>ANSWER</ans>, no redundant words. For example: <ans>A</ans>."
)
_XLRS_SEVERAL: Final = "Land use classification/Overall Land use classification"
"""The category whose questions may have several right options."""
_XLRS_ONE_INSTRUCTION: Final = (
    "Select the best answer for the multiple-choice question based on the image. Only respond with the letter "
    "corresponding to the correct answer (A, B, C, D).\nThe answer is:"
)
_XLRS_SEVERAL_INSTRUCTION: Final = (
    "Select the best answer(s) for the multiple-choice question based on the image. There may be more than one "
    "correct option. Only respond with the letter(s) corresponding to the correct answer(s) (A, B, C, D), with "
    "multiple choices separated by spaces.The answer(s) is(are):"
)


def _ask_hr_bench(row: Row, answers: tuple[str, ...], *, name: str) -> Asked:
    number = int(row["index"]) // HR_BENCH_ROTATIONS
    options = tuple(str(row[column]) for column in "ABCD" if not is_empty(row[column]))
    shown = (f"{letter}. {option}" for letter, option in zip(letters_of(options), options, strict=True))
    return Asked(
        "\n".join((row["question"].strip(), *shown, _HR_BENCH_INSTRUCTION)),
        options=options,
        meta={"cycle": str(row["cycle_category"]), "question": number},
        cluster=f"{name}-{number}",
    )


def _ask_mme(row: Row, answers: tuple[str, ...]) -> Asked:
    shown = texts(row["multi-choice options"])
    letters = letters_of(shown)
    instruction = _MME_INSTRUCTION.format(letters=", ".join(letters[:-1]) + f", or {letters[-1]}")
    return Asked(
        "\n".join((f"{row['question']} The choices are listed below:", *shown, instruction)),
        options=tuple(map(bare, shown)),
        meta={"subtask": mme_subtask(row["l2-category"])},
    )


def mme_subtask(name: str) -> str:
    """Return the name in lower case; all attributes of a thing are one subtask, as in the public code."""
    name = name.lower()
    return f"{name.split('/')[0]}/attribute" if "attribute" in name else name


def _ask_hr_scene(row: Row, answers: tuple[str, ...]) -> Asked:
    question = row["question"].strip()
    return Asked(f"{question}\n{_HR_SCENE_INSTRUCTION}", options=options_of(answers, inline_options(question)))


def _ask_xlrs(row: Row, answers: tuple[str, ...]) -> Asked:
    shown, several = texts(row["multi-choice options"]), row["category"] == _XLRS_SEVERAL
    instruction = _XLRS_SEVERAL_INSTRUCTION if several else _XLRS_ONE_INSTRUCTION
    return Asked(
        "\n".join((f"{row['question'].strip()} The choices are listed below:", *shown, "", instruction)),
        options=tuple(map(bare, shown)),
        meta={"several": several},
    )


def hr_bench_figures(scored: Sequence[Scored]) -> Mapping[str, float]:
    """Return `single`, `cross` and `average` as published; `strict circular` and `consistent` beside.

    The published figures are means over the four rotations of the accuracy within each. `strict circular` is the share
    of the questions that are right in every rotation that was asked, `consistent` the share that are right in all or
    wrong in all.
    """
    figures = {}
    for kind in ("single", "cross", "average"):
        cycles = grouped((one for one in scored if kind in (one.kind, "average")), lambda one: str(one.meta["cycle"]))
        if cycles:
            figures[kind] = fmean(map(fmean, cycles.values()))
    questions = grouped(scored, lambda one: str(one.meta["question"])).values()
    if questions:
        figures["strict circular"] = fmean(min(values) == 1 for values in questions)
        figures["consistent"] = fmean(min(values) == max(values) for values in questions)
    return figures


def mme_figures(scored: Sequence[Scored]) -> Mapping[str, float]:
    """Return the means over questions and over classes, both for Perception and Reasoning, and those of subtasks.

    `overall` is over all questions alike; the paper averages the classes (`class average`).
    """
    figures = {}
    for side in ("", "Perception", "Reasoning"):
        asked = [one for one in scored if not side or ("perception" in one.kind.lower()) == (side == "Perception")]
        if asked:
            figures[side or "overall"] = fmean(one.value for one in asked)
            classes = grouped(asked, lambda one: one.kind).values()
            figures[f"{side} class average".strip()] = fmean(map(fmean, classes))
    subtasks = grouped(scored, lambda one: f"{one.kind}/{one.meta['subtask']}")
    return figures | {name: fmean(values) for name, values in sorted(subtasks.items())}


def xlrs_figures(scored: Sequence[Scored]) -> Mapping[str, float]:
    """Return `micro`, `macro` (the mean of the subtasks that were asked) and the mean of every group of subtasks."""
    if not scored:
        return {}
    subtasks = grouped(scored, lambda one: one.kind).values()
    groups = grouped(scored, lambda one: one.kind.split("/")[0])
    figures = {"micro": fmean(one.value for one in scored), "macro": fmean(map(fmean, subtasks))}
    return figures | {name: fmean(values) for name, values in sorted(groups.items())}


HR_BENCH: Final = tuple(
    Benchmark(
        name=f"hrbench-{size}",
        title=f"HR-Bench {size.upper()}: one detail or several in {size.upper()} images (800 = 200 x 4 rotations)",
        place=HubTable(("DreamMr/HR-Bench",), config="hrbench_version_split", split=f"hrbench_{size}"),
        columns=("index", "question", "answer", "category", "A", "B", "C", "D", "cycle_category", "image"),
        id="index",
        kind="category",
        ask=partial(_ask_hr_bench, name=f"hrbench-{size}"),
        answers=one_letter,
        scorers={"faithful": choice.hr_bench, "clean": choice.clean, "vlmevalkit": choice.kit},
        aggregate=hr_bench_figures,
        coarse_tokens=(512, 4096),
    )
    for size in ("4k", "8k")
)
MME: Final = tuple(
    Benchmark(
        name=name,
        title=f"{title}: recognition and reasoning in real photographs ({n}, multiple choice)",
        place=HubTable((hub,), split="train"),
        columns=("bytes", "index", "question", "multi-choice options", "answer", "category", "l2-category"),
        id="index",
        kind="category",
        image="bytes",
        ask=_ask_mme,
        answers=one_letter,
        scorers={"faithful": choice.mme_realworld, "clean": choice.clean, "vlmevalkit": choice.mme_realworld_kit},
        aggregate=mme_figures,
        coarse_tokens=(512, 4096),
    )
    for name, title, n, hub in (
        ("mme-realworld", "MME-RealWorld", 23_609, "yifanzhang114/MME-RealWorld-Lmms-eval"),
        ("mme-realworld-lite", "MME-RealWorld Lite", 1_919, "yifanzhang114/MME-RealWorld-lite-lmms-eval"),
    )
)
HR_SCENE: Final = Benchmark(
    name="hrscene",
    title="HRScene: 25 sources of high-resolution images (testmini 1,000, validation 750, multiple choice)",
    place=HubTable(("Wenliang04/HRScene",), config="realworld_combined", split="testmini"),
    columns=("id", "image", "question", "answer"),
    id="id",
    ask=_ask_hr_scene,
    # The split whose answers are kept back says "None".
    answers=lambda cell: one_text(None if cell == "None" else cell),
    scorers={"faithful": high_resolution.hr_scene, "clean": rule},
)
XLRS: Final = Benchmark(
    name="xlrs-lite",
    title="XLRS-Bench-lite: satellite images of 100 million pixels (3,080, multiple choice)",
    place=HubTable(("initiacms/XLRS-Bench-lite",), split="train"),
    columns=("index", "question", "multi-choice options", "answer", "category", "image"),
    id="index",
    kind="category",
    ask=_ask_xlrs,
    answers=lambda cell: one_letter("".join(filter(str.isalpha, str(cell or "")))),
    scorers={"faithful": high_resolution.xlrs, "clean": high_resolution.letters},
    aggregate=xlrs_figures,
)
