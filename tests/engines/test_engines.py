"""Nano behind engines that nobody here wrote, against nano in this process. `.ci/engines` installs them and runs this.

The figures are printed: answers that are equal, and image tokens of earlier turns that vLLM had in its prefix cache.
"""

from __future__ import annotations

import os
import re
import signal
import socket
import subprocess
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import httpx
import pytest
from PIL import Image

from qzoom_agent.agent import Agent
from qzoom_agent.data.samples import TaskSource
from qzoom_agent.evaluation.run_log import RunFolder
from qzoom_agent.evaluation.runner import evaluate
from qzoom_agent.evaluation.sample_result import SampleResult
from qzoom_agent.evaluation.tasks.catalog import find_task
from qzoom_agent.geometry import tokens
from qzoom_agent.images import load_image
from qzoom_agent.models.chat_reply import Completion
from qzoom_agent.models.presets import NANO_BUDGET, NANO_FOLDER
from qzoom_agent.models.server import ServerBackend

ENGINES = Path(os.environ.get("QZOOM_ENGINES", ""))
"""Folder of the environment with vLLM."""
N = int(os.environ.get("QZOOM_ENGINES_N", "20"))
"""Questions of each task."""
TASKS = ("needle-global", "needle-scene", "needle-doc", "needle-hop")
BLOCK = 32
"""Tokens of a block of vLLM's cache: the fewest on a CPU; 16 on a GPU."""
BOARD = Image.new("RGB", (224, 224), "red")
QUESTION = "what is the code on the orange circle?"

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif("QZOOM_ENGINES" not in os.environ, reason="run .ci/engines, which installs the engines"),
]


class Engine:
    """A server in processes of its own, which can be killed and started again."""

    def __init__(self, *command: str, log: Path, model: str) -> None:
        with socket.create_server(("127.0.0.1", 0)) as free:
            self.port = free.getsockname()[1]
        self.url, self.model, self.log = f"http://127.0.0.1:{self.port}", model, log
        self.command = [*command, "--host", "127.0.0.1", "--port", str(self.port)]
        self.process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        """Return once it answers."""
        own = {
            "OMP_NUM_THREADS": "1",
            "HF_HUB_OFFLINE": "1",
            "VLLM_TARGET_DEVICE": "cpu",
            "VLLM_CPU_KVCACHE_SPACE": "1",
            "VLLM_CPU_OMP_THREADS_BIND": "nobind",
        }
        inherited = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
        with self.log.open("ab") as log:
            self.process = subprocess.Popen(
                self.command, stdout=log, stderr=log, env=inherited | own, start_new_session=True
            )
        ends = time.monotonic() + 900
        while time.monotonic() < ends:
            assert self.process.poll() is None, self.log.read_text()[-3000:]
            try:
                if httpx.get(f"{self.url}/health", timeout=2).is_success:
                    return
            except httpx.HTTPError:
                pass
            time.sleep(1)
        raise AssertionError(f"no answer within 15 minutes: {self.log.read_text()[-3000:]}")

    def kill(self) -> None:
        """End it without a word to anybody."""
        if self.process is not None and self.process.poll() is None:
            os.killpg(self.process.pid, signal.SIGKILL)
            self.process.wait()

    def agent(self, **settings: Any) -> Agent:
        """Return an agent that asks it as nano is asked."""
        budget = {
            "budget.coarse_min_tokens": NANO_BUDGET.coarse_min_tokens,
            "budget.coarse_tokens": NANO_BUDGET.coarse_max_tokens,
            "budget.crop_min_tokens": NANO_BUDGET.crop_min_tokens,
            "budget.crop_max_tokens": NANO_BUDGET.crop_max_tokens,
            "crop.min_side": NANO_BUDGET.crop_min_side,
        }
        how = {"policy": "explicit", "protocol": "nano", "attempts": 1, **budget, **settings}
        return Agent.from_server(f"{self.url}/v1", model=self.model, **how)


class Counter:
    """Counts the rows of an evaluation that are new, and kills an engine after so many."""

    def __init__(self, engine: Engine | None = None, *, after: int = 0) -> None:
        self.engine, self.after, self.new = engine, after, 0

    def begin(self, task: str, planned: int) -> None:
        pass

    def row(self, row: SampleResult, *, new: bool) -> None:
        self.new += new
        if self.engine is not None and self.new == self.after:
            self.engine.kill()


class Served(NamedTuple):
    """An evaluation through vLLM, which was killed in the middle."""

    rows: Mapping[tuple[str, int], SampleResult]
    failed: int
    """Rows with an error after the kill."""
    asked_again: int
    requests: list[tuple[Sequence[Mapping[str, Any]], Completion]]


