"""Model names that mean something: a preset is weights plus what is known about running them.

`resolve_model` turns what a user typed (a preset name, a folder, a hub id) into a Preset. Memory is that of the weights
in 16 bit and of one run's cache; budgets of checkpoints trained for one protocol are the ones they were trained with.
Nothing is loaded or looked up on the network here, so `qzoom models` answers at once; torch is not imported.
"""

from dataclasses import dataclass, field
from difflib import get_close_matches
from pathlib import Path

from qzoom_agent.backends.base import TokenBudget
from qzoom_agent.errors import BackendError

NANO_FOLDER = Path(__file__).resolve().parent.parent / "models" / "nano"


@dataclass(frozen=True, slots=True)
class Preset:
    """Where weights are and how to run them; None where only the loaded model can tell."""

    name: str
    """What the user calls it."""
    source: str
    """Folder or hub id, as transformers' `from_pretrained` takes it."""
    protocol: str | None = None
    """Zoom protocol the model was trained on, or fits best."""
    budget: TokenBudget | None = None
    """Visual tokens per view."""
    memory_gb: float | None = None
    """GB of accelerator memory (or RAM) that a run needs, roughly."""
    note: str = field(default="")
    """One line for `qzoom models`."""

    @property
    def local(self) -> bool:
        """Whether the weights are in a folder on this machine."""
        return Path(self.source).is_dir()


_NANO = TokenBudget(coarse_tokens=64, coarse_min_tokens=16, crop_min_tokens=32, crop_max_tokens=64)
_QWEN2_5 = TokenBudget(coarse_tokens=576, coarse_min_tokens=64, crop_min_tokens=64, crop_max_tokens=576)
_QWEN3 = TokenBudget(coarse_tokens=576, coarse_min_tokens=64, crop_min_tokens=256, crop_max_tokens=1024)
_DEEPEYES = TokenBudget(coarse_tokens=16384, coarse_min_tokens=4, crop_min_tokens=4, crop_max_tokens=16384)
_MINI_O3 = TokenBudget(coarse_tokens=2551, coarse_min_tokens=52, crop_min_tokens=52, crop_max_tokens=2551)
_PIXEL = TokenBudget(coarse_tokens=5120, coarse_min_tokens=512, crop_min_tokens=512, crop_max_tokens=5120)
_LLAVA = TokenBudget(coarse_tokens=576, coarse_min_tokens=576, crop_min_tokens=576, crop_max_tokens=576)

PRESETS: dict[str, Preset] = {
    preset.name: preset
    for preset in (
        Preset("nano", str(NANO_FOLDER), "nano", _NANO, 0.5, "ships with the package; knows only the needle boards"),
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


def resolve_model(name: str) -> Preset:
    """The preset of this name, or one that stands for a folder or a hub id.

    Raises BackendError for a name that is none of the three, with the presets that are spelled like it.
    """
    if name in PRESETS:
        return PRESETS[name]
    if name and Path(name).expanduser().is_dir():
        return Preset(name, str(Path(name).expanduser()))
    owner, slash, repository = name.partition("/")
    if slash and owner not in {"", ".", "..", "~"} and repository and "/" not in repository:
        return Preset(name, name)
    close = get_close_matches(name.lower(), PRESETS, n=1, cutoff=0.5)
    hint = f" Did you mean '{close[0]}'?" if close else ""
    raise BackendError(
        f"There is no model '{name}': it is neither a preset, nor a folder, nor a hub id of the form owner/name.{hint} "
        f"Presets: {', '.join(PRESETS)}."
    )
