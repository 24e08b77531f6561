"""Short training runs of tiny models with LoRA under a real Trainer, for the tests of checkpoints and of resuming."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import tiny
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, Trainer, TrainerCallback, TrainingArguments


def rows(count: int = 16, length: int = 8, masked: bool = False, seed: int = 0) -> list[dict[str, list[int]]]:
    """Rows of random ids that are trained whole, or not at all."""
    made = torch.randint(3, 400, (count, length), generator=torch.Generator().manual_seed(seed)).tolist()
    return [{"input_ids": ids, "labels": [-100] * length if masked else list(ids)} for ids in made]


def peft_model(dropout: float = 0.1, seed: int = 0, **settings: Any) -> PeftModel:
    """A tiny Phi-3 with LoRA on all its projections."""
    base = tiny.model(hidden_size=16, intermediate_size=32)
    options = {"r": 4, "lora_alpha": 8, "target_modules": "all-linear", "task_type": "CAUSAL_LM"} | settings
    torch.manual_seed(seed)
    return get_peft_model(base, LoraConfig(lora_dropout=dropout, **options))


def disturb(model: Any, seed: int = 1, scale: float = 0.1) -> None:
    """Move every trained tensor away from where it started."""
    torch.manual_seed(seed)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data += torch.randn_like(parameter) * scale


def saved_adapter(base: Any, folder: Path, seed: int = 1, scale: float = 0.1, **options: Any) -> Path:
    """A plain PEFT adapter on a loaded model, with values as after training."""
    model = get_peft_model(base, LoraConfig(**({"task_type": "CAUSAL_LM", "r": 4, "lora_alpha": 8} | options)))
    disturb(model, seed, scale)
    model.save_pretrained(folder)
    return folder


class Logs(TrainerCallback):
    """Keeps what is logged."""

    def __init__(self) -> None:
        self.said: list[dict[str, Any]] = []

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        self.said.append(dict(logs))


def learn(model: Any, batches: Iterable[torch.Tensor], optimizer: Any = None, **settings: Any) -> list[float]:
    """The losses of one plain step on each batch of ids, of AdamW unless another optimizer is given."""
    if optimizer is None:
        trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
        optimizer = torch.optim.AdamW(trained, **({"lr": 1e-2} | settings))
    model.train()
    losses = []
    for ids in batches:
        loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


def four_bit(folder: Path, compute: torch.dtype = torch.bfloat16, **changes: Any) -> Any:
    """A tiny Phi-3 in NF4, loaded from `folder`, where its weights lie in `compute`'s precision."""
    settings = {"bnb_4bit_quant_type": "nf4", "bnb_4bit_compute_dtype": compute}
    tiny.model(hidden_size=64, intermediate_size=128, **changes).to(compute).save_pretrained(folder)
    quantised = BitsAndBytesConfig(load_in_4bit=True, **settings)
    return AutoModelForCausalLM.from_pretrained(folder, quantization_config=quantised)


def fully_sharded(model: Any, **how: Any) -> Any:
    """A model that two ranks share, a unit in each layer, as FSDP 2 cuts it."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    mesh = init_device_mesh("cpu", (2,))
    for layer in model.base_model.model.model.layers:
        fully_shard(layer, mesh=mesh, **how)
    return fully_shard(model, mesh=mesh, **how)


def load(folder: Path, dtype: torch.dtype = torch.float32) -> Any:
    """The model in a folder, without fast attention."""
    return AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, attn_implementation="eager").eval()


def adapter_on(base: Path, folder: Path, **options: Any) -> Path:
    """A `saved_adapter` on the fused projections, unless told otherwise, of the model in a folder."""
    fused = {"target_modules": ["qkv_proj", "o_proj", "gate_up_proj", "down_proj"]}
    return saved_adapter(load(base), folder, **(fused | options))


def deepspeed_plan(stage: str) -> dict[str, Any]:
    """DeepSpeed's own config for ZeRO, with the Trainer's numbers."""
    plan: dict[str, Any] = {"zero_optimization": {"stage": int(stage)}, "zero_force_ds_cpu_optimizer": False}
    plan |= dict.fromkeys(("train_micro_batch_size_per_gpu", "train_batch_size", "gradient_accumulation_steps"), "auto")
    plan |= {"zero_allow_untested_optimizer": True}
    if stage == "3":
        plan["zero_optimization"]["stage3_param_persistence_threshold"] = 0  # or what is small is not cut
    return plan


def holder(store: Path) -> subprocess.Popen[str]:
    """Another process that holds the lock of a store until it is killed."""
    script = (
        "import sys; from pathlib import Path; from phi3_lora_plugin.store.lock import StoreLock\n"
        "lock = StoreLock(Path(sys.argv[1])); print('held', flush=True); sys.stdin.read()"
    )
    other = subprocess.Popen(
        [sys.executable, "-c", script, store], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert other.stdout is not None and other.stdout.readline() == "held\n"
    return other


def arguments(out: Path, **settings: Any) -> TrainingArguments:
    """Six steps of four rows, nothing saved by the Trainer."""
    defaults: dict[str, Any] = dict(
        output_dir=str(out),
        per_device_train_batch_size=4,
        per_device_eval_batch_size=4,
        max_steps=6,
        learning_rate=1e-2,
        save_strategy="no",
        report_to="none",
        use_cpu=True,
        disable_tqdm=True,
        dataloader_pin_memory=False,
        logging_steps=1,
        seed=7,
    )
    return TrainingArguments(**(defaults | settings))


def trainer(out: Path, *callbacks: Any, model: Any = None, data: Any = None, evaluated: Any = None, **settings: Any):
    """A Trainer over `rows()` with these callbacks."""
    return Trainer(
        model=peft_model() if model is None else model,
        args=arguments(out, **settings),
        train_dataset=rows() if data is None else data,
        eval_dataset=evaluated if evaluated is not None else (rows(8, seed=1) if "eval_strategy" in settings else None),
        callbacks=list(callbacks),
    )


def trained(model: Any) -> dict[str, torch.Tensor]:
    """Copies of what is trained."""
    return {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}


def same(one: Any, other: Any) -> bool:
    """Whether two nested structures of tensors are equal bit by bit."""
    if isinstance(one, torch.Tensor):
        return isinstance(other, torch.Tensor) and one.dtype == other.dtype and torch.equal(one, other)
    if isinstance(one, dict):
        return isinstance(other, dict) and one.keys() == other.keys() and all(same(one[k], other[k]) for k in one)
    if isinstance(one, (list, tuple)):
        return len(one) == len(other) and all(same(a, b) for a, b in zip(one, other, strict=True))
    return bool(one == other)
