"""A run for other tools: its rows as a table, its figures for a model card, or its answers for a test server.

parquet, csv   a row a sample with typed columns: `score_<scorer>` is a number, `parsed_<scorer>` a truth value; of
               `qzoom run` the results as they are
hf             `model-index` metadata of a model card, as YAML
submission     the answers of a split whose gold answers are kept back
"""

import csv
import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Final, Literal

from qzoom_agent.errors import ConfigError
from qzoom_agent.evaluation.run_log import RunFolder
from qzoom_agent.evaluation.sample_result import SampleResult
from qzoom_agent.evaluation.summary import Results, summarise
from qzoom_agent.extras import require
from qzoom_agent.files import atomic_write, require_file

Format = Literal["parquet", "csv", "hf", "submission"]
_FILES: Final[Mapping[Format, str]] = {
    "parquet": "samples.parquet",
    "csv": "samples.csv",
    "hf": "model-index.yaml",
    "submission": "submission.json",
}
RESULTS: Final = "results.parquet"
"""Table of the answers in the folder of `qzoom run`."""
_COLUMNS: Final[Mapping[str, str]] = {
    "task": "string",
    "id": "string",
    "index": "int64",
    "repeat": "int64",
    "kind": "string",
    "cluster": "string",
    "question": "string",
    "gold": "texts",
    "options": "texts",
    "answer": "string",
    "status": "string",
    "error": "string",
    "turns": "int64",
    "zooms": "int64",
    "visual_tokens": "int64",
    "gate": "double",
    "recall": "double",
    "iou": "double",
    "elapsed": "double",
    "seed": "int64",
    "image": "string",
    "boxes": "boxes",
    "box_images": "numbers",
}
"""The columns of a table, and their types."""
_SUBMISSIONS: Final[Mapping[str, tuple[str, str]]] = {
    "docvqa": ("questionId", "answer"),
    "infovqa": ("questionId", "answer"),
    "textvqa": ("question_id", "answer"),
}
"""Keys of the answers that a task's test server takes (rrc.cvc.uab.es, eval.ai)."""


def export(folder: RunFolder, format: Format, path: Path | None = None) -> Path:
    """Write a run in a format and return the file, by default one in the run's folder.

    Raises:
        ConfigError: There is nothing to export, the format is for one task, or the file cannot be written.
        MissingDependency: parquet without pyarrow.
    """
    rows = folder.latest()
    if not rows:
        raise ConfigError(f"There is nothing to export in {folder.path}: no sample was finished.")
    results = folder.path / RESULTS
    if results.exists() and format == "parquet":
        raise ConfigError(f"The answers of this run are a parquet file already: {results}.")
    given = results.exists() and format == "csv"
    target = require_file(path or (results.with_suffix(".csv") if given else folder.path / _FILES[format]))
    with atomic_write(target) as part:
        if given:
            require_pyarrow()
            from pyarrow import parquet

            _write_csv(parquet.read_table(results).to_pydict(), part)
        elif format == "csv":
            _write_csv(columns(rows), part)
        elif format == "hf":
            _write_model_index(summarise(folder), part)
        else:
            {"parquet": _write_parquet, "submission": _write_submission}[format](rows, part)
    return target


def columns(rows: Sequence[SampleResult]) -> dict[str, list[Any]]:
    """Return the table's columns: those of every sample, and three of every scorer."""
    found: dict[str, list[Any]] = {name: [getattr(row, name) for row in rows] for name in _COLUMNS}
    for scorer in dict.fromkeys(name for row in rows for name in row.scores):
        scores = [row.scores.get(scorer) for row in rows]
        found[f"score_{scorer}"] = [None if one is None else float(one.value) for one in scores]
        found[f"parsed_{scorer}"] = [None if one is None else one.parsed for one in scores]
        found[f"extracted_{scorer}"] = [None if one is None else one.extracted for one in scores]
    return found


