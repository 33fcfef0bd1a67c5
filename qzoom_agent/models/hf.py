"""Local weights: any stock image-text-to-text model, by preset name, folder or hub id.

The model class is that of transformers; nothing is patched. A model with missing weights is refused. One that run piece
by piece would not be the stock model (`stock`) answers through stock `generate`, and cannot be trained. Loading
logs the chosen device and number format with the reason, and the backend keeps that line.
"""

import logging
import os
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from typing import Any, Final, Literal, get_args

import torch
import transformers
from PIL import Image
from safetensors import SafetensorError
from transformers import (
    AutoConfig,
    AutoModelForImageTextToText,
    GenerationConfig,
    PretrainedConfig,
    PreTrainedModel,
    ProcessorMixin,
)
from transformers.utils import logging as hub_logging

from qzoom_agent.confidence import FILE as CALIBRATION
from qzoom_agent.confidence import Calibration
from qzoom_agent.config import ViewBudget
from qzoom_agent.errors import BackendError, ConfigError
from qzoom_agent.extras import obstacle
from qzoom_agent.messages import text
from qzoom_agent.models.hf_session import HFSession
from qzoom_agent.models.interface import Backend, ImageSource
from qzoom_agent.models.presets import (
    FAMILIES,
    PRESETS,
    SHIPPED,
    UNKNOWN_BUDGET,
    Preset,
    guess_of,
    recognised,
    resolve_model,
    shipped,
)
from qzoom_agent.models.prompts import PromptCodec, load_processor, takes_any_size, visual_factor
from qzoom_agent.models.stock import StockBackend, difference
from qzoom_agent.perception.adapters import TILED, adapter_for, base_view_tokens
from qzoom_agent.perception.branches import Branches
from qzoom_agent.perception.checkpoints import checkpoint_file, load_official, official_names, own_branches
from qzoom_agent.protocols.wording import FILE, PromptFile, read_prompt

logger = logging.getLogger(__name__)

_NEEDS: Final = re.compile(r"(?:requires the |Package `|Missing optional dependencies: )(\w+)")
"""Package that transformers misses, in its messages."""
_TOGETHER: Final = 16
MASKED_KERNELS: Final = ("sdpa", "eager")
"""Attention kernels that take a mask for each row of a batch."""
_GREEDY: Final = 1e-3
"""Temperature up to which a checkpoint's sampling is greedy decoding."""


