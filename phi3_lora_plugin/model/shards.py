"""A model folder's weights, read tensor by tensor and written shard by shard, so that memory holds about one shard."""

from __future__ import annotations

import json
import re
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from phi3_lora_plugin.error import Phi3LoraError

if TYPE_CHECKING:
    from torch import Tensor

_INDEX = "model.safetensors.index.json"
_SINGLE = "model.safetensors"
_UNITS = {"": 1, "K": 10**3, "M": 10**6, "G": 10**9, "T": 10**12, "KI": 2**10, "MI": 2**20, "GI": 2**30, "TI": 2**40}
# What belongs to a tokenizer or to generation, and travels with a model unchanged.
TOKENIZER_FILES = (
    "tokenizer.json", "tokenizer_config.json", "tokenizer.model", "special_tokens_map.json", "added_tokens.json",
    "vocab.json", "merges.txt", "chat_template.jinja", "chat_template.json",
)  # fmt: skip


class ModelFolderError(Phi3LoraError):
    """A folder is no model whose weights can be used, or a target cannot be written; says what is there."""


def model_folder(path_or_id: str | Path, revision: str | None = None) -> Path:
    """The folder of a model: a path, `embedded:NAME`, or a hub id that is in the local cache. Never downloads.

    Raises:
        ModelFolderError: it is nowhere on this machine, or has no config.json.
    """
    from phi3_lora_plugin.embedded import locate

    folder = Path(locate(str(path_or_id)))
    if not folder.exists() and re.fullmatch(r"[\w.-]+/[\w.-]+", str(path_or_id)):
        from huggingface_hub import snapshot_download
        from huggingface_hub.errors import LocalEntryNotFoundError

        try:
            folder = Path(snapshot_download(str(path_or_id), revision=revision, local_files_only=True))
        except (LocalEntryNotFoundError, FileNotFoundError) as error:
            raise ModelFolderError(
                f"{path_or_id} is neither a folder nor in the local cache; fetch it with `hf download {path_or_id}`, "
                "or name the folder where it is with --base"
            ) from error
    if not (folder / "config.json").is_file():
        raise ModelFolderError(f"{folder} is no model folder: config.json is missing")
    return folder


def read_json(path: Path) -> dict[str, Any]:
    """A JSON file that holds a mapping."""
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, json.JSONDecodeError) as error:
        raise ModelFolderError(f"{path} cannot be read: {error}") from error
    if not isinstance(data, dict):
        raise ModelFolderError(f"{path}: expected a mapping, got {type(data).__name__}")
    return data


def parse_size(text: str | int) -> int:
    """Bytes of `2GB`, `500 MB`, `1GiB` or a plain number."""
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([KMGT]?I?)B?\s*", str(text).upper())
    if match is None or float(match[1]) <= 0:
        raise ModelFolderError(f"size {text!r}: expected something like 2GB or 500MB")
    return int(float(match[1]) * _UNITS[match[2]])


class Weights:
    """The safetensors files of a model folder, one tensor at a time.

    Raises:
        ModelFolderError: no safetensors, a file that is damaged, one of the index that is missing, or tensors that the
            index promises and no file has.
    """

    def __init__(self, folder: Path) -> None:
        from safetensors import SafetensorError, safe_open

        self.folder = folder
        if (folder / _INDEX).is_file():
            place = read_json(folder / _INDEX).get("weight_map", {})
            files = sorted(set(place.values()))
        elif (folder / _SINGLE).is_file():
            place, files = None, [_SINGLE]
        else:
            found = ", ".join(sorted(entry.name for entry in folder.iterdir())[:8])
            raise ModelFolderError(
                f"{folder} has no {_SINGLE} and no {_INDEX}, and other formats are not read; found {found}"
            )
        self._file_of: dict[str, str] = {}
        self._shapes: dict[str, tuple[int, ...]] = {}
        self._dtypes: dict[str, str] = {}
        for name in files:
            if not (folder / name).is_file():
                raise ModelFolderError(
                    f"{folder / _INDEX} names {name}, which is missing; the download is not complete"
                )
            try:
                with safe_open(folder / name, framework="pt") as file:
                    for key in file.keys():
                        if place is None or place.get(key) == name:
                            part = file.get_slice(key)
                            self._file_of[key] = name
                            self._shapes[key], self._dtypes[key] = tuple(part.get_shape()), part.get_dtype()
            except SafetensorError as error:
                raise ModelFolderError(f"{folder / name} is cut off or damaged: {error}") from error
        if missing := sorted(set(place or ()) - set(self._file_of)):
            raise ModelFolderError(f"{folder}: the index promises tensors that no file has: {', '.join(missing[:5])}")

    def __iter__(self) -> Iterator[str]:
        return iter(self._file_of)

    def __len__(self) -> int:
        return len(self._file_of)

    def __contains__(self, name: object) -> bool:
        return name in self._file_of

    def shape(self, name: str) -> tuple[int, ...]:
        return self._shapes[name]

    def dtype(self, name: str) -> str:
        """As safetensors names it: F32, BF16, F16, U8, ..."""
        return self._dtypes[name]

    def read(self, name: str) -> Tensor:
        """One tensor, on the CPU."""
        from safetensors import safe_open

        with safe_open(self.folder / self._file_of[name], framework="pt") as file:
            tensor: Tensor = file.get_tensor(name)
            return tensor


