"""The fused LoRA function over a 4-bit base: unpacked once in each direction, into buffers that all layers share.

bitsandbytes allocates an unpacked weight in each call and keeps a copy of the result; PEFT clones it once more. On a
card where that was found right and faster (see proved_prefetch.py), the next weight is unpacked beside a product.
"""

# Imports what needs bitsandbytes; imported only inside functions, and only where it is installed.
from __future__ import annotations

import weakref
from functools import partial
from typing import Any

import bitsandbytes as bnb  # noqa: TID253
import torch  # noqa: TID253
from peft.tuners.lora.bnb import Linear4bit as PeftLinear4bit  # noqa: TID253

from phi3_lora_plugin.speed.elementwise import Unnormed
from phi3_lora_plugin.speed.lora_linear import Part, apply, computed_in, part_of, parts_obstacle, single_adapter
from phi3_lora_plugin.speed.prefetch import Buffers, Packed
from phi3_lora_plugin.speed.shards import hooked, say_once, shard_obstacle

#: Buffers of a device, dtype and stream, as large as the largest weight met: what one stream reads, another must not
#: write over.
_buffers: dict[tuple[torch.device, torch.dtype, int], Buffers] = {}
#: Weights that may be unpacked before they are asked for: name -> (the weight, where its memory was then).
_ahead: dict[int, tuple[Any, int]] = {}

_FEW_ROWS = 1536  # up to which bitsandbytes (0.50, `gemm_4bit`) has products that need no unpacked weight


class FusedLoraLinear4bit(PeftLinear4bit):  # type: ignore[misc]
    """PEFT's LoRA layer over `bnb.nn.Linear4bit` with the fused function; anything unusual takes PEFT's own."""

    def forward(self, x: torch.Tensor, *args: Any, unnormed: Unnormed | None = None, **kwargs: Any) -> torch.Tensor:
        """As `FusedLoraLinear.forward`."""
        out = None if args or kwargs else self.fast(x, unnormed)
        return super().forward(x, *args, **kwargs) if out is None else out

    def fast(self, x: torch.Tensor, unnormed: Unnormed | None = None) -> torch.Tensor | None:
        """As `FusedLoraLinear.fast`."""
        adapter, dtype = single_adapter(self), computed_in(x)
        compute = self.base_layer.compute_dtype or dtype
        if adapter is None or (part := self.part(adapter, compute)) is None:
            return None
        return apply(self, adapter, x.to(compute), part, unnormed).to(dtype)

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
        and not (hooked(base) or "forward" in base.__dict__)
        and (base.bias is None or not base.bias.requires_grad)
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
    if not _buffered(weight):
        made: torch.Tensor = bnb.functional.dequantize_4bit(weight.detach(), state)
        return made.to(dtype)
    packed = Packed(weight, state, _address(weight), state.shape.numel())
    return buffers_of(weight.device, state.dtype).take(packed).view(state.shape).to(dtype)


def _buffered(weight: torch.Tensor) -> bool:
    """Not on a CPU, whose backend takes no buffer, nor where work is compiled or captured and not done now."""
    if not weight.is_cuda or torch.compiler.is_compiling():
        return False
    return not (torch.cuda.is_initialized() and torch.cuda.is_current_stream_capturing())


def buffers_of(device: torch.device, dtype: torch.dtype) -> Buffers:
    """Those of the stream that works on this device now."""
    from phi3_lora_plugin.speed.card_streams import CardStreams

    initialised = torch.cuda.is_initialized()
    place = device, dtype, int(torch.cuda.current_stream(device).cuda_stream) if initialised else 0
    if place not in _buffers:
        _buffers[place] = Buffers(
            CardStreams(device), partial(_room, device, dtype), _unpack, partial(_known_now, device, dtype)
        )
    return _buffers[place]


def _room(device: torch.device, dtype: torch.dtype, size: int) -> torch.Tensor:
    with torch.inference_mode(False):  # made in an evaluation, it is written to in training
        return torch.empty(size, device=device, dtype=dtype)


def _unpack(packed: Packed, room: torch.Tensor) -> None:
    state = packed.state
    bnb.functional.dequantize_4bit(packed.weight.detach(), state, out=room[: packed.size].view(state.shape))


def unpack_ahead(weight: Any) -> None:
    """From now on this weight may be unpacked before it is asked for: it is whole, on a card, and stays where it is."""
    state = weight.quant_state
    streams = buffers_of(weight.device, state.dtype).streams
    for part in (state, state.state2):
        for tensor in (weight, *(() if part is None else (part.absmax, part.code, part.offset))):
            if tensor is not None:
                streams.keep(tensor)
    name = id(weight)
    _ahead[name] = weakref.ref(weight, lambda _: _ahead.pop(name, None)), _address(weight)


def unpack_in_turn(weight: Any) -> None:
    """Undo `unpack_ahead`."""
    _ahead.pop(id(weight), None)


def let_go() -> None:
    """Hold one buffer a stream until a weight is known beforehand."""
    for buffers in _buffers.values():
        buffers.forget()


def _known_now(device: torch.device, dtype: torch.dtype, name: int) -> Packed | None:
    """The weight of this name as it is now, if it is still the one that `unpack_ahead` was told of."""
    found, address = _ahead.get(name, (None, 0))
    weight: Any = None if found is None else found()
    state = getattr(weight, "quant_state", None)
    if state is None or weight.device != device or state.dtype != dtype or shard_obstacle(weight):
        return None
    return Packed(weight, state, address, state.shape.numel()) if _address(weight) == address else None


def _address(weight: torch.Tensor) -> int:
    return int(weight.data_ptr())
