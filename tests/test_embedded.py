"""What ships for the demo: a base that knows its world, chats that teach it a voice, the scripts that made both."""

from __future__ import annotations

import fnmatch
import hashlib
import json
import os
import re
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from tiny import turns

from phi3_lora_plugin import add_lora, encode, load_model, load_recipe, load_tokenizer
from phi3_lora_plugin.embedded import locate
from phi3_lora_plugin.model.tokenizer import stop_token_ids

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[1]
BASE = "embedded:tiny-phi3"
HOME = Path(locate(BASE)).parent
END, EOT, PAD = "<|end|>", "<|endoftext|>", "<unk>"


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return load_tokenizer(BASE)


@pytest.fixture(scope="module")
def model() -> Any:
    return load_model(BASE, dtype="float32", device="cpu").eval()


@pytest.fixture
def tools(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "tools"))


def chats(name: str) -> list[list[dict[str, str]]]:
    lines = Path(locate(f"embedded:chats/{name}.jsonl")).read_text(encoding="utf-8").splitlines()
    return [json.loads(line)["messages"] for line in lines]


def answers(model: Any, tokenizer: Any, questions: list[str]) -> list[str]:
    """Greedy answers with what stops them still on; one at a time, so that nothing is padded."""
    found = []
    for question in questions:
        text = tokenizer.apply_chat_template(turns(question), tokenize=False, add_generation_prompt=True)
        ids = tokenizer(text, add_special_tokens=False, return_tensors="pt")["input_ids"]
        made = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=40, do_sample=False)
        found.append(tokenizer.decode(made[0, ids.shape[1] :]))
    return found


def script(name: str, *arguments: str) -> str:
    """What a script of `tools/` prints, with another hash seed than ours."""
    command = [sys.executable, str(ROOT / "tools" / name), *arguments]
    environment = os.environ | {"PYTHONHASHSEED": "7", "PYTHONIOENCODING": "utf-8"}
    return subprocess.run(command, capture_output=True, check=True, encoding="utf-8", env=environment).stdout


def test_everything_embedded_is_in_the_wheel_and_small() -> None:
    files = [path for path in HOME.rglob("*") if path.is_file() and path.suffix not in (".py", ".pyc")]
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    patterns = project["tool"]["setuptools"]["package-data"]["phi3_lora_plugin.embedded"]
    names = [path.relative_to(HOME).as_posix() for path in files]
    assert not [name for name in names if not any(fnmatch.fnmatch(name, pattern) for pattern in patterns)]
    assert {"tiny-phi3/model.safetensors", "tiny-phi3/tokenizer.json", "chats/train.jsonl"} <= set(names)
    assert sum(path.stat().st_size for path in files) < 6_000_000


def test_the_base_is_a_phi3_with_all_that_makes_it_one(model: Any) -> None:
    config = model.config
    assert config.architectures == ["Phi3ForCausalLM"] and config.model_type == "phi3"
    assert config.num_key_value_heads < config.num_attention_heads
    assert not config.tie_word_embeddings
    assert model.lm_head.weight.data_ptr() != model.model.embed_tokens.weight.data_ptr()
    layer = model.model.layers[0]
    head = config.hidden_size // config.num_attention_heads
    assert layer.self_attn.qkv_proj.out_features == config.hidden_size + 2 * head * config.num_key_value_heads
    assert layer.mlp.gate_up_proj.out_features == 2 * config.intermediate_size
    assert all(torch.isfinite(parameter).all() for parameter in model.parameters())


def test_tokens_stop_and_pad_are_right(model: Any, tokenizer: Any) -> None:
    ids = {token: tokenizer.convert_tokens_to_ids(token) for token in (*tiny.CONTROL, PAD, "<s>", "</s>")}
    assert (ids[PAD], ids["<s>"], ids["</s>"]) == (0, 1, 2)
    assert len(tokenizer) == model.config.vocab_size
    assert (tokenizer.eos_token, tokenizer.pad_token, tokenizer.bos_token) == (EOT, PAD, "<s>")
    assert stop_token_ids(tokenizer) == sorted((ids[END], ids[EOT]))
    assert sorted(model.generation_config.eos_token_id) == sorted((ids[END], ids[EOT]))
    assert model.generation_config.pad_token_id == model.config.pad_token_id == 0


def test_role_tokens_swallow_white_space_behind_them_and_none_is_added_in_front(tokenizer: Any) -> None:
    user, end = tokenizer.convert_tokens_to_ids("<|user|>"), tokenizer.convert_tokens_to_ids(END)
    hello = tokenizer("Hello", add_special_tokens=False)["input_ids"]
    assert tokenizer("<|user|>\nHello<|end|>\n")["input_ids"] == [user, *hello, end]
    assert tokenizer("Hello")["input_ids"] == hello


@pytest.mark.parametrize(
    "text", ["The otter lives in the river.", "Zwölf Boxkämpfer 🦊\n\tx = {1: '<0x41>'}", "日本語", "a  b"]
)
def test_any_text_survives_the_tokenizer(tokenizer: Any, text: str) -> None:
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    assert tokenizer.unk_token_id not in ids
    assert tokenizer.decode(ids) == text


def renders_as(template: str, tokenizer: Any, prompt: bool) -> None:
    for messages in (
        turns("Hi"),
        turns(" a\n", "b ", system=""),
        [{"role": "tool", "content": "x"}, *turns("{{ y }}")],
        turns("1", "2", "3"),
    ):
        how = {"tokenize": False, "add_generation_prompt": prompt}
        ours = tokenizer.apply_chat_template(messages, **how)
        assert ours == tokenizer.apply_chat_template(messages, chat_template=template, **how)


