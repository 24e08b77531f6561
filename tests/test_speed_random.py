"""Models, adapters and batches drawn at random: each step in float64 is the step of plain transformers and PEFT."""

from __future__ import annotations

import copy
from random import Random
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import Phi3Config, Phi3ForCausalLM

from phi3_lora_plugin.speed.apply import PARTS, slow_down, speed_up

PROJECTIONS = ["qkv_proj", "o_proj", "gate_up_proj", "down_proj"]


def model(draw: Random) -> torch.nn.Module:
    heads, size = draw.choice([1, 2, 3, 6]), draw.choice([4, 6, 10, 11])
    shape = dict(
        hidden_size=draw.choice([17, 23, 40]),
        head_dim=size,
        num_attention_heads=heads,
        num_key_value_heads=draw.choice([each for each in (1, 2, 3, 6) if heads % each == 0]),
        intermediate_size=draw.choice([1, 13, 32]),
        num_hidden_layers=draw.choice([1, 2, 3]),
        vocab_size=draw.choice([11, 97]),
        partial_rotary_factor=draw.choice([0.5, 0.9, 1.0]) if size != 11 else 0.4,
        sliding_window=draw.choice([None, 1, 5, 300]),
        tie_word_embeddings=draw.random() < 0.3,
    )
    adapter = LoraConfig(
        r=draw.choice([1, 3, 17, 64]),
        lora_alpha=draw.choice([-3, 0, 7.5]),  # type: ignore[arg-type]
        use_rslora=draw.random() < 0.3,
        lora_dropout=draw.choice([0, 0, 0.3]),
        use_dora=draw.random() < 0.1,
        target_modules=draw.sample(PROJECTIONS, draw.randint(1, 4)),
        modules_to_save=draw.choice([None, None, ["norm"], ["input_layernorm"], ["lm_head"]]),
        init_lora_weights=False,
    )
    torch.manual_seed(draw.randint(0, 999))
    base = Phi3ForCausalLM(Phi3Config(pad_token_id=None, attn_implementation="sdpa", **shape)).double()  # type: ignore[arg-type]
    for name, module in base.named_modules():
        if name.endswith(tuple(draw.sample(PROJECTIONS, 1))) and draw.random() < 0.3:
            module.bias = torch.nn.Parameter(torch.randn(module.out_features, dtype=torch.float64))
    made = get_peft_model(base, adapter, autocast_adapter_dtype=False).double().train()
    for name, parameter in made.named_parameters():
        if name.endswith("bias"):
            parameter.requires_grad_(draw.random() < 0.5)
    return made


def batch(draw: Random) -> dict[str, torch.Tensor]:
    rows, tokens = draw.randint(1, 4), draw.choice([2, 8, 23])
    ids = torch.randint(0, 11, (rows, tokens), generator=torch.Generator().manual_seed(draw.randint(0, 999)))
    mask = torch.ones_like(ids)
    side = draw.choice(["left", "right", "right", "none"])
    for row in range(rows):
        padding = draw.randint(0, tokens - 1) if side != "none" else 0
        mask[row, tokens - padding :] = 0
    mask = mask.flip(1) if side == "left" else mask
    unlabelled = torch.rand(ids.shape, generator=torch.Generator().manual_seed(1)) > draw.choice([0.1, 0.5, 1.0])
    labels = ids.masked_fill((mask == 0) | unlabelled, -100)
    return {"input_ids": ids, "attention_mask": mask, "labels": labels, "num_items_in_batch": torch.tensor(5)}


def step(made: torch.nn.Module, inputs: dict[str, Any]) -> tuple[float, torch.Tensor]:
    made.zero_grad()
    torch.manual_seed(3)
    loss = made(**inputs).loss
    loss.backward()
    trained = [p for p in made.parameters() if p.requires_grad]
    return loss.item(), torch.cat([(torch.zeros_like(p) if p.grad is None else p.grad).flatten() for p in trained])


@pytest.mark.parametrize("seed", range(24))
def test_a_step_is_the_stock_step(seed: int) -> None:
    draw = Random(seed)
    stock, inputs = model(draw), batch(draw)
    ours = copy.deepcopy(stock)
    loss, gradient = step(stock, inputs)
    for parts in ("auto", {part: draw.random() < 0.5 for part in PARTS}, {draw.choice(list(PARTS)): False}):
        speed_up(ours, parts)
        mine, gradients = step(ours, inputs)
        assert mine == pytest.approx(loss, rel=1e-6, abs=1e-7), parts  # stock norms and losses are float32
        torch.testing.assert_close(gradients, gradient, rtol=1e-4, atol=1e-6 * max(1.0, float(gradient.abs().max())))
        if draw.random() < 0.5:
            slow_down(ours)
