"""Tiny random models of published families beyond those of `tiny_models`, saved as a hub repository lays them out.

Configurations are small and otherwise the family's own. Processors are written as the files of a repository, because
those with a video part cannot be built without torchvision.
"""

import json
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForImageTextToText, PreTrainedTokenizerFast

from tests.tiny_models import _tokenizer, build

SIDE = 56
"""Side in pixels of the view of families with a fixed grid: 4 x 4 patches."""
Parts = dict[str, Any]


def build_family(name: str, folder: Path) -> Path:
    """Save a tiny model of the family in `folder` and return the folder."""
    if name in ("qwen2_5_vl", "qwen3_vl", "llava"):
        return build(name, folder)  # type: ignore[arg-type]
    torch.manual_seed(0)
    return FAMILIES[name](folder)


def _template(mark: str) -> str:
    return (
        "{{ bos_token }}{% for message in messages %}<turn>{{ message.role }}\n{% for part in message.content %}"
        "{% if part.type == 'image' %}" + mark + "{% else %}{{ part.text }}{% endif %}{% endfor %}</turn>\n{% endfor %}"
        "{% if add_generation_prompt %}<turn>assistant\n{% endif %}"
    )


def _save(
    folder: Path,
    model_type: str,
    tokens: dict[str, str],
    *,
    config: Callable[[PreTrainedTokenizerFast, dict[str, int]], Parts],
    images: Any,
    processor: str,
    mark: str = "",
    template: str | None = "",
    **arguments: Any,
) -> Path:
    """Save a model and its processor.

    Args:
        folder: to write.
        model_type: of the config.
        tokens: special tokens by the attribute names of the family's tokenizer.
        config: returns the config's arguments, given the tokenizer and the ids of the tokens by name.
        images: the image processor.
        processor: name of the stock processor class.
        mark: text of an image in the chat template.
        template: the chat template; "" for a plain one, None for none.
        arguments: of the processor.
    """
    specials = ("<pad>", "<s>", "</turn>", "<turn>", *tokens.values())
    tokenizer = _tokenizer(specials, eos="</turn>", template=_template(mark) if template == "" else template or "")
    fast: Any = PreTrainedTokenizerFast
    tokenizer = fast(
        tokenizer_object=tokenizer._tokenizer,
        bos_token="<s>",
        eos_token="</turn>",
        pad_token="<pad>",
        extra_special_tokens=tokens,
    )
    ids: dict[str, int] = {name: tokenizer.convert_tokens_to_ids(token) for name, token in tokens.items()}
    made = AutoConfig.for_model(model_type, **config(tokenizer, ids))
    auto: Any = AutoModelForImageTextToText
    auto.from_config(made).eval().save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    images.save_pretrained(folder)
    if template is not None:
        (folder / "chat_template.jinja").write_text(template or _template(mark))
    (folder / "processor_config.json").write_text(json.dumps({"processor_class": processor, **arguments}))
    return folder


def _text(tokenizer: PreTrainedTokenizerFast, model_type: str, **more: Any) -> Parts:
    return {
        "model_type": model_type,
        "vocab_size": len(tokenizer),
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 8,
        "max_position_embeddings": 4096,
        "initializer_range": 0.2,
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
        **more,
    }


def _vision(model_type: str = "", **more: Any) -> Parts:
    named = {"model_type": model_type} if model_type else {}
    return {
        **named,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "image_size": SIDE,
        "patch_size": 14,
        "initializer_range": 0.2,
        **more,
    }


def _ids(ids: dict[str, int], end: str = "_id") -> Parts:
    """Return the ids of all tokens as keys of a config."""
    return {name + end: one for name, one in ids.items()}


def _pil(module: str, name: str, **arguments: Any) -> Any:
    found = import_module(f"transformers.models.{module}.image_processing_pil_{module}")
    return getattr(found, name)(**arguments)


def _square(side: int = SIDE) -> dict[str, int]:
    return {"height": side, "width": side}


def _mrope(**more: Any) -> Parts:
    rope = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 1, 1], **more}
    return {"rope_parameters": rope}


def _qwen(model_type: str, processor: str, patch: int, text: str, vision: Parts, **more: Any) -> Any:
    tokens = {
        "image_token": "<|image_pad|>",
        "video_token": "<|video_pad|>",
        "vision_start_token": "<|vision_start|>",
        "vision_end_token": "<|vision_end|>",
    }

    def save(folder: Path) -> Path:
        return _save(
            folder,
            model_type,
            tokens,
            config=lambda tokenizer, ids: {
                "text_config": _text(tokenizer, text, **more),
                "vision_config": {"depth": 2, "num_heads": 2, "initializer_range": 0.2, "patch_size": patch, **vision},
                **_ids(ids),
            },
            images=_pil("qwen2_vl", "Qwen2VLImageProcessorPil", patch_size=patch),
            processor=processor,
            mark="<|vision_start|><|image_pad|><|vision_end|>",
        )

    return save


