"""`python -m benchmarks [WORKLOAD ...]`: us against the peers, interleaved, each run in a process of its own.

    python -m benchmarks A B --pairs 5 --out bench-out
    python -m benchmarks D D-bf16 --data chats.jsonl --tokenizer phi-3-mini-4k-instruct/
    python -m benchmarks B --model num_key_value_heads=1 num_hidden_layers=8 vocab_size=200064
    python -m benchmarks A --peers trainer-peft unsloth --unsloth-python unsloth-venv/bin/python
    python -m benchmarks R --pairs 1                        # 3.8B parameters on a CPU: 13 GB, some minutes a run
    python -m benchmarks W1 W2 W3 W4 W5 --peers trainer-peft trl trl-best liger          # one GPU

A speed-up without parity does not count: where losses or adapters differ by more than the limits below, the row shows
FAILED and the command ends with exit code 1. In 16 bits right runs differ as well: there the limit is what stock code
differs from itself in this very run (eager attention; a start rounded otherwise), times `NOISE`. Ratios are given for
the clock on the wall and for processor time; the second hardly changes where other programs share the machine.

A peer that is not installed is skipped, and a run that goes out of memory ends only itself; both are reported.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from benchmarks.chart import draw
from benchmarks.jobs import BAD_FORK, run_job
from benchmarks.machine import machine
from benchmarks.workloads import WORKLOADS, Workload, chats, rows, setting

#: Ours -> the runs on the very same batches whose losses and adapters it has to match. TRL packs by itself, into
#: other batches: its packed run is compared in speed alone.
TWINS = {
    "ours": ("trainer-peft", "trl", "trl-best", "liger", "unsloth"),
    "ours-packed": ("trainer-peft-packed",),
    "ours-checkpointed": ("trainer-peft-checkpointed", "trl"),
}
LOSS_LIMIT = {"float32": 1e-5, "bfloat16": 2e-2}  # relative a step; absolute a step
COSINE_LIMIT = 0.999
NOISE = 3.0
#: Right runs of stock code, on the very same batches.
STOCK, OTHER_STOCK = "trainer-peft", ("trainer-peft-eager", "trainer-peft-nudged")
#: Runs that are there for parity, once.
ONCE = ("trainer-peft-packed", *OTHER_STOCK)
#: What a variant needs in addition to this package's own dependencies.
NEEDS = {"trl": "trl", "trl-best": "trl", "trl-packed": "trl", "liger": "liger_kernel", "unsloth": "unsloth"}
PEERS = ("trainer-peft", "trl", "trl-best", "trl-packed", "liger", "unsloth")


def arguments() -> argparse.ArgumentParser:
    """What may be asked for on the command line."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__.split("\n", 1)[0])
    parser.add_argument("workloads", nargs="*", metavar="WORKLOAD", help=f"of {', '.join(WORKLOADS)}; A to D if none")
    parser.add_argument("--pairs", type=int, default=5, help="interleaved rounds; medians are taken over them")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--model",
        nargs="*",
        type=setting,
        default=[],
        metavar="KEY=VALUE",
        help="of Phi3Config, instead of the workload's",
    )
    parser.add_argument(
        "--data", type=Path, help="real chats instead of random rows, of any format that data.path takes"
    )
    parser.add_argument("--columns", type=json.loads, default={}, help="as data.columns, in JSON, with --data")
    parser.add_argument("--tokenizer", help="folder of a Phi-3 tokenizer, with --data")
    parser.add_argument("--peers", nargs="*", default=["trainer-peft", "trl", "trl-best", "trl-packed"], choices=PEERS)
    parser.add_argument("--unsloth-python", type=Path, help="the Python of an environment that has unsloth")
    parser.add_argument("--steps", type=int, help="of each run, instead of the workload's own number")
    parser.add_argument("--warm-up", type=int, help="steps that are not timed, instead of the workload's own number")
    parser.add_argument("--threads", type=int, default=2, help="of each process, on the CPU")
    parser.add_argument("--out", type=Path, default=Path("bench-out"))
    return parser


