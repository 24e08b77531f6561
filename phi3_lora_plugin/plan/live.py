"""Which storages are alive at once while code runs, of fake tensors or real ones, and where the worst moments are."""

# This module defines a subclass of something heavy; it is imported only inside functions.
from __future__ import annotations

import weakref
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch  # noqa: TID253

from phi3_lora_plugin.seams import look_up, require

FakeTensor: Any = look_up("torch.fake")
_TorchDispatchMode: Any = look_up("torch.dispatch")
_disable_current_modes: Any = look_up("torch.without_modes")
_leaves: Any = look_up("torch.leaves")
_ITEM: Any = look_up("torch.item")
_DEVICE: Any = look_up("torch.device")
require("torch.storage")

KINDS = ("base", "adapter", "gradients", "optimizer", "activations", "logits")


@dataclass(frozen=True)
class Moment:
    """The most that was alive at once in one place of a phase: bytes of each of `KINDS`, and which operation it was."""

    phase: str
    bytes: dict[str, int]
    operation: str
    place: str = ""

    @property
    def total(self) -> int:
        return sum(self.bytes.values())


@dataclass
class Live(_TorchDispatchMode):  # type: ignore[misc]
    """Follows every storage from the operation that made it to its end.

    Attributes:
        vocabulary: width of logits, which identifies them.
        real: the tensors have values; a test compares the dry run with this.
        place: where the code is; the worst moment of each place is kept.
    """

    vocabulary: int
    real: bool = False
    base: int = 0
    place: str = ""
    now: int = 0
    logits: int = 0
    parameters: Sequence[Any] = ()
    optimizer: Any = None
    _alive: dict[int, tuple[int, bool]] = field(default_factory=dict)  # storage -> (bytes, has a row of logits)
    _best: dict[str, tuple[int, dict[str, int], str]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        super().__init__()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is _DEVICE:  # asked more often than all else is done, and makes nothing
            return args[0].fake_device if isinstance(args[0], FakeTensor) else func(*args)
        tensors = [each for each in _leaves((args, kwargs)) if isinstance(each, torch.Tensor)]
        if self.real:
            made = func(*args, **(kwargs or {}))
        elif tensors and not any(isinstance(each, FakeTensor) for each in tensors):
            with _disable_current_modes():  # ids, labels and masks are real, and with them all that depends on values
                made = func(*args, **(kwargs or {}))
        else:
            made = _without_values(func, args)
            if made is None:
                made = func(*args, **(kwargs or {}))
        for tensor in _leaves(made):
            if isinstance(tensor, torch.Tensor):
                self.see(tensor)
        if self.now > self._best.get(self.place, (0,))[0]:
            self._best[self.place] = (self.now, self.kinds(), func.name().partition(".")[0].removeprefix("aten::"))
        return made

    def see(self, tensor: Any) -> None:
        """Count the storage of a tensor from now on, once."""
        storage = tensor.untyped_storage()
        if storage._cdata in self._alive:
            return
        size = storage.nbytes()
        logits = tensor.dim() > 0 and tensor.shape[-1] == self.vocabulary and tensor.numel() > self.vocabulary
        self._alive[storage._cdata] = (size, logits)
        self.now += size
        self.logits += size * logits
        weakref.finalize(storage, self._gone, storage._cdata)

    def _gone(self, key: int) -> None:
        size, logits = self._alive.pop(key, (0, False))
        self.now -= size
        self.logits -= size * logits

    def kinds(self) -> dict[str, int]:
        """Bytes alive now, by kind."""
        adapter = sum(size_of(p) for p in self.parameters)
        gradients = sum(size_of(p.grad) for p in self.parameters if p.grad is not None)
        states = self.optimizer.state.values() if self.optimizer is not None else ()
        optimizer = sum(size_of(value) for state in states for value in state.values() if torch.is_tensor(value))
        rest = self.now - self.base - adapter - gradients - optimizer - self.logits
        return dict(zip(KINDS, (self.base, adapter, gradients, optimizer, rest, self.logits), strict=True))

    @contextmanager
    def phase(self, name: str, found: list[Moment]) -> Iterator[None]:
        """Add the worst moment of each place of what runs inside to `found`."""
        self._best, self.place = {}, ""
        yield
        if not self._best:
            found.append(Moment(name, self.kinds(), ""))
        found.extend(Moment(name, kinds, operation, place) for place, (_, kinds, operation) in self._best.items())


def mark_layers(layers: Sequence[Any], live: Live) -> None:
    """Tell `live` which decoder layer the code is in, going forward and going back: the first, the last, or between."""

    def name(number: int) -> str:
        return "first" if number == 0 else "last" if number == len(layers) - 1 else "middle"

    def enter(number: int) -> Any:
        def before(*_: Any) -> None:
            if not live.place.startswith("backward"):  # there it is a recomputation
                live.place = f"forward {name(number)}"

        return before

    def leave(number: int) -> Any:
        def after(module: Any, inputs: Any, output: Any) -> None:
            hidden = output[0] if isinstance(output, tuple) else output
            if number == len(layers) - 1 and not live.place.startswith("backward"):
                live.place = "head"
            if hidden.requires_grad:
                hidden.register_hook(lambda _: setattr(live, "place", f"backward {name(number)}"))

        return after

    for number, layer in enumerate(layers):
        layer.register_forward_pre_hook(enter(number))
        layer.register_forward_hook(leave(number))


def _without_values(func: Any, args: Any) -> Any:
    """What depends on values that are not here: hidden states at real positions are as many as there are such."""
    if func is _ITEM:
        return False if args[0].dtype == torch.bool else 1.0 if args[0].is_floating_point() else 1
    if func is torch.ops.aten.index.Tensor and args[1] and args[1][0] is not None:
        index = args[1][0]
        if index.dtype == torch.bool and not isinstance(index, FakeTensor):
            with _disable_current_modes():
                count = int(index.sum())
            return args[0].new_empty((count, *args[0].shape[index.dim() :]))
    return None


def size_of(tensor: Any) -> int:
    """Bytes of a tensor's elements."""
    return int(tensor.numel() * tensor.element_size())
