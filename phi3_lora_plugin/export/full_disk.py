"""A full disk, told as such: native writers have errors of their own for it, some of them without a reason."""

from __future__ import annotations

import errno
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from phi3_lora_plugin.error import Phi3LoraError

_LITTLE = 64 * 1024  # bytes; what a disk has left that a writer has just filled


@contextmanager
def full_disk_as_os_error(folder: Path) -> Iterator[None]:
    """Raise `OSError` (ENOSPC) for whatever a writer raised because the disk of `folder` is full."""
    try:
        yield
    except Exception as error:
        if isinstance(error, OSError) and error.errno is not None:
            raise
        told = any(words in str(error) for words in ("No space left on device", "os error 28", "requested and"))
        if not told and (isinstance(error, Phi3LoraError) or shutil.disk_usage(folder).free > _LITTLE):
            raise
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(folder)) from error