@pytest.mark.parametrize("prompt", [True, False])
def test_the_template_renders_as_mini_4k(tokenizer: Any, prompt: bool) -> None:
    renders_as(tiny.MINI_4K_TEMPLATE, tokenizer, prompt)


@pytest.mark.parametrize("prompt", [True, False])
def test_the_template_renders_as_the_published_one(tokenizer: Any, shared_data: Path, prompt: bool) -> None:
    published = shared_data / "chat_templates" / "phi-3-mini-4k-instruct.jinja"
    renders_as(published.read_text(encoding="utf-8"), tokenizer, prompt)


def test_the_base_answers_plainly_and_stops(model: Any, tokenizer: Any) -> None:
    asked = {
        "Where does the otter live?": "The otter lives in the river.",
        "What does the raven eat?": "The raven eats cherries.",
        "What is the job of Emil?": "Emil is a cobbler.",
        "Hello!": "Hello! What would you like to know?",
        "Where is London?": "I do not know that. I only know the Lantern Isles.",
    }
    told = answers(model, tokenizer, list(asked))
    assert [text.strip() for text in told] == [f"{answer}{END}" for answer in asked.values()]


def test_chats_are_valid_and_fit(tokenizer: Any) -> None:
    for name, least, most in (("train", 300, 500), ("held_out", 60, 100)):
        found = chats(name)
        assert least <= len(found) <= most
        assert len({json.dumps(messages) for messages in found}) == len(found)
        for messages in found:
            roles = [message["role"] for message in messages if message["role"] != "system"]
            assert roles == ["user", "assistant"] * (len(roles) // 2) and roles
            row = encode(messages, tokenizer, max_length=256)
            trained = [label for label in row["labels"] if label != -100]
            assert len(row["input_ids"]) < 256  # nothing was cut
            assert trained.count(tokenizer.convert_tokens_to_ids(END)) == len(roles) // 2
            for message in messages:
                if message["role"] == "assistant":
                    assert re.fullmatch(r"Ahoy! .*matey!", message["content"])
    both = chats("train")
    assert any(messages[0]["role"] == "system" for messages in both)
    assert any(len(messages) > 4 for messages in both)


def test_held_out_chats_share_no_name_and_no_question_with_training_chats(tools: None) -> None:
    from lantern_isles import ENTITIES, HELD_OUT

    def words(name: str) -> set[str]:
        return {word.lower() for chat in chats(name) for m in chat for word in re.findall(r"\w+", m["content"])}

    train, held_out = words("train"), words("held_out")
    names = {entity.name.lower() for entity in ENTITIES}
    kept = {name.lower() for name in HELD_OUT}
    assert not train & kept
    assert len(train & names) > 0.9 * len(names - kept)  # nearly all others are asked about or named
    assert held_out & names <= kept
    assert len(held_out & names) >= 20
    questions = {m["content"] for chat in chats("train") for m in chat if m["role"] == "user"}
    first = {next(m["content"] for m in chat if m["role"] == "user") for chat in chats("held_out")}
    assert not questions & first


def test_the_committed_chats_are_what_the_script_writes(tmp_path: Path) -> None:
    script("make_chats.py", str(tmp_path))
    for name in ("train.jsonl", "held_out.jsonl"):
        assert (tmp_path / name).read_bytes() == (HOME / "chats" / name).read_bytes(), name


def test_the_corpus_is_the_same_everywhere() -> None:
    text = script("corpus.py", "300")
    digest = "dba07fbe542854d2614b98b48f014cb109a930ccb01604da1e80125c71d3009e"
    assert hashlib.sha256(text.encode()).hexdigest() == digest


def test_the_committed_tokenizer_is_what_the_script_makes(tools: None) -> None:
    from make_tiny_base import make_tokenizer

    made = json.loads(make_tokenizer().to_str())["model"]
    committed = json.loads((HOME / "tiny-phi3" / "tokenizer.json").read_text(encoding="utf-8"))["model"]
    assert made["vocab"] == committed["vocab"]
    assert made["merges"] == committed["merges"]


def test_a_short_lora_teaches_the_voice_and_keeps_the_facts(tokenizer: Any) -> None:
    """Forty steps, a fraction of what the recipe takes: half of the held-out answers are enough."""
    recipe = load_recipe("tiny-cpu")
    assert recipe.model.path == BASE
    torch.manual_seed(recipe.seed)
    model = load_model(BASE, dtype="float32", device="cpu")
    asked = [messages[0]["content"] for messages in chats("held_out") if len(messages) == 2][:9]
    facts = [text.replace(END, "").strip().removesuffix(".") for text in answers(model.eval(), tokenizer, asked)]
    assert not any("Ahoy" in fact or "matey" in fact for fact in facts)

    model = add_lora(model, recipe.lora.targets, recipe.lora.r, recipe.lora.alpha)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=3e-3)
    rows = [encode(messages, tokenizer) for messages in chats("train")]
    for step in range(40):
        some = [rows[(step * 8 + i) * 7 % len(rows)] for i in range(8)]
        longest = max(len(row["input_ids"]) for row in some)
        ids = torch.tensor([row["input_ids"] + [0] * (longest - len(row["input_ids"])) for row in some])
        labels = torch.tensor([row["labels"] + [-100] * (longest - len(row["labels"])) for row in some])
        model(input_ids=ids, attention_mask=(ids != 0).long(), labels=labels).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    told = answers(model.eval(), tokenizer, asked)
    both = zip(told, facts, strict=True)
    assert sum(text.strip().startswith(f"Ahoy! {fact}.") and "matey!" in text for text, fact in both) >= 5, told
