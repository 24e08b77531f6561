"""Files and folders with the permissions that the umask gives, where libraries would make them private."""

from __future__ import annotations

import secrets
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor


def new_folder(parent: Path, prefix: str, suffix: str = "") -> Path:
    """A new folder in `parent` with a name of its own; `tempfile.mkdtemp` gives its folders to their owner alone."""
    while True:
        folder = parent / f"{prefix}{secrets.token_hex(4)}{suffix}"
        try:
            folder.mkdir()
        except FileExistsError:
            continue
        return folder


def save_tensors(tensors: Mapping[str, Tensor], file: Path, format: str = "pt") -> None:
    """Write contiguous tensors as safetensors, whose own writer makes a file of mode 0600 and renames it."""
    from safetensors.torch import save_file

    file.touch()
    mode = file.stat().st_mode & 0o777
    save_file(dict(tensors), file, metadata={"format": format})
    file.chmod(mode)
