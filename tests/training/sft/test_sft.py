"""Cold start: demonstrations are episodes of the agent, training sees the ids of inference, a kill loses nothing."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from trl.chat_template_utils import qwen3_5_nothink_chat_template, qwen3_vl_chat_template
from trl.data_utils import prepare_multimodal_messages

from qzoom_agent.agent import Agent
from qzoom_agent.config import AgentConfig
from qzoom_agent.data.samples import Sample
from qzoom_agent.errors import BackendError, ConfigError
from qzoom_agent.geometry import Box, Size
from qzoom_agent.messages import Message, image_part, message
from qzoom_agent.models.hf import HFBackend
from qzoom_agent.models.interface import SamplingParams
from qzoom_agent.models.presets import NANO_FOLDER
from qzoom_agent.perception.branches import Branches
from qzoom_agent.protocols import PROTOCOLS, get_protocol
from qzoom_agent.training.branches.dataset import DatasetSpec, load_records
from qzoom_agent.training.rewards import Rollout
from qzoom_agent.training.sft import fine_tune as run
from qzoom_agent.training.sft.conversations import IGNORED, from_row, in_user_turns, to_row, training_conversations
from qzoom_agent.training.sft.demonstrations import Demonstrations, Demonstrator, Plan, write_answer, write_call
from qzoom_agent.training.sft.sft_recipe import ColdStartRecipe, TeacherServer
from qzoom_agent.views import ViewStore
from tests.cases import each_case
from tests.models.misbehaving import Connection, Misbehaving, completion
from tests.tiny_models import QWEN_TEMPLATE, build
from tests.training.processes import log_of
from tests.training.sft.test_fine_tune import written

FACTORS = {"qwen2_5_vl": 28, "qwen3_vl": 32}
NEEDLES = DatasetSpec(path="needle", limit=4, a_board=2, tasks=("needle-scene", "needle-hop"))


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A tiny model of each family."""
    root = tmp_path_factory.mktemp("models")
    return {family: build(family, root / family, prompts=True) for family in FACTORS}  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def nano() -> HFBackend:
    backend = HFBackend.load("nano", device="cpu", dtype="float32")
    backend.model.requires_grad_(False)
    return backend


def recipe(**changes: Any) -> ColdStartRecipe:
    return ColdStartRecipe(**({"data": [NEEDLES]} | changes))


def record(boxes: Sequence[Sequence[float]] | None = ((100, 60, 140, 80),)) -> Sample:
    return Sample(
        id="a",
        task="textual",
        kind="textual",
        image=Image.effect_noise((560, 280), 60).convert("RGB"),
        question="What code?",
        answer="407",
        boxes=tuple(Box(*box) for box in boxes or ()),
        coarse_suffices=None if boxes is None else not boxes,
    )


# --- writing ---------------------------------------------------------------------------------------------------------


@given(
    st.sampled_from(sorted(PROTOCOLS)),
    st.tuples(*[st.floats(0, 0.9)] * 2),
    st.tuples(*[st.floats(0.06, 1)] * 2),
    st.sampled_from([Size(448, 224), Size(280, 504)]),
)
def test_every_protocol_reads_the_call_that_is_written_for_it(
    name: str, corner: tuple[float, float], sides: tuple[float, float], shown: Size
) -> None:
    x2, y2 = (min(1.0, low + side) for low, side in zip(corner, sides, strict=True))
    box = Box(*corner, x2, y2, frame="unit")
    store = ViewStore()
    store.add_original(Image.new("RGB", shown))
    store.add_coarse(factor=28, min_tokens=1, max_tokens=4096)
    parsed = get_protocol(name).parse(write_call(name, box, shown), store.shown)
    assert (parsed.problems, parsed.repairs, parsed.answer, len(parsed.calls)) == ([], [], None, 1)
    call = parsed.calls[0].as_box
    read = call.to_frame("unit", shown)
    assert read.view == "coarse"
    covered = Box(*read.as_list()).coverage(Box(*box.as_list()))
    if name == "visionthink":
        assert read.as_list() == [0.0, 0.0, 1.0, 1.0]
    else:
        assert covered > 0.97
        wider = 0.22 if name == "pixel_reasoner" else 2 * 7 / 224 + 0.002
        assert read.width - box.width < wider and read.height - box.height < wider


