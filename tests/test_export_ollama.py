"""Ollama: every template's Go twin renders as Jinja does, by Go itself where it is; the Modelfile is one it reads."""

from __future__ import annotations

import hashlib
import json
import shutil
import subprocess
from pathlib import Path

import pytest
from exports import EMBEDDED, adapter, same_words, ship

from phi3_lora_plugin.chat.templates import TEMPLATES, Template, render, template_for
from phi3_lora_plugin.export.exporter import ExportError
from phi3_lora_plugin.export.go_template import GoTemplateError, go_template, render_go
from phi3_lora_plugin.export.targets.ollama import read_modelfile

pytestmark = pytest.mark.slow

TOKENS = {"bos_token": "<s>", "eos_token": "<|endoftext|>"}
HERE = Path(__file__).parent
RECORDED = HERE / "go_renders.json"  # what Go gave; `python tests/test_export_ollama.py` asks it again


def turn(role: str, content: str) -> dict[str, str]:
    return {"role": role, "content": content}


CHATS = [
    [turn("user", "Where does the otter live?")],
    [turn("system", "Speak like a sailor."), turn("user", " spaces \n\n and lines\n")],
    [turn("system", ""), turn("user", 'quotes "\' `x` {{ .Role }} {% if %} \\n <b>&amp;</b>')],
    [turn("user", "u"), turn("assistant", "\n a \n"), turn("user", "größer 😀 \u2028 tab\t.")],
    [turn("system", "s"), turn("user", "u"), turn("assistant", "a"), turn("user", "v"), turn("assistant", "b"),
     turn("user", "")],
    [turn("user", "u"), turn("system", "in the middle"), turn("assistant", "a"), turn("user", "v")],
    [turn("system", "one"), turn("system", "two"), turn("user", "u"), turn("assistant", "a"), turn("user", "v")],
    [turn("user", "u"), turn("assistant", "a")],
]  # fmt: skip
USABLE = [template for template in TEMPLATES.values() if not template.refused]
CASES = [(template, "error") for template in USABLE]
CASES += [(template, "fold") for template in USABLE if not template.system]
NAMES = [f"{template.name}-{system}" for template, system in CASES]


def folded(chat: list[dict[str, str]]) -> list[dict[str, str]]:
    """System text before the first user turn's own, as training does it under `data.system: fold`."""
    texts = [message["content"] for message in chat if message["role"] == "system" and message["content"]]
    others = [dict(message) for message in chat if message["role"] != "system"]
    first = next(message for message in others if message["role"] == "user")
    first["content"] = "\n\n".join([*texts, first["content"]])
    return others


def by_jinja(template: Template, system: str, chats: list) -> list[str]:
    chats = [folded(chat) for chat in chats] if system == "fold" else chats
    return render(template.text, chats, TOKENS, add_generation_prompt=True)[0]


