"""A random model of a published shape, with branches, through the loop: peak memory, shapes and time.

    python evals/full_size.py --shape qwen2.5-vl-3b
    python evals/full_size.py --shape qwen2.5-vl-7b --device cuda --batch 1 16

Weights are noise in bfloat16, which is all that memory and time depend on; tokenizer, template and prompt are nano's.
One question is asked under `implicit`, with a gate that always fires, and under `explicit`. With `--batch`, looks with
a crop inserted are timed against one stock pass over coarse view and crop, both over views that are encoded already.
"""

import argparse
import json
import resource
import sys
from collections.abc import Callable, Mapping, Sequence
from copy import deepcopy
from statistics import median
from time import perf_counter
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from transformers import AutoConfig, AutoModelForImageTextToText, PretrainedConfig, initialization

from qzoom_agent.agent import Agent
from qzoom_agent.config import PerceptionConfig, positive_int
from qzoom_agent.messages import Message, image_part, message
from qzoom_agent.models.hf import HFBackend
from qzoom_agent.models.hf_batch import BatchEngine
from qzoom_agent.models.hf_generation import GenerationRequest
from qzoom_agent.models.interface import SamplingParams
from qzoom_agent.perception.branches import Branches
from qzoom_agent.perception.transformers_versions import image_features

_POLICIES = ("implicit", "explicit")
_ROPE = {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [16, 24, 24]}
SHAPES: dict[str, tuple[str, int, bool, dict[str, Any], dict[str, Any]]] = {
    "qwen2.5-vl-3b": (
        "qwen2_5_vl",
        24,
        True,
        {
            "hidden_size": 2048,
            "intermediate_size": 11008,
            "num_hidden_layers": 36,
            "num_attention_heads": 16,
            "num_key_value_heads": 2,
            "vocab_size": 151936,
            "rope_parameters": _ROPE,
        },
        {"hidden_size": 1280, "out_hidden_size": 2048},
    ),
    "qwen2.5-vl-7b": (
        "qwen2_5_vl",
        18,
        False,
        {
            "hidden_size": 3584,
            "intermediate_size": 18944,
            "num_hidden_layers": 28,
            "num_attention_heads": 28,
            "num_key_value_heads": 4,
            "vocab_size": 152064,
            "rope_parameters": _ROPE,
        },
        {"hidden_size": 1280, "out_hidden_size": 3584},
    ),
    "qwen3-vl-4b": (
        "qwen3_vl",
        24,
        True,
        {
            "hidden_size": 2560,
            "intermediate_size": 9728,
            "num_hidden_layers": 36,
            "num_attention_heads": 32,
            "num_key_value_heads": 8,
            "head_dim": 128,
            "vocab_size": 151936,
            "rope_parameters": {**_ROPE, "rope_theta": 5e6, "mrope_section": [24, 20, 20], "mrope_interleaved": True},
        },
        {
            "depth": 24,
            "hidden_size": 1024,
            "intermediate_size": 4096,
            "out_hidden_size": 2560,
            "deepstack_visual_indexes": [5, 11, 17],
        },
    ),
}
"""By name: model type, K, whether input and output embeddings are tied, text and vision config. What is not named is
as in the published configs: 32 layers of Qwen2.5-VL's vision encoder, 3420 wide."""


def config_of(shape: str, *, text: Mapping[str, Any] | None = None, **more: Any) -> PretrainedConfig:
    """Return the config of a shape; `text` and `more` are further keys of its decoder and of the whole."""
    model_type, _, tied, decoder, vision = SHAPES[shape]
    return AutoConfig.for_model(
        model_type, text_config={**decoder, **(text or {})}, vision_config=vision, tie_word_embeddings=tied, **more
    )


def random_backend(shape: str, device: str) -> HFBackend:
    """Build a model of this shape, of noise in bfloat16, with untrained branches after K layers."""
    nano = HFBackend.load("nano", device="cpu", check=False)
    ids = {
        name: getattr(nano.model.config, name)
        for name in ("image_token_id", "video_token_id", "vision_start_token_id", "vision_end_token_id")
    }
    ends = {
        "bos_token_id": None,
        "eos_token_id": nano.processor.tokenizer.eos_token_id,
        "max_position_embeddings": 128000,
    }
    config = config_of(shape, text=ends, **ids)
    auto: Any = AutoModelForImageTextToText
    init: Any = initialization
    with init.no_init_weights():
        model: Any = auto.from_config(config, dtype=torch.bfloat16).to(device)
    model.tie_weights()  # which is a part of the initialisation
    noise = torch.randn(2**20, dtype=torch.bfloat16, device=device) * 0.02
    with torch.no_grad():
        for weight in model.parameters():
            if weight.ndim == 1:
                weight.fill_(1.0)  # norms; biases do not matter
                continue
            flat = weight.data.view(-1)
            for start in range(0, len(flat), len(noise)):
                part = flat[start : start + len(noise)]
                part.copy_(noise[: len(part)])
    model.eval().requires_grad_(False)
    processor = deepcopy(nano.processor)
    processor.image_processor.patch_size = config.vision_config.patch_size
    branches = Branches.from_base(model, k=SHAPES[shape][1]).requires_grad_(False)
    defaults = nano.defaults.model_copy(update={"crop_min_side": 28})
    return HFBackend(model, processor, name=shape, protocol="nano", defaults=defaults, branches=branches)


