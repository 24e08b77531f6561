"""What tells one base model from another: a hash over its weights."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

from phi3_lora_plugin.model.folder import model_folder

#: Bytes up to which a tensor is hashed whole for a fingerprint; larger ones are sampled.
_WHOLE = 1 << 22


def base_fingerprint(path_or_id: str | Path, revision: str | None = None) -> str:
    """sha256 over names, types, shapes and values of a model's weights, however they are split into files.

    Tensors of more than 4 MiB are sampled (17 pieces of 256 KiB), so that 28 GB take seconds; a model trained further
    differs everywhere, an edit of single values in a large tensor may go unseen.
    """
    folder = model_folder(str(path_or_id), revision)
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


def local_fingerprint(name: str, revision: str | None = None) -> str | None:
    """Fingerprint of a base whose files lie on this machine, as `base_facts` has it; None if they do not."""
    from phi3_lora_plugin.model.fingerprint import base_fingerprint

    folder = cached_folder(name, revision)
    return None if folder is None else base_fingerprint(folder)


def cached_folder(name: str | None, commit: str | None) -> Path | None:
    """Where the files of a base lie on this machine; never asks the hub."""
    if not name:
        return None
    folder = Path(name)
    if not folder.is_dir():
        from huggingface_hub import try_to_load_from_cache
        from huggingface_hub.errors import HFValidationError

        try:
            cached = try_to_load_from_cache(name, "config.json", revision=commit)
        except HFValidationError:
            return None
        folder = Path(cached).parent if isinstance(cached, str) else folder
    return folder if (folder / "config.json").is_file() and any(folder.glob("*.safetensors")) else None
