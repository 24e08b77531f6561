"""`phi3-lora new` writes a recipe that loads and trains, asks only on a terminal, and never overwrites."""

from __future__ import annotations

import os
import pty
from pathlib import Path

import pytest
import tiny
from typer.testing import CliRunner, Result
from warm_process import Warm

from phi3_lora_plugin.cli import app
from phi3_lora_plugin.recipe import load_recipe


def new(*arguments: str) -> Result:
    return CliRunner().invoke(app, ["new", *arguments])


@pytest.fixture(autouse=True)
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    rows = {
        "chats": [tiny.chat("hello", "hi")] * 3,
        "gsm": [{"question": f"{n} + 1?", "answer": f"#### {n + 1}"} for n in range(12)],
        "pairs": [{"prompt": f"hello {n}", "chosen": "hi", "rejected": "go"} for n in range(12)],
        "judged": [{"prompt": f"hello {n}", "completion": "hi", "label": bool(n % 2)} for n in range(12)],
    }
    for name, some in rows.items():
        tiny.write(Path(f"{name}.jsonl"), some)
    return tmp_path


@pytest.mark.parametrize(
    "data, room, preset",
    [
        ("chats", "8GB", "phi3-mini-4k-qlora"),
        ("chats", "16 GB", "phi3-mini-4k-lora-16gb"),
        ("chats", "24GB", "phi3-mini-4k-lora"),
        ("chats", "141GB", "phi3-mini-4k-lora-80gb"),
        ("pairs", "24GB", "phi3-mini-4k-dpo-lora"),
        ("pairs", "cpu", "tiny-cpu"),
        ("judged", "24GB", "phi3-mini-4k-kto-lora"),
        ("judged", "cpu", "tiny-cpu"),
        ("gsm", "cpu", "tiny-cpu"),
    ],
)
def test_the_card_and_the_rows_choose_the_preset(data: str, room: str, preset: str) -> None:
    done = new("mine.yaml", "--data", f"{data}.jsonl", "--for", room)
    assert done.exit_code == 0, done.exception
    assert f"from {preset}" in done.stdout
    recipe = load_recipe("mine.yaml")
    assert recipe.data.eval_fraction == (0 if data == "chats" else 0.1)  # three rows are too few to hold one out
    assert recipe.data.path == f"{data}.jsonl" and recipe.output_dir == "runs/mine"
    assert recipe.data.columns == ({"prompt": "question", "completion": "answer"} if data == "gsm" else {})
    assert recipe.preference.loss == {"pairs": "sigmoid", "judged": "kto"}.get(data, "none") and not recipe.reward
    assert recipe.training == load_recipe(preset).training and recipe.lora == load_recipe(preset).lora
    assert CliRunner().invoke(app, ["show", "mine.yaml"]).stdout == Path("mine.yaml").read_text()


def test_nothing_is_overwritten_and_every_flag_says_what_it_takes(place: Path) -> None:
    Path("there.yaml").write_text("mine")
    wrong = {
        ("there.yaml", "--data", "chats.jsonl", "--for", "8GB"): "never overwritten",
        ("a.txt", "--data", "chats.jsonl", "--for", "8GB"): "ends in .yaml",
        ("a.yaml",): "--data FILE and --for MEMORY",
        ("a.yaml", "--data", "chats.jsonl"): "--for MEMORY",
        ("a.yaml", "--data", "chat.jsonl", "--for", "8GB"): "nearest is chats.jsonl",
        ("a.yaml", "--data", "chats.jsonl", "--for", "much"): "write 16GB, or cpu",
        ("a.yaml", "--data", "chats.jsonl", "--for", "4GB"): "GB at least",
        ("a.yaml", "--data", "chats.jsonl", "--for", "8GB", "--base", "phi-3-mini-4"): "did you mean 'phi-3-mini-4k'",
        ("a.yaml", "--data", "chats.jsonl", "--from", "tiny-cpuu"): "did you mean 'tiny-cpu'",
        ("a.yaml", "--data", "pairs.jsonl", "--from", "tiny-cpu"): "chosen and rejected",
        ("a.yaml", "--data", "judged.jsonl", "--from", "tiny-cpu"): "labels, good and bad ones",
        ("no/a.yaml", "--data", "chats.jsonl", "--for", "8GB"): "cannot be written",
    }
    for arguments, said in wrong.items():
        done = new(*arguments)
        assert done.exception is not None and said in str(done.exception), arguments
    assert Path("there.yaml").read_text() == "mine" and not Path("a.yaml").exists()


@pytest.mark.slow
def test_it_asks_on_a_terminal_and_the_recipe_trains(place: Path, warm: Warm) -> None:
    ours, theirs = pty.openpty()
    os.write(ours, b"gsm.jsonl\ncpu\n\n")
    child = warm.start_command(Path(os.ttyname(theirs)), "new", "mine.yaml", cwd=place, typed=True)
    assert child.code() == 0
    said = os.read(ours, 10_000).decode()
    assert "Your rows" in said and "Memory of your card" in said
    done = warm.command("train", "mine.yaml", "training.max_steps=2", "--no-check", "--samples=0", cwd=place)
    assert done.returncode == 0, done.stderr
    assert (place / "runs" / "mine" / "lora").is_dir()