def picture(side: int) -> Image.Image:
    """Return an image of noise."""
    return Image.fromarray(np.random.default_rng(side).integers(0, 255, (side, side, 3), dtype=np.uint8))


def peak_gb(device: str) -> float:
    """Return the most memory that this process held: of the device, or resident on the CPU."""
    if device.startswith("cuda"):
        return torch.cuda.max_memory_allocated() / 1e9
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9


def ask(backend: HFBackend, policy: str, *, tokens: int, device: str) -> dict[str, Any]:
    """Answer one question under a policy with a reply of a few tokens; return what it took."""
    budget = {"coarse_tokens": tokens, "crop_min_tokens": tokens // 2, "crop_max_tokens": tokens, "max_turns": 2}
    perception = {"gate_threshold": 0.0, "peak_share": 0.5, "roi_min_tokens": tokens // 2, "roi_max_tokens": tokens}
    agent = Agent(backend, policy=policy, budget=budget, perception=perception, generation={"max_new_tokens": 4})
    began = perf_counter()
    answer = agent.run(picture(448), "What is the code?")
    trace = answer.trace
    return {
        "policy": policy,
        "status": answer.status,
        "error": trace.error,
        "views": [[view.id, view.width, view.height, view.tokens] for view in trace.views],
        "map": None if trace.perception is None else [len(trace.perception.heat), len(trace.perception.heat[0])],
        "prompt_tokens": [turn.prompt_tokens for turn in trace.turns],
        "cached_tokens": [turn.cached_tokens for turn in trace.turns],
        "seconds": round(perf_counter() - began, 1),
        "peak_gb": round(peak_gb(device), 2),
    }


def timed(run: Callable[[], object], device: str, repeats: int) -> float:
    """Return the median seconds of a function, after one run that does not count."""
    seconds = []
    for _ in range(repeats + 1):
        if device.startswith("cuda"):
            torch.cuda.synchronize()
        began = perf_counter()
        run()
        if device.startswith("cuda"):
            torch.cuda.synchronize()
        seconds.append(perf_counter() - began)
    return median(seconds[1:])


def batched(backend: HFBackend, size: int, *, tokens: int, device: str, repeats: int) -> dict[str, Any]:
    """Time a look with a crop inserted, on so many rows, against one stock pass over coarse view and crop."""
    side = backend.defaults.factor * max(2, round(tokens**0.5))
    views = {"coarse": picture(side), "crop1": picture(side - backend.defaults.factor)}
    talk: list[Message] = [message("user", image_part("coarse"), "What is the code?")]
    zoomed: list[Message] = [message("user", image_part("coarse"), image_part("crop1"), "What is the code?")]
    first, engine = backend.session(views.__getitem__), BatchEngine(backend)
    with torch.no_grad():
        ready = first.prepare(zoomed)
    ids = torch.tensor([ready.prompt.ids], device=device).expand(size, -1)
    pixels = [backend.codec.pixels(view)[1] for view in views.values()]
    joined = {key: torch.cat([one[key] for one in pixels] * size).to(device) for key in pixels[0]}
    with torch.no_grad():
        features = image_features(backend.model, joined)

    def stock() -> Tensor:
        with torch.no_grad():
            out = backend.model(
                input_ids=ids,
                position_ids=ready.positions.expand(-1, size, -1),
                mm_encoder_outputs={"image": features},
                logits_to_keep=1,
            )
        logits: Tensor = out.logits
        return logits

    def ours() -> object:
        sessions = [first.fork() for _ in range(size)]
        engine.look(sessions, [talk] * size, options=PerceptionConfig(gate_threshold=0.0, peak_share=0.5))
        # another question in every row, so that no two prompts are computed once
        with torch.no_grad():
            requests = [
                GenerationRequest(one, one.prepare(zoomed), SamplingParams(max_new_tokens=1)) for one in sessions
            ]
        return engine.reply(requests)

    theirs, seconds = timed(stock, device, repeats), timed(ours, device, repeats)
    row = {
        "batch": size,
        "stock": round(theirs, 4),
        "look and zoom": round(seconds, 4),
        "ratio": round(seconds / theirs, 3),
    }
    return {**row, "peak_gb": round(peak_gb(device), 2)}


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=SHAPES, default="qwen2.5-vl-3b")
    parser.add_argument("--device", default="cpu", help="cpu, cuda, cuda:1 (default cpu)")
    parser.add_argument("--tokens", type=positive_int, default=64, help="visual tokens of a view (default 64)")
    parser.add_argument("--policies", choices=_POLICIES, nargs="*", default=_POLICIES, help="policies to ask under")
    parser.add_argument("--batch", type=positive_int, nargs="*", default=[], help="batch sizes to time")
    parser.add_argument("--repeats", type=positive_int, default=5, help="repetitions of what is timed (default 5)")
    options = parser.parse_args(argv)
    backend = random_backend(options.shape, options.device)
    size = sum(weight.numel() for weight in backend.model.parameters()) / 1e9
    print(
        json.dumps({"shape": options.shape, "billions": round(size, 2), "peak_gb": round(peak_gb(options.device), 2)})
    )
    for policy in options.policies:
        print(json.dumps(ask(backend, policy, tokens=options.tokens, device=options.device)), flush=True)
    how = {"tokens": options.tokens, "device": options.device, "repeats": options.repeats}
    for rows in options.batch:
        print(json.dumps(batched(backend, rows, **how)), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
