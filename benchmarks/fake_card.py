"""A fake card: tensors have shapes, dtypes and devices but no values, and every read on the host is noted.

Weights and all that is computed from them are fake (PyTorch's `FakeTensorMode`), so nothing takes memory or time. Whole
numbers that come from the batch (ids, labels, masks, bounds) keep their values as well as their shapes: what a run
decides by them is decided alike here, and a decision that has to wait for the card is recorded with its line.

On a CPU build of PyTorch the fake tensors are on the CPU and claim to be on a card (`is_cuda`), which sends our
code down its CUDA branches, forwards and backwards. A CUDA build can put them on "cuda" itself: then wrong devices are
errors too, but only forwards, as autograd wants a real card.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_leaves, tree_map_only

WHOLE = (torch.bool, torch.int32, torch.int64)
_UNKNOWN = (torch.Tag.data_dependent_output, torch.Tag.dynamic_output_shape)


class Card(TorchDispatchMode):
    """Keeps the values of whole numbers, and notes in `reads` each place where the host waits for the card."""

    def __init__(self, device: str = "cpu") -> None:
        super().__init__()
        self.device = torch.device(device)
        self.fake = FakeTensorMode(allow_non_fake_inputs=True)
        self.reads: list[str] = []
        self.copies: list[str] = []  # from the host to the card, which wait too where memory is not pinned
        self.aside = False
        """Whether operators run on a stream beside the one that computes."""

    def put(self, batch: Any) -> Any:
        """Move the tensors of a batch to the card; they keep their values."""
        return tree_map_only(torch.Tensor, self.placed, batch)

    def seen(self, func: Any, args: Any, kwargs: Any, made: Any) -> None:
        """An operator has run on the card; subclasses count it."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        tensors = [each for each in tree_leaves((args, kwargs)) if isinstance(each, torch.Tensor)]
        fakes = [each for each in tensors if isinstance(each, FakeTensor)]
        known = all(_has_value(each) for each in tensors)
        if not fakes and (tensors or kwargs.get("dtype") in WHOLE or _arange(func, args, kwargs)):
            on_card = self.device.type != "cpu" and torch.device(kwargs.get("device") or "cpu") == self.device
            made = _by_values(func, args, kwargs)
            if on_card:
                self.copies += [_where("copy")] if tensors and not kwargs.get("non_blocking") else []
                made = tree_map_only(torch.Tensor, self.placed, made)
            return made
        if _reads(func, args, kwargs):
            self.reads.append(_where(func.overloadpacket.__name__))
            if known and func.overloadpacket is torch.ops.aten._to_copy:
                made = _by_values(func, args, kwargs)  # on the host now
            elif known:
                made = tree_map_only(torch.Tensor, self.placed, _by_values(func, args, kwargs))
            else:
                made = _guess(func, args, kwargs)
        elif str(func) == "bitsandbytes.dequantize_4bit.out":
            made = _into_buffer(func, args, kwargs)
        else:
            made = func(*args, **kwargs)
            self._keep_values(func, args, kwargs, made, known and bool(fakes))
        self.seen(func, args, kwargs, made)
        return made

    def _keep_values(self, func: Any, args: Any, kwargs: Any, made: Any, known: bool) -> None:
        outs = [each for each in tree_leaves(made) if isinstance(each, FakeTensor)]
        if known and outs:
            values = [each for each in tree_leaves(_by_values(func, args, kwargs)) if isinstance(each, torch.Tensor)]
            for out, value in zip(outs, values, strict=True):
                out._value = value
        else:
            for out in outs:
                out.__dict__.pop("_value", None)  # written in place, with unknown values

    def placed(self, tensor: torch.Tensor) -> torch.Tensor:
        """A tensor on the card with the values of this one, or itself if it is there."""
        if isinstance(tensor, FakeTensor):
            return tensor
        with _disable_current_modes():
            value = tensor.clone()
            with self.fake:
                made = torch.empty_strided(value.shape, value.stride(), dtype=value.dtype, device=self.device)
        made._value = value  # type: ignore[attr-defined]
        return made


def _has_value(tensor: torch.Tensor) -> bool:
    return not isinstance(tensor, FakeTensor) or "_value" in tensor.__dict__


def _arange(func: Any, args: Any, kwargs: Any) -> bool:
    whole = all(isinstance(each, int) for each in args)
    return func.overloadpacket is torch.ops.aten.arange and kwargs.get("dtype") is None and whole


def _by_values(func: Any, args: Any, kwargs: Any) -> Any:
    with _disable_current_modes():
        args, kwargs = tree_map_only(torch.Tensor, lambda each: getattr(each, "_value", each), (args, kwargs))
        return func(*args, **(kwargs | ({"device": torch.device("cpu")} if "device" in kwargs else {})))


def _reads(func: Any, args: Any, kwargs: Any) -> bool:
    """Whether the host has to wait for a value before it knows what comes out."""
    if func.overloadpacket in (torch.ops.aten.index, torch.ops.aten.index_put, torch.ops.aten.index_put_):
        return any(each is not None and each.dtype in (torch.bool, torch.uint8) for each in args[1])
    if func.overloadpacket is torch.ops.aten.repeat_interleave:
        return kwargs.get("output_size") is None
    if func.overloadpacket is torch.ops.aten._to_copy and args[0].device.type != "cpu":
        return torch.device(kwargs.get("device") or args[0].device).type == "cpu"
    return any(tag in func.tags for tag in _UNKNOWN)


