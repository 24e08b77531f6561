"""Tiny real models and tokenizers, built in milliseconds, that every test can ask for."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, trainers
from transformers import Phi3Config, Phi3ForCausalLM, PhimoeConfig, PhimoeForCausalLM, PreTrainedTokenizerFast

CONTROL = ["<|endoftext|>", "<|assistant|>", "<|system|>", "<|end|>", "<|user|>"]

# Renders as the mini-4k template that Microsoft publishes, which is what our own table has to recognise.
MINI_4K_TEMPLATE = (
    "{% for message in messages %}"
    "{% if message['role'] == 'system' %}{{'<|system|>\n' + message['content'] + '<|end|>\n'}}"
    "{% elif message['role'] == 'user' %}{{'<|user|>\n' + message['content'] + '<|end|>\n'}}"
    "{% elif message['role'] == 'assistant' %}{{'<|assistant|>\n' + message['content'] + '<|end|>\n'}}{% endif %}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% else %}{{ eos_token }}{% endif %}"
)

# As medium's, which has no place for system messages.
MEDIUM_TEMPLATE = (
    "{% for message in messages %}{% if (message['role'] == 'user') %}{{'<|user|>' + '\n' + message['content'] + "
    "'<|end|>' + '\n' + '<|assistant|>' + '\n'}}{% elif (message['role'] == 'assistant') %}"
    "{{message['content'] + '<|end|>' + '\n'}}{% endif %}{% endfor %}"
)

#: Changes of `config`: longrope, whose long factors begin behind 32 positions.
LONGROPE: dict[str, Any] = {
    "max_position_embeddings": 256,
    "original_max_position_embeddings": 32,
    "rope_parameters": {
        "rope_type": "longrope",
        "rope_theta": 10000.0,
        "partial_rotary_factor": 1.0,
        "short_factor": [1.0, 1.1, 1.2, 1.3],
        "long_factor": [2.0, 3.0, 4.0, 5.0],
        "original_max_position_embeddings": 32,
    },
}

_TEXT = [
    "the quick brown fox jumps over the lazy dog",
    "what is the capital of france? the capital of france is paris.",
    "how many apples are there? there are three apples in the basket.",
    "hello, how are you today? i am fine, thank you. and you?",
]


def config(**changes: Any) -> Phi3Config:
    """A Phi-3 of two layers; 4 heads and, unless changed, 4 key-value heads (``num_key_value_heads=2`` is GQA)."""
    settings: dict[str, Any] = dict(
        vocab_size=512,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=4,
        max_position_embeddings=256,
        original_max_position_embeddings=256,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=0,
        attn_implementation="sdpa",
    )
    if "rope_parameters" in changes and not hasattr(Phi3Config(), "rope_parameters"):  # transformers before 5
        rope = changes.pop("rope_parameters")
        settings |= {name: rope[name] for name in ("rope_theta", "partial_rotary_factor") if name in rope}
        if rope["rope_type"] == "longrope":
            factors = {name: rope[name] for name in ("short_factor", "long_factor")}
            settings["rope_scaling"] = {"type": "longrope", **factors}
    return Phi3Config(**(settings | changes))


def turns(*texts: str, system: str | None = None) -> list[dict[str, Any]]:
    """What user and assistant say in turn, as canonical messages."""
    said = [{"role": ("user", "assistant")[number % 2], "content": text} for number, text in enumerate(texts)]
    return said if system is None else [{"role": "system", "content": system}, *said]


def chat(question: str, answer: str = "paris.", **first: Any) -> dict[str, Any]:
    """A row of a question, with other keys where there are, and its answer."""
    asked, said = turns(question, answer)
    return {"messages": [asked | first, said]}


def write(path: Path, rows: Iterable[Any]) -> Path:
    """Write rows as lines of JSON; a text is a line as it stands."""
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = [row if isinstance(row, str) else json.dumps(row) for row in rows]
    path.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
    return path


def edit(path: Path, **changes: object) -> None:
    """Change values of a JSON file."""
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def model(seed: int = 0, **changes: Any) -> Phi3ForCausalLM:
    """A random model of `config(**changes)`, always the same for one seed."""
    torch.manual_seed(seed)
    return Phi3ForCausalLM(config(**changes)).eval()


def moe(seed: int = 0, **changes: Any) -> PhimoeForCausalLM:
    """A random PhiMoE of two layers, with 4 experts, GQA, and biases of attention and head as in published configs."""
    settings: dict[str, Any] = dict(
        vocab_size=512,
        hidden_size=32,
        intermediate_size=16,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        num_local_experts=4,
        num_experts_per_tok=2,
        attention_bias=True,
        lm_head_bias=True,
        max_position_embeddings=256,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=0,
    )
    torch.manual_seed(seed)
    return PhimoeForCausalLM(PhimoeConfig(**(settings | changes))).eval()


def tokenizer(rstrip: bool = True, template: str | None = MINI_4K_TEMPLATE) -> PreTrainedTokenizerFast:
    """A Llama-style byte-fallback BPE of about 400 pieces with Phi-3's control tokens.

    `rstrip` says whether role tokens swallow the white space behind them, which differs between published revisions.
    """
    backend = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    backend.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    special = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    backend.train_from_iterator(_TEXT, trainers.BpeTrainer(vocab_size=400, special_tokens=special, show_progress=False))
    # Trained as "special tokens" only to get ids; byte pieces must not be found in text as literal strings.
    state = json.loads(backend.to_str())
    state["added_tokens"] = [token for token in state["added_tokens"] if token["id"] < 3]
    backend = Tokenizer.from_str(json.dumps(state))
    backend.add_special_tokens([AddedToken("<|endoftext|>", normalized=False)])
    backend.add_special_tokens([AddedToken(text, rstrip=rstrip, normalized=False) for text in CONTROL[1:]])
    built = PreTrainedTokenizerFast(
        tokenizer_object=backend,
        unk_token="<unk>",
        bos_token="<s>",
        eos_token="<|endoftext|>",
        pad_token="<|endoftext|>",
        model_max_length=256,
        padding_side="left",
    )
    built.chat_template = template
    return built


def base(folder: Path, rstrip: bool = True, **changes: Any) -> Path:
    """Save a tiny model and its tokenizer into `folder`, as a hub repository would hold them; return `folder`."""
    words = tokenizer(rstrip=rstrip)
    eos = words.convert_tokens_to_ids("<|endoftext|>")
    model(**({"eos_token_id": eos, "pad_token_id": eos} | changes)).save_pretrained(folder)
    words.save_pretrained(folder)
    return folder
