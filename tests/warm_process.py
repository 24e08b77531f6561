"""Processes that have imported everything already: forked off one that waits, so that a test can kill many of them."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

_WAITS = """
import gc, importlib, json, os, sys
sys.path[:0] = json.loads(sys.argv[1])
module = importlib.import_module(sys.argv[2])
import lora_runs, phi3_lora_plugin.training.callbacks, phi3_lora_plugin.training.resume, torch.optim
lora_runs.peft_model()  # fills caches
gc.collect()
gc.freeze()  # or every Trainer of a child would look through all modules
print("ready", flush=True)
for line in iter(sys.stdin.readline, ""):
    request = json.loads(line)
    if (child := os.fork()) == 0:
        break
    print(child, flush=True)
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
else:
    os._exit(0)
for number, name in ((0, os.devnull), (1, request["said"]), (2, request["said"])):
    os.dup2(os.open(name, os.O_RDWR | os.O_CREAT | os.O_APPEND), number)
# Not inside the loop: the process has to end as any other does, its threads joined and its errors shown.
getattr(module, request["function"])(*request["arguments"])
"""


@dataclass(frozen=True)
class Child:
    """One process: its id, and what it says into a file."""

    pid: int
    said: Path
    parent: subprocess.Popen[str]

    def wait(self) -> tuple[int, str]:
        """(exit code, negative for a signal; what it said)."""
        assert self.parent.stdout is not None
        return int(self.parent.stdout.readline()), self.said.read_text(encoding="utf-8", errors="replace")


class Warm:
    """Calls functions of a test module in processes of their own, one at a time."""

    def __init__(self, module: str) -> None:
        paths = [str(Path(__file__).parent), *(path for path in sys.path if path)]
        environment = os.environ | {"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
        self._parent = subprocess.Popen(
            [sys.executable, "-c", _WAITS, json.dumps(paths), module],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment,
        )  # fmt: skip
        assert self._parent.stdout is not None and self._parent.stdout.readline() == "ready\n"

    def start(self, said: Path, function: str, *arguments: Any) -> Child:
        """Start `function(*arguments)`; arguments are what JSON has."""
        assert self._parent.stdin is not None and self._parent.stdout is not None
        said.unlink(missing_ok=True)
        request = {"said": str(said), "function": function, "arguments": arguments}
        self._parent.stdin.write(json.dumps(request) + "\n")
        self._parent.stdin.flush()
        return Child(int(self._parent.stdout.readline()), said, self._parent)

    def __enter__(self) -> Warm:
        return self

    def __exit__(self, *_: object) -> None:
        self._parent.kill()
        self._parent.wait()
