"""What an operator costs on a card: arithmetic, bytes to and from memory, and whether it is a kernel at all.

Counted from shapes on a fake card (`fake_card`): every operator that is not a view reads its inputs and
writes its outputs once. A cache that holds them between two kernels is not counted.
"""

from __future__ import annotations

import weakref
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from math import prod
from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils._python_dispatch import _disable_current_modes
from torch.utils._pytree import tree_leaves

from benchmarks.cards import CardFacts
from benchmarks.fake_card import Card

#: Shares of a data sheet's figures that real kernels reach: large matrix products, attention, and streams over memory.
GEMM, ATTENTION, STREAM = 0.71, 0.35, 0.84

KINDS = ("gemm", "lora", "attention", "elementwise")
_PRODUCTS = {"mm", "addmm", "addmm_", "bmm", "baddbmm", "_addmm_activation"}
#: Of rows with weights that their shapes do not give away: bitsandbytes' with 4 bits, and each row's with its expert's.
_OF_ROWS = {"gemm_4bit", "gemv_4bit", "_grouped_mm"}
_ATTENTION = {"_varlen_attn": 1.0, "_varlen_attn_backward": 2.5}
_ATTENTION |= {"_scaled_dot_product_flash_attention_for_cpu": 1.0}
_ATTENTION |= {"_scaled_dot_product_flash_attention_for_cpu_backward": 2.5}
_FREE = {"empty", "empty_like", "new_empty", "empty_strided", "new_empty_strided", "_unsafe_view", "detach", "device"}
_FREE |= {"sym_size", "sym_stride", "sym_numel", "_local_scalar_dense", "lift_fresh", "set_", "resize_"}
#: What reads of its first input only the rows that it is asked for.
_ROWS = {"embedding", "index_select", "gather", "index"}
#: What writes into its first input without a look at it.
_OVERWRITES = {"copy_", "fill_", "zero_"}
#: Our kernels with a product of LoRA in them.
_WITH_LORA = {"gate_sum", "gate_sum_backward"}
#: Our kernel that goes over each row of its first input twice.
_READS_TWICE = {"cross_entropy_"}
#: Gradients of views, which PyTorch makes by a fill of the whole and a copy into the part.
_PARTS = {"slice_backward", "select_backward"}


@dataclass
class Costs:
    """Sums over operators: FLOPs and bytes of each of `KINDS`, kernels, seconds on a card, bytes that stay."""

    flops: Counter[str] = field(default_factory=Counter)
    bytes: Counter[str] = field(default_factory=Counter)
    seconds: Counter[str] = field(default_factory=Counter)
    kernels: int = 0
    kept: float = 0.0
    reads: int = 0
    operators: Counter[str] = field(default_factory=Counter)
    """Seconds by kind, name and the shape of the first input."""

    def __sub__(self, other: Costs) -> Costs:
        return self.plus(other, -1)

    def plus(self, other: Costs, times: float) -> Costs:
        """These and `times` the other ones."""
        sums = [
            Counter({kind: mine[kind] + times * its[kind] for kind in KINDS})
            for mine, its in ((self.flops, other.flops), (self.bytes, other.bytes), (self.seconds, other.seconds))
        ]
        rest = [getattr(self, name) + times * getattr(other, name) for name in ("kernels", "kept", "reads")]
        names = self.operators.keys() | other.operators.keys()
        operators = Counter({name: self.operators[name] + times * other.operators[name] for name in names})
        return Costs(*sums, *rest, operators)  # type: ignore[arg-type]


