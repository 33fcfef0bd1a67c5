"""Turns from a vLLM server, without one: TRL's own code up to the client, which says what a test wants."""

from __future__ import annotations

import copy
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from trl.generation import vllm_generation
from trl.generation.vllm_generation import VLLMGeneration

from qzoom_agent.errors import BackendError, ConfigError, MissingDependency
from qzoom_agent.training.grpo import launch as run
from qzoom_agent.training.grpo.checks import SamePrompts
from qzoom_agent.training.grpo.launch import make_trainer
from qzoom_agent.training.grpo.trainer import EpisodeTrainer
from tests.training.grpo.grpo_script import AGENT, tiny_recipe

Say = Callable[[list[int]], list[int]]


@pytest.fixture(scope="module")
def trainer(tmp_path_factory: pytest.TempPathFactory) -> EpisodeTrainer:
    folder = tmp_path_factory.mktemp("vllm")
    agent = {**AGENT, "generation": {"max_new_tokens": 6}}
    made = make_trainer(tiny_recipe(folder, "qwen2_5_vl", rollouts={"by": "generate"}, agent=agent), folder / "out")
    made.use_vllm, made._last_loaded_step = True, made.state.global_step
    return made


def server(accelerator: Any, say: Say, limits: list[int]) -> VLLMGeneration:
    """TRL's side of a server that answers each prompt with `say(prompt)`, at log-probability 0."""

    def generate(*, prompts: list[list[int]], max_tokens: int, **_: Any) -> dict[str, Any]:
        limits.append(max_tokens)
        ids = [say(prompt) for prompt in prompts]
        return {"prompt_ids": prompts, "completion_ids": ids, "logprobs": [[[0.0] for _ in row] for row in ids]}

    made = VLLMGeneration.__new__(VLLMGeneration)
    settings = ("temperature", "top_p", "top_k", "min_p", "repetition_penalty", "structured_outputs_regex")
    for name in settings:
        setattr(made, name, None)
    made.accelerator, made.mode, made.logprobs, made.generation_kwargs = accelerator, "server", 0, {}
    made.vllm_client = SimpleNamespace(generate=generate, image_features=list)
    made._place_features = lambda features, ids: features
    return made


class Meeting:
    """Processes as threads: what each gives is gathered when all have given it."""

    def __init__(self, count: int) -> None:
        self.barrier, self.given, self.here = threading.Barrier(count), list[Any]([None] * count), threading.local()

    def gather(self, value: Any) -> list[Any]:
        self.given[self.here.rank] = value
        self.barrier.wait(timeout=60)
        found = list(self.given)
        self.barrier.wait(timeout=60)
        return found

    def gather_object(self, rows: list[Any]) -> list[Any]:
        return [one for each in self.gather(rows) for one in each]

    def broadcast(self, payload: list[Any], from_process: int) -> None:
        payload[:] = self.gather(list(payload))[from_process]


@pytest.fixture
def meeting(monkeypatch: pytest.MonkeyPatch) -> Iterator[Meeting]:
    found = Meeting(2)
    monkeypatch.setattr(vllm_generation, "gather_object", found.gather_object)
    monkeypatch.setattr(vllm_generation, "broadcast_object_list", found.broadcast)
    yield found


def test_each_process_gets_its_own_turns(trainer: EpisodeTrainer, meeting: Meeting) -> None:
    """Two processes with three turns and one to write; TRL slices the answers as if they had equally many."""
    limits: list[int] = []
    asked = [[[1], [2], [3]], [[7]]]

    def process(rank: int) -> Any:
        meeting.here.rank = rank
        mine = copy.copy(trainer)
        mine.accelerator = SimpleNamespace(
            process_index=rank,
            is_main_process=rank == 0,
            device=torch.device("cpu"),
            gather=lambda tensor: torch.cat(meeting.gather(tensor)),
        )
        mine.vllm_generation = server(mine.accelerator, lambda prompt: [10 * prompt[0]], limits)
        return mine._trl_pass(asked[rank], [["image"] for _ in asked[rank]], 5)

    with ThreadPoolExecutor(2) as pool:
        (first, logps), (second, _) = pool.map(process, range(2))
    assert first == [[10], [20], [30]] and second == [[70]]
    assert logps == [[0.0]] * 3 and limits == [5]


