"""The agent's surface: run, stream, batch, answers on disk, and errors for bad input."""

import asyncio
import base64
import gc
import io
import json
import pickle
import re
import threading
import time
import weakref
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import aclosing
from contextvars import ContextVar, copy_context
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from PIL import Image

from qzoom_agent import Agent, AgentConfig, Answer, Box, Trace
from qzoom_agent.async_events import Receiver, events_of
from qzoom_agent.errors import ConfigError, ImageError, QzoomError
from qzoom_agent.messages import Message
from qzoom_agent.models.interface import ImageSource, Reply
from qzoom_agent.models.scripted import ScriptedBackend
from qzoom_agent.trace import by_digest, saved_images
from tests.cases import each_case

IMAGE = Image.linear_gradient("L").resize((800, 600)).convert("RGB")
ZOOM = "<zoom><loc_84><loc_112><loc_140><loc_154></zoom>"


def zoom_once(messages: list[Message]) -> str:
    """A model that zooms in its first turn and answers in the next."""
    return "42 <b>" if any(message["role"] == "assistant" for message in messages) else ZOOM


def agent(**changes: Any) -> Agent:
    return Agent(ScriptedBackend(zoom_once), config=AgentConfig().replace(**changes))


class Threaded:
    """A backend whose text arrives on a thread of its own, in pieces a test can pace."""

    def __init__(self, pieces: Sequence[str], wait: Callable[[], object] = lambda: None) -> None:
        self.name, self.protocol, self.defaults = "threaded", "nano", ScriptedBackend([]).defaults
        self.perceives = False
        self.pieces, self.wait = pieces, wait
        self.closed = False

    def session(self, image: ImageSource) -> "Threaded":
        return self

    def reply(self, messages: Any, *, settings: Any, on_text: Any = None) -> Reply:
        def write() -> None:
            for piece in self.pieces:
                if on_text is not None:
                    on_text(piece)
                self.wait()

        writer = threading.Thread(target=write)
        writer.start()
        writer.join()
        text = "".join(self.pieces)
        return Reply(
            text=text, finish="stop", prompt_tokens=1, cached_tokens=0, new_tokens=1, visual_tokens=0, seconds=0.1
        )

    def close(self) -> None:
        self.closed = True


# ---- answers -------------------------------------------------------------------------------------------------------


def test_an_answer_reads_as_its_text() -> None:
    answer = agent().run(IMAGE, "What?")
    assert str(answer) == answer.text == f"{answer:>6}" == "42 <b>"
    assert repr(answer) == "Answer(text='42 <b>', status='answered')"
    assert "42 &lt;b&gt;" in answer._repr_html_()
    assert "<b>42 <b>" not in answer._repr_html_()


def test_a_saved_answer_is_a_trace_with_images_and_the_configuration_that_repeats_it(tmp_path: Path) -> None:
    config = AgentConfig(seed=9).replace(**{"budget.max_turns": 3})
    agent = Agent(ScriptedBackend(zoom_once), config=config)
    answer = agent.run(IMAGE, "What?")
    answer.save(tmp_path / "run")
    trace = Trace.load(tmp_path / "run")
    assert trace == answer.trace
    images = saved_images(tmp_path / "run")
    for view in trace.views:
        assert images(view.digest) == answer.store.image(view.id)
    saved = AgentConfig.load(tmp_path / "run" / "config.yaml")
    assert saved == agent.config
    assert (saved.seed, saved.budget.max_turns, saved.budget.coarse_tokens, saved.protocol) == (9, 3, 64, "nano")
    assert Agent(ScriptedBackend(zoom_once), config=saved).config == saved


def test_a_report_is_one_html_file(tmp_path: Path) -> None:
    page = agent().run(IMAGE, "What?").report(tmp_path / "run.html").read_text(encoding="utf-8")
    assert "42 &lt;b&gt;" in page
    assert "data:image/" in page


def test_runs_are_repeatable_but_for_time_and_name() -> None:
    def record(answer: Any) -> str:
        trace = answer.trace.model_copy(update={"id": "", "usage": None})
        for turn in trace.turns:
            turn.act_seconds = 0.0
        return str(trace.model_dump())

    assert record(agent().run(IMAGE, "What?")) == record(agent().run(IMAGE, "What?"))


