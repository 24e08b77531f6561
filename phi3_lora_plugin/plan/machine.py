"""What memory a machine has, and what it needs in addition to the tensors that a program asks for."""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from phi3_lora_plugin.error import Phi3LoraError
from phi3_lora_plugin.model.device import KINDS, Device, elsewhere, read_device
from phi3_lora_plugin.model.folder import ModelError
from phi3_lora_plugin.wording import read_size

if TYPE_CHECKING:
    from phi3_lora_plugin.recipe import Recipe

#: What CUDA and its kernels take on a card before the first tensor. Read from published figures, not measured.
CONTEXT = 500_000_000
#: cuBLAS' workspace for each thread that multiplies: PyTorch's default from Hopper on, and before
#: (docs.pytorch.org, "CUDA semantics"). The forward pass is one thread, the backward pass another.
_WORKSPACE_HOPPER, _WORKSPACE = 32 << 20, 8320 << 10
_THREADS = 2
#: Share of what comes and goes (all but the frozen weights) that an allocator holds beyond it, in pieces that do not
#: fit: PyTorch's own for cards, without and with `expandable_segments`. Assumed until a run on a card corrects it.
_SLACK, _SLACK_EXPANDABLE = 0.08, 0.02
#: The same of glibc's malloc, and the bytes of small pieces that it keeps once they were there: chosen by the runs in
#: docs/plan.md.
_SLACK_CPU, _PIECES_CPU = 0.08, 80_000_000
#: Share of a card's memory that a plan leaves free: a desktop, the driver, and what the plan does not know of.
_MARGIN = 0.04
#: macOS lets the GPU have about three quarters of the memory (`recommendedMaxWorkingSetSize` of Metal).
_MARGIN_MPS = 0.25
#: Share of the memory that is free on this machine that a run leaves to other programs, and to a plan that is too low.
_LEFT = 0.1
_CONTAINER = Path("/sys/fs/cgroup")


class PlanError(Phi3LoraError):
    """A plan that cannot be made as asked; the message names what would make it possible."""


@dataclass(frozen=True)
class Machine:
    """What a device needs in addition to tensors.

    Attributes:
        program: bytes before the first tensor: the process itself, or a card's context.
        workspaces: bytes that kernels keep for themselves.
        slack: share of what comes and goes that the allocator holds beyond it.
        pieces: bytes that it holds of small pieces, if as many came and went.
        margin: share of the memory to leave free.
    """

    device: Device
    program: int
    workspaces: int = 0
    slack: float = 0.0
    pieces: int = 0
    margin: float = 0.0


def planned_device(recipe: Recipe, wanted: str) -> Device:
    """The device that a plan is for: as it is here, or as most of its kind are.

    Raises:
        PlanError: not a device.
    """
    if wanted not in ("auto", *KINDS):
        raise PlanError(f"device: {wanted!r} is not a device; available: auto, {', '.join(KINDS)}")
    wanted = recipe.model.device if wanted == "auto" else wanted
    try:
        return read_device(wanted)
    except ModelError:
        return elsewhere(wanted)


def machine(device: Device, program: int | None = None) -> Machine:
    """What `device` takes; the size of this process is measured if it counts and is not given."""
    if device.kind == "cpu":
        return Machine(device, program_bytes() if program is None else program, 0, _SLACK_CPU, _PIECES_CPU)
    if device.kind == "mps":  # one memory for both
        return Machine(device, program_bytes() if program is None else program, slack=_SLACK, margin=_MARGIN_MPS)
    before_hopper = device.capability is not None and device.capability < (9, 0)
    expandable = "expandable_segments:true" in " ".join(
        os.environ.get(name, "") for name in ("PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_ALLOC_CONF")
    ).lower().replace(" ", "")
    return Machine(
        device,
        CONTEXT if program is None else program,
        _THREADS * (_WORKSPACE if before_hopper else _WORKSPACE_HOPPER),
        _SLACK_EXPANDABLE if expandable else _SLACK,
        margin=_MARGIN,
    )