class HFBackend:
    """A model in memory. `HFBackend.load("nano")` loads one; the constructor takes one that is already loaded.

    The model is used as it is: a caller who trains it puts it into eval mode before asking for replies.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        processor: ProcessorMixin,
        *,
        name: str,
        protocol: str | None = None,
        defaults: ViewBudget | None = None,
        settings: Mapping[str, Any] | None = None,
        placement: str = "",
        branches: Branches | None = None,
        prompt: PromptFile | None = None,
        calibration: Calibration | None = None,
    ) -> None:
        """The model is not compared with stock, as `load` does.

        Args:
            model: the weights; of a model with adapters of peft, the model inside, which has them in its layers.
            processor: their tokenizer, chat template and image processor.
            name: the user's name for the model.
            protocol: format of zoom calls; None takes one that fits the vocabulary or the family.
            defaults: visual tokens of its views; None takes those of a model of this format or family.
            settings: recommended values of other keys of the configuration, see `Preset.settings`.
            placement: device and number format, with the reason.
            branches: gate and SD-RPN.
            prompt: the model's own words.
            calibration: turns the probability of its answers into confidence.

        Raises:
            BackendError: the branches belong to another model, or the weights are not those of a stock model alone.
        """
        model = _inside(model)
        if branches is not None:
            branches.config.require_fit(model)
        self.model = model
        self.branches = branches
        self.branches_from: str | Path | None = None
        """Folder or hub id of branches that were given in place of the model's own."""
        self.prompt = prompt
        self.calibration = calibration
        self.processor = processor
        self.name = name
        family = PRESETS.get(FAMILIES.get(model.config.model_type, ""))
        family = shipped(processor.tokenizer.get_vocab()) or family
        self.protocol = protocol or (family and family.protocol) or "plain"
        fits = family if family and family.protocol == self.protocol else None
        fits = fits or next((one for one in PRESETS.values() if one.protocol == self.protocol != "plain"), None)
        # the weights decide how large a visual token is, not the preset
        factor = visual_factor(model.config)
        budget = defaults or (fits and fits.budget) or UNKNOWN_BUDGET
        self.defaults = budget.model_copy(update={"factor": factor})
        regions = 1 if branches is None else branches.config.max_regions
        own = {"perception.max_regions": regions} if regions > 1 else {}
        self.settings: dict[str, Any] = {**_recommended(model.generation_config), **own, **(settings or {})}
        """Values of the configuration that hold where the user gives none, by dotted key."""
        self.placement = placement
        """Device and dtype with the reason, such as "cpu, float32: no accelerator found"."""
        self.codec = PromptCodec(processor, model.config)
        given = model.generation_config.eos_token_id
        ends = [*(given if isinstance(given, list) else [given]), processor.tokenizer.eos_token_id]
        self.end_ids = frozenset(int(value) for value in ends if value is not None)
        """Every id that ends a turn."""
        self._counted: dict[tuple[int, int], int] = {}
        """Visual tokens of views, by size, where the processor has to be asked."""

    @cached_property
    def turn_end(self) -> int:
        """The id that ends a turn in the chat template; the tokenizer's end where the template writes none."""
        asked, said = text("user", "What is written there?"), "An answer."
        start, whole = (self.codec.render(turns) for turns in ([asked], [asked, text("assistant", said), asked]))
        after = self.codec.tokenizer(whole.removeprefix(start + said), add_special_tokens=False)["input_ids"]
        return int(after[0] if after[0] in self.end_ids else self.processor.tokenizer.eos_token_id)

    @classmethod
    def load(
        cls,
        model: str = "nano",
        *,
        device: str = "auto",
        dtype: str = "auto",
        protocol: str | None = None,
        branches: str | Path | None = None,
        check: bool = True,
    ) -> "HFBackend":
        """Load a preset, a folder or a hub id, with the branches that come with it (ours or the published code's).

        Args:
            model: preset name, folder or hub id.
            device: "auto" (an accelerator if there is one), "cpu", "cuda", "cuda:1", "mps".
            dtype: "auto" (float32 on the CPU, else bfloat16), "float32", "bfloat16", "float16".
            protocol: format of zoom calls; None takes the preset's, else one that fits the family.
            branches: folder or hub id (`user/name`, `user/name@revision`) of branches instead of the model's own.
            check: False skips the comparison with the stock model.

        Raises:
            ConfigError: an unknown model, device or dtype.
            BackendError: the weights cannot be fetched, are incomplete, or are of a family that cannot be run.
        """
        preset = resolve_model(model)
        where, number, placement = choose(device, dtype)
        with _explained(preset), _quiet(preset):
            config = AutoConfig.from_pretrained(preset.source, trust_remote_code=False)
            if not preset.local:
                preset = recognised(preset, config.to_dict(), _card(preset.source))
            if getattr(config, "auto_map", None):
                logger.warning("%s: the code that comes with the model is not run; transformers' class is used", model)
            processor = load_processor(preset.source, config)
            weights = _load_weights(preset, config, where, number)
            ours = branches or own_branches(preset.source)
            found = _official_branches(preset.source, weights) if ours is None else Branches.load(ours, weights)
            words = checkpoint_file(preset.source, FILE)
            # Other branches or another format make the model right on other questions.
            others = branches or protocol not in (None, preset.protocol)
            fitted = None if others else checkpoint_file(preset.source, CALIBRATION)
        logger.info("%s: %s", model, placement)
        if protocol is None and (guess := guess_of(preset)):
            logger.warning(guess)
        # Thresholds of a preset are those of the published branches; ours bring their own.
        own = {key: value for key, value in preset.settings.items() if not (ours and key.startswith("perception."))}
        loaded = cls(
            weights,
            processor,
            name=model,
            protocol=protocol or preset.protocol,
            defaults=preset.budget,
            settings=own,
            placement=placement,
            branches=found,
            prompt=read_prompt(words) if words else None,
            calibration=Calibration.load(fitted) if fitted else None,
        )
        loaded.branches_from = branches
        if check and (reason := difference(loaded)):
            raise BackendError(f"{_refusal(loaded, reason)}. Use a Qwen-VL or LLaVA model.")
        return loaded

    gives_logprobs: Final = True
    """Log-probabilities cost nothing here."""

    @property
    def perceives(self) -> bool:
        return self.branches is not None and self.branches.sdrpn is not None

    @property
    def workers(self) -> int:
        """Number of questions that `Agent.batch` asks at once; 1 for a model that cannot be run in batches."""
        kernel = self.model.config.get_text_config()._attn_implementation
        try:
            adapter_for(self.model.config)  # a batch is run layer by layer, as a look is
        except BackendError:
            return 1
        return _TOGETHER if kernel in MASKED_KERNELS else 1

    def together(self, size: int) -> Backend:
        """Return this model with its sessions computed in batches of up to `size`. Raises BackendError."""
        from qzoom_agent.models.scheduler import BatchedBackend

        return BatchedBackend(self, size)

    def session(self, image: ImageSource) -> HFSession:
        return HFSession(self, image)

    @property
    def takes_sparse_crops(self) -> bool:
        """True if a crop can be encoded finer and shown in part: the branches say where, and any size is encoded."""
        return self.perceives and takes_any_size(self.model.config)

    def view_tokens(self, image: Image.Image) -> int:
        """Return the number of visual tokens that the model is shown for a view."""
        if self.branches is not None and self.model.config.model_type in TILED:
            return base_view_tokens(self.model.config)
        if takes_any_size(self.model.config):
            return image.width * image.height // self.defaults.factor**2
        if image.size not in self._counted:  # the processor prepares the whole image for that
            self._counted[image.size] = self.codec.visual_tokens(image)
        return self._counted[image.size]


