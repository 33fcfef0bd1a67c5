"""A judge of free-form answers: a language model behind an OpenAI-compatible API, asked where rules do not reach.

Rules come first, so a judge only ever turns a miss of the rule into a hit, and most replies cost no request. Verdicts
are kept in a file by what was asked and of whom: a run that is repeated asks nothing twice, and every verdict can be
read again. A figure that a judge had a part in is reported with `Judge.record`, the model and the prompt: without them
it means nothing.
"""

import hashlib
import json
import re
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Final

from pydantic import BaseModel, ValidationError

from qzoom_agent.data.answers import exact_match
from qzoom_agent.data.samples import Sample
from qzoom_agent.errors import BackendError, ConfigError
from qzoom_agent.evaluation.scorers.extraction import final_answer
from qzoom_agent.evaluation.scorers.open_answer import rule
from qzoom_agent.evaluation.tasks.task import RULES, Score, Scorer, rule_version, scorer
from qzoom_agent.files import read_text
from qzoom_agent.models.chat_client import ChatClient

PROMPT: Final = (
    "Does the answer say the same as the reference? Small differences of wording, format or unit do not matter; a "
    "contradiction or a missing part does.\n\nQuestion: {question}\nReference: {gold}\nAnswer: {answer}\n\n"
    "Reply with one word: yes or no."
)
_FIELD: Final = re.compile(r"\{(question|gold|answer)\}")
KEY_VARIABLE: Final = "QZOOM_JUDGE_KEY"
"""Environment variable with the key of the server, unless another is named. The key itself is not stored."""
_YES_OR_NO: Final = re.compile(r"\b(yes|no)\b", re.IGNORECASE)
_SECONDS: Final = 120
_ATTEMPTS: Final = 7
_PAUSE: Final = 1.0
"""Seconds before the first repetition; with doubling, a server may be away for a minute."""


class JudgeRecord(BaseModel, frozen=True):
    """The model and prompt of a judge, for the results of a run."""

    model: str
    prompt: str


class JudgeCacheLine(BaseModel, frozen=True, use_attribute_docstrings=True):
    """One line of the cache."""

    key: str
    """Hash of model, prompt, question, answer and gold."""
    right: bool
    reply: str = ""


class Judge:
    """Calls itself as `judge(question, answer, gold)`; without a server it compares by rule."""

    def __init__(
        self,
        server: str | None = None,
        *,
        model: str = "default",
        prompt: str = PROMPT,
        cache: Path | None = None,
        key_variable: str = KEY_VARIABLE,
        sleep: Callable[[float], None] = time.sleep,
    ) -> None:
        """
        Args:
            server: base URL of an OpenAI-compatible API, such as http://localhost:8000/v1.
            key_variable: environment variable with its key; servers of your own need none.
            sleep: how it waits before a request is sent again.

        Raises ConfigError if that is no address, or if the prompt does not hold {question}, {gold} and {answer}.
        """
        missing = {"question", "gold", "answer"} - set(_FIELD.findall(prompt))
        if missing:
            raise ConfigError(f"The judge's prompt lacks {', '.join(f'{{{name}}}' for name in sorted(missing))}.")
        self.cache, self.key_variable = cache, key_variable
        self._client: ChatClient | None = None
        if server is not None:
            limits = {"timeout": _SECONDS, "attempts": _ATTEMPTS, "pause": _PAUSE}
            self._client = ChatClient(server, model=model, key_variable=key_variable, sleep=sleep, **limits)
        self.server = None if self._client is None else self._client.address
        """Where it is asked; None: rules decide."""
        self.record = JudgeRecord(model=model, prompt=prompt)
        self._known = _read(cache) if cache is not None and cache.exists() else {}

    def __call__(self, question: str, answer: str, gold: str) -> bool:
        """Return whether an answer is right; raise BackendError if the server does not answer for a minute."""
        if not answer or exact_match(answer, gold) or self.server is None:
            return exact_match(answer, gold)
        asked = {"question": question, "gold": gold, "answer": answer}
        key = hashlib.sha256(json.dumps([self.record.model, self.record.prompt, *asked.values()]).encode()).hexdigest()
        if key not in self._known:
            reply = self._ask(asked, attempts=_ATTEMPTS)
            said = _YES_OR_NO.search(reply)
            self._keep(JudgeCacheLine(key=key, right=said is not None and said[1].lower() == "yes", reply=reply))
        return self._known[key]

    def check(self) -> None:
        """Ask something easy, before a long run depends on it; nothing without a server.

        Raises BackendError if the server does not answer, or with neither yes nor no.
        """
        if self.server is None:
            return
        reply = self._ask({"question": "How much is two and two?", "gold": "four", "answer": "4"}, attempts=1)
        if _YES_OR_NO.search(reply) is None:
            raise BackendError(
                f"The judge '{self.record.model}' at {self.server} says {reply!r} where yes or no is asked for. Choose "
                "a model that answers at once."
            )

    def _keep(self, verdict: JudgeCacheLine) -> None:
        self._known[verdict.key] = verdict.right
        if self.cache is not None:
            self.cache.parent.mkdir(parents=True, exist_ok=True)
            # The newline comes first: it closes the line that a killed run has torn.
            with self.cache.open("a", encoding="utf-8") as file:
                file.write(f"\n{verdict.model_dump_json()}")

    def _ask(self, asked: Mapping[str, str], *, attempts: int) -> str:
        """Return the judge's reply; empty if the server or the model withheld it."""
        assert self._client is not None
        # One pass: an answer that holds "{gold}" is not filled in.
        prompt = _FIELD.sub(lambda found: asked[found[1]], self.record.prompt)
        try:
            return self._client.complete(
                [{"role": "user", "content": prompt}], max_tokens=4, attempts=attempts, temperature=0
            ).text
        except BackendError as error:
            raise BackendError(
                f"The judge gave no verdict: {error} Start the server, put its key into {self.key_variable} if it "
                "wants one, or judge by rule."
            ) from None


def judged(judge: Judge) -> Scorer:
    """Return a scorer that asks `judge` about final answers that the rule refuses (never about a multiple choice).

    The scorer raises BackendError if the judge does not answer. Its attribute `judge` is the judge's record.
    """

    @scorer()
    def score(text: str, sample: Sample) -> Score:
        by_rule = rule(text, sample)
        said = final_answer(text)
        if by_rule.value or said is None or sample.options:
            return by_rule
        golds = sample.answers or (sample.answer,)
        return Score(float(any(judge(sample.question, said, gold) for gold in golds)), said)

    record = getattr(judge, "record", None)
    asked = record.model_dump_json() if isinstance(record, JudgeRecord) else rule_version(judge)
    asked = hashlib.sha256(asked.encode()).hexdigest()[:12]
    vars(score).update(version=f"{RULES} judge {asked}", judge=record)
    return score


def _read(cache: Path) -> dict[str, bool]:
    known = {}
    for line in read_text(cache, "Delete it to ask the judge again.").splitlines():
        try:
            verdict = JudgeCacheLine.model_validate_json(line)
        except ValidationError:
            continue  # blank, or torn by a kill
        known[verdict.key] = verdict.right
    return known
