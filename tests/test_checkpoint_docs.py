"""What docs/checkpoints.md shows works as shown, in the order shown, and what it names is there."""

from __future__ import annotations

import inspect
import re
from pathlib import Path

import pytest
import tiny
from lora_runs import arguments, peft_model, rows, trainer
from pages import blocks, commands, page
from typer.testing import CliRunner

from phi3_lora_plugin import LoraCheckpoint
from phi3_lora_plugin.cli import app
from phi3_lora_plugin.recipe.sections import CheckpointSection
from phi3_lora_plugin.store.layout import BEST, LATEST, entries

pytestmark = pytest.mark.slow

DOC = page("checkpoints")

#: What the page sums up in words.
ALSO = {
    "optimizer.pt", "scheduler.pt", "trainer_state.json", "rng_state.pth", "tokenizer_config.json", "config.json",
    "special_tokens_map.json", "chat_template.jinja", "generation_config.json",
}  # fmt: skip


@pytest.mark.usefixtures("reload_in_fork")
def test_every_snippet_and_command_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    names = {"model": peft_model(), "args": arguments(Path("out")), "rows": rows()}
    for snippet in blocks(DOC, "python"):
        exec(compile(snippet, "docs/checkpoints.md", "exec"), names)
    assert names["report"] and names["path"] == Path("out/lora/step-00000006")
    assert names["checkpoint"] is not None

    tiny.base(Path("base"), hidden_size=16, intermediate_size=32)
    tiny.write(Path("chats.jsonl"), [tiny.chat("a", "b")] * 8)
    Path("my-recipe.yaml").write_text(
        "model: {path: base, device: cpu}\ndata: {path: chats.jsonl}\nlora: {r: 2, alpha: 4, targets: all-linear}\n"
        "training: {max_steps: 2, logging_steps: 1}\ncheckpoint: {every_steps: 1}\noutput_dir: recipe-out\n"
    )
    first = CliRunner().invoke(app, ["train", "my-recipe.yaml", "--samples=0", "--no-check"])
    assert first.exit_code == 0, first.output
    for _, *words in commands(DOC):
        done = CliRunner().invoke(app, words)
        assert done.exit_code == 0, f"{words}\n{done.output}\n{done.exception}"


def test_the_tree_is_the_one_on_the_disk(tmp_path: Path) -> None:
    made = trainer(tmp_path, LoraCheckpoint(), eval_strategy="steps", eval_steps=3, max_steps=3)
    made.processing_class = made.callback_handler.processing_class = tiny.tokenizer()
    made.train()
    (entry,) = entries(tmp_path / "lora")
    for path in (entry.path, entry.path / "resume", tmp_path / "lora"):
        assert {file.name for file in path.iterdir() if file.name not in DOC and "step-" not in file.name} <= ALSO
    assert {LATEST, BEST} <= {path.name for path in (tmp_path / "lora").iterdir()}


def test_every_setting_is_named_with_its_default() -> None:
    table = dict(re.findall(r"^\| `(\w+)=([^`]+)` \|", DOC, re.MULTILINE))
    parameters = inspect.signature(LoraCheckpoint).parameters
    for name, value in table.items():
        assert repr(parameters[name].default) == value.replace('"', "'"), name
    assert set(parameters) - set(table) == {"zero_losses", "allow_drift", "facts"}
    in_recipes = set(re.findall(r"^\| `\w+=[^`]+` \| `(\w+)` \|", DOC, re.MULTILINE))
    assert in_recipes == set(CheckpointSection.model_fields)
