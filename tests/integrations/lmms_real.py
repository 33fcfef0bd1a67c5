"""The agent inside the real lmms-eval, on a local task: `python tests/integrations/lmms_real.py [VENV]`.

Makes a virtual environment (by default a temporary one), installs lmms-eval and this checkout into it with the pinned
torch, writes a task of needle boards and its answers as lmms-eval wants them, runs it with nano, and checks that every
answer that lmms-eval logged is the one that the agent gives by itself. Some minutes and a few GB of disk.
"""

import json
import re
import subprocess
import sys
import venv
from pathlib import Path
from tempfile import TemporaryDirectory

ROOT = Path(__file__).resolve().parents[2]
LMMS = "lmms-eval==0.7.3"
POLICY = "explicit"
COUNT = 6
TASK = """\
task: needle_local
dataset_path: parquet
dataset_kwargs:
  data_files:
    test: {data}
test_split: test
output_type: generate_until
doc_to_visual: !function utils.visual
doc_to_text: "{{{{question}}}}"
doc_to_target: "{{{{answer}}}}"
generation_kwargs:
  max_new_tokens: 16
  temperature: 0
process_results: !function utils.score
metric_list:
  - metric: exact
    aggregation: mean
    higher_is_better: true
metadata:
  version: 1.0
"""
UTILS = """
from qzoom_agent.evaluation.scorers.match import exact_match


def visual(doc):
    return [doc["image"].convert("RGB")]


def score(doc, results):
    return {"exact": float(exact_match(results[0], doc["answer"]))}
"""
PREPARE = """
import json, sys
from datasets import Dataset, Features, Image, Value
from qzoom_agent import Agent
from qzoom_agent.evaluation.tasks.needle import sample, sample_seed
tasks = ("needle-global", "needle-doc")
boards = [sample(tasks[index % 2], sample_seed(0, index)) for index in range(int(sys.argv[2]))]
features = Features({"image": Image(), "question": Value("string"), "answer": Value("string")})
rows = [{"image": one.image, "question": one.question, "answer": one.answer} for one in boards]
Dataset.from_list(rows, features=features).to_parquet(sys.argv[1] + "/test.parquet")
agent = Agent.from_pretrained("nano", policy=sys.argv[3])
answers = [agent.run(one.image, one.question).text for one in boards]
open(sys.argv[1] + "/answers.json", "w").write(json.dumps(answers))
"""


def main(place: Path, work: Path) -> int:
    python = place / "bin" / "python"
    if not python.exists():
        venv.create(place, with_pip=True)
    torch = re.search(r"^torch==.*$", (ROOT / "constraints.txt").read_text(encoding="utf-8"), re.M)
    torch_pin = torch[0] if torch else "torch==2.13.0"
    _run([python, "-m", "pip", "install", "-q", LMMS, torch_pin, str(ROOT), "-c", str(ROOT / "constraints.txt")], ROOT)
    # A torchvision that was built for another torch cannot be imported and breaks transformers; without one both work.
    if subprocess.run([str(python), "-c", "import torchvision"], capture_output=True, check=False).returncode:
        _run([python, "-m", "pip", "uninstall", "-q", "-y", "torchvision"], ROOT)
    (work / "needle_local.yaml").write_text(TASK.format(data=work / "test.parquet"), encoding="utf-8")
    (work / "utils.py").write_text(UTILS, encoding="utf-8")
    _run([python, "-c", PREPARE, str(work), str(COUNT), POLICY], work)
    command = [python, "-m", "lmms_eval", "--model", "qzoom", "--model_args", f"model=nano,policy={POLICY},device=cpu"]
    command += ["--tasks", "needle_local", "--include_path", str(work), "--batch_size", "1"]
    _run([*command, "--log_samples", "--output_path", str(work / "out")], work)
    (results,) = (work / "out").rglob("*_results.json")
    (samples,) = (work / "out").rglob("*_samples_needle_local.jsonl")
    logged = [json.loads(line) for line in samples.read_text(encoding="utf-8").splitlines()]
    theirs = [_text(one) for one in sorted(logged, key=lambda one: int(one["doc_id"]))]
    ours = json.loads((work / "answers.json").read_text(encoding="utf-8"))
    figures = json.loads(results.read_text(encoding="utf-8"))["results"]["needle_local"]
    print(f"lmms-eval: {figures}")
    for one, two in zip(ours, theirs, strict=True):
        print(f"{'same' if one == two else 'DIFFERENT'}  {one!r}  {two!r}")
    return int(ours != theirs)


def _text(sample: dict[str, object]) -> object:
    """The answer in a logged sample, however deep its list."""
    found = sample["filtered_resps"]
    while isinstance(found, list):
        found = found[0]
    return found


def _run(command: list[Path | str], cwd: Path) -> None:
    subprocess.run([str(part) for part in command], cwd=cwd, check=True)


if __name__ == "__main__":
    with TemporaryDirectory() as temporary:
        work = Path(temporary) / "work"
        work.mkdir()
        sys.exit(main(Path(sys.argv[1]) if len(sys.argv) > 1 else Path(temporary) / "venv", work))
