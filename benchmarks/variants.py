"""One measured run in a process of its own: `python -m benchmarks.variants VARIANT JOB.json` writes JOB's result file.

Every variant trains the same adapter on the same rows in the same order; what differs is the code that runs the step.
"""

from __future__ import annotations

import json
import os
import resource
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

if len(sys.argv) > 1 and sys.argv[1] == "unsloth":
    import unsloth  # noqa: F401  (it has to come before transformers)

import torch
from peft import LoraConfig, get_peft_model
from transformers import Phi3Config, Phi3ForCausalLM, Trainer, TrainerCallback, TrainingArguments

from benchmarks.batches import padded
from benchmarks.checkpointing import recompute
from benchmarks.jobs import run_job
from benchmarks.nf4 import pack as pack_nf4
from benchmarks.tokenizer import words
from benchmarks.workloads import WORKLOADS, Workload

TARGETS = ["qkv_proj", "o_proj", "gate_up_proj", "down_proj"]


class Clock(TrainerCallback):
    """Seconds at the end of each step, by the clock and of all processors."""

    def __init__(self) -> None:
        self.times: list[float] = []
        self.used: list[float] = []

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Read the clock once the device is done."""
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        self.times.append(time.perf_counter())
        self.used.append(time.process_time())


def build(load: Workload, seed: int) -> Any:
    """The model of a workload with a fresh adapter; equal for equal seeds."""
    dtype = getattr(torch, load.dtype)
    torch.manual_seed(seed)
    config = Phi3Config(**load.model, pad_token_id=0, bos_token_id=1, eos_token_id=2, attn_implementation="sdpa")
    with torch.device(load.device):
        before = torch.get_default_dtype()
        torch.set_default_dtype(dtype)
        model = _tiled(config, seed) if load.tiled else Phi3ForCausalLM(config)
        torch.set_default_dtype(before)
    model.config.use_cache = False
    if load.quantize:
        pack_nf4(model)
    torch.manual_seed(seed)
    return get_peft_model(model, LoraConfig(r=load.rank, lora_alpha=2 * load.rank, target_modules=TARGETS))


def _tiled(config: Any, seed: int) -> Any:
    """A model whose matrices repeat one block of normal numbers, each from where the last one stopped."""
    with torch.device("meta"):
        model = Phi3ForCausalLM(config)
    model.to_empty(device="cpu")
    length = 4_194_301  # a prime: no two rows of a matrix are the same
    block = torch.randn(length, generator=torch.Generator().manual_seed(seed)).mul_(config.initializer_range)
    block, start = block.to(torch.get_default_dtype()).repeat(2), 0
    with torch.no_grad():
        for parameter in model.parameters():
            flat = parameter.view(-1)
            if parameter.dim() == 1:
                flat.fill_(1)
                continue
            for begin in range(0, flat.numel(), length):
                part = flat[begin : begin + length]
                part.copy_(block[start : start + part.numel()])
            start = (start + flat.numel()) % length
    model.model.rotary_emb = type(model.model.rotary_emb)(config)  # its frequencies are not parameters
    return model


def arguments(load: Workload, folder: Path, kind: type = TrainingArguments, **more: Any) -> Any:
    """Training arguments that every variant shares."""
    return kind(
        output_dir=str(folder),
        max_steps=load.steps,
        per_device_train_batch_size=load.batch,
        learning_rate=load.learning_rate,
        lr_scheduler_type="constant",
        logging_steps=1,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        use_cpu=load.device == "cpu",
        bf16=load.dtype == "bfloat16" and "bf16" not in more,
        remove_unused_columns=False,
        train_sampling_strategy="sequential",
        dataloader_pin_memory=load.device != "cpu",
        seed=0,
        **more,
    )


def trainer_for(
    variant: str, model: Any, load: Workload, data: list[dict[str, Any]], folder: Path, clock: Clock
) -> Any:
    """The Trainer of a variant around the model."""
    # As many packs as hold a batch of rows, for every variant that packs.
    packs_a_batch = max(1, round(load.batch * load.mean_length / load.max_length))
    if variant == "unsloth" or variant.startswith("trl"):
        from datasets import Dataset
        from trl import SFTConfig, SFTTrainer  # unsloth has put its own in their places

        packed = variant == "trl-packed"
        more = {"max_length": load.max_length, "dataset_kwargs": {"skip_prepare_dataset": not packed}}
        if variant != "unsloth":
            # TRL uses gradient checkpointing by default; at its best it does not, where memory allows
            more |= {"packing": packed, "gradient_checkpointing": variant == "trl"}
        args = arguments(replace(load, batch=packs_a_batch) if packed else load, folder, SFTConfig, **more)
        rows = Dataset.from_list(data)
        return SFTTrainer(model, args, train_dataset=rows, processing_class=words(), callbacks=[clock])
    from phi3_lora_plugin.chat.pack import PackedCollator, pack
    from phi3_lora_plugin.speed.apply import speed_up

    collator: Any = padded
    if variant.endswith("packed"):
        packs = pack([len(row["input_ids"]) for row in data], load.max_length)
        data = [{"rows": [data[index] for index in members]} for members in packs]
        collator = PackedCollator()
        load = replace(load, batch=packs_a_batch)
    if variant.startswith("ours"):
        for applied in speed_up(model):
            print(applied, file=sys.stderr)
    args = arguments(load, folder, logging_nan_inf_filter=not variant.startswith("ours"))
    if variant.endswith("-checkpointed"):
        recompute(model)
    if variant == "trainer-peft-eager":
        # Eager attention keeps S x S a head and layer, which no card holds for all layers at once.
        model.get_base_model().set_attn_implementation("eager")
        recompute(model)
    if variant == "liger":
        from liger_kernel.transformers import apply_liger_kernel_to_phi3

        apply_liger_kernel_to_phi3(model=model.get_base_model())
    return Trainer(model, args, train_dataset=data, data_collator=collator, callbacks=[clock])


def build_unsloth(load: Workload, seed: int, folder: Path) -> Any:
    """The very same weights and adapter in unsloth's hands, which loads models from folders only."""
    from unsloth import FastLanguageModel

    twin = build(load, seed)
    base = twin.get_base_model()
    plain = Phi3ForCausalLM(base.config)
    plain.load_state_dict(
        {name.replace(".base_layer", ""): p for name, p in base.state_dict().items() if "lora_" not in name}
    )
    plain.to(getattr(torch, load.dtype)).save_pretrained(folder / "base")
    words().save_pretrained(folder / "base")
    model, _ = FastLanguageModel.from_pretrained(
        str(folder / "base"), max_seq_length=load.max_length, dtype=getattr(torch, load.dtype), load_in_4bit=False
    )
    model = FastLanguageModel.get_peft_model(
        model, r=load.rank, lora_alpha=2 * load.rank, lora_dropout=0, target_modules=TARGETS, bias="none"
    )
    adapter = {name: p for name, p in twin.named_parameters() if p.requires_grad}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            parameter.data.copy_(adapter.pop(name).data)
    if adapter:
        raise SystemExit(f"unsloth has no {', '.join(list(adapter)[:3])}")
    return model


