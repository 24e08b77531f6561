"""Part 1b: runs on this card end where they should: checkpointing, DPO, NF4, float16, saving, reloading, resuming."""

from __future__ import annotations

import hashlib
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch

from benchmarks.batches import items_in, loss_of, padded
from benchmarks.gpu.facts import Check, Found, Setup, installed
from benchmarks.gpu.models import common_arguments, error, lengths, packed, rows, small_model, step, vector, with_lora
from benchmarks.nf4 import linears, pack, packed_linear


def checks(setup: Setup) -> list[Check]:
    """In the order of what breaks a first run."""
    return [
        Check("checkpointing in the first step", 5, first_step_recomputed),
        Check("NF4 as its dequantised twin", 6, nf4_as_dequantised),
        Check("NF4 unpacked ahead as in turn", 6, unpacked_ahead),
        Check("float16 with a scaler", 4, float16_with_scaler),
        Check("DPO", 12, dpo),
        Check("the same adapter, saved now and in the background", 8, saved_alike),
        Check("greedy ids after reloading with plain PEFT", 6, greedy_after_reload),
        Check("resume: 2 + 2 steps are 4", 10, resumed),
    ]


def _words(setup: Setup) -> int:
    return int(setup.small(300, 4000))


def first_step_recomputed(setup: Setup) -> Found:
    """The first step of all recomputes its layers, and learns what a step that keeps them learns."""
    from benchmarks.checkpointing import recompute
    from phi3_lora_plugin.speed.apply import speed_up

    data = rows(setup, lengths(setup), _words(setup))
    found = []
    for first in (True, False):  # recomputing first: nothing may have been tried on this model before
        model = small_model(setup, setup.half, sliding_window=setup.small(9, 300))
        if first:
            recompute(model)
        speed_up(model)
        found.append([step(model, [batch], setup, setup.half) for batch in (padded(data), packed(data))])
    apart = max(error(again[1], kept[1]) for again, kept in zip(*found, strict=True))
    losses = [abs(again[0] - kept[0]) for again, kept in zip(*found, strict=True)]
    return Found(
        apart < 1e-2 and max(losses) < 1e-2,
        f"padded and packed pass; gradients differ by {apart:.1e} from a step that keeps its activations",
        {"gradients": apart, "losses": losses},
    )


def nf4_as_dequantised(setup: Setup) -> Found:
    """NF4 weights give what the weights that they stand for give in 16 bits."""
    installed("bitsandbytes")
    import bitsandbytes as bnb

    from phi3_lora_plugin.speed.apply import speed_up

    data = packed(rows(setup, lengths(setup), _words(setup)))
    results = {}
    for kind in ("nf4", "dequantised"):
        base = small_model(setup, setup.half).unload()
        for parent, name, linear in linears(base):
            four = packed_linear(linear)
            if kind == "nf4":
                setattr(parent, name, four)
            else:
                weight = bnb.functional.dequantize_4bit(four.weight.data, four.weight.quant_state)
                linear.weight.data = weight.to(linear.weight.dtype).view_as(linear.weight)
        base.is_loaded_in_4bit = kind == "nf4"
        model = with_lora(base, setup, 4, random=True)
        results[kind + " stock"] = step(model, [data], setup, setup.half)
        speed_up(model)
        results[kind] = step(model, [data], setup, setup.half)
    ours = error(results["nf4"][1], results["dequantised"][1])
    stock = error(results["nf4 stock"][1], results["dequantised stock"][1])
    between = error(results["nf4"][1], results["nf4 stock"][1])
    said = (
        f"gradients differ by {ours:.1e} from the twin's, stock code's by {stock:.1e}; from stock NF4 by {between:.1e}"
    )
    return Found(max(ours, between) < 2e-2, said, {"ours": ours, "stock": stock, "from stock": between})


