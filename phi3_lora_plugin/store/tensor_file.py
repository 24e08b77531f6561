"""A safetensors file streamed from tensors that exist, where the library would first copy all of it into one string."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator, Mapping, Sequence
from ctypes import c_char
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor

#: The dtypes of adapters, in the order that the format gives them in a file.
_TYPES = {"torch.float64": "F64", "torch.float32": "F32", "torch.bfloat16": "BF16", "torch.float16": "F16"}
_METADATA = {"format": "pt"}


@dataclass(frozen=True, eq=False)
class TensorFile:
    """The bytes that `safetensors.torch.save` makes of CPU tensors; iterating gives them piece by piece, uncopied.

    The format is a length of 8 bytes, a header in JSON padded to 8 bytes, and the tensors as they are in memory
    (huggingface/safetensors, README, "Format").
    """

    tensors: Mapping[str, Tensor]

    def __iter__(self) -> Iterator[Any]:
        types = {str(dtype) for dtype in {tensor.dtype for tensor in self.tensors.values()}}
        if not _TYPES.keys() >= types or sys.byteorder != "little":
            from safetensors.torch import save

            yield save({name: tensor.contiguous() for name, tensor in self.tensors.items()}, metadata=_METADATA)
            return
        header, names = _header(self.tensors)
        yield header
        yield from (_memory(tensor) for name in names if (tensor := self.tensors[name]).nbytes)


def _header(tensors: Mapping[str, Tensor]) -> tuple[bytes, Sequence[str]]:
    """The length and header of a file of these tensors, and their names in its order."""
    header: dict[str, Any] = {"__metadata__": _METADATA}
    end = 0
    kinds = list(_TYPES)
    names = sorted(tensors, key=lambda name: (kinds.index(str(tensors[name].dtype)), name))
    for name in names:
        tensor = tensors[name]
        begin, end = end, end + tensor.nbytes
        header[name] = {"dtype": _TYPES[str(tensor.dtype)], "shape": list(tensor.shape), "data_offsets": [begin, end]}
    text = json.dumps(header, ensure_ascii=False, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text, names


def _memory(tensor: Tensor) -> Any:
    """The bytes of a tensor, uncopied: `tensor.numpy()` takes seven times as long, and has no bfloat16."""
    whole = tensor if tensor.is_contiguous() else tensor.detach().contiguous()
    piece: Any = (c_char * whole.nbytes).from_address(whole.data_ptr())
    piece.owner = whole  # so that the memory stays for as long as the piece is in use
    return piece
