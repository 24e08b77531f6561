"""A part of the examination in a process of its own, whose crash is a finding and not an end."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Outcome:
    """Lines of JSON that a child wrote, and how it ended: None if well, else in a few words."""

    lines: tuple[dict[str, Any], ...]
    ended: str | None


def run(module: str, *arguments: str, seconds: int) -> Outcome:
    """Run `python -m module arguments` for `seconds` at most; nothing of the working folder is imported."""
    command = [sys.executable, "-P", "-m", module, *arguments]
    environment = os.environ | {"PYTHONUTF8": "1", "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    try:
        done = subprocess.run(command, capture_output=True, timeout=seconds, env=environment, stdin=subprocess.DEVNULL)
        said, errors, code = done.stdout, done.stderr, done.returncode
    except subprocess.TimeoutExpired as error:
        return Outcome(_lines(error.stdout or b""), f"took more than {seconds} s")
    except OSError as error:
        return Outcome((), f"no process could be started: {error.strerror or error}")
    return Outcome(_lines(said), None if code == 0 else _end(code, errors))


def teller() -> Callable[[dict[str, Any]], None]:
    """In a child: what writes a line of JSON for `run`. Whatever libraries print goes to stderr from now on."""
    out = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    return lambda line: print(json.dumps(line), file=out, flush=True)


def _lines(said: bytes) -> tuple[dict[str, Any], ...]:
    found = []
    for line in said.decode("utf-8", "replace").splitlines():
        try:
            row = json.loads(line)
        except ValueError:
            continue
        if isinstance(row, dict):
            found.append(row)
    return tuple(found)


def _end(code: int, errors: bytes) -> str:
    if code < 0:
        try:
            return f"was ended by {signal.Signals(-code).name}"
        except ValueError:
            return f"was ended by signal {-code}"
    last = [line.strip() for line in errors.decode("utf-8", "replace").splitlines() if line.strip()][-1:]
    return f"ended with exit code {code}{': ' if last else ''}{''.join(last)[:300]}"
