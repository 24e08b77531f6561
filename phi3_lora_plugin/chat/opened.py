"""A data file -> its bytes: unpacked, looked at, and by lines that are bounded, so that no file can fill the memory."""

from __future__ import annotations

import gzip
import io
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import IO, cast

LONGEST_LINE = 64 * 1024**2  # bytes; what is longer is not one chat
LARGEST_WHOLE = 2 * 1024**3  # bytes of a file that has to be read as a whole, as a JSON array is
_RATIO = 50  # times its size that a packed file may unpack to where it is read as a whole; text packs to a fifth
_CHUNK = 1024**2
#: Endings of packed files; what a file is shows in its first bytes, whatever it is called.
PACKED = (".gz", ".zst", ".zstd")
#: What reading an opened file may raise: the disk, or a packed file that is damaged.
ERRORS = (OSError, EOFError, zlib.error)


class TooLong(bytes):
    """The beginning of a line that is longer than `LONGEST_LINE`; the rest of it was skipped."""

    length = 0


def open_file(path: Path) -> IO[bytes]:
    """Open a file for reading, unpacked if it is gzip or Zstandard."""
    with path.open("rb") as file:
        head = file.read(4)
    # What it says of itself decides, not its name.
    if head[:2] == b"\x1f\x8b":
        return cast("IO[bytes]", gzip.open(path))
    if head == b"\x28\xb5\x2f\xfd":
        import pyarrow

        return io.BufferedReader(pyarrow.input_stream(str(path), compression="zstd"), _CHUNK)
    return path.open("rb")


def lines(file: IO[bytes]) -> Iterator[bytes]:
    """Yield lines with their ends; of one that is too long, its beginning as `TooLong`."""
    while line := file.readline(LONGEST_LINE + 1):
        if len(line) <= LONGEST_LINE or line.endswith(b"\n"):
            yield line
            continue
        length = len(line)
        while (more := file.readline(_CHUNK)) and not more.endswith(b"\n"):
            length += len(more)
        cut = TooLong(line[:100])
        cut.length = length + len(more)
        yield cut


def read_whole(path: Path) -> bytes | int:
    """All bytes of a file, unpacked; where they are more than may be held, how many that is."""
    size = path.stat().st_size
    with open_file(path) as file, path.open("rb") as plain:
        packed = file.read(4) != plain.read(4)
    most = min(LARGEST_WHOLE, max(LONGEST_LINE, _RATIO * size)) if packed else LARGEST_WHOLE
    parts, read = [], 0
    with open_file(path) as file:
        while part := file.read(_CHUNK):
            parts.append(part)
            read += len(part)
            if read > most:
                return most
    return b"".join(parts)


def impostor(head: bytes, kind: str) -> str | None:
    """Say what a file really is, if its first bytes give it away."""
    text = head.lstrip(b"\xef\xbb\xbf \t\r\n")
    if not text:
        return "is empty"
    if text.startswith(b"version https://git-lfs"):
        return "is a Git LFS pointer, not the data; run git lfs pull"
    if text.startswith(b"PK\x03\x04"):
        return "is a zip archive; unpack it first"
    if kind == ".parquet":
        return None if head.startswith(b"PAR1") else "is not Parquet: it does not begin with PAR1"
    if head.startswith(b"PAR1"):
        return "is Parquet; name it .parquet"
    if head.startswith((b"\xff\xfe", b"\xfe\xff")):
        return "is UTF-16; save it as UTF-8"
    if text[:5].lower() in (b"<html", b"<!doc") or (text[:1] == b"<" and kind not in (".csv", ".tsv")):
        return "is a web page (HTML), not data; download the raw file instead"
    return None
