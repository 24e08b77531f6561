"""What is measured of one model on held-out rows."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field


@dataclass(frozen=True)
class Figures:
    """What one model makes of it: see `TokenScores`, `score_answers`; `stopped` is the share that ended by itself."""

    loss: float | None = None
    perplexity: float | None = None
    token_accuracy: float | None = None
    answers: Mapping[str, float] = field(default_factory=dict)
    tasks: Mapping[str, Mapping[str, float]] = field(default_factory=dict)
