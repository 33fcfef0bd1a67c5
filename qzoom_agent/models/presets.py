"""Presets: models known by name, with everything that their authors run them with.

A model is its preset whether it is named by preset, hub id, folder or server name, and a fine-tune is that of the model
it says it comes from; `recognised` gives the order. Where a preset is silent the checkpoint's generation_config.json
counts, then the defaults of the configuration. Limits that no author states are ours.

Memory is that of the weights in 16 bit and of one run's cache. The size of a visual token is the family's; loaded
weights override it. Nothing is loaded or looked up on the network, and torch is not imported.
"""

import json
import re
from collections.abc import Container, Mapping
from dataclasses import dataclass, field, replace
from difflib import get_close_matches
from pathlib import Path
from typing import Any, Final

from qzoom_agent.config import ViewBudget
from qzoom_agent.errors import ConfigError
from qzoom_agent.files import expanded, read_yaml

NANO_FOLDER = Path(__file__).resolve().parent.parent / "weights" / "nano"
SHIPPED = ("nano", "nano-paper")
"""Presets whose weights are in the package."""
_CACHED: Final = re.compile(r"models--([^/]+)--([^/]+)(?:/|$)")
"""Folder of a repository in the hub's cache."""
_LAST_OF_PAPER: Final = "<loc_805>"
"""Last location token of nano-paper, whose coarse views are larger; nano's end at <loc_504>."""


@dataclass(frozen=True, slots=True)
class Preset:
    """Weights and how to run them; None where only the loaded model can tell."""

    name: str
    """The user's name for it."""
    source: str
    """Folder or hub id, as transformers' `from_pretrained` takes it."""
    protocol: str | None = None
    """Zoom protocol that the model was trained on, or that fits best."""
    budget: ViewBudget | None = None
    """Visual tokens per view, and the size of one."""
    memory_gb: float | None = None
    """Approximate GB of accelerator memory (or RAM) for a run."""
    note: str = ""
    """One line for `qzoom models`."""
    settings: Mapping[str, Any] = field(default_factory=dict)
    """Other values of the configuration (dotted keys) that hold where the user gives none: limits, sampling,
    thresholds."""
    wording: str = ""
    """Place where the authors keep their prompts, in public code."""
    guessed: bool = False
    """True if only the family is known, from the architecture or a part of the name."""

    @property
    def local(self) -> bool:
        """True if the weights are in a folder on this machine."""
        return Path(self.source).is_dir()


def view_budget(
    factor: int, coarse: tuple[int, int], crop: tuple[int, int], *, coarse_share: float | None = None
) -> ViewBudget:
    """Return a budget: the side of a token in pixels, and (fewest, most) tokens of a coarse view and of a crop."""
    return ViewBudget(
        factor=factor,
        coarse_min_tokens=coarse[0],
        coarse_max_tokens=coarse[1],
        crop_min_tokens=crop[0],
        crop_max_tokens=crop[1],
        coarse_share=coarse_share,
    )


def _limits(*, reply: int, turns: int = 0, images: int = 0, temperature: float | None = None) -> dict[str, Any]:
    """Return settings: most tokens of a reply, most turns and images where they are stated, and the temperature."""
    found = {"generation.max_new_tokens": reply, "budget.max_turns": turns, "budget.max_views": images}
    stated: dict[str, Any] = {key: value for key, value in found.items() if value}
    return stated if temperature is None else {**stated, "generation.temperature": temperature}


NANO_BUDGET = view_budget(28, (16, 64), (40, 100)).model_copy(update={"crop_min_side": 84, "roi_tokens": (51, 56)})
"""Budget that nano is trained with; also the scripted backend's."""
NANO_PAPER_BUDGET = view_budget(28, (16, 300), (96, 224)).model_copy(
    update={"crop_min_side": 56, "roi_tokens": (160, 224)}
)
"""Budget that the nano for receipts is trained with: location tokens end at a coarse view of 28 rows."""
UNKNOWN_BUDGET = view_budget(28, (16, 576), (64, 576))
"""Budget for unknown models."""
_QWEN2_5 = view_budget(28, (64, 576), (64, 576))
_QWEN3 = view_budget(32, (64, 576), (256, 1024))
_DEEPEYES = view_budget(28, (4, 16384), (4, 16384))
_MINI_O3 = view_budget(28, (52, 2551), (52, 2551))
_PIXEL = view_budget(28, (512, 5120), (512, 5120))
_HALVED = view_budget(28, (4, 4096), (16, 16384), coarse_share=0.5)
_GEMMA4 = view_budget(48, (40, 280), (40, 280))
_LLAVA = view_budget(14, (576, 576), (576, 576))
_QWEN3_LIMITS = _limits(reply=1024, temperature=0.7) | {
    "generation.top_p": 0.8,
    "generation.top_k": 20,
    "generation.presence_penalty": 1.5,
}
_QWEN3_WORDING = "QwenLM/Qwen3-VL: cookbooks/think_with_images.ipynb"
_NOT_TRAINED, _OWN_FORMAT = "not trained to zoom", "zooms with its own tool format"
_SINGLE_LOOK = "trained to answer from one look, without a tool"


