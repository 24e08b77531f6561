"""What a run says while it runs and writes into metrics.jsonl: losses, marks, and the same file after a resume."""

from __future__ import annotations

import json
import math
from io import StringIO
from pathlib import Path
from typing import Any

import lora_runs
import pytest
from rich.console import Console

from phi3_lora_plugin import LoraCheckpoint
from phi3_lora_plugin.store.metrics_file import EVAL, METRICS, TRAIN, MetricsFile, read_lines, read_metrics
from phi3_lora_plugin.store.run_file import RUN, RunFile, read_run
from phi3_lora_plugin.training.health import is_spike
from phi3_lora_plugin.training.log_line import log_line
from phi3_lora_plugin.training.metrics_log import MetricsLog
from phi3_lora_plugin.training.progress import ProgressReport

LINE = {"step": 1, "kind": TRAIN, "loss": 2.0}


def run(folder: Path, terminal: bool = False, **settings: Any) -> tuple[str, Any]:
    """What a run of tiny models says, and its Trainer."""
    said = StringIO()
    console = Console(file=said, width=80, force_terminal=terminal, color_system=None)
    metrics = MetricsLog(folder)
    settings = {"include_num_input_tokens_seen": "non_padding", "eval_strategy": "steps", "eval_steps": 2} | settings
    resumed = settings.pop("resume_from_checkpoint", None)
    trainer = lora_runs.trainer(folder, metrics, ProgressReport(console, metrics), **settings)
    trainer.train(resume_from_checkpoint=resumed)
    return said.getvalue(), trainer


def test_every_log_and_evaluation_has_a_line_that_stays(tmp_path: Path) -> None:
    said, trainer = run(tmp_path)
    lines = said.splitlines()
    assert [line.split("  ")[:1] for line in lines if "eval" not in line] == [[f"step {n}/6"] for n in range(1, 7)]
    assert sum("eval loss" in line for line in lines) == 3 and "best so far" in said
    for part in ("loss ", "lr ", "tokens/s", " GB", "ETA "):
        assert part in lines[0]
    largest = {"step": 11_000, "kind": TRAIN, "loss": 1.5, "learning_rate": 2e-4, "tokens_per_second": 12_345.6}
    assert len(log_line(largest | {"peak_memory_gb": 78.25, "seconds_left": 36_000}, 12_000)) <= 80
    assert all(len(line) <= 80 for line in lines) and "\x1b" not in said
    kept = read_lines(tmp_path / METRICS)
    assert [(one["step"], one["kind"]) for one in kept if one["kind"] == EVAL] == [(n, EVAL) for n in (2, 4, 6)]
    train = [one for one in kept if one["kind"] == TRAIN]
    assert [one["loss"] for one in train] == [one["loss"] for one in trainer.state.log_history if "loss" in one]
    assert all(one["tokens_per_second"] > 0 and one["peak_memory_gb"] > 0.05 for one in train)


def test_on_a_terminal_the_lines_stay_above_the_bar(tmp_path: Path) -> None:
    said, _ = run(tmp_path, terminal=True)
    assert "training" in said and "━" in said
    assert sum(line.lstrip("\r\x1b[2KA").startswith("step ") and "loss" in line for line in said.splitlines()) >= 6


def test_a_loss_is_shown_however_few_steps_there_are(tmp_path: Path) -> None:
    said, _ = run(tmp_path, max_steps=2, logging_steps=500, eval_strategy="no")
    assert "step 2/2  loss" in said


def test_a_resumed_run_continues_the_file_without_a_step_twice(tmp_path: Path) -> None:
    run(tmp_path, max_steps=4, save_strategy="steps", save_steps=2, lr_scheduler_type="constant")
    with (tmp_path / METRICS).open("a") as file:
        file.write('{"step": 5, "kind": "train", "lo')  # killed while it wrote
    again = str(tmp_path / "checkpoint-2")
    run(tmp_path, max_steps=6, resume_from_checkpoint=again, lr_scheduler_type="constant")
    kept = [json.loads(line) for line in (tmp_path / METRICS).read_text().splitlines()]
    assert [one["step"] for one in kept if one["kind"] == TRAIN] == [1, 2, 3, 4, 5, 6]
    assert [one["step"] for one in kept if one["kind"] == EVAL] == [2, 4, 6]
    # A run that starts again has nothing of the one before.
    run(tmp_path, max_steps=1, eval_strategy="no")
    assert [one["step"] for one in read_lines(tmp_path / METRICS)] == [1]