def main() -> int:
    """Run what was asked for; 0 only if every measured pair has parity."""
    parser = arguments()
    chosen = parser.parse_args()
    chosen.workloads = chosen.workloads or ["A", "B", "C", "D", "D-bf16"]
    if unknown := sorted(set(chosen.workloads) - set(WORKLOADS)):
        parser.error(f"no workload {', '.join(unknown)}; available: {', '.join(WORKLOADS)}")
    if bool(chosen.data) != bool(chosen.tokenizer):
        parser.error("--data and --tokenizer belong together")
    # Before anything is imported that reads them, here or in the processes that are measured.
    os.environ |= {"HF_HUB_OFFLINE": "1", "CI": "1", "TRANSFORMERS_VERBOSITY": "error"}
    os.environ.setdefault("PYTORCH_NVML_BASED_CUDA_CHECK", "1")  # counts cards without touching CUDA
    os.environ["OMP_NUM_THREADS"] = str(chosen.threads)
    chosen.out.mkdir(parents=True, exist_ok=True)
    report: dict[str, Any] = {"machine": machine(), "seed": chosen.seed, "pairs": chosen.pairs, "workloads": {}}
    report |= {"model": dict(chosen.model), "data": str(chosen.data) if chosen.data else "random rows"}
    report |= {"threads": chosen.threads, "load_before": os.getloadavg()[0]}
    failed = False
    for name in chosen.workloads:
        load = replace(WORKLOADS[name], model=WORKLOADS[name].model | dict(chosen.model))
        real = chosen.data is not None
        data = chats(chosen.data, chosen.columns, chosen.tokenizer, load) if real else rows(load, chosen.seed)
        most, words = max(max(row["input_ids"]) for row in data), load.model["vocab_size"]
        if most >= words:
            parser.error(f"{name} has {words} words and the data an id of {most}: add --model vocab_size={most + 1}")
        variants = _variants(load, chosen.peers)
        if load.dtype != "float32":
            variants += [each for each in (STOCK, *OTHER_STOCK) if each not in variants]
        left_out = {each: reason for each in variants if (reason := _missing(each, chosen))}
        runs: dict[str, list[dict[str, Any]]] = {each: [] for each in variants if each not in left_out}
        for variant, reason in left_out.items():
            print(f"{name}: {variant} skipped: {reason}", flush=True)
        for round_ in range(chosen.pairs):
            # forwards and backwards in turn, so that a machine that warms up or slows down favours no variant
            for variant in list(runs) if round_ % 2 == 0 else list(runs)[::-1]:
                if variant in left_out or (variant in ONCE and runs[variant]):
                    continue
                run = _run(variant, name, data, chosen)
                if "failed" in run:
                    left_out[variant] = run["failed"]
                    print(f"{name} round {round_ + 1}: {variant:<20} {run['failed']}", flush=True)
                    continue
                runs[variant].append(run)
                print(
                    f"{name} round {round_ + 1}: {variant:<20} {run['tokens_per_second']:>12,.0f} tokens/s "
                    f"{run['tokens_per_cpu_second']:>10,.0f} a processor second",
                    flush=True,
                )
        runs = {variant: done for variant, done in runs.items() if done and variant not in left_out}
        report["workloads"][name] = result = _compare(runs, load.dtype) | {"left_out": left_out}
        # the comparison is with ours; without it no parity can be shown
        failed |= any(variant in left_out for variant in TWINS if variant in variants)
        failed |= not all(twin["ok"] for row in result["ours"].values() for twin in row["parity"].values())
        _table(name, load.notes, result)
        _write(report, chosen.out)
    report["load_after"] = os.getloadavg()[0]
    _write(report, chosen.out)
    print(f"\nwritten: {chosen.out / 'benchmark.json'}, {chosen.out / 'benchmark.svg'}")
    return 1 if failed else 0


