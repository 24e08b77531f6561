"""`python -m benchmarks [WORKLOAD ...]`: us against the peers, interleaved, each run in a process of its own.

    python -m benchmarks A B --pairs 5 --out bench-out
    python -m benchmarks D --data chats.jsonl --tokenizer phi-3-mini-4k-instruct/
    python -m benchmarks W1 W2 W3 W4 W5          # one GPU

A speed-up without parity is no speed-up: where losses or adapters differ by more than the limits below, the row says
FAILED and the command ends with exit code 1.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
from importlib.metadata import version
from pathlib import Path
from typing import Any

from benchmarks.chart import draw
from benchmarks.workloads import WORKLOADS, chats, rows

#: ours -> what it is measured against. Packed runs see other batches than padded ones, so each has a parity twin: the
#: stock run on the very same batches.
PAIRS = {
    "ours": ("trainer-peft", "trl"),
    "ours-packed": ("trainer-peft", "trl", "trl-packed"),
}
TWIN = {"ours": "trainer-peft", "ours-packed": "trainer-peft-packed"}
LOSS_LIMIT = {"float32": 1e-5, "bfloat16": 2e-2}  # relative a step; absolute a step
COSINE_LIMIT = 0.999


def main() -> int:
    """Run what was asked for; 0 only if every measured pair has parity."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__.split("\n", 1)[0])
    parser.add_argument("workloads", nargs="*", default=["A", "B", "D"], choices=[*WORKLOADS, []], metavar="WORKLOAD")
    parser.add_argument("--pairs", type=int, default=5, help="interleaved rounds; medians are taken over them")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--data", type=Path, help="real chats instead of random rows (JSONL)")
    parser.add_argument("--tokenizer", type=Path, help="folder of a Phi-3 tokenizer, with --data")
    parser.add_argument("--peers", nargs="*", default=["trainer-peft", "trl", "trl-packed"], help="also: liger")
    parser.add_argument("--out", type=Path, default=Path("bench-out"))
    chosen = parser.parse_args()
    chosen.out.mkdir(parents=True, exist_ok=True)
    report: dict[str, Any] = {"machine": _machine(), "seed": chosen.seed, "pairs": chosen.pairs, "workloads": {}}
    failed = False
    for name in chosen.workloads:
        load = WORKLOADS[name]
        data = chats(chosen.data, chosen.tokenizer, load) if chosen.data else rows(load, chosen.seed)
        variants = ["ours", "ours-packed", "trainer-peft-packed", *chosen.peers]
        runs: dict[str, list[dict[str, Any]]] = {variant: [] for variant in variants}
        for round_ in range(chosen.pairs):
            # forwards and backwards in turn, so that a machine that warms up or slows down favours nobody
            for variant in variants if round_ % 2 == 0 else variants[::-1]:
                if variant == "trainer-peft-packed" and runs[variant]:
                    continue  # it is there for parity, once
                runs[variant].append(_run(variant, name, data, chosen.seed))
                speed = runs[variant][-1]["tokens_per_second"]
                print(f"{name} round {round_ + 1}: {variant:<20} {speed:>12,.0f} tokens/s", flush=True)
        report["workloads"][name] = result = _compare(runs, load.dtype)
        failed |= not all(row["parity"]["ok"] for row in result["ours"].values())
        _table(name, load.notes, result)
    (chosen.out / "benchmark.json").write_text(json.dumps(report, indent=2))
    draw(report, chosen.out / "benchmark.svg")
    print(f"\nwritten: {chosen.out / 'benchmark.json'}, {chosen.out / 'benchmark.svg'}")
    return 1 if failed else 0


