"""How near a generated answer comes to what the data says: exact match, ROUGE-L, and GSM8K's final number."""

from __future__ import annotations

import re
from collections.abc import Sequence
from decimal import Decimal

from phi3_lora_plugin.error import Phi3LoraError
from phi3_lora_plugin.wording import listed

MEASURES = ("exact", "rouge_l", "gsm8k")
# The number after the first "####": GSM8K's own rule, but a sign may be typographic and a dollar may stand before it.
_FINAL = re.compile(r"####\s*(?P<sign>[-\u2212]?)\s*\$?\s*(?P<sign2>[-\u2212]?)(?P<number>\d[\d,]*(?:\.\d+)?|\.\d+)")


class AnswerError(Phi3LoraError):
    """Answers that cannot be scored as asked; names what is in the way."""


def score_answers(
    answers: Sequence[str], references: Sequence[str], measures: Sequence[str] = ("exact", "rouge_l")
) -> dict[str, float]:
    """Mean score of answers against what was expected, each from 0 to 1, for each measure.

    Args:
        measures: "exact" (equal text, white space aside), "rouge_l" (ROUGE-L F1, see `rouge_l`), "gsm8k" (equal final
            number, see `final_answer`).

    Raises:
        AnswerError: an unknown measure, nothing to score, or a reference without a final number under "gsm8k".
    """
    if unknown := [name for name in measures if name not in MEASURES]:
        raise AnswerError(f"unknown measure {', '.join(map(repr, unknown))}, available: {', '.join(MEASURES)}")
    if not answers or len(answers) != len(references):
        raise AnswerError(f"{len(answers)} answers for {len(references)} references; expected equal counts, not 0")
    if "gsm8k" in measures and (without := [n for n, text in enumerate(references, 1) if final_answer(text) is None]):
        named = listed(without, 8)
        raise AnswerError(
            f"gsm8k compares the number after '####', and there is none in the expected answer of question {named}"
        )
    each = {"exact": _exact, "rouge_l": rouge_l, "gsm8k": _same_number}
    return {
        name: sum(each[name](said, right) for said, right in zip(answers, references, strict=True)) / len(answers)
        for name in dict.fromkeys(measures)
    }


def _exact(said: str, right: str) -> float:
    return float(said.split() == right.split())


def _same_number(said: str, right: str) -> float:
    found = final_answer(said)
    return float(found is not None and found == final_answer(right))


def rouge_l(said: str, right: str) -> float:
    """ROUGE-L F1 of a text: words in common and in order, against both lengths (Lin 2004, section 3.1, beta 1).

    A word is a run of Unicode letters, digits and underscores, in lower case and not stemmed. 0 where one has none.
    """
    here, there = (re.findall(r"\w+", text.casefold()) for text in (said, right))
    common = _common(here, there)
    return 2 * common / (len(here) + len(there)) if common else 0.0


def _common(here: Sequence[str], there: Sequence[str]) -> int:
    """Length of the longest common subsequence, a row of the table at a time in the bits of one integer (Hyyrö 2004).

    A zero bit at i says that the subsequence grows by one at the i-th word of `here`.
    """
    places: dict[str, int] = {}
    for index, word in enumerate(here):
        places[word] = places.get(word, 0) | 1 << index
    full = (1 << len(here)) - 1
    row = full
    for word in there:
        matches = row & places.get(word, 0)
        row = ((row + matches) | (row - matches)) & full
    return len(here) - row.bit_count()


def final_answer(text: str) -> Decimal | None:
    """The number after the first `####` of a GSM8K answer, or None (Cobbe et al. 2021, arXiv 2110.14168).

    Commas are dropped, a full stop after it is not part of it, and 18 equals 18.00.
    """
    found = _FINAL.search(text)
    if found is None:
        return None
    value = Decimal(found["number"].replace(",", ""))
    return -value if found["sign"] or found["sign2"] else value
