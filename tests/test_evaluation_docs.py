"""What docs/evaluation.md shows works as shown, in the order shown, on the embedded base."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest
import tiny
import typer
import yaml
from pages import blocks, commands, page
from typer.testing import CliRunner

from phi3_lora_plugin.cli import app
from phi3_lora_plugin.cli.evaluate import _NAMES
from phi3_lora_plugin.evaluate import lm_eval_tasks
from phi3_lora_plugin.evaluate.answer_scores import MEASURES
from phi3_lora_plugin.evaluate.lm_eval_tasks import HarnessError, require_lm_eval

pytestmark = pytest.mark.slow

PAGE = page("evaluation")
SMALL = ["model.path=embedded:tiny-phi3", "model.device=cpu", "data.max_length=64"]
FIRST = "phi3-lora train phi3-mini-4k-lora data.path=chats.jsonl data.eval_fraction=0.1"


def test_every_command_and_snippet_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    rows = [tiny.chat(f"Where does otter {n} live?", "In a river.") for n in range(10)]
    for name in ("chats", "test"):
        tiny.write(Path(f"{name}.jsonl"), rows)
    for name in ("gsm8k_train", "gsm8k_test"):
        tiny.write(Path(f"{name}.jsonl"), [{"question": "1 + 1?", "answer": "#### 2"}] * 3)
    shown = [shlex.split(FIRST), *commands(PAGE)]
    assert len(shown) == 9
    for _, *words in shown:
        # The base from the hub is the embedded one here.
        words = [word.replace("microsoft/Phi-3-mini-4k-instruct", "embedded:tiny-phi3") for word in words]
        small = SMALL if "phi3-mini-4k-lora" in words else []
        quick = ["--samples=0", "--no-check", "training.max_steps=1"] if words[0] == "train" else ["--max-new-tokens=8"]
        with monkeypatch.context() as without:
            if "--lm-eval" in words:  # its tasks come from the hub
                without.setattr(lm_eval_tasks, "is_installed", lambda name: False)
            done = CliRunner().invoke(app, [*words, *small, *quick], input="Where does the otter live?\n")
        if "--lm-eval" in words:
            assert isinstance(done.exception, HarnessError) and "pip install" in str(done.exception)
        else:
            assert done.exit_code == 0, f"{words}\n{done.output}\n{done.exception}"
    assert Path("runs/phi3-mini-4k-lora-2").is_dir()
    (snippet,) = blocks(PAGE, "python")
    exec(compile(snippet, "docs/evaluation.md", "exec"), {})


@pytest.mark.long  # the harness reads its 14,000 files
def test_the_harness_has_the_tasks_and_takes_the_options_of_the_page() -> None:
    pytest.importorskip("lm_eval")
    [(tasks, options)] = re.findall(r"--lm-eval (\S+) --lm-eval-args '(.+)'", PAGE)
    assert require_lm_eval(tasks.split(","), yaml.safe_load(options))


def test_every_figure_and_option_of_the_page_exists() -> None:
    shown = re.findall(r"^\| (.*?) \| ", PAGE, re.M)[1:]
    assert shown == ["loss", "perplexity", "token accuracy", *map(_NAMES.get, ("exact", "rouge_l", "stopped"))]
    assert set(_NAMES) == {*MEASURES, "stopped"}
    ours = typer.main.get_command(app).commands
    given = [parameter for name in ("eval", "train", "chat") for parameter in ours[name].params]
    known = {option for parameter in given for option in parameter.opts + parameter.secondary_opts}
    assert set(re.findall(r"--[a-z][\w-]+", PAGE)) <= known
