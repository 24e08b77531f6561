"""`phi3-lora chat`: what can be talked to, commands, stopping an answer, and what is refused."""

from __future__ import annotations

import io
import json
import os
import pty
import select
import shutil
import signal
import sys
from pathlib import Path
from typing import Any

import pytest
import tiny
from lora_runs import saved_adapter
from warm_process import Warm

from phi3_lora_plugin import load_model
from phi3_lora_plugin.cli.chat import ChatError, chat_command
from phi3_lora_plugin.store.adapter_folder import AdapterError


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with `base` and an `adapter` that makes it say something else."""
    folder = tmp_path_factory.mktemp("chat")
    tiny.base(folder / "base")
    saved_adapter(load_model(folder / "base"), folder / "adapter", scale=3.0, target_modules="all-linear")
    return folder


def say(what: Path, *lines: str, monkeypatch: pytest.MonkeyPatch, **options: Any) -> None:
    monkeypatch.setattr(sys, "stdin", io.StringIO("".join(f"{line}\n" for line in lines)))
    chat_command(str(what), max_new_tokens=16, device="cpu", **options)


def test_an_adapter_and_a_model_answer_and_say_what_they_are(
    place: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    answers = {}
    for what in ("base", "adapter"):
        say(place / what, "hello", monkeypatch=monkeypatch)
        said = capsys.readouterr()
        answers[what] = said.out
        assert f"loading {place / 'base'}" in said.err and "template phi-3-mini-4k, float32, cpu" in said.err
        assert (f"{place / 'adapter'} on {place / 'base'}" in said.err) == (what == "adapter")
    assert answers["base"] != answers["adapter"]
    say(place / "adapter", "hello", compare=True, monkeypatch=monkeypatch)
    assert capsys.readouterr().out == f"base model: {answers['base']}adapter: {answers['adapter']}"
    with pytest.raises(ChatError, match="--compare needs an adapter"):
        say(place / "base", "hello", compare=True, monkeypatch=monkeypatch)


def test_commands_change_the_conversation(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    saved = tmp_path / "talk.jsonl"
    say(
        place / "adapter", "one", f"/save {saved}", "/reset", "two", f"/save {saved}", "/help", "/exit", "never",
        monkeypatch=monkeypatch,
    )  # fmt: skip
    first, second = [json.loads(line)["messages"] for line in saved.read_text().splitlines()]
    assert [turn["role"] for turn in first] == [turn["role"] for turn in second] == ["user", "assistant"]
    assert (first[0]["content"], second[0]["content"]) == ("one", "two")
    said = capsys.readouterr()
    assert first[1]["content"] in said.out and "never" not in said.out and "/system TEXT" in said.err
    with pytest.raises(ChatError, match="'/sav' is not a command"):
        say(place / "adapter", "/sav", monkeypatch=monkeypatch)


def test_an_adapter_that_differs_from_its_manifest_is_refused_unless_told(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = Path(shutil.copytree(place / "adapter", tmp_path / "adapter"))
    manifest = {"step": 1, "files": {"adapter_model.safetensors": {"size": 5, "sha256": "0" * 64}}}
    (folder / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(AdapterError, match="is damaged"):
        say(folder, "hello", monkeypatch=monkeypatch)


def test_ctrl_c_stops_an_answer_and_comes_back_to_the_prompt(place: Path, tmp_path: Path, warm: Warm) -> None:
    """On a real terminal, as a process of its own: what aborts as the interpreter leaves shows in its exit code."""
    ours, theirs = pty.openpty()
    arguments = ["chat", str(place / "base"), "--max-new-tokens", "3000", "--device", "cpu"]
    child = warm.start_command(Path(os.ttyname(theirs)), *arguments, cwd=tmp_path, typed=True)
    seen = b""

    def until(text: bytes) -> None:
        nonlocal seen
        while text not in seen:
            assert select.select([ours], [], [], 120)[0], seen
            seen += os.read(ours, 4096)
        seen = seen.partition(text)[2]

    until(b"\n> ")
    os.write(ours, b"tell me a story\n")
    until(b"story\r\n")
    while not seen.strip():  # until an answer has begun
        seen += os.read(ours, 4096)
    os.kill(child.pid, signal.SIGINT)
    until(b"[stopped]")
    until(b"> ")
    os.write(ours, b"/exit\n")
    assert child.code() == 0


def test_ctrl_c_while_one_prompt_is_answered_ends_with_130(place: Path, tmp_path: Path, warm: Warm) -> None:
    arguments = ["chat", str(place / "base"), "--prompt", "hello", "--max-new-tokens", "3000", "--device", "cpu"]
    child = warm.start_command(tmp_path / "said", *arguments, cwd=tmp_path)
    child.wait_for("float32, cpu)\n")
    os.kill(child.pid, signal.SIGINT)
    code, said = child.wait()
    assert code == 130 and "Traceback" not in said, said