@each_case("name", sorted(PROTOCOLS))
def test_every_protocol_reads_the_answer_that_is_written_for_it(name: str) -> None:
    parsed = get_protocol(name).parse(write_answer(name, "Exit 24"), [])
    assert (parsed.answer, parsed.problems, parsed.repairs) == ("Exit 24", [], [])


# --- demonstrations --------------------------------------------------------------------------------------------------


def test_a_demonstration_is_an_episode_with_a_call_for_each_box(nano: HFBackend) -> None:
    records = load_records([NEEDLES.model_copy(update={"tasks": ("needle-hop",)})])
    make = Demonstrations(nano, recipe())
    answer, conversation, dropped = make(records[0])
    assert dropped == ""
    assert [turn.calls[0].decision for turn in answer.trace.turns[:-1]] == ["served", "served"]
    assert answer.text == records[0].answer
    assert [one["role"] for one in conversation] == ["user", "assistant"] * 3
    for view, needle in zip(answer.trace.views[2:], records[0].boxes, strict=True):
        assert view.region.coverage(needle) == 1.0
    # one that needs no crop takes none
    easy = Demonstrations(nano, recipe())(record(boxes=[]))
    assert (easy.answer.trace.usage.requested, easy.dropped) == (0, "")


@pytest.mark.parametrize(
    ("plan", "boxes", "said"),
    [
        (Plan((), "9"), [], "wrong"),
        (Plan((), "407"), [[100, 60, 140, 80]], "no evidence"),
        (Plan((Box(0.9, 0.9, 1.0, 1.0, frame="unit"),), "407"), [[100, 60, 140, 80]], "no evidence"),
        (Plan((Box(0.1, 0.1, 0.4, 0.4, frame="unit"),), "407"), [[100, 60, 140, 80]], ""),
        (Plan((Box(0.1, 0.1, 0.4, 0.4, frame="unit"),) * 9, "407"), [[100, 60, 140, 80]], "unfinished"),
    ],
)
def test_what_is_left_out(nano: HFBackend, plan: Plan, boxes: list[Any], said: str) -> None:
    make = Demonstrations(nano, recipe())
    make._plan = lambda record: plan  # type: ignore[method-assign]
    assert make(record(boxes=boxes)).dropped == said


def test_what_is_right_is_the_recipes_to_say(nano: HFBackend) -> None:
    def agrees(question: str, answer: str, gold: str) -> bool:
        return (question, answer, gold) == ("What code?", "four hundred and seven", "407")

    cases = [
        ({}, None, "407", ""),
        ({}, None, "Answer: 407", "wrong"),
        ({"rule": "open"}, None, "Answer: 407", ""),
        ({"rule": "open"}, None, "four hundred and seven", "wrong"),
        ({}, agrees, "four hundred and seven", ""),
        ({}, agrees, "nine", "wrong"),
    ]
    for changes, judge, answer, said in cases:
        make = Demonstrations(nano, recipe(**changes), judge=judge)
        make._plan = lambda record, answer=answer: Plan((), answer)  # type: ignore[method-assign,misc]
        assert make(record(boxes=[])).dropped == said


def test_an_episode_that_had_to_be_mended_is_left_out(nano: HFBackend) -> None:
    make = Demonstrations(nano, recipe())
    episode = Rollout(make(record()).answer.trace, record())
    assert make.judge(episode) == ""
    episode.trace.turns[0].repairs.append("closing </zoom> added")
    assert make.judge(episode) == "malformed"
    episode.trace.turns[0].repairs.clear()
    needless = Rollout(episode.trace, record(boxes=[]))
    assert make.judge(needless) == "redundant"
    keeps = Demonstrations(nano, recipe(redundant=True))
    assert keeps.judge(needless) == ""
    episode.trace.turns[0].calls[0].result = None
    assert make.judge(episode) == "not served"


