"""Two streams that are not there: work is done later, in any order that the events allow, or at the worst moment."""

from __future__ import annotations

import random
import weakref
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch


class Event:
    passed = False


class Simulated:
    """A card's two streams and its memory: work waits in line, and `run` does some of it, in an order drawn by chance.

    Memory that the host lets go of is given to the next who asks for it, at once, as a caching allocator does: on the
    reader's stream that is in order, and where `keep` was called, it waits for the stream beside.
    """

    def __init__(self, seed: int) -> None:
        self.draw = random.Random(seed)
        self.slower = self.draw.choice((0.05, 0.5, 0.95))  # how much more often the reader gets on
        self.lines: dict[bool, deque[Any]] = {False: deque(), True: deque()}
        self.current = False
        self.free: list[torch.Tensor] = []
        self.kept: set[int] = set()

    # What `prefetch.Streams` asks for.
    def passed(self, beside: bool) -> Event:
        event = Event()
        self.lines[beside].append(lambda: setattr(event, "passed", True))
        return event

    def wait(self, beside: bool, event: Event) -> None:
        self.lines[beside].append(event)

    @contextmanager
    def beside(self) -> Iterator[None]:
        before, self.current = self.current, True
        try:
            yield
        finally:
            self.current = before

    def keep(self, tensor: torch.Tensor) -> None:
        self.kept.add(id(tensor))

    # The card.
    def put(self, *work: Callable[[], Any]) -> None:
        """Kernels, one after the other, on the current stream."""
        self.lines[self.current].extend(work)

    def run(self, most: int) -> None:
        """Do up to so much, on either stream as it comes."""
        for _ in range(most):
            ready = [line for line in self.lines.values() if line and not _waits(line[0])]
            if not ready:
                assert not any(self.lines.values()), "both streams wait for ever"
                return
            first = ready[0 if self.draw.random() < self.slower else -1].popleft()
            if not isinstance(first, Event):
                first()

    def room(self, size: int) -> torch.Tensor:
        """Memory for the reader's stream: what was let go of first, if it is large enough."""
        fitting = next((place for place, memory in enumerate(self.free) if len(memory) >= size), None)
        memory = torch.full((size,), -1.0) if fitting is None else self.free.pop(fitting)
        made = memory[:size]
        weakref.finalize(made, self._returned, memory, id(made))
        return made

    def _returned(self, memory: torch.Tensor, name: int) -> None:
        if name in self.kept:
            self.kept.discard(name)
            self.lines[True].append(lambda: self.free.append(memory))
        else:
            self.free.append(memory)


def _waits(first: Any) -> bool:
    return isinstance(first, Event) and not first.passed


class Late:
    """The reader works at once, and the stream beside it at some moment before somebody waits for it.

    A buffer has no numbers in it from the moment on in which it may be written to.
    """

    def __init__(self, seed: int = 0, careless: bool = False) -> None:
        self.draw = random.Random(seed)
        self.line: deque[Callable[[], Any]] = deque()
        self.aside, self.careless = False, careless
        self.unpacked_beside = 0

    def passed(self, beside: bool) -> Event:
        event = Event()
        if beside:
            self.line.append(lambda: setattr(event, "passed", True))
        return event

    def wait(self, beside: bool, event: Event) -> None:
        while not beside and not event.passed and not self.careless:
            self.line.popleft()()

    @contextmanager
    def beside(self) -> Iterator[None]:
        self.aside = True
        try:
            yield
        finally:
            self.aside = False

    def keep(self, tensor: torch.Tensor) -> None:
        pass

    def unpack(self, packed: Any, room: torch.Tensor) -> None:
        """In place of `lora_linear4bit._unpack`, which needs a card."""
        import bitsandbytes as bnb

        weight, state = packed.weight, packed.state

        def write() -> None:
            room[: packed.size].view(state.shape).copy_(bnb.functional.dequantize_4bit(weight.detach(), state))

        if self.aside:
            room.fill_(float("nan"))
            self.line.append(write)
            self.unpacked_beside += 1
        else:
            write()

    def some(self) -> None:
        """Do some of what waits beside."""
        while self.line and self.draw.random() < 0.3:
            self.line.popleft()()
