"""What docs/export.md shows works as shown, in the order shown."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import tiny
from lora_runs import saved_adapter
from pages import blocks, commands, page
from typer.testing import CliRunner

from phi3_lora_plugin.cli import app
from phi3_lora_plugin.cli.convert import convert_command, merge_command

pytestmark = pytest.mark.slow

DOC = page("export")


def test_every_command_and_snippet_runs(tmp_path, monkeypatch):
    pytest.importorskip("gguf", reason="the gguf package is not installed")
    monkeypatch.chdir(tmp_path)
    base = tiny.base(Path("base"), num_key_value_heads=2)
    saved_adapter(tiny.model(num_key_value_heads=2), Path("adapter"), target_modules="all-linear")
    assert len(commands(DOC)) == 10 and base.is_dir()
    for _, *words in commands(DOC):
        done = CliRunner().invoke(app, words)
        assert done.exit_code == 0, f"{words}\n{done.output}\n{done.exception}"
    (snippet,) = blocks(DOC, "python")
    exec(compile(snippet, "docs/export.md", "exec"), {})


def test_the_options_that_the_page_names_exist():
    words = {*convert_command.__annotations__, *merge_command.__annotations__}
    known = {f"--{word.replace('_', '-')}" for word in words} | {"--json", "--no-check"}
    assert set(re.findall(r"--[a-z][a-z-]+", DOC)) - known == set()
