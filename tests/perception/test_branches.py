"""The branch file: what it keeps, how small it is, and what is said of a file that does not fit or is torn."""

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from parity_run import Recording, Run, rebuilt
from qzoom_agent.agent import Agent
from qzoom_agent.config import PerceptionConfig
from qzoom_agent.errors import BackendError
from qzoom_agent.models.hf import HFBackend
from qzoom_agent.perception.adapters import text_model
from qzoom_agent.perception.branch_config import CONFIG, SUBFOLDER, WEIGHTS, BranchConfig, default_k
from qzoom_agent.perception.branches import Branches
from qzoom_agent.perception.checkpoints import load_official, own_branches
from qzoom_agent.perception.look import resolve_options
from tests.tiny_models import Family, build

RECORDINGS = Path(__file__).resolve().parents[1] / "parity"
RECORDED = ("qwen2_5_vl", "qwen3_vl")
FAMILIES: tuple[Family, ...] = ("qwen2_5_vl", "qwen3_vl", "llava")


@pytest.fixture(scope="module", autouse=True)
def _no_gradients() -> Iterator[None]:
    with torch.no_grad():
        yield


@pytest.fixture(scope="module", params=FAMILIES)
def base(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> HFBackend:
    folder = build(request.param, tmp_path_factory.mktemp(request.param), layers=6)
    return HFBackend.load(str(folder), device="cpu", dtype="float32")


@pytest.fixture(scope="module", params=RECORDED)
def recorded(request: pytest.FixtureRequest) -> HFBackend:
    """A recorded checkpoint with its branches, whose weights are bfloat16 held as float32."""
    return HFBackend.load(str(RECORDINGS / request.param / "checkpoint"), device="cpu", dtype="float32")


@pytest.fixture(scope="module")
def other(tmp_path_factory: pytest.TempPathFactory) -> HFBackend:
    folder = build("qwen2_5_vl", tmp_path_factory.mktemp("other"), layers=6)
    return HFBackend.load(str(folder), device="cpu", dtype="float32")


def branches_of(backend: HFBackend) -> Branches:
    assert backend.branches is not None
    return backend.branches


def test_branches_read_no_states_that_image_features_are_still_missing_from(base: HFBackend) -> None:
    if base.model.config.model_type != "qwen3_vl":
        assert Branches.from_base(base.model, k=1).config.k == 1
        return
    with pytest.raises(BackendError, match=r"k = 1 layers .* first 2 layers\. Choose k from 2 on"):
        Branches.from_base(base.model, k=1)
    assert Branches.from_base(base.model, k=2).config.k == 2


def test_untrained_branches_are_copies_of_the_base(base: HFBackend) -> None:
    branches = Branches.from_base(base.model, k=2, depth=3, gate_depth=2)
    layers = text_model(base.model).layers
    assert branches.sdrpn is not None and branches.gate is not None
    assert (len(branches.sdrpn.layers), len(branches.gate.layers)) == (2, 2)
    for own in (branches.sdrpn.layers, branches.gate.layers):
        for copy, layer in zip(own, layers[2:4], strict=True):
            same = layer.state_dict()
            assert copy is not layer and copy.state_dict().keys() == same.keys()
            assert all(torch.equal(value, same[name]) for name, value in copy.state_dict().items())
    last = layers[4]
    assert torch.equal(branches.sdrpn.norm.weight, last.input_layernorm.weight)
    for name in ("q_proj", "k_proj"):
        assert torch.equal(getattr(branches.sdrpn, name).weight, getattr(last.self_attn, name).weight)
    with torch.no_grad():
        branches.sdrpn.layers[0].input_layernorm.weight.add_(1)
    assert not torch.equal(branches.sdrpn.layers[0].input_layernorm.weight, layers[2].input_layernorm.weight)


def test_of_the_last_layer_only_queries_and_keys_are_kept(base: HFBackend) -> None:
    branches = Branches.from_base(base.model, k=2, depth=1, with_gate=False)
    names = {name.split(".")[1] for name in branches.state_dict()}
    assert {"norm", "q_proj", "k_proj"} <= names <= {"norm", "q_proj", "k_proj", "q_norm", "k_norm", "extra_norm"}


@pytest.mark.parametrize(("layers", "k"), [(28, 18), (36, 23), (8, 5), (6, 4), (2, 1), (1, 1)])
def test_branches_follow_about_two_thirds_of_the_layers(layers: int, k: int) -> None:
    assert default_k(layers) == k


def test_the_default_place_is_taken(base: HFBackend) -> None:
    assert Branches.from_base(base.model, depth=2, gate_depth=2).config.k == default_k(6) == 4


@pytest.mark.parametrize("settings", [{"k": 6}, {"k": 4, "depth": 3}, {"k": 4, "depth": 1, "gate_depth": 3}])
def test_a_base_too_shallow_is_refused(settings: dict[str, int], other: HFBackend) -> None:
    with pytest.raises(BackendError, match="Choose a smaller k or depth"):
        Branches.from_base(other.model, **{"depth": 1, "gate_depth": 1} | settings)


def test_a_saved_file_comes_back_exactly(recorded: HFBackend, tmp_path: Path) -> None:
    branches = branches_of(recorded)
    written = branches.save(tmp_path / "deep" / "er")
    again = Branches.load(tmp_path / "deep" / "er", recorded.model)
    assert written == (tmp_path / "deep" / "er" / WEIGHTS).stat().st_size
    assert again.config == branches.config
    own = branches.state_dict()
    assert again.state_dict().keys() == own.keys()
    assert all(torch.equal(value, own[name]) for name, value in again.state_dict().items())
    assert {value.dtype for value in again.state_dict().values()} == {torch.float32}
    assert not again.training


def test_beside_a_model_they_lie_in_a_subfolder_and_replace_those_that_lay_flat(
    other: HFBackend, tmp_path: Path
) -> None:
    """Engines load every `*.safetensors` that lies beside the weights; a folder of an older version still loads."""
    first, second = (Branches.from_base(other.model, k=k, depth=1, gate_depth=1) for k in (1, 2))
    first.save(tmp_path)
    (tmp_path / "config.json").write_text("{}")
    for folder in (tmp_path, str(tmp_path)):
        assert Branches.load(folder, other.model).config.k == 1
    assert own_branches(str(tmp_path)) == tmp_path
    written = second.save(tmp_path)
    assert Branches.load(tmp_path, other.model).config.k == 2
    assert own_branches(str(tmp_path)) == tmp_path / SUBFOLDER
    assert {path.name for path in tmp_path.iterdir()} == {"config.json", SUBFOLDER}
    assert written == (tmp_path / SUBFOLDER / WEIGHTS).stat().st_size


@pytest.mark.parametrize("part", ["sdrpn", "gate"])
def test_either_branch_may_be_alone(part: str, base: HFBackend, tmp_path: Path) -> None:
    Branches.from_base(base.model, k=2, with_gate=part == "gate", with_sdrpn=part == "sdrpn").save(tmp_path)
    again = Branches.load(tmp_path, base.model)
    assert (again.sdrpn is None, again.gate is None) == (part == "gate", part == "sdrpn")


def test_sizes(recorded: HFBackend, tmp_path: Path) -> None:
    """Against the published form, which carries the whole last layer, both branches in bfloat16."""
    checkpoint = str(RECORDINGS / recorded.model.config.model_type / "checkpoint")
    branches, whole = branches_of(recorded), load_official(checkpoint, recorded.model).size
    assert branches.save(tmp_path / "bf16") / whole < 0.90
    assert branches.save(tmp_path / "int8", int8=True) / whole < 0.50


def test_int8_is_off_by_half_a_step_of_its_row(recorded: HFBackend, tmp_path: Path) -> None:
    branches = branches_of(recorded)
    branches.save(tmp_path, int8=True)
    own = branches.state_dict()
    stored = load_file(tmp_path / WEIGHTS)
    for name, value in Branches.load(tmp_path, recorded.model).state_dict().items():
        if stored[name].dtype == torch.int8:
            step = own[name].abs().amax(dim=1, keepdim=True) / 127
            assert ((value - own[name]).abs() <= step * 0.501).all()
        else:
            assert torch.equal(value, own[name]), "vectors and the gate's head keep their precision"
    assert stored["gate.head.weight"].dtype == torch.bfloat16


def test_int8_finds_the_same_boxes(recorded: HFBackend, tmp_path: Path) -> None:
    """In all recorded cases; the gate's probability is off by at most 0.005, a blurred map by at most 0.03."""
    branches_of(recorded).save(tmp_path, int8=True)
    small = HFBackend(recorded.model, recorded.processor, name="int8", branches=Branches.load(tmp_path, recorded.model))
    folder = RECORDINGS / recorded.model.config.model_type
    for case in Recording.read(folder).cases:
        full, ours = (Run(backend, case, rebuilt(folder, case)) for backend in (recorded, small))
        assert full.look.score is not None and ours.look.score is not None
        assert abs(full.look.score - ours.look.score) < 0.01
        assert float((full.blurred - ours.blurred).abs().max()) < 0.04
        assert torch.equal(full.foreground, ours.foreground)
        assert (full.path, full.region and full.region[:4]) == (ours.path, ours.region and ours.region[:4])


def test_a_row_of_zeros_survives_int8(base: HFBackend, tmp_path: Path) -> None:
    branches = Branches.from_base(base.model, k=2)
    assert branches.sdrpn is not None
    branches.sdrpn.q_proj.weight[0] = 0
    branches.save(tmp_path, int8=True)
    again = Branches.load(tmp_path, base.model)
    assert again.sdrpn is not None and not again.sdrpn.q_proj.weight[0].any()


def test_branches_take_the_number_format_of_their_base(recorded: HFBackend, tmp_path: Path) -> None:
    branches_of(recorded).save(tmp_path)
    family = recorded.model.config.model_type
    half = HFBackend.load(
        str(RECORDINGS / family / "checkpoint"), device="cpu", dtype="bfloat16", branches=str(tmp_path)
    )
    assert {value.dtype for value in branches_of(half).state_dict().values()} == {torch.bfloat16}


def test_branches_of_another_base_are_refused(recorded: HFBackend, other: HFBackend, tmp_path: Path) -> None:
    branches_of(recorded).save(tmp_path)
    with pytest.raises(
        BackendError, match=r"made for a qwen\w+ of width 128 with 8 layers; this model is a qwen2_5_vl"
    ):
        Branches.load(tmp_path, other.model)
    with pytest.raises(BackendError, match="Use the base they were trained on"):
        HFBackend(other.model, other.processor, name="other", branches=branches_of(recorded))


def saved(backend: HFBackend, folder: Path, *, int8: bool = False) -> Path:
    Branches.from_base(backend.model, k=2).save(folder, int8=int8)
    return folder


def test_an_empty_folder_and_half_a_file_are_named(other: HFBackend, tmp_path: Path) -> None:
    with pytest.raises(BackendError, match=f"lacks {CONFIG} and {WEIGHTS}"):
        Branches.load(tmp_path, other.model)
    (saved(other, tmp_path) / WEIGHTS).unlink()
    with pytest.raises(BackendError, match=f"lacks {WEIGHTS}"):
        Branches.load(tmp_path, other.model)


@pytest.mark.parametrize("name", [CONFIG, WEIGHTS])
@pytest.mark.parametrize("share", [0.0, 0.5, 0.99])
def test_a_torn_file_is_a_clear_error(name: str, share: float, other: HFBackend, tmp_path: Path) -> None:
    path = saved(other, tmp_path) / name
    whole = path.read_bytes()
    path.write_bytes(whole[: int(share * len(whole))])
    with pytest.raises(BackendError, match="cannot be read"):
        Branches.load(tmp_path, other.model)


@pytest.mark.parametrize("change", [{"version": 2}, {"depth": 0}, {"unknown": 1}, {"k": None}])
def test_a_config_of_another_kind_is_a_clear_error(change: dict[str, object], other: HFBackend, tmp_path: Path) -> None:
    path = saved(other, tmp_path) / CONFIG
    path.write_text(json.dumps(json.loads(path.read_text()) | change), encoding="utf-8")
    with pytest.raises(
        BackendError, match=rf"{CONFIG} has {next(iter(change))}: .* install the release .* that wrote"
    ) as told:
        Branches.load(tmp_path, other.model)
    assert "pydantic" not in str(told.value)


@pytest.mark.parametrize("lost", ["sdrpn.norm.weight", "gate.head.weight", "sdrpn.q_proj.weight.scale"])
def test_a_missing_weight_is_a_clear_error(lost: str, other: HFBackend, tmp_path: Path) -> None:
    path = saved(other, tmp_path, int8=True) / WEIGHTS
    save_file({name: value for name, value in load_file(path).items() if name != lost}, path)
    with pytest.raises(BackendError, match=str(tmp_path)):
        Branches.load(tmp_path, other.model)


def test_weights_of_another_shape_or_name_are_a_clear_error(other: HFBackend, tmp_path: Path) -> None:
    path = saved(other, tmp_path) / WEIGHTS
    stored = load_file(path)
    save_file(stored | {"sdrpn.norm.weight": torch.ones(3)}, path)
    with pytest.raises(BackendError, match=r"another shape, sdrpn\.norm\.weight for one"):
        Branches.load(tmp_path, other.model)
    save_file(stored | {"head.weight": torch.ones(3)}, path)
    with pytest.raises(BackendError, match="unknown parts"):
        Branches.load(tmp_path, other.model)


def test_options_say_what_is_foreground_before_the_branches_do() -> None:
    config = BranchConfig(family="x", hidden_size=8, base_layers=4, k=2, threshold=0.2, peak_share=0.4)
    own = resolve_options(config, PerceptionConfig())
    assert (own.threshold, own.peak_share) == (0.2, 0.4)
    absolute = resolve_options(config, PerceptionConfig(threshold=0.1))
    assert (absolute.threshold, absolute.peak_share) == (0.1, None)
    relative = resolve_options(config, PerceptionConfig(peak_share=0.7))
    assert (relative.threshold, relative.peak_share) == (0.2, 0.7)
    assert (own.blur, own.margin) == ("fixed", 0.0)
    sharp = resolve_options(config.model_copy(update={"blur": "none", "margin": 0.3}), PerceptionConfig(margin=0.0))
    assert (sharp.blur, sharp.margin) == ("none", 0.0)


def test_branches_say_how_many_regions_get_a_crop_unless_a_user_does(other: HFBackend, tmp_path: Path) -> None:
    old = Branches.from_base(other.model, k=2)
    assert "max_regions" not in old.config.model_dump()
    several = Branches.from_base(other.model, k=2, max_regions=3)
    several.save(tmp_path)
    regions = {
        name: Agent(
            HFBackend(other.model, other.processor, name="tiny", branches=branches), perception=perception
        ).config.perception.max_regions
        for name, branches, perception in (
            ("old", old, {}),
            ("new", Branches.load(tmp_path, other.model), {"margin": 0.1}),
            ("asked", several, {"max_regions": 1}),
        )
    }
    assert regions == {"old": 1, "new": 3, "asked": 1}