def test_the_trace_says_how_it_was_made() -> None:
    trace = agent(policy="blind").run(IMAGE, "What?", seed=4).trace
    assert (trace.model, trace.protocol, trace.policy, trace.seed) == ("scripted", "nano", "blind", 4)
    assert AgentConfig.model_validate(trace.config) == agent(policy="blind").config.replace(seed=4)
    assert trace.environment["langgraph"]


@pytest.mark.parametrize("image", [np.zeros((60, 80, 3), np.uint8), Image.new("L", (80, 60))])
def test_other_images(image: Any) -> None:
    assert agent().run(image, "What?").status == "answered"


# ---- streaming -----------------------------------------------------------------------------------------------------


def test_events_tell_the_whole_story_in_order() -> None:
    events = list(agent().stream(IMAGE, "What?"))
    kinds = [event.kind for event in events if event.kind != "token"]
    assert kinds == ["view", "turn", "call", "view", "turn", "answer"]
    for index, text in enumerate([ZOOM, "42 <b>"]):
        pieces = [event.data["text"] for event in events if event.kind == "token" and event.data["turn"] == index]
        assert len(pieces) > 1
        assert "".join(pieces) == text
    last = events[-1]
    assert last.answer is not None
    assert (last.answer.text, last.data["answer"], last.data["status"]) == ("42 <b>", "42 <b>", "answered")
    assert len(last.answer.trace.turns) == 2
    for event in events:
        assert len(event.model_dump_json()) < 4000
        assert json.loads(event.model_dump_json())["kind"] == event.kind


def test_text_arrives_while_the_turn_is_being_written_and_from_any_thread() -> None:
    seen = threading.Event()

    def wait() -> None:
        assert seen.wait(10)

    backend = Threaded(["4", "2"], wait)
    kinds = []
    for event in Agent(backend).stream(IMAGE, "What?"):
        kinds.append(event.kind)
        if event.kind == "token":
            seen.set()
    assert kinds == ["view", "token", "token", "turn", "answer"]
    assert backend.closed


def test_a_stream_may_be_left_early() -> None:
    backend = Threaded(["4", "2"])
    stream = Agent(backend).stream(IMAGE, "What?")
    assert next(stream).kind == "view"
    stream.close()  # type: ignore[attr-defined]
    assert Agent(backend).run(IMAGE, "What?").text == "42"


def test_bad_input_raises_before_the_first_event_is_asked_for() -> None:
    with pytest.raises(ConfigError):
        agent().stream(IMAGE, "")


def test_an_answer_is_read_from_disk_and_says_where_it_looked(tmp_path: Path) -> None:
    answer = agent().run(IMAGE, "What?")
    again = Answer.load(answer.save(tmp_path / "run"))
    assert Answer.load(tmp_path / "run" / "trace.json").boxes == again.boxes
    assert again.trace == answer.trace and (again.text, again.status) == (answer.text, answer.status)
    assert all(
        again.store.image(view.id).tobytes() == answer.store.image(view.id).tobytes() for view in again.trace.views
    )
    assert answer.boxes == [answer.trace.views[-1].box] and answer.trace.views[-1].kind == "crop"
    (found,) = json.loads(answer.to_detections("code"))
    assert found["label"] == "code" and json.loads(answer.to_detections())[0]["label"] == "42 <b>"
    thousandths = [side * by for side, by in zip(answer.boxes[0], (1000 / 800, 1000 / 600) * 2, strict=True)]
    assert np.allclose(found["bbox_2d"], thousandths, atol=0.5)
    (tmp_path / "run" / "images" / f"{answer.trace.views[0].digest}.png").unlink()
    with pytest.raises(ImageError, match="missing"):
        Answer.load(tmp_path / "run")


