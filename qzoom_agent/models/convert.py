"""Conversion of branches between published checkpoints and our branch folders.

    to_branches     an official checkpoint, or our folder, to our folder: only the weights in use, as int8 on request
    to_checkpoint   our folder and its base to a checkpoint folder that the published code loads

Our folder is made without the base's weights, so converting for a 7B model takes the memory of its branches. A
checkpoint is the base's files, its config with the published keys, and one more shard with the branches; the base's
shards are copied as they are unless a name in them has to change. Nothing is overwritten without `force`, and a base
never.
"""

import json
import shutil
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

import torch
from huggingface_hub import snapshot_download
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForImageTextToText, PreTrainedModel

from qzoom_agent.confidence import FILE as CONFIDENCE
from qzoom_agent.errors import BackendError, ConfigError
from qzoom_agent.models.hf import HFBackend
from qzoom_agent.models.presets import resolve_model
from qzoom_agent.perception.adapters import QWEN2_5_VL, QWEN3_VL, adapter_for
from qzoom_agent.perception.branch_config import CONFIG, FURTHER, SUBFOLDER, WEIGHTS, BranchConfig, branch_folder
from qzoom_agent.perception.branches import Branches
from qzoom_agent.perception.checkpoints import (
    INDEX,
    checkpoint_file,
    load_official,
    official_settings,
    own_branches,
    own_name,
    to_official,
    weight_files,
)

_BESIDE: Final = (".json", ".txt", ".jinja", ".model", ".py", ".md")
"""Suffixes of a base's files that are copied, besides its weights."""
IMAGES: Final = "preprocessor_config.json"
_RULE: Final = ("peak_share", "blur", "margin", "box", "max_regions")
"""Settings that make a box of a map, and that a published checkpoint has no keys for."""


@dataclass(frozen=True, slots=True)
class Converted:
    """Result of a conversion."""

    files: list[Path]
    before: int
    """Bytes of the branches in the source."""
    after: int
    """Bytes of the branches in the target."""
    notes: list[str] = field(default_factory=list)
    """Notes for the user, on misleading keys in the source's config."""


def to_branches(
    source: str, target: Path | str, *, base: str | None = None, int8: bool = False, force: bool = False
) -> Converted:
    """Write the branches of `source` into the folder `target`, whose other files are left alone.

    Args:
        source: an official checkpoint or branches of ours, as folder or hub id.
        target: the folder to write.
        base: the model they belong to (preset, folder or hub id). None: `source` itself, if it is a whole model.
        int8: store matrices as bytes; see `Branches.save`.
        force: replace branches in the target.

    Raises:
        ConfigError: the target already holds branches, or there is no base.
        BackendError: the source has no branches, or they are broken or made for another base.
    """
    if not Path(source).is_dir() and (own := own_branches(given := resolve_model(source).source)) is not None:
        base = base or (given if checkpoint_file(given, "config.json") else None)
        source = str(own)
    target = Path(target)
    there = [name for name in (CONFIG, WEIGHTS) if (branch_folder(target) / name).exists()]
    if there and not force:
        raise ConfigError(f"{target} already holds {' and '.join(there)}. Choose another folder, or add --force.")
    _require_folder(target)
    if (branch_folder(source) / CONFIG).is_file():
        notes: list[str] = []
        branches = Branches.load(source, _skeleton(_base_of(source, base)))
        folder = branch_folder(source)
        stored = [folder / WEIGHTS, folder / FURTHER / WEIGHTS]
        before = sum(file.stat().st_size for file in stored if file.exists())
    else:
        source = resolve_model(source).source
        branches, notes, before = load_official(source, _skeleton(base or source))
    after = branches.save(target, int8=int8)
    written = branch_folder(target)
    return Converted([written / WEIGHTS, written / CONFIG], before, after, notes)