def measure(variant: str, job: dict[str, Any]) -> dict[str, Any]:
    """Train and report: losses, tokens (padding not counted) a second, peak memory, and the adapter as one vector."""
    load, warm_up = Workload(**job["load"]) if "load" in job else WORKLOADS[job["workload"]], job["warm_up"]
    load = replace(load, model=load.model | job["model"], steps=job["steps"] or load.steps)
    if load.device == "cpu":
        torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
    if load.memory_gb and torch.cuda.is_available():
        total = torch.cuda.get_device_properties(0).total_memory
        torch.cuda.set_per_process_memory_fraction(load.memory_gb * 2**30 / total)
    data = json.loads(Path(job["rows"]).read_text())
    clock = Clock()
    begun = time.perf_counter()
    if variant == "unsloth":
        model = build_unsloth(load, job["seed"], Path(job["folder"]))
    else:
        model = build(load, job["seed"])
    begun_at = _vector(model)
    if variant == "trainer-peft-nudged":
        _nudge(model, job["seed"])
    trainer = trainer_for(variant, model, load, data, Path(job["folder"]), clock)
    counted: list[int] = []
    stock = trainer.get_batch_samples

    def counting(*args: Any, **kwargs: Any) -> Any:
        samples, items = stock(*args, **kwargs)
        counted.append(sum(_tokens(batch) for batch in samples))
        return samples, items

    trainer.get_batch_samples = counting
    ready = time.perf_counter()
    trainer.train()
    timed = clock.times[warm_up:]
    tokens = sum(counted[warm_up : warm_up + len(timed)])
    torch.save((begun_at, _vector(model)), job["vector"])
    saved = time.perf_counter()
    model.save_pretrained(Path(job["folder"], "adapter"), save_embedding_layers=False)
    peak = (
        torch.cuda.max_memory_allocated()
        if load.device == "cuda"
        else resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    )
    return {
        "variant": variant,
        "losses": [log["loss"] for log in trainer.state.log_history if "loss" in log],
        "tokens_per_cpu_second": tokens / (clock.used[-1] - clock.used[warm_up - 1]),
        "tokens_per_second": tokens / (clock.times[-1] - clock.times[warm_up - 1]),
        "step_ms": 1000 * (clock.times[-1] - clock.times[warm_up - 1]) / len(timed),
        "peak_bytes": float(peak),
        "start_seconds": ready - begun,
        "save_seconds": time.perf_counter() - saved,
    }


def _nudge(model: Any, seed: int) -> None:
    """Change each trained value by up to half a unit in the last place of bfloat16."""
    draw = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        if parameter.requires_grad:
            by = (torch.rand(parameter.shape, generator=draw) - 0.5) * 2**-8
            parameter.data.mul_(1 + by.to(parameter.device))


def _vector(model: Any) -> torch.Tensor:
    trained = sorted((name, p) for name, p in model.named_parameters() if p.requires_grad)
    return torch.cat([p.detach().float().cpu().flatten() for _, p in trained])


def _tokens(batch: dict[str, Any]) -> int:
    if "attention_mask" in batch:
        return int(batch["attention_mask"].sum())
    return int(batch["input_ids"].numel())


if __name__ == "__main__":
    run_job(sys.argv[1], json.loads(Path(sys.argv[2]).read_text()))
