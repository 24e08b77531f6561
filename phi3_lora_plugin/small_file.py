"""Small files that others may have written: regular ones only, up to a size, and what is wrong with their JSON."""

from __future__ import annotations

import errno
import json
import os
import stat
from pathlib import Path
from typing import Any, BinaryIO

from phi3_lora_plugin.error import Phi3LoraError

#: Bytes that settings and lists of weights have at most; the index of a model of 10,000 weights takes 1 MB.
LIMIT = 64_000_000


class BadFile(Phi3LoraError):
    """A file that cannot be read as what it should be; the message is about the file, without its name."""


def open_regular(path: Path) -> BinaryIO:
    """Open a file to read; one that is a pipe, a device or a folder is an `OSError`, at once.

    Raises:
        OSError: as `open`, and `EINVAL` for what is not a regular file.
    """
    handle = os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0))
    if not stat.S_ISREG(os.fstat(handle).st_mode):
        os.close(handle)
        raise OSError(errno.EINVAL, "it is not a regular file", str(path))
    return os.fdopen(handle, "rb")


def read_small(path: Path, limit: int = LIMIT) -> bytes:
    """All bytes of a regular file.

    Raises:
        FileNotFoundError: there is none.
        BadFile: it cannot be read, is not a regular file, or is larger than `limit` bytes.
    """
    try:
        with open_regular(path) as file:
            content = file.read(limit + 1)
    except FileNotFoundError:
        raise
    except (OSError, ValueError) as error:  # ValueError: a NUL byte in the name
        raise BadFile(f"cannot be read: {getattr(error, 'strerror', None) or error}") from error
    if len(content) > limit:
        raise BadFile(f"is larger than {limit:,} bytes")
    return content


def parse_json(content: bytes) -> Any:
    """The content of JSON in UTF-8.

    Raises:
        BadFile: it is something else, or nested too deeply.
    """
    if content.startswith((b"\xff\xfe", b"\xfe\xff")):
        raise BadFile("is UTF-16 text; save it as UTF-8")
    try:
        return json.loads(content.decode("utf-8"))
    except UnicodeDecodeError as error:
        raise BadFile(f"byte {error.start} is not UTF-8; save it as UTF-8") from error
    except RecursionError as error:
        raise BadFile("is nested too deeply to be read as JSON") from error
    except ValueError as error:
        raise BadFile(f"is not JSON: {error}") from error


def read_json(path: Path, limit: int = LIMIT) -> Any:
    """The JSON of a regular file; raises as `read_small` and `parse_json`, a missing file as `BadFile` too."""
    try:
        return parse_json(read_small(path, limit))
    except FileNotFoundError as error:
        raise BadFile("is missing") from error


def read_object(path: Path, error: type[Phi3LoraError]) -> dict[str, Any]:
    """The JSON object of a regular file; what is wrong with it is raised as `error`, with the file's name."""
    try:
        found = read_json(path)
    except BadFile as bad:
        raise error(f"{path} {bad}") from bad
    if not isinstance(found, dict):
        raise error(f"{path}: expected a JSON object, got {type(found).__name__}")
    return found
