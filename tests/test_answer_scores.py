"""Scores of answers against definitions written out the long way."""

from __future__ import annotations

import json
import random
from decimal import Decimal
from pathlib import Path

import pytest

from phi3_lora_plugin.evaluate.answer_scores import AnswerError, final_answer, rouge_l, score_answers


def common(here: list[str], there: list[str]) -> int:
    """Longest common subsequence by its recurrence."""
    table = [[0] * (len(there) + 1) for _ in range(len(here) + 1)]
    for i, one in enumerate(here, 1):
        for j, other in enumerate(there, 1):
            table[i][j] = table[i - 1][j - 1] + 1 if one == other else max(table[i - 1][j], table[i][j - 1])
    return table[-1][-1]


def test_rouge_l_is_its_recurrence() -> None:
    chance = random.Random(0)
    for _ in range(200):
        here, there = ([chance.choice("abcdef") for _ in range(chance.randrange(1, 90))] for _ in range(2))
        shared = common(here, there)
        precision, recall = shared / len(here), shared / len(there)
        expected = 2 * precision * recall / (precision + recall) if shared else 0.0
        assert rouge_l(" ".join(here), " ".join(there)) == pytest.approx(expected)


def test_rouge_l_of_published_examples() -> None:
    # Lin 2004, section 3.1: S1 against S2 and S3; both share as many words, S2 more of them in order.
    assert rouge_l("police kill the gunman", "police killed the gunman") == 0.75
    assert rouge_l("the gunman kill police", "police killed the gunman") == 0.5
    assert rouge_l("Ünïcode, zwei!", "ünïcode ZWEI") == 1.0
    assert rouge_l("", "a") == rouge_l("a", "") == rouge_l("!", "!") == 0.0


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("so 9 * 2 = <<9*2=18>>18\n#### 18", 18),
        ("#### 1,234,000", 1234000),
        ("####-5", -5),
        ("#### $ 12.50.", "12.5"),
        ("#### −3 apples", -3),
        ("#### .5", "0.5"),
        ("#### 7\n#### 8", 7),
        ("#### $-20", -20),
        ("the answer is 18", None),
        ("#### many", None),
        ("### 18", None),
        ("", None),
    ],
)
def test_the_final_answer(text: str, number: object) -> None:
    assert final_answer(text) == (None if number is None else Decimal(str(number)))


def test_every_real_gsm8k_answer_has_a_number(shared_data: Path) -> None:
    for name in ("gsm8k_test_200.jsonl", "gsm8k_train_1500.jsonl"):
        answers = [json.loads(line)["answer"] for line in (shared_data / "chats" / name).open(encoding="utf-8")]
        assert score_answers(answers, answers, ["gsm8k", "exact"]) == {"gsm8k": 1.0, "exact": 1.0}
        assert score_answers([*answers[1:], answers[0]], answers, ["gsm8k"])["gsm8k"] < 0.1


def test_means_over_all_answers() -> None:
    said, right = ["a  b\n", "a b", "no", "1 #### 3"], ["a b", "a c", "yes", "#### 3.0"]
    assert score_answers(said, right) == {"exact": 0.25, "rouge_l": (1 + 0.5 + 0 + 0.5) / 4}


def test_what_cannot_be_scored_is_named() -> None:
    with pytest.raises(
        AnswerError, match="gsm8k compares the number after '####', and there is none .* of question 2, 3"
    ):
        score_answers(["", "", ""], ["#### 1", "18", "#### x"], ["gsm8k"])
    with pytest.raises(AnswerError, match="unknown measure 'bleu', available: exact, rouge_l, gsm8k"):
        score_answers([""], [""], ["bleu"])
    with pytest.raises(AnswerError, match="0 answers for 0 references"):
        score_answers([], [])
