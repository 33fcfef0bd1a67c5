"""Checkpoints of the published Q-Zoom code, loaded on the stock model.

Such a checkpoint is the folder of a stock base model with extra weights, which stock loading ignores:

    Qwen2.5-VL   model.twig_layers.*, model.high_res_layers.*, model.high_res_head.*
    Qwen3-VL     model.language_model.{twig_layers, high_res_layers, high_res_head}.*

`twig` is SD-RPN, `high_res` the gate. Only these weights are read, and of the last twig layer only those of the map.
Misleading config keys are reported as notes.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final, NamedTuple, cast

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor
from transformers import PreTrainedModel
from transformers.utils.hub import cached_file

from qzoom_agent.errors import BackendError
from qzoom_agent.perception.adapters import adapter_for, text_model
from qzoom_agent.perception.branch_config import CONFIG, FURTHER, SUBFOLDER, WEIGHTS, BranchConfig, default_k
from qzoom_agent.perception.branches import Branches

_PARTS: Final = ("twig_layers.", "high_res_layers.", "high_res_head.")
_MAP: Final = ("input_layernorm.", "self_attn.q_proj.", "self_attn.k_proj.", "self_attn.q_norm.", "self_attn.k_norm.")
"""Weights of the last twig layer that the map uses."""
INDEX, _SINGLE = "model.safetensors.index.json", "model.safetensors"


def official_names(source: str) -> dict[str, str]:
    """Return the branch weights of a checkpoint (folder or hub id) as {full name: file}; empty if it has no branches.

    Raises:
        BackendError: the file that lists the weights is broken.
    """
    return {name: file for name, file in weight_files(source).items() if own_name(name) is not None}


def weight_files(source: str) -> dict[str, str]:
    """Return all weights of a checkpoint as {full name: file}; empty if none are stored as safetensors."""
    path = index = checkpoint_file(source, INDEX)
    try:
        if index is not None:
            where: dict[str, str] = json.loads(Path(index).read_text(encoding="utf-8"))["weight_map"]
            return where
        path = single = checkpoint_file(source, _SINGLE)
        if single is None:
            return {}
        with safe_open(single, framework="pt") as file:
            return dict.fromkeys(file.keys(), _SINGLE)
    except (OSError, ValueError, KeyError, SafetensorError) as error:
        raise BackendError(f"{path} cannot be read: {error}. Download it again.") from error


class OfficialBranches(NamedTuple):
    """The branches of an official checkpoint."""

    branches: Branches
    notes: list[str]
    """Notes for the user, on misleading keys of the config."""
    size: int
    """Bytes of the branch weights in the checkpoint, unused ones included."""


def load_official(source: str, model: PreTrainedModel) -> OfficialBranches:
    """Load the branches of an official checkpoint for its base `model`.

    Raises:
        BackendError: there are none, or they use a variant that the published evaluation does not use.
    """
    names = official_names(source)
    if not names:
        raise BackendError(
            f"{source} has no Q-Zoom branches: none of its weights is named {', '.join(part + '*' for part in _PARTS)}."
        )
    weights: dict[str, Tensor] = {}
    for file in sorted(set(names.values())):
        path = checkpoint_file(source, file)
        if path is None:
            raise BackendError(f"{source} lacks {file}, which its index names. Download it again.")
        try:
            with safe_open(path, framework="pt") as shard:
                found = {name: shard.get_tensor(name) for name, holder in names.items() if holder == file}
        except SafetensorError as error:
            raise BackendError(f"{path} cannot be read: {error}. Download it again.") from error
        weights |= {cast(str, own_name(name)): value for name, value in found.items()}
    config, notes = _read_config(_settings(source), weights, model)
    own_weights, dropped = _from_official(weights, config)
    if dropped:
        notes.append(f"{dropped} weights of the last twig layer are stored and never used; they were dropped.")
    branches = Branches.from_weights(own_weights, config, model, where=source)
    return OfficialBranches(branches, notes, sum(value.nbytes for value in weights.values()))


def _read_config(
    settings: Mapping[str, Any], weights: Mapping[str, Tensor], model: PreTrainedModel
) -> tuple[BranchConfig, list[str]]:
    """Return our config for a checkpoint with these config keys, and notes on misleading keys."""
    notes: list[str] = []
    layers = len(text_model(model).layers)
    for key, usual in (("roi_source", "qk"), ("roi_loss", "bce")):
        if settings.get(key, usual) != usual:
            raise BackendError(
                f"The checkpoint has {key}={settings[key]!r}; only {usual!r}, the released form, can be run."
            )
    if "twig_K" not in settings:
        notes.append(f"The config has no twig_K; {default_k(layers)} of {layers} layers are assumed.")
    k = int(settings.get("twig_K", default_k(layers)))
    if int(settings.get("high_res_K", k)) != k:
        raise BackendError(
            f"The checkpoint has twig_K={k} and high_res_K={settings['high_res_K']}. The published code mixes up the "
            "states of the two in that case; only equal values can be run."
        )
    depth, gate_depth = (
        1 + max((int(name.split(".")[1]) for name in weights if name.startswith(part)), default=-1)
        for part in ("twig_layers.", "high_res_layers.")
    )
    if depth != int(settings.get("twig_T", depth)):
        notes.append(f"The config says twig_T={settings['twig_T']}, but {depth} twig layers are stored and used.")
    if not settings.get("roi_multi_head", True):
        notes.append("roi_multi_head is false, which changed the training loss only: maps are means over heads.")
    aligned = bool(settings.get("reuse_src_pos", False))
    if not aligned and adapter_for(model.config).two_dimensional:
        notes.append(
            "reuse_src_pos is false, so crops get plain positions. Stage 2 of the published recipe trains aligned ones "
            "and stage 3 writes false all the same: compare with perception.positions=aligned."
        )
    if not settings.get("roi_enable2stage", False):
        notes.append("roi_enable2stage is not set: the published code needs it set by hand, here it does not matter.")
    config = BranchConfig(
        family=model.config.model_type,
        hidden_size=text_model(model).config.hidden_size,
        base_layers=layers,
        k=k,
        depth=max(1, depth),
        gate_depth=max(1, gate_depth),
        positions="aligned" if aligned else "plain",
        threshold=float(settings.get("roi_conf_thresh", 0.1)),
        gate_threshold=float(settings.get("high_res_thresh", settings.get("high_res_threshold", 0.1))),
    )
    return config, notes


def _from_official(weights: Mapping[str, Tensor], config: BranchConfig) -> tuple[dict[str, Tensor], int]:
    """Return official weights (named without the model's prefix) under our names, and the number of unused ones."""
    own: dict[str, Tensor] = {}
    dropped = 0
    for name, value in weights.items():
        part, _, rest = name.partition(".")
        if part != "twig_layers":
            own[f"gate.{part.removeprefix('high_res_')}.{rest}"] = value
            continue
        index, _, inside = rest.partition(".")
        if int(index) < config.depth - 1:
            own[f"sdrpn.layers.{rest}"] = value
        elif inside.startswith(_MAP):
            own["sdrpn." + inside.removeprefix("self_attn.").replace("input_layernorm.", "norm.")] = value
        else:
            dropped += 1
    return own, dropped


def to_official(branches: Branches, model: PreTrainedModel) -> dict[str, Tensor]:
    """Return our branches under the official names; unused weights of the last twig layer are those of the base."""
    prefix = "model.language_model." if model.config.model_type.startswith("qwen3") else "model."
    last = branches.config.depth - 1
    out: dict[str, Tensor] = {}
    if branches.sdrpn is not None:
        base = text_model(model).layers[branches.config.k + last]
        out |= {f"twig_layers.{last}.{name}": value for name, value in base.state_dict().items()}
    for name, value in branches.own_weights.items():
        part, _, rest = name.partition(".")
        if part == "gate":
            out[f"high_res_{rest}"] = value
        elif rest.startswith("layers."):
            out[f"twig_{rest}"] = value
        else:
            inside = rest.replace("norm.", "input_layernorm.", 1) if rest.startswith("norm.") else f"self_attn.{rest}"
            out[f"twig_layers.{last}.{inside}"] = value
    return {prefix + name: value.to(torch.bfloat16).contiguous() for name, value in out.items()}


def official_settings(branches: Branches) -> dict[str, Any]:
    """Return the keys that the published code reads from a checkpoint's config."""
    config = branches.config
    return {
        "enable_twig": branches.sdrpn is not None,
        "enable_high_res": branches.gate is not None,
        # published training never writes this key, and without it a gate that fires skips the upper layers altogether
        "roi_enable2stage": branches.sdrpn is not None,
        "twig_K": config.k,
        "twig_T": config.depth,
        "high_res_K": config.k,
        "high_res_T": config.gate_depth,
        "roi_source": "qk",
        "roi_loss": "bce",
        "roi_super_type": "v1",
        "roi_multi_head": True,
        "roi_skip_ffn": False,
        "roi_keep_ffn_mod_ratio": 1000,
        "roi_post_training": False,
        "add_noise_to_roi": False,
        "reuse_src_pos": config.positions == "aligned",
        "roi_conf_thresh": config.threshold,
        "high_res_thresh": config.gate_threshold,
    }


def own_name(name: str) -> str | None:
    """Return the name without the model's prefix, or None if it is no weight of a branch."""
    rest = name.removeprefix("model.").removeprefix("language_model.")
    return rest if rest.startswith(_PARTS) else None


def _settings(source: str) -> dict[str, Any]:
    path = checkpoint_file(source, "config.json")
    if path is None:
        raise BackendError(f"{source} has no config.json, so its branches cannot be placed. Copy the whole checkpoint.")
    found: dict[str, Any] = json.loads(Path(path).read_text(encoding="utf-8"))
    # the Qwen3 code copies its keys into the text config; training writes the outer ones, so they win
    return {**found.get("text_config", {}), **found}


def own_branches(source: str) -> Path | None:
    """Return the folder of the branches in our form that come with a model, or None; those of a hub id are fetched."""
    for folder in (f"{SUBFOLDER}/", ""):
        if file := checkpoint_file(source, folder + CONFIG):
            for name in (WEIGHTS, f"{FURTHER}/{CONFIG}", f"{FURTHER}/{WEIGHTS}"):
                checkpoint_file(source, folder + name)  # fetched into the same folder, if it is there
            return Path(file).parent
    return None


def checkpoint_file(source: str, name: str) -> str | None:
    """Return the path of a file in a folder or a hub repository, or None if there is no such file."""
    if Path(source).is_dir():
        path = Path(source) / name
        return str(path) if path.is_file() else None
    found: str | None = cached_file(source, name, _raise_exceptions_for_missing_entries=False)
    return found
