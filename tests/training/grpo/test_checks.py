"""What is refused before and during GRPO."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from PIL import Image

from qzoom_agent.config import AgentConfig
from qzoom_agent.errors import BackendError, ConfigError
from qzoom_agent.models.hf import HFBackend
from qzoom_agent.protocols import get_protocol
from qzoom_agent.training.branches.dataset import DatasetSpec, load_records
from qzoom_agent.training.grpo import checks as guards
from qzoom_agent.training.grpo.launch import episode_config, make_trainer
from qzoom_agent.training.grpo.run_cost import longest, require_room
from tests.tiny_models import QWEN_TEMPLATE, build
from tests.training.grpo.grpo_script import AGENT, questions, recipe

SHORT = {**AGENT, "generation": {"max_new_tokens": 8}}


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
        distances = guards.logp_distances(sampled, trained, torch.ones(1, 3))
        assert distances == [pytest.approx((0.25, 0.5, 2))] * 2, "one turn is all there is"
        guards.require_same_model(distances, tolerance=0.3, writer="vLLM")
        with pytest.raises(BackendError, match=r"\(vLLM\) differ from the trainer's by 0\.2500 in the mean and 0\.500"):
            guards.require_same_model(distances, tolerance=0.05, writer="vLLM")
        with pytest.raises(BackendError, match=r"0\.5000 at most; .* allows 0\.02 a token"):
            guards.require_same_model(distances, tolerance=1.0, writer="shared decoding", exact=True)

    def test_a_turn_that_is_off_is_not_hidden_by_the_others(self) -> None:
        mask = torch.ones(2, 1201)
        mask[0, 1100], mask[1, 600] = 0, 0
        sampled, trained = torch.zeros(2, 1201), torch.zeros(2, 1201)
        trained[0, 1101:] = 0.1
        trained[1, 600] = 9.0  # context
        every, first, second = guards.logp_distances(sampled, trained, mask)
        assert every.mean == pytest.approx(0.1 * 100 / 2400) and first.largest == 0
        assert second == pytest.approx((0.1 * 100 / 700, 0.1, 700))
        guards.require_same_model([every, first], tolerance=0.01, writer="vLLM")
        with pytest.raises(BackendError, match=r"\(vLLM, turn 2\) differ .* by 0\.0143 in the mean"):
            guards.require_same_model([every, first, second], tolerance=0.01, writer="vLLM")
        guards.require_same_model([every, first, second._replace(tokens=63)], tolerance=0.01, writer="vLLM")

    @pytest.mark.parametrize("agent", [{"policy": "locate"}, {"perception": {"gate": "answer"}}])
    def test_episodes_of_several_conversations_are_refused(self, tiny: HFBackend, agent: dict[str, Any]) -> None:
        with pytest.raises(ConfigError, match="asks the model in several conversations"):
            episode_config(recipe(agent={**AGENT, **agent}), tiny)

    def test_another_models_look_is_refused(self, tiny: HFBackend) -> None:
        with pytest.raises(ConfigError, match=r"agent\.perceiver is 'nano'"):
            episode_config(recipe(agent={**AGENT, "perceiver": "nano"}), tiny)

    def test_episodes_look_at_the_models_thresholds(self, tiny: HFBackend, monkeypatch: pytest.MonkeyPatch) -> None:
        own = {"perception.gate_threshold": 0.02, "generation.max_new_tokens": 9999}
        monkeypatch.setattr(tiny, "settings", own)
        config = episode_config(recipe(agent=AGENT), tiny)
        assert config.perception.gate_threshold == 0.02 and config.generation.max_new_tokens < 9999
        given = episode_config(recipe(agent={**AGENT, "perception": {"gate_threshold": 0.7}}), tiny)
        assert given.perception.gate_threshold == 0.7

    def test_torn_groups_are_refused(self) -> None:
        assert recipe(prompts=8).accumulation(4) == 2
        with pytest.raises(ConfigError, match="6 prompts do not divide over 4 devices"):
            recipe(prompts=6).accumulation(4)

    def test_the_image_processor_returns_tensors_unasked(self, tiny: HFBackend, tmp_path: Path) -> None:
        fresh = HFBackend.load(tiny.name, device="cpu", dtype="float32")
        factor = fresh.defaults.factor
        view = Image.new("RGB", (3 * factor, 2 * factor), (9, 8, 7))
        before = fresh.processor.image_processor(images=[view])
        assert not isinstance(before["pixel_values"], torch.Tensor), "else this guard is no longer needed"
        size = fresh.processor.image_processor.to_dict()["size"]
        for _ in range(2):
            guards.fit_for_trl(fresh.processor, factor=factor)
        assert fresh.processor.image_processor.size != size
        fresh.processor.save_pretrained(tmp_path)
        saved = json.loads((tmp_path / "processor_config.json").read_text())["image_processor"]
        assert saved["size"] == size, "the trained model is saved with the sizes that it came with"
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
    assert (direct.crops, direct.between, direct.written) == (0, 10, 400)
    more = config.replace(**{"budget.max_views": 6, "perception.roi_max_tokens": 12})
    hybrid = longest(more.replace(policy="hybrid"), views, opening=50, between=10)
    assert (hybrid.prompt, hybrid.crops) == (50 + 16 + 12, 4 * 12), "one of five crops is inserted"
    implicit = longest(more.replace(policy="implicit"), views, opening=50, between=10)
    assert (implicit.prompt, implicit.crops) == (50 + 16 + 3 * 12, 0), "each of three turns may be a look"
    always = longest(more.replace(policy="always", **{"perception.max_regions": 2}), views, opening=50, between=10)
    assert always.prompt == 50 + 16 + 2 * 12


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
        rf"row 3 of the dataset {source['path']} has 200\d\d tokens.*room for 1\d+ beside.*'Which\? \?.*Leave the row"
    )
    with pytest.raises(ConfigError, match=said):
        make_trainer(recipe(**given, data=[{"path": "needle"}, source]), tmp_path / "out")
    asked = load_records([DatasetSpec(**source, limit=2, seed=2)])
    ((_, numbers, texts_left),) = asked.questions()
    assert [f"{texts[at]}{source['suffix']}" for at in numbers] == texts_left and list(numbers) != [0, 1]