def test_the_file_reads_whatever_was_done_to_it(tmp_path: Path) -> None:
    path = tmp_path / METRICS
    assert read_lines(path) == []
    path.write_bytes(
        b'\xff\xfe\n[]\n{"step": "1", "kind": "train"}\n{"step": true, "kind": "train"}\n'
        + json.dumps(LINE | {"deep": {"a": 1}}).encode() + b'\n' + b'[' * 100_000 + b'\n{"step": 2, "ki'
    )  # fmt: skip
    assert read_lines(path) == [LINE]
    file = MetricsFile(tmp_path, 1)
    assert not file.append(LINE) and file.append(LINE | {"step": 2, "loss": math.nan})
    assert [json.loads(line)["loss"] for line in path.read_text().splitlines()] == [2.0, None]


def test_metrics_of_a_run_without_the_file_are_those_its_trainer_remembers(tmp_path: Path) -> None:
    trainer = lora_runs.trainer(tmp_path, LoraCheckpoint(every_steps=2), eval_strategy="steps", eval_steps=3)
    trainer.train()
    lines = read_metrics(tmp_path)
    assert [(one["step"], one["kind"]) for one in lines if one["kind"] == EVAL] == [(3, EVAL), (6, EVAL)]
    assert [one["step"] for one in lines if one["kind"] == TRAIN] == [1, 2, 3, 4, 5, 6]


def test_what_cannot_be_written_does_not_end_a_run(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / METRICS).mkdir()
    said, _ = run(tmp_path)
    assert "step 6/6" in said
    assert sum("metrics.jsonl is incomplete" in record.message for record in caplog.records) == 1


def test_spikes_stand_out_from_what_came_before() -> None:
    calm = [1.0, 1.1, 0.9, 1.05, 0.95, 1.0]
    assert is_spike(5.0, calm) and is_spike(5.0, [*calm, 5.0])  # one spike does not hide the next
    assert not is_spike(1.2, calm) and not is_spike(5.0, calm[:4])
    assert not is_spike(5.0, [1.0, 3.0, 9.0, 2.0, 5.0, 7.0])  # as wild as ever
    assert not any(is_spike(2.0 / (n + 1), [2.0 / k for k in range(1, n + 1)]) for n in range(1, 50))


def test_marks_for_spikes_and_for_what_is_not_finite(tmp_path: Path) -> None:
    log = MetricsLog(tmp_path)
    args = lora_runs.arguments(tmp_path)
    state = lora_runs.trainer(tmp_path).state
    state.max_steps = 100

    def marks(step: int, **logs: float) -> list[str]:
        state.global_step = step
        log.on_log(args, state, None, logs)
        assert log.newest is not None
        return log.newest.get("marks", [])

    assert [marks(n, loss=1.0 + n / 100) for n in range(6)] == [[]] * 6
    assert marks(7, loss=9.0) == ["spike"] and "SPIKE" in log_line(log.newest or {})
    assert marks(8, loss=math.nan) == ["not finite"] and "NOT FINITE" in log_line(log.newest or {})
    assert marks(9, loss=1.0, grad_norm=math.inf) == ["not finite"]
    assert [marks(n, eval_loss=loss) for n, loss in ((10, 2.0), (20, 1.5), (30, 1.6))] == [["best"], ["best"], []]
    assert log_line(log.newest or {}, 100) == "step 30/100  eval loss 1.6000  best 1.5000 at step 20"
    assert marks(40, eval_loss=1.7) == ["rising"] and "RISING" in log_line(log.newest or {})
    fallen = {"step": 40, "kind": EVAL, "eval_loss": 0.0, "eval_reward": 0.25, "marks": ["rising"]}
    assert log_line(fallen) == "step 40  eval reward 0.2500  FALLING: train less"


def test_the_run_file_keeps_earlier_sessions_and_knows_of_dead_processes(tmp_path: Path) -> None:
    first = RunFile(tmp_path)
    first.end("done")
    assert read_run(tmp_path) == {}  # it never began
    first.begin(False, name="x", value=math.nan)
    assert read_run(tmp_path)["status"] == "running" and read_run(tmp_path)["value"] is None
    first.content["sessions"][0]["pid"] = 2**22 + 1  # no such process
    first._write()
    assert read_run(tmp_path)["status"] == "killed"
    second = RunFile(tmp_path)
    second.begin(True, name="x")
    second.end("done", result={"steps": 3})
    found = read_run(tmp_path)
    assert found["status"] == "done" and len(found["sessions"]) == 2 and found["result"]["steps"] == 3
    (tmp_path / RUN).write_text("[1")
    assert read_run(tmp_path) == {}
