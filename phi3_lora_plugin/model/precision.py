"""Which dtype the frozen weights have, and which one training computes in: decided here and nowhere else.

Adapters are float32 in every case. The decision is a pure function of the device, of the size of the base, and of what
the recipe asks for, so that it can be looked at for a card that is not here.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from phi3_lora_plugin.model.base_size import BaseSize, base_size
from phi3_lora_plugin.model.device import Device, elsewhere, read_device, with_probe

if TYPE_CHECKING:
    from phi3_lora_plugin.recipe.sections import ModelSection

#: From this size on a base keeps 16 bits on a CPU: in float32 Phi-3-mini takes 15 GB before the first token.
LARGE = 1_000_000_000


@dataclass(frozen=True)
class Precision:
    """How a base is held and trained.

    Attributes:
        weights: dtype of the frozen weights, and the one that NF4 weights are multiplied in.
        mixed: what training computes in by autocast: "bf16", "fp16" (with a loss scaler), or "no" (as the weights).
        notes: what is slow on this device, one sentence each.
    """

    weights: Literal["float32", "bfloat16", "float16"]
    mixed: Literal["no", "bf16", "fp16"]
    notes: tuple[str, ...] = ()

    @property
    def torch_dtype(self) -> Any:
        """`weights` as torch's dtype."""
        import torch

        return getattr(torch, self.weights)

    @property
    def arguments(self) -> dict[str, bool]:
        """`mixed` as arguments of `TrainingArguments`."""
        return {"bf16": self.mixed == "bf16", "fp16": self.mixed == "fp16"}


def choose(asked: str, device: Device, base: BaseSize | None = None, quantize: str = "none") -> Precision:
    """The precision of a run: a pure function of facts.

    Args:
        asked: `model.dtype`: "auto", "float32", "bfloat16" or "float16".
        base: None where it is not known; it then counts as small.
    """
    weights: Any = asked if asked != "auto" else _weights(device, base)
    return Precision(weights, _mixed(weights, device), tuple(_notes(weights, asked, device, quantize)))


def precision_of(
    asked: str, device: Device, model: str | Path, quantize: str = "none", revision: Any = None
) -> Precision:
    """`choose` for a model by its folder or name; looks at what decides and at nothing else."""
    if device.kind != "cpu" or asked == "float32":
        return choose(asked, device, None, quantize)
    base = base_size(str(model), revision)
    return choose(asked, with_probe(device) if asked != "auto" or _large(base) else device, base, quantize)


def precision_for(model: ModelSection, device: Device | None = None) -> Precision:
    """The precision of a recipe's `model` section, on the device that it names if none is given.

    Raises:
        ModelError: that device is not here.
    """
    return precision_of(model.dtype, device or read_device(model.device), model.path, model.quantize, model.revision)


def precision_elsewhere(model: ModelSection) -> Precision:
    """The precision of a `model` section on a machine that is not this one: a current card, or what it names."""
    kind = "cuda" if model.device == "auto" else model.device
    return choose(model.dtype, elsewhere(kind), base_size(model.path, model.revision), model.quantize)


def _large(base: BaseSize | None) -> bool:
    return base is not None and base.parameters > LARGE


def _weights(device: Device, base: BaseSize | None) -> str:
    if device.kind != "cpu":
        return "bfloat16" if device.bfloat16 else "float16"
    if base is None or not _large(base):
        return "float32"
    if device.bfloat16:
        return "bfloat16"
    return base.dtype or "bfloat16"  # its own: converted, it would take twice the memory


def _mixed(weights: str, device: Device) -> Literal["no", "bf16", "fp16"]:
    if weights == "float32":
        return "no"
    if device.kind == "cpu":
        return "bf16"  # accelerate has no loss scaler on a CPU, and bfloat16 needs none
    if weights == "bfloat16":
        return "bf16" if device.bfloat16 else "no"
    return "fp16"


def _notes(weights: str, asked: str, device: Device, quantize: str) -> Iterator[str]:
    if device.kind == "cpu" and weights != "float32" and device.bfloat16 is False:
        yield (
            f"this CPU has no fast 16-bit arithmetic: {weights} halves the memory and takes longer than float32 "
            "(model.dtype: float32)"
        )
    if device.kind == "cuda" and weights == "bfloat16" and not device.bfloat16:
        yield "this card emulates bfloat16, which is slow; model.dtype: auto takes float16 here"
    if device.kind == "cuda" and not device.flash:
        yield "this card has no FlashAttention kernels; SDPA takes its memory-efficient one"
    if device.kind in ("mps", "xpu"):
        name = {"mps": "Apple GPUs (mps)", "xpu": "Intel GPUs (xpu)"}[device.kind]
        yield f"{name} have no FlashAttention kernels here and no fused attention across packed rows"
        if device.kind == "mps" and weights == "bfloat16":
            yield "M1 and M2 emulate bfloat16; model.dtype: float16 is faster there and needs a loss scaler"
        if quantize != "none":
            yield f"quantize: {quantize} has no fast kernels on {device.kind}"
