"""What identifies a base model: a hash over its weights."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

from phi3_lora_plugin.model.folder import ModelError, model_folder

#: Bytes up to which a tensor is hashed whole for a fingerprint; larger ones are sampled.
_WHOLE = 1 << 22


def base_fingerprint(folder: Path) -> str:
    """sha256 over names, types, shapes and values of a model's weights, however they are split into files.

    Tensors of more than 4 MiB are sampled (17 pieces of 256 KiB), so that 28 GB take seconds; a model trained further
    differs everywhere, an edit of single values in a large tensor may go unseen.
    """
    found: list[tuple[str, Path, str, list[int], int, int]] = []
    for file in sorted(folder.glob("*.safetensors")):
        with file.open("rb") as stream:
            size = int.from_bytes(stream.read(8), "little")
            header = json.loads(stream.read(size))
        for name, entry in header.items():
            if name != "__metadata__":
                start, stop = entry["data_offsets"]
                found.append((name, file, entry["dtype"], entry["shape"], 8 + size + start, 8 + size + stop))
    digest = hashlib.sha256()
    for name, file, dtype, shape, start, stop in sorted(found):
        digest.update(f"{name} {dtype} {shape}\n".encode())
        with file.open("rb") as stream:
            if stop - start <= _WHOLE:
                stream.seek(start)
                digest.update(stream.read(stop - start))
                continue
            piece = _WHOLE >> 4
            for part in range(17):
                stream.seek(start + part * (stop - start - piece) // 16)
                digest.update(stream.read(piece))
    return digest.hexdigest()


def local_folder(name: str | None, revision: str | None = None) -> Path | None:
    """Where the files of a base are on this machine, or None; never asks the hub."""
    try:
        return model_folder(name, revision) if name else None
    except ModelError:
        return None
