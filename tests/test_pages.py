"""The pages to start with: commands, recipes and rows in them work, and messages that they quote are the sources'."""

from __future__ import annotations

import re
import sys
from pathlib import Path

import pytest
from pages import ROOT, blocks, commands, page
from typer.testing import CliRunner
from warm_process import Warm

import phi3_lora_plugin
from phi3_lora_plugin.cli import app
from phi3_lora_plugin.cli.overrides import undashed
from phi3_lora_plugin.recipe import load_recipe
from phi3_lora_plugin.recipe.yaml_file import read_file

SMALL = ["model.path=embedded:tiny-phi3", "model.device=cpu", "model.quantize=none", "data.max_length=256"]
QUICK = ["training.max_steps=1", "--samples=0", "--no-check"]
ROW = '{"messages": [{"role": "user", "content": "Where is otter %d?"}, {"role": "assistant", "content": "Here."}]}\n'
sys.path.insert(0, str(ROOT / "tools"))
from messages import every_message, texts  # noqa: E402

sys.path.pop(0)


@pytest.mark.parametrize("name", ["quickstart", "ollama", "troubleshooting"])
def test_the_commands_name_what_exists(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("chats.jsonl").write_text("".join(ROW % number for number in range(20)))
    known = {command.name for command in app.registered_commands} | {group.name for group in app.registered_groups}
    assert commands(page(name))
    for program, *words in commands(page(name)):
        if program == "torchrun":  # the same command line after the module
            words = words[words.index("phi3_lora_plugin.cli") + 1 :]
        elif program != "phi3-lora":
            assert (program, words) == ("pip", ["install", "."])
            continue
        assert words[0] in known
        if words[0] == "new":
            assert CliRunner().invoke(app, words).exit_code == 0
        if words[0] in ("train", "plan"):
            recipe, *rest = undashed(words[1:], {"--same-batch", "--fit", "--memory", "--device"})
            load_recipe(recipe, [word for word in rest if "=" in word])


@pytest.mark.slow
def test_chats_to_ollama_runs_in_its_order(tmp_path: Path, warm: Warm) -> None:
    (tmp_path / "chats.jsonl").write_text("".join(ROW % number for number in range(40)))
    for _, *words in commands(page("ollama")):
        if words[0] == "export":
            continue  # tests/test_export_ollama.py does it, where the extra is installed
        short = ["--max-new-tokens=8"]
        extra = {"data": SMALL, "train": [*SMALL, *QUICK], "eval": short, "chat": short}
        done = warm.command(*words, *extra[words[0]], cwd=tmp_path)
        assert done.returncode == 0, (words, done.stderr)


@pytest.mark.slow
def test_each_recipe_of_the_cookbook_reads_the_rows_above_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    cookbook = page("cookbook")
    shown = list(zip(blocks(cookbook, "json"), blocks(cookbook, "yaml"), strict=True))
    assert len(shown) == 6 == len(re.findall("^## ", cookbook, re.MULTILINE))
    for row, text in shown:
        (name,) = re.findall(r"^# ([a-z0-9]+\.yaml)$", text, re.MULTILINE)
        Path(name).write_text(text)
        asked = re.search(r"(Where|Rain|What|Ann|Sum)", row)
        assert asked is not None
        rows = [row.replace(asked[0], f"{number}. {asked[0]}", 1) for number in range(20)]
        Path("rows.jsonl").write_text("".join(rows))
        load_recipe(name)
        # The tokenizer that ships here has no place for tools; text is how bases without one get them.
        tools = ["data.tools=text", "data.tool_format=text"] if name == "tools.yaml" else []
        done = CliRunner().invoke(app, ["data", "check", name, *SMALL, *tools])
        assert done.exit_code == 0, (name, done.exception, done.output)


def test_every_message_of_the_troubleshooting_page_is_in_the_sources() -> None:
    known = {" ".join(text.split()) for text in texts()}
    quoted = [line for block in blocks(page("troubleshooting"), "text") for line in block.splitlines()]
    assert len(quoted) > 20
    for line in quoted:
        # Some are put together: what is wrong in one place, the nearest name in another.
        pieces = [line] if any(map(_pattern(line).search, known)) else line.split("; ")
        for piece in pieces:
            assert len(re.sub(r"[.\s]", "", piece)) > 6, line
            assert any(map(_pattern(piece).search, known)), piece


def _pattern(line: str) -> re.Pattern[str]:
    return re.compile("".join(".*" if part == "..." else re.escape(part) for part in re.split(r"(\.\.\.)", line)))


def test_the_list_of_messages_has_those_that_are_raised() -> None:
    found = every_message()
    assert sum(map(len, found.values())) > 300
    assert any("has no turn of the assistant" in text for _, text in found["chat.turns"])
    assert ("RecipeError", "") not in found["recipe.layers"]


def test_the_reference_has_every_public_name_where_it_is_defined() -> None:
    listed = re.findall(r"^::: (phi3_lora_plugin[\w.]*)\.(\w+)$", page("reference"), re.MULTILINE)
    assert sorted(name for _, name in listed) == phi3_lora_plugin.__all__
    for module, name in listed:
        source = Path(phi3_lora_plugin.__file__).parents[1] / Path(*module.split("."))
        text = (source / "__init__.py" if source.is_dir() else source.with_suffix(".py")).read_text(encoding="utf-8")
        assert re.search(rf"^(class|def) {name}\b|^{name}\b.* = ", text, re.MULTILINE), (module, name)


def test_every_page_is_in_the_navigation() -> None:
    document = read_file(ROOT / "mkdocs.yml")
    nav = set(re.findall(r"[\w-]+\.md", str(document.data["nav"])))
    made = {"index.md", "messages.md", "contributing.md", "changelog.md"}
    assert nav == made | {path.name for path in (ROOT / "docs").glob("*.md")}
