"""`python -m benchmarks.parity`: our steps against plain transformers and PEFT in float64, over shapes and switches.

    python -m benchmarks.parity --seed 7
    python -m benchmarks.parity --shapes gqa "200k words" --steps 5

Each shape is trained by a bare loop, no Trainer: with stock code, with every part of the switch, with each part alone,
with all but one, and on packs. Losses and adapters have to agree; otherwise the command ends with exit code 1.
"""

from __future__ import annotations

import argparse
import sys
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from transformers import Phi3Config, Phi3ForCausalLM

from benchmarks.batches import items_in, padded
from phi3_lora_plugin.chat.pack import PackedCollator, pack
from phi3_lora_plugin.speed.apply import PARTS, slow_down, speed_up

TARGETS = ["qkv_proj", "o_proj", "gate_up_proj", "down_proj"]
LIMIT = 1e-6  # of losses, relative: stock code takes the loss itself in float32, whatever the model is in
CONTEXT = 48

SHAPES: dict[str, dict[str, Any]] = {
    "plain": {},
    "one layer": {"num_hidden_layers": 1},
    "32 layers": {"num_hidden_layers": 32},
    "gqa": {"num_key_value_heads": 2},
    "one key head": {"num_key_value_heads": 1},
    "partial rotary": {"partial_rotary_factor": 0.5},
    "window": {"sliding_window": 9},
    "gqa, window, partial rotary": {"num_key_value_heads": 2, "sliding_window": 9, "partial_rotary_factor": 0.75},
    "512 words": {"vocab_size": 512},
    "200k words": {"vocab_size": 200_064, "hidden_size": 32, "intermediate_size": 64},
    "tied": {"tie_word_embeddings": True},
    "longrope": {
        "max_position_embeddings": 256,
        "original_max_position_embeddings": CONTEXT,
        "rope_parameters": {
            "rope_type": "longrope",
            "rope_theta": 10000.0,
            "short_factor": [1.0 + 0.1 * i for i in range(8)],
            "long_factor": [2.0 + i for i in range(8)],
            "original_max_position_embeddings": CONTEXT,
        },
    },
}


def arguments() -> argparse.ArgumentParser:
    """What may be asked for on the command line."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.parity", description=__doc__.split("\n", 1)[0])
    parser.add_argument("--shapes", nargs="*", default=list(SHAPES), choices=list(SHAPES), metavar="SHAPE")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--steps", type=int, default=3)
    return parser


def main() -> int:
    """Print a line a shape; 0 only if all of them agree."""
    chosen = arguments().parse_args()
    alone = [{part: part == one for part in PARTS} for one in PARTS]
    without = [{part: part != one for part in PARTS} for one in PARTS]
    failed = False
    for shape in chosen.shapes:
        data = rows(SHAPES[shape].get("vocab_size", 2000), chosen.seed)
        stock, stock_adapter = train(shape, "off", [padded(data)], chosen)
        worst = [0.0, 0.0]
        for parts in ("auto", *alone, *without):
            losses, adapter = train(shape, parts, [padded(data)], chosen)
            worst[0] = max(worst[0], *(abs(a - b) / b for a, b in zip(losses, stock, strict=True)))
            worst[1] = max(worst[1], float((adapter - stock_adapter).abs().max()))
        # Longrope by document is what each row has alone; a stock batch has long factors for all if one row is long.
        single, single_adapter = train(shape, "off", [padded([row]) for row in data], chosen)
        packs = [{"rows": [data[i] for i in members]} for members in pack([len(r["input_ids"]) for r in data], 64)]
        losses, adapter = train(shape, "auto", [PackedCollator()(packs)], chosen)
        worst[0] = max(worst[0], *(abs(a - b) / b for a, b in zip(losses, single, strict=True)))
        worst[1] = max(worst[1], float((adapter - single_adapter).abs().max()))
        good = worst[0] <= LIMIT and worst[1] <= 1e-6
        failed |= not good
        print(f"{shape:<30} losses within {worst[0]:.1e}, adapters within {worst[1]:.1e}{'' if good else '  FAILED'}")
    return 1 if failed else 0


def rows(vocabulary: int, seed: int) -> list[dict[str, list[int]]]:
    """Six rows of 2 to 60 tokens, on both sides of `CONTEXT`, about half of each supervised."""
    draw = torch.Generator().manual_seed(seed)
    made = []
    for length in (60, 2, *torch.randint(3, CONTEXT, (4,), generator=draw).tolist()):
        ids = torch.randint(3, vocabulary, (length,), generator=draw).tolist()
        made.append({"input_ids": ids, "labels": [-100] * (length // 2) + ids[length // 2 :]})
    return made


def train(shape: str, parts: Any, batches: list[dict[str, Any]], chosen: Any) -> tuple[Any, Any]:
    """(loss of each step, adapter as one vector): every step takes all batches, accumulated as Trainer does it."""
    sizes = dict(hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4, vocab_size=2000)
    sizes |= dict(num_key_value_heads=4, max_position_embeddings=256, pad_token_id=0, bos_token_id=1, eos_token_id=2)
    if shape == "longrope":
        sizes |= dict(hidden_size=64)  # heads of 16: eight frequencies
    torch.manual_seed(chosen.seed)
    model = Phi3ForCausalLM(Phi3Config(**(sizes | SHAPES[shape]), use_cache=False)).double()
    torch.manual_seed(chosen.seed)
    config = LoraConfig(r=4, lora_alpha=8, target_modules=TARGETS, init_lora_weights=False)
    model = get_peft_model(model, config, autocast_adapter_dtype=False).double().train()
    speed_up(model, parts)
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.SGD(trained, lr=0.05)
    items = items_in(batches)
    losses = []
    for _ in range(chosen.steps):
        model.zero_grad()
        total = 0.0
        for batch in batches:
            loss = model(**batch, num_items_in_batch=items).loss
            loss.backward()
            total += loss.item()
        optimizer.step()
        losses.append(total)
    slow_down(model)
    return losses, torch.cat([p.detach().flatten() for p in trained])


if __name__ == "__main__":
    sys.exit(main())
