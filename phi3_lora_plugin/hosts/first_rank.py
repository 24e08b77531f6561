"""What is said once for a whole run, however many processes it has."""

from __future__ import annotations

import os
import sys


def say(sentence: str) -> None:
    """Print a sentence on stderr, in the first process of a run alone."""
    if os.environ.get("RANK", "0") == "0":
        print(f"phi3-lora: {sentence}", file=sys.stderr, flush=True)
