"""The judge, against a server on this machine."""

from __future__ import annotations

from pathlib import Path

import pytest
from PIL import Image

from qzoom_agent.data.samples import Sample
from qzoom_agent.errors import BackendError, ConfigError
from qzoom_agent.evaluation.scorers.judge import PROMPT, Judge, JudgeCacheLine, judged
from tests.models.misbehaving import Connection, Misbehaving, Script, completion


def says(reply: str | None) -> Script:
    """Return a script that always says `reply`; None: it answers with something else than JSON."""
    return lambda asked: asked.reply("oops" if reply is None else completion(reply))


def busy(asked: Connection) -> None:
    asked.reply({}, status="503 Service Unavailable")


def question(gold: str, *, options: tuple[str, ...] = ()) -> Sample:
    image = Image.new("RGB", (1, 1))
    return Sample("1", "probe", "all", image, "Who?", gold, answers=(gold, "the baker"), options=options)


def test_without_a_server_rules_decide() -> None:
    judge = Judge()
    assert judge("How much?", "12.40", "12.4") and not judge("How much?", "about twelve", "12.4")


def at_once(_: float) -> None:
    """Stands for `time.sleep`."""


def test_a_verdict_is_asked_once_and_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("QZOOM_JUDGE_KEY", "k")
    cache = tmp_path / "verdicts" / "cache.jsonl"
    with Misbehaving(says("Yes.")) as server:
        judge = Judge(server.url, model="m", cache=cache)
        assert judge("Who?", "a man who bakes {gold}", "a baker")
        assert judge("Who?", "a man who bakes {gold}", "a baker")
        assert judge("Who?", "A BAKER", "a baker")  # the rule needs no judge
        assert len(server.requests) == 1 and server.requests[0].key == "Bearer k"
        (message,) = server.requests[0].body["messages"]
        assert message["content"] == PROMPT.replace("{answer}", "\0").replace("{question}", "Who?").replace(
            "{gold}", "a baker"
        ).replace("\0", "a man who bakes {gold}")
        assert server.requests[0].body["model"] == "m" and server.requests[0].body["temperature"] == 0
    # The server is gone; what it said is still known, a torn line or not.
    with cache.open("a") as file:
        file.write('\n{"key": "torn')
    assert Judge(server.url, model="m", cache=cache)("Who?", "a man who bakes {gold}", "a baker")
    with pytest.raises(BackendError, match="gave no verdict"):
        Judge(server.url, model="another", cache=cache, sleep=at_once)("Who?", "a man who bakes {gold}", "a baker")
    (kept,) = [line for line in cache.read_text().splitlines() if line.endswith("}")]
    assert JudgeCacheLine.model_validate_json(kept).reply == "Yes."


@pytest.mark.parametrize("reply", ["no", "No, yes would be wrong.", "I cannot say", ""])
def test_anything_but_yes_is_no(reply: str) -> None:
    with Misbehaving(says(reply)) as server:
        assert not Judge(server.url)("Who?", "a smith", "a baker")


def test_a_server_that_talks_nonsense_is_an_error_that_says_so() -> None:
    with Misbehaving(says(None)) as server, pytest.raises(BackendError, match="judge by rule"):
        Judge(server.url, sleep=at_once)("Who?", "a smith", "a baker")


def test_a_server_that_is_busy_is_asked_again() -> None:
    waits: list[float] = []
    with Misbehaving(lambda asked: (busy if len(server.requests) <= 3 else says("yes"))(asked)) as server:
        assert Judge(server.url, sleep=waits.append)("Who?", "a man who bakes", "a baker")
        assert waits == [1.0, 2.0, 4.0] and len(server.requests) == 4
        server.script = busy
        with pytest.raises(BackendError, match=r"gave no verdict: .*failed \(503.*QZOOM_JUDGE_KEY"):
            Judge(server.url, sleep=waits.append)("Who?", "a man who bakes", "a baker")
        assert len(server.requests) == 4 + 7


def test_a_judge_is_tried_before_a_run_and_its_key_comes_from_the_variable_that_is_named(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    Judge().check()
    monkeypatch.setenv("MY_JUDGE", "secret\n")
    with Misbehaving(says("Yes")) as server:
        judge = Judge(server.url, key_variable="MY_JUDGE")
        judge.check()
        assert [one.key for one in server.requests] == ["Bearer secret"]
        assert "secret" not in f"{vars(judge)} {judge.record}"
        server.script = busy
        with pytest.raises(BackendError, match="put its key into MY_JUDGE"):
            judge.check()
    with (
        Misbehaving(says("<think> Let me")) as server,
        pytest.raises(BackendError, match=r"says '<think> Let me' where yes or no"),
    ):
        Judge(server.url).check()


def test_a_prompt_has_a_place_for_everything() -> None:
    with pytest.raises(ConfigError, match=r"\{gold\}"):
        Judge(prompt="{question} {answer}?")
    record = Judge(model="m", prompt="{question} {answer} {gold}?").record
    assert record.model_dump() == {"model": "m", "prompt": "{question} {answer} {gold}?"}


def test_as_a_scorer_it_is_asked_only_where_the_rule_refuses() -> None:
    with Misbehaving(says("yes")) as server:
        score = judged(Judge(server.url))
        assert score("The answer is the baker.", question("a baker")) == (1.0, "the baker")
        assert score(None, question("a baker")) == (0.0, None)
        assert score("B", question("A", options=("one", "two"))) == (0.0, "B")
        assert not server.requests
        assert score("<answer>someone who bakes</answer>", question("a baker")) == (1.0, "someone who bakes")
        assert "someone who bakes" in server.requests[0].body["messages"][0]["content"]
