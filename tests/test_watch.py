"""`phi3-lora watch`: the curve in a terminal, and once without one."""

from __future__ import annotations

import math
import os
import re
import select
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from commands import phi3_lora
from rich.console import Console
from warm_process import COMMAND

pytest.importorskip("plotille", reason="plotille draws the curve and is not installed: pip install plotille")

from phi3_lora_plugin.cli.watch import _look, _view
from phi3_lora_plugin.report.terminal_chart import terminal_chart
from phi3_lora_plugin.store.metrics_file import EVAL, TRAIN, MetricsFile
from phi3_lora_plugin.store.run_file import RunFile


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A run of this process that has come to step 100."""
    RunFile(tmp_path).begin(False, name="x")
    file = MetricsFile(tmp_path)
    for step in range(1, 101):
        loss = math.nan if step == 50 else 3.0 / step
        file.append({"step": step, "kind": TRAIN, "loss": loss, "learning_rate": 1e-4, "peak_memory_gb": 12.5})
    file.append({"step": 100, "kind": EVAL, "eval_loss": 0.5, "marks": ["best"]})
    return tmp_path


def test_without_a_terminal_every_line_is_printed_once(run: Path, capsys: Any) -> None:
    assert phi3_lora("watch", run) == 0
    said = capsys.readouterr().out
    assert len(re.findall(r"^step \d+  loss", said, re.M)) == 100 and "\x1b" not in said
    assert "step 50  loss not a number" in said and "eval loss 0.5000  best so far" in said
    assert "(loss)" in said and f"{run}: running" in said
    assert all(len(line) <= 80 for line in said.splitlines() if str(run) not in line)


@pytest.mark.parametrize(("width", "height"), [(80, 24), (40, 15), (200, 60)])
def test_the_view_fits_the_terminal(run: Path, width: int, height: int) -> None:
    console = Console(width=width, height=height, force_terminal=True, color_system="standard", highlight=False)
    with console.capture() as caught:
        console.print(_view(console, run, *_look(run)))
    lines = re.sub(r"\x1b\[[\d;]*m", "", caught.get()).splitlines()
    assert len(lines) <= height and max(map(len, lines)) <= width
    assert any("(loss)" in line for line in lines) and lines[-1].startswith("step 100  eval loss")


def test_a_run_that_has_not_logged_yet_and_folders_without_one(tmp_path: Path, capsys: Any) -> None:
    assert terminal_chart([]) == ""
    assert phi3_lora("watch", tmp_path) == 2 and "nothing of a run" in capsys.readouterr().err
    assert phi3_lora("watch", tmp_path / "none") == 2 and "is not a folder" in capsys.readouterr().err
    RunFile(tmp_path).begin(False)
    assert phi3_lora("watch", tmp_path) == 0 and "no step has been logged yet" in capsys.readouterr().out


@pytest.mark.skipif(not hasattr(os, "openpty"), reason="this system has no pseudo terminals")
def test_on_a_terminal_it_follows_the_run_to_its_end(run: Path) -> None:
    ours, theirs = os.openpty()
    environment = os.environ | {"COLUMNS": "80", "LINES": "24", "TERM": "xterm-256color"}
    child = subprocess.Popen(
        [sys.executable, "-c", COMMAND, "watch", str(run), "--every", "0.2"], stdin=theirs, stdout=theirs,
        stderr=theirs, env=environment,
    )  # fmt: skip
    os.close(theirs)
    said, step = b"", 100
    deadline = time.monotonic() + 60
    try:
        while time.monotonic() < deadline:
            if not select.select([ours], [], [], 1)[0]:
                continue
            try:
                piece = os.read(ours, 1 << 16)
            except OSError:  # the other end is closed
                break
            if not piece:
                break
            said += piece
            if step == 100 and b"running" in said:
                step = 101
                file = MetricsFile(run, 100)
                file.append({"step": step, "kind": TRAIN, "loss": 0.25})
            elif step == 101 and b"step 101" in said:
                step = 102
                done = RunFile(run)
                done.begin(True)
                done.end("done")
    finally:
        code = child.wait(timeout=30) if step == 102 else child.kill()
        os.close(ours)
    assert code == 0 and b"step 101  loss 0.2500" in said and b": done" in said, said.decode(errors="replace")