def _run(variant: str, workload: str, data: list[dict[str, Any]], seed: int) -> dict[str, Any]:
    import torch

    with tempfile.TemporaryDirectory() as folder:
        paths = {key: str(Path(folder, key)) for key in ("rows", "result", "vector", "folder")}
        Path(paths["rows"]).write_text(json.dumps(data))
        job = Path(folder, "job.json")
        job.write_text(json.dumps(paths | {"workload": workload, "seed": seed}))
        environment = os.environ | {"HF_HUB_OFFLINE": "1", "CI": "1", "TRANSFORMERS_VERBOSITY": "error"}
        command = [sys.executable, "-m", "benchmarks.variants", variant, str(job)]
        done = subprocess.run(command, env=environment, capture_output=True, text=True)
        if done.returncode != 0:
            raise SystemExit(f"{variant} on {workload} failed:\n{done.stderr[-3000:]}")
        result: dict[str, Any] = json.loads(Path(paths["result"]).read_text())
        result["vector"] = torch.load(paths["vector"], weights_only=True)
        return result


def _compare(runs: dict[str, list[dict[str, Any]]], dtype: str) -> dict[str, Any]:
    """Medians of each variant, ratios of ours over each peer with quartiles, and parity with the twin."""
    summary = {
        variant: {
            key: statistics.median(run[key] for run in done)
            for key in ("tokens_per_second", "step_ms", "peak_bytes", "start_seconds", "save_seconds")
        }
        for variant, done in runs.items()
    }
    ours = {}
    for mine, peers in PAIRS.items():
        ratios = {}
        for peer in peers:
            if not runs.get(peer):
                continue
            each = sorted(
                a["tokens_per_second"] / b["tokens_per_second"] for a, b in zip(runs[mine], runs[peer], strict=True)
            )
            quartiles = statistics.quantiles(each, n=4) if len(each) > 1 else [each[0]] * 3
            ratios[peer] = {"median": statistics.median(each), "p25": quartiles[0], "p75": quartiles[2]}
        ours[mine] = {"ratios": ratios, "parity": _parity(runs[mine][0], runs[TWIN[mine]][0], dtype)}
    return {"variants": summary, "ours": ours}


def _parity(mine: dict[str, Any], twin: dict[str, Any], dtype: str) -> dict[str, Any]:
    import torch

    pairs = list(zip(mine["losses"], twin["losses"], strict=True))
    scale = (lambda a: max(abs(a), 1e-9)) if dtype == "float32" else (lambda a: 1.0)
    worst = max(abs(a - b) / scale(b) for a, b in pairs)
    cosine = torch.nn.functional.cosine_similarity(mine["vector"], twin["vector"], 0).item()
    # Trainer prints losses with so many digits that float32 parity cannot be told below this.
    limit = max(LOSS_LIMIT[dtype], 1e-5)
    return {
        "against": twin["variant"],
        "loss": worst,
        "cosine": cosine,
        "ok": worst <= limit and cosine >= COSINE_LIMIT,
    }


def _table(name: str, notes: str, result: dict[str, Any]) -> None:
    print(f"\nworkload {name}{f' ({notes})' if notes else ''}")
    print(f"  {'variant':<22}{'tokens/s':>12}{'step ms':>10}{'peak MB':>10}{'start s':>9}{'save ms':>9}")
    for variant, row in result["variants"].items():
        print(
            f"  {variant:<22}{row['tokens_per_second']:>12,.0f}{row['step_ms']:>10,.1f}"
            f"{row['peak_bytes'] / 1e6:>10,.0f}{row['start_seconds']:>9.2f}{1000 * row['save_seconds']:>9.1f}"
        )
    for mine, row in result["ours"].items():
        parity = row["parity"]
        for peer, ratio in row["ratios"].items():
            print(f"  {mine} / {peer}: {ratio['median']:.2f}x ({ratio['p25']:.2f} to {ratio['p75']:.2f})")
        print(
            f"  {mine}: {'parity' if parity['ok'] else 'FAILED, no parity'} with {parity['against']}: "
            f"losses within {parity['loss']:.1e}, adapter cosine {parity['cosine']:.6f}"
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
