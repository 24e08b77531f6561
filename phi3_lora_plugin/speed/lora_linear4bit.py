"""The fused LoRA function over a 4-bit base: unpacked once in each direction, into one buffer for all layers.

bitsandbytes allocates an unpacked weight in each call and keeps a copy of the result; PEFT clones it once more.
"""

# Imports what needs bitsandbytes; imported only inside functions, and only where it is installed.
from __future__ import annotations

from functools import partial
from typing import Any

import bitsandbytes as bnb  # noqa: TID253
import torch  # noqa: TID253
from peft.tuners.lora.bnb import Linear4bit as PeftLinear4bit  # noqa: TID253

from phi3_lora_plugin.speed.lora_linear import Part, apply, computed_in, part_of, parts_obstacle, single_adapter
from phi3_lora_plugin.speed.shards import say_once

#: One buffer a device, dtype and stream, as large as the largest weight met.
_scratch: dict[tuple[torch.device, torch.dtype, int], torch.Tensor] = {}

_FEW_ROWS = 1536  # up to which bitsandbytes (0.50, `gemm_4bit`) has products that need no unpacked weight


class FusedLoraLinear4bit(PeftLinear4bit):  # type: ignore[misc]
    """PEFT's LoRA layer over `bnb.nn.Linear4bit` with the fused function; anything unusual takes PEFT's own."""

    def forward(self, x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        """x [..., in] -> [..., out]."""
        out = None if args or kwargs else self.fast(x)
        return super().forward(x, *args, **kwargs) if out is None else out

    def fast(self, x: torch.Tensor) -> torch.Tensor | None:
        """As `FusedLoraLinear.fast`."""
        adapter, dtype = single_adapter(self), computed_in(x)
        compute = self.base_layer.compute_dtype or dtype
        if adapter is None or (part := self.part(adapter, compute)) is None:
            return None
        return apply(self, adapter, x.to(compute), part).to(dtype)

    def part(self, adapter: str, dtype: torch.dtype) -> Part | None:
        """As `FusedLoraLinear.part`."""
        base = self.base_layer
        state = getattr(base.weight, "quant_state", None)
        if not _known(base, state) or (base.compute_dtype or dtype) != dtype:
            return None
        if obstacle := parts_obstacle(self, adapter):
            say_once(f"lora: PEFT's forward runs in layers with {obstacle}")
            return None
        bias = None if base.bias is None else base.bias.to(dtype)
        unpack = partial(_unpacked, base.weight, state, dtype)
        return part_of(self, adapter, base.weight, bias, unpack, partial(_times, base.weight, state, bias))


def _known(base: Any, state: Any) -> bool:
    """Whether the weight is packed the way that is meant here: not yet quantised, or repacked for a CPU, it is not."""
    return (
        type(base) is bnb.nn.Linear4bit
        and not (base._forward_pre_hooks or base._forward_hooks or "forward" in base.__dict__)
        and state is not None
        and state.dtype in (torch.float16, torch.bfloat16, torch.float32)
        and not getattr(state, "packing_format_for_cpu", False)
    )


def _times(weight: torch.Tensor, state: Any, bias: torch.Tensor | None, x: torch.Tensor) -> torch.Tensor | None:
    """bitsandbytes' product for few rows, which unpacks on the way where that is faster on this card."""
    if not weight.is_cuda or len(x) > _FEW_ROWS or x.dtype != state.dtype:
        return None
    made: torch.Tensor = bnb.matmul_4bit(x, weight.detach(), quant_state=state, bias=bias)
    return made


def _unpacked(weight: torch.Tensor, state: Any, dtype: torch.dtype) -> torch.Tensor:
    """[out, in] in `dtype`; good until the next call on the same stream."""
    out = None
    if weight.is_cuda:  # bitsandbytes' CPU backend takes no buffer
        size = state.shape.numel()
        place = weight.device, state.dtype, _stream(weight.device)
        if place not in _scratch or _scratch[place].numel() < size:
            _scratch[place] = torch.empty(size, device=weight.device, dtype=state.dtype)
        out = _scratch[place][:size].view(state.shape)
    unpacked: torch.Tensor = bnb.functional.dequantize_4bit(weight.detach(), state, out=out)
    return unpacked.to(dtype)


def _stream(device: torch.device) -> int:
    """The stream that works on the device now: what one stream reads, another must not write over."""
    return int(torch.cuda.current_stream(device).cuda_stream) if torch.cuda.is_available() else 0
