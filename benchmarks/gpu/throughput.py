"""Part 2: tokens a second and memory at Phi-3-mini's dimensions, ours and the peers on the very same model and rows.

The model is built once on the device, with random weights; the parts of the switch change between runs, and
adapters start from the same values each time. Runs are interleaved (ours, peers, peers, ours), each of a real Trainer:
three steps to warm up, eight that are timed between CUDA events. TRL runs in a process of its own, as it patches.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from transformers import TrainerCallback

from benchmarks.batches import padded
from benchmarks.cards import card_of, flops_per_token
from benchmarks.checkpointing import keep, recompute
from benchmarks.gpu.facts import Check, Found, LeftOut, Setup, free, installed
from benchmarks.gpu.models import common_arguments, random_base, rows, with_lora
from benchmarks.nf4 import pack
from benchmarks.workloads import MINI, WORKLOADS

RANK = 16
WARM, TIMED = 3, 8
NOISE = 3.0  # how many times stock code's distance from itself ours may have from stock code

TINY = dict(
    hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=4,
    vocab_size=300, max_position_embeddings=4096, sliding_window=2047,
)  # fmt: skip


@dataclass(frozen=True)
class Run:
    """What a run of one variant took: tokens without padding, bytes at most, the loss of each step."""

    tokens_per_second: float
    step_ms: float
    allocated: float
    reserved: float
    losses: tuple[float, ...]


class Big:
    """Phi-3-mini's dimensions with LoRA on every projection, and what its adapter starts from."""

    def __init__(self, setup: Setup, quantised: bool = False) -> None:
        self.setup, self.quantised = setup, quantised
        base = random_base(setup, setup.small(TINY, MINI), setup.half)
        if quantised:
            pack(base)
        self.model = with_lora(base, setup, RANK)
        self.start = [p.detach().clone() for p in self.model.parameters() if p.requires_grad]
        free(setup.device)

    def reset(self) -> None:
        """The adapter as it began, and no gradients."""
        trained = [p for p in self.model.parameters() if p.requires_grad]
        for parameter, value in zip(trained, self.start, strict=True):
            parameter.data.copy_(value)
            parameter.grad = None

    def learned(self) -> torch.Tensor:
        """What the adapter has moved by, as one float32 vector."""
        trained = [p for p in self.model.parameters() if p.requires_grad]
        return torch.cat([(p.detach() - v).float().flatten() for p, v in zip(trained, self.start, strict=True)])


_built: dict[str, Big] = {}


def big(setup: Setup, quantised: bool = False) -> Big:
    """The model of this part, built at the first call; one at a time is held."""
    key = f"{setup.device} {setup.tiny} {quantised}"
    if key not in _built:
        _built.clear()
        free(setup.device)
        _built[key] = Big(setup, quantised)
    return _built[key]


def let_go() -> None:
    """Hold no model any more."""
    _built.clear()