def _glm4v(folder: Path) -> Path:
    tokens = {
        "image_token": "<|image|>",
        "video_token": "<|video|>",
        "image_start_token": "<|begin_of_image|>",
        "image_end_token": "<|end_of_image|>",
        "video_start_token": "<|begin_of_video|>",
        "video_end_token": "<|end_of_video|>",
    }
    return _save(
        folder,
        "glm4v",
        tokens,
        config=lambda tokenizer, ids: {
            "text_config": _text(tokenizer, "glm4v_text", **_mrope(partial_rotary_factor=1.0)),
            "vision_config": {"depth": 2, "out_hidden_size": 32, "num_heads": 2, **_vision()},
            **_ids(ids),
        },
        images=_pil("glm4v", "Glm4vImageProcessorPil"),
        processor="Glm4vProcessor",
        mark="<|begin_of_image|><|image|><|end_of_image|>",
    )


def llava_next(folder: Path, **text: Any) -> Path:
    """Save a LLaVA-NeXT whose text config has these settings too."""
    pinpoints = [[SIDE, 2 * SIDE], [2 * SIDE, SIDE], [2 * SIDE, 2 * SIDE]]
    return _save(
        folder,
        "llava_next",
        {"image_token": "<image>"},
        config=lambda tokenizer, ids: {
            "text_config": _text(tokenizer, "llama", **text),
            "vision_config": _vision("clip_vision_model"),
            "image_token_index": ids["image_token"],
            "image_grid_pinpoints": pinpoints,
        },
        images=_pil(
            "llava_next",
            "LlavaNextImageProcessorPil",
            size={"shortest_edge": SIDE},
            crop_size=_square(),
            image_grid_pinpoints=pinpoints,
        ),
        processor="LlavaNextProcessor",
        mark="<image>",
        patch_size=14,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
    )


def _llava_onevision(folder: Path) -> Path:
    pinpoints = [[SIDE, SIDE], [SIDE, 2 * SIDE], [2 * SIDE, SIDE], [2 * SIDE, 2 * SIDE]]
    return _save(
        folder,
        "llava_onevision",
        {"image_token": "<image>", "video_token": "<video>"},
        config=lambda tokenizer, ids: {
            "text_config": _text(tokenizer, "qwen2"),
            "vision_config": _vision("siglip_vision_model", vision_use_head=False),
            **_ids(ids, "_index"),
            "image_grid_pinpoints": pinpoints,
            "vision_feature_layer": -1,
            "vision_feature_select_strategy": "full",
        },
        images=_pil(
            "llava_onevision", "LlavaOnevisionImageProcessorPil", size=_square(), image_grid_pinpoints=pinpoints
        ),
        processor="LlavaOnevisionProcessor",
        mark="<image>",
        num_image_tokens=16,
        vision_feature_select_strategy="full",
    )


def _internvl(folder: Path) -> Path:
    tokens = {
        "start_image_token": "<img>",
        "end_image_token": "</img>",
        "context_image_token": "<IMG_CONTEXT>",
        "video_token": "<video>",
    }
    return _save(
        folder,
        "internvl",
        tokens,
        config=lambda tokenizer, ids: {
            "text_config": _text(tokenizer, "qwen2"),
            "vision_config": _vision(image_size=[SIDE, SIDE], patch_size=[14, 14]),
            "image_token_id": ids["context_image_token"],
            "image_seq_length": 4,
        },
        images=_pil("got_ocr2", "GotOcr2ImageProcessorPil", size=_square(), crop_to_patches=True, max_patches=4),
        processor="InternVLProcessor",
        mark="<IMG_CONTEXT>",
        image_seq_length=4,
    )


def _idefics(model_type: str, images: str, processor: str) -> Any:
    tokens = {
        "image_token": "<image>",
        "fake_image_token": "<fake_token_around_image>",
        "global_image_token": "<global-img>",
        "end_of_utterance_token": "<end_of_utterance>",
    } | {f"row{row}{column}": f"<row_{row}_col_{column}>" for row in (1, 2) for column in (1, 2)}

    def save(folder: Path) -> Path:
        return _save(
            folder,
            model_type,
            tokens,
            config=lambda tokenizer, ids: {
                "text_config": _text(tokenizer, "llama"),
                "vision_config": _vision(),
                "image_token_id": ids["image_token"],
                "scale_factor": 2,
                "pad_token_id": tokenizer.pad_token_id,
            },
            images=_pil(model_type, images, size={"longest_edge": 2 * SIDE}, max_image_size={"longest_edge": SIDE}),
            processor=processor,
            mark="<image>",
            image_seq_len=4,
        )

    return save


_GEMMA_TOKENS = {"boi_token": "<start_of_image>", "eoi_token": "<end_of_image>", "image_token": "<image_soft_token>"}


def _gemma3(folder: Path) -> Path:
    return _save(
        folder,
        "gemma3",
        _GEMMA_TOKENS,
        config=lambda tokenizer, ids: {
            "text_config": _text(tokenizer, "gemma3_text", sliding_window=8, query_pre_attn_scalar=8),
            "vision_config": _vision("siglip_vision_model", vision_use_head=False),
            "mm_tokens_per_image": 4,
            **_ids(ids, "_index"),
            "initializer_range": 0.2,
        },
        images=_pil("gemma3", "Gemma3ImageProcessorPil", size=_square()),
        processor="Gemma3Processor",
        mark="<start_of_image>",
        image_seq_length=4,
    )


