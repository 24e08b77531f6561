"""What docs/seeing.md shows works as shown, in the order shown, on the embedded base."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import pytest
from pages import blocks, commands, page
from warm_process import Warm

from phi3_lora_plugin.store.metrics_file import METRICS, read_lines
from phi3_lora_plugin.training.log_line import log_line
from phi3_lora_plugin.training.packages import _REPORTS

pytestmark = pytest.mark.slow

PAGE = page("seeing")
SHORT = ["training.num_train_epochs=null", "training.max_steps=3", "--no-check", "--samples", "0"]


def test_every_command_and_snippet_runs(tmp_path: Path, warm: Warm) -> None:
    pytest.importorskip("pygal", reason="pygal draws the charts and is not installed: pip install pygal")
    pytest.importorskip("plotille", reason="plotille draws the curve and is not installed: pip install plotille")
    done = warm.command("train", "tiny-cpu", *SHORT, cwd=tmp_path)
    assert done.returncode == 0 and "runs/tiny-cpu/report.html" in done.stdout, done.stderr
    shutil.copytree(tmp_path / "runs" / "tiny-cpu", tmp_path / "runs" / "tiny-cpu-2")
    (tmp_path / "runs" / "tiny-cpu" / "report.html").unlink()
    assert len(commands(PAGE)) == 6
    for program, *words in commands(PAGE):
        done = warm.command(*words, *(SHORT if words[0] == "train" else ()), cwd=tmp_path)
        assert program == "phi3-lora" and done.returncode == 0, (words, done.stderr)
    for report in ("runs/tiny-cpu/report.html", "both.html", "data.html", "runs/tracked/report.html"):
        assert (tmp_path / report).read_text(encoding="utf-8").startswith("<!DOCTYPE html>")
    assert list((tmp_path / "runs" / "tracked" / "tensorboard").iterdir())
    [snippet] = blocks(PAGE, "python")
    done = warm.run(snippet, cwd=tmp_path)
    lines = read_lines(tmp_path / "runs" / "tiny-cpu" / METRICS)
    assert done.stdout == f"{[(one['step'], one['eval_loss']) for one in lines if one['kind'] == 'eval']}\n"
    run = json.loads((tmp_path / "runs" / "tiny-cpu" / "run.json").read_text())
    assert {"status", "coverage", "speed", "provenance"} <= set(run)


def test_lines_and_marks_are_what_a_run_prints() -> None:
    line = {"step": 50, "kind": "train", "loss": 0.3296, "learning_rate": 1.6e-3, "tokens_per_second": 3170.4}
    line |= {"peak_memory_gb": 0.645, "seconds_left": 12.2}
    [shown] = [block for block in blocks(PAGE, "") if "ETA" in block]
    assert shown.splitlines()[0] == log_line(line, 150)
    held_out = {"step": 50, "kind": "eval", "eval_loss": 0.1832, "marks": ["best"]}
    assert shown.splitlines()[1] == log_line(held_out, 150)
    spike = log_line(line | {"marks": ["spike", "not finite"]}) + log_line(held_out | {"marks": ["rising"]})
    for mark in re.findall(r"^\| `([A-Z ]+)` \|", PAGE, re.M):
        assert mark in spike


def test_the_trackers_of_the_table_are_known() -> None:
    for name, package in re.findall(r"^\| `(\w+)` \| `pip install ([\w-]+)` \|", PAGE, re.M):
        assert _REPORTS[name][1] == package
