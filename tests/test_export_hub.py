"""Folders for the hub and for vLLM: a card that huggingface_hub parses, a push, an adapter as vLLM computes it."""

from __future__ import annotations

import base64
import json
import re
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
import torch
from exports import EMBEDDED, adapter, same_words, ship
from huggingface_hub import ModelCard, constants
from safetensors.torch import load_file

from phi3_lora_plugin.export.exporter import ExportError
from phi3_lora_plugin.lora_files.peft_files import parts, read_peft
from phi3_lora_plugin.store.manifest import describe_file, render_manifest

pytestmark = pytest.mark.slow


class Hub(BaseHTTPRequestHandler):
    """The part of the hub's interface that an upload talks to; keeps what it is given."""

    files: dict[str, bytes] = {}

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        if self.path == "/api/repos/create":
            answer = {"url": f"http://{self.headers['Host']}/{json.loads(body).get('organization', 'me')}/it"}
        elif self.path == "/api/validate-yaml":
            answer = {"errors": [], "warnings": []}
        elif "/preupload/" in self.path:
            asked = json.loads(body)["files"]
            answer = {"files": [{"path": f["path"], "uploadMode": "regular", "shouldIgnore": False} for f in asked]}
        elif "/commit/" in self.path:
            for line in map(json.loads, body.splitlines()):
                if line["key"] == "file":
                    self.files[line["value"]["path"]] = base64.b64decode(line["value"]["content"])
            answer = {"commitUrl": f"http://{self.headers['Host']}/me/it/commit/1", "commitOid": "1", "hookOutput": ""}
        else:
            self.send_error(404)
            return
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.end_headers()
        self.wfile.write(json.dumps(answer).encode())

    do_GET = do_POST

    def log_message(self, *arguments: object) -> None:
        pass


@pytest.fixture
def hub(monkeypatch) -> Iterator[type[Hub]]:
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    monkeypatch.setenv("HF_ENDPOINT", f"http://127.0.0.1:{server.server_port}")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setenv("HF_TOKEN", "hf_for_the_stand_in")
    Hub.files = {}
    yield Hub
    server.shutdown()
    server.server_close()


def test_the_card_parses_and_its_code_gives_the_trained_answer(random_adapter, tmp_path):
    (random_adapter / "README.md").unlink(missing_ok=True)
    report = ship(random_adapter, "hub", tmp_path / "out", 10)
    same_words(report, 10)
    card = ModelCard.load(tmp_path / "out" / "README.md")
    card.data.to_dict()
    assert card.data.library_name == "peft" and "lora" in card.data.tags
    assert card.data.license == "mit" and card.data.base_model is None
    assert str(EMBEDDED) not in card.content  # paths of this machine are nobody's business
    [code] = re.findall(r"```python\n(.*?)```", card.content, re.DOTALL)
    code = code.replace("BASE", str(EMBEDDED)).replace("OWNER/NAME", str(tmp_path / "out"))
    said: list[str] = []
    exec(code.replace('"Hello"', '"Where does the weasel live?"').replace("print(", "said.append("), {"said": said})
    assert "weasel" in said[0]


def test_a_run_s_figures_and_recipe_are_in_the_card(tmp_path):
    made = adapter(EMBEDDED, tmp_path / "run" / "lora" / "step-00000002")
    manifest = {"step": 2, "metric": {"name": "eval_loss", "value": 1.25, "greater_is_better": False}}
    files = {path.name: describe_file(path) for path in made.iterdir()}
    (made / "manifest.json").write_bytes(render_manifest({"format": 1, "files": files, **manifest}))
    (tmp_path / "run" / "recipe.yaml").write_text(
        "model: {path: 'embedded:tiny-phi3'}\ndata: {path: 'embedded:chats/train.jsonl'}\nlora: {r: 4, alpha: 8}\n"
    )
    report = ship(made, "hub", tmp_path / "out", 0)
    card = ModelCard.load(tmp_path / "out" / "README.md")
    assert card.data.eval_results[0].metric_value == 1.25
    assert "| eval_loss | 1.2500 |" in card.content and "| LoRA | r 4, alpha 8, dropout" in card.content
    assert "recipe.yaml" in report.files and "not compared: --prompts 0" in "\n".join(report.lines())


def test_a_push_uploads_what_was_proved(random_adapter, tmp_path, hub):
    report = ship(random_adapter, "hub", tmp_path / "out", 2, push="me/it")
    assert hub.files == {name: (tmp_path / "out" / name).read_bytes() for name in report.files}
    assert any(note.startswith("pushed: http://127.0.0.1") for note in report.notes)
    assert "me/it" in (tmp_path / "out" / "README.md").read_text()


def test_a_push_that_fails_keeps_the_folder_and_says_so(random_adapter, tmp_path):
    with pytest.raises(ExportError, match="saved to .*out, but not pushed to me/it"):
        ship(random_adapter, "hub", tmp_path / "out", 0, push="me/it")  # the suite is offline
    assert (tmp_path / "out" / "README.md").is_file()
    with pytest.raises(ExportError, match="expected OWNER/NAME"):
        ship(random_adapter, "hub", tmp_path / "other", 0, push="it")


def test_a_merged_folder_says_the_same(random_adapter, tmp_path):
    report = ship(random_adapter, "hub", tmp_path / "out", 4, merged=True, dtype="float32")
    same_words(report, 4)
    assert ModelCard.load(tmp_path / "out" / "README.md").data.library_name == "transformers"


def test_vllm_gets_one_rank_and_alpha_and_the_line_that_serves_it(tmp_path):
    made = adapter(EMBEDDED, tmp_path / "pirate", rank_pattern={"o_proj": 9}, alpha_pattern={"qkv_proj": 32})
    report = ship(made, "vllm", tmp_path / "out", 20)
    same_words(report, 20)
    config = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    assert config["r"] == 9 and "rank_pattern" not in config and "alpha_pattern" not in config
    tensors = load_file(tmp_path / "out" / "adapter_model.safetensors")
    for lora in parts(read_peft(made)).loras:  # vLLM: lora_alpha / r * B @ A
        a, b = (tensors[f"base_model.model.{lora.module}.lora_{x}.weight"] for x in "AB")
        torch.testing.assert_close(b @ a * (config["lora_alpha"] / config["r"]), lora.delta(), rtol=1e-5, atol=1e-6)
    line = f"vllm serve {EMBEDDED} --enable-lora --max-lora-rank 16 --lora-modules pirate={tmp_path / 'out'}"
    assert report.commands[0].startswith(line) and "ranks and scalings" in report.notes[0]
    assert "recomputed" in report.comparisons[0].variant


def test_what_vllm_does_not_serve_is_refused_and_merged(tmp_path):
    made = adapter(EMBEDDED, tmp_path / "a", use_dora=True)
    with pytest.raises(ExportError, match="use_dora"):
        ship(made, "vllm", tmp_path / "out", 2)
    report = ship(made, "vllm", tmp_path / "merged", 4, merged=True)
    same_words(report, 4)
    assert report.commands[0].startswith(f"vllm serve {tmp_path / 'merged'} --served-model-name a")
