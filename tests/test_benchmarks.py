"""The benchmark measures what it says, and docs/performance.md shows commands that exist."""

from __future__ import annotations

import importlib
import json
import re
import shlex
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

ROOT = Path(__file__).parents[1]
PAGE = (ROOT / "docs" / "performance.md").read_text(encoding="utf-8")
sys.path.insert(0, str(ROOT))

from benchmarks import __main__ as bench  # noqa: E402
from benchmarks import parity, variants, workloads  # noqa: E402


@pytest.fixture
def tiny_load(monkeypatch: pytest.MonkeyPatch) -> workloads.Workload:
    model = dict(hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=2, vocab_size=300)
    load = replace(workloads.WORKLOADS["A"], name="tiny", model=model, rank=4, batch=4, steps=3, rows=12, max_length=64)
    monkeypatch.setitem(workloads.WORKLOADS, "tiny", load)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    return replace(load, mean_length=20)


def measured(variant: str, load: workloads.Workload, folder: Path) -> dict[str, Any]:
    folder.mkdir()
    job: dict[str, Any] = {key: str(folder / key) for key in ("rows", "vector", "folder")}
    Path(job["rows"]).write_text(json.dumps(workloads.rows(load, 1)))
    before = torch.get_num_threads()
    result = variants.measure(variant, job | {"workload": "tiny", "seed": 1, "steps": None, "warm_up": 1, "model": {}})
    torch.set_num_threads(before)
    result["begun"], result["vector"] = torch.load(job["vector"], weights_only=True)
    return result


def test_ours_is_held_to_the_peers_and_a_difference_is_a_failure(
    tiny_load: workloads.Workload, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    names = ("ours", "ours-packed", "trainer-peft", "trainer-peft-packed", "trl")
    runs = {name: [measured(name, tiny_load, tmp_path / name)] for name in names}
    assert all(run[0]["tokens_per_second"] > 0 and len(run[0]["losses"]) == 3 for run in runs.values())
    result = bench._compare(runs, "float32")
    assert set(result["ours"]["ours"]["parity"]) == {"trainer-peft", "trl"}
    assert all(twin["ok"] for row in result["ours"].values() for twin in row["parity"].values()), result["ours"]
    assert set(result["ours"]["ours"]["ratios"]) == {"trainer-peft", "trainer-peft-packed", "trl"}
    runs["ours"][0]["losses"][1] *= 1.001
    assert not bench._compare(runs, "float32")["ours"]["ours"]["parity"]["trl"]["ok"]
    bench._write({"workloads": {"tiny": result}}, tmp_path)
    assert "ours-packed" in (tmp_path / "benchmark.svg").read_text()
    assert json.loads((tmp_path / "benchmark.json").read_text())["workloads"]["tiny"] == result


def test_sizes_and_rows_of_ones_own_are_measured(tmp_path: Path) -> None:
    """The whole command: another shape, and chats in another format."""
    data = tmp_path / "chats.jsonl"
    rows = [{"instruction": f"Add {n} and {n}.", "output": f"It is {n + n}."} for n in range(12)]
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))

    def run(words: int) -> subprocess.CompletedProcess[str]:
        command = f"A --pairs 1 --steps 2 --warm-up 1 --threads 1 --peers trainer-peft --data {data} --out {tmp_path}"
        command += " --tokenizer embedded:tiny-phi3 --model num_attention_heads=4 num_key_value_heads=1"
        words_of_it = [sys.executable, "-m", "benchmarks", *command.split(), f"vocab_size={words}"]
        return subprocess.run(words_of_it, cwd=ROOT, capture_output=True, text=True, timeout=300)

    assert "A has 100 words and the data an id of 2047: add --model vocab_size=2048" in run(100).stderr
    done = run(2048)
    assert done.returncode == 0, done.stdout + done.stderr
    written = json.loads((tmp_path / "benchmark.json").read_text())
    assert written["model"]["num_key_value_heads"] == 1 and written["data"] == str(data)
    assert written["workloads"]["A"]["ours"]["ours"]["parity"]["trainer-peft"]["ok"]


def test_parity_runs_and_notices_what_is_wrong(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["parity", "--shapes", "gqa, window, partial rotary", "--steps", "1"])
    assert parity.main() == 0
    real = parity.speed_up

    def wrong(model: Any, parts: Any) -> Any:
        if parts == "auto":
            with torch.no_grad():
                model.get_base_model().model.norm.weight.mul_(1.01)
        return real(model, parts)

    monkeypatch.setattr(parity, "speed_up", wrong)
    assert parity.main() == 1


def test_every_command_of_the_page_is_one_that_the_benchmarks_take() -> None:
    lines = [line for block in re.findall(r"^```sh\n(.*?)^```$", PAGE, re.M | re.S) for line in block.splitlines()]
    assert len(lines) >= 6
    for line in lines:
        words = shlex.split(line.split("  #")[0])
        if words[:2] == ["make", "bench"]:
            words = ["python", "-m", "benchmarks", *shlex.split(words[2].removeprefix("BENCH=") if words[2:] else "")]
        assert words[:2] == ["python", "-m"], line
        name = words[2] if "." in words[2] else f"{words[2]}.__main__"
        importlib.import_module(name).arguments().parse_args(words[3:])


def test_every_part_of_the_switch_is_on_the_page() -> None:
    from phi3_lora_plugin.speed.apply import PARTS

    assert all(f"`{part}`" in PAGE for part in PARTS)


def test_the_script_of_the_page_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import tiny
    from peft import LoraConfig, get_peft_model
    from transformers import Trainer, TrainingArguments

    (code,) = re.findall(r"^```python\n(.*?)^```$", PAGE, re.M | re.S)
    model = get_peft_model(tiny.model(), LoraConfig(r=2, target_modules=["qkv_proj"]))
    rows = [{"input_ids": [5, 6, 7, 8], "labels": [-100, 6, 7, 8]}] * 4
    args = TrainingArguments(str(tmp_path), max_steps=1, report_to="none", use_cpu=True, remove_unused_columns=False)
    names: dict[str, Any] = {"trainer": Trainer(model, args, train_dataset=rows)}
    printed: list[str] = []
    exec(code, names | {"print": lambda text: printed.append(str(text))})
    assert printed[0] == "loss: on (cross-entropy on supervised positions only, in chunks)"