def gemma4(folder: Path, **more: Any) -> Path:
    """Save a Gemma 4 whose text config has these settings too."""
    tokens = {
        "image_token": "<|image|>",
        "boi_token": "<|image>",
        "eoi_token": "<image|>",
        "audio_token": "<|audio|>",
        "boa_token": "<|audio>",
        "eoa_token": "<audio|>",
        "video_token": "<|video|>",
    }
    return _save(
        folder,
        "gemma4",
        tokens,
        config=lambda tokenizer, ids: {
            "text_config": _text(
                tokenizer,
                "gemma4_text",
                **{
                    "layer_types": ["sliding_attention", "full_attention"],
                    "sliding_window": 16,
                    "global_head_dim": 8,
                    "vocab_size_per_layer_input": len(tokenizer),
                    "hidden_size_per_layer_input": 8,
                    "num_kv_shared_layers": 0,
                    **more,
                },
            ),
            "vision_config": {
                **_vision(initializer_range=0.02),
                "num_key_value_heads": 2,
                "head_dim": 16,
                "patch_size": 16,
            },
            "audio_config": None,
            **_ids(ids),
            "initializer_range": 0.2,
        },
        images=_pil("gemma4", "Gemma4ImageProcessorPil", max_soft_tokens=70),
        processor="Gemma4Processor",
        mark="<|image|>",
        feature_extractor={"feature_extractor_type": "Gemma4AudioFeatureExtractor"},
    )


def _mistral(model_type: str, patch: int, *, merged: Parts, **config: Any) -> Any:
    """Return a builder of a model with Pixtral's vision encoder; `merged` says how its patches are merged."""

    def save(folder: Path) -> Path:
        return _save(
            folder,
            model_type,
            {"image_token": "[IMG]", "image_break_token": "[IMG_BREAK]", "image_end_token": "[IMG_END]"},
            config=lambda tokenizer, ids: {
                "text_config": _text(tokenizer, "mistral", sliding_window=None),
                "vision_config": _vision("pixtral", image_size=4 * SIDE, head_dim=16),
                "image_token_index": ids["image_token"],
                "vision_feature_layer": -1,
                **merged,
                **config,
            },
            images=_pil("pixtral", "PixtralImageProcessorPil", patch_size=patch, size={"longest_edge": 4 * SIDE}),
            processor="PixtralProcessor",
            mark="[IMG]",
            patch_size=14,
            **merged,
        )

    return save


def _paligemma(template: str | None) -> Any:
    def save(folder: Path) -> Path:
        return _save(
            folder,
            "paligemma",
            {"image_token": "<image>"},
            config=lambda tokenizer, ids: {
                "text_config": _text(tokenizer, "gemma"),
                "vision_config": _vision("siglip_vision_model", vision_use_head=False, projection_dim=32),
                "image_token_index": ids["image_token"],
                "projection_dim": 32,
                "hidden_size": 32,
            },
            images=_pil("siglip", "SiglipImageProcessorPil", size=_square(), image_seq_length=16),
            processor="PaliGemmaProcessor",
            mark="<image>",
            template=template,
        )

    return save


_QWEN3_5 = {
    "layer_types": ["linear_attention", "full_attention"],
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
    **_mrope(partial_rotary_factor=1.0, mrope_interleaved=True),
}
_QWEN3_VISION = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "out_hidden_size": 32,
    "num_position_embeddings": 64,
    "deepstack_visual_indexes": [],
}
FAMILIES: dict[str, Callable[[Path], Path]] = {
    "qwen2_vl": _qwen(
        "qwen2_vl",
        "Qwen2VLProcessor",
        14,
        "qwen2_vl_text",
        {"embed_dim": 32, "hidden_size": 32, "mlp_ratio": 2},
        **_mrope(),
    ),
    "qwen3_5": _qwen("qwen3_5", "Qwen3VLProcessor", 16, "qwen3_5_text", _QWEN3_VISION, **_QWEN3_5),
    "glm4v": _glm4v,
    "llava_next": llava_next,
    "llava_onevision": _llava_onevision,
    "internvl": _internvl,
    "idefics3": _idefics("idefics3", "Idefics3ImageProcessorPil", "Idefics3Processor"),
    "smolvlm": _idefics("smolvlm", "SmolVLMImageProcessorPil", "SmolVLMProcessor"),
    "gemma3": _gemma3,
    "gemma4": gemma4,
    "gemma4_bidirectional": lambda folder: gemma4(folder, use_bidirectional_attention="vision"),
    "mistral3": _mistral("mistral3", 28, merged={"spatial_merge_size": 2}),
    "pixtral": _mistral("llava", 14, merged={}, vision_feature_select_strategy="full", image_seq_length=1),
    "paligemma": _paligemma(""),
    "paligemma_without_template": _paligemma(None),
}
"""Builders by name."""
