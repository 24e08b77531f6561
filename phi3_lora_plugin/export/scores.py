"""What a runtime's logits say of tokens: its scores, as `Runtime` has them."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any


class ShowsLogits(ABC):
    """The scores of a runtime whose `_logits` gives those of all of `ids`: numpy [len(ids), vocabulary]."""

    measure = "logits"

    @abstractmethod
    def _logits(self, ids: Sequence[int]) -> Any: ...

    def next_scores(self, ids: Sequence[int]) -> Any:
        return self._logits(ids)[-1]

    def log_probabilities(self, ids: Sequence[int], first: int) -> tuple[list[float], list[bool]]:
        logits, found, likeliest = self._logits(ids), [], []
        for place in range(first, len(ids)):
            row = in_measure(logits[place - 1], "log-probabilities")
            found.append(float(row[ids[place]]))
            likeliest.append(int(row.argmax()) == ids[place])
        return found, likeliest


def in_measure(logits: Any, measure: str) -> Any:
    """A row of logits, or its log-probabilities where the runtime gives only those."""
    if measure == "logits":
        return logits
    import numpy

    shifted = logits - logits.max()
    return shifted - numpy.log(numpy.exp(shifted).sum())
