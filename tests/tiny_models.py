"""Tiny random models with the stock classes, saved as ordinary folders, for the tests that run weights.

Weights are seeded and large enough (std 0.2) that logits differ clearly between prompts; the tokenizer is a byte-level
BPE trained on a few sentences, with the special tokens of the Qwen family or the placeholder of LLaVA. Qwen3-VL has its
own chat template, which writes results of tools into a user turn; Qwen2.5-VL has one that knows nothing of tools.
"""

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pytest
import torch
import transformers
from packaging.version import Version
from PIL import Image
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import (
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen3_5Config,
    Qwen3_5ForConditionalGeneration,
    Qwen3VLConfig,
    Qwen3VLForConditionalGeneration,
)
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil
from trl.chat_template_utils import qwen3_vl_chat_template

from qzoom_agent.protocols import PROTOCOLS

Family = Literal["qwen2_5_vl", "qwen3_vl", "qwen3_5", "gemma4", "llava"]
SINCE = {"idefics3": "5.18", "smolvlm": "5.18", "gemma4": "5.21", "gemma4_bidirectional": "5.21"}
"""First version of transformers that can process a family's images without torchvision."""
MIXED: frozenset[Family] = frozenset({"qwen3_5", "gemma4"})
"""Families with two kinds of layers; here every second layer has full attention."""

QWEN_TOKENS = (
    "<|endoftext|>",
    "<|im_start|>",
    "<|im_end|>",
    "<|vision_start|>",
    "<|vision_end|>",
    "<|image_pad|>",
    "<|video_pad|>",
)
QWEN_TEMPLATE = (
    "{%- for message in messages %}{{ '<|im_start|>' + message.role + '\n' }}"
    "{%- for part in message.content %}"
    "{%- if part.type == 'image' %}<|vision_start|><|image_pad|><|vision_end|>{%- else %}{{ part.text }}{%- endif %}"
    "{%- endfor %}{{ '<|im_end|>\n' }}{%- endfor %}"
    "{%- if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{%- endif %}"
)
LLAVA_TEMPLATE = (
    "{% for message in messages %}"
    "{% if message['role'] != 'system' %}{{ message['role'].upper() + ': '}}{% endif %}"
    "{% for content in message['content'] | selectattr('type', 'equalto', 'image') %}{{ '<image>\n' }}{% endfor %}"
    "{% for content in message['content'] | selectattr('type', 'equalto', 'text') %}{{ content['text'] + ' '}}"
    "{% endfor %}{% endfor %}{% if add_generation_prompt %}{{ 'ASSISTANT:' }}{% endif %}"
)
SENTENCES = (
    "user: what is the code on the red circle? You may zoom. assistant: it is 407.",
    "Answer now. How many green triangles are there? three, four, five, 0123456789 <zoom> </zoom>",
)