def asked(
    agent: Agent, out: Path, watch: Counter | None = None, *, n: int = N, workers: int = 1
) -> dict[tuple[str, int], SampleResult]:
    """Ask the first `n` questions of each task, and return the rows."""
    found = [find_task(name) for name in TASKS]
    evaluate(agent, found, out=out, source=TaskSource(n=n), workers=workers, watch=watch, traces=False)
    return {(row.task, row.index): row for row in RunFolder(out).latest()}


def differing(one: Mapping[tuple[str, int], SampleResult], other: Mapping[tuple[str, int], SampleResult]) -> list[str]:
    """Return the answers to the same questions that are not the same."""
    assert all(row.question == one[key].question for key, row in other.items())
    return [f"{key}: {row.answer} and {one[key].answer}" for key, row in other.items() if row.answer != one[key].answer]


@pytest.fixture(scope="module")
def local(tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[str, int], SampleResult]:
    agent = Agent.from_pretrained("nano", policy="explicit", device="cpu")
    return asked(agent, tmp_path_factory.mktemp("local") / "run")


@pytest.fixture(scope="module")
def vllm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Engine]:
    """vLLM with the folder of nano as it ships; with its smallest blocks, because nano's prompts are short."""
    engine = Engine(
        *(str(ENGINES / "bin" / "vllm"), "serve", str(NANO_FOLDER), "--served-model-name", "served"),
        *("--dtype", "bfloat16", "--enforce-eager", "--max-model-len", "2048", "--block-size", str(BLOCK)),
        *("--limit-mm-per-prompt", '{"image": 8}', "--enable-prompt-tokens-details"),
        log=tmp_path_factory.mktemp("vllm") / "log",
        model="served",
    )
    engine.start()
    yield engine
    engine.kill()


@pytest.fixture(scope="module")
def vllm_with_tools(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Engine]:
    """vLLM that takes nano's calls out of the text, and is told how to write results in nano's words."""
    here = Path(__file__).parent
    engine = Engine(
        *(str(ENGINES / "bin" / "vllm"), "serve", str(NANO_FOLDER), "--served-model-name", "served"),
        *("--dtype", "bfloat16", "--enforce-eager", "--max-model-len", "2048", "--block-size", str(BLOCK)),
        *("--limit-mm-per-prompt", '{"image": 8}', "--enable-prompt-tokens-details"),
        *("--enable-auto-tool-choice", "--tool-parser-plugin", str(here / "nano_tools.py")),
        *("--tool-call-parser", "nano", "--chat-template", str(here / "nano_tools.jinja")),
        log=tmp_path_factory.mktemp("tools") / "log",
        model="served",
    )
    engine.start()
    yield engine
    engine.kill()


