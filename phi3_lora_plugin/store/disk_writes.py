"""Files that are certain to be on the disk, and what a manifest records about them."""

from __future__ import annotations

import errno
import hashlib
import os
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from threading import Thread
from types import TracebackType
from typing import Any, BinaryIO

from phi3_lora_plugin.store.manifest import describe_file

#: What a file is written from: its bytes, pieces of them that stay as they are, or a function that fills a stream.
Content = bytes | Iterable[Any] | Callable[[BinaryIO], Any]


class DiskWrites:
    """New files that are all on the disk when the block is left, unless an error ends it.

    They are synced together at its end, when a journal has one thing to write and not one for each. What a manifest
    records of them is computed on threads: a hash takes as long as the disk does.

    Raises:
        OSError: in the block or on leaving it, with the name of the file.
    """

    def __init__(self) -> None:
        self._open: list[tuple[Path, BinaryIO]] = []
        self._described: list[Future[dict[str, Any]]] = []

    def __enter__(self) -> DiskWrites:
        return self

    def write(self, path: Path, content: Content) -> Future[dict[str, Any]]:
        """Write a new file; return what a manifest records of it."""
        with _named(path):
            file = path.open("xb")
            self._open.append((path, file))
            if callable(content):
                content(file)
                file.flush()
                self._described.append(_beside(partial(describe_file, path)))
            else:
                pieces = [content] if isinstance(content, bytes) else list(content)
                self._described.append(_beside(partial(_describe, pieces)))
                for piece in pieces:
                    file.write(piece)
                file.flush()
        return self._described[-1]

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        failures: list[BaseException] = []
        for path, file in self._open:
            try:
                with _named(path), file:
                    if error is None:
                        os.fsync(file.fileno())
            except OSError as failure:
                failures.append(failure)
        failures += [broken for each in self._described if (broken := each.exception()) is not None]
        if error is None and failures:
            raise failures[0]


def write_file(path: Path, content: Content) -> dict[str, Any]:
    """Write a new file down to the disk; return what a manifest records of it."""
    with DiskWrites() as disk:
        return disk.write(path, content).result()


def _describe(pieces: Iterable[Any]) -> dict[str, Any]:
    size, digest = 0, hashlib.sha256()
    for piece in pieces:
        size += memoryview(piece).nbytes
        digest.update(piece)
    return {"bytes": size, "sha256": digest.hexdigest()}


def _beside(function: Callable[[], dict[str, Any]]) -> Future[dict[str, Any]]:
    """Run a function on its own thread, or right here if the interpreter is ending and no thread can be started."""
    found: Future[dict[str, Any]] = Future()

    def run() -> None:
        try:
            found.set_result(function())
        except BaseException as error:
            found.set_exception(error)

    try:
        Thread(target=run, name="lora-hash").start()
    except RuntimeError:
        run()
    return found


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


@contextmanager
def _named(path: Path) -> Iterator[None]:
    """A write itself does not know the name of its file."""
    try:
        yield
    except OSError as error:
        raise OSError(error.errno, error.strerror or str(error), str(path)) from error
    except RuntimeError as error:
        # torch.save reports that its archive is in an odd state, which hides what the disk reported.
        if isinstance(disk := error.__context__, OSError):
            raise OSError(disk.errno, disk.strerror or str(disk), str(path)) from error
        raise
