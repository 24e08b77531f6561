"""`python -m benchmarks.overheads`: what we add around the steps: saving, callbacks, start-up, and packing many rows.

Milliseconds are medians of wall-clock time, in brackets processor time, which a busy machine does not change.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import resource
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from benchmarks.workloads import Workload


def arguments() -> argparse.ArgumentParser:
    """What may be asked for on the command line."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.overheads", description=__doc__.split("\n", 1)[0])
    parser.add_argument("parts", nargs="*", default=["start", "pack", "save", "callbacks"], metavar="PART")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--json", type=Path)
    return parser


def main() -> int:
    """Print a table; with `--json FILE` also write it."""
    chosen = arguments().parse_args()
    measured: dict[str, Any] = {}
    for part in chosen.parts:
        measured |= _PARTS[part](chosen.rounds)
    for name, (wall, cpu) in measured.items():
        print(f"{name:<58}{1000 * wall:>10.2f} ms  ({1000 * cpu:.2f})")
    if chosen.json:
        chosen.json.write_text(json.dumps(measured, indent=2))
    return 0


def start(rounds: int) -> dict[str, tuple[float, float]]:
    """Processes: what importing, discovery and the light commands cost beyond an empty Python."""
    command = "import sys; from phi3_lora_plugin.cli import main; sys.argv[1:] = {}; main()"
    ways = {
        "python, empty": "",
        "import phi3_lora_plugin": "import phi3_lora_plugin",
        "discovery": "from phi3_lora_plugin import load_plugins; load_plugins()",
        "phi3-lora --help": command.format(["--help"]),
        "phi3-lora recipes": command.format(["recipes"]),
        "phi3-lora show": command.format(["show", "phi3-mini-4k-lora"]),
    }
    measured = {}
    for name, code in ways.items():
        run = partial(subprocess.run, [sys.executable, "-c", code], capture_output=True, check=False)
        measured[f"start: {name}"] = _timed(run, rounds, children=True)
    return measured


def pack(rounds: int) -> dict[str, tuple[float, float]]:
    """Best-fit packing of lognormal lengths into 2,048 tokens: the cost is to grow as the rows do."""
    from phi3_lora_plugin.chat.pack import pack as best_fit

    draw = random.Random(0)
    lengths = [max(1, min(2048, int(draw.lognormvariate(5.2, 0.7)))) for _ in range(100_000)]
    return {
        f"pack: {count:,} rows": _timed(lambda count=count: best_fit(lengths[:count], 2048), rounds)  # type: ignore[misc]
        for count in (1_000, 10_000, 100_000)
    }


def save(rounds: int) -> dict[str, tuple[float, float]]:
    """The adapters of workloads C (256 tensors) and D (48), and one of 17M parameters: the bare file, ours, and PEFT's.

    As in training, the model makes a pass forward and back before each save, so that none finds the processor's caches
    as the last save has left them, and each save goes into a folder of its own. Deleting old ones is part of ours; the
    others' are deleted here, outside of the time that is measured.
    """
    from benchmarks.workloads import WORKLOADS

    measured = {}
    wide = replace(WORKLOADS["C"], model=WORKLOADS["C"].model | dict(hidden_size=512, intermediate_size=1408), rank=64)
    for name, load in (("C, 0.9 MB", WORKLOADS["C"]), ("D, 2.4 MB", WORKLOADS["D"]), ("32 layers, 67 MB", wide)):
        measured |= {f"save {name}: {way}": times for way, times in _saved(load, rounds).items()}
    return measured