def test_a_notebook_shows_the_picture_with_the_boxes() -> None:
    answer = agent().run(IMAGE, "What <i>?")
    shown = answer._repr_html_()
    assert "What &lt;i&gt;?" in shown and "42 &lt;b&gt;" in shown and "<p>1 crop, " in shown and 'alt=""' not in shown
    (data,) = re.findall(r"data:image/jpeg;base64,([^\"]+)", shown)
    picture = np.asarray(Image.open(io.BytesIO(base64.b64decode(data))).convert("RGB")).astype(int)
    assert picture.shape == (360, 480, 3)
    red = (picture[..., 0] - picture[..., 1]) > 80
    x1, y1, _, _ = (int(side * 0.6) for side in answer.boxes[0])
    assert red[y1 : y1 + 3, x1 + 5 : x1 + 20].all()


def test_a_notebook_shows_the_boxes_of_a_long_thin_picture_in_their_place() -> None:
    thin = Image.new("RGB", (30, 1900), "white")  # 8 x 480 as drawn, not 7.6 x 480
    answer = Agent(ScriptedBackend(["ZOOM: 0, 800, 1000, 900", "42"], protocol="plain"), policy="explicit").run(
        thin, "?"
    )
    (data,) = re.findall(r"data:image/jpeg;base64,([^\"]+)", answer._repr_html_())
    picture = np.asarray(Image.open(io.BytesIO(base64.b64decode(data))).convert("RGB")).astype(int)
    rows = np.flatnonzero((picture[..., 0] - picture[..., 1] > 80).any(axis=1))
    assert (rows.min(), rows.max() + 1) == pytest.approx((480 * 0.8, 480 * 0.9), abs=4)


# ---- batches -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("workers", [1, 4])
def test_a_batch_keeps_its_order_and_a_bad_item_is_an_error_among_answers(workers: int) -> None:
    def echo(messages: list[Message]) -> str:
        part = messages[0]["content"][-1]
        assert part["type"] == "text"
        time.sleep(0.002 * (9 - int(part["text"][0])))
        return part["text"]

    pairs: list[Any] = [(IMAGE, f"{number}?") for number in range(9)]
    pairs[4] = ("no/such.png", "4?")
    pairs[6] = (IMAGE, " ")
    answers = Agent(ScriptedBackend(echo), config=AgentConfig(policy="direct")).batch(pairs, workers=workers)
    assert [answer.status for answer in answers] == ["answered"] * 4 + ["error", "answered", "error"] + ["answered"] * 2
    assert [answer.text for answer in answers if answer.text] == [f"{number}?" for number in (0, 1, 2, 3, 5, 7, 8)]
    assert "no/such.png" in str(answers[4])
    assert (answers[4].trace.question, answers[4].trace.views) == ("4?", [])
    assert (answers[4].boxes, answers[4].to_detections()) == ([], "[]")


def test_an_error_without_a_text_is_no_worse_for_a_batch() -> None:
    class Unreadable(Exception):
        def __str__(self) -> str:
            return str(self.args[0])

    def said(messages: list[Message]) -> str:
        raise Unreadable

    answers = Agent(ScriptedBackend(said)).batch([(IMAGE, "a?")] * 2)
    assert [answer.status for answer in answers] == ["error"] * 2 and "Unreadable: (it has no text" in str(answers[0])


def test_a_batch_takes_whatever_gives_pairs() -> None:
    def said(messages: list[Message]) -> str:
        part = messages[0]["content"][-1]
        return part["text"] if part["type"] == "text" else ""

    one = Agent(ScriptedBackend(said), config=AgentConfig(policy="direct"))
    questions = ["a?", "b?", "c?"]
    for pairs in (zip([IMAGE] * 3, questions, strict=True), ((IMAGE, question) for question in questions)):
        assert [answer.text for answer in one.batch(pairs)] == questions
    assert one.batch([]) == one.batch(iter(())) == []


def test_an_event_loop_is_not_blocked() -> None:
    async def main() -> list[str]:
        shared, ticks = agent(), 0

        async def tick() -> None:
            nonlocal ticks
            while True:
                ticks += 1
                await asyncio.sleep(0.001)

        beside = asyncio.create_task(tick())
        answers = [await shared.arun(IMAGE, "What?"), *await shared.abatch([(IMAGE, "What?")] * 2)]
        events = [event async for event in shared.astream(IMAGE, "What?")]
        beside.cancel()
        assert ticks > 3
        assert [event.kind for event in events] == [event.kind for event in shared.stream(IMAGE, "What?")]
        assert events[-1].answer is not None
        return [answer.text for answer in (*answers, events[-1].answer)]

    assert asyncio.run(main()) == ["42 <b>"] * 4


