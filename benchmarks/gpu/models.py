"""Random Phi-3 models on the device, rows for them, and one step of either: what all facts are checked with."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks.batches import items_in, loss_of
from benchmarks.gpu.facts import Setup

TARGETS = ["qkv_proj", "o_proj", "gate_up_proj", "down_proj"]


def shapes(setup: Setup) -> dict[str, dict[str, Any]]:
    """What kernels tell apart: head sizes, shared keys, windows, partial and long rotary embeddings."""
    context, window = setup.small((24, 9), (512, 300))
    head = setup.small(16, 96)
    factors = [1.0 + 0.1 * i for i in range(head // 2)], [2.0 + i for i in range(head // 2)]
    rope = dict(rope_type="longrope", rope_theta=10000.0, original_max_position_embeddings=context)
    return {
        "heads of 96": {},
        "heads of 64": {"hidden_size": setup.small(32, 256)},
        "shared keys": {"num_key_value_heads": 1},
        "window": {"sliding_window": window, "num_key_value_heads": 2},
        "partial rotary": {"partial_rotary_factor": 0.75 if head % 32 == 0 else 0.5, "num_key_value_heads": 2},
        "longrope": {
            "original_max_position_embeddings": context,
            "rope_parameters": rope | dict(short_factor=factors[0], long_factor=factors[1]),
        },
    }


def lengths(setup: Setup) -> tuple[int, ...]:
    """Documents from one token on, round the tiles of kernels, beyond windows, on both sides of longrope's switch."""
    return setup.small((1, 2, 7, 23, 40), (1, 2, 63, 64, 129, 700, 4096))


def small_model(setup: Setup, dtype: torch.dtype, oracle: bool = False, **changes: Any) -> Any:
    """Two layers with LoRA on all projections, A and B both random, in training mode.

    Args:
        oracle: float32, with the very weights that `dtype` has.
    """
    sizes = dict(
        hidden_size=setup.small(64, 384),
        intermediate_size=setup.small(96, 1024),
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=4,
        vocab_size=setup.small(300, 4000),
        max_position_embeddings=8192,
    )
    base = random_base(setup, sizes | changes, torch.float32).to(dtype)
    return with_lora(base.float() if oracle else base, setup, 4, random=True)


def random_base(setup: Setup, sizes: Any, dtype: torch.dtype) -> Any:
    """A model with these fields of `Phi3Config`, or of this config, made on the device and in `dtype` at once."""
    from transformers import Phi3Config
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING

    fixed = dict(pad_token_id=0, bos_token_id=1, eos_token_id=2, attn_implementation="sdpa", use_cache=False)
    config = Phi3Config(**(sizes | fixed)) if isinstance(sizes, dict) else sizes
    torch.manual_seed(setup.seed)
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with setup.device:
            return MODEL_FOR_CAUSAL_LM_MAPPING[type(config)](config)
    finally:
        torch.set_default_dtype(before)


def with_lora(base: Any, setup: Setup, rank: int, random: bool = False) -> Any:
    """PEFT's model round `base`, equal for equal seeds."""
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(setup.seed)
    config = LoraConfig(
        r=rank, lora_alpha=2 * rank, target_modules=TARGETS, task_type="CAUSAL_LM", init_lora_weights=not random
    )
    model = get_peft_model(base, config)
    if random:  # PEFT's own random B is so large that 16 bits show nothing but its rounding
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                torch.nn.init.normal_(parameter, std=0.05)
    return model.train()


def rows(setup: Setup, counts: Sequence[int], vocabulary: int, supervised: float = 0.45) -> list[dict[str, Any]]:
    """Random rows of these lengths, the last share of each supervised."""
    draw = torch.Generator().manual_seed(setup.seed)
    made = []
    for count in counts:
        ids = torch.randint(3, vocabulary, (count,), generator=draw).tolist()
        start = count - max(1, round(supervised * count))
        made.append({"input_ids": ids, "labels": [-100] * start + ids[start:]})
    return made


def packed(some: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """One batch without padding, as our collator packs it."""
    from phi3_lora_plugin.chat.pack import PackedCollator

    return PackedCollator()([{"rows": list(some)}])


def step(model: Any, batches: Sequence[dict[str, Any]], setup: Setup, mixed: torch.dtype | None = None) -> Any:
    """(loss, gradients as one float32 vector) over all batches, as a Trainer accumulates them."""
    model.zero_grad()
    items = max(1, items_in(batches))
    total = 0.0
    for batch in batches:
        loss = loss_of(model, batch, setup.device, items, mixed)
        loss.backward()
        total += float(loss.detach())
    return total, gradients(model)


def common_arguments(setup: Setup, folder: Path, steps: int) -> dict[str, Any]:
    """Arguments that every Trainer has here."""
    on_cpu = setup.device.type == "cpu"
    return dict(
        output_dir=str(folder),
        max_steps=steps,
        per_device_train_batch_size=4,
        lr_scheduler_type="constant",
        logging_steps=1,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        use_cpu=on_cpu,
        bf16=setup.half == torch.bfloat16,
        fp16=setup.half == torch.float16,
        remove_unused_columns=False,
        dataloader_pin_memory=not on_cpu,
        seed=setup.seed,
    )


def gradients(model: Any) -> torch.Tensor:
    """Of all trained tensors, as one float32 vector; zeros where nothing came."""
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    return torch.cat([(torch.zeros_like(p) if p.grad is None else p.grad).float().flatten() for p in trained])


def error(mine: torch.Tensor, exact: torch.Tensor) -> float:
    """Norm of the difference over the norm."""
    return float((mine - exact).norm() / exact.norm())


def vector(model: Any) -> torch.Tensor:
    """All trained tensors as one float32 vector."""
    return torch.cat([p.detach().float().flatten() for p in model.parameters() if p.requires_grad])
