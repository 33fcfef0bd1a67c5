"""Where a model runs and in which number format, and why: the reason is kept, so that a slow run explains itself."""

from typing import Literal, get_args

import torch

from qzoom_agent.errors import ConfigError

DtypeName = Literal["float32", "bfloat16", "float16"]


def choose(device: str, dtype: str) -> tuple[torch.device, torch.dtype, str]:
    """The device and dtype for what the user asked ("auto" or a name), and a line that says why.

    Raises ConfigError for a name that torch does not know or a device this machine does not have.
    """
    where, why = _device(device)
    if dtype != "auto":
        if dtype not in get_args(DtypeName):
            raise ConfigError(f"Unknown dtype '{dtype}'. Use auto, {', '.join(get_args(DtypeName))}.")
        return where, getattr(torch, dtype), f"{where}, {dtype}: {why}; dtype as asked"
    if where.type == "cpu":
        return where, torch.float32, f"{where}, float32: {why}"
    if where.type == "cuda" and not torch.cuda.is_bf16_supported(including_emulation=False):
        return where, torch.float16, f"{where}, float16: {why}; it has no native bfloat16"
    return where, torch.bfloat16, f"{where}, bfloat16: {why}"


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
            f"The device '{name}' is not there: torch {torch.__version__} sees these accelerators: {have}. "
            "Use device='auto' or 'cpu', or install a torch built for your accelerator."
        )
    return asked, "device as asked"


def accelerator(process: int) -> str:
    """The name of the accelerator for process `process` of this host, or "auto" without one."""
    found = torch.accelerator.current_accelerator(check_available=True)
    return "auto" if found is None else f"{found.type}:{process % torch.accelerator.device_count()}"


def peak_memory() -> int:
    """Most bytes that tensors of this process held on an accelerator; 0 without one, or where torch does not count."""
    return int(torch.cuda.max_memory_allocated()) if torch.cuda.is_available() else 0