def build(
    family: Family,
    folder: Path,
    *,
    seed: int = 0,
    layers: int = 2,
    hidden: int = 32,
    template: str | None = None,
    prompts: bool = False,
    **text_config: Any,
) -> Path:
    """Save a model of `family` in `folder` and return the folder.

    `prompts`: with a tokenizer of the families from Qwen that knows the words of our prompts, so that they are short.

    Factors: 28 for Qwen2.5-VL, 32 for the later ones, 48 for Gemma 4; 14 with a fixed 56 px for LLaVA.
    """
    torch.manual_seed(seed)
    if family == "gemma4":
        if Version(transformers.__version__) < Version(SINCE["gemma4"]):
            pytest.skip(f"before transformers {SINCE['gemma4']} this family needs torchvision")
        from tests.tiny_families import gemma4  # which imports this module

        kinds = ["sliding_attention", "full_attention"] * (layers // 2)
        more = {"hidden_size_per_layer_input": 0, "use_bidirectional_attention": "vision", "num_hidden_layers": layers}
        return gemma4(folder, layer_types=kinds, **more, **text_config)
    if family == "llava":
        tokenizer = _tokenizer(("<s>", "</s>", "<image>"), eos="</s>", template=template or LLAVA_TEMPLATE, llama=True)
        _llava(tokenizer, layers, hidden, folder)
        return folder
    own = qwen3_vl_chat_template if family == "qwen3_vl" else QWEN_TEMPLATE
    words = [part["text"] for part in _prompts()] if prompts else []
    tokenizer = _tokenizer(QWEN_TOKENS, eos="<|im_end|>", template=template or own, words=words)
    patch = 14 if family == "qwen2_5_vl" else 16
    _save(_qwen(family, tokenizer, layers, hidden, text_config), folder)
    tokenizer.save_pretrained(folder)
    Qwen2VLImageProcessorPil(patch_size=patch).save_pretrained(folder)
    return folder


def _prompts() -> Iterator[Any]:
    """Yield the texts that our protocols write before a question."""
    for protocol in PROTOCOLS.values():
        for one in protocol.opening("What is it?", [], tools=True):
            yield from (part for part in one["content"] if part["type"] == "text")


def _tokenizer(
    specials: tuple[str, ...], *, eos: str, template: str, llama: bool = False, words: Sequence[str] = ()
) -> PreTrainedTokenizerFast:
    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=1200 if words else 400,
        special_tokens=[AddedToken(token, special=True, normalized=False) for token in specials],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    core.train_from_iterator([*SENTENCES * 4, *[*words] * 2], trainer)
    if llama:
        core.normalizer = normalizers.Prepend(" ")
        core.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    bos = "<s>" if llama else None
    return PreTrainedTokenizerFast(
        tokenizer_object=core, bos_token=bos, eos_token=eos, pad_token=specials[0], chat_template=template
    )


def _qwen(
    family: Family, tokenizer: PreTrainedTokenizerFast, layers: int, hidden: int, more: dict[str, Any]
) -> PreTrainedModel:
    ids = {
        "image_token_id": tokenizer.convert_tokens_to_ids("<|image_pad|>"),
        "video_token_id": tokenizer.convert_tokens_to_ids("<|video_pad|>"),
        "vision_start_token_id": tokenizer.convert_tokens_to_ids("<|vision_start|>"),
        "vision_end_token_id": tokenizer.convert_tokens_to_ids("<|vision_end|>"),
    }
    eighth = hidden // 4 // 2
    text: dict[str, Any] = {
        "vocab_size": len(tokenizer),
        "hidden_size": hidden,
        "intermediate_size": 2 * hidden,
        "num_hidden_layers": layers,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 2048,
        "initializer_range": 0.2,
        "bos_token_id": None,
        "eos_token_id": tokenizer.eos_token_id,
        "rope_parameters": {
            "rope_type": "default",
            "rope_theta": 10000.0,
            "mrope_section": [eighth - 2 * (eighth // 3), eighth // 3, eighth // 3],
        },
    }
    text |= more
    vision: dict[str, Any] = {
        "depth": 2,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_heads": 2,
        "out_hidden_size": hidden,
        "initializer_range": 0.2,
    }
    if family == "qwen2_5_vl":
        vision |= {"patch_size": 14, "window_size": 56, "fullatt_block_indexes": [1]}
        return Qwen2_5_VLForConditionalGeneration(Qwen2_5_VLConfig(text_config=text, vision_config=vision, **ids))
    text |= {"head_dim": hidden // 4}
    if family == "qwen3_5":
        text["rope_parameters"] |= {"partial_rotary_factor": 0.5, "mrope_interleaved": True, "mrope_section": [1, 1, 0]}
        text |= {"layer_types": ["linear_attention", "full_attention"] * (layers // 2)}
        text |= {"linear_num_key_heads": 2, "linear_num_value_heads": 4, "linear_key_head_dim": 8}
        text |= {"linear_value_head_dim": 8}
        vision |= {"patch_size": 16, "num_position_embeddings": 64}
        return Qwen3_5ForConditionalGeneration(Qwen3_5Config(text_config=text, vision_config=vision, **ids))
    vision |= {"patch_size": 16, "deepstack_visual_indexes": [0, 1], "num_position_embeddings": 64}
    return Qwen3VLForConditionalGeneration(Qwen3VLConfig(text_config=text, vision_config=vision, **ids))


def _llava(tokenizer: PreTrainedTokenizerFast, layers: int, hidden: int, folder: Path) -> None:
    vision = CLIPVisionConfig(
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=2,
        image_size=56,
        patch_size=14,
        initializer_range=0.2,
    )
    text = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=hidden,
        intermediate_size=2 * hidden,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=2048,
        initializer_range=0.2,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    config = LlavaConfig(
        vision_config=vision,
        text_config=text,
        image_token_index=tokenizer.convert_tokens_to_ids("<image>"),
        image_seq_length=16,
    )
    _save(LlavaForConditionalGeneration(config), folder)
    images = CLIPImageProcessorPil(size={"shortest_edge": 56}, crop_size={"height": 56, "width": 56})
    LlavaProcessor(
        image_processor=images,
        tokenizer=tokenizer,
        patch_size=14,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=tokenizer.chat_template,
    ).save_pretrained(folder)


def _save(model: PreTrainedModel, folder: Path) -> None:
    model.eval().save_pretrained(folder)


def noise(sizes: Mapping[str, tuple[int, int]], *, unit: int = 1, seed: int = 7) -> dict[str, Image.Image]:
    """Return views of noise; `sizes` are width and height in units of so many pixels."""
    random = np.random.default_rng(seed)
    return {
        name: Image.fromarray(random.integers(0, 255, (unit * high, unit * wide, 3), dtype=np.uint8))
        for name, (wide, high) in sizes.items()
    }