def by_go(requests: list[dict]) -> list[str]:
    if shutil.which("go") is None:
        pytest.skip("Go is not installed: apt-get install golang-go")
    done = subprocess.run(
        ["go", "run", str(HERE / "go_render" / "main.go")], input=json.dumps(requests), capture_output=True, text=True,
        timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def requests_of(template: Template, system: str, chats: list) -> list[dict]:
    text = go_template(template, TOKENS, system)
    return [{"template": text, "messages": chat} for chat in chats]


def fingerprint(requests: list[dict]) -> str:
    return hashlib.sha256(json.dumps(requests, sort_keys=True).encode()).hexdigest()


@pytest.mark.parametrize(("template", "system"), CASES, ids=NAMES)
def test_the_twin_renders_as_the_jinja_template(template, system):
    text = go_template(template, TOKENS, system)
    assert [render_go(text, chat) for chat in CHATS] == by_jinja(template, system, CHATS)


@pytest.mark.parametrize(("template", "system"), CASES, ids=NAMES)
def test_our_renderer_gives_what_go_gave(template, system):
    requests = requests_of(template, system, CHATS)
    recorded = json.loads(RECORDED.read_text(encoding="utf-8"))[f"{template.name}-{system}"]
    assert recorded["of"] == fingerprint(requests), "a template or chat changed: python tests/test_export_ollama.py"
    assert [render_go(request["template"], request["messages"]) for request in requests] == recorded["texts"]


def test_go_itself_gives_what_is_recorded():
    every = {name: requests_of(*case, CHATS) for name, case in zip(NAMES, CASES, strict=True)}
    texts = by_go([request for requests in every.values() for request in requests])
    recorded = json.loads(RECORDED.read_text(encoding="utf-8"))
    assert texts == [text for name in NAMES for text in recorded[name]["texts"]]


def test_tools_and_a_preamble_by_go(tmp_path):
    from dataclasses import replace

    mini = go_template(TEMPLATES["phi-4-mini"], TOKENS)
    tools = [{"function": {"name": "tide", "parameters": {"port": "text"}}, "type": "function"}]
    chats = [[turn("system", "s"), turn("user", "u")], [turn("user", "u")]]
    made = by_go([{"template": mini, "messages": chat, "tools": tools} for chat in chats])
    assert made == [render_go(mini, chat, tools) for chat in chats]
    declared = f"<|tool|>{json.dumps(tools, separators=(',', ':'))}<|/tool|>"
    assert made[0].startswith(f"<|system|>s{declared}<|end|>") and made[1].startswith(f"<|system|>{declared}<|end|>")
    long = replace(TEMPLATES["phi-4"], name="phi-4 with a preamble", preamble='Say "why"\nfirst: <|im_start|>')
    text = go_template(long, TOKENS)
    rendered = [render_go(text, chats[1])]
    assert by_go([{"template": text, "messages": chats[1]}]) == by_jinja(long, "error", chats[1:]) == rendered


@pytest.mark.parametrize("name", ["functools", "phi4-mini"])
def test_calls_of_earlier_turns_by_go(name, shared_data):
    from phi3_lora_plugin import encode, load_tokenizer
    from phi3_lora_plugin.chat.tool_formats import TOOL_FORMATS

    mini = go_template(TEMPLATES["phi-4-mini"], TOKENS, calls=TOOL_FORMATS[name])
    calls = [{"function": {"name": "tide", "arguments": arguments}} for arguments in ({"at": [1, "ü"], "port": {}}, {})]
    chats = [[turn("user", "u"), turn("assistant", said) | {"tool_calls": calls[:count]}, turn("tool", "3")]
             for said, count in (("", 1), ("I look.", 2))]  # fmt: skip
    made = by_go([{"template": mini, "messages": chat} for chat in chats])
    assert made == [render_go(mini, chat) for chat in chats]
    tokenizer = load_tokenizer(shared_data / "tokenizers" / "phi-4-mini")
    for chat, text in zip(chats, made, strict=True):
        row = encode([*chat, turn("assistant", "a")], tokenizer, tool_format=name)
        trained = tokenizer.decode(row["input_ids"]).partition("a<|end|><|endoftext|>")[0]
        # Go writes the JSON of arguments without blanks; the rest is the same byte by byte.
        spaced = trained.replace('{"at": [1, "ü"], "port": {}}', '{"at":[1,"ü"],"port":{}}')
        assert text == (spaced if name == "functools" else trained)


def test_published_conversations_give_the_ids_of_training(shared_data):
    from tokenizers import Tokenizer

    backends: dict[Path, Tokenizer] = {}
    rows = json.loads((shared_data / "chat_templates" / "expected_renders.json").read_text(encoding="utf-8"))
    seen = 0
    for row in rows:
        file = shared_data / "chat_templates" / Path(row.get("template_file") or "none").name
        published = row.get("template") or (file.read_text(encoding="utf-8") if file.is_file() else None)
        if published is None:  # Ollama's own cases, which are of Phi-3-mini
            published = (shared_data / "chat_templates" / "phi-3-mini-4k-instruct.jinja").read_text(encoding="utf-8")

        class Published:
            chat_template, unk_token_id = published, None
            eos_token = "<|endoftext|>"

            def get_added_vocab(self):
                return {"<|end|>": 1, "<|im_end|>": 2}

            def convert_tokens_to_ids(self, token):
                return 1

        try:
            template = template_for(Published())
        except ValueError:  # Phi-3-small and -vision, which are refused, and early templates
            continue
        chat = [dict(message) for message in row["messages"]]
        for message in chat:  # a declaration as text, which Ollama would send as its own JSON
            if tools := message.pop("tools", None):
                message["content"] += f"<|tool|>{tools}<|/tool|>"
        tokens = {} if "template" in row else TOKENS  # llama.cpp's cases were rendered without a begin token
        text = render_go(go_template(template, tokens), chat)
        assert text == row["hf_jinja_render"]
        folder = shared_data / "tokenizers" / Path(row.get("tokenizer_dir") or "phi-3-mini-4k-instruct").name
        if (folder / "tokenizer.json").is_file():
            backend = backends.get(folder) or Tokenizer.from_file(str(folder / "tokenizer.json"))
            backends[folder] = backend
            ids = backend.encode(text, add_special_tokens=False).ids
            assert ids == (row.get("ids") or backend.encode(row["hf_jinja_render"], add_special_tokens=False).ids)
        seen += 1
    assert seen >= 12


def test_the_modelfile_says_it_all_and_the_model_says_the_same(tmp_path):
    pytest.importorskip("xllamacpp", reason='llama.cpp is not installed: pip install "phi3-lora-plugin[ollama]"')
    made = adapter(EMBEDDED, tmp_path / "Pirate Talk")
    report = ship(made, "ollama", tmp_path / "out", 20, system='Speak "plainly".', dtype="float32")
    same_words(report, 20)
    lines = read_modelfile((tmp_path / "out" / "Modelfile").read_text(encoding="utf-8"))
    told = {word: [argument for one, argument in lines if one == word] for word, _ in lines}
    assert told["FROM"] == ["./Pirate-Talk-f32.gguf"] and (tmp_path / "out" / told["FROM"][0]).is_file()
    assert told["SYSTEM"] == ['Speak "plainly".']
    assert told["PARAMETER"] == ['stop "<|endoftext|>"', 'stop "<|end|>"', "num_ctx 512"]
    assert told["TEMPLATE"] == [go_template(TEMPLATES["phi-3-mini-4k"], TOKENS)]
    assert report.commands[0] == f"ollama create pirate-talk -f {tmp_path / 'out'}/Modelfile"


def test_what_ollama_does_not_take_is_refused(tmp_path):
    made = adapter(EMBEDDED, tmp_path / "a")
    for options, message in (
        ({"merged": False}, r"take no ADAPTER \(ollama#14969\)"),
        ({"quantize": ("q8_0", "q4_k_m")}, "names one file"),
        ({"system": 'a """ b', "prove": False}, "which a Modelfile cannot hold"),
    ):
        with pytest.raises(ExportError, match=message):
            ship(made, "ollama", tmp_path / "out", 2, **options)
    assert not (tmp_path / "out").exists()


def test_a_modelfile_or_a_template_that_is_not_one_is_told():
    with pytest.raises(ExportError, match="cannot be read"):
        read_modelfile('FROM ./x\nTEMPLATE """never ends')
    with pytest.raises(GoTemplateError, match="without its end"):
        render_go("{{ if .System }}x", [])
    with pytest.raises(GoTemplateError, match="not understood here"):
        render_go("{{ printf .System }}", [])
    with pytest.raises(GoTemplateError, match="has no twin"):
        go_template(TEMPLATES["phi-3-small"], TOKENS)


if __name__ == "__main__":
    every = {name: requests_of(*case, CHATS) for name, case in zip(NAMES, CASES, strict=True)}
    found = {name: {"of": fingerprint(asked), "texts": by_go(asked)} for name, asked in every.items()}
    RECORDED.write_text(json.dumps(found, indent=1) + "\n")
