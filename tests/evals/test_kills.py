"""Commands that are killed at random moments end as uninterrupted ones do."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

import kills

ROOT = Path(__file__).resolve().parents[2]


def test_ends_are_compared_without_times(tmp_path: Path) -> None:
    turn = {"text": "42", "seconds": 0.1, "cached_tokens": 3, "visual_tokens": 9, "token_layers": 5.0}
    for name, seconds, answer in (("one", 1.0, "42"), ("same", 2.0, "42"), ("other", 1.0, "43")):
        (tmp_path / name).mkdir()
        trace = {"answer": answer, "turns": [{**turn, "seconds": seconds}], "visual_tokens": 9}
        (tmp_path / name / "trace.json").write_text(json.dumps(trace))
        (tmp_path / name / f"{seconds}.txt").touch()
    one, same, other = (kills.content(tmp_path / name, ["trace.json"]) for name in ("one", "same", "other"))
    assert one == same == {"trace.json": [{"answer": "42", "turns": [{"text": "42"}], "visual_tokens": 9}]}
    assert one != other and kills.same(one, same) and not kills.same(one, other)
    assert kills.same([{"gate": 0.50001, "n": 1}], [{"gate": 0.50002, "n": 1}])
    assert not kills.same([{"gate": 0.5}], [{"gate": 0.6}]) and not kills.same([1], [1, 2])


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "count"), [("ask", 50), ("threads", 50), ("run", 20), ("eval", 50), ("branches", 50), ("grpo", 50)]
)
def test_kills_change_nothing(kind: str, count: int, tmp_path: Path) -> None:
    command = [sys.executable, str(ROOT / "evals" / "kills.py"), kind, "--kills", str(count), "--out", str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert f"{count} kills" in done.stdout and ", 0 differ;" in done.stdout