class Stopwatch(TrainerCallback):
    """When each step ended, by the device's own clock."""

    def __init__(self, device: torch.device) -> None:
        self.on_card = device.type == "cuda"
        self.marks: list[Any] = []

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Mark the stream; nothing waits."""
        if self.on_card:
            self.marks.append(torch.cuda.Event(enable_timing=True))
            self.marks[-1].record()
        else:
            self.marks.append(time.perf_counter())

    def milliseconds(self) -> list[float]:
        """Between one end and the next."""
        pairs = zip(self.marks, self.marks[1:], strict=False)
        if self.on_card:
            torch.cuda.synchronize()
            return [before.elapsed_time(after) for before, after in pairs]
        return [1000 * (after - before) for before, after in pairs]


def train(
    one: Big, variant: str, lengths: tuple[int, ...], recomputed: bool = False, steps: int = WARM + TIMED
) -> tuple[Run, torch.Tensor]:
    """(figures, what was learned) of one variant: `ours`, `ours in turn`, `stock`, `stock eager` or `liger`."""
    from transformers import PrinterCallback, Trainer, TrainingArguments

    from phi3_lora_plugin.speed.apply import accelerate_phi3, slow_down
    from phi3_lora_plugin.speed.proved_prefetch import stop

    setup, model = one.setup, one.model
    one.reset()
    data = rows(setup, lengths * steps, model.config.vocab_size)
    on_card, watch = setup.device.type == "cuda", Stopwatch(setup.device)
    shared = common_arguments(setup, setup.folder / "throughput", steps)
    own = dict(per_device_train_batch_size=len(lengths), learning_rate=2e-4, train_sampling_strategy="sequential")
    args = TrainingArguments(**(shared | own), logging_nan_inf_filter=False)
    if recomputed:
        recompute(model)
    with _patched(one, variant):
        trainer = Trainer(model, args, train_dataset=data, data_collator=padded, callbacks=[watch])
        trainer.remove_callback(PrinterCallback)
        if variant.startswith("ours"):
            accelerate_phi3(trainer)
        if variant == "ours in turn":
            stop(model)
        free(setup.device)
        try:
            trainer.train()
        finally:
            trainer.accelerator.unwrap_model(trainer.model, keep_fp32_wrapper=False)
            slow_down(model)
            if recomputed:
                keep(model)
    times = watch.milliseconds()[min(WARM, steps - 2) - 1 :] if steps > 2 else watch.milliseconds()
    step_ms = statistics.median(times)
    run = Run(
        1000 * sum(lengths) / step_ms,
        step_ms,
        float(torch.cuda.max_memory_allocated()) if on_card else 0.0,
        float(torch.cuda.max_memory_reserved()) if on_card else 0.0,
        tuple(log["loss"] for log in trainer.state.log_history if "loss" in log),
    )
    return run, one.learned()


@contextmanager
def _patched(one: Big, variant: str) -> Iterator[None]:
    """The model as a peer has it; everything is put back, also what Liger changes in transformers' module."""
    if variant == "stock eager":
        base = one.model.get_base_model()
        base.set_attn_implementation("eager")
        try:
            yield
        finally:
            base.set_attn_implementation("sdpa")
        return
    if variant != "liger":
        yield
        return
    installed("liger_kernel")
    from liger_kernel.transformers import apply_liger_kernel_to_phi3
    from transformers.models.phi3 import modeling_phi3

    before = [(module, module.__class__, dict(module.__dict__)) for module in one.model.modules()]
    names = dict(modeling_phi3.__dict__)
    forward = modeling_phi3.Phi3ForCausalLM.forward
    try:
        apply_liger_kernel_to_phi3(model=one.model.get_base_model())
        yield
    finally:
        for module, kind, state in before:
            module.__class__ = kind
            module.__dict__.clear()
            module.__dict__.update(state)
        modeling_phi3.__dict__.update(names)
        modeling_phi3.Phi3ForCausalLM.forward = forward


def _lengths(setup: Setup, rows_: int) -> tuple[int, ...]:
    """Full rows of the default preset: no variant pays for padding."""
    return (setup.small(24, 2040),) * rows_


def checks(setup: Setup) -> list[Check]:
    """The most telling first: parity, 8k tokens a step, then 16k with checkpointing, TRL and NF4."""
    made = [
        Check("parity with stock code, by its own noise", 25, parity),
        Check("8k tokens a step, activations kept", 60, partial(compare, 4, False, ("stock", "liger"))),
        Check("16k tokens a step, checkpointing", 45, partial(compare, 8, True, ("stock",))),
        Check("NF4, 8k tokens a step", 50, four_bits),
        Check("TRL with its defaults", 45, partial(trl, "trl")),
        Check("TRL, checkpointing off", 40, partial(trl, "trl-best")),
    ]
    return made[:-1] if setup.tiny else made  # the last two are one code, and a process that imports TRL takes long


def parity(setup: Setup) -> Found:
    """What ours learns differs from what stock code learns no more than stock code (eager, SDPA) from itself."""
    one = big(setup)
    lengths, steps = (setup.small(20, 256),) * 4, 8
    (_, stock), (_, eager), (_, ours) = (
        train(one, variant, lengths, steps=steps) for variant in ("stock", "stock eager", "ours")
    )

    def apart(vector: torch.Tensor) -> float:
        return 1 - float(torch.nn.functional.cosine_similarity(vector, stock, 0))

    mine, noise = apart(ours), apart(eager)
    limit = max(1e-3, NOISE * noise)
    said = f"1 - cosine of what was learned: ours {mine:.1e}, stock code from itself {noise:.1e}"
    return Found(mine <= limit, said, {"ours": mine, "noise": noise, "limit": limit})


def compare(count: int, recomputed: bool, peers: tuple[str, ...], setup: Setup) -> Found:
    """Ours against peers, ABBA; a peer that is missing or out of memory is skipped."""
    from benchmarks.jobs import out_of_memory

    one, lengths = big(setup), _lengths(setup, count)
    steps = setup.small(4, WARM + TIMED)
    runs: dict[str, list[Run]] = {}
    lost: dict[str, str] = {}
    for variant in ("ours", *peers, *peers[::-1], "ours"):
        if variant in lost:
            continue
        try:
            run = train(one, variant, lengths, recomputed, steps)[0]
            runs.setdefault(variant, []).append(run)
        except LeftOut as reason:
            lost[variant] = str(reason)
        except RuntimeError as error:
            if variant == "ours" or not out_of_memory(error):
                raise
            lost[variant] = "out of memory"
        free(setup.device)
    return _report(setup, one, lengths, recomputed, runs, lost)


