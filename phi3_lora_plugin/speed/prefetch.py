"""Where packed weights are unpacked to, and when: the next one while the product with this one runs.

Two streams work on a card: the reader's, which multiplies with unpacked weights, and one beside it, which unpacks the
next weight meanwhile. They share two buffers. Whoever takes a weight reads it on the reader's stream and has put all
its reads there before it takes another. So, when one is taken,

- the reader waits until that weight is in its buffer, if it was unpacked beside;
- all reads of the other buffer are on the reader's stream already, and the stream beside waits for them before it
  writes the next weight there.

What comes next is what came next before. A guess that is wrong costs time, and nothing else: what is in a buffer is
used only for the very weight that it was made of. Nothing here knows CUDA or bitsandbytes: `Streams` and what unpacks
are passed in, so that tests can run every order of events without a card.
"""

# Imported only inside functions, like everything that is heavy.
from __future__ import annotations

import weakref
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any, Protocol

import torch  # noqa: TID253

from phi3_lora_plugin.speed.shards import say_once

_CONTEXT = 8  # weights wanted last that tell where a step is: more than a layer has
_SMALLEST_SHARE = 50  # of a card's memory that a second buffer may take: 100 MB of 5 GB, 367 MB (Phi-4) of 19 GB
_MOST = 50_000  # places remembered; a step of 40 recomputed layers has 500


class Streams(Protocol):
    """The reader's stream and the one beside it. Nothing here makes the host wait."""

    def passed(self, beside: bool) -> Any:
        """An event behind all that was put on a stream so far."""

    def wait(self, beside: bool, event: Any) -> None:
        """What is put on a stream from now on begins after the event."""

    def beside(self) -> AbstractContextManager[Any]:
        """Work that is begun in this block goes to the stream beside."""

    def keep(self, tensor: torch.Tensor) -> None:
        """Memory of the reader's that the stream beside works on too: not to be given away before that is done."""


class Packed:
    """A packed weight as it is now: another one, or this one once it is changed, is not the same."""

    def __init__(self, weight: Any, state: Any, address: int, size: int) -> None:
        """What it is:

        state: what unpacking needs beside the weight.
        address: of the weight's memory.
        size: numbers in it when it is unpacked.
        """
        self.name, self.state, self.size = id(weight), state, size
        self._weight = weakref.ref(weight)
        self._place = address, None if weight.is_inference() else weight._version

    @property
    def weight(self) -> Any:
        """The weight, or None if it is gone."""
        return self._weight()

    def same(self, other: Packed | None) -> bool:
        """Whether both are one weight that nobody has written to in between."""
        if other is None or self._place != other._place or self._place[1] is None:
            return False
        weight = self._weight()
        return weight is not None and weight is other._weight() and self.state is other.state


class Order:
    """Which weight comes next: the one that came next when the last ones were wanted in the same order before."""

    def __init__(self) -> None:
        self._last: tuple[int, ...] = ()
        self._after: dict[tuple[int, ...], int] = {}

    def after(self, name: int) -> int | None:
        """Note that this one is wanted now, and guess the one after it."""
        if len(self._after) >= _MOST:
            self._after.clear()
        self._after[self._last] = name
        self._last = (*self._last, name)[-_CONTEXT:]
        return self._after.get(self._last)


class _Buffer:
    """Room for one weight, what is or will be in it, and the event after which it is, if it was unpacked beside."""

    def __init__(self) -> None:
        self.room: torch.Tensor | None = None
        self.holds: Packed | None = None
        self.filled: Any = None


class Buffers:
    """The unpacked weights of one stream: in one buffer, and in a second one where weights are known beforehand."""

    def __init__(
        self,
        streams: Streams,
        make_room: Callable[[int], torch.Tensor],
        unpack: Callable[[Packed, torch.Tensor], None],
        known: Callable[[int], Packed | None],
    ) -> None:
        """What is passed in:

        make_room: memory for so many numbers, allocated on the reader's stream.
        unpack: writes a weight to the beginning of a buffer, on the stream that is current.
        known: the weight of this name as it is now, if it may be unpacked before it is asked for.
        """
        self.streams, self._make_room, self._unpack, self._known = streams, make_room, unpack, known
        self._taken, self._other, self._order = _Buffer(), _Buffer(), Order()
        self._largest, self._room_for_two = 0, True
        self.found = 0
        """How often a weight was there already when it was taken."""

    def reserve(self, size: int) -> None:
        """Make buffers no smaller than for `size` numbers."""
        self._largest = max(self._largest, size)

    def forget(self) -> None:
        """Hold one buffer, and nothing in it, until a weight is known."""
        self._taken.holds, self._other = None, _Buffer()

    def take(self, packed: Packed) -> torch.Tensor:
        """The weight, unpacked, [size]; to be read on the reader's stream, before the next one is taken.

        Raises:
            torch.OutOfMemoryError: no room for one weight.
        """
        known = self._known(packed.name) is not None
        if known and packed.same(self._other.holds):
            if self._other.filled is not None:  # else it was unpacked on the reader's stream, some weights ago
                self.streams.wait(False, self._other.filled)
            self._taken, self._other = self._other, self._taken
            self.found += 1
        elif known and packed.same(self._taken.holds):
            self.found += 1
        else:
            room = self._empty(self._taken, packed)
            self._unpack(packed, room)
            self._taken.holds = packed if known else None
        taken = self._taken.room
        assert taken is not None
        if known and self._room_for_two:
            self._look_ahead(packed)
        return taken[: packed.size]

    def _look_ahead(self, packed: Packed) -> None:
        """Unpack what comes next, unless it is there."""
        guess = self._order.after(packed.name)
        following = None if guess is None else self._known(guess)
        if following is None or following.same(packed) or following.same(self._other.holds):
            return
        try:
            room = self._empty(self._other, following)
            self.streams.keep(room)
            # The last readers of this buffer, and whoever had its memory before, are on the reader's stream by now.
            self.streams.wait(True, self.streams.passed(False))
            with self.streams.beside():
                self._unpack(following, room)
            self._other.filled = self.streams.passed(True)
            self._other.holds = following
        except torch.OutOfMemoryError:
            self._room_for_two, self._other = False, _Buffer()
            say_once("lora: no memory is left to unpack the next weight while a product runs; each is unpacked in turn")

    def _empty(self, buffer: _Buffer, packed: Packed) -> torch.Tensor:
        """Room for this weight in a buffer that holds none from now on."""
        self.reserve(packed.size)
        buffer.holds = buffer.filled = None
        if buffer.room is None or len(buffer.room) < self._largest:
            buffer.room = None  # before a larger one is made
            buffer.room = self._make_room(self._largest)
        return buffer.room


def fits_twice(unpacked: int, memory: int | None) -> bool:
    """Whether a card with so many bytes of memory, if that is known, is to hold a second weight of `unpacked` bytes."""
    return memory is None or unpacked * _SMALLEST_SHARE <= memory
