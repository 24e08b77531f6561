"""What each preset of ours takes, planned once and shipped, so that a list of presets needs neither torch nor seconds.

`tools/plan_presets.py` writes `presets.json`; tests/test_plan_presets.py holds it to the presets and to `plan`.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import cache
from importlib.resources import files


@dataclass(frozen=True)
class Need:
    """What a preset takes at rows of its full length.

    Attributes:
        device: that the plan is for: "cpu", "cuda" or "mps".
        peak: bytes of the device's memory at most; where `auto` decides on checkpointing, with all layers recomputed.
        margin: share of the device's memory that a plan leaves free.
    """

    device: str
    peak: int
    margin: float

    def fits_into(self, memory: int) -> bool:
        """Whether a device of `memory` bytes is enough, as `phi3-lora plan` decides it."""
        return self.peak <= memory * (1 - self.margin)


@cache
def preset_needs() -> dict[str, Need]:
    """The needs of the presets of this package, by name."""
    table = json.loads((files(__package__) / "presets.json").read_text(encoding="utf-8"))
    return {name: Need(row["device"], row["peak"], row["margin"]) for name, row in table.items()}
