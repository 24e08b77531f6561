"""What docs/evaluation.md shows works as shown, in the order shown, on the embedded base."""

from __future__ import annotations

import json
import re
import shlex
from pathlib import Path

import pytest
import typer
import yaml
from typer.testing import CliRunner

from phi3_lora_plugin.cli.chat import chat_command
from phi3_lora_plugin.cli.evaluate import _NAMES, eval_command
from phi3_lora_plugin.cli.train import train_command
from phi3_lora_plugin.evaluate import lm_eval_tasks
from phi3_lora_plugin.evaluate.answer_scores import MEASURES
from phi3_lora_plugin.evaluate.lm_eval_tasks import HarnessError, require_lm_eval

pytestmark = pytest.mark.slow

PAGE = (Path(__file__).parents[1] / "docs" / "evaluation.md").read_text(encoding="utf-8")
SMALL = ["model.path=embedded:tiny-phi3", "model.device=cpu", "data.max_length=64"]
FIRST = "phi3-lora train phi3-mini-4k-lora data.path=chats.jsonl data.eval_fraction=0.1"


def shown_commands() -> typer.Typer:
    """The commands that the page is about."""
    app = typer.Typer()
    for name, command in (("eval", eval_command), ("train", train_command), ("chat", chat_command)):
        app.command(name)(command)
    return app


def blocks(kind: str) -> list[str]:
    return re.findall(rf"```{kind}\n(.*?)```", PAGE, re.DOTALL)


def test_every_command_and_snippet_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    chat = [{"role": "user", "content": "Where does otter {} live?"}, {"role": "assistant", "content": "In a river."}]
    rows = [[chat[0] | {"content": chat[0]["content"].format(n)}, chat[1]] for n in range(10)]
    for name in ("chats", "test"):
        Path(f"{name}.jsonl").write_text("".join(json.dumps({"messages": row}) + "\n" for row in rows))
    for name in ("gsm8k_train", "gsm8k_test"):
        Path(f"{name}.jsonl").write_text('{"question": "1 + 1?", "answer": "#### 2"}\n' * 3)
    app = shown_commands()
    commands = [FIRST, *(line for block in blocks("sh") for line in block.splitlines())]
    assert len(commands) == 9
    for command in commands:
        # The base from the hub is the embedded one here.
        words = shlex.split(command.replace("microsoft/Phi-3-mini-4k-instruct", "embedded:tiny-phi3"), comments=True)[
            1:
        ]
        small = SMALL if "phi3-mini-4k-lora" in words else []
        quick = ["--samples=0", "--no-check", "training.max_steps=1"] if words[0] == "train" else ["--max-new-tokens=8"]
        with monkeypatch.context() as without:
            if "--lm-eval" in words:  # its tasks come from the hub
                without.setattr(lm_eval_tasks, "is_installed", lambda name: False)
            done = CliRunner().invoke(app, [*words, *small, *quick], input="Where does the otter live?\n")
        if "--lm-eval" in words:
            assert isinstance(done.exception, HarnessError) and "pip install" in str(done.exception)
        else:
            assert done.exit_code == 0, f"{command}\n{done.output}\n{done.exception}"
    assert Path("runs/phi3-mini-4k-lora-2").is_dir()
    (snippet,) = blocks("python")
    exec(compile(snippet, "docs/evaluation.md", "exec"), {})


@pytest.mark.long  # the harness reads its 14,000 files
def test_the_harness_has_the_tasks_and_takes_the_options_of_the_page() -> None:
    pytest.importorskip("lm_eval")
    [(tasks, options)] = re.findall(r"--lm-eval (\S+) --lm-eval-args '(.+)'", PAGE)
    assert require_lm_eval(tasks.split(","), yaml.safe_load(options))


def test_every_figure_and_option_of_the_page_exists() -> None:
    shown = re.findall(r"^\| (.*?) \| ", PAGE, re.M)[1:]
    assert shown == [
        "loss",
        "perplexity",
        "token accuracy",
        *(_NAMES[name] for name in ("exact", "rouge_l", "stopped")),
    ]
    assert set(_NAMES) == {*MEASURES, "stopped"}
    commands = typer.main.get_command(shown_commands()).commands.values()
    known = {option for command in commands for given in command.params for option in given.opts + given.secondary_opts}
    assert set(re.findall(r"--[a-z][\w-]+", PAGE)) <= known
