"""Whether a free-form answer is right where rules do not reach: ask a language model behind an OpenAI-compatible API.

Rules come first, so a judge only ever turns a miss of the rule into a hit, and most replies cost no request. Verdicts
are kept in a file by what was asked and of whom: a run that is repeated asks nothing twice, and every verdict can be
read again. A figure that a judge had a part in is reported with `Judge.record`, the model and the prompt: without them
it means nothing.
"""

from __future__ import annotations

import hashlib
import json
import re
from http.client import HTTPException
from pathlib import Path
from typing import Final
from urllib.request import Request, urlopen

from pydantic import BaseModel, ConfigDict, ValidationError

from qzoom_agent.backends.server import base_url
from qzoom_agent.errors import BackendError, ConfigError
from qzoom_agent.evals.scoring.extraction import final_answer
from qzoom_agent.evals.scoring.match import exact_match
from qzoom_agent.evals.scoring.open_answer import rule
from qzoom_agent.evals.suites.base import Sample, Score, Scorer

PROMPT: Final = (
    "Does the answer say the same as the reference? Small differences of wording, format or unit do not matter; a "
    "contradiction or a missing part does.\n\nQuestion: {question}\nReference: {gold}\nAnswer: {answer}\n\n"
    "Reply with one word: yes or no."
)
_FIELD: Final = re.compile(r"\{(question|gold|answer)\}")
_SECONDS: Final = 120


class JudgeRecord(BaseModel):
    """Who judged, for the results of a run."""

    model_config = ConfigDict(frozen=True)

    model: str
    prompt: str


class Verdict(BaseModel):
    """One line of the cache."""

    model_config = ConfigDict(frozen=True, use_attribute_docstrings=True)

    key: str
    """Hash of model, prompt, question, answer and gold."""
    right: bool
    reply: str = ""
    """What the judge wrote."""


class Judge:
    """Calls itself as `judge(question, answer, gold)`; without a server it compares by rule."""

    def __init__(
        self,
        server: str | None = None,
        *,
        model: str = "default",
        prompt: str = PROMPT,
        cache: Path | None = None,
        api_key: str | None = None,
    ) -> None:
        """`server`: base URL of an OpenAI-compatible API, such as http://localhost:8000/v1.

        Raises ConfigError if that is no address, or the prompt does not hold {question}, {gold} and {answer}.
        """
        missing = {"question", "gold", "answer"} - set(_FIELD.findall(prompt))
        if missing:
            raise ConfigError(f"The judge's prompt lacks {', '.join(f'{{{name}}}' for name in sorted(missing))}.")
        self.server = None if server is None else base_url(server)
        self.cache, self.api_key = cache, api_key
        self.record = JudgeRecord(model=model, prompt=prompt)
        self._known = _read(cache) if cache is not None and cache.exists() else {}

    def __call__(self, question: str, answer: str, gold: str) -> bool:
        """Raises BackendError if the server does not answer."""
        if not answer or exact_match(answer, gold) or self.server is None:
            return exact_match(answer, gold)
        asked = {"question": question, "gold": gold, "answer": answer}
        key = hashlib.sha256(json.dumps([self.record.model, self.record.prompt, *asked.values()]).encode()).hexdigest()
        if key not in self._known:
            # One pass: an answer that holds "{gold}" is not filled in.
            reply = self._ask(_FIELD.sub(lambda found: asked[found[1]], self.record.prompt))
            said = re.search(r"\b(yes|no)\b", reply, re.IGNORECASE)
            self._keep(Verdict(key=key, right=said is not None and said[1].lower() == "yes", reply=reply))
        return self._known[key]

    def _keep(self, verdict: Verdict) -> None:
        self._known[verdict.key] = verdict.right
        if self.cache is not None:
            self.cache.parent.mkdir(parents=True, exist_ok=True)
            # The newline comes first: it closes the line that a killed run has torn.
            with self.cache.open("a", encoding="utf-8") as file:
                file.write(f"\n{verdict.model_dump_json()}")

    def _ask(self, prompt: str) -> str:
        body = {
            "model": self.record.model,
            "messages": [{"role": "user", "content": prompt}],
            "temperature": 0,
            "max_tokens": 4,
        }
        headers = {"Content-Type": "application/json"}
        if self.api_key:
            headers["Authorization"] = f"Bearer {self.api_key}"
        url = f"{self.server}/chat/completions"
        try:
            with urlopen(Request(url, json.dumps(body).encode(), headers), timeout=_SECONDS) as response:
                text = json.load(response)["choices"][0]["message"]["content"]
        except (OSError, HTTPException, ValueError, LookupError, TypeError) as error:
            raise BackendError(
                f"The judge at {url} gave no verdict: {error}. Start the server, or judge by rule."
            ) from None
        return text if isinstance(text, str) else ""


def judged(judge: Judge) -> Scorer:
    """A scorer that asks `judge` about the final answers that the rule refuses (never about a multiple choice).

    The scorer raises BackendError if the judge does not answer.
    """

    def score(text: str | None, sample: Sample) -> Score:
        by_rule = rule(text, sample)
        said = final_answer(text) if text else None
        if by_rule.value or said is None or sample.options:
            return by_rule
        golds = sample.answers or (sample.answer,)
        return Score(float(any(judge(sample.question, said, gold) for gold in golds)), said)

    return score


def _read(cache: Path) -> dict[str, bool]:
    known = {}
    for line in cache.read_text(encoding="utf-8").splitlines():
        try:
            verdict = Verdict.model_validate_json(line)
        except ValidationError:
            continue  # blank, or torn by a kill
        known[verdict.key] = verdict.right
    return known
