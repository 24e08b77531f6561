"""A safetensors file streamed from tensors that exist, where the library would first copy all of it into one string."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor

#: The types of adapters, in the order in which the format has them in a file.
_TYPES = {"torch.float64": "F64", "torch.float32": "F32", "torch.bfloat16": "BF16", "torch.float16": "F16"}
_METADATA = {"format": "pt"}


@dataclass(frozen=True, eq=False)
class TensorFile:
    """The bytes that `safetensors.torch.save` makes of CPU tensors; calling it writes them into a stream.

    The format is a length of 8 bytes, a header in JSON padded to 8 bytes, and the tensors as they lie in memory
    (huggingface/safetensors, README, "Format").
    """

    tensors: Mapping[str, Tensor]

    def __call__(self, stream: Any) -> None:
        for part in self._parts():
            stream.write(part)

    def to_bytes(self) -> bytes:
        """All of it at once."""
        return b"".join(self._parts())

    def _parts(self) -> Iterator[Any]:
        import sys

        from safetensors.torch import save

        plain = all(str(tensor.dtype) in _TYPES for tensor in self.tensors.values())
        if not plain or sys.byteorder != "little":
            yield save({name: tensor.contiguous() for name, tensor in self.tensors.items()}, metadata=_METADATA)
            return
        order = list(_TYPES)
        names = sorted(self.tensors, key=lambda name: (order.index(str(self.tensors[name].dtype)), name))
        header: dict[str, Any] = {"__metadata__": _METADATA}
        end = 0
        for name in names:
            tensor = self.tensors[name]
            begin, end = end, end + tensor.numel() * tensor.element_size()
            header[name] = {
                "dtype": _TYPES[str(tensor.dtype)],
                "shape": list(tensor.shape),
                "data_offsets": [begin, end],
            }
        text = json.dumps(header, ensure_ascii=False, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)
        yield len(text).to_bytes(8, "little") + text
        for name in names:
            yield _memory(self.tensors[name])


def _memory(tensor: Tensor) -> Any:
    """The bytes of a tensor where they lie; of one with gaps, of a copy."""
    import torch

    return memoryview(tensor.detach().contiguous().reshape(-1).view(torch.uint8).numpy())