def _saved(load: Workload, rounds: int) -> dict[str, tuple[float, float]]:
    """Each way to save the adapter of a workload, in turn."""
    import torch
    from safetensors.torch import save_file

    from benchmarks.variants import build
    from phi3_lora_plugin.lora.inventory import inventory_of
    from phi3_lora_plugin.lora.snapshot import take
    from phi3_lora_plugin.store.retention import Retention
    from phi3_lora_plugin.store.run import CheckpointRun

    model = build(load, 0)
    state = {key: p.detach() for key, p in model.named_parameters() if p.requires_grad}
    for key, tensor in state.items():
        if "lora_B" in key:
            torch.nn.init.normal_(tensor)
    ids = torch.arange(1, 65).reshape(1, 64)  # without 0, which pads: its embedding is zero
    step = iter(range(1, 10_000))
    known = inventory_of(model)  # as `LoraCheckpoint` has it from the beginning of training
    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder)
        run = CheckpointRun(place / "store", {}, {}, "peft", Retention(), began_at=0)
        run.open(background=False)

        def fresh() -> Path:
            other = place / f"other-{next(step)}"
            other.mkdir()
            return other

        def raw(sync: bool) -> None:
            path = fresh() / "adapter_model.safetensors"
            save_file({key: tensor.contiguous() for key, tensor in state.items()}, path)
            if sync:
                descriptor = os.open(path, os.O_RDONLY)
                os.fsync(descriptor)
                os.close(descriptor)

        def taken(copy: bool) -> Any:
            return take(model, copy=copy, inventory=inventory_of(model, None, known))

        def step_of_training() -> None:
            for old in place.glob("other-*"):
                shutil.rmtree(old)
            model(input_ids=ids, labels=ids).loss.backward()

        ways: dict[str, Callable[[], Any]] = {
            "bare safetensors": lambda: raw(sync=False),
            "bare safetensors, synced to the disk": lambda: raw(sync=True),
            "PEFT's save_pretrained": lambda: model.save_pretrained(fresh(), save_embedding_layers=False),
            "ours, while training waits (background)": lambda: taken(copy=True),
            "ours, named and checked, nothing copied": lambda: taken(copy=False),
            "ours, hashed, synced and published": lambda: run.save(next(step), taken(copy=False), None, None),
        }
        times = _interleaved(ways, rounds, before=step_of_training)
        run.close()
    return times


def callbacks(rounds: int) -> dict[str, tuple[float, float]]:
    """A step of workload C with our callbacks: the time spent in them, logging every 10th step and every step."""
    from rich.console import Console

    from benchmarks.variants import Clock, build, trainer_for
    from benchmarks.workloads import WORKLOADS, rows
    from phi3_lora_plugin import LoraCheckpoint
    from phi3_lora_plugin.training.metrics_log import MetricsLog
    from phi3_lora_plugin.training.progress import ProgressReport

    measured = {}
    for every in (10, 1):
        load = replace(WORKLOADS["C"], steps=20, batch=1, rows=20, mean_length=16)
        with tempfile.TemporaryDirectory() as folder:
            spent = {"wall": 0.0, "cpu": 0.0}
            trainer = trainer_for("ours", build(load, 0), load, rows(load, 0), Path(folder), Clock())
            trainer.args.logging_steps = every
            metrics = MetricsLog(Path(folder))
            for callback in (metrics, ProgressReport(Console(quiet=True), metrics), LoraCheckpoint()):
                for event in ("on_step_begin", "on_step_end", "on_log", "on_substep_end", "on_pre_optimizer_step"):
                    setattr(callback, event, _counted(getattr(callback, event), spent))
                trainer.add_callback(callback)
            trainer.train()
            per_step = spent["wall"] / load.steps, spent["cpu"] / load.steps
            measured[f"callbacks a step, logging every {every}"] = per_step
    return measured


def _counted(method: Callable[..., Any], spent: dict[str, float]) -> Callable[..., Any]:
    def counted(*args: Any, **kwargs: Any) -> Any:
        wall, cpu = time.perf_counter(), time.process_time()
        try:
            return method(*args, **kwargs)
        finally:
            spent["wall"] += time.perf_counter() - wall
            spent["cpu"] += time.process_time() - cpu

    return counted


def _timed(action: Callable[[], Any], rounds: int, children: bool = False) -> tuple[float, float]:
    """Median (wall, processor) seconds of an action after one that does not count."""
    return _interleaved({"": action}, rounds, children)[""]


def _interleaved(
    ways: Mapping[str, Callable[[], Any]], rounds: int, children: bool = False, before: Callable[[], Any] = lambda: None
) -> dict[str, tuple[float, float]]:
    """The same of several that take turns, so that the state of disk and memory is the same for all."""
    who = resource.RUSAGE_CHILDREN if children else resource.RUSAGE_SELF

    def processor() -> float:
        used = resource.getrusage(who)
        return used.ru_utime + used.ru_stime

    seen: dict[str, list[tuple[float, float]]] = {way: [] for way in ways}
    for _ in range(rounds + 1):
        for way, action in ways.items():
            before()
            wall, cpu = time.perf_counter(), processor()
            action()
            seen[way].append((time.perf_counter() - wall, processor() - cpu))
    return {
        way: (statistics.median(wall for wall, _ in each[1:]), statistics.median(cpu for _, cpu in each[1:]))
        for way, each in seen.items()
    }


_PARTS = {"start": start, "pack": pack, "save": save, "callbacks": callbacks}

if __name__ == "__main__":
    sys.exit(main())
