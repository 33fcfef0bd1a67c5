"""`qzoom convert`: official checkpoints and our branch folders, one into the other, and what is refused."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from parity import check_case
from parity_run import Recording
from qzoom_agent.cli.main import main
from qzoom_agent.errors import BackendError, ConfigError
from qzoom_agent.models.convert import to_branches, to_checkpoint
from qzoom_agent.models.hf import HFBackend
from qzoom_agent.perception.branch_config import CONFIG, WEIGHTS
from qzoom_agent.perception.branches import Branches
from qzoom_agent.perception.checkpoints import INDEX, official_names, own_branches, own_name, weight_files
from tests.tiny_models import Family, build

RECORDINGS = Path(__file__).resolve().parents[1] / "parity"
FAMILIES = ("qwen2_5_vl", "qwen3_vl")
UNUSED = ("self_attn.v_proj", "self_attn.o_proj", "post_attention_layernorm", "mlp.")


@pytest.fixture(params=[FAMILIES[0], pytest.param(FAMILIES[1], marks=pytest.mark.slow)])
def checkpoint(request: pytest.FixtureRequest) -> Path:
    return RECORDINGS / request.param / "checkpoint"


@pytest.fixture
def own_base(tmp_path: Path) -> Callable[[Family], Path]:
    """A base as the installed transformers saves it."""
    return lambda family: build(family, tmp_path / family, layers=6)


def all_weights(folder: Path) -> dict[str, Tensor]:
    return {name: value for file in folder.glob("*.safetensors") for name, value in load_file(file).items()}


def load(folder: Path, branches: Path | None = None) -> HFBackend:
    return HFBackend.load(str(folder), device="cpu", dtype="float32", branches=branches)


def same(ours: Branches | None, theirs: Branches | None) -> bool:
    assert ours is not None and theirs is not None
    other = theirs.state_dict()
    return ours.state_dict().keys() == other.keys() and all(
        torch.equal(value, other[name]) for name, value in ours.state_dict().items()
    )


def test_a_checkpoint_becomes_a_branch_folder(
    checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    assert main(["convert", str(checkpoint), str(out)]) == 0
    told = capsys.readouterr()
    assert {path.name for path in out.iterdir()} == {WEIGHTS, CONFIG}
    assert f"{(out / WEIGHTS).stat().st_size:,} bytes" in told.out and "branches: 1,77" in told.out
    assert "reuse_src_pos is false" in told.err and "never used" in told.err
    full, ours = load(checkpoint), load(checkpoint, out)
    assert same(ours.branches, full.branches)
    assert ours.branches is not None and full.branches is not None
    assert ours.branches.config == full.branches.config


def test_int8_is_smaller_and_can_be_made_of_a_branch_folder(checkpoint: Path, tmp_path: Path) -> None:
    first = to_branches(str(checkpoint), tmp_path / "a")
    small = to_branches(str(checkpoint), tmp_path / "b", int8=True)
    again = to_branches(str(tmp_path / "a"), tmp_path / "c", base=str(checkpoint), int8=True)
    assert small.after <= 0.60 * small.before == 0.60 * first.before
    assert again.before == first.after and again.after == small.after and not again.notes
    assert (tmp_path / "b" / WEIGHTS).read_bytes() == (tmp_path / "c" / WEIGHTS).read_bytes()


def test_there_and_back_again(checkpoint: Path, tmp_path: Path) -> None:
    to_branches(str(checkpoint), tmp_path / "ours")
    done = to_checkpoint(str(tmp_path / "ours"), tmp_path / "theirs", base=str(checkpoint))
    before, after = all_weights(checkpoint), all_weights(tmp_path / "theirs")
    assert before.keys() == after.keys() == weight_files(str(tmp_path / "theirs")).keys()
    last = "twig_layers.2."
    unused = {name for name in before if last in name and name.partition(last)[2].startswith(UNUSED)}
    assert unused and all(torch.equal(value, after[name]) for name, value in before.items() if name not in unused)
    assert all(before[name].shape == after[name].shape for name in unused)
    assert not done.notes and done.after == to_branches(str(checkpoint), tmp_path / "x").before
    full, ours = load(checkpoint), load(tmp_path / "theirs")
    assert same(ours.branches, full.branches)
    assert not {path.name for path in checkpoint.iterdir()} - {path.name for path in done.files} - {"model.safetensors"}


def test_the_written_config_has_what_the_published_training_writes(checkpoint: Path, tmp_path: Path) -> None:
    """A plain base has none of these keys."""
    written = json.loads((checkpoint / "config.json").read_text(encoding="utf-8"))
    keys = {key for key in written if key.startswith(("enable_", "twig_", "roi_"))}
    keys |= {"reuse_src_pos", "add_noise_to_roi"}
    plain = tmp_path / "plain"
    shutil.copytree(checkpoint, plain)
    bare = {key: value for key, value in written.items() if key not in keys | {"min_pixels", "max_pixels"}}
    (plain / "config.json").write_text(json.dumps(bare), encoding="utf-8")
    to_branches(str(checkpoint), tmp_path / "ours")
    to_checkpoint(str(tmp_path / "ours"), tmp_path / "out", base=str(plain))
    found = json.loads((tmp_path / "out" / "config.json").read_text(encoding="utf-8"))
    assert {key: found.get(key) for key in keys} == {key: written[key] for key in keys}
    processor = json.loads((checkpoint / "preprocessor_config.json").read_text(encoding="utf-8"))
    limits = {"min_pixels": "shortest_edge", "max_pixels": "longest_edge"}
    assert all(found[key] == (processor.get(key) or processor["size"][edge]) for key, edge in limits.items())
    assert found["roi_enable2stage"] is True and found["high_res_T"] == 3


def test_a_base_saved_by_transformers_5_keeps_the_limits_of_its_images(
    own_base: Callable[[Family], Path], tmp_path: Path
) -> None:
    """Its image processor has no file of its own then, where older releases look for it."""
    base, saved = own_base("qwen2_5_vl"), tmp_path / "saved"
    loaded = load(base)
    loaded.model.save_pretrained(saved)
    loaded.processor.save_pretrained(saved)
    assert not (saved / "preprocessor_config.json").exists()
    Branches.from_base(loaded.model, k=2).save(tmp_path / "ours")
    outs = {home: tmp_path / f"out-{home.name}" for home in (base, saved)}
    for home, out in outs.items():
        done = to_checkpoint(str(tmp_path / "ours"), out, base=str(home))
        assert done.files.count(out / "preprocessor_config.json") == 1
    configs, images = (
        [json.loads((out / name).read_text(encoding="utf-8")) for out in outs.values()]
        for name in ("config.json", "preprocessor_config.json")
    )
    for key in ("min_pixels", "max_pixels"):
        assert configs[0][key] == configs[1][key] > 0
    assert images[1]["do_resize"] is True and images[0]["size"] == images[1]["size"]


def test_a_rule_of_the_map_that_the_published_code_lacks_is_said(
    own_base: Callable[[Family], Path], tmp_path: Path
) -> None:
    """Its code crops around cells above a threshold, which branches with a share of the peak never calibrated."""
    base = own_base("qwen3_vl")
    for name, rule in (("ours", {"peak_share": 0.3, "max_regions": 2}), ("theirs", {"threshold": 0.2})):
        Branches.from_base(load(base).model, k=2, **rule).save(tmp_path / name)
        done = to_checkpoint(str(tmp_path / name), tmp_path / f"{name}-published", base=str(base))
        assert [note for note in done.notes if "peak_share=0.3, max_regions=2" in note and "here 0.1" in note] == (
            done.notes if name == "ours" else []
        )
        assert len(done.notes) == (name == "ours")


def test_a_recorded_case_is_the_same_after_both_conversions(tmp_path: Path) -> None:
    folder = RECORDINGS / "qwen3_vl"
    to_branches(str(folder / "checkpoint"), tmp_path / "ours")
    to_checkpoint(str(tmp_path / "ours"), tmp_path / "theirs", base=str(folder / "checkpoint"))
    with torch.no_grad():
        _, found = check_case(load(tmp_path / "theirs"), folder, Recording.read(folder).cases[0])
    assert not found.bad, str(found)


@pytest.mark.parametrize("part", ["sdrpn", "gate"])
def test_one_branch_alone_is_said_in_the_config(part: str, own_base: Callable[[Family], Path], tmp_path: Path) -> None:
    base = own_base("qwen3_vl")
    Branches.from_base(load(base).model, k=2, with_gate=part == "gate", with_sdrpn=part == "sdrpn").save(tmp_path / "b")
    to_checkpoint(str(tmp_path / "b"), tmp_path / "out", base=str(base))
    config = json.loads((tmp_path / "out" / "config.json").read_text(encoding="utf-8"))
    assert (config["enable_twig"], config["enable_high_res"]) == (part == "sdrpn", part == "gate")
    again = load(tmp_path / "out").branches
    assert again is not None and (again.sdrpn is None, again.gate is None) == (part == "gate", part == "sdrpn")


def test_a_base_in_shards_and_with_later_names_gets_published_names(
    own_base: Callable[[Family], Path], tmp_path: Path
) -> None:
    base = own_base("qwen2_5_vl")
    backend = load(base)
    Branches.from_base(backend.model, k=2, positions="aligned").save(tmp_path / "ours")
    stored = {
        name
        if name == "lm_head.weight"
        else f"model.{'' if name.startswith('visual') else 'language_model.'}{name.removeprefix('model.')}": value
        for name, value in load_file(base / "model.safetensors").items()
    }
    (base / "model.safetensors").unlink()
    halves = {"a.safetensors": list(stored)[::2], "b.safetensors": list(stored)[1::2]}
    for file, names in halves.items():
        save_file({name: stored[name] for name in names}, base / file)
    where = {name: file for file, names in halves.items() for name in names}
    (base / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": where}), encoding="utf-8")
    done = to_checkpoint(str(tmp_path / "ours"), tmp_path / "out", base=str(base))
    names = set(weight_files(str(tmp_path / "out")))
    assert len(list((tmp_path / "out").glob("*.safetensors"))) == 3
    assert {name.split(".")[0] for name in names} == {"visual", "model", "lm_head"}
    assert not [name for name in names if "language_model" in name]
    assert "text_config" in done.notes[0]
    ours = load(tmp_path / "out")
    assert ours.branches is not None and ours.branches.config.positions == "aligned"
    assert all(torch.equal(a, b) for a, b in zip(ours.model.parameters(), backend.model.parameters(), strict=True))


def test_nothing_is_overwritten_unasked(checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    ours, out = tmp_path / "ours", tmp_path / "out"
    assert main(["convert", str(checkpoint), str(ours)]) == 0
    assert main(["convert", str(checkpoint), str(ours), "--int8"]) == 2
    assert "already holds branches.json and branches.safetensors" in capsys.readouterr().err
    assert main(["convert", str(checkpoint), str(ours), "--int8", "--force"]) == 0
    out.mkdir()
    (out / "model.safetensors").write_bytes(b"old")
    command = ["convert", str(ours), str(out), "--official", "--base", str(checkpoint)]
    assert main(command) == 2
    assert "is not empty" in capsys.readouterr().err and (out / "model.safetensors").read_bytes() == b"old"
    assert main([*command, "--force"]) == 0
    assert not (out / "model.safetensors").exists(), "it would be loaded instead of the shards"
    assert official_names(str(out))
    to_branches(str(ours), out, base=str(checkpoint))
    assert main([*command, "--force"]) == 0
    assert own_branches(str(out)) is None, "they would be loaded instead of those in the shards"


@pytest.mark.parametrize("which", ["base", "source"])
def test_what_is_converted_is_never_the_target(which: str, checkpoint: Path, tmp_path: Path) -> None:
    ours = tmp_path / "ours"
    to_branches(str(checkpoint), ours)
    base = tmp_path / "base"
    shutil.copytree(checkpoint, base)
    with pytest.raises(ConfigError, match="Choose another folder"):
        to_checkpoint(str(ours), base if which == "base" else ours, base=str(base), force=True)


def test_branches_can_be_put_beside_their_base(checkpoint: Path, tmp_path: Path) -> None:
    base = tmp_path / "base"
    shutil.copytree(checkpoint, base)
    to_branches(str(base), base, int8=True)
    kept = all_weights(base)
    assert [path.name for path in base.glob("*.safetensors")] == ["model.safetensors"], "an engine loads every one"
    assert {name for name in kept if own_name(name)} and (base / "branches" / CONFIG).is_file()
    to_checkpoint(str(base), tmp_path / "out")
    assert not list((tmp_path / "out").rglob(CONFIG)), "the written checkpoint has them under the published names"
    assert same(load(tmp_path / "out").branches, load(base).branches) is False, "int8 in one and bfloat16 in the other"


def test_without_a_base_branches_cannot_be_read(checkpoint: Path, tmp_path: Path) -> None:
    to_branches(str(checkpoint), tmp_path / "ours")
    for convert in (to_branches, to_checkpoint):
        with pytest.raises(ConfigError, match="--base"):
            convert(str(tmp_path / "ours"), tmp_path / "out")


def test_the_wrong_base_is_refused(tmp_path: Path) -> None:
    first, second = (RECORDINGS / family / "checkpoint" for family in FAMILIES)
    to_branches(str(first), tmp_path / "ours")
    for convert in (to_branches, to_checkpoint):
        with pytest.raises(BackendError, match="Use the base they were trained on"):
            convert(str(tmp_path / "ours"), tmp_path / "out", base=str(second))
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(("family", "name"), [("llava", "LLaVA"), ("qwen3_5", r"Qwen3\.5")])
def test_a_family_without_a_published_form_is_refused(
    family: Family, name: str, own_base: Callable[[Family], Path], tmp_path: Path
) -> None:
    base = own_base(family)
    Branches.from_base(load(base).model, k=2, depth=2, gate_depth=2).save(tmp_path / "ours")
    with pytest.raises(BackendError, match=f"no Q-Zoom for {name}"):
        to_checkpoint(str(tmp_path / "ours"), tmp_path / "out", base=str(base))
    assert not (tmp_path / "out").exists()


def test_a_source_without_branches_or_torn_is_a_clear_error(
    own_base: Callable[[Family], Path], checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = str(tmp_path / "out")
    assert main(["convert", str(own_base("qwen3_vl")), out]) == 4
    assert "has no Q-Zoom branches" in capsys.readouterr().err
    torn = tmp_path / "torn"
    shutil.copytree(checkpoint, torn)
    weights = torn / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1000])
    assert main(["convert", str(torn), out]) == 4
    assert "cannot be read" in capsys.readouterr().err
    weights.unlink()
    (torn / INDEX).write_text("{", encoding="utf-8")
    assert main(["convert", str(torn), out]) == 4
    assert INDEX in capsys.readouterr().err
    (torn / INDEX).write_text(json.dumps({"weight_map": {"model.high_res_head.bias": "x.safetensors"}}))
    assert main(["convert", str(torn), out]) == 4
    assert "lacks x.safetensors" in capsys.readouterr().err
    (tmp_path / "empty").mkdir()
    assert main(["convert", str(tmp_path / "empty"), out]) == 4
    assert main(["convert", str(tmp_path / "nowhere"), out]) == 2
    assert not Path(out).exists()


def test_a_file_as_target_is_refused(checkpoint: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match="is a file"):
        to_branches(str(checkpoint), tmp_path / "file")


def test_int8_and_official_exclude_each_other() -> None:
    with pytest.raises(SystemExit) as error:
        main(["convert", "a", "b", "--int8", "--official"])
    assert error.value.code == 2
