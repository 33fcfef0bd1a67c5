"""The two learned branches, small modules beside an unchanged base model: the gate and SD-RPN.

The gate decides whether a question needs more detail, SD-RPN where. Both read the hidden states after the first K
decoder layers and start as copies of the base's layers K, K+1, ..., as far as these have full attention. Of SD-RPN's
last layer only the query and key of the map are kept (published checkpoints carry the whole layer). The gate's last
layer is computed for the last prompt token alone, whose state is all that its head reads, where its form allows it.
Neither writes to a cache.

A branch file holds their weights (see `branch_config`); with `int8` its matrices are stored as bytes and a scale for
each row, half the size of bfloat16.
"""

import hashlib
from collections.abc import Sequence
from copy import deepcopy
from pathlib import Path
from shutil import rmtree
from tempfile import TemporaryDirectory
from typing import Any

import torch
from pydantic import ValidationError
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import PreTrainedModel

from qzoom_agent.errors import BackendError
from qzoom_agent.files import first_fault
from qzoom_agent.perception.adapters import adapter_for, full_layers, text_model
from qzoom_agent.perception.branch_config import (
    CONFIG,
    FURTHER,
    SUBFOLDER,
    WEIGHTS,
    BranchConfig,
    branch_folder,
    default_k,
)
from qzoom_agent.perception.decoder import Rotary, last_token, last_token_share, layer_share, project, rotate, run_layer

_SCALE = ".scale"