def four_bits(setup: Setup) -> Found:
    """NF4: ours, ours with each weight unpacked when it is wanted, and stock code over the same 4-bit weights."""
    installed("bitsandbytes")
    one, lengths = big(setup, quantised=True), _lengths(setup, 4)
    steps = setup.small(4, WARM + TIMED)
    runs = {variant: [train(one, variant, lengths, steps=steps)[0]] for variant in ("ours in turn", "ours", "stock")}
    found = _report(setup, one, lengths, False, runs, {})
    let_go()
    return found


def _report(
    setup: Setup, one: Big, lengths: tuple[int, ...], recomputed: bool, runs: dict[str, list[Run]], lost: dict[str, str]
) -> Found:
    """PASS where ours is no slower than any peer and takes no more memory; a CPU's figures mean nothing."""
    figures: dict[str, Any] = {"tokens": sum(lengths), "left_out": lost}
    flops = flops_per_token(one.model.config, RANK, lengths, recomputed)
    card = card_of(torch.cuda.get_device_name()) if setup.device.type == "cuda" else None
    said = []
    for variant, some in runs.items():
        speed = statistics.median(run.tokens_per_second for run in some)
        row: dict[str, Any] = {
            "tokens_per_second": speed,
            "step_ms": statistics.median(run.step_ms for run in some),
            "allocated": max(run.allocated for run in some),
            "reserved": max(run.reserved for run in some),
            "tflops": speed * flops / 1e12,
            "mfu": None if card is None else speed * flops / card.flops,
            "losses": some[0].losses,
        }
        figures[variant] = row
        share = "" if row["mfu"] is None else f" ({row['mfu']:.0%} of the peak)"
        said.append(f"{variant} {speed:,.0f} tokens/s{share}, {row['reserved'] / 1e9:.1f} GB")
    said += [f"{variant}: {reason}" for variant, reason in lost.items()]
    mine = figures["ours"]
    peers = [figures[variant] for variant in runs if not variant.startswith("ours")]
    worst = max(abs(a - b) for row in peers for a, b in zip(mine["losses"], row["losses"], strict=True)) if peers else 0
    faster = all(mine["tokens_per_second"] >= row["tokens_per_second"] for row in peers)
    smaller = all(mine["allocated"] <= 1.02 * row["allocated"] for row in peers)
    ok = worst < 2e-2 and (setup.device.type != "cuda" or (faster and smaller))
    return Found(ok, f"{'; '.join(said)}; losses within {worst:.0e}", figures)


def trl(variant: str, setup: Setup) -> Found:
    """`SFTTrainer` on rows of the same lengths, in a process of its own; compared with ours by the reader."""
    installed("trl", "datasets")
    let_go()
    free(setup.device)
    name, count = "T", 4
    length, steps = setup.small(24, 2040), setup.small(4, WARM + TIMED)
    load = replace(
        WORKLOADS["W2"], name=name, model=setup.small(TINY, MINI), batch=count, max_length=length, steps=steps,
        rows=count * steps, dtype=str(setup.half).removeprefix("torch."), device=setup.device.type,
    )  # fmt: skip
    folder = setup.folder / variant
    folder.mkdir()
    job = {key: str(folder / key) for key in ("rows", "result", "vector", "folder", "log")}
    Path(job["rows"]).write_text(json.dumps(rows(setup, (length,) * (count * steps), load.model["vocab_size"])))
    job |= {"workload": name, "seed": setup.seed, "warm_up": setup.small(1, WARM), "model": {}, "steps": None}
    file = folder / "job.json"
    file.write_text(json.dumps(job | {"load": asdict(load)}))
    environment = os.environ | {"OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "2")}
    with open(job["log"], "w") as log:
        command = [sys.executable, "-m", "benchmarks.variants", variant, str(file)]
        try:
            code = subprocess.call(command, stdout=log, stderr=subprocess.STDOUT, env=environment, timeout=150)
        except subprocess.TimeoutExpired:
            raise LeftOut("TRL took more than 150 s") from None
    if code:
        tail = Path(job["log"]).read_text()[-1500:]
        raise LeftOut(f"TRL ended with code {code}: {tail.strip().splitlines()[-1] if tail.strip() else 'no output'}")
    result = json.loads(Path(job["result"]).read_text())
    if "failed" in result:
        raise LeftOut(f"TRL: {result['failed']}")
    said = f"{result['tokens_per_second']:,.0f} tokens/s, {result['peak_bytes'] / 1e9:.1f} GB"
    return Found(True, said, {key: value for key, value in result.items() if key != "variant"})
