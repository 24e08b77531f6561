"""A model folder's weights, read tensor by tensor and written shard by shard, so that memory holds about one shard."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from phi3_lora_plugin.model.folder import INDEX, SINGLE, ModelError, read_json, weight_files
from phi3_lora_plugin.model.new_files import save_tensors
from phi3_lora_plugin.wording import listed, read_size

if TYPE_CHECKING:
    from torch import Tensor

# What belongs to a tokenizer or to generation, and travels with a model unchanged.
TOKENIZER_FILES = (
    "tokenizer.json", "tokenizer_config.json", "tokenizer.model", "special_tokens_map.json", "added_tokens.json",
    "vocab.json", "merges.txt", "chat_template.jinja", "chat_template.json",
)  # fmt: skip


class Weights:
    """The safetensors files of a model folder, one tensor at a time.

    Raises:
        ModelError: no safetensors, a file that is damaged, one of the index that is missing, or tensors that the
            index promises and no file has.
    """

    def __init__(self, folder: Path) -> None:
        from safetensors import SafetensorError, safe_open

        self.folder = folder
        place = weight_files(folder)
        files = [SINGLE] if place is None else sorted(set(place.values()))
        self._file_of: dict[str, str] = {}
        self._shapes: dict[str, tuple[int, ...]] = {}
        self._dtypes: dict[str, str] = {}
        for name in files:
            if not (folder / name).is_file():
                raise ModelError(f"{folder / INDEX} names {name}, which is missing; the download is not complete")
            try:
                with safe_open(folder / name, framework="pt") as file:
                    for key in file.keys():
                        if place is None or place.get(key) == name:
                            part = file.get_slice(key)
                            self._file_of[key] = name
                            self._shapes[key], self._dtypes[key] = tuple(part.get_shape()), part.get_dtype()
            except SafetensorError as error:
                raise ModelError(f"{folder / name} is cut off or damaged: {error}") from error
        if missing := sorted(set(place or ()) - set(self._file_of)):
            raise ModelError(f"{folder}: the index promises tensors that no file has: {listed(missing)}")

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

    def floating_type(self) -> str:
        """The dtype of the first weight, as torch names it; float32 for what is neither float16 nor bfloat16."""
        return {"F16": "float16", "BF16": "bfloat16"}.get(self.dtype(next(iter(self))), "float32")

    def read(self, name: str) -> Tensor:
        """One tensor, on the CPU."""
        from safetensors import safe_open

        with safe_open(self.folder / self._file_of[name], framework="pt") as file:
            tensor: Tensor = file.get_tensor(name)
            return tensor

    def equal(self, name: str, tensor: Tensor) -> bool:
        """Whether there is such a weight and it has these values, to its own precision."""
        import torch

        if name not in self or tuple(tensor.shape) != self.shape(name):
            return False
        own = self.read(name)
        return bool(torch.equal(tensor.to(own.dtype), own))


class ShardWriter:
    """Writes tensors in the order they come as `model-0000N-of-0000M.safetensors`, or as one file if one is enough."""

    def __init__(self, folder: Path, max_shard: str | int = "2GB") -> None:
        self.folder = folder
        limit = read_size(max_shard)
        if limit is None:
            raise ModelError(f"size {max_shard!r}: expected something like 2GB or 500MB")
        self.limit = limit
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
        names = [SINGLE] if count == 1 else [f"model-{n:05}-of-{count:05}.safetensors" for n in range(1, count + 1)]
        for number, name in enumerate(names):
            (self.folder / f"shard-{number}").rename(self.folder / name)
        if count > 1:
            place = {key: name for keys, name in zip(self._shards, names, strict=True) for key in keys}
            index = {"metadata": {"total_size": self.total}, "weight_map": dict(sorted(place.items()))}
            write_json(self.folder / INDEX, index)
        return count

    def _flush(self) -> None:
        if self._open:
            save_tensors(self._open, self.folder / f"shard-{len(self._shards)}")
            self._shards.append(list(self._open))
            self._open, self._open_bytes = {}, 0


def write_json(path: Path, data: Any) -> None:
    text = json.dumps(data, indent=2, ensure_ascii=False)
    if not text.isprintable() and any("\ud800" <= character <= "\udfff" for character in text):
        text = json.dumps(data, indent=2)  # half of a surrogate pair has no form but an escape
    path.write_text(text + "\n", encoding="utf-8")


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
