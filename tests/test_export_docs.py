"""What docs/export.md shows works as shown, in the order shown."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest
import tiny
import torch
import typer
from peft import LoraConfig, get_peft_model
from typer.testing import CliRunner

from phi3_lora_plugin.cli.convert import convert_command, merge_command

pytestmark = pytest.mark.slow

DOC = (Path(__file__).parents[1] / "docs" / "export.md").read_text(encoding="utf-8")


def test_every_command_and_snippet_runs(tmp_path, monkeypatch):
    pytest.importorskip("gguf", reason="the gguf package is not installed")
    monkeypatch.chdir(tmp_path)
    base = tiny.base(Path("base"), num_key_value_heads=2)
    model = get_peft_model(tiny.model(num_key_value_heads=2), LoraConfig(r=4, target_modules="all-linear"))
    torch.manual_seed(0)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    model.save_pretrained("adapter")
    app = typer.Typer()
    app.command("convert")(convert_command)
    app.command("merge")(merge_command)
    commands = [line for block in re.findall(r"```sh\n(.*?)```", DOC, re.DOTALL) for line in block.splitlines()]
    assert len(commands) == 10 and base.is_dir()
    for command in commands:
        done = CliRunner().invoke(app, shlex.split(command)[1:])
        assert done.exit_code == 0, f"{command}\n{done.output}\n{done.exception}"
    (snippet,) = re.findall(r"```python\n(.*?)```", DOC, re.DOTALL)
    exec(compile(snippet, "docs/export.md", "exec"), {})


def test_the_options_that_the_page_names_exist():
    known = {
        f"--{word.replace('_', '-')}"
        for command in (convert_command, merge_command)
        for word in command.__annotations__
    }
    known |= {"--json", "--no-check"}
    assert set(re.findall(r"--[a-z][a-z-]+", DOC)) - known == set()
