"""metrics.jsonl: one line of JSON for each log and each evaluation of a run, written as they come."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from phi3_lora_plugin.small_file import BadFile, read_json, read_small
from phi3_lora_plugin.store.layout import replace_file, stores_in
from phi3_lora_plugin.store.manifest import RESUME
from phi3_lora_plugin.store.run_file import finite

METRICS = "metrics.jsonl"
#: Bytes that are read at most; a log of a run takes 300.
LIMIT = 256_000_000
#: Kinds of lines: `train` has the loss of steps, `eval` that of held-out rows.
TRAIN, EVAL = "train", "eval"
_STATE = "trainer_state.json"


class MetricsFile:
    """The lines of one run. A line is written in one go; a process that is killed leaves at most its last one torn.

    Args:
        folder: of the run.
        step: where the run starts. Lines of later steps are dropped, for they will be made again; at 0, all are.
    """

    def __init__(self, folder: Path, step: int = 0) -> None:
        self.path = folder / METRICS
        self.lines = [line for line in read_lines(self.path) if line["step"] <= step] if step else []
        self._known = {(line["step"], line["kind"]) for line in self.lines}
        self._torn = False  # whether the last write may have left a part of a line
        if self.path.exists():
            replace_file(self.path, "".join(map(_text, self.lines)).encode())

    def has(self, step: int, kind: str) -> bool:
        """Whether there is a line of this kind for a step."""
        return (step, kind) in self._known

    def append(self, line: Mapping[str, Any]) -> bool:
        """Write a line with `step` and `kind`; False, and nothing written, if the run has that one already.

        Raises:
            OSError: it cannot be written.
        """
        if self.has(line["step"], line["kind"]):
            return False
        self._known.add((line["step"], line["kind"]))
        self.lines.append(dict(line))
        content = (("\n" if self._torn else "") + _text(line)).encode()
        self._torn = True
        handle = os.open(self.path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
        try:
            self._torn = os.write(handle, content) < len(content)
        finally:
            os.close(handle)
        return True


def kind_of(logs: Mapping[str, Any]) -> str | None:
    """Of which kind the Trainer's logs are; None for those at the end of training."""
    return TRAIN if "loss" in logs else EVAL if "eval_loss" in logs else None


def read_lines(path: Path) -> list[dict[str, Any]]:
    """The lines of a file that hold a step and a kind; what is torn or was never ours is skipped, no file is no line.

    Raises:
        BadFile: it is there and cannot be read.
    """
    try:
        content = read_small(path, LIMIT)
    except FileNotFoundError:
        return []
    found = []
    for raw in content.split(b"\n"):
        try:
            line = json.loads(raw)
        except (ValueError, RecursionError):
            continue
        if isinstance(line, dict) and _is_step(line.get("step")) and isinstance(line.get("kind"), str):
            found.append({name: value for name, value in line.items() if _is_ours(name, value)})
    return found


def read_metrics(run: Path) -> list[dict[str, Any]]:
    """The metrics of a run by step: of `metrics.jsonl`, else what the Trainer's own newest state remembers.

    Raises:
        BadFile: `metrics.jsonl` is there and cannot be read.
    """
    lines = read_lines(run / METRICS) or _remembered(run)
    return sorted(lines, key=lambda line: (line["step"], line["kind"] != TRAIN))


def _remembered(run: Path) -> list[dict[str, Any]]:
    states = [*run.glob(f"checkpoint-*/{_STATE}"), *run.glob(_STATE)]
    states += [path for store in stores_in(run) for path in store.glob(f"*/{RESUME}/{_STATE}")]
    newest: list[dict[str, Any]] = []
    for path in states:
        try:
            history = read_json(path)["log_history"]
            lines = [line for entry in history if (line := _of_history(entry)) is not None]
        except (BadFile, KeyError, TypeError, AttributeError):
            continue
        newest = max(newest, lines, key=lambda some: some[-1]["step"] if some else -1)
    return newest


def _of_history(entry: Mapping[str, Any]) -> dict[str, Any] | None:
    kind = kind_of(entry)
    if kind is None or not _is_step(entry.get("step")):
        return None
    return {"kind": kind, **{name: value for name, value in entry.items() if _is_ours(name, value)}}


def _text(line: Mapping[str, Any]) -> str:
    return json.dumps(finite(line), ensure_ascii=False, allow_nan=False) + "\n"


def _is_step(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


def _is_ours(name: str, value: Any) -> bool:
    """Whether a value is of the kind that lines have under this name: all numbers, but for two."""
    if name == "marks":
        return isinstance(value, list) and all(isinstance(one, str) for one in value)
    if name == "kind":
        return isinstance(value, str)
    return value is None or (isinstance(value, int | float) and not isinstance(value, bool))
