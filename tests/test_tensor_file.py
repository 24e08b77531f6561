"""Streamed safetensors files are byte for byte what the library makes, and as its own reader wants them."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from safetensors.torch import load, save

from phi3_lora_plugin.store.tensor_file import TensorFile


def tensors(*types: torch.dtype) -> dict[str, Any]:
    """Names and shapes of every kind: long, short, scalar, empty, not contiguous, not ASCII, in no order."""
    made = {}
    for number, kind in enumerate(types):
        made |= {
            f"z.{number}.lora_A.weight": torch.randn(3, 5).to(kind),
            f"a.{number}.lora_B.weight": torch.randn(5, 3).to(kind).t(),
            f'größe.{number}\n"quoted"': torch.randn(()).to(kind),
            f"empty.{number}": torch.zeros(0, 4).to(kind),
        }
    return made


@pytest.mark.parametrize(
    "types",
    [
        (torch.float32,),
        (torch.bfloat16,),
        (torch.float16, torch.bfloat16, torch.float64, torch.float32),
        (torch.float32, torch.float8_e4m3fn),  # not a type of adapters: made by the library itself
    ],
    ids=str,
)
def test_bytes_are_the_librarys(types: tuple[torch.dtype, ...]) -> None:
    state = tensors(*types)
    expected = save({name: tensor.contiguous() for name, tensor in state.items()}, metadata={"format": "pt"})
    assert any(not tensor.is_contiguous() for tensor in state.values())
    written = b"".join(TensorFile(state))
    assert written == expected
    assert {name: tuple(tensor.shape) for name, tensor in load(written).items()} == {
        name: tuple(tensor.shape) for name, tensor in state.items()
    }


def test_parameters_that_are_views_of_one_buffer_are_written_each_for_itself() -> None:
    """Optimizers over one flat tensor leave such parameters behind, which the library refuses."""
    flat = torch.arange(12.0)
    state = {"one": flat[:6].view(2, 3).requires_grad_(), "two": flat[6:].view(3, 2)}
    found = load(b"".join(TensorFile(state)))
    assert torch.equal(found["one"], flat[:6].view(2, 3)) and torch.equal(found["two"], flat[6:].view(3, 2))