def to_checkpoint(source: str, target: Path | str, *, base: str | None = None, force: bool = False) -> Converted:
    """Write a checkpoint with the published names into `target`: the base's files, and the branches of `source`.

    Args:
        source: a folder of our branches.
        target: the folder to write.
        base: the model they belong to (preset, folder or hub id). None: `source` itself, if it is a whole model.
        force: write into a folder that is not empty; weights in it are removed first.

    Raises:
        ConfigError: the target is not empty, or there is no base.
        BackendError: branches or base cannot be loaded, do not fit, or are of a family that the published code lacks.
    """
    target, given = Path(target), _base_of(source, base)
    home = _local(given)
    if target.resolve() in (home.resolve(), Path(source).resolve()):
        raise ConfigError(f"{target} is the source of the conversion. Choose another folder for the result.")
    _require_folder(target)
    if target.is_dir() and any(target.iterdir()) and not force:
        raise ConfigError(f"{target} is not empty. Choose another folder, or add --force.")
    backend = HFBackend.load(given, device="cpu", dtype="bfloat16", branches=source)
    branches, model = backend.branches, backend.model
    assert branches is not None
    family = adapter_for(model.config)
    if family not in (QWEN2_5_VL, QWEN3_VL):
        raise BackendError(f"The published code has no Q-Zoom for {family.name}. Keep these branches in our form.")
    target.mkdir(parents=True, exist_ok=True)
    for stale in [*target.glob("*.safetensors"), target / INDEX, target / CONFIG, target / SUBFOLDER / CONFIG]:
        stale.unlink(missing_ok=True)  # an old shard would be loaded instead
    extra = to_official(branches, model)
    files = _write_weights(home, target, extra, renamed=family is QWEN2_5_VL)
    left = {INDEX, CONFIG, "config.json", CONFIDENCE}  # a confidence is that of the base as it comes
    for path in sorted(home.iterdir()):
        if path.is_file() and path.suffix in _BESIDE and path.name not in left:
            shutil.copyfile(path, target / path.name)
            files.append(target / path.name)
    images = _image_settings(home)
    if images and target / IMAGES not in files:  # the one file that older releases of transformers read
        (target / IMAGES).write_text(json.dumps(images, indent=2) + "\n", encoding="utf-8")
        files.append(target / IMAGES)
    settings = json.loads((home / "config.json").read_text(encoding="utf-8"))
    notes = _left_out(branches)
    if "text_config" in settings and family is QWEN2_5_VL:
        notes.append(
            "The base's config has a text_config, which the transformers release that the published code is written "
            "for does not know. Use a base as it is on the hub, or write its keys on the top level."
        )
    keys = official_settings(branches)
    written = _limits(images) | settings | keys
    if (text := settings.get("text_config")) is not None:  # the published code leaves copies of its keys there
        written["text_config"] = text | {key: value for key, value in keys.items() if key in text}
    (target / "config.json").write_text(json.dumps(written, indent=2) + "\n", encoding="utf-8")
    before, after = (branch_folder(source) / WEIGHTS).stat().st_size, sum(value.nbytes for value in extra.values())
    return Converted([*files, target / "config.json"], before, after, notes)


def _left_out(branches: Branches) -> list[str]:
    """Return what the published code does not know of these branches."""
    notes, config = [], branches.config
    if branches.further is not None:
        notes.append("The published code looks once: the branches of further looks are left out.")
    rule = {name: getattr(config, name) for name in _RULE}
    lost = [f"{key}={value}" for key, value in rule.items() if value != BranchConfig.model_fields[key].default]
    if branches.sdrpn is not None and lost:
        notes.append(
            f"The published code crops one tight box around the cells above roi_conf_thresh, here {config.threshold:g},"
            f" and knows none of {', '.join(lost)}: its crops differ from ours. For a threshold that suits it, first "
            "run `qzoom calibrate` with peak_share: null, blur: fixed, margin: 0 and box: null."
        )
    return notes


def _base_of(source: str, base: str | None) -> str:
    if base is not None:
        return base
    if (Path(source) / "config.json").is_file():
        return source
    raise ConfigError(f"{source} holds branches and no model. Give the base they were trained on with --base.")


