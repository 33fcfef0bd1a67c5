"""Episodes as rollouts: what is sampled, and the sequence that is learned from."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from qzoom_agent.agent import Agent
from qzoom_agent.config import AgentConfig
from qzoom_agent.data.samples import Sample
from qzoom_agent.errors import ConfigError
from qzoom_agent.models.hf import HFBackend
from qzoom_agent.models.hf_batch import BatchEngine
from qzoom_agent.models.hf_generation import GeneratedTurn, draw
from qzoom_agent.models.interface import SamplingParams
from qzoom_agent.models.prompts import ImageSpan, Prompt
from qzoom_agent.training.grpo.rollouts import RecordedTurn, RolloutScheduler, play, tokens_of
from tests.training.grpo.grpo_script import AGENT

SHORT = {**AGENT, "generation": {"max_new_tokens": 8}}


def asked(count: int) -> list[Sample]:
    colours = [(200, 40, 40), (40, 40, 200)]
    return [
        Sample(
            id=str(at // 2),
            task="made",
            kind="made",
            image=Image.new("RGB", (300, 200), colours[at // 2 % 2]),
            question="Which colour is it?",
            answer="red",
        )
        for at in range(count)
    ]


def test_a_crew_answers_as_the_agent_does(tiny: HFBackend) -> None:
    config = AgentConfig().replace(**SHORT)
    played = play(RolloutScheduler(tiny, BatchEngine(tiny).generate), asked(4), config, [0, 1, 2, 3])
    agent = Agent(tiny, config=config)
    for sample, one in zip(asked(4), played, strict=True):
        alone = agent.run(sample.image, sample.question)
        assert [turn.text for turn in one.answer.trace.turns] == [turn.text for turn in alone.trace.turns]
        assert one.rollout.sample.id == sample.id
    assert len({tuple(one.tokens.prompt) for one in played}) == 1


def test_what_a_row_samples_does_not_depend_on_its_neighbours(tiny: HFBackend) -> None:
    config = AgentConfig().replace(**SHORT).replace(**{"generation.temperature": 1.0})
    together = play(RolloutScheduler(tiny, BatchEngine(tiny).generate), asked(4), config, [5, 6, 7, 8])
    alone = play(RolloutScheduler(tiny, BatchEngine(tiny).generate), asked(4)[2:3], config, [7])
    assert together[2].tokens.completion == alone[0].tokens.completion
    assert together[0].tokens.completion != together[1].tokens.completion, "rollouts of a group differ"


def test_a_failing_writer_ends_every_episode_and_is_raised(tiny: HFBackend) -> None:
    def broken(wishes: Any) -> list[GeneratedTurn]:
        raise MemoryError("no room")

    with pytest.raises(MemoryError, match="no room"):
        play(RolloutScheduler(tiny, broken), asked(4), AgentConfig().replace(**SHORT), [0, 1, 2, 3])


def test_an_episode_whose_question_is_too_long_is_named(tiny: HFBackend) -> None:
    long = [replace(one, question="Which colour is it? " + "~" * 20_000) for one in asked(2)]
    with pytest.raises(ConfigError, match=r"row '0' ended before.*tokens.*reaches.*'Which colour.*Leave the row out"):
        play(RolloutScheduler(tiny, BatchEngine(tiny).generate), long, AgentConfig().replace(**SHORT), [0, 1])


@given(st.lists(st.floats(-8, 8), min_size=3, max_size=9), st.floats(0, 1, exclude_max=True), st.floats(0.3, 2))
def test_a_draw_is_a_possible_token_with_its_own_log_probability(
    row: list[float], chance: float, temperature: float
) -> None:
    logits = torch.tensor([row])
    settings = SamplingParams(temperature=temperature, top_p=0.9)
    token, logp = draw(logits, torch.tensor([chance]), settings=settings, forbidden=torch.tensor([0]))
    assert 1 <= int(token) < len(row)
    expected = torch.log_softmax(logits / temperature, 1)[0, int(token)]
    torch.testing.assert_close(logp[0], expected)


def test_draws_follow_the_probabilities() -> None:
    weights = torch.tensor([0.1, 0.6, 0.3])
    chances = (torch.arange(1000) + 0.5) / 1000
    none = torch.tensor([], dtype=torch.long)
    tokens, _ = draw(weights.log().expand(1000, 3), chances, settings=SamplingParams(temperature=1.0), forbidden=none)
    torch.testing.assert_close(tokens.bincount(minlength=3) / 1000, weights, atol=2e-3, rtol=0)
    likely, _ = draw(weights.log()[None], chances[:1], settings=SamplingParams(temperature=0.0), forbidden=none)
    assert int(likely) == 1


END = 9


def said(prompt: list[int], ids: list[int], *, finish: Any = "stop", views: int = 1) -> RecordedTurn:
    spans = tuple(ImageSpan(at, at + 1, f"view{at}") for at in range(views))
    written = GeneratedTurn(tuple(ids), tuple(-float(i) for i in ids), "", finish, 0)
    return RecordedTurn(Prompt(tuple(prompt), spans), written, torch.arange(len(prompt)).expand(3, 1, -1) * 2)


def image(view: str) -> Image.Image:
    return Image.new("RGB", (28, 28), (int(view[4:]), 0, 0))


def test_turns_become_one_sequence() -> None:
    tokens = tokens_of([said([1, 2], [3, END]), said([1, 2, 3, END, 5, 6], [7, END], views=2)], image, end=END)
    assert tokens.prompt == [1, 2]
    assert tokens.completion == [3, END, 5, 6, 7, END]
    assert tokens.mask == [1, 1, 0, 0, 1, 1]
    assert tokens.logps == [-3, -9, 0, 0, -7, -9]
    assert len(tokens.images) == 2 and tokens.rewritten == 0
    assert tokens.positions[1].tolist() == [0, 2, 4, 6, 8, 10, 11, 12], "what is written goes on from the prompt's last"


def test_another_end_than_the_template_writes_is_context() -> None:
    tokens = tokens_of([said([1, 2], [3, 8]), said([1, 2, 3, END, 5], [7, END])], image, end=END)
    assert tokens.completion == [3, END, 5, 7, END] and tokens.mask == [1, 0, 0, 1, 1] and tokens.rewritten == 1


def test_a_rewritten_turn_is_context_as_the_model_read_it() -> None:
    tokens = tokens_of([said([1, 2], [3, 4, END]), said([1, 2, 6, END, 5], [7, END])], image, end=END)
    assert tokens.completion == [6, END, 5, 7, END] and tokens.mask == [0, 0, 0, 1, 1] and tokens.rewritten == 3


def test_a_stop_string_is_followed_by_an_end_that_is_not_learned() -> None:
    assert tokens_of([said([1, 2], [3, 4])], image, end=END).mask == [1, 1, 0]
    cut = tokens_of([said([1, 2], [3, 4], finish="length")], image, end=END)
    assert cut.completion == [3, 4], "what was cut off stays without an end, which is how the trainer knows it"


def test_a_rewritten_opening_is_refused() -> None:
    with pytest.raises(ConfigError, match="only ever adds"):
        tokens_of([said([1, 2], [3, END]), said([1, 7, 3, END], [4])], image, end=END)
