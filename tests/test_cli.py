"""The command line as a shell has it: exit codes, wrong input of every kind, signals, `chat`, start-up."""

from __future__ import annotations

import json
import os
import re
import shlex
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import tiny
from warm_process import COMMAND, Warm

from phi3_lora_plugin.cli import main

pytestmark = pytest.mark.slow

FRESH = [sys.executable, "-c", COMMAND]
CHAT = [{"role": "user", "content": "what is the capital of france?"}, {"role": "assistant", "content": "paris."}]


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("place")
    tiny.base(folder / "base")
    (folder / "chats.jsonl").write_text((json.dumps({"messages": CHAT}) + "\n") * 20)
    return folder


def settings(place: Path, out: Path, *overrides: str) -> list[str]:
    return [
        "tiny-cpu",
        f"model.path={place / 'base'}",
        f"data.path={place / 'chats.jsonl'}",
        "data.eval_path=null",
        "training.num_train_epochs=null",
        "training.max_steps=3",
        f"output_dir={out}",
        *overrides,
    ]


def run(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> int:
    """The exit code of `phi3-lora ARGUMENTS`, in this process."""
    monkeypatch.setattr(sys, "argv", ["phi3-lora", *arguments])
    with pytest.raises(SystemExit) as left:
        main()
    return int(left.value.code or 0)


WRONG_DATA = {
    "missing": (None, "nowhere.jsonl"),
    "empty": ("", "is empty"),
    "html": ("<!DOCTYPE html><html><body>404</body></html>", "HTML"),
    "columns": ('{"frage": "a", "antwort": "b"}\n', "fits no format"),
    "mixed": (json.dumps({"messages": CHAT}) + '\n{"prompt": "a", "completion": "b"}\n', "data.jsonl:2"),
    "nothing trained": ('{"messages": [{"role": "user", "content": "hello"}]}\n', "no turn of the assistant"),
}


@pytest.mark.parametrize("kind", WRONG_DATA)
def test_wrong_data_is_wrong_input(
    kind: str, place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    content, said = WRONG_DATA[kind]
    file = tmp_path / ("nowhere.jsonl" if content is None else "data.jsonl")
    if content is not None:
        file.write_text(content)
    for command in (["train"], ["data", "check"]):
        out = tmp_path / f"out-{command[0]}"
        code = run(monkeypatch, *command, *settings(place, out, f"data.path={file}"))
        shown = capsys.readouterr().err
        assert code == 2 and said in shown and "Traceback" not in shown
        assert not list(out.glob("lora/*"))


def test_ten_thousand_rows_with_three_bad_ones(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    lines = [json.dumps({"messages": CHAT})] * 10_000
    lines[17], lines[4_000], lines[9_998] = "{broken", '{"messages": []}', '{"messages": [{"role": "user"}]}'
    (tmp_path / "many.jsonl").write_text("\n".join(lines))
    given = settings(place, tmp_path / "out", f"data.path={tmp_path / 'many.jsonl'}")
    assert run(monkeypatch, "data", "check", *given) == 2
    shown = capsys.readouterr().err
    assert all(f"many.jsonl:{line}" in shown for line in (18, 4_001, 9_999))
    monkeypatch.setattr(sys, "argv", ["phi3-lora", "data", "check", *given, "data.on_error=skip", "--json"])
    with pytest.raises(SystemExit) as left:
        main()
    assert not left.value.code
    found = json.loads(capsys.readouterr().out)
    assert (found["rows_read"], found["train"]["rows"], len(found["skipped"])) == (10_000, 9_997, 3)


def test_a_recipe_with_nine_mistakes_gets_nine_lines(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "bad.yaml").write_text(
        "extends: tiny-cpu\nmodel: {pth: x, dtype: float8}\ndata: {train_on: user, max_length: -1}\n"
        "lora: {r: zero, alpha: -2, dropout: 1.5}\ntraining: {lerning_rate: 1}\nseed: -1\n"
    )
    assert run(monkeypatch, "train", str(tmp_path / "bad.yaml")) == 2
    shown = capsys.readouterr().err
    assert "9 problems" in shown
    assert len(re.findall(r"bad\.yaml:\d", shown)) >= 9
    assert "learning_rate" in shown and "path" in shown


def test_folders_that_are_taken_or_cannot_be_written(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "taken" / "lora" / "step-00000003").mkdir(parents=True)
    assert run(monkeypatch, "train", *settings(place, tmp_path / "taken")) == 2
    assert "--resume" in capsys.readouterr().err
    (tmp_path / "file").write_text("")
    assert run(monkeypatch, "train", *settings(place, tmp_path / "file" / "below")) == 2
    assert "cannot be written" in capsys.readouterr().err
    assert run(monkeypatch, "train", *settings(place, tmp_path / "none"), "--resume") == 2
    assert "no run to resume" in capsys.readouterr().err


def test_what_is_refused_leaves_a_folder_that_the_repaired_recipe_may_use(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    assert run(monkeypatch, "train", *settings(place, out, "lora.targets=[qkv_porj]")) == 2
    assert "qkv_porj" in capsys.readouterr().err and not list(out.iterdir())
    # A disk that is full fails the run; there is nothing wrong with the input.
    (out / "data_report.json").symlink_to("/dev/full")
    assert run(monkeypatch, "train", *settings(place, out)) == 1
    shown = capsys.readouterr().err
    assert "No space left on device" in shown and "Traceback" not in shown
    (out / "data_report.json").unlink()
    assert run(monkeypatch, "train", *settings(place, out, "training.max_steps=1"), "--no-check") == 0


@pytest.mark.parametrize("arguments", [["train", "no-such-recipe"], ["chat", "no-such-folder"], ["verify", "nowhere"]])
def test_names_of_nothing(
    arguments: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert run(monkeypatch, *arguments) in (1, 2)
    shown = "".join(capsys.readouterr())
    assert arguments[1] in shown and "Traceback" not in shown


def test_json_is_the_only_line_on_stdout_and_chat_and_verify_work_on_the_result(
    place: Path, tmp_path: Path, warm: Warm
) -> None:
    arguments = settings(place, tmp_path / "out", "training.max_steps=2")
    # A fresh process, because libraries like to speak as they are imported.
    done = subprocess.run([*FRESH, "train", *arguments, "--json"], capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    (line,) = done.stdout.splitlines()
    result = json.loads(line)
    assert result["status"] == "done" and "\x1b" not in done.stdout + done.stderr
    assert result["reload_difference"] == 0.0
    chat = ["chat", result["output_dir"], "--prompt", "hello", "--max-new-tokens", "5", "--device", "cpu"]
    asked = warm.command(*chat, cwd=tmp_path)
    assert asked.returncode == 0, asked.stderr
    assert "<|" not in asked.stdout
    checked = warm.command("verify", result["adapter"], "--json", cwd=tmp_path)
    assert checked.returncode == 0 and json.loads(checked.stdout)["ok"]
    weights = tmp_path / result["adapter"] / "adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1])
    checked = warm.command("verify", result["adapter"], cwd=tmp_path)
    assert checked.returncode == 1 and "adapter_model.safetensors" in checked.stdout


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_finishes_the_step_saves_and_says_how_to_go_on(
    number: int, place: Path, tmp_path: Path, warm: Warm
) -> None:
    arguments = settings(place, tmp_path / "a run", "training.max_steps=100000", "training.logging_steps=5")
    command = ["train", *arguments, "--no-check"]
    child = warm.start_command(tmp_path / "said", *command, cwd=tmp_path, PYTHONUNBUFFERED="1")
    child.wait_for("\nstep 5/")
    os.kill(child.pid, number)
    code, said = child.wait()
    assert code == 130, said
    rest = said.partition("\nstep 5/")[2]
    (again,) = [line.strip() for line in rest.splitlines() if line.strip().startswith("phi3-lora train")]
    step = int(re.findall(r"stopped after step (\d+)", rest)[0])
    words = shlex.split(again)[1:]
    words = [f"training.max_steps={step + 2}" if word.startswith("training.max_steps") else word for word in words]
    done = warm.command(*words, "--no-check", "--allow-drift", "training.max_steps", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert f"step {step}" in done.stdout and (tmp_path / "a run" / "lora" / f"step-{step + 2:08d}").is_dir()


def test_a_signal_before_training_leaves_at_once(place: Path, tmp_path: Path) -> None:
    process = subprocess.Popen(
        [*FRESH, "train", *settings(place, tmp_path / "out")],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | {"PYTHONUNBUFFERED": "1"},
    )
    assert process.stdout is not None
    assert process.stdout.readline().startswith("recipe ")
    process.send_signal(signal.SIGTERM)
    _, said = process.communicate(timeout=120)
    assert (process.returncode, "nothing was saved" in said) == (130, True), said
    assert "Traceback" not in said


def test_the_light_commands_import_nothing_heavy() -> None:
    for arguments in (["--help"], ["recipes"], ["show", "tiny-cpu"], ["train", "--help"]):
        program = (
            f"import sys; sys.argv = ['phi3-lora', *{arguments!r}]\nfrom phi3_lora_plugin.cli import main\n"
            "try: main()\nexcept SystemExit: pass\n"
            "heavy = ('torch', 'transformers', 'peft', 'trl', 'datasets')\n"
            "print([name for name in heavy if name in sys.modules], file=sys.stderr)"
        )
        done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
        assert done.stderr.strip() == "[]", (arguments, done.stderr)


def test_every_summary_fits_80_columns_whole(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from typer.main import get_command

    from phi3_lora_plugin.cli import app

    command = get_command(app)
    groups = [command, *(each for each in command.commands.values() if hasattr(each, "commands"))]
    assert len(groups) > 1
    for group in groups:
        monkeypatch.setenv("COLUMNS", "80")
        with pytest.raises(SystemExit):
            group.main(["--help"], prog_name="phi3-lora")
        said = capsys.readouterr().out
        assert "..." not in said.partition("Commands:")[2]
        assert max(map(len, said.splitlines())) <= 80


@pytest.mark.parametrize("arguments", [["--version"], ["-h"], ["train", "-h"]])
def test_version_and_short_help(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    from importlib.metadata import version

    from typer.main import get_command

    from phi3_lora_plugin.cli import app

    with pytest.raises(SystemExit) as left:
        get_command(app).main(arguments, prog_name="phi3-lora")
    said = capsys.readouterr().out
    assert not left.value.code and (f"phi3-lora-plugin {version('phi3-lora-plugin')}" in said or "Usage: " in said)
