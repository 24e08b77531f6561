"""`python -m benchmarks [WORKLOAD ...]`: us against the peers, interleaved, each run in a process of its own.

    python -m benchmarks A B --pairs 5 --out bench-out
    python -m benchmarks D D-bf16 --data chats.jsonl --tokenizer phi-3-mini-4k-instruct/
    python -m benchmarks B --model num_key_value_heads=1 num_hidden_layers=8 vocab_size=200064
    python -m benchmarks A --peers trainer-peft unsloth --unsloth-python unsloth-venv/bin/python
    python -m benchmarks W1 W2 W3 W4 W5 --peers trainer-peft trl trl-best liger          # one GPU

A speed-up without parity is no speed-up: where losses or adapters differ by more than the limits below, the row says
FAILED and the command ends with exit code 1. Ratios are given for the clock on the wall and for processor time; the
second hardly changes where other programs share the machine.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import platform
import statistics
import subprocess
import sys
import tempfile
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

from benchmarks.chart import draw
from benchmarks.jobs import run_job
from benchmarks.workloads import WORKLOADS, chats, rows, setting

#: Ours, with the runs on the very same batches, to whose losses and adapters it is held. TRL packs by itself, into
#: other batches: its packed run is compared in speed alone.
TWINS = {
    "ours": ("trainer-peft", "trl", "trl-best", "liger", "unsloth"),
    "ours-packed": ("trainer-peft-packed",),
}
LOSS_LIMIT = {"float32": 1e-5, "bfloat16": 2e-2}  # relative a step; absolute a step
COSINE_LIMIT = 0.999
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
    parser.add_argument("--warm-up", type=int, default=3, help="steps that are not timed")
    parser.add_argument("--threads", type=int, default=2, help="of each process, on the CPU")
    parser.add_argument("--out", type=Path, default=Path("bench-out"))
    return parser


def main() -> int:
    """Run what was asked for; 0 only if every measured pair has parity."""
    parser = arguments()
    chosen = parser.parse_args()
    chosen.workloads = chosen.workloads or ["A", "B", "C", "D", "D-bf16"]
    if unknown := sorted(set(chosen.workloads) - set(WORKLOADS)):
        parser.error(f"no workload {', '.join(unknown)}; there are {', '.join(WORKLOADS)}")
    if bool(chosen.data) != bool(chosen.tokenizer):
        parser.error("--data and --tokenizer belong together")
    # Before anything is imported that reads them, here or in the processes that are measured.
    os.environ |= {"HF_HUB_OFFLINE": "1", "CI": "1", "TRANSFORMERS_VERBOSITY": "error"}
    os.environ["OMP_NUM_THREADS"] = str(chosen.threads)
    chosen.out.mkdir(parents=True, exist_ok=True)
    report: dict[str, Any] = {"machine": _machine(), "seed": chosen.seed, "pairs": chosen.pairs, "workloads": {}}
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
        variants = ["ours", "ours-packed", "trainer-peft-packed", *chosen.peers]
        runs: dict[str, list[dict[str, Any]]] = {variant: [] for variant in variants}
        for round_ in range(chosen.pairs):
            # forwards and backwards in turn, so that a machine that warms up or slows down favours nobody
            for variant in variants if round_ % 2 == 0 else variants[::-1]:
                if variant == "trainer-peft-packed" and runs[variant]:
                    continue  # it is there for parity, once
                runs[variant].append(run := _run(variant, name, data, chosen))
                print(
                    f"{name} round {round_ + 1}: {variant:<20} {run['tokens_per_second']:>12,.0f} tokens/s "
                    f"{run['tokens_per_cpu_second']:>10,.0f} a processor second",
                    flush=True,
                )
        report["workloads"][name] = result = _compare(runs, load.dtype)
        failed |= not all(twin["ok"] for row in result["ours"].values() for twin in row["parity"].values())
        _table(name, load.notes, result)
        _write(report, chosen.out)
    report["load_after"] = os.getloadavg()[0]
    _write(report, chosen.out)
    print(f"\nwritten: {chosen.out / 'benchmark.json'}, {chosen.out / 'benchmark.svg'}")
    return 1 if failed else 0


def _write(report: dict[str, Any], folder: Path) -> None:
    (folder / "benchmark.json").write_text(json.dumps(report, indent=2))
    draw(report, folder / "benchmark.svg")


def _run(variant: str, workload: str, data: list[dict[str, Any]], chosen: argparse.Namespace) -> dict[str, Any]:
    """One run in a process of its own. On the CPU it is forked from one that has imported everything, for all alike."""
    import torch

    with tempfile.TemporaryDirectory() as folder:
        paths = {key: str(Path(folder, key)) for key in ("rows", "result", "vector", "folder", "log")}
        Path(paths["rows"]).write_text(json.dumps(data))
        job = paths | {"workload": workload, "seed": chosen.seed, "warm_up": chosen.warm_up}
        job |= {"model": dict(chosen.model), "steps": chosen.steps}
        if WORKLOADS[workload].device == "cpu" and variant != "unsloth":
            context = multiprocessing.get_context("forkserver")
            context.set_forkserver_preload(["benchmarks.variants", "trl", "datasets"])
            process = context.Process(target=run_job, args=(variant, job, True))
            process.start()
            process.join()
            code = process.exitcode
        else:
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
    for mine, twins in TWINS.items():
        ratios: dict[str, Any] = {}
        for peer, done in runs.items():
            if peer in TWINS or len(done) != len(runs[mine]):
                continue
            ratios[peer] = {
                measure: _quartiles([a[measure] / b[measure] for a, b in zip(runs[mine], done, strict=True)])
                for measure in ("tokens_per_second", "tokens_per_cpu_second", "peak_bytes")
            }
        parity = {twin: _parity(runs[mine][0], runs[twin][0], dtype) for twin in twins if runs.get(twin)}
        ours[mine] = {"ratios": ratios, "parity": parity}
    return {"variants": summary, "ours": ours}


def _quartiles(values: list[float]) -> dict[str, float]:
    quartiles = statistics.quantiles(values, n=4) if len(values) > 1 else values * 3
    return {"median": statistics.median(values), "p25": quartiles[0], "p75": quartiles[2]}


def _parity(mine: dict[str, Any], twin: dict[str, Any], dtype: str) -> dict[str, Any]:
    import torch

    pairs = list(zip(mine["losses"], twin["losses"], strict=True))
    scale = (lambda a: max(abs(a), 1e-9)) if dtype == "float32" else (lambda a: 1.0)
    worst = max(abs(a - b) / scale(b) for a, b in pairs)
    # What was learned, not where it began: both begin at the same adapter.
    moved = [run["vector"] - run["begun"] for run in (mine, twin)]
    cosine = torch.nn.functional.cosine_similarity(*moved, 0).item()
    return {"loss": worst, "cosine": cosine, "ok": worst <= LOSS_LIMIT[dtype] and cosine >= COSINE_LIMIT}


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
                f"losses within {parity['loss']:.1e}, cosine of what the adapters learned {parity['cosine']:.6f}"
            )


def _machine() -> dict[str, Any]:
    import torch

    packages = ("torch", "transformers", "peft", "trl", "accelerate")
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else platform.processor() or platform.machine()
    return {
        "device": device,
        "cores": os.cpu_count(),
        "python": platform.python_version(),
        "versions": {package: version(package) for package in packages},
    }


if __name__ == "__main__":
    sys.exit(main())
