"""The reward of the recipe tiny-grpo, and an example of one: a function with the signature that TRL calls."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any


def tells(completions: Sequence[Any], answer: Sequence[str], **columns: Any) -> list[float]:
    """1 for each completion that has the words of its row's answer in it, else 0."""
    said = [completion[-1]["content"] for completion in completions]
    return [float(words in text) for text, words in zip(said, answer, strict=True)]
