"""Damaged and missing inputs of the command line: a sentence and exit code 2 (1 from inspect), never a traceback."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from commands import phi3_lora

from phi3_lora_plugin.embedded import locate

pytestmark = pytest.mark.slow

Run = Callable[..., tuple[int, str]]


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]) -> Run:
    """Run a command in this process; (exit code, all that it printed). An unexpected exception leaves as it is."""

    def command(*words: object) -> tuple[int, str]:
        code = phi3_lora(*words)
        out, err = capsys.readouterr()
        assert "Traceback" not in out + err
        return code, out + err

    return command


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A PEFT adapter of the embedded base."""
    from phi3_lora_plugin import add_lora, load_model

    folder = tmp_path_factory.mktemp("good") / "adapter"
    add_lora(load_model("embedded:tiny-phi3", device="cpu"), ["qkv_proj"], r=2, alpha=4).save_pretrained(folder)
    return folder


@pytest.fixture
def adapter(good: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(good, tmp_path / "adapter"))


@pytest.fixture
def base(tmp_path: Path) -> Path:
    return Path(shutil.copytree(locate("embedded:tiny-phi3"), tmp_path / "base"))


WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"


def cut(file: Path) -> None:
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])


def as_utf_16(file: Path) -> None:
    file.write_text(file.read_text(encoding="utf-8"), encoding="utf-16")


def deep(file: Path) -> None:
    file.write_text("[" * 100_000 + "]" * 100_000, encoding="utf-8")


def a_pipe(file: Path) -> None:
    file.unlink()
    os.mkfifo(file)


def without_end(file: Path) -> None:
    file.unlink()
    file.symlink_to("/dev/zero")


DAMAGE: dict[str, tuple[str, Callable[[Path], Any]]] = {
    "weights cut off": (WEIGHTS, cut),
    "weights empty": (WEIGHTS, lambda file: file.write_bytes(b"")),
    "weights gone": (WEIGHTS, Path.unlink),
    "weights are text": (WEIGHTS, lambda file: file.write_text("weights" * 99)),
    "config cut off": (CONFIG, cut),
    "config in UTF-16": (CONFIG, as_utf_16),
    "config in Latin-1": (CONFIG, lambda file: file.write_bytes(b'{"r": "\xe9"}')),
    "config too deep": (CONFIG, deep),
    "config is a list": (CONFIG, lambda file: file.write_text("[]")),
    "config is empty": (CONFIG, lambda file: file.write_text("")),
    "config of another kind": (CONFIG, lambda file: file.write_text('{"peft_type": "LORA", "r": "four"}')),
    "config without an end": (CONFIG, lambda file: file.write_text(" " * 70_000_000)),
}


@pytest.mark.parametrize("what", DAMAGE)
@pytest.mark.parametrize("command", ["chat", "eval", "merge", "convert", "inspect"])
def test_a_damaged_adapter(command: str, what: str, adapter: Path, run: Run, tmp_path: Path) -> None:
    name, damage = DAMAGE[what]
    damage(adapter / name)
    rows = locate("embedded:chats/train.jsonl")
    base = ["--base", "embedded:tiny-phi3"]
    words: list[object] = {
        "chat": ["chat", adapter, "--prompt", "hi", *base],
        "eval": ["eval", adapter, "--data", rows, *base],
        "merge": ["merge", adapter, tmp_path / "merged", *base],
        "convert": ["convert", adapter, tmp_path / "split", "--to", "split", *base],
        "inspect": ["inspect", adapter],
    }[command]
    code, said = run(*words)
    if command == "inspect" and what == "config of another kind":  # not damage: another version may read it
        assert code == 0 and "problems" in said
    else:
        assert code == (1 if command == "inspect" else 2), said
    assert "adapter" in said and len(said) < 5000


@pytest.mark.parametrize("damage", [as_utf_16, deep, cut, a_pipe, without_end], ids=lambda damage: damage.__name__)
@pytest.mark.parametrize("command", ["train", "inspect", "plan"])
def test_a_damaged_config_of_the_base(
    command: str, damage: Callable[[Path], Any], base: Path, run: Run, tmp_path: Path
) -> None:
    damage(base / "config.json")
    words: list[object] = {
        "train": ["train", f"model.path={base}", f"output_dir={tmp_path / 'out'}"],
        "plan": ["plan", "tiny-cpu", f"model.path={base}"],
        "inspect": ["inspect", base],
    }[command]
    code, said = run(*words)
    assert code == (1 if command == "inspect" else 2), said
    assert "config.json" in said and len(said) < 5000


def test_a_pickled_adapter_is_read_without_running_it(adapter: Path, run: Run) -> None:
    from safetensors.torch import load_file

    torch.save(load_file(adapter / WEIGHTS), adapter / "adapter_model.bin")
    (adapter / WEIGHTS).unlink()
    assert run("chat", adapter, "--prompt", "hi", "--base", "embedded:tiny-phi3", "--max-new-tokens", 1)[0] == 0
    cut(adapter / "adapter_model.bin")
    code, said = run("chat", adapter, "--prompt", "hi", "--base", "embedded:tiny-phi3")
    assert code == 2 and "adapter_model.bin is damaged" in said


PACKAGES = {
    "training.report_to=wandb": "pip install wandb",
    "training.report_to=[mlflow,comet_ml]": "pip install comet-ml",
    "training.optim=galore_adamw": "pip install galore-torch",
    "training.optim=schedule_free_adamw": "pip install schedulefree",
    "training.optim=adamw_torch_8bit": "pip install torchao",
    "training.deepspeed=ds.json": "pip install deepspeed",
}


@pytest.mark.parametrize("setting", PACKAGES)
def test_a_missing_package_is_named_before_anything_is_loaded(setting: str, run: Run, tmp_path: Path) -> None:
    # A base without weights: whatever is loaded first would say so.
    base = tmp_path / "base"
    base.mkdir()
    code, said = run("train", f"model.path={base}", f"output_dir={tmp_path / 'out'}", setting)
    assert code == 2 and PACKAGES[setting] in said and "MissingPackage" in said


def test_a_name_that_nothing_reports_to_is_refused(run: Run, tmp_path: Path) -> None:
    code, said = run("train", f"output_dir={tmp_path / 'out'}", "training.report_to=wandbb")
    assert code == 2 and "'wandbb' is not one of" in said and "did you mean 'wandb'?" in said


@pytest.mark.parametrize(("method", "package"), [("gptq", "optimum gptqmodel"), ("awq", "gptqmodel"), ("new", "nf4")])
def test_a_base_that_is_quantised_already_says_what_it_needs(
    method: str, package: str, base: Path, run: Run, tmp_path: Path
) -> None:
    tiny.edit(base / "config.json", quantization_config={"quant_method": method, "bits": 4})
    code, said = run("train", f"model.path={base}", f"output_dir={tmp_path / 'out'}")
    assert code == 2 and f"quantised by {method}, 4 bits" in said and package in said