def test_an_asynchronous_stream_that_is_left_ends_the_turn_under_way() -> None:
    written: list[int] = []

    class Slow(ScriptedBackend):
        def session(self, image: Any) -> Any:
            session = super().session(image)
            reply = session.reply

            def slow(messages: Any, *, settings: Any, on_text: Any = None) -> Any:
                for piece in range(100):
                    time.sleep(0.02)
                    written.append(piece)
                    on_text("a")
                return reply(messages, settings=settings)

            session.reply = slow
            return session

    agent = Agent(Slow(["42"]), policy="direct")
    events = agent.astream(IMAGE, "what?")  # made outside the loop that reads it

    async def main() -> None:
        async with aclosing(events):  # type: ignore[type-var]
            async for event in events:
                if event.kind == "token":
                    break

    asyncio.run(main())
    assert 0 < len(written) < 50


def test_a_stream_that_is_left_as_its_loop_ends_leaves_no_error_behind(caplog: pytest.LogCaptureFixture) -> None:
    def slow(_: list[Message]) -> str:
        time.sleep(0.2)
        return "42"

    async def left() -> None:
        async for _ in Agent(ScriptedBackend(slow)).astream(IMAGE, "what?"):
            break

    asyncio.run(left())
    gc.collect()
    assert "never retrieved" not in caplog.text


@pytest.mark.parametrize("leave", ["break", "cancel"])
def test_leaving_an_asynchronous_stream_closes_it(leave: str) -> None:
    closed: list[bool] = []

    def numbers() -> Iterator[int]:
        try:
            for number in range(1000):
                yield number
                time.sleep(0.001)
        finally:
            closed.append(True)

    async def main() -> None:
        async def follow() -> None:
            async with aclosing(events_of(numbers(), Receiver())) as events:  # type: ignore[type-var]
                async for number in events:
                    if number == 3 and leave == "break":
                        break

        task = asyncio.create_task(follow())
        await asyncio.sleep(0.02)
        task.cancel()
        await asyncio.wait([task])

    asyncio.run(main())
    assert closed == [True]


@pytest.mark.parametrize("way", ["arun", "abatch"])
def test_a_cancelled_task_ends_its_runs(way: str) -> None:
    """At the next step; pairs of a batch that have not begun are not asked at all. The task does not wait for it."""
    asked, going = list[str](), threading.Event()

    def slow(messages: list[Message]) -> str:
        asked.append(messages[0]["content"][-1]["text"])
        if len(asked) == 2:
            going.wait(5)
        return "ZOOM: 100, 100, 500, 500"

    async def main() -> None:
        one = Agent(ScriptedBackend(slow, protocol="plain"), policy="explicit", budget={"max_turns": 50})
        pairs = [(IMAGE, question) for question in ("a?", "b?", "c?")]
        run = one.arun(IMAGE, "a?") if way == "arun" else one.abatch(pairs, workers=1)
        task = asyncio.create_task(run)
        while len(asked) < 2:
            await asyncio.sleep(0.001)
        task.cancel()
        await asyncio.wait([task], timeout=4)
        assert task.cancelled()
        going.set()

    asyncio.run(main())  # which waits for the threads
    assert len(asked) == 2 and all("a?" in one for one in asked)


def test_an_asynchronous_stream_raises_what_went_wrong() -> None:
    def broken() -> Iterator[int]:
        yield 1
        raise ConfigError("no more")

    async def main() -> list[int]:
        return [number async for number in events_of(broken(), Receiver())]

    with pytest.raises(ConfigError, match="no more"):
        asyncio.run(main())


def test_one_agent_may_run_on_many_threads() -> None:
    shared = agent()
    with ThreadPoolExecutor(8) as pool:
        answers = list(pool.map(lambda _: shared.run(IMAGE, "What?"), range(24)))
    assert {answer.text for answer in answers} == {"42 <b>"}
    assert {len(answer.trace.views) for answer in answers} == {3}
    assert len({answer.trace.id for answer in answers}) == 24


