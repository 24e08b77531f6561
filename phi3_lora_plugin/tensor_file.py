"""A safetensors file streamed from tensors that exist, where the library would first copy all of it into one string."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor

#: The types of adapters, in the order in which the format has them in a file.
_TYPES = {"torch.float64": "F64", "torch.float32": "F32", "torch.bfloat16": "BF16", "torch.float16": "F16"}
_METADATA = {"format": "pt"}
#: Bytes below which it takes longer to ask a tensor where its memory is than to copy it.
_SMALL = 1 << 16


@dataclass(frozen=True, eq=False)
class TensorFile:
    """The bytes that `safetensors.torch.save` makes of CPU tensors; iterating gives them piece by piece, uncopied.

    The format is a length of 8 bytes, a header in JSON padded to 8 bytes, and the tensors as they lie in memory
    (huggingface/safetensors, README, "Format").
    """

    tensors: Mapping[str, Tensor]

    def __iter__(self) -> Iterator[Any]:
        import sys

        from safetensors.torch import save

        types = {dtype: str(dtype) for dtype in {tensor.dtype for tensor in self.tensors.values()}}
        if not _TYPES.keys() >= set(types.values()) or sys.byteorder != "little":
            yield save({name: tensor.contiguous() for name, tensor in self.tensors.items()}, metadata=_METADATA)
            return
        header: dict[str, Any] = {"__metadata__": _METADATA}
        ordered: list[Tensor] = []
        end = 0
        for dtype in sorted(types, key=lambda dtype: list(_TYPES).index(types[dtype])):
            for name in sorted(name for name, tensor in self.tensors.items() if tensor.dtype == dtype):
                tensor = self.tensors[name]
                begin, end = end, end + tensor.nbytes
                header[name] = {
                    "dtype": _TYPES[types[dtype]],
                    "shape": list(tensor.shape),
                    "data_offsets": [begin, end],
                }
                ordered.append(tensor)
        text = json.dumps(header, ensure_ascii=False, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)
        yield len(text).to_bytes(8, "little") + text
        yield from _memory(ordered)


def _memory(tensors: Sequence[Tensor]) -> Iterator[Any]:
    """The bytes of tensors where they lie; small ones, and those with gaps, are copied together first."""
    import torch

    for alike, group in groupby(tensors, key=lambda tensor: (tensor.dtype, tensor.nbytes < _SMALL)):
        flat = [tensor.reshape(-1) for tensor in group]
        for part in [torch.cat(flat)] if alike[1] else flat:
            yield memoryview(part.detach().view(torch.uint8).numpy())