def _write_parquet(rows: Sequence[SampleResult], path: Path) -> None:
    held = columns(rows)
    of_scorers = {"score": "double", "parsed": "bool", "extracted": "string"}
    types = {name: _COLUMNS.get(name) or of_scorers[name.partition("_")[0]] for name in held}
    write_parquet(path, types, [held])


def write_parquet(path: Path, types: Mapping[str, str], parts: Iterable[Mapping[str, Sequence[Any]]]) -> None:
    """Write a table whose rows are given in parts.

    Args:
        types: The columns in order, and their types: "texts", "boxes" (lists of x1, y1, x2, y2), "numbers" or a
            name of pyarrow's.

    Raises:
        MissingDependency: pyarrow is not installed.
    """
    schema = arrow_schema(types)
    import pyarrow as pa
    from pyarrow import parquet

    # Of a path pyarrow makes an address, which takes UTF-8 alone.
    with path.open("wb") as file, parquet.ParquetWriter(file, schema) as writer:
        for part in parts:
            writer.write_table(pa.table({name: pa.array(part[name], schema.field(name).type) for name in types}))


def arrow_schema(types: Mapping[str, str]) -> Any:
    """Return the schema of pyarrow for columns and their types, see `write_parquet`."""
    require_pyarrow()
    import pyarrow as pa

    kinds = {"texts": pa.list_(pa.string()), "boxes": pa.list_(pa.list_(pa.float64())), "numbers": pa.list_(pa.int64())}
    return pa.schema([(name, kinds.get(kind) or pa.type_for_alias(kind)) for name, kind in types.items()])


def require_pyarrow() -> None:
    """Raise MissingDependency if parquet cannot be written."""
    require("pyarrow", extra="run", use="Writing parquet")


def _write_csv(held: Mapping[str, Sequence[Any]], path: Path) -> None:
    """Write columns, with lists as JSON, and nothing where nothing is known."""
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(held)
        for cells in zip(*held.values(), strict=True):
            writer.writerow([json.dumps(cell) if isinstance(cell, list | tuple) else cell for cell in cells])


def _write_model_index(results: Results, path: Path) -> None:
    from huggingface_hub.repocard_data import EvalResult, eval_results_to_model_index
    from yaml import safe_dump

    if unscored := [name for name, task in results.tasks.items() if not task.part.answered]:
        raise ConfigError(
            f"{', '.join(unscored)} was asked without answers (--no-answers), so there is no accuracy for a model "
            "card. Export the replies: --to submission, csv or parquet."
        )
    found = [
        EvalResult(
            task_type="visual-question-answering",
            dataset_type=task.part.path or name,
            dataset_name=name,
            dataset_split=task.part.split,
            metric_type="accuracy",
            metric_name=f"{scorer} ({task.n}{f' of {task.part.total}' if task.partial else ''} questions, "
            f"{results.config.policy or 'default'} policy)",
            metric_value=marks.accuracy.mean,
        )
        for name, task in results.tasks.items()
        for scorer, marks in task.scores.items()
    ]
    index = eval_results_to_model_index(Path(results.config.model).name, found)
    path.write_text(safe_dump({"model-index": index}, sort_keys=False, allow_unicode=True), encoding="utf-8")


def _write_submission(rows: Sequence[SampleResult], path: Path) -> None:
    tasks = sorted({row.task for row in rows})
    if len(tasks) > 1 or any(row.repeat for row in rows):
        times = 1 + max(row.repeat for row in rows)
        raise ConfigError(
            f"A submission holds one answer to each question of one task; the run asks {', '.join(tasks)}"
            f"{f', each question {times} times' if times > 1 else ''}. Run it for that task alone, without --repeats."
        )
    pairs = [(row.id.removeprefix(f"{row.task}-"), row.answer or "") for row in rows]
    if tasks[0] in _SUBMISSIONS:
        key, value = _SUBMISSIONS[tasks[0]]
        text = json.dumps([{key: int(one) if one.isdigit() else one, value: said} for one, said in pairs], indent=1)
    else:
        text = "\n".join(json.dumps({"id": one, "answer": said}) for one, said in pairs)
    path.write_text(text + "\n", encoding="utf-8")
