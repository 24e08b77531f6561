"""`--lora.r=4` is `lora.r=4`; an option that is really a setting is named; a shell completes both."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

from phi3_lora_plugin.cli import app
from phi3_lora_plugin.cli.completion import complete_key, complete_recipe
from phi3_lora_plugin.cli.overrides import OptionError, undashed


@pytest.mark.parametrize(
    "words, meant",
    [
        (["tiny-cpu", "--lora.r=4"], ["tiny-cpu", "lora.r=4"]),
        (["--lora.r", "4", "x"], ["lora.r=4", "x"]),
        (["--training.learning-rate=1e-4"], ["training.learning_rate=1e-4"]),
        (["--output-dir=a", "--seed", "3"], ["output_dir=a", "seed=3"]),
        (["--data.columns={a: b=c}"], ["data.columns={a: b=c}"]),
        (["--json", "--rows=3"], ["--json", "--rows=3"]),
        (["--rows", "3", "--", "--lora.r=4"], ["--rows", "3", "--", "--lora.r=4"]),
    ],
)
def test_dashes_are_taken_off_overrides_alone(words: list[str], meant: list[str]) -> None:
    assert undashed(words, {"--json", "--rows"}) == meant


def test_a_setting_given_as_an_option_is_named() -> None:
    with pytest.raises(OptionError, match="no option --lr; .*: training.learning_rate=1e-4"):
        undashed(["--lr=1e-4"], set())
    with pytest.raises(OptionError, match="--lora.r has no value"):
        undashed(["--lora.r"], set())


@pytest.mark.parametrize("command", ["show", "validate"])
def test_commands_take_them(command: str) -> None:
    done = CliRunner().invoke(app, [command, "tiny-cpu", "--lora.r=4", "--lora.alpha", "8"])
    assert done.exit_code == 0, done.output
    assert command == "validate" or "r: 4 " in done.stdout and "alpha: 8 " in done.stdout


def test_near_names_of_commands_and_options() -> None:
    assert "Did you mean 'train'" in CliRunner().invoke(app, ["trian"]).output
    assert "--resume" in CliRunner().invoke(app, ["train", "--resme"]).output
    for file in ("rows.jsonl", "./rows.jsonl"):
        assert f"RECIPE data.path={file}" in CliRunner().invoke(app, ["show", file]).output


def test_a_blocked_name_that_no_plugin_has_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PHI3_LORA_BLOCK_PLUGINS", "ph3")
    assert "no plugin is named 'ph3'; did you mean 'phi3'?" in CliRunner().invoke(app, ["plugins"]).output


def test_a_shell_completes_recipes_and_keys(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "phi3-mine.yaml").write_text("")
    assert "phi3-mine.yaml" in complete_recipe("phi3-m") and "tiny-cpu" not in complete_recipe("phi3-m")
    assert complete_key("lora.dropo") == ["lora.dropout="]
    assert "training.learning_rate=" in complete_key("training.l") and complete_key("see") == ["seed="]
    program = "from phi3_lora_plugin.cli import main; import sys; sys.argv = ['phi3-lora']; main()"
    asked = {"_PHI3_LORA_COMPLETE": "complete_bash", "COMP_WORDS": "phi3-lora train tiny-c", "COMP_CWORD": "2"}
    command = [sys.executable, "-c", program]
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ | asked, cwd=tmp_path)
    assert done.stdout.split() == ["tiny-cpu"], done.stderr
