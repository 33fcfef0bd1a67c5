"""Nano's architecture: a stock Qwen2.5-VL of 4.7 million parameters for boards, or 11.9 million for paper as well.

Nine decoder layers, because perception branches leave after two thirds of them and are three deep. The base of the
rotary embedding is small: Qwen2.5-VL gives the image's columns the lowest frequencies, and with the usual base the
columns of a view of eight tokens would be indistinguishable to the language model.
"""

from dataclasses import dataclass
from typing import Final, cast

from transformers import PreTrainedTokenizerFast, Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

from nano.tokenizer import padded

PATCH = 14
CELL = 28


@dataclass(frozen=True)
class Size:
    """Widths and depths of nano."""

    vocabulary: int | None
    """Rows of the embedding; None: as many as the tokenizer needs."""
    hidden: int
    intermediate: int
    layers: int
    vision_hidden: int
    vision_intermediate: int
    vision_heads: int
    vision_depth: int
    whole: tuple[int, ...]
    """Blocks of the tower that attend over the whole image; the others see windows of 4 x 4 visual tokens."""


SIZES: Final[dict[str, Size]] = {
    "boards": Size(None, 192, 320, 9, 160, 384, 5, 4, (1, 3)),
    "paper": Size(1024, 256, 448, 9, 256, 768, 8, 6, (2, 5)),
}


def build_model(tokenizer: PreTrainedTokenizerFast, size: str = "boards") -> Qwen2_5_VLForConditionalGeneration:
    """Return a freshly initialised nano for this tokenizer (seed torch before calling)."""
    chosen = SIZES[size]
    names = ("image_pad", "video_pad", "vision_start", "vision_end")
    ids = {name: cast(int, tokenizer.convert_tokens_to_ids(f"<|{name}|>")) for name in names}
    config = Qwen2_5_VLConfig(
        text_config={
            "vocab_size": chosen.vocabulary or padded(len(tokenizer)),
            "hidden_size": chosen.hidden,
            "intermediate_size": chosen.intermediate,
            "num_hidden_layers": chosen.layers,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "max_position_embeddings": 4096,
            "rope_parameters": {
                "rope_type": "default",
                "rope_theta": 1000.0,
                "mrope_section": _sections(chosen.hidden // 4 // 2),
            },
            "bos_token_id": None,
            "eos_token_id": tokenizer.eos_token_id,
            "pad_token_id": tokenizer.pad_token_id,
            "tie_word_embeddings": True,
        },
        vision_config={
            "depth": chosen.vision_depth,
            "hidden_size": chosen.vision_hidden,
            "intermediate_size": chosen.vision_intermediate,
            "num_heads": chosen.vision_heads,
            "out_hidden_size": chosen.hidden,
            "patch_size": PATCH,
            "spatial_merge_size": 2,
            "temporal_patch_size": 2,
            "window_size": 112,
            "fullatt_block_indexes": list(chosen.whole),
        },
        image_token_id=ids["image_pad"],
        video_token_id=ids["video_pad"],
        vision_start_token_id=ids["vision_start"],
        vision_end_token_id=ids["vision_end"],
        tie_word_embeddings=True,
    )
    model = Qwen2_5_VLForConditionalGeneration(config)
    model.generation_config.eos_token_id = tokenizer.eos_token_id
    model.generation_config.pad_token_id = tokenizer.pad_token_id
    return model


def _sections(pairs: int) -> list[int]:
    """Return how many rotated pairs of a head tell time, row and column."""
    return [2, 4, pairs - 6]
