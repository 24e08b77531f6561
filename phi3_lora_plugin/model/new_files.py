"""Files and folders that appear whole, with the permissions that the umask gives."""

from __future__ import annotations

import os
import secrets
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING

from phi3_lora_plugin.model.folder import ModelError

if TYPE_CHECKING:
    from torch import Tensor


def new_folder(parent: Path, prefix: str, suffix: str = "") -> Path:
    """A new folder in `parent` with a name of its own; `tempfile.mkdtemp` gives its folders to their owner alone."""
    while True:
        folder = parent / f"{prefix}{secrets.token_hex(4)}{suffix}"
        with suppress(FileExistsError):
            folder.mkdir()
            return folder


@contextmanager
def scratch_folder(target: Path, suffix: str) -> Iterator[Path]:
    """A folder next to `target`, on the disk that has to hold the result anyway; deleted in the end."""
    target.parent.mkdir(parents=True, exist_ok=True)
    folder = new_folder(target.parent, f".{target.name}.", suffix)
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


@contextmanager
def staged(target: Path, overwrite: bool = False) -> Iterator[Path]:
    """A folder next to `target` to write into; it replaces `target` if the block succeeds and is deleted otherwise.

    Raises:
        ModelError: the target has something in it and `overwrite` is not given, or it is a file.
    """
    if target.is_file() or (target.is_dir() and any(target.iterdir()) and not overwrite):
        raise ModelError(f"{target} is not empty; choose another folder, or pass --overwrite")
    with scratch_folder(target, ".tmp") as stage:
        yield stage
        _sync(stage)
        old = None
        if target.exists():
            old = new_folder(target.parent, f".{target.name}.", ".old")
            target.rename(old / "was")
        stage.rename(target)
        if old:
            shutil.rmtree(old)


@contextmanager
def staged_file(target: Path, overwrite: bool = False) -> Iterator[Path]:
    """A path to write to, in a folder next to `target`; all files of that folder move over if the block succeeds.

    Raises:
        ModelError: the target exists and `overwrite` is not given.
    """
    if target.exists() and not overwrite:
        raise ModelError(f"{target} exists; name another file or pass --overwrite")
    with scratch_folder(target, ".tmp") as stage:
        yield stage / target.name
        for file in sorted(stage.iterdir(), key=lambda file: file.name == target.name):
            file.replace(target.parent / file.name)


def _sync(folder: Path) -> None:
    for path in [*folder.rglob("*"), folder]:
        handle = os.open(path, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def save_tensors(tensors: Mapping[str, Tensor], file: Path, format: str = "pt") -> None:
    """Write contiguous tensors as safetensors, whose own writer makes a file of mode 0600 and renames it."""
    from safetensors.torch import save_file

    file.touch()
    mode = file.stat().st_mode & 0o777
    save_file(dict(tensors), file, metadata={"format": format})
    file.chmod(mode)