def _inside(model: Any) -> PreTrainedModel:
    """Return the stock model inside a wrapper of peft. Raises BackendError if the wrapper adds to the prompt."""
    if hasattr(model, "get_base_model"):
        if model.active_peft_config.is_prompt_learning:
            raise BackendError(
                f"The model has an adapter of the kind {model.active_peft_config.peft_type.value}, which adds virtual "
                "tokens to each prompt; a conversation with images cannot be run with these. Use LoRA, or the base."
            )
        model = model.get_base_model()
    found: PreTrainedModel = model
    return found


def _card(source: str) -> str:
    """Return the model card of a hub repository; empty without one."""
    file = checkpoint_file(source, "README.md")
    return "" if file is None else Path(file).read_text(encoding="utf-8", errors="replace")


def _recommended(stated: GenerationConfig | None) -> dict[str, Any]:
    """Return the limit and the sampling of a checkpoint's generation_config.json as keys of the configuration."""
    if stated is None:
        return {}
    found = {"max_new_tokens": stated.max_new_tokens}
    # Some configs write greedy decoding as sampling at a temperature of 1e-6.
    if stated.do_sample and (stated.temperature is None or stated.temperature > _GREEDY):
        found |= {"temperature": stated.temperature or 1.0, "top_p": stated.top_p, "top_k": stated.top_k or None}
    return {f"generation.{key}": value for key, value in found.items() if value is not None}


def _official_branches(source: str, model: PreTrainedModel) -> Branches | None:
    """Load the published branches that come with the weights; None if there are none."""
    if not official_names(source):
        return None
    official = load_official(source, model)
    for note in official.notes:
        logger.info("%s: %s", source, note)
    return official.branches


