"""A fact that is checked on a card: what it is, how long it takes, and what came of it. Nothing here ends a command."""

from __future__ import annotations

import gc
import time
import traceback
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch

from benchmarks.jobs import out_of_memory


class LeftOut(Exception):
    """A fact that cannot be checked here; the message gives the reason."""


@dataclass(frozen=True)
class Setup:
    """Where facts are checked: on a card in real sizes, or on a CPU in tiny ones, by the same code."""

    device: torch.device
    tiny: bool
    folder: Path
    seed: int = 0

    @property
    def half(self) -> torch.dtype:
        """The 16 bits that this device computes in."""
        if self.device.type != "cuda" or torch.cuda.is_bf16_supported(including_emulation=False):
            return torch.bfloat16
        return torch.float16

    def small(self, tiny: Any, real: Any) -> Any:
        """One of two sizes."""
        return tiny if self.tiny else real


@dataclass(frozen=True)
class Found:
    """What a check found: whether it holds, in words and in figures."""

    ok: bool
    said: str
    figures: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Check:
    """One fact, and about how many seconds it takes on an H100."""

    name: str
    seconds: float
    run: Callable[[Setup], Found]


@dataclass(frozen=True)
class Fact:
    """A check that has ended: `ok` is None where it was skipped."""

    name: str
    ok: bool | None
    said: str
    seconds: float
    figures: Mapping[str, Any] = field(default_factory=dict)

    def __str__(self) -> str:
        return f"{'skipped' if self.ok is None else 'PASS' if self.ok else 'FAIL':<9}{self.name}: {self.said}"


class Clock:
    """Seconds that are left of a command's time."""

    def __init__(self, seconds: float) -> None:
        self.begun, self.seconds = time.monotonic(), seconds

    @property
    def left(self) -> float:
        return self.seconds - (time.monotonic() - self.begun)


def check(one: Check, setup: Setup, clock: Clock) -> Fact:
    """Run a check unless its time no longer fits; whatever it raises is a fact too."""
    if one.seconds > clock.left:
        said = f"takes about {one.seconds:.0f} s, and {max(0.0, clock.left):.0f} s are left"
        return Fact(one.name, None, said, 0.0)
    begun = time.monotonic()
    ok: bool | None = False
    figures: Mapping[str, Any] = {}
    try:
        found = one.run(setup)
        ok, said, figures = found.ok, found.said, found.figures
    except LeftOut as reason:
        ok, said = None, str(reason)
    except Exception as error:  # one that fails must not keep the others from being checked
        kind = "out of memory" if out_of_memory(error) else type(error).__name__
        said = f"{kind}: {(str(error).splitlines() or [''])[0][:200]}"
        figures = {"traceback": traceback.format_exc(limit=-4)}
    free(setup.device)
    return Fact(one.name, ok, said, time.monotonic() - begun, figures)


def free(device: torch.device) -> None:
    """Free memory that is not in use any more."""
    if device.type == "cuda":
        gc.collect()
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()


def installed(*packages: str) -> None:
    """Raise `LeftOut` with the first of these packages that is not installed."""
    for package in packages:
        if find_spec(package) is None:
            raise LeftOut(f"{package} is not installed")
