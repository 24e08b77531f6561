"""What cards can do, by their makers' data sheets, and what a token of training costs in arithmetic."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class CardFacts:
    """Dense 16-bit tensor-core FLOP/s, bytes a second from memory, bytes of memory."""

    title: str
    flops: float
    bandwidth: float
    memory: float
    bfloat16: bool = True


CARDS = {
    "h100": CardFacts("NVIDIA H100 SXM", 989e12, 3.35e12, 80e9),
    "h200": CardFacts("NVIDIA H200", 989e12, 4.8e12, 141e9),
    "a100": CardFacts("NVIDIA A100 SXM 80 GB", 312e12, 2.04e12, 80e9),
    "4090": CardFacts("NVIDIA GeForce RTX 4090", 165e12, 1.01e12, 24e9),
    "t4": CardFacts("NVIDIA T4", 65e12, 0.32e12, 16e9, bfloat16=False),
}


def card_of(name: str) -> CardFacts | None:
    """The card that a driver calls so (`torch.cuda.get_device_name`); None for one that is not in `CARDS`."""
    words = name.lower().replace("-", " ").split()
    return next((facts for key, facts in CARDS.items() if key in words), None)


def flops_per_token(config: Any, rank: int, lengths: tuple[int, ...], checkpointing: bool) -> float:
    """Arithmetic of a token in a LoRA step on all four projections: forward, gradients of inputs, attention, LoRA.

    The frozen weights get no gradient of their own. With checkpointing the layers' forward runs twice. The head is
    counted for every token; causal attention sees half of each document, or its window.
    """
    hidden, inter, layers = config.hidden_size, config.intermediate_size, config.num_hidden_layers
    head = hidden // config.num_attention_heads
    shared = 2 * config.num_key_value_heads * head
    maps = [(hidden, hidden + shared), (hidden, hidden), (hidden, 2 * inter), (inter, hidden)]
    linear = sum(rows * columns for rows, columns in maps)
    adapters = sum(rank * (rows + columns) for rows, columns in maps)
    window = getattr(config, "sliding_window", None) or max(lengths)
    seen = sum(min(each, window) * (each - min(each, window) / 2) for each in lengths) / sum(lengths)
    attention = 4 * seen * hidden
    passes = 3 if checkpointing else 2
    layer = 2 * passes * linear + 2 * (passes + 2) * adapters + (passes + 1.5) * attention
    return layers * layer + 4 * hidden * config.vocab_size
