"""`phi3-lora verify`: whole or not, by its exit code, in words and as JSON, for our folders and other people's."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from lora_runs import peft_model, trainer
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

from phi3_lora_plugin import LoraCheckpoint
from phi3_lora_plugin.cli import app

WEIGHTS = "adapter_model.safetensors"


def verify(*arguments: Any) -> tuple[int, str]:
    done = CliRunner().invoke(app, ["verify", *map(str, arguments)], env={"COLUMNS": "400"})
    assert done.exception is None or isinstance(done.exception, SystemExit), done.exception
    return done.exit_code, done.output


@pytest.fixture
def run(tmp_path: Path) -> Path:
    trainer(tmp_path / "run", LoraCheckpoint(every_steps=1, format="both"), max_steps=2).train()
    return tmp_path / "run"


def test_whole_folders_are_ok_from_wherever_they_are_looked_at(run: Path) -> None:
    for folder in (run, run / "lora"):
        code, said = verify(folder)
        assert code == 0 and said.count(": ok, step ") == 2, said
    code, said = verify(run / "lora" / "step-00000002")
    assert code == 0 and ": ok, step 2, " in said
    code, said = verify(run, "--json")
    found = json.loads(said)
    assert code == 0 and found["ok"] and [each["step"] for each in found["checkpoints"]] == [2, 1]


def test_damage_is_named_and_is_an_exit_code(run: Path) -> None:
    os.truncate(run / "lora" / "step-00000002" / WEIGHTS, 50)
    code, said = verify(run)
    assert code == 1 and "step-00000002: DAMAGED" in said and "step-00000001: ok" in said
    assert f"step-00000002/{WEIGHTS}: has 50 bytes, expected" in said
    assert not json.loads(verify(run, "--json")[1])["ok"]


def test_a_folder_that_is_none_or_holds_nothing_is_not_ok(tmp_path: Path) -> None:
    assert verify(tmp_path / "nowhere")[0] == 1
    code, said = verify(tmp_path)
    assert code == 1 and "not a checkpoint: no manifest.json" in said and "None" not in said


FOREIGN: dict[str, tuple[Callable[[dict[str, torch.Tensor]], dict[str, torch.Tensor]], str]] = {
    "NaN": (
        lambda tensors: {name: tensor * float("nan") for name, tensor in tensors.items()},
        "16 tensors are not finite",
    ),
    "empty": (lambda tensors: {name: tensor[:0] for name, tensor in tensors.items()}, "16 tensors are empty: shards"),
    "none": (lambda tensors: {}, "holds no tensor"),
    "half": (lambda tensors: {name: t for name, t in tensors.items() if "lora_A" in name}, "lora_B"),
}


def test_an_adapter_of_another_program_is_looked_at_tensor_by_tensor(tmp_path: Path) -> None:
    peft_model().save_pretrained(tmp_path)
    code, said = verify(tmp_path)
    assert code == 0 and "no manifest (saved by another program)" in said
    (tmp_path / WEIGHTS).write_bytes(b"<!DOCTYPE html>" * 20)
    code, said = verify(tmp_path)
    assert code == 1 and "cannot be read" in said


@pytest.mark.parametrize("what", FOREIGN)
def test_tensors_that_cannot_be_what_was_learned_are_named(what: str, tmp_path: Path) -> None:
    peft_model().save_pretrained(tmp_path)
    change, expected = FOREIGN[what]
    save_file(change(load_file(tmp_path / WEIGHTS)), tmp_path / WEIGHTS)
    code, said = verify(tmp_path)
    assert code == 1 and expected in said, said
