"""`python -m benchmarks.gpu`: prove this package on the card at hand, in one process and under eight minutes.

    python -m benchmarks.gpu --out bench-out            # on a card, with whatever is installed
    python -m benchmarks.gpu --parts 0 1a 1b            # correctness alone
    python -m benchmarks.gpu --tiny                     # the same code on a CPU, in tiny sizes

Correctness comes first (1a, 1b), then speed (2), then the profile and `plan` (3). Each fact is checked by itself: one
that fails or runs out of memory does not end the others, and one whose time no longer fits is skipped. A line of JSON
a part is written as it ends, to `gpu.jsonl` and to the screen; the table comes last. The exit code is 1 if any FAILed.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict
from importlib import import_module
from pathlib import Path
from typing import Any

PACKAGES = (
    "torch", "triton", "transformers", "peft", "accelerate", "trl", "datasets", "bitsandbytes", "liger-kernel",
    "flash-attn", "pydantic",
)  # fmt: skip
MODULES = {"1a": "exactness", "1b": "training", "2": "throughput", "3": "profile"}
PARTS = ("0", *MODULES)


def arguments() -> argparse.ArgumentParser:
    """What may be asked for on the command line."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu", description=__doc__.split("\n", 1)[0])
    parser.add_argument("--parts", nargs="*", default=list(PARTS), choices=PARTS, metavar="PART")
    parser.add_argument("--minutes", type=float, default=8.0, help="after which nothing new is begun")
    parser.add_argument("--tiny", action="store_true", help="tiny sizes, on the CPU: to see that the command works")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path("bench-out"))
    return parser


def main() -> int:
    """Check what was asked for; 0 only if nothing failed."""
    chosen = arguments().parse_args()
    os.environ |= {"HF_HUB_OFFLINE": "1", "CI": "1", "TRANSFORMERS_VERBOSITY": "error"}
    os.environ.setdefault("CUDA_VISIBLE_DEVICES", "0")  # a Trainer takes every card it sees
    os.environ.setdefault("PYTORCH_CUDA_ALLOC_CONF", "expandable_segments:True")  # before the first allocation
    import torch

    from benchmarks.gpu.facts import Clock, Fact, Setup, check

    if not chosen.tiny and not torch.cuda.is_available():
        print("no CUDA device found; --tiny runs the same code on the CPU, in tiny sizes", file=sys.stderr)
        return 2
    clock = Clock(60 * chosen.minutes)
    chosen.out.mkdir(parents=True, exist_ok=True)
    facts: dict[str, list[Fact]] = {}
    with tempfile.TemporaryDirectory() as folder, (chosen.out / "gpu.jsonl").open("w") as lines:
        device = torch.device("cpu" if chosen.tiny else "cuda:0")
        setup = Setup(device, chosen.tiny, Path(folder), chosen.seed)
        for part in chosen.parts:
            begun = time.monotonic()
            try:
                wanted = checks(part)(setup)
                facts[part] = [check(one, setup, clock) for one in wanted]
            except Exception as error:  # what a part needs cannot be imported, or it is wrong before its first fact
                facts[part] = [Fact(f"part {part}", False, f"{type(error).__name__}: {error}", 0.0)]
            line = {"part": part, "seconds": round(time.monotonic() - begun, 1)}
            line |= {"facts": [asdict(fact) for fact in facts[part]]}
            print(json.dumps(line), file=lines, flush=True)
            print(json.dumps(_short(line)), flush=True)
    return table(facts, chosen.out / "gpu.jsonl")


def checks(part: str) -> Callable[[Any], list[Any]]:
    """The checks of a part; imported only now, so that one part that cannot be imported leaves the others."""
    if part == "0":
        return here
    made: Callable[[Any], list[Any]] = import_module(f"benchmarks.gpu.{MODULES[part]}").checks
    return made


def here(setup: Any) -> list[Any]:
    """Part 0: what is installed, which card it is, and which code will run on it."""
    from benchmarks.gpu.facts import Check

    return [Check("versions", 0, _versions), Check("card", 0, _card), Check("which code runs", 15, _applied)]


def _versions(setup: Any) -> Any:
    from benchmarks.gpu.facts import Found
    from benchmarks.machine import versions

    found = versions(PACKAGES)
    missing = [package for package, known in found.items() if known is None]
    said = ", ".join(f"{package} {known}" for package, known in found.items() if known)
    said += f"; without {', '.join(missing)}" if missing else ""
    return Found(True, f"Python {platform.python_version()}, {said}", found)


def _card(setup: Any) -> Any:
    import torch

    from benchmarks.cards import card_of
    from benchmarks.gpu.facts import Found

    if setup.device.type != "cuda":
        return Found(True, f"none: {os.cpu_count()} cores of {platform.processor() or platform.machine()}")
    facts = torch.cuda.get_device_properties(setup.device)
    known = card_of(facts.name)
    said = f"{facts.name}, {facts.total_memory / 1e9:.0f} GB, capability {facts.major}.{facts.minor}, "
    said += f"CUDA {torch.version.cuda}, {facts.multi_processor_count} multiprocessors"
    said += "" if known else "; its peak is not in benchmarks/cards.py, so no MFU is given"
    return Found(True, said, {"name": facts.name, "memory": facts.total_memory, "free": torch.cuda.mem_get_info()[0]})


def _applied(setup: Any) -> Any:
    """The lines of `speed: auto` on this device for a model in 16 bits, and for one with a window and shared keys."""
    from benchmarks.gpu.facts import Found
    from benchmarks.gpu.models import shapes, small_model
    from phi3_lora_plugin.speed.apply import speed_up

    lines = {}
    for name in ("heads of 96", "window"):
        applied = speed_up(small_model(setup, setup.half, **shapes(setup)[name]))
        lines[name] = [str(one) for one in applied]
    off = [line for line in lines["heads of 96"] if ": off" in line]
    return Found(not off, "; ".join(lines["heads of 96"]), lines)


def _short(line: dict[str, Any]) -> dict[str, Any]:
    """For the screen: without figures, which are in the file."""
    kept = ("name", "ok", "said", "seconds")
    facts = [{key: round(fact[key], 1) if key == "seconds" else fact[key] for key in kept} for fact in line["facts"]]
    return line | {"facts": facts}


def table(facts: dict[str, list[Any]], file: Path) -> int:
    """Print every fact and how many hold; the exit code."""
    print()
    for part, some in facts.items():
        for fact in some:
            print(f"{part:<4}{fact}")
    every = [fact for some in facts.values() for fact in some]
    failed, left = sum(fact.ok is False for fact in every), sum(fact.ok is None for fact in every)
    print(f"\n{len(every) - failed - left} PASS, {failed} FAIL, {left} skipped; figures: {file}")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
