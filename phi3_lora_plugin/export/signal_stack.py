"""The stack that this thread's signal handlers run on, put back after a library has set one of its own.

OpenVINO (2026.4) gives the thread that compiles a model an alternate signal stack and frees its memory with the model.
Python's handlers run on that stack (SA_ONSTACK): the next Ctrl-C, or the end of a DataLoader's worker, would end the
process with a segmentation fault.
"""

from __future__ import annotations

import ctypes
import sys
from collections.abc import Iterator
from contextlib import contextmanager

_DISABLED = 2  # SS_DISABLE: handlers run on the thread's own stack


class _Stack(ctypes.Structure):
    """`stack_t` of Linux; see sigaltstack(2)."""

    _fields_ = (("sp", ctypes.c_void_p), ("flags", ctypes.c_int), ("size", ctypes.c_size_t))


@contextmanager
def signal_stack_kept() -> Iterator[None]:
    """Put the alternate signal stack of this thread back at the end of the block; only Linux needs it."""
    if sys.platform != "linux":
        yield
        return
    change = ctypes.CDLL(None).sigaltstack
    before = _Stack()
    change(None, ctypes.byref(before))
    try:
        yield
    finally:
        if change(ctypes.byref(before), None):  # too small for what the processor now saves (AMX)
            change(ctypes.byref(_Stack(flags=_DISABLED)), None)