def _variants(load: Workload, peers: Sequence[str]) -> list[str]:
    """What is run: packs, or the same rows with every layer computed twice, which TRL does unless told otherwise."""
    if not load.recomputed:
        return ["ours", "ours-packed", "trainer-peft-packed", *peers]
    with_stock = ["trainer-peft-checkpointed"] if "trainer-peft" in peers else []
    return ["ours", "ours-checkpointed", *with_stock, *(peer for peer in peers if not peer.endswith("packed"))]


def _write(report: dict[str, Any], folder: Path) -> None:
    (folder / "benchmark.json").write_text(json.dumps(report, indent=2))
    draw(report, folder / "benchmark.svg")


def _missing(variant: str, chosen: argparse.Namespace) -> str | None:
    """Why a variant cannot run here, as far as packages go; None if it can."""
    package = NEEDS.get(variant)
    if package is None or (variant == "unsloth" and chosen.unsloth_python) or find_spec(package):
        return None
    return f"{package} is not installed"


def _run(variant: str, workload: str, data: list[dict[str, Any]], chosen: argparse.Namespace) -> dict[str, Any]:
    """One run in a process of its own. On the CPU it is forked from one that has imported everything, for all alike."""
    import torch

    with tempfile.TemporaryDirectory() as folder:
        paths = {key: str(Path(folder, key)) for key in ("rows", "result", "vector", "folder", "log")}
        Path(paths["rows"]).write_text(json.dumps(data))
        job = paths | {"workload": workload, "seed": chosen.seed}
        job["warm_up"] = WORKLOADS[workload].warm_up if chosen.warm_up is None else chosen.warm_up
        job |= {"model": dict(chosen.model), "steps": chosen.steps}
        code: int | None = BAD_FORK
        if variant != "unsloth":
            # Imports cost seconds a run, so runs are forked from a server that has made them, and has not touched CUDA:
            # a fork that finds otherwise reports it, and the run gets its own process.
            context = multiprocessing.get_context("forkserver")
            preload = [package for package in ("trl", "datasets") if find_spec(package)]
            context.set_forkserver_preload(["benchmarks.variants", *preload])
            process = context.Process(target=run_job, args=(variant, job, True))
            process.start()
            process.join()
            code = process.exitcode
        if code == BAD_FORK:
            file = Path(folder, "job.json")
            file.write_text(json.dumps(job))
            python = str(chosen.unsloth_python) if variant == "unsloth" and chosen.unsloth_python else sys.executable
            with open(paths["log"], "w") as log:
                code = subprocess.call(
                    [python, "-m", "benchmarks.variants", variant, str(file)], stdout=log, stderr=subprocess.STDOUT
                )
        if code != 0:
            raise SystemExit(f"{variant} on {workload} failed:\n{Path(paths['log']).read_text()[-3000:]}")
        result: dict[str, Any] = json.loads(Path(paths["result"]).read_text())
        if "failed" in result:
            return result
        result["begun"], result["vector"] = torch.load(paths["vector"], weights_only=True)
        return result


def _compare(runs: dict[str, list[dict[str, Any]]], dtype: str) -> dict[str, Any]:
    """Medians of each variant, ratios of ours over each peer with quartiles, and parity with the twins."""
    summary = {
        variant: {
            key: statistics.median(run[key] for run in done) for key in done[0] if isinstance(done[0][key], float)
        }
        for variant, done in runs.items()
    }
    ours: dict[str, Any] = {}
    others = [_apart(runs[each][0], runs[STOCK][0], dtype) for each in OTHER_STOCK if each in runs and STOCK in runs]
    noise = None
    if dtype != "float32" and others:
        noise = {"loss": max(each["loss"] for each in others), "cosine": min(each["cosine"] for each in others)}
    for mine, twins in TWINS.items():
        if mine not in runs:
            continue
        ratios: dict[str, Any] = {}
        for peer, done in runs.items():
            if peer in TWINS or len(done) != len(runs[mine]):
                continue
            ratios[peer] = {
                measure: _quartiles([a[measure] / b[measure] for a, b in zip(runs[mine], done, strict=True)])
                for measure in ("tokens_per_second", "tokens_per_cpu_second", "peak_bytes")
            }
        parity = {twin: _parity(runs[mine][0], runs[twin][0], dtype, noise) for twin in twins if runs.get(twin)}
        ours[mine] = {"ratios": ratios, "parity": parity}
    return {"variants": summary, "ours": ours, "noise": noise}


