"""Measure several configurations of one model in one run: each question is asked of all of them before the next.

A machine that slows down then slows all of them, and every comparison is of the same questions, pair by pair. The
order of the configurations turns with the questions, so that none always comes first. All share one copy of the
weights, answer one question at a time, and nothing that one computed is there for another. A first question that does
not count warms each of them up.

An interrupted run resumes from its journal, one line a question.
"""

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from time import perf_counter

from pydantic import TypeAdapter

from qzoom_agent.agent import Agent
from qzoom_agent.data.answers import exact_match
from qzoom_agent.data.samples import Sample
from qzoom_agent.errors import BackendError, ConfigError
from qzoom_agent.evaluation.redundancy import INSIDE
from qzoom_agent.evaluation.run_log import fingerprint
from qzoom_agent.evaluation.stats import Figures
from qzoom_agent.evaluation.tasks.needle import sample, sample_seed
from qzoom_agent.files import read_text, write_text
from qzoom_agent.geometry import Box


class Cell(Figures):
    """One question answered under one configuration."""

    id: str
    correct: bool
    zoomed: bool
    covered: bool | None
    """95 % of each needle lies in a crop; None without needles."""
    visual_tokens: int
    token_layers: float
    """Work of coarse pass, branches and answer: tokens times decoder layers."""
    seconds: float
    """Wall-clock time of `Agent.run`, all of it."""


Table = dict[str, list[Cell]]
"""By the name of the configuration its cells, the same questions in the same order."""
_LINE = TypeAdapter(dict[str, Cell])


def measure(
    arms: Mapping[str, Agent],
    task: str,
    *,
    n: int,
    seed: int = 0,
    boxes: Mapping[str, Callable[[Sample], Sequence[Box]]] | None = None,
    journal: Path | None = None,
    note: Callable[[int], None] = lambda done: None,
) -> Table:
    """Ask all agents the first `n` questions of a needle task.

    Args:
        arms: Agents by name; they may share a backend.
        task: Name of the needle task.
        boxes: For policy `oracle`, boxes to crop instead of the needle, by name of the arm.
        journal: File that keeps finished questions.
        note: Called after each question with the number of finished ones.

    Raises:
        ConfigError: `journal` is of other arms, weights or questions.
        BackendError: A model failed; finished questions are kept.
    """
    settings = {
        "suite": task,  # the key of journals that earlier versions wrote
        "seed": seed,
        "split": "test",
        "arms": {name: agent.config.model_dump(mode="json") for name, agent in arms.items()},
        "weights": {name: weights_of(agent) for name, agent in arms.items()},
    }
    done = {} if journal is None else _open(journal, settings)
    rows: list[dict[str, Cell]] = []
    names, warm, boxes = list(arms), False, boxes or {}
    for index in range(n):
        if index not in done:
            if not warm:
                _ask_all(arms, names, sample(task, sample_seed(seed, n)), boxes)
                warm = True
            turned = names[index % len(names) :] + names[: index % len(names)]
            question = sample(task, sample_seed(seed, index))
            done[index] = _ask_all(arms, turned, question, boxes)
            if journal is not None:
                with journal.open("a", encoding="utf-8") as file:
                    file.write(f"\n{index} {_LINE.dump_json(done[index]).decode()}")
        rows.append(done[index])
        note(index + 1)
    return {name: [row[name] for row in rows] for name in names}


def weights_of(agent: Agent) -> dict[str, str | None]:
    """Return fingerprints that tell the weights of an agent from others of the same name (None: unknown)."""
    branches = getattr(agent.backend, "branches", None)
    base = fingerprint(agent.backend.name, base_only=True)
    return {"base": base, "branches": None if branches is None else branches.digest()}


def _ask_all(
    arms: Mapping[str, Agent],
    names: Sequence[str],
    question: Sample,
    boxes: Mapping[str, Callable[[Sample], Sequence[Box]]],
) -> dict[str, Cell]:
    return {
        name: _ask(name, arms[name], question, boxes[name](question) if name in boxes else question.boxes)
        for name in names
    }


def _ask(name: str, agent: Agent, question: Sample, gold: Sequence[Box]) -> Cell:
    began = perf_counter()
    answer = agent.run(question.image, question.question, boxes=gold if agent.config.policy == "oracle" else None)
    seconds = perf_counter() - began
    trace = answer.trace
    if trace.status == "error":  # neither its answer nor its seconds are those of the model
        raise BackendError(
            f"The model failed under '{name}', so nothing can be compared: {trace.error} - finished questions are "
            f"kept: mend that, and give the same command again, which goes on at {question.id}."
        )
    crops = [view for view in trace.views if view.kind == "crop"]
    covered = [max((crop.coverage(needle) for crop in crops), default=0.0) >= INSIDE for needle in question.boxes]
    return Cell(
        id=question.id,
        correct=exact_match(answer.text, question.answer),
        zoomed=bool(crops),
        covered=all(covered) if covered else None,
        visual_tokens=trace.usage.visual_tokens,
        token_layers=trace.token_layers,
        seconds=seconds,
    )


def _open(journal: Path, settings: Mapping[str, object]) -> dict[int, dict[str, Cell]]:
    """Return finished questions by index; start the file if there is none."""
    head = json.dumps(settings, sort_keys=True)
    lines = read_text(journal, "Delete it, or take another --out.").splitlines() if journal.exists() else []
    if not lines:
        write_text(journal, head)
        return {}
    if lines[0] != head:
        raise ConfigError(
            f"{journal} is of other configurations, weights or questions. Delete it, or take another --out."
        )
    done: dict[int, dict[str, Cell]] = {}
    for line in lines[1:]:
        index, _, text = line.partition(" ")
        try:
            done[int(index)] = _LINE.validate_json(text)
        except ValueError:
            continue  # torn by a kill: asked again
    return done