class SDRPN(nn.Module):
    """Self-distilled region proposal network: a logit for every visual token (Q-Zoom 3.1, as in the released code)."""

    def __init__(self, layers: Sequence[nn.Module], last: Any, *, extra_norm: nn.Module | None, rotated: bool) -> None:
        super().__init__()
        self.layers = nn.ModuleList(layers)
        attention = last.self_attn
        self.extra_norm = extra_norm
        self.norm = last.input_layernorm
        self.q_proj, self.k_proj = attention.q_proj, attention.k_proj
        self.q_norm, self.k_norm = getattr(attention, "q_norm", None), getattr(attention, "k_norm", None)
        self.head_dim = int(attention.head_dim)
        self.heads = int(attention.o_proj.in_features) // self.head_dim
        self.scaling = float(attention.scaling)
        """Factor of the logits."""
        self.rotated = rotated
        self.layers_a_token = len(self.layers) + layer_share((self.k_proj,), last)
        """Work for each token, in decoder layers."""

    def states(self, hidden: Tensor, *, rotary: Rotary, mask: Tensor | None) -> Tensor:
        """Return the normed states (batch, tokens, hidden) that queries and keys of the map are made of."""
        for layer in self.layers:
            hidden = run_layer(layer, hidden, rotary=rotary, mask=mask)
        if self.extra_norm is not None:
            hidden = self.extra_norm(hidden)
        normed: Tensor = self.norm(hidden)
        return normed

    def queries(self, states: Tensor, rotary: Rotary) -> Tensor:
        """Return queries (batch, heads, tokens, width) of these states, which stand at the positions of `rotary`."""
        parts = project(states, self.q_proj, self.q_norm, self.head_dim, heads=self.heads)
        return rotate(parts, rotary) if self.rotated else parts

    def keys(self, states: Tensor, rotary: Rotary) -> Tensor:
        """Return keys (batch, key heads, tokens, width) of these states."""
        parts = project(states, self.k_proj, self.k_norm, self.head_dim)
        return rotate(parts, rotary) if self.rotated else parts

    def logits(self, query: Tensor, keys: Tensor) -> Tensor:
        """Return the map (batch, n) of a query (batch, heads, 1, d) and keys (batch, key heads, n, d).

        It is the attention's logits, q.k / sqrt(d) in most families, in the mean over heads.
        """
        # grouped-query attention: several query heads share a key head
        keys = keys.repeat_interleave(query.shape[1] // keys.shape[1], dim=1)
        logits: Tensor = (query @ keys.transpose(2, 3)).mean(dim=1)[:, 0] * self.scaling
        return logits


class Gate(nn.Module):
    """Classifier of questions that need more detail: one logit for each row of the batch."""

    def __init__(self, layers: Sequence[nn.Module], hidden_size: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList(layers)
        self.head = nn.Linear(hidden_size, 1)
        self.layers_a_token = len(self.layers) - 1 + last_token_share(self.layers[-1])
        """Work for each token, in decoder layers."""

    def forward(self, hidden: Tensor, *, rotary: Rotary, mask: Tensor | None) -> Tensor:
        """Return logits (batch,) from states after K base layers, (batch, tokens, hidden)."""
        *layers, last = self.layers
        for layer in layers:
            hidden = run_layer(layer, hidden, rotary=rotary, mask=mask)
        logits: Tensor = self.head(last_token(last, hidden, rotary=rotary, mask=mask))[:, 0, 0]
        return logits


class Branches(nn.Module):
    """SD-RPN and gate of one base model. Either may be absent."""

    def __init__(self, config: BranchConfig, sdrpn: SDRPN | None, gate: Gate | None) -> None:
        super().__init__()
        self.config = config
        self.sdrpn = sdrpn
        self.gate = gate
        self.further: Branches | None = None
        """Gate and SD-RPN of further looks, at conversations that show crops already; None: the model looks once."""

    @property
    def own_weights(self) -> dict[str, Tensor]:
        """The weights without those of further looks."""
        return {name: value for name, value in self.state_dict().items() if not name.startswith(f"{FURTHER}.")}

    def add_further(self, further: "Branches") -> None:
        """Take branches of further looks. Raises BackendError if they read the states of another layer."""
        if further.config.k != self.config.k:
            raise BackendError(
                f"The branches of further looks read the states after {further.config.k} layers and those of the first "
                f"look after {self.config.k}. Both have to read the same: train them with the same k."
            )
        self.further = further

    @classmethod
    def from_base(
        cls,
        model: PreTrainedModel,
        *,
        k: int | None = None,
        depth: int = 3,
        gate_depth: int = 3,
        with_gate: bool = True,
        with_sdrpn: bool = True,
        **settings: Any,
    ) -> "Branches":
        """Make untrained branches: copies of the base's layers K, K+1, ... and a fresh head for the gate.

        Layers with linear or sliding-window attention are passed over.

        Args:
            model: the base.
            k: layers before the branches; None takes about 0.65 of them.
            depth: layers of SD-RPN, the last of which is its map's query and key.
            gate_depth: layers of the gate.
            with_gate: make a gate.
            with_sdrpn: make an SD-RPN.
            settings: other fields of `BranchConfig`.

        Raises:
            BackendError: the family is not supported, or the base is too shallow.
        """
        text = text_model(model)
        config = BranchConfig(
            family=model.config.model_type,
            hidden_size=text.config.hidden_size,
            base_layers=len(text.layers),
            k=default_k(len(text.layers)) if k is None else k,
            depth=depth,
            gate_depth=gate_depth,
            **settings,
        )
        return _build(model, config, with_sdrpn=with_sdrpn, with_gate=with_gate)

    def digest(self) -> str:
        """Return a digest of weights and settings, those of further looks among them."""
        found = hashlib.sha256(self.config.model_dump_json().encode())
        if self.further is not None:
            found.update(self.further.config.model_dump_json().encode())
        for name, value in self.state_dict().items():
            found.update(name.encode() + value.detach().float().cpu().contiguous().numpy().tobytes())
        return found.hexdigest()[:16]

    def save(self, folder: Path | str, *, int8: bool = False) -> int:
        """Write the branch file into `folder` and return its size in bytes; float32 is stored as bfloat16.

        A model's folder gets it in the subfolder `branches`, in place of a branch file beside the model. With `int8`
        matrices are stored as bytes; a value is then off by at most half a 127th of its row's largest.
        """
        given = Path(folder)
        folder = given / SUBFOLDER if (given / "config.json").is_file() else given
        folder.mkdir(parents=True, exist_ok=True)
        stored: dict[str, Tensor] = {}
        for name, value in self.own_weights.items():
            if int8 and value.ndim == 2 and value.shape[0] > 1:
                scale = value.float().abs().amax(dim=1, keepdim=True).clamp_min(1e-12) / 127
                stored[name] = (value.float() / scale).round().to(torch.int8).contiguous()
                stored[name + _SCALE] = scale[:, 0].contiguous()
            else:
                stored[name] = value.to(torch.bfloat16).contiguous()
        # settings go first and come last: a killed process leaves no branches, rather than parts of old and new ones
        (folder / CONFIG).unlink(missing_ok=True)
        rmtree(folder / FURTHER, ignore_errors=True)
        save_file(stored, folder / WEIGHTS, metadata={"format": "pt"})
        further = 0 if self.further is None else self.further.save(folder / FURTHER, int8=int8)
        (folder / CONFIG).write_text(self.config.model_dump_json(indent=1) + "\n", encoding="utf-8")
        if folder != given:
            for name in (CONFIG, WEIGHTS):
                (given / name).unlink(missing_ok=True)
        return (folder / WEIGHTS).stat().st_size + further

    def push_to_hub(self, repo_id: str, *, base: str, **options: Any) -> str:
        """Upload these branches, without their base, to the Hugging Face hub and return the address of the commit.

        Args:
            repo_id: repository, `user/name` or `name`; created if it is not there.
            base: hub id of the base.
            options: `labels`, `results` and `license` of `hub.BranchCard`; other arguments of `hub.push_branches`.

        Raises:
            BackendError: the hub refuses.
        """
        from qzoom_agent.perception.hub import BranchCard, push_branches

        card = BranchCard(base, **{key: options.pop(key) for key in ("labels", "results", "license") if key in options})
        with TemporaryDirectory() as folder:
            self.save(folder)
            return push_branches(folder, repo_id, card, **options)

    @classmethod
    def from_hub(
        cls, repo_id: str, model: PreTrainedModel, *, revision: str | None = None, token: str | None = None
    ) -> "Branches":
        """Load branches of a repository of the Hugging Face hub for their base `model`.

        Args:
            repo_id: repository, `user/name`.
            model: the base.
            revision: branch, tag or commit; None: main.
            token: None: the one that is logged in.

        Raises:
            BackendError: there is none, it holds no branches, or they were made for another base.
        """
        from qzoom_agent.perception.hub import fetch_branches

        return cls.load(fetch_branches(repo_id, revision, token=token), model)

    @classmethod
    def load(cls, source: Path | str, model: PreTrainedModel) -> "Branches":
        """Load branches (a folder, or a hub id), on the device and in the number format of their base `model`.

        Raises:
            BackendError: there are none, they are broken, or they were made for another base.
        """
        from qzoom_agent.perception.hub import local_branches

        folder = branch_folder(local_branches(source))
        missing = [name for name in (CONFIG, WEIGHTS) if not (folder / name).is_file()]
        if missing:
            raise BackendError(
                f"There are no branches in {folder}: it lacks {' and '.join(missing)}. "
                "Give the folder that `qzoom train` or `qzoom convert` wrote."
            )
        try:
            config = BranchConfig.model_validate_json((folder / CONFIG).read_text(encoding="utf-8"))
            _require_size((folder / WEIGHTS).stat().st_size, model)
            stored = load_file(folder / WEIGHTS)
            weights = {
                name: value.float() * stored[name + _SCALE][:, None] if value.dtype == torch.int8 else value
                for name, value in stored.items()
                if not name.endswith(_SCALE)
            }
        except ValidationError as error:
            raise BackendError(
                f"The branches in {folder} cannot be read: {CONFIG} has {first_fault(error)}. Copy them again, or "
                "install the release of qzoom-agent that wrote them."
            ) from None
        except (OSError, ValueError, KeyError, RuntimeError, SafetensorError) as error:
            raise BackendError(f"The branches in {folder} cannot be read: {error}. Copy them again.") from error
        found = cls.from_weights(weights, config, model, where=str(folder))
        if (folder / FURTHER / CONFIG).is_file():
            found.add_further(cls.load(folder / FURTHER, model))
        return found

    @classmethod
    def from_weights(
        cls, weights: dict[str, Tensor], config: BranchConfig, model: PreTrainedModel, *, where: str
    ) -> "Branches":
        """Make branches with these weights, by their names in `state_dict`; errors name their source `where`."""
        parts = {name.split(".")[0] for name in weights}
        if not parts or not parts <= {"sdrpn", "gate"}:
            raise BackendError(f"The branches in {where} hold unknown parts: {', '.join(sorted(parts)) or 'none'}.")
        branches = _build(model, config, with_sdrpn="sdrpn" in parts, with_gate="gate" in parts)
        own, given = ({name: value.shape for name, value in of.items()} for of in (branches.state_dict(), weights))
        if wrong := sorted(name for name in own.keys() | given.keys() if own.get(name) != given.get(name)):
            raise BackendError(
                f"The branches in {where} do not fit the model: {len(wrong)} weights are missing, unknown or of "
                f"another shape, {wrong[0]} for one. Use the base they were trained on."
            )
        if next(branches.parameters()).is_meta:  # conversion needs no weights of the base
            branches.to_empty(device="cpu")
        branches.load_state_dict(weights)
        return branches.eval()


def _require_size(stored: int, model: PreTrainedModel) -> None:
    """Raise BackendError if a file of so many bytes cannot be branches: copies of layers of the base."""
    most = 8 * sum(value.numel() for value in model.parameters()) + 2**20  # two copies in float32, and a header
    if stored > most:
        raise BackendError(f"The branch file has {stored:,} bytes; branches of this base have at most {most:,}.")


def _build(model: PreTrainedModel, config: BranchConfig, *, with_sdrpn: bool, with_gate: bool) -> Branches:
    config.require_fit(model)
    adapter, text = adapter_for(model.config), text_model(model)
    base = [text.layers[index] for index in full_layers(text.config) if index >= config.k]
    # deepcopy with a memo that holds the config keeps it shared with the base: a later change of the attention kernel
    # reaches the branches too
    shared = {id(text.config): text.config}

    def copies(count: int) -> list[nn.Module]:
        return [deepcopy(layer, dict(shared)) for layer in base[:count]]

    sdrpn = gate = None
    if with_sdrpn:
        *layers, last = copies(config.depth)
        extra = deepcopy(text.norm) if adapter.map_norm else None
        sdrpn = SDRPN(layers, last, extra_norm=extra, rotated=adapter.rotated_map)
    if with_gate:
        gate = Gate(copies(config.gate_depth), config.hidden_size)
        gate.head.to(next(text.parameters()))
    return Branches(config, sdrpn, gate).eval()
