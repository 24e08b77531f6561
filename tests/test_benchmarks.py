"""The benchmark measures what it says, and docs/performance.md shows commands that exist."""

from __future__ import annotations

import importlib
import json
import logging
import re
import shlex
import subprocess
import sys
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import Phi3Config, TrainingArguments

ROOT = Path(__file__).parents[1]
PAGE = (ROOT / "docs" / "performance.md").read_text(encoding="utf-8")
sys.path.insert(0, str(ROOT))

from benchmarks import __main__ as bench  # noqa: E402
from benchmarks import encoding, jobs, parity, variants, workloads  # noqa: E402
from phi3_lora_plugin.plan.dry_run import Batch, footprint  # noqa: E402

pytestmark = pytest.mark.slow


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
        command = (
            f"A --pairs 1 --steps 2 --warm-up 1 --threads 1 --peers trainer-peft liger --data {data} --out {tmp_path}"
        )
        command += " --tokenizer embedded:tiny-phi3 --model num_attention_heads=4 num_key_value_heads=1"
        words_of_it = [sys.executable, "-m", "benchmarks", *command.split(), f"vocab_size={words}"]
        return subprocess.run(words_of_it, cwd=ROOT, capture_output=True, text=True, timeout=300)

    assert "A has 100 words and the data an id of 2047: add --model vocab_size=2048" in run(100).stderr
    done = run(2048)
    assert done.returncode == 0, done.stdout + done.stderr
    written = json.loads((tmp_path / "benchmark.json").read_text())
    assert written["model"]["num_key_value_heads"] == 1 and written["data"] == str(data)
    assert written["workloads"]["A"]["ours"]["ours"]["parity"]["trainer-peft"]["ok"]
    if find_spec("liger_kernel") is None:
        assert "A: liger skipped: liger_kernel is not installed" in done.stdout
        assert written["workloads"]["A"]["left_out"] == {"liger": "liger_kernel is not installed"}


@pytest.mark.long
def test_the_real_sizes_on_a_cpu_are_measured_in_small(tmp_path: Path) -> None:
    """`R` with its own code in small: weights made of one block, each layer computed twice, all with parity."""
    small = "hidden_size=32 intermediate_size=64 num_hidden_layers=2 num_attention_heads=4 num_key_value_heads=4"
    command = f"R --pairs 1 --threads 1 --peers trainer-peft trl --out {tmp_path} --model {small}"
    done = subprocess.run([sys.executable, "-m", "benchmarks", *command.split()], cwd=ROOT, capture_output=True,
                          text=True, timeout=300)  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    result = json.loads((tmp_path / "benchmark.json").read_text())["workloads"]["R"]
    assert "ours-packed" not in result["variants"] and not result["left_out"]
    for mine, twin in (("ours", "trainer-peft"), ("ours-checkpointed", "trainer-peft-checkpointed")):
        assert result["ours"][mine]["parity"][twin]["ok"] and twin in result["ours"][mine]["ratios"]


