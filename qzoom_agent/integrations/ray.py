"""Questions about images in Ray Data: each worker loads the model once and answers batches of rows.

    rows = ray.data.read_json("questions.jsonl")
    asked = rows.map_batches(
        AskRows,
        fn_constructor_kwargs={"model": "qwen3-vl-4b", "folder": "/data/images"},
        batch_format="pyarrow",
        batch_size=64,
        concurrency=4,
        num_gpus=1,
    )
    asked.write_parquet("answers")

Nothing here imports Ray (extra `[ray]`); a table of pyarrow is all that is needed.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from qzoom_agent.agent import Agent
from qzoom_agent.answer import Answer
from qzoom_agent.data.image_column import picture
from qzoom_agent.errors import ConfigError, QzoomError
from qzoom_agent.evaluation.export import arrow_schema
from qzoom_agent.evaluation.table_run import ANSWERED

if TYPE_CHECKING:
    import pyarrow

_FAILED: Final = {"answer": "", "status": "error", "boxes": [], "visual_tokens": 0, "turns": 0, "seconds": 0.0}


class AskRows:
    """A function of tables that asks each row's question, for `map_batches` with the batch format "pyarrow"."""

    def __init__(
        self,
        model: str | Callable[[], Agent] = "nano",
        *,
        server: str | Sequence[str] | None = None,
        question: str | None = None,
        folder: str | Path | None = None,
        workers: int | None = None,
        **options: Any,
    ) -> None:
        """
        Args:
            model: A preset, path or hub id; or a function that makes the agent, in the worker.
            server: Address of a server, or several, that has the model.
            question: Question that is asked about every image, in place of the column `question`.
            folder: Folder that paths in the column `image` are relative to.
            workers: Most questions of a batch at a time, see `Agent.batch`.
            options: Other arguments of `Agent.from_pretrained`, or of `Agent.from_server`.

        Raises:
            ConfigError, BackendError: The model cannot be loaded with these options.
        """
        if not isinstance(model, str):
            self.agent = model()
        elif server is not None:
            self.agent = Agent.from_server(server, model=model, **options)
        else:
            self.agent = Agent.from_pretrained(model, **options)
        self.question, self.workers = question, workers
        self.folder = None if folder is None else Path(folder)

    def __call__(self, table: pyarrow.Table) -> pyarrow.Table:
        """Return the table with answer, status, error, confidence, boxes and cost of each row.

        A row that fails has status "error", and does not stop the others.

        Raises:
            ConfigError: A column is missing, or has the name of one that is added. Where all of them are there, they
                are those of an earlier call, and replaced.
        """
        import pyarrow as pa

        needed = ("image",) if self.question is not None else ("image", "question")
        if missing := [name for name in needed if name not in table.column_names]:
            raise ConfigError(f"The rows lack {', '.join(missing)}; they have {', '.join(table.column_names)}.")
        taken = [name for name in ANSWERED if name in table.column_names]
        if 0 < len(taken) < len(ANSWERED):
            raise ConfigError(
                f"The rows have {', '.join(taken)} already, which the answers would replace. Rename first, such as "
                f"rows.rename_columns({{{taken[0]!r}: 'given_{taken[0]}'}})."
            )
        given = [self.question] * len(table) if self.question is not None else table.column("question").to_pylist()
        found = self._answers(table.column("image").to_pylist(), given)
        table = table.drop_columns(taken)
        for field in arrow_schema(ANSWERED):
            table = table.append_column(field, pa.array([row.get(field.name) for row in found], field.type))
        return table

    def _answers(self, cells: Sequence[Any], questions: Sequence[Any]) -> list[dict[str, Any]]:
        found: list[dict[str, Any]] = [{} for _ in cells]
        pairs, places = [], []
        for place, (cell, question) in enumerate(zip(cells, questions, strict=True)):
            try:
                image = cell if hasattr(cell, "shape") else picture(cell, self.folder)
            except QzoomError as error:
                found[place] = {**_FAILED, "error": f"{type(error).__name__}: {error}"}
            else:
                pairs.append((image, question))
                places.append(place)
        for place, answer in zip(places, self.agent.batch(pairs, workers=self.workers), strict=True):
            found[place] = _cells(answer)
        return found


def _cells(answer: Answer) -> dict[str, Any]:
    return {
        "answer": answer.text,
        "status": answer.status,
        "error": answer.record.error,
        "confidence": answer.confidence,
        "answer_probability": answer.record.answer_probability,
        "boxes": answer.boxes,
        "visual_tokens": answer.usage.visual_tokens,
        "turns": len(answer.record.turns),
        "seconds": answer.usage.seconds.total,
    }
