"""2,000 good, wrong and abandoned requests at `qzoom serve` with nano, 32 at a time, and its throughput.

    python tests/integrations/serve_soak.py [--n 2000] [--at-once 32]

It exits with 1 if an answer was lost or differs from that of `Agent.run`, if a status was 5xx, or if memory grew.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import re
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any, NamedTuple

import httpx

from qzoom_agent.agent import Agent
from qzoom_agent.data.samples import TaskSource
from qzoom_agent.evaluation.tasks.catalog import find_task
from qzoom_agent.zoom.image_zoom import data_url

WRONG: list[dict[str, Any] | str] = [
    {"model": "gpt-9"},
    {"messages": [{"role": "user", "content": "no image"}]},
    {"qzoom": {"policy": "oracle"}},
    {"qzoom": {"budget": {"max_turns": 10**6}}},
    {"temperature": -1},
    {"image": "data:image/png;base64,iVBORw0KGgo="},
    {"image": "file:///etc/passwd"},
    {"question": "why? " * 3000},
    "{not json",
]
"""What a wrong request changes, or its whole body."""


class Asked(NamedTuple):
    """A right question, and what `Agent.run` says to it."""

    body: dict[str, Any]
    answer: str
    boxes: list[list[float]]


def questions(n: int) -> list[Asked]:
    """Return `n` small boards, each under a policy and a small budget: most are asked `direct`."""
    nano, found = Agent.from_pretrained("nano", device="cpu"), []
    for index, board in enumerate(find_task("needle-scene").load(TaskSource(n=n))):
        options = {"policy": "implicit" if index % 6 == 0 else "direct", "budget": {"coarse_tokens": 25}}
        image = board.image.resize((board.image.width // 2, board.image.height // 2))
        answer = nano.replace(**options).run(image, board.question)
        body = request(data_url(image), board.question)
        found.append(Asked(body | {"qzoom": options}, answer.text, [list(box) for box in answer.boxes]))
    return found


def request(image: str, question: str) -> dict[str, Any]:
    """Return the body of a request."""
    parts = [{"type": "image_url", "image_url": {"url": image}}, {"type": "text", "text": question}]
    return {"model": "qzoom", "messages": [{"role": "user", "content": parts}]}


class Soak:
    """Sends the requests and counts what comes back."""

    def __init__(self, url: str, asked: list[Asked], pid: int) -> None:
        self.asked, self.pid = asked, pid
        self.client = httpx.AsyncClient(
            base_url=url, trust_env=False, timeout=300, limits=httpx.Limits(max_connections=64)
        )
        self.counts = Counter[str]()
        self.memory: list[float] = []

    async def good(self, draw: random.Random) -> None:
        """Ask a right question until it is not turned away, and compare."""
        asked, stream = draw.choice(self.asked), draw.random() < 0.5
        while True:
            reply = await self.client.post("/chat/completions", json={**asked.body, "stream": stream})
            self.counts[f"status {reply.status_code}"] += 1
            if reply.status_code != 429:
                break
            await asyncio.sleep(1)
        if reply.status_code != 200:
            self.counts["lost"] += 1
            print(reply.text[:300])
            return
        if stream:
            chunks = [json.loads(line[6:]) for line in reply.text.split("\n\n") if line and "[DONE]" not in line]
            text = "".join(one["choices"][0]["delta"].get("content", "") for one in chunks if "choices" in one)
            boxes = chunks[-1].get("qzoom", {}).get("boxes")
        else:
            whole = reply.json()
            text, boxes = whole["choices"][0]["message"]["content"], whole["qzoom"]["boxes"]
        self.counts["equal" if (text, boxes) == (asked.answer, asked.boxes) else "different"] += 1

    async def wrong(self, draw: random.Random) -> None:
        """Send a wrong request, which gets a status of 4xx in OpenAI's form."""
        change, body = draw.choice(WRONG), draw.choice(self.asked).body
        if isinstance(change, str):
            sent = change
        elif "image" in change:
            sent = json.dumps(request(change["image"], "what?"))
        elif "question" in change:
            parts = body["messages"][0]["content"]
            sent = json.dumps(request(parts[0]["image_url"]["url"], change["question"]))
        else:
            sent = json.dumps({**body, **change})
        reply = await self.client.post("/chat/completions", content=sent, headers={"Content-Type": "application/json"})
        self.counts[f"status {reply.status_code}"] += 1
        self.counts["refused" if 400 <= reply.status_code < 500 and reply.json()["error"]["message"] else "odd"] += 1

    async def abandoned(self, draw: random.Random) -> None:
        """Ask a right question and leave."""
        body = {**draw.choice(self.asked).body, "stream": draw.random() < 0.5}
        try:
            reply = await asyncio.wait_for(self.client.post("/chat/completions", json=body), draw.uniform(0.01, 2))
            self.counts[f"status {reply.status_code}"] += 1
        except TimeoutError:
            self.counts["abandoned"] += 1

    async def run(self, n: int, at_once: int) -> None:
        """Send `n` requests, so many at a time."""
        free, done = asyncio.Semaphore(at_once), 0

        async def one(index: int) -> None:
            nonlocal done
            draw = random.Random(index)
            kind = draw.choices([self.good, self.wrong, self.abandoned], [70, 15, 15])[0]
            async with free:
                await kind(draw)
            done += 1
            if done % (n // 20) == 0:
                self.memory.append(resident(self.pid))
                print(f"{done} of {n}: {self.memory[-1]:.0f} MB, {dict(self.counts)}", flush=True)

        await asyncio.gather(*(one(index) for index in range(n)))

    async def throughput(self, rounds: int = 5) -> None:
        """Time eight requests one after the other, and at once."""
        bodies, ratios = [one.body for one in self.asked[-8:]], []
        for _ in range(rounds):
            began = time.perf_counter()
            for body in bodies:
                await self.client.post("/chat/completions", json=body)
            middle = time.perf_counter()
            await asyncio.gather(*(self.client.post("/chat/completions", json=body) for body in bodies))
            took = (middle - began, time.perf_counter() - middle)
            ratios.append(took[0] / took[1])
            print(f"8 one after the other {took[0]:.2f} s, at once {took[1]:.2f} s: {ratios[-1]:.2f}x", flush=True)
        print(f"median {sorted(ratios)[rounds // 2]:.2f}x")


def resident(pid: int) -> float:
    """Return the MB of memory that a process holds."""
    found = re.search(r"VmRSS:\s+(\d+)", Path(f"/proc/{pid}/status").read_text())
    return int(found[1]) / 1024 if found else 0.0


async def soak(url: str, asked: list[Asked], pid: int, *, n: int, at_once: int) -> bool:
    """Return whether everything is as it should be."""
    task = Soak(url, asked, pid)
    await task.throughput()
    began = time.perf_counter()
    await task.run(n, at_once)
    counts, early, late = task.counts, task.memory[len(task.memory) // 4], task.memory[-1]
    failed = sum(count for name, count in counts.items() if name.startswith("status 5"))
    print(f"{n} requests in {time.perf_counter() - began:.0f} s: {dict(counts)}; memory {early:.0f} to {late:.0f} MB")
    ended = (await task.client.get(url.removesuffix("/v1") + "/health")).json()
    print(ended)
    wrong = counts["lost"] + counts["different"] + counts["odd"] + failed + ended["running"] + ended["waiting"]
    return not wrong and late < early * 1.1


def main() -> int:
    """Start the server, soak it, and end it."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--n", type=int, default=2000)
    parser.add_argument("--at-once", type=int, default=32)
    given = parser.parse_args()
    command = [sys.executable, "-m", "qzoom_agent", "serve", "--port", "0", "--queue", "64", "--device", "cpu"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as server:
        try:
            asked = questions(24)
            assert server.stdout is not None
            url = server.stdout.readline().split(" at ")[1].split(" ")[0]
            good = asyncio.run(soak(url, asked, server.pid, n=given.n, at_once=given.at_once))
        finally:
            server.send_signal(signal.SIGTERM)
        code = server.wait(60)
    print(f"the server ended with {code}")
    return 0 if good and code == 0 else 1


if __name__ == "__main__":
    sys.exit(main())
