"""The parts of GRPO: sampling, sequences, guards, plans, alarms, rows."""

import json
import runpy
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from qzoom_agent.agent import Agent
from qzoom_agent.config import AgentConfig
from qzoom_agent.data.samples import Sample
from qzoom_agent.errors import BackendError, ConfigError, MissingDependency
from qzoom_agent.models.hf import HFBackend
from qzoom_agent.models.hf_batch import BatchEngine, GeneratedTurn
from qzoom_agent.models.interface import SamplingParams
from qzoom_agent.models.prompts import ImageSpan, Prompt
from qzoom_agent.models.sampling import draw
from qzoom_agent.protocols import get_protocol
from qzoom_agent.trace import Trace
from qzoom_agent.training.branches.dataset import NEEDLE_SEED, NEEDLE_SPAN
from qzoom_agent.training.branches.fitting import require_tracker
from qzoom_agent.training.grpo import callbacks as watch
from qzoom_agent.training.grpo import checks as guards
from qzoom_agent.training.grpo import launch as run
from qzoom_agent.training.grpo.callbacks import MetricsCallback, RolloutPageCallback, WarningCallback
from qzoom_agent.training.grpo.episode_length import accumulation, longest, require_room
from qzoom_agent.training.grpo.grpo_recipe import GRPORecipe, load_grpo_recipe
from qzoom_agent.training.grpo.launch import keep_recipe, make_trainer
from qzoom_agent.training.grpo.question_rows import FIRST_SEED, SEEDS_A_RUN, load_rows
from qzoom_agent.training.grpo.rollouts import RecordedTurn, RolloutBackend, RolloutScheduler, play, tokens_of
from qzoom_agent.training.grpo.trainer import trimmed
from qzoom_agent.training.rewards import Accuracy, Rollout
from qzoom_agent.views import ViewStore
from tests.tiny_models import QWEN_TEMPLATE, Family, build
from tests.training.grpo.grpo_script import AGENT, questions, tell

SHORT = {**AGENT, "generation": {"max_new_tokens": 8}}


