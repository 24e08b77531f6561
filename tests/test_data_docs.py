"""What docs/data.md shows works as shown."""

from __future__ import annotations

import json
import re
from pathlib import Path

import datasets
import pytest
import tiny
from pages import blocks, commands, page
from typer.testing import CliRunner, Result

from phi3_lora_plugin.chat.dataset import DataError
from phi3_lora_plugin.chat.encode import Policy
from phi3_lora_plugin.chat.formats import ADAPTERS, detect
from phi3_lora_plugin.chat.tool_formats import TOOL_FORMATS, render_calls
from phi3_lora_plugin.cli import app
from phi3_lora_plugin.recipe.sections import DataSection

PAGE = page("data")


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working directory with the files that the page speaks of."""
    monkeypatch.chdir(tmp_path)
    chats = [tiny.chat(f"{number}?", f"{number}!") for number in range(12)]
    tiny.write(Path("chats.jsonl"), chats)
    tiny.write(Path("gsm8k.jsonl"), [{"question": "1 + 1?", "answer": "#### 2"}] * 3)
    robot = {"messages": [chats[0]["messages"][0], {"role": "robot", "content": "beep"}]}
    Path("broken.jsonl").write_text(json.dumps(robot) + '\n{"messages": [{"role": ')
    Path("more").mkdir()
    Path("more/2024.csv").write_text("prompt,completion\nHello,Hi\nBye,See you\n")
    Path("more/2023.json").write_text(json.dumps(chats[:3]))
    saved = datasets.Dataset.from_list(chats[:5])
    datasets.DatasetDict(train=saved, test=saved.select([0])).save_to_disk("saved")
    return tmp_path


def run(*words: str) -> Result:
    return CliRunner().invoke(app, [*words, "model.path=embedded:tiny-phi3", "data.max_length=64"])


def test_every_command_runs(place: Path) -> None:
    assert len(commands(PAGE)) >= 10
    for program, *words in commands(PAGE):
        done = run(*words)
        assert program == "phi3-lora" and done.exit_code == 0, (words, done.output, done.exception)
        assert "json" not in words or json.loads(done.stdout)["train"]["rows"] == 12
        if "data.on_error=skip" in words:
            assert "2 of 14 rows malformed, left out" in done.stdout


def test_the_error_reads_as_shown(place: Path) -> None:
    (shown,) = [block for block in blocks(PAGE, "") if "DataError" in block]
    done = run("data", "check", "phi3-mini-4k-lora", "data.path=broken.jsonl")
    assert isinstance(done.exception, DataError)
    said = str(done.exception).splitlines()
    for line, want in zip(said, shown.removeprefix("DataError: ").splitlines(), strict=True):
        assert line.startswith(want.removesuffix("...")) if want.endswith("...") else line == want


def test_the_row_looks_as_shown() -> None:
    (shown,) = [block for block in blocks(PAGE, "") if "⟦" in block]
    done = run("data", "check", "tiny-cpu", "--rows", "1")
    assert shown in "".join(line.rstrip() + "\n" for line in done.stdout.splitlines())


def test_the_four_rows_are_the_same_chat_in_the_formats_named_above_them() -> None:
    rows = [json.loads(block) for block in blocks(PAGE, "json")]
    read = []
    for row, name in zip(rows, ("messages", "sharegpt", "alpaca", "prompt_completion"), strict=True):
        assert detect(row) == [name]
        assert f"`{name}`" in PAGE[: PAGE.index(json.dumps(row))].rsplit("\n\n", 2)[-2]
        read.append(ADAPTERS[name](row))
    assert read == [read[0]] * 4
    assert all(f"`{name}`" in PAGE for name in ADAPTERS)


def test_every_snippet_runs(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    snippets = blocks(PAGE, "python")
    assert len(snippets) == 2
    for snippet in snippets:
        exec(compile(snippet, "docs/data.md", "exec"), {})
    assert "3 lines to read" in capsys.readouterr().out


def test_the_keys_and_values_that_the_page_names_exist() -> None:
    assert set(re.findall(r"`data\.(\w+)", PAGE)) <= set(DataSection.model_fields)
    for key, names in (("tool_format", TOOL_FORMATS), ("thoughts", ("error", "train", "context", "drop"))):
        table = PAGE.split(f"| `data.{key}` |", 1)[1].split("\n\n", 1)[0]
        assert re.findall(r"^\| `([\w-]+)` \|", table, re.M) == list(names)
    for one in TOOL_FORMATS.values():
        made = render_calls([{"name": "f", "arguments": {}}], one, re.compile("(?!)"))
        assert f"`{made.replace('|', chr(92) + '|')}`" in PAGE
    for key in ("system", "tools", "control_tokens"):
        (values,) = re.findall(rf"^\| `data\.{key}` \| (.*?) \|", PAGE, re.M)
        for value in re.findall(r"`(\w+)`", values):
            Policy(**{key: value})
    for value in ("assistant", "last_turn", "all"):
        assert f"`{value}`" in PAGE and Policy(train_on=value)