class ShardWriter:
    """Writes tensors in the order they come as `model-0000N-of-0000M.safetensors`, or as one file if one is enough."""

    def __init__(self, folder: Path, max_shard: str | int = "2GB") -> None:
        self.folder = folder
        self.limit = parse_size(max_shard)
        self.total = 0
        self._open: dict[str, Tensor] = {}
        self._open_bytes = 0
        self._shards: list[list[str]] = []

    def add(self, name: str, tensor: Tensor) -> None:
        size = tensor.numel() * tensor.element_size()
        if self._open and self._open_bytes + size > self.limit:
            self._flush()
        self._open[name] = tensor.detach().contiguous().clone()
        self._open_bytes += size
        self.total += size

    def close(self) -> int:
        """Write what is left and the index; returns the number of files."""
        self._flush()
        count = len(self._shards)
        names = [_SINGLE] if count == 1 else [f"model-{n:05}-of-{count:05}.safetensors" for n in range(1, count + 1)]
        for number, name in enumerate(names):
            (self.folder / f"shard-{number}").rename(self.folder / name)
        if count > 1:
            place = {key: name for keys, name in zip(self._shards, names, strict=True) for key in keys}
            index = {"metadata": {"total_size": self.total}, "weight_map": dict(sorted(place.items()))}
            write_json(self.folder / _INDEX, index)
        return count

    def _flush(self) -> None:
        from safetensors.torch import save_file

        if self._open:
            save_file(self._open, self.folder / f"shard-{len(self._shards)}", metadata={"format": "pt"})
            self._shards.append(list(self._open))
            self._open, self._open_bytes = {}, 0


def write_json(path: Path, data: Any) -> None:
    path.write_text(json.dumps(data, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def copy_tokenizer(sources: list[Path], target: Path) -> Path | None:
    """Copy the tokenizer of the first folder that has one, without `auto_map`; returns that folder."""
    for source in sources:
        if not any((source / name).is_file() for name in ("tokenizer.json", "tokenizer.model")):
            continue
        for name in TOKENIZER_FILES:
            if name == "tokenizer_config.json" and (source / name).is_file():
                settings = read_json(source / name)
                settings.pop("auto_map", None)
                write_json(target / name, settings)
            elif (source / name).is_file():
                shutil.copyfile(source / name, target / name)
        return source
    return None


@contextmanager
def staged(target: Path, overwrite: bool = False) -> Iterator[Path]:
    """A folder beside `target` to write into, which takes its place when the block ends well, and else is gone.

    Raises:
        ModelFolderError: the target has something in it and `overwrite` is not given, or it is a file.
    """
    target = Path(target)
    if target.is_file() or (target.is_dir() and any(target.iterdir()) and not overwrite):
        raise ModelFolderError(f"{target} is not empty; name another place, or say --overwrite")
    target.parent.mkdir(parents=True, exist_ok=True)
    stage = Path(tempfile.mkdtemp(prefix=f".{target.name}.", suffix=".tmp", dir=target.parent))
    try:
        stage.chmod(0o755)
        yield stage
        _sync(stage)
        old = None
        if target.exists():
            old = Path(tempfile.mkdtemp(prefix=f".{target.name}.", suffix=".old", dir=target.parent))
            target.rename(old / "was")
        stage.rename(target)
        if old:
            shutil.rmtree(old)
    except BaseException:
        shutil.rmtree(stage, ignore_errors=True)
        raise


def _sync(folder: Path) -> None:
    import os

    for path in [*folder.rglob("*"), folder]:
        handle = os.open(path, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)
