"""Facts about the device that a model runs on, read in one place; what follows from them is decided in `precision`."""

from __future__ import annotations

import time
from dataclasses import dataclass, replace
from functools import cache
from typing import Any

from phi3_lora_plugin.model.folder import ModelError

KINDS = ("cpu", "cuda", "mps", "xpu")
_TITLES = {"cuda": "CUDA", "mps": "MPS (Apple)", "xpu": "XPU (Intel)"}
#: bfloat16 has to take at most this share of float32's time to count as what a CPU computes in.
_FASTER = 0.8


@dataclass(frozen=True)
class Device:
    """What decides about dtypes and kernels.

    Attributes:
        kind: "cpu", "cuda", "mps" or "xpu".
        bfloat16: it computes in bfloat16 itself, not by emulation (CUDA: compute capability 8.0). On a CPU: faster than
            in float32. None: not looked at; only `with_probe` does, since it takes a few milliseconds.
        capability: of a CUDA card, such as (7, 5) for a T4; None for other devices and for cards of other machines.
    """

    kind: str
    bfloat16: bool | None
    capability: tuple[int, int] | None = None

    @property
    def flash(self) -> bool:
        """Whether FlashAttention's kernels can run: CUDA cards from 8.0 on (github.com/Dao-AILab/flash-attention)."""
        return self.kind == "cuda" and (self.capability is None or self.capability >= (8, 0))


def read_device(wanted: str = "auto") -> Device:
    """The device that `model.device` means on this machine; "auto" is the accelerator if there is one.

    Raises:
        ModelError: `wanted` is not here.
    """
    kind = next((kind for kind in KINDS[1:] if _is_here(kind)), "cpu") if wanted == "auto" else wanted
    if kind not in KINDS:
        raise ModelError(f"model.device: {kind!r} is not a device; available: auto, {', '.join(KINDS)}")
    if kind != "cpu" and not _is_here(kind):
        raise ModelError(f"model.device: {kind}, but torch sees no {_TITLES[kind]} device; write auto or cpu")
    if kind == "cuda":
        return _cuda()
    return Device(kind, None if kind == "cpu" else _supports_bfloat16(kind))


def elsewhere(kind: str) -> Device:
    """A device that need not be here, as most of its kind are: what a plan for another machine assumes."""
    return Device(kind, None if kind == "cpu" else True)


def with_probe(device: Device) -> Device:
    """The device with `bfloat16` known: on a CPU a pair of matrix products is timed."""
    return device if device.bfloat16 is not None else replace(device, bfloat16=_cpu_is_faster_in_bfloat16())


def _is_here(kind: str) -> bool:
    import torch

    if kind == "mps":
        return bool(torch.backends.mps.is_available())
    return bool(getattr(torch, kind).is_available())


def _cuda() -> Device:
    import torch

    capability: tuple[int, int] | None = None
    try:
        major, minor = torch.cuda.get_device_capability()
        capability = (int(major), int(minor))
    except (AssertionError, RuntimeError):
        pass  # then is_bf16_supported alone decides
    return Device("cuda", (capability is None or capability >= (8, 0)) and _supports_bfloat16("cuda"), capability)


def _supports_bfloat16(kind: str) -> bool:
    """What torch reports; True if its own check fails, since the compute capability was checked before."""
    import torch

    if kind == "mps":
        return bool(torch.backends.mps.is_macos_or_newer(14, 0))
    ask: Any = getattr(torch, kind).is_bf16_supported
    try:
        return bool(ask(including_emulation=False))
    except TypeError:
        return bool(ask())
    except (AssertionError, RuntimeError):
        return True


@cache
def _cpu_is_faster_in_bfloat16() -> bool:
    """Whether a bfloat16 product beats the float32 one: instructions (AMX, AVX512-BF16) and oneDNN's use of them."""
    import torch

    def seconds(dtype: Any) -> float:
        rows, weight = torch.ones(256, 1024, dtype=dtype), torch.ones(1024, 1024, dtype=dtype)
        times = []
        for _ in range(4):  # the first one prepares the kernel
            start = time.perf_counter()
            torch.nn.functional.linear(rows, weight)
            times.append(time.perf_counter() - start)
        return min(times[1:])

    with torch.inference_mode():
        return seconds(torch.bfloat16) <= _FASTER * seconds(torch.float32)


def device_name(device: Any) -> str:
    """What a `torch.device` is: the name of the card, or its kind."""
    import torch

    return str(torch.cuda.get_device_name(device)) if device.type == "cuda" else _TITLES.get(device.type, "CPU")


def peak_memory(device: Any) -> int | None:
    """Bytes that torch held at most on a `torch.device` so far, on a CPU those of the whole process; None: unknown."""
    import torch

    if device.type in ("cuda", "xpu"):
        return int(getattr(torch, device.type).max_memory_allocated(device))
    if device.type == "mps":
        return int(torch.mps.driver_allocated_memory())  # now, which on MPS hardly ever shrinks
    if device.type != "cpu":
        return None
    import psutil

    try:
        import resource
    except ImportError:  # Windows
        return int(psutil.Process().memory_info().peak_wset)
    return int(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss) * (1 if psutil.MACOS else 1024)
