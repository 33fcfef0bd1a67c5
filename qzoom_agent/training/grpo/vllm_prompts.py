"""Prompts of vLLM in the trainer's own process (TRL's mode `colocate`).

TRL 1.16 gives such a vLLM token ids in which every image is as many tokens as it has features, and the images beside
them; vLLM expands image tokens once more, so that it would read another prompt than the trainer.
"""

from collections.abc import Sequence
from itertools import groupby
from typing import Any

from qzoom_agent.errors import BackendError


def one_token_an_image(ids: Sequence[int], image_id: int) -> list[int]:
    """Return token ids with each run of image tokens as a single one."""
    return [one for token, run in groupby(ids) for one in ([token] if token == image_id else run)]


class SamePrompts:
    """A vLLM engine (`vllm.LLM`) that expands image tokens itself; its prompts are checked to be the trainer's."""

    def __init__(self, engine: Any, image_id: int) -> None:
        self._engine, self._image_id = engine, image_id

    def __getattr__(self, name: str) -> Any:
        return getattr(self._engine, name)

    def generate(self, prompts: Sequence[dict[str, Any]], **options: Any) -> Any:
        """Generate as vLLM does. Raises BackendError if it read other tokens than it was asked to."""
        asked = [
            {**one, "prompt_token_ids": one_token_an_image(one["prompt_token_ids"], self._image_id)} for one in prompts
        ]
        replies = self._engine.generate(asked, **options)
        for prompt, reply in zip(prompts, replies, strict=True):
            given, read = list(prompt["prompt_token_ids"]), list(reply.prompt_token_ids)
            if given != read:
                counts = [sum(token == self._image_id for token in ids) for ids in (given, read)]
                raise BackendError(
                    f"vLLM read a prompt of {len(read)} tokens, {counts[1]} of them visual, where the trainer has "
                    f"{len(given)} and {counts[0]}: it sizes or places the images of this family otherwise. Set "
                    "rollouts.by to 'shared', or rollouts.vllm.mode to 'server'."
                )
        return replies
