"""This agent as a model of lmms-eval (0.7 and newer), found by the entry point group `lmms_eval.models`:

    lmms-eval --model qzoom --model_args model=nano,policy=explicit,budget.max_turns=4 --tasks vstar_bench

`model_args` are keys of `AgentConfig` (dotted), and device, branches, and traces: a folder for the whole record of
every episode. What goes back is the final answer alone, cut at the task's `until`; a task's `max_new_tokens` is meant
for that answer and never limits the turns before it. A question whose run fails counts as wrong, is named in the log
and is not cached. lmms-eval is imported inside functions only: the package works without it, and is tested with the
real one by `python tests/integrations/lmms_real.py`.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import PIL.Image

from qzoom_agent.agent import Agent
from qzoom_agent.errors import ConfigError

logger = logging.getLogger(__name__)


def manifest() -> Any:
    """Return the name of the model and of its class, for lmms-eval's entry point."""
    from lmms_eval.models.registry_v2 import ModelManifest

    return ModelManifest(model_id="qzoom", chat_class_path=f"{__name__}.QZoomLMM")


def __getattr__(name: str) -> Any:
    if name == "QZoomLMM":
        globals()[name] = found = _model_class()
        return found
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def load(settings: Mapping[str, Any]) -> Agent:
    """Return the agent that `model_args` describe; None and batch sizes, which lmms-eval adds, are left out."""
    own = {key: value for key, value in settings.items() if value is not None and key not in _ITS_OWN}
    return Agent.from_pretrained(**own)


_ITS_OWN = {"batch_size", "max_batch_size", "system_prompt"}


def question_of(messages: Iterable[Any]) -> tuple[PIL.Image.Image, str]:
    """Return the one image and the text of a task's messages. ConfigError if there is not exactly one image."""
    parts = [part for message in messages for part in message.content]
    texts = [part.text for part in parts if part.type == "text"]
    images = [part.url if part.type == "image" else None for part in parts if part.type != "text"]
    if len(images) != 1 or not isinstance(images[0], PIL.Image.Image):
        raise ConfigError(
            f"A question is about one image; this task's has {len(images)} images, videos or sounds. "
            "Choose another task."
        )
    return images[0], "\n".join(texts).strip()


def _model_class() -> type:
    from lmms_eval.api.instance import GenerationResult, TokenCounts
    from lmms_eval.api.model import lmms
    from lmms_eval.protocol import ChatMessages

    class QZoomLMM(lmms):  # type: ignore[misc]
        """See the module's note."""

        is_simple = False

        def __init__(self, traces: str | None = None, **settings: Any) -> None:
            super().__init__()
            self.traces = traces
            self.agent = load(settings)

        def generate_until(self, requests: list[Any]) -> list[Any]:
            """Return the final answer of each request, in their order."""
            from tqdm import tqdm

            results = []
            for request in tqdm(requests, disable=self.rank != 0, desc="qzoom"):
                context, to_messages, wanted, doc_id, task, split = request.args
                messages = ChatMessages(messages=to_messages(self.task_dict[task][split][doc_id]))
                image, question = question_of(messages.messages)
                answer = self.agent.run(image, question)
                if self.traces:
                    answer.save(Path(self.traces) / task / str(doc_id))
                text = answer.text_until(wanted.get("until")).strip()
                if failed := answer.status == "error":
                    logger.error("Question %s of %s failed and counts as wrong: %s", doc_id, task, answer.record.error)
                turns = answer.trace.turns
                counts = TokenCounts(
                    input_tokens=turns[-1].prompt_tokens if turns else 0,
                    output_tokens=answer.trace.usage.written_tokens,
                )
                results.append(GenerationResult(text=text, token_counts=counts))
                if not failed:  # asked again next time
                    self.cache_hook.add_partial("generate_until", (context, wanted), text)
            return results

        def loglikelihood(self, requests: list[Any]) -> list[Any]:
            raise NotImplementedError("An agent has an answer, not the likelihood of one. Choose a generation task.")

        def generate_until_multi_round(self, requests: list[Any]) -> list[Any]:
            raise NotImplementedError("The agent takes its own turns. Choose a task of type generate_until.")

    QZoomLMM.__module__ = __name__
    QZoomLMM.__qualname__ = "QZoomLMM"
    return QZoomLMM