def _guess(func: Any, args: Any, kwargs: Any) -> Any:
    """What comes out where the value is not known: losses are ones, and rows are taken by masks that are known."""
    if func is torch.ops.aten._local_scalar_dense.default:
        return False if args[0].dtype == torch.bool else 1.0 if args[0].is_floating_point() else 1
    if func is torch.ops.aten.index.Tensor and args[1][0] is not None and _has_value(args[1][0]):
        mask = getattr(args[1][0], "_value", args[1][0])
        with _disable_current_modes():
            count = int(mask.sum())
        return args[0].new_empty((count, *args[0].shape[mask.dim() :]))
    if not any(tag in func.tags for tag in _UNKNOWN):  # it waits, but for nothing that changes a shape
        return func(*args, **kwargs)
    raise RuntimeError(f"{func} depends on values that are unknown before a real step: {_where('read')}")


def _into_buffer(func: Any, args: Any, kwargs: Any) -> None:
    """bitsandbytes' own rule (0.50) finds a shape unequal to itself."""
    named = dict(zip([each.name for each in func._schema.arguments], args, strict=False)) | kwargs
    out, shape, dtype = named["out"], tuple(named["shape"]), named["dtype"]
    if tuple(out.shape) != shape or out.dtype != dtype:
        raise ValueError(f"a buffer of {tuple(out.shape)} in {out.dtype} for a weight of {shape} in {dtype}")


class _Streams:
    """Both streams of `prefetch`: nothing takes time here, so nothing waits."""

    def __init__(self, card: Card) -> None:
        self._card = card

    def passed(self, beside: bool) -> Any:
        return None

    def wait(self, beside: bool, event: Any) -> None:
        pass

    @contextmanager
    def beside(self) -> Iterator[None]:
        self._card.aside = True
        try:
            yield
        finally:
            self._card.aside = False

    def keep(self, tensor: Any) -> None:
        pass


class _Made(TorchFunctionMode):
    """Whole numbers that are made on the device of another tensor are on the card, which the CPU stands for here."""

    def __init__(self, card: Card) -> None:
        super().__init__()
        self.card = card

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        made = func(*args, **kwargs)
        if kwargs.get("device") is None or self.card.device.type != "cpu":
            return made
        if func is torch.tensor:
            self.card.copies.append(_where("copy"))
        return self.card.placed(made) if isinstance(made, torch.Tensor) and made.dtype in WHOLE else made


_LIBRARIES = ("phi3_lora_plugin", "transformers", "peft", "trl", "liger_kernel")


def _where(what: str) -> str:
    """`what`, and the line of the library that asked for it."""
    frame: Any = sys._getframe(2)
    while frame is not None:
        parts = Path(frame.f_code.co_filename).parts
        for name in _LIBRARIES:
            if name in parts:
                return f"{what} at {'/'.join(parts[len(parts) - 1 - parts[::-1].index(name) :])}:{frame.f_lineno}"
        frame = frame.f_back
    return what


@contextmanager
def on_a_card(card: Card) -> Iterator[Card]:
    """Run a block on `card`; models are brought there by `fake_step.settle`, batches by `card.put`."""

    def tolist(tensor: Any) -> Any:
        """One read, however many numbers come."""
        card.reads.append(_where("tolist"))
        return tensor._value.tolist() if _has_value(tensor) else torch.ones(tensor.shape, dtype=tensor.dtype).tolist()

    def on_host(tensor: Any) -> Any:
        """One read, and everything that follows from it is on the host."""
        card.reads.append(_where("cpu"))
        if not _has_value(tensor):
            raise RuntimeError(f"values that are unknown before a real step are wanted: {_where('cpu')}")
        with _disable_current_modes():
            return tensor._value.clone()

    from transformers import masking_utils

    says = mock.patch.object(FakeTensor, "is_cuda", property(lambda self: True), create=True)
    hosted = mock.patch.object(FakeTensor, "cpu", on_host)
    lists = mock.patch.object(FakeTensor, "tolist", tolist)
    is_hopper = mock.patch.object(torch.cuda, "get_device_capability", lambda device=None: (9, 0))
    pinned = mock.patch.object(torch.Tensor, "pin_memory", lambda tensor, device=None: tensor)
    # transformers looks into no fake tensor, and into each real one.
    looks = mock.patch.object(masking_utils, "is_tracing", lambda tensor=None: False, create=True)
    with says, hosted, lists, is_hopper, pinned, looks, _packed_weights(card), card.fake, card, _Made(card):
        yield card


@contextmanager
def _packed_weights(card: Card) -> Iterator[None]:
    """Buffers of this card alone: they would outlive it. Its weights have no address."""
    fused = sys.modules.get("phi3_lora_plugin.speed.lora_linear4bit")
    if fused is None:
        yield
        return
    from phi3_lora_plugin.speed import card_streams

    with (
        mock.patch.object(fused, "_buffers", {}),
        mock.patch.object(fused, "_ahead", {}),
        mock.patch.object(fused, "_address", id),
        mock.patch.object(card_streams, "CardStreams", lambda device: _Streams(card)),
    ):
        yield