def _q_zoom(
    base: str, *, factor: int, memory: float, documents: dict[str, float], fine: dict[str, float]
) -> list[Preset]:
    """Return the two presets of a released Q-Zoom model: thresholds for documents, and for high resolution."""
    limits = _limits(reply=128, temperature=0.0)
    name, source = f"q-zoom-{base.lower()}", f"YuhengSSS/Q-Zoom-{base.replace('-VL', 'VL')}"
    low, high = view_budget(factor, (256, 576), (256, 576)), view_budget(factor, (512, 4096), (512, 4096))
    note = f"gate and SD-RPN; thresholds for documents, {name}-hr for high resolution"
    return [
        Preset(name, source, "plain", low, memory, note, {**limits, **documents}),
        Preset(
            f"{name}-hr", source, "plain", high, memory, f"{name} for images of high resolution", {**limits, **fine}
        ),
    ]


def _thresholds(region: float, gate: float) -> dict[str, float]:
    return {"perception.threshold": region, "perception.gate_threshold": gate}


_ALL: Final = (
    Preset("nano", str(NANO_FOLDER), "nano", NANO_BUDGET, 0.5, "ships with the package; knows only the needle boards"),
    Preset(
        "nano-paper",
        str(NANO_FOLDER.with_name("nano_paper")),
        "nano",
        NANO_PAPER_BUDGET,
        0.5,
        "ships with the package; begins to read receipts",
    ),
    Preset("qwen2.5-vl-3b", "Qwen/Qwen2.5-VL-3B-Instruct", "deepeyes", _QWEN2_5, 9, _NOT_TRAINED),
    Preset("qwen2.5-vl-7b", "Qwen/Qwen2.5-VL-7B-Instruct", "deepeyes", _QWEN2_5, 19, _NOT_TRAINED),
    *(
        Preset(
            f"qwen3-vl-{size.lower()}",
            f"Qwen/Qwen3-VL-{size}-Instruct",
            "qwen3vl",
            _QWEN3,
            memory,
            _OWN_FORMAT,
            _QWEN3_LIMITS,
            _QWEN3_WORDING,
        )
        for size, memory in (("2B", 6), ("4B", 11), ("8B", 20))
    ),
    *(
        Preset(
            f"qwen3.5-{size.lower()}",
            f"Qwen/Qwen3.5-{size}",
            "qwen3_5",
            _QWEN3,
            memory,
            "thinks at length before it zooms or answers",
            _limits(reply=8192),
        )
        for size, memory in (("4B", 11), ("9B", 22))
    ),
    Preset("gemma-4-12b", "google/gemma-4-12B-it", "plain", _GEMMA4, 28, _NOT_TRAINED, _limits(reply=1024)),
    Preset(
        "deepeyes",
        "ChenShawn/DeepEyes-7B",
        "deepeyes",
        _DEEPEYES,
        24,
        "Qwen2.5-VL-7B trained to zoom by RL",
        _limits(reply=10240, turns=11, images=12),
        "Visual-Agent/DeepEyes: verl/workers/agent/envs/mm_process_engine/prompt.py",
    ),
    Preset(
        "mini-o3",
        "Mini-o3/Mini-o3-7B-v1",
        "mini_o3",
        _MINI_O3,
        22,
        "many turns; weights are non-commercial",
        _limits(reply=4096, turns=12, images=12, temperature=1.0),
        "the repository Mini-o3/Mini-o3",
    ),
    Preset(
        "pixel-reasoner",
        "TIGER-Lab/PixelReasoner-RL-v1",
        "pixel_reasoner",
        _PIXEL,
        22,
        "zooms, trained by RL",
        _limits(reply=2048),
        "TIGER-AI-Lab/Pixel-Reasoner: curiosity_driven_rl/openrlhf/trainer/ppo_utils/experience_maker.py",
    ),
    Preset(
        "visionthink",
        "Senqiao/VisionThink-Efficient",
        "visionthink",
        _HALVED,
        24,
        "sees half the sides, and asks for the full size if it needs it",
        _limits(reply=8192, turns=2, images=2),
        "dvlab-research/VisionThink: scripts/vllm_tool.py",
    ),
    Preset(
        "adaptvision",
        "AdaptVision/AdaptVision-7B",
        "adaptvision",
        _HALVED,
        24,
        "sees half the sides, and asks for a crop if it needs one",
        _limits(reply=2048, turns=2, images=2),
        "AdaptVision/AdaptVision: scripts/vllm_adaptvision.py",
    ),
    *_q_zoom("Qwen2.5-VL-3B", factor=28, memory=10, documents=_thresholds(0.15, 0.05), fine=_thresholds(0.04, 0.02)),
    *_q_zoom("Qwen2.5-VL-7B", factor=28, memory=21, documents=_thresholds(0.15, 0.05), fine=_thresholds(0.04, 0.02)),
    *_q_zoom("Qwen3-VL-4B", factor=32, memory=12, documents=_thresholds(0.15, 0.1), fine=_thresholds(0.1, 0.025)),
    *(
        Preset(
            f"zwz-{size.lower()}",
            f"inclusionAI/ZwZ-{size}",
            protocol,
            view_budget(factor, (64, 4096), (256, 1024)),
            memory,
            _SINGLE_LOOK,
            {"policy": "direct", **_limits(reply=1024)},
            "inclusionAI/Zooming-without-Zooming: mm-eval",
        )
        for size, protocol, factor, memory in (
            ("4B", "qwen3vl", 32, 13),
            ("7B", "plain", 28, 21),
            ("8B", "qwen3vl", 32, 22),
        )
    ),
    Preset("llava-1.5-7b", "llava-hf/llava-1.5-7b-hf", "plain", _LLAVA, 16, "576 tokens whatever the image"),
)
PRESETS: Final[dict[str, Preset]] = {preset.name: preset for preset in _ALL}

