"""Models with adapters of peft, as they are given to the backend, and as folders of their own."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from qzoom_agent.errors import BackendError
from qzoom_agent.messages import image_part, message
from qzoom_agent.models import SamplingParams
from qzoom_agent.models.hf import HFBackend
from qzoom_agent.models.stock import compare
from tests.tiny_models import build

peft = pytest.importorskip("peft")


def answer(backend: HFBackend) -> str:
    noise = np.random.default_rng(7).integers(0, 255, (84, 112, 3), dtype=np.uint8)
    session = backend.session(lambda view: Image.fromarray(noise))
    return session.reply(
        [message("user", image_part("coarse"), "What?")], settings=SamplingParams(max_new_tokens=12)
    ).text


def test_a_model_with_adapters_of_peft_answers_as_its_own_forward(tmp_path: Path) -> None:
    base = HFBackend.load(str(build("qwen2_5_vl", tmp_path)), device="cpu")
    lora = peft.LoraConfig(r=2, target_modules=["q_proj", "v_proj"], init_lora_weights=False)
    model = peft.get_peft_model(base.model, lora).eval()
    tuned = HFBackend(model, base.processor, name="tuned")
    assert compare(tuned) == ""
    adapted = answer(tuned)
    model.disable_adapter_layers()
    assert answer(tuned) != adapted
    model.save_pretrained(tmp_path / "adapter")
    with pytest.raises(BackendError, match="holds an adapter and not its base"):
        HFBackend.load(str(tmp_path / "adapter"), device="cpu")


def test_an_adapter_that_adds_to_the_prompt_is_refused(tmp_path: Path) -> None:
    base = HFBackend.load(str(build("qwen2_5_vl", tmp_path)), device="cpu")
    prompted = peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2, num_layers=2, token_dim=32)
    prompted.num_attention_heads, prompted.num_transformer_submodules = 4, 1
    with pytest.raises(BackendError, match="PROMPT_TUNING, which adds virtual tokens"):
        HFBackend(peft.get_peft_model(base.model, prompted), base.processor, name="prompted")