def _require_folder(target: Path) -> None:
    if target.exists() and not target.is_dir():
        raise ConfigError(f"{target} is a file, but a folder is written. Choose another name.")


def _skeleton(source: str) -> PreTrainedModel:
    """Build the modules of a model without its weights."""
    source = resolve_model(source).source
    try:
        config = AutoConfig.from_pretrained(source, trust_remote_code=False)
        maker: Any = AutoModelForImageTextToText
        with torch.device("meta"):
            model: PreTrainedModel = maker.from_config(config, dtype=torch.bfloat16)
    except (OSError, ValueError, KeyError) as error:
        reason = str(error).strip().split("\n")[0]
        raise BackendError(f"{source} has no config of an image-text-to-text model: {reason} Check --base.") from error
    return model


def _local(base: str) -> Path:
    """Return the folder with the base's files; those of a hub id are fetched."""
    source = resolve_model(base).source
    if Path(source).is_dir():
        return Path(source)
    try:
        found = snapshot_download(source, allow_patterns=["*.safetensors", *(f"*{suffix}" for suffix in _BESIDE)])
    except (OSError, ValueError) as error:
        raise BackendError(
            f"The files of {source} cannot be fetched: {error}. Check the id and the network."
        ) from error
    return Path(found)


def _write_weights(home: Path, target: Path, extra: dict[str, torch.Tensor], *, renamed: bool) -> list[Path]:
    """Copy the base's weights, add the branches as a last shard, and write the index over all."""
    held = weight_files(str(home))
    if not held:
        raise BackendError(f"{home} has no weights as safetensors. Save it with save_pretrained, or fetch it again.")
    shards = sorted(set(held.values()))
    where: dict[str, str] = {}
    for number, shard in enumerate(shards, 1):
        path = target / f"model-{number:05d}-of-{len(shards) + 1:05d}.safetensors"
        names = {name: _published(name, renamed) for name, file in held.items() if file == shard}
        try:
            if all(name == new for name, new in names.items()):
                shutil.copyfile(home / shard, path)
            else:
                stored = load_file(home / shard)
                save_file({new: stored[name] for name, new in names.items() if new}, path, metadata={"format": "pt"})
        except (OSError, KeyError, SafetensorError) as error:
            raise BackendError(f"{home / shard} cannot be copied: {error}. Fetch the base again.") from error
        where |= {new: path.name for new in names.values() if new}
    last = target / f"model-{len(shards) + 1:05d}-of-{len(shards) + 1:05d}.safetensors"
    save_file(extra, last, metadata={"format": "pt"})
    where |= dict.fromkeys(extra, last.name)
    files = sorted(target.glob("model-*.safetensors"))
    total = sum(path.stat().st_size for path in files)
    index: dict[str, Any] = {"metadata": {"total_size": total}, "weight_map": where}
    (target / INDEX).write_text(json.dumps(index, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    return [*files, target / INDEX]


def _published(name: str, renamed: bool) -> str | None:
    """Return a base weight's name in the published code; None for a weight of other branches, which ours replace."""
    if own_name(name) is not None:
        return None
    if renamed:  # Qwen2.5-VL as later transformers releases may save it
        for new, old in (("model.language_model.", "model."), ("model.visual.", "visual.")):
            if name.startswith(new):
                return old + name.removeprefix(new)
    return name


def _image_settings(home: Path) -> dict[str, Any]:
    """Return the settings of the base's image processor, from a file of its own or, as transformers 5 saves it, from
    that of the whole processor.
    """
    for name in (IMAGES, "processor_config.json"):
        if (home / name).is_file():
            found: dict[str, Any] = json.loads((home / name).read_text(encoding="utf-8"))
            return found if name == IMAGES else found.get("image_processor") or {}
    return {}


def _limits(images: dict[str, Any]) -> dict[str, int]:
    """Return the pixel limits of an image processor, which the published code reads from the config."""
    size = images.get("size") or {}
    edges = {"min_pixels": "shortest_edge", "max_pixels": "longest_edge"}
    return {key: int(value) for key, edge in edges.items() if (value := images.get(key) or size.get(edge))}
