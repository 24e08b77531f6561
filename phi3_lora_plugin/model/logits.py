"""How near the logits of two copies of a model have to be."""

from __future__ import annotations

#: Largest difference of logits that a dtype's rounding explains, as a share of the largest logit (or of 1).
TOLERANCE = {"float32": 1e-4, "bfloat16": 0.05, "float16": 0.01}


def logit_limit(dtype: str, largest: float) -> float:
    """The largest difference allowed between logits computed in `dtype`; `largest` is the largest logit."""
    return TOLERANCE.get(dtype, TOLERANCE["bfloat16"]) * max(1.0, largest)
