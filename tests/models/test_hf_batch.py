"""A batch answers what single sessions answer, whatever its rows do: zoom or not, long or short, large or small."""

from collections.abc import Callable

import numpy as np
import pytest
from PIL import Image

from qzoom_agent.config import PerceptionConfig
from qzoom_agent.errors import BackendError
from qzoom_agent.messages import Message, image_part, message
from qzoom_agent.models import SamplingParams
from qzoom_agent.models.hf import HFBackend
from qzoom_agent.models.hf_batch import BatchEngine
from qzoom_agent.models.hf_generation import GenerationRequest
from qzoom_agent.models.hf_session import HFSession
from qzoom_agent.models.interface import Reply
from tests.tiny_models import Family, noise

FAMILIES: tuple[Family, ...] = ("qwen2_5_vl", "qwen3_vl", "qwen3_5", "gemma4", "llava")
GREEDY = SamplingParams(max_new_tokens=5)
QUESTIONS = (
    "what is the code?",
    "how many green triangles are there? three, four or five?",
    "what is on the red circle, and is it green? Answer now.",
    "407",
)


@pytest.fixture(params=FAMILIES)
def backend(request: pytest.FixtureRequest, load: Callable[[Family], HFBackend]) -> HFBackend:
    return load(request.param)


def pictures(backend: HFBackend, row: int) -> dict[str, Image.Image]:
    """Other sizes in every row, where the family can tell."""
    fixed = backend.name == "llava"
    cells = {"coarse": (4, 4) if fixed else (3 + row, 5 - row), "crop1": (4, 4) if fixed else (2, 1 + row)}
    return noise(cells, unit=backend.defaults.factor, seed=row)


def asked(row: int, *, crop: bool) -> list[Message]:
    shown = ["coarse", "crop1"] if crop else ["coarse"]
    return [message("user", *(image_part(view) for view in shown), QUESTIONS[row])]


def sessions_of(backend: HFBackend) -> list[HFSession]:
    return [backend.session(pictures(backend, row).__getitem__) for row in range(len(QUESTIONS))]


def replies(
    backend: HFBackend,
    rows: list[list[Message]],
    settings: SamplingParams = GREEDY,
    *,
    stop: tuple[str, ...] = (),
    sessions: list[HFSession] | None = None,
) -> list[Reply]:
    sessions = sessions or sessions_of(backend)
    requests = [
        GenerationRequest(session, session.prepare(talk), settings.model_copy(update={"stop": stop}))
        for session, talk in zip(sessions, rows, strict=True)
    ]
    return BatchEngine(backend).reply(requests)


def test_looks_are_those_of_single_sessions(backend: HFBackend) -> None:
    rows = [asked(row, crop=False) for row in range(len(QUESTIONS))]
    every = PerceptionConfig(gate_threshold=0.0, threshold=0.3)
    single = [
        backend.session(pictures(backend, row).__getitem__).look(rows[row], options=every)[0]
        for row in range(len(QUESTIONS))
    ]
    scores = sorted(one.score or 0.0 for one in single)
    # between the scores, so that the gate lets some rows through and not others
    options = every.model_copy(update={"gate_threshold": (scores[1] + scores[2]) / 2})
    found = [seen[0] for seen in BatchEngine(backend).look(sessions_of(backend), rows, options=options)]
    assert sum(bool(one.heat) for one in found) == 2
    for ours, theirs in zip(found, single, strict=True):
        assert ours.score == pytest.approx(theirs.score, abs=1e-5)
        assert (ours.prompt_tokens, ours.visual_tokens) == (theirs.prompt_tokens, theirs.visual_tokens)
        if ours.heat:
            assert np.allclose(ours.heat, theirs.heat, atol=1e-5)
            assert (ours.cells, ours.boxes) == (theirs.cells, theirs.boxes)


@pytest.mark.parametrize(
    "zooming",
    [
        pytest.param((0, 2), id="some zoom"),
        pytest.param((0, 1, 2, 3), id="all zoom", marks=pytest.mark.slow),
        pytest.param((), id="none zooms", marks=pytest.mark.slow),
    ],
)
@pytest.mark.parametrize(
    "settings",
    [
        pytest.param(GREEDY, id="greedy"),
        pytest.param(SamplingParams(max_new_tokens=6, temperature=1.0, seed=3), id="sampled", marks=pytest.mark.slow),
    ],
)
def test_replies_are_those_of_single_sessions(
    backend: HFBackend, zooming: tuple[int, ...], settings: SamplingParams
) -> None:
    options = PerceptionConfig(gate_threshold=0.0, threshold=0.3, positions="aligned")
    before = [asked(row, crop=False) for row in range(len(QUESTIONS))]
    after = [asked(row, crop=row in zooming) for row in range(len(QUESTIONS))]
    sessions = sessions_of(backend)
    seen = BatchEngine(backend).look(sessions, before, options=options)
    for row in zooming:
        if seen[row][0].aligned:
            sessions[row].place("crop1", source="coarse", cells=(1.0, 0.0, 2.0, 1.0))
    together = replies(backend, after, settings, sessions=sessions)
    for row, ours in enumerate(together):
        session = backend.session(pictures(backend, row).__getitem__)
        sight = session.look(before[row], options=options)[0]
        if row in zooming and sight.aligned:
            session.place("crop1", source="coarse", cells=(1.0, 0.0, 2.0, 1.0))
        theirs = session.reply(after[row], settings=settings)
        assert ours.text == theirs.text
        assert (ours.finish, ours.new_tokens, ours.prompt_tokens) == (
            theirs.finish,
            theirs.new_tokens,
            theirs.prompt_tokens,
        )
        assert ours.token_layers == theirs.token_layers


