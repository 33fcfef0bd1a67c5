"""Commands of training in processes of their own, and what a run has logged."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(sys.path)}


def start(module: str, *arguments: str, processes: int = 1) -> subprocess.Popen[str]:
    """Start `python -m module`, or what `accelerate launch` starts of it on several devices."""
    launch = ("-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(processes))
    line = [sys.executable, *(launch if processes > 1 else ()), "-m", module, *arguments]
    return subprocess.Popen(line, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=ENVIRONMENT)


def finished(process: subprocess.Popen[str]) -> str:
    """Return what a process printed, once it has ended well."""
    told, _ = process.communicate(timeout=600)
    assert process.returncode == 0, told
    return told


def log_of(output: Path) -> list[dict[str, Any]]:
    """Return the lines of a run's log."""
    return [json.loads(line) for line in (output / "log.jsonl").read_text().splitlines()]
