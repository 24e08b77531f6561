"""What is measured: sizes of Phi-3 models and shapes of data. CPU workloads A to D, GPU workloads W1 to W5."""

from __future__ import annotations

import json
import math
import random
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

MINI = dict(
    hidden_size=3072,
    intermediate_size=8192,
    num_hidden_layers=32,
    num_attention_heads=32,
    num_key_value_heads=32,
    vocab_size=32064,
    max_position_embeddings=4096,
    sliding_window=2047,
)


@dataclass(frozen=True)
class Workload:
    """One model and one shape of data; `model` holds `Phi3Config` fields, `batch` counts rows (packs hold as many)."""

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
    notes: str = field(default="", compare=False)


def _small(hidden: int, intermediate: int, layers: int, heads: int, vocab: int, **more: Any) -> dict[str, Any]:
    return (
        dict(
            hidden_size=hidden,
            intermediate_size=intermediate,
            num_hidden_layers=layers,
            num_attention_heads=heads,
            num_key_value_heads=heads,
            vocab_size=vocab,
            max_position_embeddings=4096,
        )
        | more
    )


WORKLOADS = {
    load.name: load
    for load in (
        Workload("A", _small(64, 128, 2, 4, 32064), 8, 8, 512, 10, 80, 200, notes="head-bound"),
        Workload("B", _small(256, 512, 4, 4, 32064), 8, 8, 512, 8, 64, 200, notes="balanced"),
        Workload("C", _small(64, 128, 32, 4, 1000), 8, 8, 512, 10, 80, 200, notes="host overhead"),
        Workload("D", _small(384, 1024, 6, 6, 32064), 16, 8, 512, 8, 64, 200, notes="35M parameters"),
        Workload("D-bf16", _small(384, 1024, 6, 6, 32064), 16, 8, 512, 8, 64, 200, dtype="bfloat16"),
        Workload("G", _small(128, 320, 4, 8, 32064, num_key_value_heads=2), 8, 8, 512, 8, 64, 200, notes="GQA"),
        Workload("W1", MINI, 16, 16, 4096, 30, 480, 1000, "bfloat16", "cuda", notes="Phi-3-mini-4k, packed 4096"),
        Workload("W2", MINI, 16, 16, 2048, 30, 480, 1000, "bfloat16", "cuda", notes="packed 2048"),
        Workload("W3", MINI, 16, 8, 2048, 30, 480, 200, "bfloat16", "cuda", notes="short rows of many lengths"),
        Workload("W4", MINI, 16, 16, 4096, 30, 480, 1000, "bfloat16", "cuda", quantize=True, notes="QLoRA"),
        Workload("W5", MINI, 16, 4, 2048, 20, 240, 1000, "bfloat16", "cuda", memory_gb=24.0, notes="24 GB"),
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


def chats(path: Path, tokenizer: Path, load: Workload) -> list[dict[str, list[int]]]:
    """Real rows: JSONL with question and answer, or messages, encoded with a real Phi-3 tokenizer."""
    from phi3_lora_plugin.chat.encode import encode_batch
    from phi3_lora_plugin.tokenizer import load_tokenizer

    lines = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
    conversations = [
        line["messages"]
        if "messages" in line
        else [{"role": "user", "content": line["question"]}, {"role": "assistant", "content": line["answer"]}]
        for line in lines[: load.rows]
    ]
    encoded = encode_batch(conversations, load_tokenizer(tokenizer), max_length=load.max_length)
    return [{"input_ids": row["input_ids"], "labels": row["labels"]} for row in encoded if isinstance(row, dict)]
