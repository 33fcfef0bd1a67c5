"""Every task by its name, and the doors for tasks and scorers from outside this package."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Final

from qzoom_agent.data.rows import SUFFIXES
from qzoom_agent.data.samples import Sample
from qzoom_agent.errors import ConfigError
from qzoom_agent.evaluation.tasks.charxiv import CHARXIV
from qzoom_agent.evaluation.tasks.custom import custom_task, task_name
from qzoom_agent.evaluation.tasks.details import O3_BENCH, TREEBENCH, VISUAL_NEEDLE, VISUAL_PROBE, ZOOM_BENCH
from qzoom_agent.evaluation.tasks.documents import CHARTQA, DOCVQA, INFOVQA, OCRBENCH, TEXTVQA
from qzoom_agent.evaluation.tasks.high_resolution import HR_BENCH, HR_SCENE, MME, XLRS
from qzoom_agent.evaluation.tasks.needle.tasks import NEEDLE, NEEDLE_PAIR
from qzoom_agent.evaluation.tasks.ocrbench_v2 import OCRBENCH_V2
from qzoom_agent.evaluation.tasks.receipts import RECEIPTS
from qzoom_agent.evaluation.tasks.task import CustomScorer, Score, Scorer, Task
from qzoom_agent.evaluation.tasks.vstar import VSTAR
from qzoom_agent.extensions import created, find, is_reference, reference, require_call
from qzoom_agent.files import expanded

_TABLES: Final = (
    *(*HR_BENCH, *MME, DOCVQA, INFOVQA, CHARTQA, TEXTVQA, OCRBENCH, TREEBENCH, *VISUAL_PROBE, *ZOOM_BENCH),
    *(O3_BENCH, VISUAL_NEEDLE, HR_SCENE, XLRS),
)
TASKS: Final[Mapping[str, Task]] = {
    task.name: task
    for task in (
        *(*NEEDLE, NEEDLE_PAIR, VSTAR, *(benchmark.task for benchmark in _TABLES)),
        *(*CHARXIV, *OCRBENCH_V2, *RECEIPTS),
    )
}
_NEEDED: Final = ("name", "load", "scorers")


_SCORED: Final = ("an answer", "a sample")
"""What a scorer is called with."""


def find_task(name: str) -> Task:
    """Return a task by its name, or one from outside this package.

    Args:
        name: A name of `TASKS`; the path of a file or folder of questions; `module:attribute`; or an entry point of
            the group `qzoom_agent.tasks`. A name goes before a path: write ./chartqa for a folder of yours, whose task
            is then called own-chartqa. An attribute or entry point is a `Task`, an object with its attributes, or a
            function that returns one.

    Raises:
        ConfigError: There is no such task.
    """
    if name in TASKS:
        return TASKS[name]
    if (path := expanded(name)).exists():
        called = task_name(path)
        return custom_task(path, name=f"own-{called}" if called in TASKS else called)
    if not is_reference(name) and (Path(name).name != name or Path(name).suffix.lower() in SUFFIXES):
        raise ConfigError(
            f"There is nothing at {name}, seen from {Path.cwd()}. Give a file or folder of your own questions, or the "
            "name of a task (qzoom eval list)."
        )
    try:
        found = find(name, kind="task", known=TASKS)
    except ConfigError as error:
        raise ConfigError(f"{error} A file or folder of your own questions is a task, too.") from error.__cause__
    return replace(as_task(found, name), reference=name)


def as_task(found: Any, name: str) -> Task:
    """Return the task that an extension is or, called without arguments, returns; ConfigError if it is none."""
    if not isinstance(found, Task) and (isinstance(found, type) or not hasattr(found, "load")) and callable(found):
        found = created(found, kind="task")
    if isinstance(found, Task):
        return found
    missing = [attribute for attribute in _NEEDED if not hasattr(found, attribute)]
    if missing:
        raise ConfigError(
            f"The task {name!r} is {type(found).__name__} without {', '.join(missing)}. Give a Task, an object with "
            f"{', '.join(_NEEDED)}, or a function that returns one."
        )
    known = {key: getattr(found, key) for key in Task.__dataclass_fields__ if hasattr(found, key)}
    return Task(**{"title": found.name} | known)


def unscored(task: Task) -> Task:
    """Return a task for a split whose answers are kept back: `replied` is the share of questions with a reply."""
    return replace(task, scorers={"replied": replied}, aggregate=None)


def replied(answer: str | None, sample: Sample) -> Score:
    """Return 1 for any text; nothing is said about whether it is right."""
    return Score(float(bool(answer and answer.strip())), answer)


def with_scorer(
    tasks: Sequence[Task | str], scorer: str | Scorer | CustomScorer | None
) -> tuple[list[Task], str | None]:
    """Return the tasks, with a scorer from outside this package among theirs, and the scorer's name.

    Args:
        tasks: The tasks to score, or their names, as `find_task` takes them.
        scorer: The name of a scorer that one of the tasks has; `module:function`; an entry point of the group
            `qzoom_agent.scorers`; or the function itself, which goes by its `module:name`. None: each task's first.

    Raises:
        ConfigError: There is no such scorer, it is no function, or a task has none.
    """
    given = [tasks] if isinstance(tasks, str | Task) else tasks
    found_tasks = [find_task(one) if isinstance(one, str) else as_task(one, reference(one)) for one in given]
    if bare := [task.name for task in found_tasks if not task.scorers and scorer is None]:
        raise ConfigError(f"The task {bare[0]!r} has no scorer. Give it one, or --scorer module:function.")
    known = {name: one for task in found_tasks for name, one in task.scorers.items()}
    for name, one in known.items():
        require_call(one, *_SCORED, kind="scorer", name=name)
    if scorer is None or (isinstance(scorer, str) and scorer in known):
        return found_tasks, scorer
    name = scorer if isinstance(scorer, str) else reference(scorer)
    found = find(scorer, kind="scorer", known=known) if isinstance(scorer, str) else scorer
    require_call(found, *_SCORED, kind="scorer", name=name)
    return [replace(task, scorers={**task.scorers, name: found}) for task in found_tasks], name