def _load_weights(
    preset: Preset, config: PretrainedConfig, where: torch.device, number: torch.dtype
) -> PreTrainedModel:
    loaded: Any = AutoModelForImageTextToText.from_pretrained(
        preset.source,
        config=config,
        trust_remote_code=False,
        dtype=number,
        device_map=None if where.type == "cpu" else {"": where},
        output_loading_info=True,
    )
    model: PreTrainedModel = loaded[0]  # from_pretrained leaves it in eval mode
    info: dict[str, Any] = loaded[1]
    absent = sorted({*info["missing_keys"], *(str(key) for key in info["mismatched_keys"])})
    if absent:
        raise BackendError(
            f"The model '{preset.name}' lacks {len(absent)} of the weights that its config names, such as {absent[0]}. "
            "Download or save it again."
        )
    if info["unexpected_keys"]:
        logger.info("%s: %d weights are not part of the stock model", preset.name, len(info["unexpected_keys"]))
    return model


def load_backend(model: str = "nano", *, check: bool = True, **how: Any) -> HFBackend | StockBackend:
    """Load a model for answers: piece by piece if that is what the stock model computes, else by stock `generate`.

    Args:
        model: preset name, folder or hub id.
        check: False skips the comparison and trusts the family.
        how: the other arguments of `HFBackend.load`.

    Raises:
        ConfigError, BackendError: as `HFBackend.load`; or branches were given that cannot be used.
    """
    with torch.random.fork_rng(devices=[]):  # the first weights of a gate are drawn, and a user's seed is the user's
        loaded = HFBackend.load(model, check=False, **how)
        reason = difference(loaded) if check else ""
    if not reason:
        return loaded
    if how.get("branches"):
        raise BackendError(f"{_refusal(loaded, reason)}, so branches cannot be used. Leave them out.")
    logger.warning(
        "%s. It answers through stock generate: each turn is computed anew, and there is no perception.",
        _refusal(loaded, reason),
    )
    return StockBackend(loaded, reason)


def _refusal(loaded: HFBackend, reason: str) -> str:
    return (
        f"'{loaded.name}' ({loaded.model.config.model_type}) cannot be run piece by piece as the stock model runs with "
        f"transformers {transformers.__version__}: {reason}"
    )


@contextmanager
def _quiet(preset: Preset) -> Iterator[None]:
    """Silence the library while loading: a progress bar for a local folder, and hints on torchvision and weights."""
    hub: Any = hub_logging
    level, bars = hub.get_verbosity(), hub.is_progress_bar_enabled()
    hub.set_verbosity_error()
    if preset.local:
        hub.disable_progress_bar()
    try:
        yield
    finally:
        hub.set_verbosity(level)
        if bars:
            hub.enable_progress_bar()