def size(text: str) -> int:
    """Bytes of `24GB`, `24 GiB`, `500MB`; a bare number is bytes.

    Raises:
        PlanError: not a size.
    """
    read = read_size(text)
    if read is None:
        raise PlanError(f"memory: {text!r} is not a size; write 24GB, 16GiB or 500MB")
    return read


def memory_of(recipe: Recipe, device: Device) -> int | None:
    """Bytes available: of the card here, else of the one that the recipe names; on the CPU, of this machine."""
    if device.kind == "cpu":
        return system_memory()
    import torch

    if device.kind == "cuda" and torch.cuda.is_available():
        return int(torch.cuda.get_device_properties(0).total_memory)
    if device.kind == "xpu" and torch.xpu.is_available():
        return int(torch.xpu.get_device_properties(0).total_memory)
    if device.kind == "mps" and torch.backends.mps.is_available():
        return system_memory()
    found = re.match(r"\d+ GB(?! of RAM)", recipe.about.memory or "")
    return size(found[0]) if found else None


def free_memory(kind: str, held: int) -> int | None:
    """Bytes that a run may take here and now; None if that is not known.

    Args:
        kind: of the device.
        held: bytes of the weights, which are loaded and part of it.
    """
    import torch

    if kind in ("cpu", "mps"):  # each process of a machine gets a part of what is free
        return held + int((1 - _LEFT) * _available() / int(os.environ.get("LOCAL_WORLD_SIZE", "1")))
    try:
        card = getattr(torch, kind)
        free, total = card.mem_get_info()
        return int(min(total, free + card.memory_reserved() + CONTEXT))
    except (AttributeError, RuntimeError, AssertionError):
        return None


def _available() -> int:
    """Bytes that this machine, or the container that this process is in, can give without swapping."""
    import psutil

    free, limit = int(psutil.virtual_memory().available), _limit()
    try:
        used = int((_CONTAINER / "memory.current").read_text())
        cached = dict(line.split() for line in (_CONTAINER / "memory.stat").read_text().splitlines()).get("file", "0")
    except (OSError, ValueError):
        return free
    return free if limit is None else max(0, min(free, limit - used + int(cached)))


def system_memory() -> int:
    """Bytes of memory of this machine, or of the container that this process is in."""
    import psutil

    total, limit = int(psutil.virtual_memory().total), _limit()
    return total if limit is None else min(total, limit)


def _limit() -> int | None:
    """Bytes that the container allows."""
    file = _CONTAINER / "memory.max"
    allowed = file.read_text().strip() if file.is_file() else ""
    return int(allowed) if allowed.isdigit() else None


@cache
def program_bytes() -> int:
    """Resident bytes of this process once it has trained something tiny: libraries, threads, nothing of a model."""
    import tempfile

    import torch
    from transformers import Phi3Config, Phi3ForCausalLM, PrinterCallback, Trainer, TrainingArguments, set_seed

    from phi3_lora_plugin.lora.inject import add_lora

    state = torch.get_rng_state()
    set_seed(0)
    sizes = dict(hidden_size=64, intermediate_size=128, num_hidden_layers=1, num_attention_heads=2, vocab_size=256)
    model = add_lora(
        Phi3ForCausalLM(Phi3Config(**sizes, pad_token_id=0, bos_token_id=1, eos_token_id=2)), "o_proj", 4, 8
    )
    rows = [{"input_ids": [5] * 64, "labels": [5] * 64} for _ in range(4)]
    with tempfile.TemporaryDirectory() as folder:
        settings: dict[str, Any] = {"output_dir": folder, "max_steps": 2, "per_device_train_batch_size": 2}
        settings |= {"save_strategy": "no", "report_to": "none", "use_cpu": True, "disable_tqdm": True}
        trainer = Trainer(model, TrainingArguments(**settings, logging_steps=10), train_dataset=rows)
        trainer.remove_callback(PrinterCallback)
        trainer.train()
    torch.set_rng_state(state)
    return resident_bytes()


def resident_bytes() -> int:
    """Bytes of this process that are in memory now."""
    import psutil

    return int(psutil.Process().memory_info().rss)