@pytest.fixture(scope="module")
def served(vllm: Engine, tmp_path_factory: pytest.TempPathFactory) -> Served:
    agent, out = vllm.agent(), tmp_path_factory.mktemp("served") / "run"
    assert isinstance(agent.backend, ServerBackend)
    client, requests = agent.backend.client, list[tuple[Sequence[Mapping[str, Any]], Completion]]()
    complete = client.complete

    def recording(messages: Sequence[Mapping[str, Any]], **fields: Any) -> Completion:
        found = complete(messages, **fields)
        requests.append((messages, found))
        return found

    client.complete = recording  # type: ignore[method-assign]
    first = asked(agent, out, Counter(vllm, after=len(TASKS) * N // 2), workers=4)
    vllm.start()
    again = Counter()
    rows = asked(agent, out, again, workers=4)
    return Served(rows, sum(row.status == "error" for row in first.values()), again.new, requests)


def test_vllm_answers_as_the_local_model_though_it_is_killed_in_the_middle(
    served: Served, local: dict[tuple[str, int], SampleResult]
) -> None:
    total, different = len(TASKS) * N, differing(local, served.rows)
    print(f"\nvLLM: {total - len(different)} of {total} answers equal; {served.failed} failed by the kill, asked again")
    assert 0 < served.failed == served.asked_again <= total // 2
    assert not [row.error for row in served.rows.values() if row.status == "error"]
    assert len(served.rows) == total and len(different) <= total * 0.025, different


def layout(tokenizer: Any, messages: Sequence[Mapping[str, Any]]) -> tuple[int, list[range]]:
    """Return the length of a prompt, and where its images stand: each as its visual tokens, in the template's place."""
    plain, sizes = [], []
    for turn in messages:
        parts = [part if part["type"] == "text" else {"type": "image"} for part in turn["content"]]
        plain.append({**turn, "content": parts})
        urls = [part["image_url"]["url"] for part in turn["content"] if part["type"] == "image_url"]
        sizes += [tokens(load_image(url).size, NANO_BUDGET.factor) for url in urls]
    text = tokenizer.apply_chat_template(plain, tokenize=False, add_generation_prompt=True)
    before, *after = (tokenizer(piece)["input_ids"] for piece in text.split("<|image_pad|>"))
    length, spans = len(before), []
    for size, ids in zip(sizes, after, strict=True):
        spans.append(range(length, length + size))
        length += size + len(ids)
    return length, spans


def test_images_of_earlier_turns_are_in_vllms_prefix_cache(served: Served) -> None:
    """All of them, but for the last block of a prompt, which vLLM does not keep until it is full."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(NANO_FOLDER)
    hits = shown = full = found_full = turns = 0
    for messages, found in served.requests:
        assert layout(tokenizer, messages)[0] == found.prompt_tokens, "the prompt is what it is taken for"
        parts = [part for turn in messages for part in turn["content"] if part["type"] == "image_url"]
        assert all(part["uuid"] for part in parts)
        if len(messages) > 2:
            turns += 1
            length, spans = layout(tokenizer, messages[:-2])
            places = [place for span in spans for place in span]
            shown += len(places)
            hits += sum(place < found.cached_tokens for place in places)
            inside = [place for place in places if place < length // BLOCK * BLOCK]
            full += len(inside)
            found_full += sum(place < found.cached_tokens for place in inside)
    print(f"\nvLLM: {turns} later turns, {hits} of {shown} image tokens of earlier turns cached ({hits / shown:.1%});")
    print(f"{found_full / full:.1%} of the {full} in full blocks of {BLOCK}")
    assert found_full >= 0.95 * full and full >= 0.9 * shown


def test_a_reply_of_vllm_is_streamed_and_ends_when_it_is_left(vllm: Engine, served: Served) -> None:
    def metric(name: str) -> float:
        found = re.search(rf"^vllm:{name}{{.*}} (\S+)$", httpx.get(f"{vllm.url}/metrics").text, re.MULTILINE)
        assert found is not None
        return float(found[1])

    events = list(vllm.agent(policy="direct").stream(BOARD, QUESTION))
    pieces = [event.data["text"] for event in events if event.kind == "token"]
    assert len(pieces) > 1 and events[-1].answer is not None and "".join(pieces) == events[-1].answer.text
    written = metric("generation_tokens_total")
    endless = vllm.agent(policy="direct", extra_body={"ignore_eos": True}, **{"generation.max_new_tokens": 1500})
    for event in endless.stream(BOARD, QUESTION):
        if event.kind == "token":
            break
    ends = time.monotonic() + 10
    while metric("num_requests_running") and time.monotonic() < ends:
        time.sleep(0.1)
    assert metric("num_requests_running") == 0
    assert metric("generation_tokens_total") - written < 200


@pytest.mark.parametrize("api", ["chat", "responses"])
def test_native_tool_calls_by_vllm_answer_as_the_local_model(
    vllm_with_tools: Engine, local: dict[tuple[str, int], SampleResult], api: str, tmp_path: Path
) -> None:
    plain = "{images}{question}"
    words = {"system": "", "user": plain, "user_without_tools": plain, "final": "Answer now."}
    native = {"api": api, "tools": "native", "protocol": "deepeyes", "prompt": words}
    agent = vllm_with_tools.agent(**native)
    rows = asked(agent, tmp_path / "run", n=(n := max(1, N // 2)), workers=4)
    different = differing(local, rows)
    calls = [sum(found[key].usage.requested for key in rows) for found in (rows, local)]
    print(f"\nvLLM, native tools by {api}: {len(rows) - len(different)} of {len(TASKS) * n} equal; calls {calls}")
    assert not [row.error for row in rows.values() if row.status == "error"]
    assert len(different) <= 1, different
    assert calls[0] == calls[1] > 0
    board = find_task("needle-scene").load(TaskSource(n=n))[0]
    *told, last = agent.stream(board.image, board.question)
    assert last.answer is not None and last.answer.text == rows["needle-scene", 0].answer
    first, later = last.answer.trace.turns
    assert first.calls[0].id and first.calls[0].result and later.cached_tokens
    # how many pieces there are depends on how busy the machine is
    pieces = [event.data["text"] for event in told if event.kind == "token" and event.data["turn"] == later.index]
    assert pieces and "".join(pieces) == later.text


def test_transformers_serve_answers_as_the_local_model(
    local: dict[tuple[str, int], SampleResult], tmp_path: Path
) -> None:
    engine = Engine(
        *(str(ENGINES / "bin" / "python"), str(Path(__file__).with_name("transformers_serve.py")), "serve"),
        *(str(NANO_FOLDER), "--device", "cpu", "--dtype", "float32"),
        log=tmp_path / "log",
        model=str(NANO_FOLDER),
    )
    try:
        engine.start()
        rows = asked(engine.agent(), tmp_path / "run", n=(n := max(1, N // 4)))
        events = list(engine.agent(policy="direct").stream(BOARD, QUESTION))
    finally:
        engine.kill()
    different = differing(local, rows)
    print(f"\ntransformers serve: {len(rows) - len(different)} of {len(TASKS) * n} answers equal")
    assert not [row.error for row in rows.values() if row.status == "error"]
    assert len(different) <= 1, different
    assert sum(event.kind == "token" for event in events) > 1
