"""Decoders with several kinds of layers, run in pieces and in batches, against the stock forward.

On random features in place of images, so that families whose processors need more packages are compared too.
"""

from inspect import signature
from types import SimpleNamespace
from typing import Any, NamedTuple

import pytest
import torch
import transformers
from packaging.version import Version
from torch import Tensor
from transformers import AutoConfig, AutoModelForImageTextToText, PreTrainedModel
from transformers.modeling_outputs import BaseModelOutputWithPooling
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from qzoom_agent.errors import BackendError
from qzoom_agent.perception.adapters import adapter_for, full_layers, of_full_layers
from qzoom_agent.perception.attention import layer_inputs
from qzoom_agent.perception.branches import Branches
from qzoom_agent.perception.decoder import Decoder, Embedded, Prefill
from qzoom_agent.perception.masks import layer_masks
from tests.tiny_models import SINCE

IMAGE, LAYERS, K = 7, 8, 3
PROMPT = [1, 2, 3, *[IMAGE] * 12, 4, 5, *[IMAGE] * 6, 6, 8, 9, 10]
"""Text, a large image, a small one, and text."""
TEXT: dict[str, Any] = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "initializer_range": 0.15,
    "pad_token_id": 0,
    "max_position_embeddings": 512,
}
LINEAR = {
    "layer_types": ["linear_attention", "full_attention"] * (LAYERS // 2),
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
    "rope_parameters": {
        "rope_type": "default",
        "rope_theta": 10000.0,
        "partial_rotary_factor": 0.5,
        "mrope_section": [1, 1, 0],
        "mrope_interleaved": True,
    },
}
EXPERTS = {
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 16,
    "shared_expert_intermediate_size": 16,
}
SLIDING = {
    "layer_types": ["sliding_attention", "full_attention"] * (LAYERS // 2),
    "sliding_window": 5,
    "global_head_dim": 16,
    "num_kv_shared_layers": 0,
    "hidden_size_per_layer_input": 0,
    "final_logit_softcapping": 3.0,
}
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "Qwen3.5": ("qwen3_5", LINEAR),
    "Qwen3.5 with experts": ("qwen3_5_moe", {**LINEAR, **EXPERTS}),
    "Gemma 4, causal": ("gemma4", SLIDING),
    "Gemma 4": ("gemma4", {**SLIDING, "use_bidirectional_attention": "vision"}),
    "Gemma 4, one projection for keys and values": (
        "gemma4",
        {**SLIDING, "use_bidirectional_attention": "vision", "attention_k_eq_v": True, "num_global_key_value_heads": 1},
    ),
    "Gemma 4, unified": ("gemma4_unified", {**SLIDING, "use_bidirectional_attention": "vision"}),
}


class Case(NamedTuple):
    model: PreTrainedModel
    decoder: Decoder
    features: list[Any]


@pytest.fixture(scope="module", params=CASES)
def case(request: pytest.FixtureRequest) -> Case:
    model_type, text = CASES[request.param]
    if model_type not in CONFIG_MAPPING:
        pytest.skip(f"this transformers has no {model_type}")
    if model_type.startswith("gemma4") and Version(transformers.__version__) < Version(SINCE["gemma4"]):
        pytest.skip(f"layers of Gemma 4 are called differently before transformers {SINCE['gemma4']}")
    torch.manual_seed(0)
    config = AutoConfig.for_model(model_type, text_config={**TEXT, **text}, image_token_id=IMAGE, audio_config=None)
    if config.vision_config is not None:  # features are random, so the tower is not run
        for name in {"depth", "num_hidden_layers"} & vars(config.vision_config).keys():
            setattr(config.vision_config, name, 1)
        for name in {"hidden_size", "intermediate_size", "num_position_embeddings"} & vars(config.vision_config).keys():
            setattr(config.vision_config, name, 64)
    auto: Any = AutoModelForImageTextToText
    model: Any = auto.from_config(config).eval().requires_grad_(False)
    features = [SimpleNamespace(pooler_output=(torch.randn(count, 32),)) for count in (12, 6)]
    return Case(model, Decoder(model), features)


def places(case: Case, count: int) -> Tensor:
    plain = torch.arange(count)
    return plain.expand(3, 1, -1) if case.decoder.adapter.two_dimensional else plain[None]


def stock(case: Case) -> Tensor:
    ids = torch.tensor([PROMPT])
    parts = tuple(part for one in case.features for part in one.pooler_output)
    features = BaseModelOutputWithPooling(pooler_output=parts)
    given: dict[str, Any] = {"mm_encoder_outputs": {"image": features}}
    with torch.inference_mode(), pytest.MonkeyPatch.context() as patch:
        if "mm_encoder_outputs" not in signature(case.model.forward).parameters:  # before transformers 5.18
            patch.setattr(case.model.model, "get_image_features", lambda *_, **__: features)
            given = {"pixel_values": torch.zeros(1)}
        out = case.model(
            input_ids=ids,
            position_ids=places(case, len(PROMPT)),
            mm_token_type_ids=(ids == IMAGE).int(),
            use_cache=False,
            **given,
        )
    logits: Tensor = out.logits[:, -1]
    return logits


def embedded(case: Case) -> Embedded:
    return case.decoder.embed(torch.tensor([PROMPT]), case.features)


def test_all_layers_in_one_go_are_the_stock_forward(case: Case) -> None:
    decoder, new = case.decoder, embedded(case)
    with torch.inference_mode():
        rotary, mask = (
            decoder.rotary(new.hidden, places(case, len(PROMPT))),
            decoder.mask(new.hidden, visual=new.visual),
        )
        out = decoder.run(new, range(decoder.depth), rotary=rotary, mask=mask)
        assert torch.allclose(decoder.logits(out), stock(case), atol=1e-4)


@pytest.mark.parametrize("lean", [False, True])
def test_a_prefill_with_an_image_put_in_later_is_the_stock_forward(case: Case, lean: bool) -> None:
    """The small image and what follows it take the place of other text."""
    decoder, whole = case.decoder, embedded(case)
    with torch.inference_mode():
        rotary = decoder.rotary(whole.hidden, places(case, len(PROMPT)))
        prefill = Prefill(decoder, K)
        other = decoder.embed(torch.tensor([[*PROMPT[:16], 30, 31, 32]]), case.features[:1])
        prefill.extend(other, decoder.rotary(other.hidden, places(case, 19)))
        kept = prefill.keep(16)
        assert kept == (15 if decoder.recurrent else 16)  # back to the end of the image
        rest = whole.cut(slice(kept, None))
        work = prefill.extend(rest, decoder.rotary(rest.hidden, places(case, len(PROMPT))[..., kept:]))
        logits, more = prefill.finish(rotary, lean=lean)
    assert torch.allclose(logits, stock(case), atol=1e-4)
    assert work + more == K * (len(PROMPT) - kept) + (LAYERS - K) * len(PROMPT)


def test_rows_padded_on_the_left_are_those_without_padding(case: Case) -> None:
    decoder, whole = case.decoder, embedded(case)
    short = whole.cut(slice(13, None))
    pad = torch.randn(1, 13, 32)
    hidden = torch.cat((whole.hidden, torch.cat((pad, short.hidden), dim=1)))
    visual = torch.cat((whole.visual, torch.cat((torch.zeros(1, 13, dtype=torch.bool), short.visual), dim=1)))
    valid = torch.ones(2, len(PROMPT), dtype=torch.bool)
    valid[1, :13] = False
    positions = places(case, len(PROMPT)).repeat_interleave(2, dim=-2)
    with torch.inference_mode():
        mask = layer_masks(case.model.config, valid, hidden, visual=visual)
        rotary = decoder.rotary(hidden, positions)
        both = decoder.run(hidden, range(K), rotary=rotary, mask=mask)
        for row, one in ((0, whole), (1, short)):
            tokens = one.hidden.shape[1]
            turned = decoder.rotary(one.hidden, positions[..., :1, -tokens:])
            alone = decoder.run(one, range(K), rotary=turned, mask=decoder.mask(one.hidden, visual=one.visual))
            assert torch.allclose(both[row, -tokens:], alone[0], atol=1e-4)


def test_branches_are_copies_of_layers_with_full_attention(case: Case) -> None:
    branches = Branches.from_base(case.model, k=K, depth=3, gate_depth=2)
    layers = case.decoder.text.layers
    assert full_layers(case.decoder.config) == [1, 3, 5, 7]
    assert branches.sdrpn is not None and branches.gate is not None
    for own in (branches.sdrpn.layers, branches.gate.layers):
        for copy, index in zip(own, (3, 5), strict=True):
            assert all(torch.equal(a, b) for a, b in zip(copy.parameters(), layers[index].parameters(), strict=True))
    with pytest.raises(BackendError, match="3 of the model's 4 follow"):
        Branches.from_base(case.model, k=2, depth=4)


def test_an_untrained_map_is_the_attention_logits_of_its_layer(case: Case) -> None:
    decoder, new = case.decoder, embedded(case)
    branches = Branches.from_base(case.model, k=K, depth=1, gate_depth=1)
    assert branches.sdrpn is not None
    with torch.inference_mode():
        rotary, mask = (
            decoder.rotary(new.hidden, places(case, len(PROMPT))),
            decoder.mask(new.hidden, visual=new.visual),
        )
        kept = layer_inputs(decoder, new, [K], rotary=rotary, mask=mask)
        hidden = kept.states[K]
        attended = kept.attention(K, range(4), [-1], slice(None))[0, :, 0]
        turned = of_full_layers(rotary)
        states = branches.sdrpn.states(hidden, rotary=turned, mask=of_full_layers(mask))
        last = (turned[0][:, -1:], turned[1][:, -1:])
        query, keys = branches.sdrpn.queries(states[:, -1:], last), branches.sdrpn.keys(states, turned)
        shared = keys.repeat_interleave(4 // keys.shape[1], dim=1)
        logits = torch.cat([branches.sdrpn.logits(query[:, [at]], shared[:, [at]]) for at in range(4)])
    assert torch.allclose(logits.softmax(dim=-1), attended, atol=1e-5)


def test_heads_of_other_layers_are_refused(case: Case) -> None:
    decoder, new = case.decoder, embedded(case)
    with torch.inference_mode():
        rotary, mask = (
            decoder.rotary(new.hidden, places(case, len(PROMPT))),
            decoder.mask(new.hidden, visual=new.visual),
        )
        kept = layer_inputs(decoder, new, [2], rotary=rotary, mask=mask)
    assert kept.states[2].shape == (1, len(PROMPT), 32)
    with pytest.raises(BackendError, match="with full attention: 1, 3, 5, 7"):
        kept.attention(2, [0], [-1], slice(None))


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"hidden_size_per_layer_input": 8}, "embeddings of its own"),
        ({"num_kv_shared_layers": 2}, "shares keys between layers"),
        ({"use_bidirectional_attention": "all"}, "attends to later text"),
    ],
)
def test_models_whose_layers_cannot_be_copied_are_refused(changes: dict[str, Any], said: str) -> None:
    text = {**TEXT, **SLIDING, **changes}
    with pytest.raises(BackendError, match=said):
        adapter_for(AutoConfig.for_model("gemma4", text_config=text, vision_config=None, audio_config=None))
