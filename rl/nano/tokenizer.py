"""Nano's tokenizer: byte-level BPE over the words of the needle tasks, with one token for every printed character.

Capitals and digits never merge, so reading a code is one decision a character and a code that no training image showed
is as easy as any other. Lower-case words merge into single tokens. Locations are tokens of their own, `<loc_0>` to
`<loc_805>` in steps of 7 pixels (a quarter of a visual token), so that a box is four decisions. Boards need none beyond
504, and the model that ships for them has no others.
"""

from itertools import product
from typing import Final, cast

import torch
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast, Qwen2_5_VLForConditionalGeneration

from qzoom_agent.evaluation.tasks.needle.boards import FIELDS, HEADLINES, ITEMS, QUESTIONS
from qzoom_agent.evaluation.tasks.needle.ink import COLORS, SHAPES
from qzoom_agent.protocols.nano import LOCATION_STEP, UNKNOWN

SPECIALS: Final = (
    "<|endoftext|>",
    "<|im_start|>",
    "<|im_end|>",
    "<|vision_start|>",
    "<|vision_end|>",
    "<|image_pad|>",
    "<|video_pad|>",
)
LOCATIONS: Final = tuple(f"<loc_{value}>" for value in range(0, 806, LOCATION_STEP))
CHAT_TEMPLATE: Final = (
    "{%- for message in messages -%}"
    "{{- '<|im_start|>' + message['role'] + '\n' -}}"
    "{%- if message['content'] is string -%}{{- message['content'] -}}"
    "{%- else -%}{%- for part in message['content'] -%}"
    "{%- if part['type'] == 'image' -%}{{- '<|vision_start|><|image_pad|><|vision_end|>' -}}"
    "{%- elif part['type'] == 'text' -%}{{- part['text'] -}}{%- endif -%}"
    "{%- endfor -%}{%- endif -%}{{- '<|im_end|>\n' -}}"
    "{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{- '<|im_start|>assistant\n' -}}{%- endif -%}"
)


def _corpus() -> list[str]:
    things = [f"{color} {shape}" for color, shape in product(COLORS, SHAPES)]
    plurals = ["objects", *(f"{shape}es" if shape == "cross" else f"{shape}s" for shape in SHAPES)]
    names = [*things, *plurals, *FIELDS, *ITEMS, *COLORS, *SHAPES, *(word.lower() for word in HEADLINES)]
    filled = [
        template.format(name, place)
        for templates in QUESTIONS.values()
        for template in templates
        for name in names
        for place in ("directly below", "directly right of")
    ]
    rest = ["You may zoom.", "Answer now.", "user", "assistant", "system", "yes", "no", UNKNOWN]
    return [*names, *filled, *rest] * 2


def with_locations(
    tokenizer: PreTrainedTokenizerFast, model: Qwen2_5_VLForConditionalGeneration
) -> PreTrainedTokenizerFast:
    """Return the tokenizer with all location tokens; those that the model lacks begin as its last one."""
    known = tokenizer.get_vocab()
    missing = [token for token in LOCATIONS if token not in known]
    if missing:
        tokenizer = build_tokenizer()
        last = LOCATIONS[LOCATIONS.index(missing[0]) - 1]
        rows = cast(list[int], tokenizer.convert_tokens_to_ids(missing))
        if len(tokenizer) > len(cast(torch.Tensor, model.get_input_embeddings().weight)):
            model.resize_token_embeddings(padded(len(tokenizer)), mean_resizing=False)
        embedding = cast(torch.Tensor, model.get_input_embeddings().weight)
        with torch.no_grad():
            embedding[rows] = embedding[known[last]].clone()
    return tokenizer


def padded(words: int) -> int:
    """Return how many rows the embedding of so many words has."""
    return 64 * -(-words // 64)


def build_tokenizer() -> PreTrainedTokenizerFast:
    """Train the tokenizer; the same corpus gives the same vocabulary."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex("[A-Z0-9]"), "isolated"),
            pre_tokenizers.Split(Regex(" ?[a-z]+|[^a-z]"), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=900,
        min_frequency=2,
        special_tokens=list(SPECIALS),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(_corpus(), trainer)
    words = ("<zoom>", "</zoom>", *LOCATIONS)
    tokenizer.add_tokens([AddedToken(text, normalized=False, special=False) for text in words])
    return PreTrainedTokenizerFast(  # type: ignore[no-untyped-call]
        tokenizer_object=tokenizer,
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        additional_special_tokens=[text for text in SPECIALS if text not in ("<|endoftext|>", "<|im_end|>")],
        padding_side="left",
        model_max_length=4096,
        chat_template=CHAT_TEMPLATE,
        clean_up_tokenization_spaces=False,
    )
