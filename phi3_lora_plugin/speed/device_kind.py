"""The kind of device that a tensor is on: "cpu", "cuda", ...

In a dry run every tensor is on the CPU, whatever it stands for.
"""

# Imported only inside functions, like everything that is heavy.
from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch  # noqa: TID253

_dry_run_for: str | None = None


def device_kind(x: torch.Tensor) -> str:
    """The kind of the device of `x`, or of the one that it stands for."""
    return _dry_run_for or ("cuda" if x.is_cuda else x.device.type)  # a fake tensor may claim to be on a card


def in_dry_run() -> bool:
    """Whether nothing is computed, so that one of many equal turns of a loop tells as much as all of them."""
    return _dry_run_for is not None


@contextmanager
def dry_run_for(kind: str) -> Iterator[None]:
    """Take every tensor as on a device of this kind while the block runs."""
    global _dry_run_for
    before, _dry_run_for = _dry_run_for, kind
    try:
        yield
    finally:
        _dry_run_for = before
