"""`qzoom doctor --model`: what is measured on a model, and when it may be trusted."""

from pathlib import Path

import pytest

from qzoom_agent.cli import doctor
from qzoom_agent.cli.main import main
from qzoom_agent.models import examination
from qzoom_agent.models.hf import HFBackend
from tests.tiny_families import build_family


@pytest.fixture(autouse=True)
def _no_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "examine", lambda: iter(()))


def test_nano_can_be_trusted(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["doctor", "--model", "nano", "--device", "cpu"]) == 0
    out = capsys.readouterr().out
    names = ("model", "runs on", "same as stock", "visual tokens", "prefill", "decode", "look", "zoom", "peak memory")
    assert [line.split("  ")[0] for line in out.splitlines()[2:]] == list(names)
    assert "two turns equal" in out
    assert "bad" not in out


def test_a_model_that_differs_counts_wrong_or_cannot_be_run_is_not_trusted(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    with monkeypatch.context() as patched:
        patched.setattr(examination, "compare", lambda loaded: "its logits differ")
        assert main(["doctor", "--model", "nano", "--device", "cpu"]) == 4
    assert "no: its logits differ" in capsys.readouterr().out
    with monkeypatch.context() as patched:
        patched.setattr(HFBackend, "view_tokens", lambda self, image: 3)
        assert main(["doctor", "--model", "nano", "--device", "cpu"]) == 4
    assert "54 shown, 3 counted" in capsys.readouterr().out
    assert main(["doctor", "--model", str(build_family("mistral3", tmp_path))]) == 4
    assert "needs the package torchvision" in capsys.readouterr().out


def test_a_model_of_stock_generate_is_trusted_with_a_note(tmp_path: Path) -> None:
    found = {one.name: one for one in examination.examine_model(str(build_family("gemma3", tmp_path)), device="cpu")}
    assert found["same as stock"].verdict == "note"
    assert "stock generate" in found["same as stock"].found
    assert found["look"].verdict == "note"
    assert "zoom" not in found
    assert found["visual tokens"].found == "4 shown, 4 counted"
    assert all(one.verdict != "bad" for one in found.values())
