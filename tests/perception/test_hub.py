"""The Hugging Face hub: a published checkpoint loads by its id, and branches are pushed and loaded as a delta.

The checkpoint is in a cache that looks as if it had been downloaded; branches go to a hub on this machine.
"""

import json
import re
import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from huggingface_hub import EvalResult, ModelCard, constants
from huggingface_hub.repocard_data import eval_results_to_model_index

from qzoom_agent.cli.main import main
from qzoom_agent.errors import BackendError
from qzoom_agent.models.hf import HFBackend
from qzoom_agent.models.presets import NANO_FOLDER
from qzoom_agent.perception.branch_config import CONFIG, FURTHER, WEIGHTS
from qzoom_agent.perception.branches import Branches
from qzoom_agent.perception.hub import BranchCard, local_branches, push_branches
from tests.perception.local_hub import TOKEN, LocalHub, Repository

OWN = NANO_FOLDER / "branches"

CHECKPOINT = Path(__file__).resolve().parents[1] / "parity" / "qwen2_5_vl" / "checkpoint"


def test_a_published_checkpoint_loads_by_its_hub_id(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    repository = tmp_path / "hub" / "models--someone--qzoom"
    snapshot = repository / "snapshots" / ("0" * 40)
    shutil.copytree(CHECKPOINT, snapshot)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text("0" * 40)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    backend = HFBackend.load("someone/qzoom", device="cpu")
    assert backend.perceives and backend.branches is not None
    assert backend.branches.config.k == 4 and backend.branches.gate is not None


# -- branches as a delta ---------------------------------------------------------------------------------------------


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[LocalHub]:
    """A hub on this machine, with an empty cache and a token that may write."""
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)  # the hub's other way of upload, which has no stand-in
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    with LocalHub().running() as running:
        monkeypatch.setattr(constants, "ENDPOINT", running.address)
        template = running.address + "/{repo_id}/resolve/{revision}/{filename}"
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
        yield running


@pytest.fixture(scope="module")
def nano() -> HFBackend:
    return HFBackend.load("nano", device="cpu", dtype="float32")


CARD = BranchCard("someone/base", labels="attention of the base on 20,000 boards", license="apache-2.0")
FILES = {CONFIG, WEIGHTS, f"{FURTHER}/{CONFIG}", f"{FURTHER}/{WEIGHTS}"}


def test_branches_come_back_bit_for_bit(hub: LocalHub, nano: HFBackend) -> None:
    url = push_branches(OWN, "me/nano-branches", CARD)
    stored = hub.repositories["me/nano-branches"]
    assert url == f"{hub.address}/me/nano-branches/commit/{stored.refs['main']}" and not stored.private
    assert set(stored.files) == FILES | {"README.md"}
    assert all(stored.files[name] == (OWN / name).read_bytes() for name in FILES)
    found = Branches.from_hub("me/nano-branches", nano.model)
    assert nano.branches is not None and found.digest() == nano.branches.digest()
    assert not [one for one in hub.requests if one.startswith("GET") and one.endswith("README.md")]
    hub.repositories["me/model"] = Repository()  # one that also holds the base
    inside = {f"branches/{name}": stored.files[name] for name in FILES}
    hub.repositories["me/model"].commit("main", inside | {"config.json": b"{}", "model.safetensors": b""})
    assert (local_branches("me/model") / FURTHER / WEIGHTS).read_bytes() == (OWN / FURTHER / WEIGHTS).read_bytes()
    assert not [one for one in hub.requests if "/resolve/" in one and one.endswith("model.safetensors")]


def test_the_card_says_what_they_are(hub: LocalHub) -> None:
    results = [EvalResult("vqa", "needle-doc", "needle-doc", "accuracy", 0.93, metric_name="exact")]
    results.append(EvalResult("vqa", "mine", "mine", "accuracy", "93.4", metric_name="in percent"))
    push_branches(OWN, "me/branches", replace(CARD, results=results))
    card = ModelCard(hub.repositories["me/branches"].files["README.md"].decode())
    assert card.data.base_model == "someone/base" and card.data.license == "apache-2.0"
    assert card.data.eval_results is not None and card.data.eval_results[0].metric_value == 0.93
    assert (
        "on 20,000 boards" in card.text
        and "0.828" in card.text
        and "| 93.0% |" in card.text
        and "| 93.4 |" in card.text
    )
    code = re.findall(r"```python\n(.*?)```", card.text, re.S)[0]
    compile(code, "card", "exec")
    assert 'branches="me/branches"' in code
    push_branches(OWN, "short", CARD)
    assert 'branches="me/short"' in hub.repositories["me/short"].files["README.md"].decode()


def test_a_revision_and_a_private_repository(
    hub: LocalHub, nano: HFBackend, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    first = Branches.from_base(nano.model, k=5, depth=1, gate_depth=1)
    first.push_to_hub("me/two", base="nano", private=True)
    push_branches(OWN, "me/two", CARD, revision="trained")
    push_branches(OWN, "me/two", CARD, revision="trained")  # again: nothing changes
    assert hub.repositories["me/two"].private
    assert Branches.from_hub("me/two", nano.model).further is None
    again = HFBackend.load("nano", device="cpu", dtype="float32", branches="me/two@trained", check=False).branches
    assert again is not None and nano.branches is not None and again.digest() == nano.branches.digest()
    first.push_to_hub("me/two", base="nano", revision="trained")
    assert FURTHER not in str(hub.repositories["me/two"].commits[hub.repositories["me/two"].refs["trained"]])
    monkeypatch.setenv("HF_TOKEN", "hf_of_a_stranger")
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "of a stranger"))
    with pytest.raises(BackendError, match="no repository 'me/two' on the hub that you may read"):
        local_branches("me/two")
    with pytest.raises(BackendError, match=r"status 401 .*hf auth login"):
        push_branches(OWN, "me/other", CARD)