def _quartiles(values: list[float]) -> dict[str, float]:
    quartiles = statistics.quantiles(values, n=4) if len(values) > 1 else values * 3
    return {"median": statistics.median(values), "p25": quartiles[0], "p75": quartiles[2]}


def _apart(mine: dict[str, Any], twin: dict[str, Any], dtype: str) -> dict[str, float]:
    """The largest difference of a step's loss, and the cosine of what the adapters learned."""
    import torch

    pairs = list(zip(mine["losses"], twin["losses"], strict=True))
    scale = (lambda a: max(abs(a), 1e-9)) if dtype == "float32" else (lambda a: 1.0)
    # What was learned, not where it began: both begin at the same adapter.
    moved = [run["vector"] - run["begun"] for run in (mine, twin)]
    return {
        "loss": max(abs(a - b) / scale(b) for a, b in pairs),
        "cosine": torch.nn.functional.cosine_similarity(*moved, 0).item(),
    }


def _parity(
    mine: dict[str, Any], twin: dict[str, Any], dtype: str, noise: dict[str, float] | None = None
) -> dict[str, Any]:
    """How much two runs differ, and whether that is no more than right runs may."""
    apart = _apart(mine, twin, dtype)
    loss, cosine = LOSS_LIMIT[dtype], COSINE_LIMIT
    if noise is not None:
        loss, cosine = max(loss, NOISE * noise["loss"]), min(cosine, 1 - NOISE * (1 - noise["cosine"]))
    limits = {"loss_limit": loss, "cosine_limit": cosine}
    return apart | limits | {"ok": apart["loss"] <= loss and apart["cosine"] >= cosine}


def _table(name: str, notes: str, result: dict[str, Any]) -> None:
    print(f"\nworkload {name}{f' ({notes})' if notes else ''}")
    print(f"  {'variant':<22}{'tokens/s':>10}{'a cpu s':>10}{'step ms':>10}{'peak MB':>9}{'start s':>9}{'save ms':>9}")
    for variant, row in result["variants"].items():
        print(
            f"  {variant:<22}{row['tokens_per_second']:>10,.0f}{row['tokens_per_cpu_second']:>10,.0f}"
            f"{row['step_ms']:>10,.1f}{row['peak_bytes'] / 1e6:>9,.0f}{row['start_seconds']:>9.2f}"
            f"{1000 * row['save_seconds']:>9.1f}"
        )
    for mine, row in result["ours"].items():
        for peer, ratio in row["ratios"].items():
            wall, cpu, peak = (ratio[key] for key in ("tokens_per_second", "tokens_per_cpu_second", "peak_bytes"))
            print(
                f"  {mine} / {peer}: {wall['median']:.2f}x ({wall['p25']:.2f} to {wall['p75']:.2f}), of processor time "
                f"{cpu['median']:.2f}x ({cpu['p25']:.2f} to {cpu['p75']:.2f}), peak memory {peak['median']:.2f}x"
            )
        for twin, parity in row["parity"].items():
            print(
                f"  {mine}: {'parity' if parity['ok'] else 'FAILED, no parity'} with {twin}: "
                f"losses within {parity['loss']:.1e}, cosine of what the adapters learned {parity['cosine']:.6f} "
                f"(limits {parity['loss_limit']:.1e} and {parity['cosine_limit']:.6f})"
            )
    if noise := result["noise"]:
        print(
            f"  noise, stock code with itself: losses within {noise['loss']:.1e}, cosine {noise['cosine']:.6f}; "
            f"{NOISE:g} times that is the limit where it is wider"
        )


if __name__ == "__main__":
    sys.exit(main())