def test_in_16_bits_stock_code_says_how_far_right_runs_may_be_apart(
    tiny_load: workloads.Workload, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    load = replace(tiny_load, dtype="bfloat16")
    monkeypatch.setitem(workloads.WORKLOADS, "tiny", load)
    names = ("ours", bench.STOCK, *bench.OTHER_STOCK)
    runs = {name: [measured(name, load, tmp_path / name)] for name in names}
    result = bench._compare(runs, "bfloat16")
    noise, parity = result["noise"], result["ours"]["ours"]["parity"][bench.STOCK]
    apart = [bench._apart(runs[name][0], runs[bench.STOCK][0], "bfloat16") for name in bench.OTHER_STOCK]
    assert all(0 < each["loss"] < 0.02 and 0.9 < each["cosine"] < 1 - 1e-6 for each in apart)
    assert noise == {"loss": max(each["loss"] for each in apart), "cosine": min(each["cosine"] for each in apart)}
    assert parity["cosine_limit"] == min(0.999, 1 - bench.NOISE * (1 - noise["cosine"]))
    assert parity["cosine"] > 0.99 and parity["ok"] == (parity["cosine"] >= parity["cosine_limit"])
    # as far apart as stock code from itself is parity, whatever that is; another adapter is none
    runs["ours"] = runs[min(zip(names[2:], apart, strict=True), key=lambda each: each[1]["cosine"])[0]]
    assert bench._compare(runs, "bfloat16")["ours"]["ours"]["parity"][bench.STOCK]["ok"]
    runs["ours"] = [runs["ours"][0] | {"vector": runs[bench.STOCK][0]["begun"] - runs[bench.STOCK][0]["vector"]}]
    assert not bench._compare(runs, "bfloat16")["ours"]["ours"]["parity"][bench.STOCK]["ok"]


def test_a_run_out_of_memory_ends_itself_alone(tiny_load: workloads.Workload, tmp_path: Path) -> None:
    job: dict[str, Any] = {key: str(tmp_path / key) for key in ("rows", "result", "vector", "folder", "log")}
    Path(job["rows"]).write_text(json.dumps(workloads.rows(tiny_load, 1)))
    # more than any machine has, and refused before a byte of it is touched
    model = dict(hidden_size=2**20, num_attention_heads=2**14, vocab_size=2**22)
    jobs.run_job("trainer-peft", job | {"workload": "tiny", "seed": 1, "steps": None, "warm_up": 1, "model": model})
    assert json.loads(Path(job["result"]).read_text())["failed"].startswith("out of memory: ")
    with pytest.raises(RuntimeError, match="size of tensor"):
        jobs.run_job("trainer-peft", job | {"workload": "tiny", "seed": 1, "steps": None, "warm_up": 1,
                                            "model": {"hidden_size": 48, "num_attention_heads": 5}})  # fmt: skip


def test_what_is_not_installed_is_left_out(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setitem(sys.modules, "trl", None)
    chosen = bench.arguments().parse_args([])
    assert bench._missing("trl-packed", chosen) == "trl is not installed"
    assert bench._missing("trainer-peft", chosen) is None
    monkeypatch.setattr(sys, "argv", ["encoding", "--rows", "20", "--pairs", "1"])
    monkeypatch.setenv("HF_DATASETS_DISABLE_PROGRESS_BARS", "1")
    assert encoding.main() == 0
    logging.disable(logging.NOTSET)
    assert "TRL is not here" in capsys.readouterr().out


@pytest.mark.parametrize("name", ["W1", "W2", "W5"])  # W3 is W2 with shorter rows, W4 is W1 with smaller weights
def test_a_gpu_workload_fits_its_card_by_the_dry_run(name: str) -> None:
    """The worst batch of padded stock code is the most that any variant takes."""
    load = workloads.WORKLOADS[name]
    lengths = [len(row["input_ids"]) for row in workloads.rows(load, 0)][: load.batch * load.steps]
    batches = [lengths[start : start + load.batch] for start in range(0, len(lengths), load.batch)]
    worst = max(batches, key=lambda batch: len(batch) * max(batch))
    arguments = TrainingArguments("unused", use_cpu=True, bf16=True, report_to="none")
    found = footprint(
        Phi3Config(**load.model, pad_token_id=0), dict(targets="all-linear", r=load.rank, alpha=2 * load.rank),
        arguments, Batch(tuple(worst), load.supervised), dtype=torch.bfloat16, mixed="bf16", speed="off",
    )  # fmt: skip
    peak = max(moment.total for moment in found.moments)
    limit = 80.0 if load.memory_gb is None else load.memory_gb
    assert peak < 0.9e9 * limit, f"{peak / 1e9:.0f} GB"


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
        package = (ROOT / words[2].replace(".", "/")).is_dir()
        name = f"{words[2]}.__main__" if package else words[2]
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