def test_what_is_fetched_is_used_offline(hub: LocalHub, monkeypatch: pytest.MonkeyPatch) -> None:
    push_branches(OWN, "me/branches", CARD)
    fetched = local_branches("me/branches")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert local_branches("me/branches") == fetched
    with pytest.raises(
        BackendError, match=r"no folder me/never-seen.*not in the hub's cache, and the hub cannot be reached"
    ):
        local_branches("me/never-seen")
    with pytest.raises(BackendError, match=r"^The hub cannot be asked about 'me/branches': HF_HUB_OFFLINE is set"):
        push_branches(OWN, "me/branches", CARD)


def test_a_folder_of_the_same_name_is_not_what_the_hub_has(
    hub: LocalHub, nano: HFBackend, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    push_branches(OWN, "me/branches", CARD)
    (tmp_path / "me" / "branches").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    assert local_branches("me/branches") == Path("me/branches")
    assert Branches.from_hub("me/branches", nano.model).further is not None


def test_a_folder_of_branches_may_begin_at_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As that of a model may: nothing but a shell would put it in place of the ~ of a recipe."""
    (tmp_path / "branches").mkdir()
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("USERPROFILE", str(tmp_path))
    assert local_branches("~/branches") == tmp_path / "branches"


def test_a_cache_that_cannot_be_written_is_one_sentence(
    hub: LocalHub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    push_branches(OWN, "me/branches", CARD)
    (tmp_path / "file").write_text("")
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "file"))
    with pytest.raises(BackendError, match=r"The files of 'me/branches' cannot be kept here"):
        local_branches("me/branches")


@pytest.mark.parametrize(
    ("source", "told"),
    [
        ("me/nothing", r"There is no folder me/nothing\. There is no repository 'me/nothing'"),
        ("me/branches@v9", "'me/branches' has no revision 'v9'"),
        ("me/model", r"'me/model' holds no branches: .* It holds a model: name it as the model\."),
        ("me/pickled", r"'me/pickled' holds no branches: it lacks branches\.json or branches\.safetensors"),
    ],
)
def test_what_is_no_repository_of_branches(hub: LocalHub, source: str, told: str) -> None:
    push_branches(OWN, "me/branches", CARD)
    hub.repositories["me/model"] = Repository()
    hub.repositories["me/model"].commit("main", {"config.json": b"{}", "model.safetensors": b""})
    hub.repositories["me/pickled"] = Repository()
    hub.repositories["me/pickled"].commit("main", {CONFIG: b"{}", "branches.bin": b"\x80\x04", "branches.pkl": b"."})
    hub.requests.clear()
    with pytest.raises(BackendError, match=told):
        local_branches(source)
    assert not [one for one in hub.requests if "/resolve/" in one], "nothing is fetched"


def test_files_that_are_too_large_or_broken_are_not_loaded(hub: LocalHub, nano: HFBackend, tmp_path: Path) -> None:
    push_branches(OWN, "me/branches", CARD)
    hub.sizes[WEIGHTS] = 2**33 + 1
    hub.requests.clear()
    with pytest.raises(BackendError, match=r"has 8,589,934,593 bytes; branches have at most 8,589,934,592"):
        local_branches("me/branches")
    assert not [one for one in hub.requests if "/resolve/" in one]
    hub.sizes.clear()
    stored = hub.repositories["me/branches"]
    stored.commit("main", stored.files | {WEIGHTS: b"\x80\x04\x95 a pickle"})
    with pytest.raises(BackendError, match="cannot be read"):
        Branches.from_hub("me/branches", nano.model)
    shutil.copy(OWN / CONFIG, tmp_path)
    with (tmp_path / WEIGHTS).open("wb") as file:
        file.truncate(50_000_000)
    with pytest.raises(BackendError, match=r"has 50,000,000 bytes; branches of this base have at most 3"):
        Branches.load(tmp_path, nano.model)


def test_the_command_line(hub: LocalHub, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    scores = tmp_path / "model-index.yaml"
    index = eval_results_to_model_index("run", [EvalResult("vqa", "vstar", "vstar", "accuracy", 0.5)])
    scores.write_text(json.dumps({"model-index": index}))
    line = ["push", str(OWN), "me/branches", "--base", "nano", "--results", str(scores), "--labels", "boards"]
    assert main(line) == 0
    assert capsys.readouterr().out.startswith(f"{hub.address}/me/branches/commit/")
    assert "| vstar |" in hub.repositories["me/branches"].files["README.md"].decode()
    out = tmp_path / "local"
    assert main(["convert", "me/branches", str(out), "--base", "nano"]) == 0
    assert (out / FURTHER / WEIGHTS).is_file()
    index[0]["results"][0]["dataset"] = "vstar"
    scores.write_text(json.dumps({"model-index": index}))
    assert main(line) == 2
    assert "holds no scores" in capsys.readouterr().err
    assert main(["push", str(tmp_path), "me/other", "--base", "nano"]) == 4
    assert "There are no branches in" in capsys.readouterr().err and "me/other" not in hub.repositories
    assert main(["push", str(OWN), "me/other", "--base", str(out)]) == 2
    assert "names the base by its hub id" in capsys.readouterr().err