@contextmanager
def _explained(preset: Preset) -> Iterator[None]:
    """Turn an error of loading into a BackendError with advice."""
    try:
        yield
    except torch.OutOfMemoryError as error:
        need = "" if preset.memory_gb is None else f" It needs about {preset.memory_gb:g} GB."
        raise BackendError(
            f"The model '{preset.name}' does not fit on the accelerator: {error}.{need} "
            "Free its memory, use a smaller model, or device='cpu'."
        ) from error
    except (OSError, ValueError, KeyError, ImportError, RuntimeError, SafetensorError) as error:
        if "trust_remote_code" in str(error):
            raise BackendError(
                f"The model '{preset.name}' needs the code that comes with it (auto_map in its files). Such code is "
                "never run (trust_remote_code=False). Use a model of a family that transformers knows."
            ) from error
        if preset.name in SHIPPED:
            advice = obstacle() or "The package should contain it: install qzoom-agent again."
        elif preset.local and (Path(preset.source) / "adapter_config.json").is_file():
            advice = (
                "The folder holds an adapter and not its base. Merge the two with peft (merge_and_unload) and save the "
                "merged model with its processor."
            )
        elif preset.local:
            advice = "The folder should be one that transformers' save_pretrained wrote, for a model and its processor."
        else:
            offline = " (HF_HUB_OFFLINE is set)" if os.environ.get("HF_HUB_OFFLINE") else ""
            advice = (
                f"Check the id and the network{offline}, fetch it elsewhere with `hf download {preset.source}`, or "
                "give the folder of a copy. `qzoom models` lists the presets; 'nano' needs no download."
            )
        reason = str(error).strip().split("\n")[0] or type(error).__name__
        if isinstance(error, ImportError) or _NEEDS.search(reason):
            if package := _missing_package(error):
                reason = f"its processor needs the package {package}, which transformers cannot do without."
                advice = f"Install it: pip install {package}" + (
                    ", in the build that fits your torch." if package == "torchvision" else "."
                )
            else:
                advice = ""
        raise BackendError(
            f"Could not load the model '{preset.name}' from {preset.source}: {reason} {advice}"
        ) from error


def _missing_package(error: BaseException | None) -> str:
    """Return the package that transformers misses, as an error or its cause names it; empty if none does."""
    while error is not None:
        if isinstance(error, ModuleNotFoundError) and error.name:
            return error.name.split(".")[0]
        if needs := _NEEDS.search(str(error)):
            return needs[1].lower()
        error = error.__cause__
    return ""


DtypeName = Literal["float32", "bfloat16", "float16"]


def choose(device: str, dtype: str) -> tuple[torch.device, torch.dtype, str]:
    """Choose device and dtype by name or "auto"; return them with a line that gives the reason.

    Raises ConfigError for a name that torch does not know, or a device that this machine does not have.
    """
    where, why = _device(device)
    if dtype != "auto":
        if dtype not in get_args(DtypeName):
            raise ConfigError(f"Unknown dtype '{dtype}'. Use auto, {', '.join(get_args(DtypeName))}.")
        why += "; dtype as asked"
    elif where.type == "cpu":
        dtype = "float32"
    elif where.type == "cuda" and not torch.cuda.is_bf16_supported(including_emulation=False):
        dtype, why = "float16", f"{why}; it has no native bfloat16"
    else:
        dtype = "bfloat16"
    return where, getattr(torch, dtype), f"{where}, {dtype}: {why}"


def _device(name: str) -> tuple[torch.device, str]:
    found = torch.accelerator.current_accelerator(check_available=True)
    if name == "auto":
        return (torch.device("cpu"), "no accelerator found") if found is None else (found, "accelerator found")
    try:
        asked = torch.device(name)
    except RuntimeError:
        raise ConfigError(f"Unknown device '{name}'. Use auto, cpu, cuda, cuda:0 or mps.") from None
    if asked.type == "cpu":
        return asked, "device as asked"
    if found is None or found.type != asked.type or (asked.index or 0) >= torch.accelerator.device_count():
        have = "none" if found is None else f"{torch.accelerator.device_count()} x {found.type}"
        raise ConfigError(
            f"The device '{name}' was not found: torch {torch.__version__} sees these accelerators: {have}. "
            "Use device='auto' or 'cpu', or install a torch built for your accelerator."
        )
    return asked, "device as asked"


def accelerator(process: int) -> str:
    """Return the name of the accelerator for process number `process` of this host; "auto" without one."""
    found = torch.accelerator.current_accelerator(check_available=True)
    return "auto" if found is None else f"{found.type}:{process % torch.accelerator.device_count()}"


def peak_memory() -> int:
    """Return the most bytes that tensors of this process held on a CUDA device, of several the fullest; 0 without."""
    devices = range(torch.cuda.device_count()) if torch.cuda.is_available() else ()
    return max((int(torch.cuda.max_memory_allocated(device)) for device in devices), default=0)