def test_a_batch_can_reply_without_a_look(backend: HFBackend) -> None:
    rows = [asked(row, crop=row == 1) for row in range(len(QUESTIONS))]
    together = replies(backend, rows)
    for row, ours in enumerate(together):
        theirs = backend.session(pictures(backend, row).__getitem__).reply(rows[row], settings=GREEDY)
        assert (ours.text, ours.token_layers) == (theirs.text, theirs.token_layers)


def test_a_stop_string_ends_its_row_alone(load: Callable[[Family], HFBackend]) -> None:
    backend = load("qwen3_vl")
    rows = [asked(row, crop=False) for row in range(len(QUESTIONS))]
    free = replies(backend, rows)
    stop = next(reply.text[1:3] for reply in free if len(reply.text) > 4)
    stopped = replies(backend, rows, stop=(stop,))
    for before, after in zip(free, stopped, strict=True):
        cut = before.text.find(stop)
        assert after.text == (before.text if cut < 0 else before.text[: cut + len(stop)])


def test_a_kernel_without_masks_is_refused(load: Callable[[Family], HFBackend]) -> None:
    backend = load("qwen2_5_vl")
    config = backend.model.config.get_text_config()
    before = config._attn_implementation
    config._attn_implementation = "flash_attention_2"
    try:
        with pytest.raises(BackendError, match="flash_attention_2"):
            BatchEngine(backend)
    finally:
        config._attn_implementation = before


def test_later_turns_go_on_from_the_cache_as_single_sessions_do(backend: HFBackend) -> None:
    """Three turns with a look before the first: text, cached tokens and work of each are those of one session alone."""
    options = PerceptionConfig(gate_threshold=0.0, threshold=0.3, positions="plain")
    sessions, alone = sessions_of(backend), sessions_of(backend)
    talks = [asked(row, crop=False) for row in range(len(QUESTIONS))]
    BatchEngine(backend).look(sessions, talks, options=options)
    for session, talk in zip(alone, talks, strict=True):
        session.look(talk, options=options)
    for turn in range(3):
        together = replies(backend, talks, sessions=sessions)
        for row, (ours, session) in enumerate(zip(together, alone, strict=True)):
            theirs = session.reply(talks[row], settings=GREEDY)
            assert ours.model_dump(exclude={"seconds"}) == theirs.model_dump(exclude={"seconds"}), (turn, row)
            assert sessions[row].held == session.held
        shown = [image_part("crop1")] if turn == 0 else []
        talks = [
            [*talk, message("assistant", ours.text), message("user", *shown, QUESTIONS[row][::-1])]
            for row, (talk, ours) in enumerate(zip(talks, together, strict=True))
        ]


def test_rows_with_and_without_a_look_are_one_batch(backend: HFBackend) -> None:
    sessions, alone = sessions_of(backend), sessions_of(backend)
    talks = [asked(row, crop=row == 1) for row in range(len(QUESTIONS))]
    options = PerceptionConfig(gate_threshold=0.0, threshold=0.3, positions="plain")
    for row in (1, 2):
        for each in (sessions, alone):
            each[row].look(asked(row, crop=False), options=options)
    together = replies(backend, talks, sessions=sessions)
    for row, ours in enumerate(together):
        theirs = alone[row].reply(talks[row], settings=GREEDY)
        assert ours.model_dump(exclude={"seconds"}) == theirs.model_dump(exclude={"seconds"})


def test_equal_prompts_of_shared_views_are_prefilled_once(backend: HFBackend, monkeypatch: pytest.MonkeyPatch) -> None:
    first, *_ = sessions_of(backend)
    first.prepare(asked(0, crop=False))
    rows: list[int] = []
    monkeypatch.setattr(
        BatchEngine,
        "_prefill",
        lambda self, some, run=BatchEngine._prefill: (rows.append(len(some)), run(self, some))[1],
    )
    talks = [asked(0, crop=False), asked(0, crop=False), asked(0, crop=False)]
    sessions = [first.fork() for _ in talks]
    settings = [SamplingParams(max_new_tokens=6, temperature=1.0, seed=seed) for seed in (1, 1, 2)]
    requests = [
        GenerationRequest(session, session.prepare(talk), each)
        for session, talk, each in zip(sessions, talks, settings, strict=True)
    ]
    one, same, other = BatchEngine(backend).reply(requests)
    assert rows == [1]
    assert one.text == same.text != other.text
    assert other.text == first.reply(talks[0], settings=settings[2]).text