def unpacked_ahead(setup: Setup) -> Found:
    """Steps whose NF4 weights are unpacked while products run are those with weights unpacked in turn; also recomputed.

    The trial at the start decides whether a run does so; here it is done in any case, and what the trial says is told.
    """
    installed("bitsandbytes")
    from benchmarks.checkpointing import recompute
    from phi3_lora_plugin.speed.apply import speed_up
    from phi3_lora_plugin.speed.proved_prefetch import start, stop

    # More rows than bitsandbytes multiplies by packed weights, and no more: the host is far ahead of short products.
    sizes = setup.small(((9, 4, 1), (7, 5)), ((1500, 700, 1), (900, 800)))
    data = [packed(rows(setup, some, _words(setup))) for some in sizes]
    said, apart, noise = "", 0.0, 0.0
    for again in (False, True):
        base = small_model(setup, setup.half).unload()
        pack(base)
        model = with_lora(base, setup, 4, random=True)
        if again:
            recompute(model)
        said = next(str(one) for one in speed_up(model) if one.part == "lora")
        stop(model)
        want = [step(model, data, setup, setup.half) for _ in range(2)]
        if setup.device.type == "cuda":  # a CPU does it in turn
            start(model)
        got = [step(model, data, setup, setup.half) for _ in range(6)]  # the order is known after two
        stop(model)
        noise = max(noise, error(want[1][1], want[0][1]))  # attention backwards may sum in no fixed order
        apart = max(apart, *(error(mine[1], want[0][1]) for mine in got))
    told = f"gradients differ by {apart:.1e}, and by {noise:.1e} between two steps in turn; {said}"
    return Found(apart <= 3 * noise, told, {"apart": apart, "noise": noise})


def float16_with_scaler(setup: Setup) -> Found:
    """Ten steps in float16 with a loss scaler: the loss falls, nothing is skipped for good, adapters stay float32."""
    from phi3_lora_plugin.speed.apply import speed_up

    model = small_model(setup, torch.float16)
    speed_up(model)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=3e-3)
    scaler = torch.amp.GradScaler(setup.device.type, init_scale=2.0**14)
    batch = packed(rows(setup, lengths(setup), _words(setup)))
    items, losses = items_in([batch]), []
    for _ in range(10):
        optimizer.zero_grad()
        loss = loss_of(model, batch, setup.device, items, torch.float16)
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
        losses.append(float(loss.detach()))
    finite = all(bool(torch.isfinite(parameter).all()) for parameter in trained)
    dtypes = {str(parameter.dtype) for parameter in trained}
    ok = finite and losses[-1] < losses[0] and dtypes == {"torch.float32"} and scaler.get_scale() >= 1
    said = f"loss {losses[0]:.3f} to {losses[-1]:.3f}, scale {scaler.get_scale():.0f}, adapters in float32"
    return Found(ok, said, {"losses": losses, "scale": scaler.get_scale()})


def dpo(setup: Setup) -> Found:
    """DPO against the bare base by TRL's trainer: from log 2 down."""
    installed("trl", "datasets")
    from datasets import Dataset
    from trl import DPOConfig

    from benchmarks.tokenizer import words
    from phi3_lora_plugin.speed.apply import accelerate_phi3
    from phi3_lora_plugin.training.preference import PairCollator, PreferenceTrainer

    model = small_model(setup, setup.half)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:  # a new adapter is nothing, and then the loss is log 2
            torch.nn.init.zeros_(parameter)
    data = []
    for row in rows(setup, (24,) * 8, _words(setup)):
        ids, labels = row["input_ids"], row["labels"]
        other = labels[:-6] + [(label * 7) % (_words(setup) - 3) + 3 for label in labels[-6:]]
        both = ids + ids[:-6] + other[-6:]
        data.append({"input_ids": both, "labels": labels + other, "cut": len(ids)})
    folder = setup.folder / "dpo"
    args = DPOConfig(
        **common_arguments(setup, folder, 6), max_length=None, learning_rate=5e-3, gradient_checkpointing=False
    )
    trainer = PreferenceTrainer(
        model=model, args=args, train_dataset=Dataset.from_list(data), data_collator=PairCollator(0),
        processing_class=words(),
    )  # fmt: skip
    accelerate_phi3(trainer)
    trainer.train()
    losses = [log["loss"] for log in trainer.state.log_history if "loss" in log]
    ok = abs(losses[0] - 0.6931) < 5e-3 and losses[-1] < 0.67
    return Found(ok, f"loss {losses[0]:.4f} to {losses[-1]:.4f}", {"losses": losses})


