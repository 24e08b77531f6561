"""Imports each library and looks at devices, in a child: `python -m phi3_lora_plugin.doctor.probe NAME...`.

A line of JSON for each step, and one before it, so that whoever reads knows where the process was when it died.
"""

from __future__ import annotations

import contextlib
import sys
import time
import warnings
from importlib import import_module
from typing import Any

from phi3_lora_plugin.doctor.child import teller
from phi3_lora_plugin.plugins.contain import describe


def main(names: list[str]) -> None:
    """Import each module of `names`; after torch, look at devices."""
    tell = teller()
    warnings.simplefilter("ignore")
    works = set()
    for name in names:
        tell(dict(begins=name))
        start = time.perf_counter()
        try:
            import_module(name)
        except KeyboardInterrupt:
            raise
        except BaseException as error:  # a library may even end the process; whatever it is, it is told
            tell(dict(library=name, error=describe(error), missing=getattr(error, "name", None)))
        else:
            works.add(name)
            tell(dict(library=name, seconds=round(time.perf_counter() - start, 2)))
    if "torch" in works:
        tell(dict(begins="devices"))
        try:
            tell(dict(devices=_devices("bitsandbytes" in works)))
        except Exception as error:
            tell(dict(devices=[], error=describe(error)))


def _devices(nf4: bool) -> list[dict[str, Any]]:
    """Each device with what a run on it gets."""
    import torch

    from phi3_lora_plugin.model.base_size import BaseSize
    from phi3_lora_plugin.model.device import KINDS, read_device, with_probe
    from phi3_lora_plugin.model.folder import ModelError
    from phi3_lora_plugin.model.precision import choose

    flash = _has("flash_attn")
    found: list[dict[str, Any]] = []
    for kind in KINDS:
        try:
            device = with_probe(read_device(kind))
        except ModelError:
            continue
        base = BaseSize(3_800_000_000, "bfloat16")
        precision = choose("auto", device, base)
        kernels = ["flash_attention_2"] if flash and device.flash else []
        fast = ["norm, rotation and gate by Triton"] if kind == "cuda" and _has("triton") else []
        fast += (
            ["packs by varlen_attn"] if kind == "cuda" and device.flash and _has("torch.nn.attention.varlen") else []
        )
        row = {
            "kind": kind,
            "name": _name(kind),
            "weights": precision.weights,
            "mixed": precision.mixed,
            "attention": ["sdpa", *kernels],
            "fast": fast or ["fast paths in plain PyTorch"],
            "nf4": nf4,
            "notes": list(precision.notes),
        }
        if kind == "cuda":
            cards = [torch.cuda.get_device_properties(index) for index in range(torch.cuda.device_count())]
            row["cards"] = [
                {"name": card.name, "memory": card.total_memory, "capability": f"{card.major}.{card.minor}"}
                for card in cards
            ]
        found.append(row)
    found.append({"kind": "torch", "cuda": torch.version.cuda, "hip": torch.version.hip, "version": torch.__version__})
    return found


def _name(kind: str) -> str:
    import platform

    import torch

    if kind == "cuda":
        return str(torch.cuda.get_device_name(0))
    with contextlib.suppress(Exception):
        if kind == "xpu":
            return str(torch.xpu.get_device_name(0))
    return f"{platform.processor() or platform.machine()}, {torch.get_num_threads()} threads"


def _has(name: str) -> bool:
    from importlib.util import find_spec

    with contextlib.suppress(ImportError, ValueError):
        return find_spec(name) is not None
    return False


if __name__ == "__main__":
    main(sys.argv[1:])