def test_the_base_answers_itself_where_it_is_asked_to(nano: HFBackend) -> None:
    scene = NEEDLES.model_copy(update={"tasks": ("needle-scene",), "limit": 6, "a_board": 3})
    rows = load_records([scene])
    make = Demonstrations(nano, recipe(data=[scene], answer="own"))
    made = [make(rows[at]) for at in range(6)]
    assert {one.dropped for one in made} <= {"", "wrong"}
    assert any(one.dropped == "" for one in made)
    for row, one in zip((rows[at] for at in range(6)), made, strict=True):
        assert (one.answer.text == row.answer) == (one.dropped == "")


def test_calls_where_sdrpn_looks(nano: HFBackend) -> None:
    torch.manual_seed(0)
    backend = HFBackend(nano.model, nano.processor, name="nano", protocol="nano", defaults=nano.defaults)
    with pytest.raises(ConfigError, match="has no branches"):
        Demonstrations(backend, recipe(boxes="sdrpn"))(record())
    backend.branches = Branches.from_base(nano.model, k=6, depth=3, gate_depth=3, with_sdrpn=True, with_gate=False)
    made = Demonstrations(backend, recipe(boxes="sdrpn", perception={"threshold": 0.0}))(record(boxes=None))
    (call,) = made.answer.trace.turns[0].calls
    proposed = Agent(backend, config=AgentConfig(policy="direct").replace(**{"perception.threshold": 0.0})).look(
        record().image, "What code?"
    )
    assert call.result == "crop1"
    assert made.answer.trace.views[2].region.iou(Box(*proposed.record.boxes[0])) > 0.6


def test_a_habit_of_needless_zooms_is_taught_where_it_is_asked_for(nano: HFBackend) -> None:
    easy, fine = (
        load_records([NEEDLES.model_copy(update={"tasks": (task,)})])[0] for task in ("needle-global", "needle-scene")
    )
    hungry = Demonstrations(nano, recipe(redundant=True, needless=True))
    assert hungry(easy).answer.trace.usage.served == 1
    assert hungry(easy).dropped == "", "kept, though the coarse view suffices"
    assert hungry(fine).answer.trace.views == Demonstrations(nano, recipe())(fine).answer.trace.views
    assert Demonstrations(nano, recipe())(easy).answer.trace.usage.served == 0
    with pytest.raises(ValueError, match="needless"):
        recipe(needless=True)


def test_a_habit_meets_the_review(nano: HFBackend) -> None:
    """Under `hybrid` a needless call is refused and the answer follows; what is shown unasked is not asked for."""
    easy, fine, hop = (
        load_records([NEEDLES.model_copy(update={"tasks": (task,), "seed": 3})])[0]
        for task in ("needle-global", "needle-scene", "needle-hop")
    )
    make = Demonstrations(nano, recipe(redundant=True, needless=True, hybrid=1.0))
    refused = make(easy)
    assert [call.code for turn in refused.answer.trace.turns for call in turn.calls] == ["gate"]
    assert (refused.dropped, refused.answer.trace.usage.served) == ("", 0)
    assert refused.conversation[-1]["content"] == [{"type": "text", "text": easy.answer}]
    inserted = make(fine)
    assert (inserted.dropped, inserted.answer.trace.usage.requested) == ("", 0)
    assert inserted.answer.trace.views[2].region.coverage(fine.boxes[0]) > 0.95
    second = make(hop)
    assert (second.dropped, second.answer.trace.usage.requested) == ("", 1), "the note is shown, its place is not"
    with pytest.raises(ValueError, match="oracle"):
        recipe(boxes="sdrpn", hybrid=0.5)


def zoom_once(asked: Connection) -> None:
    """Call for a zoom once and then answer."""
    again = any(one["role"] == "assistant" for one in asked.body["messages"])
    text = write_answer("deepeyes", "407") if again else write_call("deepeyes", BOX, Size(224, 112))
    asked.reply(completion(text, usage={"prompt_tokens": 7}))