@pytest.fixture(scope="module", params=["qwen2_5_vl", "qwen3_vl"])
def tiny(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> HFBackend:
    family: Family = request.param
    folder = build(family, tmp_path_factory.mktemp(family), max_position_embeddings=16384)
    return HFBackend.load(str(folder), device="cpu", dtype="float32")


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
        assert one.rollout.group == sample.id
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
    long = [replace(one, question="Which colour is it? " * 2000) for one in asked(2)]
    with pytest.raises(ConfigError, match=r"row '0' ended before.*tokens.*reaches.*'Which colour.*Leave the row out"):
        play(RolloutScheduler(tiny, BatchEngine(tiny).generate), long, AgentConfig().replace(**SHORT), [0, 1])


def test_a_question_without_room_is_refused_before_any_training(tiny: HFBackend, tmp_path: Path) -> None:
    given = {
        "model": tiny.name,
        "max_steps": 1,
        "prompts": 2,
        "num_generations": 2,
        "per_device_train_batch_size": 2,
        "needle": {},
        "agent": SHORT,
    }
    source = {"path": str(questions(tmp_path / "table")), "suffix": " Answer in a word."}
    make_trainer(recipe(**given, data=[{"path": "needle"}, source]), tmp_path / "out")
    rows = list(Dataset.load_from_disk(source["path"]))
    texts = ["What is it?", "And what is that?", "Which? " + "?" * 20_000, "?" * 30_000]
    longer = [row | {"question": [text]} for row, text in zip(rows, texts, strict=True)]
    Dataset.from_list(longer).save_to_disk(str(tmp_path / "long"))
    source["path"] = str(tmp_path / "long")
    said = (
        rf"row 2 of the dataset {source['path']} has 200\d\d tokens.*room for 1\d+ beside.*'Which\? \?.*Leave the row"
    )
    with pytest.raises(ConfigError, match=said):
        make_trainer(recipe(**given, data=[{"path": "needle"}, source]), tmp_path / "out")


def test_crops_in_their_place_are_refused(tiny: HFBackend) -> None:
    scheduler = RolloutScheduler(tiny, BatchEngine(tiny).generate)
    session = RolloutBackend(scheduler, 0).session(lambda _: Image.new("RGB", (56, 56)))
    with pytest.raises(ConfigError, match=r"perception\.positions to 'plain'"):
        session.place("crop1", source="coarse", cells=(0, 0, 1, 1))


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
    return RecordedTurn(
        Prompt(tuple(prompt), spans), GeneratedTurn(tuple(ids), tuple(-float(i) for i in ids), "", finish, 0)
    )


def image(view: str) -> Image.Image:
    return Image.new("RGB", (28, 28), (int(view[4:]), 0, 0))


def test_turns_become_one_sequence() -> None:
    tokens = tokens_of([said([1, 2], [3, END]), said([1, 2, 3, END, 5, 6], [7, END], views=2)], image, end=END)
    assert tokens.prompt == [1, 2]
    assert tokens.completion == [3, END, 5, 6, 7, END]
    assert tokens.mask == [1, 1, 0, 0, 1, 1]
    assert tokens.logps == [-3, -9, 0, 0, -7, -9]
    assert len(tokens.images) == 2 and tokens.rewritten == 0


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


def test_padding_that_all_rows_share_is_left_out() -> None:
    batch = {
        "prompt_ids": torch.tensor([[0, 0, 1], [0, 2, 3]]),
        "prompt_mask": torch.tensor([[0, 0, 1], [0, 1, 1]]),
        "completion_ids": torch.tensor([[4, 0, 0, 0], [5, 6, 0, 0]]),
        "completion_mask": torch.tensor([[1, 0, 0, 0], [1, 1, 0, 0]]),
        "mm_token_type_ids": torch.arange(14).reshape(2, 7),
        "advantages": torch.tensor([1.0, -1.0]),
        "pixel_values": torch.zeros(4, 4),
    }
    cut = trimmed(batch)
    assert cut["prompt_ids"].tolist() == [[0, 1], [2, 3]]
    assert cut["completion_ids"].tolist() == [[4, 0], [5, 6]]
    assert cut["mm_token_type_ids"].tolist() == [[1, 2, 3, 4], [8, 9, 10, 11]]
    assert cut["pixel_values"].shape == (4, 4) and cut["advantages"].shape == (2,)
    masked = {**batch, "completion_mask": torch.zeros(2, 4)}
    assert trimmed(masked) is masked, "a batch that is masked wholly keeps its shape"


class TestGuards:
    def talk(self, tiny: HFBackend, protocol: str, template: str) -> guards.ProbeConversation:
        tiny.processor.chat_template = template
        return guards.ProbeConversation(tiny.codec, get_protocol(protocol), factor=tiny.defaults.factor, tools=True)

    @pytest.fixture(autouse=True)
    def _same_template(self, tiny: HFBackend) -> Any:
        before = tiny.processor.chat_template
        yield
        tiny.processor.chat_template = before

    @pytest.mark.parametrize("protocol", ["qwen3vl", "deepeyes", "mini_o3"])
    def test_a_template_that_only_adds_is_taken(self, tiny: HFBackend, protocol: str) -> None:
        talk = self.talk(tiny, protocol, QWEN_TEMPLATE)
        guards.require_template(talk)
        opening, between = talk.tokens()
        assert opening > 20 and between > 5

    def test_a_template_that_drops_images_of_results_is_refused(self, tiny: HFBackend) -> None:
        blind = QWEN_TEMPLATE.replace("part.type == 'image'", "part.type == 'image' and message.role == 'user'")
        with pytest.raises(ConfigError, match=r"shows 1 of 2 images of a conversation with a result"):
            guards.require_template(self.talk(tiny, "qwen3vl", blind))

    def test_a_template_that_rewrites_turns_is_refused(self, tiny: HFBackend) -> None:
        said = "part.text | replace('Let me', 'I') if message.role == 'assistant' else part.text"
        with pytest.raises(ConfigError, match="rewrites the conversation"):
            guards.require_template(self.talk(tiny, "qwen3vl", QWEN_TEMPLATE.replace("part.text", said)))

    def test_tokens_without_features_are_refused(self, tiny: HFBackend) -> None:
        factor, mark = tiny.defaults.factor, tiny.codec.image_id
        shown = [Image.new("RGB", (2 * factor, factor))]
        guards.require_features([1, mark, mark], shown, tiny)
        with pytest.raises(BackendError, match="1 visual tokens for 2 features of 1 images"):
            guards.require_features([1, mark], shown, tiny)

    def test_dropped_images_are_refused(self) -> None:
        guards.require_images({"pixel_values": torch.zeros(8, 4), "image_grid_thw": torch.ones(2, 3)}, 2)
        with pytest.raises(BackendError, match="dropped 2 of 2 images"):
            guards.require_images({}, 2)

    def test_a_family_whose_images_trl_cannot_place_is_refused(self, tmp_path: Path) -> None:
        llava = HFBackend.load(str(build("llava", tmp_path / "llava")), device="cpu", dtype="float32")
        with pytest.raises(BackendError, match="Qwen-VL families only"):
            guards.require_family(llava.model.config)

    def test_other_log_probabilities_are_refused(self) -> None:
        sampled, trained = torch.tensor([[-1.0, -2.0, float("nan")]]), torch.tensor([[-1.0, -2.5, -1.0]])
        distance = guards.logp_distance(sampled, trained, torch.ones(1, 3))
        assert distance == pytest.approx(0.25)
        guards.require_same_model(distance, tolerance=0.3, writer="vLLM")
        with pytest.raises(BackendError, match=r"\(vLLM\) differ from the trainer's by 0\.250"):
            guards.require_same_model(distance, tolerance=0.05, writer="vLLM")

    def test_torn_groups_are_refused(self) -> None:
        assert accumulation(recipe(prompts=8), 4) == 2
        with pytest.raises(ConfigError, match="6 prompts do not divide over 4 devices"):
            accumulation(recipe(prompts=6), 4)

    def test_the_image_processor_returns_tensors_unasked(self, tiny: HFBackend) -> None:
        fresh = HFBackend.load(tiny.name, device="cpu", dtype="float32")
        factor = fresh.defaults.factor
        view = Image.new("RGB", (3 * factor, 2 * factor), (9, 8, 7))
        before = fresh.processor.image_processor(images=[view])
        assert not isinstance(before["pixel_values"], torch.Tensor), "else this guard is no longer needed"
        guards.fit_for_trl(fresh.processor, factor=factor)
        after = fresh.processor.image_processor(images=[view])
        assert after["pixel_values"].equal(torch.as_tensor(before["pixel_values"])), "and views stay as they are"


def test_the_longest_episode_is_counted_and_refused_with_its_numbers(tiny: HFBackend) -> None:
    config = AgentConfig().replace(**AGENT)
    views = config.budget.view_budget(tiny.defaults)
    need = longest(config, views, opening=50, between=10)
    assert (need.prompt, need.written, need.crops, need.between) == (50 + 16, 4 * 200, 2 * 9, 5 * 10)
    assert require_room(need, context=2000, limit=None) == need.completion
    with pytest.raises(ConfigError, match=r"prompt 66, written 800, crops 18.*does not fit into.*context of 900"):
        require_room(need, context=900, limit=None)
    with pytest.raises(ConfigError, match=r"completion of 868 tokens, but max_completion_length is 500"):
        require_room(need, context=2000, limit=500)
    direct = longest(config.replace(policy="direct"), views, opening=50, between=10)
    assert (direct.crops, direct.between, direct.written) == (0, 0, 200)


def test_alarms_ring_once_when_calls_stop(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    alarm = WarningCallback(tmp_path / "log.jsonl")
    for rate in [0.9] * 10 + [0.0] * 30:
        tell(alarm, **{"zoom/call_rate_needed/needle-hop": rate, "entropy": 1.0})
    assert alarm.warned == ["zoom/call_rate_needed/needle-hop"]
    assert capsys.readouterr().out.count("the model stops zooming") == 1
    assert "fell from 0.90" in json.loads((tmp_path / "log.jsonl").read_text())["warning"]


@pytest.mark.parametrize(
    ("logs", "name"),
    [
        ({"zoom/refusal_rate": 0.8}, "refused"),
        ({"zoom/failure_rate": 0.8}, "failed"),
        ({"zoom/truncated": 0.5}, "truncated"),
        ({"frac_reward_zero_std": 1.0}, "equal"),
    ],
)
def test_alarms_ring(tmp_path: Path, logs: dict[str, float], name: str) -> None:
    alarm = WarningCallback(tmp_path / "log.jsonl")
    tell(alarm, **dict.fromkeys(logs, 0.0))
    assert not alarm.warned
    for _ in range(60):
        tell(alarm, **logs)
    assert alarm.warned == [name]


def test_an_alarm_rings_when_entropy_is_gone(tmp_path: Path) -> None:
    alarm = WarningCallback(tmp_path / "log.jsonl")
    for _ in range(60):
        tell(alarm, entropy=0.01 if alarm._means else 1.0)
    assert alarm.warned == ["entropy"]


def begun(callback: TrainerCallback, step: int) -> None:
    state = TrainerState(global_step=step)
    callback.on_train_begin(TrainingArguments(output_dir="none"), state, TrainerControl())


def test_an_alarm_of_a_run_that_goes_on_remembers_its_log(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Steps after the checkpoint are dropped from the log, and what was warned of before is not said again."""
    path = tmp_path / "log.jsonl"
    lines: list[dict[str, Any]] = [
        {"step": at, "loss": 0.0, "zoom/call_rate_needed": 0.9, "zoom/truncated": 0.5, "entropy": 1.0}
        for at in range(1, 11)
    ]
    lines += [{"step": 3, "warning": "50% of the rollouts are cut off"}, {"step": 11, "loss": 0.0, "entropy": 9.0}]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines) + '{"step": 12, "lo')
    alarm = WarningCallback(path)
    for callback in (MetricsCallback(path), alarm):
        begun(callback, 10)
    assert [json.loads(line) for line in path.read_text().splitlines()] == lines[:-1]
    assert alarm.warned == ["truncated"] and not capsys.readouterr().out
    for _ in range(30):
        tell(alarm, **{"zoom/call_rate_needed": 0.0, "entropy": 0.01})
    assert alarm.warned == ["truncated", "zoom/call_rate_needed", "entropy"], "peaks and the first entropy are known"


def test_episodes_are_kept_although_rounds_begin_between_the_steps(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(watch, "write_report", lambda *_, **__: None)
    trace = Trace(question="?", status="answered")
    one, store = Rollout(trace=trace, answer="407"), ViewStore()
    store.add_original(Image.new("RGB", (28, 28)))

    def steps() -> list[int]:
        return [json.loads(line)["step"] for line in (tmp_path / "rollouts.jsonl").read_text().splitlines()]

    def rounds(keeper: RolloutPageCallback, *at: int) -> None:
        for step in at:
            keeper.keep(step, [one], ["accuracy"], [[1.0]], [store])

    first = RolloutPageCallback(tmp_path, every=20, episodes=1)
    begun(first, 0)
    rounds(first, 0, 0, 12, 24, 36, 48, 60)
    assert steps() == [0, 24, 48, 60]
    again = RolloutPageCallback(tmp_path, every=20, episodes=1)
    begun(again, 48)
    assert steps() == [0, 24], "the round of the checkpoint's step is run again"
    rounds(again, 48, 60)
    assert steps() == [0, 24, 48, 60]


def recipe(**changes: Any) -> GRPORecipe:
    return GRPORecipe.model_validate(
        {"max_steps": 4, "prompts": 2, "num_generations": 2, "needle": {"needle-hop": 1.0}}
        | {"per_device_train_batch_size": 2}
        | changes
    )


def test_rows_are_those_of_the_run_and_of_no_other_stage() -> None:
    rows = load_rows(recipe(seed=3))
    assert len(rows) == 8
    names = [rows[at]["sample"].id for at in range(8)]
    assert len(set(names)) == 8
    seeds = [int(name.rsplit("-", 1)[1]) for name in names]
    assert min(seeds) >= FIRST_SEED + 3 * SEEDS_A_RUN > NEEDLE_SEED + 4 * NEEDLE_SPAN
    assert rows[5]["sample"].question == load_rows(recipe(seed=3))[5]["sample"].question
    assert len(load_rows(recipe(minibatches=2))) == 4, "two steps a round"


def test_questions_of_other_sources_keep_all_their_answers(tmp_path: Path) -> None:
    image = Image.new("RGB", (56, 56))
    Dataset.from_list([{"image": image, "question": "When?", "answer": ["noon", "12:00"]}]).save_to_disk(tmp_path / "t")
    rows = load_rows(recipe(needle={}, data=[{"path": str(tmp_path / "t")}]))
    assert rows[0]["sample"].answer == "noon" and rows[0]["sample"].answers == ("noon", "12:00")


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("needle: {needle-hop: 1.0}", r"steps\s+Field required"),
        ("max_steps: 1", "give one of them"),
        (
            "max_steps: 1\nneedle: {needle-hop: 1}\nprompts: 3\nnum_generations: 3\nper_device_train_batch_size: 2",
            "9 rows, which do not divide",
        ),
        ("max_steps: 1\nneedle: {needle-hop: 1}\nrewards: [{name: charm}]", "charm"),
        ("max_steps: 1\nneedle: {needle-hop: 1}\nrewards: charm", "no published list 'charm'"),
        ("max_steps: 1\nneedle: {needle-hop: 1}\nrewards: deepeyes\njudge: http://one/v1", "only `judge` is given"),
        (
            "max_steps: 1\nneedle: {needle-hop: 1}\nrewards: [{name: accuracy, judged: true}]",
            "only `judged: true` is given",
        ),
        ("max_steps: 1\nneedle: {needle-hop: 1}\nagent: {polcy: direct}", "Did you mean 'policy'"),
        ("max_steps: 1\nneedle: {needle-hop: 1}\nagent: {seed: 3}", "set elsewhere"),
        ("max_steps: 1\nneedle: {needle-hop: 1}\nrollouts: {vllm: {}}", "by: generate"),
        (
            "max_steps: 1\nneedle: {needle-hop: 1}\nrollouts: {by: generate, vllm: {mode: colocate}}",
            "expands them again",
        ),
        ("max_steps: 1\nneedle: {needle-hop: 1}\ntrl: {use_vllm: true}", "set elsewhere"),
        (
            "max_steps: 5\nneedle: {needle-hop: 1}\nnum_iterations: 2",
            "5 steps would end within one. Set max_steps to 6",
        ),
        (
            "max_steps: 1\nneedle: {needle-hop: 1}\ntrl: {vllm_importance_sampling_correction: false}",
            "nobody could tell",
        ),
    ],
)
def test_a_bad_recipe_says_what_is_wrong(tmp_path: Path, text: str, said: str) -> None:
    path = tmp_path / "grpo.yaml"
    path.write_text(text)
    with pytest.raises(ConfigError, match=said):
        load_grpo_recipe(path)


def test_losses_are_those_of_their_papers() -> None:
    gspo = recipe(loss={"loss_type": "gspo", "epsilon": 1e-3}).loss.settings()
    assert gspo["importance_sampling_level"] == "sequence" and gspo["epsilon"] == 1e-3 and gspo["epsilon_high"] == 4e-4
    assert recipe(loss={"loss_type": "dr_grpo"}).loss.settings()["scale_rewards"] == "none"


def test_a_dry_run_prints_the_recipe_and_the_plan(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "grpo.yaml"
    path.write_text("max_steps: 40\nneedle: {needle-hop: 1}\nminibatches: 2\nrewards: visionthink\n")
    assert run.main(["--config", str(path), "--output", str(tmp_path / "out"), "--dry-run"]) == 0
    printed = capsys.readouterr().out
    assert "policy       implicit" in printed  # as nano would answer, too
    assert "40, 20 rounds of rollouts" in printed and "8 questions x 8 rollouts = 64 episodes" in printed
    assert "rewards      1 x accuracy, 0.5 x format, 1 x visionthink-price" in printed
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("rewards: [{name: accuracy, judged: true}]", "belong together"),
        ("rewards: [{name: format}, {name: format}]", "different names"),
        ("trl: {num_generations: 3}", "`trl` sets num_generations"),
        ("report_to: notes", "no tracker 'notes'"),
    ],
)
def test_a_dry_run_refuses_what_a_run_would(tmp_path: Path, text: str, said: str) -> None:
    path = tmp_path / "grpo.yaml"
    path.write_text(f"max_steps: 40\nneedle: {{needle-hop: 1}}\n{text}\n")
    with pytest.raises(ConfigError, match=said):
        run.main(["--config", str(path), "--dry-run"])


def test_a_dry_run_says_what_this_machine_lacks(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "grpo.yaml"
    path.write_text("max_steps: 40\nneedle: {needle-hop: 1}\nrollouts: {by: generate, vllm: {}}\n")
    assert run.main(["--config", str(path), "--dry-run"]) == 0
    assert "missing      rollouts.vllm needs vLLM" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("devices", "said"),
    [
        (7, "8 prompts do not divide over 7 devices"),
        (8, "minibatches of batches of 16 on 8"),
    ],
)
def test_a_dry_run_refuses_what_the_run_would(tmp_path: Path, devices: int, said: str) -> None:
    path = tmp_path / "grpo.yaml"
    path.write_text("max_steps: 40\nneedle: {needle-hop: 1}\nper_device_train_batch_size: 16\n")
    with pytest.raises(ConfigError, match=said):
        run.main(["--config", str(path), "--dry-run", "--devices", str(devices)])


def test_a_tracker_that_is_not_there_is_named(tmp_path: Path) -> None:
    for known in ("none", "all"):
        require_tracker(known)
    with pytest.raises(ConfigError, match=r"no tracker 'wandbb'.*Choose from none, .*wandb"):
        require_tracker("wandbb")
    with pytest.raises(MissingDependency, match="report_to: swanlab needs"):
        make_trainer(recipe(report_to="swanlab"), tmp_path)


def test_branches_can_be_given_on_the_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "grpo.yaml"
    path.write_text("max_steps: 40\nneedle: {needle-hop: 1}\n")
    assert run.main(["--config", str(path), "--branches", "some/folder", "--dry-run"]) == 0
    assert "branches: some/folder" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("module", "arguments"),
    [
        ("grpo_benchmark", ["--config", "none.yaml"]),
        ("grpo_benchmark", ["--config", "some.yaml", "--rounds", "0"]),
        ("train_nano", ["--config", "none.yaml"]),
        ("qzoom_agent.training.sft.fine_tune", ["--config", "none.yaml"]),
        ("export_nano", ["no/folder", "no/folder"]),
        ("reproduce", ["none.yaml"]),
        ("review_savings", ["no/folder"]),
        ("overhead", ["--what"]),
        ("perception_benchmark", ["--repeats", "0"]),
    ],
)
def test_modules_say_what_is_missing_without_a_traceback(
    module: str, arguments: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("sys.argv", [module, *arguments])
    monkeypatch.delitem(sys.modules, module, raising=False)
    with pytest.raises(SystemExit) as ended:
        runpy.run_module(module, run_name="__main__")
    assert ended.value.code == 2
    assert arguments[-1] in capsys.readouterr().err


def test_a_finished_run_is_not_repeated(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "out" / "final").mkdir(parents=True)
    (tmp_path / "grpo.yaml").write_text("max_steps: 40\nneedle: {needle-hop: 1}\n")
    assert run.main(["--config", str(tmp_path / "grpo.yaml"), "--output", str(tmp_path / "out")]) == 0
    assert f"Delete {tmp_path / 'out'} to train again" in capsys.readouterr().out


def test_a_finished_run_is_not_passed_off_as_one_of_another_recipe(tmp_path: Path) -> None:
    (tmp_path / "grpo.yaml").write_text("model: nano\nmax_steps: 40\nneedle: {needle-hop: 1}\n")
    keep_recipe(recipe(model="other"), tmp_path / "out")
    (tmp_path / "out" / "final").mkdir()
    with pytest.raises(ConfigError, match=r"out was begun with other settings .*model: 'other', now 'nano'"):
        run.main(["--config", str(tmp_path / "grpo.yaml"), "--output", str(tmp_path / "out")])


def test_an_output_that_is_a_file_is_named(tmp_path: Path) -> None:
    (tmp_path / "grpo.yaml").write_text("max_steps: 40\nneedle: {needle-hop: 1}\n")
    (tmp_path / "out").write_text("")
    with pytest.raises(ConfigError, match="Cannot write into"):
        run.main(["--config", str(tmp_path / "grpo.yaml"), "--output", str(tmp_path / "out")])


@pytest.mark.parametrize(
    ("keys", "said"),
    [
        ({"num_generations": 3, "max_steps": 1}, "`trl` sets max_steps, num_generations, which follows"),
        ({"loss_type": "grpo"}, "`trl` sets loss_type"),
        ({"no_such_key": 1}, "TRL refuses the recipe: .*no_such_key"),
        ({"generation_batch_size": 3}, "TRL refuses the recipe"),
    ],
)
def test_further_settings_of_trl_change_none_of_the_recipes_own(
    keys: dict[str, Any], said: str, tmp_path: Path
) -> None:
    with pytest.raises(ConfigError, match=said):
        run.trl_config(recipe(trl=keys), tmp_path, completion=64)
    kept = run.trl_config(
        recipe(trl={"save_total_limit": 5, "importance_sampling_level": "sequence"}), tmp_path, completion=64
    )
    assert kept.save_total_limit == 5 and kept.importance_sampling_level == "sequence"


def test_checkpoints_are_written_between_rounds(tmp_path: Path) -> None:
    config = run.trl_config(recipe(max_steps=12, num_iterations=3, save_steps=4), tmp_path, completion=64)
    assert config.save_steps == 6


@pytest.mark.parametrize("launched", ["bf16", "no"])
def test_the_precision_is_that_of_the_launch(launched: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """DeepSpeed compares both and refuses others."""
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", launched)
    assert run.trl_config(recipe(), tmp_path, completion=64).bf16 == (launched == "bf16")
    assert run.trl_config(recipe(bf16=True), tmp_path, completion=64).bf16


def checkpoint(output: Path, step: int) -> None:
    folder = output / f"checkpoint-{step}"
    folder.mkdir(parents=True)
    (folder / "trainer_state.json").write_text("{}")


def test_a_run_goes_on_under_its_own_recipe_only(tmp_path: Path) -> None:
    keep_recipe(recipe(model="one"), tmp_path)
    keep_recipe(recipe(model="two"), tmp_path)  # nothing was trained yet
    checkpoint(tmp_path, 2)
    with pytest.raises(ConfigError, match=r"other settings \(model: 'two', now 'one'; seed: 0, now 7\)"):
        keep_recipe(recipe(model="one", seed=7), tmp_path)
    assert load_grpo_recipe(tmp_path / "recipe.yaml").model == "two"
    keep_recipe(recipe(model="two", max_steps=9, watch={"every": 3}, logging_steps=2, report_to="wandb"), tmp_path)
    assert load_grpo_recipe(tmp_path / "recipe.yaml").max_steps == 9


def test_the_command_does_not_report_one_recipe_as_another(tmp_path: Path) -> None:
    (tmp_path / "grpo.yaml").write_text("model: nano\nmax_steps: 40\nneedle: {needle-hop: 1}\n")
    checkpoint(tmp_path / "out", 2)
    keep_recipe(recipe(model="other"), tmp_path / "out")
    with pytest.raises(ConfigError, match="model: 'other', now 'nano'"):
        run.main(["--config", str(tmp_path / "grpo.yaml"), "--output", str(tmp_path / "out")])


OLD_NAMES = {new: old for old, new in GRPORecipe.renamed.items()}


def test_a_recipe_with_the_keys_of_the_first_version_is_read(tmp_path: Path) -> None:
    (tmp_path / "grpo.yaml").write_text(
        "steps: 3\ngroup: 2\nneedle: {needle-hop: 1}\nloss: {name: grpo, entropy: 0.1}\n"
    )
    with pytest.warns(FutureWarning, match="`group` is now called `num_generations`"):
        read = load_grpo_recipe(tmp_path / "grpo.yaml", overrides=["loss.beta=0.01", "rewards.0.rule=open"])
    assert (read.max_steps, read.num_generations, read.loss.loss_type, read.loss.entropy_coef) == (3, 2, "grpo", 0.1)
    assert read.loss.beta == 0.01 and read.rewards == [Accuracy(rule="open")]


def test_a_run_of_the_first_version_is_resumed_under_the_same_recipe(tmp_path: Path) -> None:
    """Its settings were saved under old keys."""
    keep_recipe(recipe(model="one"), tmp_path)
    checkpoint(tmp_path, 2)
    saved = json.loads((tmp_path / "settings.json").read_text())
    saved["loss"] = {{"loss_type": "name"}.get(key, key): value for key, value in saved["loss"].items()}
    old = {OLD_NAMES.get(key, key): value for key, value in saved.items()}
    assert {"group", "batch", "schedule"} <= old.keys()
    (tmp_path / "settings.json").write_text(json.dumps(old))
    keep_recipe(recipe(model="one"), tmp_path)
    (tmp_path / "settings.json").write_text(json.dumps(old | {"group": 16}))
    with pytest.raises(ConfigError, match="num_generations: 16, now 2"):
        keep_recipe(recipe(model="one"), tmp_path)