def run(setup: Setup, folder: Path, steps: int, resume: bool = False, background: bool = False) -> Any:
    """A Trainer of ours that has trained a small model `steps` steps: fast paths, a checkpoint every second."""
    from transformers import PrinterCallback, Trainer, TrainingArguments

    from phi3_lora_plugin.training.attach import attach
    from phi3_lora_plugin.training.callbacks import LoraCheckpoint
    from phi3_lora_plugin.training.resume import resumable

    args = TrainingArguments(**common_arguments(setup, folder, steps), learning_rate=1e-3)
    data = rows(setup, setup.small((23, 9, 17, 12), (700, 64, 129, 300)) * 4, _words(setup))
    trainer = Trainer(small_model(setup, setup.half), args, train_dataset=data, data_collator=padded)
    trainer.remove_callback(PrinterCallback)
    attach(trainer, callbacks=[LoraCheckpoint(every_steps=2, background=background, keep_last=9)])
    going_on = resumable(trainer, say=lambda text: None, allow_drift=["max_steps"]) if resume else nullcontext()
    with going_on as checkpoint:
        trainer.train(resume_from_checkpoint=checkpoint)
    return trainer


def _adapter(folder: Path) -> Path:
    from phi3_lora_plugin.store.checkpoint import latest_complete

    newest = latest_complete(folder)
    if newest is None:
        raise RuntimeError(f"no complete checkpoint in {folder}")
    return newest


def saved_alike(setup: Setup) -> Found:
    """The files of an adapter are the same bytes, written at once or in the background, with the trained values."""
    from safetensors.torch import load_file

    sums, apart = [], 0.0
    for background in (False, True):
        folder = setup.folder / f"saved-{background}"
        trainer = run(setup, folder, 2, background=background)
        file = _adapter(folder) / "adapter_model.safetensors"
        sums.append(hashlib.sha256(file.read_bytes()).hexdigest())
        saved = load_file(file)
        for name, parameter in trainer.model.named_parameters():
            if parameter.requires_grad:
                there = saved[name.replace(".default", "")]
                apart = max(apart, float((parameter.detach().cpu().float() - there.float()).abs().max()))
    return Found(sums[0] == sums[1] and apart == 0.0, f"sha256 {sums[0][:12]} and {sums[1][:12]}", {"apart": apart})


def greedy_after_reload(setup: Setup) -> Found:
    """Plain PEFT reloads the adapter over the same base and writes the same greedy ids."""
    from peft import PeftModel

    from phi3_lora_plugin.speed.apply import slow_down

    folder = setup.folder / "reload"
    trainer = run(setup, folder, 4)
    # A random model has near ties, which other roundings decide otherwise: the ids are those of the same code.
    slow_down(trainer.model)
    mine = trainer.accelerator.unwrap_model(trainer.model, keep_fp32_wrapper=False).eval()
    start = torch.tensor([rows(setup, (12,), _words(setup))[0]["input_ids"]], device=setup.device)
    asked: dict[str, Any] = dict(
        max_new_tokens=16, do_sample=False, use_cache=True, pad_token_id=0, eos_token_id=None,
        attention_mask=torch.ones_like(start),
    )  # fmt: skip
    before = mine.generate(input_ids=start, **asked)[0].tolist()
    fresh = PeftModel.from_pretrained(small_model(setup, setup.half).unload(), str(_adapter(folder))).eval()
    after = fresh.generate(input_ids=start, **asked)[0].tolist()
    return Found(before == after, f"{len(after) - 12} ids, {'equal' if before == after else 'other ones'}")


def resumed(setup: Setup) -> Found:
    """Two steps and two more after a restart end where four at a stretch end."""
    whole = vector(run(setup, setup.folder / "whole", 4).model)
    run(setup, setup.folder / "cut", 2)
    halves = vector(run(setup, setup.folder / "cut", 4, resume=True).model)
    start = vector(small_model(setup, setup.half))
    apart = error(halves - start, whole - start)
    said = "bit for bit" if torch.equal(halves, whole) else f"what was learned differs by {apart:.1e}"
    return Found(apart < 1e-4, said, {"apart": apart})
