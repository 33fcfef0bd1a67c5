"""Presets: model names with their weights, protocol and budget of visual tokens.

`resolve_model` turns a preset name, a folder or a hub id into a Preset. Memory is that of the weights in 16 bit and of
one run's cache. Checkpoints trained for one protocol have the budgets they were trained with. The size of a visual
token is the family's; loaded weights override it. Nothing is loaded or looked up on the network, and torch is not
imported.
"""

from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path

from qzoom_agent.config import ViewBudget
from qzoom_agent.errors import ConfigError

NANO_FOLDER = Path(__file__).resolve().parent.parent / "weights" / "nano"


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

    @property
    def local(self) -> bool:
        """True if the weights are in a folder on this machine."""
        return Path(self.source).is_dir()


def _views(factor: int, coarse: tuple[int, int], crop: tuple[int, int]) -> ViewBudget:
    """Return a budget: the side of a token in pixels, and (fewest, most) tokens of a coarse view and of a crop."""
    return ViewBudget(
        factor=factor,
        coarse_min_tokens=coarse[0],
        coarse_max_tokens=coarse[1],
        crop_min_tokens=crop[0],
        crop_max_tokens=crop[1],
    )


NANO_BUDGET = _views(28, (16, 64), (40, 100)).model_copy(update={"crop_min_side": 84, "roi_tokens": (51, 56)})
"""Budget that nano is trained with; also the scripted backend's."""
UNKNOWN_BUDGET = _views(28, (16, 576), (64, 576))
"""Budget for unknown models."""
_QWEN2_5 = _views(28, (64, 576), (64, 576))
_QWEN3 = _views(32, (64, 576), (256, 1024))
_DEEPEYES = _views(28, (4, 16384), (4, 16384))
_MINI_O3 = _views(28, (52, 2551), (52, 2551))
_PIXEL = _views(28, (512, 5120), (512, 5120))
_LLAVA = _views(14, (576, 576), (576, 576))

PRESETS: dict[str, Preset] = {
    preset.name: preset
    for preset in (
        Preset(
            "nano", str(NANO_FOLDER), "nano", NANO_BUDGET, 0.5, "ships with the package; knows only the needle boards"
        ),
        Preset("qwen2.5-vl-3b", "Qwen/Qwen2.5-VL-3B-Instruct", "deepeyes", _QWEN2_5, 9, "not trained to zoom"),
        Preset("qwen2.5-vl-7b", "Qwen/Qwen2.5-VL-7B-Instruct", "deepeyes", _QWEN2_5, 19, "not trained to zoom"),
        Preset("qwen3-vl-2b", "Qwen/Qwen3-VL-2B-Instruct", "qwen3vl", _QWEN3, 6, "zooms with its own tool format"),
        Preset("qwen3-vl-4b", "Qwen/Qwen3-VL-4B-Instruct", "qwen3vl", _QWEN3, 11, "zooms with its own tool format"),
        Preset("qwen3-vl-8b", "Qwen/Qwen3-VL-8B-Instruct", "qwen3vl", _QWEN3, 20, "zooms with its own tool format"),
        Preset("deepeyes", "ChenShawn/DeepEyes-7B", "deepeyes", _DEEPEYES, 24, "Qwen2.5-VL-7B trained to zoom by RL"),
        Preset("mini-o3", "Mini-o3/Mini-o3-7B-v1", "mini_o3", _MINI_O3, 22, "many turns; weights are non-commercial"),
        Preset("pixel-reasoner", "TIGER-Lab/PixelReasoner-RL-v1", "pixel_reasoner", _PIXEL, 22, "zooms, trained by RL"),
        Preset("llava-1.5-7b", "llava-hf/llava-1.5-7b-hf", "plain", _LLAVA, 16, "576 tokens whatever the image"),
    )
}


def served_model(name: str) -> Preset:
    """Return the preset with this name, or one for a server's own model name. Raises ConfigError for nano."""
    if name == "nano":
        raise ConfigError(
            "A server does not have 'nano', the model in this package. "
            "Give the name of a model that the server has: --model (in Python: model)."
        )
    return PRESETS.get(name) or Preset(name, name)


def preset_of(name: str) -> str | None:
    """Return the name of the preset with this name or hub id; None if there is none, as for a folder."""
    same = (preset.name for preset in PRESETS.values() if name in (preset.name, preset.source))
    return next(same, None)


def resolve_model(name: str) -> Preset:
    """Return the preset of this name, or one for a folder or a hub id. Raises ConfigError if it is none of these."""
    if name in PRESETS:
        return PRESETS[name]
    if name and Path(name).expanduser().is_dir():
        return Preset(name, str(Path(name).expanduser()))
    owner, slash, repository = name.partition("/")
    if slash and owner not in {"", ".", "..", "~"} and repository and "/" not in repository:
        return Preset(name, name)
    close = get_close_matches(name.lower(), PRESETS, n=1, cutoff=0.5)
    hint = f" Did you mean '{close[0]}'?" if close else ""
    raise ConfigError(
        f"There is no model '{name}': it is neither a preset, nor a folder, nor a hub id of the form owner/name.{hint} "
        f"Presets: {', '.join(PRESETS)}."
    )
