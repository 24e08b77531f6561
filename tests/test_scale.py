"""Several processes: accelerate's configs by its own parser, two processes and Ray with the result of one."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from accelerate.commands.config.config_args import load_config_from_file
from accelerate.commands.launch import _validate_launch_command, launch_command_parser
from safetensors.torch import load_file
from warm_process import LAUNCH, Warm

from phi3_lora_plugin import load_recipe, verify
from phi3_lora_plugin.cli import main
from phi3_lora_plugin.hosts.ray_settings import Cluster, RayError, read_settings
from phi3_lora_plugin.training.arguments import BatchError, same_batch

pytestmark = pytest.mark.slow

DOCS = Path(__file__).parents[1] / "docs"
BIN = Path(sys.executable).parent
CONFIGS = sorted((DOCS / "accelerate").glob("*.yaml"))
STEPS = 12
RECIPE = f"""
extends: tiny-cpu
data: {{max_length: 64}}
training: {{max_steps: {STEPS}, per_device_train_batch_size: 4, logging_steps: 4, num_train_epochs: null}}
checkpoint: {{every_steps: 3, keep_last: 9}}
"""


@pytest.mark.parametrize("config", CONFIGS, ids=lambda path: path.stem)
def test_accelerate_reads_the_configs_that_are_shipped(config: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("ACCELERATE_USE_CPU", raising=False)
    read = load_config_from_file(str(config))
    options = ["--config_file", str(config), "-m", "phi3_lora_plugin.cli", "train", "tiny-cpu"]
    args, defaults, _ = _validate_launch_command(launch_command_parser().parse_args(options))
    assert read.num_processes == 2 == args.num_processes and args.module
    assert args.training_script_args == ["train", "tiny-cpu"]
    if config.stem == "fsdp2":
        assert args.use_fsdp and args.fsdp_version == 2
        assert args.fsdp_transformer_layer_cls_to_wrap == "Phi3DecoderLayer"
    if config.stem == "deepspeed-zero3":
        assert args.use_deepspeed and args.zero_stage == 3
    assert f"accelerate/{config.name}" in (DOCS / "scale.md").read_text(encoding="utf-8")


def test_a_batch_is_divided_evenly_or_not_at_all() -> None:
    def divided(*overrides: str) -> Any:
        return same_batch(load_recipe("tiny-cpu", overrides), 2).training

    assert divided("training.per_device_train_batch_size=4")["per_device_train_batch_size"] == 2
    odd = ["training.per_device_train_batch_size=3", "training.gradient_accumulation_steps=4"]
    assert divided(*odd)["gradient_accumulation_steps"] == 2
    with pytest.raises(BatchError, match="a batch of 3 rows, 1 times a step, cannot be divided among 2"):
        divided(odd[0])


def test_settings_of_ray_are_checked_all_at_once() -> None:
    assert read_settings(["num_workers=2-4"]) == Cluster((2, 4))
    with pytest.raises(RayError, match="as in 1-4, got '3-1'"):
        read_settings(["num_workers=3-1"])
    assert read_settings(["num_workers=2,use_gpu=false", "max_failures=-1"]) == Cluster(2, False, max_failures=-1)
    with pytest.raises(RayError, match="did you mean num_workers=.*num_workers: expected a whole number of at least 1"):
        read_settings(["workers=2", "num_workers=0"])


@pytest.fixture(scope="module")
def one(tmp_path_factory: pytest.TempPathFactory, warm: Warm) -> Path:
    """The folder of a run of one process."""
    folder = tmp_path_factory.mktemp("scale")
    (folder / "r.yaml").write_text(RECIPE, encoding="utf-8")
    code, said = warm.start_command(folder / "one.txt", *command("one"), cwd=folder).wait()
    assert code == 0, said
    return folder


def command(name: str, *options: str) -> list[str]:
    return ["train", "r.yaml", f"output_dir={name}", "--samples", "0", "--no-check", *options]


def start(folder: Path, name: str, *options: str) -> subprocess.Popen[bytes]:
    with (folder / f"{name}.txt").open("wb") as said:
        environment = os.environ | {"OMP_NUM_THREADS": "1", "PHI3_LORA_CACHE": "off"}
        given = [str(BIN / "phi3-lora"), *command(name, *options)]
        return subprocess.Popen(given, cwd=folder, stdout=said, stderr=said, env=environment)


def assert_equal(folder: Path, name: str) -> None:
    found = [folder / each / "lora" / f"step-{STEPS:08d}" for each in ("one", name)]
    said = (folder / f"{name}.txt").read_text(encoding="utf-8")[-4000:]
    assert all(path.is_dir() and verify(path) for path in found), said
    assert [json.loads((path / "manifest.json").read_text())["world_size"] for path in found] == [1, 2]
    ours, theirs = (load_file(path / "adapter_model.safetensors") for path in found)
    assert ours.keys() == theirs.keys()
    for key, value in ours.items():
        torch.testing.assert_close(theirs[key], value, atol=1e-4, rtol=0)


def a_rank(folder: str, words: list[str]) -> None:
    """One of two processes, as a launcher starts them."""
    os.chdir(folder)
    sys.argv = ["phi3-lora", *words]
    main()


def test_two_processes_give_the_result_of_one(one: Path, warm: Warm, tmp_path: Path) -> None:
    said = warm.ranks(tmp_path, a_rank, str(one), command("forked", "--same-batch"), ACCELERATE_USE_CPU="true")
    (one / "forked.txt").write_text("".join(said), encoding="utf-8")
    assert_equal(one, "forked")


@pytest.mark.long  # starts two processes afresh
def test_two_processes_of_accelerate_give_the_result_of_one(one: Path, warm: Warm) -> None:
    config = str(DOCS / "accelerate" / "ddp-cpu.yaml")
    words = ["--config_file", config, "--main_process_port", "0", "-m", "phi3_lora_plugin.cli"]
    done = warm.run(
        LAUNCH, *words, *command("two", "--same-batch"), cwd=one, plain=True
    )  # only what it starts is fresh
    (one / "two.txt").write_text(done.stdout + done.stderr, encoding="utf-8")
    assert done.returncode == 0, done.stderr[-4000:]
    assert_equal(one, "two")


@pytest.mark.long  # mostly waits, for nodes and workers
def test_ray_goes_on_when_a_worker_is_killed_and_gives_the_result_of_one(one: Path) -> None:
    process = start(one, "ray", "--ray", "num_workers=2", "--same-batch")
    while process.poll() is None and not (one / "ray" / "lora" / "step-00000003").is_dir():
        time.sleep(0.02)
    workers = [each for each in psutil.Process(process.pid).children(recursive=True) if "TrainWorker" in _name(each)]
    assert workers, (one / "ray.txt").read_text()[-4000:]
    workers[0].kill()
    assert process.wait(900) == 0, (one / "ray.txt").read_text()[-4000:]
    assert_equal(one, "ray")
    said = (one / "ray.txt").read_text()
    assert "resuming from" in said
    assert "LOAD_GLOBAL" not in said  # of a fingerprint of datasets, which reads what it prints
    run = one / "ray" / "ray" / "run"  # a worker killed while Ray copies leaves a folder there that Ray does not list
    snapshot = json.loads((run / "checkpoint_manager_snapshot.json").read_text())
    kept = [run / each["checkpoint_dir_name"] for each in snapshot["checkpoint_results"]]
    assert kept and all(verify(path) for path in kept)


def _name(process: psutil.Process) -> str:
    try:
        return " ".join(process.cmdline())
    except psutil.Error:
        return ""
