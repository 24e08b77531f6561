"""Files that lie on the disk for certain, and what a manifest says about them."""

from __future__ import annotations

import errno
import hashlib
import os
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, wait
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path
from threading import Thread
from types import TracebackType
from typing import Any, BinaryIO

from phi3_lora_plugin.store.manifest import describe_file

#: What a file is written from: its bytes, pieces of them that stay as they are, or a function that fills a stream.
Content = bytes | Iterable[Any] | Callable[[BinaryIO], Any]

#: Bytes from which on a hash, which takes as long as the disk does, is worth a thread of its own.
_LARGE = 1 << 20
#: Small enough that freeing it does not make the allocator give back to the system what training has left free (1 ms).
_BUFFER = 60 << 10


class DiskWrites:
    """New files of which all are on the disk when the block is left, unless an error ends it.

    Small ones are synced at its end, when a journal has one thing to write and not one for each.

    Raises:
        OSError: in the block or on leaving it, with the name of the file.
    """

    def __init__(self) -> None:
        self._open: list[tuple[Path, BinaryIO]] = []
        self._listed: list[Future[dict[str, Any]]] = []

    def __enter__(self) -> DiskWrites:
        return self

    def write(self, path: Path, content: Content) -> Future[dict[str, Any]]:
        """Write a new file, or begin to where a function fills it; what a manifest says of it."""
        if callable(content):
            self._listed.append(_beside(partial(_fill, path, content)))
            return self._listed[-1]
        pieces = [content] if isinstance(content, bytes) else list(content)
        large = sum(memoryview(piece).nbytes for piece in pieces) >= _LARGE
        self._listed.append(_beside(partial(_describe, pieces), thread=large))
        with _named(path):
            file = path.open("xb", buffering=_BUFFER)
            self._open.append((path, file))
            for piece in pieces:
                file.write(piece)
            file.flush()
            if large:
                os.fsync(file.fileno())
                self._open.pop()
                file.close()
        return self._listed[-1]

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        wait(self._listed)
        failures = [failure for listed in self._listed if (failure := listed.exception()) is not None]
        good = error is None and not failures
        if good:
            _begin([file for _, file in self._open])
        for path, file in self._open:
            try:
                with _named(path), file:
                    if good:
                        os.fsync(file.fileno())
            except OSError as failure:
                failures.append(failure)
        if error is None and failures:
            raise failures[0]


def write_file(path: Path, content: Content) -> dict[str, Any]:
    """Write a new file down to the disk; what a manifest says of it."""
    with DiskWrites() as disk:
        return disk.write(path, content).result()


def sync_folder(folder: Path) -> None:
    """Make names inside a folder last through a power cut, where the system can."""
    with _named(folder):
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        except OSError as error:
            if error.errno not in (errno.EINVAL, errno.ENOTSUP, errno.EBADF):  # some network file systems cannot
                raise
        finally:
            os.close(handle)


def make_folder(folder: Path) -> None:
    """Make a folder and its parents, so that their names last as well; nothing is synced where all are there."""
    missing = []
    while not folder.is_dir():
        missing.append(folder)
        folder = folder.parent
    for new in reversed(missing):
        new.mkdir(exist_ok=True)
        sync_folder(new.parent)


def _beside(function: Callable[[], dict[str, Any]], thread: bool = True) -> Future[dict[str, Any]]:
    """What a function gives that works on a thread of its own: no hash, write or sync holds Python's lock."""
    found: Future[dict[str, Any]] = Future()

    def run() -> None:
        try:
            found.set_result(function())
        except BaseException as error:
            found.set_exception(error)

    try:
        if thread:
            Thread(target=run, name="lora-file").start()
    except RuntimeError:  # no thread can be had, or the interpreter is about to end
        thread = False
    if not thread:
        run()
    return found


def _begin(files: Iterable[BinaryIO]) -> None:
    """Have the system begin to write files, so that one commit of its journal has them all."""
    if hasattr(os, "posix_fadvise"):
        for file in files:
            with suppress(OSError):
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def _describe(pieces: Iterable[Any]) -> dict[str, Any]:
    size, digest = 0, hashlib.sha256()
    for piece in pieces:
        size += memoryview(piece).nbytes
        digest.update(piece)
    return {"bytes": size, "sha256": digest.hexdigest()}


def _fill(path: Path, content: Callable[[Any], Any]) -> dict[str, Any]:
    with _named(path), path.open("xb", buffering=_BUFFER) as file:
        content(file)
        file.flush()
        listed = _beside(partial(describe_file, path))
        os.fsync(file.fileno())
        return listed.result()


@contextmanager
def _named(path: Path) -> Iterator[None]:
    """A write itself does not know the name of its file."""
    try:
        yield
    except OSError as error:
        raise OSError(error.errno, error.strerror or str(error), str(path)) from error