FAMILIES: Final = {
    "qwen2_5_vl": "qwen2.5-vl-7b",
    "qwen3_vl": "qwen3-vl-4b",
    "qwen3_vl_moe": "qwen3-vl-4b",
    "qwen3_5": "qwen3.5-4b",
    "qwen3_5_moe": "qwen3.5-4b",
    "gemma4": "gemma-4-12b",
    "gemma4_unified": "gemma-4-12b",
    "llava": "llava-1.5-7b",
}
"""Preset that stands for a family, by the config's `model_type`."""


def known(name: str) -> Preset | None:
    """Return the preset of a name: a preset's, its hub id, or a path or id that ends in its repository's name.

    An end after the repository's name is allowed, as copies have it ("owner/Qwen3-VL-4B-Instruct-AWQ").
    """
    if name in PRESETS:
        return PRESETS[name]
    cached = _CACHED.search(name)
    repository = (cached[2] if cached else name.rstrip("/").rpartition("/")[2]).lower()
    published = {
        name: preset.source.rpartition("/")[2].lower() for name, preset in PRESETS.items() if name not in SHIPPED
    }
    fits = [name for name, own in published.items() if re.fullmatch(rf"{re.escape(own)}(?:[-_.].*)?", repository)]
    return PRESETS[max(fits, key=lambda fit: len(published[fit]))] if fits else None


def recognised(preset: Preset, config: Mapping[str, Any], card: str = "", *, vocabulary: str = "") -> Preset:
    """Return what is known of the model in `preset` from its own files, under its name and source.

    The first that leads to a preset counts: its name; the model that its config (`_name_or_path`) or its card
    (`base_model`) says it comes from; its vocabulary (nano's, nano-paper's); its architecture, which is a guess.

    Args:
        config: Content of config.json.
        card: Text of README.md.
        vocabulary: Text of tokenizer.json.
    """
    if preset.protocol is not None and not preset.guessed:
        return preset
    origins = [config.get("_name_or_path"), *_base_models(card)]
    found = next((one for name in origins if isinstance(name, str) and (one := known(name))), None)
    if found is None:
        found = shipped(set(re.findall(r'"(<(?:zoom|loc_\d+)>)"', vocabulary)))
    family = FAMILIES.get(str(config.get("model_type")))
    if found is not None:
        return replace(found, name=preset.name, source=preset.source)
    return preset if family is None else _guess(family, preset.name, preset.source)


def shipped(tokens: Container[str]) -> Preset | None:
    """Return the preset of weights with these tokens, if they come from a model in this package."""
    if "<zoom>" not in tokens:
        return None
    found = PRESETS["nano-paper" if _LAST_OF_PAPER in tokens else "nano"]
    return replace(found, note=f"{found.name}, or trained from it")


def _guess(family: str, name: str, source: str) -> Preset:
    """Return a model of which the family is known: its format, its budget and its longest reply."""
    stands_for = PRESETS[family]
    limits = {key: value for key, value in stands_for.settings.items() if key == "generation.max_new_tokens"}
    return Preset(name, source, stands_for.protocol, stands_for.budget, settings=limits, guessed=True)


