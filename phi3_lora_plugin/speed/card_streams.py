"""The streams of `prefetch` on a card: the one that computes, and one for each device beside it."""

# Imported only inside functions, like everything that is heavy.
from __future__ import annotations

from functools import cache
from typing import Any

import torch  # noqa: TID253


class CardStreams:
    """The stream that is current on a device when this is made, and the one beside all streams of that device."""

    def __init__(self, device: torch.device) -> None:
        self._device, self._reader = device, torch.cuda.current_stream(device)

    def passed(self, beside: bool) -> Any:
        """As `prefetch.Streams`."""
        event = torch.cuda.Event()
        event.record(self._stream(beside))
        return event

    def wait(self, beside: bool, event: Any) -> None:
        """As `prefetch.Streams`."""
        self._stream(beside).wait_event(event)

    def beside(self) -> Any:
        """As `prefetch.Streams`."""
        return torch.cuda.stream(stream_beside(self._device))

    def keep(self, tensor: torch.Tensor) -> None:
        """As `prefetch.Streams`."""
        tensor.record_stream(stream_beside(self._device))

    def _stream(self, beside: bool) -> Any:
        return stream_beside(self._device) if beside else self._reader


@cache
def stream_beside(device: torch.device) -> Any:
    """One for each device; first in line where both have work, as the next product waits for what is done here."""
    return torch.cuda.Stream(device, priority=-1)