# ---- bad input -----------------------------------------------------------------------------------------------------


@each_case(
    ("call", "kind", "says"),
    [
        (lambda a: a.run("no/such.png", "What?"), ImageError, "no/such.png"),
        (lambda a: a.run(IMAGE, ""), ConfigError, "question"),
        (lambda a: a.run(IMAGE, "\ud800"), ConfigError, "question"),
        (lambda a: a.run(IMAGE, "What?", boxes=[(1, 2, 3)]), ConfigError, r"four numbers.*\(1, 2, 3\)"),
        (lambda a: a.run(IMAGE, "What?", boxes=(1, 2, 3, 4)), ConfigError, "four numbers.*a list of them"),  # type: ignore[arg-type]
        (lambda a: a.run(IMAGE, "What?", boxes=[("a", 2, 3, 4)]), ConfigError, "four numbers"),  # type: ignore[list-item]
        (lambda a: a.run(IMAGE, "What?", boxes=Box(1, 2, 3, 4)), ConfigError, r"a list of boxes.*\[box\]"),  # type: ignore[arg-type]
        (lambda a: a.batch([IMAGE]), ConfigError, "Item 0 is not a pair"),  # type: ignore[list-item]
        (lambda a: a.batch(3), ConfigError, "a list of pairs.*got int"),  # type: ignore[arg-type]
        (lambda a: a.batch([(IMAGE, "What?")], workers=0), ConfigError, "workers.*got 0"),
        (lambda a: a.run(IMAGE, "What?", boxes=[(1, 2, 3, float("nan"))]), ConfigError, "finite"),
        (lambda a: a.run(IMAGE, "What?", boxes=[Box(1, 2, 3, 4, view="coarse")]), ConfigError, "original"),
        (lambda a: a.run(IMAGE, "What?", seed=-1), ConfigError, "'seed'"),
        (lambda a: a.run(IMAGE, "What?", thread="a"), ConfigError, "state_dir"),
        (lambda a: a.resume("a"), ConfigError, "state_dir"),
        (lambda a: a.run(Image.new("RGB", (3000, 4)), "What?"), ImageError, "200:1"),
        (lambda a: a.replace(max_pixels=9).run(IMAGE, "What?"), ImageError, "over the limit of 9 px.*max_pixels"),
        (lambda a: Agent(a.backend, config=AgentConfig(protocol="klingon")), ConfigError, "klingon.*nano"),
        (lambda a: Agent.from_pretrained("nano", polcy="direct"), ConfigError, "'polcy'.*'policy'"),
        (lambda a: a.replace(model="qwen3-vl-4b"), ConfigError, "keeps its model"),
        (lambda a: a.replace(callbacks=print), ConfigError, "list of callback handlers"),
        (lambda a: Agent("nano"), ConfigError, "got 'nano'.*from_pretrained"),  # type: ignore[arg-type]
        (lambda a: Agent(a.backend, config="a.yaml"), ConfigError, "got 'a.yaml'.*load"),  # type: ignore[arg-type]
        (lambda a: Agent.from_pretrained(config={"seed": 1}), ConfigError, "AgentConfig"),  # type: ignore[arg-type]
        (lambda a: a.run(IMAGE, "What?").to_detections(image=1), ConfigError, "1 image, counted from 0; got 1"),
        (lambda a: a.run(IMAGE, "What?").to_detections(image="x"), ConfigError, "got x"),  # type: ignore[arg-type]
        (lambda a: a.batch([(IMAGE, "What?")], workers="4"), ConfigError, "workers is the number .* got '4'"),
        (lambda a: a.replace(approve=5), ConfigError, "approve is a function .* got 5"),
    ],
)
def test_bad_input_is_an_error_that_says_what(
    call: Callable[[Agent], object], kind: type[QzoomError], says: str
) -> None:
    with pytest.raises(kind, match=f"(?s){says}"):
        call(agent())


def test_gold_boxes_are_cut_to_the_image_and_kept_on_the_record() -> None:
    trace = agent().run(IMAGE, "What?", boxes=[(-5, 30, 900, 10)]).trace
    assert trace.gold == [(0, 10, 800, 30)]


