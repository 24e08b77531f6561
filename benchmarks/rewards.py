"""`python -m benchmarks.rewards`: how much more the embedded model earns after training by rewards, in what time.

Runs the recipe tiny-grpo with the fast paths and without, each in a process of its own. Rewards are means of one drawn
answer to each held-out prompt; seconds of the processor do not change on a busy machine, those on the wall do.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path


def main() -> int:
    """Print a table; with `--json FILE` also write it. Exit code 1 if a run did not double its reward."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.rewards", description=__doc__.split("\n", 1)[0])
    parser.add_argument("--speed", nargs="*", default=["auto", "off"], metavar="WHICH", help="auto, off, or both")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--one", metavar="WHICH", help=argparse.SUPPRESS)
    chosen = parser.parse_args()
    if chosen.one:
        print(json.dumps(measure(chosen.one)))
        return 0
    found = {}
    for speed in chosen.speed:
        done = subprocess.run([sys.executable, "-m", __spec__.name, "--one", speed], stdout=subprocess.PIPE, text=True)
        found[speed] = json.loads(done.stdout.splitlines()[-1]) if done.returncode == 0 else {"failed": done.returncode}
        print(f"speed={speed:<6}", *(f"{name} {value:.4g}  " for name, value in found[speed].items()), flush=True)
    if chosen.json:
        chosen.json.write_text(json.dumps(found, indent=2))
    return int(any(run.get("after", 0) < 2 * run.get("before", 1) for run in found.values()))


def measure(speed: str) -> dict[str, float]:
    """Held-out reward before and after a run of tiny-grpo, and its seconds: of the processor, and on the wall."""
    from phi3_lora_plugin import load_recipe, train

    started, before = time.monotonic(), time.process_time()
    with tempfile.TemporaryDirectory() as folder:
        result = train(load_recipe("tiny-grpo", [f"output_dir={folder}", f"speed={speed}"]), check=False)
    assert result.eval_reward_before is not None and result.eval_reward_after is not None
    return {
        "before": result.eval_reward_before,
        "after": result.eval_reward_after,
        "processor": time.process_time() - before,
        "wall": time.monotonic() - started,
    }


if __name__ == "__main__":
    sys.exit(main())
