"""Every training option that changes a step: with the fast paths a run has the losses and adapters it has without."""

from __future__ import annotations

from pathlib import Path
from typing import Any
from weakref import ref

import pytest
import tiny
import torch
from lora_runs import arguments
from peft import LoraConfig, get_peft_model
from test_pack import LONGROPE
from transformers import DataCollatorForSeq2Seq, Trainer, set_seed

from phi3_lora_plugin.speed.apply import accelerate_phi3, slow_down, speed_up

pytestmark = pytest.mark.slow

TARGETS = ["qkv_proj", "o_proj", "gate_up_proj", "down_proj"]


def data(count: int = 16) -> list[dict[str, list[int]]]:
    made = []
    for index in range(count):
        draw = torch.Generator().manual_seed(index)
        ids = torch.randint(3, 400, (4 + 7 * index % 23,), generator=draw).tolist()
        made.append({"input_ids": ids, "labels": [-100] * (len(ids) // 3) + ids[len(ids) // 3 :]})
    return made


def collator() -> DataCollatorForSeq2Seq:
    words = tiny.tokenizer()
    words.padding_side = "right"
    return DataCollatorForSeq2Seq(words, padding=True)


def run(folder: Path, speed: str, lora: dict[str, Any], base: dict[str, Any], **settings: Any) -> tuple[Any, Any, Any]:
    """(training losses, evaluation losses, adapter) of three steps on rows of unequal length, padded."""
    set_seed(3)
    options = {"r": 4, "lora_alpha": 8, "target_modules": TARGETS, "task_type": "CAUSAL_LM"} | lora
    model = get_peft_model(tiny.model(**base), LoraConfig(**options))
    # a large epsilon: Adam makes whole steps of gradients that are nothing but rounding
    defaults = dict(max_steps=3, eval_strategy="steps", eval_steps=2, learning_rate=1e-2, adam_epsilon=1e-5)
    made = Trainer(
        model,
        arguments(folder, **(defaults | settings)),
        train_dataset=data(),  # type: ignore[arg-type]
        eval_dataset=data(5),  # type: ignore[arg-type]
        data_collator=collator(),
    )
    applied = {one.part: one.on for one in accelerate_phi3(made, speed)}
    assert applied["attention"] is applied["lora"] is (speed == "auto")
    made.train()
    log = made.state.log_history
    adapter = {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}
    return [one["loss"] for one in log if "loss" in one], [o["eval_loss"] for o in log if "eval_loss" in o], adapter


OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "neftune": {"neftune_noise_alpha": 5.0},
    "neftune, accumulated": {"neftune_noise_alpha": 5.0, "gradient_accumulation_steps": 2},
    "neftune, checkpointing": {"neftune_noise_alpha": 5.0, "gradient_checkpointing": True},
    "accumulation": {"gradient_accumulation_steps": 3, "per_device_train_batch_size": 2},
    "label smoothing": {"label_smoothing_factor": 0.1},
    "checkpointing": {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": False}},
    "checkpointing, reentrant": {
        "gradient_checkpointing": True,
        "gradient_checkpointing_kwargs": {"use_reentrant": True},
    },
    "clipping": {"max_grad_norm": 0.01},
    "weight decay": {"weight_decay": 0.3, "optim": "adamw_torch"},
    "sgd, cosine, warm-up": {"optim": "sgd", "lr_scheduler_type": "cosine", "warmup_steps": 1},
    "adafactor": {"optim": "adafactor"},
    "by length": {"train_sampling_strategy": "group_by_length"},
    "sequential": {"train_sampling_strategy": "sequential"},
    "one row": {"per_device_train_batch_size": 1, "per_device_eval_batch_size": 1},
    "no average by tokens": {"average_tokens_across_devices": False},
    "last batch dropped": {"dataloader_drop_last": True, "num_train_epochs": 1, "max_steps": -1},
    "tokens counted": {"include_num_input_tokens_seen": "non_padding"},
    "metrics of losses": {"prediction_loss_only": True},
    "workers": {"dataloader_num_workers": 1, "dataloader_persistent_workers": True},
    "full determinism": {"full_determinism": True},
}
LORA: dict[str, dict[str, Any]] = {
    "dropout": {"lora_dropout": 0.3},
    "rslora": {"use_rslora": True},
    "dora": {"use_dora": True},
    "dora, dropout": {"use_dora": True, "lora_dropout": 0.3},
    "embeddings too": {"target_modules": [*TARGETS, "embed_tokens"]},
    "saved head": {"modules_to_save": ["lm_head"]},
    "tokens": {"trainable_token_indices": [5, 6]},
    "bias": {"bias": "lora_only"},
    "one projection": {"target_modules": ["qkv_proj"]},
    "ranks": {"rank_pattern": {"qkv_proj": 2}, "alpha_pattern": {"down_proj": 3}},
}
BASE: dict[str, dict[str, Any]] = {
    "window": {"sliding_window": 6},
    "longrope": LONGROPE,
    "dropout of residuals": {"resid_pdrop": 0.2},
    "dropout of attention": {"attention_dropout": 0.2},
    "gqa, tied": {"num_key_value_heads": 2, "tie_word_embeddings": True},
}
CASES = (
    [pytest.param({}, {}, settings, id=name) for name, settings in OPTIONS.items()]
    + [pytest.param(lora, {}, {}, id=name) for name, lora in LORA.items()]
    + [pytest.param({}, base, {"neftune_noise_alpha": 5.0}, id=f"{name}, neftune") for name, base in BASE.items()]
)


@pytest.mark.parametrize(("lora", "base", "settings"), CASES)
def test_a_run_has_the_losses_that_it_has_without(
    lora: dict[str, Any], base: dict[str, Any], settings: dict[str, Any], tmp_path: Path
) -> None:
    stock = run(tmp_path / "stock", "off", lora, base, **settings)
    ours = run(tmp_path / "ours", "auto", lora, base, **settings)
    assert ours[0] == pytest.approx(stock[0], rel=1e-5) and len(ours[0]) >= 3
    assert ours[1] == pytest.approx(stock[1], rel=1e-5) and ours[1]
    for name, want in stock[2].items():
        torch.testing.assert_close(ours[2][name], want, rtol=2e-3, atol=2e-5, msg=name)


def test_a_trainer_that_is_dropped_is_gone_at_once(tmp_path: Path) -> None:
    """Not at the next garbage collection, which would wait five seconds for each worker of its DataLoaders."""
    model = get_peft_model(tiny.model(), LoraConfig(r=4, target_modules=TARGETS))
    made = Trainer(model, arguments(tmp_path), train_dataset=data(4))  # type: ignore[arg-type]
    assert next(one.on for one in accelerate_phi3(made, "auto") if one.part == "loss")
    there = ref(made)
    del made
    assert there() is None


@pytest.mark.parametrize("packed", [False, True])
def test_the_noise_of_neftune_is_scaled_by_the_shape_of_the_batch(packed: bool) -> None:
    """Jain et al. 2023 (arXiv 2310.05914): uniform in +-alpha / sqrt(tokens of a row x width)."""
    from transformers.integrations.neftune import activate_neftune

    from phi3_lora_plugin.chat.pack import PackedCollator

    model = get_peft_model(tiny.model(), LoraConfig(r=4, target_modules=TARGETS)).train()
    speed_up(model)
    rows = data(6)
    batch: Any = PackedCollator()([{"rows": rows}])
    if not packed:
        batch = collator()(rows, return_tensors="pt")
    seen: list[torch.Tensor] = []
    embedding = model.get_base_model().model.embed_tokens
    activate_neftune(model, 5.0)
    layer = model.get_base_model().model.layers[0]
    layer.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    model(**batch)
    flat = sum(len(row["input_ids"]) for row in rows)
    assert seen[0].shape == (1, flat, 32), "padding is left out all the same"
    ids = torch.tensor([token for row in rows for token in row["input_ids"]])
    clean = torch.nn.functional.embedding(ids, embedding.weight)[None]
    tokens = batch["input_ids"].shape[1]
    largest = (seen[0] - clean).abs().max().item()
    assert largest == pytest.approx(5.0 / (tokens * 32) ** 0.5, rel=0.01)
    slow_down(model)