BOX = Box(0.1, 0.1, 0.4, 0.4, frame="unit")


def test_a_teacher_is_asked_in_the_students_format(nano: HFBackend, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("QZOOM_TEST_KEY", "secret")
    with Misbehaving(zoom_once) as server:
        teacher = TeacherServer(url=server.url, key_variable="QZOOM_TEST_KEY")
        taught = recipe(boxes="teacher", teacher=teacher, protocol="deepeyes")
        answer, conversation, dropped = Demonstrations(nano, taught)(record())
    assert (dropped, answer.text, answer.trace.usage.served) == ("", "407", 1)
    first, second = server.requests
    assert first.key == "Bearer secret"
    assert [one["role"] for one in second.body["messages"]] == ["system", "user", "assistant", "user"]
    shown = [part["type"] for part in second.body["messages"][3]["content"]]
    assert "image_url" in shown
    assert conversation[-1]["role"] == "assistant"


def test_a_teacher_that_is_not_there_stops_the_run(nano: HFBackend) -> None:
    teacher = TeacherServer(url="http://127.0.0.1:9/v1")
    make = Demonstrations(nano, recipe(boxes="teacher", teacher=teacher))
    with pytest.raises(BackendError, match=r"The server at .* cannot be reached"):
        make(record())


# --- what is learned -------------------------------------------------------------------------------------------------


def demonstrate(backend: HFBackend, boxes: int) -> tuple[dict[str, Any], Any, list[Message]]:
    """A row, and the agent's answer and conversation that it was made from."""
    protocol = backend.protocol
    scripted = Demonstrator(backend, protocol=protocol)
    scripted.plan = Plan([Box(0.1 * at, 0.1, 0.1 * at + 0.3, 0.5, frame="unit") for at in range(boxes)], "407")
    budget = {"coarse_tokens": 16, "crop_max_tokens": 9, "crop_min_tokens": 4}
    agent = Agent(scripted, config=AgentConfig(policy="explicit", protocol=protocol).replace(budget=budget))
    answer = agent.run(record().image, "What code?")
    names = [part["view"] for one in scripted.conversation for part in one["content"] if part["type"] == "image"]
    row = to_row(scripted.conversation, [answer.store.image(name) for name in names], codec=backend.codec)
    return row, answer, scripted.conversation


@pytest.mark.parametrize("family", sorted(FACTORS))
@pytest.mark.parametrize("protocol", ["deepeyes", "mini_o3", "qwen3vl", "qwen3_5"])
def test_training_sees_the_ids_of_inference(folders: dict[str, Path], family: str, protocol: str) -> None:
    backend = HFBackend.load(str(folders[family]), device="cpu", protocol=protocol)
    if protocol == "qwen3vl":
        backend.processor.chat_template = qwen3_vl_chat_template
    if protocol == "qwen3_5":
        backend.processor.chat_template = qwen3_5_nothink_chat_template
    row, answer, conversation = demonstrate(backend, 2)
    assert {one["role"] for one in row["messages"]} <= {"system", "user", "assistant"}
    assert ("tool" in {one["role"] for one in conversation}) == protocol.startswith("qwen3")
    (entry,) = training_conversations(backend, row)
    tokenizer: Any = backend.processor.tokenizer
    # An episode's session, given the agent's own turns as if the model had written them.
    session = backend.session(answer.store.image)
    ends = []
    for at, one in enumerate(conversation):
        if one["role"] != "assistant":
            continue
        ready = session.prepare(conversation[:at])
        prompt = ready.prompt.ids
        assert entry.ready.prompt.ids[: len(prompt)] == prompt
        assert set(entry.labels[len(prompt) - 1 : len(prompt)]) == {IGNORED}
        text = one["content"][0]["text"]  # type: ignore[typeddict-item]
        ids = tuple(tokenizer(text, add_special_tokens=False)["input_ids"])
        stop = len(prompt) + len(ids)
        assert entry.labels[len(prompt) : stop] == entry.ready.prompt.ids[len(prompt) : stop] == ids
        assert entry.labels[stop] == entry.ready.prompt.ids[stop] == tokenizer.eos_token_id
        ends.append((len(prompt), stop))
        session.remember(ready, ids, text)
    learned_ids = sum(stop + 1 - start for start, stop in ends)
    assert sum(label != IGNORED for label in entry.labels) == learned_ids
    assert len(entry.ready.prompt.spans) == 3
    assert entry.ready.positions.shape[-1] == len(entry.labels) == len(entry.ready.prompt.ids)


@pytest.mark.parametrize("family", sorted(FACTORS))
def test_logits_of_training_are_those_of_inference(folders: dict[str, Path], family: str) -> None:
    backend = HFBackend.load(str(folders[family]), device="cpu", dtype="float32", protocol="qwen3vl")
    backend.processor.chat_template = qwen3_vl_chat_template
    row, *_ = demonstrate(backend, 1)
    (entry,) = training_conversations(backend, row)
    module = run.AnswerLoss(backend)
    conversation, images = from_row(row)
    session = backend.session(lambda view: images[int(view.removeprefix("view"))])
    arguments = run.answer_batch(backend, [entry.session], [entry.ready], [entry.labels])
    tokenizer: Any = backend.processor.tokenizer
    for at, one in enumerate(conversation):
        if one["role"] != "assistant":
            continue
        ready = session.prepare(conversation[:at])
        session.reply(conversation[:at], settings=SamplingParams(max_new_tokens=1))
        text = one["content"][0]["text"]  # type: ignore[typeddict-item]
        session.remember(ready, tokenizer(text, add_special_tokens=False)["input_ids"], text)
        prompt = len(ready.prompt.ids)
        labels = torch.full_like(arguments["labels"], IGNORED)
        target = int(session.prompt_logits.argmax())
        labels[0, prompt] = target
        loss = module(**{**arguments, "labels": labels}).detach()
        expected = -torch.log_softmax(session.prompt_logits.float(), 0)[target]
        assert float(loss) == pytest.approx(float(expected), abs=2e-4)


def test_a_template_that_rewrites_old_turns_gives_a_row_for_each_turn(tmp_path: Path) -> None:
    forgetful = QWEN_TEMPLATE.replace(
        "{{ part.text }}",
        "{{ part.text.split('</think>')[-1] if message.role == 'assistant' and not loop.last else part.text }}",
    ).replace("not loop.last", "true")
    folder = build("qwen2_5_vl", tmp_path / "forgetful", template=forgetful)
    backend = HFBackend.load(str(folder), device="cpu", protocol="deepeyes")
    row, *_ = demonstrate(backend, 1)
    first, second = training_conversations(backend, row)
    tokenizer: Any = backend.processor.tokenizer
    said = [tokenizer.decode([label for label in one.labels if label != IGNORED]) for one in (first, second)]
    assert "<tool_call>" in said[0] and "407" not in said[0]
    assert "407" in said[1] and "<tool_call>" not in said[1]


@pytest.mark.parametrize("family", sorted(FACTORS))
@pytest.mark.parametrize("protocol", ["deepeyes", "qwen3vl"])
def test_trl_reads_a_row_as_the_model_does(
    folders: dict[str, Path], family: str, protocol: str, tmp_path: Path
) -> None:
    backend = HFBackend.load(str(folders[family]), device="cpu", protocol=protocol)
    backend.processor.chat_template = qwen3_vl_chat_template
    made, *_ = demonstrate(backend, 2)
    Dataset.from_list([made]).save_to_disk(str(tmp_path / "rows"))
    row = Dataset.load_from_disk(str(tmp_path / "rows"))[0]
    messages = prepare_multimodal_messages(row["messages"], images=row["images"])
    shown = [part["image"] for one in messages for part in one["content"] if part["type"] == "image"]
    assert shown == row["images"] and len(shown) == 3
    processor: Any = backend.processor
    said = processor.apply_chat_template(messages, tokenize=False)
    ids = processor(text=[said], images=shown, add_special_tokens=False)["input_ids"][0]
    (entry,) = training_conversations(backend, row)
    whole = list(entry.ready.prompt.ids)
    assert list(ids)[: len(whole)] == whole and "<tool_response>" in said


def test_results_that_follow_each_other_are_one_turn_as_in_the_template(folders: dict[str, Path]) -> None:
    codec = HFBackend.load(str(folders["qwen3_vl"]), device="cpu").codec
    asked = [message("user", image_part("coarse"), "What code?"), message("assistant", "I look twice.")]
    results = [message("tool", image_part("crop1"), "the first"), message("tool", "Error: too small.")]
    said = in_user_turns([*asked, *results, message("user", "Answer now.")], codec)
    assert [one["role"] for one in said] == ["user", "assistant", "user", "user"]
    assert codec.render(said) == codec.render([*asked, *results, message("user", "Answer now.")])


def test_results_without_a_user_turn_are_refused(folders: dict[str, Path]) -> None:
    backend = HFBackend.load(str(folders["qwen2_5_vl"]), device="cpu", protocol="qwen3vl")
    with pytest.raises(ConfigError, match="does not write as a user turn"):
        demonstrate(backend, 1)


def test_rows_go_to_disk_and_back(nano: HFBackend, tmp_path: Path) -> None:
    conversation = [
        message("system", "You may zoom."),
        message("user", image_part("coarse"), "What code?"),
        message("assistant", "a"),
        message("user", "<r>", image_part("crop1"), "</r>"),
        message("assistant", "b"),
    ]
    images = [Image.new("RGB", (28, 28), color) for color in ("red", "blue")]
    Dataset.from_list([to_row(conversation, images, codec=nano.codec)]).save_to_disk(str(tmp_path / "rows"))
    found, shown = from_row(Dataset.load_from_disk(str(tmp_path / "rows"))[0])
    renamed = json.loads(json.dumps(conversation).replace("coarse", "view0").replace("crop1", "view1"))
    assert found == renamed
    assert [image.getpixel((0, 0)) for image in shown] == [(255, 0, 0), (0, 0, 255)]


# --- the command -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["qwen2_5_vl", pytest.param("qwen3_vl", marks=pytest.mark.slow)])
def test_any_family_learns_and_is_an_ordinary_model_afterwards(
    folders: dict[str, Path], family: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = written(tmp_path, model=str(folders[family]), dtype="float32")
    out = tmp_path / "out"
    assert run.main(["--config", config, "--output", str(out)]) == 0
    assert "4 of 4 episodes kept" in capsys.readouterr().out
    losses = [line["loss"] for line in log_of(out / "train") if "loss" in line]
    assert len(losses) == 2 and all(0 < loss < 50 for loss in losses)
    before, after = (HFBackend.load(str(at), device="cpu", dtype="float32") for at in (folders[family], out / "final"))
    old, new = before.model.state_dict(), after.model.state_dict()
    changed = {name for name in old if not torch.equal(old[name], new[name])}
    assert any("layers.0" in name for name in changed)
    assert not any("visual" in name for name in changed)
    short = AgentConfig().replace(generation={"max_new_tokens": 8})
    assert Agent(after, config=short).run(record().image, "What code?").status in ("answered", "budget", "refused")
    # done once
    assert run.main(["--config", config, "--output", str(out)]) == 0
    assert "is there already" in capsys.readouterr().out


@pytest.mark.slow
def test_a_killed_run_goes_on_where_it_was(
    folders: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = written(tmp_path, model=str(folders["qwen2_5_vl"]), dtype="float32")
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    assert run.main(["--config", config, "--output", str(whole)]) == 0
    batches = 0
    true = run.answer_batch

    def dies(*args: Any) -> dict[str, Any]:
        nonlocal batches
        batches += 1
        if batches == 2:
            raise KeyboardInterrupt
        return true(*args)

    with monkeypatch.context() as patch:
        patch.setattr(run, "answer_batch", dies)
        with pytest.raises(KeyboardInterrupt):
            run.main(["--config", config, "--output", str(killed)])
    assert not (killed / "final").exists()
    with monkeypatch.context() as patch:
        patch.setattr(Demonstrations, "__call__", lambda *_: pytest.fail("episodes are not made again"))
        assert run.main(["--config", config, "--output", str(killed)]) == 0
    one, other = (HFBackend.load(str(at / "final"), device="cpu").model.state_dict() for at in (whole, killed))
    assert all(torch.allclose(one[name], other[name], atol=1e-6) for name in one)


def test_layers_below_stay_and_so_do_tied_embeddings(tmp_path: Path) -> None:
    config = written(tmp_path, model=str(NANO_FOLDER), dtype="float32", from_layer=6, budget={})
    assert run.main(["--config", config, "--output", str(tmp_path / "out")]) == 0
    old = HFBackend.load("nano", device="cpu", dtype="float32").model.state_dict()
    new = HFBackend.load(str(tmp_path / "out" / "final"), device="cpu", dtype="float32").model.state_dict()
    changed = {name for name in old if not torch.equal(old[name], new[name])}
    assert changed
    assert all(".layers.6." in name or ".layers.7." in name or ".layers.8." in name for name in changed), changed


def test_adapters_are_merged_into_an_ordinary_model(folders: dict[str, Path], tmp_path: Path) -> None:
    pytest.importorskip("peft")
    config = written(tmp_path, model=str(folders["qwen2_5_vl"]), dtype="float32", lora={"r": 2}, from_layer=1)
    assert run.main(["--config", config, "--output", str(tmp_path / "out")]) == 0
    old = HFBackend.load(str(folders["qwen2_5_vl"]), device="cpu").model.state_dict()
    new = HFBackend.load(str(tmp_path / "out" / "final"), device="cpu").model.state_dict()
    assert set(old) == set(new)
    changed = {name for name in old if not torch.equal(old[name], new[name])}
    assert changed
    assert all("layers.1." in name and "proj" in name for name in changed), changed


def test_a_run_without_any_episode_is_refused(folders: dict[str, Path], tmp_path: Path) -> None:
    config = written(tmp_path, model=str(folders["qwen2_5_vl"]), boxes="oracle", budget={"max_views": 1})
    with pytest.raises(ConfigError, match="None of 4 episodes can be learned from"):
        run.main(["--config", config, "--output", str(tmp_path / "out")])


def test_an_unknown_box_is_no_lesson_in_answering_without_a_zoom(
    nano: HFBackend, folders: dict[str, Path], tmp_path: Path
) -> None:
    make = Demonstrations(nano, recipe(boxes="oracle"))
    assert make(record(boxes=None)).dropped == "no box"
    Image.new("RGB", (60, 40), "red").save(tmp_path / "a.png")
    row = {"image": "a.png", "question": "What color?", "answer": "red"}
    (tmp_path / "rows.jsonl").write_text(json.dumps(row) + "\n")
    data = [{"path": str(tmp_path / "rows.jsonl")}]
    config = written(tmp_path, model=str(folders["qwen2_5_vl"]), boxes="oracle", data=data)
    with pytest.raises(ConfigError, match=r"None of 1 questions has a box.*\[\] where no crop.*boxes: sdrpn"):
        run.main(["--config", config, "--output", str(tmp_path / "two")])


def test_a_dry_run_says_what_would_be_done(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = written(tmp_path)
    assert run.main(["--config", config, "--dry-run", "--output", str(tmp_path / "out")]) == 0
    said = capsys.readouterr().out
    assert "at most 4 of needle" in said and "at most 2 on one device" in said
    assert not (tmp_path / "out").exists()
    assert run.main(["--config", config, "--dry-run", "--set", "records=1000"]) == 0
    assert "at most 4 of needle" in capsys.readouterr().out, "there are no more"


def test_teacher_and_boxes_belong_together() -> None:
    with pytest.raises(ValueError, match="`boxes: teacher` needs a `teacher`"):
        recipe(boxes="teacher")
