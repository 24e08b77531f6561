"""What is measured: sizes of Phi-3 models and shapes of data. CPU workloads A to D and R, GPU workloads W1 to W5."""

from __future__ import annotations

import json
import math
import random
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

from benchmarks.sizes import MINI

_GSM8K = {"prompt": "question", "completion": "answer"}  # its columns, if no others are given


@dataclass(frozen=True)
class Workload:
    """One model and one shape of data; `model` holds `Phi3Config` fields, `batch` counts rows (packs hold as many).

    `recomputed` also measures runs with activation checkpointing, in place of packs. `tiled` repeats one block of
    random numbers in all weights, which takes seconds where billions of draws take a minute.
    """

    name: str
    model: dict[str, Any]
    rank: int
    batch: int
    max_length: int
    steps: int
    rows: int
    mean_length: int
    dtype: str = "float32"
    device: str = "cpu"
    quantize: bool = False
    memory_gb: float | None = None
    supervised: float = 0.45
    learning_rate: float = 1e-3
    warm_up: int = 3
    recomputed: bool = False
    tiled: bool = False
    notes: str = field(default="", compare=False)


def _small(hidden: int, intermediate: int, layers: int, heads: int, vocab: int, **more: Any) -> dict[str, Any]:
    sizes = dict(hidden_size=hidden, intermediate_size=intermediate, num_hidden_layers=layers, vocab_size=vocab)
    return sizes | dict(num_attention_heads=heads, num_key_value_heads=heads, max_position_embeddings=4096) | more


WORKLOADS = {
    load.name: load
    for load in (
        Workload("A", _small(64, 128, 2, 4, 32064), 8, 8, 512, 10, 80, 200, notes="head-bound"),
        Workload("B", _small(256, 512, 4, 4, 32064), 8, 8, 512, 8, 64, 200, notes="balanced"),
        Workload("C", _small(64, 128, 32, 4, 1000), 8, 8, 512, 10, 80, 200, notes="host overhead"),
        Workload("D", _small(384, 1024, 6, 6, 32064), 16, 8, 512, 8, 64, 200, notes="35M parameters"),
        Workload("D-bf16", _small(384, 1024, 6, 6, 32064), 16, 8, 512, 8, 64, 200, dtype="bfloat16"),
        Workload("G", _small(128, 320, 4, 8, 32064, num_key_value_heads=2), 8, 8, 512, 8, 64, 200, notes="GQA"),
        # The real sizes on a CPU, 9 to 13 GB a run: rows of 256 tokens exactly, two a step.
        Workload(
            "R",
            MINI,
            16,
            2,
            256,
            3,
            8,
            2000,
            "bfloat16",
            warm_up=1,
            recomputed=True,
            tiled=True,
            notes="Phi-3-mini-4k, 3.8B parameters",
        ),  # fmt: skip
        # Padded stock code, the hungriest, fits 80 GB without checkpointing; a test checks them with a dry run.
        Workload("W1", MINI, 16, 3, 4096, 30, 90, 1000, "bfloat16", "cuda", notes="Phi-3-mini-4k, packed 4096"),
        Workload("W2", MINI, 16, 5, 2048, 30, 150, 1000, "bfloat16", "cuda", notes="packed 2048"),
        Workload("W3", MINI, 16, 8, 2048, 30, 240, 200, "bfloat16", "cuda", notes="short rows of many lengths"),
        Workload("W4", MINI, 16, 3, 4096, 30, 90, 1000, "bfloat16", "cuda", quantize=True, notes="QLoRA"),
        Workload("W5", MINI, 16, 2, 1024, 20, 40, 500, "bfloat16", "cuda", memory_gb=24.0, notes="24 GB"),
    )
}


def rows(load: Workload, seed: int) -> list[dict[str, list[int]]]:
    """Random rows of lognormal lengths, the last `supervised` share of each one labelled: the shape of a short chat."""
    draw = random.Random(seed)
    made = []
    for _ in range(load.rows):
        length = int(draw.lognormvariate(math.log(load.mean_length) - 0.125, 0.5))
        length = max(8, min(load.max_length, length))
        ids = [draw.randrange(3, min(load.model["vocab_size"], 32000)) for _ in range(length)]
        start = length - max(1, int(load.supervised * length))
        made.append({"input_ids": ids, "labels": [-100] * start + ids[start:]})
    return made


def chats(path: Path, columns: Mapping[str, str], tokenizer: str, load: Workload) -> list[dict[str, list[int]]]:
    """Real rows of any format that `data.path` takes, encoded with a real Phi-3 tokenizer."""
    from phi3_lora_plugin.chat.encode import encode_batch
    from phi3_lora_plugin.model.tokenizer import load_tokenizer

    read = list(islice(conversations(path, columns), load.rows))
    encoded = encode_batch(read, load_tokenizer(tokenizer), max_length=load.max_length)
    return [{"input_ids": row["input_ids"], "labels": row["labels"]} for row in encoded if isinstance(row, dict)]


def conversations(path: Path, columns: Mapping[str, str]) -> Iterator[Any]:
    """The conversations of files, without rows that are not conversations."""
    from phi3_lora_plugin.chat.readers import SourceError

    try:
        yield from _read(path, columns)
    except SourceError:
        if columns:
            raise
        yield from _read(path, _GSM8K)


def _read(path: Path, columns: Mapping[str, str]) -> Iterator[Any]:
    from phi3_lora_plugin.chat import adapt
    from phi3_lora_plugin.chat.readers import Problem
    from phi3_lora_plugin.chat.sources import find_sources
    from phi3_lora_plugin.recipe.sections import ChatSection

    for source in find_sources(str(path)).sources:
        for item in adapt.conversations(source, adapt.Reading(source.name), ChatSection(columns=dict(columns)), {}):
            if not isinstance(item, Problem):
                yield item[1]


def setting(text: str) -> tuple[str, Any]:
    """`KEY=VALUE` of `Phi3Config`, the value in JSON."""
    name, equals, value = text.partition("=")
    if not equals:
        raise ValueError(text)
    return name, json.loads(value)
