"""One run writes into a store at a time."""

from __future__ import annotations

import errno
import fcntl
import logging
import os
import socket
import threading
from pathlib import Path

from phi3_lora_plugin.error import Phi3LoraError

log = logging.getLogger(__name__)
NAME = ".lock"

_HELD: dict[Path, StoreLock] = {}


class StoreBusy(Phi3LoraError):
    """Another run is writing into the store."""


class StoreLock:
    """The right to write into a store, until `release` or the end of the process, however it ends.

    A lock of the operating system on the open `.lock`: a killed process leaves no stale lock, and copying the folder
    within this process does not release it, unlike a record lock. Forked data loaders close their copy, so that they
    do not keep it locked.

    Args:
        holder: two locks of one holder in one process belong to one run; so do two of one thread: the first can only
            be left over from a run that failed.
    """

    def __init__(self, store: Path, holder: object = None) -> None:
        self.store = store.resolve()
        self.holder = holder
        self.thread = threading.current_thread()
        self._handle: int | None = None
        other = _HELD.get(self.store)
        if other is not None:
            if other.thread is not self.thread and other.thread.is_alive() and other.holder is not holder:
                raise StoreBusy(f"{store} is being written by another thread of this process")
            self._handle, other._handle = other._handle, None
        else:
            self._handle = _lock(self.store / NAME)
        _HELD[self.store] = self

    def renew(self) -> None:
        """Take the lock again if its file was deleted; call it before each write.

        Raises:
            StoreBusy: another run has taken the store since.
        """
        if self._handle is None or _is_at(self._handle, self.store / NAME):
            return
        log.warning("%s was deleted while this run was writing into the folder; it is made again", self.store / NAME)
        lost, self._handle = self._handle, None
        os.close(lost)
        self._handle = _lock(self.store / NAME)

    def release(self) -> None:
        """Let others write. Doing it twice does no harm."""
        if _HELD.get(self.store) is self:
            del _HELD[self.store]
        if self._handle is not None:
            try:
                if _is_at(self._handle, self.store / NAME):  # not the file of a later run
                    (self.store / NAME).unlink(missing_ok=True)
            except OSError as error:  # the file alone locks nothing
                log.debug("the lock file could not be deleted: %s", error)
            finally:
                os.close(self._handle)
                self._handle = None


def _let_go_in_child() -> None:
    """Close what a fork has inherited; closing ends no lock that the parent has open as well."""
    for lock in _HELD.values():
        if lock._handle is not None:
            os.close(lock._handle)
            lock._handle = None
    _HELD.clear()


os.register_at_fork(after_in_child=_let_go_in_child)


def holder_of(store: Path) -> object:
    """The lock of a store, if this thread holds it; None otherwise."""
    lock = _HELD.get(store.resolve())
    return lock.holder if lock is not None and lock.thread is threading.current_thread() else None


def held(store: Path) -> StoreLock | None:
    """The lock that this process has of a store; None if it has none."""
    return _HELD.get(store.resolve())


def _lock(path: Path) -> int | None:
    while True:
        handle = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            owner = os.read(handle, 200).decode(errors="replace").strip()
            os.close(handle)
            if error.errno in (errno.EACCES, errno.EAGAIN):
                raise StoreBusy(
                    f"{path.parent} is in use by another run ({owner or 'unknown'}); wait for it or use another folder"
                ) from error
            if error.errno in (errno.ENOLCK, errno.ENOTSUP, errno.ENOSYS):
                log.warning("the file system has no locks: a second run could write to %s", path.parent)
                return None
            raise
        if _is_at(handle, path):
            _sign(handle)
            return handle
        os.close(handle)  # its owner deleted the file in between: there is a new one


def _is_at(handle: int, path: Path) -> bool:
    """Whether an open file is the one that a path names."""
    try:
        there, ours = os.stat(path), os.fstat(handle)
    except FileNotFoundError:
        return False
    return (there.st_dev, there.st_ino) == (ours.st_dev, ours.st_ino)


def _sign(handle: int) -> None:
    """Write the owner into the file, for the message to other runs; on a full disk the lock works without it."""
    try:
        os.ftruncate(handle, 0)
        os.pwrite(handle, f"process {os.getpid()} on {socket.gethostname()}\n".encode(), 0)
    except OSError as error:
        log.debug("the lock file could not be written: %s", error)