class Meter(Card):
    """A card that counts what each operator costs on a real one; products with a side of `rank` are LoRA's."""

    def __init__(self, facts: CardFacts, rank: int = 0) -> None:
        super().__init__("cpu")
        self.facts, self.rank, self.costs = facts, rank, Costs()
        self._alive: dict[int, int] = {}
        self._bounds: list[int] = []  # of documents, as the forward pass has them
        self._beside = 0.0  # bytes that move while the next product runs

    def seen(self, func: Any, args: Any, kwargs: Any, made: Any) -> None:
        """Count one operator."""
        outs = [each for each in tree_leaves(made) if isinstance(each, FakeTensor)]
        for out in outs:
            self._follow(out)
        name = func.overloadpacket.__name__
        if name in _FREE or _is_view(func):
            return
        inputs = _distinct([each for each in tree_leaves((args, kwargs)) if isinstance(each, torch.Tensor)])
        if name in _ROWS:
            moved = 2 * sum(_bytes(each) for each in outs) + sum(_bytes(each) for each in inputs[1:])
        else:
            written = [each for each in inputs if _is_written(func, args, kwargs, each)]
            moved = sum(_bytes(each) for each in inputs) + sum(_bytes(each) for each in (*outs, *written))
            if name in _OVERWRITES or func._overloadname == "out":  # what was there before is not read
                moved -= sum(_bytes(each) for each in written)
            moved += sum(_bytes(each) for each in written) if name in _READS_TWICE else 0
            if outs and written:  # in place: what comes out is what was written
                moved -= sum(_bytes(each) for each in outs)
        kind, flops = self._work(name, args, outs)
        shape = next((tuple(each.shape) for each in inputs), ())
        title = f"{name} {'x'.join(map(str, shape))}"
        if name in _PARTS:
            self.note(kind, flops, _bytes(outs[0]), title)
            if not (moved := 2 * _bytes(inputs[0])):
                return
        self.note(kind, flops, moved, title)

    def note(self, kind: str, flops: float, moved: float, name: str = "") -> None:
        """Count one kernel of `kind`.

        One on the stream beside takes its time from the next product: that is as long as its arithmetic, or as the
        bytes of both, whichever is longer.
        """
        peak = self.facts.flops * (ATTENTION if kind == "attention" else GEMM)
        self.costs.kernels += 1
        self.costs.flops[kind] += flops
        self.costs.bytes[kind] += moved
        if self.aside:
            self._beside += moved
            return
        if kind == "gemm":
            moved, self._beside = moved + self._beside, 0.0
        seconds = max(flops / peak, moved / (STREAM * self.facts.bandwidth))
        self.costs.seconds[kind] += seconds
        self.costs.operators[f"{kind:<12}{name or 'a kernel of Liger'}"] += seconds

    def again(self) -> None:
        """Count from here on, in the state that the card is in now."""
        self.costs = Costs()

    def ended(self) -> None:
        """What still moves on the stream beside has no product to hide behind."""
        left, self._beside = self._beside, 0.0
        if left:
            self.note("elementwise", 0.0, left, "beside the last product")
            self.costs.kernels -= 1  # they and their bytes are counted already
            self.costs.bytes["elementwise"] -= left

    @property
    def alive(self) -> int:
        """Bytes that something still holds."""
        return sum(self._alive.values())

    def _work(self, name: str, args: Any, outs: Sequence[torch.Tensor]) -> tuple[str, float]:
        """(kind, FLOPs)."""
        if name in _PRODUCTS:
            left, right = [each for each in args if isinstance(each, torch.Tensor)][-2:]
            sides = left.shape[-2], left.shape[-1], right.shape[-1]
            return "lora" if self.rank in sides else "gemm", 2.0 * prod(sides) * prod(left.shape[:-2])
        if name in _OF_ROWS:  # [..., in] and weights -> [..., out]
            return "gemm", 2.0 * outs[0].numel() * args[0].shape[-1]
        if name in _ATTENTION:
            return "attention", _ATTENTION[name] * self._attention(name, args)
        if name in _WITH_LORA:  # .., down [n, r], wide [out, r], ..
            down, wide = [each for each in args if isinstance(each, torch.Tensor)][-2:]
            return "elementwise", 2.0 * down.numel() * wide.shape[0]
        return "elementwise", 0.0

    def _attention(self, name: str, args: Any) -> float:
        """FLOPs of causal attention forwards: two products over half of each document."""
        query = args[1] if name.endswith("backward") else args[0]
        if "varlen" in name:  # [tokens, heads, size]
            limits = next(each for each in args if isinstance(each, torch.Tensor) and each.dtype == torch.int32)
            if not isinstance(limits, FakeTensor) or "_value" in limits.__dict__:
                with _disable_current_modes():
                    self._bounds = getattr(limits, "_value", limits).tolist()
            lengths = [stop - start for start, stop in zip(self._bounds, self._bounds[1:], strict=False)]
            return 4.0 * query.shape[1] * query.shape[2] * sum(each * each / 2 for each in lengths)
        rows, heads, tokens, size = query.shape
        return 4.0 * heads * size * rows * tokens * tokens / 2

    def _follow(self, tensor: FakeTensor) -> None:
        storage = tensor.untyped_storage()
        if storage._cdata not in self._alive:
            self._alive[storage._cdata] = storage.nbytes()
            weakref.finalize(storage, self._alive.pop, storage._cdata, None)


def _is_view(func: Any) -> bool:
    returned = [each.alias_info for each in func._schema.returns]
    return bool(returned) and all(alias is not None and not alias.is_write for alias in returned)


def _is_written(func: Any, args: Any, kwargs: Any, tensor: torch.Tensor) -> bool:
    names = dict(zip([each.name for each in func._schema.arguments], args, strict=False)) | kwargs
    written = [each.name for each in func._schema.arguments if each.alias_info is not None and each.alias_info.is_write]
    return any(names.get(name) is tensor for name in written)


def _distinct(tensors: list[torch.Tensor]) -> list[torch.Tensor]:
    return list({id(each): each for each in tensors}.values())


def _bytes(tensor: torch.Tensor) -> int:
    """Of an expanded tensor what is there, not what is seen."""
    shown = prod(size for size, stride in zip(tensor.shape, tensor.stride(), strict=True) if stride != 0)
    return shown * tensor.element_size()
