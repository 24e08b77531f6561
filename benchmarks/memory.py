"""`python -m benchmarks.memory [CASE ...]`: `phi3-lora plan` against the peak of `phi3-lora train`, on CPU.

    python -m benchmarks.memory                     # the whole grid
    python -m benchmarks.memory base bf16 nf4       # some of it
    python -m benchmarks.memory --out memory.json

Each case is a random model of its own, planned in one process and trained for a few steps in another, whose peak
resident memory the kernel reports (VmHWM). Ends with exit code 1 if one is out by more than `--limit`.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

BASE: dict[str, Any] = dict(
    vocab_size=32064,
    hidden_size=384,
    intermediate_size=1024,
    num_hidden_layers=6,
    num_attention_heads=6,
    num_key_value_heads=6,
)
WIDE = dict(hidden_size=768, intermediate_size=2048, num_hidden_layers=8, num_attention_heads=12, num_key_value_heads=4)
WORDS = dict(vocab_size=200064, hidden_size=256, intermediate_size=512, num_hidden_layers=4, num_attention_heads=4,
             num_key_value_heads=4, tie_word_embeddings=True)  # fmt: skip

#: name -> (changes of the model, type of its weights on disk, overrides of the run)
CASES: dict[str, tuple[dict[str, Any], str, list[str]]] = {
    "base": ({}, "float32", []),
    "off": ({}, "float32", ["speed=off"]),
    "tiny": (dict(vocab_size=2048, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4,
                  num_key_value_heads=2), "float32", []),
    "recomputed": ({}, "float32", ["training.activation_checkpointing=true"]),
    "packed": ({}, "float32", ["data.packing=true", "training.per_device_train_batch_size=2"]),
    "bf16": ({}, "bfloat16", ["model.dtype=bfloat16"]),
    "bf16-off": ({}, "bfloat16", ["model.dtype=bfloat16", "speed=off"]),
    "converted": (WIDE, "bfloat16", ["model.dtype=float32", "training.per_device_train_batch_size=1"]),
    "wide": (WIDE, "float32", ["training.per_device_train_batch_size=2"]),
    "wide-recomputed-off": (WIDE, "float32", ["speed=off", "training.activation_checkpointing=true"]),
    "words": (WORDS, "float32", []),
    "words-off": (WORDS, "float32", ["speed=off", "training.per_device_train_batch_size=2"]),
    "deep": (dict(hidden_size=128, intermediate_size=352, num_hidden_layers=24, num_attention_heads=4,
                  num_key_value_heads=2), "float32", ["training.per_device_train_batch_size=8"]),
    "nf4": (WIDE, "bfloat16", ["model.quantize=nf4", "model.dtype=bfloat16"]),
    "evaluated": ({}, "float32", ["data.eval_fraction=0.2"]),
    "accumulated": ({}, "float32", ["training.gradient_accumulation_steps=4"]),
}  # fmt: skip


def main() -> int:
    """Measure what was asked for and print one line a case; 0 only if every one is within the limit."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.memory", description=__doc__.split("\n", 1)[0])
    parser.add_argument("cases", nargs="*", default=list(CASES), choices=[*CASES, []], metavar="CASE")
    parser.add_argument("--limit", type=float, default=0.2, help="how far off a plan may be, as a share")
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--out", type=Path, help="every figure as JSON")
    options = parser.parse_args()
    found = {}
    print(f"{'case':<22}{'parameters':>12}{'predicted':>12}{'measured':>12}{'off by':>9}", flush=True)
    for name in options.cases:
        with tempfile.TemporaryDirectory() as folder:
            found[name] = row = measure(Path(folder), *CASES[name], options.steps)
        print(
            f"{name:<22}{row['plan']['parameters']:>12,}{row['plan']['peak'] / 1e6:>9,.0f} MB"
            f"{row['measured'] / 1e6:>9,.0f} MB{100 * row['error']:>8.1f}%",
            flush=True,
        )
    if options.out:
        options.out.write_text(json.dumps(found, indent=2))
    return int(any(abs(row["error"]) > options.limit for row in found.values()))


def measure(folder: Path, changes: dict[str, Any], dtype: str, overrides: list[str], steps: int) -> dict[str, Any]:
    """Plan and train one case; `error` is predicted over measured, less one."""
    model(folder / "model", BASE | changes, dtype)
    chats(folder / "chats.jsonl")
    said = [
        "tiny-cpu",
        f"model.path={folder / 'model'}",
        f"data.path={folder / 'chats.jsonl'}",
        "data.eval_path=null",
        "data.max_length=512",
        "training.per_device_train_batch_size=4",
        f"training.max_steps={steps}",
        f"output_dir={folder / 'run'}",
        *overrides,
    ]
    planned = folder / "plan.json"
    code, _ = run(["plan", *said, "--json"], planned)
    if code not in (0, 1):
        raise SystemExit(f"planning failed: {planned.with_suffix('.err').read_text()}")
    code, peak = run(["train", *said, "--quiet", "--no-check", "--samples", "0"], folder / "train.txt")
    if code:
        raise SystemExit(f"training failed: {(folder / 'train.err').read_text()}")
    plan = json.loads(planned.read_text())
    return {"plan": plan, "measured": peak, "error": plan["peak"] / peak - 1}


#: The kernel's own high-water mark of the process (ru_maxrss would count the one that started it too).
CHILD = """
from phi3_lora_plugin.cli import main

try:
    main()
finally:
    with open("/proc/self/status") as status, open(PEAK, "w") as peak:
        peak.write(next(line.split()[1] for line in status if line.startswith("VmHWM")))
"""


def run(arguments: list[str], out: Path) -> tuple[int, int]:
    """(exit code, peak resident bytes) of `phi3-lora` with these arguments, in a process of its own."""
    environment = os.environ | {"PHI3_LORA_CACHE": "off", "HF_HUB_OFFLINE": "1"}
    peak = out.with_suffix(".peak")
    code = CHILD.replace("PEAK", repr(str(peak)))
    with out.open("wb") as stdout, out.with_suffix(".err").open("wb") as stderr:
        done = subprocess.run([sys.executable, "-c", code, *arguments], env=environment, stdout=stdout, stderr=stderr)
    return done.returncode, int(peak.read_text()) * 1024


def model(folder: Path, settings: dict[str, Any], dtype: str) -> None:
    """A random model with the tokenizer of the embedded one."""
    import torch
    from transformers import Phi3Config, Phi3ForCausalLM

    from phi3_lora_plugin.embedded import locate

    config = Phi3Config(**settings, pad_token_id=0, bos_token_id=1, eos_token_id=2, max_position_embeddings=4096)
    torch.manual_seed(0)
    Phi3ForCausalLM(config).to(getattr(torch, dtype)).save_pretrained(folder)
    for file in Path(locate("embedded:tiny-phi3")).glob("tokenizer*"):
        shutil.copy(file, folder)


def chats(file: Path, count: int = 64) -> None:
    """Chats of many lengths, some longer than 512 tokens."""
    draw = random.Random(0)
    words = "the cat sat on a mat and then it ran far away from every dog in town".split()

    def text(least: int, most: int) -> str:
        return " ".join(draw.choice(words) for _ in range(draw.randint(least, most)))

    with file.open("w", encoding="utf-8") as out:
        for _ in range(count):
            turns = [{"role": "user", "content": text(5, 60)}, {"role": "assistant", "content": text(20, 400)}]
            out.write(json.dumps({"messages": turns}) + "\n")


if __name__ == "__main__":
    sys.exit(main())