def test_views_and_images_fit_together() -> None:
    answer = agent().run(IMAGE, "What?")
    find = by_digest(answer.trace.views, answer.store.image)
    assert all(find(view.digest).size == view.size for view in answer.trace.views)


def test_an_answer_that_is_kept_or_sent_to_another_process_leaves_the_model_behind() -> None:
    class Counted(ScriptedBackend):
        def view_tokens(self, image: Image.Image) -> int:
            return image.width * image.height // 28**2

        def __reduce__(self) -> Any:
            raise TypeError("A model cannot be pickled.")

    backend = Counted(zoom_once)
    answer = Agent(backend).run(IMAGE, "What?")
    again = pickle.loads(pickle.dumps(answer))
    assert again.trace == answer.trace and again.boxes == answer.boxes
    with Agent(backend).chat(IMAGE) as chat:
        assert pickle.loads(pickle.dumps(chat.ask("What?"))).text == answer.text
    chat_gone, backend_gone = weakref.ref(chat), weakref.ref(backend)
    del chat, backend
    gc.collect()
    assert chat_gone() is None and backend_gone() is None and answer.text


@pytest.mark.parametrize(
    ("model", "says"),
    [
        ("nano", "got 'nano', which lacks name, protocol, perceives, defaults, session. Agent.from_pretrained"),
        (ScriptedBackend, "got <class .*, which lacks name, protocol, defaults. Agent"),
        (
            type("Whole", (ScriptedBackend,), {"name": "", "protocol": "plain", "defaults": None}),
            "Whole'>, a class. Agent",
        ),
    ],
)
def test_what_is_no_model_is_told_what_it_lacks(model: Any, says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        Agent(model)


def test_a_model_that_says_it_looks_and_cannot_is_named() -> None:
    backend = ScriptedBackend(["42"], looks=lambda messages: [])
    backend.session = lambda image: SimpleNamespace(reply=None, close=bool)  # type: ignore[method-assign,assignment,return-value]
    answer = Agent(backend).run(IMAGE, "What?")
    assert answer.status == "error" and "'scripted' says that it looks" in str(answer.trace.error)


def test_every_form_of_a_run_has_the_context_variables_of_its_caller() -> None:
    tenant = ContextVar("tenant", default="nobody")

    def called() -> str:
        """Return the tenant."""
        return tenant.get()

    async def awaited() -> str:
        """Return the tenant."""
        return tenant.get()

    def reply(messages: list[Message]) -> str:
        calls = [f'<tool_call>{{"name": "{name}", "arguments": {{}}}}</tool_call>' for name in ("called", "awaited")]
        return tenant.get() if len(messages) > 2 else "".join(calls)

    def heard(answer: Answer | None) -> list[str]:
        assert answer is not None
        return [answer.text, *(call.text for call in answer.trace.turns[0].calls)]

    one, pairs = Agent(ScriptedBackend(reply, protocol="qwen3vl"), tools=[called, awaited]), [(IMAGE, "What?")] * 2

    async def main() -> list[list[str]]:
        events = [event async for event in one.astream(IMAGE, "What?")]
        answers = [await one.arun(IMAGE, "What?"), events[-1].answer, *await one.abatch(pairs, workers=2)]
        return list(map(heard, answers))

    def outside() -> list[list[str]]:
        tenant.set("acme")
        *_, last = one.stream(IMAGE, "What?")
        answers = [one.run(IMAGE, "What?"), last.answer, *one.batch(pairs, workers=2)]
        return [*map(heard, answers), *asyncio.run(main())]

    assert copy_context().run(outside) == [["acme"] * 3] * 8


def test_nothing_but_the_answer_keeps_the_pixels() -> None:
    """Not even until Python collects reference cycles, because a run over thousands of images grows meanwhile."""
    gc.disable()
    try:
        answer = agent().run(IMAGE, "What?")
        pixels = weakref.ref(answer.store._images[answer.trace.views[-1].id])  # those kept: `image` returns a copy
        assert pixels() is not None
        del answer
        assert pixels() is None
    finally:
        gc.enable()
