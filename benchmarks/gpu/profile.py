"""Part 3: where the time of a step goes, and whether `plan` predicts its memory."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Sequence
from functools import partial
from typing import Any

import torch

from benchmarks.batches import items_in, loss_of, padded
from benchmarks.checkpointing import recompute
from benchmarks.gpu.facts import Check, Found, LeftOut, Setup, free, installed
from benchmarks.gpu.models import random_base, rows
from benchmarks.gpu.throughput import TINY, big, let_go
from benchmarks.nf4 import pack

PRESETS = ("phi3-mini-4k-lora", "phi3-mini-4k-lora-80gb", "phi3-mini-4k-qlora", "phi3-mini-128k-qlora")
GAP = 20e-6  # seconds without a kernel that are counted
TOP = 25
PLAN_LOW, PLAN_HIGH = -0.05, 0.20  # of what was measured: too little ends a run, too much refuses one that fits


def checks(setup: Setup) -> list[Check]:
    """The profile of a step of ours, then `plan` for four presets."""
    made = [Check("profile of one step", 15, profile)]
    names = PRESETS[::2] if setup.tiny else PRESETS
    return made + [Check(f"plan against the measured peak: {name}", 12, partial(planned, name)) for name in names]


def profile(setup: Setup) -> Found:
    """Top kernels, the share of time that the card is busy, gaps, and waits of the host."""
    from torch.profiler import ProfilerActivity
    from torch.profiler import profile as record

    from phi3_lora_plugin.speed.apply import slow_down, speed_up

    one = big(setup)
    one.reset()
    lengths = (setup.small(24, 2040),) * 4
    batch = padded(rows(setup, lengths, one.model.config.vocab_size))
    speed_up(one.model)
    trained = [p for p in one.model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=2e-4, fused=True)
    on_card = setup.device.type == "cuda"

    def step() -> None:
        _step(one.model, batch, setup)
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        optimizer.zero_grad()

    try:
        for _ in range(2):
            step()
        with record(activities=[ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if on_card else [])]) as seen:
            begun = time.perf_counter()
            step()
            if on_card:
                torch.cuda.synchronize()
            wall = time.perf_counter() - begun
    finally:
        slow_down(one.model)
    return _read(list(seen.events()), wall, on_card)


def _read(events: Sequence[Any], wall: float, on_card: bool) -> Found:
    from torch.autograd import DeviceType

    kernels = [each for each in events if (each.device_type == DeviceType.CUDA) == on_card]
    kernels = [each for each in kernels if not getattr(each, "is_user_annotation", False)]
    if not on_card:  # operators that are called by no other one
        kernels = [each for each in kernels if each.cpu_parent is None]
    spans = sorted((each.time_range.start, each.time_range.end) for each in kernels)
    total: dict[str, float] = defaultdict(float)
    count: dict[str, int] = defaultdict(int)
    for each in kernels:
        total[each.name] += (each.time_range.end - each.time_range.start) / 1e6
        count[each.name] += 1
    busy, gaps, end = 0.0, [], None
    for start, stop in spans:
        if end is None or start > end:
            if end is not None and (start - end) / 1e6 > GAP:
                gaps.append((start - end) / 1e6)
            busy += (stop - start) / 1e6
        elif stop > end:
            busy += (stop - end) / 1e6
        end = stop if end is None else max(end, stop)
    waits = [each.name for each in events if "Synchronize" in each.name or each.name == "cudaMemcpy"]
    top = sorted(total, key=lambda name: -total[name])[:TOP]
    share = busy / wall if wall else 0.0
    said = f"{1000 * wall:.1f} ms, {len(kernels)} kernels, {share:.0%} busy, {len(gaps)} gaps over 20 us "
    said += f"({1000 * sum(gaps):.1f} ms), {len(waits)} waits; most: {', '.join(name[:40] for name in top[:3])}"
    figures = {
        "wall_ms": 1000 * wall,
        "kernels": len(kernels),
        "busy": share,
        "gaps": len(gaps),
        "gap_ms": 1000 * sum(gaps),
        "waits": waits,
        "top": [{"name": name, "ms": 1000 * total[name], "count": count[name]} for name in top],
    }
    return Found(bool(kernels) and (not on_card or share > 0.5), said, figures)


def _step(model: Any, batch: dict[str, Any], setup: Setup) -> None:
    loss_of(model, batch, setup.device, items_in([batch]), setup.half).backward()


def planned(name: str, setup: Setup) -> Found:
    """The plan of a preset against the most that its step takes here, allocator included."""
    from benchmarks.sizes import config
    from phi3_lora_plugin.lora.inject import add_lora
    from phi3_lora_plugin.plan.checkpointing import least
    from phi3_lora_plugin.plan.plan import plan
    from phi3_lora_plugin.recipe import load_recipe
    from phi3_lora_plugin.speed.apply import speed_up
    from phi3_lora_plugin.training.arguments import lora_options, training_arguments
    from phi3_lora_plugin.training.checkpointing import checkpoints_activations

    small = ["data.max_length=24", "training.per_device_train_batch_size=2"] if setup.tiny else []
    recipe = load_recipe(name, ["data.eval_path=null", *least(load_recipe(name)), *small])
    if recipe.model.quantize == "nf4":
        installed("bitsandbytes")
    let_go()
    free(setup.device)
    base = random_base(setup, setup.small(TINY, config(recipe.model.path)), setup.half)
    if recipe.model.quantize == "nf4":
        pack(base)
        free(setup.device)
    said = plan(recipe, device="cuda", config=base.config)
    arguments = training_arguments(recipe, use_cpu=True, bf16=False, fp16=False)
    model = add_lora(base, **lora_options(recipe)).train()
    if checkpoints_activations(arguments):
        recompute(model)
    speed_up(model, recipe.speed)
    count, longest = int(arguments.per_device_train_batch_size), recipe.data.max_length
    batch = padded(rows(setup, (longest,) * count, base.config.vocab_size, supervised=1.0))
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=2e-4, fused=True)
    for _ in range(2):
        _step(model, batch, setup)
        optimizer.step()
        optimizer.zero_grad()
    ours = said.peak - said.program
    if setup.device.type != "cuda":
        raise LeftOut(f"planned {ours / 1e6:,.0f} MB; only a card shows what its allocator holds")
    reserved, allocated = torch.cuda.max_memory_reserved(), torch.cuda.max_memory_allocated()
    out = ours / reserved - 1
    words = f"planned {ours / 1e9:.2f} GB, reserved {reserved / 1e9:.2f}, allocated {allocated / 1e9:.2f}: {out:+.1%}"
    free_now, all_of_it = torch.cuda.mem_get_info()
    figures = {"planned": ours, "reserved": reserved, "allocated": allocated, "off": out, "phases": dict(said.phases)}
    figures["context"] = all_of_it - free_now - torch.cuda.memory_reserved()
    return Found(PLAN_LOW <= out <= PLAN_HIGH, words, figures)
