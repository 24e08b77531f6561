"""Names inside a store of checkpoints, and the few moves on disk that are whole or not at all."""

from __future__ import annotations

import logging
import os
import re
import shutil
import socket
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from phi3_lora_plugin.store.disk_writes import sync_folder, write_file
from phi3_lora_plugin.store.manifest import RESUME, ManifestError, read_manifest

log = logging.getLogger(__name__)

LATEST, BEST = "LATEST", "BEST"
#: Where a store is in an output folder. A push to the hub leaves out what begins with `_`.
FOLDER, FOLDER_WHEN_PUSHED = "lora", "_lora"
#: Ending of a checkpoint that was saved again, until it takes over the name without it.
AGAIN = ".again"
_OURS = re.compile(r"^\..+\.(?:tmp|old)-(?P<pid>\d+)-(?P<host>.+)$")
_EARLIER = re.compile(r"^earlier-(\d+)$")


@dataclass(frozen=True)
class Entry:
    """A checkpoint in a store, as its manifest describes it; its files have not been looked at."""

    path: Path
    step: int
    manifest: Mapping[str, Any]

    @property
    def has_resume(self) -> bool:
        return (self.path / RESUME).is_dir()

    @property
    def metric(self) -> Mapping[str, Any] | None:
        return self.manifest.get("metric")


def entries(store: Path) -> list[Entry]:
    """The checkpoints of a store whose manifest can be read, newest (highest step) first."""
    found = []
    for folder in _folders(store):
        try:
            manifest = read_manifest(folder)
        except ManifestError:
            continue
        found.append(Entry(folder, int(manifest["step"]), manifest))
    return sorted(found, key=lambda entry: (entry.step, entry.path.name.endswith(AGAIN)), reverse=True)


def torn(store: Path) -> list[Path]:
    """Folders that are named as checkpoints are but whose manifest is missing or damaged."""
    good = {entry.path for entry in entries(store)}
    named = (folder for folder in _folders(store) if re.match(r"step-\d+(\.again)?$", folder.name))
    return sorted(folder for folder in named if folder not in good)


def earlier(store: Path) -> list[Path]:
    """Folders into which checkpoints of earlier runs were put aside, newest first."""
    numbered = [(int(match[1]), path) for path in _folders(store) if (match := _EARLIER.match(path.name))]
    return [path for _, path in sorted(numbered, reverse=True)]


def stores_in(folder: Path) -> list[Path]:
    """The stores that a path means: itself, or those of the run that has it as output folder."""
    return [path for path in (folder, folder / FOLDER, folder / FOLDER_WHEN_PUSHED) if path.is_dir()]


def numbered(folder: Path) -> list[Path]:
    """Folders of runs that found `folder` taken and got its name with a number after it."""
    return [path for path in folder.parent.glob(f"{folder.name}-*") if path.name[len(folder.name) + 1 :].isdigit()]


def step_name(step: int) -> str:
    return f"step-{step:08d}"


def beside(store: Path, name: str, kind: str = "tmp") -> Path:
    """A name for something unfinished (`tmp`) or done with (`old`) that readers do not look at and `sweep` finds."""
    return store / f".{name}.{kind}-{os.getpid()}-{socket.gethostname()}"


def again(path: Path) -> Path:
    """The name of a checkpoint that was saved again while the one that it replaces is still there."""
    return path.with_name(path.name + AGAIN)


def replace_file(path: Path, content: bytes) -> None:
    """Put a small file in place of another; a reader sees the one or the other. The folder is not synced."""
    temporary = beside(path.parent, path.name)
    try:
        write_file(temporary, content)
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def put_away(path: Path, store: Path) -> Path:
    """Rename a folder to a name that readers ignore before deleting it, so that it is never half there."""
    name = path.name if path.parent == store else f"{path.parent.name}-{path.name}"
    away = beside(store, name, "old")
    shutil.rmtree(away, ignore_errors=True)
    os.rename(path, away)
    return away


def set_aside(store: Path, checkpoints: Iterable[Path]) -> Path | None:
    """Move checkpoints of another run out of the way, into a new `earlier-N/`; nothing is deleted."""
    paths = list(checkpoints)
    if not paths:
        return None
    numbers = [int(match[1]) for path in earlier(store) if (match := _EARLIER.match(path.name))]
    folder = store / f"earlier-{max(numbers, default=0) + 1}"
    folder.mkdir()
    for path in paths:
        os.rename(path, folder / path.name)
    sync_folder(store)
    return folder


def sweep(store: Path) -> list[str]:
    """Delete what dead processes left unfinished or half deleted, by our own names only; the names.

    Call it with the store locked.
    """
    gone = []
    for path in sorted(store.iterdir()) if store.is_dir() else ():
        match = _OURS.match(path.name)
        if match is None or _alive(int(match["pid"]), match["host"]):
            continue
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink()
        gone.append(path.name)
    return gone


def _folders(store: Path) -> list[Path]:
    try:
        inside = [path for path in store.iterdir() if not path.name.startswith(".") and path.name != RESUME]
    except OSError:
        return []
    return [path for path in inside if os.path.isdir(path)]


def _alive(pid: int, host: str) -> bool:
    import psutil

    # The lock is ours, so a process of another machine, or of this one's number, has ended.
    return host == socket.gethostname() and pid != os.getpid() and psutil.pid_exists(pid)