def test_turns_of_another_model_are_refused(trainer: EpisodeTrainer, monkeypatch: pytest.MonkeyPatch) -> None:
    """The server says what it was certain of; the model that is trained was not."""
    end = trainer.backend.codec.tokenizer.eos_token_id
    limits: list[int] = []
    trainer.vllm_generation = server(trainer.accelerator, lambda _: [65, 66, end], limits)
    rows = [dict(trainer.train_dataset[at]) for at in (0, 0, 1, 1)]
    trainer.model.train()
    with pytest.raises(BackendError, match=r"\(vLLM\) differ from the trainer's by"):
        trainer._generate_and_score_completions(rows)
    assert limits and set(limits) == {6}
    monkeypatch.setattr(trainer, "tolerance", 100.0)
    batch = trainer._generate_and_score_completions(rows)
    assert batch["sampling_per_token_logps"].abs().sum() == 0


def test_a_process_that_is_done_asks_as_long_turns_as_the_others(
    trainer: EpisodeTrainer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The main process's limit is everybody's."""
    end = trainer.backend.codec.tokenizer.eos_token_id
    trainer.vllm_generation = server(trainer.accelerator, lambda _: [65, end], [])
    trainer._inputs = [dict(trainer.train_dataset[0])]
    trainer._tokenize_prompts([])
    asked: list[tuple[list[list[int]], list[list[Any]], int]] = []
    monkeypatch.setattr(trainer, "_trl_pass", lambda *given: asked.append(given))
    busy = iter([True, False])
    monkeypatch.setattr(trainer, "_any_device_generates", lambda _: next(busy))
    trainer._join_other_devices()
    ((prompts,), (images,), limit) = asked[0]
    assert limit == 6 and prompts == trainer._finished[0].tokens.prompt and len(images) == 1


def test_what_vllm_cannot_do_is_refused_before_anything_is_loaded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = tiny_recipe(tmp_path, "qwen2_5_vl", rollouts={"by": "generate", "vllm": {}})
    monkeypatch.setattr(run, "load_model", lambda _: pytest.fail("a model was loaded"))
    with pytest.raises(MissingDependency, match=r"pip install 'trl\[vllm\]'"):
        make_trainer(recipe, tmp_path / "out")
    monkeypatch.setattr(run, "is_vllm_available", lambda: True)
    run.require_packages(recipe, processes=8)
    loop = tiny_recipe(tmp_path, "qwen2_5_vl", rollouts={"by": "environment", "vllm": {}})
    run.require_packages(loop, processes=1)
    with pytest.raises(ConfigError, match=r"8 processes .* Set rollouts\.by: generate"):
        run.require_packages(loop, processes=8)


IMAGE = 9


class Engine:
    """vLLM as it takes ids: with one token for each image, of which it makes as many as `tokens` says."""

    def __init__(self, *tokens: int) -> None:
        self.tokens, self.asked = tokens, list[list[int]]()

    def generate(self, prompts: list[dict[str, Any]], **options: Any) -> list[Any]:
        self.asked = [one["prompt_token_ids"] for one in prompts]
        images = iter(self.tokens)
        return [
            SimpleNamespace(
                prompt_token_ids=[t for token in ids for t in [token] * (next(images) if token == IMAGE else 1)]
            )
            for ids in self.asked
        ]

    def sleep(self, level: int) -> int:
        return level


@given(st.lists(st.tuples(st.lists(st.integers(0, IMAGE - 1), min_size=1), st.integers(1, 5))))
def test_vllm_in_the_process_reads_the_prompts_of_the_trainer(parts: list[tuple[list[int], int]]) -> None:
    """Words between any two images, as in every conversation."""
    prompt = [token for words, size in parts for token in (*words, *[IMAGE] * size)]
    engine = Engine(*(size for _, size in parts))
    same = SamePrompts(engine, IMAGE)
    (reply,) = same.generate([{"prompt_token_ids": prompt, "multi_modal_data": {}}])
    assert reply.prompt_token_ids == prompt
    assert engine.asked[0].count(IMAGE) == len(parts)
    assert same.sleep(level=2) == 2


def test_another_prompt_than_that_of_the_trainer_is_refused() -> None:
    """An image that vLLM makes larger, and two without a token between them."""
    for prompt, sizes in ([1, IMAGE, IMAGE, 2], (4,)), ([1, IMAGE, IMAGE, 2], (1,)):
        with pytest.raises(BackendError, match=rf"{sizes[0]} of them visual, where the trainer has 4 and 2"):
            SamePrompts(Engine(*sizes), IMAGE).generate([{"prompt_token_ids": prompt}])