def _base_models(card: str) -> list[str]:
    """Return the models that the metadata of a model card names as its base."""
    head = re.match(r"---\n(.*?)\n---", card, re.DOTALL)
    try:
        data = read_yaml(head[1]) if head else None
    except ValueError:
        return []
    found = data.get("base_model") if isinstance(data, Mapping) else None
    return [str(one) for one in found] if isinstance(found, list) else [str(found)] if found else []


def _by_name(name: str, source: str) -> Preset:
    """Return the preset of a name, its family's as a guess, or one without anything known."""
    if preset := known(name):
        return replace(preset, name=name, source=source)
    plain = re.sub("[^a-z0-9]", "", name.rpartition("/")[2].lower())
    named = (preset for kind, preset in FAMILIES.items() if kind != "llava" and kind.replace("_", "") in plain)
    family = next(named, None)
    return Preset(name, source) if family is None else _guess(family, name, source)


def guess_of(preset: Preset) -> str:
    """Return a sentence on what is only guessed of a model, and how to say it; empty for a preset's."""
    if preset.protocol is not None and not preset.guessed:
        return ""
    budget, protocol = preset.budget or UNKNOWN_BUDGET, preset.protocol or "plain"
    known_part = "only the family is known of it" if preset.guessed else "nothing is known of it"
    return (
        f"'{preset.name}' is no preset and {known_part}: it is asked in the format '{protocol}', with up to "
        f"{budget.coarse_max_tokens} visual tokens for the image and {budget.crop_max_tokens} for a crop. If it was "
        "trained otherwise, set protocol, budget.coarse_tokens, budget.crop_max_tokens and generation.max_new_tokens; "
        "a fine-tune's README.md may name its base_model."
    )


def served_model(name: str) -> Preset:
    """Return the preset with this name, or one for a server's own model name. Raises ConfigError for what ships."""
    if name in SHIPPED:
        raise ConfigError(
            f"A server does not have '{name}', a model in this package. "
            "Give the name of a model that the server has: --model (in Python: model)."
        )
    return PRESETS.get(name) or _by_name(name, name)


def preset_of(name: str) -> str | None:
    """Return the name of the preset with this name or hub id; None if there is none, as for a folder."""
    same = (preset.name for preset in PRESETS.values() if name in (preset.name, preset.source))
    return next(same, None)


def keep_origin(folder: Path, model: str, *, protocol: str | None = None) -> None:
    """Write into the config.json of a copy or fine-tune of a model which preset it is run as, if it is one's.

    The copy has another name, and transformers saves no origin: only its architecture would be known.

    Args:
        folder: The copy.
        model: The model, as it was named.
        protocol: Format that the copy was trained in; of another than the preset's nothing is written. None: the same.
    """
    given = resolve_model(model)
    same = (one for one in PRESETS.values() if one == replace(given, name=one.name, source=one.source))
    found = next((one for one in same if one.name not in SHIPPED), None)  # those are known by their vocabulary
    if found is None or given.guessed or protocol not in (None, found.protocol):
        return
    file = folder / "config.json"
    config = {**json.loads(file.read_text(encoding="utf-8")), "_name_or_path": found.name}
    file.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def resolve_model(name: str) -> Preset:
    """Return the preset of this name, or what is known of a folder or a hub id.

    Raises:
        ConfigError: It is none of these.
    """
    if name in PRESETS:
        return PRESETS[name]
    folder = expanded(name)
    if name and folder.is_dir():
        preset = replace(known(str(folder.resolve())) or Preset(name, name), name=name, source=str(folder))
        files = [_read(folder / file) for file in ("config.json", "README.md", "tokenizer.json")]
        try:
            config = json.loads(files[0] or "{}")
        except ValueError:
            config = {}  # loading the model names the fault
        return recognised(preset, config if isinstance(config, dict) else {}, files[1], vocabulary=files[2])
    owner, slash, repository = name.partition("/")
    if slash and owner not in {"", ".", "..", "~"} and repository and "/" not in repository:
        return _by_name(name, name)
    close = get_close_matches(name.lower(), PRESETS, n=1, cutoff=0.5)
    hint = f" Did you mean '{close[0]}'?" if close else ""
    raise ConfigError(
        f"There is no model '{name}': it is neither a preset, nor a folder, nor a hub id of the form owner/name.{hint} "
        f"Presets: {', '.join(PRESETS)}."
    )


def _read(file: Path) -> str:
    """Return the text of a file; empty if it cannot be read."""
    try:
        return file.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""
