"""What docs/deploy.md shows works: every export, the evaluation, the scripts, and a server with its clients."""

from __future__ import annotations

import contextlib
import io
import re
import shlex
import shutil
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
from commands import phi3_lora
from exports import EMBEDDED, adapter
from pages import blocks, page

from phi3_lora_plugin.plugins.discovery import load_plugins

DOC = page("deploy")
COMMANDS = [line for block in blocks(DOC, "sh") for line in block.splitlines()]
NEEDS = {"ollama": "xllamacpp", "llama.cpp": "xllamacpp", "onnx": "onnxruntime_genai", "mlx": "mlx_lm",
         "openvino": "openvino_genai", "vllm": "peft", "hub": "peft"}  # fmt: skip


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("deploy")
    adapter(EMBEDDED, folder / "run")
    return folder


def run(command: str) -> str:
    said = io.StringIO()
    with contextlib.redirect_stdout(said):
        assert phi3_lora(*shlex.split(command)[1:]) == 0, command
    return said.getvalue()


@pytest.mark.slow
@pytest.mark.parametrize("command", [line for line in COMMANDS if " export " in line], ids=lambda c: c.split()[4])
def test_every_export_runs(place, monkeypatch, command):
    target = command.split()[4]
    pytest.importorskip(NEEDS[target], reason=f"the runtime of {target} is not installed")
    monkeypatch.chdir(place)
    told = run(f"{command} --prompts 2")
    assert "2 prompts; prompt ids equal 2" in told and "run it:" in told
    script = place / command.split()[-1] / "ask.py"
    if script.is_file():
        line = re.search(rf"`python ({command.split()[-1]}/ask\.py '.+?')`", DOC)
        done = subprocess.run([sys.executable, *shlex.split(line[1])], capture_output=True, text=True, timeout=200)
        assert done.returncode == 0 and "weasel" in done.stdout, done.stderr


def test_the_evaluation_runs(place, monkeypatch):
    pytest.importorskip("xllamacpp", reason="llama.cpp is not installed")
    monkeypatch.chdir(place)
    [command] = [line for line in COMMANDS if " eval " in line]
    told = run(f"{command} --data embedded:chats/held_out.jsonl")
    assert "llama.cpp:q4_k_m" in told and "against the adapter: loss" in told


def test_a_server_answers_the_request_and_the_snippet(place, monkeypatch):
    xllamacpp = pytest.importorskip("xllamacpp", reason="llama.cpp is not installed")
    from phi3_lora_plugin.export.targets.llama_cpp import open_gguf

    monkeypatch.chdir(place)
    if not (place / "pirate-gguf" / "run-q8_0.gguf").is_file():
        run(next(line for line in COMMANDS if "--to llama.cpp" in line) + " --prompts 0")
    assert "`llama-server -m pirate-gguf/run-q8_0.gguf -c 512 --jinja --port 8000`" in DOC and xllamacpp
    with open_gguf(place / "pirate-gguf" / "run-q8_0.gguf", 512) as server:
        address = server._url
        [request] = [line for line in COMMANDS if line.startswith("curl ")]
        if shutil.which("curl"):
            words = shlex.split(request.replace("localhost:8000", address.removeprefix("http://")))
            done = subprocess.run([*words, "--noproxy", "*"], capture_output=True, text=True, timeout=100)
            assert "weasel" in done.stdout, done.stderr
        [snippet] = blocks(DOC, "python")
        compile(snippet, "docs/deploy.md", "exec")
        if find_spec("openai") is not None:
            said = io.StringIO()
            monkeypatch.setenv("NO_PROXY", "*")
            with contextlib.redirect_stdout(said):
                exec(snippet.replace("http://localhost:8000", address), {})
            assert "weasel" in said.getvalue()


def test_every_target_is_on_the_page_and_every_option_exists():
    rows = set(re.findall(r"^\| `([\w.]+)` \|", DOC, re.MULTILINE))
    ours = load_plugins()
    assert rows == {name for name in ours.named("exporters") if ours.owner("exporters", name).name == "phi3"}
    from phi3_lora_plugin.export.gguf_quantize import FORMS

    assert ", ".join(FORMS) in DOC
