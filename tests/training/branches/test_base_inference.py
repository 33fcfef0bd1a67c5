"""What counts as a right answer, and how answers and questions are written for training."""

from __future__ import annotations

from pathlib import Path

import pytest
from datasets import Dataset
from yaml import safe_dump

from qzoom_agent.agent import Agent
from qzoom_agent.evaluation.scorers.judge import Judge
from qzoom_agent.evaluation.scorers.match import exact_match
from qzoom_agent.models.hf import HFBackend
from qzoom_agent.perception.branches import Branches
from qzoom_agent.protocols.wording import FILE, read_prompt, write_prompt
from qzoom_agent.training.branches.base_inference import answer_ids, ask, is_right
from qzoom_agent.training.branches.dataset import DatasetSpec, Record, load_records
from tests.tiny_models import build
from tests.training.branches.conftest import picture


def record(folder: Path, *answers: str) -> Record:
    row = {"image": picture(0), "question": "When?", "answers": list(answers)}
    Dataset.from_list([row]).save_to_disk(str(folder / "table"))
    found: Record = load_records([DatasetSpec(path=str(folder / "table"), columns={"answer": "answers"})])[0]
    return found


@pytest.mark.parametrize(
    ("said", "right"),
    [
        ("January 5", True),
        ("january 5.", True),
        ("The date is January 5.", True),
        ("<answer>5 January</answer>", True),
        ("5/1", True),
        ("January 55", False),
        ("January", False),
        ("It may be any day of the week, of the month or of the year, and one of them is January 5", False),
        ("", False),
        (None, False),
    ],
)
def test_any_reference_is_right_and_may_stand_in_a_sentence(tmp_path: Path, said: str | None, right: bool) -> None:
    assert is_right(said, record(tmp_path, "January 5", "5 January", "5/1")) is right


@pytest.mark.parametrize(
    ("said", "right"),
    [
        ("A", True),
        ("(A)", True),
        ("A. A cat", True),
        ("It is a cat.", True),
        ("B. A red car", False),
        ("The answer is B, a red car", False),
        ("B", False),
    ],
)
def test_of_a_multiple_choice_the_chosen_option_counts(tmp_path: Path, said: str, right: bool) -> None:
    """The letter of the right option is a word of many wrong replies."""
    row = {"image": picture(0), "question": "What is it?", "answer": "A", "options": ["a cat", "a red car"]}
    Dataset.from_list([row]).save_to_disk(str(tmp_path / "table"))
    assert is_right(said, load_records([DatasetSpec(path=str(tmp_path / "table"))])[0]) is right


def test_on_boards_the_reply_is_the_answer_and_nothing_else() -> None:
    board = load_records([DatasetSpec(path="needle", limit=1)])[0]
    gold = board.answer
    for said in (gold, f" {gold.lower()}.", f"it is {gold}", f"The answer is {gold}", f"{gold} {gold}", "", "no"):
        assert is_right(said, board) is exact_match(said, gold)
        assert is_right(said, board, Judge("http://localhost:1/v1")) is exact_match(said, gold), "nobody is asked"
    assert not is_right(f"it is {gold}", board)


def test_a_judge_is_asked_with_every_reference_but_not_about_what_the_rule_accepts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[str] = []

    def ask(self: Judge, found: dict[str, str], *, attempts: int) -> str:
        asked.append(found["gold"])
        return "yes" if found["gold"] == "the fifth" else "no"

    monkeypatch.setattr(Judge, "_ask", ask)
    judge, day = Judge("http://localhost:1/v1"), record(tmp_path, "January 5", "the fifth", "5/1")
    assert is_right("It says 5/1.", day, judge) and not asked
    assert is_right("on day five", day, judge) and len(asked) == 2
    assert not is_right("on day five", record(tmp_path / "b", "noon"), judge)


def test_a_model_is_asked_in_the_words_of_its_prompt_file_as_at_inference(tmp_path: Path) -> None:
    """A branch that is trained in other words reads other states."""
    words = {"system_without_tools": "Be brief: é.", "user_without_tools": "{images}Look.\nNow: {question}"}
    model, tuned = build("qwen2_5_vl", tmp_path / "model", layers=4), tmp_path / "tuned"
    (model / FILE).write_text(safe_dump(words))
    backend = HFBackend.load(str(model), device="cpu", dtype="float32")
    backend.branches = Branches.from_base(backend.model, depth=1, gate_depth=1)
    (asked,) = ask(backend, [record(tmp_path, "January 5")], None)
    said = str(asked.messages)
    assert all(part in said for part in ("Be brief: é.", "Look.", "Now: When?"))
    seen = Agent(backend).look(picture(0), "When?").record
    assert seen.prompt_tokens == len(asked.ready.prompt.ids)
    tuned.mkdir()
    write_prompt(backend.prompt, tuned)
    assert backend.prompt is not None and read_prompt(tuned / FILE).digest == backend.prompt.digest


def test_a_turn_ends_with_the_token_that_the_chat_template_writes(tmp_path: Path) -> None:
    """Gemma's tokenizer ends a text with <eos>, and its template a turn with <end_of_turn>."""
    loaded = HFBackend.load(str(build("qwen2_5_vl", tmp_path)), check=False)
    model, processor = loaded.model, loaded.processor
    turn, end = processor.tokenizer.convert_tokens_to_ids(["<|im_end|>", "<|vision_end|>"])
    processor.tokenizer.eos_token = "<|vision_end|>"
    model.generation_config.eos_token_id = [turn]
    assert answer_ids(HFBackend(model, processor, name="both"), "an answer")[-1] == turn != end
    model.generation_config.eos_token_id = None
    assert answer_ids(HFBackend(model, processor, name="one"), "an answer")[-1] == end
